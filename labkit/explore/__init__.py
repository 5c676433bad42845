"""Many runs of one guest: engines compared with each other, and what hostile hosts make of one."""

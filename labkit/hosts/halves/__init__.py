"""What the host halves of the kernel's selftests do, beyond expecting ucalls.

Before a guest runs, between what it says, and about its exits. Layouts and numbers are those of the
C sources in tools/testing/selftests/kvm of Linux 6.12.
"""

"""Looking at and running guests: stepping, listings, snapshots for people, schedules to an end."""

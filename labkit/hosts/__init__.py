"""Who drives a VM from outside: the buttons of a view, hosted selftests."""

"""One VM while it runs: made, run, stepped, its events, names for its addresses, its state."""

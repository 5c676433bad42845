"""Guests: programs for a VM, how they are compiled, and the library they are compiled with."""

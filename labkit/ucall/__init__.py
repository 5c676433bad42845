"""Ucalls: what a guest says to its host, and the pool of slots it says it in."""

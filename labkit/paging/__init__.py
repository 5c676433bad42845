"""Page tables of every format: walk one address, scan them all, build them, compare them."""

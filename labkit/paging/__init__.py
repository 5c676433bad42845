"""Page tables: walk one address, scan them all, build them, compare them. One reader for every format."""

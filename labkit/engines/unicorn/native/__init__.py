"""libunicorn itself: its functions, its offsets, hooks in machine code and the words they share."""

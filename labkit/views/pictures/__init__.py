"""The pictures: each takes facts and a width and gives one SVG, and the key that goes under it."""

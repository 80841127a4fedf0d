"""A loss or divergence of one's own: found by its name, called, and written in plain torch, for verify and bench."""

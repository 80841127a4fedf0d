"""The problems of `fastreward verify`, one file per operation."""

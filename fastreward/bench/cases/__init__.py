"""The cases of `fastreward bench`, one file per operation."""

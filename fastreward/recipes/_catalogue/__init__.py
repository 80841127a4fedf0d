"""The catalogue of recipes: what is in it, how it is listed, explained and tried."""

"""Shared parts of recipes of several families: options and trees."""

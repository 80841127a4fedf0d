"""Recipes of rewards and credit in plain loops over lists, from the formula pages: what they are compared with."""

"""What credit looks like: advantages per token as a picture, as a page to look through, and the gallery of schemes."""

"""Arguments of the public operations: checks, arrays in and out, tokens and masks, groups."""

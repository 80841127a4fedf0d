"""Shared by the loss operations: the arguments of a call, the custom op, results."""

"""What the loss operations share: the arguments of a call, the custom op, results."""

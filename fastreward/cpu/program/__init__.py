"""Programs of the loss language on the CPU."""

from fastreward.cpu.program.run import broadcast_to_tokens, run, scale, threshold

__all__ = ["broadcast_to_tokens", "run", "scale", "threshold"]

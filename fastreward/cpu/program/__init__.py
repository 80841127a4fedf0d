"""Programs of the loss language on the CPU."""

from fastreward.cpu.program.run import broadcast_to_tokens, run, scale

__all__ = ["broadcast_to_tokens", "run", "scale"]

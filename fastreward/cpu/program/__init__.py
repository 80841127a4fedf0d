"""Programs of the loss language on the CPU."""

from fastreward.cpu.program.run import run, scale, spread

__all__ = ["run", "scale", "spread"]

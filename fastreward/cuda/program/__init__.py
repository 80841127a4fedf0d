"""Programs of the loss language in CUDA C++."""

from fastreward.cuda.program.run import run, scale, spread

__all__ = ["run", "scale", "spread"]

"""Programs of the loss language in CUDA C++."""

from fastreward._runtime.selection import threshold
from fastreward.cuda.program.run import broadcast_to_tokens, run, scale

__all__ = ["broadcast_to_tokens", "run", "scale", "threshold"]

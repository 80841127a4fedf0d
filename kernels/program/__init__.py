"""Programs of the loss language in Triton.

Raw functions: `run`; `scale` and `spread`, the backward of what it saved. `source` is the text of a program's kernels.
"""

from .run import run, scale, source, spread

__all__ = ["run", "scale", "source", "spread"]

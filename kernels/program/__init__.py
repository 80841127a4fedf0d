"""Programs of the loss language in Triton.

Raw functions: `run`; `threshold`, of the values that a loss selects tokens by, with torch's sort; `scale` and
`broadcast_to_tokens`, the backward of what `run` saved. `source` is the text of a program's kernels.
"""

from fastreward._runtime.selection import threshold

from .run import broadcast_to_tokens, run, scale, source

__all__ = ["broadcast_to_tokens", "run", "scale", "source", "threshold"]

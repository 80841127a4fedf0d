"""Programs of the loss language in Triton.

Raw functions: `run`; `scale` and `broadcast_to_tokens`, the backward of what it saved. `source` is the text of a
program's kernels.
"""

from .run import broadcast_to_tokens, run, scale, source

__all__ = ["broadcast_to_tokens", "run", "scale", "source"]

"""Log-probs and the other per-token statistics of rows of logits in Triton.

Raw functions: `forward` and `backward`; `accumulate` and `finish` for a vocabulary in slices.
"""

from .backward import backward
from .forward import accumulate, finish, forward

__all__ = ["accumulate", "backward", "finish", "forward"]

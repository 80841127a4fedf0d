"""Log-probs and the other per-token statistics of rows of logits in Triton.

Raw functions: `forward` and `backward`; `fold` and `finish` for a vocabulary in slices.
"""

from .backward import backward
from .forward import finish, fold, forward

__all__ = ["backward", "finish", "fold", "forward"]

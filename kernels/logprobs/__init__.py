"""Log-probs and the other per-token statistics of rows of logits in Triton: forward.py, backward.py."""

from .backward import backward
from .forward import finish, fold, forward

__all__ = ["backward", "finish", "fold", "forward"]

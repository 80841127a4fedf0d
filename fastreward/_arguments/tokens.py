"""The tokens of a call: padded or packed, and which of them count."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class Tokens:
    """shape: [B, T], or [N] where packed with cu_seqlens i64 [B + 1]. mask: of that shape; None: all count."""

    shape: tuple[int, ...]
    mask: Tensor | None = None
    cu_seqlens: Tensor | None = None

    @property
    def rows(self) -> int:
        """Sequences."""
        return self.shape[0] if self.cu_seqlens is None else self.cu_seqlens.shape[0] - 1

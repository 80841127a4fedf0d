"""The tokens of a call: padded or packed, and which of them count."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fastreward._arguments import check

#: About as many as a GPU has multiprocessors: with fewer rows most of it has nothing to do.
FEW_ROWS = 128
#: Blocks of a long row on average: what takes longer one after the other than a few launches do (estimated).
LONG_ROW = 16


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

    def broadcast(self, x: Tensor) -> Tensor:
        """Values per sequence [B] in the tokens' shape."""
        return broadcast_to_tokens(x, self.shape, self.cu_seqlens)


def few_and_long(tokens: Tokens, block: int) -> bool:
    """Whether a program per row would leave a GPU idle: by shapes alone, as the host does not know packed lengths.

    From both sides of it a call has the same bits.
    """
    rows, count = tokens.rows, math.prod(tokens.shape)
    return rows <= FEW_ROWS and count >= rows * LONG_ROW * block


def broadcast_to_tokens(x: Tensor, shape: tuple[int, ...] | torch.Size, cu_seqlens: Tensor | None) -> Tensor:
    """Values per sequence [B] in the tokens' shape [B, T], or [N] where packed."""
    if cu_seqlens is None:
        return x.unsqueeze(-1).expand(shape)
    return x.repeat_interleave(cu_seqlens.diff(), output_size=shape[0])


def one_per_token(
    name: str, x: Tensor, shape: tuple[int, ...] | torch.Size, cu_seqlens: Tensor | None, *, spread: bool = True
) -> bool:
    """Whether `x`, given per token or per sequence, is per token.

    Packed tokens may be as many as their sequences, so that [N] is [B]. Where each sequence has its one token both are
    the same; where some are empty, and others longer, what gives other numbers per token than per sequence is an error,
    as nobody knows which was meant. Where values may not be looked at (on a GPU) it is per token.

    spread: whether a sequence's value stands for that of each of its tokens.
    """
    if tuple(x.shape) != tuple(shape):
        return False
    if cu_seqlens is None or cu_seqlens.shape[0] - 1 != shape[0] or not check.values_checked(cu_seqlens):
        return True
    single = bool((cu_seqlens.diff() == 1).all())
    if not single and not (spread and torch.equal(x, broadcast_to_tokens(x, shape, cu_seqlens))):
        raise ValueError(
            f"{name}: {list(shape)} may be one per token or one per sequence, as there are {shape[0]} of both and some "
            "of the packed sequences are empty; leave these out: cu_seqlens.unique_consecutive(), and of what is per "
            "sequence the values where cu_seqlens.diff() > 0"
        )
    return True


def token_bounds(cu_seqlens: Tensor | None, like: Tensor, name: str, argument: str = "cu_seqlens") -> Tensor | None:
    """cu_seqlens as i64; inside the tokens also where they may not be looked at."""
    if cu_seqlens is None:
        return None
    check.integers(argument, cu_seqlens)
    check.same_device(argument, cu_seqlens, name, like)
    if like.ndim != 1 or cu_seqlens.ndim != 1 or cu_seqlens.shape[0] < 1:
        raise ValueError(
            f"{argument}: expected [B + 1] bounds over packed {name} [N], "
            f"got {list(cu_seqlens.shape)} over {list(like.shape)}"
        )
    if cu_seqlens.shape[0] == 1 and like.shape[0]:
        raise ValueError(f"{argument}: expected bounds from 0 to {like.shape[0]}, got those of no sequence")
    bounds = cu_seqlens.long()
    if check.values_checked(bounds):
        check.every(argument, bounds.diff(prepend=bounds[:1]) >= 0, bounds, "bounds that never decrease")
        if int(bounds[0]) != 0 or int(bounds[-1]) != like.shape[0]:
            raise ValueError(
                f"{argument}: expected bounds from 0 to {like.shape[0]} (the packed length), "
                f"got {int(bounds[0])} to {int(bounds[-1])}"
            )
        return bounds.contiguous()
    # Unchecked: whatever they are, no kernel may leave the tokens, and every token belongs to some sequence.
    bounds = bounds.clamp(0, like.shape[0]).cummax(0).values
    bounds[:1], bounds[-1:] = 0, like.shape[0]
    return bounds

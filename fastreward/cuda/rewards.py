"""Raw functions of rewards on CUDA tensors. The kernels: csrc/cuda/rewards.cu."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from torch import Tensor

from fastreward._arguments.options import PLACES, REWARD_KLS, Place, RewardKL
from fastreward._arguments.tokens import Tokens
from fastreward._runtime.layout import REWARD_NUMBERS
from fastreward.cuda._launch import countable, launch, pack

_SOURCE: Final = "rewards"
# As in the source.
_THREADS: Final = 256
_TILE: Final = 1024


def token_rewards(
    scores: Tensor,
    logprobs: Tensor | None,
    ref_logprobs: Tensor | None,
    tokens: Tokens,
    kl: RewardKL,
    place: Place,
    numbers: Sequence[float] | Tensor,
    out: Tensor,
) -> None:
    """The scores at their place, less kl_coef * KL on valid tokens, into `out`: one launch."""
    rows, count = tokens.rows, out.numel()
    if rows == 0 or count == 0:
        return
    splits = -(-count // (rows * _TILE))
    known, given = ([0.0] * len(REWARD_NUMBERS), numbers) if isinstance(numbers, Tensor) else (numbers, None)
    mask, kind = countable(tokens.mask)
    arguments = pack(
        scores, logprobs, ref_logprobs, mask, kind, tokens.cu_seqlens, tokens.shape[-1], splits,
        REWARD_KLS.index(kl), PLACES.index(place), *map(float, known), given, out,
    )  # fmt: skip
    launch(_SOURCE, "token_rewards", rows * splits, _THREADS, arguments, out.device)

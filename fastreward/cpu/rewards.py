"""CPU backend of `rewards`: torch tensors to pointers for csrc/cpu/rewards.cpp. Inputs are validated already."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastreward import _core
from fastreward._arguments import check
from fastreward._arguments.options import PLACES, REWARD_KLS, Place, RewardKL
from fastreward._arguments.tokens import Tokens
from fastreward._runtime.addresses import address, mask_arguments


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
    """The scores at their place, less kl_coef * KL on valid tokens, into `out`; a NaN among those raises."""
    assert not isinstance(numbers, Tensor)
    bad = _core.token_rewards(
        address(scores),
        address(logprobs),
        address(ref_logprobs),
        *mask_arguments(tokens.mask),
        tokens.rows,
        tokens.shape[-1],
        address(tokens.cu_seqlens),
        -1 if logprobs is None else REWARD_KLS.index(kl),
        PLACES.index(place),
        list(numbers),
        address(out),
        torch.get_num_threads(),
    )
    if bad:
        assert logprobs is not None
        assert ref_logprobs is not None
        check.numbers_where_set({"logprobs": logprobs, "ref_logprobs": ref_logprobs}, tokens.mask)

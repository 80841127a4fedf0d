"""Keyword options that recipes pass on to the operation they call, and what recipes add to them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypedDict

from torch import Tensor

from fastreward._arguments import check
from fastreward._arguments.groups import GroupIds
from fastreward._arguments.options import KL, Aggregation, Empty, PairAggregation
from fastreward._arguments.tokens import broadcast_to_tokens, one_per_token


class PolicyOptions(TypedDict, total=False):
    """Those of `fastreward.policy_loss`, which describes them."""

    normalizer: float | Tensor | None
    ref_logprobs: Tensor | None
    rollout_logprobs: Tensor | None
    kl: KL | None
    kl_coef: float
    entropy: Tensor | None
    entropy_coef: float
    weights: Tensor | None
    keep: Tensor | None
    group_ids: GroupIds | None
    group_size: int | None
    cu_seqlens: Tensor | None
    extra: Mapping[str, Tensor] | None
    empty: Empty
    return_token_loss: bool
    return_tokens: Sequence[str]


class LossOptions(PolicyOptions, total=False):
    """PolicyOptions and the aggregation, for which a recipe has a default of its own."""

    aggregation: Aggregation


class PairOptions(TypedDict, total=False):
    """Those of `fastreward.preference_loss`, which describes them."""

    chosen_mask: Tensor | None
    rejected_mask: Tensor | None
    chosen_weights: Tensor | None
    rejected_weights: Tensor | None
    weights: Tensor | None
    aggregation: PairAggregation
    normalizer: float | Tensor | None
    group_ids: GroupIds | None
    chosen_cu_seqlens: Tensor | None
    rejected_cu_seqlens: Tensor | None
    empty: Empty
    return_pair_loss: bool


class CorrectionOptions(TypedDict, total=False):
    """Those of `fastreward.correction_weights`, which describes them."""

    batch_normalize: bool
    log_ratio_clamp: float | None
    unscored: bool
    cu_seqlens: Tensor | None


def per_token(name: str, x: Tensor, logprobs: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """[B] given to each token, in the shape of logprobs; what has that shape already stays as it is."""
    per_token = one_per_token(name, x, logprobs.shape, cu_seqlens)
    return x if per_token else broadcast_to_tokens(x, logprobs.shape, cu_seqlens)


def keep_also(options: PolicyOptions, keep: Tensor, logprobs: Tensor) -> None:
    """Drops more sequences or tokens: `keep` bool, [B] or in the shape of logprobs."""
    given = options.get("keep")
    if given is not None and given.shape != keep.shape:
        given, keep = (per_token("keep", x, logprobs, options.get("cu_seqlens")) for x in (given, keep))
    options["keep"] = keep if given is None else keep & (given != 0)


def scored(options: PolicyOptions, rewards: Tensor, logprobs: Tensor) -> Tensor:
    """Rewards [B] as float32; drops the sequences whose reward is NaN: they were not scored."""
    rewards = check.rewards("rewards", rewards).float()
    keep_also(options, ~rewards.isnan(), logprobs)
    return rewards


def weigh_also(options: PolicyOptions, weights: Tensor, logprobs: Tensor) -> None:
    """Multiplies the weights, [B] or in the shape of logprobs."""
    given = options.get("weights")
    if given is not None and given.shape != weights.shape:
        given, weights = (per_token("weights", x, logprobs, options.get("cu_seqlens")) for x in (given, weights))
    options["weights"] = weights if given is None else weights * given


def add_extra(options: PolicyOptions, **extra: Tensor) -> None:
    """Adds tensors that the loss reads as t.extra(name)."""
    options["extra"] = {**(options.get("extra") or {}), **extra}


def add_kl(options: PolicyOptions, kl: KL, kl_coef: float) -> None:
    """The method's KL term, where the caller passes ref_logprobs and chooses no other."""
    if options.get("ref_logprobs") is not None:
        options.setdefault("kl", kl)
        options.setdefault("kl_coef", kl_coef)

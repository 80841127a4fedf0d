"""The gap between trainer and rollout engine: --custom-tis-function-path, and what reduces the surrogate afterwards."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any, Final

import torch
from torch import Tensor

from fastreward._arguments import check
from fastreward.correction import correction_weights
from fastreward.patch.hooks import arguments, chosen, hook, parsed, recipe
from fastreward.patch.slime.layout import Layout, joined, parallel

#: Where --custom-pg-loss-reducer-function-path, which slime does not pass its arguments, learns what to do.
REDUCER: Final = "FASTREWARD_SLIME_PG_LOSS_REDUCER"
_REDUCTIONS: Final = ("seq-mean-token-mean", "seq-mean-token-sum", "seq-mean-token-sum-norm", "token-sum")


@hook("slime", lambda *_, pg_loss, **__: pg_loss.numel())
def tis(
    args: Any,
    *,
    pg_loss: Tensor,
    train_log_probs: Sequence[Tensor],
    rollout_log_probs: Sequence[Tensor],
    loss_masks: Sequence[Tensor],
    total_lengths: Sequence[int],
    response_lengths: Sequence[int],
    **_: Any,
) -> tuple[Tensor, list[Tensor], dict[str, Tensor]]:
    """Truncated importance sampling, slime's, or a recipe's weights and rejection of tokens and sequences.

    `args.fastreward_tis`, or FASTREWARD_SLIME_TIS, names a recipe that returns weights, with its options: "icepop",
    "seq_mis(high=3.0)", "geo_rs". Neither: exp(train - rollout) within [args.tis_clip_low, args.tis_clip].

    Args:
        args: slime's.
        pg_loss: [N], of this rank's response tokens.
        train_log_probs, rollout_log_probs: one tensor per sample, of the same tokens.
        loss_masks: one tensor [response length] per sample, also where context parallelism has cut the tokens.
        total_lengths, response_lengths: of the samples.

    Returns:
        pg_loss times the weights, 0 where masked out; the masks, without what the recipe rejects; metrics per token:
        tis (the ratio), tis_clipfrac (1 where the weight is another), tis_abs (|ratio - 1|). A mask of 0 hides
        whatever a log-prob is there.
    """
    layout = Layout.of(total_lengths, response_lengths, parallel())
    old, rollout = layout.whole(train_log_probs).detach(), layout.whole(rollout_log_probs).detach()
    mask, bounds = joined(loss_masks, old.device), layout.whole_bounds(old.device)
    name, options = chosen("tis", args, "FASTREWARD_SLIME_TIS")
    if name is None:
        bound = {"low": args.tis_clip_low, "high": args.tis_clip}
        weights, keep, _metrics = correction_weights(
            old, rollout, mask, mode="truncate", log_ratio_clamp=None, cu_seqlens=bounds, **bound
        )
    else:
        found = recipe("fastreward_tis", name, ("weights",))
        given = {"old_logprobs": old, "rollout_logprobs": rollout, "mask": mask}
        call = arguments("fastreward_tis", found, given, options)
        weights, keep, _metrics = found.function(**call, cu_seqlens=bounds)
    ratio = torch.where(mask != 0, torch.exp(old - rollout), 0.0)
    other = ~torch.isclose(weights, ratio, rtol=1e-5, atol=0.0)  # two roundings of one ratio are the same
    metrics = {"tis": ratio, "tis_clipfrac": other.float(), "tis_abs": (ratio - 1).abs() * (mask != 0)}
    kept = [m * k.to(m.dtype) for m, k in zip(loss_masks, torch.split(keep, layout.lengths), strict=True)]
    own = layout.own_part(weights)
    weighted = torch.where(layout.local(loss_masks) != 0, pg_loss, 0.0) * own
    return weighted, kept, {key: layout.own_part(x) for key, x in metrics.items()}


@hook("slime", lambda totals, lengths, *_, **__: sum(map(int, lengths)))
def pg_loss_reducer(
    total_lengths: Sequence[int],
    response_lengths: Sequence[int],
    loss_masks: Sequence[Tensor],
    calculate_per_token_loss: bool = False,
) -> Callable[[Tensor], Tensor]:
    """The sum over samples of their means, as slime's, or another sum of the tokens' losses.

    FASTREWARD_SLIME_PG_LOSS_REDUCER in the environment chooses, as slime passes no arguments here:
    "seq-mean-token-mean" (slime's), "token-sum" (slime's under calculate_per_token_loss, which is the default then),
    "seq-mean-token-sum", "seq-mean-token-sum-norm(length=8192)" (Dr. GRPO's constant). Each is the sum over the samples
    here; slime divides by their number.

    Args:
        total_lengths, response_lengths: of the samples.
        loss_masks: one tensor [response length] per sample.
        calculate_per_token_loss: slime's option.

    Returns:
        reducer(pg_loss [N]) -> []. Tokens under a mask of 0 count nothing, whatever their loss is.
    """
    name, options = parsed(REDUCER, os.environ.get(REDUCER) or _REDUCTIONS[3 if calculate_per_token_loss else 0])
    check.choice(REDUCER, name, _REDUCTIONS)
    if set(options) != ({"length"} if name.endswith("norm") else set()):
        raise ValueError(
            f"{REDUCER}: expected seq-mean-token-sum-norm(length=...) or a name alone, got {name}{options}"
        )
    layout = Layout.of(total_lengths, response_lengths, parallel())
    length = check.positive(f"{REDUCER}: length", options.get("length", 1))
    by_mean = name == "seq-mean-token-mean"
    factors = [m / (m.sum().clamp(min=1) if by_mean else length) for m in loss_masks]
    factor = layout.local(factors)

    def reducer(pg_loss: Tensor) -> Tensor:
        return (torch.where(factor != 0, pg_loss, 0.0) * factor).sum()

    return reducer

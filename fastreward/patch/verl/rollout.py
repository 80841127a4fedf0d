"""verl's rollout correction: importance weights, rejection and their metrics in a few passes instead of some hundred.

Standard deviations are two-pass, where verl takes E[x^2] - E[x]^2 in float32; all else has verl's numbers.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Mapping
from typing import Any, Final, cast

import torch
from torch import Tensor

from fastreward._runtime.memory import empty_like
from fastreward.correction import REJECTIONS, CorrectionLevel, Mode, correction_weights
from fastreward.patch.bindings import Entry
from fastreward.patch.verl.aggregation import check_tokens
from fastreward.patch.verl.batch import flags
from fastreward.patch.verl.replacement import NotServed, Replacement

HELPER: Final = "verl.trainer.ppo.rollout_corr_helper"


def compute_rollout_correction_and_rejection_mask(
    stock: Any,
    old_log_prob: Tensor,
    rollout_log_prob: Tensor,
    response_mask: Tensor,
    rollout_is: str | None = None,
    rollout_is_threshold: Any = 2.0,
    rollout_is_batch_normalize: bool = False,
    rollout_rs: str | None = None,
    rollout_rs_threshold: Any = None,
) -> tuple[Any, Tensor, dict[str, float]]:
    """(DataProto with the weights [B, T], or None; the mask without what is rejected; the metrics as floats)."""
    options = _weighting(stock, rollout_is, rollout_is_threshold, rollout_is_batch_normalize)
    options |= {"reject": _criteria(stock, rollout_rs, rollout_rs_threshold)}
    weights, keep, metrics = _corrected(old_log_prob, rollout_log_prob, response_mask, **options)
    mask = empty_like(response_mask).copy_(keep)  # as verl's, memory of its own
    proto = None
    if options["mode"] is not None:
        data = importlib.import_module("verl.protocol").DataProto
        proto = data.from_dict(tensors={"rollout_is_weights": weights})
    return proto, mask, {f"rollout_corr/{name}": value for name, value in metrics.items()}


def compute_offpolicy_metrics(
    _: Any, old_log_prob: Tensor, rollout_log_prob: Tensor | None, response_mask: Tensor
) -> dict[str, Any]:
    """Perplexities, KL estimates and chi-squared divergences of the gap between trainer and rollout engine."""
    if rollout_log_prob is None:
        raise NotServed("the perplexity of one policy alone")
    return _corrected(old_log_prob, rollout_log_prob, response_mask, mode=None)[2]


def _corrected(old: Tensor, rollout: Tensor, mask: Tensor, **options: Any) -> tuple[Tensor, Tensor, dict[str, float]]:
    old, rollout = old.detach(), rollout.detach()  # as verl, which lets no gradient through the weights
    there = flags(mask, old)
    check_tokens(there, old, rollout)
    if torch.promote_types(old.dtype, rollout.dtype) != torch.float32:
        raise NotServed("half precision, in which verl's ratios and thresholds are rounded")
    weights, keep, metrics = correction_weights(old, rollout, there, **options)
    values = metrics.floats()
    if math.isnan(values["kl"]):
        raise NotServed("no token that counts, which verl refuses")
    return weights, keep, values


def _weighting(stock: Any, level: str | None, threshold: Any, normalize: bool) -> dict[str, Any]:
    """verl's rollout_is_* as arguments of `correction_weights`; one bound truncates, two are IcePop's."""
    if level is None or threshold is None:
        return {"mode": None}
    if level not in ("token", "sequence"):
        raise NotServed(f"a level {level!r}")
    if normalize and torch.distributed.is_available() and torch.distributed.is_initialized():
        raise NotServed("a mean weight over all ranks")
    high, low = _verls(stock, "_parse_rollout_is_threshold")(threshold)
    mode: Mode = "truncate" if low is None else "icepop"
    return {
        "mode": mode,
        "level": cast(CorrectionLevel, level),
        "low": low,
        "high": high,
        "batch_normalize": bool(normalize),
    }


def _criteria(stock: Any, rollout_rs: Any, threshold: Any) -> Mapping[str, Any] | None:
    """verl's rollout_rs as `reject`; None: nothing is rejected."""
    if rollout_rs is None:
        return None
    if not isinstance(rollout_rs, str) or threshold is None:
        raise NotServed("criteria that verl refuses")
    options = list(dict.fromkeys(name for part in rollout_rs.split(",") if (name := part.strip())))
    if not options or not set(options) <= set(REJECTIONS):
        raise NotServed(f"criteria {rollout_rs!r}")
    limits = _verls(stock, "_parse_rollout_rs_thresholds")(options, threshold)
    return {
        name: limits[name]["upper"] if limits[name]["lower"] is None else (limits[name]["lower"], limits[name]["upper"])
        for name in options
    }


def _verls(stock: Any, name: str) -> Any:
    """A function beside verl's own, whose reading of a configuration is verl's to say."""
    found = stock.__globals__.get(name)
    if found is None:
        raise NotServed(f"verl has no {name}")
    return found


REPLACEMENTS: Final = (
    Replacement(
        f"{HELPER}.compute_rollout_correction_and_rejection_mask",
        (
            *("old_log_prob", "rollout_log_prob", "response_mask"),
            *("rollout_is", "rollout_is_threshold", "rollout_is_batch_normalize"),
            *("rollout_rs", "rollout_rs_threshold"),
        ),
        compute_rollout_correction_and_rejection_mask,
        "fastreward.correction_weights",
        "weights, rejection and metrics in a few passes, one host read instead of dozens",
    ),
    Replacement(
        f"{HELPER}.compute_offpolicy_metrics",
        ("old_log_prob", "rollout_log_prob", "response_mask"),
        compute_offpolicy_metrics,
        "fastreward.correction_weights",
        "one host read instead of a dozen",
    ),
)
KEPT: Final = (
    Entry(
        f"{HELPER}.compute_rollout_correction_and_add_to_batch and compute_rollout_corr_metrics_from_logprobs",
        "verl's own",
        "they call what is replaced",
    ),
    Entry(
        f"{HELPER}.compute_rollout_correction_weights and compute_rollout_rejection_mask",
        "verl's own",
        "the function around them is replaced; they serve what that hands on",
    ),
)

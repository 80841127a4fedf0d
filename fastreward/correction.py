"""Rollout correction: importance weights, rejection masks and metrics of the gap between trainer and rollout engine.

The mathematics is written in the loss language and runs as one program: verl's rollout_corr_helper.py, TRL's
importance-sampling modes, IcePop, and DeepSeek-V3.2's off-policy sequence mask.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Final, get_args

import torch
from torch import Tensor

from fastreward._arguments import check
from fastreward._arguments.arrays import accepts_arrays
from fastreward._arguments.numbers import Number, number, parameters, read, size
from fastreward._arguments.tokens import Tokens, token_bounds
from fastreward._loss_call.results import Metrics
from fastreward._runtime.custom_op import custom_op
from fastreward._runtime.dispatch import implementation, select
from fastreward._runtime.memory import empty_like
from fastreward.losses._correction import REJECTIONS, CorrectionLevel, Formula, Mode, plan, sequence_mask_plan

Threshold = Number | tuple[Number, Number]

#: Bounds where a call gives neither: verl's TIS, TRL's sequence_mask, IcePop's own (and verl's decoupled_token_icepop).
DEFAULT_BOUNDS: Final[dict[Mode, tuple[float | None, float | None]]] = {
    "truncate": (None, 2.0),
    "mask": (None, 3.0),
    "icepop": (0.5, 5.0),
}


# ------------------------------------------------------------------------------------------------------------ the op
_FORMULAS: Final[dict[str, Formula]] = {}


def _register(*fields: Any) -> tuple[str, tuple[str, ...], tuple[bool | None, bool | None]]:
    """(the name under which the op finds the formula of these fields, its metrics, Plan.per_token)."""
    formula = Formula(*fields)
    built = plan(formula)
    _FORMULAS[built.program.key] = formula
    return built.program.key, built.metrics, built.per_token


# Dynamo runs it while it traces and takes the result for a constant, which it is: strings and truths.
_register._dynamo_marked_constant = True  # type: ignore[attr-defined]


@custom_op("correction_weights")
def _correction_weights(
    old_logprobs: Tensor,  # [B, T] or [N]
    rollout_logprobs: Tensor,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    parameters: list[float],
    numbers: Tensor | None,  # f64 [parameters]: instead of them, where the host does not know them all
    on_device: list[Tensor],  # f32 []: those of them that only a kernel may read, by Formula.on_device
    formula: str,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    p = plan(_FORMULAS[formula])
    given = {"old_logprob": old_logprobs, "rollout_logprob": rollout_logprobs}
    given |= {f"parameter.{k}": x for k, x in zip(_FORMULAS[formula].on_device, on_device, strict=True)}
    inputs = [given[str(node.name)] for node in p.program.inputs]
    scalars = p.program.scalar_values(dict(zip(p.parameters, read(parameters, numbers), strict=True)))
    sides = [Tokens(tuple(old_logprobs.shape), mask, cu_seqlens)]
    outputs, metrics = implementation("program", backend).run(p.program, inputs, sides, scalars, None)
    found = iter(outputs)
    weights, keep = (metrics.new_empty(0) if k is None else next(found) for k in p.per_token)
    return weights, keep, metrics


@_correction_weights.register_fake
def _(old_logprobs: Tensor, cu_seqlens: Tensor | None, formula: str) -> tuple[Tensor, Tensor, Tensor]:
    p, new = plan(_FORMULAS[formula]), old_logprobs.new_empty
    rows = Tokens(tuple(old_logprobs.shape), None, cu_seqlens).rows
    weights, keep = (new((0,) if k is None else old_logprobs.shape if k else (rows,)) for k in p.per_token)
    return weights, keep, new((len(p.metrics),))


@custom_op("off_policy_sequence_mask")
def _off_policy_sequence_mask(
    logprobs: Tensor,  # [B, T] or [N]
    rollout_logprobs: Tensor,
    advantages: Tensor,  # [B]
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    threshold: list[float],  # [1]
    numbers: Tensor | None,  # f64 [1]: instead of it, where the host does not know it
    on_device: Tensor | None,  # f32 []: the same, where only a kernel may read it
    unscored: bool,
    backend: str,
) -> Tensor:
    p = sequence_mask_plan(unscored, () if on_device is None else ("threshold",))
    given = {"logprob": logprobs, "rollout_logprob": rollout_logprobs, "advantage": advantages}
    given |= {} if on_device is None else {"parameter.threshold": on_device}
    sides = [Tokens(tuple(logprobs.shape), mask, cu_seqlens)]
    inputs = [given[str(node.name)] for node in p.inputs]
    outputs, _ = implementation("program", backend).run(
        p, inputs, sides, p.scalar_values({"threshold": read(threshold, numbers)[0]}), None
    )
    kept: Tensor = outputs[0]
    return kept


@_off_policy_sequence_mask.register_fake
def _(advantages: Tensor) -> Tensor:
    return torch.empty_like(advantages)


# --------------------------------------------------------------------------------------------------- public functions
@accepts_arrays
def correction_weights(
    old_logprobs: Tensor,
    rollout_logprobs: Tensor,
    mask: Tensor | None = None,
    *,
    mode: Mode | None = "truncate",
    level: CorrectionLevel = "token",
    low: Number | None = None,
    high: Number | None = None,
    reject: Mapping[str, Threshold] | None = None,
    batch_normalize: bool = False,
    log_ratio_clamp: Number | None = 20.0,
    unscored: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor, Metrics]:
    """Importance weights exp(old - rollout) for tokens that another engine sampled, and what to leave out of the loss.

    Args:
        old_logprobs: of the trainer's policy, [B, T], or packed [N] with cu_seqlens; any floating dtype, computed with
            in float32, to which float64 (NumPy's default) is rounded. Constants.
        rollout_logprobs: as the inference engine reported them, same shape.
        mask: same shape, bool, integer or float; nonzero = a token that counts.
        mode: truncate: a weight beyond a bound becomes the bound (TIS; TRL's *_truncate); icepop: it becomes 0, the
            token still counts in the loss's denominator (IcePop; verl's "lower_upper"; TRL's *_mask); mask:
            it becomes 0 and `keep` drops the token (MIS). None: no weights (ones).
        level: token; sequence: the product of a sequence's token ratios; geometric: its geometric mean.
        low, high: bounds of the weight, None for none; as all thresholds here numbers or 0-d tensors. Neither: 2.0
            above (truncate: verl's), 3.0 above (mask: TRL's), 0.5 to 5.0 (icepop: its paper's and verl's).
        reject: criteria by verl's names (`correction.REJECTIONS`) with their thresholds, all of which a token or
            sequence has to pass: k1 = -l, k2 = l^2 / 2, k3 = e^l - 1 - l of the log-ratio l clamped to +-20; per token,
            or their sum, mean or maximum over the sequence. One number is an upper bound; k1 takes ratio bounds (low,
            high), of which one number x is (1 / x, x), and compares k1 with their logarithms.
        batch_normalize: divides the weights by their mean, over tokens, or over sequences that have any.
        log_ratio_clamp: the level's log-ratio is clamped to +- this before exp (verl: 20; TRL: None).
        unscored: True: a NaN in rollout_logprobs is a token that the engine could not score; its log-ratio is 0 (TRL).
        cu_seqlens: integers [B + 1], the packed sequences' bounds, from 0 to N.

    Returns:
        weights: f32 in the tokens' shape, 0 where masked out; constants, for policy_loss(weights=...).
        keep: bool in the tokens' shape, for policy_loss(keep=...): valid, not rejected, and with mode="mask" inside
            the bounds.
        metrics: verl's (without "rollout_corr/"), by name, on the device: rollout_is_*, rollout_rs_*, and the gap's
            training_ppl, rollout_ppl, kl, k3_kl, chi2_token, chi2_seq, ... Sequences without a token count in verl's
            means over sequences as 0, as there. Standard deviations are two-pass (verl's are E[x^2] - E[x]^2).

    Raises:
        TypeError, ValueError: wrong dtype, shape, name or bound; on the CPU (on a GPU with FASTREWARD_DEBUG=1) also for
            a NaN where mask is set, or -inf in both.

    Code: verl 0.9.1 rollout_corr_helper.py and TRL 1.16.0 grpo_trainer.py, run against in the tests. The geometric
    level is an earlier verl's (from memory); the present one has reject={"seq_mean_k1": ...}.
    """
    old_logprobs = check.floats("old_logprobs", old_logprobs)
    rollout_logprobs = check.floats("rollout_logprobs", rollout_logprobs)
    bounds = _check_tokens("old_logprobs", old_logprobs, rollout_logprobs, cu_seqlens)
    mask = check.mask(mask, "old_logprobs", old_logprobs)
    if mode is not None:
        check.choice("mode", mode, get_args(Mode))
        if low is None and high is None:
            low, high = DEFAULT_BOUNDS[mode]
        low = None if low is None else number("low", low, old_logprobs, check.not_negative)
        high = None if high is None else number("high", high, old_logprobs, check.positive)
        _check_order("low", low, "high", high)
    elif low is not None or high is not None:
        raise ValueError("low, high: there are no weights to bound with mode=None")
    check.choice("level", level, get_args(CorrectionLevel))
    if batch_normalize and mode is None:
        raise ValueError("batch_normalize: there are no weights to normalise with mode=None")
    if not isinstance(reject, Mapping | None):
        raise TypeError(f"reject: expected a mapping such as {{'seq_mean_k3': 0.01}}, got {reject!r}")
    limits = {name: _limits(name, threshold, old_logprobs) for name, threshold in (reject or {}).items()}
    tokens, backend = Tokens(tuple(old_logprobs.shape), mask, bounds), select("correction", old_logprobs)
    clamped = log_ratio_clamp is not None
    named: dict[str, Number] = {
        "rows": size(max(tokens.rows, 1), old_logprobs),
        "clamp": number("log_ratio_clamp", log_ratio_clamp, old_logprobs, check.positive) if clamped else math.inf,
        "low": 0.0 if low is None else low,
        "high": 0.0 if high is None else high,
    }
    for name, pair in limits.items():
        named[f"{name}.low"], named[f"{name}.high"] = pair
    ready = parameters(named, backend)
    key, names, per_token = _register(
        mode,
        level,
        mode is not None and low is not None,
        mode is not None and high is not None,
        clamped,
        check.flag("batch_normalize", batch_normalize),
        check.flag("unscored", unscored),
        tuple(limits),
        tuple(ready.inputs),
    )
    weights, keep, values = _correction_weights(
        check.constant("old_logprobs", old_logprobs).contiguous(),
        check.constant("rollout_logprobs", rollout_logprobs).contiguous(),
        mask,
        bounds,
        ready.known,
        ready.numbers,
        list(ready.inputs.values()),
        key,
        backend,
    )
    metrics = Metrics(values, names)
    if check.values_checked(old_logprobs) and check.nan_refused() and metrics["kl"].isnan():
        _check_finite(old_logprobs, rollout_logprobs, mask)
    valid = _valid(tokens, old_logprobs.device)
    factor = valid.float() if per_token[0] is None else _in_tokens_shape(weights, per_token[0], valid, tokens)
    return factor, valid if per_token[1] is None else _in_tokens_shape(keep, per_token[1], valid, tokens) != 0, metrics


@accepts_arrays
def off_policy_sequence_mask(
    logprobs: Tensor,
    rollout_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor | None = None,
    *,
    threshold: Number,
    unscored: bool = False,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """Which sequences to learn from, bool [B]: A >= 0, or mean of (rollout - current) log-prob at most `threshold`.

    Args:
        logprobs: of the policy being trained, [B, T], or packed [N] with cu_seqlens; any floating dtype. No
            gradient here.
        rollout_logprobs: as the inference engine (or the old policy) had them, same shape.
        advantages: [B].
        mask: same shape as logprobs; nonzero = a token that counts.
        threshold: nats per token; a number or a 0-d tensor.
        unscored: True: a NaN in rollout_logprobs counts as no difference (TRL).
        cu_seqlens: integers [B + 1], the packed sequences' bounds, from 0 to N.

    For policy_loss(keep=...), or weights= where the denominator is to stay (TRL multiplies the loss with it).
    DeepSeek-V3.2 (arXiv 2512.02556). Code: TRL 1.16.0 grpo_trainer.py `get_off_policy_mask`, run against in the tests.
    """
    logprobs = check.floats("logprobs", logprobs)
    rollout_logprobs = check.floats("rollout_logprobs", rollout_logprobs)
    bounds = _check_tokens("logprobs", logprobs, rollout_logprobs, cu_seqlens)
    mask = check.mask(mask, "logprobs", logprobs)
    tokens = Tokens(tuple(logprobs.shape), mask, bounds)
    advantages = check.reals("advantages", advantages)
    check.shape("advantages", advantages, (tokens.rows,), "one per sequence")
    check.same_device("advantages", advantages, "logprobs", logprobs)
    backend = select("correction", logprobs)
    ready = parameters({"threshold": number("threshold", threshold, logprobs, check.finite)}, backend)
    kept: Tensor = _off_policy_sequence_mask(
        logprobs.detach().contiguous(),  # a decision: it has no gradient that could be lost
        rollout_logprobs.detach().contiguous(),
        advantages.detach().contiguous(),
        mask,
        bounds,
        ready.known,
        ready.numbers,
        ready.inputs.get("threshold"),
        check.flag("unscored", unscored),
        backend,
    )
    return kept != 0


# ---------------------------------------------------------------------------------------------------------- checks
def _check_tokens(name: str, logprobs: Tensor, rollout_logprobs: Tensor, cu_seqlens: Tensor | None) -> Tensor | None:
    """cu_seqlens as the kernels read it."""
    check.shape("rollout_logprobs", rollout_logprobs, logprobs.shape, f"as {name}")
    check.same_device("rollout_logprobs", rollout_logprobs, name, logprobs)
    if cu_seqlens is None and logprobs.ndim != 2:
        raise ValueError(f"{name}: expected [B, T], or [N] with cu_seqlens, got shape {list(logprobs.shape)}")
    return token_bounds(cu_seqlens, logprobs, name)


def _check_order(low_name: str, low: Number | None, high_name: str, high: Number | None) -> None:
    if isinstance(low, float) and isinstance(high, float) and low > high:
        raise ValueError(f"{low_name}: expected at most {high_name}, {high}, got {low}")


def _limits(option: str, threshold: Threshold, like: Tensor) -> tuple[Number, Number]:
    """(low, high) of a criterion's thresholds; low is 0 where there is none."""
    check.choice("reject", option, REJECTIONS)
    name = f"reject[{option!r}]"
    pair = isinstance(threshold, tuple | list)
    if not option.endswith("k1"):
        if pair:
            raise ValueError(f"{name}: expected one number, an upper bound, got {threshold!r}")
        return 0.0, number(name, threshold, like, check.positive)
    if not pair:
        high = number(name, threshold, like, check.positive)
        low = 1.0 / high
    else:
        if len(threshold) != 2:  # type: ignore[arg-type]
            raise ValueError(f"{name}: expected (low, high), got {threshold!r}")
        low, high = (number(name, x, like, check.positive) for x in threshold)  # type: ignore[union-attr]
    _check_order(f"{name}: low", low, "high", high)
    return low, high


def _check_finite(old_logprobs: Tensor, rollout_logprobs: Tensor, mask: Tensor | None) -> None:
    valid = torch.ones_like(old_logprobs, dtype=torch.bool) if mask is None else mask != 0
    for name, x in (("old_logprobs", old_logprobs), ("rollout_logprobs", rollout_logprobs)):
        hint = "; pass unscored=True for tokens that the engine could not score" if name == "rollout_logprobs" else ""
        check.every(name, ~(x.isnan() & valid), x, f"numbers where mask is set{hint}")
    impossible = old_logprobs.isneginf() & rollout_logprobs.isneginf()  # neither policy could have sampled it
    check.every("old_logprobs", ~(impossible & valid), old_logprobs, "a finite one of the two where mask is set")


# --------------------------------------------------------------------------------------------------- rows and tokens
def _valid(tokens: Tokens, device: torch.device) -> Tensor:
    if tokens.mask is None:
        return torch.ones(tokens.shape, dtype=torch.bool, device=device)
    if tokens.mask.dtype != torch.bool:
        return tokens.mask != 0
    return empty_like(tokens.mask).copy_(tokens.mask)  # torch takes ten times as long to compare truth values


def _in_tokens_shape(x: Tensor, per_token: bool, valid: Tensor, tokens: Tokens) -> Tensor:
    """x in the tokens' shape, 0 where masked out; a program's token output is that already."""
    return x if per_token else torch.where(valid, tokens.broadcast(x), 0.0)


__all__ = [
    "DEFAULT_BOUNDS",
    "REJECTIONS",
    "CorrectionLevel",
    "Mode",
    "Threshold",
    "correction_weights",
    "off_policy_sequence_mask",
]

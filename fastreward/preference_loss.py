"""Losses over pairs of a chosen and a rejected sequence, with metrics, and the gradient for both sides' log-probs."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Final

from torch import Tensor

from fastreward._arguments import check
from fastreward._arguments.arrays import accepts_arrays
from fastreward._arguments.groups import GroupIds, numbered_groups
from fastreward._arguments.numbers import Number, anything, is_number, number, parameters, single
from fastreward._arguments.options import EMPTY, PAIR_AGGREGATIONS, Empty, PairAggregation
from fastreward._arguments.tokens import Tokens, token_bounds
from fastreward._loss_call.call import (
    NO_TOKEN,
    check_numbers,
    checked_extra,
    checked_loss,
    level_of,
    on_device,
    parameter,
    per_token,
)
from fastreward._loss_call.op import evaluate
from fastreward._loss_call.results import Metrics, PolicyLoss
from fastreward._runtime.dispatch import select
from fastreward.language.node import Level
from fastreward.language.objective import CALL_PARAMETERS
from fastreward.language.terms import PAIR_TERMS, PER_TOKEN, SIDES
from fastreward.losses import Loss, dpo

#: Names of arguments and f32 tensors, by term and side.
_Terms = dict[tuple[str, int], tuple[str, Tensor]]
_DEFAULT_LOSS: Final = dpo()


@accepts_arrays
def preference_loss(
    chosen_logprobs: Tensor,
    rejected_logprobs: Tensor,
    *,
    loss: Loss | None = None,
    ref_chosen_logprobs: Tensor | None = None,
    ref_rejected_logprobs: Tensor | None = None,
    chosen_mask: Tensor | None = None,
    rejected_mask: Tensor | None = None,
    chosen_weights: Tensor | None = None,
    rejected_weights: Tensor | None = None,
    weights: Tensor | None = None,
    aggregation: PairAggregation = "mean",
    normalizer: Number | None = None,
    group_ids: GroupIds | None = None,
    chosen_cu_seqlens: Tensor | None = None,
    rejected_cu_seqlens: Tensor | None = None,
    extra: Mapping[str, Tensor] | None = None,
    chosen_extra: Mapping[str, Tensor] | None = None,
    rejected_extra: Mapping[str, Tensor] | None = None,
    empty: Empty = "raise",
    return_pair_loss: bool = False,
) -> PolicyLoss:
    """A loss over pairs (DPO and its variants) with its metrics; one read of the log-probs, one write of the gradients.

    Args:
        chosen_logprobs, rejected_logprobs: per token, [P, T] or packed [N] with cu_seqlens; the two sides may differ in
            length. Gradients flow to both, in their dtype. All log-probs may be of any floating dtype; they are
            computed with in float32, to which float64 (NumPy's default) is rounded.
        loss: one of `fastreward.losses` over pairs, or your own (`losses.define(pairs=True)`); default losses.dpo().
        ref_chosen_logprobs, ref_rejected_logprobs: of the reference policy, for losses that have one; per token, as
            the log-probs are, not their sums over a sequence.
        chosen_mask, rejected_mask: nonzero = a token that counts. What lies under a zero leaks nowhere.
        chosen_weights, rejected_weights: per token or [P], for losses that read them (t.chosen.weight).
        weights: constant factor of each pair's loss, [P].
        aggregation: "mean" over pairs, "sum", or "group-mean" (mean over groups of their means: MAH-DPO's dimensions).
            A pair counts where either side has a valid token.
        normalizer: replaces that denominator (pairs; 1; groups), for gradient accumulation and data parallelism
            (`loss_normalizer`); a number or a 0-d tensor, as are the loss's own numbers.
        group_ids: [P] integers or any hashables, for group-mean and losses over groups.
        chosen_cu_seqlens, rejected_cu_seqlens: integers [P + 1], bounds of packed sequences; where N == P, see
            `policy_loss`.
        extra: what the loss reads as t.extra(name), [P] or numbers; chosen_extra, rejected_extra: per token of a side,
            or [P].
        empty: what a batch without a valid pair is: "raise", an error; "zero": a loss of 0 whose gradients, zeros,
            flow as ever. On a GPU, where looking would synchronise, always "zero".
        return_pair_loss: also give the loss of each pair, [P], as token_loss.

    Returns:
        PolicyLoss(loss f32 [], metrics, token_loss f32 [P] or None). The metrics are those of pairs (see Metrics), then
        what the loss reports (dpo: rewards, margins, accuracy).

    Raises:
        TypeError, ValueError: wrong dtype, shape or name, a term that the loss reads and that is not there, a loss
            whose gradient is zero; on the CPU (on a GPU with FASTREWARD_DEBUG=1) also for a NaN where a mask is set
            that made the loss or a metric NaN, and where no pair counts without empty="zero" or `normalizer`.
    """
    loss = checked_loss(loss, _DEFAULT_LOSS)
    check.choice("empty", empty, EMPTY)
    chosen_logprobs = check.floats("chosen_logprobs", chosen_logprobs)
    rejected_logprobs = check.floats("rejected_logprobs", rejected_logprobs)
    check.choice("aggregation", aggregation, PAIR_AGGREGATIONS)
    sides = (
        _side("chosen", chosen_logprobs, chosen_mask, chosen_cu_seqlens),
        _side("rejected", rejected_logprobs, rejected_mask, rejected_cu_seqlens),
    )
    pairs = sides[0].rows
    if sides[1].rows != pairs:
        raise ValueError(f"rejected_logprobs: expected {pairs} sequences, as many as chosen, got {sides[1].rows}")
    check.same_device("rejected_logprobs", rejected_logprobs, "chosen_logprobs", chosen_logprobs)
    likes = (chosen_logprobs, rejected_logprobs)
    terms = _side_terms(0, likes[0], pairs, ref_chosen_logprobs, chosen_weights, chosen_extra)
    terms |= _side_terms(1, likes[1], pairs, ref_rejected_logprobs, rejected_weights, rejected_extra)
    levels = {(term, k): level_of(argument, x, sides[k], loss, term, k) for (term, k), (argument, x) in terms.items()}
    of_pairs = _pair_terms(extra, terms, chosen_logprobs, pairs)
    terms |= of_pairs
    levels_of_pairs = {key: Level.SEQUENCE if x.ndim else Level.BATCH for key, (_, x) in of_pairs.items()}
    given = {key: x for key, (_, x) in terms.items()}
    scalars = loss.scalars
    numbers = {name: number(name, scalars[name], chosen_logprobs, anything) for name in sorted(scalars)}
    backend = select("preference_loss", chosen_logprobs)
    ready = parameters(dict.fromkeys(CALL_PARAMETERS, 0.0) | numbers, backend)
    given |= {(f"parameter.{name}", 0): x for name, x in ready.inputs.items()}
    objective, inputs, names, grouped, _ = loss.pair_plan(
        (_levels_of(0, levels), _levels_of(1, levels)),
        tuple([(term, level) for (term, _), level in levels_of_pairs.items()]),
        aggregation,
        normalizer is not None,
        weights is not None,
        return_pair_loss,
        tuple(ready.inputs),
    )
    for (term, side), (argument, _) in terms.items():
        if term != "ref_logprob" and not loss.asks(term, side):
            raise ValueError(f"{argument}: {loss.name} does not read it; it reads {loss.reading()}")
    if grouped and group_ids is None:
        what = "aggregation 'group-mean' is" if aggregation == "group-mean" else f"{loss.name} is a loss"
        raise ValueError(f"group_ids: {what} over groups; pass group_ids=...")
    for name, value in loss.tensors.items():
        given[f"parameter.{name}", 0] = parameter(
            f"{loss.name}: {name}", value, chosen_logprobs, pairs, "chosen_logprobs"
        )
    if weights is not None:
        given["call.weights", 0] = _per_pair("weights", weights, chosen_logprobs, pairs)
    if normalizer is not None:
        given["call.normalizer", 0] = single("normalizer", normalizer, chosen_logprobs, check.positive)
    found = evaluate(
        objective,
        chosen_logprobs.contiguous(),
        rejected_logprobs.contiguous(),
        [given[key] for key in inputs],
        sides,
        numbered_groups(group_ids, None, pairs, chosen_logprobs),
        ready.known,
        ready.numbers,
        backend,
    )
    if check.values_checked(chosen_logprobs):
        inspected = {f"{SIDES[k]}_logprobs": (likes[k], Level.TOKEN, k) for k in (0, 1)}
        levels |= levels_of_pairs
        inspected |= {argument: (x, levels[key], key[1]) for key, (argument, x) in terms.items()}
        may_be_empty = normalizer is not None or empty == "zero"
        _check_results(found.numbers(), names, inspected, sides, may_be_empty)
    return PolicyLoss(found.loss, Metrics(found.metrics, names), found.token_loss if return_pair_loss else None)


def _check_results(
    numbers: list[float],
    metrics: tuple[str, ...],
    inspected: Mapping[str, tuple[Tensor, Level, int]],
    sides: tuple[Tokens, Tokens],
    may_be_empty: bool,
) -> None:
    """That a pair counted, and that no argument, by name with its level and side, is NaN where its tokens do."""
    if not numbers[1 + metrics.index("pair_count")]:
        if not may_be_empty and sides[0].rows and any(0 not in side.shape for side in sides):
            raise ValueError(
                f"chosen_mask, rejected_mask: expected at least one counted token, got all-zero masks; {NO_TOKEN}"
            )
    elif any(map(math.isnan, numbers)) and check.nan_refused():
        for argument, (x, level, side) in inspected.items():
            check_numbers(argument, x.detach(), level, sides[side])


def _levels_of(k: int, levels: Mapping[tuple[str, int], Level]) -> tuple[tuple[str, Level], ...]:
    """Those of the terms of side k, log-probs among them."""
    return ("logprob", Level.TOKEN), *[(term, level) for (term, side), level in levels.items() if side == k]


def _side(side: str, like: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None) -> Tokens:
    name = f"{side}_logprobs"
    bounds = token_bounds(cu_seqlens, like, name, f"{side}_cu_seqlens")
    if bounds is None and like.ndim != 2:
        raise ValueError(f"{name}: expected [P, T], or [N] with {side}_cu_seqlens, got shape {list(like.shape)}")
    counted = check.mask(mask, name, like, f"{side}_mask")
    return Tokens(tuple(like.shape), counted, bounds)


def _side_terms(
    k: int, like: Tensor, pairs: int, ref: object, weights: object, extra: Mapping[str, Tensor] | None
) -> _Terms:
    """The constants of side k."""
    side, reference = SIDES[k], f"{SIDES[k]}_logprobs"
    named: dict[str, tuple[str, Any]] = {
        "ref_logprob": (f"ref_{side}_logprobs", ref),
        "weight": (f"{side}_weights", weights),
    }
    named |= checked_extra(f"{side}_extra", extra, PAIR_TERMS)
    return {
        (term, k): (
            argument,
            per_token(argument, x, like, reference)
            if term in PER_TOKEN
            else on_device(argument, x, like, pairs, reference),
        )
        for term, (argument, x) in named.items()
        if x is not None
    }


def _pair_terms(extra: Mapping[str, Tensor] | None, sides: _Terms, like: Tensor, pairs: int) -> _Terms:
    """The constants of the pairs, of which side 0 stands for both."""
    terms: _Terms = {}
    for term, (argument, x) in checked_extra("extra", extra, PAIR_TERMS).items():
        if (term, 0) in sides or (term, 1) in sides:
            raise ValueError(f"{argument}: chosen_extra or rejected_extra has one of the same name; rename one")
        terms[term, 0] = argument, _per_pair(argument, x, like, pairs)
    return terms


def _per_pair(name: str, x: object, like: Tensor, pairs: int) -> Tensor:
    if is_number(x):
        return single(name, x, like, anything)
    tensor = check.reals(name, x)
    if not check.shape_among(tensor, (pairs,)):
        raise ValueError(f"{name}: expected shape [{pairs}] (one per pair) or [], got {list(tensor.shape)}")
    check.same_device(name, tensor, "chosen_logprobs", like)
    return check.constant(name, tensor).contiguous()

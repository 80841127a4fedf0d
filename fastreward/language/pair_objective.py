"""Objective of a `preference_loss` call: the loss per pair, aggregated."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from fastreward._arguments.options import PairAggregation
from fastreward._runtime.layout import PAIR_METRICS
from fastreward.language.derivative import gradients
from fastreward.language.functions import batch_mean, batch_sum, group_sum, maximum, seq_sum, where
from fastreward.language.graph import Graph
from fastreward.language.node import Level, Node
from fastreward.language.objective import (
    Gradient,
    Key,
    Objective,
    built_of,
    check_depends,
    nonzero,
    parameters,
    sources,
)
from fastreward.language.program import without_stop_gradient
from fastreward.language.terms import PairTerms, measured
from fastreward.language.traced import TracedLoss


@dataclass(frozen=True)
class PairCall:
    """Key of a `preference_loss` call's formula, besides the loss. Levels: of each side, and of the pair.

    on_device: names of numbers that only a kernel may read.
    """

    sides: tuple[tuple[tuple[str, Level], ...], tuple[tuple[str, Level], ...]]
    levels: tuple[tuple[str, Level], ...]
    aggregation: PairAggregation
    normalizer: bool = False
    weights: bool = False
    pair_loss: bool = False
    on_device: tuple[str, ...] = ()


def pair_objective(loss: TracedLoss, call: PairCall) -> Objective:
    """The objective of `loss` under `call`; kept, as tracing takes milliseconds."""
    return _cached_pair(Key(loss), call)


@lru_cache(maxsize=512)
def _cached_pair(key: Key, call: PairCall) -> Objective:
    graph = Graph(2, call.on_device)
    t = PairTerms(graph, dict(call.levels), (dict(call.sides[0]), dict(call.sides[1])))
    value = key.loss.trace(t)
    if value.level == Level.TOKEN:
        raise ValueError(
            f"{key.loss.place}: expected a loss per pair, got one per token; reduce it, as in seq_sum(...)"
        )
    if call.weights:
        value = value * graph.input("call.weights", Level.SEQUENCE)
    wanted = [t.chosen.logprob, t.rejected.logprob]
    check_depends(key.loss, value, wanted)
    pairs = batch_sum(1.0, graph)
    groups = group_sum(1.0, graph) if call.aggregation == "group-mean" else graph.constant(1.0)
    denominator = {"mean": pairs, "sum": graph.constant(1.0)}.get(call.aggregation)
    if denominator is None:
        denominator = batch_sum(1.0 / groups)
    denominator = graph.input("call.normalizer", Level.BATCH) if call.normalizer else maximum(denominator, 1.0)
    total = batch_sum(value / maximum(groups, 1.0) / denominator)
    metrics = _pair_metrics(t)
    outputs: list[Node] = []
    kept: list[Gradient | None] = []
    found = gradients(total, wanted)
    given = [x for x in found if x is not None]
    total, value, *rest = without_stop_gradient([total, value, *given, *metrics.values()], 2)
    lowered, metrics = total.graph, dict(zip(metrics, rest[len(given) :], strict=True))
    remaining = iter(rest)
    for g in (None if x is None else nonzero(next(remaining)) for x in found):
        if g is None:
            kept.append(None)
            continue
        per_token = g.level == Level.TOKEN
        kept.append(Gradient(len(outputs), per_token))
        outputs.append(g if per_token else where(lowered.valid(), g, 0.0))
    pair_loss = None
    if call.pair_loss:
        pair_loss = len(outputs)
        outputs.append(where(lowered.valid(), value, 0.0))
    built, before = built_of(outputs, [total, *metrics.values()], wanted, 2)
    names, places = parameters(key.loss), sources(built, wanted)
    return Objective(built, names, places, tuple(metrics), (kept[0], kept[1]), pair_loss, None, (), before)


def _pair_metrics(t: PairTerms) -> dict[str, Node]:
    graph = t.graph
    values = {
        "pair_count": batch_sum(1.0, graph),
        "chosen_logprob": measured(batch_mean(seq_sum(t.chosen.logprob))),
        "rejected_logprob": measured(batch_mean(seq_sum(t.rejected.logprob))),
        "chosen_tokens": graph.reduce("batch_sum", graph.length(0)),
        "rejected_tokens": graph.reduce("batch_sum", graph.length(1)),
    }
    assert tuple(values) == PAIR_METRICS
    return {**values, **{name: x for name, x in t.reports.items() if name not in values}}

"""Objective of a `policy_loss` or `preference_loss` call: the loss, its KL and entropy terms, aggregated.

All of it is written in the loss language, so that one program gives the loss, its metrics and its gradient.
"""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Final, get_args

from fastreward._arguments.options import KL, Aggregation
from fastreward._runtime.layout import METRICS, VALUE_METRICS, Clip
from fastreward.language.derivative import gradients
from fastreward.language.functions import (
    abs,
    batch_max,
    batch_mean,
    batch_min,
    batch_sum,
    clip,
    expm1,
    group_sum,
    maximum,
    seq_sum,
    stop_gradient,
    where,
)
from fastreward.language.graph import Graph
from fastreward.language.node import Level, Node, walk
from fastreward.language.ops import ALONG_TOKENS, SEQ_REDUCTIONS, THRESHOLDS
from fastreward.language.program import Program, program, without_stop_gradient
from fastreward.language.terms import CLIP_FRACTIONS, LOG_RATIO_CLAMP, SIDES, Terms, asked, measured
from fastreward.language.thresholds import Threshold, given, without_thresholds
from fastreward.language.traced import TracedLoss

#: Parameters of a call that are not the loss's own; their values come before its.
CALL_PARAMETERS: Final = ("call.width", "call.kl_coef", "call.entropy_coef")


@dataclass(frozen=True, slots=True)
class Gradient:
    """Where the gradient for one differentiable input is: an output that holds it once a token, or once a sequence.

    A gradient per sequence is that of each of its valid tokens, the aggregation's weight included.
    """

    output: int
    per_token: bool


@dataclass(frozen=True, eq=False)
class Objective:
    """A program and the meaning of what goes in and out. batch: the loss, then `metrics` in order.

    parameters: names of the numbers of a call, in order. sources: for each input of the program its place among the
    differentiable tensors (the first, the second where there is one, the extras), else -1.
    extras: the differentiable ones, each with the output that holds its gradient, per sequence.
    row_weight: the output that gradients per token have still to be multiplied with, by sequence; None: nothing.
    tokens: the outputs that hold what the call asks for of each token, in its order. before: what is computed first,
    each with the `sources` of its program.
    """

    program: Program
    parameters: tuple[str, ...]
    sources: tuple[int, ...]
    metrics: tuple[str, ...]
    gradients: tuple[Gradient | None, Gradient | None]
    token_loss: int | None
    row_weight: int | None
    tokens: tuple[int, ...] = ()
    before: tuple[tuple[Threshold, tuple[int, ...]], ...] = ()
    extras: tuple[tuple[str, int], ...] = ()

    @cached_property
    def key(self) -> str:
        """Equal for objectives that are the same in every respect."""
        outputs = (self.gradients, self.token_loss, self.row_weight, self.tokens, self.extras)
        before = [(t.program.key, sources) for t, sources in self.before]
        return f"{self.program.key} {(self.parameters, self.sources, self.metrics, *outputs, *before)}"

    @cached_property
    def inputs(self) -> tuple[tuple[str, int], ...]:
        """(name, side) of the programs' inputs that a call gives and that are not differentiable, in order."""
        found: dict[tuple[str, int], None] = {}
        for made, places in ((self.program, self.sources), *((t.program, own) for t, own in self.before)):
            nodes = zip(made.inputs, places, strict=True)
            found |= {(n.name or "", n.side): None for n, k in nodes if k < 0 and given(n.name or "")}
        return tuple(found)

    @cached_property
    def groups(self) -> bool:
        """Whether the call has to say which sequences belong together."""
        return any(p.groups for p in (self.program, *(t.program for t, _ in self.before)))


#: What has been built in this process, by key: an op's arguments are tensors, numbers and strings.
_OBJECTIVES: Final[dict[str, Objective]] = {}
_GRADIENTS: Final[dict[str, TokenGradient]] = {}


def register(objective: Objective) -> str:
    """The name under which an op finds the objective."""
    _OBJECTIVES[objective.key] = objective
    return objective.key


def registered_objective(key: str) -> Objective:
    """A registered objective."""
    return _OBJECTIVES[key]


def register_gradient(gradient: TokenGradient) -> str:
    """The name under which `gradient_program` finds it."""
    _GRADIENTS[gradient.key] = gradient
    return gradient.key


def gradient_program(key: str) -> TokenGradient:
    """A registered gradient."""
    return _GRADIENTS[key]


@dataclass(frozen=True)
class PolicyCall:
    """Key of a `policy_loss` call's formula, besides the loss. levels: the terms passed, by name.

    packed: tokens come with cu_seqlens. deferred: gradients may leave out the aggregation's weight.
    on_device: names of numbers that only a kernel may read. tokens: what is to be given of each token, by name.
    """

    levels: tuple[tuple[str, Level], ...]
    aggregation: Aggregation
    normalizer: bool = False
    packed: bool = False
    kl: KL | None = None
    entropy_bonus: bool = False
    token_loss: bool = False
    deferred: bool = False
    on_device: tuple[str, ...] = ()
    tokens: tuple[str, ...] = ()
    explained_variance: bool = False


def kl(t: Terms, kind: KL = "k3", *, clamp: float | None = LOG_RATIO_CLAMP, value_clamp: float | None = None) -> Node:
    """Estimate of KL(policy || reference) per token, from x = ref_logprob - logprob.

    k1: -x. abs: |x|. k2: x^2 / 2. k3: e^x - x - 1 (http://joschu.net/blog/kl-approx.html). With "+" the value of that
    one and the gradient of k2, whose expectation is the KL's (verl's kl_penalty). "k3-corrected": k3 times the ratio to
    the old policy, not detached (DeepSeek-V3.2; TRL's use_bias_correction_kl).

    clamp: x is clamped to +- this, with gradient 0 beyond (None: not at all, as in TRL; exp then overflows above 88).
    value_clamp: so is the estimate (verl: 10 for k3; OpenRLHF: 10).
    """
    if kind not in get_args(KL):
        raise ValueError(f"kl: expected one of {', '.join(map(repr, get_args(KL)))}, got {kind!r}")
    x = t.ref_logprob - t.logprob
    if clamp is not None:
        x = clip(x, -clamp, clamp)
    squared = 0.5 * x * x
    if kind == "k3-corrected":
        value = (expm1(x) - x) * t.ratio
    else:
        value = {"k1": -x, "abs": abs(x), "k2": squared, "k3": expm1(x) - x}[kind.removesuffix("+")]
    if value_clamp is not None:
        value = clip(value, -value_clamp, value_clamp)
    return squared - stop_gradient(squared) + stop_gradient(value) if kind.endswith("+") else value


# ------------------------------------------------------------------------------------------------------ policy losses
def policy_objective(loss: TracedLoss, call: PolicyCall) -> Objective:
    """The objective of `loss` under `call`; kept, as tracing takes milliseconds."""
    return _cached_policy(Key(loss), call)


class Key:
    """A loss as a cache's key: equal when the formulas are."""

    def __init__(self, loss: TracedLoss) -> None:
        self.loss, self.structure = loss, loss.structure

    def __hash__(self) -> int:
        return hash(self.structure)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Key) and self.structure == other.structure


def terms_read(loss: TracedLoss) -> frozenset[str]:
    """Names of the terms and extras that the loss depends on where a call passes them, of pairs on either side."""
    return _cached_terms(Key(loss))[0]


def inputs_asked(loss: TracedLoss) -> frozenset[tuple[str, Level, int]]:
    """(name, level, side) of all that tracing asks for, be it passed or where something else is not.

    Also of what is only reported, or simplified away (as in x - x).
    """
    return _cached_terms(Key(loss))[1]


def differentiable_extras(loss: TracedLoss) -> frozenset[str]:
    """Names of the extras that the loss gives a gradient to."""
    return _cached_terms(Key(loss))[2]


def reading(loss: TracedLoss) -> str:
    """`inputs_asked` as the loss writes them, for messages."""
    texts = {
        f"{SIDES[side]}.{name}" if loss.pairs and (side or level == Level.TOKEN) else name
        for name, level, side in inputs_asked(loss)
    }
    return ", ".join(sorted(texts)) or "nothing"


@lru_cache(maxsize=512)
def _cached_terms(key: Key) -> tuple[frozenset[str], frozenset[tuple[str, Level, int]], frozenset[str]]:
    t = key.loss.terms()
    read = {n.name for n in walk([key.loss.trace(t)]) if n.op == "input" and n.name is not None}
    traced = [t]
    if asked(t):  # where nothing of it is there
        traced.append(key.loss.terms(optional=False))
        with suppress(Exception):  # a loss may refuse such a call
            key.loss.trace(traced[1])
    inputs = [x for t in traced for x in t.graph.inputs()]
    trained = [name for t in traced if isinstance(t, Terms) for name in t.differentiable]
    return frozenset(read), frozenset(x for x in inputs if not x[0].startswith("parameter.")), frozenset(trained)


@lru_cache(maxsize=512)
def _cached_policy(key: Key, call: PolicyCall) -> Objective:
    t, total, trained, weight, value = _traced(key.loss, call)
    wanted = [*trained, *t.differentiable.values()]
    metrics, tokens = _policy_metrics(t, call), _tokens(key.loss, t, call, value)

    def assembled(found: Sequence[Node | None], tokens: Sequence[Node], *, weighted: bool) -> Objective:
        return _assemble(
            key.loss, total, wanted, len(trained), found, weight, value, call.token_loss, metrics, tokens,
            weighted=weighted,
        )  # fmt: skip

    if call.deferred and value.level == Level.TOKEN:
        seeded = gradients(value, wanted, t.graph.constant(1.0))
        objective = assembled(seeded, (), weighted=False)
        if len(objective.program.stages) == 1:  # whatever is asked for of the tokens: the gradient's bits are the same
            return assembled(seeded, tokens, weighted=False) if tokens else objective
    return assembled(gradients(total, wanted), tokens, weighted=True)


def _traced(loss: TracedLoss, call: PolicyCall) -> tuple[Terms, Node, list[Node], Node, Node]:
    """(terms, total loss, differentiable inputs, the sequences' weights, loss per token or sequence)."""
    levels = dict(call.levels)
    t = Terms(Graph(on_device=call.on_device), levels)
    surrogate = loss.trace(t)
    if "weight" in levels and not any(n.op == "input" and n.name == "weight" for n in walk([surrogate])):
        surrogate = surrogate * t.weight  # a loss that reads the weights applies them itself
    value = surrogate
    if call.kl is not None:
        value = value + t.graph.parameter("call.kl_coef") * kl(t, call.kl)
    if call.entropy_bonus:
        value = value - t.graph.parameter("call.entropy_coef") * t.entropy
    weight = _row_weight(t.graph, call)
    total = t.graph.reduce("batch_sum", _weighted(weight, value))
    wanted = trained_terms(t, levels)
    for part in (wanted, *([x] for x in t.differentiable.values())):
        check_depends(loss, surrogate, part)
    return t, total, wanted, weight, value


def trained_terms(t: Terms, levels: Mapping[str, Level]) -> list[Node]:
    """The differentiable inputs of a call: log-probs and, where they are given, entropies; of a critic its values."""
    if of_values(levels):
        return [t.value]
    return [t.logprob, *([t.entropy] if "entropy" in levels else [])]


def of_values(names: Container[str]) -> bool:
    """Whether terms of these names are those of a critic's loss (a policy's may have an extra that is called value)."""
    return "value" in names and "logprob" not in names


@dataclass(frozen=True, eq=False)
class TokenGradient:
    """The gradient alone: a program whose outputs are the derivatives for what `gradients` names, all per token.

    No pass but the last reads logprob or entropy, so a kernel that has just computed them for a token can go on.
    gradients: "logprob", "entropy" or both in this order: what the loss has a gradient for. entropy: the call reads
    entropies: in the loss, with a gradient or without, or in what is measured.
    """

    program: Program
    parameters: tuple[str, ...]
    inputs: tuple[tuple[str, int], ...]
    gradients: tuple[str, ...]
    entropy: bool

    @cached_property
    def key(self) -> str:
        """Equal for gradients that are the same in every respect."""
        return f"{self.program.key} {self.parameters} {self.gradients} {self.entropy}"


def token_gradient(loss: TracedLoss, call: PolicyCall) -> TokenGradient | None:
    """The gradient of an objective token by token; None where it needs sums over log-probs of other tokens first.

    None too where an extra gets a gradient as well, which is made with the loss.
    """
    return _cached_gradient(Key(loss), call)


@lru_cache(maxsize=512)
def _cached_gradient(key: Key, call: PolicyCall) -> TokenGradient | None:
    t, total, wanted, *_ = _traced(key.loss, call)
    if t.differentiable:
        return None
    given = zip(wanted, map(nonzero, gradients(total, wanted)), strict=True)
    found = {x.name or "": g for x, g in given if g is not None}
    names = {x.name for x in wanted}
    for node in walk(found.values()):
        if node.op in (*ALONG_TOKENS, *THRESHOLDS):
            return None
        below = walk(node.args) if node.op in SEQ_REDUCTIONS else ()
        if any(n.op == "input" and n.name in names for n in below):
            return None
    if not found:
        return None
    outputs = [_per_token(g) for g in without_stop_gradient(list(found.values()))]
    built = program(outputs, [])
    inputs = tuple((n.name or "", n.side) for n in built.inputs)
    return TokenGradient(built, parameters(key.loss), inputs, tuple(found), "entropy" in names)


def _weighted(weight: Node, value: Node) -> Node:
    """The sequence's share of the loss. A value per sequence of an empty one may be anything: it must not count."""
    if value.level == Level.TOKEN:
        return weight * seq_sum(value)
    return where(value.graph.valid(), weight * seq_sum(value), 0.0)


def _row_weight(graph: Graph, call: PolicyCall) -> Node:
    """The aggregation's weight of a sequence's token losses, per sequence."""
    length = graph.length()
    sequences, one = batch_sum(1.0, graph), graph.constant(1.0)
    width = graph.input("call.width", Level.BATCH) if call.packed else graph.parameter("call.width")
    groups = batch_sum(1.0 / group_sum(1.0, graph)) if call.aggregation == "group-mean" else one
    denominator = {
        "token-mean": graph.reduce("batch_sum", length),
        "token-sum": one,
        "seq-mean-token-mean": sequences,
        "seq-mean-token-sum": sequences,
        "seq-mean-token-sum-norm": sequences * width,
        "group-mean": groups,
    }[call.aggregation]
    denominator = graph.input("call.normalizer", Level.BATCH) if call.normalizer else maximum(denominator, 1.0)
    if call.aggregation == "group-mean":
        return 1.0 / (denominator * maximum(length * group_sum(1.0, graph), 1.0))
    if call.aggregation == "seq-mean-token-mean":
        return 1.0 / (denominator * maximum(length, 1.0))
    return 1.0 / denominator


def check_depends(loss: TracedLoss, value: Node, wanted: Sequence[Node]) -> None:
    """Refuses a loss that no parameter of the model can change, before anything runs."""
    if any(nonzero(g) is not None for g in gradients(value, wanted)):
        return
    names = " and ".join(dict.fromkeys(x.name or "" for x in wanted))
    here = {n.id for n in walk([value])}
    why = "every use is inside stop_gradient, a comparison or sign()"
    if not any(x.id in here for x in wanted):
        why = f"the loss does not depend on {names}"
    raise ValueError(f"{loss.place}: its gradient for {names} is zero everywhere: {why}")


def nonzero(gradient: Node | None) -> Node | None:
    """A gradient, unless it is known to be zero before anything runs."""
    return None if gradient is not None and gradient.op == "constant" and gradient.value == 0.0 else gradient


def _policy_metrics(t: Terms, call: PolicyCall) -> dict[str, Node]:
    """Those of METRICS that the call has the terms for, in order, then what the loss reports besides."""
    graph, levels = t.graph, dict(call.levels)
    if of_values(levels):
        return _value_metrics(t, call.explained_variance)
    values: dict[str, Node] = {name: t.reports[name] for name in CLIP_FRACTIONS if name in t.reports}
    if "old_logprob" in levels:
        log_ratio = batch_mean(clip(t.log_ratio, -LOG_RATIO_CLAMP, LOG_RATIO_CLAMP))
        ratio = batch_mean(t.ratio)
        values |= {"kl_old_k1": measured(-log_ratio), "kl_old_k3": measured(ratio - log_ratio - 1.0)}
    if "ref_logprob" in levels:
        gap = clip(t.ref_logprob - t.logprob, -LOG_RATIO_CLAMP, LOG_RATIO_CLAMP)
        values |= {"kl_ref_k1": measured(-batch_mean(gap)), "kl_ref_k3": measured(batch_mean(expm1(gap) - gap))}
    if "old_logprob" in levels:
        values |= {
            "ratio_mean": measured(ratio),
            "ratio_min": measured(batch_min(t.ratio)),
            "ratio_max": measured(batch_max(t.ratio)),
        }
    if "entropy" in levels:
        values["entropy_mean"] = measured(batch_mean(t.entropy))
    values["token_count"] = graph.reduce("batch_sum", graph.length())
    assert tuple(values) == tuple(name for name in METRICS if name in values)
    return {**values, **{name: x for name, x in t.reports.items() if name not in values}}


def _value_metrics(t: Terms, explained_variance: bool) -> dict[str, Node]:
    """VALUE_METRICS in order, as far as they are asked for, then what the loss reports besides."""
    tokens = t.graph.reduce("batch_sum", t.graph.length())
    values = {"value_mean": measured(batch_mean(t.value)), "return_mean": measured(batch_mean(t.returns))}
    if explained_variance:

        def variance(x: Node) -> Node:
            off = x - batch_mean(x)
            return batch_sum(off * off) / (tokens - 1.0)

        explained = 1.0 - variance(t.returns - t.value) / (variance(t.returns) + 1e-5)
        values["explained_variance"] = where(tokens > 1.0, explained, float("nan"))
    values["token_count"] = tokens
    assert tuple(values) == tuple(name for name in VALUE_METRICS if name in values)
    return {**values, **{name: x for name, x in t.reports.items() if name not in values}}


def _tokens(loss: TracedLoss, t: Terms, call: PolicyCall, value: Node) -> list[Node]:
    """What the call asks for of each token. value: the loss; where a report has one of its names, that is given."""
    if not call.tokens:
        return []
    levels, reported = dict(call.levels), t.reported
    there: dict[str, Node] = {name: getattr(t, name) for name in ("logprob", "entropy") if name in levels}
    if "old_logprob" in levels:
        there["ratio"] = t.ratio
    if any(name in reported for name in CLIP_FRACTIONS):
        there["clip"] = _clip_code(t)
    if "ref_logprob" in levels:
        there["kl"] = kl(t, call.kl or "k3")
    there |= {"loss": value, **reported}
    for name in call.tokens:
        if name not in there:
            why = {
                "entropy": "; pass entropy=",
                "ratio": "; pass old_logprobs=",
                "kl": "; pass ref_logprobs=",
                "clip": f"; {loss.place} reports no clip",
            }.get(name, "")
            raise ValueError(f"return_tokens: expected one of {', '.join(map(repr, there))}, got {name!r}{why}")
    return [_per_token(_as_number(there[name])) for name in call.tokens]


def _clip_code(t: Terms) -> Node:
    """A `Clip` per token, from the conditions whose means are the clip fractions."""
    code = t.graph.constant(float(Clip.NONE))
    for name, which in zip(CLIP_FRACTIONS, (Clip.LOW, Clip.HIGH, Clip.DUAL), strict=True):
        if name in t.reported:
            acted = t.reported[name]
            code = where(acted if acted.boolean else acted != 0.0, float(which), code)
    return code


def _as_number(node: Node) -> Node:
    return where(node, 1.0, 0.0) if node.boolean else node


def _assemble(
    loss: TracedLoss,
    total: Node,
    wanted: Sequence[Node],
    trained: int,  # how many of them are no extras
    found: Sequence[Node | None],
    weight: Node,
    value: Node,
    want_token_loss: bool,
    metrics: Mapping[str, Node],
    tokens: Sequence[Node],
    *,
    weighted: bool,
) -> Objective:
    # First without stop_gradient: a copy and its original may cancel, and a gradient then be the same for all tokens.
    given = [x for x in found if x is not None]
    total, weight, value, *rest = without_stop_gradient([total, weight, value, *given, *metrics.values(), *tokens])
    remaining, end = iter(rest), len(given) + len(metrics)
    metrics = dict(zip(metrics, rest[len(given) : end], strict=True))
    outputs: list[Node] = []

    def add(node: Node) -> int:
        outputs.append(node)
        return len(outputs) - 1

    graph = total.graph
    kept: list[Gradient | None] = []
    for g in (None if x is None else nonzero(next(remaining)) for x in found):
        if g is None:
            kept.append(None)
        elif g.level == Level.TOKEN:
            kept.append(Gradient(add(g), True))
        else:  # the same for every valid token of a sequence; of an extra, all of its gradient
            per_sequence = g if weighted else g * weight
            kept.append(Gradient(add(where(graph.valid(), per_sequence, 0.0)), False))
    token_loss = add(_per_token(value)) if want_token_loss else None
    row_weight = add(where(graph.valid(), weight, 0.0)) if not weighted else None
    asked = tuple(map(add, rest[end:]))
    built, before = built_of(outputs, [total, *metrics.values()], wanted, graph.sides)
    first, second = (*kept[:trained], None)[:2]
    extras = tuple(
        (x.name or "", g.output) for x, g in zip(wanted[trained:], kept[trained:], strict=True) if g is not None
    )
    names, places = parameters(loss), sources(built, wanted)
    return Objective(
        built, names, places, tuple(metrics), (first, second), token_loss, row_weight, asked, before, extras
    )


def built_of(
    outputs: Sequence[Node], batch: Sequence[Node], wanted: Sequence[Node], sides: int
) -> tuple[Program, tuple[tuple[Threshold, tuple[int, ...]], ...]]:
    """The program, and what is computed before it."""
    roots, thresholds = without_thresholds([*outputs, *batch], sides)
    built = program(roots[: len(outputs)], roots[len(outputs) :], sides)
    return built, tuple((t, sources(t.program, wanted)) for t in thresholds)


def parameters(loss: TracedLoss) -> tuple[str, ...]:
    """Names of the numbers of a call, in order."""
    return (*CALL_PARAMETERS, *sorted(loss.scalars))


def sources(built: Program, wanted: Sequence[Node]) -> tuple[int, ...]:
    """Which differentiable tensor each input of the program is, in the order of `wanted`; -1: none."""
    places = {(x.name, x.side): k for k, x in enumerate(wanted)}
    return tuple(places.get((n.name, n.side), -1) for n in built.inputs)


def _per_token(value: Node) -> Node:
    """The value per token: one per sequence is broadcast to its tokens (NaN where what is trained is)."""
    if value.level == Level.TOKEN:
        return value
    trained = "value" if of_values({name for name, _, _ in value.graph.inputs()}) else "logprob"
    x = value.graph.input(trained, Level.TOKEN)
    return where(x == x, value, float("nan"))

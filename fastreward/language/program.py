"""A loss as the backends receive it: a graph cut into passes over the tokens, with work per sequence between them.

A pass reads the tokens once: it computes per-token nodes, reduces some of them over each sequence, and in the last pass
stores the results. Between two passes the nodes per sequence (SEQUENCE) and for the batch (BATCH) are computed, among
them reductions over groups and over the batch. A pass with scans goes along each sequence one way, and what another
pass needs of it is kept per token (passes.py). A backend needs nothing but this page and the operators' table.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from fastreward.language.graph import Graph
from fastreward.language.node import Level, Node, walk
from fastreward.language.ops import (
    BACKWARDS,
    GROUP_REDUCTIONS,
    LEAVES,
    OPS,
    REDUCTIONS,
    SCANS,
    SEQ_REDUCTIONS,
    THRESHOLDS,
    where,
)
from fastreward.language.passes import Passes, is_sequence_operator, passes


@dataclass(frozen=True, eq=False)
class TokenStep:
    """One pass over the tokens of one side.

    body: TOKEN operators, arguments first; an argument of a lower level is one value for the whole sequence.
    reduce: seq_* nodes over valid tokens, each one SEQUENCE value. store: (index of `Program.outputs`, and behind them
    of `Program.kept`, node) pairs; tokens that are masked out get 0. reverse: it goes from the last token to the first.
    """

    side: int
    body: tuple[Node, ...]
    reduce: tuple[Node, ...]
    store: tuple[tuple[int, Node], ...]

    @property
    def scans(self) -> tuple[Node, ...]:
        """Those nodes of the body that need a sequence's tokens in order; all go the same way."""
        return tuple(n for n in self.body if n.op in SCANS)

    @property
    def reverse(self) -> bool:
        """Whether the pass goes from the last token to the first."""
        return any(n.op in BACKWARDS for n in self.body)

    @property
    def inputs(self) -> tuple[Node, ...]:
        """The TOKEN inputs that the pass reads."""
        used = walk(self._roots, lambda n: n.level == Level.TOKEN)
        return tuple(n for n in used if n.op == "input" and n.level == Level.TOKEN)

    @property
    def given(self) -> tuple[Node, ...]:
        """The SEQUENCE, BATCH and SCALAR nodes that the pass reads, constants among them."""
        below = (n for n in walk(self._roots, lambda n: n.level == Level.TOKEN) if n.level < Level.TOKEN)
        return tuple(below)

    @property
    def _roots(self) -> list[Node]:
        return [*(a for n in self.reduce for a in n.args), *(node for _, node in self.store)]


@dataclass(frozen=True, eq=False)
class Stage:
    """A pass over the tokens of each side, then nodes per sequence and for the batch, arguments first."""

    tokens: tuple[TokenStep, ...]
    sequences: tuple[Node, ...]


@dataclass(frozen=True, eq=False)
class Program:
    """Program that a backend runs.

    key: a hash of everything here. sides: sets of tokens (2 for preference losses). inputs: the tensors of a call in
    order; TOKEN inputs as the tokens of their side, SEQUENCE [B], BATCH []. scalars: SCALAR nodes whose values are
    given at each call, in order; constants are in the graph. prologue: SEQUENCE and BATCH nodes before the first pass.
    outputs: tensors, TOKEN or SEQUENCE nodes, f32. batch: BATCH (or SCALAR) nodes, one f32 vector. kept: (TOKEN inputs
    that passes read, the node that an earlier pass stored there): a backend's scratch.
    """

    key: str
    sides: int
    inputs: tuple[Node, ...]
    scalars: tuple[Node, ...]
    prologue: tuple[Node, ...]
    stages: tuple[Stage, ...]
    outputs: tuple[Node, ...]
    batch: tuple[Node, ...]
    kept: tuple[tuple[Node, Node], ...] = ()

    @cached_property
    def scans(self) -> bool:
        """Whether a pass has scans."""
        return any(step.scans for stage in self.stages for step in stage.tokens)

    @cached_property
    def all_inputs(self) -> tuple[Node, ...]:
        """`inputs`, then what earlier passes have kept."""
        return (*self.inputs, *(node for node, _ in self.kept))

    @cached_property
    def nodes(self) -> tuple[Node, ...]:
        """All nodes, arguments first, and what is read of them."""
        kept = (n for pair in self.kept for n in pair)
        return tuple(walk([*self.outputs, *self.batch, *self.scalars, *self.inputs, *kept]))

    @cached_property
    def groups(self) -> bool:
        """Whether the call has to say which sequences belong together."""
        return any(n.op in GROUP_REDUCTIONS for n in self.sequences)

    @cached_property
    def sequences(self) -> tuple[Node, ...]:
        """All SEQUENCE and BATCH operators in the order in which they run, seq_* nodes left out."""
        return (*self.prologue, *(n for stage in self.stages for n in stage.sequences))

    def scalar_values(self, parameters: Mapping[str, float]) -> list[float]:
        """The values of `scalars`, in float64."""
        values = self._scalar_constants.copy()
        for i, name in self._scalar_parameters:
            values[i] = parameters[name]
        for i, function, arguments in self._scalar_calls:
            values[i] = float(function(*[values[a] for a in arguments]))
        return [values[n.id] for n in self.scalars]

    # What `scalar_values` needs of the nodes, by their ids.
    @cached_property
    def _scalar_constants(self) -> dict[int, float]:
        return {n.id: n.value for n in walk(self.scalars) if n.value is not None}

    @cached_property
    def _scalar_parameters(self) -> list[tuple[int, str]]:
        return [(n.id, n.name) for n in walk(self.scalars) if n.name is not None]

    @cached_property
    def _scalar_calls(self) -> list[tuple[int, Callable[..., float], list[int]]]:
        return [(n.id, OPS[n.op].value, [a.id for a in n.args]) for n in walk(self.scalars) if n.args]


def program(outputs: Sequence[Node], batch: Sequence[Node], sides: int = 1) -> Program:
    """The program that computes `outputs` (TOKEN or SEQUENCE nodes) and `batch` (nodes of at most BATCH level)."""
    lowered = without_stop_gradient([*outputs, *batch], sides)
    cut = passes(lowered[: len(outputs)], lowered[len(outputs) :])
    nodes = list(walk([*cut.roots, *(n for _, n in cut.kept)]))
    stages = tuple(
        Stage(
            tuple(s for side in range(sides) if (s := _token_step(cut, nodes, k, side))),
            tuple(n for n in nodes if is_sequence_operator(n) and cut.place[n.id] == k),
        )
        for k in range(cut.count)
    )
    prologue = tuple(n for n in nodes if is_sequence_operator(n) and cut.place[n.id] < 0)
    own = {n.id for n, _ in cut.kept}
    inputs = tuple(n for n in nodes if n.op == "input" and n.id not in own)
    tensors, totals = tuple(cut.roots[: len(outputs)]), tuple(cut.roots[len(outputs) :])
    key, scalars = _key(nodes, tensors, totals, cut.kept), _scalars(nodes, cut.roots)
    return Program(key, sides, inputs, scalars, prologue, stages, tensors, totals, cut.kept)


def without_stop_gradient(roots: Sequence[Node], sides: int = 1) -> list[Node]:
    """Copy nodes to a fresh graph, where a constant copy and its original are one."""
    graph = Graph(sides)
    copy: dict[int, Node] = {}
    for node in walk(roots):
        args = [copy[a.id] for a in node.args]
        copy[node.id] = args[0] if node.op == "stop_gradient" else copied(graph, node, args)
    return [copy[n.id] for n in roots]


def copied(graph: Graph, node: Node, args: list[Node]) -> Node:
    """The node on another graph, with these arguments."""
    if not args:
        return _copy_leaf(graph, node)
    if node.op == "segment_sum":
        return _segment_sum(graph, *args)
    if node.op in THRESHOLDS:
        return graph.threshold(node.op, *args)
    if node.op in SCANS:
        return graph.along(node.op, *args, side=node.side)
    return graph.reduce(node.op, *args) if node.op in REDUCTIONS else graph.call(node.op, *args)


def _copy_leaf(graph: Graph, node: Node) -> Node:
    if node.op == "seq_count":
        return graph.length(node.side)
    if node.op == "constant":
        assert node.value is not None
        return graph.truth(node.value) if node.boolean else graph.constant(node.value)
    assert node.name is not None
    return graph.parameter(node.name) if node.op == "parameter" else graph.input(node.name, node.level, node.side)


def _segment_sum(graph: Graph, x: Node, ids: Node) -> Node:
    """As scans: a run's sum so far, and from its last token back to all of it, so that they have the same bits."""
    inside = ids >= 0.0
    run = where(inside, ids + 1.0, 0.0)  # neither end of the sequence has a neighbour of the same one
    so_far = graph.along("scan", x, run == graph.along("shift", run), side=ids.side)
    last = run != graph.along("shift_reverse", run)
    total = graph.along("scan_reverse", where(last, so_far, 0.0), ~last)
    return where(inside, total, 0.0)


def _token_step(cut: Passes, nodes: Sequence[Node], k: int, side: int) -> TokenStep | None:
    reduce = tuple(n for n in nodes if n.op in SEQ_REDUCTIONS and cut.place[n.id] == k and n.side == side)
    store = tuple((i, n) for i, n in cut.stores[k] if n.side == side)
    if not reduce and not store:
        return None
    roots = [*(a for n in reduce for a in n.args), *(n for _, n in store)]
    used = walk(roots, lambda n: n.level == Level.TOKEN)
    body = tuple(n for n in used if n.level == Level.TOKEN and n.op not in LEAVES)
    return TokenStep(side, body, reduce, store)


def _scalars(nodes: Sequence[Node], outputs: Sequence[Node]) -> tuple[Node, ...]:
    """SCALAR nodes that others read, constants left out."""
    read = {a.id for n in nodes if n.level > Level.SCALAR for a in n.args} | {o.id for o in outputs}
    return tuple(n for n in nodes if n.level == Level.SCALAR and n.op != "constant" and n.id in read)


def _key(
    nodes: Sequence[Node],
    outputs: Sequence[Node],
    batch: Sequence[Node],
    kept: Sequence[tuple[Node, Node]] = (),
) -> str:
    at = {n.id: i for i, n in enumerate(nodes)}
    text = repr(
        (
            [(n.op, n.name, n.value, n.boolean, int(n.level), n.side, [at[a.id] for a in n.args]) for n in nodes],
            [at[n.id] for n in outputs],
            [at[n.id] for n in batch],
            *([[(at[n.id], at[source.id]) for n, source in kept]] if kept else []),
        )
    )
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def digest(roots: Sequence[Node]) -> str:
    """Equal for the same nodes of different graphs."""
    return _key(list(walk(roots)), roots, ())


# ---------------------------------------------------------------------------------------------------- token by token
@dataclass(frozen=True, eq=False)
class TokenPart:
    """A program whose last pass has no reductions, in two: what comes before it, and that pass alone.

    before: its outputs (SEQUENCE) and batch values (BATCH) are what the pass reads of a sequence. token: one pass of
    TOKEN operators whose inputs are those of the program, then `before`'s outputs and batch values as tokens. sources:
    for each input of `token` its number among the program's inputs, or ~k for value k of `before`, outputs first.
    scalars: for each part the numbers of its scalars among the program's.
    """

    before: Program
    token: Program
    sources: tuple[int, ...]
    scalars: tuple[tuple[int, ...], tuple[int, ...]]


def token_part(whole: Program) -> TokenPart:
    """Splits a program of one side whose outputs are all TOKEN."""
    (step,) = whole.stages[-1].tokens
    assert not whole.batch
    assert all(n.op == "seq_count" for n in step.reduce)
    sequences = [n for n in step.given if n.level == Level.SEQUENCE]
    batch = [n for n in step.given if n.level == Level.BATCH]
    before = program(sequences, batch)
    graph = Graph()
    copy: dict[int, Node] = {n.id: graph.input(f"before {k}", Level.TOKEN) for k, n in enumerate((*sequences, *batch))}
    for node in walk(whole.outputs, lambda n: n.id not in copy):
        if node.id not in copy:
            args = [copy[a.id] for a in node.args]
            copy[node.id] = graph.call(node.op, *args) if args else _copy_leaf(graph, node)
    token = program([copy[n.id] for n in whole.outputs], [])
    numbers = {(n.name, n.level): k for k, n in enumerate(whole.inputs)}
    numbers |= {(f"before {k}", Level.TOKEN): ~k for k in range(len(sequences) + len(batch))}
    sources = tuple(numbers[n.name, n.level] for n in token.inputs)
    places = {_formula(n): k for k, n in enumerate(whole.scalars)}
    of_before, of_token = (tuple(places[_formula(n)] for n in p.scalars) for p in (before, token))
    return TokenPart(before, token, sources, (of_before, of_token))


def _formula(node: Node) -> str:
    """Equal for equal formulas of different graphs, to the last digit."""
    return f"{node.op} {node.name} {node.value!r} ({', '.join(map(_formula, node.args))})"

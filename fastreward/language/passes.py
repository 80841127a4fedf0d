"""How a graph is cut into passes over the tokens: what is computed in which, and what of it a later one finds kept.

A pass ends where a value per sequence or for the batch is needed; and where a scan of one direction reads what a scan
of the other has made, since a pass goes along a sequence one way. What a pass needs of an earlier one's scans is kept
per token, or the scan is done again where the pass goes its way; everything else is computed again from the inputs.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import count, product
from typing import Final

from fastreward.language.node import Level, Node, walk
from fastreward.language.ops import BACKWARDS, LEAVES, OPS, SCANS, SEQ_REDUCTIONS

#: Of each pass: whether it goes from the last token to the first.
Ways = tuple[bool, ...]
#: Name of the inputs that stand for what is kept.
KEPT: Final = "kept."


@dataclass(frozen=True, eq=False)
class Passes:
    """A graph in `count` passes. roots: of what was asked for, outputs first; kept: as `Program.kept`.

    place: for each node below them the pass in or after which it is computed, -1: before the first. stores: by pass, as
    `TokenStep.store`.
    """

    roots: tuple[Node, ...]
    kept: tuple[tuple[Node, Node], ...]
    place: dict[int, int]
    stores: tuple[tuple[tuple[int, Node], ...], ...]

    @property
    def count(self) -> int:
        """Passes."""
        return len(self.stores)


def is_sequence_operator(node: Node) -> bool:
    """Whether a node is computed between passes."""
    return node.level in (Level.BATCH, Level.SEQUENCE) and node.op not in (*LEAVES, *SEQ_REDUCTIONS)


def passes(outputs: Sequence[Node], batch: Sequence[Node]) -> Passes:
    """The fewest passes that compute `outputs` and `batch`."""
    nodes = list(walk([*outputs, *batch]))
    along = _along_tokens(nodes)
    earliest, ways = _earliest(nodes, outputs)
    last = len(ways) - 1
    place = _places(nodes, outputs, earliest, along, last)
    stores = [
        (i, n, earliest[n.id] if n.id in along else last) for i, n in enumerate(outputs) if n.level == Level.TOKEN
    ]
    if all(earliest[n.id] == last for n in nodes if n.op in SCANS):  # no pass finds anything of an earlier one
        by_pass = tuple(tuple((i, n) for i, n, k in stores if k == p) for p in range(last + 1))
        return Passes((*outputs, *batch), (), place, by_pass)
    return _Rewritten(nodes, earliest, ways, place, stores).passes(outputs, batch)


# ------------------------------------------------------------------------------------------------------------- where
def _in_pass(node: Node) -> bool:
    return node.level == Level.TOKEN or node.op in SEQ_REDUCTIONS


def _along_tokens(nodes: Iterable[Node]) -> set[int]:
    """The TOKEN nodes that are made of scans."""
    found: set[int] = set()
    for n in nodes:
        if n.level == Level.TOKEN and (n.op in SCANS or any(a.id in found for a in n.args)):
            found.add(n.id)
    return found


def _earliest(nodes: Sequence[Node], outputs: Sequence[Node]) -> tuple[dict[int, int], Ways]:
    """For each node the first pass in or after which it can be computed, and the ways of the fewest passes.

    Of as many passes those in which scans come latest: what the last pass stores is then not scanned twice.
    """
    scans = [n for n in nodes if n.op in SCANS]
    if not scans:
        earliest = _with_ways(nodes, ())
        return earliest, (False,) * (_last(nodes, outputs, earliest) + 1)
    for length in count(1):
        tried = ((_with_ways(nodes, ways), ways) for ways in product((False, True), repeat=length))
        found = [(earliest, ways) for earliest, ways in tried if _last(nodes, outputs, earliest) < length]
        if found:
            return max(found, key=lambda way: sum(way[0][n.id] for n in scans))
    raise AssertionError  # count does not end


def _last(nodes: Sequence[Node], outputs: Sequence[Node], earliest: Mapping[int, int]) -> int:
    """The last pass that there has to be."""
    inside = max((earliest[n.id] for n in nodes if _in_pass(n)), default=0)
    return max([inside, *(earliest[o.id] + 1 for o in outputs if o.level == Level.TOKEN and not _in_pass(o))])


def _with_ways(nodes: Sequence[Node], ways: Ways) -> dict[int, int]:
    earliest = {n.id: -1 for n in nodes}
    for n in nodes:
        if n.op in SEQ_REDUCTIONS:
            earliest[n.id] = max([0, *(earliest[a.id] for a in n.args)])
        elif n.level == Level.TOKEN:
            k = max([0, *(earliest[a.id] + (a.level < Level.TOKEN) for a in n.args)])
            while n.op in SCANS and k < len(ways) and ways[k] != (n.op in BACKWARDS):
                k += 1
            earliest[n.id] = k
        elif n.args:
            earliest[n.id] = max(earliest[a.id] for a in n.args)
    return earliest


def _places(
    nodes: Sequence[Node], outputs: Sequence[Node], earliest: dict[int, int], along: set[int], last: int
) -> dict[int, int]:
    """For each node the pass in or after which it is computed.

    A reduction that no later pass waits for moves to the last one that reads its inputs anyway, or to the last; but one
    of scans stays where they are.
    """
    awaited = {m.id for m in walk(a for n in nodes if n.level == Level.TOKEN for a in n.args if a.level < Level.TOKEN)}

    def stays(n: Node) -> bool:
        return n.id in awaited or any(a.id in along for a in n.args)

    fixed = [n for n in nodes if n.op in SCANS or (n.op in SEQ_REDUCTIONS and stays(n))]
    fixed += [o for o in outputs if o.id in along]
    read = [_inputs(n for n in fixed if earliest[n.id] == p) for p in range(last)]
    place: dict[int, int] = {}
    for n in nodes:
        if n.op in SEQ_REDUCTIONS and not stays(n):
            needed = _inputs(n.args)
            there = (p for p in reversed(range(last)) if along and needed and needed <= read[p])
            place[n.id] = next((p for p in there if p >= earliest[n.id]), last)
        elif n.op in SEQ_REDUCTIONS or n.level == Level.TOKEN or not n.args:
            place[n.id] = earliest[n.id]
        else:
            place[n.id] = max(place[a.id] for a in n.args)
    return place


def _inputs(roots: Iterable[Node]) -> set[int]:
    """The TOKEN inputs that are read for them."""
    below = walk(roots, lambda n: n.level == Level.TOKEN or n.op in SEQ_REDUCTIONS)
    return {n.id for n in below if n.op == "input" and n.level == Level.TOKEN}


# ------------------------------------------------------------------------------------------------------ what is kept
class _Rewritten:
    """The graph with an input for each kept value, in every pass that reads it."""

    def __init__(
        self,
        nodes: Sequence[Node],
        earliest: dict[int, int],
        ways: Ways,
        place: dict[int, int],
        stores: Sequence[tuple[int, Node, int]],
    ) -> None:
        self._nodes, self._earliest, self._ways, self._place = nodes, earliest, ways, place
        self._stores = stores
        self._graph = nodes[0].graph
        self._lower: dict[int, Node] = {}  # what is not per token, by its original
        self._tokens: dict[tuple[int, int], Node] = {}  # per token, by original and pass
        self._inputs: dict[int, tuple[Node, Node]] = {}  # by original: the input, and what is kept there
        self._new_place: dict[int, int] = {}
        self._by_pass: list[list[tuple[int, Node]]] = [[] for _ in ways]
        self._kept: list[set[int]] = [set() for _ in ways]
        for p in reversed(range(len(ways))):  # what is kept has to be computed in an earlier one
            self._kept[p] = self._chosen(p)

    def passes(self, outputs: Sequence[Node], batch: Sequence[Node]) -> Passes:
        """The result."""
        for n in self._nodes:
            if n.level < Level.TOKEN:
                self._lower[n.id] = self._below(n)
        stored = {i: self._at(n, p) for i, n, p in self._stores}
        roots = [stored[i] if i in stored else self._lower[n.id] for i, n in enumerate([*outputs, *batch])]
        for i, _, p in self._stores:
            self._by_pass[p].append((i, stored[i]))
        kept = tuple(self._inputs.values())
        for k, (original, (_, source)) in enumerate(self._inputs.items(), len(outputs)):
            self._by_pass[self._earliest[original]].append((k, source))
        everything = walk([*roots, *(source for _, source in kept)])
        place = self._new_place | {n.id: -1 for n in everything if n.id not in self._new_place}
        return Passes(tuple(roots), kept, place, tuple(map(tuple, self._by_pass)))

    # -------------------------------------------------------------------------------------------------- which
    def _roots(self, p: int) -> list[Node]:
        """The TOKEN values that pass p has to have."""
        reduced = (a for n in self._nodes if n.op in SEQ_REDUCTIONS and self._place[n.id] == p for a in n.args)
        scans = (n for n in self._nodes if n.op in SCANS and self._earliest[n.id] == p)
        later = set().union(*self._kept[p + 1 :])
        kept = (n for n in self._nodes if n.id in later and self._earliest[n.id] == p)
        return [*reduced, *scans, *kept, *(n for _, n, k in self._stores if k == p)]

    def _chosen(self, p: int) -> set[int]:
        """What pass p reads of earlier ones' scans: themselves or what was made of them, whichever costs less."""
        options = [self._cut(p, made, again) for made in (True, False) for again in (True, False)]
        return min(options, key=lambda option: option[1])[0]

    def _cut(self, p: int, made: bool, again: bool) -> tuple[set[int], float]:
        """(nodes to keep, tensors read and written for that). again: scans that go the pass's way are redone."""
        found: set[int] = set()
        for n in self._nodes:
            if n.level == Level.TOKEN and (self._gone(n, p, again) or any(a.id in found for a in n.args)):
                found.add(n.id)

        def stops(n: Node) -> bool:
            return n.id in found and self._earliest[n.id] < p and (made or self._gone(n, p, again))

        below = list(walk(self._roots(p), lambda n: n.level == Level.TOKEN and not stops(n)))
        kept = [n for n in below if n.level == Level.TOKEN and stops(n)]
        read = sum(n.op == "input" and n.level == Level.TOKEN for n in below)
        redone = sum(n.op in SCANS and not stops(n) and self._earliest[n.id] < p for n in below)
        cost = 2 * (len(kept) + len(self._needed(kept))) + read + 0.5 * redone
        return {n.id for n in kept}, cost

    def _needed(self, kept: Sequence[Node]) -> set[int]:
        """The scans that have to be kept for these, besides those that their passes need anyway."""
        needed: set[int] = set()
        for e in {self._earliest[n.id] for n in kept}:
            needed |= self._scans_gone([n for n in kept if self._earliest[n.id] == e], e)
            needed -= self._scans_gone(self._roots(e), e)
        return needed

    def _scans_gone(self, roots: Sequence[Node], p: int) -> set[int]:
        """The scans that pass p can't do and the roots are made of."""
        below = walk(roots, lambda n: not self._gone(n, p, True))
        return {n.id for n in below if self._gone(n, p, True)}

    def _gone(self, n: Node, p: int, again: bool) -> bool:
        """Whether a scan is an earlier pass's, which pass p can't do, or is not to do again."""
        return n.op in SCANS and self._earliest[n.id] < p and not (again and self._goes(n, p))

    def _goes(self, n: Node, p: int) -> bool:
        return self._ways[p] == (n.op in BACKWARDS)

    # ------------------------------------------------------------------------------------------------ rewriting
    def _below(self, n: Node) -> Node:
        """A node that is not per token, of rewritten arguments."""
        if n.op in SEQ_REDUCTIONS and n.args:
            new = self._graph.reduce(n.op, *(self._at(a, self._place[n.id]) for a in n.args))
        elif not n.args:
            new = n
        else:
            new = self._made(n, [self._lower[a.id] for a in n.args])
        self._new_place[new.id] = self._place[n.id]
        return new

    def _at(self, node: Node, p: int) -> Node:
        """A TOKEN node as pass p computes it; any other as it is."""
        for n in walk([node], lambda n: (n.id, p) not in self._tokens and self._computed(n, p)):
            if n.level == Level.TOKEN and (n.id, p) not in self._tokens:
                self._tokens[n.id, p] = self._token(n, p)
        return self._tokens[node.id, p] if node.level == Level.TOKEN else self._lower[node.id]

    def _computed(self, n: Node, p: int) -> bool:
        return n.level == Level.TOKEN and n.id not in self._kept[p]

    def _token(self, n: Node, p: int) -> Node:
        if n.id in self._kept[p]:
            if n.id not in self._inputs:
                source = self._at(n, self._earliest[n.id])
                name = f"{KEPT}{len(self._inputs)}"
                self._inputs[n.id] = self._graph.input(name, Level.TOKEN, n.side), source
            found = self._inputs[n.id][0]
            return found != 0.0 if n.boolean else found
        args = [self._tokens[a.id, p] if a.level == Level.TOKEN else self._lower[a.id] for a in n.args]
        new = self._made(n, args) if args else n
        self._new_place.setdefault(new.id, self._earliest[n.id])
        return new

    def _made(self, n: Node, args: Sequence[Node]) -> Node:
        """The node on other arguments, not simplified."""
        if all(a is b for a, b in zip(n.args, args, strict=True)):
            return n
        if n.op in SCANS:
            return self._graph.along(n.op, *args, side=n.side)
        return self._graph.plain(n.op, *args) if n.op in OPS else self._graph.reduce(n.op, *args)

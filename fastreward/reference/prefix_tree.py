"""Prefix trees in plain Python and float64 torch: one node, sequence or token at a time (trie.py builds them).

NaN is the value of a sequence, or of a node, that is not there.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor

from fastreward.reference.trie import NODES, build, lengths, starts

__all__ = [
    "advantages",
    "aggregate",
    "aggregate_backward",
    "broadcast_to_tokens",
    "build",
    "collect",
    "gather",
    "layout",
    "lengths",
    "node_of_token",
    "propagate",
    "propagate_backward",
    "scatter_reduce",
    "starts",
    "unique_of_token",
]

#: Fields of the rows, as every backend exchanges them.
ROWS = ("leaf", "order", "start", "length")


class _Forest:
    """The tensors `nodes` and `rows` as lists, by name; empty nodes behind those that are there are left out."""

    def __init__(self, nodes: Tensor, rows: Tensor) -> None:
        names, values = (*NODES, *ROWS), (*nodes.tolist(), *rows.tolist())
        self._fields: dict[str, list[int]] = dict(zip(names, values, strict=True))
        self.size = sum(count > 0 for count in self.count)

    def __getattr__(self, name: str) -> list[int]:
        """A field of the nodes or of the sequences."""
        return self._fields[name]

    def rows_of(self, n: int) -> list[int]:
        """The sequences through a node."""
        return self.order[self.row_begin[n] : self.row_begin[n] + self.count[n]]

    def children_of(self) -> list[list[int]]:
        """The children of each node."""
        children: list[list[int]] = [[] for _ in range(self.size)]
        for n in range(self.size):
            if self.parent[n] >= 0:
                children[self.parent[n]].append(n)
        return children

    def path(self, n: int) -> list[int]:
        """A node's ancestors from its root down, and the node itself."""
        found = [n]
        while self.parent[found[-1]] >= 0:
            found.append(self.parent[found[-1]])
        return found[::-1]

    def tokens(self, row: int) -> Iterator[tuple[int, int, int]]:
        """(flat index, node, place on the node's edge) of a sequence's tokens, in order."""
        for n in self.path(self.leaf[row]):
            for k in range(self.edge_length[n]):
                yield self.start[row] + self.edge_start[n] + k, n, k


#: (initial value, lower bound, upper bound) of a recurrence.
Rules = tuple[float | Tensor, float | Tensor, float | Tensor]


def _doubles(values: Sequence[float]) -> Tensor:
    """Numbers as f64, none of them by way of f32."""
    return torch.tensor(values, dtype=torch.float64)


# ------------------------------------------------------------------------------------------------------- aggregate
class _AggregateOptions(Protocol):
    """The fields of fastreward's AggregateOptions read here (the reference imports nothing but torch)."""

    @property
    def op(self) -> str: ...
    @property
    def over(self) -> str: ...
    @property
    def normalized(self) -> bool: ...
    @property
    def scale(self) -> float | Tensor: ...
    @property
    def discount(self) -> float | Tensor: ...


def _combine(v: Tensor, w: Tensor, o: _AggregateOptions) -> Tensor:
    """One value of several, with weights; NaN of none."""
    if len(v) == 0:
        return torch.full((), torch.nan, dtype=v.dtype)
    if o.op == "mean":
        return (w * v).sum() / w.sum()
    if o.op == "sum":
        return (w * v).sum()
    if o.op == "max":
        return v.max()
    if o.op == "min":
        return v.min()
    if o.op == "any":
        return (v != 0).any().double()
    total = torch.logsumexp(o.scale * v + w.log(), 0)
    return (total - w.sum().log() if o.normalized else total) / o.scale


def _derivatives(v: Tensor, w: Tensor, o: _AggregateOptions) -> Tensor:
    """Of _combine for each value: mean, sum and logsumexp. Where a logsumexp is infinite, nothing moves it: 0."""
    if o.op == "mean":
        return w / w.sum()
    if o.op == "sum":
        return w
    logs = o.scale * v + w.log()
    total = torch.logsumexp(logs, 0)
    return torch.zeros_like(v) if total.isinf() else (logs - total).exp()


class _Aggregate:
    """The parts of each node's value: sequences, or children."""

    def __init__(
        self,
        values: Tensor,
        weights: Tensor | None,
        child_weights: Tensor | None,
        forest: _Forest,
        options: _AggregateOptions,
    ) -> None:
        self.f, self.o = forest, options
        self.values = values.cpu().double()
        self.weights = torch.ones_like(self.values) if weights is None else weights.cpu().double()
        ones = _doubles([1.0] * forest.size)
        self.child_weights = ones if child_weights is None else child_weights.cpu().double()
        self.discount = float(options.discount)
        self.discounts = [self.discount**length for length in forest.edge_length]
        self.children = forest.children_of()

    def sequences(self, n: int) -> tuple[list[int], Tensor, Tensor, Tensor]:
        """Over sequences: those below a node that are there, their discounts, discounted values and weights."""
        rows = _there(self.f.rows_of(n), self.values)
        end = self.f.edge_start[n] + self.f.edge_length[n]
        discounts = _doubles([self.discount ** (self.f.length[b] - end) for b in rows])
        return rows, discounts, self.values[rows] * discounts, self.weights[rows]

    def parts(self, n: int, results: Tensor) -> tuple[list[int], list[int], Tensor, Tensor, Tensor]:
        """Over children: the sequences that end at a node and its child nodes, if they are there; discounts, values and
        weights of both.

        results: [nodes], those of the children.
        """
        rows = _there([b for b in self.f.rows_of(n) if self.f.leaf[b] == n], self.values)
        children = _there(self.children[n], results)
        discounts = _doubles([1.0] * len(rows) + [self.discounts[c] for c in children])
        values = torch.cat([self.values[rows], results[children]]) * discounts
        weights = torch.cat([self.weights[rows], self.child_weights[children]])
        return rows, children, discounts, values, weights

    def results(self) -> Tensor:
        """f64 [nodes]."""
        out = _doubles([0.0] * self.f.size)
        for n in reversed(range(self.f.size)):
            *_, v, w = self.sequences(n) if self.o.over == "sequences" else self.parts(n, out)
            out[n] = _combine(v, w, self.o)
        return out


def aggregate(
    values: Tensor,
    weights: Tensor | None,
    child_weights: Tensor | None,
    nodes: Tensor,
    rows: Tensor,
    options: _AggregateOptions,
) -> Tensor:
    """[nodes], the dtype of values."""
    found = _Aggregate(values, weights, child_weights, _Forest(nodes, rows), options).results()
    return _padded(found, nodes).to(values)


def aggregate_backward(
    grad: Tensor,
    values: Tensor,
    weights: Tensor | None,
    child_weights: Tensor | None,
    nodes: Tensor,
    rows: Tensor,
    options: _AggregateOptions,
) -> Tensor:
    """Gradient for values, [B]; for mean, sum and logsumexp. None comes from a node whose value is NaN."""
    a = _Aggregate(values, weights, child_weights, _Forest(nodes, rows), options)
    out = torch.zeros_like(a.values)
    upstream = grad.cpu().double().clone()
    results = a.results()
    for n in _there(range(a.f.size), results):
        if options.over == "sequences":
            ends, discounts, v, w = a.sequences(n)
            children: list[int] = []
        else:
            ends, children, discounts, v, w = a.parts(n, results)
        passed = upstream[n] * _derivatives(v, w, options) * discounts
        out[ends] += passed[: len(ends)]
        upstream[children] += passed[len(ends) :]
    return out.to(values)


def _there(which: Sequence[int], values: Tensor) -> list[int]:
    """Those whose value is not NaN."""
    return [k for k in which if not values[k].isnan()]


def _padded(found: Tensor, nodes: Tensor) -> Tensor:
    """Zeros for the empty nodes at the end."""
    return torch.cat([found, found.new_zeros(nodes.shape[1] - len(found))])


# ------------------------------------------------------------------------------------------------------ advantages
class _AdvantageOptions(Protocol):
    """The fields of fastreward's AdvantageOptions read here."""

    @property
    def mode(self) -> str: ...
    @property
    def scale(self) -> str: ...
    @property
    def ddof(self) -> int: ...
    @property
    def eps(self) -> float | Tensor: ...
    @property
    def singleton(self) -> str: ...


def advantages(values: Tensor, nodes: Tensor, rows: Tensor, options: _AdvantageOptions) -> Tensor:
    """[nodes] from node values [nodes]; 0 for roots, without a value and with nothing to compare it with."""
    forest = _Forest(nodes, rows)
    children = forest.children_of()
    v = values.cpu().double()
    out = _doubles([0.0] * forest.size)
    for n in range(forest.size):
        if forest.parent[n] >= 0 and not v[n].isnan():
            out[n] = _advantage(v, n, forest, children[forest.parent[n]], options)
    return _padded(out, nodes).to(values)


def _advantage(v: Tensor, n: int, forest: _Forest, siblings: list[int], o: _AdvantageOptions) -> Tensor:
    *ancestors, _ = path = forest.path(n)
    if o.mode == "td":
        return _mean_difference(v, n, [ancestors[-1]])
    if o.mode == "root":
        return _mean_difference(v, n, [ancestors[0]])
    if o.mode == "td+root":
        return _mean_difference(v, n, [ancestors[-1]]) + _mean_difference(v, n, [ancestors[0]])
    if o.mode == "all-ancestors":
        return _mean_difference(v, n, ancestors)
    if o.mode == "depth-weighted":
        return _mean_difference(v, n, path, forest.count)
    siblings = _there(siblings, v)
    if len(siblings) == 1:
        return v[n] if o.singleton == "raw" else torch.zeros_like(v[n])
    centred = v[siblings] - v[siblings].mean()
    deviation = ((centred**2).sum() / max(len(siblings) - o.ddof, 0)).sqrt()
    return centred[siblings.index(n)] / (deviation + o.eps if o.scale == "std" else 1.0)


def _mean_difference(v: Tensor, n: int, others: list[int], weights: list[int] | None = None) -> Tensor:
    """The mean of V - V(a) over those that are there; 0 if none is."""
    others = _there(others, v)
    if not others:
        return torch.zeros_like(v[n])
    w = _doubles([1.0 if weights is None else weights[a] for a in others])
    return (w * (v[n] - v[others])).sum() / w.sum()


# ------------------------------------------------------------------------------------------------------- propagate
def propagate(scale: Tensor, shift: Tensor, nodes: Tensor, rows: Tensor, rules: Rules) -> Tensor:
    """x[root] = initial, x[n] = clamp(scale[n] * x[parent] + shift[n], low, high); [nodes]."""
    x, _ = _recurrence(scale, shift, _Forest(nodes, rows), rules)
    return _padded(x, nodes).to(scale)


def _recurrence(scale: Tensor, shift: Tensor, forest: _Forest, rules: Rules) -> tuple[Tensor, list[bool]]:
    """x, f64 [nodes], and what passes no gradient: where a bound has cut, and NaN."""
    a, b = scale.cpu().double(), shift.cpu().double()
    initial, low, high = map(float, rules)
    x = _doubles([initial] * forest.size)
    cut = [False] * forest.size
    for n in range(forest.size):
        if forest.parent[n] < 0:
            continue
        x[n] = a[n] * x[forest.parent[n]] + b[n]
        for bound, crossed in ((low, torch.lt), (high, torch.gt)):
            if crossed(x[n], bound):
                x[n], cut[n] = bound, True
        cut[n] = cut[n] or bool(x[n].isnan())
    return x, cut


def propagate_backward(
    grad: Tensor, scale: Tensor, shift: Tensor, nodes: Tensor, rows: Tensor, rules: Rules
) -> tuple[Tensor, Tensor]:
    """Gradients for scale and shift; none passes a bound that has cut, nor NaN."""
    forest = _Forest(nodes, rows)
    x, cut = _recurrence(scale, shift, forest, rules)
    upstream = grad.cpu().double().clone()
    grad_scale, grad_shift = torch.zeros_like(upstream), torch.zeros_like(upstream)
    for n in reversed(range(forest.size)):
        p = forest.parent[n]
        if p >= 0 and not cut[n]:
            grad_scale[n] = upstream[n] * x[p]
            grad_shift[n] = upstream[n]
            upstream[p] += upstream[n] * scale[n].item()
    return grad_scale.to(scale), grad_shift.to(scale)


# ------------------------------------------------------------------------------------------------ nodes and tokens
def broadcast_to_tokens(
    values: Tensor,
    nodes: Tensor,
    rows: Tensor,
    extents: Tensor,
    mask: Tensor | None,
    place: str,
    count: int,
    row_values: Tensor | None = None,
) -> Tensor:
    """Node values [nodes] to flat tokens [count], to a whole edge or its start or end; 0 where there is no credit.

    row_values [B]: added on every token of a row that gets credit. NaN: the row gets 0, a node adds nothing.
    """
    forest = _Forest(nodes, rows)
    v = values.tolist()
    own = [0.0] * len(forest.leaf) if row_values is None else row_values.tolist()
    out = [0.0] * count
    for i, n, row in _places(forest, mask, place):
        if not math.isnan(v[n]) and not math.isnan(own[row]):
            out[i] += v[n]
    for i, _, row in _places(forest, mask, "broadcast"):
        if not math.isnan(own[row]):
            out[i] += own[row]
    return _doubles(out).to(values)


def collect(tokens: Tensor, nodes: Tensor, rows: Tensor, extents: Tensor, mask: Tensor | None, place: str) -> Tensor:
    """The transpose of broadcast_to_tokens: flat tokens to node values [nodes], summed."""
    out = [0.0] * nodes.shape[1]
    t = tokens.tolist()
    for i, n, _ in _places(_Forest(nodes, rows), mask, place):
        out[n] += t[i]
    return _doubles(out).to(tokens)


def _places(forest: _Forest, mask: Tensor | None, place: str) -> Iterator[tuple[int, int, int]]:
    """(flat index, node, row) of the tokens that get their node's value."""
    for i, n, k, row in _credited(forest, mask):
        only = {"broadcast": k, "start": 0, "end": forest.edge_length[n] - 1}[place]
        if k == only:
            yield i, n, row


def _credited(forest: _Forest, mask: Tensor | None) -> Iterator[tuple[int, int, int, int]]:
    """(flat index, node, place on its edge, row) of the tokens that get credit, row by row."""
    counts = None if mask is None else (mask.cpu() != 0).tolist()
    for row in range(len(forest.leaf)):
        for i, n, k in forest.tokens(row):
            if counts is None or counts[i]:
                yield i, n, k, row


# ----------------------------------------------------------------------------------------- unique tokens and tokens
def gather(unique: Tensor, nodes: Tensor, rows: Tensor, extents: Tensor, mask: Tensor | None, count: int) -> Tensor:
    """Values of unique tokens to flat tokens [count]; 0 outside of the sequences and where masked."""
    forest = _Forest(nodes, rows)
    out = [0.0] * count
    u = unique.tolist()
    for i, n, k, _ in _credited(forest, mask):
        out[i] = u[forest.token_begin[n] + k]
    return _doubles(out).to(unique)


def scatter_reduce(
    tokens: Tensor, nodes: Tensor, rows: Tensor, extents: Tensor, mask: Tensor | None, op: str, unique: int
) -> Tensor:
    """Flat tokens to unique tokens [unique]: sum, mean or first of those that count, 0 where none does."""
    forest = _Forest(nodes, rows)
    t = tokens.tolist()
    found: list[list[float]] = [[] for _ in range(unique)]  # in the order of the batch
    for i, n, k, _ in _credited(forest, mask):
        found[forest.token_begin[n] + k].append(t[i])
    reduce = {"sum": sum, "mean": lambda x: sum(x) / len(x), "first": lambda x: x[0]}[op]
    return _doubles([reduce(x) if x else 0.0 for x in found]).to(tokens)


def node_of_token(nodes: Tensor, rows: Tensor, extents: Tensor, count: int) -> Tensor:
    """i32 [count]: each token's node, -1 outside of the sequences."""
    out = torch.full((count,), -1, dtype=torch.int32)
    for i, n, _, _ in _credited(_Forest(nodes, rows), None):
        out[i] = n
    return out.to(nodes.device)


def unique_of_token(nodes: Tensor, rows: Tensor, extents: Tensor, count: int) -> Tensor:
    """i64 [count]: each token's unique token, -1 outside of the sequences."""
    forest = _Forest(nodes, rows)
    out = torch.full((count,), -1, dtype=torch.int64)
    for i, n, k, _ in _credited(forest, None):
        out[i] = forest.token_begin[n] + k
    return out.to(nodes.device)


def layout(tokens: Tensor, nodes: Tensor, rows: Tensor, unique: int) -> tuple[Tensor, ...]:
    """i64 [unique] each: token id, position, parent (-1: none), end of the subtree, sequences, flat index."""
    forest = _Forest(nodes, rows)
    ids = tokens.tolist()
    columns = []
    for n in range(forest.size):
        above = forest.parent[n]
        last = -1 if above < 0 else forest.token_begin[above] + forest.edge_length[above] - 1
        for k in range(forest.edge_length[n]):
            position = forest.edge_start[n] + k
            source = forest.start[forest.first_row[n]] + position
            own = forest.token_begin[n] + k
            parent = -1 if position == 0 else last if k == 0 else own - 1
            columns.append((ids[source], position, parent, forest.token_tout[n], forest.count[n], source))
    fields = torch.tensor(columns, dtype=torch.int64).reshape(len(columns), 6).t().to(nodes.device)
    return tuple(field.clone() for field in torch.nn.functional.pad(fields, (0, unique - len(columns))))

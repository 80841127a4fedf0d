"""Credit over prefix trees as its papers and code describe it: node objects, recursion, Python floats.

A forest is grown from lists; every method is written out from its own definition (prefixes, path ids, branch positions,
walks up and down), not from fastreward's operations. Tensors come out only at the end: float64 [B, T].
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

Rewards = Sequence[float]


@dataclass(eq=False)
class Node:
    """Positions [start, end) of the sequences `rows`; `ended`: those of them that end there."""

    start: int
    end: int
    rows: list[int]
    ended: list[int]
    parent: Node | None
    children: list[Node] = field(default_factory=list)


@dataclass(eq=False)
class Forest:
    """credit: [B][T], which tokens count; place: [B][T], the position of a token in its sequence, -1 behind its end."""

    sequences: list[list[Hashable]]
    groups: list[Hashable]
    credit: list[list[bool]]
    roots: list[Node]
    place: list[list[int]]

    def nodes(self) -> Iterator[Node]:
        for root in self.roots:
            yield from walk(root)

    def path(self, row: int) -> list[Node]:
        """From the root to where the sequence ends."""
        node = next(root for root in self.roots if row in root.rows)
        found = [node]
        while row not in node.ended:
            node = next(child for child in node.children if row in child.rows)
            found.append(node)
        return found

    def members(self, row: int) -> list[int]:
        """Sequences of its group."""
        return [b for b, group in enumerate(self.groups) if group == self.groups[row]]

    def tokens(self, value: Callable[[int, Node, int], float]) -> Tensor:
        """value(row, node, position) on every credited token, 0 on the others."""
        columns = len(self.credit[0]) if self.credit else 0
        out = torch.zeros(len(self.sequences), columns, dtype=torch.float64)
        for row in range(len(self.sequences)):
            path = self.path(row)
            for column, position in enumerate(self.place[row]):
                if position >= 0 and self.credit[row][column]:
                    node = next(n for n in path if n.start <= position < n.end)
                    out[row, column] = value(row, node, position)
        return out

    def broadcast(self, value: dict[Node, float]) -> Tensor:
        return self.tokens(lambda _, node, __: value[node])

    def per_row(self, value: Sequence[float]) -> Tensor:
        return self.tokens(lambda row, _, __: value[row])


def walk(node: Node) -> Iterator[Node]:
    yield node
    for child in node.children:
        yield from walk(child)


def forest(
    sequences: Sequence[Sequence[Hashable]],
    groups: Sequence[Hashable],
    credit: list[list[bool]],
    *,
    place: list[list[int]] | None = None,
    compress: bool = True,
) -> Forest:
    sequences = [list(s) for s in sequences]
    if place is None:
        place = [[t if t < len(s) else -1 for t in range(len(c))] for s, c in zip(sequences, credit, strict=True)]
    of_group: dict[Hashable, list[int]] = {}
    for row, group in enumerate(groups):
        of_group.setdefault(group, []).append(row)
    roots = []
    for rows in of_group.values():
        root = Node(0, 0, rows, [b for b in rows if not sequences[b]], None)
        grow(root, sequences, compress)
        roots.append(root)
    return Forest(sequences, list(groups), credit, roots, place)


def grow(node: Node, sequences: list[list[Hashable]], compress: bool) -> None:
    branches: dict[Hashable, list[int]] = {}
    for row in node.rows:
        if row not in node.ended:
            branches.setdefault(sequences[row][node.end], []).append(row)
    for rows in branches.values():
        end = node.end + 1
        while compress and all(len(sequences[b]) > end for b in rows) and len({sequences[b][end] for b in rows}) == 1:
            end += 1
        child = Node(node.end, end, rows, [b for b in rows if len(sequences[b]) == end], node)
        node.children.append(child)
        grow(child, sequences, compress)


# -------------------------------------------------------------------------------------------------------------- pieces
def deviation(values: Sequence[float], ddof: int) -> float:
    mean = fmean(values)
    return math.sqrt(sum((x - mean) ** 2 for x in values) / (len(values) - ddof))


def normal(x: float, values: Sequence[float], ddof: int, eps: float) -> float:
    """(x - mean) / (std + eps); 0 of one alone."""
    return 0.0 if len(values) == 1 else (x - fmean(values)) / (deviation(values, ddof) + eps)


def below(f: Forest, r: Rewards, reduce: Callable[[list[float]], float] = fmean) -> dict[Node, float]:
    return {node: reduce([r[b] for b in node.rows]) for node in f.nodes()}


def of_children(f: Forest, leaf: Rewards, reduce: Callable[[list[float]], float] = fmean) -> dict[Node, float]:
    """A sequence that ends at a node is one of its children."""
    found: dict[Node, float] = {}

    def up(node: Node) -> float:
        found[node] = reduce([leaf[b] for b in node.ended] + [up(child) for child in node.children])
        return found[node]

    for root in f.roots:
        up(root)
    return found


def difference(f: Forest, v: dict[Node, float]) -> dict[Node, float]:
    return {n: 0.0 if n.parent is None else v[n] - v[n.parent] for n in f.nodes()}


def siblings(f: Forest, v: dict[Node, float], ddof: int, eps: float, scale: str = "std") -> dict[Node, float]:
    out = {}
    for n in f.nodes():
        values = [] if n.parent is None else [v[child] for child in n.parent.children]
        if len(values) < 2:
            out[n] = 0.0
        elif scale == "none":
            out[n] = v[n] - fmean(values)
        else:
            out[n] = normal(v[n], values, ddof, eps)
    return out


def group_normal(f: Forest, r: Rewards, ddof: int, eps: float) -> list[float]:
    return [normal(r[b], [r[i] for i in f.members(b)], ddof, eps) for b in range(len(r))]


def whitened(x: Tensor, counted: Tensor) -> Tensor:
    kept = x[counted]
    variance = kept.var(correction=1)
    return torch.where(counted, (x - kept.mean()) / (variance + 1e-8).sqrt(), 0.0)


def credited(f: Forest) -> Tensor:
    return f.tokens(lambda *_: 1.0) != 0


# ----------------------------------------------------------------------------------------------- by prefixes of tokens
def prefix_value(f: Forest, r: Rewards, row: int, length: int) -> float:
    """Mean reward of the group's responses that begin as this one does."""
    begin = f.sequences[row][:length]
    return fmean(r[b] for b in f.members(row) if f.sequences[b][:length] == begin)


def tempo(f: Forest, r: Rewards, ddof: int = 1, eps: float = 1e-6) -> Tensor:
    def value(row: int, _: Node, t: int) -> float:
        group = [r[b] for b in f.members(row)]
        if len(group) == 1:
            return 0.0
        td = prefix_value(f, r, row, t + 1) - prefix_value(f, r, row, t)
        return (r[row] - fmean(group) + td) / (deviation(group, ddof) + eps)

    return f.tokens(value)


def tvm(f: Forest, r: Rewards) -> Tensor:
    return f.tokens(lambda row, _, t: prefix_value(f, r, row, t + 1))


# ------------------------------------------------------------------------------------------------- steps and segments
def spo_tree(
    f: Forest,
    r: Rewards,
    variant: str = "rloo",
    old: Tensor | None = None,
    threshold: float = 0.9,
    whiten: bool = True,
) -> Tensor:
    v = of_children(f, r)
    out = f.broadcast(difference(f, v) if variant == "rloo" else siblings(f, v, 0, 1e-8))
    counted = credited(f)
    if old is not None:
        unsure = counted & (old.exp() < threshold)
        out = torch.where(unsure, out, 0.0)
        counted = unsure if bool(unsure.any()) else counted
    return whitened(out, counted) if whiten else out


def treerpo(f: Forest, r: Rewards, scale: str = "std", ddof: int = 1, eps: float = 1e-6) -> Tensor:
    return f.broadcast(siblings(f, of_children(f, r), ddof, eps, scale))


def depth(node: Node) -> int:
    return 0 if node.parent is None else 1 + depth(node.parent)


def portool(
    f: Forest,
    r: Rewards,
    step: Sequence[float] | None = None,
    gamma: float = 0.95,
    op: str = "mean",
    weights: tuple[float, float] = (1.0, 1.0),
) -> Tensor:
    reduce = fmean if op == "mean" else max
    v = {}
    for number, node in enumerate(f.nodes()):
        steps_left = {b: len(f.path(b)) - 1 - depth(node) for b in node.rows}
        v[node] = reduce([gamma ** steps_left[b] * r[b] for b in node.rows]) + (0.0 if step is None else step[number])
    fork = f.broadcast(siblings(f, v, 1, 1e-6))
    return weights[0] * f.per_row(group_normal(f, r, 1, 1e-6)) + weights[1] * fork


def tree_grpo(f: Forest, r: Rewards, prompts: Sequence[Hashable], sequential: bool = False) -> Tensor:
    def norm(values: Rewards, keys: Sequence[Hashable]) -> list[float]:
        out = []
        for b, key in enumerate(keys):
            group = [x for x, other in zip(values, keys, strict=True) if other == key]
            out.append(values[b] if len(group) == 1 else normal(values[b], group, 1, 1e-6))
        return out

    prompt = norm(r, prompts)
    if sequential:
        return f.per_row(norm(prompt, f.groups))
    return f.per_row([a + b for a, b in zip(prompt, norm(r, f.groups), strict=True)])


def at2po(
    f: Forest,
    r: Rewards,
    entropy: Sequence[float],
    node_value: str = "child_softmax",
    advantage: str = "node_value",
    normalize: bool = True,
) -> Tensor:
    leaf = group_normal(f, r, 0, 1e-6) if normalize else list(r)
    h = dict(zip(f.nodes(), entropy, strict=True))
    v: dict[Node, float] = {}

    def up(node: Node) -> float:
        values = [leaf[b] for b in node.ended] + [up(child) for child in node.children]
        weights = [1.0] * len(node.ended) + [math.exp(h[child]) for child in node.children]
        if node_value == "child_mean":
            weights = [1.0] * len(values)
        if node_value == "leaf_mean":
            values, weights = [leaf[b] for b in node.rows], [1.0] * len(node.rows)
        v[node] = sum(w * x for w, x in zip(weights, values, strict=True)) / sum(weights)
        return v[node]

    for root in f.roots:
        up(root)

    def worth(row: int, node: Node, _: int) -> float:
        assert node.parent is not None
        local, whole = v[node] - v[node.parent], v[node] - v[f.path(row)[0]]
        return {
            "node_value": v[node],
            "diff_parent": local,
            "diff_global": whole,
            "diff_localglobal": whole + local,
        }[advantage]

    return f.tokens(worth)


def slate(f: Forest, step: Sequence[float]) -> Tensor:
    return f.broadcast(siblings(f, dict(zip(f.nodes(), step, strict=True)), 1, 1e-6))


# ---------------------------------------------------------------------------------------------------------------- ROSE
def branched(parent: Sequence[int], position: Sequence[int], lengths: Sequence[int]) -> list[list[Hashable]]:
    """Sequences with the prefixes that the branches share, every other token its own."""
    made: list[list[Hashable]] = []
    for b, (p, k, length) in enumerate(zip(parent, position, lengths, strict=True)):
        shared = [] if p < 0 else made[p][:k]
        made.append(shared + [(b, t) for t in range(len(shared), length)])
    return made


def rose(f: Forest, r: Rewards, length_penalty: float = 0.0) -> Tensor:
    """By the nodes of the tree."""
    v = below(f, r)

    def shortest(row: int) -> int | None:
        right = [b for b in f.members(row) if abs(r[b]) > 1e-6]
        return min(right, key=lambda b: len(f.sequences[b]), default=None)

    def factor(row: int, position: int) -> float:
        best = shortest(row)
        if best is None or abs(r[row]) <= 1e-6 or not f.sequences[best]:
            return 0.0
        common = max(n.end for n in f.path(row) if best in n.rows)
        mine, its = len(f.sequences[row]) - common, len(f.sequences[best]) - common
        return max(0.0, 1 - (its / mine) ** length_penalty) if position >= common and mine > 0 else 0.0

    def worth(row: int, node: Node, position: int) -> float:
        assert node.parent is not None
        a = (r[row] if row in node.ended else v[node]) - v[node.parent]
        return a - abs(a) * factor(row, position) if length_penalty > 0 else a

    return f.tokens(worth)


def rose_published(
    f: Forest, r: Rewards, parent: Sequence[int], position: Sequence[int], length_penalty: float = 0.0
) -> Tensor:
    """By sets of branch positions."""
    lengths = [len(s) for s in f.sequences]
    points = [{0} for _ in r]
    for b in range(len(r)):
        c = b
        while c >= 0:
            if parent[c] >= 0:
                points[b].add(position[c])
            c = parent[c]
    for b in range(len(r)):  # up, to every ancestor on whose path the point lies
        c = b
        while parent[c] >= 0 and position[b] <= position[c]:
            points[parent[c]].add(position[b])
            c = parent[c]
    for b in range(len(r)):  # down, what lies before one's own
        if parent[b] >= 0:
            points[b] |= {k for k in points[parent[b]] if k < position[b]}

    def value(b: int, k: int) -> float:
        return fmean(r[i] for i in f.members(b) if k in points[i])

    out = torch.zeros(len(r), len(f.credit[0]), dtype=torch.float64)
    for b, length in enumerate(lengths):
        marks = [*sorted(k for k in points[b] if k < length), length]
        for k0, k1 in pairwise(marks):
            out[b, k0:k1] = (r[b] if k1 == length else value(b, k1)) - value(b, k0)
    if length_penalty > 0:
        for b, length in enumerate(lengths):
            right = [i for i in f.members(b) if abs(r[i]) > 1e-6]
            if b not in right:
                continue
            best = min(right, key=lambda i: lengths[i])
            if b == best or lengths[best] == 0:
                continue
            common = max(k for k in points[b] & points[best] if k <= min(length, lengths[best]))
            if length > common:
                penalty = max(0.0, 1 - ((lengths[best] - common) / (length - common)) ** length_penalty)
                out[b, common:length] -= out[b, common:length].abs() * penalty
    return torch.where(credited(f), out, 0.0)


# -------------------------------------------------------------------------------------------------------------- TreePO
def treepo(
    f: Forest, r: Rewards, weighting: str = "group_size", skip_constant: bool = False, whiten: bool = True
) -> Tensor:
    """By the first path ids; the path of a sequence is its group, then the nodes that it goes through."""
    paths = [tuple(id(n) for n in f.path(b)) for b in range(len(r))]
    scores = []
    for b, path in enumerate(paths):
        parts: list[tuple[float, int]] = []
        for d in range(len(path)):
            group = [r[i] for i, other in enumerate(paths) if other[: d + 1] == path[: d + 1]]
            mean = fmean(group) if len(group) > 1 else 0.0
            constant = skip_constant and len(set(group)) == 1
            if d == 0 or (len(group) > 1 and not constant):
                parts.append((r[b] - mean, len(group)))
        weights = [size if weighting == "group_size" else 1 for _, size in parts]
        scores.append(sum(s * w for (s, _), w in zip(parts, weights, strict=True)) / sum(weights))
    out = f.per_row(scores)
    return whitened(out, credited(f)) if whiten else out


def treepo_segment(
    f: Forest, r: Rewards, eta: float | None = None, sibling_norm: bool = False, whiten: bool = True
) -> Tensor:
    v = below(f, r)
    leaf = []
    for b in range(len(r)):
        path = f.path(b)
        leaf.append(sum((r[b] - v[a]) * len(a.rows) for a in path) / sum(len(a.rows) for a in path))
    v = of_children(f, leaf)
    if sibling_norm:
        raw = dict(v)
        for n in f.nodes():
            values = [] if n.parent is None else [raw[child] for child in n.parent.children]
            if len(values) > 1:
                std = deviation(values, 0)
                v[n] = 0.0 if std < 1e-8 else (raw[n] - fmean(values)) / std
    for root in f.roots:
        v[root] = 0.0

    def worth(row: int, node: Node, _: int) -> float:
        assert node.parent is not None
        nodes = f.path(row)  # root included
        decay = 1.0 if eta is None else eta ** (len(nodes) - nodes.index(node))
        return v[node] - decay * v[node.parent]

    out = f.tokens(worth)
    return whitened(out, credited(f)) if whiten else out


# -------------------------------------------------------------------------------------------------------------- search
def treerl(
    f: Forest,
    r: Rewards,
    reward: str = "pure",
    overall_norm: str = "token",
    reweight: str = "none",
    selected: Sequence[bool] | None = None,
    average_one_generation: bool = False,
    fill_in: bool = True,
) -> Tensor:
    loo = []
    for b in range(len(r)):
        others = [r[i] for i in f.members(b) if i != b]
        loo.append(r[b] - fmean(others) if others else 0.0)
    total = of_children(f, loo, fmean if average_one_generation else sum)
    count = {n: len(n.rows) for n in f.nodes()}
    for root in f.roots:
        nodes = list(walk(root))
        size = {n: {"token": n.end - n.start, "step": 1, "none": 0}[overall_norm] for n in nodes}
        weight = sum(count[n] * size[n] for n in nodes)
        mean = sum(total[n] * size[n] for n in nodes) / weight if weight else 0.0
        for n in nodes:
            total[n] -= mean * count[n]
    for n in f.nodes():
        chosen = sum(1 for b in n.rows if selected is None or selected[b])
        if chosen and reweight != "none":
            total[n] /= math.sqrt(chosen) if reweight == "sqrt" else chosen
    v = total if average_one_generation else {n: total[n] / count[n] for n in f.nodes()}
    value: dict[tuple[int, Node], float] = {}
    for b in range(len(r)):
        path = f.path(b)
        steps = [v[n] - v[path[i]] for i, n in enumerate(path[1:])]
        if reward == "mix_all_ancestors":
            steps = [fmean(v[n] - v[a] for a in path[: i + 1]) for i, n in enumerate(path[1:])]
        elif fill_in:
            for i in range(1, len(steps)):
                if abs(steps[i]) < 1e-8:
                    steps[i] = steps[i - 1]
        for n, step in zip(path[1:], steps, strict=True):
            value[b, n] = {"state_value": step + v[n], "value_only": v[n]}.get(reward, step)
    return f.tokens(lambda row, node, _: value[row, node])


def propa(
    f: Forest,
    r: Rewards,
    visits: Sequence[float] | None = None,
    boost: float | None = 10.0,
    min_range: float = 0.1,
) -> Tensor:
    w = [1.0] * len(r) if visits is None else list(visits)
    x = {}
    for n in f.nodes():
        seen = sum(w[b] for b in n.rows)
        label = sum(w[b] * r[b] for b in n.rows) / seen if seen else 0.0
        if boost is not None:
            label = 0.0 if label <= 0 else 1.0 if label >= 1 else math.log(1 + boost * label) / math.log(1 + boost)
        x[n] = label
    out = siblings(f, x, 1, 1e-4)
    for n in f.nodes():
        values = [] if n.parent is None else [x[child] for child in n.parent.children]
        if values and max(values) - min(values) < min_range:
            out[n] = 0.0
    return f.broadcast(out)


def rest_mcts(f: Forest, r: Rewards) -> Tensor:
    steps: dict[Node, float] = {}
    right: set[Node] = set()

    def up(node: Node) -> float:
        """Steps to the nearest correct end, the node included."""
        ends = [1.0 for b in node.ended if r[b] > 0]
        steps[node] = min([*ends, *(1 + up(child) for child in node.children)], default=math.inf)
        if steps[node] < math.inf:
            right.add(node)
        return steps[node]

    v: dict[Node, float] = {}

    def down(node: Node, inherited: float, above: float) -> None:
        m = steps[node] if node in right else inherited
        sign = 1 if node in right else -1
        v[node] = above if node.parent is None else max(0.0, (1 - above) * sign / m + above)
        for child in node.children:
            down(child, m, v[node])

    for root in f.roots:
        up(root)
        down(root, math.inf, 0.0)
    return f.broadcast(v)


def mcts_step_values(f: Forest, r: Rewards, visits: Sequence[float] | None = None, backup: str = "mean") -> Tensor:
    n_of = {n: len(n.rows) if visits is None else visits[i] for i, n in enumerate(f.nodes())}
    v: dict[Node, float] = {}

    def up(node: Node) -> float:
        parts = [(1.0, r[b]) for b in node.ended] + [(n_of[c], up(c)) for c in node.children]
        v[node] = max(x for _, x in parts) if backup == "max" else _mean(parts)
        return v[node]

    for root in f.roots:
        up(root)
    return f.broadcast(v)


def _mean(parts: list[tuple[Any, float]]) -> float:
    return sum(w * x for w, x in parts) / sum(w for w, _ in parts)


def diffusion_tree(f: Forest, r: Rewards, scale: float = 1.0, form: str = "mean") -> Tensor:
    """[nodes]."""

    def soft(values: list[float]) -> float:
        total = sum(math.exp(scale * x) for x in values)
        return math.log(total / len(values) if form == "mean" else total) / scale

    v = of_children(f, r, soft)
    return torch.tensor([v[n] for n in f.nodes()], dtype=torch.float64)


def tree_opo(f: Forest, r: Rewards, baseline: str = "mean") -> Tensor:
    v = below(f, r, {"mean": fmean, "max": max, "min": min}[baseline])  # type: ignore[arg-type]
    return f.per_row([r[b] - v[f.path(b)[-2 if f.sequences[b] else -1]] for b in range(len(r))])

"""Prefix trees from sequences: a trie of dictionaries, one token at a time, and its nodes as tensors."""

from __future__ import annotations

import itertools
from collections.abc import Hashable, Iterator, Sequence

import torch
from torch import Tensor

#: Fields of the nodes, as every backend exchanges them.
NODES = (
    *("parent", "depth", "edge_start", "edge_length", "count", "first_row", "tout", "token_begin", "token_tout"),
    *("children", "row_begin", "root"),
)


# ------------------------------------------------------------------------------------------------- rows of a batch
def starts(mask: Tensor, extents: Tensor) -> Tensor:
    """Flat index of each row's first valid token; where its extent begins if there is none."""
    valid = (mask.cpu() != 0).tolist()
    bounds = extents.tolist()
    first = [next((i for i in range(begin, end) if valid[i]), begin) for begin, end in itertools.pairwise(bounds)]
    return torch.tensor(first, dtype=torch.int64, device=extents.device)


def lengths(mask: Tensor, extents: Tensor, starts: Tensor | None) -> Tensor:
    """Tokens from each row's start to its last valid one."""
    valid = (mask.cpu() != 0).tolist()
    first = (extents[:-1] if starts is None else starts).tolist()
    out = [
        next((i + 1 - begin for i in reversed(range(begin, end)) if valid[i]), 0)
        for begin, end in zip(first, extents[1:].tolist(), strict=True)
    ]
    return torch.tensor(out, dtype=torch.int64, device=extents.device)


# ----------------------------------------------------------------------------------------------------------- build
class _Node:
    """A token of a trie, with the sequences through it; once compressed, a run of such."""

    def __init__(self, parent: _Node | None, start: int, length: int) -> None:
        self.parent, self.start, self.length = parent, start, length
        self.children: dict[Hashable, _Node] = {}
        self.rows: list[int] = []  # sequences that pass through it or end there, ascending
        self.ends: list[int] = []  # those that end there
        self.number = -1

    def subtree(self) -> Iterator[_Node]:
        """Itself and all below in pre-order; the children of a node may change while that node is in hand."""
        waiting = [self]
        while waiting:
            node = waiting.pop()
            yield node
            waiting += reversed(node.children.values())


def build(
    tokens: Tensor | None,
    parent_row: Tensor | None,
    branch_position: Tensor | None,
    starts: Tensor,
    lengths: Tensor,
    group: Tensor,
    ordered_groups: bool,
    compress: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """nodes i64 [12, nodes], rows i64 [4, B], sizes i64 [3]: nodes, groups, unique tokens."""
    if tokens is not None:
        flat = tokens.tolist()
        paths = [flat[s : s + n] for s, n in zip(starts.tolist(), lengths.tolist(), strict=True)]
    else:
        assert parent_row is not None
        assert branch_position is not None
        paths = _branch_paths(parent_row.tolist(), branch_position.tolist(), lengths.tolist())
    labels = group.tolist()
    forest: list[_Node] = []
    groups = sorted(set(labels)) if ordered_groups else list(dict.fromkeys(labels))
    for label in groups:
        root = _trie(paths, [b for b, other in enumerate(labels) if other == label])
        if compress:
            _compress(root)
        forest += root.subtree()
    for number, node in enumerate(forest):
        node.number = number
    nodes = _node_fields(forest)
    rows = torch.stack([*_row_fields(forest, len(paths)), starts.cpu(), lengths.cpu()])
    sizes = torch.tensor([len(forest), len(groups), sum(node.length for node in forest)])
    return nodes.to(starts.device), rows.to(starts.device), sizes.to(starts.device)


def _branch_paths(parent: list[int], position: list[int], length: list[int]) -> list[list[Hashable]]:
    """Sequences with the given branches: the parent's first tokens, then tokens that no other row brings in."""
    paths: dict[int, list[Hashable]] = {}
    while len(paths) < len(length):
        ready = [b for b in range(len(length)) if b not in paths and (parent[b] < 0 or parent[b] in paths)]
        if not ready:
            raise ValueError("parent: expected rows that lead to a row without parent (-1), got rows that form a cycle")
        for b in ready:
            shared = [] if parent[b] < 0 else paths[parent[b]][: position[b]]
            paths[b] = shared + [(b, i) for i in range(len(shared), length[b])]
    return [paths[b] for b in range(len(length))]


def _trie(paths: Sequence[Sequence[Hashable]], rows: list[int]) -> _Node:
    """One node for each distinct prefix; children in the order in which their first sequences come."""
    root = _Node(None, 0, 0)
    for b in rows:
        node = root
        node.rows.append(b)
        for i, token in enumerate(paths[b]):
            if token not in node.children:
                node.children[token] = _Node(node, i, 1)
            node = node.children[token]
            node.rows.append(b)
        node.ends.append(b)
    return root


def _compress(root: _Node) -> None:
    """Joins each node with its only child, unless a sequence ends between them; the root stays without tokens."""
    for node in root.subtree():
        while node is not root and len(node.children) == 1 and not node.ends:
            (child,) = node.children.values()
            node.length += child.length
            node.children, node.ends = child.children, child.ends
        for child in node.children.values():
            child.parent = node


def _node_fields(forest: list[_Node]) -> Tensor:
    """i64 [12, nodes] of numbered nodes in pre-order."""
    tokens_before, rows_before = [0], [0]
    for node in forest:
        tokens_before.append(tokens_before[-1] + node.length)
        rows_before.append(rows_before[-1] + len(node.ends))
    columns: list[dict[str, int]] = []
    for n, node in enumerate(forest):
        above = None if node.parent is None else columns[node.parent.number]
        columns.append(
            {
                "parent": -1 if node.parent is None else node.parent.number,
                "depth": 0 if above is None else above["depth"] + 1,
                "edge_start": node.start,
                "edge_length": node.length,
                "count": len(node.rows),
                "first_row": node.rows[0],
                "token_begin": tokens_before[n],
                "children": len(node.children),
                "row_begin": rows_before[n],
                "root": n if above is None else above["root"],
            }
        )
    for n in reversed(range(len(forest))):  # children before their parents
        last = n if not forest[n].children else list(forest[n].children.values())[-1].number
        columns[n]["tout"] = n + 1 if last == n else columns[last]["tout"]
        columns[n]["token_tout"] = tokens_before[columns[n]["tout"]]
    fields = [[column[name] for column in columns] for name in NODES]
    return torch.tensor(fields, dtype=torch.int64).reshape(len(NODES), len(forest))


def _row_fields(forest: list[_Node], count: int) -> tuple[Tensor, Tensor]:
    """leaf and order, [B] each."""
    order = [b for node in forest for b in node.ends]
    leaf = {b: node.number for node in forest for b in node.ends}
    return torch.tensor([leaf[b] for b in range(count)], dtype=torch.int64), torch.tensor(order, dtype=torch.int64)

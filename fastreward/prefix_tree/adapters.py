"""Packed trees in the forms of other packages: areal's TrieNode, TRL's tree-packing row."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fastreward._arguments import check
from fastreward.prefix_tree.layout import PackedLayout
from fastreward.prefix_tree.sequences import rows_of_tokens


@dataclass
class TrieNode:
    """The fields of areal's TrieNode (areal-project/AReaL, areal/models/tree_attn/tree.py, 1.0.4).

    start_idx and end_idx (inclusive) count a trie's tokens in the order in which its sequences bring them; -1 for a
    root, whose `nodes` lists all others in pre-order, children by token.
    """

    tree_id: int
    start_idx: int = -1
    end_idx: int = -1
    tokens: list[int] = field(default_factory=list)
    sequence_ids: list[int] = field(default_factory=list)
    children: dict[int, TrieNode] = field(default_factory=dict, repr=False)
    ancestors: list[TrieNode] = field(default_factory=list, repr=False)
    nodes: list[TrieNode] = field(default_factory=list, repr=False)


def areal_tries(packed: PackedLayout, node_class: type[Any] | None) -> list[Any]:
    """See PackedTree.to_areal."""
    return [_areal_trie(part, k, node_class or TrieNode) for k, part in enumerate(packed.bins())]


def _areal_trie(part: PackedLayout, tree_id: int, node_class: type[Any]) -> Any:
    tree = part.tree
    if tree.num_groups > 1:
        raise ValueError(
            f"to_areal: expected a tree of one group, got {tree.num_groups}; areal knows no groups: "
            "build the tree without group_ids"
        )
    start = _insertion_starts(part)
    names = ("parent", "edge_length", "token_begin", "row_begin", "count")
    parent, length, begin, row_begin, count = (tree.forest.node(name).tolist() for name in names)
    order, rows, ids = tree.forest.row("order").tolist(), part.rows.tolist(), part.token_ids.tolist()
    nodes: list[Any] = [node_class(tree_id=tree_id)]
    for n in range(1, tree.num_nodes):
        above = nodes[parent[n]]
        node = node_class(
            tree_id=tree_id,
            start_idx=start[n],
            end_idx=start[n] + length[n] - 1,
            tokens=ids[begin[n] : begin[n] + length[n]],
            sequence_ids=[rows[b] for b in sorted(order[row_begin[n] : row_begin[n] + count[n]])],
            ancestors=[*above.ancestors, above] if parent[n] > 0 else [],
        )
        above.children[node.tokens[0]] = node
        nodes.append(node)
    for node in nodes:
        node.children = dict(sorted(node.children.items()))
    root = nodes[0]
    waiting = list(reversed(root.children.values()))
    while waiting:
        root.nodes.append(node := waiting.pop())
        waiting.extend(reversed(node.children.values()))
    return root


def _insertion_starts(part: PackedLayout) -> list[int]:
    """Per node: its first token's number where tokens are numbered as the rows bring them, one row after the other."""
    tree = part.tree
    first, at, size = tree.first_row, tree.edge_start, tree.edge_length
    fresh = torch.zeros_like(tree.lengths).scatter_add_(0, first, size)  # what a row brings: the tail of its path
    before = fresh.cumsum(0) - fresh
    starts: list[int] = (before[first] + at - (tree.lengths[first] - fresh[first])).tolist()
    return starts


def trl_row(packed: PackedLayout, advantages: Tensor, old_logprobs: Tensor | None) -> dict[str, Tensor]:
    """See PackedTree.trl_row."""
    if packed.num_bins > 1:
        raise ValueError(f"trl_row: expected one bin, got {packed.num_bins}; take them apart with .bins()")
    tree = packed.tree
    place = packed.packed_of_token
    if check.tensor("advantages", advantages).ndim == 1 and len(tree.shape) == 2:
        check.shape("advantages", advantages, (tree.num_rows,), "one per sequence, or as tokens")
        advantages = advantages.unsqueeze(1).expand(tree.shape)
    check.shape("advantages", advantages, tree.shape, "one per sequence, or as tokens")
    mask = tree.forest.sequences.credit
    trained = packed.predicting_index >= 0
    if mask is not None:
        trained = trained & (mask.view(tree.shape) != 0)
    row_of_token = rows_of_tokens(tree.forest.sequences.extents, place.numel()).view(tree.shape)
    fields = {
        "input_ids": packed.token_ids,
        "position_ids": packed.position_ids,
        "pred_index": packed.predicting_index[trained],
        "target_id": packed.token_ids[place[trained]],
        "advantages": advantages[trained].float(),
        "segment_id": row_of_token[trained],
        "tree_enter": packed.tin.int(),
        "tree_leave": packed.tout.int(),
    }
    if old_logprobs is not None:
        check.shape("old_logprobs", old_logprobs, tree.shape, "as tokens")
        fields["old_log_probs"] = old_logprobs[trained].float()
    return fields

"""Prefix trees laid out for training: every unique token once, and what attention, log-probs and losses need."""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor

from fastreward._arguments import check
from fastreward._arguments.arrays import accepts_arrays
from fastreward._arguments.numbers import Number
from fastreward._runtime.dispatch import implementation
from fastreward._runtime.logprobs import TokenStats
from fastreward.prefix_tree import adapters, ops
from fastreward.prefix_tree.forest import Forest, grow
from fastreward.prefix_tree.layout import PackedLayout
from fastreward.prefix_tree.operations import TreeOperations, made_of
from fastreward.prefix_tree.packed_logprobs import further_children, packed_token_logprobs

By = Literal["group", "row"]


class PackedTree(PackedLayout):
    """The unique tokens of a prefix tree in pre-order, bin by bin, as one sequence that a model can be trained on.

    Token q may look at token k where tin[k] <= tin[q] < tout[k]: at itself and at what comes before it in its
    sequences. Pass token_ids and position_ids as a batch of one with `block_mask()` (FlexAttention) or
    `attention_mask()` (dense): logits [P, V] come back, `token_logprobs` makes log-probs [P] of them and `to_tokens`
    lays those out as [B, T], for any loss; its backward adds up what the sequences that share a token contribute.

    Attributes (i64 [P] unless said otherwise; P unique tokens, copies of a prefix in several bins counted each):
        token_ids, position_ids: what the model reads.
        parent: the token before it, whose logits predict it; -1 for the first token of a sequence.
        tin, tout: its subtree is tin to tout - 1; tin is its own place.
        multiplicity: sequences that share it, the weight of its loss where that is the same for all of them.
        row, column: where it stands in the first of these sequences (column: in packed input, its flat index).
        rows: i64 [B], the rows of the batch that are packed here.
        cu_bins: i64 [bins + 1], where each bin's tokens begin and end; `bins()` takes them apart.
        tree: the forest as it is packed, one root for each group of a bin.
    """

    @accepts_arrays
    def token_logprobs(
        self,
        logits: Tensor,
        *,
        temperature: Number = 1.0,
        outputs: tuple[str, ...] = ("logprobs",),
        inplace_backward: bool = False,
    ) -> TokenStats:
        """Log-prob of each packed token under the logits of its parent.

        The logsumexp of a row is taken once, however many tokens follow it, and its gradient is written once: the
        tokens' own terms are added to it. Rows that no token with credit follows are not read.

        Args:
            logits: [P, V] or [1, P, V], the model's output for token_ids; float32, bfloat16 or float16.
            temperature: a positive number, or a 0-d tensor.
            outputs: logprobs, entropy, logsumexp, log_sum_sq_probs: of the row that predicts each token.
            inplace_backward: the backward overwrites the logits with their gradient.

        Returns:
            TokenStats, float32 [P] each; 0 for tokens without parent or without credit. Gradients flow to logits.
        """
        return packed_token_logprobs(self, self._further, logits, temperature, outputs, inplace_backward)

    @cached_property
    def _further(self) -> Tensor:
        return further_children(self)

    # ------------------------------------------------------------------------------------------------------ adapters
    def to_areal(self, node_class: type[Any] | None = None) -> list[Any]:
        """One trie per bin with the numbers that areal 1.0.4 gives them (areal/models/tree_attn/tree.py).

        Args:
            node_class: areal's TrieNode; without it, a dataclass here with the same fields.

        Raises:
            ValueError: a tree of several groups: areal knows none, its tries share whatever is equal.
        """
        return adapters.areal_tries(self, node_class)

    @accepts_arrays
    def trl_row(self, advantages: Tensor, old_logprobs: Tensor | None = None) -> dict[str, Tensor]:
        """The fields of TRL's tree packing (`TrainingRow` of huggingface/trl#7328), for one bin.

        Args:
            advantages: [B], or in the shape of tokens, of this packing's rows.
            old_logprobs: in the shape of tokens; left out where not given.

        NumPy arrays give arrays.
        """
        return adapters.trl_row(self, advantages, old_logprobs)


# -------------------------------------------------------------------------------------------------------------- pack
def pack(tree: TreeOperations, max_tokens: int | None, by: By) -> PackedTree:
    """See PrefixTree.pack."""
    check.choice("by", by, ("group", "row"))
    forest = tree.forest
    if not forest.sequences.packable:
        raise ValueError("pack: expected a tree of whole token sequences, not of paths, branches or with ignore_masked")
    bin_of_row, bins = _bins(forest, max_tokens, by)
    if bins > 1:
        root = tree.root[tree.leaf]  # grows from group to group
        _, group = torch.unique(bin_of_row * forest.places + root, return_inverse=True)
        forest = grow(replace(forest.sequences, group=group, ordered_groups=True), forest.builder)
        tree = made_of(type(tree), forest)
    return _lay_out(tree, bin_of_row, bins)


def _bins(forest: Forest, max_tokens: int | None, by: By) -> tuple[Tensor, int]:
    """(bin of each row, bins); planned on the host, whose decision the sizes are."""
    if max_tokens is None:
        return torch.zeros_like(forest.row("leaf")), 1
    max_tokens = check.whole("max_tokens", max_tokens, "unique tokens of a bin")
    nodes = forest.nodes[:, : forest.num_nodes].cpu().contiguous()
    bin_of_row, bins = implementation("prefix_tree", "cpu").bins(nodes, forest.rows.cpu(), max_tokens, by == "row")
    if bins < 0:
        row = -1 - bins
        length = int(forest.row("length")[row])
        raise ValueError(
            f"max_tokens: expected room for the longest sequence, got {max_tokens} for {length} (row {row})"
        )
    return bin_of_row.to(forest.rows.device), max(bins, 1)


def _lay_out(tree: TreeOperations, bin_of_row: Tensor, bins: int) -> PackedTree:
    f, s = tree.forest, tree.forest.sequences
    assert s.tokens is not None
    fields = ops.layout(s.tokens, f.nodes, f.rows, f.unique_places, f.builder)
    token_ids, position_ids, parent, tout, multiplicity, source = (x[: tree.num_tokens] for x in fields)
    row = tree.first_row.repeat_interleave(tree.edge_length, output_size=tree.num_tokens)
    column = source - s.extents[row] if len(s.shape) == 2 else source
    counts = torch.zeros(bins, dtype=torch.int64, device=row.device)
    counts.scatter_add_(0, bin_of_row[tree.first_row], tree.edge_length)
    return PackedTree(
        tree,
        torch.arange(tree.num_rows, device=row.device),
        bin_of_row,
        torch.nn.functional.pad(counts.cumsum(0), (1, 0)),
        token_ids,
        position_ids,
        parent,
        tout,
        multiplicity,
        row,
        column,
    )

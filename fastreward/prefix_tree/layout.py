"""Prefix trees laid out for training: every unique token once, and what attention, log-probs and losses need."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from fastreward._arguments import check
from fastreward._arguments.arrays import accepts_arrays
from fastreward._arguments.numbers import Number
from fastreward._arguments.options import TokenOp
from fastreward._runtime.dispatch import implementation
from fastreward.prefix_tree import ops
from fastreward.prefix_tree.sequences import Sequences
from fastreward.prefix_tree.tree import PrefixTree

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

    from fastreward._runtime.logprobs import TokenStats

By = Literal["group", "row"]


@dataclass(frozen=True, eq=False)
class PackedTree:
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

    tree: PrefixTree
    rows: Tensor
    bin_of_row: Tensor  # [B], of this packing's rows
    cu_bins: Tensor
    token_ids: Tensor
    position_ids: Tensor
    parent: Tensor
    tout: Tensor
    multiplicity: Tensor
    row: Tensor
    column: Tensor

    def __len__(self) -> int:
        return self.token_ids.shape[0]

    def __repr__(self) -> str:
        return f"PackedTree({len(self)} tokens for {self.tokens}, {self.num_bins} bins)"

    @property
    def num_bins(self) -> int:
        """Bins."""
        return self.cu_bins.shape[0] - 1

    @cached_property
    def tokens(self) -> int:
        """Tokens of all sequences, shared ones counted for each."""
        return int(self.tree.lengths.sum())

    @property
    def tin(self) -> Tensor:
        """Each token's own place."""
        return torch.arange(len(self), device=self.token_ids.device)

    @property
    def packed_of_token(self) -> Tensor:
        """i64 in the shape of the batch's tokens: the place of each in the packing, -1 outside of the sequences."""
        return self.tree.unique_of_token

    @cached_property
    def predicting_index(self) -> Tensor:
        """i64 in the shape of the batch's tokens: the packed token whose logits predict each, -1 without one."""
        place = self.packed_of_token
        return torch.where(place >= 0, self.parent[place.clamp(min=0)], -1) if len(self) else place

    def bins(self) -> list[PackedTree]:
        """Each bin as a packing of its own, places counted from its first token; its `rows` say which of the batch."""
        if self.num_bins == 1:
            return [self]
        return [self._bin(k) for k in range(self.num_bins)]

    def _bin(self, k: int) -> PackedTree:
        begin, end = int(self.cu_bins[k]), int(self.cu_bins[k + 1])
        chosen = (self.bin_of_row == k).nonzero().squeeze(1)
        position = torch.empty_like(self.rows).scatter_(0, chosen, torch.arange(len(chosen), device=chosen.device))
        tree = PrefixTree._from(_select(self.tree._sequences, chosen), self.tree._backend)
        parent, row = self.parent[begin:end], position[self.row[begin:end]]
        padded = len(self.tree.shape) == 2
        offset = 0 if padded else (tree._sequences.starts - self.tree._sequences.starts[chosen])[row]
        return PackedTree(
            tree,
            self.rows[chosen],
            torch.zeros_like(chosen),
            self.cu_bins.new_tensor([0, end - begin]),
            self.token_ids[begin:end],
            self.position_ids[begin:end],
            torch.where(parent >= 0, parent - begin, -1),
            self.tout[begin:end] - begin,
            self.multiplicity[begin:end],
            row,
            self.column[begin:end] + offset,
        )

    # ----------------------------------------------------------------------------------------------------- attention
    def mask_mod(self, block_size: int = 128) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
        """The mask as a function of (batch, head, q, k) for FlexAttention; `block_size` is that of its blocks."""
        # Blocks may reach beyond the last token: nobody looks at what is there.
        tout = torch.nn.functional.pad(self.tout, (0, -len(self) % block_size))

        def sees(batch: Tensor, head: Tensor, q: Tensor, k: Tensor) -> Tensor:
            return (k <= q) & (q < tout[k])

        return sees

    def block_mask(self, block_size: int = 128) -> BlockMask:
        """FlexAttention's BlockMask [1, 1, P, P], from lists of blocks: no P x P mask is made."""
        from torch.nn.attention.flex_attention import BlockMask

        if check.whole("block_size", block_size, "tokens of a block") < 1:
            raise ValueError(f"block_size: expected a positive number of tokens, got {block_size}")
        lists = implementation("prefix_tree", "cpu").blocks(self.tout.cpu().contiguous(), block_size)
        counts, indices, full_counts, full_indices = (x[None, None].to(self.tout.device) for x in lists)
        return BlockMask.from_kv_blocks(
            counts,
            indices,
            full_counts,
            full_indices,
            BLOCK_SIZE=block_size,
            mask_mod=self.mask_mod(block_size),
            seq_lengths=(len(self), len(self)),
        )

    def attention_mask(self) -> Tensor:
        """The dense mask, bool [1, 1, P, P], for attention that takes no other; P^2 bytes."""
        place = self.tin
        return ((place <= place[:, None]) & (place[:, None] < self.tout))[None, None]

    # --------------------------------------------------------------------------------------- log-probs, batch layout
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
        from fastreward.prefix_tree.packed_logprobs import packed_token_logprobs

        return packed_token_logprobs(self, logits, temperature, outputs, inplace_backward)

    @cached_property
    def credited(self) -> Tensor:
        """bool [P]: whether some sequence gives the token credit."""
        mask = self.tree._sequences.credit
        if mask is None:
            return torch.ones_like(self.token_ids, dtype=torch.bool)
        return self.from_tokens((mask != 0).float().view(self.tree.shape)) > 0

    @cached_property
    def _further(self) -> Tensor:
        """Tokens with credit that do not stand right behind their parent: its second, third, ... children."""
        return (self.credited & (self.parent >= 0) & (self.parent != self.tin - 1)).nonzero().squeeze(1)

    @accepts_arrays
    def to_tokens(self, packed_values: Tensor) -> Tensor:
        """Values [P] in the shape of the batch's tokens (of `rows`), 0 without credit; gradients are summed."""
        check.shape("packed_values", check.tensor("packed_values", packed_values), (len(self),), "one per packed token")
        padding = self.tree._unique - len(self)
        return self.tree.unique_to_tokens(
            torch.nn.functional.pad(packed_values, (0, padding)) if padding else packed_values
        )

    @accepts_arrays
    def from_tokens(self, token_values: Tensor, op: TokenOp = "sum") -> Tensor:
        """Values in the shape of the batch's tokens (of `rows`) to [P]: see PrefixTree.from_tokens."""
        return self.tree.from_tokens(token_values, op)[: len(self)]

    # ------------------------------------------------------------------------------------------------------ adapters
    def to_areal(self, node_class: type[Any] | None = None) -> list[Any]:
        """One trie per bin with the numbers that areal 1.0.4 gives them (areal/models/tree_attn/tree.py).

        Args:
            node_class: areal's TrieNode; without it, a dataclass here with the same fields.

        Raises:
            ValueError: a tree of several groups: areal knows none, its tries share whatever is equal.
        """
        from fastreward.prefix_tree.adapters import areal_tries

        return areal_tries(self, node_class)

    @accepts_arrays
    def trl_row(self, advantages: Tensor, old_logprobs: Tensor | None = None) -> dict[str, Tensor]:
        """The fields of TRL's tree packing (`TrainingRow` of huggingface/trl#7328), for one bin.

        Args:
            advantages: [B], or in the shape of tokens, of this packing's rows.
            old_logprobs: in the shape of tokens; left out where not given.

        NumPy arrays give arrays.
        """
        from fastreward.prefix_tree.adapters import trl_row

        return trl_row(self, advantages, old_logprobs)


# -------------------------------------------------------------------------------------------------------------- pack
def pack(tree: PrefixTree, max_tokens: int | None, by: By) -> PackedTree:
    """See PrefixTree.pack."""
    check.choice("by", by, ("group", "row"))
    if not tree._sequences.packable:
        raise ValueError("pack: expected a tree of whole token sequences, not of paths, branches or with ignore_masked")
    bin_of_row, bins = _bins(tree, max_tokens, by)
    packed = tree
    if bins > 1:
        root = tree.root[tree.leaf]  # grows from group to group
        _, group = torch.unique(bin_of_row * tree._nodes.shape[1] + root, return_inverse=True)
        packed = PrefixTree._from(replace(tree._sequences, group=group, ordered_groups=True), tree._backend)
    return _lay_out(packed, bin_of_row, bins)


def _bins(tree: PrefixTree, max_tokens: int | None, by: By) -> tuple[Tensor, int]:
    """(bin of each row, bins); planned on the host, whose decision the sizes are."""
    if max_tokens is None:
        return torch.zeros_like(tree.leaf), 1
    max_tokens = check.whole("max_tokens", max_tokens, "unique tokens of a bin")
    nodes = tree._nodes[:, : tree.num_nodes].cpu().contiguous()
    bin_of_row, bins = implementation("prefix_tree", "cpu").bins(nodes, tree._rows.cpu(), max_tokens, by == "row")
    if bins < 0:
        row = -1 - bins
        length = int(tree.lengths[row])
        raise ValueError(
            f"max_tokens: expected room for the longest sequence, got {max_tokens} for {length} (row {row})"
        )
    return bin_of_row.to(tree.leaf.device), max(bins, 1)


def _lay_out(tree: PrefixTree, bin_of_row: Tensor, bins: int) -> PackedTree:
    s = tree._sequences
    assert s.tokens is not None
    fields = ops.layout(s.tokens, tree._nodes, tree._rows, tree._unique, tree._backend)
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


def _select(s: Sequences, rows: Tensor) -> Sequences:
    """The sequences of some rows."""
    assert s.tokens is not None
    sizes = s.extents.diff()[rows]
    extents = torch.nn.functional.pad(sizes.cumsum(0), (1, 0))
    total = int(extents[-1])
    # Place of each token of the selection in the whole: its row's old begin in place of the new one.
    _, group = torch.unique(s.group[rows], return_inverse=True)  # in the order that they have in the whole
    shift = (s.extents[rows] - extents[:-1]).repeat_interleave(sizes, output_size=total)
    place = torch.arange(total, device=shift.device) + shift
    return Sequences(
        (len(rows), s.shape[1]) if len(s.shape) == 2 else (total,),
        s.starts[rows] - s.extents[rows] + extents[:-1],
        s.lengths[rows],
        extents,
        group,
        None if s.credit is None else s.credit[place],
        s.tokens[place],
        ordered_groups=True,
        flat=total,
    )

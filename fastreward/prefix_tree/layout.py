"""The unique tokens of a prefix tree as one sequence: bins, attention, and the way to the batch and back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor

from fastreward._arguments import check
from fastreward._arguments.arrays import accepts_arrays
from fastreward._arguments.options import TokenOp
from fastreward._runtime.dispatch import implementation
from fastreward.prefix_tree.forest import Forest, grow
from fastreward.prefix_tree.operations import TreeOperations, made_of
from fastreward.prefix_tree.sequences import Sequences

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

L = TypeVar("L", bound="PackedLayout")


@dataclass(frozen=True, eq=False)
class PackedLayout:
    """The arrays of a packing, see PackedTree."""

    tree: TreeOperations
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
        return f"{type(self).__name__}({len(self)} tokens for {self.tokens}, {self.num_bins} bins)"

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

    def bins(self: L) -> list[L]:
        """Each bin as a packing of its own, places counted from its first token; its `rows` say which of the batch."""
        if self.num_bins == 1:
            return [self]
        return [self._bin(k) for k in range(self.num_bins)]

    def _bin(self: L, k: int) -> L:
        begin, end = int(self.cu_bins[k]), int(self.cu_bins[k + 1])
        chosen = (self.bin_of_row == k).nonzero().squeeze(1)
        position = torch.empty_like(self.rows).scatter_(0, chosen, torch.arange(len(chosen), device=chosen.device))
        forest = self.tree.forest
        tree = made_of(type(self.tree), grow(_select(forest, chosen), forest.builder))
        parent, row = self.parent[begin:end], position[self.row[begin:end]]
        padded = len(self.tree.shape) == 2
        offset = 0 if padded else (tree.forest.row("start") - forest.row("start")[chosen])[row]
        return type(self)(
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

    # -------------------------------------------------------------------------------------------------- batch layout
    @cached_property
    def credited(self) -> Tensor:
        """bool [P]: whether some sequence gives the token credit."""
        mask = self.tree.forest.sequences.credit
        if mask is None:
            return torch.ones_like(self.token_ids, dtype=torch.bool)
        return self.from_tokens((mask != 0).float().view(self.tree.shape)) > 0

    @accepts_arrays
    def to_tokens(self, packed_values: Tensor) -> Tensor:
        """Values [P] in the shape of the batch's tokens (of `rows`), 0 without credit; gradients are summed."""
        check.shape("packed_values", check.tensor("packed_values", packed_values), (len(self),), "one per packed token")
        padding = self.tree.forest.unique_places - len(self)
        return self.tree.unique_to_tokens(
            torch.nn.functional.pad(packed_values, (0, padding)) if padding else packed_values
        )

    @accepts_arrays
    def from_tokens(self, token_values: Tensor, op: TokenOp = "sum") -> Tensor:
        """Values in the shape of the batch's tokens (of `rows`) to [P]: see PrefixTree.from_tokens."""
        return self.tree.from_tokens(token_values, op)[: len(self)]


def _select(forest: Forest, rows: Tensor) -> Sequences:
    """The sequences of some rows."""
    s = forest.sequences
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
        extents,
        group,
        first=None if s.first is None else s.first[place],
        lengths=forest.row("length")[rows],
        credit=None if s.credit is None else s.credit[place],
        tokens=s.tokens[place],
        ordered_groups=True,
        flat=total,
    )

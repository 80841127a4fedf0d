"""Prefix trees: a batch of token sequences as one compressed radix forest, for credit and for training on it."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import TYPE_CHECKING, Literal

from torch import Tensor

from fastreward._arguments import check
from fastreward._arguments.arrays import accepts_arrays
from fastreward._arguments.groups import GroupIds
from fastreward._runtime.dispatch import select
from fastreward.prefix_tree.forest import grow
from fastreward.prefix_tree.operations import TreeOperations, made_of
from fastreward.prefix_tree.packed import PackedTree, pack
from fastreward.prefix_tree.sequences import branch_sequences, path_sequences, token_sequences

if TYPE_CHECKING:
    import networkx
    from matplotlib.axes import Axes

    from fastreward.prefix_tree.views import TreeStatistics


class PrefixTree(TreeOperations):
    """A batch of token sequences as one compressed radix forest: flat arrays, one root per group.

    A node is a run of tokens that the same sequences share; a sequence is a path from its group's root to the node
    where it ends (`leaf`). Nodes are numbered in pre-order, group by group in the order in which they come in the
    batch, children by their first sequence: the same batch always gets the same numbers, and a group's part of them
    does not depend on the other groups. Roots have no tokens.

    Args:
        tokens: integers of any width, padded [B, T], or packed [N] with cu_seqlens. Padding on the left is told from
            tokens by `attention_mask` alone: without it a row begins at its first position, padding is part of the
            sequence, and `pack` hands it to the model.
        mask: the shape of tokens, bool, integer or float; nonzero = a token that gets credit. A sequence runs from its
            row's first position to its last valid one; masked-out tokens inside it (tool output) count for identity.
        group_ids: integers [B], or any sequence of B hashables (uid strings); groups need not be contiguous. Without
            group_ids and group_size the whole batch is one group.
        group_size: instead of group_ids, equal contiguous groups of this size.
        lengths: integers [B], tokens of each sequence, instead of the mask's end.
        attention_mask: the shape of tokens; a sequence runs from its first to its last nonzero position (left-padded
            prompts), whatever `mask` says.
        cu_seqlens: integers [B + 1], where packed sequences begin and end.
        ignore_masked: masked-out tokens are left out of identity too, as if they were not there.

    Attributes, i64 [nodes] each: parent (-1 for a root), depth (nodes above), edge_start (tokens of a sequence before
    the node's own), edge_length, count (sequences through it), first_row, tin and tout (the numbers of a node's subtree
    are tin to tout - 1; tin is the node's own number), token_begin (unique tokens before it), children, root; is_branch
    (bool: two or more children). i64 [B]: leaf. node_of_token: i32 in the shape of tokens, -1 outside of the sequences.

    On a GPU the arrays have room for the most nodes that there can be, 3 B; those behind `num_nodes` are empty (count
    0, parent -1), as counting the nodes would wait for the device.

    NaN means "not there", in a sequence's value (a reward that was not scored) and in a node's: it counts in nothing,
    gets no credit and passes no gradient. A node with no scored sequence below has the value NaN. Weights may not be
    NaN; values of tokens are taken as they are.

    Raises:
        TypeError, ValueError: wrong dtype, shape, device or lengths, before anything runs.
    """

    @accepts_arrays
    def __init__(
        self,
        tokens: Tensor,
        mask: Tensor | None = None,
        group_ids: GroupIds | None = None,
        *,
        group_size: int | None = None,
        lengths: Tensor | Sequence[int] | None = None,
        attention_mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        ignore_masked: bool = False,
    ) -> None:
        backend = select("prefix_tree_build", check.tensor("tokens", tokens))
        sequences = token_sequences(
            tokens, mask, group_ids, group_size, lengths, attention_mask, cu_seqlens, ignore_masked, backend
        )
        self.forest = grow(sequences, backend)

    @classmethod
    def from_paths(
        cls,
        path_ids: Tensor | Sequence[Sequence[Hashable]],
        group_ids: GroupIds | None = None,
        *,
        group_size: int | None = None,
        segment_ids: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> PrefixTree:
        """A tree of given steps: row b goes through the nodes path_ids[b, 0], path_ids[b, 1], ...

        Nothing is compressed: each step is a node of its own, also where no other path leaves it, and `edge_start`
        counts steps.

        Args:
            path_ids: integers [B, D], negative = no more steps; or a list of B sequences: of hashables, which count by
                value (uid strings, numbers, 0-d tensors), or integer tensors or arrays, as the rows of [B, D].
            group_ids, group_size: as in PrefixTree.
            segment_ids: integers [B, T]: the step of each token (its place in the path, not its id), negative = none.
                to_tokens then gives [B, T] instead of [B, D].
            mask: the shape of segment_ids (or of path_ids), as in PrefixTree.
        """
        sequences, device_of = path_sequences(path_ids, group_ids, group_size, segment_ids, mask)
        return made_of(cls, grow(sequences, select("prefix_tree_build", device_of), compress=False))

    @classmethod
    @accepts_arrays
    def from_branches(
        cls,
        parent: Tensor,
        branch_position: Tensor,
        lengths: Tensor,
        group_ids: GroupIds | None = None,
        *,
        group_size: int | None = None,
        mask: Tensor | None = None,
    ) -> PrefixTree:
        """A tree of given branches: row b has its first branch_position[b] tokens from row parent[b].

        Args:
            parent: integers [B], another row of the same group, or -1: the row hangs off its group's root.
            branch_position: integers [B], at most the tokens of either row; not read where parent is -1.
            lengths: integers [B], tokens of each row.
            group_ids, group_size: as in PrefixTree.
            mask: [B, T], as in PrefixTree; it sets T, which is else the greatest length.
        """
        sequences = branch_sequences(parent, branch_position, lengths, group_ids, group_size, mask)
        return made_of(cls, grow(sequences, select("prefix_tree_build", parent)))

    def pack(self, max_tokens: int | None = None, *, by: Literal["group", "row"] = "group") -> PackedTree:
        """The layout for training: every unique token once (see PackedTree).

        Args:
            max_tokens: at most so many unique tokens in a bin; None: one bin.
            by: "group" keeps groups whole where they fit, each in the first bin with room; a longer one is cut into
                pieces of neighbouring sequences, each with its own copy of the prefix. "row" goes through the batch row
                by row and puts each into the first bin with room for what is new of it, as areal does.

        Raises:
            ValueError: a sequence that is longer than max_tokens; a tree without tokens, or one that ignores some.
        """
        return pack(self, max_tokens, by)

    # --------------------------------------------------------------------------------------------------------- views
    def statistics(self) -> TreeStatistics:
        """Tokens saved, branch points, depths; print it for a table."""
        from fastreward.prefix_tree.views import statistics

        return statistics(self)

    def to_networkx(self, **node_values: Tensor) -> networkx.DiGraph:
        """A networkx.DiGraph with an edge to each child; nodes carry every field and what is given here."""
        from fastreward.prefix_tree.views import to_networkx

        return to_networkx(self, node_values)

    def plot(
        self,
        values: Tensor | None = None,
        advantages: Tensor | None = None,
        *,
        rewards: Tensor | None = None,
        group: int = 0,
        decode: Callable[[list[int]], str] | None = None,
        ax: Axes | None = None,
        max_nodes: int = 400,
    ) -> Axes:
        """A picture of one group, values [nodes] on the nodes and advantages [nodes] on the edges; needs matplotlib.

        Args:
            values, advantages: [nodes], shown as colours and numbers.
            rewards: [B], written beside the sequences' ends.
            group: by its number as they come in the batch.
            decode: token ids to text, such as a tokenizer's `decode`; else the ids are written.
            ax: matplotlib axes to draw in; a new pyplot figure of fitting size if None.
            max_nodes: more than these are refused (ValueError).
        """
        from fastreward.prefix_tree.plot import plot

        return plot(self, values, advantages, rewards=rewards, group=group, decode=decode, ax=ax, max_nodes=max_nodes)

    def __repr__(self) -> str:
        return f"PrefixTree({list(self.shape)}, {self.forest.places} nodes on {self.forest.nodes.device})"

    def __str__(self) -> str:
        from fastreward.prefix_tree.views import drawing

        return drawing(self)

"""Prefix trees: a batch of token sequences as one compressed radix forest, for credit and for training on it."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from fastreward._arguments import check
from fastreward._arguments.arrays import accepts_arrays
from fastreward._arguments.groups import GroupIds
from fastreward._arguments.numbers import Number, is_number, number, split
from fastreward._arguments.options import (
    OVERS,
    PLACES,
    TOKEN_OPS,
    TREE_MODES,
    TREE_OPS,
    Over,
    Place,
    TokenOp,
    TreeMode,
    TreeOp,
)
from fastreward._runtime.dispatch import select
from fastreward._runtime.layout import NODES, ROWS
from fastreward.prefix_tree import ops
from fastreward.prefix_tree.computed import computed_once
from fastreward.prefix_tree.sequences import Sequences, branch_sequences, path_sequences, token_sequences

if TYPE_CHECKING:
    import networkx
    from matplotlib.axes import Axes

    from fastreward.prefix_tree.packed import PackedTree
    from fastreward.prefix_tree.views import TreeStatistics


def _not_0(name: str, value: object) -> float:
    number = check.finite(name, value)
    if number == 0.0:
        raise ValueError(f"{name}: expected a number other than 0, got 0")
    return number


class PrefixTree:
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
            row's first position to its last counted one; masked-out tokens inside it (tool output) count for identity.
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

    _sequences: Sequences
    _backend: str
    _nodes: Tensor  # i64 [F, nodes], see _layout.NODES
    _rows: Tensor  # i64 [4, B], see _layout.ROWS
    _sizes: Tensor  # i64 [3]: nodes, groups, unique tokens

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
        backend = select("prefix_tree", check.tensor("tokens", tokens))
        sequences = token_sequences(
            tokens, mask, group_ids, group_size, lengths, attention_mask, cu_seqlens, ignore_masked, backend
        )
        self._build(sequences, backend)

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
        return cls._from(sequences, select("prefix_tree", device_of), compress=False)

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
        return cls._from(sequences, select("prefix_tree", parent))

    @classmethod
    def _from(cls, sequences: Sequences, backend: str, *, compress: bool = True) -> PrefixTree:
        tree = cls.__new__(cls)
        tree._build(sequences, backend, compress=compress)
        return tree

    def _build(self, s: Sequences, backend: str, *, compress: bool = True) -> None:
        self._sequences, self._backend = s, backend
        self._nodes, self._rows, self._sizes = ops.build(
            s.tokens, s.parent_row, s.branch_position, s.starts, s.lengths, s.group, s.ordered_groups, compress, backend
        )
        if self._sizes.device.type == "cpu" and not torch.compiler.is_compiling():
            _ = self.num_tokens  # known from now on: a compiled function can't read it off a tensor

    # ---------------------------------------------------------------------------------------------------- what it is
    def _node_field(self, name: str) -> Tensor:
        return self._nodes[NODES.index(name)]

    def _row_field(self, name: str) -> Tensor:
        return self._rows[ROWS.index(name)]

    @property
    def parent(self) -> Tensor:
        """The node above, -1 for a root."""
        return self._node_field("parent")

    @property
    def depth(self) -> Tensor:
        """Nodes above it."""
        return self._node_field("depth")

    @property
    def edge_start(self) -> Tensor:
        """Tokens of a sequence before the node's own."""
        return self._node_field("edge_start")

    @property
    def edge_length(self) -> Tensor:
        """The node's own tokens, 0 for a root."""
        return self._node_field("edge_length")

    @property
    def count(self) -> Tensor:
        """Sequences that pass through the node or end there."""
        return self._node_field("count")

    @property
    def first_row(self) -> Tensor:
        """The first of its sequences."""
        return self._node_field("first_row")

    @property
    def tin(self) -> Tensor:
        """The node's own number, with which its subtree begins."""
        return torch.arange(self._nodes.shape[1], device=self._nodes.device)

    @property
    def tout(self) -> Tensor:
        """End of the numbers of its subtree."""
        return self._node_field("tout")

    @property
    def token_begin(self) -> Tensor:
        """Unique tokens of the forest before the node's own."""
        return self._node_field("token_begin")

    @property
    def children(self) -> Tensor:
        """Number of child nodes."""
        return self._node_field("children")

    @property
    def root(self) -> Tensor:
        """The root of its group."""
        return self._node_field("root")

    @property
    def is_branch(self) -> Tensor:
        """Whether two or more children follow."""
        return self.children > 1

    @property
    def leaf(self) -> Tensor:
        """i64 [B]: the node where each sequence ends."""
        return self._row_field("leaf")

    @property
    def lengths(self) -> Tensor:
        """i64 [B]: tokens of each sequence."""
        return self._row_field("length")

    @property
    def num_rows(self) -> int:
        """Sequences."""
        return self._rows.shape[1]

    @computed_once
    def num_nodes(self) -> int:
        """Nodes, roots included. On a GPU this waits for the device."""
        return self._nodes.shape[1] if self._nodes.device.type == "cpu" else int(self._sizes[0])

    @computed_once
    def num_groups(self) -> int:
        """Groups. On a GPU this waits for the device."""
        return int(self._sizes[1])

    @computed_once
    def num_tokens(self) -> int:
        """Unique tokens. On a GPU this waits for the device."""
        return int(self._sizes[2])

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the tokens: [B, T], or [N] where packed."""
        return self._sequences.shape

    def rows_of(self, node: int) -> Tensor:
        """The sequences that pass through a node or end there, ascending."""
        begin, count = int(self._node_field("row_begin")[node]), int(self.count[node])
        return self._row_field("order")[begin : begin + count].sort().values

    @computed_once
    def node_of_token(self) -> Tensor:
        """i32 in the shape of tokens: the node of each, -1 outside of the sequences."""
        return self._from_flat(
            ops.node_of_token(self._nodes, self._rows, self._sequences.extents, self._flat, self._backend), -1
        )

    @computed_once
    def unique_of_token(self) -> Tensor:
        """i64 in the shape of tokens: the place of each among the unique tokens, -1 outside of the sequences."""
        return self._from_flat(
            ops.unique_of_token(self._nodes, self._rows, self._sequences.extents, self._flat, self._backend), -1
        )

    # ---------------------------------------------------------------------------------------------------- operations
    @accepts_arrays
    def aggregate(
        self,
        leaf_values: Tensor,
        op: TreeOp = "mean",
        *,
        over: Over = "sequences",
        weights: Tensor | None = None,
        child_weights: Tensor | None = None,
        scale: Number = 1.0,
        normalized: bool = False,
        discount: Number = 1.0,
    ) -> Tensor:
        """Values of the nodes, from those of the sequences below them.

        Args:
            leaf_values: [B] float32 or float64, one per sequence; bool and half precision become float32, integers
                float64 (exact to 2^53), here and in all that follows. NaN: not scored; the sequence counts in no node,
                as if it had not been there.
            op: "mean", "sum", "max", "min", "logsumexp", or "any" (1 where some value is not 0, else 0).
            over: what counts alike: the "sequences" below a node, or its "children", level by level (a sequence that
                ends at an inner node is one of its children; duplicates are one each).
            weights: [B], how much a sequence counts in mean, sum and logsumexp (MCTS visits).
            child_weights: [nodes], the same for nodes among their siblings, with over="children".
            scale: logsumexp is log(sum(exp(scale * v))) / scale; negative gives a soft minimum. A number or, like all
                numbers of these methods, a 0-d tensor.
            normalized: logsumexp of the mean instead of the sum: minus log(weight) / scale.
            discount: factor per token (per step in from_paths) between the end of a sequence and the end of the node's
                edge, for mean and sum.

        Returns:
            [nodes], the dtype of leaf_values; sums in float64. NaN where no scored sequence lies below, and for the
            mean where the weights sum to 0; over children such a node counts in its parent as little as an unscored
            sequence. Gradients flow to leaf_values through mean, sum and logsumexp, none from NaN.

        Raises:
            TypeError, ValueError: wrong dtype, shape or name; weights that are not finite (or below 0, of a logsumexp);
                max, min or any of values that need a gradient.
        """
        check.choice("op", op, TREE_OPS)
        check.choice("over", over, OVERS)
        if child_weights is not None and over != "children":
            raise ValueError("child_weights: needs over='children'")
        values = self._per_row("leaf_values", leaf_values)
        scale = number("scale", scale, values, _not_0)
        discount = number("discount", discount, values, check.finite)
        if op not in ("mean", "sum") and (isinstance(discount, Tensor) or discount != 1.0):
            raise ValueError(
                f"discount: expected 1 with op={op!r}, as only mean and sum are discounted, got {discount}"
            )
        if normalized and op != "logsumexp":
            raise ValueError("normalized: needs op='logsumexp'")
        if op in ("max", "min", "any") and values.requires_grad and torch.is_grad_enabled():
            raise ValueError(
                f"leaf_values: op={op!r} has no gradient; use .detach(), or a logsumexp with a large scale"
            )
        out: Tensor = ops.aggregate(
            values,
            None if weights is None else self._row_weights(weights, op).to(values.dtype),
            None if child_weights is None else self._child_weights(child_weights, op).to(values.dtype),
            self._nodes,
            self._rows,
            f"{op}|{over}|{'normalized' if normalized else ''}",
            *(known for known, _ in (split(scale), split(discount))),
            *(given for _, given in (split(scale), split(discount))),
            self._backend,
        )
        return out

    @accepts_arrays
    def advantages(
        self,
        node_values: Tensor,
        mode: TreeMode = "td",
        *,
        scale: Literal["std", "none"] = "std",
        ddof: int = 1,
        eps: Number = 1e-6,
        singleton: Literal["zero", "raw"] = "zero",
    ) -> Tensor:
        """What each node is worth: its value against others'.

        Args:
            node_values: [nodes] float32 or float64; NaN: not there, in no mean and compared with nobody.
            mode: V is a node's value, and its advantage
                "td": V - V(parent);
                "sibling": (V - mean) / (std + eps) over the children of its parent;
                "root": V - V(root);
                "td+root": the sum of these two;
                "all-ancestors": the mean of V - V(a) over the ancestors a, root included (TreeRL, arXiv 2506.11902);
                "depth-weighted": the mean of V - V(a) over the ancestors and the node itself, weighted by the sequences
                through a (TreePO, arXiv 2508.17445).
            scale, ddof, eps: sibling: "std" with ddof, or "none" (only centred).
            singleton: sibling: an only child gets "zero", or its "raw" value.

        Returns:
            [nodes], the dtype of node_values; 0 for roots, for nodes without a value and for those that have nothing to
            be compared with. A constant: no gradient flows to node_values.
        """
        check.choice("mode", mode, TREE_MODES)
        check.choice("scale", scale, ("std", "none"))
        check.choice("singleton", singleton, ("zero", "raw"))
        ddof = check.whole("ddof", ddof, "the divisor of a variance is count - ddof")
        values = check.constant("node_values", self._per_node("node_values", node_values))
        modes = f"{mode}|{scale}|{singleton}"
        eps = number("eps", eps, values, check.finite)
        out: Tensor = ops.advantages(values, self._nodes, self._rows, modes, ddof, *split(eps), self._backend)
        return out

    @accepts_arrays
    def propagate(
        self,
        scale: Number,
        shift: Number,
        *,
        initial: Number = 0.0,
        low: Number | None = None,
        high: Number | None = None,
    ) -> Tensor:
        """A recurrence from the roots down: x = clamp(scale * x(parent) + shift, low, high), x(root) = initial.

        Args:
            scale, shift: [nodes] float32 or float64, or numbers; those of roots are not read. Where one is NaN, the
                node is not there, nor is what comes below it: its x is NaN.
            initial: the value of the roots.
            low, high: bounds, None = none.

        Returns:
            [nodes]. Gradients flow to scale and shift, where no bound has cut (on a bound they do) and x is not NaN.
        """
        given = {"scale": scale, "shift": shift}
        tensors = {name: self._per_node(name, check.tensor(name, x)) for name, x in given.items() if not is_number(x)}
        dtype = torch.float64 if any(x.dtype == torch.float64 for x in tensors.values()) else torch.float32
        factors = [
            tensors[name].to(dtype) if name in tensors else self._everywhere(name, x, dtype)
            for name, x in given.items()
        ]
        numbers = {"initial": initial, "low": low, "high": high}
        known = {name: None if x is None else number(name, x, self._nodes, check.finite) for name, x in numbers.items()}
        rules = [(None, None) if x is None else split(x) for x in known.values()]
        low, high = known["low"], known["high"]
        if isinstance(low, float) and isinstance(high, float) and low > high:
            raise ValueError(f"low, high: expected low <= high, got {low} and {high}")
        values, instead = zip(*rules, strict=True)
        out: Tensor = ops.propagate(*factors, self._nodes, self._rows, *values, *instead, self._backend)
        return out

    @accepts_arrays
    def to_tokens(self, node_values: Tensor, *, place: Place = "broadcast", row_values: Tensor | None = None) -> Tensor:
        """Each token's node's value: [nodes] to the shape of tokens.

        Args:
            node_values: [nodes] float32 or float64; NaN (not there) gives its tokens nothing.
            place: "broadcast" gives it to every token of the node, "start" and "end" to its first or last one alone.
            row_values: [B], added on every token of a sequence that gets credit; a constant. NaN: the sequence is not
                there, and all its tokens get 0.

        Returns:
            The shape of tokens; 0 where the mask gives no credit and outside of the sequences. Gradients flow to
            node_values.
        """
        check.choice("place", place, PLACES)
        values = self._per_node("node_values", node_values)
        added = (
            None
            if row_values is None
            else self._constant("row_values", self._per_row("row_values", row_values), values)
        )
        if place == "broadcast" or self._sequences.one_to_one:
            return self._broadcast(values, added, place)
        # A step is one place in flat memory, and may be many tokens.
        ends = self._sequences.ends_of_steps(place)
        if added is None:
            return torch.where(ends, self._broadcast(values, None, "broadcast"), 0.0)
        elsewhere = self._broadcast(torch.zeros_like(values), added, "broadcast")
        return torch.where(ends, self._broadcast(values, added, "broadcast"), elsewhere)

    def _broadcast(self, values: Tensor, row_values: Tensor | None, place: Place) -> Tensor:
        s = self._sequences
        flat = ops.broadcast_to_tokens(
            values, row_values, self._nodes, self._rows, s.extents, s.credit, place, self._flat, self._backend
        )
        return s.credited(flat)

    @accepts_arrays
    def from_tokens(self, token_values: Tensor, op: TokenOp = "sum") -> Tensor:
        """Values of the unique tokens, from those of the tokens: the shape of tokens to [num_tokens], in pre-order.

        Args:
            token_values: float32 or float64 in the shape of tokens; masked-out ones do not count, whatever they are.
            op: "sum" or "mean" over the sequences that share a token, or the "first" one's value; 0 where none counts.

        Returns:
            [num_tokens] (on a GPU as many places as there are tokens); sums in float64. Gradients flow to token_values
            through sum and mean.
        """
        check.choice("op", op, TOKEN_OPS)
        self._check_tokens("token_values", token_values)
        s = self._sequences
        flat = self._to_flat(self._floats("token_values", token_values))
        out: Tensor = ops.scatter_reduce(
            flat, self._nodes, self._rows, s.extents, s.credit, op, self._unique, self._backend
        )
        return out

    @accepts_arrays
    def unique_to_tokens(self, unique_values: Tensor) -> Tensor:
        """Each token's value among those of the unique tokens: [num_tokens] to the shape of tokens.

        0 where the mask gives no credit and outside of the sequences. float32 or float64; gradients flow, summed over
        the sequences that share a token.
        """
        check.shape("unique_values", check.tensor("unique_values", unique_values), (self._unique,), "num_tokens")
        s = self._sequences
        unique = self._floats("unique_values", unique_values)
        return s.credited(ops.gather(unique, self._nodes, self._rows, s.extents, s.credit, self._flat, self._backend))

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
        from fastreward.prefix_tree.packed import pack

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
        return f"PrefixTree({list(self.shape)}, {self._nodes.shape[1]} nodes on {self._nodes.device})"

    def __str__(self) -> str:
        from fastreward.prefix_tree.views import drawing

        return drawing(self)

    # ------------------------------------------------------------------------------------------------------ plumbing
    @property
    def _flat(self) -> int:
        """Tokens of the flat memory that the kernels see."""
        return self._sequences.flat

    @property
    def _unique(self) -> int:
        """Places for unique tokens: as many as there are on the CPU, the most there can be on a GPU."""
        return self.num_tokens if self._nodes.device.type == "cpu" else self._flat

    def _floats(self, name: str, x: Tensor) -> Tensor:
        return check.rewards(name, x).contiguous()

    def _per_row(self, name: str, x: Tensor) -> Tensor:
        check.shape(name, check.tensor(name, x), (self.num_rows,), "one per sequence")
        check.same_device(name, x, "the tree", self._rows)
        return self._floats(name, x)

    def _per_node(self, name: str, x: Tensor) -> Tensor:
        check.shape(name, check.tensor(name, x), (self._nodes.shape[1],), "one per node")
        check.same_device(name, x, "the tree", self._nodes)
        return self._floats(name, x)

    def _everywhere(self, name: str, x: Number, dtype: torch.dtype) -> Tensor:
        """A number for every node; a 0-d tensor keeps its gradient."""
        value = x if isinstance(x, Tensor) and x.requires_grad else number(name, x, self._nodes, check.finite)
        if not isinstance(value, Tensor):
            return torch.full((self._nodes.shape[1],), value, dtype=dtype, device=self._nodes.device)
        return value.to(device=self._nodes.device, dtype=dtype).expand(self._nodes.shape[1]).contiguous()

    def _row_weights(self, weights: Tensor, op: TreeOp) -> Tensor:
        w = check.constant("weights", self._per_row("weights", weights))
        self._check_weights("weights", w, op)
        return w

    def _child_weights(self, weights: Tensor, op: TreeOp) -> Tensor:
        w = check.constant("child_weights", self._per_node("child_weights", weights))
        self._check_weights("child_weights", torch.where(self.parent < 0, 1.0, w), op)  # those of roots are not read
        return w

    @staticmethod
    def _check_weights(name: str, weights: Tensor, op: TreeOp) -> None:
        if check.values_checked(weights):
            check.every(name, weights.isfinite(), weights, "finite numbers")
            if op == "logsumexp":
                check.every(name, weights >= 0, weights, "numbers >= 0 with op='logsumexp'")

    @staticmethod
    def _constant(name: str, x: Tensor, like: Tensor) -> Tensor:
        return check.constant(name, x).to(like.dtype)

    def _check_tokens(self, name: str, x: Tensor) -> None:
        check.shape(name, check.tensor(name, x), self.shape, "as tokens")
        check.same_device(name, x, "the tree", self._nodes)

    def _to_flat(self, x: Tensor) -> Tensor:
        return self._sequences.to_flat(x)

    def _from_flat(self, x: Tensor, none: Any) -> Tensor:
        return self._sequences.from_flat(x, none)

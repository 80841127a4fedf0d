"""The arrays of a prefix tree, and the operations on values of its nodes, sequences and tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from fastreward._arguments import check
from fastreward._arguments.arrays import accepts_arrays
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
from fastreward.prefix_tree import node_ops, ops
from fastreward.prefix_tree.forest import Forest, computed_once

T = TypeVar("T", bound="TreeOperations")


def _node_field(name: str, meaning: str) -> Any:
    """A property: a field of the nodes, i64 [nodes]."""
    return property(lambda tree: tree.forest.node(name), doc=meaning)


class TreeOperations:
    """Arrays and operations of a prefix tree, whatever it is made from."""

    forest: Forest

    # ------------------------------------------------------------------------------------------------------- arrays
    parent: Tensor = _node_field("parent", "The node above, -1 for a root.")
    depth: Tensor = _node_field("depth", "Nodes above it.")
    edge_start: Tensor = _node_field("edge_start", "Tokens of a sequence before the node's own.")
    edge_length: Tensor = _node_field("edge_length", "The node's own tokens, 0 for a root.")
    count: Tensor = _node_field("count", "Sequences that pass through the node or end there.")
    first_row: Tensor = _node_field("first_row", "The first of its sequences.")
    tout: Tensor = _node_field("tout", "End of the numbers of its subtree.")
    token_begin: Tensor = _node_field("token_begin", "Unique tokens of the forest before the node's own.")
    children: Tensor = _node_field("children", "Number of child nodes.")
    root: Tensor = _node_field("root", "The root of its group.")

    @property
    def tin(self) -> Tensor:
        """The node's own number, with which its subtree begins."""
        return torch.arange(self.forest.places, device=self.forest.nodes.device)

    @property
    def is_branch(self) -> Tensor:
        """Whether two or more children follow."""
        return self.children > 1

    @property
    def leaf(self) -> Tensor:
        """i64 [B]: the node where each sequence ends."""
        return self.forest.row("leaf")

    @property
    def lengths(self) -> Tensor:
        """i64 [B]: tokens of each sequence."""
        return self.forest.row("length")

    @property
    def num_rows(self) -> int:
        """Sequences."""
        return self.forest.rows.shape[1]

    @property
    def num_nodes(self) -> int:
        """Nodes, roots included. On a GPU this waits for the device."""
        return self.forest.num_nodes

    @property
    def num_groups(self) -> int:
        """Groups. On a GPU this waits for the device."""
        return self.forest.num_groups

    @property
    def num_tokens(self) -> int:
        """Unique tokens. On a GPU this waits for the device."""
        return self.forest.num_tokens

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the tokens: [B, T], or [N] where packed."""
        return self.forest.sequences.shape

    def rows_of(self, node: int) -> Tensor:
        """The sequences that pass through a node or end there, ascending."""
        begin, count = int(self.forest.node("row_begin")[node]), int(self.count[node])
        return self.forest.row("order")[begin : begin + count].sort().values

    @computed_once
    def node_of_token(self) -> Tensor:
        """i32 in the shape of tokens: the node of each, -1 outside of the sequences."""
        return self._numbered(ops.node_of_token)

    @computed_once
    def unique_of_token(self) -> Tensor:
        """i64 in the shape of tokens: the place of each among the unique tokens, -1 outside of the sequences."""
        return self._numbered(ops.unique_of_token)

    def _numbered(self, op: Callable[..., Tensor]) -> Tensor:
        f, s = self.forest, self.forest.sequences
        return s.from_flat(op(f.nodes, f.rows, s.extents, s.flat, f.backend), -1)

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
        f = self.forest
        if child_weights is not None and over != "children":
            raise ValueError("child_weights: needs over='children'")
        values = f.per_row("leaf_values", leaf_values)
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
        out: Tensor = node_ops.aggregate(
            values,
            None if weights is None else f.row_weights(weights, op).to(values.dtype),
            None if child_weights is None else f.child_weights(child_weights, op).to(values.dtype),
            f.nodes,
            f.rows,
            f"{op}|{over}|{'normalized' if normalized else ''}",
            *(known for known, _ in (split(scale), split(discount))),
            *(given for _, given in (split(scale), split(discount))),
            f.backend,
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
        """Advantage of each node: its value against others'.

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
        f = self.forest
        values = check.constant("node_values", f.per_node("node_values", node_values))
        modes = f"{mode}|{scale}|{singleton}"
        eps = number("eps", eps, values, check.finite)
        out: Tensor = node_ops.advantages(values, f.nodes, f.rows, modes, ddof, *split(eps), f.backend)
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
        f = self.forest
        tensors = {name: f.per_node(name, check.tensor(name, x)) for name, x in given.items() if not is_number(x)}
        dtype = torch.float64 if any(x.dtype == torch.float64 for x in tensors.values()) else torch.float32
        factors = [
            tensors[name].to(dtype) if name in tensors else f.everywhere(name, x, dtype) for name, x in given.items()
        ]
        numbers = {"initial": initial, "low": low, "high": high}
        known = {name: None if x is None else number(name, x, f.nodes, check.finite) for name, x in numbers.items()}
        rules = [(None, None) if x is None else split(x) for x in known.values()]
        low, high = known["low"], known["high"]
        if isinstance(low, float) and isinstance(high, float) and low > high:
            raise ValueError(f"low, high: expected low <= high, got {low} and {high}")
        values, instead = zip(*rules, strict=True)
        out: Tensor = node_ops.propagate(*factors, f.nodes, f.rows, *values, *instead, f.backend)
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
        f, s = self.forest, self.forest.sequences
        values, added = f.per_node("node_values", node_values), None
        if row_values is not None:
            added = check.constant("row_values", f.per_row("row_values", row_values)).to(values.dtype)
        if place == "broadcast" or s.one_to_one:
            return self._broadcast(values, added, place)
        # A step is one place in flat memory, and may be many tokens.
        ends = s.ends_of_steps(place)
        if added is None:
            return torch.where(ends, self._broadcast(values, None, "broadcast"), 0.0)
        elsewhere = self._broadcast(torch.zeros_like(values), added, "broadcast")
        return torch.where(ends, self._broadcast(values, added, "broadcast"), elsewhere)

    def _broadcast(self, values: Tensor, row_values: Tensor | None, place: Place) -> Tensor:
        f, s = self.forest, self.forest.sequences
        return s.credited(
            ops.broadcast_to_tokens(values, row_values, f.nodes, f.rows, s.extents, s.credit, place, s.flat, f.backend)
        )

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
        check.shape("token_values", check.tensor("token_values", token_values), self.shape, "as tokens")
        f, s = self.forest, self.forest.sequences
        check.same_device("token_values", token_values, "the tree", f.nodes)
        flat = s.to_flat(check.rewards("token_values", token_values).contiguous())
        places = f.unique_places
        out: Tensor = ops.scatter_reduce(flat, f.nodes, f.rows, s.extents, s.credit, op, places, f.backend)
        return out

    @accepts_arrays
    def unique_to_tokens(self, unique_values: Tensor) -> Tensor:
        """Each token's value among those of the unique tokens: [num_tokens] to the shape of tokens.

        0 where the mask gives no credit and outside of the sequences. float32 or float64; gradients flow, summed over
        the sequences that share a token.
        """
        f, s = self.forest, self.forest.sequences
        check.shape("unique_values", check.tensor("unique_values", unique_values), (f.unique_places,), "num_tokens")
        unique = check.rewards("unique_values", unique_values).contiguous()
        return s.credited(ops.gather(unique, f.nodes, f.rows, s.extents, s.credit, s.flat, f.backend))


def made_of(kind: type[T], forest: Forest) -> T:
    """A tree of some kind, of a forest that has grown."""
    tree = kind.__new__(kind)
    tree.forest = forest
    return tree


def _not_0(name: str, value: object) -> float:
    number = check.finite(name, value)
    if number == 0.0:
        raise ValueError(f"{name}: expected a number other than 0, got 0")
    return number

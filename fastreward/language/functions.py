"""The functions that a loss is written with: NumPy's and torch's names, and reductions over tokens and sequences."""

from __future__ import annotations

from types import FunctionType

from fastreward.language.messages import FUNCTIONS, described, origin
from fastreward.language.node import Level, Node, Nodes
from fastreward.language.ops import *  # noqa: F403
from fastreward.language.ops import Value, call, exp, graph_of, log, maximum, minimum, stop_gradient, where


# ------------------------------------------------------------------------------------------ made of the operators
def softplus(x: Value) -> Node:
    """log(1 + e^x) without overflow."""
    graph = graph_of("softplus", x)
    return -graph.call("logsigmoid", graph.call("neg", x))


def relu(x: Value) -> Node:
    """max(x, 0); gradient 1 at 0."""
    return call("maximum", x, 0.0)


def clip(x: Value, low: Value | None = None, high: Value | None = None) -> Node:
    """x within [low, high]; gradient 1 on the bounds and between them, 0 outside. None: no bound."""
    if low is None and high is None:
        raise TypeError(f"{origin()}: clip: expected a lower or an upper bound")
    if low is None:
        return minimum(x, 0.0 if high is None else high)
    return maximum(x, low) if high is None else call("clip", x, low, high)


# -------------------------------------------------------------------------------------- over the tokens of a sequence
# What is the same for all tokens of a sequence may be given too: its mean is itself, its sum is length times it.
def seq_sum(x: Node) -> Node:
    """Sum over the valid tokens."""
    graph = graph_of("seq_sum", x)
    return graph.reduce("seq_sum", _number(x)) if x.level == Level.TOKEN else x * graph.length(x.side)


def seq_mean(x: Node) -> Node:
    """Mean over the valid tokens; 0 where there are none."""
    graph = graph_of("seq_mean", x)
    return seq_sum(x) / maximum(graph.length(x.side), 1.0) if x.level == Level.TOKEN else x


def seq_max(x: Node) -> Node:
    """Largest over the valid tokens, -inf where there are none; the gradient is shared among equals."""
    graph = graph_of("seq_max", x)
    return graph.reduce("seq_max", _number(x)) if x.level == Level.TOKEN else x


def seq_min(x: Node) -> Node:
    """Smallest over the valid tokens, inf where there are none; the gradient is shared among equals."""
    graph = graph_of("seq_min", x)
    return graph.reduce("seq_min", _number(x)) if x.level == Level.TOKEN else x


# ---------------------------------------------------------------------------------------- along a sequence's tokens
# One value per token, of the valid ones; those that do not count are passed over, discounts and all, and get 0.
def seq_cumsum(x: Value, reverse: bool = False) -> Node:
    """Sum over the tokens up to this one, this one included; reverse: over those from this one on."""
    return _along("seq_cumsum", "scan", reverse, x, 1.0)


def seq_discounted_sum(x: Value, gamma: Value, reverse: bool = True) -> Node:
    """x_t + gamma y_(t+1) with the next token's own sum y_(t+1), 0 beyond the end: sum over s >= t of gamma^(s-t) x_s.

    reverse=False: x_t + gamma y_(t-1). gamma: a number, a parameter or a term; where it is one per token, that token's
    multiplies what comes in from its neighbour, and a 0 starts anew. Gradients go to gamma too.
    """
    return _along("seq_discounted_sum", "scan", reverse, x, gamma)


def seq_shift(x: Value, reverse: bool = False) -> Node:
    """x of the token before, 0 at the first; reverse: of the one after, 0 at the last."""
    return _along("seq_shift", "shift", reverse, x)


def segment_sum(x: Value, ids: Node) -> Node:
    """Sum over the token's segment, a run of equal ids (turns, steps; one per sequence: all of it).

    0 where the id is below 0: in none. No gradient goes to the ids.
    """
    return _along("segment_sum", "segment_sum", False, x, ids)


def segment_mean(x: Value, ids: Node) -> Node:
    """Mean over the token's segment; 0 where it is in none."""
    total = segment_sum(x, ids)
    return total / maximum(segment_sum(1.0, total.graph.node(ids)), 1.0)


def _along(name: str, op: str, reverse: bool, x: Value, by: Value | None = None) -> Node:
    graph = graph_of(name, x) if by is None else graph_of(name, x, by)
    args = [graph.node(a) for a in (x, by) if a is not None]
    if graph.sides > 1 and all(a.level < Level.TOKEN for a in args):
        raise TypeError(f"{origin()}: {name}: expected a term per token of one side, got one per pair")
    return graph.along(f"{op}_reverse" if reverse else op, *args)


# ----------------------------------------------------------------------------------- over the sequences of the group
# Sequences without a valid token do not count.
def group_sum(x: Value, graph: Nodes | None = None) -> Node:
    """Sum over the sequences of the same group."""
    x, valid = _per_sequence("group_sum", x, graph)
    return x.graph.reduce("group_sum", where(valid, x, 0.0))


def group_size(t: object) -> Node:
    """Sequences of the same group; `t`: the loss's terms."""
    graph = getattr(t, "graph", None)
    if not isinstance(graph, Nodes):
        raise TypeError(f"{origin()}: group_size: expected the loss's terms, as in group_size(t), got {described(t)}")
    return group_sum(1.0, graph)


def group_mean(x: Node) -> Node:
    """Mean over the sequences of the same group."""
    x, _ = _per_sequence("group_mean", x)
    return group_sum(x) / maximum(group_sum(1.0, x.graph), 1.0)


def group_max(x: Node) -> Node:
    """Largest over the sequences of the same group."""
    x, valid = _per_sequence("group_max", x)
    return x.graph.reduce("group_max", where(valid, x, float("-inf")))


def group_min(x: Node) -> Node:
    """Smallest over the sequences of the same group."""
    x, valid = _per_sequence("group_min", x)
    return x.graph.reduce("group_min", where(valid, x, float("inf")))


def group_cumsum(x: Value, *, by: Node, reverse: bool = False) -> Node:
    """Sum over the same group's sequences from the one with the largest `by` down to oneself, oneself included.

    reverse: from oneself down to the smallest. Equal keys are in the order of the sequences. No gradient goes to `by`.
    """
    by, valid = _per_sequence("group_cumsum", by)
    x, _ = _per_sequence("group_cumsum", x, by.graph)
    op = "group_sum_after" if reverse else "group_sum_before"
    return by.graph.reduce(op, where(valid, x, 0.0), stop_gradient(by))


def group_sum_others(x: Node) -> Node:
    """Sum over the other sequences of the same group."""
    x, valid = _per_sequence("group_sum_others", x)
    return x.graph.reduce("group_sum_others", where(valid, x, 0.0))


def group_logsumexp(x: Node, *, by: Node | None = None, reverse: bool = False, others: bool = False) -> Node:
    """Log of the sum of e^x over the same group's sequences, those that group_cumsum takes, or the others alone.

    x may be -inf: such a sequence adds nothing and gets gradient 0. Of nothing -inf, with gradient 0.
    """
    x, valid = _per_sequence("group_logsumexp", x)
    largest = stop_gradient(group_max(x))
    top = where(largest > float("-inf"), largest, 0.0)
    grown = where(valid, exp(x - top), 0.0)
    if others:
        total = group_sum_others(grown)
    else:
        total = group_sum(grown) if by is None else group_cumsum(grown, by=by, reverse=reverse)
    something = total > 0.0
    return where(something, top + log(where(something, total, 1.0)), float("-inf"))


# ------------------------------------------------------------------------------------------------ over the whole batch
def batch_sum(x: Value, graph: Nodes | None = None) -> Node:
    """Sum over the valid tokens of the batch; of what is per sequence, over its sequences with a valid token."""
    if isinstance(x, Node) and x.level == Level.TOKEN:
        return batch_sum(seq_sum(x))
    x, valid = _per_sequence("batch_sum", x, graph)
    return x.graph.reduce("batch_sum", where(valid, x, 0.0))


def batch_mean(x: Node) -> Node:
    """Mean over the valid tokens of the batch; of what is per sequence, over its sequences with a valid token."""
    graph = graph_of("batch_mean", x)
    if x.level < Level.SEQUENCE:
        return x
    count = batch_sum(graph.length(x.side)) if x.level == Level.TOKEN else batch_sum(1.0, graph)
    return batch_sum(x) / maximum(count, 1.0)


def batch_max(x: Node) -> Node:
    """Largest over the valid tokens of the batch, or over its sequences."""
    x, valid = _per_sequence("batch_max", seq_max(x) if isinstance(x, Node) else x)
    return x.graph.reduce("batch_max", where(valid, x, float("-inf")))


def batch_min(x: Node) -> Node:
    """Smallest over the valid tokens of the batch, or over its sequences."""
    x, valid = _per_sequence("batch_min", seq_min(x) if isinstance(x, Node) else x)
    return x.graph.reduce("batch_min", where(valid, x, float("inf")))


def batch_threshold(x: Node, *, keep_mean_below: Value) -> Node:
    """The largest x of the batch's valid tokens such that those not above it have a mean below the bound, exactly.

    Where not even the smallest are below it, the smallest: something is always kept. No gradient goes through it.
    """
    return _threshold("batch_threshold", x, keep_mean_below)


def batch_largest(x: Node, *, share: Value) -> Node:
    """The smallest of the largest x of the batch: of floor(share times the valid tokens) of them, at least of one.

    No gradient goes through it.
    """
    return _threshold("batch_largest", x, share)


def _threshold(name: str, x: Node, bound: Value) -> Node:
    graph = graph_of(name, x)
    limit = graph.node(bound)
    if x.level < Level.TOKEN or limit.level > Level.BATCH:
        x.fail(
            f"{name} takes a term per token and a bound for the batch, got "
            f"{'a term that is not per token' if x.level < Level.TOKEN else 'a bound per token or sequence'}"
        )
    return graph.threshold(name, stop_gradient(_number(x)), limit)


def batch_match(x: Node, y: Node) -> Node:
    """For each sequence the y of that rank among all sequences which its own x has; gradients go to y."""
    x, y = _per_sequence("batch_match", x)[0], _per_sequence("batch_match", y)[0]
    rank_of_y, rank_of_x = stop_gradient(y), stop_gradient(x)
    return x.graph.reduce("batch_permute", y, rank_of_y, rank_of_x)


def _number(x: Node) -> Node:
    return where(x, 1.0, 0.0) if x.boolean else x


def _per_sequence(name: str, x: Value, graph: Nodes | None = None) -> tuple[Node, Node]:
    """`x` as a node, and whether a sequence counts."""
    graph = graph_of(name, x) if graph is None or isinstance(x, Node) else graph
    node = graph.node(x)
    if node.level == Level.TOKEN:
        node.fail(f"{name} takes what is per sequence, got a per-token term; reduce it first, as in seq_mean(...)")
    return _number(node), graph.valid()


_own = {name for name, x in vars().items() if isinstance(x, FunctionType) and x.__module__ == __name__}
FUNCTIONS.update(name for name in _own if not name.startswith("_"))
# Not as a statement: type checkers take a list that they can't read for an empty one.
vars()["__all__"] = sorted(FUNCTIONS)

"""PrefixTree: its arrays, and every operation on random and adversarial batches, with gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastreward._arguments.options import OVERS, PLACES, TOKEN_OPS, TREE_MODES, TREE_OPS
from fastreward._runtime.dispatch import absent, backend, select
from fastreward.prefix_tree import PrefixTree
from fastreward.verify import eager
from fastreward.verify.problem import Problem, Tensors, gradients, leaf

_ARRAYS = (
    *("parent", "depth", "edge_start", "edge_length", "count", "first_row", "tout", "token_begin", "children", "root"),
    *("leaf", "lengths", "node_of_token", "unique_of_token"),
)
_PER_NODE = _ARRAYS[:10]
_SMOOTH = ("mean", "sum", "logsumexp")


def problems(quick: bool) -> Iterator[Problem]:
    """Batches of all kinds; on each the arrays, then the operations."""
    for seed in range(1 if quick else 3):
        for name, batch, values in _batches(seed):
            for what, call in _calls().items():
                yield Problem(
                    "prefix_tree",
                    f"{name}, {what}" if seed == 0 else f"{name}, {what} (seed {seed})",
                    str(values["rows"].dtype).removeprefix("torch."),
                    batch | values,
                    partial(_run, call),
                    partial(_truth, call),
                    partial(_torch, call),
                )


# ---------------------------------------------------------------------------------------------------------- batches
def _batches(seed: int) -> Iterator[tuple[str, dict[str, Any], Tensors]]:
    """(name, arguments of PrefixTree, values to work on)."""
    g = torch.Generator().manual_seed(seed)
    tokens = _rollouts(g, 24, 40)
    mask = torch.rand(tokens.shape, generator=g) < 0.8
    ids = torch.randint(-2, 3, (24,), generator=g) * 10**6
    yield "one group", {"tokens": tokens}, _values(g, tokens)
    yield "groups and a mask", {"tokens": tokens, "mask": mask, "group_ids": ids}, _values(g, tokens)
    yield "masked tokens ignored", {"tokens": tokens, "mask": mask, "ignore_masked": True}, _values(g, tokens)
    left = torch.arange(40) >= torch.randint(0, 40, (24, 1), generator=g)
    yield "left-padded", {"tokens": tokens.int(), "attention_mask": left.int(), "mask": mask}, _values(g, tokens)
    wide = {name: x.double() for name, x in _values(g, tokens).items()}
    yield "float64 values", {"tokens": tokens, "group_ids": ids}, wide
    far = _values(g, tokens)
    yield "values far from 0", {"tokens": tokens, "group_size": 8}, far | {"rows": 1e4 + 1e-2 * far["rows"]}
    lengths = torch.randint(0, 4, (24,), generator=g)
    yield "short, empty and equal rows", {"tokens": tokens % 2, "lengths": lengths}, _values(g, tokens)
    offsets = torch.tensor([0, 0, 7, 7, 30, 31, 60])
    flat = tokens.flatten()[:60].contiguous()
    yield "packed", {"tokens": flat, "cu_seqlens": offsets}, _values(g, flat, 6)
    yield "no rows", {"tokens": tokens[:0]}, _values(g, tokens[:0])


def _rollouts(g: torch.Generator, rows: int, columns: int) -> Tensor:
    """Rows that often begin as an earlier one does."""
    tokens = torch.randint(0, 2**31 - 1, (rows, columns), generator=g)
    for b in range(1, rows):
        shared = int(torch.randint(0, columns + 1, (), generator=g))
        tokens[b, :shared] = tokens[int(torch.randint(0, b, (), generator=g)), :shared]
    return tokens


def _values(g: torch.Generator, tokens: Tensor, rows: int | None = None) -> Tensors:
    """Values of rows, tokens, and of as many nodes and unique tokens as there may be."""
    count = tokens.shape[0] if rows is None else rows
    return {
        "rows": torch.randn(count, generator=g),
        "weights": torch.rand(count, generator=g) + 0.1,
        "of_tokens": torch.randn(tokens.shape, generator=g),
        "of_nodes": torch.randn(3 * count, generator=g),
        "shift": torch.randn(3 * count, generator=g),
        "unique": torch.randn(tokens.numel(), generator=g),
    }


# -------------------------------------------------------------------------------------------------------- operations
#: What a call does its work with: PrefixTree's methods, or plain torch.
_Operations = Mapping[str, Callable[..., Tensor]]
_Call = Callable[[PrefixTree, _Operations, Tensors], Tensors]


def _calls() -> dict[str, _Call]:
    """Operations by name; each gives its results from (tree, operations, values)."""
    calls: dict[str, _Call] = {"arrays": _arrays}
    for over in OVERS:
        calls[f"aggregate over {over}"] = partial(_aggregates, over)
    calls["advantages"] = _advantages
    calls["propagate"] = _propagates
    calls["tokens"] = _tokens
    return calls


def _arrays(tree: PrefixTree, operations: _Operations, values: Tensors) -> Tensors:
    """Whole numbers: they have to be right. On a GPU empty nodes are left out."""
    out = {name: getattr(tree, name) for name in _ARRAYS}
    out |= {name: out[name][: tree.num_nodes] for name in _PER_NODE}
    return out | {"sizes": torch.tensor([tree.num_nodes, tree.num_groups, tree.num_tokens])}


def _aggregates(over: str, tree: PrefixTree, operations: _Operations, values: Tensors) -> Tensors:
    aggregate, x, weights = operations["aggregate"], values["rows"], values["weights"].detach()
    out: Tensors = {op: aggregate(x if op in _SMOOTH else x.detach(), op, over=over) for op in TREE_OPS}
    out["weighted mean, discounted"] = aggregate(x, "mean", over=over, weights=weights, discount=0.97)
    out["weighted soft minimum"] = aggregate(x, "logsumexp", over=over, weights=weights, scale=-2.0, normalized=True)
    return {name: y[: tree.num_nodes] for name, y in out.items()}


def _advantages(tree: PrefixTree, operations: _Operations, values: Tensors) -> Tensors:
    advantages, v = operations["advantages"], values["of_nodes"].detach()
    out: Tensors = {mode: advantages(v, mode) for mode in TREE_MODES}
    out["siblings, centred, alone raw"] = advantages(v, "sibling", scale="none", singleton="raw")
    out["siblings, ddof 0, eps 0.1"] = advantages(v, "sibling", ddof=0, eps=0.1)
    return {name: y[: tree.num_nodes] for name, y in out.items()}


def _propagates(tree: PrefixTree, operations: _Operations, values: Tensors) -> Tensors:
    propagate, scale, shift = operations["propagate"], values["of_nodes"], values["shift"]
    out = {"free": propagate(scale, shift, initial=0.5), "bounded": propagate(scale, shift, low=-0.7, high=0.9)}
    return {name: y[: tree.num_nodes] for name, y in out.items()}


def _tokens(tree: PrefixTree, operations: _Operations, values: Tensors) -> Tensors:
    x = values["of_tokens"]
    out = {f"to {place}": operations["to_tokens"](values["of_nodes"], place=place) for place in PLACES}
    for op in TOKEN_OPS:
        found = operations["from_tokens"](x.detach() if op == "first" else x, op)
        out[f"from, {op}"] = found[: tree.num_tokens]
    return out | {"unique to tokens": operations["unique_to_tokens"](values["unique"])}


# ------------------------------------------------------------------------------------------------------------- ways
def _tree(inputs: Mapping[str, Any]) -> PrefixTree:
    """On the backend that is chosen; where that builds no trees, Triton's."""
    chosen = select("prefix_tree", inputs["tokens"])
    with backend("triton" if absent("prefix_tree_build", chosen) else chosen):
        return _built(inputs)


def _built(inputs: Mapping[str, Any]) -> PrefixTree:
    names = ("tokens", "mask", "group_ids", "group_size", "lengths", "attention_mask", "cu_seqlens", "ignore_masked")
    return PrefixTree(**{name: inputs[name] for name in names if name in inputs})


def _methods(tree: PrefixTree) -> _Operations:
    names = ("aggregate", "advantages", "propagate", "to_tokens", "from_tokens", "unique_to_tokens")
    return {name: getattr(tree, name) for name in names}


def _finish(
    call: _Call, tree: PrefixTree, operations: _Operations, inputs: Mapping[str, Any], *, double: bool = False
) -> Tensors:
    """Results and gradients of a call; values per node and unique token as long as the tree's arrays are."""
    nodes, unique = len(tree.parent), len(tree.from_tokens(inputs["of_tokens"]))
    leaves = {
        name: leaf(inputs[name][:end], double)
        for name, end in (
            *(("rows", None), ("weights", None), ("of_tokens", None)),
            *(("of_nodes", nodes), ("shift", nodes), ("unique", unique)),
        )
    }
    out = call(tree, operations, leaves)
    return out | {
        name: grad[: tree.num_nodes] if name.endswith(("of_nodes", "shift")) else grad
        for name, grad in gradients(out, leaves, seed=1).items()
    }


def _run(call: _Call, inputs: Mapping[str, Any]) -> Tensors:
    tree = _tree(inputs)
    return _finish(call, tree, _methods(tree), inputs)


def _truth(call: _Call, inputs: Mapping[str, Any]) -> Tensors:
    with backend("reference"):
        tree = _tree(inputs)
    return _finish(call, tree, _methods(tree), inputs, double=True)


def _torch(call: _Call, inputs: Mapping[str, Any]) -> Tensors:
    with backend("reference"):
        tree = _tree(inputs)
    mask = inputs.get("mask")
    plain: _Operations = {
        "aggregate": partial(eager.tree_aggregate, tree),
        "advantages": partial(eager.tree_advantages, tree),
        "propagate": partial(eager.tree_propagate, tree),
        "to_tokens": partial(eager.tree_to_tokens, tree, mask=mask),
        "from_tokens": lambda x, op: eager.tree_from_tokens(tree, x, mask, op),
        "unique_to_tokens": partial(eager.tree_unique_to_tokens, tree, mask=mask),
    }
    return _finish(call, tree, plain, inputs)

"""What a trainer has at hand, given to PrefixTree and PackedTree: ids by value, integers of any width, arrays, empty
batches; every public method takes arrays and gives them back."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import networkx
import numpy as np
import pytest
import torch
from torch import Tensor

import fastreward as fr
from fastreward import PrefixTree
from fastreward.prefix_tree.packed import PackedTree
from fastreward.prefix_tree.views import TreeStatistics

TOKENS = torch.tensor([[1, 2, 3], [1, 2, 4], [1, 2, 3], [1, 5, 6]])
LABELS = torch.tensor([7, 7, 8, 8])


def same(tree: PrefixTree, want: PrefixTree) -> None:
    assert torch.equal(tree.forest.nodes, want.forest.nodes)
    assert torch.equal(tree.forest.rows[:2], want.forest.rows[:2])


# --------------------------------------------------------------------------------------------------------------- ids
IDS: dict[str, Any] = {
    "0-d tensors": list(LABELS),
    "NumPy scalars": list(LABELS.numpy()),
    "strings of NumPy": list(np.array(["a", "a", "b", "b"])),
    "an array of objects": np.array(["a", "a", "b", "b"], dtype=object),
    "tuples of tensors": [(x, "turn") for x in LABELS],
    "mixed": [7, np.int64(7), torch.tensor(8), 8.0],
    "strided": torch.stack([LABELS, LABELS.flip(0)], 1)[:, 0],
}


@pytest.mark.parametrize("ids", IDS.values(), ids=IDS)
def test_groups_by_value(ids: Any) -> None:
    want = PrefixTree(TOKENS, group_ids=LABELS)
    assert want.num_groups == 2
    same(PrefixTree(TOKENS, group_ids=ids), want)
    branches = torch.tensor([-1, 0, -1, 2]), torch.tensor([0, 2, 0, 1]), torch.tensor([3, 3, 3, 3])
    same(PrefixTree.from_branches(*branches, ids), PrefixTree.from_branches(*branches, LABELS))
    paths = PrefixTree.from_paths(TOKENS, LABELS)
    same(PrefixTree.from_paths(TOKENS, ids), paths)


PATHS: dict[str, Callable[[Tensor], Sequence[Any]]] = {
    "lists": lambda t: t.tolist(),
    "lists of 0-d tensors": lambda t: [list(row) for row in t],
    "tensors": list,
    "arrays": lambda t: list(t.numpy()),
    "narrow arrays": lambda t: list(t.numpy().astype(np.uint8)),
    "lists of NumPy scalars": lambda t: [list(row) for row in t.numpy()],
    "strings": lambda t: [list(map(str, row)) for row in t.tolist()],
    "strings of NumPy": lambda t: t.numpy().astype(str),  # type: ignore[return-value]
    "objects": lambda t: t.numpy().astype(object),  # type: ignore[return-value]
    "tuples of tensors": lambda t: [[("step", x) for x in row] for row in t],
}


@pytest.mark.parametrize("kind", PATHS)
def test_steps_by_value(kind: str) -> None:
    same(PrefixTree.from_paths(PATHS[kind](TOKENS)), PrefixTree.from_paths(TOKENS))


def test_paths_of_several_lengths() -> None:
    want = PrefixTree.from_paths(torch.tensor([[1, 2, -1], [1, -1, -1], [1, 2, 3]]))
    rows = [[1, 2], [1], [1, 2, 3]]
    for paths in (rows, [torch.tensor(row) for row in rows], [np.array(row) for row in rows]):
        same(PrefixTree.from_paths(paths), want)
    same(PrefixTree.from_paths([torch.tensor([1, 2, -1]), torch.tensor([1]), torch.tensor([1, 2, 3])]), want)


PATHS_REFUSED = [
    ([[1, -1], [1, 2]], ValueError, "path_ids: expected no negative numbers in lists"),
    (["ab", "ac"], TypeError, "path_ids: expected a sequence of ids for each path, got a string"),
    ([[float("nan")], [1]], ValueError, "path_ids: expected labels that equal themselves, got nan at index 0"),
    ([[object()], [1]], TypeError, "path_ids: expected labels that compare by value"),
    ([torch.ones(2), torch.ones(2)], TypeError, "path_ids: expected an integer tensor, got float32"),
]


@pytest.mark.parametrize(("paths", "error", "message"), PATHS_REFUSED)
def test_paths_that_would_share_nothing_or_end_early(paths: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        PrefixTree.from_paths(paths)


# ------------------------------------------------------------------------------------------------------------ tokens
@pytest.mark.parametrize("dtype", [np.int8, np.int16, np.int32, np.int64, np.uint8, np.uint16, np.uint32, np.uint64])
def test_integers_of_any_width(dtype: Any) -> None:
    want = PrefixTree(TOKENS)
    array = TOKENS.numpy().astype(dtype)
    for tokens in (array, torch.from_numpy(array), array[:, ::-1][:, ::-1], np.asfortranarray(array)):
        same(PrefixTree(tokens), want)
    top = np.iinfo(dtype).max
    wide = np.array([[top, top], [top, top - 1]], dtype=dtype)
    assert PrefixTree(wide).num_tokens == 3
    assert torch.equal(PrefixTree(array).pack().token_ids, want.pack().token_ids)


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int16, torch.float16, torch.bfloat16, torch.float64])
def test_masks_of_any_kind(dtype: torch.dtype) -> None:
    mask = torch.tensor([[1, 1, 0], [1, 0, 1], [0, 0, 0], [1, 1, 1]])
    want = PrefixTree(TOKENS, mask)
    for given in (mask.to(dtype), mask.to(dtype).t().contiguous().t()):
        same(PrefixTree(TOKENS, given), want)
        same(PrefixTree(TOKENS, attention_mask=given), PrefixTree(TOKENS, attention_mask=mask))


@pytest.mark.parametrize(
    "lengths", [[3, 2, 0, 1], (3, 2, 0, 1), np.array([3, 2, 0, 1]), list(torch.tensor([3, 2, 0, 1]))]
)
def test_lengths_of_any_kind(lengths: Any) -> None:
    same(PrefixTree(TOKENS, lengths=lengths), PrefixTree(TOKENS, lengths=torch.tensor([3, 2, 0, 1])))


def test_left_padding_is_told_by_attention_mask() -> None:
    """With it, prompts of two lengths share what follows the padding; without it, padding is tokens (as documented)."""
    tokens = torch.tensor([[0, 0, 5, 6, 7], [0, 5, 6, 7, 8], [5, 6, 7, 8, 9]])
    there = tokens != 0
    tree = PrefixTree(tokens, attention_mask=there)
    assert tree.num_tokens == 5
    assert tree.pack().position_ids.tolist() == [0, 1, 2, 3, 4]
    assert PrefixTree(tokens).num_tokens > 5
    assert "attention_mask" in (PrefixTree.__doc__ or "").partition("mask: the shape of tokens")[0]


# ------------------------------------------------------------------------------------------------------------ values
@pytest.mark.parametrize(
    ("dtype", "wanted"),
    [
        (torch.bool, torch.float32),
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.int32, torch.float64),
        (torch.int64, torch.float64),
        (torch.float64, torch.float64),
    ],
)
def test_values_of_any_kind_lose_nothing(dtype: torch.dtype, wanted: torch.dtype) -> None:
    tree = PrefixTree(TOKENS)
    big = 2**24 + 1 if dtype in (torch.int32, torch.int64) else 1
    rewards = torch.tensor([big, 0, 0, 0]).to(dtype)
    values = tree.aggregate(rewards, "sum", weights=torch.ones(4, dtype=torch.int64))
    assert values.dtype == wanted
    assert values[0] == big
    nodes = values.to(dtype)
    for got in (tree.advantages(nodes, "root"), tree.propagate(1, nodes), tree.to_tokens(nodes)):
        assert got.dtype == wanted
    assert tree.to_tokens(nodes)[0, 0] == nodes[1]
    tokens = torch.full(TOKENS.shape, big).to(dtype)
    assert tree.from_tokens(tokens, "first")[0] == big


def test_complex_values_are_refused() -> None:
    tree = PrefixTree(TOKENS)
    for call in (tree.aggregate, tree.advantages, tree.to_tokens, tree.from_tokens, tree.unique_to_tokens):
        size = {tree.aggregate: (4,), tree.from_tokens: (4, 3), tree.unique_to_tokens: (tree.num_tokens,)}
        with pytest.raises(TypeError, match="expected real numbers, got complex64"):
            call(torch.ones(size.get(call, (tree.num_nodes,)), dtype=torch.complex64))


# ------------------------------------------------------------------------------------------------------------ arrays
def packed() -> PackedTree:
    return PrefixTree(TOKENS).pack()


def numbers(*shape: int) -> np.ndarray:
    return np.linspace(0.0, 1.0, int(np.prod(shape)), dtype=np.float32).reshape(shape)


NODES, UNIQUE, VOCAB = 6, 6, 8
#: method -> (arguments, all arrays; what comes back of arrays, else a type)
TREE_METHODS: dict[str, tuple[dict[str, Any], Any]] = {
    "aggregate": ({"leaf_values": numbers(4), "weights": numbers(4) + 1}, np.ndarray),
    "advantages": ({"node_values": numbers(NODES)}, np.ndarray),
    "propagate": ({"scale": numbers(NODES), "shift": numbers(NODES)}, np.ndarray),
    "to_tokens": ({"node_values": numbers(NODES), "row_values": numbers(4)}, np.ndarray),
    "from_tokens": ({"token_values": numbers(4, 3)}, np.ndarray),
    "unique_to_tokens": ({"unique_values": numbers(UNIQUE)}, np.ndarray),
    "from_paths": (
        {"path_ids": TOKENS.numpy(), "group_ids": LABELS.numpy(), "segment_ids": TOKENS.numpy() % 3,
         "mask": numbers(4, 3)},
        PrefixTree,
    ),
    "from_branches": (
        {"parent": np.array([-1, 0]), "branch_position": np.array([0, 1]), "lengths": np.array([2, 3]),
         "mask": numbers(2, 3)},
        PrefixTree,
    ),
    "to_networkx": ({"value": numbers(NODES)}, networkx.DiGraph),
    "plot": ({"values": numbers(NODES), "advantages": numbers(NODES), "rewards": numbers(4)}, None),
    "rows_of": ({"node": np.int64(1)}, Tensor),
    "pack": ({"max_tokens": np.int32(9)}, PackedTree),
    "statistics": ({}, TreeStatistics),
}  # fmt: skip
PACKED_METHODS: dict[str, tuple[dict[str, Any], Any]] = {
    "token_logprobs": ({"logits": numbers(UNIQUE, VOCAB)}, fr.TokenStats),
    "to_tokens": ({"packed_values": numbers(UNIQUE)}, np.ndarray),
    "from_tokens": ({"token_values": numbers(4, 3)}, np.ndarray),
    "trl_row": ({"advantages": numbers(4), "old_logprobs": numbers(4, 3)}, dict),
    "bins": ({}, list),
    "to_areal": ({}, list),
    "attention_mask": ({}, Tensor),
    "block_mask": ({"block_size": np.int64(128)}, None),
    "mask_mod": ({"block_size": np.int64(128)}, None),
}


def methods(of: type) -> set[str]:
    """The public ones, whoever adds one: functions of the class, and class methods."""
    found = {name for name, x in inspect.getmembers(of) if callable(x) and not name.startswith("_")}
    return found - {name for name in found if isinstance(inspect.getattr_static(of, name), property)}


def test_every_public_method_is_called_with_arrays() -> None:
    assert methods(PrefixTree) == set(TREE_METHODS)
    assert methods(PackedTree) == set(PACKED_METHODS)


def as_tensors(x: Any) -> Any:
    if isinstance(x, dict):
        return {name: as_tensors(value) for name, value in x.items()}
    return torch.from_numpy(x) if isinstance(x, np.ndarray) else x


def fields(result: Any) -> list[Any]:
    """Arrays or tensors of a result."""
    if isinstance(result, fr.TokenStats):
        return [result.logprobs]
    return list(result.values()) if isinstance(result, dict) else [result]


CALLS = [
    *((lambda: PrefixTree(TOKENS), name, *case) for name, case in TREE_METHODS.items()),
    *((packed, name, *case) for name, case in PACKED_METHODS.items()),
]


@pytest.mark.filterwarnings("ignore:.*non-interactive.*")
@pytest.mark.parametrize(("make", "method", "given", "kind"), CALLS)
def test_arrays_in_and_out(make: Any, method: str, given: dict[str, Any], kind: Any) -> None:
    got = getattr(make(), method)(**given)
    if kind is not None:
        assert isinstance(got, kind)
    if kind in (np.ndarray, dict, fr.TokenStats):
        want = getattr(make(), method)(**as_tensors(given))
        for x, y in zip(fields(got), fields(want), strict=True):
            assert isinstance(x, np.ndarray)
            assert isinstance(y, Tensor)
            assert np.array_equal(x, y.detach().numpy())


def test_the_constructor_takes_arrays() -> None:
    mask, attention = numbers(4, 3) >= 0, np.ones((4, 3), np.int8)
    tree = PrefixTree(TOKENS.numpy(), mask, LABELS.numpy(), attention_mask=attention, lengths=np.full(4, 3))
    same(tree, PrefixTree(TOKENS, group_ids=LABELS))
    flat = PrefixTree(TOKENS.numpy().reshape(-1), cu_seqlens=np.arange(0, 13, 3, dtype=np.int32))
    same(flat, PrefixTree(TOKENS))


# ------------------------------------------------------------------------------------------------------------- edges
EDGES: dict[str, dict[str, Any]] = {
    "no rows": {"tokens": torch.zeros(0, 3, dtype=torch.int64), "group_ids": []},
    "no columns": {"tokens": torch.zeros(3, 0, dtype=torch.int64)},
    "one token": {"tokens": torch.ones(1, 1, dtype=torch.int64)},
    "all masked": {"tokens": TOKENS, "mask": torch.zeros(4, 3), "group_ids": LABELS},
    "one group masked": {"tokens": TOKENS, "mask": (LABELS == 7).unsqueeze(1).expand(4, 3), "group_ids": LABELS},
    "no packed rows": {"tokens": torch.zeros(0, dtype=torch.int64), "cu_seqlens": torch.zeros(1, dtype=torch.int64)},
}


@pytest.mark.parametrize("name", EDGES)
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_edges(name: str, backend: Any) -> None:
    """Everything has an answer, and a gradient where there is one."""
    with fr.backend(backend):
        tree = PrefixTree(**EDGES[name])
        rewards = torch.ones(tree.num_rows, requires_grad=True)
        values = tree.aggregate(rewards)
        out = tree.to_tokens(tree.propagate(0.5, values), row_values=torch.ones(tree.num_rows))
        assert out.shape == tree.shape
        out.sum().backward()
        assert rewards.grad is not None
        assert rewards.grad.isfinite().all()
        for mode in ("td", "sibling", "root", "td+root", "all-ancestors", "depth-weighted"):
            assert tree.advantages(values.detach(), mode).isfinite().all()  # type: ignore[arg-type]
        folded = tree.from_tokens(torch.ones(tree.shape))
        assert tree.unique_to_tokens(folded).shape == tree.shape
        assert len(tree.pack()) == tree.num_tokens
        assert tree.statistics().sequences == tree.num_rows


# ----------------------------------------------------------------------------------------------------------- numbers
NUMBERS: list[Callable[[PrefixTree, Callable[[float], Any]], Tensor]] = [
    lambda tree, n: tree.aggregate(torch.arange(4.0), discount=n(0.7)),
    lambda tree, n: tree.aggregate(torch.arange(4.0), "logsumexp", scale=n(-0.3)),
    lambda tree, n: tree.advantages(torch.arange(6.0), "sibling", eps=n(0.1)),
    lambda tree, n: tree.propagate(n(0.5), n(0.1), initial=n(1.0), low=n(-0.2), high=n(0.6)),
    lambda tree, n: tree.pack().token_logprobs(torch.linspace(0, 1, 48).view(6, 8), temperature=n(0.3)).logprobs,
]


@pytest.mark.parametrize("call", NUMBERS)
@pytest.mark.parametrize("kind", [lambda x: torch.tensor(x, dtype=torch.float64), np.float64, lambda x: np.array(x)])
def test_numbers_of_any_kind(call: Any, kind: Any) -> None:
    """A float, a 0-d tensor, a scalar of NumPy: the same bits."""
    tree = PrefixTree(TOKENS)
    got, want = call(tree, kind), call(tree, float)
    assert np.array_equal(np.asarray(got), want.numpy())


def test_numbers_out_of_range() -> None:
    tree, inf = PrefixTree(TOKENS), torch.tensor(torch.inf)
    for message, call in (
        (
            "scale: expected a number other than 0",
            lambda: tree.aggregate(torch.ones(4), "logsumexp", scale=torch.zeros(())),
        ),
        ("discount: expected a finite number", lambda: tree.aggregate(torch.ones(4), discount=inf)),
        ("discount: expected shape", lambda: tree.aggregate(torch.ones(4), discount=torch.ones(2))),
        ("initial: expected a finite number", lambda: tree.propagate(1.0, 1.0, initial=inf)),
        ("low, high: expected low <= high", lambda: tree.propagate(1.0, 1.0, low=torch.tensor(1.0), high=0.0)),
        (
            "discount: expected 1 with op='max'",
            lambda: tree.aggregate(torch.ones(4), "max", discount=torch.tensor(0.5)),
        ),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_a_0d_tensor_of_propagate_keeps_its_gradient() -> None:
    tree, leaf = PrefixTree(TOKENS), torch.tensor(0.5, requires_grad=True)
    (grad,) = torch.autograd.grad(tree.propagate(1.0, leaf).sum(), leaf)
    assert grad == tree.depth.sum()

"""Values and gradients on a PrefixTree against the float64 reference and autograd, and their bits."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from drawn_tree import DRAWN, LEAF_VALUES, tree_of
from prefix_tree_checks import (
    advantage_modes,
    aggregations,
    both,
    close,
    random_batch,
    same_tree,
)
from torch import Tensor

import fastreward as fr
from fastreward import PrefixTree
from fastreward._arguments.options import PLACES, TOKEN_OPS

INF, NAN = float("inf"), float("nan")


@pytest.mark.parametrize("seed", range(4))
def test_long_rows_against_the_reference(seed: int) -> None:
    """Edges longer than any block or vector, more than one thread, all kinds of masks."""
    r = random.Random(seed)
    torch.manual_seed(seed)
    tokens = torch.randint(0, 2, (12, 3300), dtype=torch.int32)
    for b in range(1, 12):
        shared = r.choice((31, 33, 1023, 1025, 2048, 2500, 3300))
        tokens[b, :shared] = tokens[r.randrange(b), :shared]
    mask = torch.rand(12, 3300) < 0.9
    given = {"tokens": tokens, "mask": (mask, mask.to(torch.int32), mask.float(), None)[seed], "group_size": 6}
    tree, truth = both(lambda: PrefixTree(**given))
    same_tree(tree, truth)
    values = torch.randn(tree.num_nodes)
    for place in PLACES:
        assert torch.equal(tree.to_tokens(values, place=place), truth.to_tokens(values, place=place))
    x = torch.randn(12, 3300)
    for op in TOKEN_OPS:
        close(tree.from_tokens(x, op), truth.from_tokens(x, op), op)
    for place in PLACES:
        leaf = torch.randn(tree.num_nodes, requires_grad=True)
        grads = [torch.autograd.grad(t.to_tokens(leaf, place=place), leaf, x)[0] for t in (tree, truth)]
        torch.testing.assert_close(*grads, atol=1e-5, rtol=1e-6)  # sums of some thousand terms, stored as f32


@pytest.mark.parametrize("dtype", [torch.int16, torch.int32, torch.int64])
@pytest.mark.parametrize("shared", [1, 31, 32, 33, 40, 64, 65, 99])
def test_rows_part_anywhere(shared: int, dtype: torch.dtype) -> None:
    """At the first token that differs, by whatever bits, though others of the same vector differ too or do not."""
    tokens = torch.randint(0, 30_000, (2, 100)).to(dtype)
    tokens[1, :shared] = tokens[0, :shared]
    tokens[1, shared] = tokens[0, shared] ^ 6
    tree = PrefixTree(tokens, group_size=2)
    assert tree.edge_length.tolist() == [0, shared, 100 - shared, 100 - shared]


@pytest.mark.parametrize("over", ["sequences", "children"])
@pytest.mark.parametrize("op", ["mean", "sum", "logsumexp", "max", "min", "any"])
@pytest.mark.parametrize("special", [[-INF], [INF], [NAN], [-INF, INF], [0.0]])
def test_infinities_and_nan(op: Any, over: Any, special: list[float]) -> None:
    for seed in range(3):
        r = random.Random(seed)
        tokens = random_batch(r, 12)["tokens"]
        tree, truth = both(lambda tokens=tokens: PrefixTree(tokens))
        values = torch.randn(tree.num_rows)
        values[torch.rand(tree.num_rows) < 0.4] = special[0]
        values[torch.rand(tree.num_rows) < 0.2] = special[-1]
        got, want = (t.aggregate(values, op, over=over) for t in (tree, truth))
        close(got, want, (op, over))
        for options in advantage_modes(r):
            close(tree.advantages(got, **options), truth.advantages(got, **options), options)
        if op == "logsumexp":  # where no value is finite the gradient is 0, not NaN
            x = values.requires_grad_()
            grads = [torch.autograd.grad(t.aggregate(x, op, over=over).sum(), x)[0] for t in (tree, truth)]
            close(*grads, "gradient")
            assert torch.isfinite(grads[0]).all() or special[0] != special[0]


def test_a_logsumexp_whose_exponentials_overflow() -> None:
    tree = tree_of([[1, 2], [1, 3], [1, 4]])
    values = torch.tensor([1e4, -1e4, 5.0], dtype=torch.float64, requires_grad=True)
    weights = torch.tensor([0.0, 1.0, 2.0])
    got = tree.aggregate(values, "logsumexp", weights=weights)
    expected = torch.tensor([0.0, 0.0, 1.0]).double()
    close(torch.autograd.grad(got[1], values)[0], expected, "a part without weight has no gradient")
    assert tree.aggregate(values.detach(), "logsumexp")[0] == 1e4


def test_weights_that_sum_to_nothing() -> None:
    tree = tree_of(DRAWN)
    got = tree.aggregate(LEAF_VALUES, weights=torch.tensor([0.0, 1, 1, 1, 0, 1]))
    assert got.isnan().tolist() == [False, False, True, False, False]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.bool])
def test_other_dtypes_become_float32(dtype: torch.dtype) -> None:
    tree, values = tree_of(DRAWN), LEAF_VALUES.to(dtype)
    got = tree.aggregate(values)
    assert got.dtype == torch.float32
    assert torch.equal(got, tree.aggregate(values.float()))
    assert tree.to_tokens(torch.ones(5, dtype=dtype)).dtype == torch.float32
    assert tree.advantages(torch.ones(5).double()).dtype == torch.float64
    assert tree.propagate(torch.ones(5).double(), torch.ones(5)).dtype == torch.float64


def test_advantages_as_their_formulas_say() -> None:
    """Each mode written out a second time, with nothing of the reference."""
    for seed in range(5):
        r = random.Random(seed)
        tree = PrefixTree(random_batch(r, 16)["tokens"], group_ids=None)
        parent, count = tree.parent.tolist(), tree.count.tolist()
        v = torch.randn(tree.num_nodes).double()
        above = [[n] for n in range(len(parent))]
        for path in above:
            while parent[path[-1]] >= 0:
                path.append(parent[path[-1]])
        for n, path in enumerate(above):
            if parent[n] < 0:
                continue
            over = path[1:]
            siblings = torch.stack([v[k] for k in range(len(parent)) if parent[k] == parent[n]])
            expected = {
                "td": v[n] - v[path[1]],
                "root": v[n] - v[path[-1]],
                "td+root": 2 * v[n] - v[path[1]] - v[path[-1]],
                "all-ancestors": sum(v[n] - v[a] for a in over) / len(over),
                "depth-weighted": sum(count[a] * (v[n] - v[a]) for a in path) / sum(count[a] for a in path),
            }
            if len(siblings) > 1:
                expected["sibling"] = (v[n] - siblings.mean()) / (siblings.std() + 1e-6)
            for mode, value in expected.items():
                close(tree.advantages(v, mode)[n], value, (mode, n))


class TestGradcheck:
    """Numerical derivatives in float64, on the CPU's kernels and on the reference."""

    @pytest.fixture(params=["cpu", "reference"])
    def tree(self, request: pytest.FixtureRequest) -> PrefixTree:
        tokens = torch.tensor([[1, 2, 3, 4], [1, 2, 5, 0], [1, 2, 0, 0], [7, 8, 0, 0], [1, 2, 3, 4], [0, 0, 0, 0]])
        mask = torch.tensor([[1, 0, 1, 1], [1, 1, 1, 0], [0, 1, 0, 0], [1, 1, 0, 0], [1, 1, 0, 1], [0, 0, 0, 0]])
        with fr.backend(request.param):
            return PrefixTree(tokens, mask, ["a", "a", "a", "a", "a", "b"])

    @staticmethod
    def check(function: Any, *sizes: tuple[int, ...]) -> None:
        inputs = tuple(torch.randn(size, dtype=torch.float64, requires_grad=True) for size in sizes)
        torch.autograd.gradcheck(function, inputs)

    def test_aggregate(self, tree: PrefixTree) -> None:
        r = random.Random(0)
        for _ in range(2):
            for options in aggregations(r, tree):
                if options["op"] in ("mean", "sum", "logsumexp"):
                    self.check(lambda v, o=options: tree.aggregate(v, **o), (6,))

    @pytest.mark.parametrize("bounds", [{}, {"low": -0.1}, {"low": -0.3, "high": 0.2}])
    def test_propagate(self, tree: PrefixTree, bounds: dict[str, float]) -> None:
        size = (tree.num_nodes,)
        self.check(lambda a, b: tree.propagate(a, b, initial=0.5, **bounds), size, size)

    def test_tokens(self, tree: PrefixTree) -> None:
        for place in PLACES:
            self.check(lambda v, p=place: tree.to_tokens(v, place=p), (tree.num_nodes,))
        for op in ("sum", "mean"):
            self.check(lambda v, o=op: tree.from_tokens(v, o), (6, 4))
        self.check(tree.unique_to_tokens, (tree.num_tokens,))


def test_gradients_that_there_are_not() -> None:
    tree, x = tree_of(DRAWN), torch.ones(6, requires_grad=True)
    for op in ("max", "min", "any"):
        with pytest.raises(ValueError, match=f"leaf_values: op='{op}' has no gradient"):
            tree.aggregate(x, op)
        assert not tree.aggregate(x.detach(), op).requires_grad
    with pytest.raises(ValueError, match="node_values: expected a constant, as no gradient flows to it"):
        tree.advantages(torch.ones(5, requires_grad=True))
    first = tree.from_tokens(torch.ones(6, 4, requires_grad=True), "first")
    with pytest.raises(NotImplementedError, match="op='first' has no gradient"):
        first.sum().backward()
    grad = torch.autograd.grad(tree.aggregate(x).square().sum(), x, create_graph=True)[0]
    with pytest.raises(NotImplementedError, match="double backward"):
        grad.sum().backward()


def test_gradients_through_several_operations() -> None:
    """Upstream gradients that are views, and not uniform."""
    tree, truth = both(lambda: tree_of(DRAWN))
    x = LEAF_VALUES.double().requires_grad_()
    weight = torch.randn(4, 6).double()

    def loss(t: PrefixTree) -> Tensor:
        tokens = t.to_tokens(t.aggregate(x, "logsumexp") * t.propagate(0.5, 1.0).double())
        again = t.unique_to_tokens(t.from_tokens(tokens.square(), "mean"))
        return (again.t() * weight).sum()

    close(*(torch.autograd.grad(loss(t), x)[0] for t in (tree, truth)), "gradient")


# -------------------------------------------------------------------------------------------------------------- bits
def everything(tree: PrefixTree) -> list[Tensor]:
    """Arrays, values and gradients, from inputs that depend on a place's own group and row alone."""
    g = torch.Generator().manual_seed(1)
    rows = torch.randn(tree.num_rows, generator=g, requires_grad=True)
    tokens = torch.randn(tree.shape, generator=g)
    out = [tree.forest.nodes, tree.forest.rows, tree.node_of_token, tree.unique_of_token]
    for op in ("mean", "logsumexp", "max"):
        for over in ("sequences", "children"):
            values = tree.aggregate(rows if op != "max" else rows.detach(), op, over=over)
            out.append(values)
            if op != "max":
                out.append(torch.autograd.grad(values.sin().sum(), rows)[0])
    for options in advantage_modes(random.Random(0)):
        out.append(tree.advantages(out[4].detach(), **options))
    x = out[4].detach().requires_grad_()
    out += [tree.propagate(x, 0.1), tree.to_tokens(x), tree.from_tokens(tokens, "mean")]
    out.append(torch.autograd.grad(tree.to_tokens(x), x, tokens)[0])
    out.append(torch.autograd.grad(tree.propagate(x, 0.1).sin().sum(), x)[0])
    return [y.detach() for y in out]


@pytest.mark.usefixtures("threads")
def test_same_bits_on_any_number_of_threads() -> None:
    """Sizes above every threshold from which on threads share the work."""
    torch.manual_seed(0)
    shallow = torch.randint(0, 2, (6000, 40)), 8
    deep = torch.randint(0, 2, (64, 1), dtype=torch.int32).expand(64, 4096).contiguous(), 16
    for tokens, size in (shallow, deep):
        mask = torch.rand(tokens.shape) < 0.9
        found = []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append(everything(PrefixTree(tokens, mask, group_size=size)))
        for one, two in zip(*found, strict=True):
            assert torch.equal(one.nan_to_num(7.0), two.nan_to_num(7.0))


def test_a_group_depends_neither_on_the_others_nor_on_padding() -> None:
    torch.manual_seed(0)
    tokens = torch.randint(0, 2, (30, 12))
    ids = torch.arange(30) % 3
    values, token_values = torch.randn(30), torch.randn(30, 12)
    whole = PrefixTree(tokens, group_ids=ids)
    for group in range(3):
        rows = ids == group
        alone = PrefixTree(torch.nn.functional.pad(tokens[rows], (0, 5), value=9), lengths=torch.full((10,), 12))
        begin = int(whole.root[whole.leaf[group]])
        end = int(whole.tout[begin])
        assert torch.equal(alone.count, whole.count[begin:end])
        assert torch.equal(alone.leaf, whole.leaf[rows] - begin)
        unique = int(whole.token_begin[begin])
        for options in aggregations(random.Random(0), alone):
            options.pop("weights", None), options.pop("child_weights", None)
            got, want = alone.aggregate(values[rows], **options), whole.aggregate(values, **options)
            assert torch.equal(got, want[begin:end])
        for options in advantage_modes(random.Random(0)):
            assert torch.equal(alone.advantages(got, **options), whole.advantages(want, **options)[begin:end])
        wide = torch.nn.functional.pad(token_values[rows], (0, 5), value=NAN)
        for op in TOKEN_OPS:
            part = whole.from_tokens(token_values, op)[unique : unique + alone.num_tokens]
            assert torch.equal(alone.from_tokens(wide, op), part)
        assert torch.equal(alone.to_tokens(got)[:, :12], whole.to_tokens(want)[rows])


def test_reshuffled_rows_have_the_same_prefixes() -> None:
    tokens = torch.randint(0, 2, (40, 6))
    order = torch.randperm(40)
    tree, shuffled = PrefixTree(tokens), PrefixTree(tokens[order])
    values = torch.randint(-9, 9, (40,)).float()  # sums of which are exact in any order
    a = tree.aggregate(values, "sum")[tree.node_of_token.long()]
    b = shuffled.aggregate(values[order], "sum")[shuffled.node_of_token.long()]
    assert torch.equal(a[order], b)

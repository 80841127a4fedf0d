"""Segments against the float64 reference and the loops of the papers' code: ids, reductions, differences, scatter."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from criterion import MASK_DTYPES, assert_as_good_as_torch
from torch import Tensor

import fastreward as fr
from fastreward._arguments.options import SEGMENT_OPS, SEGMENT_PLACES
from fastreward.reference import segments as reference

NAN = torch.nan


@pytest.fixture(params=["cpu", "reference"])
def _backend(request: pytest.FixtureRequest) -> Iterator[None]:
    with fr.backend(request.param):
        yield


def options_of(op: str) -> dict[str, Any]:
    return {"op": op} | ({"temperature": 0.3} if op == "softmin" else {})


# --------------------------------------------------------------------------------------------------------------- ids
@pytest.mark.usefixtures("_backend")
def test_ids() -> None:
    mask = torch.tensor([[1, 1, 0, 1, 1, 0], [0, 1, 1, 1, 0, 1], [0, 0, 0, 0, 0, 0]])
    for dtype in MASK_DTYPES:
        turns = fr.segment_ids(mask.to(dtype))
    assert turns.tolist() == [[0, 0, -1, 1, 1, -1], [-1, 0, 0, 0, -1, 1], [-1] * 6]
    tokens = torch.tensor([[5, 9, 7, 8, 5, 9], [9, 9, 5, 5, 8, 5], [5, 5, 5, 5, 5, 5]])
    assert fr.segment_ids(tokens, separators=9).tolist() == [[0, 0, 1, 1, 1, 1], [0, 1, 2, 2, 2, 2], [0] * 6]
    steps = fr.segment_ids(tokens.int(), separators=[8, 9], mask=mask)
    assert steps.tolist() == [[0, 0, -1, 1, 2, -1], [-1, 0, 1, 1, -1, 1], [-1] * 6]
    assert torch.equal(fr.segment_ids(tokens, separators=torch.tensor([8, 9]), mask=mask), steps)
    ends = torch.tensor([[1, 3, 4], [2, 2, -1], [-1, -1, -1]])
    assert fr.segment_ids(mask, ends=ends).tolist() == [[0, 0, -1, 1, 2, -1], [-1, 0, 0, -1, -1, -1], [-1] * 6]
    whole = torch.ones_like(mask)
    assert fr.segment_ids(whole, ends=ends).tolist() == [[0, 0, 1, 1, 2, -1], [0, 0, 0, -1, -1, -1], [-1] * 6]
    assert torch.equal(fr.segment_ids(whole, ends=mask == 0)[0], torch.tensor([0, 0, 0, 1, 1, 1]).int())
    assert fr.segment_ids(whole[:1], ends=torch.tensor([[1, 1, 4]])).tolist() == [[0, 0, 2, 2, 2, -1]]
    labels = torch.tensor([[3, 3, 1, 1, -1, 1], [0, 0, 0, 0, 0, 0], [-1, 2, 2, 3, 2, -1]])
    thoughts = [[0, 0, 1, 1, -1, 2], [0] * 6, [-1, 0, 0, 1, 2, -1]]
    assert fr.segment_ids(labels, by="labels").tolist() == thoughts
    assert fr.segment_ids(labels.int(), by="labels", mask=mask)[0].tolist() == [0, 0, -1, 1, -1, -1]


@pytest.mark.usefixtures("_backend")
def test_ids_packed() -> None:
    mask = torch.tensor([1, 1, 0, 1, 1, 1, 0, 1])
    bounds = torch.tensor([0, 4, 4, 8])
    assert fr.segment_ids(mask, cu_seqlens=bounds).tolist() == [0, 0, -1, 1, 0, 0, -1, 1]
    whole, segments = torch.ones(8), torch.tensor([0, 1, 4, 4, 6, 8])
    assert fr.segment_ids(whole, bounds=segments, cu_seqlens=bounds).tolist() == [0, 1, 1, 1, 0, 0, 1, 1]
    empty = torch.tensor([0, 0, 1, 1, 4, 4, 6, 6, 6, 8])  # those within a sequence count, as they do among ends
    assert fr.segment_ids(whole, bounds=empty, cu_seqlens=bounds).tolist() == [0, 2, 2, 2, 0, 0, 3, 3]
    ends = torch.tensor([0, 0, 3, 3, 5, 5, 5, 7])
    assert fr.segment_ids(whole, ends=ends, cu_seqlens=bounds).tolist() == [0, 2, 2, 2, 0, 0, 3, 3]
    ends = torch.tensor([0, 3, 5])
    assert fr.segment_ids(whole, ends=ends, cu_seqlens=bounds).tolist() == [0, 1, 1, 1, 0, 0, -1, -1]
    with pytest.raises(ValueError, match="bounds: expected every bound of cu_seqlens among"):
        fr.segment_ids(whole, bounds=torch.tensor([0, 5, 8]), cu_seqlens=bounds)
    with pytest.raises(ValueError, match="bounds: expected packed tokens"):
        fr.segment_ids(torch.ones(2, 4), bounds=segments)


# --------------------------------------------------------------------------------------------------------- reduction
def batch(seed: int, runs: bool = True) -> dict[str, Any]:
    """x [B, T], ids in runs with holes or in any order, weights: some 0, with NaN below."""
    g = torch.Generator().manual_seed(seed)
    B, T, S = 5, 37, 6
    ids = torch.randint(-1, S - 1, (B, T), generator=g)  # the last segment is empty
    ids = ids.sort(-1).values if runs else ids
    weights = torch.rand(B, T, generator=g) * (torch.rand(B, T, generator=g) < 0.7)
    weights[1], ids[2] = 0.0, -1
    x = torch.randn(B, T, generator=g).masked_fill((weights == 0) | (ids < 0), NAN)
    return {"x": x, "segment_ids": ids, "weights": weights, "num_segments": S, "grad": torch.randn(B, S, generator=g)}


def with_gradient(function: Any, x: Tensor, grad: Tensor) -> list[Tensor]:
    leaf = x.clone().requires_grad_()
    out = function(leaf)
    if not out.requires_grad:  # a count, in the reference
        return [out, torch.zeros_like(x)]
    return [out.detach(), *torch.autograd.grad(out, leaf, grad.to(out), allow_unused=True, materialize_grads=True)]


@pytest.mark.usefixtures("_backend")
@pytest.mark.parametrize("runs", [True, False])
@pytest.mark.parametrize("op", SEGMENT_OPS)
def test_reduce(op: str, runs: bool) -> None:
    d, options = batch(3, runs), options_of(op)
    ids, weights, segments = d["segment_ids"], d["weights"], d["num_segments"]

    def truth(x: Tensor, w: Tensor | None = weights) -> Tensor:
        return reference.segment_reduce(x, ids, weights=w, num_segments=segments, empty=-7.0, **options)

    want = with_gradient(truth, d["x"], d["grad"])
    bounds = torch.arange(6) * 37
    for kind in (torch.int32, torch.int64, torch.int8):
        got = with_gradient(
            lambda x, k=kind: fr.segment_reduce(
                x, ids.to(k), weights=weights, num_segments=segments, empty=-7.0, **options
            ),
            d["x"], d["grad"],
        )  # fmt: skip
        for a, b in zip(got, want, strict=True):
            assert_as_good_as_torch(a, b, b.float(), op)
    packed = with_gradient(
        lambda x: fr.segment_reduce(
            x, ids.flatten(), weights=weights.flatten(), num_segments=segments, empty=-7.0, cu_seqlens=bounds, **options
        ),
        d["x"].flatten(), d["grad"],
    )  # fmt: skip
    assert torch.equal(packed[0], got[0])
    assert torch.equal(packed[1], got[1].flatten())
    mask = weights > 0
    masked = with_gradient(lambda x: truth(x, mask), d["x"], d["grad"])
    got = with_gradient(
        lambda x: fr.segment_reduce(x, ids, weights=mask, num_segments=segments, empty=-7.0, **options),
        d["x"], d["grad"],
    )  # fmt: skip
    whole = d["x"].nan_to_num(0.5)
    got += with_gradient(
        lambda x: fr.segment_reduce(x, ids, num_segments=segments, empty=-7.0, **options), whole, d["grad"]
    )
    masked += with_gradient(lambda x: truth(x, None), whole, d["grad"])
    for a, b in zip(got, masked, strict=True):
        assert_as_good_as_torch(a, b, b.float(), op)


@pytest.mark.usefixtures("_backend")
def test_reduce_at_the_edges() -> None:
    inf = torch.inf
    x, ids = torch.tensor([[-inf, -inf, 1.0, -inf, inf, 2.0]]), torch.tensor([[0, 0, 1, 1, 2, 2]])
    assert fr.segment_reduce(x, ids, op="logsumexp").tolist() == [[-inf, 1.0, inf]]
    assert fr.segment_reduce(x, ids, op="softmin", temperature=1e-3).tolist()[0][2] == 2.0
    assert fr.segment_reduce(x, ids, op="max", num_segments=4, empty=NAN).isnan().tolist() == [[False] * 3 + [True]]
    none = torch.full_like(ids, -1)
    assert fr.segment_reduce(x, none, op="min", num_segments=2, empty=inf).tolist() == [[inf, inf]]
    large = torch.tensor([[1e4, 1e4 + 1.0, -3e38, -3e38]])
    got = fr.segment_reduce(large, torch.tensor([[0, 0, 1, 1]]), op="logsumexp")
    torch.testing.assert_close(got.double(), large.double().view(1, 2, 2).logsumexp(-1), rtol=1e-7, atol=0.0)
    for shape in ((0, 4), (3, 0)):
        empty = fr.segment_reduce(torch.zeros(shape), torch.zeros(shape, dtype=torch.int64), op="mean")
        assert empty.shape == (shape[0], 0)
        assert fr.scatter_rewards(torch.ones(shape[0]), mask=torch.ones(shape)).shape == shape
        assert fr.segment_ids(torch.ones(shape)).shape == shape


@pytest.mark.usefixtures("_backend")
def test_the_gradient_of_softmin_at_minus_infinity() -> None:
    """The lowest value takes it all, and several share it, as in the limit."""
    x = torch.tensor([[-torch.inf, 1.0, -torch.inf, -torch.inf, 2.0]], requires_grad=True)
    got = fr.segment_reduce(x, torch.tensor([[0, 0, 1, 1, 1]]), op="softmin", num_segments=2, temperature=0.5)
    assert got.tolist() == [[-torch.inf, -torch.inf]]
    got.backward(torch.tensor([[3.0, 5.0]]))
    assert x.grad is not None
    assert x.grad.tolist() == [[3.0, 0.0, 2.5, 2.5, 0.0]]


def test_sequences_beyond_what_an_id_can_number() -> None:
    with pytest.raises(ValueError, match=r"x: expected sequences of less than 2\^31 tokens, got 2147483648"):
        fr.segment_ids(torch.ones((), dtype=torch.bool).expand(1, 2**31))


def test_ties_go_to_the_first() -> None:
    x = torch.tensor([[2.0, 1.0, 1.0, 2.0]], requires_grad=True)
    for op, want in (("min", [0.0, 1.0, 0.0, 0.0]), ("max", [1.0, 0.0, 0.0, 0.0])):
        (grad,) = torch.autograd.grad(fr.segment_reduce(x, torch.zeros(1, 4).long(), op=op).sum(), x)
        assert grad.tolist() == [want]


@pytest.mark.parametrize("op", ["sum", "mean", "softmin"])
def test_bits_depend_on_a_segments_own_tokens_alone(op: str) -> None:
    x, ids = torch.randn(3, 700), torch.arange(700).expand(3, 700) // 90
    want = fr.segment_reduce(x, ids, **options_of(op))
    pad = torch.nn.functional.pad
    for left, right in ((5, 0), (0, 9)):
        padded = fr.segment_reduce(pad(x, (left, right)), pad(ids, (left, right), value=-1), **options_of(op))
        assert torch.equal(padded, want)
    one = fr.segment_reduce(x[1:2], ids[1:2], **options_of(op))
    assert torch.equal(one, want[1:2])
    mixed = torch.stack([x, torch.randn_like(x)], -1).flatten(1)  # another segment's tokens in between
    between = torch.stack([ids, torch.full_like(ids, 8)], -1).flatten(1)
    assert torch.equal(fr.segment_reduce(mixed, between, **options_of(op))[:, :8], want)


# ----------------------------------------------------------------------------------------------------------- scatter
@pytest.mark.usefixtures("_backend")
@pytest.mark.parametrize("runs", [True, False])
@pytest.mark.parametrize("place", SEGMENT_PLACES)
def test_scatter(place: str, runs: bool) -> None:
    d = batch(5, runs)
    ids, mask, values, upstream = d["segment_ids"], d["weights"] > 0, d["grad"], d["x"]
    truth = with_gradient(
        lambda v: reference.scatter_rewards(v, ids, place=place, mask=mask), values, upstream.nan_to_num()
    )
    for m in (mask, mask.float(), mask.long()):
        got = with_gradient(lambda v, m=m: fr.scatter_rewards(v, ids, place=place, mask=m), values, upstream)
    for a, b in zip(got, truth, strict=True):
        assert_as_good_as_torch(a, b, b.float(), place)
    out = torch.full_like(upstream, 9.0)
    assert fr.scatter_rewards(values, ids, place=place, mask=mask, out=out) is out
    assert torch.equal(out, got[0])
    packed = fr.scatter_rewards(
        values, ids.flatten(), place=place, mask=mask.flatten(), cu_seqlens=torch.arange(6) * 37
    )
    assert torch.equal(packed, got[0].flatten())
    total = reference.scatter_rewards(values, ids, place=place)
    assert_as_good_as_torch(fr.scatter_rewards(values, ids, place=place), total, total.float())


@pytest.mark.usefixtures("_backend")
def test_cases() -> None:
    """Outcome rewards of rows without a valid token, steps that are broadcast, discounted turns."""
    mask = torch.tensor([[1, 1, 0, 1, 0], [0, 0, 0, 0, 0]])
    assert fr.scatter_rewards(torch.tensor([2.0, 3.0]), mask=mask).tolist() == [[0, 0, 0, 2, 0], [0] * 5]
    assert fr.scatter_rewards(torch.tensor([2, 3]), mask=mask, place="start").tolist() == [[2, 0, 0, 0, 0], [0] * 5]
    spread = fr.scatter_rewards(torch.tensor([3.0, NAN]), mask=mask | 1, place="spread")
    torch.testing.assert_close(spread, torch.tensor([[0.6] * 5, [0.0] * 5]))
    steps = torch.tensor([[1, 1, 0, 0], [0, 0, 0, 1]])
    ids = fr.segment_ids(steps.sum(0, keepdim=True))
    assert ids.tolist() == [[0, 0, -1, 1]]
    per_step = [fr.scatter_rewards(torch.tensor([2.0]), mask=m[None], place="broadcast") for m in steps]
    assert torch.cat(per_step).tolist() == [[2, 2, 0, 0], [0, 0, 0, 2]]
    turns = torch.tensor([[0, 0, -1, 1, 1]])
    rewards = fr.segment_reduce(torch.tensor([[0.0, 0.2, 5.0, 0.0, 1.0]]), turns)
    credit = torch.stack([rewards[:, 0] + 0.5 * rewards[:, 1], rewards[:, 1]], -1)
    torch.testing.assert_close(
        fr.scatter_rewards(credit, turns, place="broadcast"), torch.tensor([[0.7, 0.7, 0.0, 1.0, 1.0]])
    )
    ends = torch.tensor([[1, 2, 4], [0, -1, -1]])
    placed = fr.scatter_rewards(torch.tensor([[1.0, 2.0, 3.0], [4.0, 9.0, 9.0]]), ends=ends, mask=mask)
    assert placed.tolist() == [[0, 1, 0, 3, 0], [0] * 5]  # segment 1 has no valid token, 2 ends at one that is not


# ------------------------------------------------------------------------------------------------------- differences
def test_differences() -> None:
    v = torch.tensor([[0.2, 0.5, NAN, 0.1, 0.7], [0.3, NAN, NAN, NAN, NAN]])
    mask = torch.tensor([[1, 1, 0, 1, 1], [1, 0, 0, 0, 0]])

    def diff(mode: Any, **options: Any) -> list[list[float]]:
        return [[round(x, 5) for x in row] for row in fr.segment_diff(v, mode=mode, mask=mask, **options).tolist()]

    assert diff("backward") == [[0, 0.3, 0, -0.4, 0.6], [0] * 5]
    assert diff("backward", first="value") == [[0.2, 0.3, 0, -0.4, 0.6], [0.3, 0, 0, 0, 0]]
    assert diff("backward", first=torch.tensor([0.1, 0.5])) == [[0.1, 0.3, 0, -0.4, 0.6], [-0.2, 0, 0, 0, 0]]
    assert diff("forward") == [[0.3, -0.4, 0, 0.6, -0.7], [-0.3, 0, 0, 0, 0]]
    assert diff("forward", last="zero") == [[0.3, -0.4, 0, 0.6, 0], [0] * 5]
    assert diff("forward", last=1.0) == [[0.3, -0.4, 0, 0.6, 0.3], [0.7, 0, 0, 0, 0]]
    assert diff("forward", drop_last=True) == [[0.3, -0.4, 0, -0.1, 0], [0] * 5]  # Delta's, with the sign turned
    assert diff("forward", rewards=torch.ones(2, 5)) == [[1.3, 0.6, 0, 1.6, 0.3], [0.7, 0, 0, 0, 0]]
    leaf = v.nan_to_num().requires_grad_()
    (grad,) = torch.autograd.grad(fr.segment_diff(leaf, mask=mask)[0, 3], leaf)
    assert grad.tolist() == [[0, -1, 0, 1, 0], [0] * 5]
    assert fr.segment_diff(v[:, :0], mode="lookahead").shape == (2, 0)
    with pytest.raises(ValueError, match="first: expected one of 'zero', 'value'"):
        fr.segment_diff(v, first="none")


def test_lookahead_is_the_papers_loop() -> None:
    """VSRM's rollout_postprocess.py: the first difference that is one, up to `horizon` steps on, decayed."""
    g = torch.Generator().manual_seed(1)
    values = torch.randint(0, 4, (40, 9), generator=g).double() / 5
    values[0] = 0.2
    want = torch.zeros_like(values)
    for b, acc in enumerate(values):
        n = len(acc)
        d = acc[1:] - acc[:-1]
        for j in range(n - 1):
            for k in range(j, j + 3):
                if k >= n - 1:
                    want[b, j] = (acc[-1] - acc[j]) * 0.7 ** (n - j - 1)
                    break
                if abs(d[k]) >= 0.3:  # 1e-5 there, so that what is left at the end is nothing
                    want[b, j] = d[k] * 0.7 ** (k - j)
                    break
    got = fr.segment_diff(values, mode="lookahead", horizon=2, threshold=0.3)
    torch.testing.assert_close(got.double(), want, rtol=1e-6, atol=1e-7)


# ------------------------------------------------------------------------------------------------------------- errors
X, IDS, MASK = torch.randn(2, 3), torch.tensor([[0, 1, -1], [0, 0, 1]]), torch.ones(2, 3)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: fr.segment_ids(MASK, by="turns"), "by: expected one of"),
        (lambda: fr.segment_ids(IDS, by="labels", separators=1), "separators: expected one way to tell segments"),
        (lambda: fr.segment_ids(MASK[0]), r"x: expected \[B, T\], or packed"),
        (lambda: fr.segment_ids(MASK, ends=torch.tensor([[0, 3], [0, 1]])), r"ends: .* got 3 at index \[0, 1\]"),
        (lambda: fr.segment_ids(MASK, ends=torch.tensor([[0, 1], [1, 0]])), r"ends: .* got 0 at index \[1, 1\]"),
        (lambda: fr.segment_ids(MASK, ends=torch.tensor([0, 1])), r"ends: expected positions \[2, K\]"),
        (lambda: fr.segment_reduce(X, IDS, op="median"), "op: expected one of"),
        (lambda: fr.segment_reduce(X, IDS[:, :2]), "segment_ids: expected shape"),
        (lambda: fr.segment_reduce(X, IDS, num_segments=1), r"segment_ids: .* got 1 at index \[0, 1\]"),
        (lambda: fr.segment_reduce(X, IDS - 1), r"segment_ids: .* got -2 at index \[0, 2\]"),
        (lambda: fr.segment_reduce(X, IDS, num_segments=-1), "num_segments: expected at least 0"),
        (lambda: fr.segment_reduce(X, IDS, temperature=1.0), "temperature: needed for op='softmin', and only"),
        (lambda: fr.segment_reduce(X, IDS, weights=MASK - 2), r"weights: .* got -1.0 at index \[0, 0\]"),
        (lambda: fr.segment_reduce(X.index_fill(1, torch.tensor(1), NAN), IDS), r"x: .* got nan at index \[0, 1\]"),
        (lambda: fr.scatter_rewards(torch.ones(2)), "mask: needed without segment_ids"),
        (lambda: fr.scatter_rewards(torch.ones(2), IDS), r"values: expected \[2, S\], got \[2\]"),
        (lambda: fr.scatter_rewards(torch.ones(2, 1), IDS), r"segment_ids: .* got 1 at index \[0, 1\]"),
        (lambda: fr.scatter_rewards(torch.ones(2), mask=MASK, place="last"), "place: expected one of"),
        (lambda: fr.scatter_rewards(torch.ones(2, 2), IDS, ends=IDS), "segment_ids, ends: expected at most one"),
        (
            lambda: fr.scatter_rewards(torch.ones(2, 1), x := torch.zeros(2, 3).int(), out=x.view(torch.float32)),
            "out: expected memory of its own",
        ),
        (lambda: fr.scatter_rewards(torch.ones(2), mask=MASK, out=torch.ones(3, 2).t()), "out: expected a contiguous"),
        (lambda: fr.segment_diff(X, mode="central"), "mode: expected one of"),
    ],
)
@pytest.mark.usefixtures("_backend")
def test_bad_input(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_nothing_is_written_before_an_error() -> None:
    out = torch.full((2, 3), 9.0)
    with pytest.raises(ValueError, match="segment_ids: expected"):
        fr.scatter_rewards(torch.ones(2, 1), IDS, out=out)
    assert (out == 9).all()


def test_a_separator_beyond_the_ids_dtype_ends_nothing() -> None:
    ids = torch.tensor([[44, 1, 2]], dtype=torch.uint8)
    assert fr.segment_ids(ids, separators=[1, 300]).tolist() == [[0, 0, 1]]  # 300 is 44 in 8 bits


def test_a_counts_second_derivative_is_0() -> None:
    x = torch.ones(1, 5, requires_grad=True)
    ids = torch.tensor([[0, 0, 1, 1, 1]])
    counts, sums = (fr.segment_reduce(x, ids, op=op, num_segments=2) for op in ("count", "sum"))
    (gradient,) = torch.autograd.grad((counts * sums).sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(gradient.square().sum(), x)
    assert gradient.tolist() == [[2, 2, 3, 3, 3]]
    assert second.tolist() == [[0] * 5]

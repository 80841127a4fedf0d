"""fastreward.rewards beside what it says it computes, written out; NaN, gradients, and what is refused."""

from __future__ import annotations

import inspect
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fastreward import rewards

NAN = math.nan


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


SCORES = torch.cat([numbers(20), torch.tensor([NAN])])
COMPONENTS = numbers(30, 3).abs().masked_fill(numbers(30, 3, seed=1) > 1.2, NAN)
COMPONENTS[4] = NAN


# --------------------------------------------------------------------------------------------------- element by element
@pytest.mark.parametrize(
    ("call", "plain"),
    [
        (lambda r: rewards.affine(r, 2.0, -1.0), lambda r: 2 * r - 1),
        (lambda r: rewards.clip(r, -0.5, 1.0), lambda r: min(max(r, -0.5), 1.0)),
        (lambda r: rewards.clip(r, high=0.25), lambda r: min(r, 0.25)),
        (lambda r: rewards.sigmoid(r, 0.5, 2.0), lambda r: 1 / (1 + math.exp(-2 * (r - 0.5)))),
        (lambda r: rewards.logsigmoid(r, 0.5), lambda r: -math.log1p(math.exp(-(r - 0.5)))),
        (lambda r: rewards.standardize(r, 0.5, 2.0, eps=0.1), lambda r: (r - 0.5) / 2.1),
        (
            lambda r: rewards.tiers(r, [-0.5, 0.5], [0.0, 1.0, 3.0]),
            lambda r: 0.0 if r < -0.5 else 1.0 if r < 0.5 else 3.0,
        ),
        (lambda r: rewards.ramp(r, -1.0, 1.0, 2.0, 0.0), lambda r: 2.0 - min(max((r + 1) / 2, 0), 1) * 2),
        (
            lambda r: rewards.denoise(r, false_positive=0.1, false_negative=0.3),
            lambda r: (r - 0.1) / (1 - 0.1 - 0.3),
        ),
        (
            lambda r: rewards.denoise(r, false_positive=0.1, false_negative=0.3, method="forward"),
            lambda r: r - (1 - 0.3),
        ),
    ],
)  # fmt: skip
def test_maps(call: Any, plain: Any) -> None:
    got = call(SCORES)
    want = torch.tensor([plain(r) for r in SCORES[:-1].tolist()])
    assert got.dtype == torch.float32
    torch.testing.assert_close(got[:-1], want, rtol=2e-6, atol=2e-6)
    assert got[-1].isnan()
    assert isinstance(call(SCORES.numpy()), np.ndarray)
    leaf = SCORES[:-1].clone().requires_grad_()
    out = call(leaf)
    if out.requires_grad:
        assert torch.autograd.grad(out.sum(), leaf)[0].isfinite().all()


def test_tiers_on_their_bounds_and_gradients_to_their_values() -> None:
    values = torch.tensor([0.0, 1.0, 3.0], requires_grad=True)
    got = rewards.tiers(torch.tensor([0.0, 1.0, 0.999, -9.0, 9.0]), [0.0, 1.0], values)
    assert got.tolist() == [1.0, 3.0, 1.0, 0.0, 3.0]
    assert torch.autograd.grad(got.sum(), values)[0].tolist() == [1.0, 2.0, 2.0]


def test_overlong_is_trls_and_verls() -> None:
    lengths = torch.arange(0, 130)
    functional = pytest.importorskip("trl.rewards")
    for longest, buffer in ((100, 20), (100, 0), (50, 50)):
        theirs = functional.get_soft_overlong_punishment(longest, buffer)([[0] * n for n in lengths.tolist()])
        torch.testing.assert_close(rewards.overlong(lengths, longest, buffer), torch.tensor(theirs), rtol=0, atol=0)
    verl = [min(-(n - 80) / 20 * 0.5, 0) for n in lengths.tolist()]
    got = rewards.overlong(lengths, 100, 20, factor=0.5, floor=None)
    torch.testing.assert_close(got, torch.tensor(verl, dtype=torch.float64).float(), rtol=0, atol=0)


# -------------------------------------------------------------------------------------------------------- [B, K] to [B]
def plainly(row: list[float], op: str, weights: list[float]) -> float:
    pairs = [(r, w) for r, w in zip(row, weights, strict=True) if not math.isnan(r)]
    if not pairs:
        return NAN
    values, total = [r for r, _ in pairs], sum(w for _, w in pairs)
    mean = sum(r * w for r, w in pairs) / total
    variance = sum((r - mean) ** 2 for r in values) / (len(values) - 1) if len(values) > 1 else 0.0
    return {
        "sum": mean * total,
        "mean": mean,
        "min": min(values),
        "max": max(values),
        "product": math.prod(r**w for r, w in pairs),
        "geometric-mean": math.prod((r + 0.1) ** (w / total) for r, w in pairs),
        "mean-minus-variance": mean - 0.3 * variance,
    }[op]


@pytest.mark.parametrize("op", ["sum", "mean", "min", "max", "product", "geometric-mean", "mean-minus-variance"])
def test_combine(op: Any) -> None:
    for weights in (None, [1.0, 0.5, 2.0]):
        options: dict[str, Any] = {"smoothing": 0.1, "penalty": 0.3}
        if weights is not None:
            if op in ("min", "max", "mean-minus-variance"):
                with pytest.raises(ValueError, match=r"weights: .* has none"):
                    rewards.combine(COMPONENTS, op, weights=weights)
                continue
            options["weights"] = weights
        want = torch.tensor([plainly(row, op, weights or [1.0] * 3) for row in COMPONENTS.tolist()])
        torch.testing.assert_close(
            rewards.combine(COMPONENTS, op, **options), want, rtol=3e-6, atol=3e-6, equal_nan=True
        )
        leaf = COMPONENTS.clone().requires_grad_()
        rewards.combine(leaf, op, **options).nansum().backward()
        assert leaf.grad is not None
        assert leaf.grad[~COMPONENTS.isnan()].any()
        assert not leaf.grad[COMPONENTS.isnan()].any()


def test_gates() -> None:
    r, g = torch.tensor([1.0, 2.0, 3.0, NAN]), torch.tensor([0.4, 0.5, NAN, 1.0])
    assert rewards.gate(r, g, otherwise=-1.0).nan_to_num(9.0).tolist() == [-1.0, 2.0, 9.0, 9.0]
    rows = torch.tensor([[1.0, 1.0, 5.0], [0.0, 1.0, 5.0], [1.0, 0.5, 5.0], [NAN, 1.0, 5.0]])
    want = [[1.0, 1.0, 5.0], [0.0, 0.0, 0.0], [1.0, 0.5, 0.0], [9.0, 0.0, 0.0]]
    for thresholds in ([0.5, 0.5], [0.5, 0.5, 7.0]):
        assert rewards.priority_gate(rows, thresholds).nan_to_num(9.0).tolist() == want


def test_pareto_mask() -> None:
    rows = torch.cat([numbers(300, 2, seed=3), torch.tensor([[9.0, NAN], [9.0, -9.0], [9.0, -9.0]])])
    plain = rows.tolist()

    def dominates(a: list[float], b: list[float]) -> bool:
        return all(x >= y for x, y in zip(a, b, strict=True)) and a != b

    scored = [row for row in plain if not any(map(math.isnan, row))]
    want = [row in scored and not any(dominates(other, row) for other in scored) for row in plain]
    assert rewards.pareto_mask(rows).tolist() == want
    assert want[-2:] == [True, True]
    assert rewards.pareto_mask(rows[:0]).tolist() == []


# -------------------------------------------------------------------------------------------------------------- weights
def test_anneal() -> None:
    assert [rewards.anneal(k, 4, start=2.0) for k in (0, 1, 4, 9)] == [2.0, 1.5, 0.0, 0.0]
    assert rewards.anneal(2, 4, shape="cosine", end=0.5) == pytest.approx(0.75)
    assert rewards.anneal(3, 4, shape="exponential") == pytest.approx(math.exp(-0.75))


@pytest.mark.parametrize("kind", ["at-least", "equal"])
def test_multipliers_are_sgds(kind: Any) -> None:
    """The published multiplier loss under torch's SGD; a copy from a state goes on in the same way."""
    multipliers = rewards.LagrangeMultipliers([0.5, 0.2], kind=kind, lr=0.3, momentum=0.1)
    leaf = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    optimizer, thresholds = torch.optim.SGD([leaf], lr=0.3, momentum=0.1), torch.tensor([0.5, 0.2])
    other = rewards.LagrangeMultipliers([0.5, 0.2], kind=kind, lr=0.3, momentum=0.1)
    for k, means in enumerate(([0.1, 0.9], [0.2, 0.8], [0.6, 0.1])):
        optimizer.zero_grad()
        mu = leaf.tanh() if kind == "equal" else leaf.sigmoid()
        (mu * (torch.tensor(means) - thresholds)).sum().backward()
        optimizer.step()
        (multipliers if k < 2 else other).update(means)
        other.load_state_dict(multipliers.state_dict()) if k < 2 else None
    want = (leaf.tanh() if kind == "equal" else leaf.sigmoid()).detach()
    torch.testing.assert_close(other.values, want, rtol=1e-6, atol=1e-6)
    task, own = other.weights
    assert task == pytest.approx(2 - float(want.sum()), abs=1e-6)
    assert own == pytest.approx(want.tolist(), abs=1e-6)


# -------------------------------------------------------------------------------------------------------------- refused
@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: rewards.tiers(SCORES, [0.5, 0.5], [0.0, 1.0, 2.0]), r"bounds: expected bounds .*index \[1\]"),
        (lambda: rewards.tiers(SCORES, [0.5], [0.0]), r"values: expected shape \[2\]"),
        (lambda: rewards.ramp(SCORES, 1.0, 1.0), "end: expected a number above start"),
        (lambda: rewards.overlong(SCORES, 10, 0, floor=None), "buffer: expected at least 1"),
        (lambda: rewards.denoise(SCORES, false_positive=0.6, false_negative=0.5), "expected a sum below 1"),
        (lambda: rewards.denoise(SCORES, false_positive=-0.1, false_negative=0.5), "false_positive: expected a rate"),
        (lambda: rewards.combine(COMPONENTS, "median"), "op: expected one of 'sum'"),
        (lambda: rewards.combine(COMPONENTS, weights=[1.0, 2.0]), r"weights: expected shape \[3\]"),
        (lambda: rewards.combine(torch.zeros(3, 0)), r"rewards: expected \[B, K\]"),
        (lambda: rewards.priority_gate(COMPONENTS, [1.0]), r"thresholds: expected shape \[2\]"),
        (lambda: rewards.pareto_mask(SCORES), r"rewards: expected \[B, K\]"),
        (lambda: rewards.anneal(-1, 5), "step: expected a number of at least 0"),
        (lambda: rewards.LagrangeMultipliers([1.0]).update([1.0, 2.0]), r"means: expected shape \[1\]"),
        (lambda: rewards.sigmoid(SCORES, center=torch.tensor(0.5, requires_grad=True)), "center: expected a constant"),
    ],
)  # fmt: skip
def test_refused(call: Any, message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        call()


def test_all_are_documented() -> None:
    for name in rewards.__all__:
        assert inspect.getdoc(getattr(rewards, name))
        assert name in (rewards.__doc__ or "")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ("ab", r"\[0\]: expected a number, got 'a'"),
        ([1.0, math.nan], r"\[1\]: expected a (finite )?number, got nan"),
        (torch.tensor([1.0, math.nan]), r"got nan at index \[1\]"),
        (torch.tensor([1.0 + 2.0j, 1.0]), "expected real numbers, got complex64"),
        (5.0, "expected a tensor or a sequence of numbers, got 5.0"),
    ],
)
def test_weights_and_thresholds_are_numbers(values: Any, message: str) -> None:
    """None of them would be noticed in the sum; infinite thresholds are gates that are always open, or never."""
    with pytest.raises((TypeError, ValueError), match=f"weights.*{message}"):
        rewards.combine(torch.rand(3, 2), weights=values)
    with pytest.raises((TypeError, ValueError), match=f"thresholds.*{message}"):
        rewards.priority_gate(torch.rand(3, 2), values)
    assert torch.equal(rewards.priority_gate(torch.ones(1, 2), [-math.inf]), torch.ones(1, 2))


def test_tiers_with_large_bounds() -> None:
    assert rewards.tiers(torch.tensor([5e8, 1e9]), [1e9], [0.0, 1.0]).tolist() == [0, 1]
    with pytest.raises(ValueError, match="bounds that increase"):
        rewards.tiers(SCORES, [NAN], [0.0, 1.0])


def test_overlong_keeps_nan_and_may_weigh_nothing() -> None:
    assert rewards.overlong(torch.tensor([NAN, 5.0]), 10, 4).isnan().tolist() == [True, False]
    assert rewards.overlong(torch.tensor([5, 15]), 10, 0).tolist() == [0, -1]
    assert rewards.overlong(torch.tensor([5, 15]), 10, 0, factor=0.0).tolist() == [0, 0]


def test_the_rewards_alone_decide_on_the_dtype() -> None:
    x, other = torch.ones(3), torch.full((3,), 0.25, dtype=torch.float64)
    results = [
        rewards.standardize(x, other, other),
        rewards.sigmoid(x, other),
        rewards.logsigmoid(x, other),
        rewards.denoise(x, false_positive=other, false_negative=other),
        rewards.denoise(x, false_positive=other, false_negative=other, method="forward"),
        rewards.gate(x, other),
    ]
    assert {result.dtype for result in results} == {torch.float32}
    assert rewards.gate(x.double(), other, otherwise=0.1).tolist() == [0.1] * 3

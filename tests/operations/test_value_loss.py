"""value_loss: the right numbers of the cases, its language against torch's autograd, metrics, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import fastreward as fr
from fastreward import losses
from fastreward.losses.value import huber, squared
from fastreward.verify import eager

B, T = 5, 61


def inputs(seed: int = 0) -> dict[str, Any]:
    g = torch.Generator().manual_seed(seed)
    old = torch.randn(B, T, generator=g)
    return {
        "values": old + 0.4 * torch.randn(B, T, generator=g),
        "old_values": old,
        "returns": old + 3 + torch.randn(B, T, generator=g),
        "mask": torch.arange(T) < torch.tensor([61, 1, 0, 30, 17]).unsqueeze(-1),
    }


def run(given: dict[str, Any], **options: Any) -> tuple[fr.PolicyLoss, Tensor]:
    leaf = given["values"].clone().requires_grad_()
    result = fr.value_loss(**(given | {"values": leaf}), **options)
    return result, torch.autograd.grad(result.loss, leaf)[0]


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize(
    ("value", "target", "loss", "gradient"), [(2.0, 1.0, 0.5, 1.0), (2.0, 3.0, 1.125, 0.0), (1.2, 3.0, 1.62, -1.8)]
)
def test_the_cases(value: float, target: float, loss: float, gradient: float, backend: Any) -> None:
    """cases.md 2.10: the larger of both, clip 0.5 around 1."""
    given = {k: torch.full((1, 1), x) for k, x in (("values", value), ("old_values", 1.0), ("returns", target))}
    with fr.backend(backend):
        result, grad = run(given, clip=0.5)
    assert result.loss.item() == pytest.approx(loss)
    assert grad.item() == pytest.approx(gradient)
    assert result.metrics["clip_fraction"] == float(gradient == 0.0)


def test_the_gradient_is_one_select() -> None:
    """What is clipped lies outside its bounds, and twice the half is the gap itself: a pass over tokens has no more."""
    assert str(squared()).endswith("v4 = where(v3, v2, v1)\n  loss = 0.5 * (v4 * v4)\n  d/d value = where(v3, 0, v4)")


@pytest.mark.parametrize("clip", [0.2, None])
def test_squared_against_torch(clip: float | None) -> None:
    given = inputs()
    leaf = given["values"].double().requires_grad_()
    rest = [given[k].double() for k in ("old_values", "returns")]
    want = eager.value_loss(leaf, *rest, given["mask"], clip=clip)
    (want_grad,) = torch.autograd.grad(want, leaf)
    result, grad = run(given | ({} if clip else {"old_values": None}), clip=clip)
    torch.testing.assert_close(result.loss.double(), want, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(grad.double(), want_grad, rtol=1e-6, atol=1e-8)
    assert ("clip_fraction" in result.metrics) == (clip is not None)


def test_huber_is_torchs() -> None:
    given = inputs()
    leaf = given["values"].clone().requires_grad_()
    token = torch.nn.functional.huber_loss(leaf, given["returns"], delta=1.5, reduction="none")
    want = token[given["mask"]].mean()
    result, grad = run(given, loss="huber", delta=1.5, clip=None, return_token_loss=True)
    torch.testing.assert_close(result.loss, want)
    torch.testing.assert_close(grad, torch.autograd.grad(want, leaf)[0])
    assert result.token_loss is not None
    torch.testing.assert_close(result.token_loss, (token * given["mask"]).detach())
    clipped = run(given, loss="huber", delta=1.5)[0]
    assert torch.equal(clipped.loss, run(given, loss=huber(0.2, 1.5))[0].loss)
    assert clipped.loss > result.loss


def test_metrics() -> None:
    given = inputs()
    result, _ = run(given, explained_variance=True)
    values, old, returns = (given[k][given["mask"]] for k in ("values", "old_values", "returns"))
    clipped = values.clamp(old - 0.2, old + 0.2)
    want = {
        "value_mean": values.mean(),
        "return_mean": returns.mean(),
        "explained_variance": 1 - (returns - values).var() / (returns.var() + 1e-5),
        "token_count": torch.tensor(float(len(values))),
        "clip_fraction": ((clipped - returns) ** 2 > (values - returns) ** 2).float().mean(),
    }
    assert tuple(result.metrics) == tuple(want)
    for name, x in want.items():
        torch.testing.assert_close(result.metrics[name], x, rtol=1e-5, atol=1e-6)
    far = run(given | {"returns": torch.full((B, T), 1000.1)}, explained_variance=True)[0]
    assert far.metrics["explained_variance"] == pytest.approx(float(1 - values.var() / 1e-5), rel=1e-3)
    alone = run({k: x[1:2, :1] for k, x in given.items()}, explained_variance=True)[0]
    assert alone.metrics["explained_variance"].isnan()


def test_packed_masked_and_other_aggregations() -> None:
    given = inputs()
    hidden = {k: x.masked_fill(~given["mask"], torch.nan) if k != "mask" else x for k, x in given.items()}
    flat = {k: x[given["mask"]] for k, x in given.items() if k != "mask"}
    bounds = torch.nn.functional.pad(given["mask"].sum(-1).cumsum(0), (1, 0))
    for options in ({}, {"aggregation": "seq-mean-token-mean"}, {"normalizer": 77.0}):
        want, want_grad = run(given, **options)
        got, grad = run(hidden, **options)
        assert torch.equal(got.loss, want.loss)
        assert torch.equal(grad, want_grad)
        together, gradient = run(flat, **options, cu_seqlens=bounds)
        torch.testing.assert_close(together.loss, want.loss)
        torch.testing.assert_close(gradient, want_grad[given["mask"]])
    weights = torch.rand(B)
    weighted = run(given, weights=weights, aggregation="token-sum", return_token_loss=True)[0]
    plain = run(given, aggregation="token-sum", return_token_loss=True)[0]
    assert plain.token_loss is not None
    assert weighted.token_loss is not None
    torch.testing.assert_close(weighted.token_loss, plain.token_loss * weights.unsqueeze(-1))


def test_a_loss_of_ones_own() -> None:
    @losses.define
    def absolute(t: Any) -> Any:
        return losses.abs(t.value - t.returns)

    given = inputs()
    result, grad = run(given | {"old_values": None}, loss=absolute())
    gap = (given["values"] - given["returns"])[given["mask"]]
    torch.testing.assert_close(result.loss, gap.abs().mean())
    torch.testing.assert_close(grad[given["mask"]], gap.sign() / len(gap))
    assert "d/d value" in str(absolute())


def test_refused() -> None:
    given = inputs()
    bad: list[tuple[dict[str, Any], str]] = [
        ({"loss": losses.ppo()}, "loss: ppo is a policy loss; it goes to policy_loss"),
        ({"loss": losses.dpo()}, "loss: dpo is a loss over pairs"),
        ({"loss": "l1"}, "loss: expected one of 'squared', 'huber'"),
        ({"old_values": None}, "old_values: needed where values are clipped"),
        ({"returns": given["returns"][:, 1:]}, "returns: expected shape"),
        ({"returns": given["returns"].index_fill(1, torch.tensor([3]), torch.nan)}, r"returns: expected numbers"),
        ({"clip": 0.0}, "clip: expected a positive number"),
        ({"mask": torch.zeros(B, T)}, "mask: expected at least one counted token"),
    ]  # fmt: skip
    for changed, message in bad:
        with pytest.raises((TypeError, ValueError), match=message):
            fr.value_loss(**(given | changed))
    with pytest.raises(TypeError, match="loss: squared is a loss of values; it goes to value_loss"):
        fr.policy_loss(given["values"], given["values"], torch.ones(B), loss=squared())
    with pytest.raises(TypeError, match="loss: jsd is a divergence; it goes to token_divergence"):
        fr.policy_loss(given["values"], given["values"], torch.ones(B), loss=fr.divergences.jsd())

"""preference_loss as its callers see it: layouts, aggregations, metrics, messages. Numbers: test_losses_preference."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import fastreward as fr
from fastreward import losses
from fastreward._runtime.layout import PAIR_METRICS


def batch(pairs: int = 5) -> dict[str, Tensor]:
    data = {}
    for side, width in (("chosen", 17), ("rejected", 11)):
        ref = -torch.rand(pairs, width) * 3
        lengths = torch.randint(1, width + 1, (pairs, 1))
        data[f"{side}_logprobs"] = ref + 0.3 * torch.randn(pairs, width)
        data[f"ref_{side}_logprobs"] = ref
        data[f"{side}_mask"] = torch.arange(width) < lengths
    return data


def margins(data: dict[str, Tensor]) -> Tensor:
    """S_w - S_l [P] in float64."""
    sums = [
        torch.where(data[f"{s}_mask"], data[f"{s}_logprobs"].double() - data[f"ref_{s}_logprobs"], 0.0).sum(-1)
        for s in ("chosen", "rejected")
    ]
    return sums[0] - sums[1]


def grads(data: dict[str, Tensor], **options: Any) -> tuple[fr.PolicyLoss, list[Tensor]]:
    own = {
        k: v.clone().requires_grad_() if k in ("chosen_logprobs", "rejected_logprobs") else v for k, v in data.items()
    }
    result = fr.preference_loss(**own, **options)
    return result, list(torch.autograd.grad(result.loss, [own["chosen_logprobs"], own["rejected_logprobs"]]))


def test_default_is_dpo() -> None:
    data = batch()
    result, (chosen, rejected) = grads(data)
    z = 0.1 * margins(data)
    torch.testing.assert_close(result.loss.double(), torch.nn.functional.softplus(-z).mean(), rtol=1e-6, atol=1e-7)
    slope = (-0.1 * torch.sigmoid(-z) / len(z)).unsqueeze(-1)
    torch.testing.assert_close(chosen.double(), torch.where(data["chosen_mask"], slope, 0.0), rtol=1e-5, atol=1e-8)
    torch.testing.assert_close(rejected.double(), torch.where(data["rejected_mask"], -slope, 0.0), rtol=1e-5, atol=1e-8)


def test_packed_equals_padded() -> None:
    data = batch()
    padded, expected = grads(data)
    packed = {}
    for side in ("chosen", "rejected"):
        inside = data[f"{side}_mask"]
        packed[f"{side}_cu_seqlens"] = torch.nn.functional.pad(inside.sum(-1).cumsum(0), (1, 0))
        for name in (f"{side}_logprobs", f"ref_{side}_logprobs"):
            packed[name] = data[name][inside]
    result, actual = grads(packed)
    torch.testing.assert_close(result.loss, padded.loss)
    for a, e, side in zip(actual, expected, ("chosen", "rejected"), strict=True):
        torch.testing.assert_close(a, e[data[f"{side}_mask"]])


def test_aggregations_weights_and_normalizer() -> None:
    data, weights = batch(), torch.tensor([1.0, 0.5, 2.0, 0.0, 1.0])
    pair = torch.nn.functional.softplus(-0.1 * margins(data)) * weights
    groups = torch.tensor([1, 0, 1, 1, 0])
    means = torch.stack([pair[groups == g].mean() for g in (0, 1)])
    for options, expected in (
        ({}, pair.mean()),
        ({"aggregation": "sum"}, pair.sum()),
        ({"aggregation": "group-mean", "group_ids": groups}, means.mean()),
        ({"aggregation": "group-mean", "group_ids": ["b", "a", "b", "b", "a"]}, means.mean()),
        ({"normalizer": 7.0}, pair.sum() / 7),
    ):
        result = fr.preference_loss(**data, weights=weights, return_pair_loss=True, **options)
        torch.testing.assert_close(result.loss.double(), expected, rtol=1e-6, atol=1e-7)
        assert result.token_loss is not None
        torch.testing.assert_close(result.token_loss.double(), pair, rtol=1e-6, atol=1e-7)


def test_metrics() -> None:
    data = batch()
    metrics = fr.preference_loss(**data).metrics
    assert tuple(metrics)[: len(PAIR_METRICS)] == PAIR_METRICS
    assert metrics["pair_count"] == 5
    assert metrics["chosen_tokens"] == data["chosen_mask"].sum()
    chosen = torch.where(data["chosen_mask"], data["chosen_logprobs"], 0.0).sum(-1).mean()
    torch.testing.assert_close(metrics["chosen_logprob"], chosen)


def test_metrics_of_no_pairs() -> None:
    data = batch()
    data |= {name: torch.zeros_like(x) for name, x in data.items() if name.endswith("mask")}
    metrics = fr.preference_loss(**data, normalizer=3.0).metrics.floats()
    counts = {name: metrics.pop(name) for name in ("pair_count", "chosen_tokens", "rejected_tokens")}
    assert set(counts.values()) == {0.0}
    assert all(math.isnan(x) for x in metrics.values())


def test_a_loss_of_ones_own() -> None:
    @losses.define(pairs=True)
    def hinge(t, margin=1.0):
        return losses.relu(margin - (losses.seq_mean(t.chosen.logprob) - losses.seq_mean(t.rejected.logprob)))

    data = batch()
    means = [
        torch.where(data[f"{s}_mask"], data[f"{s}_logprobs"], 0.0).sum(-1) / data[f"{s}_mask"].sum(-1)
        for s in ("chosen", "rejected")
    ]
    expected = (2.0 - (means[0] - means[1])).clamp(min=0).mean()
    torch.testing.assert_close(fr.preference_loss(**data, loss=hinge(margin=2.0)).loss, expected)


def test_compiles_in_one_graph() -> None:
    data = batch()
    rest = {k: v for k, v in data.items() if k not in ("chosen_logprobs", "rejected_logprobs")}

    def step(chosen: Tensor, rejected: Tensor) -> Tensor:
        return fr.preference_loss(chosen * 1.0, rejected * 1.0, **rest).loss

    leaves = [data[k].requires_grad_() for k in ("chosen_logprobs", "rejected_logprobs")]
    eager = torch.autograd.grad(step(*leaves), leaves)
    compiled = torch.autograd.grad(torch.compile(step, fullgraph=True, backend="aot_eager")(*leaves), leaves)
    for a, b in zip(eager, compiled, strict=True):
        torch.testing.assert_close(a, b)


def test_numpy_extras_and_sequences_of_no_tokens() -> None:
    data = {k: v.numpy() for k, v in batch().items()}
    consistency = np.linspace(0, 1, 5, dtype=np.float32)
    got = fr.preference_loss(**data, loss=losses.cream(), extra={"consistency": consistency})
    tensors = {k: torch.from_numpy(v) for k, v in data.items()}
    want = fr.preference_loss(**tensors, loss=losses.cream(), extra={"consistency": torch.from_numpy(consistency)})
    assert isinstance(got.loss, np.ndarray)
    assert got.loss == want.loss.numpy()
    empty = torch.zeros(5, 0)
    assert fr.preference_loss(empty, empty, ref_chosen_logprobs=empty, ref_rejected_logprobs=empty).loss == 0


@pytest.mark.parametrize(
    ("error", "message", "change"),
    [
        (TypeError, r"loss: ppo is a policy loss; it goes to policy_loss", {"loss": losses.ppo()}),
        (
            TypeError,
            r"loss: expected a loss such as .*, got Definition; call it: dpo",
            {"loss": losses.dpo},
        ),
        (
            ValueError,
            r"rejected_logprobs: expected 5 sequences",
            {"rejected_logprobs": torch.zeros(4, 11), "rejected_mask": None},
        ),
        (ValueError, r"chosen_mask: expected shape \[5, 17\]", {"chosen_mask": torch.ones(5)}),
        (ValueError, r"ref_logprob.*pass ref_chosen_logprobs=", {"ref_chosen_logprobs": None}),
        (ValueError, r"aggregation: expected one of 'mean'", {"aggregation": "token-mean"}),
        (ValueError, r"group_ids: aggregation 'group-mean' is over groups", {"aggregation": "group-mean"}),
        (ValueError, r"extra\['margin'\]: dpo does not read it", {"extra": {"margin": torch.zeros(5)}}),
        (
            ValueError,
            r"expected at least one counted token",
            {"chosen_mask": torch.zeros(5, 17), "rejected_mask": torch.zeros(5, 11)},
        ),
        (ValueError, r"weights: expected shape \[5\] \(one per pair\)", {"weights": torch.zeros(5, 17)}),
        (
            ValueError,
            r"extra\['rho'\]: chosen_extra or rejected_extra has one of the same name",
            {"extra": {"rho": torch.zeros(5)}, "chosen_extra": {"rho": torch.zeros(5, 17)}},
        ),
        (ValueError, r"extra\['weight'\]: 'weight' is a term of its own", {"extra": {"weight": torch.zeros(5)}}),
        (TypeError, "extra: expected a mapping from terms to tensors", {"extra": torch.zeros(5)}),
        (TypeError, "chosen_extra: expected a mapping from terms to tensors", {"chosen_extra": "rho"}),
    ],
)
def test_messages(error: type[Exception], message: str, change: dict[str, Any]) -> None:
    with pytest.raises(error, match=message):
        fr.preference_loss(**{**batch(), **change})

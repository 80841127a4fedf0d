"""Losses over the batches of several ranks: the parts add up to the loss of all, and so do their gradients."""

from __future__ import annotations

from typing import Any

import pytest
import rank_calls
import torch
from rank_pool import RankPool
from torch import Tensor

import fastreward as fr

AGGREGATIONS = (
    "token-mean",
    "token-sum",
    "seq-mean-token-mean",
    "seq-mean-token-sum",
    "seq-mean-token-sum-norm",
    "group-mean",
)
T = 7
SIZES = ([2, 4], [6], [2, 0, 4])


def batch() -> dict[str, Tensor]:
    """Six sequences; one counts nothing, two groups count."""
    mask = torch.rand(6, T) > 0.4
    mask[3] = False
    mask[0, 0] = mask[5, 2] = True
    p = {name: torch.randn(6, T).masked_fill(~mask, torch.nan) for name in ("logprobs", "old_logprobs", "advantages")}
    return p | {"mask": mask, "group_ids": torch.tensor([4, 4, 9, 9, 9, 7])}


def parts_of(p: dict[str, Tensor], sizes: list[int]) -> list[dict[str, Tensor]]:
    columns = [x.split(sizes) for x in p.values()]
    return [dict(zip(p, own, strict=True)) for own in zip(*columns, strict=True)]


def loss_of(p: dict[str, Tensor], aggregation: str, normalizer: Tensor | None) -> tuple[Tensor, Tensor]:
    """(loss, gradient for the log-probs)."""
    leaf = p["logprobs"].clone().requires_grad_()
    found = fr.policy_loss(
        leaf, p["old_logprobs"], p["advantages"], p["mask"], aggregation=aggregation, normalizer=normalizer,
        group_ids=p["group_ids"],
    )  # type: ignore[arg-type]  # fmt: skip
    found.loss.backward()
    assert leaf.grad is not None
    return found.loss.detach(), leaf.grad


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_the_parts_add_up(aggregation: str, sizes: list[int], ranks: RankPool) -> None:
    p = batch()
    loss, grad = loss_of(p, aggregation, None)
    for averaged in (False, True):
        requests = [
            {
                "operation": "loss_normalizer", "args": (own["mask"],),
                "options": {"aggregation": aggregation, "group_ids": own["group_ids"], "averaged": averaged},
            }
            for own in parts_of(p, sizes)
        ]  # fmt: skip
        normalizers = [rank["out"]["result"] for rank in ranks.run(rank_calls.call, requests)]
        assert len(set(map(float, normalizers))) == 1
        found = [loss_of(own, aggregation, n) for own, n in zip(parts_of(p, sizes), normalizers, strict=True)]
        combine = (lambda x: x.mean(0)) if averaged else (lambda x: x.sum(0))
        torch.testing.assert_close(combine(torch.stack([x for x, _ in found])), loss, rtol=1e-6, atol=1e-7)
        scale = len(sizes) if averaged else 1
        torch.testing.assert_close(torch.cat([x for _, x in found]) / scale, grad, rtol=1e-6, atol=1e-7)


def test_packed_and_on_one_process() -> None:
    mask, bounds = torch.tensor([1, 1, 0, 0, 1, 1, 1]), torch.tensor([0, 3, 4, 7])
    expected = {"token-mean": 5, "token-sum": 1, "seq-mean-token-sum": 2, "seq-mean-token-sum-norm": 6, "group-mean": 1}
    for aggregation, value in expected.items():
        options: dict[str, Any] = {"cu_seqlens": bounds, "group_ids": ["a", "b", "a"]}
        assert fr.loss_normalizer(mask, aggregation=aggregation, **options) == value  # type: ignore[arg-type]
    assert fr.loss_normalizer(torch.zeros(2, 3)) == 1
    assert fr.loss_normalizer(torch.zeros(0, 3), aggregation="seq-mean-token-sum-norm") == 1
    assert fr.loss_normalizer(torch.ones(2, 3).numpy()) == 6  # type: ignore[arg-type]
    assert fr.loss_normalizer(torch.ones(2, 3), averaged=True) == 6


def test_the_widest_rank_counts(ranks: RankPool) -> None:
    requests = [
        {
            "operation": "loss_normalizer", "args": (mask,),
            "options": {"aggregation": "seq-mean-token-sum-norm"},
        }
        for mask in (torch.ones(2, 3), torch.ones(1, 5))
    ]  # fmt: skip
    assert [float(rank["out"]["result"]) for rank in ranks.run(rank_calls.call, requests)] == [15.0, 15.0]


def test_what_is_refused() -> None:
    with pytest.raises(ValueError, match=r"mask: expected \[B, T\], or \[N\] with cu_seqlens, got shape \[3\]"):
        fr.loss_normalizer(torch.ones(3))
    with pytest.raises(ValueError, match="group_ids: aggregation 'group-mean' is over groups"):
        fr.loss_normalizer(torch.ones(3, 2), aggregation="group-mean")
    with pytest.raises(ValueError, match="aggregation: expected one of"):
        fr.loss_normalizer(torch.ones(3, 2), aggregation="mean")  # type: ignore[arg-type]

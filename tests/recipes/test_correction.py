"""Recipes against the gap to the rollout engine: each is the operation's call that it says it is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from reference_losses import correction as reference
from torch import Tensor

import fastreward as fr
from fastreward import correction_weights, losses, policy_loss, recipes

Data = dict[str, Tensor]


def data() -> Data:
    mask = torch.ones(4, 7)
    mask[2, 3:] = 0
    mask[3, 1] = 0
    old = -1 - 2 * torch.rand(4, 7)
    return {
        "old": old,
        "rollout": old + torch.tensor([[0.02], [0.9], [0.3], [0.6]]) * torch.randn(4, 7),
        "mask": mask,
        "lp": (old + 0.2 * torch.randn(4, 7)).requires_grad_(),
        "ref": old + 0.3 * torch.randn(4, 7),
        "adv": torch.tensor([0.8, -0.7, 0.4, -0.5]),
    }


SAME: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    # recipe: (its options, those of correction_weights)
    "tis": ({}, {"mode": "truncate", "level": "token", "high": 2.0}),
    "tis with a bound": (
        {"high": 1.3, "batch_normalize": True, "reject": {"token_k2": 0.5}},
        {"mode": "truncate", "high": 1.3, "batch_normalize": True, "reject": {"token_k2": 0.5}},
    ),
    "seq_tis": ({}, {"mode": "truncate", "level": "sequence", "high": 2.0}),
    "mis": ({}, {"mode": "mask", "level": "token", "high": 3.0}),
    "mis with bounds": ({"low": 0.7, "high": 1.5}, {"mode": "mask", "low": 0.7, "high": 1.5}),
    "seq_mis": (
        {},
        {"mode": "truncate", "level": "sequence", "high": 2.0, "reject": {"seq_sum_k1": (0.5, 2.0)}},
    ),
    "icepop": ({}, {"mode": "icepop", "level": "token", "low": 0.5, "high": 5.0}),
    "geo_rs": ({}, {"mode": None, "reject": {"seq_mean_k1": (0.999, 1.001)}}),
    "geo_rs with bounds": ({"bounds": (0.9, 1.1)}, {"mode": None, "reject": {"seq_mean_k1": (0.9, 1.1)}}),
    "k3_rs": ({"log_ratio_clamp": 5.0}, {"mode": None, "reject": {"seq_mean_k3": 0.01}, "log_ratio_clamp": 5.0}),
}


@pytest.mark.parametrize("name", SAME)
def test_is_the_operation_s_call(name: str) -> None:
    d, (options, same) = data(), SAME[name]
    weights, keep, metrics = getattr(recipes, name.partition(" ")[0])(d["old"], d["rollout"], d["mask"], **options)
    want = correction_weights(d["old"], d["rollout"], d["mask"], **same)
    assert torch.equal(weights, want[0])
    assert torch.equal(keep, want[1])
    assert metrics.names == want[2].names
    assert torch.equal(metrics.values_tensor.nan_to_num(), want[2].values_tensor.nan_to_num())
    assert not (torch.equal(weights, d["mask"]) and torch.equal(keep, d["mask"] != 0)), "nothing was corrected"


def test_every_recipe_is_compared() -> None:
    of_the_file = {r.name for r in recipes.RECIPES.values() if r.family == "correction"}
    assert {name.partition(" ")[0] for name in SAME} | {"off_policy_sequence_mask", "deepseek_v3_2"} == of_the_file


def test_off_policy_sequence_mask() -> None:
    d = data()
    got = recipes.off_policy_sequence_mask(d["lp"], d["rollout"], d["adv"], d["mask"], threshold=0.1)
    want = reference.off_policy_sequence_mask(d["lp"], d["rollout"], d["adv"], d["mask"], threshold=0.1)
    assert torch.equal(got, want)
    assert torch.equal(got, fr.off_policy_sequence_mask(d["lp"], d["rollout"], d["adv"], d["mask"], threshold=0.1))


def deepseek(d: Data, rollout: Tensor, threshold: float, kl_coef: float) -> Tensor:
    """TRL's order of things, written out: the mask multiplies the surrogate, the KL term is added after it."""
    lp, old, ref, mask = (d[k].double() for k in ("lp", "old", "ref", "mask"))
    adv, r = d["adv"].double().unsqueeze(-1), torch.exp(lp - old)
    surrogate = torch.maximum(-adv * r, -adv * r.clamp(0.8, 1.2))
    keep = reference.off_policy_sequence_mask(lp, rollout, d["adv"], mask, threshold=threshold).unsqueeze(-1)
    kl = r * (torch.exp(ref - lp) - (ref - lp) - 1)
    per_row = ((surrogate * keep + kl_coef * kl) * mask).sum(-1) / mask.sum(-1)
    return per_row.mean()


@pytest.mark.parametrize("engine", [True, False])
@pytest.mark.parametrize("threshold", [-1.0, 0.0, 9.0])
def test_deepseek_v3_2(threshold: float, engine: bool) -> None:
    d = data()
    rollout = {"rollout_logprobs": d["rollout"]} if engine else {}
    result = recipes.deepseek_v3_2(
        d["lp"], d["old"], d["adv"], d["mask"], threshold=threshold, ref_logprobs=d["ref"], kl_coef=0.3, **rollout
    )
    want = deepseek(d, d["rollout"] if engine else d["old"], threshold, 0.3)
    torch.testing.assert_close(result.loss.double(), want, rtol=1e-5, atol=1e-6)
    got, expected = (torch.autograd.grad(x, d["lp"])[0] for x in (result.loss, want))
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


def test_deepseek_v3_2_without_a_reference_or_packed() -> None:
    d = data()
    call: Callable[..., Any] = recipes.deepseek_v3_2
    plain = call(d["lp"], d["old"], d["adv"], d["mask"], threshold=0.05)
    keep = reference.off_policy_sequence_mask(d["lp"], d["old"], d["adv"], d["mask"], threshold=0.05)
    assert keep.any()
    assert not keep.all()
    want = policy_loss(
        d["lp"],
        d["old"],
        d["adv"],
        d["mask"],
        loss=losses.ppo(),
        aggregation="seq-mean-token-mean",
        weights=keep.float(),
    )
    assert torch.equal(plain.loss, want.loss)
    counted, bounds = d["mask"] != 0, torch.tensor([0, 7, 14, 17, 23])
    weights = torch.rand(4, 7) + 0.5
    padded = call(d["lp"], d["old"], d["adv"], d["mask"], threshold=0.05, weights=weights)
    packed = call(
        d["lp"][counted], d["old"][counted], d["adv"], threshold=0.05, cu_seqlens=bounds, weights=weights[counted]
    )
    torch.testing.assert_close(packed.loss, padded.loss)
    both = {"loss": losses.ppo(), "weights": weights * keep.unsqueeze(-1), "aggregation": "seq-mean-token-mean"}
    torch.testing.assert_close(padded.loss, policy_loss(d["lp"], d["old"], d["adv"], d["mask"], **both).loss)
    assert padded.loss != plain.loss

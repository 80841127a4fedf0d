"""What the clamps and caps of the published losses are for: inputs that nothing but them keeps in range."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from reference_losses import policy as reference
from torch import Tensor

import fastreward as fr
from fastreward import losses
from fastreward.language.define import Definition, Loss


@pytest.fixture(params=["reference", "cpu"], autouse=True)
def _backend(request: pytest.FixtureRequest) -> Iterator[None]:
    with fr.backend(request.param):
        yield


def of_policies() -> dict[str, Definition[Any]]:
    return {n: d for n in losses.__all__ if isinstance(d := getattr(losses, n), Definition) and not d.pairs}


def gradient(loss: Loss, lp: Tensor, old: Tensor, adv: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    """(loss, gradient), token-sum."""
    leaf = lp.clone().requires_grad_()
    result = fr.policy_loss(leaf, old, adv, loss=loss, aggregation="token-sum", **options)
    result.loss.backward()
    assert leaf.grad is not None
    return result.loss.detach(), leaf.grad


def near(found: Tensor, expected: Tensor) -> None:
    """Each number to 2e-5 of itself, however small."""
    torch.testing.assert_close(found.double(), expected.double(), rtol=2e-5, atol=0)


# ---------------------------------------------------------------------------------------------------------- the ratio
UNCLAMPED = {n: d for n, d in of_policies().items() if "log_ratio_clamp" in inspect.signature(d).parameters}
#: What makes a loss's own advantage 0, where that is not the advantage passed.
ZERO = {"nsr": 1.0, "w_reinforce": 1.0}
EXTRAS = {"tw_grpo": "importance", "clip_cov": "selected", "kl_cov": "selected"}


@pytest.mark.parametrize("name", UNCLAMPED)
def test_an_advantage_of_0_keeps_an_unclamped_ratio_out(name: str) -> None:
    """e^119 is no float32, and 0 times infinity no number."""
    options = {"w_reinforce": {"positive_weight": 0.0}, "ppo": {"dual_clip": 3.0, "delta": 2.0}}.get(name, {})
    loss = UNCLAMPED[name](log_ratio_clamp=None, **options)
    adv = torch.tensor([[ZERO.get(name, 0.0)] * 3, [0.7, 0.0, 0.3]])
    lp, extra = torch.full((2, 3), -0.5), {n: torch.zeros(2, 3) for n in (EXTRAS.get(name),) if n}
    near_old = torch.tensor([[-0.5, -0.5, -0.5], [-0.6, -0.4, -0.7]])
    far_old = near_old.clone()
    far_old[0] = torch.tensor([-119.5, 118.5, -89.5])
    near_one, far_one = (gradient(loss, lp, old, adv, extra=extra) for old in (near_old, far_old))
    for found, wanted in zip(far_one, near_one, strict=True):
        assert torch.equal(found, wanted)
    assert not far_one[1][0].any()


def test_clamps_differ_where_the_advantage_is_not_0() -> None:
    lp, adv = torch.tensor([[-0.5]]), torch.tensor([[-1.0]])
    for clamp, ratio in ((5.0, math.exp(5)), (20.0, math.exp(20)), (None, math.exp(30))):
        loss = losses.ppo(log_ratio_clamp=clamp)
        value, grad = gradient(loss, lp, lp - 30.0, adv)
        near(value, torch.tensor(ratio))
        near(grad, torch.tensor([[0.0 if clamp is not None else ratio]]))


# ---------------------------------------------------------------------------------------------------------- the metrics
@pytest.mark.parametrize(("gap", "clamped"), [(100.0, 20.0), (-100.0, -20.0), (20.0, 20.0), (3.0, 3.0)])
def test_divergence_metrics_are_clamped_as_the_ratio_is(gap: float, clamped: float) -> None:
    lp = torch.tensor([[-0.5, -0.5]])
    other = torch.tensor([[-0.5 + gap, -0.5]])
    result = fr.policy_loss(
        lp, lp - (other - lp), torch.ones(1), ref_logprobs=other, kl="k1", kl_coef=0.1, loss=losses.ppo()
    )
    metrics = result.metrics.floats()
    for which in ("ref", "old"):
        assert metrics[f"kl_{which}_k1"] == pytest.approx(-clamped / 2, rel=1e-6)
        assert metrics[f"kl_{which}_k3"] == pytest.approx((math.expm1(clamped) - clamped) / 2, rel=1e-5)
    assert metrics["ratio_max"] == pytest.approx(max(1.0, math.exp(clamped)), rel=1e-5)
    assert metrics["ratio_min"] == pytest.approx(min(1.0, math.exp(clamped)), rel=1e-5)


# ---------------------------------------------------------------------------------------------------------------- vespo
VESPO = {
    "a token far above": [50.0, -20.0, -15.0],
    "a token far below": [-100.0, 25.0, 1.0],
    "all far below": [-30.0, -30.0, 0.1],
    "all far above": [15.0, 15.0, 0.1],
    "at the lower clip": [math.log(1e-8) + 0.01, 0.0, 0.0],
    "below the lower clip": [math.log(1e-8) - 5.0, 0.0, 0.0],
}


@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("gaps", VESPO.values(), ids=VESPO)
@pytest.mark.parametrize("weighted", ["", "tokens", "sequence"])
def test_vespo_clamps_tokens_sequences_and_weights(gaps: list[float], weighted: str, sign: float) -> None:
    lp = torch.tensor([[-0.5, -1.5, -0.25]])
    old, adv = lp - torch.tensor([gaps]), torch.full((1,), sign)
    # 0 and e^-30 are as 1e-8, e^40 as e^20, in a token or for a whole sequence.
    weights = {"tokens": torch.tensor([[0.0, 1e-13, 3e17]]), "sequence": torch.tensor([1e-20])}.get(weighted)
    _, found = gradient(losses.vespo(), lp, old, adv, weights=weights)
    double = lp.double().requires_grad_()
    mask = torch.ones(1, 3, dtype=torch.bool)
    expected = reference.vespo(double, old.double(), adv.double(), mask, is_weight=weights)
    near(found, torch.autograd.grad(expected.sum(), double)[0])


def test_vespo_clips_a_sequence_from_above() -> None:
    """Where lambda is so small that e^20 of it is not 0 yet: log W of 30 counts as 20."""
    lp = torch.full((1, 2), -0.5)
    _, grad = gradient(losses.vespo(1.0, 1e-9), lp, lp - 15.0, torch.ones(1))
    near(grad, torch.full((1, 2), -math.exp(20 + 1e-9 * (1 - math.exp(20)))))


# ----------------------------------------------------------------------------------------------------------- sdpo_topk
@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_sdpo_topk_over_all_of_the_vocabulary(alpha: float) -> None:
    """The ids leave nothing to the tail: its probability is capped at what rounding leaves, 1 - e^-1e-7."""
    logits = torch.randn(2, 5, 7, generator=torch.Generator().manual_seed(3))
    student, teacher = logits.log_softmax(-1)
    student[0], teacher[0] = 1e-3 + student[0], 1e-3 + teacher[0]  # rounded up: more than everything
    leaf = student.clone().requires_grad_()
    result = fr.policy_loss(
        leaf,
        torch.zeros_like(student),
        torch.zeros(5),
        loss=losses.sdpo_topk(alpha),
        extra={"teacher_logprob": teacher},
    )
    result.loss.backward()
    double, mask = student.double().requires_grad_(), torch.ones(5, 7, dtype=torch.bool)
    expected = reference.sdpo_topk(double, None, None, mask, teacher=teacher.double(), alpha=alpha).mean()
    torch.testing.assert_close(result.loss.double(), expected.detach(), rtol=1e-4, atol=1e-6)
    (wanted,) = torch.autograd.grad(expected, double)
    assert leaf.grad is not None
    assert leaf.grad.isfinite().all()
    torch.testing.assert_close(leaf.grad[0].double(), wanted[0], rtol=1e-4, atol=1e-6)


# --------------------------------------------------------------------------------------------------------------- pairs
def test_each_side_has_its_own_length() -> None:
    """Pairs of unequal lengths: sums of means, means over the batch and token counts."""

    @losses.define(pairs=True, aggregation="mean")
    def lengths(t):  # type: ignore[no-untyped-def]
        mean = losses.seq_mean(t.chosen.logprob)
        t.report(
            mean_rejected=losses.batch_mean(t.rejected.logprob),
            mean_chosen=losses.batch_mean(t.chosen.logprob),
            longer=t.rejected.length - t.chosen.length,
        )
        return losses.seq_sum(mean + t.rejected.logprob) + losses.batch_mean(t.rejected.logprob)

    chosen = torch.tensor([[-1.0, -3.0], [-2.0, 0.0]], requires_grad=True)
    rejected = torch.tensor([[-1.0, -2.0, -3.0], [-4.0, -8.0, 0.0]], requires_grad=True)
    masks = {"chosen_mask": torch.tensor([[1, 1], [1, 0]]), "rejected_mask": torch.tensor([[1, 1, 1], [1, 1, 0]])}
    refs = {"ref_chosen_logprobs": torch.zeros(2, 2), "ref_rejected_logprobs": torch.zeros(2, 3)}
    result = fr.preference_loss(chosen, rejected, loss=lengths(), **masks, **refs)
    result.loss.backward()
    # Per pair 3 * -2 - 6 and 2 * -2 - 12, each with the mean of the rejected tokens, -18 / 5.
    assert result.loss.item() == pytest.approx((-12 - 16) / 2 - 18 / 5)
    metrics = result.metrics.floats()
    assert metrics["mean_rejected"] == pytest.approx(-18 / 5)
    assert metrics["mean_chosen"] == pytest.approx(-6 / 3)
    assert metrics["longer"] == 1.0
    assert (metrics["chosen_tokens"], metrics["rejected_tokens"]) == (3, 5)
    assert chosen.grad is not None
    assert rejected.grad is not None
    torch.testing.assert_close(chosen.grad, torch.tensor([[0.75, 0.75], [1.0, 0.0]]))
    torch.testing.assert_close(rejected.grad, torch.tensor([[0.7, 0.7, 0.7], [0.7, 0.7, 0.0]]))


# ---------------------------------------------------------------------------------------------------- fractions, bounds
def test_dual_clip_fraction_counts_the_tokens_at_the_cap() -> None:
    lp = torch.full((1, 4), -0.5)
    old = lp - torch.tensor([[math.log(5.0), math.log(5.0), math.log(2.0), 0.0]])
    adv = torch.tensor([[-1.0, 1.0, -1.0, -1.0]])
    result = fr.policy_loss(lp, old, adv, loss=losses.ppo(dual_clip=3.0))
    assert result.metrics["clip_fraction_dual"].item() == 0.25


@pytest.mark.parametrize("make", [losses.dppo_tv, losses.dppo_kl])
def test_dppo_keeps_what_is_exactly_on_its_bound(make: Any) -> None:
    """Probabilities of 0 and 1, whose total variation is 1; and no move at all, whose KL is 0."""
    lp, old = torch.tensor([[0.0], [-1e30], [-0.5]]), torch.tensor([[-1e30], [0.0], [-0.5]])
    moves = {1.0: [0], -1.0: [1]} if make is losses.dppo_tv else {1.0: [2], -1.0: [2]}
    bound = 1.0 if make is losses.dppo_tv else 0.0
    for sign, rows in moves.items():
        new, before = lp[rows], old[rows]
        _, grad = gradient(make(bound, bound), new, before, torch.tensor([sign]))
        near(grad, -sign * (new - before).clamp(-20, math.log(20)).exp())


def test_cov_selection_leaves_out_what_is_exactly_on_a_bound() -> None:
    """Means of 0, and covariances 1, 2 and 4 twice each."""
    lp, adv = torch.tensor([[1.0, -1, 2, -2, 2, -2]]), torch.tensor([[1.0, -1, 1, -1, 2, -2]])

    def selected(low: float, high: float) -> list[bool]:
        bounds = {"cov_low": low, "cov_high": high, "clip_low": 0.0, "clip_high": 1e6}
        found = losses.cov_mask(lp, adv, method="clip", share=1.0, old_logprobs=lp, **bounds)
        return [bool(x) for x in found[0]]

    assert selected(0.5, 5.0) == [True] * 6
    assert selected(1.0, 4.0) == [False, False, True, True, False, False]
    assert selected(0.5, 2.0) == [True, True, False, False, False, False]


@pytest.mark.parametrize("which", ["paper", "code"])
def test_stable_reinforce_of_equal_advantages(which: str) -> None:
    """Their variance is 0: z is 0 / 1e-4 + 1e-8, no 0 / 0."""
    lp = torch.full((2, 2), -0.5)
    value, grad = gradient(losses.stable_reinforce(advantage_filter=which), lp, lp, torch.full((2,), 0.5))
    near(grad, torch.full((2, 2), -1e-8))
    near(value, torch.tensor(-4e-8))


def test_tw_grpo_importance_is_clamped_above_and_below() -> None:
    """A row's log-prob is `gap` above the mean of two, the other's as far below: beyond 11 as at 11."""
    gaps = torch.tensor([0.0, 11.0, 12.0, 40.0, 5.0])
    logprobs = torch.stack([gaps, -gaps]).unsqueeze(-1) - 50.0  # [2, T, V] with V = 1
    found = losses.tw_grpo_importance(logprobs, torch.ones(2, 5), group_size=2)
    near(found[:, 4], (torch.cosh(gaps[4:]) - 1).expand(2) / (math.cosh(11.0) - 1))
    assert found[:, :4].tolist() == [[0.0, 1.0, 1.0, 1.0]] * 2


def test_accuracy_of_equal_rewards_is_none() -> None:
    lp = torch.full((2, 2), -0.5)
    refs = {"ref_chosen_logprobs": lp, "ref_rejected_logprobs": lp}
    result = fr.preference_loss(lp, lp + torch.tensor([[0.0], [-1.0]]), loss=losses.dpo(), **refs)
    assert result.metrics["reward_accuracy"].item() == 0.5

"""Token-level recipes: each is the operation's call that it says it is; what they compute on the way is right."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from reference_losses import policy as reference
from torch import Tensor

from fastreward import PolicyLoss, losses, policy_loss, recipes


@dataclass(frozen=True)
class Batch:
    """Four responses to two prompts, [4, 7]; the third is short, the last has a hole as a tool's tokens leave it."""

    lp: Tensor
    old: Tensor
    adv: Tensor
    mask: Tensor
    ref: Tensor
    other: Tensor
    rewards: Tensor

    @property
    def common(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.lp, self.old, self.adv, self.mask

    @property
    def rewarded(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.lp, self.old, self.rewards, self.mask


def batch() -> Batch:
    mask = torch.ones(4, 7)
    mask[2, 2:] = 0
    mask[3, 3] = 0
    lp = -3 * torch.rand(4, 7)
    return Batch(
        lp=lp.requires_grad_(),
        old=lp.detach() + 0.4 * torch.randn(4, 7),
        adv=torch.tensor([1.1, -0.9, 0.7, -0.6]),
        mask=mask,
        ref=lp.detach() + 0.3 * torch.randn(4, 7),
        other=torch.rand(4, 7),
        rewards=torch.tensor([1.0, 0.0, 0.0, 1.0]),
    )


def equal(one: Callable[[Batch], PolicyLoss], other: Callable[[Batch], PolicyLoss]) -> None:
    """Same loss, gradient and metrics, bit by bit, for a gradient from above that is not 1."""
    made = []
    for call in (one, other):
        torch.manual_seed(1)
        data = batch()
        torch.manual_seed(2)  # what a recipe draws
        result = call(data)
        (gradient,) = torch.autograd.grad(1.7 * result.loss, data.lp)
        made.append((result.loss.detach(), gradient, result.metrics.values_tensor, result.metrics.names))
    for a, b in zip(made[0][:3], made[1][:3], strict=True):
        assert torch.equal(a.nan_to_num(), b.nan_to_num())
    assert made[0][3] == made[1][3]
    assert made[0][1].abs().sum() > 0


# -------------------------------------------------------------------------------------------------------- compositions
GRPO: Any = {"aggregation": "seq-mean-token-mean"}
SAME: dict[str, tuple[Callable[[Batch], PolicyLoss], Callable[[Batch], PolicyLoss]]] = {
    "ppo": (
        lambda d: recipes.ppo(*d.common, clip_low=0.1, clip_high=0.3),
        lambda d: policy_loss(*d.common, loss=losses.ppo(0.1, 0.3), aggregation="token-mean"),
    ),
    "dual_clip_ppo": (
        lambda d: recipes.dual_clip_ppo(*d.common, dual_clip=1.1),
        lambda d: policy_loss(*d.common, loss=losses.ppo(dual_clip=1.1)),
    ),
    "grpo_loss": (
        lambda d: recipes.grpo_loss(*d.common),
        lambda d: policy_loss(*d.common, loss=losses.ppo(), **GRPO),
    ),
    "grpo_loss with its KL": (
        lambda d: recipes.grpo_loss(*d.common, ref_logprobs=d.ref),
        lambda d: policy_loss(*d.common, loss=losses.ppo(), **GRPO, ref_logprobs=d.ref, kl="k3", kl_coef=0.04),
    ),
    "grpo_loss with another KL": (
        lambda d: recipes.grpo_loss(*d.common, ref_logprobs=d.ref, kl="k2", kl_coef=0.5),
        lambda d: policy_loss(*d.common, loss=losses.ppo(), **GRPO, ref_logprobs=d.ref, kl="k2", kl_coef=0.5),
    ),
    "dapo": (
        lambda d: recipes.dapo(*d.common, normalizer=11.0),
        lambda d: policy_loss(*d.common, loss=losses.ppo(0.2, 0.28), aggregation="token-mean", normalizer=11.0),
    ),
    "dr_grpo_loss": (
        lambda d: recipes.dr_grpo_loss(*d.common),
        lambda d: policy_loss(*d.common, loss=losses.ppo(), aggregation="seq-mean-token-sum-norm"),
    ),
    "bnpo_loss": (
        lambda d: recipes.bnpo_loss(*d.common),
        lambda d: policy_loss(*d.common, loss=losses.ppo(), aggregation="token-mean"),
    ),
    "lite_ppo_loss": (
        lambda d: recipes.lite_ppo_loss(*d.common),
        lambda d: policy_loss(*d.common, loss=losses.ppo(), aggregation="token-mean"),
    ),
    "intellect_2": (
        lambda d: recipes.intellect_2(*d.common, delta=1.3, ref_logprobs=d.ref),
        lambda d: policy_loss(
            *d.common, loss=losses.ppo(delta=1.3), **GRPO, ref_logprobs=d.ref, kl="k3", kl_coef=0.001
        ),
    ),
    "clip_cov": (
        lambda d: recipes.clip_cov(*d.common, share=0.1, cov_low=0.01, cov_high=9.0),
        lambda d: policy_loss(
            *d.common,
            loss=losses.clip_cov(share=0.1, cov_low=0.01, cov_high=9.0),
            extra={"lots": torch.rand(4, 7)},
        ),
    ),
    "kl_cov": (
        lambda d: recipes.kl_cov(*d.common, ppo_kl_coef=0.7, share=0.2),
        lambda d: policy_loss(
            *d.common,
            loss=losses.kl_cov(0.7, 0.2),
        ),
    ),
    "cfpo": (
        lambda d: recipes.cfpo(*d.common, epsilon=0.3),
        lambda d: policy_loss(*d.common, loss=losses.cfpo(0.3)),
    ),
    "bapo": (
        lambda d: recipes.bapo(*d.common, target=0.5, high_end=1.6, aggregation="token-sum"),
        lambda d: policy_loss(*d.common, loss=losses.bapo(0.5, high_end=1.6), aggregation="token-sum"),
    ),
    "kpop": (
        lambda d: recipes.kpop(*d.common, threshold=0.01),
        lambda d: policy_loss(*d.common, loss=losses.kpop(0.01)),
    ),
    "tw_grpo": (
        lambda d: recipes.tw_grpo(d.lp, d.old, d.adv, d.other, d.mask, alpha=1.5),
        lambda d: policy_loss(*d.common, loss=losses.tw_grpo(1.5), extra={"importance": d.other}),
    ),
    "stable_reinforce": (
        lambda d: recipes.stable_reinforce(*d.common, advantage_filter="code"),
        lambda d: policy_loss(*d.common, loss=losses.stable_reinforce(advantage_filter="code"), **GRPO),
    ),
    "visurf": (
        lambda d: recipes.visurf(d.lp, d.old, d.adv, d.rewards, d.mask),
        lambda d: policy_loss(*d.common, loss=losses.visurf(), **GRPO, extra={"expert": d.rewards}),
    ),
    "fipo": (
        lambda d: recipes.fipo(*d.common, weight_low=0.8, safety=3.0),
        lambda d: policy_loss(*d.common, loss=losses.fipo(weight_low=0.8, safety=3.0), aggregation="token-mean"),
    ),
    "m2po": (
        lambda d: recipes.m2po(*d.common, tau=0.01),
        lambda d: policy_loss(*d.common, loss=losses.m2po(0.01), aggregation="token-mean"),
    ),
    "segment_ppo": (
        lambda d: recipes.segment_ppo(d.lp, d.old, d.adv, d.other.round(), d.mask, average=False),
        lambda d: policy_loss(
            *d.common, loss=losses.segment_ppo(average=False), extra={"segment_ids": d.other.round()}
        ),
    ),
    "psr": (
        lambda d: recipes.psr(*d.rewarded),
        lambda d: policy_loss(*d.rewarded, loss=losses.ppo(), keep=torch.tensor([True, False, False, True])),
    ),
    "nsr": (
        lambda d: recipes.nsr(*d.rewarded),
        lambda d: policy_loss(*d.rewarded, loss=losses.nsr(), keep=torch.tensor([False, True, True, False])),
    ),
    "w_reinforce": (
        lambda d: recipes.w_reinforce(*d.rewarded, positive_weight=0.3),
        lambda d: policy_loss(*d.rewarded, loss=losses.w_reinforce(0.3)),
    ),
    "sapo": (
        lambda d: recipes.sapo(*d.common, tau_neg=1.2),
        lambda d: policy_loss(*d.common, loss=losses.sapo(1.0, 1.2), **GRPO),
    ),
    "cispo": (
        lambda d: recipes.cispo(*d.common, clip_high=1.4, convention="trl"),
        lambda d: policy_loss(*d.common, loss=losses.cispo(clip_high=1.4, convention="trl")),
    ),
    "dispo": (
        lambda d: recipes.dispo(*d.common, pos_high=0.5),
        lambda d: policy_loss(*d.common, loss=losses.dispo(pos_high=0.5)),
    ),
    "dppo_tv": (
        lambda d: recipes.dppo_tv(*d.common, high=0.1),
        lambda d: policy_loss(*d.common, loss=losses.dppo_tv(high=0.1)),
    ),
    "dppo_kl": (
        lambda d: recipes.dppo_kl(*d.common, low=0.01),
        lambda d: policy_loss(*d.common, loss=losses.dppo_kl(low=0.01)),
    ),
    "dro": (
        lambda d: recipes.dro(*d.common, beta=0.3),
        lambda d: policy_loss(*d.common, loss=losses.dro(0.3)),
    ),
    "vespo": (
        lambda d: recipes.vespo(*d.common, k_pos=1.0, weights=d.other + 0.5),
        lambda d: policy_loss(*d.common, loss=losses.vespo(1.0), weights=d.other + 0.5),
    ),
    "reinforce": (
        lambda d: recipes.reinforce(*d.common, weights=d.other),
        lambda d: policy_loss(*d.common, loss=losses.reinforce(), aggregation="seq-mean-token-sum", weights=d.other),
    ),
    "gpg_loss": (
        lambda d: recipes.gpg_loss(*d.common),
        lambda d: policy_loss(*d.common, loss=losses.gpg(), **GRPO),
    ),
    "dft": (
        lambda d: recipes.dft(d.lp, d.mask, normalizer=3.0),
        lambda d: policy_loss(d.lp, None, None, d.mask, loss=losses.dft(), normalizer=3.0),
    ),
    "topr": (
        lambda d: recipes.topr(*d.common),
        lambda d: policy_loss(*d.common, loss=losses.topr()),
    ),
    "kimi_k1_5": (
        lambda d: recipes.kimi_k1_5(*d.common, tau=0.3),
        lambda d: policy_loss(*d.common, loss=losses.dro(0.3)),
    ),
    "vapo_loss": (
        lambda d: recipes.vapo_loss(d.lp, d.old, d.adv, d.rewards, d.mask, nll_coef=0.4),
        lambda d: policy_loss(*d.common, loss=losses.vapo(nll_coef=0.4), extra={"reward": d.rewards}),
    ),
    "echo": (
        lambda d: recipes.echo(d.lp, d.old, d.adv, d.other > 0.5, d.mask, alpha=0.4, clip_high=0.3),
        lambda d: policy_loss(*d.common, loss=losses.echo(0.4, 0.2, 0.3), extra={"observation": d.other > 0.5}),
    ),
    "loglinear_ppo": (
        lambda d: recipes.loglinear_ppo(
            d.lp, d.old, d.adv, torch.tensor([7, 6, 3, 8, -1, 2, 6]).expand(4, 7), d.mask, current_version=7
        ),
        lambda d: policy_loss(
            *d.common,
            loss=losses.loglinear_ppo(),
            extra={"interpolation": torch.tensor([0.0, 0.0, 0.75, 0.0, 0.0, 0.8, 0.0]).expand(4, 7)},
        ),
    ),
    "sft": (
        lambda d: recipes.sft(d.lp, d.mask),
        lambda d: policy_loss(d.lp, None, None, d.mask, loss=losses.sft()),
    ),
    "raft": (
        lambda d: recipes.raft(*d.rewarded),
        lambda d: policy_loss(*d.rewarded, loss=losses.sft(), keep=torch.tensor([True, False, False, True])),
    ),
    "sdpo": (
        lambda d: recipes.sdpo(d.lp, d.old, d.ref, d.mask, is_clip=1.1),
        lambda d: policy_loss(
            d.lp, d.old, torch.zeros(4), d.mask, loss=losses.sdpo(1.1), extra={"teacher_logprob": d.ref}
        ),
    ),
}


@pytest.mark.parametrize("name", SAME)
def test_is_the_operation_s_call(name: str) -> None:
    equal(*SAME[name])


def test_every_recipe_is_compared() -> None:
    of_the_file = {r.name for r in recipes.RECIPES.values() if r.family == "token"}
    assert {name.partition(" ")[0] for name in SAME} | {"sdpo_topk"} == of_the_file


# ------------------------------------------------------------------------------------------- what they make on the way
@pytest.mark.parametrize(("recipe", "chosen"), [(recipes.psr, [0, 3]), (recipes.nsr, [1, 2]), (recipes.raft, [0, 3])])
def test_dropped_responses_are_as_if_never_there(recipe: Callable[..., PolicyLoss], chosen: list[int]) -> None:
    d = batch()
    whole = recipe(*d.rewarded)
    part = recipe(*(x[chosen] for x in d.rewarded))
    torch.testing.assert_close(whole.loss, part.loss)
    (gradient,) = torch.autograd.grad(whole.loss, d.lp)
    assert not gradient[[i for i in range(4) if i not in chosen]].any()
    assert whole.metrics["token_count"] == d.mask[chosen].sum()


def test_an_extra_of_the_caller_s_is_not_dropped_in_silence() -> None:
    d = batch()
    with pytest.raises(ValueError, match=r"extra\['mine'\]: tw_grpo does not read it"):
        recipes.tw_grpo(d.lp, d.old, d.adv, torch.zeros_like(d.lp), d.mask, extra={"mine": d.adv})


def test_the_caller_s_keep_still_holds() -> None:
    """Per response, per token, and packed."""
    d = batch()
    rows, tokens = torch.tensor([True, True, True, False]), torch.arange(7) > 2
    by_row = recipes.psr(*d.rewarded, keep=rows)
    assert by_row.metrics["token_count"] == 7  # response 0 alone
    by_token = recipes.psr(*d.rewarded, keep=tokens.expand(4, 7))
    assert by_token.metrics["token_count"] == 4 + 3
    packed = [x[d.mask != 0] for x in (d.lp, d.old)]
    bounds = torch.tensor([0, 7, 14, 16, 22])
    kept = tokens.expand(4, 7)[d.mask != 0]
    for keep, want in ((rows, by_row), (kept, by_token), (None, recipes.psr(*d.rewarded))):
        got = recipes.psr(*packed, d.rewards, cu_seqlens=bounds, keep=keep)
        torch.testing.assert_close(got.loss, want.loss)
        assert got.metrics["token_count"] == want.metrics["token_count"]


def test_cov_selection_is_the_published_one() -> None:
    """The same with advantages per response, per token and packed; dropped responses are not selected from."""
    d = batch()
    d.lp.requires_grad_(False)
    chosen = reference.cov_mask(d.lp, d.old, d.adv, d.mask, method="kl", ratio=0.2)
    assert 0 < chosen.sum() < 5
    want = reference.kl_cov(d.lp, d.old, d.adv, d.mask, selected=chosen)
    want = (want * d.mask).sum() / d.mask.sum()
    bounds = torch.tensor([0, 7, 14, 16, 22])
    packed = [x[d.mask != 0] for x in (d.lp, d.old)]
    per_token = d.adv.unsqueeze(-1).expand(4, 7)
    for got in (
        recipes.kl_cov(*d.common, share=0.2),
        recipes.kl_cov(d.lp, d.old, per_token, d.mask, share=0.2),
        recipes.kl_cov(*packed, d.adv, cu_seqlens=bounds, share=0.2),
    ):
        torch.testing.assert_close(got.loss.double(), want, rtol=1e-6, atol=1e-6)
    keep = torch.tensor([True, False, True, True])
    got = recipes.kl_cov(*d.common, share=0.2, keep=keep)
    alone = recipes.kl_cov(*(x[keep] for x in d.common), share=0.2)
    torch.testing.assert_close(got.loss, alone.loss)


def test_clip_cov_takes_tokens_out_at_random() -> None:
    d = batch()
    everything = reference.cov_mask(d.lp, d.old, d.adv, d.mask, method="clip", cov_low=0.05, cov_high=9.0)
    assert everything.sum() > 2
    seen = torch.zeros(4, 7, dtype=torch.bool)
    for _ in range(60):
        result = recipes.clip_cov(*d.common, share=1 / 22, cov_low=0.05, cov_high=9.0)  # of 22 tokens: one
        (gradient,) = torch.autograd.grad(result.loss, d.lp)
        gone = (gradient == 0) & everything
        assert gone.sum() == 1
        seen |= gone
    assert torch.equal(seen, everything)


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("tail", [True, False])
def test_sdpo_topk_is_the_mean_over_tokens(alpha: float, tail: bool) -> None:
    student, teacher = (torch.randn(3, 5, 20).log_softmax(-1)[..., :4] for _ in range(2))
    student.requires_grad_()
    mask, weights = torch.rand(3, 5) > 0.3, torch.rand(3, 5) + 0.5
    result = recipes.sdpo_topk(student, teacher, mask, alpha=alpha, tail=tail, weights=weights)
    double = student.detach().double().requires_grad_()
    each = reference.sdpo_topk(
        double.flatten(0, 1),
        None,
        None,
        torch.ones(15, 4),
        teacher=teacher.flatten(0, 1),
        alpha=alpha,
        tail=tail,
        is_weight=weights.flatten(),
    )
    want = each[mask.flatten()].mean()
    torch.testing.assert_close(result.loss.double(), want, rtol=1e-5, atol=1e-6)
    got = torch.autograd.grad(result.loss, student)[0]
    torch.testing.assert_close(got.double(), torch.autograd.grad(want, double)[0], rtol=1e-4, atol=1e-6)
    assert not got[~mask].any()
    scaled = recipes.sdpo_topk(student, teacher, mask, alpha=alpha, tail=tail, weights=weights, normalizer=7.0)
    torch.testing.assert_close(scaled.loss, result.loss * mask.sum() / 7)


def test_sdpo_topk_says_what_it_expects() -> None:
    with pytest.raises(ValueError, match=r"logprobs: expected shape \[B, T, k\], got \[3, 4\]"):
        recipes.sdpo_topk(torch.zeros(3, 4), torch.zeros(3, 4))


def test_sft_of_packed_responses() -> None:
    d = batch()
    packed = recipes.sft(d.lp[d.mask != 0], cu_seqlens=torch.tensor([0, 7, 14, 16, 22]))
    torch.testing.assert_close(packed.loss, recipes.sft(d.lp, d.mask).loss)

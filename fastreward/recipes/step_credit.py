"""Credit of steps: from scores of a reward model, or verdicts, and an outcome, to advantages of their tokens.

Scores of steps are step_scores or verdicts [B, K], one for each step, and segment_ids [B, T] (or packed [N] with
cu_seqlens) say which tokens a step has, as in step_rewards.py. Recipes return constants: float32 in the shape of the
tokens, 0 where the mask is 0. NaN in rewards: not scored; such a response is in no statistic, and its tokens get 0. In
a group of one nothing is centred on the others: its outcome gives 0, as `group_advantages` has it.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from fastreward._arguments import check
from fastreward._arguments.groups import GroupIds
from fastreward._arguments.numbers import Number, number
from fastreward.group import group_advantages
from fastreward.group_statistics import group_statistics
from fastreward.recipes._catalogue.registry import recipe
from fastreward.recipes._shared.groups import finite_or_nan
from fastreward.recipes._shared.steps import Steps, of_others, responses_of, steps_of, whitened
from fastreward.recipes._shared.tokens import beside, token_values
from fastreward.returns import discounted_returns, gae

__all__ = ["fine_grained_rlhf", "pure", "pure_verl", "spark", "tp_grpo"]


# ----------------------------------------------------------------------------------------------------- min-form credit
@recipe(
    "PURE (min-form credit, soft)",
    "arXiv 2504.15275",
    code="PURE, OpenRLHF branch, experience_maker.py",
    passes=("rewards=rewards", "group_ids"),
)
def pure(
    step_scores: Tensor,
    segment_ids: Tensor,
    mask: Tensor | None = None,
    *,
    rewards: Tensor | None = None,
    group_ids: GroupIds | None = None,
    group_size: int | None = None,
    temperature: Number = 0.1,
    weighted: bool = True,
    baseline: Literal["token", "step"] = "token",
    outcome_coef: Number = 1.0,
    keep_ends: bool = False,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """A = sum of r from t on, r_k = w_k p_k - baseline at the end of step k, w = softmax(-p / temperature).

    The sum of w p is nearly the least p, so what a response is credited with is its worst step. The outcome, less the
    mean of the others, is on the last token. The strict form is `recipes.pure_verl`.

    Args:
        step_scores: p, [B, K], in [-1, 1]: a process reward model's.
        segment_ids: steps, [B, T] or [N].
        mask: its shape; nonzero = a token of the response.
        rewards: [B], 0 or 1; None: the process rewards alone.
        group_ids, group_size: one of them, as in `fastreward.group_advantages`.
        temperature: near 0 it is the minimum.
        weighted: False: w_k = 1 / K.
        baseline: "token": what the others get per token, times the tokens of the step before its end; "step": the mean
            of what the others get per step.
        outcome_coef: of the outcome.
        keep_ends: False, as published: the tokens at which steps end get no advantage.
        cu_seqlens: [B + 1], of packed responses.
    """
    check.choice("baseline", baseline, ("token", "step"))
    steps = steps_of("step_scores", step_scores, segment_ids, mask, rewards, cu_seqlens)
    p = steps.values("step_scores", step_scores)
    share = _min_weights(p, steps, temperature) if check.flag("weighted", weighted) else 1 / steps.count.clamp(min=1)
    p = share * p
    total = p.sum(-1)
    if baseline == "token":
        others = of_others(_there(total, steps), group_ids, group_size)
        others = others / of_others(_there(steps.lengths(), steps), group_ids, group_size)
        p = p - others.nan_to_num(0.0).unsqueeze(-1) * (steps.tokens - 1)
    else:
        others = of_others(total / steps.count[:, 0], group_ids, group_size)
        p = p - others.nan_to_num(0.0).unsqueeze(-1)
    reward = steps.scatter(p, "end")
    if rewards is not None:
        outcome = group_advantages(
            steps.outcomes, group_ids, group_size=group_size, center="leave-one-out", scale="none"
        )
        reward = reward + number("outcome_coef", outcome_coef, reward, check.finite) * steps.at_end(outcome)
    advantages = discounted_returns(reward, steps.mask, cu_seqlens=cu_seqlens)
    if check.flag("keep_ends", keep_ends):
        return advantages
    return advantages.masked_fill(_ends(steps), 0.0)


def _min_weights(p: Tensor, steps: Steps, temperature: Number) -> Tensor:
    """softmax(-p / temperature) over the steps of each response, [B, K]."""
    logits = -p / number("temperature", temperature, p, check.positive)
    return torch.where(steps.there, logits, -torch.inf).softmax(-1).nan_to_num(0.0)


def _there(x: Tensor, steps: Steps) -> Tensor:
    """[B]: NaN, not there, where a response has no token, or was not scored."""
    return torch.where(steps.lengths() > 0, x, torch.nan)


def _ends(steps: Steps) -> Tensor:
    """Bool in the shape of tokens: the last one of a step."""
    return steps.scatter(torch.ones_like(steps.tokens), "end") != 0


@recipe(
    "PURE (min-form credit, strict)",
    "arXiv 2504.15275",
    code="PURE, verl branch, core_algos.py, fsdp_workers.py",
    passes=("rewards=rewards", "group_ids"),
)
def pure_verl(
    step_scores: Tensor,
    segment_ids: Tensor,
    mask: Tensor | None = None,
    *,
    rewards: Tensor | None = None,
    group_ids: GroupIds | None = None,
    group_size: int | None = None,
    form: Literal["min", "sum"] = "min",
    temperature: Number = 0.1,
    outcome_coef: Number = 1.0,
    capped: bool = False,
    columns: Number | None = None,
    whiten: bool = False,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """A = (least r from t on) - (the mean of that over the others' tokens), r = p at the end of a step, R at the end.

    form "sum": the sum from t on, of w p, w = softmax(-p / temperature). Tokens behind which there is no reward have 0
    for the least; in a group of one there is no baseline.

    Args:
        step_scores: p, [B, K], in [-1, 1]: a process reward model's.
        segment_ids: steps, [B, T] or [N].
        mask: its shape; nonzero = a token of the response.
        rewards: [B], 0 or 1; None: the process rewards alone.
        group_ids, group_size: one of them, as in `fastreward.group_advantages`.
        form: "min" or "sum".
        temperature: of the sum.
        outcome_coef: of the outcome.
        capped: the least of r and 0. As released: tokens without a reward hold 0 there, padding among them, so that no
            positive reward survives.
        columns: the others' sums are divided by so many tokens each; None: by those that they have. As released: T.
        whiten: over the tokens of the batch.
        cu_seqlens: [B + 1], of packed responses.
    """
    check.choice("form", form, ("min", "sum"))
    steps = steps_of("step_scores", step_scores, segment_ids, mask, rewards, cu_seqlens)
    p = steps.values("step_scores", step_scores)
    reward = steps.scatter(p if form == "min" else _min_weights(p, steps, temperature) * p, "end")
    bears = _ends(steps)
    if rewards is not None:
        bears = bears | steps.is_last()
        reward = reward + number("outcome_coef", outcome_coef, reward, check.finite) * steps.at_end(steps.outcomes)
    ahead = (
        _least_ahead(reward, bears, steps, capped)
        if form == "min"
        else discounted_returns(reward, steps.mask, cu_seqlens=cu_seqlens)
    )
    width: Number = (
        of_others(_there(steps.lengths(), steps), group_ids, group_size)
        if columns is None
        else number("columns", columns, reward, check.positive)
    )
    others = of_others(_there(steps.total(ahead), steps), group_ids, group_size)
    baseline = (others / width).nan_to_num(0.0)
    advantages = ahead - steps.on_tokens(baseline)
    return whitened(advantages, steps.mask) if check.flag("whiten", whiten) else advantages


def _least_ahead(reward: Tensor, bears: Tensor, steps: Steps, capped: bool) -> Tensor:
    """The least of the rewards from each token on, 0 where there is none."""
    nothing = torch.finfo(torch.float32).max
    least = discounted_returns(reward.masked_fill(~bears, nothing), steps.mask, op="min", cu_seqlens=steps.cu_seqlens)
    least = least.masked_fill(least == nothing, 0.0)
    return least.clamp(max=0.0) if check.flag("capped", capped) else least


# ------------------------------------------------------------------------------------------------------------ verdicts
@recipe(
    "TP-GRPO (thought-level process rewards)",
    "arXiv 2507.23317",
    note="notes that quote its propositions 1 and 2; alpha, ddof and eps are our guess",
    passes=("group_ids",),
)
def tp_grpo(
    verdicts: Tensor,
    segment_ids: Tensor,
    mask: Tensor | None,
    rewards: Tensor,
    *,
    group_ids: GroupIds | None = None,
    group_size: int | None = None,
    alpha: Number = 1.0,
    ddof: int = 1,
    eps: Number = 1e-6,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """A = (R - mean) / (std + eps); less alpha acc in wrong thoughts of right answers; 0 where a wrong one explores.

    acc = the share of right answers in the group. A thought of a wrong answer that does not lead to that answer is
    exploration, and is not punished. Steps that follow each other with one verdict are one thought: as their tokens
    get the same, they need not be merged.

    Args:
        verdicts: [B, K], nonzero = the step is right; in a wrong response: it leads to the wrong answer.
        segment_ids: steps, [B, T] or [N]; tokens of none get (R - mean) / (std + eps).
        mask: its shape; nonzero = a token of the response.
        rewards: [B], above 0 = right; the paper's are 1 and -1.
        group_ids, group_size: one of them, as in `fastreward.group_advantages`.
        alpha: of the process reward.
        ddof, eps: of the std.
        cu_seqlens: [B + 1], of packed responses.
    """
    steps = steps_of("verdicts", verdicts, segment_ids, mask, rewards, cu_seqlens)
    fine = steps.values("verdicts", verdicts) != 0
    outcome = group_advantages(steps.outcomes, group_ids, group_size=group_size, ddof=ddof, eps=eps).double()
    right = steps.outcomes > 0
    scored = torch.where(steps.outcomes.isnan(), torch.nan, right.double())
    share = group_statistics(scored, group_ids, ("mean",), group_size=group_size)["mean"].double()
    change = torch.where(right, -number("alpha", alpha, outcome, check.finite) * share, -outcome)
    return steps.on_tokens(outcome) + steps.scatter(torch.where(fine, 0.0, change.unsqueeze(-1)))


@recipe(
    "SPARK (stepwise)",
    "arXiv 2512.03244",
    note="notes on the paper; ddof and eps are our guess",
    passes=("group_ids",),
)
def spark(
    verdicts: Tensor,
    segment_ids: Tensor,
    mask: Tensor | None,
    rewards: Tensor,
    *,
    group_ids: GroupIds | None = None,
    group_size: int | None = None,
    variant: Literal["selective", "augmented"] = "selective",
    step_weight: Number = 0.4,
    ddof: int = 1,
    eps: Number = 1e-6,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """A = (R - mean) / (std + eps), on the right steps where it is no less than 0, else on the wrong ones; 0 elsewhere.

    variant "augmented": R' = (1 - step_weight) R + step_weight (share of right steps) in place of R, on all tokens. The
    paper's third one, 0.8 of the one advantage and 0.2 of a step's, is not here: what the latter is was not seen.

    Args:
        verdicts: [B, K], nonzero = the step is right: a generative process reward model's, by majority.
        segment_ids: steps, [B, T] or [N].
        mask: its shape; nonzero = a token of the response.
        rewards: [B], 0 or 1; 0 where the format is wrong.
        group_ids, group_size: one of them, as in `fastreward.group_advantages`.
        variant: "selective", the paper's best, or "augmented".
        step_weight: of the second.
        ddof, eps: of the std.
        cu_seqlens: [B + 1], of packed responses.
    """
    check.choice("variant", variant, ("selective", "augmented"))
    steps = steps_of("verdicts", verdicts, segment_ids, mask, rewards, cu_seqlens)
    fine = steps.values("verdicts", verdicts) != 0
    reward = steps.outcomes
    if variant == "augmented":
        weight = number("step_weight", step_weight, reward, check.finite)
        share = (fine & steps.there).sum(-1) / steps.count[:, 0].clamp(min=1)
        reward = (1 - weight) * reward + weight * share
    advantages = group_advantages(reward, group_ids, group_size=group_size, ddof=ddof, eps=eps)
    if variant == "augmented":
        return steps.on_tokens(advantages)
    agrees = fine == (advantages >= 0).unsqueeze(-1)
    return steps.scatter(torch.where(agrees, advantages.unsqueeze(-1), 0.0))


# ----------------------------------------------------------------------------------------------- several granularities
@recipe(
    "Fine-Grained RLHF",
    "arXiv 2306.01693",
    code="allenai/FineGrainedRLHF fgrlhf/reward.py, fgrlhf/ppo.py, fgrlhf/utils.py",
    passes=(
        "relevance=verdicts",
        "relevance_ids=segment_ids",
        "factuality=verdicts",
        "factuality_ids=segment_ids",
        "completeness=completeness",
    ),
)
def fine_grained_rlhf(
    values: Tensor,
    old_logprobs: Tensor,
    ref_logprobs: Tensor,
    mask: Tensor | None = None,
    *,
    relevance: Tensor | None = None,
    relevance_ids: Tensor | None = None,
    factuality: Tensor | None = None,
    factuality_ids: Tensor | None = None,
    completeness: Tensor | None = None,
    relevance_weight: Number = 0.3,
    factuality_weight: Number = 0.5,
    completeness_weight: Number = 0.3,
    completeness_mean: Number = -0.4468,
    completeness_std: Number = 8.3012,
    kl_coef: Number = 0.3,
    gamma: Number = 1.0,
    lam: Number = 0.95,
    by_root_of_std: bool = True,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """A = whiten(GAE(scale(r_t - kl_coef (lp - ref_lp)), V)): three reward models, each on segments of its own.

    r_t: + or - relevance_weight where a sub-sentence ends, + or - factuality_weight where a sentence does, and
    completeness_weight (x - mean) / std on the last token. What a model is not there for is left out.

    Args:
        values: of the critic, [B, T] or [N].
        old_logprobs, ref_logprobs: of the policy and of the reference, in its shape.
        mask: its shape; nonzero = a token of the response.
        relevance: [B, K], nonzero = the sub-sentence is fine; relevance_ids: its segments (`fastreward.segment_ids`).
        factuality: [B, K], nonzero = the sentence is; factuality_ids: its segments.
        completeness: [B], as the reward model gives it.
        relevance_weight, factuality_weight, completeness_weight, completeness_mean, completeness_std: of the rewards.
        kl_coef: what the authors' adaptive one begins with.
        gamma, lam: as in `fastreward.gae`.
        by_root_of_std: rewards and advantages are divided by the root of their std, as the released code does; False:
            by the std.
        cu_seqlens: [B + 1], of packed responses.
    """
    v = token_values("values", values, mask)
    tokens = responses_of("values", v, mask, None, cu_seqlens)
    old = beside("old_logprobs", old_logprobs, "values", v, mask)
    gap = old - beside("ref_logprobs", ref_logprobs, "values", v, mask)
    total = -number("kl_coef", kl_coef, v, check.finite) * gap
    for name, verdicts, ids, weight in (
        ("relevance", relevance, relevance_ids, relevance_weight),
        ("factuality", factuality, factuality_ids, factuality_weight),
    ):
        if (verdicts is None) != (ids is None):
            raise ValueError(f"{name}, {name}_ids: expected both or none of them")
        if verdicts is not None and ids is not None:
            check.shape(f"{name}_ids", check.tensor(f"{name}_ids", ids), v.shape, "as values")
            steps = steps_of(name, verdicts, ids, tokens.mask, None, cu_seqlens)
            signs = torch.where(steps.values(name, verdicts) != 0, 1.0, -1.0)
            total = total + number(f"{name}_weight", weight, v, check.finite) * steps.scatter(signs, "end")
    if completeness is not None:
        score = finite_or_nan("completeness", check.reals("completeness", completeness))
        score = score - number("completeness_mean", completeness_mean, v, check.finite)
        score = score / number("completeness_std", completeness_std, v, check.positive)
        total = total + tokens.at_end(number("completeness_weight", completeness_weight, v, check.finite) * score)
    root = check.flag("by_root_of_std", by_root_of_std)
    scaled = _scaled(total, tokens.mask, root, shift_mean=False)
    advantages, _ = gae(scaled, v, tokens.mask, gamma=gamma, lam=lam, cu_seqlens=cu_seqlens)
    return _scaled(advantages, tokens.mask, root, shift_mean=True)


def _scaled(x: Tensor, mask: Tensor, root: bool, *, shift_mean: bool) -> Tensor:
    """Whitened with ddof 0; root: divided by the root of the std instead."""
    if not root:
        return whitened(x, mask, ddof=0, shift_mean=shift_mean)
    nothing, size = ~mask, mask.sum().clamp(min=1)
    mean = x.masked_fill(nothing, 0.0).sum(dtype=torch.float64) / size
    centred = (x - mean).masked_fill(nothing, 0.0)
    variance = centred.square().sum(dtype=torch.float64) / size
    scaled = centred * (variance.sqrt() + 1e-8).rsqrt()
    return scaled if shift_mean else (scaled + mean).masked_fill(nothing, 0.0)

"""Rewards from likelihoods: what a model gives a reference answer behind its own reasoning, and other texts.

l = log-probs of an answer's tokens, L their number. All of it comes from one `fastreward.token_logprobs` pass over the
texts that are scored: a reference answer spliced in behind each response, the prompt of a picture, a follow-up. Recipes
take log-probs [B, L] with a mask, or packed [N] with cu_seqlens, and return constants: rewards [B] float32 unless they
say so. An answer without a token has probability 0, and its log-prob is NaN: not scored, as `group_advantages` has it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastreward._arguments import check
from fastreward._arguments.groups import GroupIds
from fastreward._arguments.numbers import Number, number
from fastreward.group_statistics import group_statistics
from fastreward.recipes._catalogue.registry import recipe
from fastreward.recipes._shared.groups import finite_or_nan, given, prompts
from fastreward.recipes._shared.steps import steps_of
from fastreward.recipes._shared.tokens import Score, beside, likelihood, mean, per_response, token_values, total
from fastreward.segments import scatter_rewards, segment_diff

__all__ = [
    "cdr", "darl", "flr", "igpo_gain", "jepo_advantages", "likelihood_reward", "p2s", "prompt_echo", "rlpr",
    "rlpr_filter", "rlpt", "sar", "verifree_reward",
]  # fmt: skip


# ------------------------------------------------------------------------------------------------ of reference answers
@recipe(
    "Log-prob rewards (likelihood-based reward designs)",
    "arXiv 2602.03979",
    paper="equations 2 to 11",
    passes=("answer_mask",),
)
def likelihood_reward(
    answer_logprobs: Tensor,
    answer_mask: Tensor | None = None,
    *,
    score: Score = "sum",
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """R = sum l, mean l, exp(sum l) or mean exp(l), of the reference answer behind the response.

    The paper's log-prob, average log-prob, probability and average probability; it trains with RLOO, and on the answer
    too. Its form of JEPO is `recipes.jepo`.

    Args:
        answer_logprobs: of the answer's tokens, [B, L] or [N].
        answer_mask: its shape; nonzero = a token of the answer.
        score: "sum", "mean", "prob" or "mean-prob"; also "geometric", exp(mean l).
        cu_seqlens: [B + 1], of packed answers.
    """
    return likelihood("answer_logprobs", answer_logprobs, answer_mask, score, cu_seqlens, "answer_mask").float()


@recipe(
    "VeriFree's reward",
    "arXiv 2505.21493",
    code="sail-sg/VeriFree verifree.py",
    passes=("answer_mask",),
)
def verifree_reward(
    answer_logprobs: Tensor, answer_mask: Tensor | None = None, *, cu_seqlens: Tensor | None = None
) -> Tensor:
    """R = exp(sum l); 0 where the response has no place for an answer.

    Of log-probs at the sampling temperature. The loss that goes with it, `recipes.verifree`, trains on the answer too.

    Args:
        answer_logprobs: of the answer's tokens, [B, L] or [N].
        answer_mask: its shape; nonzero = a token of the answer; a row of zeros where there is none.
        cu_seqlens: [B + 1], of packed answers.
    """
    return likelihood("answer_logprobs", answer_logprobs, answer_mask, "prob", cu_seqlens, "answer_mask").float()


@recipe(
    "RLPR (reference probability reward)",
    "arXiv 2506.18254",
    code="OpenBMB/RLPR reward_manager/prob.py",
    passes=("answer_mask", "baseline=baseline"),
)
def rlpr(
    answer_logprobs: Tensor,
    answer_mask: Tensor | None = None,
    *,
    baseline: Tensor | None = None,
    format_rewards: Tensor | None = None,
    score: Score = "mean-prob",
    threshold: Number | None = 0.0,
    weight: Number = 0.9,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """R = weight max(mean exp(l) - baseline, threshold) + (1 - weight) format: what the reasoning adds to the answer.

    The code rounds to bfloat16; here nothing is rounded. Groups of little spread are left out by
    `recipes.rlpr_filter`.

    Args:
        answer_logprobs: of the reference answer in the response's answer tags, [B, L] or [N].
        answer_mask: its shape; nonzero = a token of the answer.
        baseline: [B], the same score without the reasoning, one per prompt; None: 0.
        format_rewards: [B], in [0, 1]; None: the reward has no such part, and no weight.
        score: as in `recipes.likelihood_reward`.
        threshold: the least gain; None: any.
        weight: of the answer.
        cu_seqlens: [B + 1], of packed answers.
    """
    gain = likelihood("answer_logprobs", answer_logprobs, answer_mask, score, cu_seqlens, "answer_mask")
    if baseline is not None:
        gain = gain - per_response("baseline", baseline, "answer_logprobs", gain)
    if threshold is not None:
        gain = gain.clamp(min=number("threshold", threshold, gain, check.finite))
    if format_rewards is None:
        return gain.float()
    weight = number("weight", weight, gain, check.finite)
    return (weight * gain + (1 - weight) * per_response("format_rewards", format_rewards, "the answers", gain)).float()


@recipe(
    "RLPR's filter of groups",
    "arXiv 2506.18254",
    code="OpenBMB/RLPR core_algos.py",
    returns="mask",
    passes=("group_ids", "running_std=0.4"),
)
def rlpr_filter(
    rewards: Tensor,
    group_ids: GroupIds | None = None,
    *,
    running_std: Number,
    group_size: int | None = None,
    ratio: Number = 0.5,
    ddof: int = 1,
) -> Tensor:
    """keep = std of the group's rewards >= ratio running_std.

    Args:
        rewards: [B], NaN = not scored.
        group_ids, group_size: as in `fastreward.group_advantages`.
        running_std: an exponential mean of the groups' std over the steps (decay 0.99), which the caller keeps; the
            method begins to filter after 6 to 11 steps.
        ratio: as in the formula.
        ddof: of the std.

    Returns:
        bool [B]; False for a group of no more than ddof.
    """
    std = group_statistics(given("rewards", rewards), group_ids, ("std",), group_size=group_size, ddof=ddof)["std"]
    bound = number("ratio", ratio, std, check.not_negative) * number(
        "running_std", running_std, std, check.not_negative
    )
    return std >= bound


@recipe(
    "JEPO's advantages (Jensen's evidence lower bound)",
    "arXiv 2503.19618",
    paper="arXiv 2602.03979, which restates it (equations 2 to 11)",
    returns="response advantages",
    passes=("answer_mask", "group_ids=group_ids"),
)
def jepo_advantages(
    answer_logprobs: Tensor,
    answer_mask: Tensor | None = None,
    *,
    group_ids: GroupIds | None = None,
    group_size: int | None = None,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """A = log mean p over the group - log mean p of the others, p = exp(sum l).

    0 in a group of one, and for a response without an answer, which is in no mean. The loss that goes with it trains on
    the answer too: `recipes.jepo`.

    Args:
        answer_logprobs: of the reference answer, [B, L] or [N].
        answer_mask: its shape; nonzero = a token of the answer.
        group_ids, group_size: as in `fastreward.group_advantages`.
        cu_seqlens: [B + 1], of packed answers.
    """
    p = likelihood("answer_logprobs", answer_logprobs, answer_mask, "sum", cu_seqlens, "answer_mask")
    p = p - group_statistics(p, group_ids, ("max",), group_size=group_size)["max"]  # the scale drops out
    names = ("count", "logsumexp", "leave-one-out-logsumexp")
    n, every, others = group_statistics(p, group_ids, names, group_size=group_size).values()
    return torch.where(n > 1, (every - n.log()) - (others - (n - 1).log()), 0.0).nan_to_num(0.0)


@recipe(
    "DARL (diversity beside the reference answer)",
    "arXiv 2601.14700",
    reconstructed="notes on the paper; how far the own answer is from the reference is our guess: |p_own - p_ref|",
    passes=("answer_mask", "own_logprobs=own_logprobs", "own_mask=own_mask"),
)
def darl(
    answer_logprobs: Tensor,
    answer_mask: Tensor | None = None,
    *,
    own_logprobs: Tensor,
    own_mask: Tensor | None = None,
    score: Score = "mean-prob",
    weight: Number = 1.0,
    diversity: Number = 0.01,
    gamma: Number = 8.0,
    cu_seqlens: Tensor | None = None,
    own_cu_seqlens: Tensor | None = None,
) -> Tensor:
    """R = weight p_ref + diversity D 1[D <= p_ref / gamma], D = |p_own - p_ref|.

    p = mean exp(l) of the reference answer and of the response's own. An answer of one's own is rewarded a little, but
    no further away than the reference is likely.

    Args:
        answer_logprobs: of the reference answer, [B, L] or [N].
        answer_mask: its shape; nonzero = a token of the answer.
        own_logprobs, own_mask: of the response's own answer, any length.
        score: as in `recipes.likelihood_reward`.
        weight, diversity, gamma: as in the formula; the notes say 0.01 and 8 to 10.
        cu_seqlens, own_cu_seqlens: [B + 1], of packed answers.
    """
    reference = likelihood("answer_logprobs", answer_logprobs, answer_mask, score, cu_seqlens, "answer_mask")
    own = likelihood("own_logprobs", own_logprobs, own_mask, score, own_cu_seqlens, "own_mask")
    check.shape("own_logprobs", own, reference.shape, "a row for each of answer_logprobs")
    weight = number("weight", weight, own, check.finite)
    diversity, gamma = number("diversity", diversity, own, check.finite), number("gamma", gamma, own, check.positive)
    distance = (own - reference).abs()
    return (weight * reference + diversity * torch.where(distance <= reference / gamma, distance, 0.0)).float()


# ------------------------------------------------------------------------------------------------------ turns and steps
@recipe(
    "IGPO's information gain",
    "arXiv 2510.14967",
    code="GuoqingWang1/IGPO generation.py",
    returns="token rewards",
)
def igpo_gain(likelihoods: Tensor, segment_ids: Tensor, rewards: Tensor, *, cu_seqlens: Tensor | None = None) -> Tensor:
    """r_k = p_k - p_{k-1} on the last token of turn k, p = exp(mean l) of the answer; the last turn has the outcome.

    Args:
        likelihoods: [B, S + 1], `recipes.likelihood_reward(..., score="geometric")` of the reference answer behind the
            prompt and behind each turn; anything behind a response's last turn.
        segment_ids: integers [B, T] or [N], the turn of each token, -1 = none, as from `fastreward.segment_ids`.
        rewards: [B], of the outcome (F1).
        cu_seqlens: [B + 1], of packed tokens.
    """
    p = finite_or_nan("likelihoods", check.floats("likelihoods", likelihoods))
    if p.ndim != 2 or not p.shape[1]:
        raise ValueError(f"likelihoods: expected shape [B, S + 1], got {list(p.shape)}")
    outcome = per_response("rewards", rewards, "likelihoods", p)
    turns = steps_of("likelihoods", p.shape[1] - 1, segment_ids, None, None, cu_seqlens)
    check.shape("likelihoods", p, (turns.rows, p.shape[1]), "a row for each of segment_ids")
    gains = segment_diff(p[:, 1:], mask=turns.there, first=p[:, 0])
    gains = torch.where(turns.final, outcome.unsqueeze(-1), gains)
    return scatter_rewards(gains, segment_ids, cu_seqlens=cu_seqlens)


@recipe(
    "P2S (probabilistic process supervision)",
    "arXiv 2601.20649",
    reconstructed="notes on the paper; the weights' steepness, and that they sum to 1, are our guess",
    passes=("group_ids",),
)
def p2s(
    gains: Tensor,
    answer_scores: Tensor,
    rewards: Tensor,
    group_ids: GroupIds | None = None,
    *,
    group_size: int | None = None,
    well_formed: Tensor | None = None,
    steepness: Number = 10.0,
    malformed: Number = -1.0,
) -> Tensor:
    """R = outcome where one in the group is right, else sum of w_i r_i; r_i = max over t of the gain, w_i = sigmoid.

    r_i is the most that step i adds to a suffix of the best reasoning of the group; the last step's is the answer's
    log-prob. w_i = sigmoid(steepness (i / m - 1/2)), i = 1, ..., m, over their sum.

    Args:
        gains: [B, steps, suffixes], log pi(suffix t | question, steps to i) less the same with these steps masked;
            NaN = there is no such suffix, or step.
        answer_scores: [B], log pi(answer | question, all steps): `recipes.likelihood_reward`.
        rewards: [B], of the outcome: above 0 = right.
        group_ids, group_size: as in `fastreward.group_advantages`.
        well_formed: [B], 0 = malformed; None: all are well formed.
        steepness: of the weights.
        malformed: the reward of a malformed response.
    """
    outcome = per_response("rewards", rewards, "the call", rewards)
    x = finite_or_nan("gains", check.floats("gains", gains))
    if x.ndim != 3 or x.shape[0] != len(outcome):
        raise ValueError(f"gains: expected shape [{len(outcome)}, steps, suffixes], got {list(x.shape)}")
    groups = prompts(group_ids, group_size, len(outcome))
    best = torch.where(x.isnan(), -torch.inf, x).amax(-1) if x.shape[2] else x.new_full(x.shape[:2], -torch.inf)
    steps = torch.cat([best, per_response("answer_scores", answer_scores, "gains", x).unsqueeze(-1)], -1)
    place = torch.arange(1, steps.shape[1] + 1, device=x.device, dtype=torch.float64) / steps.shape[1]
    there = steps != -torch.inf
    weights = torch.where(there, (number("steepness", steepness, x, check.finite) * (place - 0.5)).sigmoid(), 0.0)
    process = (weights * torch.where(there, steps, 0.0)).sum(-1) / weights.sum(-1)
    right = group_statistics(outcome, groups, ("max",))["max"] > 0
    reward = torch.where(right, outcome, process.float())
    if well_formed is None:
        return reward
    formed = per_response("well_formed", well_formed, "gains", x) != 0
    return torch.where(formed, reward, number("malformed", malformed, x, check.finite))


# ------------------------------------------------------------------------------------------------- of the same response
@recipe(
    "SAR (self-aligned reward)",
    "arXiv 2509.05489",
    code="amazon-science efficiency_reward.py",
    passes=("alone_logprobs=alone_logprobs", "rewards=rewards"),
)
def sar(
    logprobs: Tensor,
    mask: Tensor | None = None,
    *,
    alone_logprobs: Tensor,
    rewards: Tensor | None = None,
    weight: Number = 0.2,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """R = rewards + weight max((ppl(a) - ppl(a|q)) / ppl(a), -1), ppl = exp(-mean l).

    A response that only makes sense behind its question is short and to the point.

    Args:
        logprobs: of the response behind its question, [B, T] or [N]; read as constants.
        mask: its shape; nonzero = a token of the response.
        alone_logprobs: of the same tokens without the question.
        rewards: [B], of the outcome; None: 0.
        weight: of the part that is the model's own.
        cu_seqlens: [B + 1], of packed responses.
    """
    given = token_values("logprobs", check.tensor("logprobs", logprobs).detach(), mask)
    alone = beside("alone_logprobs", alone_logprobs, "logprobs", given, mask)
    perplexity, perplexity_alone = (
        mean(-x, mask, "logprobs", cu_seqlens).nan_to_num(0.0).exp() for x in (given, alone)
    )
    fit = ((perplexity_alone - perplexity) / (perplexity_alone + 1e-9)).clamp(min=-1.0)
    fit = number("weight", weight, fit, check.finite) * fit
    return (fit if rewards is None else fit + per_response("rewards", rewards, "logprobs", fit)).float()


@recipe(
    "CDR (density ratio of a strong and a weak model)",
    "arXiv 2411.02481",
    code="reward_hub drsow.py",
    passes=("weak_logprobs=weak_logprobs",),
)
def cdr(
    strong_logprobs: Tensor,
    mask: Tensor | None = None,
    *,
    weak_logprobs: Tensor,
    per_token: bool = False,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """R = sum of lp_strong - lp_weak over the response, or its mean per token.

    Args:
        strong_logprobs: of the response, by the model that was aligned, [B, T] or [N].
        mask: its shape; nonzero = a token of the response that is no special one.
        weak_logprobs: by the other.
        per_token: the mean.
        cu_seqlens: [B + 1], of packed responses.
    """
    strong = token_values("strong_logprobs", strong_logprobs, mask)
    ratio = strong.double() - beside("weak_logprobs", weak_logprobs, "strong_logprobs", strong, mask)
    if check.flag("per_token", per_token):
        return mean(ratio, mask, "strong_logprobs", cu_seqlens).float()
    return total(ratio, "strong_logprobs", cu_seqlens).float()


# ------------------------------------------------------------------------------------------------------- of other texts
@recipe(
    "PromptEcho (the prompt's likelihood given the picture)",
    "arXiv 2604.12652",
    reconstructed="the abstract; whether it is a mean or a sum is our guess",
    passes=("prompt_mask",),
)
def prompt_echo(
    prompt_logprobs: Tensor,
    prompt_mask: Tensor | None = None,
    *,
    score: Score = "mean",
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """R = mean l of the prompt that a picture was made for, by a frozen model that reads the picture.

    Args:
        prompt_logprobs: of the prompt's tokens, [B, L] or [N].
        prompt_mask: its shape; nonzero = a token of the prompt.
        score: as in `recipes.likelihood_reward`.
        cu_seqlens: [B + 1], of packed prompts.
    """
    return likelihood("prompt_logprobs", prompt_logprobs, prompt_mask, score, cu_seqlens, "prompt_mask").float()


@recipe(
    "FLR (follow-up likelihood as reward)",
    "FLR, github.com/e0397123/FLR",
    code="e0397123/FLR run_llama3.py, which reads logits at one position",
)
def flr(positive: Tensor, negative: Tensor) -> Tensor:
    """R = mean over the positive follow-ups - mean over the negative, of their log-likelihoods.

    Args:
        positive: [B, P], the log-likelihood of each positive follow-up behind the response: sums of
            `recipes.likelihood_reward`, say. The code takes one token of each at one position: there id_logprobs of
            `fastreward.token_logprobs` and raw logits give the same reward.
        negative: [B, N], of the negative ones.
    """
    sides = [_follow_ups(name, x) for name, x in (("positive", positive), ("negative", negative))]
    check.shape("negative", sides[1][:, 0], sides[0].shape[:1], "a row for each of positive")
    check.same_device("negative", sides[1], "positive", sides[0])
    return (sides[0].mean(-1) - sides[1].mean(-1)).float()


def _follow_ups(name: str, x: Tensor) -> Tensor:
    x = check.constant(name, check.floats(name, x))
    if x.ndim != 2 or not x.shape[1]:
        raise ValueError(f"{name}: expected shape [B, K] with K > 0 follow-ups, got {list(x.shape)}")
    if check.values_checked(x):
        check.every(name, x.isfinite(), x, "finite numbers")
    return x.double()


@recipe(
    "RLPT (reinforcement learning on pre-training data)",
    "arXiv 2509.19249",
    reconstructed="the abstract: a judge says whether the predicted segment begins the text's; how is our guess",
)
def rlpt(verdict_logprobs: Tensor, *, soft: bool = False) -> Tensor:
    """R = 1[lp_yes > lp_no], of a judge that is asked whether the next segment was predicted; or the share of yes.

    Args:
        verdict_logprobs: [B, 2], of the judge's tokens for yes and no (id_logprobs of `fastreward.token_logprobs`).
        soft: p_yes / (p_yes + p_no).
    """
    x = _follow_ups("verdict_logprobs", verdict_logprobs)
    check.shape("verdict_logprobs", x, (x.shape[0], 2), "yes and no")
    margin = x[:, 0] - x[:, 1]
    return margin.sigmoid().float() if check.flag("soft", soft) else (margin > 0).float()

"""Rewards from what a model's distribution says of itself, and of a judge's or a value model's.

Every input is an output of one `fastreward.token_logprobs` pass: logsumexp, mean_logit, label_logit, entropy, and
id_logprobs for a few tokens at one position. Recipes take tensors of tokens, [B, T] or packed [N] with cu_seqlens, and
return constants: rewards [B] float32 unless they say so. A response without a token is not scored: NaN.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastreward._arguments import check
from fastreward._arguments.groups import GroupIds, Groups
from fastreward._arguments.numbers import Number, number
from fastreward._arguments.tokens import broadcast_to_tokens
from fastreward.group import group_advantages
from fastreward.group_statistics import group_statistics
from fastreward.recipes._catalogue.registry import recipe
from fastreward.recipes._shared.groups import prompts
from fastreward.recipes._shared.tokens import Score, beside, likelihood, mean, per_response, token_values, total

__all__ = [
    "endogenous", "intuitor", "laser_advantages", "laser_score", "majority_vote", "negative_entropy", "oprm",
    "oprm_win_rate", "own_likelihood", "shop_r1", "value_augmented", "zip_rc",
]  # fmt: skip


# ------------------------------------------------------------------------------------------- of the model's own tokens
@recipe(
    "Intuitor (self-certainty)",
    "arXiv 2505.19590",
    code="sunblaze-ucb/Intuitor torch_functional.py",
)
def intuitor(
    logsumexp: Tensor, mean_logit: Tensor, mask: Tensor | None = None, *, cu_seqlens: Tensor | None = None
) -> Tensor:
    """R = mean of logsumexp(z) - mean(z) over the response: KL(uniform || p) + log V per token.

    The KL of the other direction is in `recipes.shop_r1`. Trained with GRPO.

    Args:
        logsumexp, mean_logit: outputs of `fastreward.token_logprobs`, [B, T] or [N].
        mask: their shape; nonzero = a token of the response.
        cu_seqlens: [B + 1], of packed responses.
    """
    upper = token_values("logsumexp", logsumexp, mask)
    certainty = upper.double() - beside("mean_logit", mean_logit, "logsumexp", upper, mask)
    return mean(certainty, mask, "logsumexp", cu_seqlens).float()


@recipe(
    "Shop-R1's self-certainty",
    "arXiv 2507.17842",
    note="notes on the paper",
    settings={"vocab_size": 32000},
)
def shop_r1(
    entropy: Tensor,
    mask: Tensor | None = None,
    *,
    vocab_size: int,
    rewards: Tensor | None = None,
    alpha: Number = 0.005,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """R = rewards + alpha mean of log V - H over the rationale: KL(p || uniform) per token.

    The KL of the other direction is `recipes.intuitor`. The method's KL to the reference has the coefficient 0.001.

    Args:
        entropy: an output of `fastreward.token_logprobs`, [B, T] or [N].
        mask: its shape; nonzero = a token of the rationale.
        vocab_size: V.
        rewards: [B], of the action; None: 0.
        alpha: of the certainty.
        cu_seqlens: [B + 1], of packed responses.
    """
    uniform = math.log(check.positive("vocab_size", vocab_size))
    certainty = uniform - mean(token_values("entropy", entropy, mask), mask, "entropy", cu_seqlens)
    certainty = number("alpha", alpha, certainty, check.finite) * certainty
    return (
        certainty if rewards is None else certainty + per_response("rewards", rewards, "entropy", certainty)
    ).float()


@recipe(
    "Token entropy as a reward (URLVR's intrinsic family)",
    "arXiv 2603.08660",
    note="notes on the paper",
)
def negative_entropy(entropy: Tensor, mask: Tensor | None = None, *, cu_seqlens: Tensor | None = None) -> Tensor:
    """R = -mean H over the response.

    Args:
        entropy: an output of `fastreward.token_logprobs`, [B, T] or [N].
        mask: its shape; nonzero = a token of the response.
        cu_seqlens: [B + 1], of packed responses.
    """
    return -mean(token_values("entropy", entropy, mask), mask, "entropy", cu_seqlens).float()


@recipe(
    "A rollout's own likelihood as its reward (URLVR's intrinsic family)",
    "arXiv 2603.08660",
    note="notes on the paper",
)
def own_likelihood(
    old_logprobs: Tensor,
    mask: Tensor | None = None,
    *,
    score: Score = "mean",
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """R = mean lp of the response that was sampled; or its sum, exp(sum lp), exp(mean lp).

    The family's others are `recipes.intuitor` and `recipes.negative_entropy`.

    Args:
        old_logprobs: of the policy that sampled, [B, T] or [N].
        mask: its shape; nonzero = a token of the response.
        score: "mean", "sum", "prob", "geometric", exp(mean lp), or "mean-prob".
        cu_seqlens: [B + 1], of packed responses.
    """
    return likelihood("old_logprobs", old_logprobs, mask, score, cu_seqlens).float()


@recipe(
    "Majority vote (URLVR's intrinsic family, TTRL)",
    "arXiv 2603.08660",
    note="notes on the paper",
    passes=("group_ids",),
)
def majority_vote(answers: GroupIds, group_ids: GroupIds | None = None, *, group_size: int | None = None) -> Tensor:
    """R = 1 for the answer that most responses of the group have, the first of several; 0 for the others.

    Args:
        answers: [B], integers or any hashables (strings), equal where the answers are; -1 or None: no answer.
        group_ids, group_size: as in `fastreward.group_advantages`.
    """
    index = Groups.by(answers).index
    groups = prompts(group_ids, group_size, len(index))
    there = index >= 0
    place = torch.arange(len(index), device=index.device)
    votes, first = group_statistics(place, Groups.by(groups, index), ("count", "min")).values()
    most = there & (votes == group_statistics(votes, groups, ("max",))["max"])
    winner = group_statistics(first.where(most, torch.nan), groups, ("min",))["min"]
    return (most & (first == winner)).float()


@recipe(
    "Endogenous reward (the reward that a language model's logits are)",
    "arXiv 2506.23235",
    note="notes on the paper, equations 10 to 12",
    returns="token rewards",
)
def endogenous(
    label_logit: Tensor,
    logsumexp: Tensor,
    mask: Tensor | None = None,
    *,
    final: Tensor | None = None,
    alpha: Number = 1.0,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """r_t = alpha (z_t - V_{t+1}), z the label's logit over alpha, V logsumexp: alpha lp + alpha (V_t - V_{t+1}).

    Logits as Q values, by the inverse soft Bellman operator. The sum telescopes to alpha (sum lp + V_1 - V_end).

    Args:
        label_logit, logsumexp: outputs of `fastreward.token_logprobs(..., temperature=alpha)`, [B, T] or [N].
        mask: their shape; nonzero = a token of the response; the next token is the next one that counts.
        final: [B], V behind the last token; None: 0, the response is over.
        alpha: the temperature, which the two outputs have been divided by.
        cu_seqlens: [B + 1], of packed responses.
    """
    value = token_values("logsumexp", logsumexp, mask)
    taken = beside("label_logit", label_logit, "logsumexp", value, mask)
    end = total(torch.zeros_like(value), "logsumexp", cu_seqlens)
    end = end if final is None else per_response("final", final, "logsumexp", end)
    following = _of_next_token(value, mask, end.float(), cu_seqlens)
    rewards = number("alpha", alpha, value, check.positive) * (taken - following)
    return rewards if mask is None else torch.where(mask != 0, rewards, 0.0)


def _of_next_token(x: Tensor, mask: Tensor | None, end: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """In the shape of x: its value at the next token that counts; `end` [B] behind the last."""
    places = torch.arange(x.numel(), device=x.device)
    counted = places if mask is None else torch.where(mask.flatten() != 0, places, x.numel())
    after = torch.nn.functional.pad(counted, (0, 1), value=x.numel())[1:].flip(0).cummin(0).values.flip(0)
    bounds = torch.arange(1, x.shape[0] + 1, device=x.device) * x.shape[-1] if cu_seqlens is None else cu_seqlens[1:]
    last = broadcast_to_tokens(bounds, x.shape, cu_seqlens)
    value = torch.nn.functional.pad(x.flatten(), (0, 1))[after].view(x.shape)
    return torch.where(after.view(x.shape) < last, value, broadcast_to_tokens(end, x.shape, cu_seqlens))


# ------------------------------------------------------------------------------------------ of some tokens at one place
@recipe(
    "OPRM (ordinal probabilistic reward model)",
    "arXiv 2602.12660",
    note="notes on the paper",
)
def oprm(rating_logprobs: Tensor, *, ratings: Tensor | None = None) -> Tensor:
    """R = sum of s p(s), p the softmax over the rating tokens "1", ..., "9" alone.

    Args:
        rating_logprobs: [B, K], of the rating tokens behind the response: id_logprobs of `fastreward.token_logprobs`,
            or their logits.
        ratings: [K], what they stand for; None: 1, ..., K.
    """
    x = _ids("rating_logprobs", rating_logprobs, 2)
    values = torch.arange(1, x.shape[1] + 1, device=x.device) if ratings is None else _bins("ratings", ratings, x, 1)
    return (x.softmax(-1) * values).sum(-1).float()


@recipe(
    "OPRM's comparison of two responses",
    "arXiv 2602.12660",
    reconstructed="notes on the paper; that ties count half is our guess",
    passes=("other_logprobs=other_logprobs",),
)
def oprm_win_rate(rating_logprobs: Tensor, *, other_logprobs: Tensor, ties: Number = 0.5) -> Tensor:
    """P = sum of p(s) p_other(r) over s > r, + ties times that over s = r: how likely a response has the higher rating.

    The reward model is trained with -log P of the chosen response over the rejected one.

    Args:
        rating_logprobs: [B, K], of the rating tokens behind each response, as of `recipes.oprm`.
        other_logprobs: [B, K], behind the other response.
        ties: what an equal rating counts.
    """
    x, y = _ids("rating_logprobs", rating_logprobs, 2), _ids("other_logprobs", other_logprobs, 2)
    check.shape("other_logprobs", y, x.shape, "as rating_logprobs")
    check.same_device("other_logprobs", y, "rating_logprobs", x)
    p, q = x.softmax(-1), y.softmax(-1)
    below = q.cumsum(-1) - q
    return (p * (below + number("ties", ties, q, check.not_negative) * q)).sum(-1).float()


@recipe(
    "ZIP-RC's utility (value and remaining length, read off reserved tokens)",
    "arXiv 2512.01457",
    note="notes on a third party's implementation; what the length costs is ours",
    passes=("values=values", "lengths=lengths"),
)
def zip_rc(bin_logprobs: Tensor, *, values: Tensor, lengths: Tensor | None = None, cost: Number = 0.0) -> Tensor:
    """R = E[value] - cost E[length], of the joint softmax over the reserved tokens, one for each pair of bins.

    Args:
        bin_logprobs: [B, values, lengths], of the reserved tokens at one position: id_logprobs of
            `fastreward.token_logprobs`, or their logits; kept_tokens there keeps them out of sampling.
        values: [values], of each bin.
        lengths: [lengths], tokens that remain, of each bin; needed where they cost something.
        cost: per token.
    """
    x = _ids("bin_logprobs", bin_logprobs, 3)
    joint = x.flatten(1).softmax(-1).view(x.shape)
    value = (joint.sum(2) * _bins("values", values, x, 1)).sum(-1)
    if lengths is None:
        return value.float()
    length = (joint.sum(1) * _bins("lengths", lengths, x, 2)).sum(-1)
    return (value - number("cost", cost, value, check.finite) * length).float()


def _ids(name: str, x: Tensor, ndim: int) -> Tensor:
    x = check.constant(name, check.floats(name, x))
    if x.ndim != ndim or 0 in x.shape[1:]:
        raise ValueError(f"{name}: expected {ndim} dimensions, a row of tokens for each response, got {list(x.shape)}")
    if check.values_checked(x):
        check.every(name, x.isfinite(), x, "finite numbers")
    return x.double()


def _bins(name: str, values: Tensor, like: Tensor, dim: int) -> Tensor:
    values = check.constant(name, check.reals(name, values))
    check.shape(name, values, like.shape[dim : dim + 1], "one per token")
    check.same_device(name, values, "their log-probs", like)
    if check.values_checked(values):
        check.every(name, values.isfinite(), values, "finite numbers")
    return values.double()


@recipe(
    "LaSeR's score (last-token self-rewarding)",
    "arXiv 2510.14943",
    code="RUCBM/LaSeR dp_actor.py",
)
def laser_score(
    score_logprobs: Tensor,
    *,
    ref_score_logprobs: Tensor | None = None,
    beta: Number = 0.1,
    temperature: Number = 1.0,
    constant: Number = -23.0,
) -> Tensor:
    """R = beta (temperature lp - constant), lp of a fixed token behind the end of the response.

    1 for right, 0 for wrong, once `recipes.laser` has trained it; above 0.5 a response counts as right.

    Args:
        score_logprobs: [B], of that token; read as constants.
        ref_score_logprobs: [B], by the reference: temperature times these in the constant's place.
        beta: as in `recipes.laser`.
        temperature: of sampling, which the log-probs have been divided by.
        constant: what the reference gives the token, about.
    """
    score = check.floats("score_logprobs", score_logprobs).detach()
    temperature = number("temperature", temperature, score, check.positive)
    score = temperature * per_response("score_logprobs", score, "the call", score)
    if ref_score_logprobs is None:
        score = score - number("constant", constant, score, check.finite)
    else:
        score = score - temperature * per_response("ref_score_logprobs", ref_score_logprobs, "score_logprobs", score)
    return (number("beta", beta, score, check.finite) * score).float()


@recipe(
    "LaSeR's advantages (last-token self-rewarding)",
    "arXiv 2510.14943",
    code="RUCBM/LaSeR ray_trainer.py",
    returns="response advantages",
    passes=("group_ids",),
)
def laser_advantages(
    advantages: Tensor,
    scores: Tensor,
    group_ids: GroupIds | None = None,
    *,
    group_size: int | None = None,
    weight: Number = 0.1,
    min_std: Number = 0.1,
    ddof: int = 1,
) -> Tensor:
    """A = (1 - weight) A + weight (s - mean s) / std s, s = clip(score, 0, 1), where a group's std is above min_std.

    The method mixes them after its first 200 steps.

    Args:
        advantages: [B], GRPO's.
        scores: [B], `recipes.laser_score`; 0 for a response that was cut off.
        group_ids, group_size: as in `fastreward.group_advantages`.
        weight, min_std: as in the formula.
        ddof: of the std.
    """
    base = per_response("advantages", advantages, "the call", advantages)
    clipped = per_response("scores", scores, "advantages", base).clamp(0.0, 1.0)
    std = group_statistics(clipped, group_ids, ("std",), group_size=group_size, ddof=ddof)["std"]
    own = group_advantages(clipped, group_ids, group_size=group_size, ddof=ddof, eps=0.0)
    weight = number("weight", weight, base, check.finite)
    spread = std > number("min_std", min_std, base, check.not_negative)
    return torch.where(spread, base + weight * (own - base), base)


# ------------------------------------------------------------------------------------------------------ while sampling
@recipe(
    "VAS (value-augmented sampling)",
    "arXiv 2405.06639",
    code="idanshen/Value-Augmented-Sampling vas_trainer.py",
    returns="logits",
    passes=("token_ids=token_ids",),
)
def value_augmented(logits: Tensor, values: Tensor, *, token_ids: Tensor, beta: Number = 3.0) -> Tensor:
    """z[k] + beta (V(k) - mean V over the k) for a row's likeliest tokens; other logits stay.

    Args:
        logits: [..., V], of the base model at the next token.
        values: [..., k], of the text with each of these tokens behind it.
        token_ids: integers [..., k] in [0, V), unique in a row: the 20 likeliest, in the code.
        beta: how much the values steer.

    Returns:
        float32 [..., V].
    """
    steered = check.constant("logits", check.floats("logits", logits))
    values = check.constant("values", check.floats("values", values))
    check.integers("token_ids", token_ids)
    check.shape("values", values, (*steered.shape[:-1], *token_ids.shape[-1:]), "one per token id")
    check.shape("token_ids", token_ids, values.shape, "as values")
    if check.values_checked(token_ids):
        check.every("values", values.isfinite(), values, "finite numbers")
        inside = (token_ids >= 0) & (token_ids < steered.shape[-1])
        check.every("token_ids", inside, token_ids, f"ids in [0, {steered.shape[-1]})")
    gain = number("beta", beta, values, check.finite) * (values - values.mean(-1, keepdim=True))
    return steered.scatter_add(-1, token_ids.long().clamp(0, steered.shape[-1] - 1), gain.float())

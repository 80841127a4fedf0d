"""Rewards that depend on the rest of the group, and rewards made of several, before GRPO: [B].

R = rewards [B], NaN where a response was not scored: it counts in nothing and gets 0. group_ids or group_size says
which responses are to the same prompt, as in `fastreward.group_advantages`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastreward._arguments import check
from fastreward._arguments.groups import GroupIds, Groups
from fastreward._arguments.numbers import Number, number
from fastreward.group import group_advantages
from fastreward.group_statistics import group_statistics
from fastreward.recipes._catalogue.registry import recipe
from fastreward.recipes._shared.groups import beside_rewards, finite_or_nan, given, of_responses, prompts, truths
from fastreward.recipes._shared.tokens import likelihood
from fastreward.recipes.confidence import majority_vote
from fastreward.rewards import denoise

__all__ = ["armed", "co_reward", "csr", "fapo", "noise_correction", "trust_grpo", "unlikeliness"]


# ------------------------------------------------------------------------------------------------------ right and wrong
@recipe(
    "Trust-GRPO (SophiaVL-R1)",
    "arXiv 2505.17018",
    code="kxfan2002/SophiaVL-R1 verl/workers/reward/custom.py",
    passes=("group_ids",),
)
def trust_grpo(
    rewards: Tensor,
    thinking_rewards: Tensor,
    group_ids: GroupIds | None = None,
    *,
    group_size: int | None = None,
    step: int = 0,
    steps: float = 500.0,
    weight: float = 0.3,
    eps: Number = 1e-6,
) -> Tensor:
    """A = (S - mean) / (std + eps), S = R + weight e^(-step / steps) g R_think, g = min(1, exp(mu_right - mu_wrong)).

    mu = mean of R_think over the group's right (R >= 0.5) and wrong responses: a judge that likes wrong answers better
    is not trusted. Without a right one g = 1. R_think is 0 where R < 0.2, and in a group whose R are all at least 0.9
    or all at most 0.1.

    Args:
        rewards: [B], of the answers, in [0, 1].
        thinking_rewards: [B], of the thinking, in [0, 1].
        group_ids, group_size: as in `fastreward.group_advantages`.
        step, steps, weight, eps: as in the formulas.
    """
    scored = given("rewards", rewards)
    groups = prompts(group_ids, group_size, len(scored))
    bounds = group_statistics(scored, groups, ("min", "max"))
    decided = (bounds["min"] >= 0.9) | (bounds["max"] <= 0.1)
    think = torch.where(decided | (scored < 0.2), 0.0, beside_rewards("thinking_rewards", thinking_rewards, scored))
    right = scored >= 0.5
    mu_right = group_statistics(think.where(right, torch.nan), groups, ("mean",))["mean"]
    mu_wrong = group_statistics(think.where(scored < 0.5, torch.nan), groups, ("mean",))["mean"]
    trust = (mu_right - mu_wrong.nan_to_num(0.0)).clamp(max=0.0).exp().nan_to_num(1.0)
    left = math.exp(-check.not_negative("step", step) / check.positive("steps", steps))
    total = scored + check.not_negative("weight", weight) * left * trust * think
    return group_advantages(total, groups, eps=eps)


@recipe(
    "Rewarding the unlikely",
    "arXiv 2506.02355",
    code="AndreHe02/rewarding-unlikely-release ray_lean_trainer.py",
    passes=("group_ids",),
)
def unlikeliness(
    old_logprobs: Tensor,
    mask: Tensor | None,
    rewards: Tensor,
    group_ids: GroupIds | None = None,
    *,
    group_size: int | None = None,
    weight: Number = 0.25,
    cu_seqlens: Tensor | None = None,
    eps: Number = 1e-6,
) -> Tensor:
    """A = (S - mean) / (std + eps), S = R (1 - weight u), u = rank / n of the mean log-prob, 0 of the least likely.

    Args:
        old_logprobs: [B, T], or [N] with cu_seqlens, of the policy that sampled.
        mask: its shape; nonzero = a token of the response.
        rewards: [B].
        group_ids, group_size: as in `fastreward.group_advantages`.
        weight, eps: as in the formula.
        cu_seqlens: [B + 1], of packed responses.
    """
    scored = given("rewards", rewards)
    mean = likelihood("old_logprobs", old_logprobs, mask, "mean", cu_seqlens)
    check.shape("rewards", scored, mean.shape, "one per response")
    groups = prompts(group_ids, group_size, len(scored))
    found = group_statistics(torch.where(scored.isnan(), torch.nan, mean), groups, ("rank",), ties="ordinal")
    count = group_statistics(scored, groups, ("count",))["count"]
    unlikely = (found["rank"] / count).nan_to_num(0.0)
    return group_advantages(scored * (1 - number("weight", weight, scored, check.finite) * unlikely), groups, eps=eps)


@recipe(
    "FAPO (flawed-aware policy optimization)",
    "arXiv 2510.22543",
    code="verl-recipe fapo/reward_fn_reasoning.py",
    passes=("group_ids",),
)
def fapo(
    rewards: Tensor,
    flawed: Tensor,
    group_ids: GroupIds | None = None,
    *,
    group_size: int | None = None,
    penalty: Number = 1.0,
    eps: Number = 1e-6,
) -> Tensor:
    """A = (S - mean) / (std + eps), S = -1 if wrong, 1 if right, 1 - penalty if right by a flawed way.

    Args:
        rewards: [B], right where above 0.
        flawed: [B], nonzero = a generative reward model found a mistake on the way.
        group_ids, group_size: as in `fastreward.group_advantages`.
        penalty, eps: as in the formula.
    """
    scored = given("rewards", rewards)
    less = truths("flawed", flawed, scored) * number("penalty", penalty, scored, check.not_negative)
    s = torch.where(scored > 0, 1.0 - less, -1.0)
    return group_advantages(torch.where(scored.isnan(), torch.nan, s), group_ids, group_size=group_size, eps=eps)


@recipe(
    "Correction of a noisy verifier",
    "arXiv 2510.00915",
    paper="the abstract; the weights of the forward form are derived",
    passes=("group_ids",),
    settings={"false_positive": 0.1, "false_negative": 0.2},
)
def noise_correction(
    rewards: Tensor,
    group_ids: GroupIds | None = None,
    *,
    false_positive: Number | Tensor,
    false_negative: Number | Tensor,
    forward: bool = False,
    group_size: int | None = None,
) -> Tensor:
    """A = S - mean, S = (R - fp) / (1 - fp - fn) (backward), or R - (1 - fn) (forward).

    Backward, S has the true reward for its expectation; forward, the gradient has the right direction and fp is not
    needed. Never divided by the std, which would undo it.

    Args:
        rewards: [B], of the verifier, 1 or 0.
        group_ids, group_size: as in `fastreward.group_advantages`.
        false_positive, false_negative: fp = P(R = 1 | wrong), fn = P(R = 0 | right), numbers or [B], of each prompt.
        forward: which of the two.
    """
    clean = denoise(
        given("rewards", rewards),
        false_positive=false_positive,
        false_negative=false_negative,
        method="forward" if check.flag("forward", forward) else "backward",
    )
    return group_advantages(clean, group_ids, group_size=group_size, scale="none")


@recipe(
    "Co-rewarding (the majority answer of the rephrased question)",
    "arXiv 2508.00410",
    code="tmlr-group/Co-rewarding co_reward.py",
    returns="rewards",
)
def co_reward(answers: GroupIds, group_ids: GroupIds, partner_ids: GroupIds) -> Tensor:
    """R = 1 for the answer that most responses to the other form of the question have, 0 for the others.

    Args:
        answers: [B], integers or any hashables, equal where the answers are; -1 or None: no answer.
        group_ids: [B], the form of the question.
        partner_ids: [B], its other form, as it is called in group_ids; where nothing has been sampled for that, 0.
    """
    answer = Groups.by(answers).index
    count = len(answer)
    forms = Groups(_joined(group_ids, partner_ids)).index.to(answer.device)
    check.shape("group_ids, partner_ids", forms, (2 * count,), "one per answer each")
    own, partner = forms[:count], forms[count:]
    won = majority_vote(answers, group_ids) > 0
    label = torch.full((2 * count,), -1, dtype=torch.int64, device=answer.device)
    label.scatter_reduce_(0, own, torch.where(won, answer, -1), "amax")
    return ((answer >= 0) & (answer == label[partner])).float()


def _joined(first: GroupIds, second: GroupIds) -> GroupIds:
    if isinstance(first, Tensor) and isinstance(second, Tensor):
        return torch.cat([first.long(), second.to(first.device).long()])
    if isinstance(first, Groups) or isinstance(second, Groups):
        raise TypeError("group_ids, partner_ids: expected ids that name the same forms, got Groups")
    for name, ids in (("group_ids", first), ("partner_ids", second)):
        if not isinstance(ids, Tensor) and (isinstance(ids, str) or not hasattr(ids, "__iter__")):
            raise TypeError(f"{name}: expected integers [B] or a sequence of hashables, got {ids!r}")
    return [*first, *second]


# ------------------------------------------------------------------------------------------------------ several rewards
@recipe(
    "ARMed (adaptive semantic rewards)",
    "arXiv 2508.12957",
    reconstructed="the abstract",
    passes=("group_ids",),
)
def armed(
    rewards: Tensor,
    semantic_rewards: Tensor,
    group_ids: GroupIds | None = None,
    *,
    group_size: int | None = None,
    weight: Number = 1.0,
    min_range: Number = 0.01,
    eps: Number = 1e-6,
) -> Tensor:
    """A = (S - mean) / (std + eps), S = R + weight (s - s_min) / (s_max - s_min), over the group.

    Semantic scores of different answers lie close together ("reward collapse") and would not tell them apart: they are
    stretched over [0, 1], unless they are nearer than min_range, where all get 0.

    Args:
        rewards: [B], whether the text is right.
        semantic_rewards: s [B], of a model that compares meanings; NaN counts as 0 after stretching.
        group_ids, group_size: as in `fastreward.group_advantages`.
        weight, min_range, eps: as in the formula; none is the paper's.
    """
    scored = given("rewards", rewards)
    groups = prompts(group_ids, group_size, len(scored))
    s = torch.where(scored.isnan(), torch.nan, beside_rewards("semantic_rewards", semantic_rewards, scored))
    found = group_statistics(s, groups, ("min", "max"))
    span = found["max"] - found["min"]
    apart = span >= number("min_range", min_range, scored, check.positive)
    stretched = torch.where(apart, (s - found["min"]) / span, 0.0).nan_to_num(0.0)
    total = scored + number("weight", weight, scored, check.finite) * stretched
    return group_advantages(total, groups, eps=eps)


@recipe(
    "CSR (calibrated self-rewarding)",
    "arXiv 2405.14622",
    code="YiyangZhou/CSR inference_csr/construct.py, utils.py",
    returns="rewards",
)
def csr(image_scores: Tensor, text_scores: Tensor, *, image_weight: Number = 0.9) -> Tensor:
    """R = mean over the sentences of image_weight r_image + (1 - image_weight) r_text.

    The best and the worst response to a prompt become a pair for DPO. NaN without a sentence.

    Args:
        image_scores, text_scores: [B, S], of each sentence: how well it fits the picture (CLIP), and its likelihood;
            NaN = no sentence. The code takes for both 1 - place / n among the n sentences that were sampled at that
            point of the beam, 1 the first place, and adds one to the sentences that it divides by: for the prompt.
        image_weight: as in the formula.
    """
    image = of_responses("image_scores", image_scores).double()
    text = finite_or_nan("text_scores", text_scores)
    check.shape("text_scores", text, image_scores.shape, "as image_scores")
    check.same_device("text_scores", text, "image_scores", image)
    share = number("image_weight", image_weight, image, check.not_negative)
    return (share * image + (1 - share) * text.view(image.shape)).nanmean(-1).float()

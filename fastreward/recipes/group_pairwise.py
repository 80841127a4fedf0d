"""Advantages and rewards from comparisons of responses, which a judge makes: [B].

A comparison's result is 1 for the response, 0 against it, 0.5 for a tie; NaN = none was made. Where a method has
differences instead, positive is for the response. group_ids or group_size says which responses are to the same prompt,
as in `fastreward.group_advantages`.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from fastreward._arguments import check
from fastreward._arguments.groups import GroupIds
from fastreward._arguments.numbers import Number, number
from fastreward.group import group_advantages
from fastreward.group_statistics import group_statistics
from fastreward.recipes._catalogue.registry import recipe
from fastreward.recipes._shared.groups import beside_rewards, finite_or_nan, of_responses, prompts, sums, truths

__all__ = ["arena_rl", "brpo", "heron", "openrs", "pref_grpo", "think_rm"]

Tournament = Literal["round-robin", "anchor", "swiss", "elimination"]


@recipe(
    "ArenaRL (places in a tournament)",
    "arXiv 2601.06487",
    code="Alibaba-NLP/qqr qqr/reward_models/arena",
    passes=("group_ids",),
)
def arena_rl(
    wins: Tensor,
    group_ids: GroupIds | None = None,
    *,
    group_size: int | None = None,
    tournament: Tournament = "round-robin",
    tie_breaks: Tensor | None = None,
    eps: Number = 1e-6,
) -> Tensor:
    """A = (S - mean) / (std + eps), S the place in the tournament, 1 for the first and 0 for the last.

    Args:
        wins: [B, M], results of comparisons, or [B], points, such as their sum or the scores against an anchor; for
            "elimination" what orders the responses. NaN = did not take part.
        group_ids, group_size: as in `fastreward.group_advantages`.
        tournament: "round-robin" and "anchor": S = (r_max - r) / (r_max - 1), r = 1 + responses with more points.
            "swiss" and "elimination": S = 1 - r / (n - 1), r = 0, 1, ..., its mean over those with equal points.
        tie_breaks: [B], order responses with equal points (of a Swiss tournament the sum of the opponents' points).
        eps: as in the formula.
    """
    check.choice("tournament", tournament, get_args(Tournament))
    points = sums(of_responses("wins", wins))
    groups = prompts(group_ids, group_size, len(points))
    if tie_breaks is not None:
        second = torch.where(points.isnan(), torch.nan, beside_rewards("tie_breaks", tie_breaks, points))
        found = group_statistics(points, groups, ("rank", "count"), ties="min")
        points = found["rank"] * found["count"] + group_statistics(second, groups, ("rank",), ties="min")["rank"]
    shared = tournament in ("round-robin", "anchor")
    place = group_statistics(points, groups, ("rank",), ties="max" if shared else "average")["rank"]
    found = group_statistics(place, groups, ("count", "min"))
    last = found["min"] if shared else 0.0
    others = found["count"] - 1 - last
    score = torch.where(others > 0, (place - last) / others, 0.0)
    return group_advantages(torch.where(place.isnan(), torch.nan, score), groups, eps=eps)


@recipe(
    "Pref-GRPO (win rates for rewards)",
    "arXiv 2508.20751",
    code="CodeGoat24/Pref-GRPO",
    passes=("group_ids",),
)
def pref_grpo(
    comparisons: Tensor,
    group_ids: GroupIds | None = None,
    *,
    group_size: int | None = None,
    rewards: Tensor | None = None,
    component_weights: Tensor | None = None,
    digits: int = 3,
    clip: float = 5.0,
    eps: Number = 1e-8,
) -> Tensor:
    """A = sum over components of w (R - mean) / (std + eps), within +-clip; R the win rate, then other rewards.

    Args:
        comparisons: [B, M], results; the win rate is their mean. [B]: win rates.
        group_ids, group_size: as in `fastreward.group_advantages`.
        rewards: [B, K], other components.
        component_weights: w [1 + K], default 1.
        digits: to which the win rate is rounded.
        clip, eps: as in the formula.
    """
    results = of_responses("comparisons", comparisons).double()
    rate = torch.round(results.nanmean(-1, keepdim=True), decimals=check.whole("digits", digits, "of the win rate"))
    if rewards is not None:
        others = of_responses("rewards", rewards)
        check.shape("rewards", others, (rate.shape[0], others.shape[1]), "[B, K]")
        check.same_device("rewards", others, "comparisons", rate)
        rate = torch.cat([rate, others.double()], -1)
    bound = check.positive("clip", clip)
    advantages = group_advantages(
        rate,
        group_ids,
        group_size=group_size,
        component_weights=component_weights,
        normalize="normalize-then-sum",
        eps=eps,
    )
    return advantages.clamp(-bound, bound)


@recipe(
    "Think-RM (differences for rewards)",
    "arXiv 2505.16265",
    code="IlgeeHong/Think-RM PairwiseRLHF core_algos.py `compute_grpo_difference_advantage`",
    passes=("group_ids",),
)
def think_rm(
    differences: Tensor,
    group_ids: GroupIds | None = None,
    *,
    group_size: int | None = None,
    eps: Number = 1e-6,
) -> Tensor:
    """A_i = mean over j of d_ij / sqrt(sum over the group of d^2 / (2 n (n - 1)) + eps), d_ij = how much i beats j.

    GRPO's advantage where d_ij = R_i - R_j, without a reward of its own for any response.

    Args:
        differences: [B, M], of each response against the others of its group, itself (0) or not; NaN = none. The judge
            gives -3 to 3, and is asked once for each pair: d_ji = -d_ij.
        group_ids, group_size: as in `fastreward.group_advantages`; n = its responses.
        eps: as in the formula.
    """
    d = of_responses("differences", differences).double()
    compared = ~d.isnan().all(-1)
    squares = torch.where(compared, d.square().nansum(-1), torch.nan)
    found = group_statistics(squares, prompts(group_ids, group_size, len(d)), ("count", "mean"))
    n, mean = found["count"].double(), found["mean"].double()
    floor = number("eps", eps, d, check.not_negative)
    spread = (mean / (2.0 * (n - 1.0).clamp(min=1.0)) + floor).sqrt()
    total = d.nansum(-1)
    return torch.where(compared & (n > 1) & (total != 0), total / n / spread, 0.0).float()


@recipe(
    "BRPO (bootstrapped relative policy optimization, Writing-Zero)",
    "arXiv 2506.00103",
    note="third-party notes and code",
)
def brpo(votes: Tensor, reference: Tensor) -> Tensor:
    """A = 1 where a response beats the reference response of its group in every vote, else -1; 0 of the reference.

    The reference is one of the group, drawn at random; nothing is normalised. That it gets 0 is reconstructed.

    Args:
        votes: [B] or [B, V], positive = for the response, against its group's reference; NaN = no vote. `openrs` in
            both orders gives two. Without any vote a response gets 0.
        reference: [B], nonzero = is its group's reference.
    """
    cast = of_responses("votes", votes)
    there = ~cast.isnan()
    won = ((cast > 0) | ~there).all(-1)
    judged = there.any(-1) & ~truths("reference", reference, cast)
    return torch.where(judged, torch.where(won, 1.0, -1.0), 0.0)


@recipe(
    "OpenRS (open rubric system)",
    "arXiv 2602.14069",
    code="Qwen-Applications/OpenRS tools.py `parse_pair_score`, evaluator.py; how it trains is not in it",
    returns="rewards",
)
def openrs(
    criteria: Tensor,
    criterion_weights: Tensor,
    critical: Tensor,
    *,
    verified: Tensor | None = None,
    eps: Number = 1e-6,
) -> Tensor:
    """R = sum of w d / (sum of w + eps) over the criteria that tell; of the critical ones their sum of d alone.

    A response against another, of its group for `brpo`: positive = better.

    Args:
        criteria: [B, K], d of each criterion, positive for the response; 0 and NaN: it does not tell them apart.
        criterion_weights: [K] or [B, K]; the rubrics have 5 (core), 2 (important) and 1 (highlight).
        critical: [K] or [B, K], nonzero = a fatal flaw, which overrides every other criterion.
        verified: [B], the difference of what can be verified; where it is not 0 it is R.
        eps: as in the formula.
    """
    d = finite_or_nan("criteria", criteria).double()
    if d.ndim != 2:
        raise ValueError(f"criteria: expected shape [B, K], got {list(d.shape)}")
    d = d.nan_to_num(0.0)
    w = torch.where(d != 0, _per_criterion("criterion_weights", criterion_weights, d).double(), 0.0)
    fatal = (_per_criterion("critical", critical, d) != 0) & (d != 0)
    w = torch.where(fatal, 0.0, w)
    score = (w * d).sum(-1) / (w.sum(-1) + number("eps", eps, d, check.positive))
    score = torch.where(fatal.any(-1), torch.where(fatal, d, 0.0).sum(-1), score)
    if verified is not None:
        check.shape("verified", check.tensor("verified", verified), d.shape[:1], "one per response")
        known = finite_or_nan("verified", verified).nan_to_num(0.0)
        score = torch.where(known != 0, known, score)
    return score.float()


def _per_criterion(name: str, x: Tensor, like: Tensor) -> Tensor:
    """[K] or [B, K] as [B, K]."""
    x = finite_or_nan(name, x)
    check.same_device(name, x, "criteria", like)
    if not check.shape_among(x, like.shape, like.shape[1:]):
        raise ValueError(f"{name}: expected shape {list(like.shape[1:])} or {list(like.shape)}, got {list(x.shape)}")
    return x.expand(like.shape)


@recipe(
    "HERON (hierarchical comparisons)",
    "arXiv 2309.02632",
    reconstructed="the abstract and a review: a decision tree over signals ranked by importance",
    returns="rewards",
    passes=("group_ids",),
)
def heron(
    signals: Tensor,
    group_ids: GroupIds | None = None,
    *,
    group_size: int | None = None,
    margins: Number | Tensor = 0.0,
) -> Tensor:
    """R = share of the group's others that it beats (ties: half): by the first signal that differs beyond its margin.

    No weights: a less important signal speaks only where the more important ones are silent. These comparisons are what
    the paper fits a reward model to.

    Args:
        signals: [B, K], the most important one first; NaN = not there, silent.
        group_ids, group_size: as in `fastreward.group_advantages`. A response alone gets 0.5.
        margins: a number or [K], at least 0.
    """
    x = of_responses("signals", signals).double()
    groups = prompts(group_ids, group_size, len(x))
    labels = torch.where(x.isnan().all(-1), -1, groups.index.to(x.device))  # -1: nobody to compare with
    bounds = _margins(margins, x)
    shares = [
        _share_beaten(x[begin : begin + 256], labels[begin : begin + 256], x, labels, bounds)
        for begin in range(0, len(x), 256)
    ]
    share = torch.cat(shares) if shares else x.new_zeros(0)
    return torch.where(labels < 0, torch.nan, share).float()


def _margins(margins: Number | Tensor, signals: Tensor) -> Tensor | float:
    if not isinstance(margins, Tensor) or margins.ndim == 0:
        return number("margins", margins, signals, check.not_negative)
    check.shape("margins", margins, signals.shape[1:], "one per signal")
    check.same_device("margins", margins, "signals", signals)
    margins = check.constant("margins", check.reals("margins", margins))
    if check.values_checked(margins):
        check.every("margins", margins >= 0, margins, "numbers >= 0")
    return margins.double()


def _share_beaten(rows: Tensor, row_labels: Tensor, x: Tensor, labels: Tensor, margins: Tensor | float) -> Tensor:
    """Of a few rows, against all of their groups: time B^2 K, memory B K for each of them."""
    gap = rows.unsqueeze(1) - x.unsqueeze(0)  # [rows, B, K]
    speaks = gap.abs() > margins
    first = speaks.long().argmax(-1, keepdim=True)
    decided = torch.where(speaks.any(-1), gap.gather(-1, first).squeeze(-1).sign(), 0.0)
    met = (row_labels.unsqueeze(1) == labels.unsqueeze(0)) & (row_labels >= 0).unsqueeze(1)
    others = met.sum(-1) - 1  # itself, a tie
    won = torch.where(met, (decided + 1) / 2, 0.0).sum(-1) - 0.5
    return torch.where(others > 0, won / others, 0.5)

"""Rewards that are shaped, gated and combined before they are advantages: compositions of `fastreward.rewards`.

R = rewards [B], R_k = components [B, K]. All take constants of any real dtype and return float32, [B]; NaN means "not
scored": such a component is left out where components are summed, multiplied or compared, and a response of which
nothing was scored is NaN.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastreward._arguments import check
from fastreward._arguments.groups import GroupIds
from fastreward._arguments.numbers import Number, number
from fastreward.group import group_advantages
from fastreward.recipes._catalogue.registry import recipe
from fastreward.recipes._shared.groups import finite_or_nan, given
from fastreward.rewards import (
    affine,
    combine,
    gate,
    logsigmoid,
    overlong,
    pareto_mask,
    priority_gate,
    sigmoid,
    standardize,
    tiers,
)

__all__ = [
    "carl", "chat_shop_buddy", "constrained_rlhf", "crf", "dapo_overlong", "lsc", "par", "parrot", "quark", "r3",
    "router_r1", "rubric", "sd_e2", "searchllm", "ssl_tiers", "toolrl", "uwo", "wco",
]  # fmt: skip


# ----------------------------------------------------------------------------------------------------- of reward models
@recipe("PAR (preference as reward)", "arXiv 2502.18770", code="PorUna-byte/PAR trainers/reward_shaper.py")
def par(rewards: Tensor, reference_rewards: Tensor, *, scale: Number = 1.0) -> Tensor:
    """R = mean over j of sigmoid(scale (R - R_ref,j)): how often a response beats those of the reference model.

    The code's length penalty is subtracted before: pass rewards less `fastreward.rewards.ramp` of the lengths.

    Args:
        rewards: [B], of the reward model.
        reference_rewards: [B, M], of M responses (the paper: 10) that the reference model gave to the same prompt.
        scale: as in the formula.
    """
    scores = _rewards("rewards", rewards)
    references = _components("reference_rewards", reference_rewards, scores)
    return combine(sigmoid(scores.unsqueeze(-1), references, scale), "mean").float()


@recipe(
    "LSC (log-sigmoid centred, summed)",
    "arXiv 2402.00742",
    code="PorUna-byte/PAR trainers/reward_shaper.py",
    passes=("mean=mean", "std=std"),
)
def lsc(
    components: Tensor,
    *,
    mean: Tensor | Number,
    std: Tensor | Number,
    quantile: float = 0.85,
    eps: float = 1e-5,
) -> Tensor:
    """R = sum over k of logsigmoid(R_k - r_k), r_k the quantile of a normal distribution of mean and std + eps.

    "Transforming and Combining Rewards": below the reference a component counts in full, above it hardly more, so the
    sum asks for all of them at once.

    Args:
        components: [B, K], of the reward models.
        mean, std: [K] or numbers, of the reference model's rewards.
        quantile: the reference point of its rewards.
        eps: added to std.
    """
    scores = _components("components", components)
    z = float(torch.special.ndtri(torch.tensor(quantile, dtype=torch.float64)))
    center, deviation = _per_component("mean", mean, scores), _per_component("std", std, scores)
    return combine(logsigmoid(scores, center + z * (deviation + eps))).float()


@recipe(
    "WCO (worst-case optimisation over an ensemble)",
    "arXiv 2310.02743",
    code="tlc4418/llm_optimization ppo_reward_functions.py",
)
def wco(components: Tensor) -> Tensor:
    """R = min over k of R_k, of an ensemble of reward models.

    Args:
        components: [B, K].
    """
    return combine(_components("components", components), "min").float()


@recipe(
    "UWO (uncertainty-weighted optimisation over an ensemble)",
    "arXiv 2310.02743",
    code="tlc4418/llm_optimization ppo_reward_functions.py",
)
def uwo(components: Tensor, *, penalty: Number = 0.1, ddof: int = 1) -> Tensor:
    """R = mean over k of R_k - penalty * their variance.

    The paper's best-of-n has penalty=0.5 and ddof=0.

    Args:
        components: [B, K], of an ensemble of reward models.
        penalty: as in the formula.
        ddof: of the variance.
    """
    scores = _components("components", components)
    return combine(scores, "mean-minus-variance", penalty=penalty, ddof=ddof).float()


@recipe(
    "Reference-frozen normalisation (Quark Medical)",
    "arXiv 2602.11661",
    reconstructed="the abstract; the page's guess of the z-score",
    passes=("mean=mean", "std=std"),
)
def quark(
    components: Tensor,
    *,
    mean: Tensor | Number,
    std: Tensor | Number,
    weights: Sequence[float] | None = None,
    eps: Number = 1e-6,
) -> Tensor:
    """R = sum over k of w_k (R_k - mean_k) / (std_k + eps), with the statistics of a frozen reference policy.

    Args:
        components: [B, K].
        mean, std: [K] or numbers, of the reference policy's rewards, computed once.
        weights: [K]; None: 1.
        eps: as in the formula.
    """
    scores = _components("components", components)
    center, deviation = _per_component("mean", mean, scores), _per_component("std", std, scores)
    return combine(standardize(scores, center, deviation, eps), weights=weights).float()


# --------------------------------------------------------------------------------------------------- several objectives
@recipe(
    "Constrained RLHF",
    "arXiv 2310.04373",
    code="tedmoskovitz/ConstrainedRL4LMs constrained_ppo.py",
    returns="response advantages",
    passes=("multipliers=[0.3, 0.6]",),
)
def constrained_rlhf(
    rewards: Tensor, constrained: Tensor, *, multipliers: Sequence[float] | Tensor, eps: Number = 1e-8
) -> Tensor:
    """A = (K - sum mu) z(R) + sum over k of mu_k z(R_k), z: whitened over the batch.

    Args:
        rewards: [B], what is not constrained (the method's: less the KL).
        constrained: [B, K], each to be kept above (or at) its threshold.
        multipliers: mu [K]; `fastreward.rewards.LagrangeMultipliers` makes them (`.values`).
        eps: added to the standard deviation (ddof 1).
    """
    main = _rewards("rewards", rewards)
    others = _components("constrained", constrained, main)
    mu = torch.as_tensor(multipliers, dtype=torch.float64, device=main.device)
    check.shape("multipliers", mu, others.shape[1:], "one per constraint")
    weights = torch.cat([(len(mu) - mu.sum()).unsqueeze(0), mu])
    return group_advantages(
        torch.cat([main.unsqueeze(-1), others], -1),
        group_size=max(len(main), 1),
        component_weights=weights.float(),
        normalize="normalize-then-sum",
        eps=eps,
    )


@recipe(
    "SD-E2",
    "arXiv 2601.17982",
    reconstructed="the abstract; z-scores over the group are a guess",
    returns="response advantages",
    passes=("group_ids",),
)
def sd_e2(
    components: Tensor,
    group_ids: GroupIds | None = None,
    *,
    group_size: int | None = None,
    weights: Sequence[float] | None = None,
    eps: Number = 1e-6,
) -> Tensor:
    """A = sum over k of w_k z(R_k), z over the group: of correctness, efficiency and diversity.

    Args:
        components: [B, K], NaN = not scored.
        group_ids, group_size: as in `fastreward.group_advantages`.
        weights: [K]; None: 1.
        eps: added to the standard deviations.
    """
    return group_advantages(
        _components("components", components),
        group_ids,
        group_size=group_size,
        component_weights=weights,
        normalize="normalize-then-sum",
        eps=eps,
    )


@recipe("Parrot", "arXiv 2401.05675", reconstructed="the abstract")
def parrot(components: Tensor, *, weights: Sequence[float] | None = None) -> Tensor:
    """R = sum over k of w_k R_k of the responses that no other of the batch dominates, 0 of the others.

    Args:
        components: [B, K]; a response with a component that was not scored is dominated.
        weights: [K]; None: 1.
    """
    scores = _components("components", components)
    return torch.where(pareto_mask(scores), combine(scores, weights=weights), 0.0).float()


# ---------------------------------------------------------------------------------------------------------------- gates
@recipe(
    "SearchLLM's gate",
    "arXiv 2603.10473",
    note="third-party notes; the form of the smoothing is a guess",
)
def searchllm(
    bottom_line: Tensor, utilities: Tensor, *, weights: Sequence[float] | None = None, smoothing: Number = 0.01
) -> Tensor:
    """R = prod over k of (b_k + smoothing)^(1/K) * the weighted mean of the utilities: useful only if nothing fails.

    Args:
        bottom_line: b [B, K], in [0, 1]: what has to hold.
        utilities: [B, M].
        weights: [M]; None: 1.
        smoothing: how much is left where one of them fails.
    """
    floor = combine(_components("bottom_line", bottom_line), "geometric-mean", smoothing=smoothing)
    return (floor * combine(_components("utilities", utilities, floor), "mean", weights=weights)).float()


@recipe("CaRL", "arXiv 2504.17838", reconstructed="the abstract; the terminal penalty is from memory")
def carl(progress: Tensor, factors: Tensor, *, failed: Tensor | None = None, terminal_penalty: Number = 1.0) -> Tensor:
    """R = progress * prod over k of p_k, less terminal_penalty where the episode ended in a failure.

    Args:
        progress: [B], what has been achieved.
        factors: p [B, K], in [0, 1], each below 1 for a fault.
        failed: [B], nonzero = ended by a hard fault; None: none.
        terminal_penalty: as above.
    """
    achieved = _rewards("progress", progress)
    total = achieved * combine(_components("factors", factors, achieved), "product")
    if failed is not None:
        total = total + gate(
            torch.zeros_like(total), -_rewards("failed", failed, total), 0.0, otherwise=-terminal_penalty
        )
    return total.float()


@recipe(
    "ChatShopBuddy (hierarchical reward modeling)",
    "arXiv 2603.06065",
    reconstructed="the abstract: rewards behind conditional gates; their order, thresholds and sum are a guess",
)
def chat_shop_buddy(components: Tensor, *, thresholds: Number | Tensor | Sequence[float] = 0.5) -> Tensor:
    """R = sum over k of R_k where all R_j before it are above their thresholds: correct, then convincing, then thrifty.

    Args:
        components: [B, K], by falling importance: the product is right, the response is good, few tools were used.
        thresholds: a number or [K - 1]: what a component must exceed for those behind it to count.
    """
    x = _components("components", components)
    if not isinstance(thresholds, Sequence):
        bounds = _per_component("thresholds", thresholds, x[:, 1:])
        thresholds = torch.as_tensor(bounds, dtype=x.dtype, device=x.device).expand(x.shape[1] - 1)
    return torch.where(x.isnan().all(-1), torch.nan, combine(priority_gate(x, thresholds))).float()


@recipe("CRF (conciseness reward function)", "arXiv 2511.09158", note="third-party notes")
def crf(
    rewards: Tensor, conciseness: Tensor, difficulty: Tensor, *, alpha: Number = 1.0, annealed: Number = 1.0
) -> Tensor:
    """R = R_outcome (1 + alpha c (annealed + difficulty)): brevity counts where the answer is right.

    Args:
        rewards: R_outcome [B].
        conciseness: c [B], in [0.1, 1], of the conciseness reward model.
        difficulty: [B], of the prompt.
        alpha: as in the formula.
        annealed: falls during the run (`fastreward.rewards.anneal`).
    """
    outcome = _rewards("rewards", rewards)
    hard = affine(_rewards("difficulty", difficulty, outcome), 1.0, annealed)
    return (outcome * affine(_rewards("conciseness", conciseness, outcome) * hard, alpha, 1.0)).float()


@recipe(
    "Rubrics with veto and saturation",
    "common knowledge",
    reconstructed="what is commonly known",
    passes=("veto=veto",),
)
def rubric(
    components: Tensor,
    *,
    weights: Sequence[float] | None = None,
    veto: Tensor | None = None,
    saturation: float = 1.0,
) -> Tensor:
    """R = min(sum w R_k / sum w, saturation) / saturation, 0 where an item with a veto has failed.

    Args:
        components: [B, K], items in [0, 1].
        weights: [K]; None: 1.
        veto: bool [K]: items below 0.5 of which nothing else counts for.
        saturation: from which mean on the reward is 1: not every item has to hold.
    """
    scores = _components("components", components)
    mean = combine(scores, "mean", weights=weights)
    total = torch.where(mean > saturation, saturation, mean) / check.positive("saturation", saturation)
    if veto is None:
        return total.float()
    check.shape("veto", check.tensor("veto", veto), scores.shape[-1:], "one per item")
    failed = ((scores < 0.5) & (check.constant("veto", veto) != 0)).any(-1)
    return gate(total, -failed.double(), 0.0).float()


@recipe("ToolRL's scale", "arXiv 2504.13958", reconstructed="from memory of the paper's ranges")
def toolrl(format_rewards: Tensor, matches: Tensor, *, scale: Number = 3.0) -> Tensor:
    """R = format + scale (2 match - 1): in [-3, 4] with the paper's scale.

    Args:
        format_rewards: [B], 0 or 1.
        matches: [B], in [0, 1]: the share of tool names, parameters and values that are right.
        scale: of correctness beside the format.
    """
    formed = _rewards("format_rewards", format_rewards)
    return (formed + affine(affine(_rewards("matches", matches, formed), 2.0, -1.0), scale)).float()


@recipe("Router-R1", "arXiv 2506.09033", reconstructed="from memory: the hierarchy of format, outcome and cost")
def router_r1(format_rewards: Tensor, rewards: Tensor, costs: Tensor, *, alpha: Number = 0.6) -> Tensor:
    """R = format + (1 - alpha) R_outcome + alpha R_cost; the format's alone where that is below 0.

    Args:
        format_rewards: [B], -1 or 0.
        rewards: R_outcome [B].
        costs: R_cost [B], higher for cheaper models.
        alpha: how much the cost counts.
    """
    formed = _rewards("format_rewards", format_rewards)
    right, cheap = _rewards("rewards", rewards, formed), _rewards("costs", costs, formed)
    shares = affine(right, 1.0 - alpha) + affine(cheap, alpha)
    return (formed + gate(shares, formed, 0.0)).float()


@recipe("SSL (tiered rewards)", "arXiv 2601.22491", reconstructed="the abstract: tiers that increase")
def ssl_tiers(
    rewards: Tensor, *, bounds: Sequence[float] = (0.25, 0.5, 0.75), values: Sequence[float] = (0.0, 0.25, 0.5, 1.0)
) -> Tensor:
    """R = values[k] where bounds[k - 1] <= R < bounds[k].

    Args:
        rewards: [B], a score.
        bounds, values: as in `fastreward.rewards.tiers`.
    """
    return tiers(_rewards("rewards", rewards), bounds, values).float()


# -------------------------------------------------------------------------------------------------- length, repetition
@recipe(
    "DAPO's overlong reward shaping",
    "arXiv 2503.14476",
    code="TRL rewards/other_rewards.py, verl reward_manager/dapo.py",
)
def dapo_overlong(
    rewards: Tensor,
    lengths: Tensor,
    *,
    max_length: int = 20480,
    buffer: int = 4096,
    factor: Number = 1.0,
    floor: Number | None = -1.0,
) -> Tensor:
    """R = R + penalty: 0 up to max_length - buffer tokens, then falling to -factor at max_length (TRL: never below -1).

    Args:
        rewards: [B].
        lengths: [B], tokens of each response.
        max_length, buffer, factor: as in `fastreward.rewards.overlong`.
        floor: None: verl's, which goes on falling.
    """
    scores = _rewards("rewards", rewards)
    penalty = overlong(_rewards("lengths", lengths, scores), max_length, buffer, factor=factor, floor=floor)
    return (scores + penalty).float()


@recipe("R3 (rule-based proxy of a reward model)", "arXiv 2403.02469", note="third-party notes")
def r3(relevance: Tensor, length_incentive: Tensor, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
    """R = relevance * length incentive * unique trigrams / trigrams, of open-ended questions.

    Args:
        relevance: [B], of the response to the prompt.
        length_incentive: [B], grows with the length.
        tokens: [B, T] ids; a response of fewer than three has no repetition: 1.
        mask: [B, T], nonzero = a token of the response.
    """
    check.integers("tokens", tokens)
    if tokens.ndim != 2:
        raise ValueError(f"tokens: expected shape [B, T], got {list(tokens.shape)}")
    counted = check.mask(mask, "tokens", tokens)
    rows = [row if counted is None else row[counted[b] != 0] for b, row in enumerate(tokens)]
    unique = [_unique_trigrams(row) for row in rows]
    fits = _rewards("relevance", relevance, tokens)
    incentive = _rewards("length_incentive", length_incentive, tokens)
    return (fits * incentive * torch.tensor(unique, dtype=torch.float64, device=tokens.device)).float()


def _unique_trigrams(row: Tensor) -> float:
    if len(row) < 3:
        return 1.0
    trigrams = row.unfold(0, 3, 1)
    return len(torch.unique(trigrams, dim=0)) / len(trigrams)


# ------------------------------------------------------------------------------------------------------------ arguments
def _rewards(name: str, x: Tensor, like: Tensor | None = None) -> Tensor:
    """[B] float64, a constant; as many as the rows of `like`, another argument."""
    x = given(name, x).double()
    return x if like is None else _of_rows(name, x, like)


def _components(name: str, x: Tensor, like: Tensor | None = None) -> Tensor:
    """[B, K] float64, a constant; as many rows as `like`, another argument, has."""
    x = finite_or_nan(name, x).double()
    if x.ndim != 2 or not x.shape[1]:
        raise ValueError(f"{name}: expected shape [B, K], K at least 1, got {list(x.shape)}")
    return x if like is None else _of_rows(name, x, like)


def _of_rows(name: str, x: Tensor, like: Tensor) -> Tensor:
    check.shape(name, x, (like.shape[0], *x.shape[1:]), "a row for each response")
    check.same_device(name, x, "the first argument", like)
    return x


def _per_component(name: str, x: Tensor | Number, like: Tensor) -> float | Tensor:
    """A number, or one for each component [K] of `like`, float64, finite; a constant."""
    if not isinstance(x, Tensor) or x.ndim == 0:
        return number(name, x, like, check.finite)
    x = check.constant(name, check.rewards(name, x)).double()
    check.shape(name, x, like.shape[-1:], "one per component")
    check.same_device(name, x, "components", like)
    if check.values_checked(x):
        check.every(name, x.isfinite(), x, "finite numbers")
    return x

"""Advantages against other baselines than the mean of the group: per token, per role, of bundles, of all prompts.

R = rewards [B], NaN where a response was not scored: it counts in nothing and gets 0. group_ids or group_size says
which responses are to the same prompt, as in `fastreward.group_advantages`.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from fastreward._arguments import check
from fastreward._arguments.groups import GroupIds, Groups, groups_of
from fastreward._arguments.numbers import Number, number
from fastreward.ema_baseline import EmaBaseline, When
from fastreward.group import group_advantages
from fastreward.group_statistics import group_statistics
from fastreward.recipes._catalogue.registry import recipe
from fastreward.recipes._shared.groups import beside_rewards, finite_or_nan, given, prompts, truths
from fastreward.recipes._shared.tokens import beside, rewards_of_tokens, token_values
from fastreward.returns import discounted_returns
from fastreward.segments import scatter_rewards, segment_reduce

__all__ = ["copo", "grpo_s", "hierarchical_grpo", "otb", "rae", "riskpo", "verpo", "weighted_grpo"]

Positions = Literal["column", "token"]
Credit = Literal["uniform", "std", "score"]


# ---------------------------------------------------------------------------------------------------------- per token
@recipe(
    "OTB (optimal token baseline)",
    "verl, github.com/verl-project/verl",
    code="verl core_algos.py `compute_optimal_token_baseline_advantage`, and its multi-turn form",
    returns="advantages",
    passes=("group_ids",),
)
def otb(
    token_rewards: Tensor,
    old_logprobs: Tensor,
    log_sum_sq_probs: Tensor,
    mask: Tensor,
    group_ids: GroupIds | None = None,
    *,
    group_size: int | None = None,
    weights: Tensor | None = None,
    positions: Positions = "column",
    eps: Number = 1e-8,
) -> Tensor:
    """A_t = G_t - sum of G_t W_t / (sum of W_t + eps), W_t = the sum up to t of 1 - 2 p + sum over v of p_v^2. [B, T].

    W is the squared norm of the score function so far; the sums are over the responses to the prompt that have a t-th
    position, and where only one has, A = G.

    Args:
        token_rewards: [B, T], of `fastreward.token_rewards`; those under the mask do not count. G_t: their sum from t
            on.
        old_logprobs, log_sum_sq_probs: [B, T], of the policy that sampled; outputs of `fastreward.token_logprobs`.
        mask: [B, T].
        group_ids, group_size: as in `fastreward.group_advantages`.
        weights: [B, T], of the correction for the inference engine; 1 - 2 p + ... is multiplied by their squares.
        positions: what a response's t-th position is: the "column" of the batch, or its t-th "token" that counts (the
            multi-turn form, for tools' tokens in between).
        eps: as in the formula.
    """
    check.choice("positions", positions, get_args(Positions))
    x = rewards_of_tokens("token_rewards", token_rewards, mask)
    lp = token_values("old_logprobs", old_logprobs, mask)
    collision = beside("log_sum_sq_probs", log_sum_sq_probs, "old_logprobs", lp, mask)
    step = (1 - 2 * lp.exp() + collision.exp()).clamp(min=0.0)
    if weights is not None:
        step = step * beside("weights", weights, "old_logprobs", lp, mask).square()
    returns = discounted_returns(x, mask, masked_rewards="drop")
    energy = discounted_returns(step, mask, reverse=False)
    there = mask != 0
    index = prompts(group_ids, group_size, len(lp)).index.to(lp.device)
    at = None if positions == "column" else (there.cumsum(-1) - 1).clamp(min=0)
    weighed, total, count = (_sums(x, index, at) for x in (returns * energy, energy, there.float()))
    baseline = torch.where(count > 1, weighed / (total + number("eps", eps, lp, check.positive)), 0.0)
    own = baseline[:, torch.where(index < 0, len(index), index)].mT
    return torch.where(there, returns - (own if at is None else own.gather(1, at)), 0.0)


def _sums(x: Tensor, index: Tensor, at: Tensor | None) -> Tensor:
    """[T, B + 1] from [B, T]: sums over each group at each position, the last 0. at: positions, else the columns."""
    x = x if at is None else torch.zeros_like(x).scatter_add(1, at, x)
    order = index.argsort(stable=True)
    columns = x[order].mT.contiguous()
    return segment_reduce(columns, index[order].expand(columns.shape), op="sum", num_segments=len(index) + 1)


@recipe(
    "VeRPO (verifiable dense rewards from unit tests)",
    "arXiv 2601.03525",
    note="notes on the paper, without its constants",
    returns="advantages",
    passes=("group_ids",),
)
def verpo(
    passed: Tensor,
    segment_ids: Tensor,
    rewards: Tensor,
    group_ids: GroupIds | None = None,
    *,
    group_size: int | None = None,
    alpha: float = 1.0,
    sigma: float = 0.1,
    delta: float = 1.0,
    beta: float = 1.0,
    gamma: float = 0.95,
) -> Tensor:
    """A = A_traj + beta A_turn, both R - mean; R_traj = gamma^turns R, R_turn = sum over tests j of w_j passed_j.

    w_j = exp(-alpha rho_j) / (n_j + delta), n_j = sum over i of exp(-(rho_j - rho_i)^2 / (2 sigma^2)), rho_j = how
    often the group's attempts pass test j: hard tests count more, of many alike each less. The mean of R_turn is over
    all turns of the group (reconstructed). [B, T], the same on all tokens of a turn.

    Args:
        passed: [B, S, J], 1 and 0 for each turn's code and test of the prompt; NaN = no turn, no test.
        segment_ids: integers [B, T] in [-1, S): the turn of each token.
        rewards: [B], of the outcomes.
        group_ids, group_size: as in `fastreward.group_advantages`.
        alpha, sigma, delta, beta, gamma: as in the formulas; the values are not the paper's.
    """
    outcome, results = given("rewards", rewards), finite_or_nan("passed", passed)
    if results.ndim != 3 or results.shape[0] != outcome.shape[0]:
        raise ValueError(f"passed: expected shape [{outcome.shape[0]}, S, J], got {list(results.shape)}")
    if check.tensor("segment_ids", segment_ids).ndim != 2 or len(segment_ids) != len(outcome):
        raise ValueError(f"segment_ids: expected shape [{len(outcome)}, T], got {list(segment_ids.shape)}")
    groups = prompts(group_ids, group_size, len(outcome))
    rho = _pass_rates(results, groups)
    width = 2.0 * check.positive("sigma", sigma) ** 2
    alike = (-(rho.unsqueeze(-1) - rho.unsqueeze(-2)).square() / width).exp().nansum(-1)
    w = (-check.not_negative("alpha", alpha) * rho).exp() / (alike + check.not_negative("delta", delta))
    there = ~results.isnan().all(-1)
    turn = torch.where(there, (w.unsqueeze(1) * results).nansum(-1), torch.nan)
    shortened = outcome * check.positive("gamma", gamma) ** there.sum(-1)
    every_turn = Groups.by(groups, torch.zeros_like(turn, dtype=torch.int64))
    advantages = group_advantages(shortened, groups, scale="none").unsqueeze(-1) + check.not_negative(
        "beta", beta
    ) * group_advantages(turn, every_turn, scale="none")
    return scatter_rewards(advantages, segment_ids, place="broadcast")


def _pass_rates(results: Tensor, groups: Groups) -> Tensor:
    """[B, J] from [B, S, J]: over all attempts of the group, NaN without any."""
    count, turns, tests = results.shape
    test = torch.arange(tests, device=results.device).repeat(turns).expand(count, -1)
    rates = group_statistics(results.reshape(count, turns * tests), Groups.by(groups, test), ("mean",))["mean"]
    return rates[:, :tests] if turns else results.new_full((count, tests), torch.nan)


# -------------------------------------------------------------------------------------------------------- per response
@recipe(
    "RiskPO (risk measures of bundles of prompts)",
    "arXiv 2510.00911",
    code="RTkenny/RiskPO core_algos.py, ray_trainer.py",
)
def riskpo(
    rewards: Tensor,
    bundle_ids: GroupIds,
    group_ids: GroupIds | None = None,
    *,
    group_size: int | None = None,
    low: float = 0.2,
    high: float = 0.9,
    weight: float = 1.5,
    quantiles: Tensor | None = None,
    normalized: bool = False,
    credit: Credit = "uniform",
    eps: float = 1e-6,
) -> Tensor:
    """A = (V + weight C) / (1 + weight): the middle of the distribution, and more so its lower tail, S = sum of R.

    V = ((S - q_low)+ - (S - q_high)+ + q_low - q_high) / (high - low + eps), C = -(q_low - S)+ / (low + eps), S the sum
    over a bundle: the j-th response to each of 5 prompts.

    Args:
        rewards: [B].
        bundle_ids: [B], which responses are one bundle.
        group_ids, group_size: which are to the same prompt, for credit="std".
        low, high, weight: as in the formulas; weight=0 is RVaR alone.
        quantiles: [2], q_low and q_high that are tracked over the steps, q += 0.1 (level - share of S < q); default:
            those of the batch's bundles.
        normalized: divided by the std over the bundles + eps.
        credit: what a response gets of its bundle's A: A ("uniform"), A over the std of its prompt's rewards (1 where
            that is below 0.001) + eps ("std"), half of A if it is right (R > 0), else 1.5 A ("score").
        eps: as in the formulas.
    """
    check.choice("credit", credit, get_args(Credit))
    below, above = check.not_negative("low", low), check.not_negative("high", high)
    if not below < above <= 1:
        raise ValueError(f"high: expected a number in (low, 1] with low = {low}, got {high}")
    tail, floor = check.not_negative("weight", weight), check.positive("eps", eps)
    scored = given("rewards", rewards)
    bundles = prompts(bundle_ids, None, len(scored), "bundle_ids")
    found = group_statistics(scored, bundles, ("count", "mean", "rank"), ties="ordinal")
    total = found["mean"].double() * found["count"]
    once = torch.where(found["rank"] == 0, total, torch.nan)  # each bundle as one
    everyone = torch.zeros_like(once, dtype=torch.int64)
    q_low, q_high = (
        _tracked(quantiles, total)
        if quantiles is not None
        else [group_statistics(once, everyone, ("quantile",), q=q)["quantile"].double() for q in (below, above)]
    )
    middle = (total - q_low).clamp(min=0) - (total - q_high).clamp(min=0) + q_low - q_high
    worst = -(q_low - total).clamp(min=0) / (below + floor)
    advantages = (tail * worst + middle / (above - below + floor)) / (tail + 1)
    if check.flag("normalized", normalized):
        spread = group_statistics(advantages.where(~once.isnan(), torch.nan), everyone, ("std",))["std"]
        advantages = advantages / (spread.nan_to_num(0.0) + floor)
    if credit == "std":
        std = group_statistics(scored, prompts(group_ids, group_size, len(scored)), ("std",))["std"]
        advantages = advantages / (torch.where(std >= 1e-3, std, 1.0) + floor)
    elif credit == "score":
        advantages = advantages * torch.where(scored > 0, 0.5, 1.5)
    return torch.where(scored.isnan(), 0.0, advantages).float()


def _tracked(quantiles: Tensor, like: Tensor) -> list[Tensor]:
    q = check.constant("quantiles", check.reals("quantiles", quantiles))
    check.shape("quantiles", q, (2,), "q_low and q_high")
    if check.values_checked(q):
        check.every("quantiles", q.isfinite(), q, "finite numbers")
    return list(q.to(like.device).double())


@recipe(
    "RAE (role-conditioned advantage estimation, SPIRAL)",
    "arXiv 2506.24119",
    code="PrimeIntellect-ai/prime-rl orchestrator/algo/rae.py",
)
def rae(
    rewards: Tensor,
    roles: GroupIds,
    *,
    baseline: EmaBaseline | None = None,
    decay: float = 0.95,
    when: When = "before",
) -> Tensor:
    """A = R - b, b the running mean of the role's rewards: b <- decay b + (1 - decay) R.

    For self-play: in a zero-sum game the mean of all is 0 whatever the policy does, and one role may have an edge.

    Args:
        rewards: [B], in the order in which they count; NaN = not scored.
        roles: [B], integers or hashables: who played, or (game, role).
        baseline: kept over the steps, with its own decay; None: one that begins here, at 0.
        decay: as in the formula.
        when: b "before" it takes the reward itself in, or "after".
    """
    kept = EmaBaseline(decay) if baseline is None else baseline
    if not isinstance(kept, EmaBaseline):
        raise TypeError(f"baseline: expected an EmaBaseline, got {type(kept).__name__}")
    scored = given("rewards", rewards).float()
    return torch.where(scored.isnan(), 0.0, scored - kept(scored, groups_of("roles", roles), when=when))


@recipe(
    "Hierarchical GRPO (proposers and solvers)",
    "prime-rl, github.com/PrimeIntellect-ai/prime-rl",
    code="prime-rl orchestrator/algo/hierarchical_grpo.py",
    passes=("group_ids",),
)
def hierarchical_grpo(
    rewards: Tensor,
    roles: Tensor,
    problem_ids: Tensor,
    group_ids: GroupIds | None = None,
    *,
    group_size: int | None = None,
) -> Tensor:
    """A = R - mean over those who have the same role: of solvers on the same problem, of proposers from the same task.

    Args:
        rewards: [B].
        roles: integers [B], who did it.
        problem_ids: integers [B], the problem that a solver was given; -1 = a proposer.
        group_ids, group_size: the task from which problems are proposed.
    """
    scored = given("rewards", rewards)
    for name, x in (("roles", roles), ("problem_ids", problem_ids)):
        check.integers(name, x)
        check.shape(name, x, scored.shape, "one per response")
    if check.values_checked(problem_ids):
        check.every("problem_ids", problem_ids >= -1, problem_ids, "a problem, or -1")
    # Groups of each: as a bare key -1 would be no group, and is the proposers' here
    compared = Groups.by(prompts(group_ids, group_size, len(scored)), Groups(roles), Groups(problem_ids))
    return group_advantages(scored, compared, scale="none")


@recipe(
    "COPO (consistency-aware policy optimization)",
    "arXiv 2508.04138",
    note="two third-party notes that agree; that the advantages are mixed, and not two losses, is reconstructed",
    passes=("group_ids",),
)
def copo(
    rewards: Tensor,
    answers: GroupIds,
    group_ids: GroupIds | None = None,
    *,
    group_size: int | None = None,
    gamma: float = 20.0,
    rho: float = 1.5,
    eps: Number = 1e-6,
) -> Tensor:
    """A = w A_local + (1 - w) A_global, w = sigmoid(gamma (H - rho)), H = entropy of the answers in the group.

    A_local = (R - mean) / (std + eps); A_global = (m - mean of m) / (std of m + eps) over the prompts, m = mean: where
    a group agrees, all of it is pushed, or pushed away.

    Args:
        rewards: [B].
        answers: [B], integers or any hashables, equal where the final answers are.
        group_ids, group_size: as in `fastreward.group_advantages`.
        gamma, rho, eps: as in the formulas.
    """
    scored = given("rewards", rewards)
    groups = prompts(group_ids, group_size, len(scored))
    found = group_statistics(scored, groups, ("count", "mean", "rank"), ties="ordinal")
    same = group_statistics(scored, Groups.by(groups, prompts(answers, None, len(scored), "answers")), ("count",))[
        "count"
    ]
    surprise = torch.where(scored.isnan(), torch.nan, (found["count"] / same).log())
    entropy = group_statistics(surprise, groups, ("mean",))["mean"].double()
    w = (check.positive("gamma", gamma) * (entropy - check.finite("rho", rho))).sigmoid()
    once = torch.where(found["rank"] == 0, found["mean"], torch.nan)  # each prompt as one
    of_prompts = group_statistics(once, torch.zeros_like(once, dtype=torch.int64), ("mean", "std"))
    std = of_prompts["std"].nan_to_num(0.0)
    floor = number("eps", eps, scored, check.positive)
    spread = (found["mean"].double() - of_prompts["mean"]) / (std + floor)
    mixed = w * group_advantages(scored, groups, eps=eps) + (1 - w) * spread
    return torch.where(scored.isnan(), 0.0, mixed).float()


@recipe(
    "GRPO-S (GRPO scaled by difficulty, DR-IRL)",
    "arXiv 2503.18991",
    note="notes on the paper; over what its means are is reconstructed",
    passes=("group_ids",),
)
def grpo_s(
    rewards: Tensor,
    hardness: Tensor,
    reward_gaps: Tensor,
    group_ids: GroupIds | None = None,
    *,
    group_size: int | None = None,
    category_ids: GroupIds | None = None,
) -> Tensor:
    """A = a_D a_M (R - mean) / (std + 1e-6), a_D = sigmoid(h) / sigmoid(mean of h), a_M = sigmoid(g) / sigmoid(g_c).

    g = mean of the reward gaps over the batch, g_c = over the category of the response; the mean of h is over the
    batch.

    Args:
        rewards: [B].
        hardness: h [B], of the prompt: 1 - mean of the largest cosines of its clauses with those of demonstrations.
        reward_gaps: [B], between the demonstration and the response; NaN = masked out.
        group_ids, group_size: as in `fastreward.group_advantages`.
        category_ids: [B], integers or hashables; default: all are of one category.
    """
    scored = given("rewards", rewards)
    h = torch.where(scored.isnan(), torch.nan, beside_rewards("hardness", hardness, scored))
    gaps = torch.where(scored.isnan(), torch.nan, beside_rewards("reward_gaps", reward_gaps, scored))
    everyone = torch.zeros(scored.shape, dtype=torch.int64, device=scored.device)
    categories = everyone if category_ids is None else prompts(category_ids, None, len(scored), "category_ids")
    of_all = group_statistics(gaps, everyone, ("mean",))["mean"]
    of_category = group_statistics(gaps, categories, ("mean",))["mean"]
    data = h.sigmoid() / group_statistics(h, everyone, ("mean",))["mean"].sigmoid()
    model = (of_all.sigmoid() / of_category.sigmoid()).nan_to_num(1.0)
    return data.nan_to_num(1.0).float() * model * group_advantages(scored, group_ids, group_size=group_size)


@recipe(
    "Weighted GRPO (a hard and an easy prompt as a pair)",
    "arXiv 2602.03452",
    reconstructed="the abstract, which has no weights",
    passes=("group_ids",),
)
def weighted_grpo(
    rewards: Tensor,
    easy: Tensor,
    group_ids: GroupIds | None = None,
    *,
    group_size: int | None = None,
    success: Number = 1.0,
    failure: Number = 1.0,
    eps: Number = 1e-6,
) -> Tensor:
    """A = (S - mean) / (std + eps) over a pair of prompts, S = success (hard one, right), -failure (easy one, wrong).

    S is 0 else. A rare success on the hard prompt stands out upwards, a rare failure on the easy one downwards; within
    one prompt alone GRPO would undo any such weights.

    Args:
        rewards: [B], right where above 0.
        easy: [B], nonzero = a response to the easy prompt of its pair.
        group_ids, group_size: which responses are to the same pair of prompts.
        success, failure, eps: as in the formula.
    """
    scored = given("rewards", rewards)
    right, of_easy = scored > 0, truths("easy", easy, scored)
    won = number("success", success, scored, check.not_negative)
    lost = -number("failure", failure, scored, check.not_negative)
    s = torch.where(of_easy, torch.where(right, 0.0, lost), torch.where(right, won, 0.0))
    return group_advantages(torch.where(scored.isnan(), torch.nan, s), group_ids, group_size=group_size, eps=eps)

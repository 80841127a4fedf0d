"""Advantages against other baselines than the mean of the group."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable

from reference_credit.group_advantage import Ids, Row, dr_grpo, grpo, mean, std, there


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def zero(rewards: Row, group_ids: Ids, trainer_eps: float = 1e-6) -> Row:
    """GRPO, but a response alone gets 0."""
    alone = {g for g in group_ids if sum(h == g and there(r) for h, r in zip(group_ids, rewards, strict=True)) < 2}
    return [0.0 if g in alone else a for a, g in zip(grpo(rewards, group_ids), group_ids, strict=True)]


def otb(
    token_rewards: list[Row],
    old_logprobs: list[Row],
    log_sum_sq_probs: list[Row],
    mask: list[Row],
    group_ids: Ids,
    weights: list[Row] | None = None,
    positions: str = "column",
) -> list[Row]:
    rows, width = range(len(mask)), len(mask[0])
    at = [[] for _ in rows]  # of each response its tokens that count: (column, place, return, energy)
    for b in rows:
        columns = [t for t in range(width) if mask[b][t]]
        energy = 0.0
        for k, t in enumerate(columns):
            own = 1 - 2 * math.exp(old_logprobs[b][t]) + math.exp(log_sum_sq_probs[b][t])
            energy += own * (1.0 if weights is None else weights[b][t] ** 2)
            rest = sum(token_rewards[b][u] for u in columns[k:])
            at[b].append((t, t if positions == "column" else k, rest, energy))
    out = [[0.0] * width for _ in rows]
    for b in rows:
        for t, place, rest, _ in at[b]:
            group = [x for c in rows if group_ids[c] == group_ids[b] for x in at[c] if x[1] == place]
            weighed = sum(g * w for _, _, g, w in group) / (sum(w for *_, w in group) + 1e-8)
            out[b][t] = rest - (weighed if len(group) > 1 else 0.0)
    return out


def verpo(
    passed: list[list[Row]], rewards: Row, segment_ids: list[list[int]], group_ids: Ids, sigma: float = 0.1
) -> list[Row]:
    rows = range(len(rewards))
    turns = [[k for k, tests in enumerate(passed[b]) if any(map(there, tests))] for b in rows]
    of_turn: list[dict[int, float]] = []
    for b in rows:
        group = [c for c in rows if group_ids[c] == group_ids[b]]
        tests = range(len(passed[b][0]))
        rho = []
        for j in tests:
            results = [passed[c][k][j] for c in group for k in turns[c] if there(passed[c][k][j])]
            rho.append(mean(results) if results else math.nan)
        w = []
        for j in tests:
            alike = sum(math.exp(-((rho[j] - r) ** 2) / (2 * sigma**2)) for r in rho if there(r))
            w.append(math.exp(-rho[j]) / (alike + 1.0) if there(rho[j]) else 0.0)
        of_turn.append({k: sum(w[j] * passed[b][k][j] for j in tests if there(passed[b][k][j])) for k in turns[b]})
    outcomes = dr_grpo([r * 0.95 ** len(turns[b]) for b, r in enumerate(rewards)], group_ids)
    out = []
    for b, row in enumerate(segment_ids):
        group = [x for c in rows if group_ids[c] == group_ids[b] for x in of_turn[c].values()]
        own = {k: outcomes[b] + x - mean(group) for k, x in of_turn[b].items()}
        out.append([0.0 if k < 0 else own.get(k, outcomes[b]) for k in row])
    return out


def quantile(values: Row, q: float) -> float:
    ordered = sorted(values)
    place = q * (len(ordered) - 1)
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])


def riskpo(
    rewards: Row,
    bundle_ids: Ids,
    group_ids: Ids | None = None,
    low: float = 0.2,
    high: float = 0.9,
    weight: float = 1.5,
    quantiles: Row | None = None,
    normalized: bool = False,
    credit: str = "uniform",
) -> Row:
    total: dict[Hashable, float] = {}
    for r, bundle in zip(rewards, bundle_ids, strict=True):
        if there(r):
            total[bundle] = total.get(bundle, 0.0) + r
    q_low, q_high = quantiles or [quantile(list(total.values()), q) for q in (low, high)]
    risk = {}
    for bundle, s in total.items():
        middle = (max(s - q_low, 0) - max(s - q_high, 0) + q_low - q_high) / (high - low + 1e-6)
        risk[bundle] = (weight * -max(q_low - s, 0) / (low + 1e-6) + middle) / (weight + 1)
    spread = std(list(risk.values())) + 1e-6 if normalized else 1.0
    out = [0.0] * len(rewards)
    for b, r in enumerate(rewards):
        if not there(r):
            continue
        factor = 1.0
        if credit == "score":
            factor = 0.5 if r > 0 else 1.5
        if credit == "std":
            assert group_ids is not None
            own = [x for x, g in zip(rewards, group_ids, strict=True) if g == group_ids[b] and there(x)]
            deviation = std(own) if len(own) > 1 else 0.0
            factor = 1 / ((deviation if deviation >= 1e-3 else 1.0) + 1e-6)
        out[b] = risk[bundle_ids[b]] / spread * factor
    return out


def rae(rewards: Row, roles: list[int], decay: float = 0.95, when: str = "before") -> Row:
    running, out = dict.fromkeys(roles, 0.0), []
    for r, role in zip(rewards, roles, strict=True):
        before = running[role]
        running[role] = decay * before + (1 - decay) * r if there(r) else before
        out.append(r - (before if when == "before" else running[role]) if there(r) else 0.0)
    return out


def hierarchical_grpo(rewards: Row, roles: list[int], problem_ids: list[int], group_ids: Ids) -> Row:
    return dr_grpo(rewards, list(zip(roles, problem_ids, group_ids, strict=True)))


def copo(rewards: Row, answers: list[Hashable], group_ids: Ids, gamma: float = 20.0, rho: float = 1.5) -> Row:
    local, means = zero(rewards, group_ids), {}
    for g in group_ids:
        own = [r for r, h in zip(rewards, group_ids, strict=True) if h == g and there(r)]
        if own:
            means[g] = mean(own)
    of_prompts = list(means.values())
    spread = std(of_prompts) if len(of_prompts) > 1 else 0.0
    out = [0.0] * len(rewards)
    for b, g in enumerate(group_ids):
        if not there(rewards[b]):
            continue
        votes = Counter(a for a, h, r in zip(answers, group_ids, rewards, strict=True) if h == g and there(r))
        shares = [n / sum(votes.values()) for n in votes.values()]
        w = sigmoid(gamma * (-sum(p * math.log(p) for p in shares) - rho))
        out[b] = w * local[b] + (1 - w) * (means[g] - mean(of_prompts)) / (spread + 1e-6)
    return out


def grpo_s(rewards: Row, hardness: Row, reward_gaps: Row, group_ids: Ids, category_ids: Ids | None = None) -> Row:
    rows = [b for b, r in enumerate(rewards) if there(r)]
    categories = category_ids or [0] * len(rewards)
    gaps = [reward_gaps[b] for b in rows if there(reward_gaps[b])]
    average = mean([hardness[b] for b in rows])
    out = zero(rewards, group_ids)
    for b in rows:
        own = [reward_gaps[c] for c in rows if categories[c] == categories[b] and there(reward_gaps[c])]
        model = sigmoid(mean(gaps)) / sigmoid(mean(own)) if own else 1.0
        out[b] *= sigmoid(hardness[b]) / sigmoid(average) * model
    return out


def weighted_grpo(rewards: Row, easy: list[bool], group_ids: Ids, success: float = 1.0, failure: float = 1.0) -> Row:
    s = []
    for r, of_easy in zip(rewards, easy, strict=True):
        s.append(r if not there(r) else (0.0 if r > 0 else -failure) if of_easy else success if r > 0 else 0.0)
    return zero(s, group_ids)

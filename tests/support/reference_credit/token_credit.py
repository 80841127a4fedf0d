"""Credit of tokens. Singular values alone are torch's."""

from __future__ import annotations

import math

import torch

Row = list[float]
Rows = list[list[float]]


# -------------------------------------------------------------------------------------------------- what others share
def scored(mask: Rows, rewards: Row | None) -> list[list[int]]:
    """The places of the tokens of each response; none where it was not scored."""
    return [
        [t for t, m in enumerate(row) if m and not (rewards and math.isnan(rewards[b]))] for b, row in enumerate(mask)
    ]


def members(group_ids: list[str], rewards: Row) -> dict[str, list[int]]:
    """The scored responses of each group."""
    found: dict[str, list[int]] = {}
    for b, label in enumerate(group_ids):
        if not math.isnan(rewards[b]):
            found.setdefault(label, []).append(b)
    return found


def normalized(rewards: Row, group_ids: list[str], eps: float = 1e-6, ddof: int = 1, scale: bool = True) -> Row:
    """(R - mean) / (std + eps) in the group; 0 where alone or not scored."""
    found = [0.0] * len(rewards)
    for group in members(group_ids, rewards).values():
        mean = sum(rewards[b] for b in group) / len(group)
        if len(group) > ddof:
            std = math.sqrt(sum((rewards[b] - mean) ** 2 for b in group) / (len(group) - ddof))
            for b in group:
                if len(group) > 1 and rewards[b] != mean:
                    found[b] = (rewards[b] - mean) / (std + eps if scale else 1.0)
    return found


def less_others(rewards: Row, group_ids: list[str]) -> Row:
    found = [0.0] * len(rewards)
    for group in members(group_ids, rewards).values():
        for b in group:
            if len(group) > 1:
                found[b] = rewards[b] - sum(rewards[j] for j in group if j != b) / (len(group) - 1)
    return found


def ahead(rewards: Rows, places: list[list[int]], gamma: float = 1.0) -> Rows:
    """Discounted sums from each token on."""
    found = [[0.0] * len(row) for row in rewards]
    for b, tokens in enumerate(places):
        value = 0.0
        for t in reversed(tokens):
            value = rewards[b][t] + gamma * value
            found[b][t] = value
    return found


def whitened(x: Rows, places: list[list[int]]) -> Rows:
    values = [x[b][t] for b, tokens in enumerate(places) for t in tokens]
    mean = sum(values) / len(values)
    variance = sum((v - mean) ** 2 for v in values) / (len(values) - 1)
    found = [[0.0] * len(row) for row in x]
    for b, tokens in enumerate(places):
        for t in tokens:
            found[b][t] = (x[b][t] - mean) / math.sqrt(variance + 1e-8)
    return found


def of_tokens(x: Row | Rows, places: list[list[int]], columns: int) -> Rows:
    found = [[0.0] * columns for _ in places]
    for b, tokens in enumerate(places):
        for t in tokens:
            found[b][t] = x[b][t] if isinstance(x[b], list) else x[b]
    return found


# -------------------------------------------------------------------------------------------------------- the methods
def prime(
    rm_logprobs: Rows, ref_logprobs: Rows, mask: Rows, rewards: Row, group_ids: list[str],
    beta: float = 0.05, lam: float = 0.0, granularity: str = "token", use_gt: bool = False, keep_last: bool = False,
    batch_norm: bool = True, process_coef: float = 5.0, outcome_coef: float = 5.0,
) -> Rows:  # fmt: skip
    places, columns = scored(mask, rewards), len(mask[0])
    q = [[0.0] * columns for _ in mask]
    for b, tokens in enumerate(places):
        for t in tokens:
            q[b][t] = beta * (rm_logprobs[b][t] - ref_logprobs[b][t])
        if use_gt and tokens:
            q[b][tokens[-1]] = rewards[b] - sum(q[b][t] for t in tokens[:-1])
    r = ahead(q, places, lam)
    for b, tokens in enumerate(places):
        if not tokens:
            continue
        if granularity == "whole":
            total = sum(r[b])
            r[b] = [0.0] * columns
            r[b][tokens[-1]] = total
        elif not keep_last:
            r[b][tokens[-1]] = 0.0
    if batch_norm:
        largest = max(abs(x) for row in ahead(r, places) for x in row)
        r = [[x / (largest + 1e-6) for x in row] for row in r]
    outcome = less_others(rewards, group_ids)
    total_rewards = [[0.0] * columns for _ in mask]
    for group in members(group_ids, rewards).values():
        there = [b for b in group if places[b]]
        n = len(there)
        means = {b: sum(r[b][t] for t in places[b]) / len(places[b]) for b in there}
        for b in there:
            for t in places[b]:
                if n > 1:
                    total_rewards[b][t] += process_coef * (r[b][t] * n / (n - 1) - sum(means.values()) / (n - 1))
            total_rewards[b][places[b][-1]] += outcome_coef * outcome[b]
    return whitened(ahead(total_rewards, places), places)


def rlfr(
    deviations: Rows, mask: Rows, rewards: Row, group_ids: list[str],
    weight: float = 0.01, threshold: float = 0.6, top: int = 15, eps: float = 1e-9,
) -> Rows:  # fmt: skip
    places, outcome = scored(mask, rewards), normalized(rewards, group_ids, eps)
    r = [[0.0] * len(mask[0]) for _ in mask]
    for b, tokens in enumerate(places):
        if not tokens:
            continue
        values = [deviations[b][t] for t in tokens]
        low, high = min(values), max(values)
        u = {t: (deviations[b][t] - low) / (high - low) if high > low else 0.0 for t in tokens}
        u = {t: x for t, x in u.items() if x > threshold}
        for t in sorted(u, key=lambda t, u=u: (-u[t], t))[:top]:
            r[b][t] = -weight * u[t]
        r[b][tokens[-1]] += outcome[b]
    return ahead(r, places)


def verl_shaping(
    advantages: Row | Rows, ranks: Rows, mask: Rows, averages: Row,
    gain: float = 2.0, scale: float = 1.0, kappa: float = 2.0, place: str = "end",
) -> Rows:  # fmt: skip
    places = scored(mask, None)
    found = of_tokens(advantages, places, len(mask[0]))
    for b, tokens in enumerate(places):
        distance = [max(-5.0, min(5.0, (x - m) / (abs(m) + 1e-8))) for x, m in zip(ranks[b], averages, strict=True)]
        w = 1 / (1 + math.exp(-gain * distance[2]))
        aux = scale * (w * math.tanh(distance[0]) + (1 - w) * math.tanh(distance[1]))
        for t in tokens[-1:] if place == "end" else tokens:
            found[b][t] += min(max(aux, 0.0), abs(found[b][t]) / kappa)
    return found


def effective_ranks(hidden: list[Rows], mask: Rows, stride: int = 40, max_tokens: int | None = 512) -> Rows:
    def rank(rows: Rows) -> float:
        if len(rows) < 2:
            return 0.0
        x = torch.tensor(rows, dtype=torch.float64)
        singular = torch.linalg.svdvals(x - x.mean(0)).tolist()
        return math.exp(-sum(s / sum(singular) * math.log(s / sum(singular)) for s in singular if s > 1e-12))

    found = []
    for b, tokens in enumerate(scored(mask, None)):
        rows = [hidden[b][t] for t in tokens]
        last = min(len(rows), max_tokens or len(rows))
        m = [rank(rows[:k]) for k in range(stride, last + 1, stride)]
        d = [m[j] - sum(m[:j]) / j for j in range(1, len(m))]
        dd = [d[j] - d[j - 1] for j in range(1, len(d))]
        found.append([rank(rows), sum(d) / len(d) if d else 0.0, sum(dd) / len(dd) if dd else 0.0])
    return found


def tw_grpo_weights(vocab_logprobs: list[Rows], mask: Rows, group_size: int, alpha: float = 1.4) -> Rows:
    rows, columns, vocabulary = len(mask), len(mask[0]), len(vocab_logprobs[0][0])
    uniform = [-math.log(vocabulary)] * vocabulary
    found = [[0.0] * columns for _ in mask]
    for start in range(0, rows, group_size):
        group = range(start, start + group_size)
        divergence = []
        for t in range(columns):
            lp = [vocab_logprobs[b][t] if mask[b][t] else uniform for b in group]
            mean = [sum(row[v] for row in lp) / group_size for v in range(vocabulary)]
            total = 0.0
            for row in lp:
                for v in range(vocabulary):
                    d = max(-11.0, min(11.0, mean[v] - row[v]))
                    total += math.exp(d) - d - 1
            divergence.append(total / group_size)
        low, high = min(divergence), max(divergence)
        for b in group:
            for t in range(columns):
                if mask[b][t]:
                    found[b][t] = 1 + (alpha - 1) * (divergence[t] - low) / (high - low + 1e-8)
    return found


def capo(
    errors: list[Rows], mask: Rows, rewards: Row, group_ids: list[str], vote: str = "majority",
    outcome_weight: float = 2.0, process_weight: float = 1.0, ddof: int = 1, eps: float = 1e-6,
) -> Rows:  # fmt: skip
    places = scored(mask, rewards)
    found = [[0.0] * len(mask[0]) for _ in mask]
    for group in members(group_ids, rewards).values():
        r = {}
        for b in group:
            for t in places[b]:
                said = errors[b][t] if isinstance(errors[b][t], list) else [errors[b][t]]
                said = [bool(x) for x in said]
                share = sum(said) / len(said)
                wrong = {
                    "intersection": all(said),
                    "majority": share >= 0.5,
                    "union": any(said),
                    "average": share,
                    "first": said[0],
                }[vote]
                r[b, t] = outcome_weight * rewards[b] - process_weight * wrong
        if len(r) < 2:
            continue
        mean = sum(r.values()) / len(r)
        std = math.sqrt(sum((x - mean) ** 2 for x in r.values()) / (len(r) - ddof))
        for (b, t), x in r.items():
            found[b][t] = (x - mean) / (std + eps)
    return found


def _influence(residuals: list[Rows], hidden: list[Rows], places: list[list[int]], group: list[int], rewards: Row):
    """{(b, t): the sum over tokens of right responses of (g g') (h h')} and the least mean of right responses."""

    def dot(x: Row, y: Row) -> float:
        return sum(a * b for a, b in zip(x, y, strict=True))

    right = [b for b in group if rewards[b] > 0]
    score = {
        (j, k): sum(
            dot(residuals[j][k], residuals[i][t]) * dot(hidden[j][k], hidden[i][t]) for i in right for t in places[i]
        )
        for j in group
        for k in places[j]
    }
    means = [sum(score[i, t] for t in places[i]) / len(places[i]) for i in right if places[i]]
    return score, min(means) if means else None, len(right)


def nthr(
    advantages: Row, mask: Rows, residuals: list[Rows], hidden: list[Rows], rewards: Row, group_ids: list[str],
    beta: float = 1.0,
) -> Rows:  # fmt: skip
    places = scored(mask, rewards)
    found = of_tokens(advantages, places, len(mask[0]))
    for group in members(group_ids, rewards).values():
        score, least, right = _influence(residuals, hidden, places, group, rewards)
        p = right / len(group)
        if p in (0, 1) or least is None:
            continue
        for (b, t), s in score.items():
            if rewards[b] <= 0 and s > beta * least:
                found[b][t] *= 2 * abs(0.5 - p)
    return found


def thr(
    advantages: Row, mask: Rows, residuals: list[Rows], hidden: list[Rows], rewards: Row, group_ids: list[str],
    p: float = 0.1, beta: float = 1.0,
) -> Rows:  # fmt: skip
    places = scored(mask, rewards)
    found = of_tokens(advantages, places, len(mask[0]))
    for group in members(group_ids, rewards).values():
        score, least, right = _influence(residuals, hidden, places, group, rewards)
        if least is None:
            continue
        for (b, t), s in score.items():
            signed = (1 if rewards[b] > 0 else -1) * s / right
            dominant = abs(signed) > beta * abs(least / right)
            found[b][t] *= (1 + math.copysign(p, signed)) if dominant else 0.0
    return found

"""Advantages of responses against the others to the same prompt."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable

Row = list[float]
Ids = list[Hashable]


def there(x: float) -> bool:
    return not math.isnan(x)


def mean(values: Row) -> float:
    return sum(values) / len(values)


def std(values: Row, ddof: int = 1) -> float:
    m = mean(values)
    return math.sqrt(sum((x - m) ** 2 for x in values) / (len(values) - ddof))


def by_group(rewards: Row, group_ids: Ids, rule: Callable[[Row, int], float]) -> Row:
    """rule(scored rewards of the group, place of this one among them) for every scored response, else 0."""
    out = [0.0] * len(rewards)
    for b in range(len(rewards)):
        if not there(rewards[b]):
            continue
        rows = [i for i in range(len(rewards)) if group_ids[i] == group_ids[b] and there(rewards[i])]
        out[b] = rule([rewards[i] for i in rows], rows.index(b))
    return out


def grpo(rewards: Row, group_ids: Ids, trainer: str = "verl") -> Row:
    ddof, eps, alone = {
        "verl": (1, 1e-6, "raw"), "trl": (1, 1e-4, "zero"), "trl-async": (0, 1e-8, "zero"),
        "openrlhf": (1, 1e-9, "nan"), "slime": (1, 1e-6, "zero"),
        "nemo-rl": (1, 1e-6, "zero"),
    }[trainer]  # fmt: skip

    def rule(rs: Row, at: int) -> float:
        if len(rs) == 1:
            return {"raw": rs[0], "zero": 0.0, "nan": math.nan}[alone]
        if trainer == "nemo-rl":
            others = rs[:at] + rs[at + 1 :]
            spread = std(others, ddof) if len(others) > 1 else 0.0
            return (rs[at] - mean(others)) / (spread + eps if spread > 0 else 1.0)
        return (rs[at] - mean(rs)) / (std(rs, ddof) + eps)

    return by_group(rewards, group_ids, rule)


def dr_grpo(rewards: Row, group_ids: Ids, singleton: str = "zero") -> Row:
    alone = singleton == "raw"
    return by_group(rewards, group_ids, lambda rs, at: rs[at] - (0.0 if alone and len(rs) == 1 else mean(rs)))


def rloo(rewards: Row, group_ids: Ids) -> Row:
    return by_group(rewards, group_ids, lambda rs, at: rs[at] - (mean(rs[:at] + rs[at + 1 :]) if len(rs) > 1 else 0.0))


def opo(rewards: Row, lengths: Row, group_ids: Ids) -> Row:
    out = [0.0] * len(rewards)
    for b in range(len(rewards)):
        rows = [i for i in range(len(rewards)) if group_ids[i] == group_ids[b] and there(rewards[i])]
        if there(rewards[b]):
            baseline = sum(lengths[i] * rewards[i] for i in rows) / sum(lengths[i] for i in rows)
            out[b] = rewards[b] - (baseline if len(rows) > 1 else 0.0)
    return out


def lite_ppo(rewards: Row, group_ids: Ids) -> Row:
    everyone = std([r for r in rewards if there(r)])
    return by_group(rewards, group_ids, lambda rs, at: (rs[at] - mean(rs)) / (everyone + 1e-6))


def prpo(rewards: Row, eps: float = 1e-6) -> Row:
    return by_group(rewards, [0] * len(rewards), lambda rs, at: (rs[at] - mean(rs)) / (std(rs) + eps))


def remax(rewards: Row, greedy_rewards: Row) -> Row:
    return [r - g if there(r) else 0.0 for r, g in zip(rewards, greedy_rewards, strict=True)]


def gpg(rewards: Row, group_ids: Ids, f_norm: float = 1.0) -> Row:
    scored = [r for r in rewards if there(r)]
    alpha = len(scored) / max(1, sum(r != 0 for r in scored))
    return [alpha * a / f_norm for a in dr_grpo(rewards, group_ids, "raw")]


def gdpo(rewards: list[Row], group_ids: Ids, component_weights: Row, batch_eps: float | None = 1e-4) -> Row:
    columns = [grpo([row[k] for row in rewards], group_ids, "trl") for k in range(len(component_weights))]
    summed = [
        sum(w * column[b] for w, column in zip(component_weights, columns, strict=True)) for b in range(len(rewards))
    ]
    if batch_eps is None:
        return summed
    return prpo([s if any(map(there, row)) else math.nan for s, row in zip(summed, rewards, strict=True)], batch_eps)


def reinforce_plus_plus(token_rewards: list[Row], mask: list[Row], gamma: float = 1.0) -> list[Row]:
    out = [[0.0] * len(row) for row in mask]
    for b, row in enumerate(mask):
        valid = [t for t, counts in enumerate(row) if counts]
        after = 0.0
        for t in reversed(valid):
            after = token_rewards[b][t] + gamma * after
            out[b][t] = after
    tokens = [out[b][t] for b, row in enumerate(mask) for t, counts in enumerate(row) if counts]
    m, var = mean(tokens), std(tokens) ** 2
    return [
        [(x - m) / math.sqrt(var + 1e-8) if counts else 0.0 for x, counts in zip(xs, row, strict=True)]
        for xs, row in zip(out, mask, strict=True)
    ]


def reinforce_plus_plus_baseline(rewards: Row, mask: list[Row], group_ids: Ids) -> list[Row]:
    centred = dr_grpo(rewards, group_ids, "raw")
    tokens = [centred[b] for b, row in enumerate(mask) for counts in row if counts]
    m, var = mean(tokens), std(tokens) ** 2
    return [
        [(centred[b] - m) / math.sqrt(var + 1e-8) if counts else 0.0 for counts in row] for b, row in enumerate(mask)
    ]


def pass_at_k(rewards: Row, group_ids: Ids, scale: str = "std") -> Row:
    def rule(rs: Row, at: int) -> float:
        first, second = sorted([*rs, -math.inf], reverse=True)[:2]
        if len(rs) == 1 or rs[at] < first:
            return 0.0
        return (first - second) / (std(rs) + 1e-6 if scale == "std" else 1.0)

    return by_group(rewards, group_ids, rule)


def pass_at_k_training(rewards: Row, group_ids: Ids, k: int) -> Row:
    def rule(rs: Row, at: int) -> float:
        n, c = len(rs), sum(r > 0 for r in rs)
        if n < k:
            return 0.0
        p = 1 - math.comb(n - c, k) / math.comb(n, k)
        s = math.sqrt(p * (1 - p))
        lost = 0.0 if rs[at] > 0 else math.comb(n - c - 1, k - 1) / math.comb(n - 1, k - 1)
        return (1 - p - lost) / (s + 1e-6)

    return by_group(rewards, group_ids, rule)


def maxrl(rewards: Row, group_ids: Ids) -> Row:
    return by_group(rewards, group_ids, lambda rs, at: 0.0 if len(rs) == 1 or mean(rs) <= 0 else rs[at] / mean(rs) - 1)


def bnpo(rewards: Row, group_ids: Ids, low: float = 0.0, high: float = 1.0) -> Row:
    scaled = [(r - low) / (high - low) for r in rewards]
    p: dict[Hashable, float] = {}
    for label in dict.fromkeys(group_ids):
        own = [r for r, g in zip(scaled, group_ids, strict=True) if g == label and there(r)]
        if own:
            p[label] = mean(own) if len(own) > 1 else 0.0
    m, var = (mean(list(p.values())), std(list(p.values())) ** 2) if len(p) > 1 else (0.0, 1.0)
    spread = m * (1 - m) / var - 1 if var > 0 else 0.0
    a, b = max(1 + spread * m / 3, 1.0), max(1 + spread * (1 - m) / 3, 1.0)
    beta = math.gamma(a) * math.gamma(b) / math.gamma(a + b)

    def weight(x: float) -> float:
        density = x ** (a - 1) * (1 - x) ** (b - 1) / beta
        return 1e6 if density == 0 else min(1 / density, 1e6)

    return [(r - p[g]) * weight(p[g]) if there(r) else 0.0 for r, g in zip(scaled, group_ids, strict=True)]

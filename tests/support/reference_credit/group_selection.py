"""Which responses are learned from, how much each counts, how many more are drawn."""

from __future__ import annotations

import math

from reference_credit.group_advantage import Ids, Row, mean, std, there
from reference_credit.group_pairwise import members


def raft_selection(rewards: Row, group_ids: Ids, best: int = 1, at_least: float | None = None) -> list[bool]:
    out = []
    for b, r in enumerate(rewards):
        ordered = sorted(members(rewards, group_ids, b), key=lambda c: -rewards[c])
        out.append(b in ordered[:best] and (at_least is None or r >= at_least))
    return out


def prof(rewards: Row, process_rewards: Row, group_ids: Ids, kept: int) -> list[bool]:
    out = [False] * len(rewards)
    for b in range(len(rewards)):
        group = members(rewards, group_ids, b)
        right = sorted((c for c in group if rewards[c] > 0), key=lambda c: -process_rewards[c])
        wrong = sorted((c for c in group if rewards[c] <= 0), key=lambda c: process_rewards[c])
        half = min(len(right), max(math.ceil(kept / 2), kept - len(wrong)))
        out[b] = b in right[:half] + wrong[: kept - half]
    return out


def pf_ppo(rewards: Row, group_ids: Ids, strategy: str = "power", power: float = 2.0) -> Row:
    p = []
    for b, r in enumerate(rewards):
        ordered = sorted(members(rewards, group_ids, b), key=lambda c: rewards[c])
        if not there(r):
            p.append(0.0)
        elif strategy == "power":
            p.append(abs(r) ** power + 1e-8)
        elif strategy == "max-min":
            p.append(float(b in (ordered[0], ordered[-1])))
        else:
            p.append(0.4 if b == ordered[-1] else 0.1)
    n = sum(map(there, rewards))
    return [n * x / sum(p) for x in p]


def dars(
    rewards: Row, group_ids: Ids, schedule: str = "equal", spread: str = "variance", max_rollouts: int = 32
) -> Row:
    out = []
    for b in range(len(rewards)):
        group = members(rewards, group_ids, b)
        n, solved = max(1, len(group)), sum(rewards[c] > 0 for c in group)
        a = solved / n if solved else 0.5 / n
        s, peak = (2 * a * (1 - a), n / 2) if spread == "variance" else (2 * math.sqrt(a * (1 - a)), n)
        goal = 2 * (1 - a) * peak if schedule == "hardness" else peak
        out.append(float(max(0, min(math.ceil((goal - n * s) / s), max_rollouts - n))) if a < 0.5 else 0.0)
    return out


def recap(losses: list[Row], objectives: list[int], window: int, temperature: float = 5.0, mix: float = 0.5) -> Row:
    scores = []
    for row in losses:
        last, before = row[-window:], row[-2 * window : -window]
        scores.append(mix * mean(last) / mean(before) + (1 - mix) * std(last) / mean(last))
    share = [math.exp(s / temperature) for s in scores]
    return [share[k] / sum(share) for k in objectives]


def stable_reinforce_filter(
    advantages: list[Row] | Row, mask: list[Row], sigmas: float = 3.0, published_code: bool = False
) -> list[Row]:
    rows = [
        [a[t] if isinstance(a, list) else a for t in range(len(counts))]
        for a, counts in zip(advantages, mask, strict=True)
    ]
    tokens = [x for row, counts in zip(rows, mask, strict=True) for x, c in zip(row, counts, strict=True) if c]
    m, sigma = mean(tokens), math.sqrt(std(tokens, 0) ** 2 + 1e-8)

    def kept(z: float) -> float:
        inside = abs(z - m) <= sigmas and abs(z) <= 10 if published_code else abs(z) <= sigmas
        return z if inside else 0.0

    return [
        [kept((x - m) / sigma) if c else 0.0 for x, c in zip(row, counts, strict=True)]
        for row, counts in zip(rows, mask, strict=True)
    ]

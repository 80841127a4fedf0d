"""Credit of turns."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence

Row = list[float]
Rows = list[list[float]]
Ids = list[list[int]]
Labels = Sequence[Sequence[Hashable]]


def turn_baseline(
    turn_rewards: Rows, segment_ids: list[list[int]], group_ids: list[Hashable], gamma: float = 1.0
) -> Rows:
    returns = []
    for row, turns in zip(turn_rewards, segment_ids, strict=True):
        after, found = 0.0, [0.0] * len(row)
        for k in range(max([-1, *turns]), -1, -1):
            after = (0.0 if math.isnan(row[k]) else row[k]) + gamma * after
            found[k] = after
        returns.append(found)
    out = []
    for b, turns in enumerate(segment_ids):
        others = [i for i in range(len(returns)) if i != b and group_ids[i] == group_ids[b]]
        line = []
        for k in turns:
            baseline = sum(returns[i][k] for i in others) / len(others) if others and k >= 0 else 0.0
            line.append(returns[b][k] - baseline if k >= 0 else 0.0)
        out.append(line)
    return out


# --------------------------------------------------------------------------------------------------------------- parts
def mean(x: Row) -> float:
    return sum(x) / len(x)


def std(x: Row, ddof: int) -> float:
    return math.sqrt(sum((v - mean(x)) ** 2 for v in x) / (len(x) - ddof))


def count(ids: list[int]) -> int:
    """Turns of a response."""
    return max([-1, *ids]) + 1


def trimmed(turn_values: Rows, segment_ids: Ids) -> Rows:
    """What there is of each response; NaN = none."""
    return [row[: count(ids)] for row, ids in zip(turn_values, segment_ids, strict=True)]


def there(row: Row) -> Row:
    return [x for x in row if not math.isnan(x)]


def total(row: Row) -> float:
    return sum(there(row)) if there(row) else math.nan


def returns_from(row: Row, gamma: float) -> Row:
    found, after = [], 0.0
    for r in reversed(row):
        after = (0.0 if math.isnan(r) else r) + gamma * after
        found.append(after)
    return found[::-1]


def normed(x: float, members: Row, norm: str, eps: float, alone: str, ddof: int = 1) -> float:
    """A value against its group, of which it is one."""
    members = there(members)
    if math.isnan(x):
        return 0.0
    if len(members) == 1:
        return x if alone == "raw" else 0.0
    centred = x - mean(members)
    if abs(centred) < 1e-12:
        return 0.0
    return centred / (std(members, ddof) + eps) if norm == "mean-std" else centred


def of_responses(
    rewards: Row, group_ids: list[Hashable], norm: str, eps: float, alone: str, weights: Row | None = None
) -> Row:
    found = []
    for r, g in zip(rewards, group_ids, strict=True):
        members = [b for b, other in enumerate(group_ids) if other == g]
        values = [rewards[b] for b in members for _ in range(1 if weights is None else int(weights[b]))]
        if math.isnan(r) or not there(values):
            found.append(0.0)
            continue
        found.append(normed(r, values, norm, eps, alone))
    return found


def of_turns(rows: Rows, keys: Labels, norm: str, eps: float, alone: str, ddof: int = 1) -> Rows:
    """Values of turns against those of the turns with the same key; None: no group."""
    found = []
    for b, row in enumerate(rows):
        line = []
        for k, x in enumerate(row):
            members = [
                y for other, own in zip(rows, keys, strict=True) for y, key in zip(other, own, strict=False)
                if key == keys[b][k]
            ]  # fmt: skip
            line.append(0.0 if keys[b][k] is None else normed(x, members, norm, eps, alone, ddof))
        found.append(line)
    return found


def same_prompt(rows: Rows, group_ids: list[Hashable]) -> Labels:
    return [[g] * len(row) for row, g in zip(rows, group_ids, strict=True)]


def spread(rows: Rows, segment_ids: Ids) -> Rows:
    return [[row[k] if k >= 0 else 0.0 for k in ids] for row, ids in zip(rows, segment_ids, strict=True)]


def lengths(ids: list[int]) -> list[int]:
    return [sum(k == j for k in ids) for j in range(count(ids))]


# ------------------------------------------------------------------------------------------------------------- methods
def match_tir(
    turn_rewards: Rows, segment_ids: Ids, group_ids: list[Hashable], lam: float = 0.9, eps: float = 1e-6
) -> Rows:
    rows = trimmed(turn_rewards, segment_ids)
    whole = of_responses([total(row) for row in rows], group_ids, "mean-std", eps, "raw")
    later = [returns_from(row, lam) for row in rows]
    keys = [[(g, k) for k in range(len(row))] for row, g in zip(rows, group_ids, strict=True)]
    step = of_turns(later, keys, "mean-std", eps, "raw")
    return spread([[(a + d) / 2 for d in line] for a, line in zip(whole, step, strict=True)], segment_ids)


def match_tir_rewards(
    rewards: Row, call_scores: list[Rows], call_turns: Ids, segment_ids: Ids, assignment: str = "hard",
    reg: float = 0.1, iterations: int = 100, num_segments: int | None = None,
) -> Rows:  # fmt: skip
    found = []
    for b, ids in enumerate(segment_ids):
        score = call_scores[b]
        pairs = [(s, p, q) for p, row in enumerate(score) for q, s in enumerate(row) if s == s]
        matched = _greedy(pairs) if assignment == "hard" else _transported(pairs, reg, iterations)
        turns = [[matched.get(p, 0.0) for p, turn in enumerate(call_turns[b]) if turn == k] for k in range(count(ids))]
        values = [mean(of) if of else 0.0 for of in turns[:-1]] + [rewards[b]] * (count(ids) > 0)
        ends = {k: max(t for t, j in enumerate(ids) if j == k) for k in range(count(ids))}
        line = [0.0] * len(ids)
        for k, t in ends.items():
            line[t] = values[k]
        found.append(line)
    return found


def _greedy(pairs: list[tuple[float, int, int]]) -> dict[int, float]:
    matched: dict[int, float] = {}
    taken = set()
    for s, p, q in sorted(pairs, key=lambda pair: -pair[0]):
        if s > 0 and p not in matched and q not in taken:
            matched[p] = s
            taken.add(q)
    return matched


def _transported(pairs: list[tuple[float, int, int]], reg: float, iterations: int) -> dict[int, float]:
    calls, partners = sorted({p for _, p, _ in pairs}), sorted({q for _, _, q in pairs})
    kernel = {(p, q): math.exp(s / reg) for s, p, q in pairs}
    u, v = dict.fromkeys(calls, 1.0), dict.fromkeys(partners, 1.0)
    for _ in range(iterations):
        u = {p: 1 / len(calls) / sum(kernel.get((p, q), 0.0) * v[q] for q in partners) for p in calls}
        v = {q: 1 / len(partners) / sum(kernel.get((p, q), 0.0) * u[p] for p in calls) for q in partners}
    return {p: sum(u[p] * kernel[i, q] * v[q] * s for s, i, q in pairs if i == p) for p in calls}


def igpo(
    turn_rewards: Rows, segment_ids: Ids, group_ids: list[Hashable], norm: str = "joint", gamma: float = 1.0
) -> Rows:
    rows = trimmed(turn_rewards, segment_ids)
    found = []
    for b, row in enumerate(rows):
        line = []
        for k, x in enumerate(row):
            members = [
                y for i, other in enumerate(rows) for j, y in enumerate(other)
                if group_ids[i] == group_ids[b]
                and (norm == "joint" or (j == len(other) - 1) == (k == len(row) - 1)) and y == y
            ]  # fmt: skip
            scale = math.sqrt(std(members, 0) ** 2 + 1e-8) + 1e-6 if len(members) > 1 else 1.0
            line.append((x - mean(members)) / scale if x == x else 0.0)
        found.append(returns_from(line, gamma))
    return spread(found, segment_ids)


def _episode(rewards: Row, rows: Rows, group_ids: list[Hashable], norm: str, eps: float, across_turns: bool) -> Row:
    """Statistics over as many copies of R as the response has turns: a response of one turn, alone, is one value."""
    weights = [float(len(row)) for row in rows] if across_turns else None
    return of_responses(rewards, group_ids, norm, eps, "raw", weights)


def gigpo(
    rewards: Row, turn_rewards: Rows, segment_ids: Ids, states: Labels, group_ids: list[Hashable], gamma: float = 0.95,
    weight: float = 1.0, norm: str = "mean", eps: float = 1e-6, across_turns: bool = True,
) -> Rows:  # fmt: skip
    rows = trimmed(turn_rewards, segment_ids)
    whole = _episode(rewards, rows, group_ids, norm, eps, across_turns)
    keys = _with_prompt(states, group_ids)
    step = of_turns([returns_from(row, gamma) for row in rows], keys, norm, eps, "zero")
    return spread([[a + weight * d for d in line] for a, line in zip(whole, step, strict=True)], segment_ids)


def _with_prompt(labels: Labels, group_ids: list[Hashable]) -> Labels:
    return [
        [None if x in (None, -1) else (g, x) for x in row] + [None] * 99
        for row, g in zip(labels, group_ids, strict=True)
    ]


def hgpo(
    turn_rewards: Rows, segment_ids: Ids, states: Labels, group_ids: list[Hashable], rewards: Row | None = None,
    history: int = 2, alpha: float = 1.0, gamma: float = 0.95, norm: str = "mean-std", eps: float = 1e-6,
) -> Rows:  # fmt: skip
    rows = trimmed(turn_rewards, segment_ids)
    later = [returns_from(row, gamma) for row in rows]
    levels = []
    if rewards is not None:
        whole = _episode(rewards, rows, group_ids, norm, eps, True)
        levels.append((0, [[a] * len(row) for a, row in zip(whole, rows, strict=True)]))
    for k in range(1, history + 2):
        keys = []
        for row, g, own in zip(rows, group_ids, states, strict=True):
            last = [tuple(own[j - k + 1 : j + 1]) if j - k + 1 >= 0 else None for j in range(len(row))]
            keys.append([None if h is None or None in h or -1 in h else (g, h) for h in last])
        levels.append((k, of_turns(later, keys, norm, eps, "zero", ddof=0)))
    found = []
    for b, row in enumerate(rows):
        line = []
        for j in range(len(row)):
            items = [((k + 1) ** alpha, level[b][j]) for k, level in levels if level[b][j] != 0]
            line.append(sum(w * a for w, a in items) / (sum(w for w, _ in items) + eps) if items else 0.0)
        found.append(line)
    return spread(found, segment_ids)


def rlvmr(
    rewards: Row, turn_rewards: Rows, segment_ids: Ids, tags: Labels, group_ids: list[Hashable], weight: float = 1.0,
    norm: str = "mean", eps: float = 1e-6, across_turns: bool = True,
) -> Rows:  # fmt: skip
    rows = trimmed(turn_rewards, segment_ids)
    whole = _episode(rewards, rows, group_ids, norm, eps, across_turns)
    step = of_turns(rows, _with_prompt(tags, group_ids), norm, eps, "raw")
    return spread([[a + weight * d for d in line] for a, line in zip(whole, step, strict=True)], segment_ids)


def istar(
    rewards: Row, segment_ids: Ids, prm_logprobs: Rows, old_logprobs: Rows, group_ids: list[Hashable],
    beta: float = 0.05, alpha: float = 1.0, norm: str = "mean-std", eps: float = 1e-6, num_segments: int | None = None,
) -> Rows:  # fmt: skip
    rows = []
    for ids, prm, old in zip(segment_ids, prm_logprobs, old_logprobs, strict=True):
        rows.append([beta * sum(prm[t] - old[t] for t, k in enumerate(ids) if k == j) for j in range(count(ids))])
    whole = of_responses(rewards, group_ids, norm, eps, "raw")
    step = of_turns(rows, same_prompt(rows, group_ids), norm, eps, "raw")
    return spread([[a + alpha * d for d in line] for a, line in zip(whole, step, strict=True)], segment_ids)


def pro_rag(
    rewards: Row, turn_rewards: Rows, segment_ids: Ids, group_ids: list[Hashable], beta: float = 0.3, eps: float = 1e-4
) -> Rows:
    rows = trimmed(turn_rewards, segment_ids)
    whole = of_responses(rewards, group_ids, "mean-std", eps, "zero")
    found = []
    for b, ids in enumerate(segment_ids):
        tokens = [
            rows[i][k] for i, own in enumerate(segment_ids) if group_ids[i] == group_ids[b]
            for k in own if k >= 0 and rows[i][k] == rows[i][k]
        ]  # fmt: skip
        scale = math.sqrt(std(tokens, 0) ** 2 + 1e-8) if tokens else 1.0
        step = [(rows[b][k] - mean(tokens)) / scale if k >= 0 and rows[b][k] == rows[b][k] else 0.0 for k in ids]
        found.append([whole[b] + beta * a if k >= 0 else 0.0 for k, a in zip(ids, step, strict=True)])
    return found

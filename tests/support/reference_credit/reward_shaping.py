"""Combined and shaped rewards."""

from __future__ import annotations

import math
import statistics

Row = list[float]
Rows = list[Row]


def chat_shop_buddy(components: Rows, thresholds: float = 0.5) -> Row:
    found = []
    for row in components:
        total, some = 0.0, False
        for k, x in enumerate(row):
            if all(before > thresholds for before in row[:k]):
                some |= not math.isnan(x)
                total += 0.0 if math.isnan(x) else x
        found.append(total if some or not all(map(math.isnan, row)) else math.nan)
    return found


def _there(row: Row) -> Row:
    return [x for x in row if not math.isnan(x)]


def _sum(row: Row, weights: Row | None = None) -> float:
    pairs = [(x, w) for x, w in zip(row, weights or [1.0] * len(row), strict=True) if not math.isnan(x)]
    return sum(x * w for x, w in pairs) if pairs else math.nan


def _mean(row: Row, weights: Row | None = None) -> float:
    used = [w for x, w in zip(row, weights or [1.0] * len(row), strict=True) if not math.isnan(x)]
    return _sum(row, weights) / sum(used) if used else math.nan


def _logsigmoid(x: float) -> float:
    return -math.log1p(math.exp(-x))


def par(rewards: Row, reference_rewards: Rows, scale: float = 1.0) -> Row:
    return [
        _mean([1 / (1 + math.exp(-scale * (r - other))) for other in others])
        for r, others in zip(rewards, reference_rewards, strict=True)
    ]


def lsc(components: Rows, mean: Row, std: Row, quantile: float = 0.85, eps: float = 1e-5) -> Row:
    at = [statistics.NormalDist(m, s + eps).inv_cdf(quantile) for m, s in zip(mean, std, strict=True)]
    return [_sum([_logsigmoid(r - x) if r == r else r for r, x in zip(row, at, strict=True)]) for row in components]


def wco(components: Rows) -> Row:
    return [min(_there(row), default=math.nan) for row in components]


def uwo(components: Rows, penalty: float = 0.1, ddof: int = 1) -> Row:
    found = []
    for row in components:
        values = _there(row)
        mean = _mean(row)
        freedom = len(values) - ddof
        found.append(mean - (penalty * sum((x - mean) ** 2 for x in values) / freedom if freedom > 0 else 0.0))
    return found


def quark(components: Rows, mean: Row, std: Row, weights: Row | None = None, eps: float = 1e-6) -> Row:
    return [_sum([(r - m) / (s + eps) for r, m, s in zip(row, mean, std, strict=True)], weights) for row in components]


def _z(column: Row, eps: float) -> Row:
    mean = sum(column) / len(column)
    std = math.sqrt(sum((x - mean) ** 2 for x in column) / (len(column) - 1)) if len(column) > 1 else 0.0
    return [(x - mean) / (std + eps) if len(column) > 1 else 0.0 for x in column]


def constrained_rlhf(rewards: Row, constrained: Rows, multipliers: Row, eps: float = 1e-8) -> Row:
    columns = [_z(list(column), eps) for column in zip(*constrained, strict=True)]
    main = len(multipliers) - sum(multipliers)
    return [
        main * z + sum(mu * column[b] for mu, column in zip(multipliers, columns, strict=True))
        for b, z in enumerate(_z(rewards, eps))
    ]


def sd_e2(components: Rows, group_ids: list[str], weights: Row | None = None, eps: float = 1e-6) -> Row:
    found = [0.0] * len(components)
    for label in set(group_ids):
        members = [b for b, other in enumerate(group_ids) if other == label]
        for k, w in enumerate(weights or [1.0] * len(components[0])):
            for b, z in zip(members, _z([components[b][k] for b in members], eps), strict=True):
                found[b] += w * z
    return found


def parrot(components: Rows, weights: Row | None = None) -> Row:
    def dominated(row: Row) -> bool:
        return any(all(a >= b for a, b in zip(other, row, strict=True)) and other != row for other in components)

    return [0.0 if dominated(row) else _sum(row, weights) for row in components]


def searchllm(bottom_line: Rows, utilities: Rows, weights: Row | None = None, smoothing: float = 0.01) -> Row:
    return [
        math.prod(b + smoothing for b in floor) ** (1 / len(floor)) * _mean(row, weights)
        for floor, row in zip(bottom_line, utilities, strict=True)
    ]


def carl(progress: Row, factors: Rows, failed: Row | None = None, terminal_penalty: float = 1.0) -> Row:
    return [
        x * math.prod(factors[b]) - (terminal_penalty if failed is not None and failed[b] else 0.0)
        for b, x in enumerate(progress)
    ]


def crf(rewards: Row, conciseness: Row, difficulty: Row, alpha: float = 1.0, annealed: float = 1.0) -> Row:
    triples = zip(rewards, conciseness, difficulty, strict=True)
    return [r * (1 + alpha * c * (annealed + d)) for r, c, d in triples]


def rubric(
    components: Rows, weights: Row | None = None, veto: list[bool] | None = None, saturation: float = 1.0
) -> Row:
    found = []
    for row in components:
        failed = veto is not None and any(v and x < 0.5 for v, x in zip(veto, row, strict=True))
        found.append(0.0 if failed else min(_mean(row, weights), saturation) / saturation)
    return found


def toolrl(format_rewards: Row, matches: Row, scale: float = 3.0) -> Row:
    return [f + scale * (2 * m - 1) for f, m in zip(format_rewards, matches, strict=True)]


def router_r1(format_rewards: Row, rewards: Row, costs: Row, alpha: float = 0.6) -> Row:
    triples = zip(format_rewards, rewards, costs, strict=True)
    return [f if f < 0 else f + (1 - alpha) * r + alpha * c for f, r, c in triples]


def ssl_tiers(
    rewards: Row, bounds: tuple[float, ...] = (0.25, 0.5, 0.75), values: tuple[float, ...] = (0.0, 0.25, 0.5, 1.0)
) -> Row:
    return [math.nan if math.isnan(r) else values[sum(r >= bound for bound in bounds)] for r in rewards]


def dapo_overlong(
    rewards: Row, lengths: Row, max_length: int = 20480, buffer: int = 4096, factor: float = 1.0,
    floor: float | None = -1.0,
) -> Row:  # fmt: skip
    found = []
    for r, n in zip(rewards, lengths, strict=True):
        penalty = min(-(n - (max_length - buffer)) / buffer * factor, 0.0)
        found.append(r + (penalty if floor is None else max(penalty, floor)))
    return found


def r3(relevance: Row, length_incentive: Row, tokens: list[list[int]], mask: Rows) -> Row:
    found = []
    for b, (r, incentive) in enumerate(zip(relevance, length_incentive, strict=True)):
        ids = [x for x, m in zip(tokens[b], mask[b], strict=True) if m]
        trigrams = [tuple(ids[i : i + 3]) for i in range(len(ids) - 2)]
        found.append(r * incentive * (len(set(trigrams)) / len(trigrams) if trigrams else 1.0))
    return found

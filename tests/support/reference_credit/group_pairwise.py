"""Advantages and rewards from comparisons of responses."""

from __future__ import annotations

import math

from reference_credit.group_advantage import Ids, Row, mean, std, there
from reference_credit.group_baseline import zero


def members(values: Row, group_ids: Ids, b: int) -> list[int]:
    return [c for c in range(len(values)) if group_ids[c] == group_ids[b] and there(values[c])]


def heron(signals: list[Row], group_ids: Ids, margins: float = 0.0) -> Row:
    found = []
    for b, own in enumerate(signals):
        if not any(map(there, own)):
            found.append(math.nan)
            continue
        results = []
        for c, other in enumerate(signals):
            if c != b and group_ids[c] == group_ids[b] and any(map(there, other)):
                gaps = [x - y for x, y in zip(own, other, strict=True)]
                decisive = next((gap for gap in gaps if abs(gap) > margins), 0.0)
                results.append(0.5 if decisive == 0 else float(decisive > 0))
        found.append(sum(results) / len(results) if results else 0.5)
    return found


def arena_rl(
    wins: list[Row] | Row, group_ids: Ids, tournament: str = "round-robin", tie_breaks: Row | None = None
) -> Row:
    points: list[tuple[float, float] | None] = []
    for b, row in enumerate(wins):
        results = [x for x in (row if isinstance(row, list) else [row]) if there(x)]
        points.append((sum(results), 0.0 if tie_breaks is None else tie_breaks[b]) if results else None)
    scores = [math.nan] * len(points)
    for b, own in enumerate(points):
        if own is None:
            continue
        group = [p for p, g in zip(points, group_ids, strict=True) if g == group_ids[b] and p is not None]
        if tournament in ("round-robin", "anchor"):
            ranks = [1 + sum(q > p for q in group) for p in group]
            rank = 1 + sum(q > own for q in group)
            scores[b] = (max(ranks) - rank) / (max(ranks) - 1) if max(ranks) > 1 else 0.0
        else:
            places = [k for k, p in enumerate(sorted(group, reverse=True)) if p == own]
            scores[b] = 1 - mean([float(k) for k in places]) / (len(group) - 1) if len(group) > 1 else 0.0
    return zero(scores, group_ids)


def pref_grpo(
    comparisons: list[Row], group_ids: Ids, rewards: list[Row] | None = None, component_weights: Row | None = None
) -> Row:
    results = [[x for x in row if there(x)] for row in comparisons]
    columns = [[round(mean(row), 3) if row else math.nan for row in results]]
    columns += [list(column) for column in zip(*rewards, strict=True)] if rewards else []
    out = [0.0] * len(comparisons)
    for w, column in zip(component_weights or [1.0] * len(columns), columns, strict=True):
        for b, x in enumerate(column):
            group = [column[c] for c in members(column, group_ids, b)]
            if there(x) and len(group) > 1 and x != mean(group):
                out[b] += w * (x - mean(group)) / (std(group) + 1e-8)
    return [max(-5.0, min(5.0, a)) for a in out]


def think_rm(differences: list[Row], group_ids: Ids) -> Row:
    total = [sum(x for x in row if there(x)) if any(map(there, row)) else math.nan for row in differences]
    out = [0.0] * len(differences)
    for b in range(len(differences)):
        group = members(total, group_ids, b)
        n = len(group)
        if there(total[b]) and n > 1:
            squares = sum(x * x for c in group for x in differences[c] if there(x))
            out[b] = total[b] / n / math.sqrt(squares / (2 * n * (n - 1)) + 1e-6)
    return out


def brpo(votes: list[Row], reference: list[bool]) -> Row:
    cast = [[v for v in row if there(v)] for row in votes]
    return [
        0.0 if r or not row else 1.0 if all(v > 0 for v in row) else -1.0
        for row, r in zip(cast, reference, strict=True)
    ]


def openrs(criteria: list[Row], criterion_weights: Row, critical: list[bool], verified: Row | None = None) -> Row:
    out = []
    for b, row in enumerate(criteria):
        fatal = [d for d, c in zip(row, critical, strict=True) if c and there(d) and d != 0]
        telling = [
            (d, w) for d, w, c in zip(row, criterion_weights, critical, strict=True) if not c and there(d) and d != 0
        ]
        score = sum(w * d for d, w in telling) / (sum(w for _, w in telling) + 1e-6)
        score = sum(fatal) if fatal else score
        out.append(verified[b] if verified is not None and there(verified[b]) and verified[b] != 0 else score)
    return out

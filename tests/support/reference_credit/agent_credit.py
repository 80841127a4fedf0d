"""Credit of an agent's turns, and rewards of its trajectories."""

from __future__ import annotations

import math
from collections.abc import Hashable

from reference_credit.turn_credit import (
    Ids,
    Row,
    Rows,
    lengths,
    mean,
    of_responses,
    of_turns,
    returns_from,
    same_prompt,
    spread,
    std,
    there,
    total,
    trimmed,
)  # fmt: skip


def _gae(rewards: Row, values: Row, gamma: float, lam: float) -> Row:
    found, after, value = [], 0.0, 0.0
    for r, v in zip(reversed(rewards), reversed(values), strict=True):
        after = r + gamma * value - v + gamma * lam * after
        value = v
        found.append(after)
    return found[::-1]


def multi_turn_ppo(
    turn_rewards: Rows, values: Rows, segment_ids: Ids, level: str = "token", gamma: float = 1.0, lam: float = 1.0
) -> Rows:
    found = []
    for row, v, ids in zip(trimmed(turn_rewards, segment_ids), values, segment_ids, strict=True):
        rewards = [0.0 if r != r else r for r in row]
        if level == "turn":
            line = _gae(rewards, [v[ids.index(k)] for k in range(len(row))], gamma, lam)
            found.append([line[k] if k >= 0 else 0.0 for k in ids])
            continue
        own = [t for t, k in enumerate(ids) if k >= 0]
        ends = {max(t for t in own if ids[t] == k): r for k, r in enumerate(rewards)}
        line = _gae([ends.get(t, 0.0) for t in own], [v[t] for t in own], gamma, lam)
        found.append([line[own.index(t)] if k >= 0 else 0.0 for t, k in enumerate(ids)])
    tokens = [a for row, ids in zip(found, segment_ids, strict=True) for a, k in zip(row, ids, strict=True) if k >= 0]
    scale = math.sqrt(std(tokens, 1) ** 2 + 1e-8)
    return [
        [(a - mean(tokens)) / scale if k >= 0 else 0.0 for a, k in zip(row, ids, strict=True)]
        for row, ids in zip(found, segment_ids, strict=True)
    ]


def multi_turn_grpo(
    turn_rewards: Rows, segment_ids: Ids, group_ids: list[Hashable], level: str = "response",
    token_weighted: bool = True, norm: str = "mean", gamma: float = 1.0, eps: float = 1e-6,
) -> Rows:  # fmt: skip
    def value(x: float, members: Row, weights: Row) -> float:
        if len(members) == 1:
            return 0.0
        center = sum(w * y for w, y in zip(weights, members, strict=True)) / sum(weights)
        return (x - center) / (std(members, 1) + eps if norm == "mean-std" else 1.0)

    return _at_level(turn_rewards, segment_ids, group_ids, level, gamma, value, token_weighted)


def multi_turn_rloo(
    turn_rewards: Rows, segment_ids: Ids, group_ids: list[Hashable], level: str = "response", gamma: float = 1.0
) -> Rows:
    def value(x: float, members: Row, _: Row) -> float:
        return x if len(members) == 1 else x - (sum(members) - x) / (len(members) - 1)

    return _at_level(turn_rewards, segment_ids, group_ids, level, gamma, value, False)


def _at_level(turn_rewards, segment_ids, group_ids, level, gamma, value, token_weighted):  # type: ignore[no-untyped-def]
    rows = trimmed(turn_rewards, segment_ids)
    x = [[total(row)] * len(row) for row in rows] if level == "response" else [returns_from(row, gamma) for row in rows]
    tokens = [sum(lengths(ids)) if token_weighted else 1 for ids in segment_ids]
    found = []
    for b, row in enumerate(x):
        line = []
        for k, y in enumerate(row):
            members = [
                i for i, other in enumerate(x) if group_ids[i] == group_ids[b]
                and (len(other) > k if level == "turn" else other and other[0] == other[0])
            ]  # fmt: skip
            at = k if level == "turn" else 0
            line.append(value(y, [x[i][at] for i in members], [tokens[i] for i in members]) if y == y else 0.0)
        found.append(line)
    return spread(found, segment_ids)


def trm(
    rewards: Row, turn_rewards: Rows, segment_ids: Ids, group_ids: list[Hashable], weight: float = 1.0,
    norm: str = "mean-std", eps: float = 1e-6,
) -> Rows:  # fmt: skip
    rows = trimmed(turn_rewards, segment_ids)
    whole = of_responses(rewards, group_ids, norm, eps, "zero")
    call = of_turns(rows, same_prompt(rows, group_ids), norm, eps, "zero")
    return spread([[a + weight * c for c in line] for a, line in zip(whole, call, strict=True)], segment_ids)


def scope(
    rewards: Row, turn_scores: Rows, segment_ids: Ids, group_ids: list[Hashable], threshold: float = 0.5,
    blame: float = 0.0, eps: float = 1e-6,
) -> Rows:  # fmt: skip
    whole = of_responses(rewards, group_ids, "mean-std", eps, "zero")
    found = []
    for a, row in zip(whole, trimmed(turn_scores, segment_ids), strict=True):
        first = next((k for k, x in enumerate(row) if x < threshold), 0)
        found.append([a * blame if a < 0 and k < first else a for k in range(len(row))])
    return spread(found, segment_ids)


def cm2(
    criteria: Rows, segment_ids: Ids, open_criteria: list[Rows], group_ids: list[Hashable],
    weights: Rows | None = None, min_scores: int = 5, normalize: bool = False,
) -> Rows:  # fmt: skip
    found = []
    for b, steps in enumerate(open_criteria):
        line = []
        for is_open in steps:
            advantage = weight = 0.0
            for c, x in enumerate(criteria[b]):
                w = weights[b][c] if weights else 1.0
                if not is_open[c] or x != x:
                    continue
                members = there([row[c] for row, g in zip(criteria, group_ids, strict=True) if g == group_ids[b]])
                weight += w
                if len(members) >= min_scores and len(members) > 1:
                    advantage += w * (x - mean(members))
            line.append(advantage / (weight if normalize and weight else 1.0))
        found.append(line)
    return spread(found, segment_ids)


# ------------------------------------------------------------------------------------------------------------- rewards
def r3_rag(
    rewards: Row, turn_rewards: Rows, segment_ids: Ids, well_formed: Rows | None = None, right_factor: float = 1.6,
    right_final: float = 2.0, wrong_factor: float = 0.8, wrong_final: float = 0.0, unanswered_factor: float = 0.9,
    malformed: float = -0.9,
) -> Rows:  # fmt: skip
    found = [[0.0] * len(ids) for ids in segment_ids]
    for b, row in enumerate(trimmed(turn_rewards, segment_ids)):
        for k, relevance in enumerate(row):
            if rewards[b] != rewards[b]:
                r = relevance * unanswered_factor
            elif k == len(row) - 1:
                r = right_final if rewards[b] > 0 else wrong_final
            else:
                r = relevance * (right_factor if rewards[b] > 0 else wrong_factor)
            if well_formed is not None and not well_formed[b][k]:
                r = malformed
            if r == r:
                found[b][max(t for t, j in enumerate(segment_ids[b]) if j == k)] = r
    return found


def _mean(row: Row) -> float:
    return mean(there(row)) if there(row) else 0.0


def search_r2(rewards: Row, evidence: Rows, weight: float = 1.0) -> Row:
    return [r * (1 + weight * _mean(row)) for r, row in zip(rewards, evidence, strict=True)]


def sub_search(
    rewards: Row, answerability: Rows, decomposition: Rows, format_rewards: Row | None = None, beta: float = 0.2,
    high: float = 1.0,
) -> Row:  # fmt: skip
    found = []
    for b, em in enumerate(rewards):
        r = em + beta * (0.5 * _mean(answerability[b]) + 0.5 * _mean(decomposition[b])) * (1 - em)
        r += format_rewards[b] if format_rewards else 0.0
        found.append(high if r > high else r)
    return found


def chat_r1(rewards: Row, intents: Rows, alpha: float = 0.5) -> Row:
    return [r + alpha * max(there(row), default=0.0) for r, row in zip(rewards, intents, strict=True)]


def long_trace_rl(
    rewards: Row, rubrics: Row, group_ids: list[Hashable], mode: str = "positive", rho: float = 0.3, eta: float = 0.5
) -> Row:
    found = []
    for b, (out, own) in enumerate(zip(rewards, rubrics, strict=True)):
        top = max(there([x for x, g in zip(rubrics, group_ids, strict=True) if g == group_ids[b]]), default=0.0)
        rubric = 0.0 if own != own else own / top if top > 0 else own
        mixed = (1 - rho) * out + rho * rubric
        if mode == "longrlvr":
            found.append(out + eta * rubric + (1 - eta) * out * rubric)
        elif mode == "positive":
            found.append(out if out == 0 else mixed)
        else:
            found.append(mixed if mode == "always" or out == 0 else out)
    return found


def medsam_agent(
    turn_scores: Rows, start: float = 0.0, threshold: float = 0.01, weight: float = 0.5, turn_cost: float = 0.0
) -> Row:
    found = []
    for row in turn_scores:
        steps = there(row)
        gains = [x - before for before, x in zip([start, *steps], steps, strict=False)]
        share = mean([float(g >= threshold) for g in gains]) if steps else math.nan
        found.append(steps[-1] + weight * share - turn_cost * len(steps) if steps else math.nan)
    return found

"""Rewards from likelihoods."""

from __future__ import annotations

import math

Rows = list[list[float]]
Row = list[float]


def _counted(rows: Rows, mask: Rows | None) -> Rows:
    return [[x for t, x in enumerate(row) if mask is None or mask[b][t]] for b, row in enumerate(rows)]


def _score(tokens: Row, score: str) -> float:
    n = len(tokens)
    if score in ("sum", "mean"):
        if not n:
            return math.nan
        return sum(tokens) if score == "sum" else sum(tokens) / n
    if not n:
        return 0.0
    if score == "mean-prob":
        return sum(math.exp(x) for x in tokens) / n
    return math.exp(sum(tokens) if score == "prob" else sum(tokens) / n)


def likelihood_reward(answer_logprobs: Rows, answer_mask: Rows | None = None, score: str = "sum") -> Row:
    return [_score(tokens, score) for tokens in _counted(answer_logprobs, answer_mask)]


def verifree_reward(answer_logprobs: Rows, answer_mask: Rows | None = None) -> Row:
    return [math.exp(sum(tokens)) if tokens else 0.0 for tokens in _counted(answer_logprobs, answer_mask)]


def rlpr(
    answer_logprobs: Rows, answer_mask: Rows, baseline: Row | None = None, format_rewards: Row | None = None,
    score: str = "mean-prob", threshold: float | None = 0.0, weight: float = 0.9,
) -> Row:  # fmt: skip
    found = []
    for b, tokens in enumerate(_counted(answer_logprobs, answer_mask)):
        gain = _score(tokens, score) - (baseline[b] if baseline else 0.0)
        if threshold is not None:
            gain = max(gain, threshold)
        found.append(weight * gain + (1 - weight) * format_rewards[b] if format_rewards else gain)
    return found


def darl(
    answer_logprobs: Rows, answer_mask: Rows, own_logprobs: Rows, own_mask: Rows,
    score: str = "mean-prob", weight: float = 1.0, diversity: float = 0.01, gamma: float = 8.0,
) -> Row:  # fmt: skip
    found = []
    for reference, own in zip(_counted(answer_logprobs, answer_mask), _counted(own_logprobs, own_mask), strict=True):
        r, distance = _score(reference, score), abs(_score(own, score) - _score(reference, score))
        found.append(weight * r + (diversity * distance if distance <= r / gamma else 0.0))
    return found


def sar(logprobs: Rows, mask: Rows, alone_logprobs: Rows, rewards: Row | None = None, weight: float = 0.2) -> Row:
    found = []
    for b, (given, alone) in enumerate(zip(_counted(logprobs, mask), _counted(alone_logprobs, mask), strict=True)):
        ppl, ppl_alone = (math.exp(-sum(x) / len(x)) if x else 1.0 for x in (given, alone))
        fit = max((ppl_alone - ppl) / (ppl_alone + 1e-9), -1.0)
        found.append((rewards[b] if rewards else 0.0) + weight * fit)
    return found


def cdr(strong_logprobs: Rows, mask: Rows, weak_logprobs: Rows, per_token: bool = False) -> Row:
    found = []
    for strong, weak in zip(_counted(strong_logprobs, mask), _counted(weak_logprobs, mask), strict=True):
        ratio = sum(s - w for s, w in zip(strong, weak, strict=True))
        found.append(ratio if not per_token else ratio / len(strong) if strong else math.nan)
    return found


def prompt_echo(prompt_logprobs: Rows, prompt_mask: Rows, score: str = "mean") -> Row:
    return [_score(tokens, score) for tokens in _counted(prompt_logprobs, prompt_mask)]


def flr(positive: Rows, negative: Rows) -> Row:
    return [sum(p) / len(p) - sum(n) / len(n) for p, n in zip(positive, negative, strict=True)]


def rlpt(verdict_logprobs: Rows, soft: bool = False) -> Row:
    if soft:
        return [math.exp(yes) / (math.exp(yes) + math.exp(no)) for yes, no in verdict_logprobs]
    return [1.0 if yes > no else 0.0 for yes, no in verdict_logprobs]


# ------------------------------------------------------------------------------------------------------------- groups
def _std(x: Row, ddof: int) -> float:
    if len(x) <= ddof:
        return math.nan
    center = sum(x) / len(x)
    return math.sqrt(sum((v - center) ** 2 for v in x) / (len(x) - ddof))


def rlpr_filter(
    rewards: Row, group_ids: list[str], running_std: float, ratio: float = 0.5, ddof: int = 1
) -> list[bool]:
    found = []
    for g in group_ids:
        members = [r for r, other in zip(rewards, group_ids, strict=True) if other == g and r == r]
        found.append(_std(members, ddof) >= ratio * running_std)
    return found


def jepo_advantages(answer_logprobs: Rows, answer_mask: Rows, group_ids: list[str]) -> Row:
    p = [math.exp(sum(tokens)) if tokens else None for tokens in _counted(answer_logprobs, answer_mask)]
    found = []
    for i, own in enumerate(p):
        members = [j for j, g in enumerate(group_ids) if g == group_ids[i] and p[j] is not None]
        others = [p[j] for j in members if j != i]
        if own is None or not others:
            found.append(0.0)
            continue
        found.append(math.log(sum(p[j] for j in members) / len(members)) - math.log(sum(others) / len(others)))
    return found


# -------------------------------------------------------------------------------------------------- turns and steps
def igpo_gain(likelihoods: Rows, segment_ids: list[list[int]], rewards: Row) -> Rows:
    found = [[0.0] * len(row) for row in segment_ids]
    for b, row in enumerate(segment_ids):
        ends = {s: t for t, s in enumerate(row) if s >= 0}
        for k, t in ends.items():
            found[b][t] = rewards[b] if k == max(ends) else likelihoods[b][k + 1] - likelihoods[b][k]
    return found


def p2s(
    gains: list[Rows], answer_scores: Row, rewards: Row, group_ids: list[str], well_formed: Row | None = None,
    steepness: float = 10.0, malformed: float = -1.0,
) -> Row:  # fmt: skip
    found = []
    for b, steps in enumerate(gains):
        best = [max((x for x in suffixes if x == x), default=None) for suffixes in steps] + [answer_scores[b]]
        weights = [1 / (1 + math.exp(-steepness * ((i + 1) / len(best) - 0.5))) for i in range(len(best))]
        pairs = [(w, r) for w, r in zip(weights, best, strict=True) if r is not None]
        process = sum(w * r for w, r in pairs) / sum(w for w, _ in pairs)
        right = any(r > 0 for r, g in zip(rewards, group_ids, strict=True) if g == group_ids[b])
        formed = well_formed is None or well_formed[b]
        found.append((rewards[b] if right else process) if formed else malformed)
    return found

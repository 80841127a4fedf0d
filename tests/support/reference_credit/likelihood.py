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

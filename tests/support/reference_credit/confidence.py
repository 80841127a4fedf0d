"""Rewards from distributions."""

from __future__ import annotations

import math

from reference_credit.likelihood import Row, Rows, _counted, _score, _std


def _mean(tokens: Row) -> float:
    return sum(tokens) / len(tokens) if tokens else math.nan


def intuitor(logsumexp: Rows, mean_logit: Rows, mask: Rows) -> Row:
    pairs = zip(_counted(logsumexp, mask), _counted(mean_logit, mask), strict=True)
    return [_mean([u - m for u, m in zip(upper, middle, strict=True)]) for upper, middle in pairs]


def shop_r1(entropy: Rows, mask: Rows, vocab_size: int, rewards: Row | None = None, alpha: float = 0.005) -> Row:
    certainties = [_mean([math.log(vocab_size) - h for h in tokens]) for tokens in _counted(entropy, mask)]
    return [alpha * c + (rewards[b] if rewards else 0.0) for b, c in enumerate(certainties)]


def negative_entropy(entropy: Rows, mask: Rows) -> Row:
    return [-_mean(tokens) for tokens in _counted(entropy, mask)]


def own_likelihood(old_logprobs: Rows, mask: Rows, score: str = "mean") -> Row:
    return [_score(tokens, score) for tokens in _counted(old_logprobs, mask)]


def endogenous(label_logit: Rows, logsumexp: Rows, mask: Rows, final: Row | None = None, alpha: float = 1.0) -> Rows:
    found = [[0.0] * len(row) for row in mask]
    for b, row in enumerate(mask):
        counted = [t for t in range(len(row)) if row[t]]
        for k, t in enumerate(counted):
            last = k == len(counted) - 1
            following = (final[b] if final else 0.0) if last else logsumexp[b][counted[k + 1]]
            found[b][t] = alpha * (label_logit[b][t] - following)
    return found


def _softmax(x: Row) -> Row:
    total = sum(math.exp(v) for v in x)
    return [math.exp(v) / total for v in x]


def oprm(rating_logprobs: Rows, ratings: Row | None = None) -> Row:
    return [sum(p * (ratings[k] if ratings else k + 1) for k, p in enumerate(_softmax(row))) for row in rating_logprobs]


def oprm_win_rate(rating_logprobs: Rows, other_logprobs: Rows, ties: float = 0.5) -> Row:
    found = []
    for x, y in zip(rating_logprobs, other_logprobs, strict=True):
        p, q, wins = _softmax(x), _softmax(y), 0.0
        for i in range(len(p)):
            for j in range(len(q)):
                wins += p[i] * q[j] * (1.0 if i > j else ties if i == j else 0.0)
        found.append(wins)
    return found


def zip_rc(bin_logprobs: list[Rows], values: Row, lengths: Row | None = None, cost: float = 0.0) -> Row:
    found = []
    for bins in bin_logprobs:
        joint = _softmax([x for row in bins for x in row])
        value = length = 0.0
        for i, p in enumerate(joint):
            value += p * values[i // len(bins[0])]
            length += p * lengths[i % len(bins[0])] if lengths else 0.0
        found.append(value - cost * length)
    return found


def laser_score(
    score_logprobs: Row, ref_score_logprobs: Row | None = None,
    beta: float = 0.1, temperature: float = 1.0, constant: float = -23.0,
) -> Row:  # fmt: skip
    base = [temperature * x for x in ref_score_logprobs] if ref_score_logprobs else [constant] * len(score_logprobs)
    return [beta * (temperature * x - c) for x, c in zip(score_logprobs, base, strict=True)]


def value_augmented(logits: Rows, values: Rows, token_ids: list[list[int]], beta: float = 3.0) -> Rows:
    found = [list(row) for row in logits]
    for b, ids in enumerate(token_ids):
        center = sum(values[b]) / len(values[b])
        for k, token in enumerate(ids):
            found[b][token] += beta * (values[b][k] - center)
    return found


def laser_advantages(
    advantages: Row, scores: Row, group_ids: list[str], weight: float = 0.1, min_std: float = 0.1, ddof: int = 1
) -> Row:
    found, clipped = [], [min(max(s, 0.0), 1.0) for s in scores]
    for i, a in enumerate(advantages):
        members = [s for s, g in zip(clipped, group_ids, strict=True) if g == group_ids[i]]
        std = _std(members, ddof)
        own = (clipped[i] - sum(members) / len(members)) / std if std > min_std else 0.0
        found.append((1 - weight) * a + weight * own if std > min_std else a)
    return found


def majority_vote(answers: list[str | None], group_ids: list[str]) -> Row:
    found = []
    for i, own in enumerate(answers):
        members = [a for a, g in zip(answers, group_ids, strict=True) if g == group_ids[i] and a is not None]
        winner = max(members, key=members.count, default=None)  # the first of several
        found.append(1.0 if own is not None and own == winner else 0.0)
    return found

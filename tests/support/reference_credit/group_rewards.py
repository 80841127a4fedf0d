"""Rewards that depend on the rest of the group, and rewards made of several, before GRPO."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable

from reference_credit.group_advantage import Ids, Row, dr_grpo, mean, there
from reference_credit.group_baseline import zero
from reference_credit.group_pairwise import members


def trust_grpo(rewards: Row, thinking_rewards: Row, group_ids: Ids, step: int = 0, steps: float = 500.0) -> Row:
    total = list(rewards)
    for b, r in enumerate(rewards):
        if not there(r):
            continue
        group = members(rewards, group_ids, b)
        if all(rewards[c] >= 0.9 for c in group) or all(rewards[c] <= 0.1 for c in group):
            continue
        think = {c: thinking_rewards[c] if rewards[c] >= 0.2 else 0.0 for c in group}
        right = [think[c] for c in group if rewards[c] >= 0.5]
        wrong = [think[c] for c in group if rewards[c] < 0.5]
        gap = mean(right) - (mean(wrong) if wrong else 0.0) if right else 0.0
        total[b] += 0.3 * math.exp(-step / steps) * math.exp(min(gap, 0.0)) * think[b]
    return zero(total, group_ids)


def unlikeliness(rewards: Row, old_logprobs: list[Row], mask: list[Row], group_ids: Ids, weight: float = 0.25) -> Row:
    likelihood = []
    for row, counts in zip(old_logprobs, mask, strict=True):
        own = [x for x, c in zip(row, counts, strict=True) if c]
        likelihood.append(mean(own) if own else math.nan)
    shaped = []
    for b, r in enumerate(rewards):
        group = members(rewards, group_ids, b)
        rank = sum(likelihood[c] < likelihood[b] for c in group) if there(likelihood[b]) else 0
        shaped.append(r * (1 - weight * rank / len(group)) if there(r) else r)
    return zero(shaped, group_ids)


def fapo(rewards: Row, flawed: list[bool], group_ids: Ids, penalty: float = 1.0) -> Row:
    s = []
    for r, f in zip(rewards, flawed, strict=True):
        s.append(r if not there(r) else -1.0 if r <= 0 else 1.0 - penalty * f)
    return zero(s, group_ids)


def noise_correction(
    rewards: Row, group_ids: Ids, false_positive: float, false_negative: float, forward: bool = False
) -> Row:
    if forward:
        return dr_grpo([r - (1 - false_negative) for r in rewards], group_ids)
    return dr_grpo([(r - false_positive) / (1 - false_positive - false_negative) for r in rewards], group_ids)


def co_reward(answers: list[Hashable], group_ids: Ids, partner_ids: Ids) -> Row:
    out = []
    for b, answer in enumerate(answers):
        votes = Counter(a for a, g in zip(answers, group_ids, strict=True) if g == partner_ids[b] and a is not None)
        label = votes.most_common(1)[0][0] if votes else None
        out.append(float(label is not None and answer == label))
    return out


def armed(rewards: Row, semantic_rewards: Row, group_ids: Ids, weight: float = 1.0, min_range: float = 0.01) -> Row:
    total = list(rewards)
    for b, r in enumerate(rewards):
        if not there(r) or not there(semantic_rewards[b]):
            continue
        group = [semantic_rewards[c] for c in members(rewards, group_ids, b) if there(semantic_rewards[c])]
        span = max(group) - min(group)
        total[b] += weight * (semantic_rewards[b] - min(group)) / span if span >= min_range else 0.0
    return zero(total, group_ids)


def csr(image_scores: list[Row], text_scores: list[Row], image_weight: float = 0.9) -> Row:
    out = []
    for image, text in zip(image_scores, text_scores, strict=True):
        both = [
            image_weight * i + (1 - image_weight) * t for i, t in zip(image, text, strict=True) if there(i) and there(t)
        ]
        out.append(mean(both) if both else math.nan)
    return out

"""Credit of turns."""

from __future__ import annotations

import math
from collections.abc import Hashable

Rows = list[list[float]]


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

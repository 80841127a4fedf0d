"""Credit of turns."""

from __future__ import annotations

import random

from reference_credit import turn_credit as reference

from credit_cases.case import COLUMNS, ROWS, Arguments, Case, floats, groups, rollout_mask, segments
from fastreward import recipes


def _turns(rng: random.Random) -> Arguments:
    rewards = floats(rng, ROWS, COLUMNS + 1)  # a turn that nobody has
    rewards[2, 1] = float("nan")
    return {"turn_rewards": rewards, "segment_ids": segments(rng, rollout_mask(rng)), "group_ids": groups(rng)}


MARKS = {"turn_baseline": "reconstructed"}
CASES = {
    "turn_baseline": Case(recipes.turn_baseline, reference.turn_baseline, _turns, scales_with=("turn_rewards",)),
    "turn_baseline, discounted": Case(recipes.turn_baseline, reference.turn_baseline, _turns, {"gamma": 0.5}),
}

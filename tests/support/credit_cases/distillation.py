"""Distillation on the student's own samples."""

from __future__ import annotations

import random

from reference_credit import distillation as reference

from credit_cases.case import Arguments, Case, logprobs, rollout_mask
from fastreward import recipes


def _sampled(rng: random.Random) -> Arguments:
    mask = rollout_mask(rng)
    return {"old_logprobs": logprobs(rng, mask), "teacher_logprobs": logprobs(rng, mask), "mask": mask}


def _gated(rng: random.Random) -> Arguments:
    arguments = _sampled(rng)
    return {**arguments, "rollout_logprobs": logprobs(rng, arguments["mask"])}


CASES = {
    "opd": Case(recipes.opd, reference.opd, _sampled),
    "opd, gated": Case(recipes.opd, reference.opd, _gated, {"low": 0.8, "high": 1.5}),
}

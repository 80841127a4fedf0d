"""Distillation on the student's own samples."""

from __future__ import annotations

import random
from functools import partial

from reference_credit import distillation as reference
from torch import Tensor

from credit_cases.case import Arguments, Case, floats, logprobs, rollout_mask
from fastreward import recipes


def _sampled(rng: random.Random, student: str = "old_logprobs", advantages: bool = False) -> Arguments:
    mask = rollout_mask(rng)
    arguments = {student: logprobs(rng, mask), "teacher_logprobs": logprobs(rng, mask), "mask": mask}
    return {**arguments, "advantages": floats(rng)} if advantages else arguments


def _with_advantages_of_tokens(rng: random.Random) -> Arguments:
    arguments = _sampled(rng)
    return {**arguments, "advantages": floats(rng, mask=arguments["mask"])}


def _keeps_the_sign(arguments: Arguments, result: Tensor) -> None:
    signs = arguments["advantages"].sign().unsqueeze(-1).expand_as(result)
    assert (result.sign() == signs)[arguments["mask"]].all()


CASES = {
    "opd": Case(recipes.opd, reference.opd, _sampled),
    "opd, with rewards": Case(recipes.opd, reference.opd, partial(_sampled, advantages=True), {"coef": 0.3}),
    "opd, with credit": Case(recipes.opd, reference.opd, _with_advantages_of_tokens),
    "iw_opd": Case(recipes.iw_opd, reference.iw_opd, partial(_sampled, student="rollout_logprobs")),
    "rlsd": Case(
        recipes.rlsd,
        reference.rlsd,
        partial(_sampled, advantages=True),
        law=_keeps_the_sign,
    ),
    "rlsd, wrong ones": Case(
        recipes.rlsd, reference.rlsd, partial(_sampled, advantages=True), {"negative_only": True, "lam": 0.9}
    ),
    "sdar": Case(recipes.sdar, reference.sdar, partial(_sampled, student="logprobs")),
}

"""kernels/program.py and kernels/logits_policy_loss.py under Triton's interpreter, against the float64 reference."""

from __future__ import annotations

import program_checks as checks
import pytest
import raw_checks
import torch
from fastreward.kernels import logits_policy_loss, program

from fastreward import losses
from fastreward.losses._graph import Level

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, of what lies under the mask

LAYOUTS = [(4, 33, False), (3, 20, True), (1, 1, False), (2, 1100, False)]


@pytest.mark.parametrize("name", checks.PROGRAMS)
def test_losses(name: str) -> None:
    named = checks.PROGRAMS[name]()
    masks = list(checks.MASKS)
    for seed, (rows, width, packed) in enumerate(LAYOUTS):
        mask = masks[(seed + len(name)) % len(masks)]
        call = checks.make_call(named, rows, width, mask=mask, packed=packed, seed=seed)
        checks.check_run(program, "cpu", named, call)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(("rows", "width"), [(0, 5), (3, 0)])
def test_nothing(rows: int, width: int, packed: bool) -> None:
    for name in ("ppo", "gspo", "real", "dpo"):
        named = checks.PROGRAMS[name]()
        checks.check_run(program, "cpu", named, checks.make_call(named, rows, width, packed=packed))


def test_prologue() -> None:
    named = checks.prologue_program()
    for rows, width, packed in LAYOUTS[:2]:
        checks.check_run(program, "cpu", named, checks.make_call(named, rows, width, packed=packed))


@pytest.mark.parametrize("seed", range(4))
def test_random_graphs(seed: int) -> None:
    named = checks.random_program(seed, 60 + 40 * seed)
    for rows, width, packed in ((7, 5, False), (9, 11, True)):
        call = checks.make_call(named, rows, width, packed=packed, seed=seed)
        checks.check_run(program, "cpu", named, call, 1e-5)


@pytest.mark.parametrize("packed", [False, True])
def test_backward(packed: bool) -> None:
    named = checks.PROGRAMS["ppo"]()
    for seed, mask in enumerate(checks.MASKS):
        checks.check_backward(program, "cpu", checks.make_call(named, 4, 33, mask=mask, packed=packed, seed=seed))


def test_parameters_and_shapes_give_the_same_source() -> None:
    texts = set()
    for clip in (0.1, 0.3):
        named = checks.policy(losses.ppo(clip_low=clip, dual_clip=3.0), Level.TOKEN, deferred=True)
        texts.add(losses.ppo(clip_low=clip, dual_clip=3.0).source("triton"))
        for rows, width in ((3, 9), (7, 40)):
            checks.check_run(program, "cpu", named, checks.make_call(named, rows, width))
    assert len(texts) == 1


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])  # the interpreter truncates what becomes bf16
def test_logits(dtype: torch.dtype, in_place: bool) -> None:
    for entropy, packed in ((False, False), (True, True)):
        gradient = checks.logits_gradient(losses.ppo(dual_clip=3.0), entropy=entropy, advantage=Level.TOKEN)
        for kind in ("plain", "masked"):
            case = raw_checks.logits_case(kind, dtype, 5, 1003)
            checks.check_logits(logits_policy_loss, "cpu", gradient, case, in_place=in_place, packed=packed)


def test_rescale() -> None:
    for dtype in (torch.float32, torch.float16):
        checks.check_rescale(logits_policy_loss, "cpu", dtype, 3, 1003)

"""The CUDA backend of the loss language, emulated on the CPU: generated kernels against the reference.

This tests what they compute. test_program_compile.py compiles them for real GPUs; only a GPU shows races, memory
ordering, the fast instructions' rounding and speed.
"""

from __future__ import annotations

import platform
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import program_checks as checks
import pytest
import raw_checks
import torch
from emulation import Emulator

from fastreward import losses
from fastreward._arguments.tokens import Tokens
from fastreward.cuda import logits_policy_loss, program
from fastreward.language.node import Level

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        shutil.which("g++") is None or platform.machine() != "x86_64" or platform.system() != "Linux",
        reason="the emulation needs g++ on x86-64 Linux",
    ),
]
#: Where `program` has its launches from.
_RUN = sys.modules["fastreward.cuda.program.run"]
LAYOUTS = [(5, 33, False), (2, 2500, False), (1, 1, False), (20, 3, True), (3, 5000, True)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("emulation")


@pytest.fixture
def emulator(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Emulator]:
    stand_in = Emulator(folder)
    for module in (_RUN, logits_policy_loss):
        for name in ("launch_text", "multiprocessors", "has_clusters", "shared_memory", "counter"):
            if hasattr(module, name):
                monkeypatch.setattr(module, name, getattr(stand_in, name))
    empty = torch.empty

    def poisoned(*shape: Any, **options: Any) -> torch.Tensor:
        made = empty(*shape, **options)
        return made.fill_(torch.nan) if made.is_floating_point() else made.fill_(1 << 30)

    monkeypatch.setattr(torch, "empty", poisoned)  # what nobody has written is seen
    yield stand_in
    assert int(stand_in.counter(torch.device("cpu"))) == 0, "a kernel left its counter"


@pytest.mark.parametrize("name", checks.PROGRAMS)
def test_losses(name: str, emulator: Emulator) -> None:
    named = checks.PROGRAMS[name]()
    masks = list(checks.MASKS)
    for seed, (rows, width, packed) in enumerate(LAYOUTS):
        mask = masks[(seed + len(name)) % len(masks)]
        call = checks.make_call(named, rows, width, mask=mask, packed=packed, seed=seed)
        checks.check_run(program, "cpu", named, call)
    for packed in (False, True):
        for rows, width in ((0, 5), (3, 0)):
            call = checks.make_call(named, rows, width, packed=packed)
            checks.check_run(program, "cpu", named, call)


@pytest.mark.parametrize("seed", range(4))
def test_scans(seed: int, emulator: Emulator) -> None:
    """Rows shorter and longer than a unit, packed and padded."""
    named = checks.scan_program(seed, 5)
    rows, width, packed = [(3, 300, False), (2, 2100, True), (4, 33, True), (1, 4200, False)][seed]
    call = checks.make_call(named, rows, width, mask=list(checks.MASKS)[seed], packed=packed, seed=seed)
    checks.check_run(program, "cpu", named, call, 1e-5)


def test_prologue(emulator: Emulator) -> None:
    """Reductions of what is known before the first pass take a launch of one block; outputs may be plain inputs."""
    named = checks.prologue_program()
    for rows, width, packed in LAYOUTS:
        checks.check_run(program, "cpu", named, checks.make_call(named, rows, width, packed=packed))
    assert emulator.launched[-2:] == ["program_rows", "program_pass_1"]


def test_ties(emulator: Emulator) -> None:
    named = checks.ties_program()
    checks.check_run(program, "cpu", named, checks.make_call(named, 9, 11), 0.0)


def test_functions(emulator: Emulator) -> None:
    checks.check_functions(program, "cpu")


@pytest.mark.parametrize("seed", range(4))
def test_random_graphs(seed: int, emulator: Emulator) -> None:
    named = checks.random_program(seed, 60 + 40 * seed)
    for rows, width, packed in ((7, 5, False), (9, 11, True), (0, 3, False)):
        checks.check_run(program, "cpu", named, checks.make_call(named, rows, width, packed=packed, seed=seed), 1e-5)


def test_backward_of_an_overflow(emulator: Emulator) -> None:
    checks.check_overflow(program, "cpu")


@pytest.mark.parametrize("packed", [False, True])
def test_backward(packed: bool, emulator: Emulator) -> None:
    named = checks.PROGRAMS["ppo"]()
    for seed, mask in enumerate(checks.MASKS):
        for rows, width in ((4, 33), (2, 4500), (0, 3)):
            checks.check_backward(
                program, "cpu", checks.make_call(named, rows, width, mask=mask, packed=packed, seed=seed)
            )


def test_launches(emulator: Emulator) -> None:
    """One per pass: a token-level loss, its gradient's common factor deferred, takes one forward and one backward."""
    named = checks.PROGRAMS["ppo"]()
    call = checks.make_call(named, 3, 9)
    outputs, _ = program.run(named.program, *call.on("cpu"))
    assert named.objective is not None
    assert named.objective.row_weight is not None
    program.scale(outputs[0], outputs[named.objective.row_weight], torch.ones(()), call.sides[0])
    assert emulator.launched == ["program_pass_1", "program_scale"]
    weighted = checks.policy(losses.ppo(dual_clip=3.0, delta=2.0), Level.TOKEN)  # each row's weight must be known first
    others = [(checks.PROGRAMS[name](), 1) for name in ("ppo, everything", "gspo", "real", "dpo")]
    for named, passes in ((weighted, 2), *others):
        emulator.launched.clear()
        program.run(named.program, *checks.make_call(named, 3, 9).on("cpu"))
        assert emulator.launched == [f"program_pass_{k + 1}" for k in range(passes)]


def test_parameters_and_shapes_compile_nothing(emulator: Emulator) -> None:
    texts = set()
    compiled = emulator.launch_text

    def launch_text(text: str, *args: Any, **options: Any) -> None:
        texts.add(text)
        compiled(text, *args, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_RUN, "launch_text", launch_text)
        for clip, rows, width, packed, mask in ((0.1, 3, 9, False, "none"), (0.3, 7, 40, True, "int64")):
            named = checks.policy(losses.ppo(clip_low=clip, dual_clip=3.0, delta=2.0), Level.TOKEN, deferred=True)
            call = checks.make_call(named, rows, width, packed=packed, mask=mask)
            checks.check_run(program, "cpu", named, call)
    assert len(texts) == 1


def test_bits(emulator: Emulator) -> None:
    """A row gives the same bits alone, in another place, packed, and with more padding."""
    named = checks.PROGRAMS["ppo"]()
    call = checks.make_call(named, 5, 4200, mask="bool", seed=3)
    inputs, (side,), scalars, groups = call.on("cpu")
    assert side.mask is not None
    first, totals = program.run(named.program, inputs, [side], scalars, groups)

    def run(rows: torch.Tensor, pad: int, packed: bool) -> torch.Tensor:
        moved = [torch.nn.functional.pad(x[rows], (0, pad), value=torch.nan) if x.ndim == 2 else x for x in inputs]
        mask = torch.nn.functional.pad(side.mask[rows], (0, pad))
        tokens = Tokens(mask.shape, mask)
        if packed:
            bounds = torch.arange(len(rows) + 1) * mask.shape[1]
            moved, tokens = (
                [x.flatten() if x.ndim == 2 else x for x in moved],
                Tokens((mask.numel(),), mask.flatten(), bounds),
            )
        outputs, batch = program.run(named.program, moved, [tokens], scalars, groups[rows])
        if len(rows) == 5:
            assert torch.equal(batch, totals) or not torch.equal(rows, torch.arange(5))
        return outputs[0].reshape(len(rows), -1)[:, :4200]

    for rows, pad, packed in (
        ([2], 0, False),
        ([4, 3, 2, 1, 0], 0, False),
        ([0, 1, 2, 3, 4], 77, False),
        ([1, 0], 0, True),
    ):
        index = torch.tensor(rows)
        assert torch.equal(run(index, pad, packed), first[0][index])
    assert torch.equal(run(torch.arange(5), 0, True), first[0])


# -------------------------------------------------------------------------------------------------- logits_policy_loss
#: Shared memory of a multiprocessor so that 1003 logits are held by one block, by a cluster, or not at all.
ONE_BLOCK, CLUSTER, READ_TWICE = 228 << 10, 8000, 0
KINDS = ("plain", "strided", "temperatures", "one_temperature", "masked", "infinities", "ties", "far_apart")
VARIANTS = {
    "one block, f32": (ONE_BLOCK, torch.float32, False, KINDS),
    "cluster, f32": (CLUSTER, torch.float32, False, ("strided", "masked")),
    "cluster, bf16, entropy": (CLUSTER, torch.bfloat16, True, ("plain", "strided", "infinities")),
    "read twice, f16, entropy": (READ_TWICE, torch.float16, True, ("plain", "strided", "infinities", "masked")),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits(variant: str, emulator: Emulator) -> None:
    emulator.shared, dtype, entropy, kinds = VARIANTS[variant]
    gradient = checks.logits_gradient(losses.ppo(), entropy=entropy, aggregation="seq-mean-token-mean")
    for i, kind in enumerate(kinds):
        case = raw_checks.logits_case(kind, dtype, 3, 1003)
        packed = i % 2 == 1
        fresh = checks.check_logits(logits_policy_loss, "cpu", gradient, case, packed=packed)
        if i < 2:
            written = checks.check_logits(logits_policy_loss, "cpu", gradient, case, packed=packed, in_place=True)
            assert all(checks.same_bits(a, b) for a, b in zip(fresh, written, strict=True))
    assert emulator.launched[-2:] == ["program_pass_1", "logits_policy_loss"]
    assert (emulator.cluster > 1) == (emulator.shared == CLUSTER)


@pytest.mark.parametrize("name", ["entropy as a constant", "entropy alone"])
def test_a_gradient_for_either_term(name: str, emulator: Emulator) -> None:
    case = raw_checks.logits_case("masked", torch.float32, 3, 1003)
    checks.check_logits(logits_policy_loss, "cpu", checks.GRADIENTS[name](), case)


def test_logits_bits_and_labels(emulator: Emulator) -> None:
    """A row's bits whatever its place and address; an illegal label gives NaN for that token and nothing else."""
    gradient = checks.logits_gradient(losses.ppo(), aggregation="token-sum")
    p, case = gradient.program, raw_checks.logits_case("plain", torch.float32, 4, 1003)

    def run(logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        rows = len(labels)
        given = {"old_logprob": torch.full((1, rows), -7.0), "advantage": torch.ones(1)}
        inputs = [given.get(n.name or "") for n in p.inputs]
        scalars = p.scalar_values(dict.fromkeys(gradient.parameters, 0.2))
        around = torch.full((rows, 1005), 9.0)
        arguments = (inputs, Tokens((1, rows)), scalars, None, torch.ones(()), around[:, 1:1004], ("logprob",), False)
        logprobs, _ = logits_policy_loss.run(p, logits, labels, 1.0, *arguments)
        assert (around[:, [0, 1004]] == 9.0).all()
        return logprobs, around[:, 1:1004]

    first = run(case.logits, case.labels)
    wide = torch.full((4, 1010), torch.nan)
    wide[:, 3:1006] = case.logits
    for a, b in zip(run(wide[:, 3:1006], case.labels), first, strict=True):
        assert torch.equal(a, b)
    for a, b in zip(run(case.logits[2:3], case.labels[2:3]), first, strict=True):
        assert torch.equal(a, b[2:3])
    logprobs, grad = run(case.logits, torch.tensor([-100, 5, 1003, 2**62]))
    assert logprobs.isnan().tolist() == [True, False, True, True]
    assert grad[1].isfinite().all()
    assert emulator.launched[0] == "logits_policy_loss", "nothing is known beforehand to wait for"


@pytest.mark.parametrize("vocab", [1, 3, 4, 9, 517])
def test_logits_sizes(vocab: int, emulator: Emulator) -> None:
    gradient = checks.logits_gradient(losses.ppo(), aggregation="seq-mean-token-mean")
    for kind in ("plain", "strided"):
        checks.check_logits(logits_policy_loss, "cpu", gradient, raw_checks.logits_case(kind, torch.float32, 2, vocab))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rescale(dtype: torch.dtype, emulator: Emulator) -> None:
    for rows, vocab in ((3, 1003), (2, 7), (1, 1), (1, 70_000)):
        checks.check_rescale(logits_policy_loss, "cpu", dtype, rows, vocab)

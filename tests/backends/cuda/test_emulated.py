"""The CUDA C++ kernels, run on the CPU by tests/support/emulation through the package's own launch plans.

This tests what they compute: indexing, alignment, order of merges, clusters, edge cases. It cannot see what only
hardware shows (races, memory ordering, the fast instructions' rounding, speed): tests/backends/gpu does.
"""

from __future__ import annotations

import platform
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import raw_checks
import returns_checks
import torch
from emulation import Emulator

from fastreward._arguments.options import PLACES, REWARD_KLS, Place, ReturnsOptions
from fastreward.cuda import group, logprobs, returns, rewards, segments, whiten

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        shutil.which("g++") is None or platform.machine() != "x86_64" or platform.system() != "Linux",
        reason="the emulation needs g++ on x86-64 Linux",
    ),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("emulation")


@pytest.fixture
def emulator(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Emulator]:
    stand_in = Emulator(folder)
    modules: tuple[ModuleType, ...] = (logprobs, group, returns, rewards, segments, whiten)
    for module in modules:
        for name in ("launch", "multiprocessors", "has_clusters", "counter"):
            if hasattr(module, name):
                monkeypatch.setattr(module, name, getattr(stand_in, name))
    yield stand_in
    assert int(stand_in.counter(torch.device("cpu"))) == 0, "a kernel left its counter"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", raw_checks.CASES)
def test_logprobs(kind: str, dtype: torch.dtype, emulator: Emulator) -> None:
    case = raw_checks.logits_case(kind, dtype, 5, 1003)
    raw_checks.check_logprobs_forward(logprobs, "cpu", case)
    raw_checks.check_logprobs_backward(logprobs, "cpu", case)
    raw_checks.check_logprobs_backward(logprobs, "cpu", case, in_place=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_extreme_temperatures(dtype: torch.dtype, emulator: Emulator) -> None:
    raw_checks.check_extreme_temperatures(logprobs, "cpu", dtype, 1003)


@pytest.mark.parametrize("flags", [0, 1, 8, 9, 2, 4, 16])
def test_logprobs_flags(flags: int, emulator: Emulator) -> None:
    raw_checks.check_logprobs_forward(logprobs, "cpu", raw_checks.logits_case("ties", torch.bfloat16, 3, 517), flags)


@pytest.mark.parametrize("only", ["logprobs", "entropy", "logsumexp", "log_sum_sq_probs"])
@pytest.mark.parametrize("inv_softcap", [0.0, 1 / 30.0])
def test_logprobs_backward_of_one_output(only: str, inv_softcap: float, emulator: Emulator) -> None:
    case = raw_checks.logits_case("plain", torch.float32, 3, 2000)
    raw_checks.check_logprobs_backward(logprobs, "cpu", case, only=only, inv_softcap=inv_softcap)


@pytest.mark.parametrize("vocab", [1, 2, 7, 8, 9, 8191, 8192, 8193, 20_011])
def test_logprobs_sizes(vocab: int, emulator: Emulator) -> None:
    for kind in ("plain", "strided"):
        case = raw_checks.logits_case(kind, torch.bfloat16, 2, vocab)
        raw_checks.check_logprobs_forward(logprobs, "cpu", case)
        raw_checks.check_logprobs_backward(logprobs, "cpu", case)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vocab", [32_768, 50_257])
def test_logprobs_clusters_change_no_bit(dtype: torch.dtype, vocab: int, emulator: Emulator) -> None:
    for kind in ("plain", "strided", "infinities", "keep_mask"):
        case = raw_checks.logits_case(kind, dtype, 3, vocab)
        raw_checks.check_logprobs_forward(logprobs, "cpu", case)
        assert emulator.launched[-1].endswith("_cluster")
        clustered = logprobs.forward(*case.arguments("cpu"), raw_checks.EVERYTHING)
        emulator.clusters = False
        plain = logprobs.forward(*case.arguments("cpu"), raw_checks.EVERYTHING)
        assert not emulator.launched[-1].endswith("_cluster")
        emulator.clusters = True
        for a, b in zip(clustered, plain, strict=True):
            assert torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logprobs_bits_and_illegal_labels(dtype: torch.dtype, emulator: Emulator) -> None:
    raw_checks.check_bits(logprobs, "cpu", raw_checks.logits_case("plain", dtype, 9, 9001))
    raw_checks.check_illegal_labels(logprobs, "cpu", dtype, 1003)


@pytest.mark.parametrize("known_labels", [True, False])
@pytest.mark.parametrize("kind", ["plain", "infinities", "temperatures", "far_apart", "ties"])
def test_logprobs_accumulate(kind: str, known_labels: bool, emulator: Emulator) -> None:
    case = raw_checks.logits_case(kind, torch.bfloat16, 4, 1003)
    raw_checks.check_accumulate(logprobs, "cpu", case, 300, known_labels=known_labels)


@pytest.mark.parametrize("contiguous", [False, True])
@pytest.mark.parametrize("name", raw_checks.GROUP_OPTIONS)
def test_group(name: str, contiguous: bool, emulator: Emulator) -> None:
    for rows in (1, 12, 301):
        options = raw_checks.GROUP_OPTIONS[name]
        raw_checks.check_group(group, "cpu", options, rows, contiguous=contiguous, wide=rows == 12)


@pytest.mark.parametrize("contiguous", [False, True])
def test_group_statistics(contiguous: bool, emulator: Emulator) -> None:
    for rows in (1, 300):
        raw_checks.check_group_statistics(group, "cpu", rows, contiguous=contiguous, wide=rows == 300)


def test_group_corners(emulator: Emulator) -> None:
    raw_checks.check_group_corners(group, "cpu")


def test_group_larger_than_a_warp(emulator: Emulator) -> None:
    rewards = torch.randn(200, 1, generator=torch.Generator().manual_seed(0))
    for index in (torch.zeros(200, dtype=torch.int64), torch.arange(200) // 64, torch.arange(200) // 33):
        arguments = (rewards, index, 0, None, None, None, None, raw_checks.GROUP_OPTIONS["grpo"])
        raw_checks.close(group.forward(*arguments), raw_checks.reference_group.forward(*arguments), 1e-6, 1e-6)


@pytest.mark.parametrize("place", PLACES)
def test_token_rewards(place: Place, emulator: Emulator) -> None:
    for k, kl in enumerate((None, *REWARD_KLS)):
        raw_checks.check_token_rewards(rewards, "cpu", kl, place, packed=k % 2 == 0)


def test_whiten_corners(emulator: Emulator) -> None:
    raw_checks.check_whiten_corners(whiten, "cpu")


@pytest.mark.parametrize("shift_mean", [True, False])
@pytest.mark.parametrize("masked", [True, False])
def test_whiten(shift_mean: bool, masked: bool, emulator: Emulator) -> None:
    for shape, offset in (((3, 7), 0.0), ((9, 1000), 1e4), ((2, 4096), -3.0)):
        raw_checks.check_whiten(whiten, "cpu", shape, shift_mean=shift_mean, masked=masked, offset=offset)


def test_whiten_where_nothing_counts(emulator: Emulator) -> None:
    x, out = torch.full((3, 4), torch.nan), torch.full((3, 4), 7.0)
    whiten.forward(x, torch.zeros(3, 4), True, 1, 1e-8, out)
    assert (out == 0).all()
    assert whiten.statistics(x, torch.zeros(3, 4)).tolist() == [0.0, 0.0, 0.0]
    assert whiten.statistics(x[:0], None).tolist() == [0.0, 0.0, 0.0]


@pytest.mark.parametrize(("kind", "packed"), [("runs", False), ("anywhere", True), ("whole", False)])
def test_segments(kind: str, packed: bool, emulator: Emulator) -> None:
    raw_checks.check_segments(segments, "cpu", kind, packed, 300)


def test_segment_ids_and_corners(emulator: Emulator) -> None:
    raw_checks.check_segment_ids(segments, "cpu", 300)
    raw_checks.check_segment_corners(segments, "cpu")


@pytest.mark.parametrize("form", range(6))
def test_returns(form: int, emulator: Emulator) -> None:
    for k, chosen in enumerate(returns_checks.options()):
        if (k + form) % 6 == 0:
            shape = (3, 1100) if k % 8 == 0 and chosen.op == "sum" else (3, 40)
            returns_checks.check_numbers(returns, "cpu", shape, chosen, packed=k % 4 < 2, form=form)


def test_bits_of_returns(emulator: Emulator) -> None:
    for chosen in (ReturnsOptions("gae", move=True), ReturnsOptions("vtrace", "zero")):
        returns_checks.check_bits(returns, "cpu", (3, 1030), chosen)
    returns_checks.check_products_beyond_float32(returns, "cpu")


@pytest.mark.parametrize(("chosen", "packed", "form"), returns_checks.BLOCKS, ids=str)
def test_blocks_of_returns(chosen: ReturnsOptions, packed: bool, form: int, emulator: Emulator) -> None:
    returns_checks.check_blocks(returns, "cpu", 4100, chosen, packed, form)

"""kernels/program/run.py under Triton's interpreter, against the float64 reference."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import program_checks as checks
import pytest
import torch
from fastreward.kernels import program
from fastreward.kernels._shared.launch import mask_bytes
from fastreward.kernels.program.module import load
from fastreward.kernels.program.source import generate

from fastreward import losses
from fastreward._arguments.tokens import Tokens
from fastreward.language import functions as f
from fastreward.language.graph import Graph
from fastreward.language.node import Level
from fastreward.language.program import Program
from fastreward.language.program import program as lowered
from fastreward.reference import program as reference

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, of what lies under the mask

PROGRAM_RUN = sys.modules[program.run.__module__]

#: Rows that are short, shared by programs, one token, packed and long, none, empty, shared by many programs.
LAYOUTS = [
    (3, 20, True),
    (2, 1100, False),
    (1, 1, False),
    (3, 1500, True),
    (0, 5, False),
    (3, 0, True),
    (1, 9300, False),
]


@pytest.fixture(autouse=True)
def _poisoned(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What no kernel has written is seen, and so is a counter that is left standing."""
    empty = torch.empty
    counters: list[torch.Tensor] = []
    counter = PROGRAM_RUN.arrival_counter

    def poisoned(*shape: Any, **options: Any) -> torch.Tensor:
        made = empty(*shape, **options)
        return made.fill_(torch.nan) if made.is_floating_point() else made.fill_(1 << 30)

    def kept(x: torch.Tensor) -> torch.Tensor:
        counters.append(counter(x))
        return counters[-1]

    monkeypatch.setattr(torch, "empty", poisoned)
    monkeypatch.setattr(PROGRAM_RUN, "arrival_counter", kept)
    yield
    assert all(int(c) == 0 for c in counters)


def run(built: Program, inputs: list[Any], sides: list[Tokens], groups: torch.Tensor | None = None) -> Any:
    """(got, wanted), each outputs and batch values."""
    args = (inputs, sides, built.scalar_values({}), groups)
    return program.run(built, *args), reference.run(built, *args)


def same(got: Any, want: Any, tolerance: float = 1e-6) -> None:
    for a, b in zip([*got[0], got[1]], [*want[0], want[1]], strict=True):
        torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance, equal_nan=True)


@pytest.mark.parametrize("name", checks.PROGRAMS)
def test_losses(name: str) -> None:
    named = checks.PROGRAMS[name]()
    masks, k = list(checks.MASKS), list(checks.PROGRAMS).index(name)
    layouts = LAYOUTS if name == "ppo" else [LAYOUTS[k % 4], LAYOUTS[4 + k // 4 % 2]]
    for seed, (rows, width, packed) in enumerate([(4, 33, False), *layouts]):
        call = checks.make_call(named, rows, width, mask=masks[(seed + k) % len(masks)], packed=packed, seed=seed)
        checks.check_run(program, "cpu", named, call)


@pytest.mark.parametrize(("rows", "width", "packed"), [(3, 70, False), (1, 515, True), (4, 12, True)])
def test_scans(rows: int, width: int, packed: bool) -> None:
    """Short rows and a long one in several tiles, packed ones, both widths of loads."""
    named = checks.scan_program(width, 4)
    call = checks.make_call(named, rows, width, packed=packed, seed=rows)
    checks.check_run(program, "cpu", named, call, 1e-5)


@pytest.mark.parametrize(("rows", "width", "packed"), [(1, 201, False), (2, 150, True)])
def test_rows_that_programs_share_have_the_same_bits(
    rows: int, width: int, packed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Scans of a row's tiles by several programs; a run of masked tokens that is longer than a tile lies between."""
    g = Graph()
    x, whole = g.input("x", Level.TOKEN), g.input("whole", Level.TOKEN)
    built = lowered([f.segment_sum(x, whole), f.seq_discounted_sum(x, 0.9)], [])
    assert [launch.maps for launch in generate(built).launches] == [True, False] * len(built.stages)
    call = checks.make_call(checks.Named(built, {}), rows, width, packed=packed, seed=1)
    (tokens,) = call.sides
    assert tokens.mask is not None
    tokens.mask.flatten()[20:110] = False
    monkeypatch.setattr(PROGRAM_RUN, "WARPS", 1)  # tiles of 64 tokens
    monkeypatch.setattr(PROGRAM_RUN, "LONG", 20)
    alone = run(built, call.inputs, call.sides)
    same(*alone)
    monkeypatch.setattr(PROGRAM_RUN, "SCANNED", 40)
    assert PROGRAM_RUN.geometry(tokens, True, True)[0][-1] > 2
    shared = program.run(built, call.inputs, call.sides, [], None)
    assert all(torch.equal(a, b) for a, b in zip(alone[0][0], shared[0], strict=True))


def test_a_scan_of_a_scan_is_not_shared() -> None:
    g = Graph()
    x = g.input("x", Level.TOKEN)
    one, two = (lowered([n], []) for n in (f.seq_cumsum(x), f.seq_cumsum(f.exp(f.seq_cumsum(x)))))
    assert [launch.maps for launch in generate(one).launches] == [True, False]
    assert [launch.maps for launch in generate(two).launches] == [False]


def test_launches() -> None:
    """One per pass and side; PPO, its gradient's common factor deferred, and losses of a sequence's ratio have one."""
    counts = {name: len(generate(checks.PROGRAMS[name]().program).launches) for name in checks.PROGRAMS}
    wanted = {"ppo": 1, "sapo": 1, "gspo": 1, "real": 1, "gdro": 1, "jepo": 2, "dpo": 2}
    assert wanted.items() <= counts.items()


def test_a_counter_belongs_to_one_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """One for all its launches, and none where no launch has a last program: a kept one may lie in a graph's memory."""
    made, fresh = [], PROGRAM_RUN.arrival_counter

    def counted(x: torch.Tensor) -> torch.Tensor:
        made.append(fresh(x))
        return made[-1]

    monkeypatch.setattr(PROGRAM_RUN, "arrival_counter", counted)
    named = checks.PROGRAMS["jepo"]()
    assert len(generate(named.program).launches) == 2
    for _ in range(2):
        program.run(named.program, *checks.make_call(named, 3, 9).on("cpu"))
    assert len(made) == len({x.data_ptr() for x in made}) == 2


def test_masks_are_bytes() -> None:
    """One type for the compiler: those of one byte are looked at as they are, others converted."""
    for dtype in (torch.bool, torch.uint8, torch.int8):
        mask = torch.tensor([0, 1, 1], dtype=dtype)
        assert mask_bytes(mask).data_ptr() == mask.data_ptr()
    for mask in (
        torch.tensor([0, 1 << 40, -1]),
        torch.tensor([-0.0, 0.25, torch.inf]),
        torch.tensor([False, True, True]),
    ):
        found = mask_bytes(mask)
        assert found.dtype == torch.uint8
        assert (found != 0).tolist() == [False, True, True]
    assert mask_bytes(None) is None


def test_prologue() -> None:
    named = checks.prologue_program()
    assert [launch.kernel for launch in generate(named.program).launches] == ["sequences_0", "tokens_1"]
    for rows, width, packed in ((5, 33, False), *LAYOUTS[:1], *LAYOUTS[4:]):
        checks.check_run(program, "cpu", named, checks.make_call(named, rows, width, packed=packed))


def test_ties() -> None:
    named = checks.ties_program()
    checks.check_run(program, "cpu", named, checks.make_call(named, 9, 11), 0.0)


def test_functions() -> None:
    checks.check_functions(program, "cpu")


@pytest.mark.parametrize("seed", range(5))
def test_random_graphs(seed: int) -> None:
    named = checks.random_program(seed, 40 + 25 * seed)
    for rows, width, packed in ((7, 5, False), (9, 11, True)):
        call = checks.make_call(named, rows, width, packed=packed, seed=seed)
        checks.check_run(program, "cpu", named, call, 1e-5)


@pytest.mark.parametrize("packed", [False, True])
def test_backward(packed: bool) -> None:
    named = checks.PROGRAMS["ppo"]()
    for seed, mask in enumerate(checks.MASKS):
        checks.check_backward(program, "cpu", checks.make_call(named, 4, 33, mask=mask, packed=packed, seed=seed))
    for rows, width in ((2, 1500), (0, 3)):
        checks.check_backward(program, "cpu", checks.make_call(named, rows, width, packed=packed))
    checks.check_overflow(program, "cpu")


def test_reductions_of_groups_of_any_number_and_size() -> None:
    """Groups within one step and over several, a group's result reduced again, equal and NaN keys, ranks with NaN."""
    g = Graph()
    x, key, other = (g.input(n, Level.SEQUENCE) for n in ("x", "key", "other"))
    total, top, low = (g.reduce(f"group_{op}", x) for op in ("sum", "max", "min"))
    again = g.reduce("group_sum", total)
    outputs = [total, top, low, again, g.reduce("group_sum_before", total, key), g.reduce("group_sum_after", x, key)]
    outputs += [g.reduce("group_sum_others", x), g.reduce("batch_permute", x, key, other), x * again]
    built = lowered(outputs, [g.reduce("batch_max", total), g.reduce("batch_min", again)])
    for rows, count in ((300, 3), (150, 150), (40, 1), (1, 1)):
        groups = torch.randint(count, (rows,))
        groups = groups.unique(return_inverse=True)[1]
        keys = torch.randint(5, (2, rows)).float()
        keys[:, rows // 2] = torch.nan
        values = {"x": torch.randn(rows), "key": keys[0], "other": keys[1]}
        same(*run(built, [values[n.name or ""] for n in built.inputs], [Tokens((rows, 3))], groups), 1e-5)
    values["x"][0] = torch.nan
    same(*run(built, [values[n.name or ""] for n in built.inputs], [Tokens((1, 3))], groups))


def test_a_nan_that_counts_is_seen_and_infinities_are_kept() -> None:
    g = Graph()
    x, r = g.input("x", Level.TOKEN), g.input("r", Level.SEQUENCE)
    rows = [f.seq_max(x), f.seq_min(x), f.seq_sum(x), f.exp(r), f.log(f.abs(r)), 1.0 / r, r / r, f.logsigmoid(r)]
    rows += [f.tanh(r), f.sign(f.where(r == r, r, -3.0)), f.clip(r, -1.0, 1.0)]
    tokens = [f.exp(x), f.log(x), f.log1p(x), f.expm1(x), f.tanh(x), f.sigmoid(x), f.logsigmoid(x), 1.0 / x]
    tokens += [f.sqrt(x), f.expm1(x) - x, f.sign(f.where(x == x, x, 1.0)), f.clip(x, -1.0, 1.0)]
    extremes = [f.maximum(r, 0.5), f.minimum(-0.5, r), f.maximum(r, -r), f.minimum(x, 0.5), f.maximum(0.5, x)]
    batch = [g.reduce("batch_max", f.seq_max(x)), g.reduce("batch_min", r)]
    built = lowered([*rows, *tokens, *extremes, f.minimum(-x, x)], batch)
    special = torch.tensor([torch.nan, torch.inf, -torch.inf, 0.0, 1e30, -1e30, 1e-30, 88.0, -100.0, 1e-3, -0.3])
    values = {"x": special.repeat(4, 1), "r": torch.tensor([torch.nan, torch.inf, -torch.inf, 0.0])}
    values["x"][1, 0], values["x"][2] = 1.0, torch.arange(11.0)
    (got, totals), (want, wanted) = run(built, [values[n.name or ""] for n in built.inputs], [Tokens((4, 11))])
    y, s, half = values["x"], values["r"], torch.tensor(0.5)
    want[-6:] = [s.maximum(half), s.minimum(-half), s.abs(), y.minimum(half), y.maximum(half), -y.abs()]
    same((got, totals), (want, wanted), 3e-6)


def test_bits() -> None:
    """A row gives the same bits alone, in another place, packed, with more padding; so does what its sum gives."""
    g = Graph()
    x, r = g.input("x", Level.TOKEN), g.input("r", Level.SEQUENCE)
    ratio = f.exp(f.seq_mean(x))
    built = lowered([x * f.clip(ratio, 0.5, r), ratio], [])
    values, scale = torch.randn(5, 1300), torch.rand(5) + 1.0
    mask = torch.rand(5, 1300) < 0.8

    def rows(index: list[int], pad: int = 0, packed: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
        inputs = {"x": torch.nn.functional.pad(values[index], (0, pad), value=torch.nan), "r": scale[index]}
        tokens = Tokens((len(index), 1300 + pad), torch.nn.functional.pad(mask[index], (0, pad)))
        if packed:
            assert tokens.mask is not None
            bounds = torch.arange(len(index) + 1) * tokens.shape[1]
            inputs["x"] = inputs["x"].flatten()
            tokens = Tokens((inputs["x"].numel(),), tokens.mask.flatten(), bounds)
        got, _ = program.run(built, [inputs[n.name or ""] for n in built.inputs], [tokens], [], None)
        return got[0].reshape(len(index), -1)[:, :1300], got[1]

    first = rows([0, 1, 2, 3, 4])
    for index, pad, packed in (([2], 0, False), ([4, 1], 0, True), ([3], 77, False), ([0, 1], 3000, False)):
        for a, b in zip(rows(index, pad, packed), first, strict=True):
            assert torch.equal(a, b[index])


def test_bounds_that_lie_are_not_followed() -> None:
    named = checks.PROGRAMS["gspo"]()
    call = checks.make_call(named, 2, 20, packed=True)
    count = call.sides[0].shape[0]
    tokens = Tokens((count,), torch.zeros(count), torch.tensor([-5, 30, 4000]))
    _, batch = program.run(named.program, call.inputs, [tokens], call.scalars, call.groups)
    assert batch[0] == 0


def test_parameters_and_shapes_generate_nothing_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTREWARD_CACHE", str(tmp_path))
    load.cache_clear()
    calls = ((0.1, 3, 9, False, "none"), (0.3, 7, 40, True, "int64"), (0.2, 2, 4, False, "bool"))
    for clip, rows, width, packed, mask in calls:
        named = checks.policy(losses.ppo(clip_low=clip, dual_clip=3.0), Level.TOKEN, deferred=True)
        checks.check_run(program, "cpu", named, checks.make_call(named, rows, width, packed=packed, mask=mask))
    (kept,) = (tmp_path / "triton").glob("*.py")
    assert kept.read_text() == generate(named.program).source
    kept.write_text("raise RuntimeError('not what was generated')")
    load.cache_clear()
    checks.check_run(program, "cpu", named, checks.make_call(named, 3, 9))
    load.cache_clear()


def test_a_cache_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("FASTREWARD_CACHE", str(tmp_path / "file"))
    with pytest.raises(RuntimeError, match="set FASTREWARD_CACHE to a folder"):
        load("program", "x = 1\n")

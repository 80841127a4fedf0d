"""Programs of the loss language on the CPU: against the float64 reference, on any layout, to the bit where promised."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from types import ModuleType

import program_checks as checks
import pytest
import torch
from instruction_sets import in_use
from raw_checks import close
from torch import Tensor

from fastreward import _core
from fastreward._arguments.tokens import Tokens
from fastreward.cpu import logits_policy_loss, logprobs
from fastreward.cpu import program as cpu
from fastreward.language.graph import Graph
from fastreward.language.node import Level
from fastreward.language.ops import OPS
from fastreward.language.program import program
from fastreward.reference import program as reference

T, R, B = Level.TOKEN, Level.SEQUENCE, Level.BATCH
INF, NAN = torch.inf, torch.nan
SPECIAL = (NAN, INF, -INF, 0.0, -0.0, 1.0, -1.0, 0.3, -2.5, 88.0, -88.0, 3e38, -3e38, 1e-30, 2.0)


UNARY = [op for op in OPS if OPS[op].arity == 1 and op not in ("not", "stop_gradient")]
BINARY = [op for op in OPS if OPS[op].arity == 2 and op not in ("and", "or")]


def one_operator(op: str, levels: tuple[Level, ...]) -> checks.Named:
    """A program that stores one operator's value, a condition as 0 and 1."""
    g = Graph()
    args = [g.input(f"x{k}", level) for k, level in enumerate(levels)]
    value = g.plain(op, *args)
    return checks.Named(program([g.call("where", value, 1.0, 0.0) if value.boolean else value], []), {})


def values_of(op: str, levels: tuple[Level, ...], grid: Tensor) -> tuple[Tensor, Tensor]:
    """The CPU's values on a grid [n, arity], and those of the operator's definition."""
    p = one_operator(op, levels).program
    columns = {f"x{k}": grid[:, k].contiguous() for k in range(grid.shape[1])}
    rows = [columns[n.name or ""].unsqueeze(1) if n.level == T else columns[n.name or ""] for n in p.inputs]
    (got,), _ = cpu.run(p, rows, [Tokens((len(grid), 1))], [], None)
    want = torch.tensor([float(OPS[op].value(*row)) for row in grid.tolist()], dtype=torch.float64)
    return got.squeeze(1), want


# ------------------------------------------------------------------------------------------------------------- numbers
class TestNumbers:
    @pytest.mark.parametrize("name", checks.PROGRAMS)
    @pytest.mark.parametrize(("rows", "width"), [(8, 37), (3, 5000), (64, 1), (5, 2048), (0, 9), (4, 0)])
    def test_losses(self, name: str, rows: int, width: int) -> None:
        named = checks.PROGRAMS[name]()
        for packed in (False, True):
            checks.check_run(cpu, "cpu", named, checks.make_call(named, rows, width, packed=packed))

    @pytest.mark.parametrize("seed", range(60))
    def test_random_programs(self, seed: int) -> None:
        named = checks.random_program(seed, 30 + 3 * seed)
        mask = list(checks.MASKS)[seed % 6]
        call = checks.make_call(named, 7, 211, mask=mask, packed=seed % 3 == 1, seed=seed)
        checks.check_run(cpu, "cpu", named, call, 2e-5)

    @pytest.mark.parametrize("seed", range(24))
    def test_scans(self, seed: int) -> None:
        named = checks.scan_program(seed)
        mask = list(checks.MASKS)[seed % 6]
        call = checks.make_call(named, 5, (300, 1, 2100, 130)[seed % 4], mask=mask, packed=seed % 3 == 1, seed=seed)
        checks.check_run(cpu, "cpu", named, call, 1e-5)

    @pytest.mark.parametrize("mask", checks.MASKS)
    def test_masks(self, mask: str) -> None:
        named = checks.PROGRAMS["ppo, everything"]()
        for packed in (False, True):
            checks.check_run(cpu, "cpu", named, checks.make_call(named, 6, 4500, mask=mask, packed=packed))

    def test_prologue_and_outputs_without_operators(self) -> None:
        named = checks.prologue_program()
        checks.check_run(cpu, "cpu", named, checks.make_call(named, 6, 300))

    def test_functions(self) -> None:
        checks.check_functions(cpu, "cpu")

    def test_ties(self) -> None:
        named = checks.ties_program()
        for packed in (False, True):
            checks.check_run(cpu, "cpu", named, checks.make_call(named, 70, 100, packed=packed), 0.0)

    @pytest.mark.parametrize("name", ["ppo", "dpo"])
    def test_backward(self, name: str) -> None:
        named = checks.PROGRAMS[name]()
        for packed, mask in itertools.product((False, True), checks.MASKS):
            checks.check_backward(cpu, "cpu", checks.make_call(named, 5, 2100, mask=mask, packed=packed))

    @pytest.mark.parametrize("module", [cpu, reference])
    def test_an_upstream_gradient_that_overflowed(self, module: ModuleType) -> None:
        checks.check_overflow(module, "cpu")

    @pytest.mark.parametrize("op", UNARY)
    def test_functions_everywhere(self, op: str) -> None:
        """Within 3 units in the last place; NaN and infinities as defined."""
        small = torch.logspace(-40, 2.2, 4000)
        grid = torch.cat([small, -small, torch.linspace(-110, 110, 8001), torch.tensor(SPECIAL)])
        got, want = values_of(op, (T,), grid.unsqueeze(1))
        exact = want.float()
        finite = torch.isfinite(exact)
        assert torch.equal(got.isnan(), exact.isnan())
        assert torch.equal(got[exact.isinf()], exact[exact.isinf()])
        step = (torch.nextafter(exact.abs(), torch.tensor(INF)) - exact.abs()).double().clamp(min=2.0**-149)
        assert float(((got.double() - want).abs() / step)[finite].max()) <= 3.0

    @pytest.mark.parametrize("levels", [(T, T), (T, R), (R, T)])
    @pytest.mark.parametrize("op", BINARY)
    def test_two_arguments_with_special_values(self, op: str, levels: tuple[Level, ...]) -> None:
        got, want = values_of(op, levels, torch.cartesian_prod(torch.tensor(SPECIAL), torch.tensor(SPECIAL)))
        close(got, want.float(), 0.0, 1e-7, op)

    @pytest.mark.parametrize("levels", [k for k in itertools.product((T, R), repeat=3) if T in k])
    @pytest.mark.parametrize("op", ["clip", "outside"])
    def test_bounds_with_special_values(self, op: str, levels: tuple[Level, ...]) -> None:
        """Bounds that are NaN, infinite or the wrong way round, too."""
        few = torch.tensor((NAN, INF, -INF, 0.0, 1.0, -2.5))
        got, want = values_of(op, levels, torch.cartesian_prod(torch.tensor(SPECIAL), few, few))
        close(got, want.float(), 0.0, 0.0, op)

    @pytest.mark.parametrize("levels", [k for k in itertools.product((T, R), repeat=3) if T in k])
    def test_where(self, levels: tuple[Level, ...]) -> None:
        g = Graph()
        c, x, y = (g.input(n, level) for n, level in zip("cxy", levels, strict=True))
        p = program([g.plain("where", c > 0.0, x, y), g.call("where", c > 0.0, 0.0, x * y)], [])
        rows = torch.cartesian_prod(torch.tensor((NAN, -1.0, 1.0)), torch.tensor(SPECIAL), torch.tensor((2.0, NAN)))
        at = {n: rows[:, k].contiguous() for k, n in enumerate("cxy")}
        given = [at[n.name or ""].reshape(-1, 1) if n.level == T else at[n.name or ""] for n in p.inputs]
        got, _ = cpu.run(p, given, [Tokens((len(rows), 1))], [], None)
        first = torch.where(at["c"] > 0, at["x"], at["y"])
        second = torch.where(at["c"] > 0, 0.0, at["x"] * at["y"])
        for a, b in zip(got, (first, second), strict=True):
            close(a.reshape(-1), b, 0.0, 1e-7)

    def test_extremes_and_sums_meet_nan(self) -> None:
        """Of any token that counts, in whole and in partly counted tiles, with and without a sum of the same value."""
        g = Graph()
        x = g.input("x", T)
        grown = g.call("exp", x)
        kept = [g.reduce(op, y) for y in (x, grown) for op in ("seq_sum", "seq_min", "seq_max")]
        alone = [g.reduce("seq_min", x * 2.0), g.reduce("seq_max", x * 3.0)]
        p = program([*kept, *alone], [])
        values = torch.randn(6, 4200)
        mask = torch.rand(6, 4200) < 0.9
        mask[:3] = True
        for row, (place, value) in enumerate([(0, NAN), (2500, NAN), (4199, NAN), (7, INF), (4100, -INF)]):
            values[row, place], mask[row, place] = value, True
        values[5, ~mask[5]] = NAN
        got, _ = cpu.run(p, [values], [Tokens((6, 4200), mask)], [], None)
        want, _ = reference.run(p, [values], [Tokens((6, 4200), mask)], [], None)
        for a, b in zip(got, want, strict=True):
            close(a, b, 1e-3, 1e-6)

    def test_rows_meet_nan(self) -> None:
        """A sequence's NaN is the extreme of its group and of the batch, wherever its row stands."""
        g = Graph()
        r = g.input("r", Level.SEQUENCE)
        ops = ("group_max", "group_min", "group_sum", "batch_max", "batch_min")
        p = program([g.reduce(op, r) for op in ops[:3]], [g.reduce(op, r) for op in ops[3:]])
        groups = torch.tensor([0, 1, 2] * 7)
        for place in (0, 10, 20):
            values = torch.randn(21)
            values[place] = NAN
            got, want = (m.run(p, [values], [Tokens((21, 1))], [], groups) for m in (cpu, reference))
            for a, b in zip([*got[0], got[1]], [*want[0], want[1]], strict=True):
                close(a, b, 1e-6, 1e-6)

    def test_tokens_and_rows_without_any(self) -> None:
        """Extremes of nothing are infinite, sums 0; also where a row has room but no valid token."""
        g = Graph()
        x = g.input("x", T)
        reduced = [g.reduce(op, x) for op in ("seq_sum", "seq_min", "seq_max")]
        p = program([*reduced, g.length(), x], [g.reduce("batch_sum", reduced[0]), g.reduce("batch_max", reduced[2])])
        for side, x_ in (
            (Tokens((2, 300), torch.zeros(2, 300, dtype=torch.bool)), torch.full((2, 300), NAN)),
            (Tokens((2, 0)), torch.zeros(2, 0)),
            (Tokens((0,), None, torch.tensor([0, 0, 0])), torch.zeros(0)),
        ):
            (total, least, most, length, same), batch = cpu.run(p, [x_], [side], [], None)
            assert total.tolist() == length.tolist() == [0.0, 0.0]
            assert least.tolist() == [INF, INF]
            assert most.tolist() == [-INF, -INF]
            assert batch.tolist() == [0.0, -INF]
            assert torch.equal(same, torch.zeros(side.shape))


# ---------------------------------------------------------------------------------------------------------------- bits
def run_bits(named: checks.Named, call: checks.Call) -> list[Tensor]:
    outputs, batch = cpu.run(named.program, call.inputs, call.sides, call.scalars, call.groups)
    return [*outputs, batch]


SCANS = [f"scans {seed}" for seed in range(5)]


def named_program(name: str | int) -> checks.Named:
    """A loss's, a random one, or one of scans."""
    if isinstance(name, int):
        return checks.random_program(name)
    return checks.scan_program(int(name.split()[1])) if name in SCANS else checks.PROGRAMS[name]()


@pytest.mark.parametrize("name", [*checks.PROGRAMS, *range(8), *SCANS])
def test_bits_do_not_depend_on_threads(name: str | int, threads: None) -> None:
    named = named_program(name)
    call = checks.make_call(named, 40, 5000)
    results = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        results.append(run_bits(named, call))
    assert all(checks.same_bits(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("name", ["ppo", "sapo", "gspo", "real", "gdro", *range(8), *SCANS])
def test_bits_do_not_depend_on_padding_or_layout(name: str | int) -> None:
    """Padding on the right (masked out) or packing leaves every sum, every token and every total as it is."""
    named = named_program(name)
    call = checks.make_call(named, 9, 3001, mask="none", packed=True, seed=3)
    bounds = call.sides[0].cu_seqlens
    assert bounds is not None
    lengths = bounds.diff()
    results = [run_bits(named, call)]
    for width in (int(lengths.max()), 3001, 6200):
        inside = torch.arange(width) < lengths.unsqueeze(1)
        padded = [
            torch.full((9, width), NAN).masked_scatter(inside, x) if n.level == T else x
            for n, x in zip(named.program.inputs, call.inputs, strict=True)
        ]
        one = checks.Call(padded, [Tokens((9, width), inside)], call.scalars, call.groups)
        results.append([x[inside] if x.shape == inside.shape else x for x in run_bits(named, one)])
    assert all(checks.same_bits(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


def test_a_token_is_the_same_anywhere() -> None:
    """In any row, at any place, at any alignment, alone or among others."""
    g = Graph()
    a, b = g.input("a", T), g.input("b", T)
    value = g.call("where", a > b, g.call("log1p", g.call("exp", a)) * b, g.call("tanh", a * b + 0.3) / b)
    p = program([g.call("sigmoid", value) - g.call("expm1", b)], [])
    x, y = torch.randn(2, 5000)
    (together,), _ = cpu.run(p, [x[None], y[None]], [Tokens((1, 5000))], [], None)
    for start, count in ((0, 1), (1, 1), (17, 40), (4999, 1), (100, 130), (2047, 2)):
        rows = [v[start : start + count].clone()[None] for v in (x, y)]
        (alone,), _ = cpu.run(p, rows, [Tokens((1, count))], [], None)
        assert torch.equal(alone[0], together[0, start : start + count])


def test_large_outputs_go_past_the_caches_unharmed() -> None:
    """Large enough for streaming stores: aligned rows, rows that are not, masks with holes and none at all."""
    named = checks.PROGRAMS["ppo"]()
    for width, mask in ((4096, "bool"), (4099, "bool"), (4096, "none")):
        call = checks.make_call(named, 300, width, mask=mask)
        got, _ = cpu.run(named.program, call.inputs, call.sides, call.scalars, None)
        counted = call.sides[0].mask
        for row in (0, 1, 150, 299):
            own = slice(row, row + 1)
            inputs = [
                x[own].clone() if n.level >= R else x for n, x in zip(named.program.inputs, call.inputs, strict=True)
            ]
            side = Tokens((1, width), None if counted is None else counted[own].clone())
            alone, _ = cpu.run(named.program, inputs, [side], call.scalars, None)
            assert torch.equal(alone[0][0], got[0][row])


# ------------------------------------------------------------------------------------------------ what is not there
class TestMissingTensors:
    """A tensor without memory where the kernel would read or write one is an error, not a null pointer followed."""

    def test_an_input(self) -> None:
        named = checks.PROGRAMS["ppo"]()
        call = checks.make_call(named, 3, 5)
        for k in range(len(call.inputs)):
            inputs = [torch.empty(0) if i == k else x for i, x in enumerate(call.inputs)]
            with pytest.raises(ValueError, match=r"inputs: expected .* values, got none"):
                cpu.run(named.program, inputs, call.sides, call.scalars, None)
        with pytest.raises(ValueError, match="inputs: expected"):
            cpu.run(named.program, call.inputs[1:], call.sides, call.scalars, None)

    def test_a_gradient_to_scale_or_broadcast(self) -> None:
        tokens, one = Tokens((2, 3)), torch.ones(())
        with pytest.raises(ValueError, match="sequence_values: expected 2 values, got none"):
            cpu.broadcast_to_tokens(torch.empty(0), one, tokens)
        with pytest.raises(ValueError, match=r"(saved|out): expected 6 values, got none"):
            cpu.scale(torch.empty(0), None, one, tokens)

    def test_a_gradient_of_log_probs(self) -> None:
        values, _, ids = logprobs.forward(torch.zeros(2, 3), torch.zeros(2).long(), 1.0, None, None, None, None, 0)
        given = (torch.zeros(2, 3), torch.zeros(2).long(), 1.0, None, None, None, None)
        for upstream, out, name in (
            (torch.empty(0), torch.empty(2, 3), "grad_values"),
            (values, torch.empty(0), "grad_logits"),
        ):
            with pytest.raises(ValueError, match=rf"{name}: expected .* values, got none"):
                logprobs.backward(*given, values, ids, upstream, None, out.reshape(-1, 3), 0.0)

    def test_entropies_that_the_gradient_needs(self) -> None:
        gradient = checks.GRADIENTS["entropy as a constant"]()
        inputs = [None if n.name in ("logprob", "entropy") else torch.ones(2) for n in gradient.program.inputs]
        logits, labels = torch.zeros(2, 3), torch.zeros(2).long()
        scalars = gradient.program.scalar_values(dict.fromkeys(gradient.parameters, 0.2))
        call = (logits, labels, 1.0, inputs, Tokens((2, 1)), scalars, None, torch.ones(()), torch.empty(2, 3))
        with pytest.raises(ValueError, match="entropies: expected 2 values, got none"):
            logits_policy_loss.run(gradient.program, *call, gradient.gradients, False)
        with pytest.raises(ValueError, match="logprob_gradient, entropy_gradient: expected the places of all outputs"):
            logits_policy_loss.run(gradient.program, *call, (), True)


# -------------------------------------------------------------------------------------------------- instruction sets
@pytest.mark.parametrize("isa", ["baseline", "avx2"])
def test_other_instruction_sets(isa: str) -> None:
    """Everything above, once more on what this machine's best does not run."""
    if os.environ.get("FASTREWARD_ISA") or isa == _core.isa():
        pytest.skip("one level of these is enough")
    environment = {**os.environ, "FASTREWARD_ISA": isa}
    if in_use(isa) != isa:
        pytest.skip(f"this machine has no {isa}")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:]

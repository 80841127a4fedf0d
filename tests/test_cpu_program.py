"""Programs of the loss language on the CPU: against the float64 reference, on any layout, to the bit where promised."""

from __future__ import annotations

import program_checks as checks
import pytest

from fastreward.cpu import program as cpu
from fastreward.losses._graph import Level

T, R, B = Level.TOKEN, Level.ROW, Level.BATCH


# ------------------------------------------------------------------------------------------------------------- numbers
class TestNumbers:
    @pytest.mark.parametrize("name", checks.PROGRAMS)
    @pytest.mark.parametrize(("rows", "width"), [(8, 37), (3, 5000), (64, 1), (5, 2048)])
    def test_losses(self, name: str, rows: int, width: int) -> None:
        named = checks.PROGRAMS[name]()
        for packed in (False, True):
            checks.check_run(cpu, "cpu", named, checks.make_call(named, rows, width, packed=packed))

    @pytest.mark.parametrize("seed", range(60))
    def test_random_programs(self, seed: int) -> None:
        named = checks.random_program(seed, 30 + 3 * seed)
        call = checks.make_call(named, 7, 211, packed=seed % 3 == 1, seed=seed)
        checks.check_run(cpu, "cpu", named, call, 2e-5)

    def test_prologue_and_outputs_without_operators(self) -> None:
        named = checks.prologue_program()
        checks.check_run(cpu, "cpu", named, checks.make_call(named, 6, 300))

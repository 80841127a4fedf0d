"""Values at hand when a kernel computes a node: constants, arguments, and what earlier phases or launches have left."""

from __future__ import annotations

from typing import Final

from fastreward.cuda.program.expressions import Real, literal, truth
from fastreward.cuda.program.names import Names
from fastreward.language.gpu_plan import Launch, Plan, Time
from fastreward.language.node import Level, Node
from fastreward.language.program import Program, TokenStep

_SIDES: Final = ("Chosen", "Rejected")


class Values:
    """A program's values by their names and places."""

    def __init__(self, program: Program) -> None:
        self.program, self.plan, self.name = program, Plan(program), Names(program)
        self._scalars = {n.id for n in program.scalars}

    def kernel(self, k: int) -> str:
        """The kernel of launch k."""
        return f"program_{_name(self.plan.launches[k])}"

    def finish(self, k: int) -> str:
        """Its function for the last block."""
        return f"finish_{_name(self.plan.launches[k])}"

    def pass_name(self, k: int, step: TokenStep) -> str:
        """The struct of a pass over the tokens of one side."""
        side = _SIDES[step.side] if self.program.sides == 2 else ""
        return f"{_name(self.plan.launches[k]).title().replace('_', '')}{side}"

    def leaf(self, node: Node, real: Real, *, row: bool) -> tuple[str, bool] | None:
        """Constants, scalars and, per sequence where a row is at hand, inputs."""
        if node.op == "constant":
            assert node.value is not None
            yes = "true" if node.value else "false"
            return (yes if node.boolean else literal(node.value, real)), False
        if node.id in self._scalars:
            return truth(node, f"a.{self.name(node)}"), False
        if node.op == "input":
            assert node.level < Level.SEQUENCE or row
            return f"double({self.element(node)})", True
        return None

    def kept(self, node: Node, time: Time) -> tuple[str, bool] | None:
        """Values that an earlier phase or launch has left."""
        total, column = self.plan.total(node, time), self.plan.column(node, time)
        if total is not None:
            return truth(node, f"a.totals[{total}]"), True
        return None if column is None else (truth(node, f"a.columns[{column} * rows + row]"), True)

    def element(self, node: Node) -> str:
        """An input per sequence, or of the batch."""
        return f"a.{self.name(node)}[{'row' if node.level == Level.SEQUENCE else 0}]"


def _name(launch: Launch) -> str:
    return f"pass_{launch.number}" if launch.number else "rows"

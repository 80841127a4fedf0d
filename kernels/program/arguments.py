"""Arguments of generated kernels, collected while a kernel's source is written, and lines of at most 120 characters."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final

from fastreward.language.node import Level, Node
from fastreward.language.program import Program

#: Kinds of which a kernel has one at most, and what is said of them; before the numbers and outputs, and after.
_FRONT: Final = {
    "mask": "u8 like the tokens, nonzero = valid",
    "cu_seqlens": "i64 [B + 1]",
    "row_of_token": "i64 [N], read where PACKED",
    "order": "i64 [B], sequences sorted by group",
    "starts": "i64 [B + 1], where each group starts in order",
    "groups": "i64 [B]",
}
_BACK: Final = {
    "batch": "f32, out: what there is one of for the batch",
    "columns": "f64 [columns, B], then partial results [reductions, B, chunks]; scratch",
    "values": "f64, scratch: numbers of the batch that a later launch reads",
    "maps": "f64 [scans, 2, N // TILE + B]: what each tile makes of a scan's value before it; scratch",
    "counter": "i32 [1], zero before and after",
}
_KINDS: Final = ("input", *_FRONT, "scalar", "output", *_BACK)
_INPUTS: Final = {Level.TOKEN: "f32, as the tokens", Level.SEQUENCE: "f32 [B]", Level.BATCH: "f32 []"}


@dataclass(frozen=True)
class Argument:
    """Kind of a kernel's argument, and which of its kind: an index of program.all_inputs, .scalars or .outputs."""

    name: str
    kind: str
    index: int = 0
    comment: str = ""

    @property
    def per_token(self) -> bool:
        """Whether it is a f32 tensor of tokens."""
        return self.comment.startswith(_INPUTS[Level.TOKEN])


class Arguments:
    """The tensors and numbers that a function needs."""

    def __init__(self, program: Program, names: Mapping[int, str]) -> None:
        self._names = names
        self._inputs = {n.id: i for i, n in enumerate(program.all_inputs)}
        self._scalars = {n.id: i for i, n in enumerate(program.scalars)}
        self._known: dict[str, Argument] = {}

    def pointer(self, node: Node) -> str:
        """Name of the pointer to an input."""
        return self._add(f"{self._names[node.id]}_ptr", "input", self._inputs[node.id], _INPUTS[node.level])

    def scalar(self, node: Node) -> str:
        """Name of a run-time number."""
        return self._add(self._names[node.id], "scalar", self._scalars[node.id])

    def output(self, index: int, level: Level) -> str:
        """Name of the pointer to an output, per token or per sequence."""
        return self._add(f"output_{index}_ptr", "output", index, f"{_INPUTS[max(level, Level.SEQUENCE)]}, out")

    def plain(self, *kinds: str) -> None:
        """Arguments of which there is one."""
        for kind in kinds:
            self._add(kind, kind, 0, (_FRONT | _BACK)[kind])

    def take(self, other: Arguments) -> None:
        """Arguments that a called function needs."""
        self._known |= other._known

    def ordered(self) -> tuple[Argument, ...]:
        """In the order of the signature: tensors, numbers, results, scratch."""
        return tuple(sorted(self._known.values(), key=lambda a: (_KINDS.index(a.kind), a.index)))

    def signature(self) -> list[str]:
        """One line an argument. Numbers are f64, so that per-sequence work has all their digits."""
        return [
            f"    {a.name}: tl.float64," if a.kind == "scalar" else f"    {a.name},  # {a.comment}"
            for a in self.ordered()
        ]

    def _add(self, name: str, kind: str, index: int, comment: str = "") -> str:
        self._known[name] = Argument(name, kind, index, comment)
        return name


def wrapped(head: str, items: Iterable[str], tail: str) -> list[str]:
    """`head item, item, ... tail`, as one line or as several."""
    items = list(items)
    text = f"{head}{', '.join(items)}{tail}"
    if len(text) <= 120:
        return [text]
    indent = " " * (len(text) - len(text.lstrip()))
    lines = textwrap.wrap(f"{', '.join(items)},", 116 - len(indent), break_long_words=False, break_on_hyphens=False)
    return [head, *(f"{indent}    {line}" for line in lines), f"{indent}{tail}"]

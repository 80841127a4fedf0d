"""What a row of the table says: a function or method of OpenRLHF's, and what is called in its place."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from fastreward.patch.openrlhf.serving import Serving, elements
from fastreward.patch.openrlhf.source import check_own
from fastreward.patch.source import Unrecognised, digest


@dataclass(frozen=True, slots=True)
class Replacement:
    """One function or method, and ours.

    Attributes:
        module, name: where it is defined. Other bindings of a function are found by identity; a method is exchanged in
            its class, so that objects which exist already are served too.
        known: digests of the sources that `ours` was written for; another source is left alone.
        ours: called with `Serving`, with the module where `with_module` says so, and then with the call's arguments.
        what, why: for the report: the operation of fastreward's behind it, and what is gained.
        reads: what of OpenRLHF's the source relies on, as (module, name), and so is recognised together with it.
        tokens: called with the call's arguments, how many tokens it has.
        refusals: exceptions of `ours` that hand the call on to OpenRLHF's own.
    """

    module: str
    name: str
    known: tuple[str, ...]
    ours: Callable[..., Any]
    what: str
    why: str
    reads: tuple[tuple[str, str], ...] = ()
    tokens: Callable[..., int] = elements
    refusals: tuple[type[Exception], ...] = (TypeError, ValueError)
    with_module: bool = False

    @property
    def target(self) -> str:
        """Its dotted name."""
        return f"{self.module}.{self.name}"

    @property
    def method(self) -> bool:
        """Whether it is a class's."""
        return "." in self.name

    def check_source(self, root: Path) -> None:
        """Raises `Unrecognised` where the package below `root` has another source than `ours` was written for."""
        found = digest(root, ((self.module, self.name), *self.reads))
        if found not in self.known:
            also = "".join(f", {name}" for _, name in self.reads)
            raise Unrecognised(f"the source of {self.name}{also} is not one that fastreward knows ({found})")

    def owner(self, module: ModuleType) -> Any:
        """The module or class that has it; raises `Unrecognised` where there is none."""
        owner = getattr(module, self.name.partition(".")[0], None) if self.method else module
        if owner is None or self.short not in vars(owner):
            raise Unrecognised(f"{self.module} has no {self.name}")
        return owner

    @property
    def short(self) -> str:
        """What it is called there."""
        return self.name.rpartition(".")[2]

    def stock(self, module: ModuleType) -> Any:
        """OpenRLHF's own; raises `Unrecognised` where someone has put something else in its place."""
        value = vars(self.owner(module))[self.short]
        check_own(value, self.module, self.name)
        return value

    def bound(self, stock: Any, module: ModuleType, serving: Serving) -> Any:
        """Ours, counted, under the name and signature of OpenRLHF's."""
        given = (serving, module) if self.with_module else (serving,)
        ours = functools.partial(self.ours, *given)
        return serving.replacement(self.target, ours, stock, self.tokens, refusals=self.refusals)

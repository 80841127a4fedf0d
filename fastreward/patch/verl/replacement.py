"""What a row of the tables says, and the function that is bound in verl's place."""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Final

from torch import Tensor

from fastreward._runtime.errors import BackendError
from fastreward.patch.bindings import Report, is_own
from fastreward.patch.source import Unrecognised, digest
from fastreward.patch.usage import handed_on, is_handed_on
from fastreward.patch.verl.sources import KNOWN

CORE: Final = "verl.trainer.ppo.core_algos"
TORCH: Final = "verl.utils.torch_functional"


def elements(*args: Any, **kwargs: Any) -> int:
    """The size of a call's first tensor: how many tokens it has, where that is [B, T]."""
    return next((x.numel() for x in (*args, *kwargs.values()) if isinstance(x, Tensor)), 0)


@dataclass(frozen=True, slots=True)
class Replacement:
    """One function of verl's, and what is called in its place.

    Attributes:
        target: its dotted name, where it is defined; every other binding is found by identity.
        parameters: the names of its parameters, for which `ours` was written. Another signature is left alone.
        ours: called with verl's own function and then the call's arguments. Where it raises `NotServed`, or fastreward
            refuses an argument (which is told once), verl's own function is called with them: an error is verl's to
            raise. Until it knows, it writes nothing.
        what, why: for the report: the operation of fastreward's behind it, and what is gained.
        tokens: called with the call's arguments, how many tokens it has.
        counted: False for what only chooses what is called.
    """

    target: str
    parameters: tuple[str, ...]
    ours: Callable[..., Any]
    what: str
    why: str
    tokens: Callable[..., int] = elements
    counted: bool = True

    @property
    def module(self) -> str:
        """The module that has to be imported for it."""
        return self.target.rpartition(".")[0]

    @property
    def name(self) -> str:
        """What it is called there."""
        return self.target.rpartition(".")[2]

    def stock(self, module: ModuleType) -> Any:
        """verl's own; raises `Unrecognised` where it isn't what `ours` was written for."""
        stock = vars(module).get(self.name)
        if stock is None:
            raise Unrecognised(f"{self.module} has no {self.name}")
        if not callable(stock) or getattr(stock, "__module__", None) != self.module:
            raise Unrecognised(f"it is not verl's own any more but {stock!r}")
        try:
            found = tuple(inspect.signature(stock).parameters)
        except (TypeError, ValueError) as problem:  # compiled code may not say
            raise Unrecognised(f"its parameters are not known: {problem}") from problem
        if found != self.parameters:
            raise Unrecognised(f"it takes {', '.join(found)}; expected {', '.join(self.parameters)}")
        if not is_own(stock, "verl"):
            raise Unrecognised(f"someone has wrapped {stock!r} around it")
        self._check_source()
        return stock

    def _check_source(self) -> None:
        root = Path(next(iter(sys.modules["verl"].__path__)))
        if self.target in KNOWN and digest(root, [(self.module, self.name)]) != KNOWN[self.target]:
            raise Unrecognised("its source is not the one that fastreward's was written for")

    def bound(self, stock: Any, report: Report) -> Any:
        """Ours, counted, under the name, signature and docstring of verl's.

        The name is what Ray pickles: a worker looks it up in its own process, and calls what is bound there.
        """
        ours = self.ours

        def choosing(*args: Any, **kwargs: Any) -> Any:
            return ours(stock, *args, **kwargs)

        def served(*args: Any, **kwargs: Any) -> Any:
            try:
                return ours(stock, *args, **kwargs)
            except (NotServed, ValueError, TypeError, BackendError) as refusal:
                if is_handed_on():  # verl's own error
                    raise
                error = refusal
            handed_on()  # outside of the except clause, so that an error of verl's does not show ours as its context
            result = stock(*args, **kwargs)
            if not isinstance(error, NotServed):
                report.refused(self.target, error)
            return result

        bound = report.counted(self.target, served, self.tokens) if self.counted else choosing
        return functools.wraps(stock)(bound)


@dataclass(frozen=True, slots=True)
class Registration:
    """Names of ours in one of verl's registries, which its configuration then takes.

    Attributes:
        registry: the dotted name of the dictionary.
        functions: returns what is registered, by name ("fastreward..."); called when the registry's module is imported.
        what, why: for the report.
        tokens: called with a call's arguments, how many tokens it has.
    """

    registry: str
    functions: Callable[[], Mapping[str, Callable[..., Any]]]
    what: str
    why: str
    tokens: Callable[..., int] = elements

    @property
    def module(self) -> str:
        """The module that has to be imported for it."""
        return self.registry.rpartition(".")[0]

    def dictionary(self, module: ModuleType) -> dict[str, Any]:
        """The registry; raises `Unrecognised` where there is none."""
        registry = vars(module).get(self.registry.rpartition(".")[2])
        if not isinstance(registry, dict):
            raise Unrecognised(f"{self.registry} is no dictionary")
        return registry

    def bound(self, report: Report) -> dict[str, Callable[..., Any]]:
        """The functions, each counted from its first call on: a report of a hundred rows of zeros says nothing."""

        def serving(key: str, function: Callable[..., Any]) -> Callable[..., Any]:
            def call(*args: Any, **kwargs: Any) -> Any:
                return report.counted(f"{self.registry}[{key!r}]", function, self.tokens)(*args, **kwargs)

            return call

        return {key: serving(key, function) for key, function in self.functions().items()}


class NotServed(Exception):
    """The call is one for verl's own function."""

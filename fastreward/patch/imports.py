"""Something to do after a module has been imported, whenever that is: a trainer's modules are imported lazily."""

from __future__ import annotations

import importlib.machinery
import sys
from collections.abc import Callable, Collection, Sequence
from importlib.abc import Loader, MetaPathFinder
from types import ModuleType
from typing import Any


class AfterImport(MetaPathFinder):
    """Calls `then(module)` right after any of `names` has been executed, before the importing code goes on.

    The module is found and loaded by whoever would have done it: only its loader is stood in for, until it runs.
    """

    def __init__(self, names: Collection[str], then: Callable[[ModuleType], None]) -> None:
        self.names, self.then = frozenset(names), then

    def start(self) -> None:
        """From now on."""
        if self not in sys.meta_path:
            sys.meta_path.insert(0, self)

    def stop(self) -> None:
        """No more."""
        if self in sys.meta_path:
            sys.meta_path.remove(self)

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """What the other finders find, for a module that is waited for; None, so that they are asked, for others."""
        if fullname not in self.names:
            return None
        for finder in sys.meta_path:
            spec = None if finder is self else finder.find_spec(fullname, path, target)
            if spec is not None:
                if spec.loader is not None:
                    spec.loader = _Loading(spec.loader, self.then)
                return spec
        return None


class _Loading(Loader):
    """The loader of one module, in front of its own, which it is again before the module's code runs."""

    def __init__(self, loader: Loader, then: Callable[[ModuleType], None]) -> None:
        self._loader, self._then = loader, then

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        module.__loader__ = self._loader
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        self._loader.exec_module(module)
        self._then(module)


def is_imported(name: str) -> bool:
    """Whether a module is there and has run to its end."""
    module = sys.modules.get(name)
    return module is not None and not getattr(module.__spec__, "_initializing", False)

"""Where OpenRLHF is, and whether what is bound there is its own."""

from __future__ import annotations

import importlib.util
import inspect
from pathlib import Path
from typing import Any, Final

from fastreward.patch.bindings import is_own
from fastreward.patch.source import Unrecognised

PACKAGE: Final = "openrlhf"


def folder() -> Path | None:
    """Where the package is installed; None: it is not."""
    spec = importlib.util.find_spec(PACKAGE)
    return Path(spec.submodule_search_locations[0]) if spec and spec.submodule_search_locations else None


def check_own(value: Any, module: str, name: str) -> None:
    """That what is bound is what the module's file defines, and not what someone has put in its place."""
    function = inspect.unwrap(value)
    code = getattr(function, "__code__", None)
    if getattr(function, "__module__", None) != module or getattr(function, "__qualname__", None) != name or not code:
        raise Unrecognised(f"it is not OpenRLHF's own any more but {value!r}")
    if not is_own(value, PACKAGE):
        raise Unrecognised(f"someone has wrapped {value!r} around it")

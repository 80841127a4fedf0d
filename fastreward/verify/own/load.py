"""`module:function` and `file.py:function`: a loss, a divergence, or a peer, by name."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from fastreward.language.define import Definition, Loss
from fastreward.language.objective import inputs_asked


def loss(text: str) -> Loss:
    """A loss or divergence: itself, or what its definition, or a function without arguments, makes with its defaults.

    Raises:
        ValueError: nothing of this name, no loss, or one that needs parameters; says which.
    """
    found = _object(text)
    for _ in range(3):  # a function may give a definition
        if isinstance(found, Loss):
            return _checked(text, found)
        if not callable(found):
            break
        found = _called(text, found)
    raise ValueError(
        f"{text}: expected a loss or divergence (of losses.define, divergences.define), or a function that gives one, "
        f"got {type(found).__name__}"
    )


def function(text: str) -> Callable[..., Any]:
    """A function, whatever it does.

    Raises:
        ValueError: nothing of this name, or nothing that can be called.
    """
    found = _object(text)
    if isinstance(found, Loss | Definition) or not callable(found):
        raise ValueError(f"{text}: expected a plain function of tensors, got {type(found).__name__}")
    made: Callable[..., Any] = found
    return made


def functions(texts: Sequence[str]) -> dict[str, Callable[..., Any]]:
    """Functions by what they were named with, no two of one name.

    Raises:
        ValueError: as `function`; the same name twice.
    """
    names = [text.rpartition(":")[2] for text in texts]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"{name}: expected peers with names of their own, got it {names.count(name)} times")
    return {text: function(text) for text in texts}


def _checked(text: str, found: Loss) -> Loss:
    if found.tensors:
        raise ValueError(
            f"{text}: its parameters {', '.join(found.tensors)} are tensors, of sequences that are not here; "
            "give it numbers"
        )
    try:
        inputs_asked(found)
    except Exception as error:  # as in _called
        raise ValueError(f"{text}: tracing it raises {type(error).__name__}: {error}") from error
    return found


def _called(text: str, found: Callable[..., Any]) -> Any:
    try:
        wanted = list(inspect.signature(found).parameters.values())
    except (TypeError, ValueError):  # what is written in C may have none
        wanted = []
    needed = [p.name for p in wanted if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    if needed and isinstance(found, Definition):
        raise ValueError(
            f"{text}: needs the parameters {', '.join(needed)}; give them defaults, or name a loss that has them, "
            f"as in own = {found.name}({needed[0]}=...)"
        )
    if needed:
        raise ValueError(
            f"{text}: expected a loss, or a function without arguments that gives one; got a function of "
            f"{', '.join(needed)}. Is losses.define missing above it?"
        )
    try:
        return found()
    except Exception as error:  # it is somebody's own
        raise ValueError(f"{text}: calling it raises {type(error).__name__}: {error}") from error


def _object(text: str) -> Any:
    place, colon, name = text.rpartition(":")
    if not colon or not place or not name:
        raise ValueError(f"{text}: expected module:function or file.py:function")
    found: Any = _module(text, place)
    for part in name.split("."):
        if not hasattr(found, part):
            named = vars(found) if hasattr(found, "__dict__") else {}
            there = [x for x, value in named.items() if not x.startswith("_") and not isinstance(value, ModuleType)]
            raise ValueError(f"{text}: {place} has no {name!r}; it has {', '.join(there[:12]) or 'nothing'}")
        found = getattr(found, part)
    return found


def _module(text: str, place: str) -> ModuleType:
    try:
        if not place.endswith(".py"):
            if "" not in sys.path and str(Path.cwd()) not in sys.path:
                sys.path.insert(0, str(Path.cwd()))  # a console script has the folder of its own there instead
            return importlib.import_module(place)
        path = Path(place)
        if not path.is_file():
            raise ValueError(f"{text}: there is no file {place}")
        name = f"_own_{path.stem}"  # not that of another module
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module  # dataclasses look for it there
        spec.loader.exec_module(module)
        return module
    except (ValueError, AssertionError):
        raise
    except Exception as error:  # importing runs anything
        raise ValueError(f"{text}: {place} can't be imported: {type(error).__name__}: {error}") from error

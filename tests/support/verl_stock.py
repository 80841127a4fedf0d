"""Modules of verl's that import what is not installed here, for parts of them that no test uses."""

from __future__ import annotations

import importlib
import sys
import types
import warnings
from typing import Any
from unittest.mock import MagicMock

from fastreward.patch.source import Unrecognised


def imported(name: str) -> Any:
    """The module of verl's; a mock stands for each package that is missing (servers, loaders of data, caches)."""
    while True:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # about engines that are not there
                return importlib.import_module(name)
        except ModuleNotFoundError as error:
            if not error.name or error.name.split(".")[0] in ("verl", "torch", "fastreward"):
                raise
            missing = types.ModuleType(error.name)
            missing.__path__ = []
            missing.__getattr__ = lambda attribute: MagicMock(name=attribute)  # type: ignore[method-assign]
            sys.modules[error.name] = missing


def recognised(row: Any, module: Any) -> bool:
    """Whether this verl's function is the one that a row of the patch's tables was written for."""
    try:
        row.stock(module)
    except Unrecognised:
        return False
    return True

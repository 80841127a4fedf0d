"""Drop fastreward into an installed trainer: `fastreward.patch.trl()`, and no other change to a training script.

Importing this package imports no trainer. Each patch returns a `Report` of what was replaced and what was left and why;
`undo()` restores every binding, `status()` tells what is in place and how much it has served; `trl_callback()` logs it.
"""

from __future__ import annotations

import importlib
from typing import Any

from fastreward.patch.bindings import Entry, PatchRefused, Report, Status, status, undo
from fastreward.patch.openrlhf import openrlhf, openrlhf_runtime_env
from fastreward.patch.trl.apply import trl
from fastreward.patch.trl.callback import trl_callback
from fastreward.patch.usage import Usage
from fastreward.patch.verl import verl

__all__ = [
    "Entry",
    "PatchRefused",
    "Report",
    "Status",
    "Usage",
    "openrlhf",
    "openrlhf_runtime_env",
    "status",
    "trl",
    "trl_callback",
    "undo",
    "verl",
]

#: Modules whose functions these trainers find by their paths; loaded when they are asked for.
_BY_PATH = ("slime", "prime_rl")


def __getattr__(name: str) -> Any:
    if name in _BY_PATH:
        return importlib.import_module(f"fastreward.patch.{name}")
    raise AttributeError(f"module 'fastreward.patch' has no attribute {name!r}")

"""All rows of the files of this folder, and what is verl's to keep."""

from __future__ import annotations

from typing import Final

from fastreward.patch.bindings import Entry
from fastreward.patch.verl import (
    advantages,
    aggregation,
    balancing,
    linear,
    logprobs,
    losses,
    masked,
    methods,
    padding,
    rewards,
    rollout,
    rows,
    token_baseline,
)
from fastreward.patch.verl.replacement import Registration, Replacement

_FILES: Final = (
    advantages,
    token_baseline,
    rewards,
    masked,
    losses,
    aggregation,
    logprobs,
    linear,
    rollout,
    balancing,
    padding,
    rows,
    methods,
)
REPLACEMENTS: Final[tuple[Replacement, ...]] = tuple(row for file in _FILES for row in file.REPLACEMENTS)
REGISTRATIONS: Final[tuple[Registration, ...]] = methods.REGISTRATIONS
KEPT: Final[tuple[Entry, ...]] = tuple(row for file in _FILES for row in getattr(file, "KEPT", ()))

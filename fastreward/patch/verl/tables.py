"""All rows of the files of this folder, and what is verl's to keep."""

from __future__ import annotations

from typing import Final

from fastreward.patch.bindings import Entry
from fastreward.patch.verl import aggregation, balancing, linear, logprobs, losses, masked
from fastreward.patch.verl.replacement import Registration, Replacement

REPLACEMENTS: Final[tuple[Replacement, ...]] = (
    *masked.REPLACEMENTS,
    *losses.REPLACEMENTS,
    *aggregation.REPLACEMENTS,
    *logprobs.REPLACEMENTS,
    *linear.REPLACEMENTS,
    *balancing.REPLACEMENTS,
)
REGISTRATIONS: Final[tuple[Registration, ...]] = ()
KEPT: Final[tuple[Entry, ...]] = (*losses.KEPT, *logprobs.KEPT, *linear.KEPT)

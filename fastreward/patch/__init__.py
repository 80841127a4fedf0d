"""Drop fastreward into an installed trainer: `fastreward.patch.trl()`, and no other change to a training script.

Importing this package imports no trainer. Each patch returns a `Report` of what was replaced and what was left and why;
`undo()` restores every binding, `status()` tells what is in place.
"""

from __future__ import annotations

from fastreward.patch.bindings import Entry, PatchRefused, Report, status, undo
from fastreward.patch.trl import trl

__all__ = ["Entry", "PatchRefused", "Report", "status", "trl", "undo"]

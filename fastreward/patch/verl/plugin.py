"""verl's entry point (group `verl.plugins`): importing this module applies the patch.

verl imports it in the middle of its own import, in every process, and says nothing of what goes wrong in it, so that
this module does: one line on stderr of what is served, one for each function that could not be.

    FASTREWARD_VERL=off              this plugin does nothing
    FASTREWARD_VERL=metrics          verl's metrics have what is served, as with metrics=True
    VERL_USE_EXTERNAL_PLUGINS=none   verl loads no plugin; a list of names without "fastreward" leaves this one out
"""

from __future__ import annotations

import os
import sys
from typing import Final

from fastreward.patch.bindings import PatchRefused, Report
from fastreward.patch.verl.apply import verl

_OFF: Final = ("off", "0", "no", "false", "none")


def apply() -> Report | None:
    """Apply the patch unless FASTREWARD_VERL says off, and say so; None: it is off or was refused."""
    setting = os.environ.get("FASTREWARD_VERL", "on").strip().lower()
    if setting in _OFF:
        return None
    try:
        report = verl(metrics=setting == "metrics", tell=warn)
    except PatchRefused as refusal:
        warn(str(refusal))
        return None
    except Exception as error:  # verl would swallow it, and train without us
        warn(f"fastreward.patch.verl could not be applied: {type(error).__name__}: {error}")
        raise
    served = len(report.replaced) + len(report.pending)
    say(f"{served} functions of verl {report.version} are served; FASTREWARD_VERL=off turns this off")
    return report


def say(line: str) -> None:
    """One line on stderr, whatever loggers and filters there are."""
    print(f"fastreward (process {os.getpid()}): {line}", file=sys.stderr, flush=True)


def warn(line: str) -> None:
    """One that something is not as expected."""
    say(f"WARNING: {line}")


apply()

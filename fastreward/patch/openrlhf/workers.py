"""The patch in Ray's workers: OpenRLHF's actors and its trainer run there, and no import of the driver's reaches them.

FASTREWARD_OPENRLHF, in the environment of a process: "off" leaves it alone, "metrics" logs as metrics=True does.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from typing import Any, Final

from fastreward.patch.bindings import PatchRefused, Report
from fastreward.patch.openrlhf.apply import openrlhf

VARIABLE: Final = "FASTREWARD_OPENRLHF"
HOOK: Final = f"{__name__}.apply"
_OFF: Final = ("off", "0", "no", "false", "none")
_SETUP: Final = "worker_process_setup_hook"


def openrlhf_runtime_env(runtime_env: Mapping[str, Any] | None = None, *, metrics: bool = False) -> dict[str, Any]:
    """`ray.init(runtime_env=fastreward.patch.openrlhf_runtime_env())`: every worker of the job applies the patch.

    Ray calls its hook before anything else runs in a worker. FASTREWARD_OPENRLHF=off in the environment turns it off,
    and a line on stderr of each process says what is served there. `python -m fastreward.patch.openrlhf
    openrlhf.cli.train_ppo_ray ...` does the same for OpenRLHF's command line, which calls ray.init itself.

    Args:
        runtime_env: one that the hook is added to; what it says of environment variables stays.
        metrics: log how much fastreward has served, as `openrlhf(metrics=True)` does.

    Raises:
        ValueError: runtime_env has a worker_process_setup_hook already. Have that one call
            fastreward.patch.openrlhf.workers.apply.
    """
    merged = dict(runtime_env or {})
    if merged.get(_SETUP, HOOK) != HOOK:
        raise ValueError(
            f"runtime_env: expected no {_SETUP} of another's, got {merged[_SETUP]!r}; a worker has one: call "
            f"{HOOK} in it"
        )
    merged[_SETUP] = HOOK
    setting = os.environ.get(VARIABLE, "metrics" if metrics else "on")
    merged["env_vars"] = {VARIABLE: setting, **merged.get("env_vars", {})}
    return merged


def apply() -> Report | None:
    """Apply the patch in this process unless FASTREWARD_OPENRLHF says off, and say so; None: it is off or refused."""
    setting = os.environ.get(VARIABLE, "on").strip().lower()
    if setting in _OFF:
        return None
    try:
        report = openrlhf(metrics=setting == "metrics", tell=_warn)
    except PatchRefused as refusal:
        _warn(str(refusal))
        return None
    served = [entry.target.rpartition(".")[2] for entry in (*report.replaced, *report.pending)]
    names = ", ".join(served)
    _say(f"serves {len(served)} functions of OpenRLHF {report.version} ({names}); {VARIABLE}=off turns it off")
    return report


def _say(line: str) -> None:
    """One line on stderr, whatever loggers and filters there are."""
    print(f"fastreward (process {os.getpid()}): {line}", file=sys.stderr, flush=True)


def _warn(line: str) -> None:
    """One that something is not as expected."""
    _say(f"WARNING: {line}")

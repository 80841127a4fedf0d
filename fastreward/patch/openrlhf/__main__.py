"""`python -m fastreward.patch.openrlhf openrlhf.cli.train_ppo_ray ...`: OpenRLHF's command line, served by fastreward.

Runs the module that is named first as python -m would, with the patch in this process and, where it calls ray.init, in
every worker of the job. --metrics before it logs how much fastreward has served.
"""

from __future__ import annotations

import functools
import os
import runpy
import sys
from typing import Any

from fastreward.patch.openrlhf import workers

_USAGE = "usage: python -m fastreward.patch.openrlhf [--metrics] MODULE [its arguments ...]"


def main() -> None:
    """Run it."""
    arguments = sys.argv[1:]
    metrics = arguments[:1] == ["--metrics"]
    arguments = arguments[metrics:]
    if not arguments or arguments[0].startswith("-"):
        raise SystemExit(f"{__doc__}\n{_USAGE}")
    if metrics:
        os.environ[workers.VARIABLE] = os.environ.get(workers.VARIABLE, "metrics")
    if workers.apply() is not None:
        hook_workers(metrics)
    sys.argv = arguments
    runpy.run_module(arguments[0], run_name="__main__", alter_sys=True)


def hook_workers(metrics: bool) -> None:
    """Have ray.init, whoever calls it, give every worker the patch."""
    import ray

    stock = ray.init

    @functools.wraps(stock)
    def init(*args: Any, **kwargs: Any) -> Any:
        kwargs["runtime_env"] = workers.openrlhf_runtime_env(kwargs.get("runtime_env"), metrics=metrics)
        return stock(*args, **kwargs)

    ray.init = init


if __name__ == "__main__":
    main()

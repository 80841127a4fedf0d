"""Forks a process for each test run, so that none of them pays for importing torch. Reads and answers lines of JSON.

    {"tests": [arguments for pytest], "limit": seconds, "log": path, "keep": whether bytecode may be written}
    {"outcome": "passed" | "failed" | "timeout" | "nothing", "seconds": 1.2}         nothing: no test was selected

fastreward must not be imported here: each run imports the code as it then is.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import sys
import time
import traceback
from typing import Any, Final, NoReturn

import hypothesis
import pytest

_OPTIONS: Final = (
    *("-x", "-q", "--tb=line", "-p", "no:cacheprovider", "-p", "no:xdist", "-p", "no:benchmark"),
    *("--hypothesis-profile", "mutation"),
    *("-W", "ignore::pytest.PytestAssertRewriteWarning"),  # of hypothesis, imported here before pytest's run
)


def main() -> None:
    """Imports the modules named on the command line, then serves until the input ends."""
    for name in sys.argv[1:]:
        importlib.import_module(name)
    # A failure found is enough: hypothesis need not look for a smaller one, nor remember it.
    phases = (hypothesis.Phase.explicit, hypothesis.Phase.generate)
    hypothesis.settings.register_profile("mutation", phases=phases, database=None)
    assert not any(name.split(".")[0] == "fastreward" for name in sys.modules)
    for line in sys.stdin:
        start = time.monotonic()
        outcome = _forked(json.loads(line))
        print(json.dumps({"outcome": outcome, "seconds": time.monotonic() - start}), flush=True)


def _forked(request: dict[str, Any]) -> str:
    child = os.fork()
    if not child:
        _tests(request)
    until = time.monotonic() + request["limit"]
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            code = os.waitstatus_to_exitcode(status)
            return {0: "passed", pytest.ExitCode.NO_TESTS_COLLECTED: "nothing"}.get(code, "failed")
        if time.monotonic() > until:
            os.killpg(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return "timeout"
        time.sleep(0.02)


def _tests(request: dict[str, Any]) -> NoReturn:
    status = 1
    try:
        os.setpgid(0, 0)  # so that what the tests start ends with them
        log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        for stream, file in ((0, os.open(os.devnull, os.O_RDONLY)), (1, log), (2, log)):
            os.dup2(file, stream)
        if not request["keep"]:
            sys.dont_write_bytecode = True
            os.environ["PYTHONDONTWRITEBYTECODE"] = "1"
        status = int(pytest.main([*_OPTIONS, *request["tests"]]))
        sys.stdout.flush()
        sys.stderr.flush()
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


if __name__ == "__main__":
    main()

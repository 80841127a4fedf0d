"""Which instruction set the CPU kernels run on where FASTREWARD_ISA asks for one."""

from __future__ import annotations

import os
import subprocess
import sys

from fastreward import _core

#: Loads the module by its path: alone, as importing the package imports torch, which takes seconds.
_ASK = """
import sys
from importlib import util
spec = util.spec_from_file_location("_core", sys.argv[1])
module = util.module_from_spec(spec)
spec.loader.exec_module(module)
print(module.isa())
"""


def in_use(isa: str) -> str:
    """The instruction set in use where `isa` is asked for: another one where this machine has it not."""
    environment = {**os.environ, "FASTREWARD_ISA": isa}
    command = [sys.executable, "-c", _ASK, _core.__file__]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.strip()

"""The Triton kernels' numerics without a GPU: collected where TRITON_INTERPRET=1, by a pytest run of their own.

Triton reads the variable when it is imported, and then it holds for the whole process. `make test` runs both.
"""

from __future__ import annotations

import importlib.util
import os
from types import FunctionType
from typing import Any

collect_ignore_glob = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["test_*.py"]


def _patch_language_once_per_launch() -> None:
    """Half of the interpreter's time: it patches triton.language at each call of a function by a kernel, not just at a
    launch. A module that this launch has patched stays so until the launch restores it.
    """
    from triton.runtime import interpreter

    if not hasattr(interpreter, "_LangPatchScope"):  # another version, which does it otherwise
        return
    patch, restore, patched = interpreter._patch_lang, interpreter._LangPatchScope.restore, set[int]()

    def patch_once(function: FunctionType) -> Any:
        languages = (interpreter.tl, interpreter.tl.core)
        used = {id(x) for x in languages if any(x is value for value in function.__globals__.values())}
        if used and used <= patched:
            return None  # of a call, whose scope nobody asks for; a launch finds nothing patched
        patched.update(used)
        return patch(function)

    def restore_all(scope: Any) -> None:
        patched.clear()
        restore(scope)

    interpreter._patch_lang, interpreter._LangPatchScope.restore = patch_once, restore_all


if not collect_ignore_glob and importlib.util.find_spec("triton") is not None:
    _patch_language_once_per_launch()

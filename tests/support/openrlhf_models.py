"""OpenRLHF's models/loss.py and models/utils.py as modules of their own: the package needs deepspeed and a GPU."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest


@contextmanager
def models() -> Iterator[Any]:
    """The two as `.loss` and `.utils`; skips the test where OpenRLHF is not installed."""
    spec = importlib.util.find_spec("openrlhf")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("openrlhf is not installed (`make test` installs it)")
    added = {"openrlhf_models": types.ModuleType("openrlhf_models")}
    if importlib.util.find_spec("deepspeed") is None:
        added["deepspeed"] = types.ModuleType("deepspeed")  # named in a function that nobody calls
    sys.modules.update(added)
    added["openrlhf_models"].__path__ = [str(Path(spec.submodule_search_locations[0]) / "models")]
    loss = importlib.import_module("openrlhf_models.loss")
    yield types.SimpleNamespace(loss=loss, utils=importlib.import_module("openrlhf_models.utils"))
    for name in [*added, "openrlhf_models.loss", "openrlhf_models.utils"]:
        del sys.modules[name]

"""areal's trie builder (1.0.4, areal/models/tree_attn/tree.py), without the engines that importing areal needs.

The file is loaded as it is installed; what it imports for launching, logging and batching is replaced by names alone,
none of which the builder calls.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

from fastreward.bench.peers import Absent, quietly

#: Module -> names that tree.py takes from it.
_NAMES = {
    "areal.api.cli_args": ("MicroBatchSpec",),
    "areal.utils.data": ("MicroBatchList",),
    "areal.utils.perf_tracer": ("trace_perf", "trace_scope"),
    "areal.utils": ("stats_tracker",),
    "areal.models.tree_attn.constants": ("BLOCK_SIZE", "USE_TRITON_TREE_ATTN"),
    "areal.models.tree_attn.module_fsdp": ("create_block_mask_from_dense",),
}
_REAL = ("areal.models.tree_attn.triton_kernel", "areal.models.tree_attn.tree")


@cache
def tree_module() -> Any:
    """areal.models.tree_attn.tree; Absent where areal is not installed."""
    spec = importlib.util.find_spec("areal")
    if spec is None or spec.submodule_search_locations is None:
        raise Absent("not installed")
    folder = Path(next(iter(spec.submodule_search_locations))) / "models" / "tree_attn"
    before = {name: module for name, module in sys.modules.items() if name.partition(".")[0] == "areal"}
    sys.modules.update(_stand_ins())
    try:
        with quietly():
            return [_load(name, folder) for name in _REAL][-1]
    finally:
        for name in [name for name in sys.modules if name.partition(".")[0] == "areal"]:
            del sys.modules[name]
        sys.modules.update(before)


def builder() -> Callable[[dict[str, Any], int], tuple[list[Any], list[int]]]:
    """(tokens and attention mask, tokens of a trie) -> (tries, tokens of each)."""
    found: Callable[[dict[str, Any], int], tuple[list[Any], list[int]]] = tree_module()._greedy_build_tries
    return found


def _load(name: str, folder: Path) -> Any:
    spec = importlib.util.spec_from_file_location(name, folder / f"{name.rpartition('.')[2]}.py")
    if spec is None or spec.loader is None:
        raise Absent(f"{name} is not in this version")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def _stand_ins() -> dict[str, ModuleType]:
    made: dict[str, ModuleType] = {}
    for full in (*_NAMES, "areal.utils.logging"):
        for end in [i for i, c in enumerate(full) if c == "."] + [len(full)]:
            module = made.setdefault(full[:end], ModuleType(full[:end]))
            module.__path__ = []
    for full, names in _NAMES.items():
        for name in names:
            setattr(made[full], name, 128 if name == "BLOCK_SIZE" else None)
    made["areal.utils.perf_tracer"].trace_perf = lambda _: lambda function: function  # type: ignore[attr-defined]
    logging = made["areal.utils.logging"]
    logging.getLogger = lambda _: None  # type: ignore[attr-defined]
    made["areal.utils"].logging = logging  # type: ignore[attr-defined]
    return made

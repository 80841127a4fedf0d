"""Generated kernels as modules: Triton compiles from source files, so each is kept in one and imported from there.

The folder is FASTREWARD_CACHE, or ~/.cache/fastreward. A file's name ends in a hash of its content; Triton keeps what
it compiles in a cache of its own, so a loss that was used before starts without a compiler.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import sys
import tempfile
from functools import lru_cache
from pathlib import Path
from types import ModuleType


def folder() -> Path:
    """Where generated modules are kept."""
    given = os.environ.get("FASTREWARD_CACHE")
    return (Path(given) if given else Path.home() / ".cache" / "fastreward") / "triton"


@lru_cache(maxsize=4096)
def load(name: str, source: str) -> ModuleType:
    """The module `source`, written to the cache unless it is there."""
    stem = f"{name}_{hashlib.sha256(source.encode()).hexdigest()[:16]}"
    path = folder() / f"{stem}.py"
    if not _holds(path, source):
        _write(path, source)
    spec = importlib.util.spec_from_file_location(f"fastreward_generated_{stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def _holds(path: Path, source: str) -> bool:
    try:
        return path.read_text(encoding="utf-8") == source
    except OSError:
        return False


def _write(path: Path, source: str) -> None:
    """All of it or nothing, whoever else writes the same file."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.stem, suffix=".tmp")
    except OSError as error:
        raise RuntimeError(
            f"fastreward: cannot write generated kernels to {path.parent} ({error}); set FASTREWARD_CACHE to a folder "
            "that can be written"
        ) from error
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        file.write(source)
    os.replace(temporary, path)

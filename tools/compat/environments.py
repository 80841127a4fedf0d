"""An environment for each row: a folder with the packages of its own, in front of those of this environment.

Nothing of this environment is changed, and what it has already is not installed again. A row of another Python has an
environment of its own from the bottom up, as its packages are others.
"""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Final

from rows import Row

ROOT: Final = Path(__file__).resolve().parents[2]
FOLDER: Final = ROOT / "build" / "compat"
#: What the tests of another Python need there.
_TEST_PACKAGES: Final = ("pytest", "pytest-timeout", "hypothesis", "scikit-build-core", "pybind11", "ninja", "cmake")


class NotHere(Exception):
    """The row can't be run on this machine; the message says why."""


def python_of(row: Row) -> Path:
    """The interpreter of the row's environment, which is made if it isn't there."""
    if _is_here(row):
        return Path(sys.executable)
    place = FOLDER / row.name
    python = place / "bin" / "python"
    if not (place / "complete").exists():
        if row.kind == "python":
            _own(row, place)  # goes on where it was interrupted
        else:
            shutil.rmtree(place, ignore_errors=True)
            _overlay(row, place)
        (place / "complete").touch()
    return python


def _is_here(row: Row) -> bool:
    """Whether this environment is the row's: of trainers only where nothing has to be installed."""
    if row.kind == "python":
        return row.version == f"{sys.version_info.major}.{sys.version_info.minor}"
    if row.kind in ("torch", "triton", "compiled"):
        package = "torch" if row.kind == "torch" else "triton"
        return importlib.metadata.version(package).partition("+")[0] == row.version
    return not row.install


def _overlay(row: Row, place: Path) -> None:
    """The row's packages in front of those of this environment."""
    _run(sys.executable, "-m", "venv", "--without-pip", place)
    (site,) = (place / "lib").glob("python*/site-packages")
    ours = sysconfig.get_path("purelib")
    (site / "fastreward_compat.pth").write_text(f"import site; site.addsitedir({ours!r})\n", encoding="utf-8")
    if row.install:
        alone = ("--no-deps",) if row.alone else ()
        _install(sys.executable, "--target", site, *alone, *row.install)


def _own(row: Row, place: Path) -> None:
    """Another Python, with torch, and fastreward built for it."""
    _run(_interpreter(row.version), "-m", "venv", place)
    python = place / "bin" / "python"
    _install(python, "--constraint", ROOT / "constraints.txt", "torch", "numpy", "rich", "typer", *_TEST_PACKAGES)
    launcher = {"CMAKE_CXX_COMPILER_LAUNCHER": "ccache"} if shutil.which("ccache") else {}
    path = f"{place / 'bin'}{os.pathsep}{os.environ['PATH']}"
    options = ("--no-build-isolation", "--no-deps", "--config-settings=cmake.define.FASTREWARD_CUDA=OFF")
    _install(python, *options, "--editable", ROOT, env=launcher | {"PATH": path})


def _interpreter(version: str) -> str:
    """python3.x of this machine: on the path, or pyenv's."""
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"))
    candidates = [shutil.which(f"python{version}"), *sorted(pyenv.glob(f"versions/{version}.*/bin/python"))]
    for candidate in candidates:
        if candidate and subprocess.run([candidate, "-c", ""], capture_output=True, check=False).returncode == 0:
            return str(candidate)
    raise NotHere(f"no Python {version} on the machine of this run")


def _install(python: str | Path, *arguments: str | Path, env: dict[str, str] | None = None) -> None:
    command = (python, "-m", "pip", "install", "--quiet", "--no-compile", "--disable-pip-version-check", *arguments)
    try:
        _run(*command, env=env)
    except subprocess.CalledProcessError as error:
        lines = [line for line in error.stderr.splitlines() if line.startswith("ERROR")]
        raise NotHere(f"can't be installed on the machine of this run: {lines[0] if lines else error}") from error


def _run(*command: str | Path, env: dict[str, str] | None = None) -> None:
    strings = [str(part) for part in command]
    subprocess.run(strings, check=True, capture_output=True, text=True, env={**os.environ, **(env or {})})

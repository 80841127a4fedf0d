"""A copy of the repository in which one mutation at a time is applied, and the process that runs its tests.

The copy's Python is made to import the copy: PYTHONPATH puts it first, with an empty module of the name by which an
editable install would point to the working tree.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Final

from mutation_list import REPOSITORY, Mutation, Room

_SERVER: Final = Path(__file__).with_name("mutation_server.py")
_BUILD: Final = "build/mutation"
#: Threads that wait must not take the core from those that work; nothing may look at a GPU.
_ENVIRONMENT: Final = {"OMP_WAIT_POLICY": "passive", "OPENBLAS_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


class CompileError(Exception):
    """The changed code is no code."""


@dataclass(frozen=True)
class Answer:
    """Of a test run: passed, failed, timeout or nothing (no test was selected), and how long it took."""

    outcome: str
    seconds: float


class Copy:
    """A copy of the repository, made or refreshed on entry: build/mutation/<number>."""

    def __init__(self, number: int) -> None:
        self._root = REPOSITORY / _BUILD / str(number)
        self._server: subprocess.Popen[str] | None = None
        self._served: Room | None = None

    def __enter__(self) -> Copy:
        self._refresh()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._stop()

    # ------------------------------------------------------------------------------------------------------- its files
    def _refresh(self) -> None:
        listed = subprocess.run(
            ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
            cwd=REPOSITORY,
            capture_output=True,
            text=True,
            check=True,
        )
        wanted = {name for name in listed.stdout.split("\0") if name and (REPOSITORY / name).is_file()}
        (self._root / "build").mkdir(parents=True, exist_ok=True)
        for path in [p for p in self._root.rglob("*") if p.suffix in (".py", ".cpp", ".hpp", ".cu")]:
            relative = path.relative_to(self._root)
            if str(relative) not in wanted and relative.parts[0] != "build" and not path.is_symlink():
                path.unlink()
        for name in wanted:
            there, here = self._root / name, REPOSITORY / name
            if not there.exists() or there.read_bytes() != here.read_bytes():
                there.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(here, there)
        (self._root / "_editable_skbc_fastreward.py").write_text('"""In the place of the editable install\'s."""\n')
        kernels = self._root / "fastreward" / "kernels"
        if not kernels.is_symlink():
            kernels.symlink_to("../kernels")
        installed = Path(sysconfig.get_path("platlib")) / "fastreward"
        modules = list(installed.glob("_c*.so"))
        if not modules:
            raise FileNotFoundError(f"no compiled modules in {installed}: build first (make build)")
        for module in modules:
            shutil.copy2(module, self._root / "fastreward" / module.name)

    @contextmanager
    def changed(self, mutation: Mutation) -> Iterator[None]:
        """Applies the mutation, compiled where it is C++ of the CPU; restores everything afterwards."""
        path = self._root / mutation.file
        original, times = path.read_text(encoding="utf-8"), path.stat()
        text = original.replace(mutation.before, mutation.after)
        if path.suffix == ".py":
            try:
                compile(text, str(path), "exec")
            except SyntaxError as error:
                raise CompileError(str(error)) from error
        compiled = _is_core(mutation.file)
        (module,) = (self._root / "fastreward").glob("_core*.so")
        built = module.read_bytes()
        try:
            path.write_text(text, encoding="utf-8")
            if compiled:
                self._build()
            else:  # so that no .pyc of the original passes for one of this
                os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns + 10**10))
            yield
        finally:
            path.write_text(original, encoding="utf-8")
            if compiled:  # its time stays new: the next build has to see it
                module.unlink()
                module.write_bytes(built)
            else:
                os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))

    def _build(self) -> None:
        """Compiles _core for this machine's instruction set alone, and what has changed alone."""
        build = self._root / "build"
        if not (build / "build.ninja").exists():
            _run("cmake", "-S", str(self._root), "-B", str(build), "-G", "Ninja", *_cmake_options(self._root))
        _run("cmake", "--build", str(build), "--target", "_core")
        (module,) = build.glob("_core*.so")
        there = self._root / "fastreward" / module.name
        there.unlink(missing_ok=True)
        shutil.copy2(module, there)

    # ------------------------------------------------------------------------------------------------------- its tests
    def prepare(self, room: Room) -> None:
        """Starts the process that the room's tests are forked from, unless it is there."""
        if self._served == room:
            return
        self._stop()
        if any(_is_core(m.file) for m in room.mutations):  # the unchanged code compiled as the changed will be
            self._build()
        environment = {
            **os.environ,
            **_ENVIRONMENT,
            "PYTHONPATH": str(self._root),
            "FASTREWARD_CACHE": str(self._root / "build" / "cache"),
            **dict(room.environment),
        }
        self._server = subprocess.Popen(
            [sys.executable, str(_SERVER), *room.preload],
            cwd=self._root,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._served = room

    def run_tests(
        self, room: Room, files: Sequence[str], expression: str, limit: float, *, unchanged: bool = False
    ) -> Answer:
        """Runs pytest on `files` with -k `expression`, until the first failure. unchanged: its bytecode may be kept."""
        assert self._server is not None
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        assert self._served == room
        shutil.rmtree(self._root / "build" / "cache", ignore_errors=True)  # of code that a changed generator wrote
        tests = [*files, *(("-k", expression) if expression else ())]
        request = {"tests": tests, "limit": limit, "log": str(self._log), "keep": unchanged}
        print(json.dumps(request), file=self._server.stdin, flush=True)
        return Answer(**json.loads(self._server.stdout.readline()))

    @property
    def _log(self) -> Path:
        return self._root / "build" / "tests.log"

    def log(self) -> str:
        """The end of what the last tests printed."""
        return self._log.read_text(encoding="utf-8", errors="replace")[-3000:]

    def first_failure(self) -> str:
        """The last test run's line for what failed."""
        lines = [x for x in self.log().splitlines() if x.startswith(("FAILED", "ERROR"))]
        return lines[0] if lines else ""

    def _stop(self) -> None:
        if self._server is not None:
            assert self._server.stdin is not None
            self._server.stdin.close()
            self._server.wait()
        self._server = self._served = None


def _is_core(file: str) -> bool:
    """Whether a file goes into the compiled module; those of csrc/cuda are compiled by the tests."""
    return file.startswith("csrc/") and not file.startswith("csrc/cuda/")


def _cmake_options(root: Path) -> list[str]:
    import pybind11

    launcher = ["-DCMAKE_CXX_COMPILER_LAUNCHER=ccache"] if shutil.which("ccache") else []
    return [
        "-DCMAKE_BUILD_TYPE=Release",
        "-DFASTREWARD_CUDA=OFF",
        f"-DFASTREWARD_ONLY_ISA={_isa(root)}",
        f"-DPython_EXECUTABLE={sys.executable}",
        f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
        *launcher,
    ]


def _isa(root: Path) -> str:
    """The instruction set that the compiled module chooses here."""
    code = "import fastreward._core as core; print(core.isa())"
    return _run(sys.executable, "-P", "-c", code, PYTHONPATH=str(root)).strip()


def _run(*command: str, **environment: str) -> str:
    environment = {**os.environ, **environment}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise CompileError(f"{' '.join(command[:3])} ...: {(done.stdout + done.stderr)[-1500:]}")
    return done.stdout

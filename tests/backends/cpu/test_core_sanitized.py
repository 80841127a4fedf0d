"""The C++ core under sanitizers: builds the presets `sanitize` (ASan, UBSan) and `sanitize-thread` (TSan), and runs the
test program of each: all of it, or the cases that use threads, for one instruction set.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from checkout import ROOT
from instruction_sets import in_use

ISAS = ("baseline", "avx2", "avx512")


def _tool(name: str) -> str | None:
    """A build tool: of the environment that runs the tests, else of PATH."""
    beside = Path(sys.executable).with_name(name)
    return str(beside) if beside.exists() else shutil.which(name)


def _run(*command: str | Path, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    merged = {**os.environ, **(env or {})}
    return subprocess.run([str(part) for part in command], capture_output=True, text=True, env=merged, cwd=ROOT)


def _compiler(folder: Path, sanitizers: str) -> str:
    """A C++ compiler whose sanitized programs link and run; else the test is skipped with the reason."""
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    source, program = folder / "probe.cpp", folder / "probe"
    source.write_text("int main() { return 0; }\n")
    built = _run(compiler, "-pthread", f"-fsanitize={sanitizers}", source, "-o", program)
    if built.returncode != 0:
        pytest.skip(f"{compiler} has no sanitizer runtime: {built.stderr.strip()[:200]}")
    ran = _run(program)
    if ran.returncode != 0:
        pytest.skip(f"a sanitized program does not run here: {ran.stderr.strip()[:200]}")
    return compiler


def _build(folder: Path, preset: str, sanitizers: str) -> Path:
    """The test program of a preset."""
    cmake, ninja = _tool("cmake"), _tool("ninja")
    if cmake is None or ninja is None:
        pytest.skip("cmake and ninja are not installed")
    compiler = _compiler(folder, sanitizers)
    configure = [f"-DCMAKE_MAKE_PROGRAM={ninja}", f"-DCMAKE_CXX_COMPILER={compiler}"]
    configured = _run(cmake, "--preset", preset, "-B", folder / "build", "-S", ROOT, *configure)
    assert configured.returncode == 0, configured.stdout + configured.stderr
    built = _run(cmake, "--build", folder / "build", "--target", "core_tests")
    assert built.returncode == 0, built.stdout[-8000:] + built.stderr
    return folder / "build" / "core_tests"


@pytest.fixture(scope="module")
def core_tests(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _build(tmp_path_factory.mktemp("sanitize"), "sanitize", "address,undefined")


@pytest.mark.slow
@pytest.mark.timeout(1500)  # the sanitized build alone takes minutes on a busy machine
@pytest.mark.parametrize("isa", ISAS)
def test_core_is_clean(core_tests: Path, isa: str) -> None:
    if in_use(isa) != isa:
        pytest.skip(f"this machine has no {isa}")
    result = _run(core_tests, env={"FASTREWARD_ISA": isa})
    assert result.returncode == 0, result.stdout + result.stderr
    assert " 0 failures" in result.stdout


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_threads_are_clean(tmp_path: Path) -> None:
    result = _run(_build(tmp_path, "sanitize-thread", "thread"), "threads")
    assert result.returncode == 0, result.stdout + result.stderr
    assert " 0 failures" in result.stdout

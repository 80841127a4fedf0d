"""The sdist builds a wheel from itself, and the wheel holds every room, the Triton kernels as fastreward.kernels."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from checkout import ROOT


@pytest.mark.slow
def test_sdist_builds_a_wheel_from_itself(tmp_path: Path) -> None:
    build = f"from scikit_build_core.build import build_sdist; print(build_sdist({str(tmp_path)!r}))"
    subprocess.run([sys.executable, "-c", build], cwd=ROOT, check=True, capture_output=True)
    (sdist,) = tmp_path.glob("*.tar.gz")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir"]
    # Of one instruction set, unoptimised: what is in the wheel is the question, and all else takes long.
    defines = ("FASTREWARD_CUDA=OFF", "FASTREWARD_ONLY_ISA=baseline", "FASTREWARD_COMMIT=abc123")
    options = [f"--config-settings=cmake.define.{define}" for define in defines]
    options += [f"--config-settings=cmake.{x}" for x in ("build-type=Debug", "define.CMAKE_CXX_FLAGS_DEBUG=")]
    subprocess.run([*command, str(tmp_path), *options, str(sdist)], cwd=tmp_path, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert zipfile.ZipFile(wheel).read("fastreward/_sources/commit.txt") == b"abc123\n"
    for expected in (
        "fastreward/py.typed",
        "fastreward/logprobs.py",
        "fastreward/kernels/logprobs/forward.py",
        "fastreward/reference/logprobs.py",
        "fastreward/_sources/cuda/logprobs.cu",
        *(f"fastreward/credit_plot/page.{kind}" for kind in ("html", "css", "js")),
    ):
        assert expected in names
    assert any(name.startswith("fastreward/_core.") and name.endswith(".so") for name in names)
    assert not any(name.startswith(("tests/", "kernels/")) for name in names)
    assert wheel.stat().st_size < 20e6


def test_a_build_without_a_compiler_says_what_to_install(tmp_path: Path) -> None:
    cmake = shutil.which("cmake", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if cmake is None:
        pytest.skip("no cmake")
    command = [cmake, "-S", str(ROOT), "-B", str(tmp_path)]
    environment = {**os.environ, "CXX": str(tmp_path / "nothing")}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "there is no C++ compiler: install one" in " ".join(done.stderr.split())

"""The sdist builds a wheel from itself, and the wheel holds every room, the Triton kernels as fastreward.kernels."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.slow
def test_sdist_builds_a_wheel_from_itself(tmp_path: Path) -> None:
    build = f"from scikit_build_core.build import build_sdist; print(build_sdist({str(tmp_path)!r}))"
    subprocess.run([sys.executable, "-c", build], cwd=ROOT, check=True, capture_output=True)
    (sdist,) = tmp_path.glob("*.tar.gz")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir"]
    options = ["--config-settings=cmake.define.FASTREWARD_CUDA=OFF", str(sdist)]
    subprocess.run([*command, str(tmp_path), *options], cwd=tmp_path, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    for expected in (
        "fastreward/py.typed",
        "fastreward/logprobs.py",
        "fastreward/kernels/logprobs.py",
        "fastreward/reference/logprobs.py",
        "fastreward/_sources/cuda/logprobs.cu",
    ):
        assert expected in names
    assert any(name.startswith("fastreward/_core.") and name.endswith(".so") for name in names)
    assert not any(name.startswith(("tests/", "kernels/")) for name in names)
    assert wheel.stat().st_size < 20e6

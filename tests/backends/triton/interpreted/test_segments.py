"""kernels/segments.py under Triton's interpreter, against the float64 reference."""

from __future__ import annotations

import pytest
import raw_checks
from fastreward.kernels import segments as kernels

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


@pytest.mark.parametrize(("kind", "packed"), [("runs", True), ("anywhere", False), ("whole", True)])
def test_reductions_and_adjoints(kind: str, packed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("BLOCK", 16), ("SEGMENT", 8), ("PROGRAMS", 4)):  # more blocks than programs
        monkeypatch.setattr(kernels, name, value)
    raw_checks.check_segments(kernels, "cpu", kind, packed, 23)


def test_ids(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "BLOCK", 16)
    raw_checks.check_segment_ids(kernels, "cpu", 21)


def test_corners() -> None:
    raw_checks.check_segment_corners(kernels, "cpu")

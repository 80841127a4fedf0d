from __future__ import annotations

from collections.abc import Callable

OPERATION = "correction"


def test_correction(run_contender: Callable[[str, str, str, str], None], case: str, dtype: str, contender: str) -> None:
    run_contender(OPERATION, case, dtype, contender)

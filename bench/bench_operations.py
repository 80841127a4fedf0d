"""Every case of every operation: `pytest bench -k whiten` runs one operation's."""

from __future__ import annotations

from collections.abc import Callable


def test_operation(
    run_contender: Callable[[str, str, str, str], None], operation: str, case: str, dtype: str, contender: str
) -> None:
    run_contender(operation, case, dtype, contender)

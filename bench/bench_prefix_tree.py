from __future__ import annotations

from collections.abc import Callable

OPERATION = "prefix_tree"


def test_prefix_tree(
    run_contender: Callable[[str, str, str, str], None], case: str, dtype: str, contender: str
) -> None:
    run_contender(OPERATION, case, dtype, contender)

from __future__ import annotations

from collections.abc import Callable

OPERATION = "linear_policy_loss"


def test_linear_policy_loss(
    run_contender: Callable[[str, str, str, str], None], case: str, dtype: str, contender: str
) -> None:
    run_contender(OPERATION, case, dtype, contender)

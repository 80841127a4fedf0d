"""The ranks, started once for all tests of this room."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from rank_pool import RankPool


@pytest.fixture(scope="session")
def ranks() -> Iterator[RankPool]:
    """Processes that are ranks 0, 1 and 2."""
    pool = RankPool()
    pool.start()
    yield pool
    pool.stop()

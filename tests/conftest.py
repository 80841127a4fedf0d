"""What every test shares."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

from fastreward import _core

# verl applies the patch when it is imported, once fastreward is installed; tests apply it themselves.
os.environ.setdefault("FASTREWARD_VERL", "off")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Slow tests first: `make test` has two workers, and what is left at the end should be short."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def threads() -> Iterator[None]:
    """For a test that changes the thread count: also small calls use all threads; both are as before afterwards."""
    count, worth_waking = torch.get_num_threads(), _core.set_worth_waking(0)
    yield
    torch.set_num_threads(count)
    _core.set_worth_waking(worth_waking)

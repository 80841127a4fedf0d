"""kernels/rewards.py under Triton's interpreter, against the float64 reference."""

from __future__ import annotations

import pytest
import raw_checks
from fastreward.kernels import rewards as kernels

from fastreward._arguments.options import PLACES, REWARD_KLS, Place


@pytest.mark.parametrize("place", PLACES)
def test_against_float64(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "BLOCK", 64)  # sequences of several tiles, some of them without a valid token
    for k, kl in enumerate((None, *REWARD_KLS)[PLACES.index(place) :: 2]):
        raw_checks.check_token_rewards(kernels, "cpu", kl, place, packed=k % 2 == 0, width=150)

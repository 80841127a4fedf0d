"""Moving averages per key, against the loop."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

import fastreward as fr

KEYS = ["x", "y", "x", "x", "y", "z", "x"]
REWARDS = [1.0, -1.0, 0.5, math.nan, 2.0, math.nan, 0.25]


def loop(state: dict[str, float], decay: float, when: str) -> list[float]:
    out = []
    for key, reward in zip(KEYS, REWARDS, strict=True):
        before = state.get(key, 0.5)
        if math.isnan(reward):
            out.append(0.0)
            continue
        state[key] = decay * before + (1 - decay) * reward
        out.append(state[key] if when == "after" else before)
    return out


@pytest.mark.parametrize("when", ["after", "before"])
def test_is_the_loop_from_batch_to_batch(when: Any) -> None:
    baseline, state, rewards = fr.EmaBaseline(0.8, initial=0.5), dict[str, float](), torch.tensor(REWARDS)
    for _ in range(2):
        torch.testing.assert_close(baseline(rewards, KEYS, when=when), torch.tensor(loop(state, 0.8, when)))
    assert baseline.values == pytest.approx(state)
    assert repr(baseline) == "EmaBaseline(decay=0.8, 2 keys)"
    again = fr.EmaBaseline()
    again.load_state_dict(baseline.state_dict())
    assert torch.equal(again(rewards, KEYS, when=when), baseline(rewards, fr.Groups(KEYS), when=when))


def test_without_a_memory_the_one_before_is_the_baseline() -> None:
    got = fr.EmaBaseline(0.0, initial=7.0)(torch.tensor([1.0, math.nan, 2.0, 4.0]), [0, 0, 1, 0], when="before")
    assert got.tolist() == [7.0, 0.0, 7.0, 1.0]


def test_arrays_and_entries_in_no_group() -> None:
    got = fr.EmaBaseline(0.5)(np.array([1.0, 2.0, 4.0]), fr.Groups.by(["a", None, "a"]))
    assert isinstance(got, np.ndarray)
    assert got.tolist() == [0.5, 0.0, 2.25]
    assert fr.EmaBaseline()(torch.zeros(0), []).shape == (0,)


@pytest.mark.parametrize(
    ("error", "message", "call"),
    [
        (ValueError, r"decay: expected a number in \[0, 1\), got 1.0", lambda: fr.EmaBaseline(1.0)),
        (ValueError, "state: expected .* got no 'decay'", lambda: fr.EmaBaseline().load_state_dict({})),
        (TypeError, "keys: expected hashable labels", lambda: fr.EmaBaseline()(torch.ones(1), [[0]])),
        (ValueError, "when: expected one of", lambda: fr.EmaBaseline()(torch.ones(2), [0, 1], when="later")),
        (ValueError, r"rewards: expected shape \[2\]", lambda: fr.EmaBaseline()(torch.ones(3), [0, 1])),
        (
            ValueError,
            r"rewards: expected finite .* got inf at index \[1\]",
            lambda: fr.EmaBaseline()(torch.tensor([1, math.inf]), [0, 1]),
        ),
    ],
)
def test_messages(error: type[Exception], message: str, call: Any) -> None:
    with pytest.raises(error, match=message):
        call()

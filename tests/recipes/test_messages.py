"""Errors of recipes name the recipe's own arguments, whatever operation has found them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from fastreward import recipes

LOGPROBS, MASK = torch.full((4, 6, 10), -2.0), torch.ones(4, 6)
SCORES, TURNS = torch.rand(2, 3, 2), torch.tensor([[0, 1, 1]] * 2)
IDS, REWARDS = torch.tensor([[0, 0, 1, -1]] * 2), torch.rand(2)
GAINS = torch.rand(4, 2, 3)


@pytest.mark.parametrize(
    ("message", "call"),
    [
        ("vocab_logprobs: expected shape", lambda: recipes.tw_grpo_weights(LOGPROBS[0], MASK, group_size=2)),
        ("mask: expected.*of vocab_logprobs", lambda: recipes.tw_grpo_weights(LOGPROBS, MASK[:, :5], group_size=2)),
        ("segment_ids: expected shape", lambda: recipes.match_tir_rewards(SCORES, TURNS, IDS[0], REWARDS)),
        ("call_turns: expected", lambda: recipes.match_tir_rewards(SCORES, TURNS + 5, IDS, REWARDS)),
        ("gains: expected shape", lambda: recipes.p2s(GAINS[:3], torch.rand(4), torch.rand(4), group_size=2)),
        ("group_ids: expected 4", lambda: recipes.p2s(GAINS, torch.rand(4), torch.rand(4), [1, 1, 2])),
    ],
)
def test_errors_name_the_recipes_own_arguments(message: str, call: Callable[[], Any]) -> None:
    with pytest.raises(ValueError, match=message):
        call()

"""Recipes of token and step credit: what is refused, answers that are written out, and steps made from tokens."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import fastreward as fr
from fastreward import recipes

IDS = torch.tensor([[0, 0, 1, 1, -1], [0, 1, 1, -1, -1]])
MASK = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
SCORES = torch.tensor([[0.5, -0.2], [-0.4, 0.9]])
REWARDS = torch.tensor([1.0, 0.0])


def pure(**changed: Any) -> torch.Tensor:
    given = {"step_scores": SCORES, "segment_ids": IDS, "mask": MASK, "rewards": REWARDS, "group_ids": [3, 3]}
    return recipes.pure_verl(**{**given, **changed})


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"step_scores": SCORES[0]}, ValueError, r"step_scores: expected shape \[B, K\]"),
        ({"step_scores": SCORES[:1]}, ValueError, r"step_scores: expected shape \[2, 2\]"),
        ({"step_scores": SCORES.clone().requires_grad_()}, ValueError, "step_scores: expected a constant"),
        (
            {"step_scores": torch.tensor([[0.5, 0.0], [0.1, torch.nan]])},
            ValueError,
            r"step_scores: expected finite numbers where the step has a token, got nan at index \[1, 1\]",
        ),
        ({"segment_ids": IDS.float()}, TypeError, "segment_ids: expected an integer tensor"),
        ({"segment_ids": IDS + 1}, ValueError, r"segment_ids: expected -1 or ids in \[0, 2\).*got 2 at index \[0, 2\]"),
        ({"mask": MASK[:, 1:]}, ValueError, "mask: expected shape"),
        ({"rewards": REWARDS[:1]}, ValueError, r"rewards: expected shape \[2\]"),
        ({"rewards": torch.tensor([0.0, torch.inf])}, ValueError, r"rewards: expected finite.*got inf at index \[1\]"),
        ({"group_size": 2}, ValueError, "group_ids, group_size: expected exactly one"),
        ({"form": "minimum"}, ValueError, r"form: expected one of 'min', 'sum', got 'minimum' \(did you mean 'min'"),
        ({"form": "sum", "temperature": 0.0}, ValueError, "temperature: expected"),
        ({"capped": "no"}, TypeError, "capped: expected"),
    ],
)
def test_bad_input_is_refused_by_name(changed: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^{message}"):
        pure(**changed)


def test_the_strict_minimum() -> None:
    """Rewards at the ends of steps, the outcome on the last token; the baseline is the mean over the other's tokens."""
    ahead = torch.tensor([[-0.2, -0.2, -0.2, -0.2, 1.0], [-0.4, 0.9, 0.9, 0.0, 0.0]])
    others = torch.tensor([[1.4 / 3], [0.2 / 5]])
    torch.testing.assert_close(pure(), (ahead - others) * MASK)
    capped = ahead.clamp(max=0.0)
    torch.testing.assert_close(pure(capped=True, columns=5.0), (capped - torch.tensor([[-0.4 / 5], [-0.8 / 5]])) * MASK)


def test_the_soft_minimum_tends_to_the_worst_step() -> None:
    """The return of the first token: nearly the least score of a response, whatever the number of its steps."""
    scores = torch.tensor([[0.9, -0.7, 0.3], [0.2, 0.4, 0.6]])
    ids = torch.tensor([[0, 1, 2], [0, 1, 2]])
    sums = recipes.pure(scores, ids, group_ids=[0, 1], temperature=0.01, keep_ends=True)[:, 0]
    torch.testing.assert_close(sums, scores.amin(1), rtol=1e-3, atol=1e-3)


def test_steps_are_made_from_separators() -> None:
    tokens = torch.tensor([[5, 9, 5, 5, 9, 5], [5, 5, 9, 7, 7, 7]])
    mask = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0]])
    ids = fr.segment_ids(tokens, separators=9, mask=mask)
    values = torch.tensor([[0.2, 0.5, 0.9], [0.4, 0.0, 0.0]])
    want = torch.tensor([[0.3, 0.3, 0.4, 0.4, 0.4, 0.1], [-0.4, -0.4, -0.4, 0.0, 0.0, 0.0]])
    torch.testing.assert_close(recipes.vine_ppo(values, ids, mask, REWARDS), want)


def test_cuts_make_the_segments_of_spo_chain() -> None:
    """Before every second unsure token, here 0.5; the rest is sure."""
    probs = torch.tensor([[0.99, 0.5, 0.5, 0.99, 0.5, 0.99], [0.5, 0.99, 0.5, 0.5, 0.99, 0.99]])
    ends = recipes.spo_cuts(probs.log(), interval=2)
    assert fr.segment_ids(torch.ones(2, 6), ends=ends).tolist() == [[0, 1, 1, 1, 2, 2], [0, 0, 0, 1, 1, 1]]


def test_arrays_in_arrays_out() -> None:
    got = recipes.pure_verl(
        SCORES.numpy(), IDS.numpy(), MASK.numpy(), rewards=REWARDS.numpy(), group_ids=np.array([3, 3])
    )
    assert isinstance(got, np.ndarray)
    np.testing.assert_array_equal(got, pure().numpy())


def test_prime_without_the_reward_model_is_rloo_whitened() -> None:
    """Where both models agree the process gives nothing, and each token has its response's advantage."""
    lp, rewards = -torch.rand(4, 3), torch.tensor([1.0, 0.0, 0.0, 1.0])
    got = recipes.prime(lp, lp, torch.ones(4, 3), rewards, group_size=2)
    advantages = fr.group_advantages(rewards, group_size=2, center="leave-one-out", scale="none")
    want = fr.whiten(5.0 * advantages.unsqueeze(-1).expand(4, 3).contiguous())
    torch.testing.assert_close(got, want)


def test_effective_rank_counts_directions() -> None:
    """Of two that are equally long: 2, and 1 where all lie on a line."""
    plane = torch.tensor([[1.0, 0.0, 0.0], [-1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, -1.0, 0.0]])
    line = torch.tensor([[1.0, 2.0, 0.5]]) * torch.tensor([[1.0], [2.0], [-1.0], [4.0]])
    found = recipes.effective_ranks(torch.stack([plane, line]), torch.ones(2, 4), stride=2)
    torch.testing.assert_close(found, torch.tensor([[2.0, 1.0, 0.0], [1.0, 0.0, 0.0]]), rtol=1e-5, atol=1e-5)

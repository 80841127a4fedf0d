"""What recipes of group advantages and selections refuse, and what they do over several steps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

import fastreward as fr
from fastreward import recipes

R, IDS, NAN = torch.tensor([1.0, 0.0, 0.0, 1.0]), ["a", "a", "b", "b"], float("nan")
MASK, WHOLE = torch.ones(4, 3), torch.tensor([1, 0, 0, 1])


@pytest.mark.parametrize(
    ("message", "call"),
    [
        ("group_ids, group_size: expected exactly one", lambda: recipes.trust_grpo(R, R)),
        ("group_ids, group_size: expected exactly one", lambda: recipes.copo(R, IDS, IDS, group_size=2)),
        ("rewards: expected shape \\[B\\], got \\[4, 3\\]", lambda: recipes.fapo(MASK, R, IDS)),
        ("flawed: expected shape \\[4\\]", lambda: recipes.fapo(R, R[:2], IDS)),
        ("easy: expected shape \\[4\\]", lambda: recipes.weighted_grpo(R, R[:2], IDS)),
        ("high: expected a number in \\(low, 1\\]", lambda: recipes.riskpo(R, IDS, low=0.9, high=0.2)),
        ("quantiles: expected shape \\[2\\]", lambda: recipes.riskpo(R, IDS, quantiles=R)),
        ("credit: expected one of", lambda: recipes.riskpo(R, IDS, credit="scores")),  # type: ignore[arg-type]
        (
            "problem_ids: expected a problem, or -1, got -2",
            lambda: recipes.hierarchical_grpo(R, WHOLE, -2 * WHOLE, IDS),
        ),
        ("passed: expected shape \\[4, S, J\\]", lambda: recipes.verpo(MASK, MASK.long(), R, IDS)),
        ("positions: expected one of", lambda: recipes.otb(MASK, -MASK, -MASK, MASK, IDS, positions="tokens")),  # type: ignore[arg-type]
        ("log_sum_sq_probs: expected shape \\[4, 3\\]", lambda: recipes.otb(MASK, -MASK, -MASK[:, 1:], MASK, IDS)),
        ("old_logprobs: expected finite", lambda: recipes.otb(MASK, NAN * MASK, -MASK, MASK, IDS)),
        ("tournament: expected one of", lambda: recipes.arena_rl(R, IDS, tournament="robin")),  # type: ignore[arg-type]
        ("criterion_weights: expected shape \\[3\\] or \\[4, 3\\]", lambda: recipes.openrs(MASK, R, MASK)),
        ("rewards: expected shape \\[4, 2\\]", lambda: recipes.pref_grpo(MASK, IDS, rewards=MASK[:2, :2])),
        ("best: expected an integer of at least 1", lambda: recipes.raft_selection(R, IDS, best=0)),
        ("kept: expected an integer of at least 1", lambda: recipes.prof(R, R, IDS, kept=0)),
        ("losses: expected shape \\[K, at least 2 \\* 10\\]", lambda: recipes.recap(MASK, WHOLE)),
        (
            "objectives: expected objectives in \\[0, 4\\), got 4",
            lambda: recipes.recap(MASK.repeat(1, 2), 4 * WHOLE, window=2),
        ),
        (
            "old_logprobs: expected a constant",
            lambda: recipes.unlikeliness(MASK.clone().requires_grad_(), MASK, R, IDS),
        ),
    ],
)
def test_refusals(message: str, call: Callable[[], Any]) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_wrong_types() -> None:
    with pytest.raises(TypeError, match="baseline: expected an EmaBaseline, got float"):
        recipes.rae(R, IDS, baseline=0.5)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="expected ids that name the same forms, got Groups"):
        recipes.co_reward(IDS, fr.Groups(IDS), IDS)
    with pytest.raises(TypeError, match="problem_ids: expected an integer tensor"):
        recipes.hierarchical_grpo(R, WHOLE, R, IDS)


def test_a_baseline_lives_on() -> None:
    baseline = fr.EmaBaseline(0.5)
    assert recipes.rae(torch.tensor([1.0, 1.0]), ["x", "y"], baseline=baseline).tolist() == [1.0, 1.0]
    assert recipes.rae(torch.tensor([1.0, NAN]), ["x", "y"], baseline=baseline).tolist() == [0.5, 0.0]
    assert baseline.values == {"x": 0.75, "y": 0.5}


def test_arrays_and_a_selection_in_the_loss() -> None:
    keep = recipes.raft_selection(R.numpy(), np.array([5, 5, 7, 7]))
    assert isinstance(keep, np.ndarray)
    assert keep.tolist() == [True, False, False, True]
    logprobs = (-MASK).requires_grad_()
    recipes.sft(logprobs, MASK, keep=torch.from_numpy(keep)).loss.backward()
    assert logprobs.grad is not None
    assert (logprobs.grad != 0).any(1).tolist() == keep.tolist()


def test_weights_are_what_drawing_anew_gives_on_average() -> None:
    scores = torch.tensor([2.0, -1.0, 0.0, NAN])
    weights = recipes.pf_ppo(scores)
    torch.testing.assert_close(weights, torch.tensor([2.4, 0.6, 0.0, 0.0]), rtol=0, atol=1e-6)
    assert recipes.pf_ppo(torch.tensor([NAN, NAN])).tolist() == [0.0, 0.0]

"""Recipes of turns: answers that are written out, ways to say the same, and what is refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from credit_cases import agent_credit, turn_credit
from credit_cases.case import Case

import fastreward as fr
from fastreward import recipes

CASES = {**turn_credit.CASES, **agent_credit.CASES}
IDS = torch.tensor([[0, 0, -1, 1, 1], [0, 1, -1, 2, -1]])  # two turns, and three
REWARDS = torch.tensor([[0.2, 1.0, torch.nan], [0.0, 0.0, 0.0]])
GIGPO: dict[str, Any] = {
    "rewards": torch.tensor([1.0, 0.0]),
    "turn_rewards": torch.zeros(2, 3),
    "segment_ids": IDS,
    "states": [["a", "b"], ["c", "d", "e"]],
    "group_size": 2,
}


# ------------------------------------------------------------------------------------------------------- written out
def test_returns_of_turns() -> None:
    """Turns [0, 0, -, 1, 1] with rewards 0.2 and 1, gamma 0.5: the other response to the prompt has none."""
    advantages = recipes.turn_baseline(REWARDS, IDS, group_size=2, gamma=0.5)
    torch.testing.assert_close(advantages[0], torch.tensor([0.7, 0.7, 0.0, 1.0, 1.0]))


def test_a_baseline_over_responses_and_one_over_turns() -> None:
    over_responses = recipes.gigpo(**GIGPO, across_turns=False)
    over_turns = recipes.gigpo(**GIGPO)
    torch.testing.assert_close(over_responses[:, 0], torch.tensor([0.5, -0.5]))
    torch.testing.assert_close(over_turns[:, 0], torch.tensor([0.6, -0.4]))


def test_turns_in_the_same_state() -> None:
    same = recipes.gigpo(**GIGPO | {"states": [["a", "b"], ["c", "a", "e"]], "turn_rewards": REWARDS, "gamma": 1.0})
    torch.testing.assert_close(same - recipes.gigpo(**GIGPO), torch.tensor([[0.6, 0.6, 0, 0, 0], [0, -0.6, 0, 0, 0]]))


def test_longer_histories_weigh_more() -> None:
    """The second turns agree in the last state and the one before: (2 x 1 + 3 x 1) / (2 + 3)."""
    ids = torch.tensor([[0, 1], [0, 1]])
    rewards = torch.tensor([[0.0, 2.0], [0.0, 0.0]])
    options: dict[str, Any] = {"group_size": 2, "norm": "mean", "gamma": 0.0, "eps": 0.0}
    advantages = recipes.hgpo(rewards, ids, states=torch.tensor([[7, 8], [7, 8]]), **options)
    torch.testing.assert_close(advantages, torch.tensor([[0.0, 1.0], [0.0, -1.0]]))
    assert not recipes.hgpo(rewards, ids, states=torch.tensor([[7, 8], [7, -1]]), **options).any()


def test_a_checklist() -> None:
    """Of four responses one misses the second criterion, which is open at its second step alone."""
    criteria = torch.tensor([[1.0, 0.0], [1.0, 1.0], [1.0, 1.0], [1.0, 1.0]])
    ids = torch.tensor([[0, 1]]).expand(4, 2)
    is_open = torch.tensor([[1, 0], [0, 1]]).expand(4, 2, 2)
    options: dict[str, Any] = {"open_criteria": is_open, "group_size": 4}
    advantages = recipes.cm2(criteria, ids, min_scores=4, **options)
    torch.testing.assert_close(advantages[:2], torch.tensor([[0.0, -0.75], [0.0, 0.25]]))
    assert not recipes.cm2(criteria, ids, **options).any()


def test_the_gain_goes_on_to_igpo() -> None:
    likelihoods = torch.rand(4, 3)
    ids = torch.tensor([[0, 0, 1], [0, 1, 1], [0, -1, 1], [0, 0, -1]])
    gain = recipes.igpo_gain(likelihoods, ids, torch.tensor([1.0, 0.0, 0.5, 1.0]))
    rewards = fr.segment_reduce(gain, ids, op="last", empty=float("nan"))
    advantages = recipes.igpo(rewards, ids, group_size=4)
    at = torch.stack([rewards[0, 0], rewards[0, 1], *rewards[1:3].flatten(), rewards[3, 0]])
    scaled = (at - at.mean()) / (at.var(correction=0) + 1e-8).sqrt()
    torch.testing.assert_close(advantages[0], torch.stack([scaled[:2].sum(), scaled[:2].sum(), scaled[1]]))


def test_calls_are_matched_one_to_one() -> None:
    """The second call takes the first of the reference; the first one is left with the second, the third with none."""
    ids = torch.tensor([[0, 0, 1, 2]])
    matches = torch.tensor([[[0.8, 0.5], [0.9, 0.1], [0.7, 0.0]]])
    turns = torch.tensor([[0, 0, 1]])
    rewards = recipes.match_tir_rewards(matches, turns, ids, torch.tensor([0.25]))
    torch.testing.assert_close(rewards, torch.tensor([[0.0, 0.7, 0.0, 0.25]]))
    assert recipes.match_tir_rewards(matches[..., :0], turns, ids, torch.tensor([0.25]))[0].tolist() == [0, 0, 0, 0.25]
    soft = recipes.match_tir_rewards(
        matches[:, :2], turns[:, :2], ids, torch.tensor([0.25]), assignment="soft", reg=1e-3
    )
    assert soft[0, 1].item() == pytest.approx(0.35, abs=1e-3)  # the same plan, of mass 1


def test_istar_reads_the_number_of_turns_off_the_ids() -> None:
    arguments = CASES["istar"].arguments(0)
    told = recipes.istar(**arguments)
    assert torch.equal(recipes.istar(**arguments | {"num_segments": None}), told)


# ------------------------------------------------------------------------------------------------ the same, otherwise
@pytest.mark.parametrize("name", ["match_tir", "gigpo", "hgpo", "pro_rag", "multi_turn_grpo", "cm2"])
def test_groups_and_arrays_serve_as_well(name: str) -> None:
    case = CASES[name]
    arguments = case.arguments(0)
    want = case(arguments)
    assert torch.equal(case(arguments | {"group_ids": fr.Groups(arguments["group_ids"])}), want)
    arrays = {k: x.numpy() if isinstance(x, torch.Tensor) else x for k, x in arguments.items()}
    found: Any = case(arrays)
    assert isinstance(found, np.ndarray)
    assert np.array_equal(found, want.numpy())


def test_labels_may_be_integers_or_text_and_end_early() -> None:
    integers = torch.tensor([[4, 5, -1], [6, 4, -1]])
    text = [["a", "b"], ["c", "a", None]]
    want = recipes.gigpo(**GIGPO | {"turn_rewards": REWARDS, "states": integers})
    assert torch.equal(recipes.gigpo(**GIGPO | {"turn_rewards": REWARDS, "states": text}), want)
    assert torch.equal(recipes.gigpo(**GIGPO | {"turn_rewards": REWARDS, "states": fr.Groups.by(integers)}), want)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_no_response_and_no_token(case: Case) -> None:
    if case.of_the_batch:  # nothing to whiten
        return
    arguments = case.arguments(0)
    none = {k: x[:0] if isinstance(x, torch.Tensor | list) else x for k, x in arguments.items()}
    assert case(none).shape[0] == 0
    if "segment_ids" in arguments:
        masked = torch.full_like(arguments["segment_ids"], -1)
        assert not case(arguments | {"segment_ids": masked}).any()


# ----------------------------------------------------------------------------------------------------------- refused
@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"turn_rewards": torch.zeros(3)}, r"turn_rewards: expected shape \[B, S\], got \[3\]"),
        ({"turn_rewards": torch.zeros(3, 3)}, "turn_rewards: expected shape"),
        ({"turn_rewards": torch.full((2, 3), torch.inf)}, r"turn_rewards: expected finite .* at index \[0, 0\]"),
        ({"turn_rewards": torch.zeros(2, 2)}, r"segment_ids: expected .* got 2 at index \[1, 3\]"),
        ({"turn_rewards": torch.zeros(2, 3, requires_grad=True)}, "turn_rewards"),
        ({"segment_ids": torch.tensor([0, 1])}, r"segment_ids: expected shape \[B, T\], or \[N\] with cu_seqlens"),
        ({"segment_ids": IDS - 1}, "segment_ids"),
        ({"rewards": torch.zeros(3)}, "rewards: expected shape"),
        ({"rewards": torch.tensor([torch.inf, 0.0])}, "rewards: expected finite"),
        ({"states": torch.zeros(2, 2, dtype=torch.int64)}, r"states: expected shape \[2, 3\], got \[2, 2\]"),
        ({"states": [["a"] * 4, []]}, "states: expected 2 rows of at most 3 labels, got 2 of up to 4"),
        ({"norm": "median"}, "norm: expected"),
        ({"gamma": float("nan")}, "gamma"),
        ({"weight": float("inf")}, "weight"),
        ({"group_ids": ["a", "a"]}, "group_ids, group_size"),
        ({"group_size": None}, "group_ids, group_size"),
    ],
)
def test_what_is_wrong_is_named(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        recipes.gigpo(**GIGPO | changed)


def test_other_arguments_that_are_refused() -> None:
    with pytest.raises(ValueError, match=r"open_criteria: expected shape \[B, S, C\]"):
        recipes.cm2(torch.zeros(2, 3), IDS, open_criteria=torch.zeros(2, 3), group_size=2)
    with pytest.raises(ValueError, match="open_criteria: expected shape"):
        recipes.cm2(torch.zeros(2, 4), IDS, open_criteria=torch.zeros(2, 3, 3), group_size=2)
    with pytest.raises(ValueError, match=r"evidence: expected shape \[2, K\]"):
        recipes.search_r2(torch.zeros(2), evidence=torch.zeros(3, 1))
    with pytest.raises(ValueError, match=r"call_scores: expected shape \[2, P, Q\]"):
        recipes.match_tir_rewards(torch.zeros(2, 3), torch.zeros(2, 3, dtype=torch.int64), IDS, torch.zeros(2))
    with pytest.raises(ValueError, match=r"call_turns: expected shape"):
        recipes.match_tir_rewards(torch.zeros(2, 3, 1), torch.zeros(2, 1, dtype=torch.int64), IDS, torch.zeros(2))
    with pytest.raises(ValueError, match="values: expected shape"):
        recipes.multi_turn_ppo(REWARDS, torch.zeros(2, 4), IDS)
    with pytest.raises(ValueError, match="level: expected"):
        recipes.multi_turn_rloo(REWARDS, IDS, group_size=2, level="token")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"turn_scores: expected shape \[B, S\]"):
        recipes.medsam_agent(torch.zeros(2))

"""Groups: keys of every kind, once worked out, wherever groups are asked for."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import fastreward as fr
from fastreward import losses
from fastreward._arguments.groups import membership
from fastreward._arguments.labels import renumbered
from fastreward.group_statistics import _Order

UIDS = ["b", "a", "b", "c", "a", "b"]


@pytest.mark.parametrize(
    "ids", [UIDS, np.array(UIDS, dtype=object), torch.tensor([5, -1, 5, 7, -1, 5]), np.array([2, 9, 2, -1, 9, 2])]
)
def test_of_one_key(ids: Any) -> None:
    groups = fr.Groups(ids)
    assert groups.index.tolist() == [0, 1, 0, 2, 1, 0]
    assert (groups.count, groups.sizes.tolist(), groups.first.tolist()) == (3, [3, 2, 1], [0, 1, 3])
    assert groups.labels == [ids[0], ids[1], ids[3]]
    assert repr(groups) == "Groups(3 groups of 1 to 3 in [6])"
    rewards = torch.randn(6)
    assert torch.equal(fr.group_advantages(rewards, groups), fr.group_advantages(rewards, ids))


def test_of_a_size() -> None:
    groups, rewards = fr.Groups(group_size=3, count=6), torch.randn(6)
    assert groups.index.tolist() == [0, 0, 0, 1, 1, 1]
    assert torch.equal(fr.group_advantages(rewards, groups), fr.group_advantages(rewards, group_size=3))


def test_of_prompt_and_turn() -> None:
    """Turn-level normalisation is one call: each prompt's rewards of the same turn, where there is one."""
    turns = torch.tensor([[0, 1, -1], [0, 1, 2], [0, -1, -1], [0, 0, -1], [0, 1, 2], [0, 1, 2]])
    groups = fr.Groups.by(UIDS, turns)
    assert groups.shape == (6, 3)
    assert groups.labels == [("b", 0), ("b", 1), ("a", 0), ("a", 1), ("a", 2), ("c", 0), ("b", 2)]
    assert groups.sizes.tolist() == [3, 2, 2, 2, 2, 2, 1]
    assert repr(groups) == "Groups(7 groups of 1 to 3 in [6, 3], 4 in none)"
    rewards = torch.randn(6, 3)
    expected = torch.zeros(6, 3)
    for number in range(groups.count):
        of = groups.index == number
        expected[of] = fr.group_advantages(rewards[of], torch.zeros(int(of.sum()), dtype=torch.long))
    rewards[turns < 0] = torch.inf  # of no turn
    got = fr.group_advantages(rewards, groups)
    assert torch.equal(got, expected)
    both = fr.group_advantages(torch.stack([rewards, rewards], -1), groups, component_weights=[0.5, 0.5])
    torch.testing.assert_close(both, got)
    lengths = torch.rand(6, 3) + 1
    weighted = fr.group_advantages(rewards, groups, center="length-weighted", scale="none", lengths=lengths)
    mean = fr.group_statistics(rewards, groups, ("weighted-mean",), weights=lengths)["weighted-mean"]
    torch.testing.assert_close(weighted, torch.where((turns >= 0) & (groups.index < 6), rewards - mean, 0))


def test_responses_without_turns_have_a_shape() -> None:
    groups = fr.Groups.by(["a", "b"], [[], []])
    assert groups.shape == (2, 0)
    assert groups.count == 0
    assert fr.group_advantages(torch.zeros(2, 0), groups).shape == (2, 0)


def test_keys_of_every_kind() -> None:
    states = [["x", "y"], ["x"], ["y", "x"]]  # of rows that end early
    groups = fr.Groups.by(["p", "p", None], states)
    assert groups.index.tolist() == [[0, 1], [0, -1], [-1, -1]]
    assert groups.labels == [("p", "x"), ("p", "y")]
    assert fr.Groups.by(fr.Groups(UIDS), ["t"] * 6).labels == [("b", "t"), ("a", "t"), ("c", "t")]
    three = fr.Groups.by([0, 0, 1], [5, 5, 5], torch.tensor([[1, 2], [1, 2], [1, 1]]))
    assert three.index.tolist() == [[0, 1], [0, 1], [2, 2]]
    masked = fr.Groups(UIDS, mask=torch.tensor([0, 1, 1, 0, 1, 1]))
    assert masked.index.tolist() == [-1, 0, 1, -1, 0, 1]
    assert fr.Groups([]).count == 0


def test_groups_inside_groups() -> None:
    """Hierarchical GRPO: the means of the inner groups against each other in the outer one."""
    inner = fr.Groups.by(["p", "p", "p", "q", "q", "p"], [0, 1, 1, 0, 1, 0])
    assert inner.parent.labels == ["p", "q"]
    assert inner.parent.index.tolist() == [0, 0, 1, 1]
    means = fr.group_statistics(torch.tensor([1.0, 2, 4, 5, 7, 3]), inner, ("mean",), per="group")["mean"]
    assert fr.group_advantages(means, inner.parent, scale="none").tolist() == [-0.5, 0.5, -1.0, 1.0]
    with pytest.raises(ValueError, match="parent: expected groups of several keys"):
        _ = inner.parent.parent


def test_wherever_groups_are_asked_for() -> None:
    logprobs, old, tokens = torch.randn(6, 4) - 2, torch.randn(6, 4) - 2, torch.randint(0, 2, (6, 4))

    def of(ids: Any) -> list[torch.Tensor]:
        options: dict[str, Any] = {"loss": losses.real(), "aggregation": "group-mean", "group_ids": ids}
        tree = fr.PrefixTree(tokens, group_ids=ids)
        return [fr.policy_loss(logprobs, old, torch.ones(6), **options).loss, torch.tensor(tree.num_tokens)]

    assert all(map(torch.equal, of(fr.Groups(UIDS)), of(UIDS)))
    with pytest.raises(ValueError, match=r"group_ids: expected every entry in a group, .* got -1 at index \[3\]"):
        of(fr.Groups(UIDS, mask=torch.tensor([1, 1, 1, 0, 1, 1])))
    with pytest.raises(
        ValueError, match=r"group_ids: expected groups of 6 entries, got Groups\(2 groups of 2 in \[4\]"
    ):
        of(fr.Groups(group_size=2, count=4))


def test_without_the_core_numbers_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    labels = torch.randint(-3, 5, (50,)) * 2**40
    labels[::7] = -1
    expected = [renumbered(labels, absent=absent) for absent in (True, False)]
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert all(torch.equal(renumbered(labels, absent=a), e) for a, e in zip((True, False), expected, strict=True))
    assert renumbered(labels[:0]).shape == (0,)


def test_no_host_reads_integers_of_a_device() -> None:
    """A tensor on "meta" has no values to read."""
    ids, turns = torch.zeros(4, dtype=torch.long, device="meta"), torch.zeros(4, 3, dtype=torch.long, device="meta")
    groups = fr.Groups.by(ids, turns, mask=torch.ones(4, device="meta"))
    assert groups.partial
    assert repr(groups) == "Groups([4, 3] on meta)"
    order = _Order.of(torch.zeros(12, device="meta"), membership(groups, None, torch.zeros(4, 3, device="meta"), "x"))
    assert order.below.shape == (12,)


def test_compiles_in_one_graph() -> None:
    turns, rewards = torch.tensor([[0, 1], [0, -1], [0, 1]]), torch.randn(3, 2)

    def call(rewards: torch.Tensor, turns: torch.Tensor) -> torch.Tensor:
        return fr.group_advantages(rewards, fr.Groups.by(torch.tensor([4, 4, 4]), turns))

    compiled = torch.compile(call, fullgraph=True, backend="eager")
    assert torch.equal(compiled(rewards, turns), call(rewards, turns))


@pytest.mark.parametrize(
    ("error", "message", "call"),
    [
        (ValueError, "expected group_ids, or group_size and count", lambda: fr.Groups()),
        (ValueError, "expected group_ids, or group_size and count", lambda: fr.Groups(group_size=2)),
        (ValueError, "group_size: expected a positive divisor of the 5", lambda: fr.Groups(group_size=2, count=5)),
        (ValueError, "keys: expected at least one", lambda: fr.Groups.by()),
        (TypeError, r"keys\[1\]: expected labels that compare by value", lambda: fr.Groups.by([0, 1], [0, object()])),
        (
            ValueError,
            r"keys\[1\]: expected shape \[3\] or \[3, 2\]",
            lambda: fr.Groups.by(torch.ones(3, 2).long(), [0]),
        ),
        (TypeError, "group_ids: expected an integer tensor", lambda: fr.Groups(torch.ones(3))),
        (ValueError, r"mask: expected shape \[2\]", lambda: fr.Groups([0, 1], mask=torch.ones(3))),
        (
            ValueError,
            r"rewards: expected shape \[2, 1\] or \[..., K\], got \[2\]",
            lambda: fr.group_advantages(torch.ones(2), fr.Groups.by([0, 1], torch.zeros(2, 1).long())),
        ),
    ],
)
def test_messages(error: type[Exception], message: str, call: Any) -> None:
    with pytest.raises(error, match=message):
        call()

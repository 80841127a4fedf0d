"""Group ids count by value, whatever they are given as, wherever groups are asked for."""

from __future__ import annotations

import dataclasses
import enum
import uuid
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import fastreward as fr
from fastreward import losses
from fastreward._arguments.groups import factorize

IDS = torch.tensor([7, 7, 8, 8])
ARRAY = np.array([7, 7, 8, 8])
REWARDS = torch.tensor([1.0, 0.0, 0.0, 1.0])


class Prompt(enum.Enum):
    FIRST = 7
    SECOND = 8


@dataclasses.dataclass(frozen=True)
class Turn:
    prompt: Any


class Plain:
    """Hashable, and equal to itself alone."""


KINDS: dict[str, Callable[[], Any]] = {
    "0-d tensors": lambda: list(IDS),
    "0-d tensors of two dtypes": lambda: [IDS[0].int(), *IDS[1:]],
    "0-d float tensors": lambda: list(IDS.double()),
    "tensors and integers": lambda: [IDS[0], 7, IDS[2], 8],
    "a tuple of tensors": lambda: tuple(IDS),
    "NumPy integers": lambda: list(ARRAY),
    "NumPy integers beside Python's": lambda: [ARRAY[0], 7, 8.0, ARRAY[3]],
    "NumPy floats": lambda: list(ARRAY.astype(np.float32)),
    "0-d arrays": lambda: [np.array(i) for i in (7, 7, 8, 8)],
    "NumPy strings": lambda: list(ARRAY.astype(str)),
    "NumPy bytes": lambda: list(ARRAY.astype("S1")),
    "NumPy dates": lambda: list(ARRAY.astype("M8[s]")),
    "an array of strings": lambda: ARRAY.astype(str),
    "an array of objects": lambda: np.array([str(i) for i in ARRAY], dtype=object),
    "an array of tensors": lambda: np.fromiter(iter(IDS), dtype=object),
    "pairs of tensors": lambda: [(i, torch.tensor(0)) for i in IDS],
    "pairs of NumPy's": lambda: [(i, np.str_("turn")) for i in ARRAY],
    "nested pairs": lambda: [("a", (i, None)) for i in IDS],
    "sizes": lambda: [torch.Size([int(i)]) for i in IDS],
    "uuids": lambda: [uuid.UUID(int=int(i)) for i in IDS],
    "an enumeration": lambda: [Prompt(int(i)) for i in IDS],
    "booleans": lambda: [True, np.bool_(True), False, torch.tensor(False)],
    "frozen sets": lambda: [frozenset((int(i), 1)) for i in IDS],
    "frozen sets of tensors": lambda: [frozenset((i, torch.tensor(1))) for i in IDS],
    "0-d tensors of truth values": lambda: list(IDS == 7),
    "None among strings": lambda: [None, None, "a", "a"],
    "a generator": lambda: (str(i) for i in ARRAY),
}


@pytest.mark.parametrize("kind", KINDS)
def test_ids_count_by_value(kind: str) -> None:
    expected = fr.group_advantages(REWARDS, IDS)
    assert expected.abs().min() > 0.5
    assert torch.equal(fr.group_advantages(REWARDS, KINDS[kind]()), expected)


@pytest.mark.parametrize("kind", ["0-d tensors", "pairs of tensors", "NumPy integers", "an array of tensors"])
def test_wherever_groups_are_asked_for(kind: str) -> None:
    logprobs, old = torch.randn(4, 6) - 2, torch.randn(4, 6) - 2
    loss = losses.real()

    def of(ids: Any) -> list[torch.Tensor]:
        tokens = torch.zeros(4, 6, dtype=torch.long)
        tokens[:, 3:] = torch.arange(12).reshape(4, 3)
        pairs = {"loss": losses.mah_dpo(), "aggregation": "group-mean"}
        sides = {"ref_chosen_logprobs": old, "ref_rejected_logprobs": old}
        return [
            fr.policy_loss(logprobs, old, REWARDS, loss=loss, aggregation="group-mean", group_ids=ids).loss,
            fr.preference_loss(logprobs, old, **sides, **pairs, group_ids=ids).loss,
            loss.evaluate(logprob=logprobs, old_logprob=old, advantage=REWARDS, group_ids=ids).float(),
            torch.tensor(fr.PrefixTree(tokens, group_ids=ids).num_tokens),
        ]

    expected, found = of(IDS), of(KINDS[kind]())
    assert expected[0] > 0
    assert expected[3] == 18  # each group has its prefix once
    assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize(
    ("error", "message", "label"),
    [
        (TypeError, "expected labels that compare by value, got .*Plain.* at index 2, .*: give its id", Plain()),
        (TypeError, "expected labels that compare by value", (1, Plain())),
        (TypeError, "expected labels that compare by value", frozenset({Plain()})),
        (TypeError, r"expected labels that compare by value.* its prompt is a tensor", Turn(torch.tensor(7))),
        (TypeError, r"expected numbers or 0-d tensors, got a tensor \[1\] at index 2", torch.tensor([1])),
        (TypeError, "expected hashable labels: unhashable type: 'list' at index 2", [1]),
        (TypeError, "expected hashable labels: unhashable type: 'dict' at index 2", ("a", {})),
        (ValueError, "expected labels that equal themselves, got nan at index 2", float("nan")),
        (ValueError, "expected labels that equal themselves, got .*nan.* at index 2", torch.tensor(float("nan"))),
        (ValueError, "expected labels that equal themselves, got .*NaT.* at index 2", np.datetime64("NaT")),
        (ValueError, "expected labels that equal themselves, got nan at index 2", ("a", (float("nan"),))),
    ],
)
def test_labels_that_would_be_groups_of_their_own(error: type[Exception], message: str, label: Any) -> None:
    with pytest.raises(error, match=f"group_ids: {message}"):
        fr.group_advantages(REWARDS, ["a", "a", label, "b"])


@pytest.mark.parametrize("ids", ["abcd", b"abcd", {1, 2, 3, 4}, {1: 1, 2: 2, 3: 3, 4: 4}, 3, np.int64(3)])
def test_what_is_no_sequence_of_ids(ids: Any) -> None:
    with pytest.raises(TypeError, match=r"group_ids: expected integers \[B\] or a sequence of hashables, got"):
        fr.group_advantages(REWARDS, ids)


def test_lists_of_tensors_stay_on_their_device_and_compile() -> None:
    """A list of a device's tensors is stacked: the host reads no id."""
    with torch._subclasses.FakeTensorMode():  # whose values no host can read
        assert factorize(list(torch.zeros(4, dtype=torch.long)), 4, torch.device("cpu")).shape == (4,)
    compiled = torch.compile(fr.group_advantages, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(REWARDS, list(IDS)), fr.group_advantages(REWARDS, IDS))


def test_bounds_of_integers_are_kept() -> None:
    extremes = [torch.tensor(-(2**63)), torch.tensor(2**63 - 1)] * 2
    assert torch.equal(fr.group_advantages(REWARDS, extremes), fr.group_advantages(REWARDS, [0, 1, 0, 1]))
    assert torch.equal(
        fr.group_advantages(REWARDS, [2**80, 2**80, -(2**80), 0]), fr.group_advantages(REWARDS, list("aabc"))
    )


def test_labels_where_tensors_have_no_memory() -> None:
    with FakeTensorMode():
        assert factorize(["a", "b"], 2, torch.device("cpu")).shape == (2,)
    numbers = torch.func.functionalize(lambda x: x + factorize(["a", "b", "a"], 3, x.device))(torch.zeros(3))
    assert numbers.tolist() == [0, 1, 0]

"""token_rewards: the cases that went wrong somewhere, the reference, bits, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import fastreward as fr
from fastreward._arguments.options import PLACES, REWARD_KLS, Place, RewardKL
from fastreward.verify.error import distance

NAN = torch.nan


def random_call(rows: int = 6, columns: int = 700, seed: int = 0) -> dict[str, Any]:
    g = torch.Generator().manual_seed(seed)
    logprobs = -torch.rand(rows, columns, generator=g) * 3
    mask = torch.rand(rows, columns, generator=g) < 0.7
    mask[0], mask[1, columns // 2 :] = False, False
    return {
        "scores": torch.randn(rows, generator=g),
        "mask": mask,
        "logprobs": logprobs,
        "ref_logprobs": logprobs + torch.randn(rows, columns, generator=g),
        "kl_coef": 0.05,
    }


def packed(call: dict[str, Any]) -> dict[str, Any]:
    rows, columns = call["mask"].shape
    flat = {k: x.flatten() if isinstance(x, Tensor) and x.ndim == 2 else x for k, x in call.items()}
    return flat | {"cu_seqlens": torch.arange(rows + 1) * columns}


def test_kl_shaped_rewards_of_the_cases() -> None:
    """cases.md 2.7 and 2.6: a NaN under the mask vanishes; without a valid token there is no reward anywhere."""
    logprobs, ref = torch.tensor([[0.1, 0.2, NAN]]), torch.tensor([[0.0, 0.0, 0.0]])
    got = fr.token_rewards(torch.ones(1), torch.tensor([[1, 1, 0]]), logprobs=logprobs, ref_logprobs=ref, kl_coef=0.1)
    torch.testing.assert_close(got, torch.tensor([[-0.01, 0.98, 0.0]]))
    for place in PLACES:
        assert not fr.token_rewards(torch.ones(2), torch.zeros(2, 3), place=place).any()


def test_places() -> None:
    scores, mask = torch.tensor([2.0, NAN, 7.0]), torch.tensor([[0, 1, 1, 0], [1, 1, 1, 1], [1, 0, 0, 0]])
    want: dict[Place, list[list[float]]] = {
        "end": [[0, 0, 2, 0], [0, 0, 0, 0], [5, 0, 0, 0]],
        "start": [[0, 2, 0, 0], [0, 0, 0, 0], [5, 0, 0, 0]],
        "broadcast": [[0, 2, 2, 0], [0, 0, 0, 0], [5, 0, 0, 0]],
    }
    for place, rows in want.items():
        assert fr.token_rewards(scores, mask, place=place, clip=(None, 5)).tolist() == rows


@pytest.mark.parametrize("kl", REWARD_KLS)
@pytest.mark.parametrize("place", PLACES)
def test_against_the_reference(place: Place, kl: RewardKL) -> None:
    call = random_call() | {"kl": kl, "place": place, "clip": (-0.5, 0.7), "kl_value_clamp": 1.5}
    for given in (call, packed(call), call | {"mask": None}, call | {"mask": call["mask"].double()}):
        got = fr.token_rewards(**given)
        with fr.backend("reference"):
            want = fr.token_rewards(**given)
        assert distance(got, want) < 1e-6
        assert not got[~call["mask"].view(got.shape)].any() or given["mask"] is None


def test_bits_know_neither_batch_nor_padding() -> None:
    call = random_call() | {"kl": "k3"}
    whole = fr.token_rewards(**call)
    alone = fr.token_rewards(**{k: x[2:3] if isinstance(x, Tensor) else x for k, x in call.items()})
    assert torch.equal(alone, whole[2:3])
    assert torch.equal(fr.token_rewards(**packed(call)).view(whole.shape), whole)
    for pad in ((5, 0), (0, 9)):
        wider = {k: torch.nn.functional.pad(x, pad) if k.endswith(("mask", "logprobs")) else x for k, x in call.items()}
        got = fr.token_rewards(**wider)
        assert torch.equal(got[:, pad[0] : got.shape[1] - pad[1]], whole)
        assert got.count_nonzero() == whole.count_nonzero()


def test_out() -> None:
    call = random_call()
    out = torch.full(call["mask"].shape, NAN)
    assert fr.token_rewards(**call, out=out) is out
    assert torch.equal(out, fr.token_rewards(**call))
    for bad, message in (
        (call["logprobs"], "memory of its own"),
        (out.t().contiguous().t(), "contiguous"),
        (out.double(), "dtype float32"),
        (out[:2], "expected shape"),
        (torch.zeros_like(out, requires_grad=True), "requires_grad"),
    ):
        with pytest.raises((ValueError, TypeError), match=f"^out: .*{message}"):
            fr.token_rewards(**call, out=bad)


@pytest.mark.parametrize("place", ["start", "end"])
def test_sequences_across_the_shares_of_threads(place: Any) -> None:
    """Longer than what a thread takes at a time, and beginning and ending where that does."""
    bounds = torch.tensor([0, 5, 8192, 8192, 8193, 40_960, 60_000])
    scores, mask = torch.arange(1.0, 7.0), torch.rand(60_000) < 0.5
    want = torch.zeros(60_000)
    for score, begin, end in zip(scores, bounds[:-1].tolist(), bounds[1:].tolist(), strict=True):
        if (valid := mask[begin:end].nonzero()).numel():
            want[begin + int(valid[0 if place == "start" else -1])] = score
    assert torch.equal(fr.token_rewards(scores, mask, place=place, cu_seqlens=bounds), want)
    padded = torch.zeros(3, 20_000).index_fill(1, torch.tensor([19_990 if place == "end" else 77]), 2.0)
    assert torch.equal(fr.token_rewards(torch.full((3,), 2.0), padded != 0, place=place), padded)


def test_empty() -> None:
    assert fr.token_rewards(torch.ones(3), torch.ones(3, 0)).shape == (3, 0)
    assert fr.token_rewards(torch.ones(0), torch.ones(0, 4)).shape == (0, 4)
    bounds = torch.tensor([0, 0, 2, 2])
    assert fr.token_rewards(torch.arange(3.0), torch.ones(2), cu_seqlens=bounds).tolist() == [0.0, 1.0]
    assert fr.token_rewards(torch.ones(0), torch.ones(0), cu_seqlens=torch.zeros(1, dtype=torch.long)).shape == (0,)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"ref_logprobs": None}, "ref_logprobs: needed where kl_coef is not 0"),
        ({"scores": torch.ones(5)}, r"scores: expected shape \[6\]"),
        ({"kl": "k4"}, "kl: expected one of 'k1'"),
        ({"place": "last"}, "place: expected one of"),
        ({"clip": (1.0, 0.0)}, "clip: expected a lowest score"),
        ({"clip": 1.0}, r"clip: expected \(lowest, highest\)"),
        ({"logprobs": random_call()["logprobs"].index_fill(1, torch.tensor([3]), NAN)},
         r"logprobs: expected numbers where mask is set, got nan at index \[1, 3\]"),
    ],
)  # fmt: skip
def test_refused(changed: dict[str, Any], message: str) -> None:
    call = random_call()
    call["mask"][1, 3] = True
    for backend in ("cpu", "reference"):
        with fr.backend(backend), pytest.raises((ValueError, TypeError), match=message):  # type: ignore[arg-type]
            fr.token_rewards(**(call | changed))

"""compare: its numbers against float64 written out, layouts, and what it says of itself."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
import torch
from rollout_sides import sample, seeded, top
from torch import Tensor

import fastreward as fr
from fastreward.compare import measure
from fastreward.compare.pair import Pairs

B, T, V = 3, 7, 11
MASK = torch.tensor([[1, 1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0, 0]])


def numbers(*shape: int, seed: int) -> Tensor:
    return 2 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


A, OTHER = numbers(B, T, V, seed=1), numbers(B, T, V, seed=2)
TOKENS = torch.arange(B * T).reshape(B, T) % V


def expected() -> dict[str, float]:
    la, lb = (z.double().log_softmax(-1)[MASK != 0] for z in (A, OTHER))
    tokens = TOKENS[MASK != 0].unsqueeze(-1)
    d = (lb.gather(-1, tokens) - la.gather(-1, tokens)).squeeze(-1)
    sums = torch.stack([d[:7].sum(), d[7:].sum()]).exp()
    size = d.abs().sort().values
    return {
        "kl_ab": float((la.exp() * (la - lb)).sum(-1).mean()),
        "kl_ba": float((lb.exp() * (lb - la)).sum(-1).mean()),
        "tv": float((la.exp() - lb.exp()).abs().sum(-1).mean() / 2),
        "kl_k1": float(-d.mean()),
        "kl_k2": float((d * d / 2).mean()),
        "kl_k3": float((d.exp() - 1 - d).mean()),
        "tv_estimate": float((d.exp() - 1).abs().mean() / 2),
        "difference_mean": float(d.mean()),
        "difference_median": float(size[4]),
        "difference_p99": float(size[-1]),
        "difference_max": float(size[-1]),
        "correlation": float(np.corrcoef(*(x.gather(-1, tokens).squeeze(-1) for x in (la, lb)))[0, 1]),
        "equal_share": 0.0,
        "top1_agreement": float((la.argmax(-1) == lb.argmax(-1)).double().mean()),
        "entropy_a": float(-(la.exp() * la).sum(-1).mean()),
        "entropy_b": float(-(lb.exp() * lb).sum(-1).mean()),
        "ess_tokens": float(d.exp().mean() ** 2 / (2 * d).exp().mean()),
        "ess_sequences": float(sums.mean() ** 2 / sums.square().mean()),
    }


def test_logits() -> None:
    result = fr.compare(A, OTHER, mask=MASK, tokens=TOKENS)
    assert (result.kind, result.sequences, result.tokens) == ("logits", B, 10)
    want = expected()
    assert {name: result.totals[name] for name in want} == pytest.approx(want, rel=2e-5, abs=2e-6)
    assert result.totals["overlap"] == 1.0  # of 20 largest of 11
    assert result.first_difference.tolist() == [0, 0, -1]
    assert result.cu_seqlens.tolist() == [0, 7, 10, 10]
    assert all(len(x) == 10 for x in result.per_token.values())
    assert result.per_token["kl_ab"].mean().item() == pytest.approx(want["kl_ab"], rel=1e-5)


@pytest.mark.parametrize("chunk", [1, 33, 1 << 24])
def test_chunks_change_nothing(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = fr.compare(A, OTHER, mask=MASK, tokens=TOKENS)
    monkeypatch.setattr(measure, "_CHUNK", chunk)
    steps: list[tuple[int, int]] = []
    parts = fr.compare(A, OTHER, mask=MASK, tokens=TOKENS, step=lambda done, all_: steps.append((done, all_)))
    assert parts.totals == whole.totals
    assert steps[-1] == (10, 10)
    assert len(steps) == {1: 10, 33: 4}.get(chunk, 1)


def test_chosen_tokens_are_looked_up() -> None:
    logprobs = A.log_softmax(-1).gather(-1, TOKENS.unsqueeze(-1)).squeeze(-1)
    want = expected()
    for a, b in ((logprobs, OTHER), ({"logprobs": logprobs, "tokens": TOKENS}, OTHER)):
        options: dict[str, Any] = {} if isinstance(a, dict) else {"tokens": TOKENS}
        found = fr.compare(a, b, mask=MASK, **options)
        assert found.kind == "logprobs"
        for name in ("kl_k1", "kl_k3", "difference_max", "ess_tokens"):
            assert found.totals[name] == pytest.approx(want[name], rel=1e-5, abs=1e-6)
    # The other way round the difference has the other sign.
    assert fr.compare(OTHER, logprobs, mask=MASK, tokens=TOKENS).totals["kl_k1"] == pytest.approx(
        -want["kl_k1"], rel=1e-5
    )
    with pytest.raises(ValueError, match="tokens: needed to find the log-probs of A in the logits of B"):
        fr.compare(logprobs, OTHER, mask=MASK)


@pytest.mark.parametrize("k", [2, 5, 11])
@pytest.mark.parametrize("form", ["both", "a", "b"])
def test_bounds_of_top_k(k: int, form: str) -> None:
    a, b = (top(A, k), top(OTHER, k)) if form == "both" else (top(A, k), OTHER) if form == "a" else (A, top(OTHER, k))
    found, exact = fr.compare(a, b).per_token, fr.compare(A, OTHER).per_token
    for name in ("kl_ab", "kl_ba", "tv"):
        assert (found[f"{name}_at_least"] <= exact[name] + 1e-5).all(), name
        assert (found[f"{name}_at_least"] >= 0).all(), name
    assert (found["tv_at_most"] >= exact["tv"] - 1e-5).all()
    if k == V:
        for name in ("kl_ab", "kl_ba", "tv"):
            assert torch.allclose(found[f"{name}_at_least"], exact[name], rtol=1e-4, atol=1e-5), name
        assert torch.allclose(found["tv_at_most"], exact["tv"], atol=1e-5)


def test_top_k_by_hand() -> None:
    p, q = torch.tensor([[[0.5, 0.2]]]), torch.tensor([[[0.4, 0.3]]])
    a = {"top_logprobs": p.log(), "top_ids": torch.tensor([[[7, 3]]])}
    b = {"top_logprobs": q.log(), "top_ids": torch.tensor([[[9, 7]]])}  # of 7 it is 0.3
    found = fr.compare(a, b).per_token
    assert found["overlap"].tolist() == [0.5]
    assert found["tv_at_least"].item() == pytest.approx(0.2, abs=1e-6)
    assert found["tv_at_most"].item() == pytest.approx((0.2 + 0.5 + 0.7) / 2, abs=1e-6)
    want = 0.5 * math.log(0.5 / 0.3) + 0.5 * math.log(0.5 / 0.7)
    assert found["kl_ab_at_least"].item() == pytest.approx(want, abs=1e-6)
    assert (found["a"].item(), found["b"].item()) == pytest.approx((math.log(0.5), math.log(0.3)))


def test_layouts_are_paired_by_tokens_that_count() -> None:
    logprobs, other = (-numbers(B, T, seed=s).abs() for s in (3, 4))
    padded = fr.compare(logprobs, other, mask=MASK)
    counted = MASK != 0
    bounds = torch.tensor([0, 7, 10, 10])
    packed = fr.compare({"logprobs": logprobs[counted], "cu_seqlens": bounds}, {"logprobs": other, "mask": MASK})
    flat = fr.compare(logprobs[counted], other[counted], cu_seqlens=bounds)
    assert padded.totals == packed.totals == flat.totals
    assert torch.equal(padded.per_token["b"], packed.per_token["b"])
    lengths = fr.compare({"logprobs": logprobs, "lengths": torch.tensor([7, 3, 0])}, other)
    assert lengths.totals == padded.totals


def test_masks_that_differ_are_said() -> None:
    logprobs = -numbers(2, 4, seed=5).abs()
    a = {"logprobs": logprobs, "mask": torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])}
    b = {"logprobs": logprobs, "mask": torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]])}
    found = fr.compare(a, b)
    assert found.tokens == 6
    assert found.notes == ("the masks of A and B differ in 1 sequences: 6 tokens that count in both are compared",)
    short = fr.compare({"logprobs": logprobs[:, :3], "lengths": torch.tensor([3, 2])}, b)
    assert short.tokens == 5
    assert "sequence 0: 3 and 4" in short.notes[0]


def test_what_is_masked_out_is_not_read() -> None:
    clean = fr.compare(A, OTHER, mask=MASK, tokens=TOKENS)
    out = MASK == 0
    spoilt = fr.compare(
        A.masked_fill(out.unsqueeze(-1), torch.nan), OTHER.masked_fill(out.unsqueeze(-1), torch.inf), mask=MASK,
        tokens=TOKENS.masked_fill(out, 10**6),
    )  # fmt: skip
    assert clean.totals == spoilt.totals


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtypes(dtype: torch.dtype) -> None:
    a, b = A.to(dtype), OTHER.to(dtype)
    found = fr.compare(a, b, mask=MASK, tokens=TOKENS)
    want = fr.compare(a.float(), b.float(), mask=MASK, tokens=TOKENS)
    assert found.totals == pytest.approx(want.totals, rel=1e-5, abs=1e-6)


def test_arrays_strides_and_gradients() -> None:
    want = fr.compare(A, OTHER, mask=MASK, tokens=TOKENS).totals
    assert fr.compare(A.numpy(), OTHER.numpy(), mask=MASK.numpy(), tokens=TOKENS.numpy()).totals == want
    strided = A.transpose(0, 1).contiguous().transpose(0, 1).requires_grad_()
    assert fr.compare(strided, OTHER, mask=MASK, tokens=TOKENS).totals == want


def test_tolerance_of_the_first_difference() -> None:
    a = torch.full((2, 5), -1.0)
    b = a + torch.tensor([[0.0, 1e-6, 0.0, 0.1, 0.0], [0.0] * 5])
    assert fr.compare(a, b).first_difference.tolist() == [1, -1]
    assert fr.compare(a, b, tolerance=1e-3).first_difference.tolist() == [3, -1]
    assert fr.compare(a, b).totals["equal_share"] == pytest.approx(0.8)


def test_infinite_on_one_side_or_both() -> None:
    a = torch.tensor([[-1.0, -torch.inf, -torch.inf, -1.0]])
    b = torch.tensor([[-1.0, -torch.inf, -1.0, -torch.inf]])
    found = fr.compare(a, b)
    assert found.per_token["difference"].tolist() == [0.0, 0.0, torch.inf, -torch.inf]
    assert found.totals["difference_max"] == torch.inf
    assert 0 < found.totals["ess_tokens"] <= 1
    json.dumps(found.to_dict(per_token=True), allow_nan=False)
    assert "-inf" in str(found)


@pytest.mark.parametrize("shape", [(0, 5), (0, 0), (3, 0), (0, 5, 7), (3, 0, 7)])
def test_empty(shape: tuple[int, ...]) -> None:
    found = fr.compare(torch.zeros(shape), torch.zeros(shape))
    assert (found.tokens, found.sequences, found.faults) == (0, shape[0], ())
    assert found.verdict == "no fault found: there is nothing to compare"
    assert found.first_difference.tolist() == [-1] * shape[0]
    json.dumps(found.to_dict(), allow_nan=False)
    assert str(found)


def test_all_masked_out() -> None:
    found = fr.compare(A, OTHER, mask=torch.zeros(B, T))
    assert found.tokens == 0


def test_the_report() -> None:
    seeded(0)
    tokens = sample(A)
    found = fr.compare(A, OTHER, tokens=tokens)
    facts = found.to_dict()
    assert set(facts["totals"]) == set(found.totals)
    assert "per_token" not in facts
    assert len(found.to_dict(per_token=True)["per_token"]["kl_ab"]) == found.tokens
    worst = facts["worst"][0]
    size = found.per_token["difference"].abs()
    assert abs(worst["difference"]) == size.max().item()
    assert worst["sequence"] * T + worst["token"] == int(size.argmax())
    text = str(found)
    assert found.verdict in " ".join(text.split())
    assert f"{found.totals['kl_ab']:.4g}" in text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"a": torch.zeros(2, 3, dtype=torch.int64)}, "A: logprobs: expected dtype float32"),
        ({"a": torch.zeros(3)}, r"A: logprobs: expected \[B, T\], or \[N\] with cu_seqlens, got shape \[3\]"),
        ({"a": -torch.ones(3, 3)}, "B: expected 3 sequences, as A has, got 2"),
        ({"a": torch.full((2, 3), 0.5)}, "A: logprobs: expected log-probs, at most 0 .*got 0.5 in sequence 0, token 0"),
        ({"b": torch.tensor([[-1.0, -1, -1], [-1, torch.nan, -1]])}, "B: logprobs: .*got nan in sequence 1, token 1"),
        ({"a": {"values": torch.zeros(2, 3)}}, "A: expected one of the names logprobs, .*got values"),
        ({"a": {}}, "A: expected one of the names .*got none"),
        ({"a": {"top_logprobs": torch.zeros(2, 3, 4)}}, "A: expected top_logprobs and top_ids together"),
        (
            {"a": {"top_logprobs": torch.zeros(2, 3, 4), "top_ids": torch.zeros(2, 3, 5, dtype=torch.int64)}},
            r"A: top_ids: expected shape \[2, 3, 4\]",
        ),
        ({"a": torch.zeros(2, 3, 5), "b": torch.zeros(2, 3, 6)}, "B: logits: expected a vocabulary of 5, as A has"),
        ({"a": torch.zeros(2, 3, 0)}, "A: logits: expected a vocabulary"),
        ({"a": torch.full((2, 3, 5), -torch.inf), "b": torch.zeros(2, 3, 5)}, "A: logits: expected numbers, one above"),
        ({"mask": torch.ones(2, 4)}, r"A: mask: expected shape \[2, 3\]"),
        ({"a": {"logprobs": -torch.ones(2, 3), "lengths": torch.ones(3, dtype=torch.int64)}}, "A: lengths: expected"),
        ({"a": -torch.ones(6), "cu_seqlens": torch.tensor([0, 3, 5])}, "A: cu_seqlens: expected bounds from 0 to 6"),
        ({"a": torch.zeros(2, 3, 5), "tokens": torch.full((2, 3), 5)}, r"A: tokens: expected ids in \[0, 5\)"),
        ({"tokens": torch.zeros(2, 3)}, "A: tokens: expected an integer tensor"),
        ({"top": 0}, "top: expected at least 1"),
        ({"tolerance": -1.0}, "tolerance: expected a number of at least 0"),
        ({"temperature_b": 0.0}, "temperature_b: expected a positive number"),
        ({"key_a": "other", "a": {"logprobs": torch.zeros(2, 3)}}, "A: there is no 'other'; there are logprobs"),
        ({"a": 3}, "A: expected a torch tensor"),
        ({"step": 3}, "step: expected a function"),
    ],
)  # fmt: skip
def test_refusals(change: dict[str, Any], message: str) -> None:
    given: dict[str, Any] = {"a": -torch.ones(2, 3), "b": -torch.ones(2, 3), **change}
    with pytest.raises((TypeError, ValueError), match=message):
        fr.compare(given.pop("a"), given.pop("b"), **given)


def test_sample_sizes_of_tokens_and_of_sequences() -> None:
    difference = torch.tensor([[0.1, 0.2], [-0.3, 0.0], [0.5, 0.5]], dtype=torch.float64)
    found = fr.compare(torch.full((3, 2), -2.0, dtype=torch.float64), difference - 2.0)
    for name, logs in (("ess_tokens", difference.reshape(-1)), ("ess_sequences", difference.sum(-1))):
        w = logs.exp()
        assert found.totals[name] == pytest.approx(float(w.mean() ** 2 / (w * w).mean()), rel=1e-5)
    far = fr.compare(torch.full((2, 1), -100.0), torch.tensor([[-200.0], [-1.0]]))
    assert far.totals["ess_sequences"] == pytest.approx(0.5)


def test_temperatures_of_both_sides() -> None:
    found = fr.compare(A, OTHER, mask=MASK, tokens=TOKENS, temperature_a=0.5, temperature_b=2.0)
    want = fr.compare(A / 0.5, OTHER / 2.0, mask=MASK, tokens=TOKENS)
    for name in ("kl_ab", "kl_ba", "tv", "kl_k3", "entropy_a", "entropy_b"):
        assert found.totals[name] == pytest.approx(want.totals[name], rel=1e-5), name


def test_shifted_pairs_stay_in_their_sequence() -> None:
    pairs = Pairs(torch.arange(6), torch.arange(6) + 10, torch.tensor([0, 0, 0, 2, 2, 3]), 4)
    late, early = pairs.shifted(1), pairs.shifted(-2)
    assert (late.a.tolist(), late.b.tolist(), late.sequence.tolist()) == ([1, 2, 4], [10, 11, 13], [0, 0, 2])
    assert (early.a.tolist(), early.b.tolist()) == ([0], [12])
    assert len(pairs.shifted(7)) == 0
    assert pairs.cu_seqlens.tolist() == [0, 3, 3, 5, 6]
    assert pairs.position.tolist() == [0, 1, 2, 0, 1, 0]

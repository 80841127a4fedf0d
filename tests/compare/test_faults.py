"""compare: faults that are put in are named, with bfloat16 noise beside them; without one it says so."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from rollout_sides import B, T, bf16_noise, chosen, logits, moved, normal, said, sample, seeded, top, top_k, top_p
from torch import Tensor

import fastreward as fr

KINDS = ("logprobs", "top-k", "logits")
PAIRS = [("logprobs", "logprobs"), ("top-k", "top-k"), ("logits", "logits"), ("top-k", "logits"), ("logits", "top-k")]


def names(result: Any) -> list[str]:
    return [fault.name for fault in result.faults]


def both(kinds: tuple[str, str], of_a: Tensor, of_b: Tensor, **options: Any) -> Any:
    tokens = sample(of_a)
    return fr.compare(said(kinds[0], of_a, tokens), said(kinds[1], of_b, tokens), **options)


@pytest.fixture(scope="module")
def z() -> Tensor:
    seeded(0)
    return logits()


@pytest.fixture(scope="module")
def mask() -> Tensor:
    seeded(1)
    lengths = torch.randint(20, T + 1, (B,), generator=torch.Generator().manual_seed(1))
    return torch.arange(T) < lengths.unsqueeze(-1)


# ------------------------------------------------------------------------------------------------------------- values
@pytest.mark.parametrize("kinds", PAIRS)
@pytest.mark.parametrize("temperature", [0.5, 0.7, 0.9, 1.3])
def test_temperature(z: Tensor, kinds: tuple[str, str], temperature: float) -> None:
    seeded(2)
    result = both(kinds, bf16_noise(z / temperature), z)
    assert names(result) == ["temperature"]
    found = float(result.faults[0].value)
    # From chosen tokens alone it is an estimate.
    assert found == pytest.approx(temperature, rel=0.3 if kinds[0] == "logprobs" else 0.01)
    assert f"{found:.3g}" in result.faults[0].evidence
    assert "temperature" in result.verdict


@pytest.mark.parametrize("temperature", [0.3, 0.6])
@pytest.mark.parametrize("kinds", PAIRS)
def test_temperature_on_the_other_side(z: Tensor, kinds: tuple[str, str], temperature: float) -> None:
    seeded(3)
    result = both(kinds, bf16_noise(z), z / temperature)
    assert names(result) == ["temperature"]
    found = float(result.faults[0].value)
    assert found == pytest.approx(1 / temperature, rel=0.15 if kinds[0] == "logprobs" else 0.01)


def test_a_temperature_that_is_given_is_none(z: Tensor) -> None:
    seeded(4)
    tokens = sample(z)
    sides = {"logits": bf16_noise(z), "tokens": tokens}, {"logits": z, "tokens": tokens}
    assert names(fr.compare(*sides, temperature_a=0.7)) == ["temperature"]
    assert names(fr.compare(*sides, temperature_a=0.7, temperature_b=0.7)) == []
    assert names(fr.compare({"logits": bf16_noise(z / 0.7)}, z, temperature_b=0.7)) == []
    with pytest.raises(ValueError, match=r"temperature_a: expected 1 for log-probs, got 0.7"):
        fr.compare(chosen(z, tokens), chosen(z, tokens), temperature_a=0.7)


@pytest.mark.parametrize(("share", "kinds"), [(s, k) for s in (0.5, 0.9, 0.95) for k in PAIRS])
def test_renormalised_after_top_p(z: Tensor, share: float, kinds: tuple[str, str]) -> None:
    seeded(5)
    result = both(kinds, top_p(bf16_noise(z), share), z)
    assert "processed" in names(result)
    assert set(names(result)) <= {"processed", "kept-set"}
    fault = next(f for f in result.faults if f.name == "processed")
    assert fault.side == "A"
    assert float(fault.value) == pytest.approx(share, abs=0.06)
    # An engine that reports -inf for what it left out shows that itself.
    assert ("kept-set" in names(result)) == (kinds != ("logprobs", "logprobs"))


@pytest.mark.parametrize("kinds", PAIRS)
@pytest.mark.parametrize("k", [10, 50])
def test_renormalised_after_top_k(z: Tensor, k: int, kinds: tuple[str, str]) -> None:
    seeded(6)
    result = both(kinds, top_k(bf16_noise(z), k), z)
    assert "processed" in names(result)
    assert set(names(result)) <= {"processed", "kept-set"}


def test_which_side_is_renormalised(z: Tensor) -> None:
    seeded(7)
    tokens = sample(top_p(z, 0.8))
    result = fr.compare(chosen(bf16_noise(z), tokens), chosen(top_p(z, 0.8), tokens))
    assert [(f.name, f.side) for f in result.faults] == [("processed", "B")]


@pytest.mark.parametrize("kinds", [("logprobs", "logprobs"), ("logits", "logits"), ("top-k", "logits")])
def test_a_kept_set_is_missing(z: Tensor, kinds: tuple[str, str]) -> None:
    """The trainer keeps less than the engine sampled from."""
    seeded(8)
    result = both(kinds, bf16_noise(z), top_k(z, 20))
    assert result.faults[0].name == "kept-set"
    assert result.faults[0].side == "A"
    assert "-inf on B and" in result.faults[0].evidence


def test_a_large_negative_logit_forbids_too(z: Tensor) -> None:
    kept = top_k(z, 20).clamp(min=torch.finfo(torch.float32).min)
    assert fr.compare(kept, z).faults[0].name == "kept-set"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
def test_rounding(z: Tensor, kind: str, dtype: torch.dtype) -> None:
    seeded(9)
    tokens = sample(z)
    plain = said(kind, z, tokens)

    def rounded(x: Tensor) -> Tensor:
        return x.to(dtype).float() if x.dtype == torch.float32 else x

    result = fr.compare(plain, moved(plain, rounded))
    assert [(f.name, f.side, f.value) for f in result.faults] == [("rounding", "B", str(dtype)[6:])]
    assert "100 % of the differences are within half a step" in result.faults[0].evidence
    assert names(fr.compare(moved(plain, rounded), moved(plain, rounded))) == []  # both: none is worse
    noisy = moved(said(kind, bf16_noise(z), tokens), rounded)
    assert names(fr.compare(noisy, plain)) == ["rounding"]


# ---------------------------------------------------------------------------------------------------------- alignment
@pytest.mark.parametrize("kinds", PAIRS)
@pytest.mark.parametrize("by", [1, -1, 2])
def test_a_shift(z: Tensor, mask: Tensor, kinds: tuple[str, str], by: int) -> None:
    seeded(10)
    noisy = bf16_noise(z)
    tokens = sample(noisy)
    late = moved(said(kinds[0], noisy, tokens), lambda x: x.roll(by, 1))
    if isinstance(late, dict):
        late.pop("tokens", None)
    right = said(kinds[1], z, tokens)
    result = fr.compare(late, right, mask=mask)
    assert [(f.name, f.side, f.value) for f in result.faults] == [("shift", "A", float(by))]
    assert ("later" in result.faults[0].evidence) == (by > 0)


@pytest.mark.parametrize("kind", KINDS)
def test_a_shift_and_a_temperature(z: Tensor, mask: Tensor, kind: str) -> None:
    seeded(11)
    noisy = bf16_noise(z / 0.6)
    tokens = sample(noisy)
    late = moved(said(kind, noisy, tokens), lambda x: x.roll(-1, 1))
    if isinstance(late, dict):
        late.pop("tokens", None)
    assert names(fr.compare(late, said(kind, z, tokens), mask=mask)) == ["shift", "temperature"]


def _flush_right(x: Tensor, mask: Tensor) -> Tensor:
    out = torch.zeros_like(x)
    for row, length in enumerate(mask.sum(-1).tolist()):
        out[row, T - length :] = x[row, :length]
    return out


def _cut(x: Tensor, mask: Tensor) -> Tensor:
    out = torch.zeros_like(x)
    for row, length in enumerate(mask.sum(-1).tolist()):
        out[row, :length] = x[row, :length]
    return out


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("left", ["A", "B"])
@pytest.mark.parametrize("kind", KINDS)
def test_padding_at_the_other_end(z: Tensor, mask: Tensor, kind: str, left: str, masked: bool) -> None:
    seeded(12)
    noisy = bf16_noise(z)
    tokens = sample(noisy)
    sides = [said(kind, noisy, tokens), said(kind, z, tokens)]
    for k, name in enumerate("AB"):
        sides[k] = moved(sides[k], lambda x, name=name: (_flush_right if name == left else _cut)(x, mask))
    result = fr.compare(*sides, mask=mask if masked else None)
    assert [(f.name, f.side) for f in result.faults] == [("padding", left)]


def test_masks_that_say_where_the_padding_is(z: Tensor, mask: Tensor) -> None:
    """The comparison goes by them."""
    seeded(13)
    noisy = bf16_noise(z)
    tokens = sample(noisy)
    a = {"logprobs": _flush_right(chosen(noisy, tokens), mask), "mask": _flush_right(mask.float(), mask)}
    b = {"logprobs": chosen(z, tokens), "mask": mask}
    result = fr.compare(a, b)
    assert [(f.name, f.side) for f in result.faults] == [("padding", "A")]
    plain = fr.compare(chosen(noisy, tokens), chosen(z, tokens), mask=mask)
    assert result.totals == plain.totals


# ------------------------------------------------------------------------------------------------------------ no fault
@pytest.mark.parametrize("kinds", PAIRS)
def test_the_same(z: Tensor, kinds: tuple[str, str]) -> None:
    seeded(14)
    result = both(kinds, z, z)
    assert result.faults == ()
    if kinds[0] == kinds[1]:
        assert result.verdict == "no fault found: both sides are the same to the last bit"
        assert (result.first_difference == -1).all()
        assert result.totals["equal_share"] == 1.0


@pytest.mark.parametrize("kinds", PAIRS)
@pytest.mark.parametrize("seed", range(3))
def test_honest_noise(z: Tensor, kinds: tuple[str, str], seed: int) -> None:
    seeded(20 + seed)
    result = both(kinds, bf16_noise(z), bf16_noise(z))
    assert result.faults == ()
    assert "of the size of rounding in bfloat16" in result.verdict


def test_honest_bfloat16_logits(z: Tensor) -> None:
    seeded(15)
    tokens = sample(z)
    result = fr.compare(bf16_noise(z).bfloat16(), bf16_noise(z).bfloat16(), tokens=tokens)
    assert result.faults == ()
    assert "rounding in bfloat16" in result.verdict
    result = fr.compare(z.double(), z + 1e-6 * normal(*z.shape), tokens=tokens)
    assert "rounding in float32" in result.verdict


@pytest.mark.parametrize("kinds", PAIRS)
@pytest.mark.parametrize("by", [0.4, 1.0])
def test_other_weights(z: Tensor, kinds: tuple[str, str], by: float) -> None:
    seeded(16)
    result = both(kinds, z + by * normal(*z.shape), z)
    assert result.faults == ()
    assert "other weights, or another policy" in result.verdict


@pytest.mark.parametrize("kinds", PAIRS)
def test_another_model(z: Tensor, kinds: tuple[str, str]) -> None:
    seeded(17)
    result = both(kinds, logits(), z)
    assert result.faults == ()
    assert "other weights, or another policy" in result.verdict


def test_too_few_tokens_to_tell() -> None:
    result = fr.compare(torch.tensor([[-1.0, -2.0]]), torch.tensor([[-1.5, -2.5]]))
    assert result.faults == ()
    assert result.verdict == "no fault found, but in 2 tokens most would not be seen"


def test_top_logprobs_with_the_chosen_token_beyond_them(z: Tensor) -> None:
    seeded(18)
    tokens = sample(z)
    result = fr.compare(top(bf16_noise(z), 3), {"logprobs": chosen(z, tokens), "tokens": tokens})
    assert result.kind == "logprobs"
    beyond = int((top(z, 3)["top_ids"] != tokens.unsqueeze(-1)).all(-1).sum())
    assert abs(int(result.per_token["difference"].isnan().sum()) - beyond) < 30
    assert "are in one side's top-k alone" in result.notes[0]


# ------------------------------------------------------------------------------------------------------ false alarms
def test_log_probs_near_0_lie_on_every_grid() -> None:
    """Where a model is sure, a float32 difference of logits is a small number of steps, which bfloat16 has too."""
    seeded(5)
    z = torch.randn(4, 64, 50) * 2
    z[..., 7] += 18.0
    engine = z + 1e-2 * torch.randn(4, 64, 50)
    tokens = sample(z)
    assert names(fr.compare(chosen(engine.log_softmax(-1), tokens), {"logits": z, "tokens": tokens})) == []


def test_one_token_that_has_moved_up_is_chance() -> None:
    seeded(6)
    trainer = torch.cat([-1e-5 * torch.rand(19), torch.tensor([-1.0])])
    engine = trainer + torch.cat([-1e-6 * torch.rand(19), torch.tensor([5e-3])])
    assert names(fr.compare(engine[None], trainer[None])) == []


def test_whole_logits_are_not_renormalised() -> None:
    """A flat distribution's temperature moves its largest log-probs by nearly the same; no id is missing."""
    seeded(7)
    z = 0.5 * torch.randn(4, 64, 300)
    assert "processed" not in names(fr.compare(z / 1.2 + 0.03 * torch.randn(4, 64, 300), z))

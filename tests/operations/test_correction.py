"""Rollout correction in the language against its float64 reference: weights, masks, verl's metrics, TRL's modes."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from reference_losses import correction as reference
from torch import Tensor

import fastreward as fr
from fastreward.correction import (
    DEFAULT_BOUNDS,
    REJECTIONS,
    CorrectionLevel,
    correction_weights,
    off_policy_sequence_mask,
)

ROWS = 8


def rollouts(rows: int = ROWS, width: int = 17, *, spread: float = 0.5) -> tuple[Tensor, Tensor, Tensor]:
    """(mask, old, rollout): ragged; row 3 empty, row 5 of one token, row 1 on policy."""
    mask = torch.rand(rows, width) > 0.3
    mask[:, 0] = True
    if rows > 5:
        mask[3] = False
        mask[5, 1:] = False
    old = -torch.rand(rows, width) * 3
    rollout = old + spread * torch.randn(rows, width)
    if rows > 1:
        rollout[1] = old[1]
    return mask, old, rollout


def hidden(x: Tensor, mask: Tensor) -> Tensor:
    """x with NaN and inf where masked out."""
    return torch.where(mask, x, torch.where(torch.rand(x.shape) > 0.5, torch.nan, torch.inf))


def packed(mask: Tensor) -> tuple[Tensor, Tensor]:
    """(places of the tokens that are kept when rows are cut to random lengths, cu_seqlens)."""
    lengths = torch.where(mask.any(-1), mask.shape[1] - mask.flip(-1).int().argmax(-1), 0)
    inside = torch.arange(mask.shape[1]) < lengths.unsqueeze(-1)
    return inside, torch.nn.functional.pad(lengths.cumsum(0), (1, 0))


def check(data: tuple[Tensor, Tensor, Tensor], **settings: Any) -> None:
    """Weights, kept tokens and metrics, padded and packed, with garbage under the mask."""
    mask, old, rollout = data
    bounds = {"low": None, "high": None}
    mode = settings.get("mode", "truncate")
    if mode is not None and "low" not in settings and "high" not in settings:
        bounds = dict(zip(("low", "high"), DEFAULT_BOUNDS[mode], strict=True))
    expected = reference.correction_weights(old, rollout, mask, **{**bounds, **settings})
    padded = correction_weights(hidden(old, mask), hidden(rollout, mask), mask, **settings)
    compare(padded, expected)
    inside, cu_seqlens = packed(mask)
    flat = [x[inside] for x in (hidden(old, mask), hidden(rollout, mask), mask)]
    weights, keep, metrics = correction_weights(*flat, cu_seqlens=cu_seqlens, **settings)
    compare((weights, keep, metrics), (expected[0][inside], expected[1][inside], expected[2]))


def compare(ours: tuple[Tensor, Tensor, Any], theirs: tuple[Tensor, Tensor, dict[str, Tensor]]) -> None:
    weights, keep, metrics = ours
    assert weights.dtype == torch.float32
    assert keep.dtype == torch.bool
    torch.testing.assert_close(weights.double(), theirs[0], rtol=2e-5, atol=1e-7)
    assert torch.equal(keep, theirs[1])
    assert set(metrics) == set(theirs[2])
    largest = torch.finfo(torch.float32).max
    for name, value in theirs[2].items():
        expected = float(value) if abs(float(value)) < largest else float("inf")
        assert float(metrics[name]) == pytest.approx(expected, rel=5e-5, abs=2e-5), name


# ------------------------------------------------------------------------------------------------------------- weights
@pytest.mark.parametrize("level", reference.LEVELS)
@pytest.mark.parametrize("mode", reference.MODES)
@pytest.mark.parametrize("bounds", [{}, {"high": 1.3}, {"low": 0.8}, {"low": 0.7, "high": 1.4}])
def test_weights(level: str, mode: str, bounds: dict[str, float]) -> None:
    check(rollouts(), mode=mode, level=level, **bounds)


@pytest.mark.parametrize("level", reference.LEVELS)
@pytest.mark.parametrize("mode", reference.MODES)
@pytest.mark.parametrize("clamp", [20.0, 1.0, None])
def test_clamp_and_normalization(level: str, mode: str, clamp: float | None) -> None:
    check(rollouts(), mode=mode, level=level, low=0.5, high=1.9, log_ratio_clamp=clamp, batch_normalize=True)


@pytest.mark.parametrize("level", reference.LEVELS)
@pytest.mark.parametrize("size", [30.0, -30.0, 200.0, -200.0])
def test_extreme_log_ratios(level: str, size: float) -> None:
    mask, old, rollout = rollouts(spread=0.1)
    rollout[0, 0] = old[0, 0] - size
    rollout[5, 0] = old[5, 0] - size
    reject = {"token_k1": 2.0, "seq_sum_k2": 1.0, "seq_max_k3": 0.5}
    for mode in reference.MODES:
        check((mask, old, rollout), mode=mode, level=level, reject=reject)


@pytest.mark.parametrize("level", reference.LEVELS)
@pytest.mark.parametrize("mode", ["mask", "icepop", "truncate"])
def test_a_weight_exactly_on_its_bounds_is_inside(level: str, mode: str) -> None:
    old = -torch.rand(3, 4)
    weights, keep, metrics = correction_weights(old, old, mode=mode, level=level, low=1.0, high=1.0)
    assert torch.equal(weights, torch.ones(3, 4))
    assert keep.all()
    assert metrics["rollout_is_ratio_fraction_high"] == metrics["rollout_is_ratio_fraction_low"] == 0


def test_a_statistic_exactly_on_its_threshold_passes() -> None:
    """Log-ratios of 0: k1 between log 1 and log 1; and no gap on average, for an advantage below 0."""
    old = -torch.rand(3, 4)
    for place in ("token", "seq_sum", "seq_mean"):
        assert correction_weights(old, old, reject={f"{place}_k1": (1.0, 1.0)})[1].all()
    gap = torch.full((3, 4), 0.25)
    half = old.mul(256).round().div(256)  # sums are exact
    for threshold, kept in ((0.25, True), (0.125, False)):
        found = off_policy_sequence_mask(half, half + gap, -torch.ones(3), threshold=threshold)
        assert found.tolist() == [kept] * 3


@pytest.mark.parametrize("level", reference.LEVELS)
@pytest.mark.parametrize("gap", [2.0, -2.0])
def test_the_log_ratio_is_clamped_at_its_level(level: str, gap: float) -> None:
    """Two tokens, each 2 off: a sequence's sum is 4, its mean 2."""
    old = torch.full((1, 2), -0.5)
    whole = 2 * gap if level == "sequence" else gap
    for clamp, expected in ((0.5, 0.5 * whole / abs(whole)), (3.0, max(-3.0, min(3.0, whole))), (None, whole)):
        weights, _, _ = correction_weights(old, old - gap, level=level, high=1000.0, log_ratio_clamp=clamp)
        torch.testing.assert_close(weights.log(), torch.full((1, 2), expected), rtol=1e-5, atol=1e-5)


def test_single_token_and_nothing_inside() -> None:
    """T = 1; a batch whose weights are all outside: the mean weight is 0 and normalising by it changes nothing."""
    check(rollouts(width=1), level="sequence", reject={"seq_mean_k1": (0.9, 1.1)})
    mask, old, _ = rollouts()
    check((mask, old, old + 3.0), mode="icepop", low=0.9, high=1.1, batch_normalize=True)
    check((mask, old, old + 3.0), mode="mask", low=0.9, high=1.1, reject={"token_k2": 1e-3})


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("rows", [0, 3])
@pytest.mark.parametrize("level", reference.LEVELS)
def test_no_token(level: CorrectionLevel, rows: int, backend: str) -> None:
    """Nothing is weighed and nothing kept; every metric says that there was nothing to take it over."""
    nothing = torch.zeros(rows, 5)
    options = {"level": level, "mode": "icepop", "batch_normalize": True}
    with fr.backend(backend):
        weights, keep, metrics = correction_weights(
            nothing, nothing, nothing.bool(), reject={"token_k1": 2.0, "seq_max_k3": 0.5}, **options
        )
    assert weights.shape == keep.shape == (rows, 5)
    assert not weights.any()
    assert not keep.any()
    assert metrics.values_tensor.isnan().all()


# ----------------------------------------------------------------------------------------------------------- rejection
@pytest.mark.parametrize("option", REJECTIONS)
@pytest.mark.parametrize("spread", [0.3, 12.0])
def test_rejection(option: str, spread: float) -> None:
    threshold: Any = (0.8, 1.3) if option.endswith("k1") else 0.1
    check(rollouts(spread=spread), mode=None, reject={option: threshold})


def test_rejections_together() -> None:
    reject = {"token_k1": 1.8, "seq_mean_k3": 0.2, "seq_max_k2": 1.5}
    for mode, level in itertools.product((None, *reference.MODES), reference.LEVELS):
        check(rollouts(), mode=mode, level=level, reject=reject)


# ----------------------------------------------------------------------------------------------------------------- TRL
@pytest.mark.parametrize("mode", ["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"])
@pytest.mark.parametrize(("low", "high"), [(None, 3.0), (0.5, 2.0), (0.9, None)])
def test_trl_modes(mode: str, low: float | None, high: float | None) -> None:
    """TRL's ratio, with a token that vLLM could not score."""
    mask, old, rollout = rollouts()
    rollout[0, 0] = torch.nan
    level, action = mode.split("_")
    weights, keep, metrics = correction_weights(
        old,
        rollout,
        mask,
        mode="truncate" if action == "truncate" else "icepop",
        level=level,  # type: ignore[arg-type]
        low=low,
        high=high,
        log_ratio_clamp=None,
        unscored=True,
    )
    expected = reference.trl_importance_ratio(old, rollout, mask, mode, low, high)
    torch.testing.assert_close(weights.double(), expected.expand(mask.shape) * mask, rtol=1e-5, atol=1e-7)
    assert torch.equal(keep, mask)
    assert all(x == x for x in metrics.floats().values())


@pytest.mark.parametrize("threshold", [-0.1, 0.0, 0.05, 0.3])
@pytest.mark.parametrize("unscored", [False, True])
def test_off_policy_sequence_mask(threshold: float, unscored: bool) -> None:
    mask, logprobs, rollout = rollouts(rows=64)
    advantages = torch.randn(64)
    advantages[7], rollout[7] = 0.0, logprobs[7] + 1.0  # kept for its advantage alone, which is not negative
    assert mask[7].any()
    if unscored:
        rollout[9, 0], mask[9, 0], advantages[9] = torch.nan, True, -1.0
    expected = reference.off_policy_sequence_mask(logprobs, rollout, advantages, mask, threshold=threshold)
    assert 0 < expected.sum() < 64
    arguments = (hidden(logprobs, mask), torch.where(mask, rollout, torch.inf), advantages)
    ours = off_policy_sequence_mask(*arguments, mask, threshold=threshold, unscored=unscored)
    assert torch.equal(ours, expected)
    inside, cu_seqlens = packed(mask)
    flat = off_policy_sequence_mask(
        *(x[inside] for x in arguments[:2]),
        advantages,
        mask[inside],
        threshold=threshold,
        unscored=unscored,
        cu_seqlens=cu_seqlens,
    )
    assert torch.equal(flat, expected)


# ----------------------------------------------------------------------------------------------------- how it is called
def test_numbers_compile_nothing() -> None:
    """Thresholds and shapes are run-time: one program serves them all."""
    from fastreward import correction

    mask, old, rollout = rollouts()
    correction.plan.cache_clear()
    for high, threshold in ((1.5, 0.1), (2.5, 0.7)):
        for rows in (3, ROWS):
            correction_weights(old[:rows], rollout[:rows], mask[:rows], high=high, reject={"token_k2": threshold})
    assert correction.plan.cache_info().misses == 1


def test_masks_of_every_kind() -> None:
    mask, old, rollout = rollouts()
    expected = correction_weights(old, rollout, mask)[0]
    for dtype in (torch.uint8, torch.int32, torch.int64, torch.float32, torch.float64):
        assert torch.equal(correction_weights(old, rollout, mask.to(dtype))[0], expected)
    whole = torch.ones_like(mask)
    assert torch.equal(correction_weights(old, rollout)[0], correction_weights(old, rollout, whole)[0])


def test_packed_single_tokens_with_an_empty_sequence() -> None:
    """As many sequences as tokens: what is per sequence must not be taken for what is per token."""
    old, rollout = -torch.rand(3), -torch.rand(3)
    cu_seqlens = torch.tensor([0, 2, 2, 3])
    weights, _, _ = correction_weights(old, rollout, level="sequence", high=100.0, cu_seqlens=cu_seqlens)
    ratio = (old - rollout).double()
    expected = torch.stack([ratio[:2].sum(), ratio[:2].sum(), ratio[2]]).exp()
    torch.testing.assert_close(weights.double(), expected, rtol=1e-6, atol=0)


def test_numpy() -> None:
    mask, old, rollout = rollouts()
    weights, keep, metrics = correction_weights(old.numpy(), rollout.numpy(), mask.numpy())  # type: ignore[arg-type]
    expected = correction_weights(old, rollout, mask)
    assert isinstance(weights, np.ndarray)
    assert np.array_equal(weights, expected[0].numpy())
    assert np.array_equal(keep, expected[1].numpy())  # type: ignore[arg-type]
    assert float(metrics["kl"]) == float(expected[2]["kl"])


def test_compiled() -> None:
    mask, old, rollout = rollouts()

    def step(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        weights, keep, metrics = correction_weights(x, y, mask, mode="mask", level="sequence", reject={"token_k1": 2.0})
        return weights, keep, metrics["kl"]

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for ours, expected in zip(compiled(old, rollout), step(old, rollout), strict=True):
        assert torch.equal(ours, expected)


def test_opcheck() -> None:
    from fastreward import correction

    mask, old, rollout = rollouts()
    for level, reject in (("token", ()), ("sequence", ("seq_max_k2",))):
        key, _, _ = correction._register("mask", level, True, True, True, True, False, reject)
        numbers = [float(ROWS), 20.0, 0.5, 2.0, *[0.0, 0.3] * len(reject)]
        for given in ((numbers, None), ([], torch.tensor(numbers, dtype=torch.float64))):
            torch.library.opcheck(
                torch.ops.fastreward.correction_weights, (old, rollout, mask, None, *given, [], key, "cpu")
            )
    arguments = (old, rollout, torch.randn(ROWS), mask, None, [0.1], None, None, True, "cpu")
    torch.library.opcheck(torch.ops.fastreward.off_policy_sequence_mask, arguments)


def test_no_gradient_flows() -> None:
    mask, old, rollout = rollouts()
    for given in ((old.requires_grad_(), rollout), (old.detach(), rollout.requires_grad_())):
        with pytest.raises(ValueError, match=r"_logprobs: expected a constant, .*\.detach\(\)"):
            correction_weights(*given, mask)
    with torch.no_grad():
        weights, _, metrics = correction_weights(old, rollout, mask)
    assert not weights.requires_grad
    assert not metrics.values_tensor.requires_grad


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"mode": "clip"}, ValueError, "mode: expected one of"),
        ({"level": "tokens"}, ValueError, r"did you mean 'token'\?"),
        ({"low": 3.0, "high": 2.0}, ValueError, "low: expected at most high, 2.0, got 3.0"),
        ({"high": -1.0}, ValueError, "high: expected a positive number"),
        ({"low": -1.0}, ValueError, "low: expected a number of at least 0"),
        ({"mode": None, "high": 2.0}, ValueError, "no weights to bound"),
        ({"reject": "seq_mean_k3"}, TypeError, "reject: expected a mapping"),
        ({"reject": {"token_k4": 1.0}}, ValueError, "reject: expected one of"),
        ({"reject": {"seq_max_k1": 1.0}}, ValueError, "reject: expected one of"),
        ({"reject": {"token_k2": (0.1, 1.0)}}, ValueError, "expected one number, an upper bound"),
        ({"reject": {"token_k1": (1.2, 0.9)}}, ValueError, "low: expected at most high"),
        ({"reject": {"token_k1": (1.2,)}}, ValueError, r"expected \(low, high\)"),
        ({"mode": None, "batch_normalize": True}, ValueError, "no weights to normalise"),
        ({"log_ratio_clamp": 0.0}, ValueError, "log_ratio_clamp: expected a positive number"),
    ],
)
def test_bad_settings(settings: dict[str, Any], error: type[Exception], message: str) -> None:
    mask, old, rollout = rollouts()
    with pytest.raises(error, match=message):
        correction_weights(old, rollout, mask, **settings)


def test_bad_tensors() -> None:
    mask, old, rollout = rollouts()
    nowhere = torch.full_like(old, -torch.inf)
    with pytest.raises(ValueError, match="a finite one of the two where mask is set, got -inf"):
        correction_weights(nowhere, nowhere, mask)
    with pytest.raises(TypeError, match="rollout_logprobs: expected floating-point numbers, got int64"):
        correction_weights(old, rollout.long(), mask)
    with pytest.raises(ValueError, match="rollout_logprobs: expected shape"):
        correction_weights(old, rollout[:, 1:], mask)
    with pytest.raises(ValueError, match="mask: expected shape"):
        correction_weights(old, rollout, mask[1:])
    with pytest.raises(ValueError, match=r"expected \[B, T\], or \[N\] with cu_seqlens"):
        correction_weights(old.flatten(), rollout.flatten())
    with pytest.raises(ValueError, match=r"advantages: expected shape \[8\]"):
        off_policy_sequence_mask(old, rollout, torch.zeros(7), mask, threshold=0.1)
    rollout[6, 0] = torch.nan
    with pytest.raises(ValueError, match=r"rollout_logprobs: .*unscored=True.* at index \[6, 0\]"):
        correction_weights(old, rollout, mask)

"""verl's rollout correction, patched, beside verl's own: weights, masks and every metric."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import fastreward
from fastreward.patch.bindings import Report
from fastreward.patch.verl import rollout

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]

pytest.importorskip("verl", reason="verl is not installed (`make test` installs it)", exc_type=ImportError)
helper = importlib.import_module("verl.trainer.ppo.rollout_corr_helper")
protocol = importlib.import_module("verl.protocol")

B, T = 8, 29
REPORT = Report("verl", "0.9")
OURS: dict[str, Callable[..., Any]] = {
    row.name: row.bound(getattr(helper, row.name), REPORT) for row in rollout.REPLACEMENTS
}
CORRECTION = "compute_rollout_correction_and_rejection_mask"
#: What is under "rollout_corr/" and is E[x^2] - E[x]^2 in verl, whose float32 leaves three digits of a small one.
ROUGH = ("_std",)


def inputs(spread: float = 0.3, mask_dtype: torch.dtype = torch.bool) -> tuple[Tensor, Tensor, Tensor]:
    """(trainer's log-probs, the engine's, mask): ragged rows, a hole, and a row of which nothing counts."""
    g = torch.Generator().manual_seed(int(10 * spread))
    engine = -torch.rand(B, T, generator=g) * 3
    trainer = engine + spread * torch.randn(B, T, generator=g)
    mask = torch.arange(T) < torch.tensor([T, 1, 9, 0, T - 1, 5, 12, 20]).unsqueeze(-1)
    mask[4, 3:6] = False
    return trainer, engine, mask.to(mask_dtype)


def assert_same(found: Any, given: tuple[Tensor, Tensor, Tensor], **options: Any) -> None:
    """As verl's own in float32, masks bit for bit, and its metrics as in float64."""
    proto, mask, metrics = found
    expected, kept, theirs = getattr(helper, CORRECTION)(*given, **options)
    exact = getattr(helper, CORRECTION)(given[0].double(), given[1].double(), given[2], **options)[2]
    assert mask.dtype == kept.dtype
    assert torch.equal(mask, kept)
    assert (proto is None) == (expected is None)
    if proto is not None:
        weights, others = (x.batch["rollout_is_weights"] for x in (proto, expected))
        assert weights.dtype == others.dtype
        torch.testing.assert_close(weights, others, rtol=2e-6, atol=1e-7)
        assert not weights.requires_grad
    assert set(metrics) == set(theirs)
    for name, value in metrics.items():
        assert type(value) is type(theirs[name])
        assert math.isclose(value, exact[name], rel_tol=5e-6, abs_tol=1e-6), name
        if not name.endswith(ROUGH):
            assert math.isclose(value, theirs[name], rel_tol=2e-5, abs_tol=1e-6), name


@pytest.fixture
def served() -> Iterator[None]:
    """A call that ours hands on is a failure."""
    before = REPORT.total.handed_on
    yield
    assert REPORT.total.handed_on == before


@pytest.mark.parametrize("spread", [0.05, 0.3, 1.5])
@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("threshold", [2.0, "1.5", "0.5_5.0"])
@pytest.mark.parametrize("normalize", [False, True])
def test_weights(level: str, threshold: Any, normalize: bool, spread: float, served: None) -> None:
    given = inputs(spread)
    options = {"rollout_is": level, "rollout_is_threshold": threshold, "rollout_is_batch_normalize": normalize}
    assert_same(OURS[CORRECTION](*given, **options), given, **options)


@pytest.mark.parametrize("spread", [0.05, 0.3, 1.5])
@pytest.mark.parametrize("option", sorted(helper.SUPPORTED_ROLLOUT_RS_OPTIONS))
def test_rejection(option: str, spread: float, served: None) -> None:
    given = inputs(spread)
    options = {"rollout_rs": option, "rollout_rs_threshold": "0.8_1.3" if option.endswith("k1") else 0.1}
    assert_same(OURS[CORRECTION](*given, **options), given, **options)


@pytest.mark.parametrize("mask_dtype", [torch.bool, torch.int64, torch.float32])
def test_weights_and_several_criteria_at_once(mask_dtype: torch.dtype, served: None) -> None:
    given = inputs(0.3, mask_dtype)
    options = {
        "rollout_is": "sequence",
        "rollout_is_threshold": 3.0,
        "rollout_rs": "token_k1, seq_mean_k3,seq_max_k2,token_k1",
        "rollout_rs_threshold": "0.6_1.6,0.08,0.5",
    }
    found = OURS[CORRECTION](*given, **options)
    assert 0 < found[1].sum() < given[2].sum()
    assert_same(found, given, **options)
    shared = options | {"rollout_rs": "token_k2,seq_mean_k3", "rollout_rs_threshold": 0.2}
    assert_same(OURS[CORRECTION](*given, **shared), given, **shared)


@pytest.mark.parametrize("shift", [30.0, -30.0])
def test_extreme_ratios(shift: float, served: None) -> None:
    trainer, engine, mask = inputs()
    trainer = trainer + torch.where(torch.arange(T) % 5 == 2, shift, 0.0)
    options = {"rollout_is": "token", "rollout_rs": "seq_mean_k1,token_k2", "rollout_rs_threshold": "0.9_1.1,3.0"}
    found = OURS[CORRECTION](trainer, engine, mask, **options)
    expected, kept, theirs = getattr(helper, CORRECTION)(trainer, engine, mask, **options)
    assert torch.equal(found[1], kept)
    torch.testing.assert_close(found[0].batch["rollout_is_weights"], expected.batch["rollout_is_weights"])
    for name, value in found[2].items():
        assert name.endswith(ROUGH) or math.isclose(value, theirs[name], rel_tol=2e-5, abs_tol=1e-6), name


def test_metrics_alone(served: None) -> None:
    given = inputs()
    assert_same(OURS[CORRECTION](*given), given)
    found, theirs = (f(*given) for f in (OURS["compute_offpolicy_metrics"], helper.compute_offpolicy_metrics))
    assert set(found) == set(theirs)
    assert found == pytest.approx(theirs, rel=2e-5, abs=1e-6)


def test_the_mask_is_a_copy_and_the_gradient_stops(served: None) -> None:
    trainer, engine, mask = inputs()
    trainer.requires_grad_()
    proto, kept, _ = OURS[CORRECTION](trainer, engine, mask, "token")
    assert torch.equal(kept, mask)
    assert kept.data_ptr() != mask.data_ptr()
    assert not proto.batch["rollout_is_weights"].requires_grad


def test_what_lies_under_the_mask_leaks_nowhere(served: None) -> None:
    trainer, engine, mask = inputs()
    options = {"rollout_is": "token", "rollout_rs": "seq_sum_k3", "rollout_rs_threshold": 0.5}
    clean = OURS[CORRECTION](trainer, engine, mask, **options)
    dirty = OURS[CORRECTION](*(torch.where(mask, x, math.nan) for x in (trainer, engine)), mask, **options)
    assert torch.equal(clean[1], dirty[1])
    assert torch.equal(*(x[0].batch["rollout_is_weights"] for x in (clean, dirty)))
    assert clean[2] == dirty[2]


# ------------------------------------------------------------------------------------------------- what verl is left
@pytest.mark.parametrize(
    ("change", "options", "error"),
    [
        (lambda x: x.double(), {"rollout_is": "token"}, None),
        (lambda x: x.bfloat16(), {"rollout_is": "token"}, None),
        (lambda x: x, {"rollout_is": "geometric"}, "Invalid rollout_is"),
        (lambda x: x, {"rollout_is": "token", "rollout_is_threshold": "-1"}, "must be positive"),
        (lambda x: x, {"rollout_rs": "token_k9", "rollout_rs_threshold": 1.0}, "Invalid rollout_rs option"),
        (lambda x: x, {"rollout_rs": "token_k1"}, "must be explicitly provided"),
        (lambda x: x, {"rollout_rs": ",", "rollout_rs_threshold": 1.0}, "at least one valid option"),
    ],
)
def test_what_ours_does_not_take_is_verls(change: Any, options: Any, error: str | None) -> None:
    before = REPORT.total.handed_on
    trainer, engine, mask = inputs()
    given = change(trainer), change(engine), mask
    if error is None:
        found, expected = (f(*given, **options) for f in (OURS[CORRECTION], getattr(helper, CORRECTION)))
        assert found[2] == expected[2]
        assert torch.equal(*(x[0].batch["rollout_is_weights"] for x in (found, expected)))
    else:
        with pytest.raises(ValueError, match=error):
            OURS[CORRECTION](*given, **options)
    assert REPORT.total.handed_on == before + (error is None)


def test_a_batch_of_which_nothing_counts_is_verls_to_refuse() -> None:
    trainer, engine, mask = inputs()
    with pytest.raises(ValueError, match="at least one valid token"):
        OURS[CORRECTION](trainer, engine, torch.zeros_like(mask))
    with pytest.raises(AssertionError, match="at least one valid token"):
        OURS["compute_offpolicy_metrics"](trainer, engine, torch.zeros_like(mask))


# ---------------------------------------------------------------------------------------------------- where it is bound
def test_a_batch_is_corrected_through_ours() -> None:
    config = importlib.import_module("verl.trainer.config.algorithm").RolloutCorrectionConfig
    trainer, engine, mask = inputs(0.3, torch.int64)
    settings = config(
        rollout_is="sequence", rollout_is_threshold=2.0, rollout_rs="seq_mean_k1", rollout_rs_threshold="0.9_1.1"
    )
    results = []
    for patched in (False, True):
        report = fastreward.patch.verl() if patched else None
        tensors = {"old_log_probs": trainer, "rollout_log_probs": engine, "response_mask": mask}
        batch = protocol.DataProto.from_dict(tensors=dict(tensors))
        results.append(helper.compute_rollout_correction_and_add_to_batch(batch, settings))
        results.append(helper.compute_rollout_corr_metrics_from_logprobs(trainer, engine, mask))
    fastreward.patch.undo("verl")
    (theirs, metrics), alone, (ours, found), found_alone = results
    assert torch.equal(ours.batch["response_mask"], theirs.batch["response_mask"])
    torch.testing.assert_close(ours.batch["rollout_is_weights"], theirs.batch["rollout_is_weights"], rtol=2e-6, atol=0)
    rough = {name for name in metrics if name.endswith(ROUGH)}
    assert set(found) == set(metrics)
    assert {k: v for k, v in found.items() if k not in rough} == pytest.approx(
        {k: v for k, v in metrics.items() if k not in rough}, rel=2e-5, abs=1e-6
    )
    assert found_alone == pytest.approx(alone, rel=2e-5, abs=1e-6)
    assert report is not None
    assert report.usage[f"{rollout.HELPER}.{CORRECTION}"].calls == 1
    assert report.usage[f"{rollout.HELPER}.compute_offpolicy_metrics"].calls == 1

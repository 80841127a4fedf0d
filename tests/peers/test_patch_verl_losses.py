"""verl's policy losses, aggregation and value loss, patched, beside verl's own: values, gradients and metrics."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from verl_stock import recognised

import fastreward
from fastreward.patch.bindings import Report
from fastreward.patch.verl import aggregation, losses

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]

pytest.importorskip("verl", reason="verl is not installed (`make test` installs it)", exc_type=ImportError)
core = importlib.import_module("verl.trainer.ppo.core_algos")
configs = importlib.import_module("verl.workers.config")

B, T = 7, 23
WIDE = (0.3, 1.5, 25.0)  # spread of the log-ratios: inside the clip, well outside, outside the clamp of +-20
MODES = ("token-mean", "token-sum", "seq-mean-token-sum", "seq-mean-token-sum-norm", "seq-mean-token-mean")
#: What a trainer hands to agg_loss: nothing, or the numbers of the whole batch.
BATCHES: tuple[dict[str, Any], ...] = (
    {},
    {"dp_size": 2, "batch_num_tokens": 310, "global_batch_size": 24, "loss_scale_factor": None},
    {"dp_size": 1, "batch_num_tokens": None, "global_batch_size": None, "loss_scale_factor": 512},
    {"dp_size": 4, "batch_num_tokens": torch.tensor(400), "global_batch_size": 32, "loss_scale_factor": 100},
)
REPORT = Report("verl", "0.9")
OURS: dict[str, Callable[..., Any]] = {
    row.name: row.bound(getattr(core, row.name), REPORT)
    for row in (*losses.REPLACEMENTS, *aggregation.REPLACEMENTS)
    if recognised(row, core)
}
LOSSES = sorted(name for name in OURS if name.startswith("compute_policy_loss"))
OPTIONS: dict[str, dict[str, Any]] = {
    "compute_policy_loss_vanilla": {"clip_ratio_low": 0.2, "clip_ratio_high": 0.28, "clip_ratio_c": 3.0},
    "compute_policy_loss_dppo_tv": {"clip_ratio_low": 0.1, "clip_ratio_high": 0.15, "clip_ratio_c": 5.0},
    "compute_policy_loss_dppo_kl": {"clip_ratio_low": 0.02, "clip_ratio_high": 0.05, "clip_ratio_c": 5.0},
    "compute_policy_loss_gspo": {"clip_ratio_low": 0.05, "clip_ratio_high": 0.08},
    "compute_policy_loss_sapo": {"tau_pos": 1.0, "tau_neg": 1.3},
    "compute_policy_loss_kl_cov": {"kl_cov_ratio": 0.2, "ppo_kl_coef": 0.5},
    "compute_policy_loss_geo_mean": {"clip_ratio_low": 0.4, "clip_ratio_high": 0.3},
    "compute_policy_loss_dro": {"dro_beta": 0.3},
    "compute_policy_loss_cispo": {"clip_ratio_low": 0.3, "clip_ratio_high": 0.6},
}


def config(batch: dict[str, Any] | None = None, **options: Any) -> Any:
    names = ("clip_cov", "kl_cov", "ppo_kl", "dro", "rollout_correction")
    own = {k: options.pop(k) for k in list(options) if k.startswith(names)}
    made = configs.ActorConfig(
        strategy="fsdp",
        rollout_n=1,
        ppo_micro_batch_size_per_gpu=1,
        policy_loss=configs.PolicyLossConfig(**own),
        **options,
    )
    made.global_batch_info.update(batch or {})
    return made


def inputs(spread: float = 0.3, *, dtype: torch.dtype = torch.float32, seed: int = 0) -> dict[str, Tensor]:
    """Ragged rows with a hole in one, a row of which nothing counts, an advantage of 0."""
    g = torch.Generator().manual_seed(seed)
    old = -torch.rand(B, T, generator=g) * 3
    new = old + spread * torch.randn(B, T, generator=g)
    # A policy's log-probs are below 0, so that the log-ratio's upper end needs a far lower old one.
    old, new = old - (new.clamp(min=0)), -new.abs()
    advantages = torch.randn(B, 1, generator=g).expand(B, T).clone()
    advantages[2] = 0.0
    advantages += 0.1 * torch.randn(B, T, generator=g) * (torch.arange(B) != 2).unsqueeze(-1)
    mask = torch.arange(T) < torch.tensor([T, 1, 9, 0, T - 1, 5, 12]).unsqueeze(-1)
    mask[4, 3:6] = False
    given = {"old": old, "new": new, "advantages": advantages, "weights": torch.rand(B, T, generator=g) + 0.5}
    return {name: x.to(dtype) for name, x in given.items()} | {"mask": mask}


def run(
    function: Callable[..., Any], given: dict[str, Tensor], mode: str, settings: Any, weights: Tensor | None
) -> tuple[Tensor, dict[str, Any], Tensor]:
    """(loss, metrics, gradient for the log-probs under an upstream gradient of 1.7)."""
    leaf = given["new"].clone().requires_grad_()
    loss, metrics = function(given["old"], leaf, given["advantages"], given["mask"], mode, settings, weights)
    return loss, metrics, torch.autograd.grad(1.7 * loss, leaf)[0]


def assert_same(ours: Any, theirs: Any, *, rtol: float = 1e-6, atol: float = 5e-7) -> None:
    loss, metrics, gradient = ours
    assert loss.dtype == theirs[0].dtype
    assert loss.shape == theirs[0].shape == ()
    torch.testing.assert_close(loss, theirs[0], rtol=rtol, atol=atol)
    assert {k: type(v) for k, v in metrics.items()} == {k: type(v) for k, v in theirs[1].items()}
    assert list(metrics) == list(theirs[1])
    for name, value in metrics.items():
        assert math.isclose(value, theirs[1][name], rel_tol=rtol, abs_tol=atol), name
    scale = float(theirs[2].abs().max())
    assert scale > 0, "a comparison of nothing"
    torch.testing.assert_close(gradient / scale, theirs[2] / scale, rtol=10 * rtol, atol=rtol)


@pytest.fixture
def served() -> Iterator[None]:
    """A call that ours hands on is a failure."""
    before = REPORT.total.handed_on
    yield
    assert REPORT.total.handed_on == before


@pytest.mark.parametrize("spread", WIDE)
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("name", LOSSES)
def test_policy_losses(name: str, spread: float, weighted: bool, served: None) -> None:
    given = inputs(spread)
    settings = config(BATCHES[1], **OPTIONS.get(name, {}))
    weights = given["weights"] if weighted else None
    ours, theirs = (run(f, given, "token-mean", settings, weights) for f in (OURS[name], getattr(core, name)))
    assert_same(ours, theirs)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("batch", range(len(BATCHES)))
@pytest.mark.parametrize("name", ["compute_policy_loss_vanilla", "compute_policy_loss_geo_mean"])
def test_aggregations_of_policy_losses(name: str, mode: str, batch: int, served: None) -> None:
    given, settings = inputs(), config(BATCHES[batch])
    ours, theirs = (run(f, given, mode, settings, given["weights"]) for f in (OURS[name], getattr(core, name)))
    assert_same(ours, theirs)


@pytest.mark.parametrize("name", LOSSES)
def test_the_default_aggregation_and_keywords_are_verls(name: str, served: None) -> None:
    given, first = inputs(), "rollout_log_prob" if name.endswith("reinforce") else "old_log_prob"
    settings = config(**OPTIONS.get(name, {}))
    named = {
        first: given["old"],
        "log_prob": given["new"],
        "advantages": given["advantages"],
        "response_mask": given["mask"],
        "config": settings,
    }
    (loss, metrics), (expected, others) = OURS[name](**named), getattr(core, name)(**named)
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=5e-7)
    assert metrics == pytest.approx(others, rel=1e-6, abs=1e-7)


@pytest.mark.parametrize("mask_dtype", [torch.bool, torch.int64, torch.float32])
@pytest.mark.parametrize("name", sorted({"compute_policy_loss_vanilla", "compute_policy_loss_gspo"} & OURS.keys()))
def test_masks_of_any_dtype(name: str, mask_dtype: torch.dtype, served: None) -> None:
    given = inputs()
    given["mask"] = given["mask"].to(mask_dtype)
    ours, theirs = (run(f, given, "token-mean", config(), None) for f in (OURS[name], getattr(core, name)))
    assert_same(ours, theirs)


@pytest.mark.parametrize("name", LOSSES)
def test_bfloat16_is_no_further_from_the_truth_than_verl(name: str, served: None) -> None:
    given, settings = inputs(0.3, dtype=torch.bfloat16), config(**OPTIONS.get(name, {}))
    exact = {k: x if x.dtype == torch.bool else x.double() for k, x in given.items()}
    truth = run(getattr(core, name), exact, "token-mean", settings, exact["weights"])
    runs = [run(f, given, "token-mean", settings, given["weights"]) for f in (OURS[name], getattr(core, name))]
    assert runs[0][0].dtype == runs[1][0].dtype
    off, theirs = (abs(float(loss) - float(truth[0])) for loss, *_ in runs)
    assert off <= theirs + 0.004 * abs(float(truth[0]))
    off, theirs = (float((g.double() - truth[2]).abs().max()) for *_, g in runs)
    assert off <= theirs + 0.004 * float(truth[2].abs().max())


@pytest.mark.parametrize("name", LOSSES)
def test_what_lies_under_the_mask_leaks_nowhere(name: str, served: None) -> None:
    given, settings = inputs(), config(**OPTIONS.get(name, {}))
    clean = run(OURS[name], given, "token-mean", settings, given["weights"])
    dirty = {k: x if k == "mask" else torch.where(given["mask"], x, math.nan) for k, x in given.items()}
    found = run(OURS[name], dirty, "token-mean", settings, dirty["weights"])
    assert found[1] == clean[1]
    assert torch.equal(found[0], clean[0])
    assert torch.equal(found[2], clean[2])


@pytest.mark.parametrize("batch", [0, 1])
@pytest.mark.parametrize("name", LOSSES)
def test_a_micro_batch_of_which_nothing_counts(name: str, batch: int, served: None) -> None:
    given, settings = inputs(), config(BATCHES[batch], **OPTIONS.get(name, {}))
    given["mask"] = torch.zeros_like(given["mask"])
    for mode in ("token-mean", "seq-mean-token-mean"):
        (loss, metrics, _), (theirs, others, _) = (
            run(f, given, mode, settings, None) for f in (OURS[name], getattr(core, name))
        )
        torch.testing.assert_close(loss, theirs, equal_nan=True)
        assert metrics == others


def test_verls_in_place_sum_of_losses_keeps_the_gradient(served: None) -> None:
    # ppo_loss subtracts the entropy bonus from the loss in place.
    given, gradients = inputs(), []
    for function in (OURS["compute_policy_loss_vanilla"], core.compute_policy_loss_vanilla):
        leaf = given["new"].clone().requires_grad_()
        loss, _ = function(given["old"], leaf, given["advantages"], given["mask"], "token-mean", config())
        loss -= 0.1 * leaf.square().mean()
        loss += 0.5 * leaf.mean()
        gradients.append(torch.autograd.grad(loss, leaf)[0])
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-7)


# ------------------------------------------------------------------------------------------------- what verl is left
@pytest.mark.parametrize(
    "change",
    [
        lambda given: given | {"new": given["new"].double()},
        lambda given: given | {"mask": given["mask"] * 0.5},
        lambda given: given | {"advantages": given["advantages"][:, :1]},
        lambda given: given | {"advantages": given["advantages"].requires_grad_()},
    ],
    ids=["float64", "a fractional mask", "broadcast advantages", "advantages with a gradient"],
)
def test_what_ours_does_not_take_is_verls(change: Any) -> None:
    given, before = change(inputs()), REPORT.total.handed_on
    name = "compute_policy_loss_vanilla"
    ours, theirs = (run(f, given, "token-mean", config(), None) for f in (OURS[name], getattr(core, name)))
    torch.testing.assert_close(ours[0], theirs[0], rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(ours[2], theirs[2], rtol=0, atol=0, equal_nan=True)
    assert REPORT.total.handed_on == before + 1


@pytest.mark.parametrize("name", [*LOSSES, "agg_loss", "compute_value_loss"])
def test_a_nan_that_counts_gives_verls_nan_and_is_told_once(name: str) -> None:
    """verl goes on or skips the step; the warning says where the NaN is."""
    given, settings = inputs(), config(**OPTIONS.get(name, {}))
    given["new"][0, 2] = math.nan
    REPORT.refusals.discard(f"{losses.CORE}.{name}")

    def call(function: Callable[..., Any]) -> tuple[Tensor, Any, Tensor]:
        if name.startswith("compute_policy_loss"):
            return run(function, given, "token-mean", settings, None)
        leaf = given["new"].clone().requires_grad_()
        others = () if name == "agg_loss" else (given["advantages"], given["old"])
        rest = (given["mask"], "token-mean") if name == "agg_loss" else (given["mask"], 0.2)
        found = function(leaf, *others, *rest)
        loss, share = (found, {}) if name == "agg_loss" else (found[0], {"share": float(found[1])})
        return loss, share, torch.autograd.grad(1.7 * loss, leaf)[0]

    expected = call(getattr(core, name))
    with pytest.warns(RuntimeWarning, match=rf"{name} went on to verl's own code.*mask is set.*nan at index \[0, 2\]"):
        found = call(OURS[name])
    again = call(OURS[name])  # a second warning would be an error
    assert found[0].isnan()
    for ours in (found, again):
        torch.testing.assert_close(ours, expected, rtol=0, atol=0, equal_nan=True)


def test_what_verl_refuses_is_refused_by_verl() -> None:
    given, warned = inputs(), set(REPORT.refusals)
    arguments = (given["old"], given["new"], given["advantages"], given["mask"])
    with pytest.raises(AssertionError):
        OURS["compute_policy_loss_vanilla"](*arguments, "token-mean", None)
    with pytest.raises(AssertionError, match="should be greater than 1"):
        OURS["compute_policy_loss_vanilla"](*arguments, "token-mean", config(clip_ratio_c=0.5))
    with pytest.raises(ValueError, match="must be a positive value"):
        OURS["compute_policy_loss_dro"](*arguments, "token-mean", config())
    with pytest.raises(ValueError, match="batch_num_tokens is required"):
        OURS["agg_loss"](given["new"], given["mask"], "token-mean", dp_size=2)
    with pytest.raises(ValueError, match="Invalid loss_agg_mode"):
        OURS["agg_loss"](given["new"], given["mask"], "sum of squares")
    assert warned == REPORT.refusals


@pytest.mark.parametrize(
    ("width", "mode", "options"),
    [
        (0, "seq-mean-token-sum-norm", {}),
        (T, "seq-mean-token-sum-norm", {"loss_scale_factor": 0}),
        (T, "token-sum", {"dp_size": 0}),
        (T, "token-mean", {"dp_size": 0}),
        (T, "token-mean", {"dp_size": 0, "batch_num_tokens": 7}),
        (T, "token-mean", {"batch_num_tokens": 0}),
    ],
)
def test_what_verl_multiplies_or_divides_by_zero_is_verls(width: int, mode: str, options: dict[str, Any]) -> None:
    given = inputs()
    matrix, mask = given["new"][:, :width], given["mask"][:, :width]
    expected = core.agg_loss(matrix, mask, mode, **options)
    torch.testing.assert_close(OURS["agg_loss"](matrix, mask, mode, **options), expected, equal_nan=True)


# ------------------------------------------------------------------------------------ aggregation, value and entropy
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("batch", range(len(BATCHES)))
def test_agg_loss(mode: str, batch: int, served: None) -> None:
    given, results = inputs(), []
    for function in (OURS["agg_loss"], core.agg_loss):
        leaf = given["new"].clone().requires_grad_()
        loss = function(loss_mat=leaf, loss_mask=given["mask"], loss_agg_mode=mode, **BATCHES[batch])
        results.append((loss, torch.autograd.grad(-0.3 * loss, leaf)[0]))
    torch.testing.assert_close(results[0], results[1], rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("mode", MODES)
def test_agg_loss_of_half_precision(mode: str, served: None) -> None:
    given = inputs(dtype=torch.bfloat16)
    found, expected = (f(given["new"], given["mask"], mode) for f in (OURS["agg_loss"], core.agg_loss))
    truth = core.agg_loss(given["new"].double(), given["mask"], mode)
    assert found.dtype == expected.dtype
    assert abs(found.double() - truth) <= abs(expected.double() - truth) + 1e-6


def test_agg_loss_of_a_published_case(served: None) -> None:
    loss = torch.tensor([[1.0, 2.0, math.nan], [1.0, 0.0, 0.0]])
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    found = [OURS["agg_loss"](loss, mask, mode).item() for mode in MODES]
    assert found == pytest.approx([4 / 3, 4.0, 2.0, 2 / 3, 1.25])


def test_agg_loss_of_nothing_is_verls_nan_or_0(served: None) -> None:
    loss, mask = torch.ones(2, 3), torch.zeros(2, 3, dtype=torch.bool)
    for mode in MODES:
        for batch in BATCHES[:2]:
            found, expected = (f(loss, mask, mode, **batch) for f in (OURS["agg_loss"], core.agg_loss))
            torch.testing.assert_close(found, expected, equal_nan=True)


@pytest.mark.parametrize("clip", [0.1, 0.5])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("batch", range(len(BATCHES)))
def test_value_loss(mode: str, batch: int, clip: float, served: None) -> None:
    given, results = inputs(), []
    returns, old = given["advantages"] + given["old"], given["old"]
    for function in (OURS["compute_value_loss"], core.compute_value_loss):
        leaf = given["new"].clone().requires_grad_()
        loss, share = function(
            vpreds=leaf,
            values=old,
            returns=returns,
            response_mask=given["mask"],
            cliprange_value=clip,
            loss_agg_mode=mode,
            **BATCHES[batch],
        )
        results.append((loss, share, torch.autograd.grad(2.5 * loss, leaf)[0]))
    assert 0 < results[1][1] < 1
    torch.testing.assert_close(results[0], results[1], rtol=2e-6, atol=1e-7)


def test_value_loss_without_a_clip_range_is_verls() -> None:
    given, before = inputs(), REPORT.total.handed_on
    arguments = (given["new"], given["advantages"], given["old"], given["mask"], 0.0)
    REPORT.refusals.discard(f"{losses.CORE}.compute_value_loss")
    with pytest.warns(RuntimeWarning, match="clip: expected a positive number"):
        found = OURS["compute_value_loss"](*arguments)
    assert all(map(torch.equal, found, core.compute_value_loss(*arguments)))
    assert REPORT.total.handed_on == before + 1


# ---------------------------------------------------------------------------------------------------- where it is bound
def test_the_registry_and_bypass_mode_call_ours() -> None:
    rollout_correction = importlib.import_module("verl.trainer.config.algorithm").RolloutCorrectionConfig
    given, results = inputs(), {}
    arguments = (given["old"], given["new"], given["advantages"], given["mask"], "token-mean")
    for patched in (False, True):
        report = fastreward.patch.verl() if patched else None
        for kind in ("ppo_clip", "reinforce"):
            options = {"rollout_is": "token", "rollout_is_threshold": 1.5, "loss_type": kind}
            settings = config(rollout_correction=rollout_correction(**options))
            results[patched, kind] = core.get_policy_loss_fn("bypass_mode")(*arguments, settings)
        results[patched, "vanilla"] = core.get_policy_loss_fn("vanilla")(*arguments, config(), given["weights"])
    assert report is not None
    fastreward.patch.undo("verl")
    for kind in ("ppo_clip", "reinforce", "vanilla"):
        (loss, metrics), (expected, others) = results[True, kind], results[False, kind]
        torch.testing.assert_close(loss, expected, rtol=1e-6, atol=5e-7)
        assert metrics == pytest.approx(others, rel=1e-5, abs=1e-5)
    assert report.usage[f"{losses.CORE}.compute_policy_loss_vanilla"].calls == 2
    assert report.usage[f"{losses.CORE}.compute_policy_loss_reinforce"].calls == 1


def test_the_actors_loss_is_made_of_ours() -> None:
    """verl's ppo_loss on a batch of nested tensors: policy loss, entropy bonus and KL, added up in place."""
    glue = importlib.import_module("verl.workers.utils.losses")
    tensordicts = importlib.import_module("verl.utils.tensordict_utils")
    given, lengths, results = inputs(), [T, 1, 9, 2, T - 1, 5, 12], []

    def nested(x: Tensor) -> Tensor:
        return torch.nested.nested_tensor([x[k, :n] for k, n in enumerate(lengths)], layout=torch.jagged)

    tensors = {
        "old_log_probs": nested(given["old"]),
        "advantages": nested(given["advantages"]),
        "rollout_is_weights": nested(given["weights"]),
        "ref_log_prob": nested(given["old"] - 0.1),
        "response_mask": nested(given["mask"].long()),
        "responses": nested(torch.zeros(B, T, dtype=torch.long)),
        "prompts": torch.nested.nested_tensor([torch.zeros(2, dtype=torch.long)] * B, layout=torch.jagged),
    }
    # Of prompt and response together: a token predicts the next one, so one value stands before the response's.
    edge = torch.zeros(1)
    packed = torch.cat([x for k, n in enumerate(lengths) for x in (edge, given["new"][k, :n], edge)])
    for patched in (False, True):
        report = fastreward.patch.verl() if patched else None
        numbers = {"dp_size": 2, "batch_num_tokens": 90, "global_batch_size": 9}
        leaf = packed.clone().requires_grad_()
        outputs = {"log_probs": leaf, "entropy": torch.exp(-0.5 * leaf)}
        settings = config(use_kl_loss=True, entropy_coeff=0.01)
        loss, metrics = glue.ppo_loss(settings, outputs, tensordicts.get_tensordict(dict(tensors), numbers))
        logged = {name: float(getattr(x, "values", [x])[0]) for name, x in metrics.items()}
        results.append((loss.detach(), torch.autograd.grad(loss, leaf)[0], logged))
    fastreward.patch.undo("verl")
    torch.testing.assert_close(results[1][:2], results[0][:2], rtol=1e-5, atol=1e-6)
    assert results[1][2] == pytest.approx(results[0][2], rel=2e-6, abs=1e-7)
    assert report is not None
    assert report.usage[f"{losses.CORE}.compute_policy_loss_vanilla"].calls == 1
    assert report.usage[f"{losses.CORE}.agg_loss"].calls == 2

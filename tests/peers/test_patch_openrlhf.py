"""The OpenRLHF drop-in, function by function: each replacement beside OpenRLHF's own, values and gradients."""

from __future__ import annotations

import importlib
import math
import warnings
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from compat import largest
from openrlhf_whole import stand_ins
from torch import Tensor

pytest.importorskip("openrlhf")
pytest.importorskip("peft")
stand_ins()
# What transformers, peft and ray warn about on import is theirs.
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]

from fastreward import patch  # noqa: E402

UTILS, LOSS = "openrlhf.models.utils", "openrlhf.models.loss"
FUNCTIONS = ("log_probs_from_logits", "compute_entropy", "compute_approx_kl", "compute_reward", "masked_mean")
B, T = 7, 37


@pytest.fixture(scope="module")
def stock() -> Any:
    """OpenRLHF's own functions and forwards, by name."""
    patch.undo()
    utils, loss = importlib.import_module(UTILS), importlib.import_module(LOSS)
    forwards = {name: vars(getattr(loss, name))["forward"] for name in ("PolicyLoss", "ValueLoss")}
    functions = {name: getattr(utils, name) for name in FUNCTIONS}
    return SimpleNamespace(**functions, **forwards, aggregate_loss=loss.aggregate_loss)


@pytest.fixture(scope="module")
def patched(stock: Any) -> Iterator[Any]:
    """The same names with the patch in place."""
    report = patch.openrlhf()
    utils, loss = importlib.import_module(UTILS), importlib.import_module(LOSS)
    found = {name: getattr(utils, name) for name in FUNCTIONS}
    assert all(found[name] is not getattr(stock, name) for name in FUNCTIONS)
    yield SimpleNamespace(**found, loss=loss, aggregate_loss=loss.aggregate_loss, report=report)
    patch.undo()


@pytest.fixture
def ours(patched: Any) -> Any:
    """With an account of this test's calls alone."""
    for usage in patched.report.usage.values():
        usage.calls = usage.handed_on = 0
    patched.report.refusals.clear()
    return patched


def served(ours: Any, target: str) -> bool:
    """Whether the one call since the patch was applied was fastreward's."""
    usage = ours.report.usage[target]
    assert usage.calls + usage.handed_on == 1, usage
    return bool(usage.calls == 1)


def batch(seed: int, mask: torch.dtype = torch.int64, spread: float = 0.4) -> Any:
    """Log-probs as an actor gives them, 0 under the mask, and what belongs to them."""
    g = torch.Generator().manual_seed(seed)

    def normal(scale: float = 1.0) -> Tensor:
        return scale * torch.randn(B, T, generator=g)

    m = (torch.rand(B, T, generator=g) < 0.7).to(mask)
    m[0] = 1
    lp = -3 * torch.rand(B, T, generator=g)
    old = lp + normal(spread)
    return SimpleNamespace(
        mask=m, lp=lp, old=old, ref=lp + normal(2 * spread), rollout=old + normal(spread), adv=normal(),
        values=normal(), old_values=normal(), returns=normal(), upstream=normal(),
        scores=2 * torch.randn(B, generator=g),
    )  # fmt: skip


def with_gradient(function: Callable[..., Any], x: Tensor, upstream: Tensor | None = None) -> list[Tensor | None]:
    """What a function of `x` returns, and the gradient through its first result."""
    x = x.clone().requires_grad_()
    result = function(x)
    results = result if isinstance(result, tuple) else (result,)
    (gradient,) = torch.autograd.grad(results[0], x, torch.ones(()) if upstream is None else upstream)
    return [*(None if r is None else r.detach() for r in results), gradient]


# ---- log-probs and entropy -------------------------------------------------------------------------------------------
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_log_probs(stock: Any, ours: Any, temperature: float, dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(0)
    logits, labels = (3 * torch.randn(B, T, 103, generator=g)).to(dtype), torch.randint(103, (B, T), generator=g)
    upstream = torch.randn(B, T, generator=g).to(dtype)

    def run(function: Any) -> list[Tensor | None]:
        # OpenRLHF divides in place, which a leaf does not allow
        return with_gradient(lambda x: function(x * 1, labels, temperature), logits, upstream)

    tolerance = 1e-6 if dtype == torch.float32 else 2e-2
    largest(f"{UTILS}.log_probs_from_logits", run(ours.log_probs_from_logits), run(stock.log_probs_from_logits),
            atol=tolerance, rtol=tolerance, what=str(dtype))  # fmt: skip
    assert served(ours, f"{UTILS}.log_probs_from_logits")
    assert ours.log_probs_from_logits(logits, labels).dtype == dtype


def test_logits_are_not_divided_in_place(stock: Any, ours: Any) -> None:
    logits, labels = torch.randn(2, 3, 11), torch.zeros(2, 3, dtype=torch.long)
    before = logits.clone()
    ours.log_probs_from_logits(logits, labels, 0.5)
    assert torch.equal(logits, before)
    stock.log_probs_from_logits(logits, labels, 0.5)
    assert torch.equal(logits, before / 0.5)


def test_entropy_beside_a_temperature_can_be_trained(stock: Any, ours: Any) -> None:
    """OpenRLHF's in-place division spoils what the entropy has saved for its backward; ours leaves it alone."""
    g = torch.Generator().manual_seed(1)
    weight, labels = torch.randn(B, T, 53, generator=g), torch.randint(53, (B, T), generator=g)

    def loss(functions: Any, x: Tensor, entropy: Any) -> Tensor:
        logits = x * 2.0
        bonus = entropy(logits)  # of the logits as they are
        return (functions.log_probs_from_logits(logits, labels, 0.7) - 0.1 * bonus).sum()

    eager = stock.compute_entropy._torchdynamo_orig_callable
    x = weight.clone().requires_grad_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss(stock, x, eager).backward()
    loss(ours, x, ours.compute_entropy).backward()
    y = weight.double().requires_grad_()
    rows = (2 * y).log_softmax(-1)
    entropy = -(rows.exp() * rows).sum(-1)
    picked = (2 * y / 0.7).log_softmax(-1).gather(-1, labels.unsqueeze(-1)).squeeze(-1)
    (want,) = torch.autograd.grad((picked - 0.1 * entropy).sum(), y)
    torch.testing.assert_close(x.grad, want.float(), atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_entropy(stock: Any, ours: Any, dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(2)
    logits, upstream = (3 * torch.randn(B, T, 103, generator=g)).to(dtype), torch.randn(B, T, generator=g).to(dtype)
    eager = stock.compute_entropy._torchdynamo_orig_callable  # what it compiles, which takes seconds
    mine = with_gradient(ours.compute_entropy, logits, upstream)
    assert served(ours, f"{UTILS}.compute_entropy")
    theirs = with_gradient(lambda x: eager(x.float()).to(dtype), logits, upstream)
    tolerance = 5e-6 if dtype == torch.float32 else 1e-2  # logsumexp less a mean of the same size
    largest(f"{UTILS}.compute_entropy", mine, theirs, atol=tolerance, rtol=tolerance, what=str(dtype))
    assert mine[0] is not None
    assert mine[0].dtype == dtype


def test_logits_that_are_not_taken_go_to_openrlhf(stock: Any, ours: Any) -> None:
    logits, labels = torch.randn(2, 3, 11, dtype=torch.float64), torch.zeros(2, 3, dtype=torch.long)
    assert torch.equal(ours.log_probs_from_logits(logits, labels), stock.log_probs_from_logits(logits, labels))
    assert not served(ours, f"{UTILS}.log_probs_from_logits")


# ---- KL and rewards --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("spread", [0.4, 6.0])
@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("unbiased", [False, True])
@pytest.mark.parametrize("kind", ["k1", "k2", "k3"])
def test_kl(stock: Any, ours: Any, kind: str, unbiased: bool, old: bool, spread: float) -> None:
    b = batch(3, spread=spread)

    def run(function: Any) -> list[Tensor | None]:
        kwargs = {"log_probs_old": b.old if old else None, "kl_estimator": kind, "unbiased_gradient": unbiased}
        return with_gradient(lambda x: function(x, b.ref, **kwargs), b.lp, b.upstream)

    mine, theirs = run(ours.compute_approx_kl), run(stock.compute_approx_kl)
    assert served(ours, f"{UTILS}.compute_approx_kl")
    # A straight-through value is v + s - s, which rounds at the size of s.
    largest(f"{UTILS}.compute_approx_kl", mine, theirs, atol=2e-4 if unbiased else 5e-6, rtol=5e-6, what=kind)
    if spread > 1:
        assert (theirs[0] == 10).any()  # type: ignore[union-attr]


@pytest.mark.parametrize("spread", [0.4, 6.0])
@pytest.mark.parametrize("kind", ["k1", "k2", "k3"])
def test_kl_without_gradient(stock: Any, ours: Any, kind: str, spread: float) -> None:
    b = batch(4, spread=spread)
    mine = ours.compute_approx_kl(b.lp, b.ref, kl_estimator=kind)
    assert served(ours, f"{UTILS}.compute_approx_kl")
    largest(f"{UTILS}.compute_approx_kl", mine, stock.compute_approx_kl(b.lp, b.ref, kl_estimator=kind), rtol=5e-6)


def test_kl_of_nan_and_of_another_name_is_openrlhfs(stock: Any, ours: Any) -> None:
    b = batch(4)
    b.lp[1, 2] = math.nan
    with pytest.warns(RuntimeWarning, match="compute_approx_kl went on to openrlhf's own code.*mask is set"):
        assert ours.compute_approx_kl(b.lp, b.ref).isnan().sum() == 1
    with pytest.raises(ValueError, match="Unknown kl_estimator"):
        ours.compute_approx_kl(b.lp, b.ref, kl_estimator="k4")
    usage = ours.report.usage[f"{UTILS}.compute_approx_kl"]
    assert (usage.calls, usage.handed_on) == (0, 1)  # the other has raised


@pytest.mark.parametrize("kl_coef", [0.0, -1.0, 0.3])
@pytest.mark.parametrize("bounds", [None, (-1.0, 0.5)])
@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float32])
def test_reward(stock: Any, ours: Any, kl_coef: float, bounds: Any, dtype: torch.dtype) -> None:
    b = batch(5, dtype)
    b.mask[2] = 0  # whose score is in the last column
    kl = b.lp - b.ref
    mine = ours.compute_reward(b.scores, kl_coef, kl, b.mask, bounds)
    assert served(ours, f"{UTILS}.compute_reward")
    largest(f"{UTILS}.compute_reward", mine, stock.compute_reward(b.scores, kl_coef, kl, b.mask, bounds))


def test_a_reward_of_nan_stays_nan(ours: Any) -> None:
    b = batch(5)
    b.scores[1] = math.nan
    assert ours.compute_reward(b.scores, 0.1, b.lp, b.mask).isnan().sum() == 1
    assert not served(ours, f"{UTILS}.compute_reward")


# ---- means and aggregation -------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float32])
def test_masked_mean(stock: Any, ours: Any, dtype: torch.dtype) -> None:
    b = batch(6, dtype)
    mine = with_gradient(lambda x: ours.masked_mean(x, b.mask), b.values)
    assert served(ours, f"{UTILS}.masked_mean")
    largest(f"{UTILS}.masked_mean", mine, with_gradient(lambda x: stock.masked_mean(x, b.mask), b.values))


@pytest.mark.filterwarnings("ignore:fastreward.patch. a call of:RuntimeWarning")  # NaN, as OpenRLHF gives it
@pytest.mark.parametrize("case", ["none", "rows", "weights", "empty", "bfloat16"])
def test_means_that_are_openrlhfs(stock: Any, ours: Any, case: str) -> None:
    b = batch(6)
    x = b.values.bfloat16() if case == "bfloat16" else b.values
    mask = {"none": None, "weights": b.mask * 2, "empty": b.mask * 0}.get(case, b.mask)
    dim = -1 if case == "rows" else None
    mine, theirs = ours.masked_mean(x, mask, dim), stock.masked_mean(x, mask, dim)
    torch.testing.assert_close(mine, theirs, rtol=0, atol=0, equal_nan=True)
    assert not served(ours, f"{UTILS}.masked_mean")


COUNTS: list[dict[str, Any]] = [
    {},
    {"dp_size": 4, "batch_num_tokens": 51.0, "global_batch_size": 3.0},
    {"dp_size": 2, "batch_num_tokens": torch.tensor(51.0), "global_batch_size": torch.tensor(3.0)},
]


@pytest.mark.parametrize("counts", COUNTS)
@pytest.mark.parametrize("token_level", [True, False])
def test_aggregate_loss(stock: Any, ours: Any, token_level: bool, counts: dict[str, Any]) -> None:
    b = batch(7)
    b.mask[3] = 0

    def run(function: Any) -> list[Tensor | None]:
        return with_gradient(lambda x: function(x, b.mask, token_level, **counts), b.values)

    mine = run(ours.aggregate_loss)
    assert served(ours, f"{LOSS}.aggregate_loss")
    largest(f"{LOSS}.aggregate_loss", mine, run(stock.aggregate_loss))


@pytest.mark.filterwarnings("ignore:fastreward.patch. a call of:RuntimeWarning")  # NaN, as OpenRLHF gives it
def test_a_batch_without_tokens(stock: Any, ours: Any) -> None:
    """With a global count it is 0; without one it is NaN, as OpenRLHF has it."""
    b = batch(7)
    nothing = b.mask * 0
    assert ours.aggregate_loss(b.values, nothing, batch_num_tokens=9.0) == 0
    assert served(ours, f"{LOSS}.aggregate_loss")
    assert ours.aggregate_loss(b.values, nothing).isnan()
    assert stock.aggregate_loss(b.values, nothing).isnan()


def test_sft_loss_is_served_by_its_aggregation(ours: Any) -> None:
    b = batch(8, torch.float32)
    loss = ours.loss.SFTLoss()(b.lp, b.mask, batch_num_tokens=51.0)
    assert served(ours, f"{LOSS}.aggregate_loss")
    torch.testing.assert_close(loss, -(b.lp * b.mask).sum() / 51)


# ---- losses ----------------------------------------------------------------------------------------------------------
POLICIES: list[dict[str, Any]] = [
    {},
    {"clip_eps_low": 0.1, "clip_eps_high": 0.3, "dual_clip": 1.4},
    {"token_level_loss": False},
    {"policy_loss_type": "gspo", "clip_eps_low": 0.05, "clip_eps_high": 0.08},
    {"policy_loss_type": "gspo", "is_correction_level": "token"},
    {"is_correction_level": "token", "is_correction_threshold": [0.7, 1.3]},
    {"is_correction_level": "token", "is_correction_mode": "clip", "is_correction_threshold": [0.7, 1.3]},
    {"is_correction_level": "seq", "is_correction_threshold": [0.95, 1.1], "dual_clip": 3.0},
    {"is_correction_level": "token", "is_correction_gating": "tv", "is_correction_threshold": [0.0, 0.1]},
    {"is_correction_level": "seq", "is_correction_gating": "tv", "is_correction_threshold": [0.0, 0.11]},
]


@pytest.mark.parametrize("spread", [0.4, 12.0])
@pytest.mark.parametrize("counts", COUNTS[::2])
@pytest.mark.parametrize("options", POLICIES, ids=lambda o: "-".join(map(str, o.values())) or "ppo")
def test_policy_loss(stock: Any, ours: Any, options: dict[str, Any], counts: dict[str, Any], spread: float) -> None:
    b = batch(9, spread=spread)
    b.mask[3] = 0
    module = ours.loss.PolicyLoss(**options)

    def run(function: Any) -> list[Tensor | None]:
        return with_gradient(lambda x: function(module, x, b.old, b.adv, b.mask, b.rollout, **counts), b.lp)

    mine, theirs = run(ours.loss.PolicyLoss.forward), run(stock.PolicyLoss)
    assert served(ours, f"{LOSS}.PolicyLoss.forward")
    largest(f"{LOSS}.PolicyLoss.forward", mine, theirs, rtol=1e-5, atol=1e-6, what=str(options))
    corrected = options.get("is_correction_level", "off") != "off" and "policy_loss_type" not in options
    assert (mine[3] is not None) == corrected
    if corrected and spread < 1:
        assert 0 < float(theirs[4]) < 1  # type: ignore[arg-type]


def test_what_lies_under_the_mask_of_a_policy_loss_is_not_read(ours: Any) -> None:
    b = batch(9)
    module = ours.loss.PolicyLoss()
    want = with_gradient(lambda x: module(x, b.old, b.adv, b.mask), b.lp)
    for x in (b.lp, b.old, b.adv):
        x[b.mask == 0] = math.nan
    got = with_gradient(lambda x: module(x, b.old, b.adv, b.mask), b.lp)
    assert [torch.equal(a, c) for a, c in zip(got, want, strict=True) if a is not None and c is not None] == [True] * 4


@pytest.mark.parametrize("name", ["PolicyLoss", "ValueLoss"])
def test_a_nan_that_counts_gives_openrlhfs_nan_and_is_told_once(stock: Any, ours: Any, name: str) -> None:
    b, module = batch(9), getattr(ours.loss, name)()
    x = b.lp if name == "PolicyLoss" else b.values
    x[tuple(b.mask.nonzero()[0])] = math.nan
    others = (b.old, b.adv) if name == "PolicyLoss" else (b.old_values, b.returns)

    def run(function: Any) -> list[Tensor | None]:
        return with_gradient(lambda y: function(module, y, *others, b.mask), x)

    forward = getattr(ours.loss, name).forward
    with pytest.warns(RuntimeWarning, match=f"{name}.forward went on to openrlhf's own code.*mask is set"):
        mine = run(forward)  # what OpenRLHF calls in its turn, and ours refuses too, would be another warning
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = run(forward)
    assert mine[0] is not None
    assert mine[0].isnan()
    with pytest.warns(RuntimeWarning, match="went on to openrlhf's own code"):  # of what it calls
        theirs = run(getattr(stock, name))
    for found in (mine, again):
        largest(f"{LOSS}.{name}.forward", found, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("case", ["binary_kl", "no mask", "weights", "bfloat16", "advantages with a gradient"])
def test_policy_losses_that_are_openrlhfs(stock: Any, ours: Any, case: str) -> None:
    b = batch(10)
    options = {"is_correction_gating": "binary_kl", "is_correction_level": "token", "is_correction_threshold": [0, 0.1]}
    module = ours.loss.PolicyLoss(**options) if case == "binary_kl" else ours.loss.PolicyLoss()
    mask = {"no mask": None, "weights": b.mask * 2}.get(case, b.mask)
    if case == "advantages with a gradient":
        b.adv.requires_grad_()
    lp = b.lp.bfloat16() if case == "bfloat16" else b.lp
    mine = module(lp, b.old, b.adv, mask, b.rollout)
    assert not served(ours, f"{LOSS}.PolicyLoss.forward")
    for x, y in zip(mine, stock.PolicyLoss(module, lp, b.old, b.adv, mask, b.rollout), strict=True):
        # masked_mean within it is ours, in another order
        assert (x is y is None) or torch.allclose(x, y, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("counts", COUNTS[::2])
@pytest.mark.parametrize("token_level", [True, False])
@pytest.mark.parametrize("clip", [None, 0.5])
def test_value_loss(stock: Any, ours: Any, clip: float | None, token_level: bool, counts: dict[str, Any]) -> None:
    b = batch(11)
    module = ours.loss.ValueLoss(clip, token_level)

    def run(function: Any) -> list[Tensor | None]:
        return with_gradient(lambda x: function(module, x, b.old_values, b.returns, b.mask, **counts), b.values)

    mine, theirs = run(ours.loss.ValueLoss.forward), run(stock.ValueLoss)
    assert served(ours, f"{LOSS}.ValueLoss.forward")
    largest(f"{LOSS}.ValueLoss.forward", mine, theirs, what=str(clip))

"""prime-rl's hook: called as it calls it, against its formulas in float64."""

from __future__ import annotations

import importlib
import math
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import prime_rl_formulas as formulas
import pytest
import torch
from compat import largest

from fastreward import patch
from fastreward.patch import hooks, prime_rl
from fastreward.recipes import RECIPES


@pytest.fixture(autouse=True)
def _no_account() -> Any:
    yield
    patch.undo()


def test_its_import_path_is_found() -> None:
    module, _, name = "fastreward.patch.prime_rl.loss".rpartition(".")
    assert getattr(importlib.import_module(module), name) is prime_rl.loss


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("default", {}),
        ("default", {"dppo_mask_low": 0.05, "dppo_mask_high": 0.1, "adv_tau": 0.5, "kl_tau": 0.3}),
        ("ipo", {"eps": 0.1}),
        ("ipo", {"kl_tau": 0.0, "adv_tau": 2.0}),
        ("icepop", {}),
        ("icepop", {"ratio_low": 0.9, "ratio_high": 1.3, "adv_tau": 0.7}),
    ],
)
def test_its_own_losses(kind: str, options: dict[str, float], weighted: bool) -> None:
    x = formulas.inputs(64, weighted=weighted)
    kwargs: dict[str, Any] = dict(options) if kind == "default" else {"loss": f"prime_rl.{kind}", **options}
    ours = prime_rl.loss(x, **kwargs)
    assert isinstance(ours, formulas.LossOutputs)  # prime-rl's own record, from beside its inputs
    assert ours.loss.shape == ()
    (2.0 * ours.loss).backward()
    logprobs = x.trainer_logprobs.detach().double().requires_grad_()
    expected, dropped = formulas.loss(x, kind, logprobs, **options)
    (2.0 * expected).backward()
    pair = [ours.loss, x.trainer_logprobs.grad, ours.metrics["is_masked"]], [expected, logprobs.grad, dropped]
    largest("prime-rl.loss", *pair, version=formulas.VERSION, rtol=2e-6, atol=2e-6)
    assert 0 < dropped < 1 or not options or "kl_tau" in options
    assert all(m.shape == () and not m.requires_grad for m in ours.metrics.values())


def test_what_lies_under_the_mask_never_matters() -> None:
    x = formulas.inputs(32)
    clean = prime_rl.loss(x)
    hidden = {
        name: torch.where(x.loss_mask, getattr(x, name).detach(), math.nan)
        for name in ("trainer_logprobs", "inference_logprobs", "advantages")
    }
    hidden["trainer_logprobs"].requires_grad_()
    dirty = prime_rl.loss(replace(x, **hidden))
    torch.testing.assert_close(dirty.loss, clean.loss)
    dirty.loss.backward()
    clean.loss.backward()
    assert torch.equal(hidden["trainer_logprobs"].grad, x.trainer_logprobs.grad)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["default", "ipo", "icepop"])
@pytest.mark.parametrize("name", ["trainer_logprobs", "inference_logprobs", "advantages"])
def test_a_nan_that_counts_gives_prime_rls_nan(name: str, kind: str) -> None:
    """The trainer sees a loss of NaN, as without us, and no exception; the gradient is NaN for that token alone."""
    x = formulas.inputs(32)
    first = int(x.loss_mask.nonzero()[0])
    with torch.no_grad():
        getattr(x, name)[first] = math.nan
    logprobs = x.trainer_logprobs.detach().double().requires_grad_()
    expected, _ = formulas.loss(x, kind, logprobs)
    expected.backward()
    ours = prime_rl.loss(x, loss=f"prime_rl.{kind}")
    ours.loss.backward()
    largest("prime-rl.loss", ours.loss, expected, version=formulas.VERSION)
    assert ours.loss.isnan()
    largest("prime-rl.loss", x.trainer_logprobs.grad, logprobs.grad, version=formulas.VERSION, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("tokens", [0, 5])
def test_a_sequence_without_a_counted_token_flows_zeros(tokens: int) -> None:
    x = formulas.inputs(tokens)
    x.loss_mask = torch.zeros(tokens, dtype=torch.bool)
    ours = prime_rl.loss(x)
    ours.loss.backward()
    assert ours.loss == 0
    assert x.trainer_logprobs.grad is not None
    assert not x.trainer_logprobs.grad.any()
    assert all(m == 0 for m in ours.metrics.values())  # it averages them over sequences


FIT = [
    name
    for name, r in RECIPES.items()
    if r.returns == "loss" and hooks.fits(r, dict.fromkeys(("logprobs", "old_logprobs", "advantages", "mask"), 1))
]  # fmt: skip


@pytest.mark.parametrize("name", FIT)
def test_every_recipe_that_fits_is_that_recipe(name: str) -> None:
    x = formulas.inputs(48)
    torch.manual_seed(1)  # clip_cov draws
    ours = prime_rl.loss(x, loss=name)
    torch.manual_seed(1)
    given = {"logprobs": x.trainer_logprobs, "old_logprobs": x.inference_logprobs, "advantages": x.advantages}
    rows = {key: value[None] for key, value in (given | {"mask": x.loss_mask}).items()}
    call = hooks.arguments("", RECIPES[name], rows, {})
    expected = RECIPES[name].function(**call, aggregation="token-sum", normalizer=1)
    (mine,) = torch.autograd.grad(ours.loss, x.trainer_logprobs)
    (theirs,) = torch.autograd.grad(expected.loss, x.trainer_logprobs)
    torch.testing.assert_close((ours.loss, mine), (expected.loss, theirs))


@pytest.mark.parametrize("name", ["ppo", "gmpo", "vespo", "dispo"])
def test_weights_scale_the_loss_of_a_recipe(name: str) -> None:
    x = formulas.inputs(48)
    plain = prime_rl.loss(x, loss=name).loss
    x.loss_weights = torch.full((48,), 0.25)
    torch.testing.assert_close(prime_rl.loss(x, loss=name).loss, 0.25 * plain)


def test_a_kl_to_the_reference_beside_a_recipe() -> None:
    x = formulas.inputs(48)
    plain, with_kl = prime_rl.loss(x, loss="ppo").loss, prime_rl.loss(x, loss="ppo", kl="k1", kl_coef=0.5).loss
    gap = (x.trainer_logprobs - x.ref_logprobs)[x.loss_mask].sum()
    torch.testing.assert_close(with_kl - plain, 0.5 * gap)
    x.ref_logprobs = None
    with pytest.raises(ValueError, match="expected ref_logprobs among the inputs, got None"):
        prime_rl.loss(x, loss="ppo", kl="k1", kl_coef=0.5)


def test_a_recipe_with_one_advantage_of_a_sequence() -> None:
    x = formulas.inputs(48)
    x.advantages = torch.where(x.loss_mask, -1.5, 0.0)  # prime-rl's are 0 where nothing was sampled
    assert prime_rl.loss(x, loss="deepseek_v3_2", threshold=-9.0).loss == 0
    torch.testing.assert_close(
        prime_rl.loss(x, loss="deepseek_v3_2", threshold=9.0).loss, prime_rl.loss(x, loss="ppo").loss
    )
    x.loss_mask = x.loss_mask.long()
    assert prime_rl.loss(x, loss="deepseek_v3_2", threshold=-9.0).loss == 0


@pytest.mark.parametrize(
    ("kwargs", "error", "words"),
    [
        ({"loss": "no_such"}, ValueError, "no such recipe"),
        ({"loss": "grpo"}, ValueError, "returns response advantages"),
        ({"loss": "dpo"}, ValueError, "dpo needs chosen_logprobs"),
        ({"loss": "ppo", "clip": 0.2}, TypeError, "clip"),
        ({"loss": "ppo", "aggregation": "token-mean"}, TypeError, "aggregation follow from prime-rl's"),
        ({"eps": 0.2}, TypeError, "eps"),
    ],
)
def test_what_does_not_fit_is_refused_with_the_reason(
    kwargs: dict[str, Any], error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        prime_rl.loss(formulas.inputs(8), **kwargs)


def test_records_of_another_kind_and_the_account() -> None:
    x = formulas.inputs(8)
    fields = ("trainer_logprobs", "inference_logprobs", "advantages", "loss_mask")
    plain = SimpleNamespace(**{name: getattr(x, name) for name in fields})
    assert isinstance(prime_rl.loss(plain), prime_rl.LossOutputs)
    assert patch.status()["prime-rl"].usage["prime-rl.loss"].tokens == 8

"""`patch.trl(losses=True)`: GRPO's and RLOO's loss, gradients and every metric are TRL's, option by option."""

from __future__ import annotations

import importlib
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from compat import largest
from trl_stand_ins import Accelerator, Batch, Outcome, TwoLikeThis, compute

pytest.importorskip("trl")
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]

from fastreward import patch  # noqa: E402

TARGET = "trl.trainer.{}_trainer.{}Trainer._compute_loss"
LOSS_TYPES = ("grpo", "bnpo", "dr_grpo", "dapo", "luspo", "cispo", "sapo", "vespo")
CLIPPED = LOSS_TYPES[:5]


@pytest.fixture(scope="module")
def grpo() -> Any:
    return importlib.import_module("trl.trainer.grpo_trainer").GRPOTrainer


@pytest.fixture(scope="module")
def rloo() -> Any:
    return importlib.import_module("trl.trainer.rloo_trainer").RLOOTrainer


@pytest.fixture(autouse=True)
def _unpatched() -> Iterator[None]:
    yield
    patch.undo()


def both(trainer: Any, batch: Batch, **options: Any) -> tuple[Outcome, Outcome]:
    """TRL's outcome and ours, through the method that the class has with and without the patch."""
    patch.undo()
    theirs = compute(trainer, trainer._compute_loss, batch, **options)
    patch.trl(losses=True)
    ours = compute(trainer, trainer._compute_loss, batch, **options)
    if trainer.__module__.startswith("trl."):
        name = trainer.__name__.removesuffix("Trainer")
        pair = [ours.loss, ours.gradients], [theirs.loss, theirs.gradients]
        largest(TARGET.format(name.lower(), name), *pair, rtol=1e-3, atol=1e-3)  # to be noted; assert_same is stricter
    return theirs, ours


def assert_same(theirs: Outcome, ours: Outcome, tolerance: float = 1e-6) -> None:
    torch.testing.assert_close(ours.loss, theirs.loss, rtol=tolerance, atol=tolerance)
    for a, b in zip(ours.gradients, theirs.gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=2 * tolerance, atol=tolerance * float(b.abs().max().clamp(min=1e-3)))
    assert list(ours.metrics) == list(theirs.metrics)
    for name, values in theirs.metrics.items():
        assert ours.metrics[name] == pytest.approx(values, rel=tolerance, abs=tolerance, nan_ok=True), name


def served(kind: str = "grpo") -> tuple[int, int]:
    """Calls that fastreward computed and calls that went to TRL."""
    usage = patch.status()["trl"].usage[TARGET.format(kind, kind.upper())]
    return usage.calls, usage.handed_on


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "kl": {"beta": 0.1},
    "corrected kl": {"beta": 0.1, "use_bias_correction_kl": True},
    "vllm": {"use_vllm": True, "beta": 0.05},
    "vllm without correction": {"use_vllm": True, "vllm_importance_sampling_correction": False},
    "off-policy mask": {"off_policy_mask_threshold": 0.05, "beta": 0.1},
    "off-policy mask, vllm": {"off_policy_mask_threshold": 0.05, "use_vllm": True},
    "top entropy": {"top_entropy_quantile": 0.4, "beta": 0.1},
    "bonus": {"entropy_coef": 0.02},
    "bonus, top entropy": {"entropy_coef": 0.02, "top_entropy_quantile": 0.4, "use_vllm": True, "beta": 0.03},
    "accumulation": {"current_gradient_accumulation_steps": 4, "steps_per_generation": 8, "entropy_coef": -0.01},
    "mixture of experts": {"aux_loss_enabled": True, "current_gradient_accumulation_steps": 2},
    "sequence": {"importance_sampling_level": "sequence", "epsilon_low": 0.02, "epsilon_high": 0.03},
    "sequence, kl, vllm": {
        "importance_sampling_level": "sequence",
        "beta": 0.2,
        "use_bias_correction_kl": True,
        "use_vllm": True,
    },
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_grpo(grpo: Any, loss_type: str, options: dict[str, Any]) -> None:
    if loss_type == "cispo":
        options = {**options, "epsilon_high": 1.2}
    for seed, training in ((0, True), (1, True), (2, False)):
        batch = Batch.random(seed=seed, empty=seed)
        assert_same(*both(grpo, batch, loss_type=loss_type, training=training, **options))
    left = options.get("importance_sampling_level") == "sequence" and loss_type in ("cispo", "sapo")
    left |= loss_type == "vespo" and bool(options.keys() & {"off_policy_mask_threshold", "top_entropy_quantile"})
    assert served() == ((0, 1) if left else (1, 0))


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("loss_type", CLIPPED)
def test_delta(grpo: Any, loss_type: str, level: str) -> None:
    batch = Batch.random(spread=0.8 if level == "token" else 3.0)
    options = {"loss_type": loss_type, "importance_sampling_level": level, "epsilon_high": 0.1}
    theirs, ours = both(grpo, batch, delta=1.3, **options)
    assert_same(theirs, ours)
    assert served() == (1, 0)
    without = both(grpo, batch, **options)[0]
    assert not torch.equal(theirs.gradients[0], without.gradients[0])
    assert_same(*both(grpo, batch, delta=1.05, **options))
    assert served() == (0, 1)  # of such a delta TRL's clip metrics are of another ratio


@pytest.mark.parametrize("spread", [0.0, 3.0, 25.0])
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_far_off_policy(grpo: Any, loss_type: str, spread: float) -> None:
    """Nothing is clamped: log-ratios of tens give TRL's numbers too."""
    batch = Batch.random(spread=spread)
    batch.advantages[-1] = 0.3  # TRL's infinite ratio times an advantage of 0 is NaN
    assert_same(*both(grpo, batch, loss_type=loss_type, beta=0.01), tolerance=3e-6)


@pytest.mark.parametrize("mode", ["token_mask", "sequence_truncate"])
def test_weights_of_sampling(grpo: Any, mode: str) -> None:
    batch = Batch.random()
    if mode == "token_mask":
        batch.weights[1, 0] = 0.0
    else:
        batch.weights = batch.weights[:, :1]
    for loss_type in LOSS_TYPES if mode == "token_mask" else LOSS_TYPES[:-1]:
        assert_same(*both(grpo, batch, loss_type=loss_type, use_vllm=True, vllm_importance_sampling_mode=mode))
        assert served() == (1, 0)


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_advantages_per_token_and_a_tool_mask(grpo: Any, loss_type: str, level: str) -> None:
    batch = Batch.random()
    batch.advantages = torch.randn(batch.mask.shape, generator=torch.Generator().manual_seed(3))
    batch.tool_mask = torch.ones_like(batch.mask)
    batch.tool_mask[:, 1::3] = 0
    options = {"loss_type": loss_type, "importance_sampling_level": level, "beta": 0.1}
    assert_same(*both(grpo, batch, **options))


def test_old_log_probs_that_are_not_there(grpo: Any) -> None:
    """The first of several updates: the ratio is 1, and its gradient is not 0."""
    for loss_type in LOSS_TYPES:
        theirs, ours = both(grpo, Batch.random(), loss_type=loss_type, without=("old_per_token_logps",))
        assert_same(theirs, ours)
        assert ours.gradients[0].abs().max() > 1e-3


@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize("width", [1, 2])
def test_short_completions_and_batches_of_nothing(grpo: Any, rloo: Any, rows: int, width: int) -> None:
    for empty in (0, rows):
        batch = Batch.random(rows, width, empty=empty)
        for loss_type in LOSS_TYPES:
            for level in ("token", "sequence"):
                options = {"loss_type": loss_type, "importance_sampling_level": level, "epsilon_high": 1.2}
                assert_same(*both(grpo, batch, entropy_coef=0.1, beta=0.1, **options))
        assert_same(*both(rloo, batch))


@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_single_tokens_that_are_masked_out(grpo: Any, loss_type: str, level: str, per_token: bool) -> None:
    """As by mask_truncated_completions: TRL's metrics take one column for values per sequence, and count them all."""
    batch = Batch.random(6, 1, seed=1, spread=1.0)
    batch.mask[1::2] = 0
    if per_token:
        batch.advantages = batch.advantages.unsqueeze(1)
    options = {"loss_type": loss_type, "importance_sampling_level": level, "epsilon_high": 1.2}
    for more in ({}, {"use_bias_correction_kl": True, "entropy_coef": 0.1}):
        assert_same(*both(grpo, batch, beta=0.1, **options, **more))


@pytest.mark.parametrize("loss_type", ["grpo", "dapo", "vespo", "cispo"])
def test_two_processes(grpo: Any, rloo: Any, loss_type: str) -> None:
    options: dict[str, Any] = {"accelerator": TwoLikeThis(), "training": True}
    batch = Batch.random(empty=1)
    assert_same(*both(grpo, batch, loss_type=loss_type, beta=0.1, entropy_coef=0.01, **options))
    assert_same(*both(rloo, batch, **options))


class Counting(Accelerator):
    """Counts what would go over the network."""

    calls = 0

    def reduce(self, x: torch.Tensor, reduction: str = "sum") -> torch.Tensor:
        self.calls += 1
        return x

    def gather(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return x


def test_fewer_collectives_and_the_same_on_every_rank(grpo: Any) -> None:
    patch.trl(losses=True)
    counts = []
    for batch in (Batch.random(), Batch.random(3, 1, empty=3), Batch.random(1, 40)):
        accelerator = Counting()
        compute(grpo, grpo._compute_loss, batch, accelerator=accelerator, beta=0.1)
        counts.append(accelerator.calls)
    assert counts == [2, 2, 2]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("spread", [0.05, 0.5])
def test_rloo(rloo: Any, spread: float, training: bool) -> None:
    for seed, empty in ((0, 0), (1, 2)):
        batch = Batch.random(spread=spread, seed=seed, empty=empty)
        theirs, ours = both(rloo, batch, training=training, aux_loss_enabled=seed == 1)
        assert_same(theirs, ours, tolerance=2e-6)
        assert served("rloo") == (1, 0)
    if spread > 0.1:
        assert theirs.metrics["clip_ratio/region_mean"][0] > 0


def test_rloo_over_thousands_of_tokens(rloo: Any) -> None:
    """Sums of that many log-probs are rounded by 1e-4: where nothing has changed the ratio has to be 1 all the same."""
    batch = Batch.random(6, 8192)
    batch.old = batch.logprobs.clone()
    for _ in range(2):
        theirs, ours = both(rloo, batch)
        assert_same(theirs, ours)
        batch.old = batch.old + 1e-4 * torch.randn(batch.old.shape) * batch.mask


def test_what_is_under_the_mask_does_not_matter(grpo: Any) -> None:
    """TRL makes NaN of it; ours gives the number."""
    patch.trl(losses=True)
    batch, dirty = Batch.random(), Batch.random()
    outside = dirty.mask == 0
    for x in (dirty.logprobs, dirty.entropy, dirty.old, dirty.ref, dirty.weights):
        x[outside] = math.nan
    options: dict[str, Any] = {"beta": 0.1, "use_vllm": True}
    clean = compute(grpo, grpo._compute_loss, batch, **options)
    found = compute(grpo, grpo._compute_loss, dirty, **options)
    assert torch.equal(found.loss, clean.loss)
    assert all(torch.equal(a, b) for a, b in zip(found.gradients, clean.gradients, strict=True))
    assert found.metrics == clean.metrics


def test_a_policy_that_has_become_nan_is_no_error(grpo: Any) -> None:
    batch = Batch.random()
    batch.logprobs[0, 0] = math.nan
    theirs, ours = both(grpo, batch, beta=0.1)
    assert ours.loss.isnan()
    assert theirs.loss.isnan()
    assert math.isnan(ours.metrics["kl"][0])


def test_the_adaptive_bonus_and_own_gamma_weights_go_to_trl(grpo: Any) -> None:
    batch = Batch.random()
    options: dict[str, Any] = {"use_adaptive_entropy": True, "entropy_coef": 0.1}
    assert_same(*both(grpo, batch, **options))
    assert served() == (0, 1)

    class Own:
        get_gamma_weights = staticmethod(lambda advantages, **_: torch.full_like(advantages, 0.5))

    found = compute(Own, grpo._compute_loss, batch, loss_type="vespo")
    assert found.metrics["vespo/phi_seq_mean"] == [0.5]
    assert served() == (0, 2)


# ---- what is replaced ------------------------------------------------------------------------------------------------


def test_only_on_request_and_put_back(grpo: Any, rloo: Any) -> None:
    stock = grpo._compute_loss, rloo._compute_loss
    report = patch.trl()
    assert (grpo._compute_loss, rloo._compute_loss) == stock
    assert any("losses=True was not asked for" in entry.why for entry in report.kept)
    report = patch.trl(losses=True)
    assert patch.trl(losses=True) is report
    assert {TARGET.format(k, k.upper()) for k in ("grpo", "rloo")} <= {entry.target for entry in report.replaced}
    assert grpo._compute_loss is not stock[0]
    assert rloo._compute_loss is not stock[1]
    patch.undo()
    assert (grpo._compute_loss, rloo._compute_loss) == stock


def test_subclasses_that_override_it_keep_theirs() -> None:
    gmpo = importlib.import_module("trl.experimental.gmpo.gmpo_trainer").GMPOTrainer
    own = gmpo._compute_loss
    patch.trl(losses=True)
    assert gmpo._compute_loss is own


@pytest.mark.parametrize("changed", ["_compute_loss", "get_gamma_weights"])
def test_another_source_is_left_alone(grpo: Any, rloo: Any, monkeypatch: pytest.MonkeyPatch, changed: str) -> None:
    def other(self: Any, model: Any, inputs: Any) -> Any:
        raise AssertionError

    monkeypatch.setattr(grpo, changed, other)
    before = grpo._compute_loss
    report = patch.trl(losses=True)
    assert grpo._compute_loss is before
    assert any(e.target == TARGET.format("grpo", "GRPO") and "source" in e.why for e in report.kept)
    assert any(e.target == TARGET.format("rloo", "RLOO") for e in report.replaced)


def test_the_backward_is_counted(grpo: Any) -> None:
    batch = Batch.random(64, 512)
    patch.trl(losses=True)
    compute(grpo, grpo._compute_loss, batch)
    usage = patch.status()["trl"].usage[TARGET.format("grpo", "GRPO")]
    assert (usage.calls, usage.tokens) == (1, 64 * 512)
    assert usage.seconds > 0

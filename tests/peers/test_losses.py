"""The written-out policy losses against the trainers' own code: values and gradients, each under its own convention."""

from __future__ import annotations

import importlib
import importlib.util
import types
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from openrlhf_models import models
from reference_losses import policy as reference
from torch import Tensor

# What trl, verl, ray and transformers warn about on import is theirs.
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]

WIDE = (0.3, 1.5, 25.0)  # spread of the log-ratios: inside the clip, well outside, outside the clamp of +-20


@dataclass
class Batch:
    """Ragged rows, [B, T] float64; advantages one per row, one of them 0."""

    lp: Tensor
    old: Tensor
    ref: Tensor
    adv: Tensor
    mask: Tensor
    weights: Tensor

    def arguments(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.lp, self.old, self.adv, self.mask

    def token_mean(self, loss: Tensor) -> Tensor:
        return (loss * self.weights * self.mask).sum() / self.mask.sum()

    def seq_mean_token_mean(self, loss: Tensor) -> Tensor:
        return ((loss * self.weights * self.mask).sum(-1) / self.mask.sum(-1)).mean()


def batch(spread: float = 0.3, *, rows: int = 6, length: int = 9) -> Batch:
    generator = torch.Generator().manual_seed(int(spread * 10))

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    old = -randn(rows, length).abs() * 2
    # Log-probs stay below 0, so the log-ratio's upper end needs a far lower old one.
    lp = -(-old + spread * randn(rows, length)).abs()
    old = torch.where(randn(rows, length) > 0.5, lp - spread * randn(rows, length).abs(), old)
    adv = randn(rows, 1)
    adv[2] = 0.0
    mask = (torch.arange(length) < torch.randint(1, length + 1, (rows, 1), generator=generator)).double()
    mask[1, 0] = 0.0  # a hole, as a tool's tokens leave it
    mask[1, 1] = 1.0
    weights = torch.rand(rows, length, generator=generator, dtype=torch.float64) + 0.5
    ref = lp.clone() + 0.7 * randn(rows, length)
    return Batch(lp.requires_grad_(), old, ref, adv.expand(rows, length).contiguous(), mask, weights)


def assert_same(theirs: Tensor, ours: Tensor, lp: Tensor, tolerance: float = 1e-7) -> None:
    """Values, and gradients for lp; the trainers add 1e-8 to token counts, hence the tolerance."""
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)
    gradients = [torch.autograd.grad(x, lp, retain_graph=True)[0] for x in (ours, theirs)]
    assert gradients[1].abs().max() > 0, "a comparison of nothing"
    torch.testing.assert_close(*gradients, rtol=tolerance, atol=tolerance)


# ---------------------------------------------------------------------------------------------------------------- verl
@pytest.fixture(scope="module")
def verl() -> Any:
    pytest.importorskip("verl", reason="verl is not installed (`make test` installs it)", exc_type=ImportError)
    try:
        return importlib.import_module("verl.trainer.ppo.core_algos")
    except ImportError as error:  # its own dependencies: pip install '.[verl]'
        pytest.skip(f"verl can't be imported: {error}")


def verl_config(**options: Any) -> Any:
    configs = importlib.import_module("verl.workers.config")
    loss_options = {k: options.pop(k) for k in list(options) if k.startswith(("clip_cov", "kl_cov", "ppo_kl", "dro"))}
    return configs.ActorConfig(
        strategy="fsdp",
        rollout_n=1,
        ppo_micro_batch_size_per_gpu=1,
        policy_loss=configs.PolicyLossConfig(**loss_options),
        **options,
    )


def verl_loss(verl: Any, name: str, b: Batch, aggregation: str = "token-mean", **options: Any) -> Tensor:
    function = verl.get_policy_loss_fn(name)
    loss: Tensor = function(b.old, b.lp, b.adv, b.mask, aggregation, verl_config(**options), b.weights)[0]
    return loss


@pytest.mark.parametrize("spread", WIDE)
@pytest.mark.parametrize(
    ("name", "ours", "options", "parameters"),
    [
        (
            "vanilla",
            reference.ppo,
            {"clip_ratio_low": 0.2, "clip_ratio_high": 0.28, "clip_ratio_c": 3.0},
            {"clip_low": 0.2, "clip_high": 0.28, "dual_clip": 3.0},
        ),
        (
            "cispo",
            reference.cispo,
            {"clip_ratio_low": 0.3, "clip_ratio_high": 0.6},
            {"clip_low": 0.3, "clip_high": 0.6, "convention": "verl"},
        ),
        (
            "dppo_tv",
            reference.dppo_tv,
            {"clip_ratio_low": 0.1, "clip_ratio_high": 0.15, "clip_ratio_c": 20.0},
            {"low": 0.1, "high": 0.15, "cap": 20.0},
        ),
        (
            "dppo_kl",
            reference.dppo_kl,
            {"clip_ratio_low": 0.02, "clip_ratio_high": 0.05, "clip_ratio_c": 10.0},
            {"low": 0.02, "high": 0.05, "cap": 10.0},
        ),
        ("gpg", reference.gpg, {}, {}),
        ("dro", reference.dro, {"dro_beta": 0.3}, {"beta": 0.3}),
    ],
)
def test_verl_token_losses(
    verl: Any, name: str, ours: Callable[..., Tensor], options: Any, parameters: Any, spread: float
) -> None:
    b = batch(spread)
    theirs = verl_loss(verl, name, b, **options)
    assert_same(theirs, b.token_mean(ours(*b.arguments(), **parameters)), b.lp)


@pytest.mark.parametrize("spread", WIDE)
def test_verl_sapo(verl: Any, spread: float) -> None:
    b = batch(spread)
    theirs = verl_loss(verl, "sapo", b, "seq-mean-token-mean", tau_pos=1.0, tau_neg=1.3)
    ours = reference.sapo(*b.arguments(), tau_pos=1.0, tau_neg=1.3)
    assert_same(theirs, b.seq_mean_token_mean(ours), b.lp)


@pytest.mark.parametrize("spread", WIDE)
def test_verl_gspo(verl: Any, spread: float) -> None:
    b = batch(spread)
    clip = {"clip_low": 0.05, "clip_high": 0.08}
    theirs = verl_loss(verl, "gspo", b, "seq-mean-token-mean", clip_ratio_low=0.05, clip_ratio_high=0.08)
    assert_same(theirs, b.seq_mean_token_mean(reference.gspo_token(*b.arguments(), **clip)), b.lp)
    # With one advantage a row and even weights, the sequence form is the same loss with the same gradient.
    b.weights = torch.ones_like(b.weights)
    theirs = verl_loss(verl, "gspo", b, "seq-mean-token-mean", clip_ratio_low=0.05, clip_ratio_high=0.08)
    assert_same(theirs, reference.gspo(*b.arguments(), **clip).mean(), b.lp)


@pytest.mark.parametrize("spread", WIDE)
def test_verl_geo_mean(verl: Any, spread: float) -> None:
    b = batch(spread)
    theirs = verl_loss(verl, "geo_mean", b, clip_ratio_low=0.4, clip_ratio_high=0.3)
    ours = reference.gmpo(*b.arguments(), clip_low=0.4, clip_high=0.3, log_ratio_clamp=None, is_weight=b.weights)
    assert_same(theirs, ours.mean(), b.lp)


@pytest.mark.parametrize("spread", WIDE[:2])
def test_verl_clip_cov(verl: Any, spread: float) -> None:
    b = batch(spread)
    # A share this large takes every candidate, which leaves nothing to verl's random draw.
    options = {"clip_cov_ratio": 1.0, "clip_cov_lb": 0.1, "clip_cov_ub": 2.0}
    theirs = verl_loss(verl, "clip_cov", b, clip_ratio_low=0.2, clip_ratio_high=0.2, **options)
    selected = reference.cov_mask(*b.arguments(), method="clip", cov_low=0.1, cov_high=2.0)
    assert 0 < selected.sum() < b.mask.sum()
    ours = reference.clip_cov(*b.arguments(), selected=selected, log_ratio_clamp=None)
    assert_same(theirs, b.token_mean(ours), b.lp)


@pytest.mark.parametrize("share", [0.0002, 0.2, 0.7])
@pytest.mark.parametrize("spread", WIDE[:2])
def test_verl_kl_cov(verl: Any, spread: float, share: float) -> None:
    b = batch(spread)
    theirs = verl_loss(verl, "kl_cov", b, kl_cov_ratio=share, ppo_kl_coef=0.5)
    selected = reference.cov_mask(*b.arguments(), method="kl", ratio=share)
    assert selected.sum() == max(1, int(share * b.mask.sum()))
    ours = reference.kl_cov(*b.arguments(), selected=selected, kl_coef=0.5, log_ratio_clamp=None)
    assert_same(theirs, b.token_mean(ours), b.lp)


def test_verl_reinforce(verl: Any) -> None:
    b = batch()
    weights, mode = b.weights, "seq-mean-token-sum"
    theirs = verl.compute_policy_loss_reinforce(b.old, b.lp, b.adv, b.mask, mode, verl_config(), weights)[0]
    assert_same(theirs, (reference.reinforce(*b.arguments()) * weights * b.mask).sum(-1).mean(), b.lp)


@pytest.mark.parametrize("spread", [0.3, 4.0, 25.0])
@pytest.mark.parametrize("kind", reference.KL_KINDS)
def test_verl_kl(verl: Any, kind: str, spread: float) -> None:
    b = batch(spread)
    theirs = verl.kl_penalty(b.lp, b.old, kind)
    ours = reference.kl(*b.arguments(), ref=b.old, kind=kind)
    assert_same(b.token_mean(theirs), b.token_mean(ours), b.lp)


# ----------------------------------------------------------------------------------------------------------------- TRL
class Accelerator:
    """One process: nothing to reduce or gather."""

    num_processes = 1
    sync_gradients = True

    def reduce(self, x: Tensor, reduction: str = "sum") -> Tensor:
        return x

    def gather(self, x: Tensor) -> Tensor:
        return x

    gather_for_metrics = gather


def trl_loss(b: Batch, module: str, name: str, loss_type: str, *, level: str = "token", **options: Any) -> Tensor:
    """TRL's own `_compute_loss`, run on given log-probs: only the model's forward is replaced."""
    pytest.importorskip("trl", reason="trl is an extra of fastreward")
    trainer_class = getattr(importlib.import_module(module), name)
    args = {
        "delta": None,
        "use_bias_correction_kl": False,
        "sapo_temperature_pos": 1.0,
        "sapo_temperature_neg": 1.05,
        "vespo_k_pos": 2.0,
        "vespo_lambda_pos": 3.0,
        "vespo_k_neg": 3.0,
        "vespo_lambda_neg": 2.0,
        "steps_per_generation": 1,
    }
    args |= {k: options.pop(k) for k in list(options) if k in args}
    trainer = types.SimpleNamespace(
        args=types.SimpleNamespace(**args),
        accelerator=Accelerator(),
        model=types.SimpleNamespace(training=True),
        current_gradient_accumulation_steps=1,
        loss_type=loss_type,
        importance_sampling_level=level,
        epsilon_low=options.pop("epsilon_low", 0.2),
        epsilon_high=options.pop("epsilon_high", 0.28),
        beta=options.pop("beta", 0.0),
        aux_loss_enabled=False,
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        use_vllm=loss_type != "vespo",
        vllm_importance_sampling_correction=True,
        max_completion_length=b.mask.shape[1],
        _entropy_bonus_enabled=False,
        _metrics={"train": defaultdict(list)},
        _get_per_token_logps_and_entropies=lambda *_, **__: (b.lp, torch.zeros_like(b.old), None),
        get_gamma_weights=getattr(trainer_class, "get_gamma_weights", None),
    )
    assert not options
    ids = torch.zeros(b.mask.shape, dtype=torch.int64)
    inputs = {
        "prompt_ids": ids,
        "prompt_mask": ids,
        "completion_ids": ids,
        "completion_mask": b.mask,
        "advantages": b.adv[:, 0],
        "old_per_token_logps": b.old,
        "ref_per_token_logps": b.ref,
        "num_items_in_batch": b.mask.sum(),
    }
    if loss_type != "vespo":
        inputs["importance_sampling_ratio"] = b.weights
    # The decorators around the method (profiling) ask for a whole trainer; what they wrap is the loss.
    method = getattr(trainer_class._compute_loss, "__wrapped__", trainer_class._compute_loss)
    loss: Tensor = method(trainer, None, inputs)
    return loss


GRPO = ("trl.trainer.grpo_trainer", "GRPOTrainer")
GMPO = ("trl.experimental.gmpo.gmpo_trainer", "GMPOTrainer")


@pytest.mark.parametrize("spread", WIDE)
@pytest.mark.parametrize("delta", [None, 1.8])
def test_trl_ppo(spread: float, delta: float | None) -> None:
    b = batch(spread)
    ours = reference.ppo(*b.arguments(), clip_low=0.2, clip_high=0.28, delta=delta, log_ratio_clamp=None)
    assert_same(trl_loss(b, *GRPO, "dapo", delta=delta), b.token_mean(ours), b.lp)
    assert_same(trl_loss(b, *GRPO, "grpo", delta=delta), b.seq_mean_token_mean(ours), b.lp)


@pytest.mark.parametrize("spread", WIDE)
def test_trl_cispo(spread: float) -> None:
    b = batch(spread)
    ours = reference.cispo(*b.arguments(), clip_high=5.0, convention="trl", log_ratio_clamp=None)
    assert_same(trl_loss(b, *GRPO, "cispo", epsilon_high=5.0), b.token_mean(ours), b.lp)


@pytest.mark.parametrize("spread", WIDE)
def test_trl_sapo(spread: float) -> None:
    b = batch(spread)
    theirs = trl_loss(b, *GRPO, "sapo", sapo_temperature_pos=0.9, sapo_temperature_neg=1.2)
    ours = reference.sapo(*b.arguments(), tau_pos=0.9, tau_neg=1.2, log_ratio_clamp=None)
    assert_same(theirs, b.seq_mean_token_mean(ours), b.lp)


@pytest.mark.parametrize("corrected", [False, True])
@pytest.mark.parametrize("spread", WIDE[:2])
def test_trl_vespo(spread: float, corrected: bool) -> None:
    b = batch(spread)
    weights, b.weights = b.weights, torch.ones_like(b.weights)
    if not corrected:
        theirs = trl_loss(b, *GRPO, "vespo", vespo_k_pos=1.5, vespo_lambda_neg=0.8)
        assert_same(theirs, b.token_mean(reference.vespo(*b.arguments(), k_pos=1.5, lambda_neg=0.8)), b.lp)
        return
    pytest.importorskip("trl", reason="trl is an extra of fastreward")
    trainer = importlib.import_module(GRPO[0]).GRPOTrainer
    inside = torch.where(b.mask != 0, weights, 1.0)  # TRL's own correction is 1 where nothing was generated
    phi = trainer.get_gamma_weights(b.adv, b.lp.detach() - b.old, b.mask, inside)
    ours = reference.vespo(*b.arguments(), is_weight=inside)
    assert_same(b.token_mean(-phi * b.adv * b.lp), b.token_mean(ours), b.lp)


@pytest.mark.parametrize("spread", WIDE)
def test_trl_gspo(spread: float) -> None:
    b = batch(spread)
    b.weights = torch.ones_like(b.weights)
    theirs = trl_loss(b, *GRPO, "grpo", level="sequence", epsilon_low=0.05, epsilon_high=0.08)
    ours = reference.gspo(*b.arguments(), clip_low=0.05, clip_high=0.08, log_ratio_max=None)
    assert_same(theirs, ours.mean(), b.lp)


@pytest.mark.parametrize("spread", WIDE)
def test_trl_gmpo(spread: float) -> None:
    b = batch(spread)
    theirs = trl_loss(b, *GMPO, "grpo", epsilon_low=0.4, epsilon_high=0.3)
    ours = reference.gmpo(*b.arguments(), clip_low=0.4, clip_high=0.3, log_ratio_clamp=None)
    assert_same(theirs, ours.mean(), b.lp)


@pytest.mark.parametrize("bias_correction", [False, True])
def test_trl_kl(bias_correction: bool) -> None:
    b = batch(1.5)
    theirs = trl_loss(b, *GRPO, "dapo", beta=0.3, use_bias_correction_kl=bias_correction)
    kl = reference.kl(*b.arguments(), ref=b.ref, convention="trl", bias_correction=bias_correction)
    ours = b.weights * reference.ppo(*b.arguments(), clip_high=0.28, log_ratio_clamp=None) + 0.3 * kl
    assert_same(theirs, (ours * b.mask).sum() / b.mask.sum(), b.lp)


def distributions(n: int, vocabulary: int) -> tuple[Tensor, Tensor]:
    logits = torch.randn(2, n, vocabulary, dtype=torch.float64) * 2
    return logits[0].requires_grad_(), logits[1]


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.5, 1.0])
@pytest.mark.parametrize("tail", [True, False])
def test_trl_sdpo_topk(alpha: float, tail: bool) -> None:
    pytest.importorskip("trl", reason="trl is an extra of fastreward")
    theirs = importlib.import_module("trl.experimental.sdpo.loss_utils").compute_topk_self_distillation_loss
    student, teacher = distributions(7, 30)
    expected = theirs(student, teacher, distillation_topk=5, distillation_alpha=alpha, distillation_add_tail=tail)
    ids = student.topk(5, dim=-1).indices
    s, t = (x.log_softmax(-1).gather(-1, ids) for x in (student, teacher))
    found = reference.sdpo_topk(s, None, None, torch.ones(7, 5), teacher=t, alpha=alpha, tail=tail)
    weights = torch.linspace(0.5, 2.0, 7, dtype=torch.float64)
    assert_same((expected * weights).sum(), (found * weights).sum(), student)


@pytest.mark.parametrize("is_clip", [None, 1.1])
def test_trl_sdpo_token(is_clip: float | None) -> None:
    pytest.importorskip("trl", reason="trl is an extra of fastreward")
    theirs = importlib.import_module("trl.experimental.sdpo.loss_utils")
    student, teacher = distributions(7, 30)
    ids = torch.arange(7).unsqueeze(-1)
    lp, ref = (x.log_softmax(-1).gather(-1, ids) for x in (student, teacher))
    old = lp.detach() + 0.5 * torch.randn(7, 1, dtype=torch.float64)
    expected = theirs.compute_sampled_token_self_distillation_loss(
        student, teacher, ids.squeeze(-1), distillation_alpha=1.0
    ).unsqueeze(-1)
    if is_clip is not None:
        expected = theirs.apply_importance_sampling_clipping(expected, lp, old, is_clip)
    found = reference.sdpo(lp, old, torch.zeros(7, 1), torch.ones(7, 1), teacher=ref, is_clip=is_clip)
    weights = torch.linspace(0.5, 2.0, 7, dtype=torch.float64).unsqueeze(-1)
    assert_same((expected * weights).sum(), (found * weights).sum(), student)


# ------------------------------------------------------------------------------------------------------------ OpenRLHF
@pytest.fixture(scope="module")
def openrlhf() -> Any:
    with models() as found:
        yield found


@pytest.mark.parametrize("spread", WIDE)
@pytest.mark.parametrize("dual_clip", [None, 3.0])
def test_openrlhf_ppo(openrlhf: Any, spread: float, dual_clip: float | None) -> None:
    b = batch(spread)
    b.weights = torch.ones_like(b.weights)
    theirs = openrlhf.loss.PolicyLoss(0.2, 0.28, dual_clip)(b.lp, b.old, b.adv, b.mask)[0]
    ours = reference.ppo(*b.arguments(), clip_high=0.28, dual_clip=dual_clip)
    assert_same(theirs, b.token_mean(ours), b.lp)


@pytest.mark.parametrize("spread", WIDE)
def test_openrlhf_gspo(openrlhf: Any, spread: float) -> None:
    b = batch(spread)
    theirs = openrlhf.loss.PolicyLoss(0.05, 0.08, policy_loss_type="gspo")(b.lp, b.old, b.adv, b.mask)[0]
    ours = reference.gspo(*b.arguments(), clip_low=0.05, clip_high=0.08, log_ratio_max=None)
    assert_same(theirs, ours.mean(), b.lp)


def test_openrlhf_sft(openrlhf: Any) -> None:
    b = batch()
    b.weights = torch.ones_like(b.weights)
    assert_same(openrlhf.loss.SFTLoss()(b.lp, b.mask), b.token_mean(reference.sft(*b.arguments())), b.lp)


@pytest.mark.parametrize("spread", [0.3, 4.0, 25.0])
@pytest.mark.parametrize("kind", ["k1", "k2", "k3", "k1+", "k2+", "k3+"])
def test_openrlhf_kl(openrlhf: Any, kind: str, spread: float) -> None:
    b = batch(spread)
    plus = kind.endswith("+")
    theirs = openrlhf.utils.compute_approx_kl(b.lp, b.ref, b.old, kind.rstrip("+"), unbiased_gradient=plus)
    ours = reference.kl(*b.arguments(), ref=b.ref, kind=kind, convention="openrlhf")
    # It computes in float32, whatever it is given.
    assert_same(b.token_mean(theirs), b.token_mean(ours), b.lp, tolerance=1e-5)

"""The reference losses and the rollout correction against TRL's and verl's own code, run as it is."""

from __future__ import annotations

import inspect
import textwrap
from collections import defaultdict
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from reference_losses import correction, preference
from torch import Tensor

# What trl, verl and what they import warn about is theirs.
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]

Pairs = dict[str, Tensor]


def ragged_mask(rows: int, width: int, *, empty: int | None = None) -> Tensor:
    """[rows, width]: a run of ones after a prompt, with some left out; row `empty` has none."""
    start = torch.randint(0, max(1, width // 3), (rows, 1))
    stop = torch.maximum(start + 1, torch.randint(width // 2, width + 1, (rows, 1)))
    at = torch.arange(width)
    mask = ((at >= start) & (at < stop)).long()
    mask *= (torch.rand(rows, width) > 0.2) | (at == start)
    if empty is not None:
        mask[empty] = 0
    return mask


def pairs(count: int = 6, width: int = 11, *, spread: float = 0.5, dtype: torch.dtype = torch.float64) -> Pairs:
    """Log-probs [count, width] of both sides, 0 where masked out, as TRL's fused head gives them."""
    data: Pairs = {}
    for side in ("chosen", "rejected"):
        mask = ragged_mask(count, width, empty=3 if side == "rejected" else None)
        logprobs = -torch.rand(count, width, dtype=dtype) * 3
        data[side] = logprobs * mask
        data[f"ref_{side}"] = (logprobs + spread * torch.randn(count, width, dtype=dtype)) * mask
        data[f"{side}_mask"] = mask
        data[f"{side}_log_sum_sq_probs"] = (-torch.rand(count, width, dtype=dtype) * 2) * mask
    return data


# --------------------------------------------------------------------------------------------------------- TRL's DPO
@pytest.fixture(scope="module")
def trainer_class() -> Any:
    pytest.importorskip("trl", reason="compares with TRL's own DPO losses")
    from trl.trainer.dpo_trainer import DPOTrainer

    return DPOTrainer


class StubModel(torch.nn.Module):
    """A model whose fused LM head answers with given log-probs; all that TRL's loss reads of a model."""

    is_gradient_checkpointing = False

    def __init__(self, log_probs: Tensor, log_sum_sq_probs: Tensor) -> None:
        super().__init__()
        self.log_probs, self.log_sum_sq_probs = log_probs, log_sum_sq_probs

    def forward(self, **_: Any) -> Any:
        zeros = torch.zeros_like(self.log_probs)
        return SimpleNamespace(
            log_probs=self.log_probs,
            log_sum_sq_probs=self.log_sum_sq_probs,
            entropy=zeros,
            mean_logits=zeros,
            is_top1=zeros.bool(),
        )


def trl_loss(trainer_class: Any, data: Pairs, **settings: Any) -> Tensor:
    """DPOTrainer._compute_loss on a stand-in for the trainer: TRL's code from log-probs to the loss."""

    def both(name: str, suffix: str = "") -> Tensor:
        return torch.cat([data[f"{name}chosen{suffix}"], data[f"{name}rejected{suffix}"]])

    settings = {
        "beta": 0.1,
        "label_smoothing": 0.0,
        "f_divergence_type": "reverse_kl",
        "f_alpha_divergence_coef": 0.5,
        "ld_alpha": None,
        "use_weighting": False,
        "discopop_tau": 0.05,
        **settings,
    }
    # TRL's tensors have the sequence's first token too, which nothing predicts.
    mask = torch.nn.functional.pad(both("", "_mask"), (1, 0))
    trainer = SimpleNamespace(
        model=StubModel(both(""), both("", "_log_sum_sq_probs")),
        ref_model=StubModel(both("ref_"), both("", "_log_sum_sq_probs")),
        accelerator=SimpleNamespace(device=torch.device("cpu"), gather=lambda x: x, gather_for_metrics=lambda x: x),
        args=SimpleNamespace(gradient_checkpointing_kwargs=None, discopop_tau=settings["discopop_tau"]),
        aux_loss_enabled=False,
        precompute_ref_logps=False,
        loss_weights=[1.0],
        _metrics=defaultdict(lambda: defaultdict(list)),
        _total_train_tokens=0,
        _tp_size=1,
        **settings,
    )
    inputs = {"input_ids": torch.zeros_like(mask), "attention_mask": torch.ones_like(mask), "completion_mask": mask}
    loss: Tensor = trainer_class._compute_loss(trainer, trainer.model, inputs, False)
    return loss


def reference_arguments(data: Pairs) -> tuple[Tensor, ...]:
    names = ("chosen", "rejected", "ref_chosen", "ref_rejected", "chosen_mask", "rejected_mask")
    return tuple(data[name] for name in names)


def compare(data: Pairs, reference: Callable[[Pairs], Tensor], peer: Callable[[Pairs], Tensor], rtol: float) -> None:
    """Mean losses and the gradients of both sides' log-probs."""
    results = []
    for function in (reference, peer):
        leaves = {side: data[side].clone().requires_grad_() for side in ("chosen", "rejected")}
        loss = function({**data, **leaves}).mean()
        grads = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
        # TRL gives masked-out places a gradient (its head does not look at them): they are not compared.
        masked = [
            torch.zeros_like(data[side]) if grad is None else grad * data[f"{side}_mask"]
            for side, grad in zip(leaves, grads, strict=True)
        ]
        results.append((loss.detach(), *masked))
    assert results[0][1].abs().max() > 0
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours.double(), theirs.double(), rtol=rtol, atol=rtol * 1e-1)


@pytest.mark.parametrize("variant", preference.VARIANTS)
@pytest.mark.parametrize("beta", [0.1, 0.7])
@pytest.mark.parametrize("spread", [0.5, 10.0])
def test_dpo_variants(trainer_class: Any, variant: str, beta: float, spread: float) -> None:
    smoothing = {"robust": 0.1, "exo_pair": 1e-3, "aot": 0.2, "aot_unpaired": 0.2}.get(variant, 0.0)
    if variant == "discopop":
        spread = min(spread, 2.0)  # TRL's exp(-z) * sigmoid(z / tau) overflows further out
    compare(
        pairs(spread=spread),
        lambda data: preference.dpo(*reference_arguments(data), beta=beta, label_smoothing=smoothing, variant=variant),
        lambda data: trl_loss(trainer_class, data, loss_types=[variant], beta=beta, label_smoothing=smoothing),
        rtol=1e-6,
    )


@pytest.mark.parametrize("variant", preference.F_DIVERGENCE_VARIANTS)
@pytest.mark.parametrize("divergence", preference.F_DIVERGENCES[1:])
@pytest.mark.parametrize("alpha", [0.5, 1.0, 2.0])
def test_f_divergences(trainer_class: Any, variant: str, divergence: str, alpha: float) -> None:
    name = divergence if divergence == "forward_kl" else f"{divergence}_divergence"
    smoothing = {"robust": 0.1, "exo_pair": 1e-3}.get(variant, 0.0)
    compare(
        pairs(dtype=torch.float32, spread=0.2),  # TRL's alpha divergence knows no float64
        lambda data: preference.dpo(
            *reference_arguments(data), variant=variant, label_smoothing=smoothing, f_divergence=divergence, alpha=alpha
        ),
        lambda data: trl_loss(
            trainer_class,
            data,
            loss_types=[variant],
            label_smoothing=smoothing,
            f_divergence_type=name,
            f_alpha_divergence_coef=alpha,
        ),
        rtol=2e-4,  # their float32, squared by ipo
    )


@pytest.mark.parametrize("variant", ["sigmoid", "ipo", "aot", "bco_pair"])
@pytest.mark.parametrize("ld_alpha", [0.0, 0.4, 1.0])
def test_ld_alpha(trainer_class: Any, variant: str, ld_alpha: float) -> None:
    compare(
        pairs(),
        lambda data: preference.dpo(*reference_arguments(data), variant=variant, ld_alpha=ld_alpha),
        lambda data: trl_loss(trainer_class, data, loss_types=[variant], ld_alpha=ld_alpha),
        rtol=1e-9,
    )


@pytest.mark.parametrize("variant", ["sigmoid", "ipo", "bco_pair", "apo_down"])
def test_wpo_weighting(trainer_class: Any, variant: str) -> None:
    """Not hinge and sft, where TRL 1.16 multiplies in place what autograd still needs, and fails."""
    compare(
        pairs(),
        lambda data: preference.dpo(
            *reference_arguments(data),
            variant=variant,
            chosen_log_sum_sq_probs=data["chosen_log_sum_sq_probs"],
            rejected_log_sum_sq_probs=data["rejected_log_sum_sq_probs"],
        ),
        lambda data: trl_loss(trainer_class, data, loss_types=[variant], use_weighting=True),
        rtol=1e-9,
    )


# --------------------------------------------------------------------------------------------- TRL's CPO: SimPO, cDPO
@pytest.fixture(scope="module")
def cpo_loss() -> Callable[..., Tensor]:
    pytest.importorskip("trl", reason="compares with TRL's own SimPO loss")
    from trl.experimental.cpo.cpo_trainer import CPOTrainer

    def loss(chosen: Tensor, rejected: Tensor, **settings: Any) -> Tensor:
        accelerator = SimpleNamespace(device=torch.device("cpu"))
        losses: Tensor = CPOTrainer.cpo_loss(
            SimpleNamespace(**{"accelerator": accelerator, "alpha": 0.0, **settings}), chosen, rejected
        )[0]
        return losses

    return loss


def mean_logprobs(data: Pairs, side: str) -> Tensor:
    return (data[side] * data[f"{side}_mask"]).sum(-1) / data[f"{side}_mask"].sum(-1).clamp(min=1)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_simpo(cpo_loss: Callable[..., Tensor], smoothing: float) -> None:
    compare(
        pairs(),
        lambda data: preference.simpo(*reference_arguments(data), beta=2.5, gamma=1.4, label_smoothing=smoothing),
        lambda data: cpo_loss(
            mean_logprobs(data, "chosen"),
            mean_logprobs(data, "rejected"),
            loss_type="simpo",
            beta=2.5,
            simpo_gamma=1.4,
            label_smoothing=smoothing,
        ),
        rtol=1e-9,
    )


@pytest.mark.parametrize("alpha", [0.25, -0.5])
def test_alphapo(cpo_loss: Callable[..., Tensor], alpha: float) -> None:
    compare(
        pairs(),
        lambda data: preference.alphapo(*reference_arguments(data), alpha=alpha, beta=2.5, gamma=1.4),
        lambda data: cpo_loss(
            mean_logprobs(data, "chosen"),
            mean_logprobs(data, "rejected"),
            loss_type="simpo",
            beta=2.5,
            simpo_gamma=1.4,
            label_smoothing=0.0,
            alpha=alpha,
        ),
        rtol=1e-9,
    )


@pytest.mark.parametrize("variant", ["sigmoid", "hinge", "ipo"])
def test_cpo(cpo_loss: Callable[..., Tensor], variant: str) -> None:
    """Without the likelihood, which TRL's trainer adds elsewhere."""

    def scores(data: Pairs, side: str) -> Tensor:
        mean = mean_logprobs(data, side)
        return mean if variant == "ipo" else mean * data[f"{side}_mask"].sum(-1)

    compare(
        pairs(),
        lambda data: preference.cpo(*reference_arguments(data), beta=0.3, variant=variant, sft_weight=0.0),
        lambda data: cpo_loss(
            scores(data, "chosen"), scores(data, "rejected"), loss_type=variant, beta=0.3, label_smoothing=0.0
        ),
        rtol=1e-9,
    )


def test_orpo() -> None:
    """Its odds ratio; the likelihood is added here as it is there, a mean over the chosen tokens."""
    pytest.importorskip("trl", reason="compares with TRL's own ORPO loss")
    from trl.experimental.orpo.orpo_trainer import ORPOTrainer

    trainer = SimpleNamespace(beta=0.3, accelerator=SimpleNamespace(device=torch.device("cpu")))

    def peer(data: Pairs) -> Tensor:
        means = (mean_logprobs(data, side) for side in ("chosen", "rejected"))
        mask = data["chosen_mask"]
        nll = -(data["chosen"] * mask).sum() / mask.sum()
        # A pair's share of that mean, as `batch_nll` gives it: their sums are the same.
        share = -(data["chosen"] * mask).sum(-1) * len(mask) / mask.sum()
        assert torch.allclose(share.mean(), nll)
        return share - ORPOTrainer.odds_ratio_loss(trainer, *means)[0]

    data = pairs()
    both = data["chosen_mask"].bool().any(-1) & data["rejected_mask"].bool().any(-1)  # of an empty side TRL gives inf
    assert 1 < both.sum() < len(both)
    kept = {name: x[both] for name, x in data.items()}
    compare(kept, lambda data: preference.orpo(*reference_arguments(data), beta=0.3), peer, rtol=1e-5)


@pytest.mark.parametrize("smoothing", [0.0, 0.3])
def test_cdpo_and_cream(cpo_loss: Callable[..., Tensor], smoothing: float) -> None:
    """Conservative DPO is CPO's smoothed sigmoid on log-ratios; CREAM with a constant label is the same."""

    def log_ratio(data: Pairs, side: str) -> Tensor:
        return ((data[side] - data[f"ref_{side}"]) * data[f"{side}_mask"]).sum(-1)

    def peer(data: Pairs) -> Tensor:
        settings = {"loss_type": "sigmoid", "beta": 0.3, "label_smoothing": smoothing}
        return cpo_loss(log_ratio(data, "chosen"), log_ratio(data, "rejected"), **settings)

    for reference in (
        lambda data: preference.cdpo(*reference_arguments(data), beta=0.3, label_smoothing=smoothing),
        lambda data: preference.cream(*reference_arguments(data), beta=0.3, consistency=1 - smoothing),
        lambda data: preference.dpo(*reference_arguments(data), beta=0.3, label_smoothing=smoothing),
    ):
        compare(pairs(), reference, peer, rtol=1e-9)


# ------------------------------------------------------------------------------------------------ TRL's rollout ratios
@pytest.fixture(scope="module")
def grpo_trainer() -> Any:
    pytest.importorskip("trl", reason="compares with TRL's own importance sampling")
    from trl.trainer.grpo_trainer import GRPOTrainer

    return GRPOTrainer


def trl_ratio_code(grpo_trainer: Any) -> Any:
    """The lines of GRPOTrainer._generate_and_score_completions from the two log-probs to the ratio, compiled."""
    source = inspect.getsource(grpo_trainer._generate_and_score_completions)
    start = source.index("per_token_logps_diff = (old_per_token_logps - sampling_per_token_logps)")
    stop = source.index("# Compute the per-token log probabilities for the reference model", start)
    block = source[source.rindex("\n", 0, start) + 1 : stop].rstrip()
    return compile(textwrap.dedent(block), "grpo_trainer.py", "exec")


@pytest.mark.parametrize("mode", ["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"])
@pytest.mark.parametrize(("low", "high"), [(None, 3.0), (0.5, 2.0), (0.9, None)])
def test_trl_importance_ratio(grpo_trainer: Any, mode: str, low: float | None, high: float | None) -> None:
    mask, old, rollout = rollouts()
    rollout[0, mask[0].nonzero()[0]] = torch.nan  # a token vLLM could not score
    names: dict[str, Any] = {
        "torch": torch,
        "math": __import__("math"),
        "mask": mask,
        "old_per_token_logps": old,
        "sampling_per_token_logps": rollout,
        "self": SimpleNamespace(
            vllm_importance_sampling_mode=mode,
            vllm_importance_sampling_clip_min=low,
            vllm_importance_sampling_clip_max=high,
        ),
    }
    exec(trl_ratio_code(grpo_trainer), names)
    ours = correction.trl_importance_ratio(old, rollout, mask, mode, low, high)
    torch.testing.assert_close(ours, names["vllm_importance_sampling_ratio"], rtol=1e-9, atol=0)
    # The general reference gives the same weights where a token counts.
    level, action = mode.split("_")
    scored = torch.where(rollout.isnan(), old, rollout)
    raw = correction.raw_weights(old, scored, mask, level, clamp=None)
    weights, _ = correction.bounded_weights(raw, mask, action, low, high)
    torch.testing.assert_close(weights, ours.expand(mask.shape) * mask, rtol=1e-9, atol=0)


@pytest.mark.parametrize("threshold", [-0.1, 0.0, 0.05, 0.3])
def test_off_policy_sequence_mask(grpo_trainer: Any, threshold: float) -> None:
    mask, logprobs, rollout = rollouts(rows=64)
    rollout[5, mask[5].nonzero()[0]] = torch.nan
    advantages = torch.randn(64, dtype=torch.float64)
    advantages[7] = 0.0
    theirs = grpo_trainer.get_off_policy_mask(advantages.unsqueeze(1), logprobs, rollout, mask, threshold)
    ours = correction.off_policy_sequence_mask(logprobs, rollout, advantages, mask, threshold=threshold)
    assert 0 < ours.sum() < 64
    assert torch.equal(ours, theirs.squeeze(1).bool())


# ------------------------------------------------------------------------------------------- verl's rollout correction
@pytest.fixture(scope="module")
def verl() -> ModuleType:
    reason = "compares with verl's own rollout correction; verl is not installed (`make test` installs it)"
    module: ModuleType = pytest.importorskip("verl.trainer.ppo.rollout_corr_helper", reason=reason)
    return module


def rollouts(rows: int = 7, width: int = 13, *, spread: float = 0.6) -> tuple[Tensor, Tensor, Tensor]:
    """(mask, old, rollout) [rows, width] float64, row 4 empty. Row 1 is on policy: verl divides by the mean weight."""
    mask = ragged_mask(rows, width, empty=4)
    old = -torch.rand(rows, width, dtype=torch.float64) * 3
    rollout = old + spread * torch.randn(rows, width, dtype=torch.float64)
    rollout[1] = old[1]
    return mask, old, rollout


def verl_threshold(threshold: float | tuple[float, float]) -> str:
    return f"{threshold[0]}_{threshold[1]}" if isinstance(threshold, tuple) else str(threshold)


def check_metrics(ours: dict[str, Tensor], theirs: dict[str, float]) -> None:
    assert {f"rollout_corr/{name}" for name in ours} == set(theirs)
    for name, value in ours.items():
        expected = theirs[f"rollout_corr/{name}"]
        assert float(value) == pytest.approx(expected, rel=1e-6, abs=1e-7), name


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("bounds", [(None, 2.0), (0.5, 5.0), (0.8, 1.2)])
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("spread", [0.6, 12.0])
def test_verl_weights(
    verl: ModuleType, level: str, bounds: tuple[float | None, float], normalize: bool, spread: float
) -> None:
    """A single threshold is TIS (truncate), two are IcePop; spread 12 runs into the clamp of log-ratios at 20."""
    mask, old, rollout = rollouts(spread=spread)
    low, high = bounds
    proto, kept, theirs = verl.compute_rollout_correction_and_rejection_mask(
        old,
        rollout,
        mask,
        rollout_is=level,
        rollout_is_threshold=high if low is None else f"{low}_{high}",
        rollout_is_batch_normalize=normalize,
    )
    weights, keep, metrics = correction.correction_weights(
        old,
        rollout,
        mask,
        mode="truncate" if low is None else "icepop",
        level=level,
        low=low,
        high=high,
        batch_normalize=normalize,
    )
    torch.testing.assert_close(weights, proto.batch["rollout_is_weights"], rtol=1e-7, atol=1e-12)
    assert torch.equal(keep, kept.bool())
    check_metrics(metrics, theirs)


@pytest.mark.parametrize(
    "reject",
    [
        *({option: (0.7, 1.4)} if option.endswith("k1") else {option: 0.2} for option in correction.REJECTIONS),
        {"token_k1": 1.8},
        {"token_k3": 0.5, "seq_mean_k1": (0.8, 1.3), "seq_max_k2": 1.0},
        {"seq_sum_k3": 1e-9},
    ],
    ids=lambda reject: "+".join(reject),
)
@pytest.mark.parametrize("spread", [0.3, 12.0])
def test_verl_rejection(verl: ModuleType, reject: dict[str, Any], spread: float) -> None:
    mask, old, rollout = rollouts(spread=spread)
    _, kept, theirs = verl.compute_rollout_correction_and_rejection_mask(
        old,
        rollout,
        mask,
        rollout_rs=",".join(reject),
        rollout_rs_threshold=",".join(verl_threshold(threshold) for threshold in reject.values()),
    )
    _, keep, metrics = correction.correction_weights(old, rollout, mask, mode=None, reject=reject)
    assert torch.equal(keep, kept.bool())
    check_metrics(metrics, theirs)


def test_verl_single_token(verl: ModuleType) -> None:
    """One counted token: verl's standard deviations are 0, not NaN."""
    mask, old, rollout = rollouts(width=1)
    mask[1:] = 0
    assert mask.sum() == 1
    reject = {"token_k1": (0.5, 2.0), "seq_sum_k3": 0.3}
    _, kept, theirs = verl.compute_rollout_correction_and_rejection_mask(
        old, rollout, mask, rollout_is="sequence", rollout_rs="token_k1,seq_sum_k3", rollout_rs_threshold="0.5_2.0,0.3"
    )
    _, keep, metrics = correction.correction_weights(old, rollout, mask, level="sequence", reject=reject)
    assert torch.equal(keep, kept.bool())
    check_metrics(metrics, theirs)

"""correction_weights with all its metrics: truncated token weights (TIS), and rejection by the geometric mean."""

from __future__ import annotations

from functools import lru_cache, partial

import torch
from torch import Tensor

from fastreward.bench import peers, roofline
from fastreward.bench.case import OURS, Case, Contender, Target
from fastreward.bench.cases._steps import add_torch
from fastreward.correction import correction_weights
from fastreward.verify.error import distance

CASES = ("tis", "geo_rs")
DTYPES = ("float32",)
SHAPE = (512, 8192)
QUICK = (64, 512)

_BOUNDS = (0.99, 1.01)
Weights = tuple[Tensor, Tensor]  # weights and keep, both [B, T]


@lru_cache(maxsize=1)
def _data(shape: tuple[int, ...], device: str) -> tuple[Tensor, Tensor, Tensor]:
    """Old and rollout log-probs f32 [B, T], a ragged mask bool [B, T]."""
    generator = torch.Generator(device=device).manual_seed(0)
    old = -torch.randn(shape, generator=generator, device=device).abs()
    lengths = torch.randint(shape[1] // 4, shape[1] + 1, shape[:1], generator=generator, device=device)
    mask = torch.arange(shape[1], device=device) < lengths.unsqueeze(-1)
    return old, old + 0.3 * torch.randn(shape, generator=generator, device=device), mask


def build(case: str, dtype: torch.dtype, shape: tuple[int, ...], device: str) -> Case:
    """Weights, mask and metrics of [B, T] float32."""
    data = _data(shape, device)
    truth = _plain(case, data[0].double(), data[1].double(), data[2])
    built = Case(
        operation="correction",
        name=case,
        dtype=str(dtype).removeprefix("torch."),
        shape=shape,
        traffic=roofline.correction(data[0].numel()),
        error=partial(_error, truth, data[2]),
        contenders=[Contender(OURS, partial(_ours, case, *data))],
        tolerance=1e-5,
        inputs=list(data),
        targets=(Target("speedup", 10.0, "verl"),),
    )
    add_torch(built, partial(_plain, case), lambda form: partial(form, *data), 1e-4)
    peers.add(built, "verl", partial(_verl, case, data))
    built.absent["TRL"] = "its correction is inside GRPOTrainer, no function of its own"
    built.absent["liger-kernel"] = "no such function"
    return built


def _ours(case: str, old: Tensor, rollout: Tensor, mask: Tensor) -> Weights:
    if case == "tis":
        return correction_weights(old, rollout, mask, high=2.0)[:2]
    reject = {"seq_mean_k1": _BOUNDS}
    return correction_weights(old, rollout, mask, mode=None, reject=reject)[:2]


def _plain(case: str, old: Tensor, rollout: Tensor, mask: Tensor) -> Weights:
    """The obvious form, without the metrics that the others compute."""
    log_ratio = old - rollout
    if case == "tis":
        return log_ratio.clamp(-20.0, 20.0).exp().clamp(max=2.0) * mask, mask.clone()
    mean = ((log_ratio * mask).sum(-1) / mask.sum(-1)).exp()
    inside = (mean >= _BOUNDS[0]) & (mean <= _BOUNDS[1])
    return mask.to(old.dtype), mask & inside.unsqueeze(-1)


def _verl(case: str, data: tuple[Tensor, Tensor, Tensor]) -> Contender:
    helper = peers.load("verl", "verl.trainer.ppo.rollout_corr_helper")
    options = (
        {"rollout_is": "token", "rollout_is_threshold": 2.0}
        if case == "tis"
        else {"rollout_rs": "seq_mean_k1", "rollout_rs_threshold": f"{_BOUNDS[0]}_{_BOUNDS[1]}"}
    )

    def step(old: Tensor, rollout: Tensor, mask: Tensor) -> Weights:
        weights, keep, _ = helper.compute_rollout_correction_and_rejection_mask(old, rollout, mask, **options)
        return weights.batch["rollout_is_weights"] if weights is not None else mask.float(), keep

    return Contender("verl", partial(step, *data), tolerance=1e-4)


def _error(truth: Weights, mask: Tensor, result: Weights) -> float:
    """Error of the weights; infinite where other sequences are kept."""
    if not torch.equal(result[1].bool() & mask, truth[1]):
        return torch.inf
    return distance(result[0] * mask, truth[0])

"""What stands in for `_compute_loss` of TRL's GRPO and RLOO trainers: their forward, then loss and metrics in one pass.

Model, masks and the numbers that TRL's own helper methods give (`get_high_entropy_mask`, `get_off_policy_mask`) are
TRL's. Whether a call is served is decided by the trainer's options alone, which are the same on every rank: the two
sides talk to other processes in another order.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Final

import torch
from torch import Tensor

from fastreward._arguments.options import Aggregation
from fastreward.losses import Loss
from fastreward.patch.trl import objective
from fastreward.patch.trl.objective import Batch, Run

#: What a model's forward may need beside the tokens.
_MODEL_INPUTS: Final = (
    "pixel_values", "image_grid_thw", "num_images", "pixel_attention_mask", "spatial_shapes", "num_tiles",
    "image_sizes", "token_type_ids", "mm_token_type_ids", "image_position_ids",
)  # fmt: skip
_CLIPPED: Final = ("grpo", "bnpo", "dr_grpo", "dapo", "luspo")
#: Loss types whose normaliser is the tokens of the whole generation batch.
_BY_ITEMS: Final = ("cispo", "dapo", "vespo")
_AGGREGATIONS: Final[dict[str, Aggregation]] = {
    "grpo": "seq-mean-token-mean",
    "sapo": "seq-mean-token-mean",
    "bnpo": "token-mean",
    "dr_grpo": "token-sum",
    "dapo": "token-sum",
    "cispo": "token-sum",
    "vespo": "token-sum",
    "luspo": "seq-mean-token-sum",
}
#: As RLOO logs them.
_CLIP_RATIOS: Final = tuple(f"clip_ratio/{x}" for x in ("low_mean", "low_min", "high_mean", "high_max", "region_mean"))


@dataclass(slots=True)
class TrainerLoss:
    """A replacement of `_compute_loss`.

    run: `objective.run`, counted. left: called where a call is handed on. gamma_weights: TRL's own
    `get_gamma_weights`, which a subclass may override; None of a trainer that has none.
    """

    stock: Callable[..., Tensor]
    run: Run
    left: Callable[[], None]
    gamma_weights: Callable[..., Tensor] | None

    def bound(self) -> Callable[..., Tensor]:
        """The function to put into the trainer's class."""

        @functools.wraps(self.stock)
        def _compute_loss(trainer: Any, model: Any, inputs: dict[str, Any]) -> Tensor:
            if self.declined(trainer, inputs) is not None:
                self.left()
                return self.stock(trainer, model, inputs)
            return self.compute(trainer, model, inputs)

        return _compute_loss

    def declined(self, trainer: Any, inputs: dict[str, Any]) -> str | None:
        """Why TRL computes this loss itself, or None. The same on all ranks."""
        raise NotImplementedError

    def compute(self, trainer: Any, model: Any, inputs: dict[str, Any]) -> Tensor:
        """The loss; the metrics go to the trainer."""
        raise NotImplementedError


# --------------------------------------------------------------------------------------------------------------- GRPO
class GRPOLoss(TrainerLoss):
    """`GRPOTrainer._compute_loss`."""

    def declined(self, trainer: Any, inputs: dict[str, Any]) -> str | None:
        """Why TRL computes this loss itself, or None."""
        kind, level = trainer.loss_type, trainer.importance_sampling_level
        masked = trainer.off_policy_mask_threshold is not None or trainer.top_entropy_quantile < 1.0
        delta = trainer.args.delta
        if kind not in _AGGREGATIONS or level not in ("token", "sequence"):
            return "a loss_type or importance_sampling_level that TRL 1.16 has not"
        if level == "sequence" and kind in ("cispo", "sapo"):
            return f"{kind} with importance_sampling_level 'sequence'"
        if trainer.use_adaptive_entropy:
            return "use_adaptive_entropy, whose controller is part of the method"
        if kind in _CLIPPED and delta is not None and delta <= 1 + trainer.epsilon_high:
            return "a delta within the clip range"
        if kind == "vespo" and masked:
            return "vespo with a mask of sequences or tokens"
        if kind == "vespo" and getattr(type(trainer), "get_gamma_weights", None) is not self.gamma_weights:
            return "a get_gamma_weights of one's own"
        if kind == "vespo" and "importance_sampling_ratio" in inputs and not _holds_one(trainer):
            return "vespo with sampling weights whose bounds exclude 1"
        return None

    def compute(self, trainer: Any, model: Any, inputs: dict[str, Any]) -> Tensor:
        """The loss; the metrics go to the trainer."""
        mask = inputs["completion_mask"]
        mask = mask * inputs["tool_mask"] if "tool_mask" in inputs else mask
        logprobs, entropies, aux_loss = _scores(trainer, model, inputs)
        acts = None
        if trainer.top_entropy_quantile < 1.0:
            acts = trainer.get_high_entropy_mask(entropies, mask, 1 - trainer.top_entropy_quantile)
        old = inputs.get("old_per_token_logps")
        old = logprobs.detach() if old is None else old
        training = trainer.model.training
        steps = trainer.current_gradient_accumulation_steps if training else 1.0
        aggregation, normalizer = _AGGREGATIONS[trainer.loss_type], _normalizer(trainer, inputs, mask, steps)
        bonus = _Bonus.of(trainer, mask, acts, normalizer, steps) if trainer._entropy_bonus_enabled else None
        batch = Batch(
            logprobs,
            mask,
            inputs["advantages"],
            entropies if bonus is not None else entropies.detach(),
            old_logprobs=old,
            ref_logprobs=inputs["ref_per_token_logps"] if trainer.beta != 0.0 else None,
            weights=_weights(trainer, inputs, logprobs, old, mask, acts),
            extra={} if bonus is None else bonus.extra,
        )
        formula = _grpo_loss(trainer)
        loss, sums = self.run(batch, formula, aggregation, normalizer)
        sums = _of_nothing(sums, mask)
        metrics = trainer._metrics["train" if training else "eval"]
        if bonus is not None:
            policy = loss.detach() + bonus.in_loss(sums)
            metrics["policy_loss"].append(trainer.accelerator.gather(policy).nanmean().item())
            if training and trainer.accelerator.sync_gradients:
                metrics["entropy_coef"].append(trainer.entropy_coef)
        if trainer.loss_type not in _BY_ITEMS:
            loss = loss / steps
        if aux_loss is not None:
            loss = loss + float(trainer.router_aux_loss_coef) * aux_loss / steps
            metrics["aux_loss"].append(trainer.accelerator.gather_for_metrics(aux_loss).mean().item())
        if mask.shape[1] == 1:
            sums = _of_single_tokens(trainer, batch, formula, sums)
        _log_grpo(trainer, metrics, sums, batch)
        return loss


def _holds_one(trainer: Any) -> bool:
    """Whether the weight of a token that was not sampled is 1: TRL adds up its logarithms over the padding too."""
    low, high = trainer.vllm_importance_sampling_clip_min, trainer.vllm_importance_sampling_clip_max
    return (low is None or low <= 1) and (high is None or high >= 1)


def _scores(trainer: Any, model: Any, inputs: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor | None]:
    """Log-probs and entropies of the completion [B, T], and the load-balancing loss of a mixture of experts."""
    completion_ids = inputs["completion_ids"]
    found: tuple[Tensor, Tensor, Tensor | None] = trainer._get_per_token_logps_and_entropies(
        model,
        torch.cat([inputs["prompt_ids"], completion_ids], dim=1),
        torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1),
        completion_ids.size(1),
        compute_entropy=True,
        compute_aux_loss=trainer.aux_loss_enabled,
        **{name: inputs.get(name) for name in _MODEL_INPUTS},
    )
    return found


def _normalizer(trainer: Any, inputs: dict[str, Any], mask: Tensor, steps: float) -> float | Tensor | None:
    """What the sum of the aggregation is divided by; None: as the aggregation has it."""
    rows, kind = mask.shape[0], trainer.loss_type
    if kind in _BY_ITEMS:
        # The items are those of the generation batch: a window of accumulation has its share of them.
        items = inputs["num_items_in_batch"].clamp(min=1.0) / trainer.accelerator.num_processes
        whole: Tensor = items * steps / trainer.args.steps_per_generation if trainer.model.training else items
        return whole
    if kind == "bnpo":
        return None
    return float(rows * trainer.max_completion_length if kind == "dr_grpo" else rows)


def _weights(
    trainer: Any, inputs: dict[str, Any], logprobs: Tensor, old: Tensor, mask: Tensor, acts: Tensor | None
) -> Tensor | None:
    """The product of all that multiplies the surrogate, [B] or [B, T]."""
    factors = []
    if trainer.off_policy_mask_threshold is not None:
        advantages = inputs["advantages"]
        factors.append(
            trainer.get_off_policy_mask(
                advantages=advantages.unsqueeze(1) if advantages.dim() == 1 else advantages,
                per_token_logps=logprobs,
                sampling_per_token_logps=inputs.get("sampling_per_token_logps", old),
                mask=mask,
                off_policy_threshold=trainer.off_policy_mask_threshold,
            )
        )
    if acts is not None:
        factors.append(acts)
    corrected = trainer.use_vllm and trainer.vllm_importance_sampling_correction
    if trainer.loss_type == "vespo":
        corrected = inputs.get("importance_sampling_ratio") is not None
    if corrected:
        factors.append(inputs["importance_sampling_ratio"])
    if not factors:
        return None
    product: Tensor = math.prod(factors[1:], start=factors[0].float())
    return product.squeeze(1) if product.shape[1] == 1 else product


def _grpo_loss(trainer: Any) -> Loss:
    args, kind, kl = trainer.args, trainer.loss_type, float(trainer.beta)
    common = {
        "kl_coef": kl,
        "kl_corrected": kl != 0.0 and bool(args.use_bias_correction_kl),
        "ratio_of": trainer.importance_sampling_level,
    }
    low, high = float(trainer.epsilon_low), float(trainer.epsilon_high)
    if kind == "cispo":
        return objective.cispo(high, **common)
    if kind == "sapo":
        return objective.sapo(args.sapo_temperature_pos, args.sapo_temperature_neg, **common)
    if kind == "vespo":
        least = 1e-4  # TRL's bound
        pos, neg = max(args.vespo_lambda_pos, least), max(args.vespo_lambda_neg, least)
        return objective.vespo(args.vespo_k_pos, pos, args.vespo_k_neg, neg, **common)
    return objective.clipped(low, high, args.delta, **common)


@dataclass(slots=True)
class _Bonus:
    """The entropy bonus: coef times the mean over the acting tokens, whatever the policy's own normaliser is.

    extra: the factor of each sequence's entropies that the aggregation makes that of, and the tokens that act.
    share: of the sum of the acting entropies in the loss, before it is divided for accumulation.
    """

    extra: dict[str, Tensor]
    share: Tensor

    @staticmethod
    def of(trainer: Any, mask: Tensor, acts: Tensor | None, normalizer: Any, steps: float) -> _Bonus:
        """For a policy loss with this normaliser."""
        acting = (mask if acts is None else mask * acts).sum().clamp(min=1.0)
        lengths = mask.sum(-1).clamp(min=1.0)
        aggregation = _AGGREGATIONS[trainer.loss_type]
        share = trainer.entropy_coef / acting
        if trainer.loss_type in _BY_ITEMS:
            share = share / steps
        denominator = mask.sum().clamp(min=1.0) if normalizer is None else normalizer
        factor = share * denominator * (lengths if aggregation == "seq-mean-token-mean" else torch.ones_like(lengths))
        extra = {"bonus": factor} if acts is None else {"bonus": factor, "acts": acts}
        return _Bonus(extra, share)

    def in_loss(self, sums: dict[str, Tensor]) -> Tensor:
        """What the loss is lower by."""
        return self.share * sums["acting_sum"]


@torch.no_grad()
def _of_single_tokens(trainer: Any, batch: Batch, formula: Loss, sums: dict[str, Tensor]) -> dict[str, Tensor]:
    """The sums to log of completions of one token: TRL takes these for values per sequence, of which all count."""
    old, mask = batch.old_logprobs, batch.mask
    if trainer.importance_sampling_level == "sequence":  # the mean over no tokens is 0, and the ratio 1
        old = torch.where(mask != 0, old, batch.logprobs)  # type: ignore[arg-type]
    every = replace(batch, mask=torch.ones_like(mask), old_logprobs=old)
    own = {name: sums[name] for name in ("phi_sum", "sequences") if name in sums}
    return objective.run(every, formula, "token-sum", 1.0)[1] | own


def _log_grpo(trainer: Any, metrics: Any, sums: dict[str, Tensor], batch: Batch) -> None:
    """TRL's means over the tokens (or sequences) of all processes, in one reduction, then the extremes in another."""
    rows, width = batch.mask.shape
    count = batch.mask.sum().float()
    every = torch.full_like(count, rows)
    # TRL takes what has one column for values per sequence, of which all count.
    per_token = every if width == 1 else count
    by_token = trainer.importance_sampling_level == "token" or batch.advantages.dim() == 2
    kind, means = trainer.loss_type, {}
    if trainer.beta != 0.0:
        means["kl"] = (sums["kl_sum"], per_token)
    means["entropy"] = (sums["entropy_sum"], per_token)
    clips = per_token if by_token else every
    if kind in _CLIPPED:
        means["clip_ratio/low_mean"] = (sums["low_sum"], clips)
        means["clip_ratio/high_mean"] = (sums["high_sum"], clips)
    elif kind == "cispo":
        means["cispo_clip_ratio"] = (sums["high_sum"], clips)
    elif kind == "vespo":
        phi = sums["phi_sum"]
        if batch.advantages.dim() == 1 or width == 1:  # of an empty sequence it is 1
            means["vespo/phi_seq_mean"] = (phi + rows - sums["sequences"], every)
        else:
            means["vespo/phi_seq_mean"] = (phi, per_token)
    found = _means(trainer, means)
    if kind in _CLIPPED:
        low, high = found.pop("clip_ratio/low_mean"), found.pop("clip_ratio/high_mean")
        found |= {"clip_ratio/low_mean": low, "clip_ratio/high_mean": high, "clip_ratio/region_mean": low + high}
        # Those count, as not clipped; of single tokens they are among the sums.
        empty = None if by_token or width == 1 else sums["sequences"] < rows
        found |= _extremes(trainer, sums, empty)
    for name, value in found.items():
        metrics[name].append(value)


def _of_nothing(sums: dict[str, Tensor], mask: Tensor) -> dict[str, Tensor]:
    """The sums, 0 where no token counts at all: the language's metrics are NaN then."""
    something = mask.any()
    return {k: torch.where(something, x, 0.0) if k.endswith(("_sum", "sequences")) else x for k, x in sums.items()}


def _means(trainer: Any, means: dict[str, tuple[Tensor, Tensor]]) -> dict[str, float]:
    """sum / count over all processes, of each (sum, count) by name."""
    local = torch.stack([torch.stack([total, count]) for total, count in means.values()])
    totals = trainer.accelerator.reduce(local, reduction="sum")
    return dict(zip(means, (totals[:, 0] / totals[:, 1].clamp(min=1.0)).tolist(), strict=True))


def _extremes(trainer: Any, sums: dict[str, Tensor], empty: Tensor | None) -> dict[str, float]:
    """The smallest share of tokens clipped low in a sequence, the largest clipped high; NaN where there is none.

    empty: whether there are sequences without a token which count for ones that are not clipped.
    """
    low, high = sums["low_min"], sums["high_max"]
    if empty is not None:
        low, high = torch.where(empty, 0.0, low), torch.where(empty, high.nan_to_num(nan=0.0), high)
    every = trainer.accelerator.gather(torch.stack([low, high]).unsqueeze(0))
    lows, highs = ([x for x in column if not math.isnan(x)] for column in every.T.tolist())
    return {"clip_ratio/low_min": min(lows, default=math.nan), "clip_ratio/high_max": max(highs, default=math.nan)}


# --------------------------------------------------------------------------------------------------------------- RLOO
class RLOOLoss(TrainerLoss):
    """`RLOOTrainer._compute_loss`."""

    def declined(self, trainer: Any, inputs: dict[str, Any]) -> str | None:
        """Why TRL computes this loss itself, or None."""
        return "advantages per token" if inputs["advantages"].dim() != 1 else None

    def compute(self, trainer: Any, model: Any, inputs: dict[str, Any]) -> Tensor:
        """The loss; the metrics go to the trainer."""
        mask = inputs["completion_mask"]
        logprobs, entropies, aux_loss = _scores(trainer, model, inputs)
        # Summed in float32 as TRL does, and as it has summed the old ones: at thousands of tokens the rounding of such
        # a sum is seen in the ratio, which has to be 1 where nothing has changed.
        whole = (logprobs * mask).sum(1).unsqueeze(0)
        every = torch.ones_like(whole, dtype=torch.bool)
        old = inputs["old_logps"].unsqueeze(0)
        batch = Batch(whole, every, inputs["advantages"].unsqueeze(0), torch.zeros_like(old), old_logprobs=old)
        chosen = objective.rloo(float(trainer.epsilon_low), float(trainer.epsilon_high))
        loss, sums = self.run(batch, chosen, "token-mean", None)
        metrics: Any = trainer._metrics["train" if trainer.model.training else "eval"]
        if aux_loss is not None:
            loss = loss + float(trainer.router_aux_loss_coef) * aux_loss
            metrics["aux_loss"].append(trainer.accelerator.gather_for_metrics(aux_loss).mean().item())
        count = every.sum().float()
        means = {
            "entropy": ((entropies.detach() * mask).sum(), mask.sum().float()),
            "clip_ratio/low_mean": (sums["low_sum"], count),
            "clip_ratio/high_mean": (sums["high_sum"], count),
        }
        found = _means(trainer, means) | _extremes(trainer, sums, None)
        found["clip_ratio/region_mean"] = found["clip_ratio/low_mean"] + found["clip_ratio/high_mean"]
        for name in ("entropy", *_CLIP_RATIOS):
            metrics[name].append(found[name])
        return loss

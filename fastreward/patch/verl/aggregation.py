"""verl's agg_loss and compute_value_loss, and what its policy losses share with them: normalisers, masks, dtypes."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor

from fastreward._arguments.options import Aggregation
from fastreward._arguments.transforms import transformed
from fastreward._runtime.masks import zeros_and_ones
from fastreward.losses import Loss
from fastreward.patch.verl import formulas
from fastreward.patch.verl.replacement import CORE, NotServed, Replacement
from fastreward.policy_loss import PolicyLoss, policy_loss
from fastreward.value_loss import value_loss

#: float64 is verl's: fastreward would round it.
DTYPES: Final = (torch.float32, torch.bfloat16, torch.float16)
_IDENTITY: Final[Loss] = formulas.identity()


@dataclass(frozen=True, slots=True)
class Normalised:
    """An aggregation of verl's as `policy_loss` takes it, and by what its result has still to be multiplied."""

    aggregation: Aggregation
    normalizer: Any = None
    factor: float = 1.0

    @property
    def options(self) -> dict[str, Any]:
        """As arguments."""
        return {"aggregation": self.aggregation, "normalizer": self.normalizer}


def normalised(
    width: int,
    mode: str,
    dp_size: Any = 1,
    batch_num_tokens: Any = None,
    global_batch_size: Any = None,
    loss_scale_factor: Any = None,
) -> Normalised:
    """What agg_loss divides by under `mode`, of a mask of this width; raises `NotServed` for what it refuses."""
    scale = width if loss_scale_factor is None else loss_scale_factor
    if not dp_size > 0 or (mode == "seq-mean-token-sum-norm" and not scale):
        raise NotServed("no ranks, or a length of 0")
    if mode == "token-sum":
        return Normalised("token-sum", None if dp_size == 1 else 1.0 / dp_size)
    count = batch_num_tokens if mode == "token-mean" else global_batch_size
    if count is None and dp_size != 1:
        raise NotServed("verl refuses to count the tokens or sequences of one rank of several")
    per_rank = None if count is None else count / dp_size
    if mode in ("token-mean", "seq-mean-token-sum", "seq-mean-token-mean"):
        return Normalised(mode, per_rank)  # type: ignore[arg-type]
    if mode != "seq-mean-token-sum-norm":
        raise NotServed(f"an aggregation {mode!r}")
    if per_rank is None:  # the number of sequences is counted with the loss
        return Normalised("seq-mean-token-sum", None, 1.0 / scale)
    return Normalised("seq-mean-token-sum", per_rank * scale)


def agg_loss(
    _: Any,
    loss_mat: Tensor,
    loss_mask: Tensor,
    loss_agg_mode: str,
    dp_size: Any = 1,
    batch_num_tokens: Any = None,
    global_batch_size: Any = None,
    loss_scale_factor: Any = None,
) -> Tensor:
    """One number of losses per token [B, T]; NaN, as verl, where nothing counts and no normaliser is given."""
    given = (loss_agg_mode, dp_size, batch_num_tokens, global_batch_size, loss_scale_factor)
    check_tokens(loss_mask, loss_mat)
    how = normalised(loss_mask.shape[-1], *given)
    found = policy_loss(loss_mat, None, None, loss_mask, loss=_IDENTITY, empty="zero", **how.options)
    return finished(found, how, (loss_mat, loss_mask))


def compute_value_loss(
    _: Any,
    vpreds: Tensor,
    returns: Tensor,
    values: Tensor,
    response_mask: Tensor,
    cliprange_value: float,
    loss_agg_mode: str = "token-mean",
    dp_size: Any = 1,
    batch_num_tokens: Any = None,
    global_batch_size: Any = None,
    loss_scale_factor: Any = None,
) -> tuple[Tensor, Tensor]:
    """(half the aggregated larger one of both squared errors, share of tokens where the clipped one is the larger)."""
    given = (loss_agg_mode, dp_size, batch_num_tokens, global_batch_size, loss_scale_factor)
    check_tokens(response_mask, vpreds, values, returns)
    how = normalised(response_mask.shape[-1], *given)
    found = value_loss(vpreds, values, returns, response_mask, clip=cliprange_value, empty="zero", **how.options)
    share = found.metrics["clip_fraction"]
    loss = finished(found, how, (vpreds, values, returns, response_mask))
    return loss, torch.where(found.metrics["token_count"] > 0, share, 0.0)


def finished(found: PolicyLoss, how: Normalised, inputs: Sequence[Tensor]) -> Tensor:
    """The loss in the dtype that verl's would have; NaN where verl divides by a count of 0."""
    loss = found.loss
    if how.factor != 1.0:
        loss = loss * how.factor
    if how.normalizer is None and how.aggregation != "token-sum":
        loss = torch.where(found.metrics["token_count"] > 0, loss, torch.nan)
    if how.aggregation.startswith("seq"):
        return loss  # verl counts sequences in float32, and its quotient is that
    return loss.to(functools.reduce(torch.promote_types, [x.dtype for x in inputs]))


def check_tokens(mask: Tensor, trained: Tensor, *constants: Tensor) -> None:
    """Raises `NotServed` unless all are plain [B, T], only `trained` may have a gradient, and mask is of 0 and 1."""
    for x in (mask, trained, *constants):
        if type(x) not in (Tensor, torch.nn.Parameter) or x.layout != torch.strided or x.shape != trained.shape:
            raise NotServed("not one value per token, or a tensor of another kind")
    if trained.ndim != 2 or transformed():
        raise NotServed("not [B, T], or inside a transform of torch.func")
    if any(x.dtype not in DTYPES for x in (trained, *constants)):
        raise NotServed("float64 or integers")
    if any(x.requires_grad for x in (mask, *constants)):
        raise NotServed("a gradient for what is a constant here")
    if not _is_a_mask(mask):
        raise NotServed("a mask with other numbers than 0 and 1, by which verl multiplies")


def _is_a_mask(mask: Tensor) -> bool:
    if mask.dtype == torch.bool:
        return True
    return mask.is_cpu and zeros_and_ones(mask)  # on a GPU looking would make the host wait


_AGGREGATION: Final = ("loss_agg_mode", "dp_size", "batch_num_tokens", "global_batch_size", "loss_scale_factor")
REPLACEMENTS: Final = (
    Replacement(
        f"{CORE}.agg_loss",
        ("loss_mat", "loss_mask", *_AGGREGATION),
        agg_loss,
        "fastreward.policy_loss",
        "one pass over the tokens, and one for the gradient",
    ),
    Replacement(
        f"{CORE}.compute_value_loss",
        ("vpreds", "returns", "values", "response_mask", "cliprange_value", *_AGGREGATION),
        compute_value_loss,
        "fastreward.value_loss",
        "loss, clip fraction and gradient in one pass",
    ),
)

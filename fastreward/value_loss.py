"""The loss of a critic's values, its metrics and its gradient."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final, Literal, get_args

from torch import Tensor

from fastreward._arguments import check
from fastreward._arguments.arrays import accepts_arrays
from fastreward._arguments.groups import GroupIds
from fastreward._arguments.numbers import Number, number
from fastreward._arguments.options import Aggregation, Empty
from fastreward._loss_call.call import PolicyArguments, checked_loss, finish, prepare
from fastreward._loss_call.results import PolicyLoss
from fastreward._runtime.dispatch import select
from fastreward.losses import Loss
from fastreward.losses.value import huber, squared

Name = Literal["squared", "huber"]
_DEFAULT_LOSS: Final = squared()
#: By name, clipped and not; the numbers are the call's (a loss can't be made while torch.compile traces).
_LOSSES: Final = {"squared": (_DEFAULT_LOSS, squared(None)), "huber": (huber(), huber(None))}


@accepts_arrays
def value_loss(
    values: Tensor,
    old_values: Tensor | None,
    returns: Tensor,
    mask: Tensor | None = None,
    *,
    clip: Number | None = 0.2,
    loss: Name | Loss = "squared",
    delta: Number = 1.0,
    aggregation: Aggregation | None = None,
    normalizer: Number | None = None,
    weights: Tensor | None = None,
    keep: Tensor | None = None,
    group_ids: GroupIds | None = None,
    group_size: int | None = None,
    cu_seqlens: Tensor | None = None,
    extra: Mapping[str, Tensor] | None = None,
    empty: Empty = "raise",
    return_token_loss: bool = False,
    explained_variance: bool = False,
) -> PolicyLoss:
    """PPO's value loss with its metrics: half the squared distance from the returns (or Huber's), clipped.

    verl's compute_value_loss and OpenRLHF's ValueLoss, with their factor of 1/2: of the losses of the value and of the
    value held within old_values +- clip the larger counts. The gradient is made with it.

    Args:
        values: the critic's, [B, T], or packed [N] with cu_seqlens. Gradients flow to it, in its dtype. Any floating
            dtype; computed with in float32.
        old_values: those that the advantages were made with, same shape. None where the loss does not clip.
        returns: what the values should be, same shape.
        mask: in the shape of values, bool, integer or float; nonzero = a token that counts. What lies under a zero
            (NaN, inf) leaks nowhere and has gradient 0.
        clip: how far a value may go from the old one; None: as far as it likes (verl: 0.5, OpenRLHF: 0.5 or None).
        loss: "squared": e^2 / 2, e = values - returns; "huber": the same up to |e| = delta, and linear beyond; or your
            own (`losses.define` over t.value, t.old_value, t.returns), which has its own clip.
        delta: where Huber's loss becomes linear.
        aggregation, normalizer, weights, keep, group_ids, group_size, cu_seqlens, extra, empty, return_token_loss: as
            in `policy_loss`; aggregation None: token-mean. OpenRLHF's token_level_loss=False is seq-mean-token-mean.
        explained_variance: also measure that; it takes a second look at values and returns.

    clip, delta and normalizer are numbers or 0-d tensors.

    Returns:
        PolicyLoss(loss f32 [], metrics, token_loss f32 or None). `help(result.metrics)` says what the metrics are.

    Raises:
        TypeError, ValueError: as `policy_loss`; old_values missing where the loss clips.
    """
    values = check.floats("values", values)
    backend = select("value_loss", values)
    numbers: dict[str, Number] = {}
    if isinstance(loss, str):
        check.choice("loss", loss, get_args(Name))
        numbers = {"delta": number("delta", delta, values, check.positive)}
        if clip is not None:
            numbers["clip"] = number("clip", clip, values, check.positive)
        loss = _LOSSES[loss][clip is None]
    chosen = checked_loss(loss, _DEFAULT_LOSS)
    if old_values is None and chosen.asks("old_value"):
        raise ValueError(f"old_values: needed where values are clipped around them; pass clip=None for {chosen.name}")
    given = PolicyArguments(
        mask=mask,
        loss=chosen,
        aggregation=aggregation,
        normalizer=normalizer,
        weights=weights,
        keep=keep,
        group_ids=group_ids,
        group_size=group_size,
        cu_seqlens=cu_seqlens,
        extra=extra,
        empty=empty,
        token_loss=return_token_loss,
        old_values=old_values,
        returns=returns,
        explained_variance=check.flag("explained_variance", explained_variance),
        numbers=numbers,
    )
    call = prepare("values", values, given, entropy=False, backend=backend, trained="value")
    return finish(call, values, None, backend, {"values": values})

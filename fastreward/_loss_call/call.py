"""Arguments of the policy losses: checked, and brought to what the op takes."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final, get_args

import torch
from torch import Tensor

from fastreward._arguments import check
from fastreward._arguments.groups import GroupIds, numbered_groups
from fastreward._arguments.numbers import (
    Number,
    anything,
    is_number,
    may_differ_from_0,
    number,
    parameters,
    single,
    size,
)
from fastreward._arguments.options import AGGREGATIONS, EMPTY, KL, Aggregation, Empty
from fastreward._arguments.tokens import Tokens, broadcast_to_tokens, token_bounds
from fastreward._loss_call.results import Metrics
from fastreward.language.define import Definition
from fastreward.losses import Loss, ppo

_TOKEN, _ROW, _BATCH = 3, 2, 1  # losses._graph.Level, as numbers that Dynamo takes for constants
_DEFAULT_LOSS: Final = ppo()
_TERMS: Final = ("logprob", "old_logprob", "ref_logprob", "rollout_logprob", "advantage", "entropy", "weight")

#: What one can do about a batch in which nothing counts.
NO_TOKEN: Final = 'pass empty="zero" where a micro-batch may be empty (or normalizer=...)'


@dataclass(frozen=True, slots=True)
class Call:
    """A checked call. tensors: what the objective reads besides the differentiable ones, in its order."""

    objective: str
    tensors: list[Tensor]
    tokens: Tokens
    groups: Tensor | None
    parameters: list[float]
    numbers: Tensor | None
    metrics: tuple[str, ...]
    constants: dict[str, Tensor]  # by argument
    may_be_empty: bool
    entropy: bool
    gradient: str | None  # of the gradient token by token, for logits_policy_loss
    gradient_tensors: list[Tensor]

    def check_results(
        self, loss: Tensor, metrics: Metrics, computed: Callable[[], Mapping[str, Tensor | None]]
    ) -> None:
        """That something counted, and that no argument is NaN where it does. computed: log-probs and entropy by name.

        NaN is looked for where the loss or a metric has become NaN, and in advantages per sequence always.
        """
        numbers = metrics.values_tensor.tolist()
        if not numbers[metrics.names.index("token_count")]:
            if not self.may_be_empty and torch.Size(self.tokens.shape).numel():
                raise ValueError(f"mask: expected at least one counted token, got an all-zero mask; {NO_TOKEN}")
            return
        advantages = self.constants.get("advantages")
        rows = () if advantages is None or advantages.shape == self.tokens.shape else (advantages.sum().item(),)
        if any(map(math.isnan, (loss.item(), *numbers, *rows))):  # a sum is NaN where there is one, if not only there
            for argument, x in {**self.constants, **computed()}.items():
                if x is not None:
                    check_numbers(argument, x.detach(), self.tokens)


def prepare(
    name: str,
    like: Tensor,
    old_logprobs: Tensor | None,
    advantages: Tensor | None,
    mask: Tensor | None,
    *,
    loss: Loss | None,
    aggregation: Aggregation | None,
    normalizer: Number | None,
    ref_logprobs: Tensor | None,
    rollout_logprobs: Tensor | None,
    kl: KL | None,
    kl_coef: Number,
    entropy: bool,
    entropy_coef: Number,
    weights: Tensor | None,
    keep: Tensor | None,
    group_ids: GroupIds | None,
    group_size: int | None,
    cu_seqlens: Tensor | None,
    extra: Mapping[str, Tensor] | None,
    empty: Empty,
    token_loss: bool,
    backend: str,
    from_logits: bool = False,
) -> Call:
    """`like`: in the tokens' shape and on their device, called `name` in messages. entropy: whether it is given."""
    loss = _loss(loss)
    chosen: str = loss.aggregation if aggregation is None else aggregation
    check.choice("aggregation", chosen, AGGREGATIONS)
    check.choice("empty", empty, EMPTY)
    _check_kl(kl, kl_coef, ref_logprobs, old_logprobs)
    bounds = token_bounds(cu_seqlens, like, name)
    if bounds is None and like.ndim != 2:
        raise ValueError(f"{name}: expected [B, T], or [N] with cu_seqlens, got shape {list(like.shape)}")
    tokens = Tokens(tuple(like.shape), _with_keep(check.mask(mask, name, like), keep, like, bounds, name), bounds)
    for term in extra or {}:
        if term in _TERMS:
            raise ValueError(f"extra[{term!r}]: {term!r} is a term of its own; pass it by its argument")
    given: dict[str, Tensor] = {}
    arguments: dict[str, Tensor] = {}
    for term, argument, x, read in (
        ("old_logprob", "old_logprobs", old_logprobs, _per_token),
        ("advantage", "advantages", advantages, _advantages),
        ("ref_logprob", "ref_logprobs", ref_logprobs, _per_token),
        ("rollout_logprob", "rollout_logprobs", rollout_logprobs, _per_token),
        ("weight", "weights", weights, _weights),
        *((term, f"extra[{term!r}]", x, on_device) for term, x in (extra or {}).items()),
    ):
        if x is not None:
            given[term] = read(argument, x, like, tokens.rows, name)
            arguments[argument] = given[term]
    levels = [(term, level_of(x, like)) for term, x in given.items()]
    levels += [("logprob", _TOKEN), *([("entropy", _TOKEN)] if entropy else [])]
    packed = bounds is not None
    named: dict[str, Number] = {
        "call.width": 0.0 if packed else size(like.shape[1], like),
        "call.kl_coef": number("kl_coef", kl_coef, like, check.finite),
        "call.entropy_coef": number("entropy_coef", entropy_coef, like, check.finite),
    }
    scalars = loss.scalars
    named |= {term: number(term, scalars[term], like, anything) for term in sorted(scalars)}
    ready = parameters(named, backend)
    given |= {f"parameter.{term}": x for term, x in ready.inputs.items()}
    formula = (tuple(levels), chosen, normalizer is not None, packed, kl, may_differ_from_0(entropy_coef))
    unknown = tuple(ready.inputs)
    # On a GPU the aggregation's weights are known only when all tokens have been seen.
    objective, inputs, metrics, grouped = loss.policy_plan(*formula, token_loss, backend != "cpu", unknown)
    gradient = loss.gradient_plan(*formula, False, False, unknown) if from_logits else None
    unread = [f"extra[{term!r}]" for term in extra or {} if not loss.asks(term)]
    unread += ["rollout_logprobs"] if rollout_logprobs is not None and not loss.asks("rollout_logprob") else []
    if unread:
        raise ValueError(f"{unread[0]}: {loss.name} does not read it; it reads {loss.reading()}")
    if grouped and group_ids is None and group_size is None:
        what = f"aggregation {chosen!r} is" if chosen != loss.aggregation else f"{loss.name} is a loss"
        raise ValueError(f"group_ids: {what} over groups; pass group_ids=... or group_size=...")
    for term, value in loss.tensors.items():
        given[f"parameter.{term}"] = parameter(f"{loss.name}: {term}", value, like, tokens.rows, name)
    if normalizer is not None:
        given["call.normalizer"] = single("normalizer", normalizer, like, check.positive)
    if bounds is not None:
        given["call.width"] = (bounds.diff().max() if tokens.rows else bounds.new_zeros(())).float()
    return Call(
        objective,
        [given[term] for term, _ in inputs],
        tokens,
        numbered_groups(group_ids, group_size, tokens.rows, like),
        ready.known,
        ready.numbers,
        metrics,
        arguments,
        normalizer is not None or empty == "zero",
        entropy,
        None if gradient is None else gradient[0],
        [] if gradient is None else [given[term] for term, _ in gradient[1] if term not in ("logprob", "entropy")],
    )


# ------------------------------------------------------------------------------------------------------------ checks
def _loss(loss: Any) -> Loss:
    if loss is None:
        return _DEFAULT_LOSS
    if not isinstance(loss, Loss):
        raise TypeError(f"loss: expected a loss such as losses.ppo(), got {type(loss).__name__}{how_to_make(loss)}")
    if loss.definition.pairs:
        raise TypeError(f"loss: {loss.name} is a loss over pairs; it goes to preference_loss")
    return loss


def how_to_make(loss: object) -> str:
    """What is missing to make a loss of it, for a message."""
    if isinstance(loss, Definition):
        return f"; call it: {loss.name}()"
    if callable(loss):
        return "; decorate a function over terms with @losses.define and call it"
    return f"; write losses.{loss}()" if isinstance(loss, str) else ""


def _check_kl(kl: str | None, kl_coef: Number, ref_logprobs: Tensor | None, old_logprobs: Tensor | None) -> None:
    if kl is not None:
        check.choice("kl", kl, get_args(KL))
        if ref_logprobs is None:
            raise ValueError(f"ref_logprobs: needed for kl={kl!r}")
        if kl == "k3-corrected" and old_logprobs is None:
            raise ValueError("old_logprobs: needed for kl='k3-corrected'")
    elif may_differ_from_0(kl_coef):
        raise ValueError(f"kl: expected one of {', '.join(map(repr, get_args(KL)))} where kl_coef is not 0, got None")


def _per_token(name: str, x: object, like: Tensor, rows: int, reference: str) -> Tensor:
    tensor = check.floats(name, x)
    check.shape(name, tensor, like.shape, f"as {reference}")
    check.same_device(name, tensor, reference, like)
    return check.constant(name, tensor).contiguous()


def _weights(name: str, x: object, like: Tensor, rows: int, reference: str) -> Tensor:
    tensor = check.reals(name, x)
    if tensor.ndim == 1 and tuple(tensor.shape) != tuple(like.shape):
        check.shape(name, tensor, (rows,), "one per sequence")
    else:
        check.shape(name, tensor, like.shape, f"as {reference}")
    check.same_device(name, tensor, reference, like)
    return check.constant(name, tensor).contiguous()


def _advantages(name: str, x: object, like: Tensor, rows: int, reference: str) -> Tensor:
    tensor = check.reals(name, x)
    if not check.shape_among(tensor, like.shape, (rows,)):
        raise ValueError(
            f"{name}: expected shape {list(like.shape)} (one per token) or [{rows}] (one per sequence), "
            f"got {list(tensor.shape)}"
        )
    check.same_device(name, tensor, reference, like)
    return check.constant(name, tensor).contiguous()


def on_device(name: str, x: object, like: Tensor, rows: int, reference: str) -> Tensor:
    """A constant per token, per sequence or for all, f32."""
    if is_number(x):
        return single(name, x, like, anything)
    tensor = check.reals(name, x)
    if not check.shape_among(tensor, like.shape, (rows,)):
        raise ValueError(
            f"{name}: expected shape {list(like.shape)} (one per token), [{rows}] (one per sequence) or [], "
            f"got {list(tensor.shape)}"
        )
    check.same_device(name, tensor, reference, like)
    return check.constant(name, tensor).contiguous()


def parameter(name: str, x: Tensor, like: Tensor, rows: int, reference: str) -> Tensor:
    """A loss's parameter: one value per row, or for all."""
    if is_number(x):
        return single(name, x, like, anything)
    tensor = check.reals(name, x)
    check.shape(name, tensor, (rows,), "one per sequence")
    check.same_device(name, tensor, reference, like)
    return check.constant(name, tensor).contiguous()


def level_of(x: Tensor, like: Tensor) -> int:
    """How often `x` has a value, beside tokens like `like`."""
    if x.shape == like.shape:
        return _TOKEN
    return _ROW if x.ndim else _BATCH


def check_numbers(name: str, x: Tensor, tokens: Tokens) -> None:
    """No NaN in `x`, one per token, per sequence or for all, where a token counts."""
    mask, bounds = tokens.mask, tokens.cu_seqlens
    counted = torch.ones(tokens.shape, dtype=torch.bool, device=x.device) if mask is None else mask != 0
    if x.ndim and x.shape != tokens.shape:
        before = None if bounds is None else torch.nn.functional.pad(counted.cumsum(0), (1, 0))[bounds]
        counted = counted.any(-1) if before is None else before.diff() > 0
    check.every(name, ~(x.isnan() & counted) if x.ndim else ~x.isnan(), x, "numbers where mask is set")


def _with_keep(
    mask: Tensor | None, keep: Tensor | None, like: Tensor, bounds: Tensor | None, name: str
) -> Tensor | None:
    """The mask, less what `keep` drops; contiguous."""
    if keep is None:
        return None if mask is None else mask.contiguous()
    kept = check.constant("keep", check.tensor("keep", keep)) != 0
    check.same_device("keep", keep, name, like)
    sequences = like.shape[0] if bounds is None else bounds.shape[0] - 1
    if kept.shape != like.shape:
        check.shape("keep", kept, (sequences,), f"one per sequence, or as {name}")
        kept = broadcast_to_tokens(kept, like.shape, bounds)
    return (kept if mask is None else kept & (mask != 0)).contiguous()

"""Arguments of the policy losses: checked, brought to what the op takes, and what is made of its results."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

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
from fastreward._arguments.options import AGGREGATIONS, EMPTY, KL, KLS, Aggregation, Empty
from fastreward._arguments.tokens import Tokens, broadcast_to_tokens, one_per_token, token_bounds
from fastreward._loss_call.op import Evaluation, evaluate
from fastreward._loss_call.results import Metrics, PolicyLoss
from fastreward.language.define import Definition, Loss, published
from fastreward.language.node import Level
from fastreward.language.terms import PER_TOKEN

_TERMS: Final = {
    "logprob": "logprobs",
    "old_logprob": "old_logprobs",
    "advantage": "advantages",
    "ref_logprob": "ref_logprobs",
    "rollout_logprob": "rollout_logprobs",
    "weight": "weights",
    "entropy": "entropy",
    "value": "values",
    "old_value": "old_values",
    "returns": "returns",
}

#: What one can do about a batch in which nothing counts.
NO_TOKEN: Final = 'pass empty="zero" where a micro-batch may be empty (or normalizer=...)'


@dataclass(slots=True, eq=False, repr=False)
class PolicyArguments:
    """The arguments that the losses over log-probs and `value_loss` share, as they were given."""

    mask: Tensor | None
    loss: Loss
    aggregation: Aggregation | None
    normalizer: Number | None
    weights: Tensor | None
    keep: Tensor | None
    group_ids: GroupIds | None
    group_size: int | None
    cu_seqlens: Tensor | None
    extra: Mapping[str, Tensor] | None
    empty: Empty
    token_loss: bool
    old_logprobs: Tensor | None = None
    advantages: Tensor | None = None
    ref_logprobs: Tensor | None = None
    rollout_logprobs: Tensor | None = None
    kl: KL | None = None
    kl_coef: Number = 0.0
    entropy_coef: Number = 0.0
    return_tokens: Sequence[str] = ()
    old_values: Tensor | None = None
    returns: Tensor | None = None
    explained_variance: bool = False
    numbers: Mapping[str, Number] = field(default_factory=dict)  # of the loss, in place of its own


@dataclass(slots=True, eq=False, repr=False)
class Call:
    """A checked call. tensors: what the objective reads besides the differentiable ones, in its order."""

    objective: str
    extras: Tensor | None  # f32 [K, B]: differentiable
    tensors: list[Tensor]
    tokens: Tokens
    groups: Tensor | None
    parameters: list[float]
    numbers: Tensor | None
    metrics: tuple[str, ...]
    terms: dict[str, Tensor]  # the constants by term
    levels: dict[str, Level]  # how often each has a value
    may_be_empty: bool
    token_loss: bool
    token_names: tuple[str, ...]
    gradient: str | None  # of the gradient token by token, for logits_policy_loss
    gradient_tensors: list[Tensor]

    def check_results(self, found: Evaluation, computed: Callable[[], Mapping[str, Tensor | None]]) -> None:
        """That something counted, and that no argument is NaN where it does. computed: log-probs and entropy by name.

        NaN is looked for where the loss or a metric has become NaN, and in advantages per sequence always.
        """
        numbers = found.numbers()
        if not numbers[1 + self.metrics.index("token_count")]:
            if not self.may_be_empty and 0 not in self.tokens.shape:
                raise ValueError(f"mask: expected at least one counted token, got an all-zero mask; {NO_TOKEN}")
            return
        if self.levels.get("advantage") == Level.SEQUENCE:
            numbers = [*numbers, self.terms["advantage"].max().item()]  # NaN where there is one
        if any(map(math.isnan, numbers)) and check.nan_refused():
            for term, x in self.terms.items():
                check_numbers(_argument(term), x, self.levels[term], self.tokens)
            for argument, given in computed().items():
                if given is not None:
                    check_numbers(argument, given.detach(), Level.TOKEN, self.tokens)

    def result(
        self, found: Evaluation, loss: Tensor | None = None, shaped: Callable[[Tensor], Tensor] = lambda x: x
    ) -> PolicyLoss:
        """What a caller gets. loss: with its gradient, instead of the evaluation's. shaped: tokens as they came."""
        return PolicyLoss(
            found.loss if loss is None else loss,
            Metrics(found.metrics, self.metrics),
            shaped(found.token_loss) if self.token_loss else None,
            dict(zip(self.token_names, map(shaped, found.tokens), strict=True)),
        )


def prepare(
    name: str,
    like: Tensor,
    given: PolicyArguments,
    *,
    entropy: bool,
    backend: str,
    from_logits: bool = False,
    trained: str = "logprob",
) -> Call:
    """`like`: in the tokens' shape and on their device, called `name` in messages. entropy: whether it is given.

    trained: the term whose gradient is wanted.
    """
    loss = given.loss
    aggregation: str = loss.aggregation if given.aggregation is None else given.aggregation
    check.choice("aggregation", aggregation, AGGREGATIONS)
    check.choice("empty", given.empty, EMPTY)
    wanted = _token_names(given.return_tokens)
    _check_kl(given)
    tokens = _checked_tokens(name, like, given)
    terms = _checked_terms(name, like, given, tokens.rows)
    packed = tokens.cu_seqlens is not None
    ready = parameters(_numbers(like, given, packed), backend)
    levels = {term: level_of(_argument(term), x, tokens, loss, term) for term, x in terms.items()}
    computed = [(trained, Level.TOKEN), ("entropy", Level.TOKEN)] if entropy else [(trained, Level.TOKEN)]
    bonus = may_differ_from_0(given.entropy_coef)
    formula = ((*levels.items(), *computed), aggregation, given.normalizer is not None, packed, given.kl, bonus)
    unknown = tuple(ready.inputs)
    # On a GPU the aggregation's weights are known only when all tokens have been seen.
    plan = loss.policy_plan(*formula, given.token_loss, backend != "cpu", unknown, wanted, given.explained_variance)
    objective, inputs, metrics, grouped, extras = plan
    gradient = loss.gradient_plan(*formula, False, False, unknown) if from_logits else None
    _check_read(given)
    if grouped and given.group_ids is None and given.group_size is None:
        chosen = aggregation == "group-mean" and loss.aggregation != aggregation
        what = f"aggregation {aggregation!r} is" if chosen else f"{loss.name} is a loss"
        raise ValueError(f"group_ids: {what} over groups; pass group_ids=... or group_size=...")
    tensors = {**terms, **{f"parameter.{term}": x for term, x in ready.inputs.items()}}
    for term, value in loss.tensors.items():
        tensors[f"parameter.{term}"] = parameter(f"{loss.name}: {term}", value, like, tokens.rows, name)
    if given.normalizer is not None:
        tensors["call.normalizer"] = single("normalizer", given.normalizer, like, check.positive)
    if tokens.cu_seqlens is not None:
        tensors["call.width"] = _longest(tokens.cu_seqlens)
    return Call(
        objective,
        torch.stack([tensors[term] for term in extras]) if extras else None,
        [tensors[term] for term, _ in inputs],
        tokens,
        numbered_groups(given.group_ids, given.group_size, tokens.rows, like),
        ready.known,
        ready.numbers,
        metrics,
        terms,
        levels,
        given.normalizer is not None or given.empty == "zero",
        given.token_loss,
        wanted,
        None if gradient is None else gradient[0],
        [] if gradient is None else [tensors[term] for term, _ in gradient[1] if term not in ("logprob", "entropy")],
    )


def finish(
    call: Call, logprobs: Tensor, entropy: Tensor | None, backend: str, named: Mapping[str, Tensor | None]
) -> PolicyLoss:
    """The loss of a checked call. named: what log-probs and entropy are called where they are NaN."""
    found = evaluate(
        call.objective,
        logprobs.contiguous(),
        None if entropy is None else entropy.contiguous(),
        call.tensors,
        [call.tokens],
        call.groups,
        call.parameters,
        call.numbers,
        backend,
        call.extras,
    )
    if check.values_checked(logprobs):
        call.check_results(found, lambda: named)
    return call.result(found)


def reads_entropy(given: PolicyArguments) -> bool:
    """Whether a call that makes its own log-probs has to make entropies too."""
    return may_differ_from_0(given.entropy_coef) or given.loss.asks("entropy") or "entropy" in given.return_tokens


def _token_names(given: object) -> tuple[str, ...]:
    """The names of return_tokens, each once. Which there are is known when the loss has been traced."""
    if not isinstance(given, tuple | list) or not all(isinstance(name, str) for name in given):
        hint = f"; write ({given!r},)" if isinstance(given, str) else ""
        raise TypeError(f"return_tokens: expected a tuple of names, got {given!r}{hint}")
    return tuple(dict.fromkeys(given))


# ------------------------------------------------------------------------------------------------------------ checks
def checked_loss(loss: object, default: Loss) -> Loss:
    """`loss`, or the default in its place; over pairs, or none, as the default is."""
    if loss is None:
        return default
    if not isinstance(loss, Loss):
        example, hint = f"losses.{default.name}()", _how_to_make(loss, published(default.pairs))
        raise TypeError(f"loss: expected a loss such as {example}, got {type(loss).__name__}{hint}")
    if _place(loss) != _place(default):
        kind, place = _place(loss)
        raise TypeError(f"loss: {loss.name} is {kind}; it goes to {place}")
    return loss


def _place(loss: Loss) -> tuple[str, str]:
    """What kind of loss it is, and the operation that takes it."""
    if loss.pairs:
        return "a loss over pairs", "preference_loss"
    if (loss.asks("log_p") or loss.asks("log_q")) and not loss.asks("logprob"):
        return "a divergence", "token_divergence"
    of_values = loss.asks("value") and not loss.asks("logprob")  # a policy's may have an extra that is called value
    return ("a loss of values", "value_loss") if of_values else ("a policy loss", "policy_loss")


def _how_to_make(loss: object, known: list[str]) -> str:
    """What is missing to make a loss of it, for a message. known: the names in `losses` that would do."""
    if isinstance(loss, Definition):
        return f"; call it: {loss.name}()"
    name = getattr(loss, "__name__", "")
    if callable(loss) and (getattr(loss, "__module__", None) or "").startswith("fastreward.recipes."):
        instead = f", or pass losses.{name}()" if name in known else ""
        return f"; {name} is a recipe: call it in place of the operation{instead}"
    if callable(loss):
        return "; decorate a function over terms with @losses.define and call it"
    if not isinstance(loss, str):
        return ""
    if loss in known:
        return f"; write losses.{loss}()"
    near = [f"losses.{close}()" for close in difflib.get_close_matches(loss, known)]
    hint = f" (near: {', '.join(near)})" if near else ""
    return f"; no loss for this operation has that name{hint}; published methods: `fastreward recipes {loss}`"


def _check_kl(given: PolicyArguments) -> None:
    kl = given.kl
    if kl is not None:
        check.choice("kl", kl, KLS)
        if given.ref_logprobs is None:
            raise ValueError(f"ref_logprobs: needed for kl={kl!r}")
        if kl == "k3-corrected" and given.old_logprobs is None:
            raise ValueError("old_logprobs: needed for kl='k3-corrected'")
    elif may_differ_from_0(given.kl_coef):
        raise ValueError(f"kl: expected one of {', '.join(map(repr, KLS))} where kl_coef is not 0, got None")


def _check_read(given: PolicyArguments) -> None:
    """That the loss reads what is given for it alone."""
    loss, only = given.loss, list(given.extra or {})
    if given.rollout_logprobs is not None:
        only.append("rollout_logprob")
    for term in only:
        if not loss.asks(term):
            raise ValueError(f"{_argument(term)}: {loss.name} does not read it; it reads {loss.reading()}")


def _checked_tokens(name: str, like: Tensor, given: PolicyArguments) -> Tokens:
    bounds = token_bounds(given.cu_seqlens, like, name)
    if bounds is None and like.ndim != 2:
        raise ValueError(f"{name}: expected [B, T], or [N] with cu_seqlens, got shape {list(like.shape)}")
    mask = check.mask(given.mask, name, like)
    return Tokens(tuple(like.shape), _with_keep(mask, given.keep, like, bounds, name), bounds)


def _checked_terms(name: str, like: Tensor, given: PolicyArguments, rows: int) -> dict[str, Tensor]:
    """The constants of a call by term, f32 and contiguous."""
    terms: dict[str, Tensor] = {}
    if given.old_logprobs is not None:
        terms["old_logprob"] = per_token("old_logprobs", given.old_logprobs, like, name)
    if given.advantages is not None:
        terms["advantage"] = _advantages("advantages", given.advantages, like, rows, name)
    if given.ref_logprobs is not None:
        terms["ref_logprob"] = per_token("ref_logprobs", given.ref_logprobs, like, name)
    if given.rollout_logprobs is not None:
        terms["rollout_logprob"] = per_token("rollout_logprobs", given.rollout_logprobs, like, name)
    for term, argument, x in (("old_value", "old_values", given.old_values), ("returns", "returns", given.returns)):
        if x is not None:
            terms[term] = per_token(argument, x, like, name)
    if given.weights is not None:
        terms["weight"] = _weights("weights", given.weights, like, rows, name)
    for term, (argument, x) in checked_extra("extra", given.extra, _TERMS).items():
        if x is not None:
            place = _per_sequence if term in given.loss.differentiable else on_device
            terms[term] = place(argument, x, like, rows, name)
    return terms


def _argument(term: str) -> str:
    return _TERMS.get(term, f"extra[{term!r}]")


def _numbers(like: Tensor, given: PolicyArguments, packed: bool) -> dict[str, Number]:
    """The numbers of a call by name, in the order of an objective's parameters."""
    scalars = given.loss.scalars
    named: dict[str, Number] = {
        "call.width": 0.0 if packed else size(like.shape[1], like),
        "call.kl_coef": number("kl_coef", given.kl_coef, like, check.finite),
        "call.entropy_coef": number("entropy_coef", given.entropy_coef, like, check.finite),
    }
    for term in sorted(scalars):
        own = given.numbers.get(term)
        named[term] = number(term, scalars[term], like, anything) if own is None else own
    return named


def _longest(bounds: Tensor) -> Tensor:
    return (bounds.diff().max() if bounds.shape[0] > 1 else bounds.new_zeros(())).float()


def checked_extra(name: str, extra: object, own: Collection[str]) -> dict[str, tuple[str, Any]]:
    """Argument and value of each extra, by term; none is called as a term that has an argument of its own."""
    if not isinstance(extra, Mapping | None):
        raise TypeError(f"{name}: expected a mapping from terms to tensors or numbers, got {type(extra).__name__}")
    found = {}
    for term, x in (extra or {}).items():
        argument = f"{name}[{term!r}]"
        if term in own:
            raise ValueError(f"{argument}: {term!r} is a term of its own; pass it by its argument")
        found[term] = argument, x
    return found


def _constant(name: str, x: Tensor, like: Tensor, reference: str) -> Tensor:
    check.same_device(name, x, reference, like)
    return check.constant(name, x).contiguous()


def per_token(name: str, x: object, like: Tensor, reference: str) -> Tensor:
    tensor = check.floats(name, x)
    check.shape(name, tensor, like.shape, f"as {reference}")
    return _constant(name, tensor, like, reference)


def _weights(name: str, x: object, like: Tensor, rows: int, reference: str) -> Tensor:
    tensor = check.reals(name, x)
    if tensor.ndim == 1 and tuple(tensor.shape) != tuple(like.shape):
        check.shape(name, tensor, (rows,), "one per sequence")
    else:
        check.shape(name, tensor, like.shape, f"as {reference}")
    return _constant(name, tensor, like, reference)


def _advantages(name: str, x: object, like: Tensor, rows: int, reference: str) -> Tensor:
    tensor = check.reals(name, x)
    if not check.shape_among(tensor, like.shape, (rows,)):
        raise ValueError(
            f"{name}: expected shape {list(like.shape)} (one per token) or [{rows}] (one per sequence), "
            f"got {list(tensor.shape)}"
        )
    return _constant(name, tensor, like, reference)


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
    return _constant(name, tensor, like, reference)


def _per_sequence(name: str, x: object, like: Tensor, rows: int, reference: str) -> Tensor:
    """Differentiable: one value per sequence, f32 [B]; one for all is given to each."""
    if not isinstance(x, Tensor):
        return single(name, x, like, anything).expand(rows)
    tensor = check.reals(name, x)
    if tensor.ndim:
        check.shape(name, tensor, (rows,), "one per sequence")
    check.same_device(name, tensor, reference, like)
    return tensor.expand(rows)


def parameter(name: str, x: Tensor, like: Tensor, rows: int, reference: str) -> Tensor:
    """A loss's parameter: one value per row, or for all."""
    if is_number(x):
        return single(name, x, like, anything)
    tensor = check.reals(name, x)
    check.shape(name, tensor, (rows,), "one per sequence")
    return _constant(name, tensor, like, reference)


def level_of(name: str, x: Tensor, tokens: Tokens, loss: Loss, term: str, side: int = 0) -> Level:
    """How often `x`, which is called `name`, has a value; where both would fit the loss may have said it."""
    if not x.ndim:
        return Level.BATCH
    if tuple(x.shape) == (tokens.rows,) and loss.asks_once(term, side):
        return Level.SEQUENCE
    per_token = term in PER_TOKEN or one_per_token(name, x, tokens.shape, tokens.cu_seqlens)
    return Level.TOKEN if per_token else Level.SEQUENCE


def check_numbers(name: str, x: Tensor, level: Level, tokens: Tokens) -> None:
    """No NaN in `x` where a token counts."""
    mask, bounds = tokens.mask, tokens.cu_seqlens
    counted = torch.ones(tokens.shape, dtype=torch.bool, device=x.device) if mask is None else mask != 0
    if level == Level.SEQUENCE:
        before = None if bounds is None else torch.nn.functional.pad(counted.cumsum(0), (1, 0))[bounds]
        counted = counted.any(-1) if before is None else before.diff() > 0
    check.every(name, ~(x.isnan() & counted) if x.ndim else ~x.isnan(), x, "numbers where mask is set")


def _with_keep(
    mask: Tensor | None, keep: Tensor | None, like: Tensor, bounds: Tensor | None, name: str
) -> Tensor | None:
    """The mask, less what `keep` drops; contiguous."""
    if keep is None:
        return mask
    kept = check.constant("keep", check.tensor("keep", keep)) != 0
    check.same_device("keep", keep, name, like)
    sequences = like.shape[0] if bounds is None else bounds.shape[0] - 1
    if not one_per_token("keep", kept, like.shape, bounds):
        check.shape("keep", kept, (sequences,), f"one per sequence, or as {name}")
        kept = broadcast_to_tokens(kept, like.shape, bounds)
    return (kept if mask is None else kept & (mask != 0)).contiguous()

"""Decorators for a recipe that is one loss, or one rule: a short function makes it, and the operation does the rest.

    @policy_recipe("SAPO (soft adaptive policy optimization)", "arXiv 2511.20347", code="verl core_algos.py")
    def sapo(*, tau_pos: float = 1.0, tau_neg: float = 1.05, **options: Unpack[LossOptions]) -> Loss:
        \"\"\"-A sigmoid(tau (r - 1)) 4 / tau, tau = tau_pos where A > 0, else tau_neg.\"\"\"
        return losses.sapo(tau_pos, tau_neg)

is called `recipes.sapo(logprobs, old_logprobs, advantages, mask, tau_pos=..., aggregation=..., **options)`: in its
signature, and for type checkers, the operation's arguments stand before the function's own and its options behind them.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any, ParamSpec, Protocol, TypedDict, TypeVar, Unpack, cast

from torch import Tensor

from fastreward._arguments.options import KL, Aggregation
from fastreward._loss_call.results import Metrics, PolicyLoss
from fastreward.correction import CorrectionLevel, Mode, correction_weights
from fastreward.losses import Loss
from fastreward.policy_loss import policy_loss
from fastreward.preference_loss import preference_loss
from fastreward.recipes._catalogue.registry import recipe
from fastreward.recipes._shared.options import (
    CorrectionOptions,
    PairOptions,
    PolicyOptions,
    add_extra,
    add_kl,
    keep_also,
    scored,
)

P = ParamSpec("P")
R = TypeVar("R")
Correction = tuple[Tensor, Tensor, Metrics]
Threshold = float | tuple[float, float]


class Rule(TypedDict, total=False):
    """A method's arguments for `fastreward.correction_weights`."""

    mode: Mode | None
    level: CorrectionLevel
    low: float | None
    high: float | None
    reject: Mapping[str, Threshold] | None


class _Policy(Protocol[P]):
    def __call__(
        self,
        logprobs: Tensor,
        old_logprobs: Tensor,
        advantages: Tensor,
        mask: Tensor | None = None,
        *args: P.args,
        **kwargs: P.kwargs,
    ) -> PolicyLoss: ...


class _Reading(Protocol[P]):
    def __call__(
        self, logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, *args: P.args, **kwargs: P.kwargs
    ) -> PolicyLoss: ...


class _Rewarded(Protocol[P]):
    def __call__(
        self,
        logprobs: Tensor,
        old_logprobs: Tensor | None,
        rewards: Tensor,
        mask: Tensor | None = None,
        *args: P.args,
        **kwargs: P.kwargs,
    ) -> PolicyLoss: ...


class _Pair(Protocol[P]):
    def __call__(
        self,
        chosen_logprobs: Tensor,
        rejected_logprobs: Tensor,
        ref_chosen_logprobs: Tensor,
        ref_rejected_logprobs: Tensor,
        *args: P.args,
        **kwargs: P.kwargs,
    ) -> PolicyLoss: ...


class _Correction(Protocol[P]):
    def __call__(
        self,
        old_logprobs: Tensor,
        rollout_logprobs: Tensor,
        mask: Tensor | None = None,
        *args: P.args,
        **kwargs: P.kwargs,
    ) -> Correction: ...


def policy_recipe(
    title: str, source: str, *, aggregation: Aggregation | None = None, kl: tuple[KL, float] | None = None, **facts: Any
) -> Callable[[Callable[P, Loss]], _Policy[P]]:
    """A policy loss. aggregation: None is the loss's own. kl: the kind and its coefficient, with ref_logprobs."""

    def make(build: Callable[P, Loss]) -> _Policy[P]:
        published = aggregation or _aggregation(build, facts)

        def call(
            logprobs: Tensor,
            old_logprobs: Tensor,
            advantages: Tensor,
            mask: Tensor | None = None,
            *,
            aggregation: Aggregation = published,
            **options: Unpack[PolicyOptions],
        ) -> PolicyLoss:
            loss, rest = _made(build, options)
            if kl is not None:
                add_kl(rest, *kl)
            return policy_loss(logprobs, old_logprobs, advantages, mask, loss=loss, aggregation=aggregation, **rest)

        return cast("_Policy[P]", recipe(title, source, build=build, **facts)(_described(call, build)))

    return make


def reading_recipe(title: str, source: str, **facts: Any) -> Callable[[Callable[P, Loss]], _Reading[P]]:
    """A policy loss that reads more. The function's positional parameters are what it reads as extra, then the mask."""

    def make(build: Callable[P, Loss]) -> _Reading[P]:
        published = _aggregation(build, facts)

        def call(
            logprobs: Tensor,
            old_logprobs: Tensor,
            advantages: Tensor,
            *read: Tensor,
            aggregation: Aggregation = published,
            **options: Unpack[PolicyOptions],
        ) -> PolicyLoss:
            extra = _read(build, read, options, 3)
            loss, rest = _made(build, options, *read)
            mask = extra.pop("mask", None)
            add_extra(rest, **extra)
            return policy_loss(logprobs, old_logprobs, advantages, mask, loss=loss, aggregation=aggregation, **rest)

        return cast("_Reading[P]", recipe(title, source, build=build, **facts)(_described(call, build)))

    return make


def reward_recipe(
    title: str, source: str, *, keep: Callable[[Tensor], Tensor] | None = None, **facts: Any
) -> Callable[[Callable[P, Loss]], _Rewarded[P]]:
    """A policy loss on rewards in the place of advantages, NaN: not scored. keep: whose responses count, by reward."""

    def make(build: Callable[P, Loss]) -> _Rewarded[P]:
        published = _aggregation(build, facts)

        def call(
            logprobs: Tensor,
            old_logprobs: Tensor | None,
            rewards: Tensor,
            mask: Tensor | None = None,
            *,
            aggregation: Aggregation = published,
            **options: Unpack[PolicyOptions],
        ) -> PolicyLoss:
            loss, rest = _made(build, options)
            rewards = scored(rest, rewards, logprobs)
            if keep is not None:
                keep_also(rest, keep(rewards), logprobs)
            return policy_loss(logprobs, old_logprobs, rewards, mask, loss=loss, aggregation=aggregation, **rest)

        return cast("_Rewarded[P]", recipe(title, source, build=build, **facts)(_described(call, build)))

    return make


def pair_recipe(title: str, source: str, **facts: Any) -> Callable[[Callable[P, Loss]], _Pair[P]]:
    """A preference loss with a reference. The function's positional parameters are what the loss reads as extra."""

    def make(build: Callable[P, Loss]) -> _Pair[P]:
        def call(
            chosen_logprobs: Tensor,
            rejected_logprobs: Tensor,
            ref_chosen_logprobs: Tensor,
            ref_rejected_logprobs: Tensor,
            *read: Tensor,
            **options: Unpack[PairOptions],
        ) -> PolicyLoss:
            extra = _extra(build, read, options)
            loss, rest = _made(build, options, *read)
            return preference_loss(
                chosen_logprobs,
                rejected_logprobs,
                loss=loss,
                ref_chosen_logprobs=ref_chosen_logprobs,
                ref_rejected_logprobs=ref_rejected_logprobs,
                **extra,
                **rest,
            )

        return cast("_Pair[P]", recipe(title, source, build=build, **facts)(_described(call, build)))

    return make


def correction_recipe(title: str, source: str, **facts: Any) -> Callable[[Callable[P, Rule]], _Correction[P]]:
    """Weights for the gap between the policy and the engine that wrote the rollouts."""

    def make(rule: Callable[P, Rule]) -> _Correction[P]:
        def call(
            old_logprobs: Tensor,
            rollout_logprobs: Tensor,
            mask: Tensor | None = None,
            **options: Unpack[CorrectionOptions],
        ) -> Correction:
            made, rest = _made(rule, options)
            return correction_weights(old_logprobs, rollout_logprobs, mask, **made, **rest)

        return cast("_Correction[P]", recipe(title, source, **facts)(_described(call, rule)))

    return make


def _aggregation(build: Callable[..., Loss], facts: Mapping[str, Any]) -> Aggregation:
    """The aggregation that the loss was published with."""
    read = [None for p in _own(build).values() if p.kind is p.POSITIONAL_OR_KEYWORD]
    return cast(Aggregation, build(*read, **facts.get("settings", {})).definition.aggregation)


@functools.cache
def _own(method: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """The method's own parameters: all but **options."""
    return {name: p for name, p in inspect.signature(method).parameters.items() if p.kind is not p.VAR_KEYWORD}


def _made(method: Callable[..., R], options: Any, *read: Tensor) -> tuple[R, Any]:
    """The method's result on its own options, and the other options."""
    return method(*read, **options), {name: value for name, value in options.items() if name not in _own(method)}


def _read(method: Callable[..., Loss], read: tuple[Tensor, ...], options: Any, before: int) -> dict[str, Tensor]:
    """The method's positional arguments by name, however they were given; `before`: how many the operation has."""
    names = [name for name, p in _own(method).items() if p.kind is p.POSITIONAL_OR_KEYWORD]
    if len(read) > len(names):
        counts = f"{before + len(names)} positional arguments but {before + len(read)} were given"
        raise TypeError(f"{method.__name__}() takes {counts}")
    return dict(zip(names, read, strict=False)) | {n: options[n] for n in names if n in options}


def _extra(method: Callable[..., Loss], read: tuple[Tensor, ...], options: Any) -> dict[str, Any]:
    """The positional arguments as `preference_loss` takes them: chosen_x and rejected_x are x of their side."""
    extra: dict[str, dict[str, Tensor]] = {}
    for name, value in _read(method, read, options, 4).items():
        side, _, rest = name.partition("_")
        if side in ("chosen", "rejected"):  # a loss reads a token's logprob, a caller passes logprobs
            extra.setdefault(f"{side}_extra", {})[rest.replace("logprobs", "logprob")] = value
        else:
            extra.setdefault("extra", {})[name] = value
    return extra


def _described(call: Callable[..., R], method: Callable[..., Any]) -> Callable[..., R]:
    """`call` with the method's name and docstring, and with the parameters of both."""
    outer = inspect.signature(call)
    theirs = [p for p in outer.parameters.values() if p.kind is not p.VAR_POSITIONAL]
    first = [p for p in theirs if p.kind is p.POSITIONAL_OR_KEYWORD]
    # Positional: the operation's, then the method's own; by keyword: the method's own, then the operation's.
    parameters = sorted([*first, *_own(method).values(), *theirs[len(first) :]], key=lambda p: p.kind)
    functools.update_wrapper(call, method)
    call.__signature__ = outer.replace(parameters=parameters)  # type: ignore[attr-defined]
    call.__annotations__ = {p.name: p.annotation for p in parameters} | {"return": outer.return_annotation}
    return call

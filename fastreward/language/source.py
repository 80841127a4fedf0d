"""`Loss.source`: the kernel that a backend generates for a loss."""

from __future__ import annotations

import importlib
from typing import Any

from fastreward._runtime.dispatch import module
from fastreward.language.node import Level
from fastreward.language.objective import PolicyCall, of_values, policy_objective
from fastreward.language.pair_objective import PairCall, pair_objective
from fastreward.language.terms import PairTerms
from fastreward.language.traced import TracedLoss


def source(loss: TracedLoss, backend: str, **options: Any) -> str:
    """The generated source for a call that passes every term the loss reads, per token (extras as the loss says).

    options: fields of PolicyCall or PairCall, such as aggregation="seq-mean-token-mean" or kl="k3".
    """
    if backend not in ("triton", "cuda"):
        raise ValueError(f"backend: expected 'triton' or 'cuda' (the cpu backend interprets), got {backend!r}")
    traced = loss.terms()
    loss.trace(traced)
    given = traced.graph.inputs()
    if isinstance(traced, PairTerms):
        sides = tuple(_levels(given, side, Level.TOKEN, "logprob") for side in (0, 1))
        extras = _levels(given, 0, Level.SEQUENCE)
        options = {"aggregation": "mean", **options}
        objective = pair_objective(loss, PairCall((sides[0], sides[1]), extras, **options))
    else:
        names = dict(
            (*_levels(given, 0, Level.TOKEN), *_levels(given, 0, Level.SEQUENCE), *_levels(given, 0, Level.BATCH))
        )
        for term in () if of_values(names) else ("logprob", "old_logprob", "advantage"):
            names.setdefault(term, Level.TOKEN)
        names |= {"ref_logprob": Level.TOKEN} if options.get("kl") else {}
        names |= {"entropy": Level.TOKEN} if options.get("entropy_bonus") else {}
        options = {"aggregation": loss.aggregation, "deferred": True, **options}
        objective = policy_objective(loss, PolicyCall(tuple(names.items()), **options))
    write = importlib.import_module(f"{module('program', backend)}.source").source
    return "\n\n".join(write(p) for p in (*(t.program for t, _ in objective.before), objective.program))


def _levels(
    given: list[tuple[str, Level, int]], side: int, level: Level, *always: str
) -> tuple[tuple[str, Level], ...]:
    own = {name: at for name, at, of in given if of == side and at == level and not name.startswith("parameter.")}
    return (*own.items(), *((name, level) for name in always if name not in own))

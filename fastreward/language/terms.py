"""The terms that a loss is written with: t.logprob, t.ratio, t.advantage, ..., and named extras."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping
from typing import Final, Literal, NoReturn

from fastreward._runtime.layout import METRICS, PAIR_METRICS
from fastreward.language.functions import batch_mean, batch_sum, clip, exp, where
from fastreward.language.graph import Graph
from fastreward.language.messages import origin
from fastreward.language.node import Level, Node

#: The log-ratio is clamped to +- this before t.ratio exponentiates it (verl's and OpenRLHF's bound).
LOG_RATIO_CLAMP: Final = 20.0

SOURCES: Final = {
    "logprob": "logprobs",
    "old_logprob": "old_logprobs",
    "ref_logprob": "ref_logprobs",
    "rollout_logprob": "rollout_logprobs",
    "advantage": "advantages",
    "entropy": "entropy",
    "weight": "weights",
    "value": "values",
    "old_value": "old_values",
    "returns": "returns",
    "log_p": "logits",
    "log_q": "teacher_logits",
}
PAIR_SOURCES: Final = {
    "logprob": "{side}_logprobs",
    "ref_logprob": "ref_{side}_logprobs",
    "weight": "{side}_weights",
}
#: What a policy loss gets per token always; the others may be per sequence.
PER_TOKEN: Final = (
    *("logprob", "old_logprob", "ref_logprob", "rollout_logprob", "entropy"),
    *("value", "old_value", "returns"),
    *("log_p", "log_q"),
)
#: What a call gives beside extras, of a pair on each side.
TERMS: Final = tuple(SOURCES)
PAIR_TERMS: Final = tuple(PAIR_SOURCES)
SIDES: Final = ("chosen", "rejected")
_PER: Final = {Level.TOKEN: "token", Level.SEQUENCE: "sequence", Level.BATCH: "batch"}
#: Metrics of every policy loss that the losses themselves report.
CLIP_FRACTIONS: Final = ("clip_fraction_low", "clip_fraction_high", "clip_fraction_dual")


class _Inputs:
    """Inputs of the graph by name, as a call passes them, with the level of each.

    levels: None where there is no call yet: whatever the loss reads is there, at its usual level (where it may be per
    sequence no higher than `highest`), and `has` says `optional`: of all names, or whether the name is one of these (of
    a side: chosen.name).
    """

    def __init__(
        self,
        graph: Graph,
        levels: Mapping[str, Level] | None,
        side: int,
        sources: Mapping[str, str],
        optional: bool | Collection[str] = True,
        highest: Level = Level.TOKEN,
    ) -> None:
        self.graph = graph
        self._levels, self._optional, self._highest = levels, optional, highest
        self._side = side
        self._named = sources
        self.asked: set[str] = set()  # names that `has` was asked for

    def _input(self, name: str, usual: Level) -> Node:
        full = self._argument(name)
        level = usual if name in PER_TOKEN else min(usual, self._highest)
        if self._levels is not None:
            if name not in self._levels:
                reader = self.graph.reader
                raise ValueError(f"{origin()}: {reader} reads the term {name!r}, which was not passed; pass {full}")
            level = self._levels[name]
        if level > usual:
            raise ValueError(
                f"{full}: the loss reads {name!r} once per {_PER[usual]} ({origin()}), got a value per {_PER[level]}"
            )
        return self.graph.input(name, level, self._side)

    def _argument(self, name: str) -> str:
        """How a caller passes a term, for messages."""
        if self.graph.by_term:
            return f"{SIDES[self._side]}_{name}=" if isinstance(self, Side) else f"{name}="
        return self._named.get(name, f'extra={{"{name}": ...}}').replace("{side}", SIDES[self._side])

    def extra(self, name: str, per: Literal["token", "sequence", "batch"] = "token") -> Node:
        """The caller's extra={name: tensor}: a constant per token, per sequence or for the whole batch."""
        levels = {"token": Level.TOKEN, "sequence": Level.SEQUENCE, "batch": Level.BATCH}
        if per not in levels:
            raise ValueError(f"{origin()}: extra: per: expected 'token', 'sequence' or 'batch', got {per!r}")
        return self._input(name, levels[per])

    def has(self, name: str) -> bool:
        """Whether the call passes this term or extra: an ordinary bool, known while the loss is traced.

        True in print(loss), loss.source(...) and loss.reads(...), where nothing is passed yet.
        """
        self.asked.add(name)
        there = self._optional if self._levels is None else self._levels
        return there if isinstance(there, bool) else name in there

    def _unknown(self, name: str, known: list[str]) -> NoReturn:
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.7)
        hint = f" (did you mean t.{near[0]}?)" if near else ""
        raise AttributeError(
            f"{origin()}: no term {name!r}{hint}; one of your own is t.extra({name!r}), passed as "
            f"extra={{{name!r}: ...}}; there are {', '.join(known)}"
        )


def _reported(graph: Graph, values: Mapping[str, Node], reserved: tuple[str, ...]) -> dict[str, Node]:
    """The means of what a loss reports, unless they have the name of a metric that is always there."""
    for name in values:
        if name in reserved:
            raise ValueError(f"{origin()}: report: {name!r} is a metric of every loss already; choose another name")
    return {name: measured(batch_mean(graph.node(value))) for name, value in values.items()}


def measured(value: Node) -> Node:
    """A metric: NaN where there is no token (no pair) to take it over."""
    return where(batch_sum(1.0, value.graph) > 0.0, value, float("nan"))


class Terms(_Inputs):
    """Terms of a policy loss, one value per token unless said.

    logprob, old_logprob, ref_logprob, rollout_logprob, entropy, weight: as passed to the call. advantage: per token or
    per sequence. log_ratio: logprob - old_logprob. ratio: exp(log_ratio), the log-ratio clamped to +-20. length:
    valid tokens, per sequence. extra(name): the caller's own. Gradients flow through logprob and entropy, and through
    extras that are declared differentiable.

    A loss of a critic, for `value_loss`, is written with value, old_value and returns instead; its gradient flows
    through value. A divergence, for `token_divergence`, is written with log_p and log_q, the student's and the
    teacher's log-prob of one token of the vocabulary, and p and q, their exponentials.
    """

    NAMES: Final = (*SOURCES, "log_ratio", "ratio", "p", "q", "length", "extra", "report")

    def __init__(
        self,
        graph: Graph,
        levels: Mapping[str, Level] | None = None,
        *,
        optional: bool | Collection[str] = True,
        highest: Level = Level.TOKEN,
    ) -> None:
        super().__init__(graph, levels, 0, {k: f"{v}=" for k, v in SOURCES.items()}, optional, highest)
        self.reports: dict[str, Node] = {}  # metrics
        self.reported: dict[str, Node] = {}  # the same before any mean
        self.differentiable: dict[str, Node] = {}  # extras that get a gradient

    def extra(
        self, name: str, per: Literal["token", "sequence", "batch"] = "token", *, differentiable: bool = False
    ) -> Node:
        """The caller's extra={name: tensor}: a constant per token, per sequence or for the whole batch.

        differentiable: a gradient flows to it, as to logprob; of one per sequence, such as a learned log Z of a prompt.
        """
        node = super().extra(name, per)
        if differentiable:
            if per != "sequence":
                raise ValueError(f"{origin()}: extra: differentiable: expected per='sequence' with it, got {per!r}")
            self.differentiable[name] = node
        return node

    @property
    def log_ratio(self) -> Node:
        """Logprob - old_logprob."""
        return self.logprob - self.old_logprob

    @property
    def ratio(self) -> Node:
        """exp(log_ratio) with the log-ratio clamped to +-20, gradient 0 beyond."""
        return exp(clip(self.log_ratio, -LOG_RATIO_CLAMP, LOG_RATIO_CLAMP))

    @property
    def p(self) -> Node:
        """exp(log_p), the student's probability of a token of the vocabulary."""
        return exp(self.log_p)

    @property
    def q(self) -> Node:
        """exp(log_q), the teacher's."""
        return exp(self.log_q)

    @property
    def length(self) -> Node:
        """Valid tokens of the sequence."""
        return self.graph.length(self._side)

    def report(self, **values: Node) -> None:
        """Adds metrics: the mean of each value over the valid tokens, of a sequence's over the sequences.

        `policy_loss(..., return_tokens=(name,))` gives the values themselves.
        """
        self.reports |= _reported(self.graph, values, tuple(n for n in METRICS if n not in CLIP_FRACTIONS))
        self.reported |= {name: self.graph.node(value) for name, value in values.items()}

    def __getattr__(self, name: str) -> Node:
        if name.startswith("_") or name not in SOURCES:
            self._unknown(name, list(self.NAMES))
        return self._input(name, Level.TOKEN)


class Side(_Inputs):
    """Terms of one side of a pair, per token: logprob, ref_logprob, weight, log_ratio = logprob - ref_logprob.

    length: valid tokens of that side, per pair. Gradients flow through logprob.
    """

    NAMES: Final = (*PAIR_SOURCES, "log_ratio", "length", "extra")

    def __init__(
        self,
        graph: Graph,
        levels: Mapping[str, Level] | None,
        side: int,
        optional: bool | Collection[str] = True,
        highest: Level = Level.TOKEN,
    ) -> None:
        sources = {k: f"{v}=" for k, v in PAIR_SOURCES.items()}
        super().__init__(graph, levels, side, sources, optional, highest)

    @property
    def log_ratio(self) -> Node:
        """Logprob - ref_logprob."""
        return self.logprob - self.ref_logprob

    @property
    def length(self) -> Node:
        """Valid tokens of this side."""
        return self.graph.length(self._side)

    def __getattr__(self, name: str) -> Node:
        if name.startswith("_") or name not in PAIR_SOURCES:
            self._unknown(name, list(self.NAMES))
        return self._input(name, Level.TOKEN)


class PairTerms(_Inputs):
    """Terms of a preference loss: t.chosen and t.rejected (see Side), and extra(name) per pair."""

    NAMES: Final = ("chosen", "rejected", "extra", "report")

    def __init__(
        self,
        graph: Graph,
        levels: Mapping[str, Level] | None = None,
        sides: tuple[Mapping[str, Level], Mapping[str, Level]] | None = None,
        *,
        optional: bool | Collection[str] = True,
        highest: Level = Level.TOKEN,
    ) -> None:
        super().__init__(graph, levels, 0, {}, optional)
        self.chosen = Side(graph, None if sides is None else sides[0], 0, _below(optional, "chosen"), highest)
        self.rejected = Side(graph, None if sides is None else sides[1], 1, _below(optional, "rejected"), highest)
        self.reports: dict[str, Node] = {}

    def extra(self, name: str, per: Literal["token", "sequence", "batch"] = "sequence") -> Node:
        """The caller's extra={name: tensor [pairs]}."""
        if per == "token":
            raise ValueError(
                f"{origin()}: extra: per-token extras belong to a side: t.chosen.extra(...) or t.rejected.extra(...)"
            )
        return super().extra(name, per)

    def report(self, **values: Node) -> None:
        """Adds metrics: the mean of each value over the pairs."""
        self.reports |= _reported(self.graph, values, PAIR_METRICS)

    def __getattr__(self, name: str) -> NoReturn:
        self._unknown(name, list(self.NAMES))


def asked(t: Terms | PairTerms) -> frozenset[str]:
    """Names that `t.has` was asked for, those of a side as chosen.name."""
    parts = {"": t, "chosen.": t.chosen, "rejected.": t.rejected} if isinstance(t, PairTerms) else {"": t}
    return frozenset(prefix + name for prefix, part in parts.items() for name in part.asked)


def _below(optional: bool | Collection[str], side: str) -> bool | Collection[str]:
    """`optional` as a side sees it."""
    if isinstance(optional, bool):
        return optional
    return {name.removeprefix(f"{side}.") for name in optional if name.startswith(f"{side}.")}

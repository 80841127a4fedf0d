"""What a loss reads, made up: by the arguments of the function that runs it."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from fastreward.language.define import Loss
from fastreward.language.node import Level, walk
from fastreward.language.objective import inputs_asked
from fastreward.language.ops import ALONG_TOKENS
from fastreward.language.terms import PAIR_SOURCES, SIDES, SOURCES

Tensors = dict[str, Tensor]

#: Terms of a pair's sides by argument; the trained ones.
_TRAINED: Final = {
    "policy_loss": ("logprobs", "entropy"),
    "value_loss": ("values",),
    "preference_loss": ("chosen_logprobs", "rejected_logprobs"),
    "divergence": ("logits",),
}
#: What an extra's name says of its values; another one is normal.
_BY_NAME: Final = (
    (r"log_?p", "logprob"),
    (r"mask|flag|^is_|correct|success|label|valid|select", "truth"),
    (r"prob|share|confidence", "share"),
    (r"std|sigma|temperature|length|count|weight|scale|beta|coef", "positive"),
    (r"(^|_)ids?$|index|segment|turn|step|position", "whole"),
)


@dataclass(frozen=True)
class Term:
    """Something that a loss reads: its name there, what a caller calls it, at which level, of which side."""

    name: str
    argument: str
    level: Level
    side: int
    extra: bool


@dataclass(frozen=True)
class Own:
    """A loss of somebody's own: what runs it, and what it reads."""

    loss: Loss
    operation: str
    terms: tuple[Term, ...]
    grouped: bool

    @property
    def trained(self) -> tuple[str, ...]:
        """Arguments that get a gradient."""
        there = {term.argument for term in self.terms}
        always = self.operation in ("preference_loss", "divergence")
        known = (x for x in _TRAINED[self.operation] if always or x in there)
        return (*known, *self.loss.differentiable)

    @property
    def scans(self) -> bool:
        """Whether it goes along a sequence token by token."""
        return any(node.op in ALONG_TOKENS for node in walk([self.loss.trace(self.loss.terms())]))

    @property
    def extras(self) -> tuple[str, ...]:
        """Names of what the caller gives as extra=."""
        return tuple(term.argument for term in self.terms if term.extra)


def own(loss: Loss) -> Own:
    """What a loss reads.

    Raises:
        ValueError: nothing that is trained is read.
    """
    read = sorted(inputs_asked(loss), key=lambda x: (x[2], x[0]))
    names = {name for name, _, _ in read}
    operation = (
        "preference_loss" if loss.pairs
        else "divergence" if names & {"log_p", "log_q"}
        else "value_loss" if names & {"value", "old_value", "returns"}
        else "policy_loss"
    )  # fmt: skip
    grouped = loss.aggregation == "group-mean" or any(
        node.op.startswith("group_") for node in walk([loss.trace(loss.terms())])
    )
    terms = tuple(_term(loss, *x) for x in read)
    trained = {"logprob", "entropy"} if operation in ("policy_loss", "preference_loss") else {"value", "log_p"}
    if not names & trained:
        raise ValueError(
            f"{loss.name}: reads {loss.reading()}, and nothing of it is trained: {', '.join(sorted(trained))}"
        )
    if operation == "divergence" and names - {"log_p", "log_q"}:
        raise ValueError(f"{loss.name}: reads {loss.reading()}; expected a divergence over log_p and log_q alone")
    return Own(loss, operation, terms, grouped)


def _term(loss: Loss, name: str, level: Level, side: int) -> Term:
    sources = PAIR_SOURCES if loss.pairs and level == Level.TOKEN else {} if loss.pairs else SOURCES
    if name in sources:
        return Term(name, sources[name].replace("{side}", SIDES[side]), level, side, False)
    of_side = loss.pairs and level == Level.TOKEN
    return Term(name, f"{SIDES[side]}_{name}" if of_side else name, level, side, True)


# ---------------------------------------------------------------------------------------------------------- made up
def made_up(what: Own, shape: tuple[int, ...], seed: int = 0, spread: float = 0.2, device: str = "cpu") -> Tensors:
    """Arguments by name, float32, with a ragged mask; shape: [B, T], of a divergence [N, V].

    spread: how far what is trained is from what it is compared with.
    """
    generator = torch.Generator(device=device).manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, device=device)

    def uniform(*size: int) -> Tensor:
        return torch.rand(size, generator=generator, device=device)

    if what.operation == "divergence":
        logits = 2 * normal(*shape)
        return {"logits": logits, "teacher_logits": logits + spread * normal(*shape)}
    found: Tensors = {}
    sides = SIDES if what.loss.pairs else ("",)
    bases = [-normal(*shape).abs() for _ in sides]
    if what.operation == "value_loss":
        bases = [normal(*shape)]
    for term in what.terms:
        size = {Level.TOKEN: shape, Level.SEQUENCE: shape[:1]}.get(term.level, ())
        if term.extra:
            found[term.argument] = _extra(term.argument, size, normal, uniform)
        else:
            found[term.argument] = _known(term, size, bases[term.side], spread, normal, uniform)
    if what.loss.pairs:
        for side, base in zip(sides, bases, strict=True):
            found.setdefault(f"{side}_logprobs", base + spread * normal(*shape))
    elif what.operation == "policy_loss":
        found.setdefault("logprobs", bases[0] + spread * normal(*shape))
    for side in sides:
        lengths = torch.randint(shape[1] // 4, shape[1] + 1, shape[:1], generator=generator, device=device)
        lengths[: shape[0] > 2] = 0  # one without a token
        found[f"{side}_mask".removeprefix("_")] = torch.arange(shape[1], device=device) < lengths.unsqueeze(-1)
    if what.grouped:
        found["group_ids"] = torch.arange(shape[0], device=device) // 4
    return found


Draw = Callable[..., Tensor]


def _known(term: Term, size: tuple[int, ...], base: Tensor, spread: float, normal: Draw, uniform: Draw) -> Tensor:
    """A term that the language knows, beside the base: old log-probs, or old values."""
    if term.name in ("logprob", "value"):
        return base + spread * normal(*size)
    if term.name in ("old_logprob", "old_value"):
        return base
    if term.name == "returns":
        return base + normal(*size)
    if term.name in ("ref_logprob", "rollout_logprob"):
        return base + 0.1 * normal(*size)
    if term.name == "entropy":
        return normal(*size).abs()
    if term.name == "weight":
        return uniform(*size) + 0.5
    # Advantages: one for all tokens of a sequence, as of outcomes.
    return normal(len(base), 1).expand(base.shape).contiguous() if len(size) == 2 else normal(*size)


def _extra(name: str, size: tuple[int, ...], normal: Draw, uniform: Draw) -> Tensor:
    kind = next((kind for pattern, kind in _BY_NAME if re.search(pattern, name)), "normal")
    if kind == "logprob":
        return -normal(*size).abs()
    if kind == "truth":
        return (uniform(*size) < 0.5).float()
    if kind == "share":
        return uniform(*size)
    if kind == "whole":
        return (uniform(*size) * 4).floor()
    return uniform(*size) + 0.5 if kind == "positive" else normal(*size)


def double(inputs: Mapping[str, Tensor]) -> Tensors:
    """The same in float64."""
    return {name: x.double() if x.is_floating_point() else x for name, x in inputs.items()}

"""Ways to compute a loss of one's own: ours, plain torch from its graph, the truth, a peer's."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fastreward.divergence import token_divergence
from fastreward.language.graph import Graph
from fastreward.language.node import Level, Node
from fastreward.language.terms import PairTerms, Terms
from fastreward.policy_loss import policy_loss
from fastreward.preference_loss import preference_loss
from fastreward.reference.divergence import LOWEST
from fastreward.reference.policy_loss import aggregate
from fastreward.reference.program import ELEMENTWISE, Values
from fastreward.value_loss import value_loss
from fastreward.verify.own.inputs import Own, Tensors, made_up

Form = Callable[..., Tensor]

_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "policy_loss": policy_loss,
    "value_loss": value_loss,
    "preference_loss": preference_loss,
}


def ours(what: Own) -> Form:
    """The public function on arguments by name: a loss [], of a divergence one for each row [N]."""
    if what.operation == "divergence":
        return lambda logits, teacher_logits: token_divergence(logits, teacher_logits, divergence=what.loss).divergence
    function = _FUNCTIONS[what.operation]
    needed = {"policy_loss": ("old_logprobs", "advantages"), "value_loss": ("old_values", "returns")}

    def form(**inputs: Any) -> Tensor:
        given: dict[str, Any] = dict.fromkeys(needed.get(what.operation, ()))
        given |= {name: x for name, x in inputs.items() if name not in what.extras}
        given |= _extras(what, inputs)
        if given.get("old_values") is None and what.operation == "value_loss":
            given["clip"] = None
        found: Tensor = function(**given, loss=what.loss, empty="zero").loss
        return found

    return form


def _extras(what: Own, inputs: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Extras as the public function takes them, those of a pair's sides by side."""
    found: dict[str, dict[str, Tensor]] = {}
    for term in what.terms:
        if term.extra:
            of_side = what.loss.pairs and term.level == Level.TOKEN
            argument = f"{('chosen', 'rejected')[term.side]}_extra" if of_side else "extra"
            found.setdefault(argument, {})[term.name] = inputs[term.argument]
    return found


# -------------------------------------------------------------------------------------------------------- plain torch
class _Plain(Values):
    """As one writes a loss down: without care for what does not count, which is 0 where it is read."""

    def _elementwise(self, node: Any, args: Sequence[Tensor]) -> Tensor:
        result: Tensor = ELEMENTWISE[node.op](*args)
        return result


class _Rows(_Plain):
    """Of log-probs [N, V], all of which count."""

    def _input(self, node: Any) -> Tensor:
        return self._inputs[node.name, node.side]


def plain(what: Own, careful: bool = False) -> Form:
    """The loss's graph in torch, in the dtype of what is trained; careful: what does not count can't spoil a gradient.

    It is traced here and once, so that torch.compile sees nothing but operators.
    """
    node, loss = _traced(what), what.loss
    if what.operation == "divergence":

        def divergence(logits: Tensor, teacher_logits: Tensor) -> Tensor:
            log_p, log_q = (x.log_softmax(-1).clamp(min=LOWEST) for x in (logits, teacher_logits))
            every = torch.ones(1, 1, dtype=torch.bool, device=logits.device)
            values = _Rows({("log_p", 0): log_p, ("log_q", 0): log_q}, [every], None, loss.scalars, logits.dtype)
            return values.of(node).expand(log_p.shape).sum(-1)

        return divergence
    kind = Values if careful else _Plain
    names = [f"{side}_mask".removeprefix("_") for side in (("chosen", "rejected") if loss.pairs else ("",))]
    trained = what.trained[0]

    def form(**inputs: Tensor) -> Tensor:
        named = {(term.name, term.side): inputs[term.argument] for term in what.terms}
        masks = [inputs[name] for name in names]
        groups = inputs.get("group_ids")
        value = kind(named, masks, groups, loss.scalars, inputs[trained].dtype).of(node)
        if loss.pairs:
            valid = torch.stack([mask.any(-1) for mask in masks]).any(0)
            pairs = torch.where(valid, value.expand(len(valid), 1).squeeze(-1), 0.0)
            return pairs.sum() / valid.sum().clamp(min=1)
        tokens = torch.where(masks[0], value.expand(masks[0].shape), 0.0)
        return aggregate(tokens, masks[0], loss.aggregation, None, groups)

    return form


def _traced(what: Own) -> Node:
    """The loss as a graph where each term is there at its level."""
    levels = [{t.name: t.level for t in what.terms if t.side == side} for side in (0, 1)]
    loss = what.loss
    return loss.trace(
        PairTerms(Graph(2), levels[0], (levels[0], levels[1])) if loss.pairs else Terms(Graph(), levels[0])
    )


# ------------------------------------------------------------------------------------------------------------- peers
def peer(what: Own, name: str, function: Callable[..., Any]) -> Form:
    """A function of tensors, called with those of the arguments that it names.

    Raises:
        ValueError: it asks for something else.
    """
    known = {term.argument for term in what.terms} | set(what.trained)
    known |= {"mask"} if what.operation in ("policy_loss", "value_loss") else set()
    known |= {"chosen_mask", "rejected_mask"} if what.loss.pairs else set()
    known |= {"logits", "teacher_logits"} if what.operation == "divergence" else set()
    known |= {"group_ids"} if what.grouped else set()
    known -= {"log_p", "log_q"}
    parameters = inspect.signature(function).parameters.values()
    for p in parameters:
        if p.name not in known and p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD):
            raise ValueError(f"{name}: asks for {p.name!r}; there are {', '.join(sorted(known))}")
    every = any(p.kind == p.VAR_KEYWORD for p in parameters)
    wanted = known if every else known & {p.name for p in parameters}
    if not wanted & set(what.trained):
        raise ValueError(f"{name}: expected a function of {' or '.join(what.trained)}, by that name")

    def form(**inputs: Tensor) -> Tensor:
        out = function(**{k: x for k, x in inputs.items() if k in wanted})
        if isinstance(out, tuple | list) and out:
            out = out[0]
        if not isinstance(out, Tensor):
            raise TypeError(f"{name}: expected it to return the loss as a tensor, got {type(out).__name__}")
        expected = (len(inputs["logits"]),) if what.operation == "divergence" else ()
        if tuple(out.shape) != expected:
            raise ValueError(
                f"{name}: expected it to return {'one value per row' if expected else 'one number'}, "
                f"got shape {list(out.shape)}"
            )
        return out

    return form


def step(form: Form, trained: Sequence[str], inputs: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
    """(value, gradients of its sum for what is trained)."""
    leaves = {name: inputs[name].detach().requires_grad_() for name in trained}
    out = form(**{**inputs, **leaves})
    grads = torch.autograd.grad(out.sum(), list(leaves.values()), allow_unused=True, materialize_grads=True)
    return (out.detach(), *grads)


def check_untouched(what: Own, name: str, form: Form) -> None:
    """Refuse a peer that changes its arguments: others are given the same ones.

    Raises:
        ValueError: names the first argument that it has changed.
    """
    inputs = made_up(what, (8, 16))
    before = {argument: x.clone() for argument, x in inputs.items()}
    form(**{argument: x.detach() for argument, x in inputs.items()})
    for argument, x in inputs.items():
        if not torch.equal(x, before[argument]):
            raise ValueError(f"{name}: changes {argument} in place, which the others are given too")


__all__ = ["Form", "Own", "Tensors", "check_untouched", "ours", "peer", "plain", "step"]

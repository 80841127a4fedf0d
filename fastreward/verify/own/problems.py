"""Problems of a loss of one's own: what breaks losses, against its graph in float64."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastreward.verify.own import load
from fastreward.verify.own.forms import Form, check_untouched, ours, peer, plain
from fastreward.verify.own.inputs import Own, Tensors, double, made_up, own
from fastreward.verify.problem import Problem, gradients, leaf
from fastreward.verify.run import Finding, Plan, of_peer, plan_of

_SHAPE, _ROWS = (8, 41), (7, 1003)
PEERED = "random"  # problems that a function without care for masks and ties can get right


def problems(what: Own, quick: bool) -> Iterator[Problem]:
    """Random and adversarial. The name of the operation has the loss's behind it.

    Raises:
        ValueError: the loss is not finite on random inputs, so that nothing could be compared.
    """
    truth = plain(what, careful=True)
    forms = ours(what), plain(what)
    _check_finite(what, truth(**double(made_up(what, _ROWS if what.operation == "divergence" else _SHAPE))))
    for seed in range(1 if quick else 3):
        for name, inputs in _inputs(what, seed):
            label = name if seed == 0 else f"{name} (seed {seed})"
            own = partial(_packed, what, forms[0]) if name == "packed" else forms[0]
            ways = (partial(_way, what, own, False, seed), partial(_way, what, truth, True, seed))
            yield Problem(
                f"{what.operation} {what.loss.name}", label, "float32", inputs, *ways,
                partial(_way, what, forms[1], False, seed),
            )  # fmt: skip


def _check_finite(what: Own, value: Tensor) -> None:
    if not bool(value.isfinite().all()):
        made = f" with {', '.join(what.extras)} made up" if what.extras else ""
        hint = "; names such as x_prob, x_mask, x_logprob and x_ids say what an extra holds" if made else ""
        raise ValueError(
            f"{what.loss.name}: its value on random inputs{made} is {float(value.sum())}: nothing can be compared{hint}"
        )


def _inputs(what: Own, seed: int) -> Iterator[tuple[str, Tensors]]:
    if what.operation == "divergence":
        x = made_up(what, _ROWS, seed)
        yield PEERED, x
        yield f"{PEERED}, far apart", made_up(what, _ROWS, seed, spread=3.0)
        forbidden = torch.rand(_ROWS[1], generator=torch.Generator().manual_seed(seed)) < 0.2
        yield "tokens that neither allows", {k: v.masked_fill(forbidden, -torch.inf) for k, v in x.items()}
        yield "equal", {**x, "teacher_logits": x["logits"].clone()}
        yield "V = 1", made_up(what, (4, 1), seed)
        return
    x = made_up(what, _SHAPE, seed)
    yield f"{PEERED}, ragged mask", x
    yield f"{PEERED}, larger differences", made_up(what, _SHAPE, seed, spread=1.0)
    yield "differences of 8 nats", made_up(what, _SHAPE, seed, spread=8.0)
    yield "nothing has moved: ties", made_up(what, _SHAPE, seed, spread=0.0)
    yield "one token each", made_up(what, (8, 1), seed)
    masks = {name: x[name] for name in x if name.endswith("mask")}
    under = {name: _mask_of(name, x, masks) for name in x if x[name].shape == _SHAPE and name not in masks}
    yield "NaN under the mask", x | {name: x[name].masked_fill(~mask, torch.nan) for name, mask in under.items()}
    yield "packed", x


def _mask_of(argument: str, inputs: Tensors, masks: Tensors) -> Tensor:
    """The mask of an argument's side."""
    if len(masks) == 1:
        return next(iter(masks.values()))
    return inputs["rejected_mask" if "rejected" in argument else "chosen_mask"]


def _way(what: Own, form: Form, in_double: bool, seed: int, inputs: Mapping[str, Any]) -> Tensors:
    given = double(inputs) if in_double else dict(inputs)
    leaves = {name: leaf(given[name], in_double) for name in what.trained}
    out = form(**{**given, **leaves})
    return {"loss": out.detach()} | gradients({"loss": out}, leaves, seed)


def _packed(what: Own, form: Form, **inputs: Tensor) -> Tensor:
    """The mask becomes the layout: what it drops is not there at all."""
    masks = {name: x for name, x in inputs.items() if name.endswith("mask")}
    packed = {}
    for name, x in inputs.items():
        if name in masks:
            bounds = torch.nn.functional.pad(x.sum(-1).cumsum(0), (1, 0))
            packed[name.removesuffix("mask") + "cu_seqlens"] = bounds
        else:
            mask = _mask_of(name, inputs, masks)
            packed[name] = x[mask] if x.shape == mask.shape else x
    return form(**packed)


def plan(text: str, named: Sequence[str], backends: Sequence[str] | None, quick: bool) -> tuple[Plan, list[Finding]]:
    """The problems of the loss named by `text`, and what the peers of these names have given already.

    Raises:
        ValueError: what can't be found or called, and why.
    """
    what = own(load.loss(text))
    forms = {name: peer(what, name, function) for name, function in load.functions(named).items()}
    for name, form in forms.items():
        check_untouched(what, name, form)
    usable: list[Problem] = []
    undefined: list[Problem] = []
    for problem in problems(what, quick):
        finite = all(bool(x.isfinite().all()) for x in problem.truth(problem.inputs).values())
        (usable if finite else undefined).append(problem)
    findings = [finding for name, form in forms.items() for finding in _of_peer(what, name, form, usable)]
    made = plan_of(what.operation, usable, backends)
    for problem in undefined:
        made.skipped[f"{problem.name!r}", "every backend"] = "the loss, or its gradient, is not finite there"
    return made, findings


def _of_peer(what: Own, name: str, form: Form, jobs: Sequence[Problem]) -> Iterator[Finding]:
    """A peer's findings, in float64, on what a plain function can be expected to get right."""
    for problem in jobs:
        if problem.name.startswith(PEERED):
            got = _way(what, form, True, _seed(problem.name), problem.inputs)
            yield from of_peer(name.rpartition(":")[2], problem, got)


def _seed(name: str) -> int:
    """Of the upstream gradients of a problem, by its name."""
    return int(name.rpartition("(seed ")[2].rstrip(")")) if "(seed " in name else 0

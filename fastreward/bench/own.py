"""A loss or divergence of one's own beside its graph in torch, eager and compiled, and beside peers of one's own."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch

from fastreward.bench import peers, roofline, shape_of
from fastreward.bench.case import OURS, Case, Contender
from fastreward.bench.cases._steps import Tensors, off_edges, worst_of_rows
from fastreward.bench.engine import run
from fastreward.bench.roofline import Traffic
from fastreward.bench.run import Plan, Result
from fastreward.verify.error import sampled_rows
from fastreward.verify.own import load
from fastreward.verify.own.forms import Form, check_untouched, ours, peer, plain, step
from fastreward.verify.own.inputs import Own, double, made_up, own

_TOLERANCE, _PEER_TOLERANCE = 1e-5, 1e-4
_TINY = (8, 16)


class Unusable(ValueError):
    """What was named can't be found, called or compared; the message says why."""


def results(text: str, named: Sequence[str], plan: Plan, told: Callable[[str], None]) -> Iterator[Result]:
    """Times the loss named by `text` beside the peers of these names, at the plan's size; `told` what happens next.

    Raises:
        Unusable: see there. EquivalenceError: ours is not what its graph says in float64.
    """
    try:
        what = own(load.loss(text))
        functions = load.functions(named)
        told(f"{what.loss.name}: data")
        shape = shape_of(what.operation, plan.quick, plan.rows, plan.vocab)
        case = build(what, functions, shape, plan.device, peered=plan.peers)
    except (TypeError, ValueError) as error:
        raise Unusable(str(error)) from error
    yield Result(run(case, plan.device, plan.settings, lambda x: told(f"{what.loss.name}: {x}")), [])


def build(
    what: Own, functions: Mapping[str, Callable[..., Any]], shape: tuple[int, ...], device: str, peered: bool = True
) -> Case:
    """Forward and gradient of the mean (of a divergence: of the sum over rows), float32."""
    inputs = made_up(what, shape, device=device)
    own_peers = {name: peer(what, name, f) for name, f in functions.items()}
    for name, form in own_peers.items():
        check_untouched(what, name, form)
    graph = _eager(what)
    forms = {"torch eager": graph} | {name.rpartition(":")[2]: form for name, form in own_peers.items()}

    def call(form: Form) -> Callable[[], Tensors]:
        return partial(step, form, what.trained, inputs)

    made = Case(
        operation=what.operation,
        name=what.loss.name,
        dtype="float32",
        shape=shape,
        traffic=_traffic(what, inputs),
        error=_error(what, inputs),
        contenders=[Contender(OURS, call(ours(what)))],
        tolerance=_TOLERANCE,
        inputs=list(inputs.values()),
    )
    for name, form in forms.items() if peered else ():
        made.contenders.append(Contender(name, call(form), tolerance=_PEER_TOLERANCE))
        if form is graph and what.scans:
            made.absent["torch.compile"] = "it unrolls a scan for minutes; --peer for another form"
            continue
        compiled = call(peers.compiled(form))
        label = "torch.compile" if name == "torch eager" else f"{name}, compiled"
        made.contenders.append(Contender(label, compiled, tolerance=_PEER_TOLERANCE, compiled=True))
    return made


def _eager(what: Own) -> Form:
    """As one writes it; where that gives no gradient (0 * inf under the mask), with the care that it takes."""
    inputs = made_up(what, _TINY)
    found = step(plain(what), what.trained, inputs)
    return plain(what, careful=not all(bool(x.isfinite().all()) for x in found))


def _error(what: Own, inputs: Mapping[str, torch.Tensor]) -> Callable[[Any], float]:
    truth = plain(what, careful=True)
    if what.operation == "divergence":
        rows = sampled_rows(len(inputs["logits"]), inputs["logits"].device)
        expected = step(truth, what.trained, double({name: x[rows] for name, x in inputs.items()}))
        return partial(worst_of_rows, (rows, expected), True)
    expected = step(truth, what.trained, double(inputs))
    if not bool(expected[0].isfinite()):
        raise ValueError(
            f"{what.loss.name}: its value on random inputs is {float(expected[0])}; nothing can be compared"
        )
    return partial(off_edges, expected)


def _traffic(what: Own, inputs: Mapping[str, torch.Tensor]) -> Traffic:
    """Every input read once and every gradient written once; of a divergence's logits two reads."""
    if what.operation == "divergence":
        rows, vocab = inputs["logits"].shape
        return roofline.divergence(rows, vocab, inputs["logits"].element_size(), True)
    return Traffic(sum(x.nbytes for x in inputs.values()), sum(inputs[name].nbytes for name in what.trained))

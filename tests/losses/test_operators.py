"""Every row of the operators' table, against the reference's operator and its derivatives by autograd."""

from __future__ import annotations

import inspect
import itertools

import pytest
import torch
from torch.testing import assert_close

from fastreward import losses
from fastreward.language.derivative import gradients
from fastreward.language.graph import CONDITIONS, Graph
from fastreward.language.node import Level
from fastreward.language.ops import OPS
from fastreward.reference.program import ELEMENTWISE, Values

NUMBERS = (-40.0, -1.5, -0.3, 0.2, 0.7, 1.3, 30.0)


def test_every_operator_has_a_reference() -> None:
    assert set(OPS) == set(ELEMENTWISE)


@pytest.mark.parametrize("op", sorted(set(OPS) - {"stop_gradient"}))
def test_value_and_derivatives(op: str) -> None:
    spec, operator = OPS[op], ELEMENTWISE[op]
    conditions = CONDITIONS.get(op, [False] * spec.arity)
    for values in itertools.product(*((False, True) if c else NUMBERS for c in conditions)):
        numbers = [v for v, c in zip(values, conditions, strict=True) if not c]
        if len(set(numbers)) < len(numbers):
            continue  # ties have tests of their own
        graph = Graph()
        terms = [
            graph.truth(v) if c else graph.input(str(k), Level.TOKEN)
            for k, (v, c) in enumerate(zip(values, conditions, strict=True))
        ]
        args = [
            torch.tensor([[v]], dtype=torch.bool if c else torch.float64)
            for v, c in zip(values, conditions, strict=True)
        ]
        known = Values({(str(k), 0): x for k, x in enumerate(args)}, [torch.ones(1, 1, dtype=torch.bool)])
        leaves = [x if c else x.clone().requires_grad_() for x, c in zip(args, conditions, strict=True)]
        value = operator(*leaves)
        assert_close(float(value.detach()), float(spec.value(*values)), rtol=1e-14, atol=0.0, equal_nan=True)
        if not value.isfinite() or not value.requires_grad:
            assert spec.derivatives == () or not value.isfinite()
            continue
        value.backward()
        for x, derivative in zip(leaves, gradients(graph.plain(op, *terms), terms), strict=True):
            if x.requires_grad:
                want = 0.0 if x.grad is None else float(x.grad)
                assert_close(0.0 if derivative is None else float(known.of(derivative)), want, rtol=1e-12, atol=1e-15)


def test_the_functions_of_operators_say_what_they_are() -> None:
    """What fastreward.losses exports comes from the table: with a name, a signature and a docstring."""
    for name in sorted(set(OPS) & set(losses.__all__)):
        function = getattr(losses, name)
        assert function.__name__ == name
        assert function.__doc__
        assert len(inspect.signature(function).parameters) == OPS[name].arity
    assert set(losses.__all__) >= {"exp", "clip", "where", "softplus", "seq_sum"}

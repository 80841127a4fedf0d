"""The loss language's derivatives against autograd, ties, groups and empty sequences among them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from losses_of_a_few_tokens import make

import fastreward
from fastreward import losses
from fastreward.language.node import Node
from fastreward.losses import (
    clip,
    define,
    exp,
    log,
    maximum,
    minimum,
    seq_mean,
    seq_sum,
    stop_gradient,
    where,
)

UNARY: tuple[Callable[[Node], Node], ...] = (
    exp,
    lambda x: log(abs(x) + 0.5),
    losses.tanh,
    losses.sigmoid,
    losses.logsigmoid,
    losses.softplus,
    losses.expm1,
    lambda x: losses.log1p(abs(x)),
    lambda x: losses.sqrt(x * x + 1.0),
    abs,
    lambda x: clip(x, -0.3, 0.4),
    lambda x: -x,
    lambda x: x**3,
    losses.relu,
    lambda x: seq_mean(x),
    lambda x: seq_sum(x) * 0.1,
    losses.seq_max,
    losses.batch_mean,
    lambda x: losses.group_mean(seq_mean(x)),
    lambda x: losses.group_logsumexp(seq_mean(x)),
    lambda x: losses.group_logsumexp(seq_mean(x), others=True) * where(losses.group_size(x_terms(x)) > 1, 1.0, 0.0),
    lambda x: losses.group_cumsum(seq_mean(x), by=seq_mean(x)),
)
BINARY: tuple[Callable[[Node, Node], Node], ...] = (
    lambda x, y: x + y,
    lambda x, y: x - y,
    lambda x, y: x * y,
    lambda x, y: x / (y * y + 1.0),
    maximum,
    minimum,
    lambda x, y: where(x > y, x * y, y - x),
    lambda x, y: stop_gradient(x) * y,
)


def x_terms(x: Node) -> Node:
    """group_size takes whatever has a graph."""
    return x


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.data())
def test_derived_gradients_are_autograds(data: st.DataObject) -> None:
    """Random losses: value and derived gradient of the whole objective against torch autograd of its evaluation."""
    choice = data.draw(st.lists(st.tuples(st.integers(0, 99), st.integers(0, 99)), min_size=2, max_size=7))

    @define(aggregation="seq-mean-token-mean")
    def random_loss(t):
        values = [t.logprob, t.advantage, t.old_logprob]
        for kind, pick in choice:
            x, y = values[-1], values[pick % len(values)]
            values.append(UNARY[kind % len(UNARY)](x) if kind < 60 else BINARY[kind % len(BINARY)](x, y))
        return values[-1] + 0.1 * t.logprob * seq_mean(t.logprob)

    check_derived(random_loss(), seed=len(choice))


@pytest.mark.parametrize("kind", range(len(UNARY) + len(BINARY)))
def test_each_function_has_its_own_derivative(kind: int) -> None:
    """Alone and within a product, under an upstream gradient that no two tokens share."""

    @define(aggregation="seq-mean-token-mean")
    def one_function(t):
        f = UNARY[kind] if kind < len(UNARY) else lambda x: BINARY[kind - len(UNARY)](x, 0.5 * t.logprob - 0.1)
        return t.advantage * f(t.logprob) + t.logprob * f(t.advantage * t.logprob)

    check_derived(one_function(), seed=kind)


def check_derived(loss: losses.Loss, seed: int) -> None:
    """Value and derived gradient of the whole objective against torch autograd of its evaluation."""
    tensors = make(seed=seed)
    groups = [0, 1, 0, 1]
    mask = torch.tensor([[1, 1, 1, 0, 0, 0], [1] * 6, [0, 1, 0, 1, 0, 0], [1, 0, 0, 0, 0, 0]])
    value = loss.evaluate(mask=mask, group_ids=groups, **tensors)
    per_row = value.sum(-1) / mask.sum(-1) if value.ndim == 2 else value
    (expected,) = torch.autograd.grad(per_row.mean(), tensors["logprob"])
    leaf = tensors["logprob"].detach().float().requires_grad_()
    with fastreward.backend("reference"):
        result = fastreward.policy_loss(
            leaf, tensors["old_logprob"].float(), tensors["advantage"].float(), mask, loss=loss, group_ids=groups
        )
        (actual,) = torch.autograd.grad(result.loss, leaf)
    torch.testing.assert_close(result.loss.double(), per_row.mean().detach(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(actual.double(), expected, rtol=1e-3, atol=1e-4)


def test_a_sum_of_a_rows_product_and_two_gradients_runs() -> None:
    """Row values start no binary operator on the CPU: this loss once made it jump outside its table."""

    @define
    def two_outputs(t):
        return maximum(t.log_ratio * t.advantage, t.ratio * t.logprob + t.entropy)

    data, found = make(4, 5), []
    for name in ("cpu", "reference"):
        leaf = data["logprob"].detach().float().requires_grad_()
        entropy = torch.linspace(0, 1, 20).reshape(4, 5).requires_grad_()
        with fastreward.backend(name):
            result = fastreward.policy_loss(
                leaf, data["old_logprob"].float(), data["advantage"][:, 0].float(), loss=two_outputs(), entropy=entropy
            )
            found.append((result.loss.detach(), *torch.autograd.grad(result.loss, (leaf, entropy))))
    torch.testing.assert_close(*found)


def test_a_groups_maximum_gathers_the_gradients_of_its_members() -> None:
    @define(aggregation="token-sum")
    def largest(t):
        return t.advantage * losses.group_max(seq_mean(t.logprob))

    leaf = torch.tensor([[-1.0, -1.0], [-2.0, -2.0]], requires_grad=True)
    result = fastreward.policy_loss(leaf, leaf.detach(), torch.tensor([1.0, 10.0]), loss=largest(), group_size=2)
    result.loss.backward()
    assert leaf.grad is not None
    assert leaf.grad.tolist() == [[11.0, 11.0], [0.0, 0.0]]


@pytest.mark.parametrize("extreme", [losses.seq_max, losses.seq_min])
def test_a_maximum_finds_its_tokens_again(extreme: Callable[[Node], Node]) -> None:
    """The pass of the gradient has to come to the same bits as the one that found the maximum."""

    @define(aggregation="token-sum")
    def most(t):
        return extreme(t.ratio * t.logprob + t.old_logprob)

    g = torch.Generator().manual_seed(5)
    leaf = (-2 * torch.rand(400, 33, generator=g)).requires_grad_()
    old = leaf.detach() + 0.3 * torch.randn(400, 33, generator=g)
    fastreward.policy_loss(leaf, old, torch.zeros(400), loss=most()).loss.backward()
    assert leaf.grad is not None
    assert (leaf.grad != 0).any(-1).all()


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_empty_sequences_have_no_gradient_and_spoil_none(backend: str) -> None:
    @define(aggregation="token-sum")
    def spread(t):
        others = losses.batch_mean(t.logprob) * losses.group_mean(losses.seq_min(t.logprob))
        return where(losses.seq_max(t.logprob) < 0, losses.seq_max(t.logprob), 0.0) + others * t.advantage

    data = make(3, 4)
    mask, groups = torch.tensor([[1, 1, 1, 1], [0, 0, 0, 0], [1, 0, 1, 0]]), [0, 0, 1]
    value = spread().evaluate(mask=mask, group_ids=groups, **data)
    (expected,) = torch.autograd.grad(value.sum(), data["logprob"])
    leaf = data["logprob"].detach().float().requires_grad_()
    rest = (data["old_logprob"].float(), data["advantage"].float(), mask)
    with fastreward.backend(backend):
        result = fastreward.policy_loss(leaf, *rest, loss=spread(), group_ids=groups, return_token_loss=True)
        (actual,) = torch.autograd.grad(result.loss, leaf)
    assert expected.isfinite().all()
    assert not expected[1].any()
    torch.testing.assert_close(actual.double(), expected, rtol=1e-4, atol=1e-5)
    assert result.token_loss is not None
    torch.testing.assert_close(result.token_loss.double(), value.detach(), rtol=1e-4, atol=1e-5)


def test_evaluate_gives_nothing_for_an_empty_sequence() -> None:
    """-inf, the maximum of nothing, reaches neither the values nor, as 0 * inf, the gradients of other sequences."""

    @define
    def product(t):
        return losses.seq_max(t.logprob) * losses.batch_mean(t.logprob)

    data = make(2, 3)
    mask = torch.tensor([[1, 1, 1], [0, 0, 0]])
    value = product().evaluate(mask=mask, logprob=data["logprob"])
    assert value[1] == 0
    value.sum().backward()
    assert data["logprob"].grad is not None
    assert data["logprob"].grad.isfinite().all()

"""The loss language: what it traces, simplifies, derives, prints and refuses."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import fastreward
from fastreward import losses
from fastreward.losses import (
    _objective,
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
from fastreward.losses._graph import Graph, Level, Node
from fastreward.losses._objective import PolicyCall, policy_objective
from fastreward.losses._ops import OPS

TOKENS = (("logprob", Level.TOKEN), ("old_logprob", Level.TOKEN), ("advantage", Level.TOKEN))


@define
def plain_ppo(t, clip_low=0.2, clip_high=0.2):
    return maximum(-t.advantage * t.ratio, -t.advantage * clip(t.ratio, 1 - clip_low, 1 + clip_high))


def make(rows: int = 4, width: int = 6, seed: int = 0) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)
    old = -torch.rand(rows, width, generator=g, dtype=torch.float64)
    return {
        "logprob": (old + 0.3 * torch.randn(rows, width, generator=g, dtype=torch.float64)).requires_grad_(),
        "old_logprob": old,
        "advantage": torch.randn(rows, width, generator=g, dtype=torch.float64),
    }


# ------------------------------------------------------------------------------------------------------------ graphs
def test_equal_expressions_are_one_node() -> None:
    graph = Graph()
    x, y = graph.input("x", Level.TOKEN), graph.input("y", Level.TOKEN)
    assert (x * y).id == (y * x).id
    assert (exp(x) - 1).id == (exp(x) - 1).id


def test_constants_fold_and_neutral_elements_vanish() -> None:
    graph = Graph()
    x = graph.input("x", Level.TOKEN)
    assert (graph.constant(2.0) * 3 + 1).value == 7.0
    assert (x + 0).id == x.id
    assert (1 * x).id == x.id
    assert (x * 0).value == 0.0
    negated = -x
    assert (-negated).id == x.id
    assert where(graph.constant(1.0) > 0, x, 5.0).id == x.id
    assert (x - x).value == 0.0


def test_a_rows_product_is_computed_once_a_row() -> None:
    graph = Graph()
    token, a, b = graph.input("x", Level.TOKEN), graph.input("a", Level.ROW), graph.input("b", Level.ROW)
    product = (token * a) * b
    assert {n.level for n in product.args} == {Level.TOKEN, Level.ROW}


def test_ppos_derivative_is_the_hand_written_one() -> None:
    """One select: 0 where the clipped branch is taken outside the range (or the log-ratio is clamped), else -A r."""
    program = policy_objective(plain_ppo(), PolicyCall(TOKENS, "token-mean", deferred=True)).program
    (stage,) = program.stages
    ops = [n.op for n in stage.tokens[0].body]
    assert ops.count("where") == 1
    assert ops.count("exp") == 1
    assert len(ops) <= 14


def test_a_gradient_per_sequence_is_not_stored_per_token() -> None:
    @define(aggregation="seq-mean-token-mean")
    def sequence_ppo(t):
        ratio = exp(seq_mean(t.log_ratio))
        return -seq_mean(t.advantage) * ratio

    objective = policy_objective(sequence_ppo(), PolicyCall(TOKENS, "seq-mean-token-mean"))
    gradient = objective.gradients[0]
    assert gradient is not None
    assert not gradient.per_token
    assert len(objective.program.stages) == 1  # one read of the tokens


# ------------------------------------------------------------------------------------------- parameters and programs
def test_other_numbers_and_shapes_make_no_new_program() -> None:
    _objective._cached_policy.cache_clear()
    for rows, width, low in ((2, 3, 0.1), (5, 8, 0.3), (1, 1, 0.25)):
        data = {k: v.float() for k, v in make(rows, width).items()}
        fastreward.policy_loss(
            data["logprob"], data["old_logprob"], data["advantage"], loss=plain_ppo(clip_low=low, clip_high=2 * low)
        )
    assert _objective._cached_policy.cache_info().misses == 1


def test_none_and_strings_are_structure() -> None:
    assert losses.ppo().structure != losses.ppo(dual_clip=3.0).structure
    assert losses.ppo(dual_clip=2.0).structure == losses.ppo(dual_clip=3.0).structure
    assert losses.ppo(log_ratio_clamp=20.0).structure != losses.ppo(log_ratio_clamp=10.0).structure  # static


def test_a_parameter_may_be_one_value_per_sequence() -> None:
    data = {k: v.float() for k, v in make().items()}
    args = (data["logprob"], data["old_logprob"], data["advantage"])
    low = torch.tensor([0.1, 0.2, 0.3, 0.05])
    together = fastreward.policy_loss(*args, loss=plain_ppo(clip_low=low), aggregation="token-sum").loss
    apart = sum(
        fastreward.policy_loss(
            *(x[i : i + 1] for x in args), loss=plain_ppo(clip_low=float(low[i])), aggregation="token-sum"
        ).loss
        for i in range(4)
    )
    torch.testing.assert_close(together, torch.as_tensor(apart))


def test_losses_compose() -> None:
    @define
    def half_and_half(t, share=0.5):
        return share * plain_ppo(clip_low=0.1)(t) - (1 - share) * t.advantage * t.logprob

    data = make()
    expected = 0.25 * plain_ppo(clip_low=0.1).evaluate(**data) - 0.75 * data["advantage"] * data["logprob"]
    torch.testing.assert_close(half_and_half(share=0.25).evaluate(**data), expected)


# -------------------------------------------------------------------------------------------------------- derivatives
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

    loss = random_loss()
    tensors = make(seed=len(choice))
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


def test_every_operator_has_a_derivative_or_none() -> None:
    from fastreward.losses._derivative import _RULES

    flat = {"sign", "stop_gradient"} | {name for name, op in OPS.items() if op.boolean}
    assert set(OPS) - flat <= set(_RULES)


# ------------------------------------------------------------------------------------------------------------ showing
def test_print_shows_the_formula_and_its_derivative() -> None:
    text = str(plain_ppo(clip_low=0.1))
    assert "plain_ppo(clip_low=0.1, clip_high=0.2)" in text
    assert "loss = maximum(" in text
    assert "d/d logprob = where(" in text
    assert "exp(clip(" in text


# ----------------------------------------------------------------------------------------------------------- refusals
def refused(function: Callable[..., object], error: type[Exception], *parts: str, **extra: Tensor) -> None:
    loss = define(function)()  # type: ignore[arg-type]
    data = {k: v.float() for k, v in make().items()}
    with pytest.raises(error) as caught:
        fastreward.policy_loss(data["logprob"], data["old_logprob"], data["advantage"], loss=loss, extra=extra or None)
    for part in parts:
        assert part in str(caught.value)


def test_errors_name_the_line_and_say_what_to_write() -> None:
    def branches(t):
        if t.advantage > 0:
            return t.logprob
        return -t.logprob

    def uses_math(t):
        return math.exp(t.logprob)

    def uses_torch(t):
        return torch.exp(t.logprob)

    def misspells(t):
        return t.logprobs

    def indexes(t):
        return t.logprob[0]

    def halves(t):
        return t.ratio**0.5

    here = "test_loss_language.py:"
    refused(branches, TypeError, here, "in branches", "where(condition, a, b)")
    refused(uses_math, TypeError, here, "in uses_math", "fastreward.losses")
    refused(uses_torch, TypeError, here, "fastreward.losses.exp")
    refused(misspells, AttributeError, here, "did you mean t.logprob")
    refused(indexes, TypeError, here, "can't be indexed")
    refused(halves, TypeError, here, "exp(0.5 * log(x))")


def test_missing_terms_are_named_with_their_argument() -> None:
    refused(lambda t: t.logprob - t.ref_logprob, ValueError, "reads the term 'ref_logprob'", "pass ref_logprobs=")
    refused(lambda t: t.logprob * t.extra("gate"), ValueError, "reads the term 'gate'", 'extra={"gate": ...}')
    refused(
        lambda t: t.logprob * t.extra("score", per="sequence"), ValueError, "once per sequence", score=torch.ones(4, 6)
    )


def test_a_loss_without_a_gradient_is_refused() -> None:
    refused(lambda t: t.advantage * t.old_logprob, ValueError, "gradient", "zero")
    refused(lambda t: -stop_gradient(t.ratio) * t.advantage, ValueError, "stop_gradient")
    refused(lambda t: where(t.ratio > 1, 1.0, 0.0), ValueError, "zero")


def test_group_losses_need_groups_and_sequence_values() -> None:
    refused(lambda t: seq_mean(t.logprob) - losses.group_mean(seq_mean(t.logprob)), ValueError, "group_ids")
    refused(lambda t: losses.group_mean(t.logprob), TypeError, "per sequence", "seq_mean")


def test_what_a_loss_returns_and_takes_is_checked() -> None:
    refused(lambda t: t.ratio > 1, TypeError, "condition")
    refused(lambda t: None, TypeError, "expected the loss to return a term")
    with pytest.raises(TypeError, match=r"as in losses\.ppo"):
        fastreward.policy_loss(*(torch.zeros(1, 1) for _ in range(3)), loss=losses.ppo)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="clip_low"):
        losses.ppo(clip_low=2.0)
    with pytest.raises(ValueError, match="no parameter"):
        define(static=("nothing",))(lambda t: t.logprob)

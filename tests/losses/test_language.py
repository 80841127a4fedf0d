"""The loss language: what it traces, simplifies, derives, prints and refuses."""

from __future__ import annotations

import copy
import math
import operator
import pickle
from collections.abc import Callable
from fractions import Fraction
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import fastreward
from fastreward import losses
from fastreward.language import objective as objective_module
from fastreward.language.graph import Graph
from fastreward.language.node import Level, Node
from fastreward.language.objective import PolicyCall, policy_objective
from fastreward.language.program import program
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
    assert where(graph.constant(1.0) < 0, 5.0, x).id == x.id
    assert (x - x).value == 0.0
    y = graph.input("y", Level.TOKEN)
    assert (-(x - y)).id == (y - x).id
    assert (x / 4.0).id == (x * 0.25).id
    condition, true, false = x > y, graph.truth(True), graph.truth(False)
    assert (condition & true).id == (true & condition).id == condition.id
    assert (condition | false).id == (false | condition).id == condition.id
    assert (condition & false).value == 0.0
    assert (condition | true).value == 1.0


def test_keys_tell_programs_apart() -> None:
    """By the level of an input, its name and side, a constant, an operator, and what is wanted."""

    def key(level: Level = Level.TOKEN, name: str = "y", value: float = 2.0, side: int = 0, swap: bool = False) -> str:
        graph = Graph(sides=2)
        x, y = graph.input("x", Level.TOKEN, side), graph.input(name, level, side)
        outputs = [x * y + value, minimum(x, y)]
        return program(outputs[::-1] if swap else outputs, [], 2).key

    keys = [key(), key(Level.SEQUENCE), key(name="z"), key(value=3.0), key(side=1), key(swap=True)]
    assert len(set(keys)) == len(keys)
    assert key() == keys[0]


def test_a_rows_product_is_computed_once_a_row() -> None:
    graph = Graph()
    token, a, b = graph.input("x", Level.TOKEN), graph.input("a", Level.SEQUENCE), graph.input("b", Level.SEQUENCE)
    product = (token * a) * b
    assert {n.level for n in product.args} == {Level.TOKEN, Level.SEQUENCE}


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
    objective_module._cached_policy.cache_clear()
    for rows, width, low in ((2, 3, 0.1), (5, 8, 0.3), (1, 1, 0.25)):
        data = {k: v.float() for k, v in make(rows, width).items()}
        fastreward.policy_loss(
            data["logprob"], data["old_logprob"], data["advantage"], loss=plain_ppo(clip_low=low, clip_high=2 * low)
        )
    assert objective_module._cached_policy.cache_info().misses == 1


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


@define
def half_and_half(t, share=0.5):
    return share * plain_ppo(clip_low=0.1)(t) - (1 - share) * t.advantage * t.logprob


def test_losses_compose() -> None:
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


# ---------------------------------------------------------------------------------------------- compiled and pickled
def test_a_compiled_function_tells_losses_apart() -> None:
    data = {k: v.detach().float() for k, v in make().items()}
    rewards = torch.tensor([1.0, 0.0, 0.0, 1.0])

    def policy(loss: losses.Loss) -> Tensor:
        return fastreward.policy_loss(data["logprob"], data["old_logprob"], rewards, loss=loss, group_size=2).loss

    def preference(loss: losses.Loss) -> Tensor:
        refs = (data["old_logprob"], data["old_logprob"] + 0.1)
        return fastreward.preference_loss(
            data["logprob"], 2 * data["logprob"], loss=loss, ref_chosen_logprobs=refs[0], ref_rejected_logprobs=refs[1]
        ).loss

    cispos = [losses.cispo(), losses.cispo(convention="trl"), losses.cispo(convention="tinker")]
    for function, different in (
        (policy, [losses.psr(), losses.nsr(), half_and_half(), half_and_half(0.2)]),
        (policy, cispos),
        (policy, [losses.real(), losses.real(variant="bce")]),
        (preference, [losses.dpo(), losses.dpo(variant="hinge")]),
    ):
        torch.compiler.reset()
        compiled = torch.compile(function, fullgraph=True, backend="eager")
        values = [compiled(loss) for loss in different]
        torch.testing.assert_close(values, [function(loss) for loss in different])
        assert len({float(x) for x in values}) > 1


def test_formulas_tell_losses_apart() -> None:
    def lookalike() -> Any:
        return define(lambda t, scale=1.0: scale * t.logprob)

    different = [
        losses.ppo(),
        losses.ppo(dual_clip=3.0),
        losses.ppo(log_ratio_clamp=10.0),
        losses.ppo(clip_low=torch.tensor(0.1)),
        losses.ppo(clip_low=torch.tensor([0.1])),
        losses.psr(),
        lookalike()(),
        lookalike()(),
    ]
    assert len({x.formula for x in different}) == len(different)
    assert losses.ppo(0.1).formula == losses.ppo(0.2).formula


def test_a_loss_made_inside_a_compiled_function_is_refused() -> None:
    torch.compiler.reset()
    zeros = torch.zeros(1, 1)

    def step(logprobs: Tensor) -> Tensor:
        return fastreward.policy_loss(logprobs, zeros, zeros, loss=losses.ppo()).loss

    with pytest.raises(RuntimeError, match="make it outside the compiled function"):
        torch.compile(step, fullgraph=True, backend="eager")(zeros)


@pytest.mark.parametrize("copied", [lambda x: pickle.loads(pickle.dumps(x)), copy.deepcopy, copy.copy])
def test_losses_are_pickled_and_copied(copied: Callable[[losses.Loss], losses.Loss]) -> None:
    data = make()
    for loss in (losses.ppo(0.1, dual_clip=3.0), losses.ppo(torch.tensor([0.1, 0.2, 0.3, 0.4])), plain_ppo(0.3)):
        there = copied(loss)
        assert there.definition is loss.definition
        assert there.formula == loss.formula
        torch.testing.assert_close(there.evaluate(**data), loss.evaluate(**data))
    assert pickle.loads(pickle.dumps(losses.ppo)) is losses.ppo


# ------------------------------------------------------------------------------------------------------------ showing
def test_a_definition_and_a_loss_show_their_parameters_in_one_line() -> None:
    assert (
        repr(losses.gspo) == "losses.gspo(clip_low=0.0003, clip_high=0.0004, log_ratio_max=10.0): call it to get a loss"
    )
    assert repr(losses.gspo(clip_low=0.1)) == "gspo(clip_low=0.1, clip_high=0.0004, log_ratio_max=10.0)"

    def own(t: losses.Terms, floor: float = 0.1, *, cap: float) -> Node:
        return -clip(t.ratio, floor, cap)

    assert repr(define(own)) == "own(floor=0.1, cap): call it to get a loss"
    assert repr([define(own)(cap=2.0)]) == "[own(floor=0.1, cap=2.0)]"


def test_print_shows_the_formula_and_its_derivative() -> None:
    text = str(plain_ppo(clip_low=0.1))
    assert "plain_ppo(clip_low=0.1, clip_high=0.2)" in text
    assert "loss = maximum(" in text
    assert "d/d logprob = where(" in text
    assert "exp(clip(" in text


@define
def with_bonus(t):
    value = -t.advantage * t.logprob
    return value - 0.5 * t.entropy if t.has("entropy") else value


def test_what_a_loss_can_do_without_is_shown_and_read() -> None:
    text = str(with_bonus())
    assert "with_bonus() where entropy is passed" in text
    assert "d/d entropy = -0.5" in text
    assert "where" not in str(plain_ppo()).splitlines()[0]
    assert "log(weight)" in str(losses.vespo())
    assert "where chosen.weight, rejected.weight are passed" in str(losses.dpo())
    assert with_bonus().reads("entropy")
    assert losses.vespo().reads("weight")
    assert not losses.dpo(variant="sft").reads("ref_logprob")


def test_what_a_loss_can_do_without_comes_from_the_logits() -> None:
    data = {k: v.float() for k, v in make().items()}
    rest = (data["old_logprob"], data["advantage"])
    g = torch.Generator().manual_seed(1)
    hidden, weight = torch.randn(4, 6, 3, generator=g), torch.randn(5, 3, generator=g)
    logits, labels = hidden @ weight.T, torch.randint(5, (4, 6), generator=g)
    stats = fastreward.token_logprobs(logits, labels, outputs=("logprobs", "entropy"))
    for loss, entropy in ((with_bonus(), stats.entropy), (losses.vespo(), None), (losses.gmpo(), None)):
        expected = fastreward.policy_loss(stats.logprobs, *rest, loss=loss, entropy=entropy).loss
        found = fastreward.logits_policy_loss(logits, labels, *rest, loss=loss).loss
        torch.testing.assert_close(found, expected)
        found = fastreward.linear_policy_loss(hidden, weight, labels, *rest, loss=loss).loss
        torch.testing.assert_close(found, expected)

    @define
    def instead(t):
        value = -t.advantage * t.logprob
        return value if t.has("weight") else value - 0.5 * t.entropy

    found = fastreward.logits_policy_loss(logits, labels, *rest, loss=instead()).loss
    torch.testing.assert_close(found, fastreward.logits_policy_loss(logits, labels, *rest, loss=with_bonus()).loss)
    without = fastreward.policy_loss(stats.logprobs, *rest, loss=with_bonus()).loss
    torch.testing.assert_close(without, -(rest[1] * stats.logprobs).mean())


# ------------------------------------------------------------------------------------------------------------ numbers
def applied(function: Callable[[Node], Node]) -> Tensor:
    """`function` of the log-probs of make()."""
    return define(lambda t: function(t.logprob))().evaluate(logprob=make()["logprob"].detach())


def test_numbers_of_other_libraries_are_numbers() -> None:
    x = make()["logprob"].detach()
    for scale in (np.float32(2), np.float64(2), np.int64(2), np.array(2.0), Fraction(2), 2):
        product, rest = partial(operator.mul, scale), partial(operator.sub, scale)
        torch.testing.assert_close(applied(product), 2 * x)
        torch.testing.assert_close(applied(lambda y, times=scale: y * times), 2 * x)
        torch.testing.assert_close(applied(rest), 2 - x)
        assert plain_ppo(clip_low=scale).scalars["clip_low"] == 2.0
    assert losses.pacs(balanced=np.False_).parameters["balanced"] is False
    torch.testing.assert_close(applied(lambda y: where(np.float32(-0.3) < y, +y, 0)), torch.where(x > -0.3, x, 0))


def test_powers() -> None:
    x = make()["logprob"].detach()
    for power in (0, 1, 2, 2.0, 3, -1, -2, np.int64(2)):
        torch.testing.assert_close(applied(lambda y, n=power: y + y**n), x + x ** float(power))
    torch.testing.assert_close(applied(lambda y: abs(y) ** 0.5), x.abs().sqrt())


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

    def third_root(t):
        return t.ratio**0.3

    here = "test_language.py:"
    refused(branches, TypeError, here, "in branches", "where(condition, a, b)")
    refused(uses_math, TypeError, here, "in uses_math", "fastreward.losses")
    refused(uses_torch, TypeError, here, "fastreward.losses.exp")
    refused(misspells, AttributeError, here, "did you mean t.logprob")
    refused(indexes, TypeError, here, "can't be indexed")
    refused(third_root, TypeError, here, "exp(0.3 * log(x))")


@pytest.mark.parametrize(
    ("function", "part"),
    [
        (lambda t: np.exp(t.logprob), "use fastreward.losses.exp"),
        (lambda t: np.where(t.ratio > 1, 1.0, 0.0), "use fastreward.losses.where"),
        (lambda t: np.mean(t.ratio), "seq_mean, group_mean or batch_mean"),
        (lambda t: np.asarray(t.ratio), "no array"),
        (lambda t: np.ones(3) * t.ratio, "extra={...}"),
        (lambda t: torch.ones(3) * t.ratio, "extra={...}"),
        (lambda t: t.ratio * torch.ones(3), "extra={...}"),
        (lambda t: torch.clamp(t.ratio, 0, 1), "use clip"),
        (lambda t: 2**t.ratio, "exp(x * math.log(2))"),
        (lambda t, power=2: t.ratio**power, "write exp(y * log(x)), or name the parameter in define(static="),
        (lambda t: t.ratio % 2, "does not round"),
        (lambda t: 2 // t.ratio, "does not round"),
        (lambda t: round(t.ratio), "does not round"),
        (lambda t: math.floor(t.ratio), "does not round"),
        (lambda t: t.ratio @ t.ratio, "seq_sum(x * y)"),
        (lambda t: t.ratio ^ 2, "x ** 2"),
        (lambda t: len(t.ratio), "t.length"),
        (lambda t: 1 in t.ratio, "can't be searched"),
        (lambda t: seq_sum(1.0), "seq_sum: expected a term of the loss (t.logprob, ...), got 1.0"),
        (lambda t: losses.batch_mean(1.0), "batch_mean: expected a term of the loss"),
        (lambda t: losses.batch_max(1.0), "batch_max: expected a term of the loss"),
        (lambda t: seq_mean(t), "got Terms; take one of its terms, as in t.logprob"),
        (lambda t: exp(t), "got Terms; take one of its terms, as in t.logprob"),
        (lambda t: losses.group_mean(t.logprob), "group_mean takes what is per sequence"),
        (lambda t: losses.group_size(1), "group_size: expected the loss's terms"),
        (lambda t: t.ratio * losses.ppo(), "got Loss; call it with the terms"),
        (lambda t: losses.ppo(clip_high=torch.ones(4))(t), "clip_high: a tensor can't be a parameter of a loss inside"),
        (lambda t: losses.ppo()(1), "expected a loss's terms"),
        (lambda t: None, "expected the loss to return a term, got None"),
        (lambda t: (t.ratio, t.ratio), "expected the loss to return a term, got tuple"),
        (lambda t: t.ratio > 1, "where(condition, 1.0, 0.0)"),
    ],
)  # fmt: skip
def test_what_the_language_has_not_is_refused_with_a_remedy(function: Callable[..., object], part: str) -> None:
    refused(function, TypeError, f"test_language.py:{function.__code__.co_firstlineno}", part)


def test_methods_of_arrays_are_refused_with_a_remedy() -> None:
    refused(lambda t: t.ratio.exp(), AttributeError, "test_language.py:", "use fastreward.losses.exp")
    refused(lambda t: t.ratio.mean(), AttributeError, "seq_mean, group_mean or batch_mean")
    refused(lambda t: t.ratio.detach(), AttributeError, "use stop_gradient")
    refused(lambda t: t.ratio.shape, AttributeError, "no .shape", "help(fastreward.losses)")


def test_metrics_of_every_loss_are_not_a_losss_own() -> None:
    def reports(t):
        t.report(clip_fraction_low=t.ratio > 1, own=t.ratio)
        t.report(ratio_mean=t.ratio)
        return t.logprob

    refused(reports, ValueError, "test_language.py:", "'ratio_mean' is a metric of every loss already")


@pytest.mark.parametrize(
    ("make_loss", "error", "message"),
    [
        (lambda: losses.ppo("a"), TypeError, "ppo: clip_low: expected a number or a [B] tensor, got 'a'"),
        (lambda: losses.ppo(None), TypeError, "ppo: clip_low: expected a number or a [B] tensor, got None"),
        (lambda: losses.ppo(True), TypeError, "ppo: clip_low: expected a number or a [B] tensor, got True"),
        (lambda: losses.dpo("a"), TypeError, "dpo: beta: expected a number"),
        (lambda: losses.pacs(balanced=1), TypeError, "pacs: balanced: expected True or False, got 1"),
        (lambda: losses.ppo([0.1]), TypeError, "ppo: clip_low: expected a number or a [B] tensor, got list"),
        (lambda: losses.ppo(clip=0.1), TypeError, "ppo: got an unexpected keyword argument 'clip'"),
        (lambda: losses.ppo(log_ratio_clamp=torch.tensor(3.0)), TypeError, "expected a number or None (it decides"),
        (lambda: losses.simpo(gamma=math.nan), ValueError, "simpo: gamma: expected a number, got nan"),
        (lambda: plain_ppo(clip_low=math.nan), ValueError, "plain_ppo: clip_low: expected a number, got nan"),
        (lambda: losses.rpo(eta=math.nan), ValueError, "eta: expected a number >= 0, got nan"),
        (lambda: losses.tgdpo(alpha=-3), ValueError, "alpha: expected a number >= 0"),
        (lambda: losses.simpo(sft_weight=-1), ValueError, "sft_weight: expected a number >= 0"),
        # A tensor keeps the others' checks on, and is looked at itself.
        (lambda: losses.pacs(torch.ones(3), method="bogus"), ValueError, "method: expected 'sum' or 'mean'"),
        (lambda: losses.cispo(torch.ones(3), convention="bogus"), ValueError, "convention: expected"),
        (lambda: losses.ppo(torch.tensor([0.1, -5.0])), ValueError, "clip_low: expected a number >= 0, got -5.0"),
        (lambda: losses.ppo(torch.tensor([0.1, math.nan])), ValueError, "clip_low: expected a number >= 0"),
        (lambda: losses.dpo(label_smoothing=torch.zeros(3), variant="exo_pair"), ValueError, "a number above 0"),
    ],
)  # fmt: skip
def test_bad_parameters_are_named(make_loss: Callable[[], object], error: type[Exception], message: str) -> None:
    with pytest.raises(error) as caught:
        make_loss()
    assert message in str(caught.value)


def test_parameters_that_are_not_known_yet_do_not_hide_the_others() -> None:
    """Inside another loss a parameter may be a term; what its default would break is not held against it."""

    def smoothed(variant: str) -> losses.Loss:
        @define(pairs=True)
        def outer(t, share=0.1):
            return losses.dpo(label_smoothing=share, variant=variant)(t)

        return outer()

    assert "label_smoothing" not in str(smoothed("exo_pair"))
    with pytest.raises(ValueError, match="variant: expected one of"):
        str(smoothed("exo"))
    losses.cispo(torch.tensor([0.1, 0.5]), torch.tensor([0.2, 0.6]), convention="tinker")


def test_evaluate_names_what_it_can_not_use() -> None:
    data = make()
    with pytest.raises(ValueError, match=r"advantages: ppo does not read it \(did you mean 'advantage'\?\)"):
        losses.ppo().evaluate(**data, advantages=data["advantage"])
    with pytest.raises(ValueError, match=r"ppo: clip_low: expected \[4\], one per sequence, got shape \[3\]"):
        losses.ppo(torch.tensor([0.1, 0.2, 0.3])).evaluate(**data)
    losses.ppo().evaluate(**data, weight=data["advantage"])  # a term, that this loss leaves alone


def test_evaluate_names_missing_terms_as_it_takes_them() -> None:
    with pytest.raises(ValueError, match=r"ppo reads the term 'old_logprob', which was not passed; pass old_logprob=$"):
        losses.ppo().evaluate(logprob=-1.0, advantage=1.0)
    with pytest.raises(ValueError, match=r"which was not passed; pass rejected_ref_logprob=$"):
        losses.dpo().evaluate(chosen_logprob=-1.0, rejected_logprob=-1.0, chosen_ref_logprob=-1.0)
    with pytest.raises(ValueError, match=r"which was not passed; pass consistency=$"):
        losses.cream().evaluate(**{f"{side}_{x}logprob": -1.0 for side in ("chosen", "rejected") for x in ("", "ref_")})


POLICY_LOSSES = [x for x in vars(losses).values() if isinstance(x, losses.Definition) and not x.pairs]
PAIR_LOSSES = [x for x in vars(losses).values() if isinstance(x, losses.Definition) and x.pairs]


@pytest.mark.parametrize("definition", [*POLICY_LOSSES, *PAIR_LOSSES], ids=lambda d: d.name)
def test_evaluate_takes_numbers_and_one_token_a_sequence(definition: losses.Definition[Any]) -> None:
    needed = {name: 0.1 for name, p in definition.__signature__.parameters.items() if p.default is p.empty}
    loss, g = definition(**needed), torch.Generator().manual_seed(0)
    arrays, group_ids = {}, [0, 0, 1]
    for name, level, side in sorted(objective_module.inputs_asked(loss)):
        prefix = ("chosen_", "rejected_")[side] if loss.definition.pairs and (side or level == Level.TOKEN) else ""
        arrays[prefix + name] = (-torch.rand(3, generator=g), level)
    padded = {name: x.unsqueeze(-1) if level == Level.TOKEN else x for name, (x, level) in arrays.items()}
    expected = loss.evaluate(**padded, group_ids=group_ids)
    result = loss.evaluate(**{name: x for name, (x, _) in arrays.items()}, group_ids=group_ids)
    assert result.shape == (3,)
    torch.testing.assert_close(result, expected.reshape(3), equal_nan=True)
    first = {name: x[:1] for name, x in padded.items()}
    number = loss.evaluate(**{name: float(x[0]) for name, (x, _) in arrays.items()}, group_ids=[0])
    assert number.shape == ()
    torch.testing.assert_close(number, loss.evaluate(**first, group_ids=[0]).reshape(()), equal_nan=True)


def test_evaluate_of_numbers() -> None:
    value = losses.ppo().evaluate(logprob=-1.0, old_logprob=-1.2, advantage=2.0)
    assert float(value) == pytest.approx(-2.0 * 1.2)  # clipped
    x = torch.tensor(-1.0, requires_grad=True)
    losses.reinforce().evaluate(logprob=x, advantage=np.float32(3.0)).backward()
    assert x.grad == -3.0
    found = losses.ppo().evaluate(logprob=[-1.0, -1.0], old_logprob=np.array([-1.0, -1.2]), advantage=-1.0)
    torch.testing.assert_close(found, torch.tensor([1.0, math.exp(0.2)], dtype=torch.float64))
    with pytest.raises(ValueError, match=r"mask: expected \[B, T\], got shape \[2\]"):
        losses.ppo().evaluate(logprob=[-1.0, -1.0], old_logprob=-1.0, advantage=1.0, mask=[1, 0])


def test_what_a_loss_reads_is_named_exactly() -> None:
    """In messages: all that it may read, its own terms and extras alone."""

    @define
    def own(t, scale=1.0):
        t.report(seen=t.rollout_logprob)
        value = -t.extra("gate", per="sequence") * t.logprob * scale
        return value if t.has("weight") else value * t.extra("other")

    reads = "own does not read it; it reads gate, logprob, other, rollout_logprob$"
    x = torch.zeros(2, 3)
    extra = {"gate": torch.ones(2), "other": x, "bogus": x}
    for scale in (2.0, torch.tensor([1.0, 2.0])):
        with pytest.raises(ValueError, match=rf"extra\['bogus'\]: {reads}"):
            fastreward.policy_loss(
                x, x, x, loss=own(scale), extra=extra, rollout_logprobs=x, ref_logprobs=x, weights=None
            )
        with pytest.raises(ValueError, match=rf"bogus: {reads}"):
            own(scale).evaluate(logprob=x, rollout_logprob=x, **extra)
    with pytest.raises(ValueError, match=r"rollout_logprobs: ppo does not read it; it reads advantage, logprob, old_"):
        fastreward.policy_loss(x, x, x, rollout_logprobs=x)

    @define(pairs=True)
    def chosen_only(t, scale=1.0):
        return -scale * seq_sum(t.chosen.logprob * t.chosen.weight) + t.extra("margin") * seq_sum(t.rejected.logprob)

    reads = r"chosen_only does not read it; it reads chosen\.logprob, chosen\.weight, margin, rejected\.logprob$"
    pair = {"loss": chosen_only(), "extra": {"margin": torch.ones(2)}, "chosen_weights": x}
    with pytest.raises(ValueError, match=f"rejected_weights: {reads}"):
        fastreward.preference_loss(x, x, rejected_weights=x, **pair)
    with pytest.raises(ValueError, match=rf"rejected_extra\['gate'\]: {reads}"):
        fastreward.preference_loss(x, x, rejected_extra={"gate": x}, ref_chosen_logprobs=x, **pair)


def test_missing_terms_are_named_with_their_argument() -> None:
    refused(lambda t: t.logprob - t.ref_logprob, ValueError, "reads the term 'ref_logprob'", "pass ref_logprobs=")
    refused(lambda t: t.logprob * t.extra("gate"), ValueError, "reads the term 'gate'", 'extra={"gate": ...}')
    refused(
        lambda t: t.logprob * t.extra("score", per="sequence"), ValueError, "once per sequence", score=torch.ones(4, 6)
    )


def test_a_loss_without_a_gradient_is_refused() -> None:
    refused(lambda t: t.advantage * t.old_logprob, ValueError, "gradient", "zero", "does not depend on logprob")
    refused(lambda t: 3.0, ValueError, "test_language.py:", "does not depend on logprob")
    refused(lambda t: -stop_gradient(t.ratio) * t.advantage, ValueError, "stop_gradient")
    refused(lambda t: where(t.ratio > 1, 1.0, 0.0), ValueError, "zero")


def test_group_losses_need_groups_and_sequence_values() -> None:
    refused(lambda t: seq_mean(t.logprob) - losses.group_mean(seq_mean(t.logprob)), ValueError, "group_ids")
    refused(lambda t: losses.group_mean(t.logprob), TypeError, "per sequence", "seq_mean")


def test_what_a_loss_returns_and_takes_is_checked() -> None:
    refused(lambda t: t.ratio > 1, TypeError, "condition")
    refused(lambda t: None, TypeError, "expected the loss to return a term")
    with pytest.raises(TypeError, match=r"call it: ppo\(\)"):
        fastreward.policy_loss(*(torch.zeros(1, 1) for _ in range(3)), loss=losses.ppo)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="clip_low"):
        losses.ppo(clip_low=-2.0)
    with pytest.raises(ValueError, match="no parameter"):
        define(static=("nothing",))(lambda t: t.logprob)

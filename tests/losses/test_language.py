"""The loss language: what it traces, simplifies, prints and takes as numbers."""

from __future__ import annotations

import copy
import operator
import pickle
from collections.abc import Callable
from fractions import Fraction
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from losses_of_a_few_tokens import make, plain_ppo
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
    minimum,
    seq_mean,
    where,
)

TOKENS = (("logprob", Level.TOKEN), ("old_logprob", Level.TOKEN), ("advantage", Level.TOKEN))


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

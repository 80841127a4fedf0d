"""What a loss reads from outside (globals, closures, what its helpers read) is what it was when the loss was made."""

from __future__ import annotations

import functools
import math
import random
import re
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import fastreward
from fastreward import losses
from fastreward.language import objective, surroundings
from fastreward.losses import define

DATA = {"logprob": torch.tensor([[-1.0]]), "old_logprob": torch.tensor([[-1.0]]), "advantage": torch.tensor([[-1.0]])}


class Config:
    """An object of a user's class."""

    def __init__(self, k: float) -> None:
        self.k = k

    def scaled(self, x: Any) -> Any:
        return x * self.k


K = 2.0
TABLE: dict[str, dict[str, float]] = {"a": {"k": 2.0}}
CONFIG = Config(2.0)
SETTINGS = types.ModuleType("settings")
SETTINGS.K = 2.0  # type: ignore[attr-defined]


def helper(x: Any) -> Any:
    return x * K


def other(x: Any) -> Any:
    return x * 3.0


def by_default(x: Any, k: float = 2.0) -> Any:
    return x * k


HELPER: Callable[[Any], Any] = by_default


@define
def inner(t, scale=1.0):
    return scale * t.ratio * K


@define
def reads_global(t):
    return -t.advantage * t.ratio * K


@define
def reads_table(t):
    return -t.advantage * t.ratio * TABLE["a"]["k"]


@define
def reads_attribute(t):
    return -t.advantage * t.ratio * CONFIG.k


@define
def reads_module(t):
    return -t.advantage * t.ratio * SETTINGS.K


@define
def reads_object(t):
    return -t.advantage * t.ratio * (lambda config: config.k)(CONFIG)


@define
def calls_method(t):
    return CONFIG.scaled(-t.advantage * t.ratio)


@define
def calls_helper(t):
    return helper(-t.advantage * t.ratio)


@define
def calls_rebound(t):
    return HELPER(-t.advantage * t.ratio)


@define
def calls_inner(t):
    return -t.advantage * inner()(t)


@define
def looks_it_up(t):
    return -t.advantage * t.ratio * globals()["K"]


@define
def in_a_lambda(t):
    return (lambda x: x * K)(-t.advantage * t.ratio)


@define
def where_nothing_is_passed(t):
    return -t.advantage * t.ratio * (1.0 if t.has("entropy") else K)


def change(monkeypatch: pytest.MonkeyPatch, name: str, value: Any) -> None:
    monkeypatch.setitem(globals(), name, value)


CHANGES: dict[str, tuple[Any, Callable[[pytest.MonkeyPatch], None], str]] = {
    "global": (reads_global, lambda m: change(m, "K", 3.0), "reads K from"),
    "container": (reads_table, lambda m: m.setitem(TABLE["a"], "k", 3.0), "reads TABLE from"),
    "attribute": (reads_attribute, lambda m: m.setattr(CONFIG, "k", 3.0), "reads CONFIG from"),
    "module": (reads_module, lambda m: m.setattr(SETTINGS, "K", 3.0), "reads SETTINGS"),
    "object": (reads_object, lambda m: m.setattr(CONFIG, "k", 3.0), "reads CONFIG from"),
    "method": (calls_method, lambda m: m.setattr(CONFIG, "k", 3.0), "reads CONFIG from"),
    "helper": (calls_helper, lambda m: change(m, "K", 3.0), "reads helper from"),
    "another helper": (calls_rebound, lambda m: change(m, "HELPER", other), "reads HELPER from"),
    "default of a helper": (calls_rebound, lambda m: m.setattr(HELPER, "__defaults__", (3.0,)), "reads HELPER from"),
    "nested loss": (calls_inner, lambda m: change(m, "K", 3.0), "reads inner from"),
    "globals()": (looks_it_up, lambda m: change(m, "K", 3.0), "reads something from"),
    "lambda": (in_a_lambda, lambda m: change(m, "K", 3.0), "from its surroundings"),
    "has": (where_nothing_is_passed, lambda m: change(m, "K", 3.0), "reads K from"),
}


def value(loss: losses.Loss) -> float:
    return float(fastreward.policy_loss(DATA["logprob"], DATA["old_logprob"], DATA["advantage"], loss=loss).loss)


@pytest.mark.parametrize("kind", CHANGES)
def test_a_loss_has_the_values_of_when_it_was_made(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    definition, patch, words = CHANGES[kind]
    before, used = definition(), definition()
    assert value(used) == 2.0
    patch(monkeypatch)
    after = definition()
    assert value(after) == 3.0
    assert float(after.evaluate(**DATA)) == 3.0
    assert value(used) == 2.0  # traced already
    assert before != after
    assert before.formula != after.formula
    with pytest.raises(ValueError, match=rf"{definition.name} \(test_surroundings.py.*{words}.*parameter"):
        before.evaluate(**DATA)
    assert re.match(rf"{definition.name}\(\): not shown, since .*{words}.* make the loss anew", str(before))
    assert "loss = " in str(after)
    objective._cached_policy.cache_clear()
    with pytest.raises(ValueError, match=words):
        value(before)


def test_a_closures_variable_may_change() -> None:
    k = 2.0

    @define
    def closure(t):
        return -t.advantage * t.ratio * k

    first = closure()
    assert value(first) == 2.0
    k = 3.0
    assert value(closure()) == 3.0
    assert value(first) == 2.0
    k = 2.0
    assert closure() == first  # nothing is compiled anew for what was there before


def test_losses_in_a_closure_are_what_they_are() -> None:
    def outer(part: losses.Loss) -> Any:
        return define(lambda t: -t.advantage * part(t))

    part = define(lambda t, scale=1.0: scale * t.ratio)
    definition = outer(part(2.0))
    assert value(definition()) == 2.0
    assert value(outer(part(3.0))()) == 3.0
    first = definition()
    definition.function.__closure__[0].cell_contents = part(3.0)
    assert value(definition()) == 3.0
    assert first != definition()


def test_partials_and_methods_are_looked_through() -> None:
    scaled = functools.partial(by_default, k=3.0)
    assert value(define(lambda t: scaled(-t.advantage * t.ratio))()) == 3.0

    class Trainer:
        k = 3.0

        def loss(self, t: Any) -> Any:
            return -t.advantage * t.ratio * self.k

    trainer = Trainer()
    definition = define(trainer.loss)
    first = definition()
    assert value(first) == 3.0
    trainer.k = 2.0
    assert value(definition()) == 2.0


def test_a_compiled_function_sees_the_loss_made_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    def policy(loss: losses.Loss) -> Tensor:
        return fastreward.policy_loss(DATA["logprob"], DATA["old_logprob"], DATA["advantage"], loss=loss).loss

    torch.compiler.reset()
    compiled = torch.compile(policy, fullgraph=True, backend="eager")
    first = reads_global()
    assert float(compiled(first)) == 2.0
    change(monkeypatch, "K", 3.0)
    assert float(compiled(reads_global())) == 3.0
    assert float(compiled(first)) == 2.0


def test_every_case_of_what_is_passed_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    @define(static=("case",))
    def in_one_case(t, case):
        there = [name for name in "abc" if t.has(name)]
        value = -t.advantage * t.ratio * math.prod(t.extra(name) for name in there)
        return value * K if there == list(case) else value

    for case in ("", "a", "b", "c", "ab", "ac", "bc", "abc"):
        extra = {name: torch.ones(1, 1) for name in case}
        for k in (2.0, 3.0):
            change(monkeypatch, "K", k)
            loss = in_one_case(case)
            assert float(fastreward.policy_loss(*DATA.values(), loss=loss, extra=extra).loss) == k


def test_a_side_of_a_pair_counts_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    @define(pairs=True)
    def on_one_side(t):
        there = [losses.seq_sum(side.extra("x")) for side in (t.chosen, t.rejected) if side.has("x")]
        value = losses.seq_sum(t.rejected.logprob) - losses.seq_sum(t.chosen.logprob) + sum(there)
        return value * K if len(there) == 1 else value

    logprobs = torch.tensor([[-3.0]]), torch.tensor([[-2.0]])
    for k in (2.0, 3.0):
        change(monkeypatch, "K", k)
        extra = {"x": torch.ones(1, 1)}
        found = fastreward.preference_loss(*logprobs, loss=on_one_side(), rejected_extra=extra)
        assert float(found.loss) == 2.0 * k


def test_a_loss_that_is_another_one_each_time_says_so() -> None:
    with pytest.raises(ValueError, match=r"reads random from its surroundings.*parameter"):
        value(define(lambda t: t.ratio * random.random())())


def test_a_mistake_is_told_where_the_loss_is_used() -> None:
    loss = define(lambda t: t.ratio * missing)()  # noqa: F821
    with pytest.raises(NameError, match="missing"):
        value(loss)
    method = define(Config(2.0).scaled)
    assert method.place.startswith("scaled (test_surroundings.py:")


def test_losses_of_the_package_are_not_traced_when_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(surroundings, "fresh_terms", lambda *_: pytest.fail("traced"))
    losses.ppo(0.1)
    with pytest.raises(pytest.fail.Exception):
        reads_global()


@define
def by_group(t):
    return -losses.group_sum(t.advantage) * t.ratio * t.extra("share") * K * losses.stop_gradient(t.entropy)


def test_a_loss_that_takes_what_is_per_sequence_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Traced before any call, such a loss is told of no call that has advantages per token."""
    assert by_group().reading() == "advantage, entropy, logprob, old_logprob, share"
    assert "group_sum" in str(by_group())
    assert by_group().source("triton")
    logits, labels = torch.randn(2, 3, 5, requires_grad=True), torch.randint(5, (2, 3))
    old, advantages = torch.full((2, 3), -1.0), torch.tensor([1.0, 2.0])
    options = {"group_ids": [0, 0], "extra": {"share": torch.tensor([0.5, 0.2])}}

    def found() -> tuple[Tensor, Tensor]:
        stats = fastreward.token_logprobs(logits, labels, outputs=("logprobs", "entropy"))
        arguments = (old, advantages)
        return (
            fastreward.policy_loss(stats.logprobs, *arguments, loss=by_group(), entropy=stats.entropy, **options).loss,
            fastreward.logits_policy_loss(logits, labels, *arguments, loss=by_group(), **options).loss,
        )

    before = found()
    torch.testing.assert_close(before[1], before[0])
    monkeypatch.setitem(globals(), "K", 2 * K)
    torch.testing.assert_close(found(), tuple(2.0 * x for x in before))

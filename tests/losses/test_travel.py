"""Losses reach other processes: copied, by pickle and by cloudpickle, from modules, __main__ and closures."""

from __future__ import annotations

import copy
import functools
import json
import pickle
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from checkout import ROOT
from torch._dynamo.testing import CompileCounter

import fastreward
from fastreward import losses
from fastreward.language import objective
from fastreward.losses import define

cloudpickle = pytest.importorskip("cloudpickle")

DATA = {
    "logprob": torch.tensor([[-1.0, -2.0]], dtype=torch.float64),
    "old_logprob": torch.tensor([[-1.5, -1.0]], dtype=torch.float64),
    "advantage": torch.tensor([1.0], dtype=torch.float64),
}
K = 2.0


@define
def of_a_module(t, scale=1.0):
    return -t.advantage * t.ratio * scale * K


unnamed = define(lambda t, scale=1.0: -t.advantage * t.logprob * scale)


def by_hand(t, scale=1.0):
    return -t.advantage * t.ratio * scale


renamed = define(aggregation="token-sum")(by_hand)


class Holder:
    @define
    def of_a_class(t, scale=1.0):
        return -t.advantage * t.ratio * scale


def closed_over(k: float) -> Any:
    @define(static=("power",), aggregation="token-sum")
    def local(t, scale=1.0, *, power=2):
        return -t.advantage * t.ratio**power * k * scale

    return local


@dataclass
class Config:
    loss: losses.Loss
    rate: float = 1e-3


MODULES = (losses.ppo, of_a_module, unnamed, renamed, Holder.of_a_class)
PARAMETERS = (0.5, torch.tensor(0.5), torch.tensor([0.5]))
COPIES: dict[str, Callable[[Any], Any]] = {
    **{f"pickle {p}": functools.partial(lambda x, p: pickle.loads(pickle.dumps(x, p)), p=p) for p in range(6)},
    "cloudpickle": lambda x: pickle.loads(cloudpickle.dumps(x)),
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
}


def elsewhere(x: Any) -> Any:
    """Carries what it is given as to another process."""
    return pickle.loads(cloudpickle.dumps(x))


@pytest.mark.parametrize("name", COPIES)
def test_losses_of_modules_are_copied(name: str) -> None:
    copied = COPIES[name]
    for definition in MODULES:
        assert copied(definition) is definition
        for parameter in PARAMETERS:
            loss = definition(parameter)
            there = copied(Config(loss)).loss
            assert there == loss
            assert hash(there) == hash(loss)
            assert there.formula == loss.formula
            torch.testing.assert_close(there.evaluate(**DATA), loss.evaluate(**DATA), rtol=0, atol=0)
    assert losses.ppo(0.1) != losses.ppo(0.2)
    assert losses.ppo(torch.tensor([0.1])) != losses.ppo(torch.tensor([0.2]))
    assert losses.psr() != losses.nsr()


def test_a_deep_copy_has_tensors_of_its_own() -> None:
    tensor = torch.tensor([0.5])
    loss = of_a_module(tensor)
    there = copy.deepcopy(loss)
    tensor.fill_(1.0)
    assert float(there.tensors["scale"]) == 0.5


def test_a_local_loss_travels_by_value() -> None:
    for parameter in PARAMETERS:
        loss = closed_over(3.0)(parameter)
        there = elsewhere(Config(loss)).loss
        assert there.definition is not loss.definition
        assert (there.name, there.aggregation) == ("local", "token-sum")
        assert there.structure[2] == loss.structure[2]
        assert str(there) == str(loss)
        torch.testing.assert_close(there.evaluate(**DATA), loss.evaluate(**DATA), rtol=0, atol=0)
        again = elsewhere(there)  # and on
        torch.testing.assert_close(again.evaluate(**DATA), loss.evaluate(**DATA), rtol=0, atol=0)


def test_losses_of_one_name_stay_apart() -> None:
    sent = [closed_over(k)(0.5) for k in (2.0, 3.0)]
    there = [elsewhere(loss) for loss in sent]
    assert there[0] != there[1]
    assert there[0].formula != there[1].formula
    found = [float(loss.evaluate(**DATA).sum()) for loss in there]
    assert found == [float(loss.evaluate(**DATA).sum()) for loss in sent]
    assert found[0] != found[1]


def test_what_arrives_again_is_not_compiled_again() -> None:
    def policy(loss: losses.Loss) -> torch.Tensor:
        return fastreward.policy_loss(*data, loss=loss).loss

    data = [DATA[name].float() for name in ("logprob", "old_logprob", "advantage")]
    torch.compiler.reset()
    compiled = torch.compile(policy, fullgraph=True, backend=(backend := CompileCounter()))
    definition = closed_over(3.0)
    loss = definition(0.5)
    expected = compiled(loss)
    traced = objective._cached_policy.cache_info().misses
    for _ in range(2):
        there = elsewhere(loss)
        assert there.definition is not definition
        assert there == loss == elsewhere(there)  # sent back
        torch.testing.assert_close(compiled(there), expected)
        torch.testing.assert_close(policy(elsewhere(definition)(1.0)), 2.0 * expected)
    assert backend.frame_count == 1
    assert objective._cached_policy.cache_info().misses == traced
    definition.function.__closure__[0].cell_contents = 4.0
    changed = elsewhere(definition)(0.5)
    assert changed != loss
    torch.testing.assert_close(compiled(changed), expected * 4.0 / 3.0)


def test_a_step_that_closes_over_a_loss_travels() -> None:
    for loss in (closed_over(3.0)(0.5), of_a_module(0.5)):
        step = lambda: loss.evaluate(**DATA)  # noqa: B023, E731
        partial = functools.partial(losses.Loss.evaluate, loss)
        for function, kwargs in ((step, {}), (partial, DATA)):
            there = pickle.loads(cloudpickle.dumps(function))
            torch.testing.assert_close(there(**kwargs), loss.evaluate(**DATA), rtol=0, atol=0)


@pytest.mark.parametrize("protocol", range(6))
def test_what_pickle_can_not_carry_says_so(protocol: int) -> None:
    held = {"loss": closed_over(3.0)()}
    with pytest.raises((pickle.PicklingError, AttributeError), match=r"local .*cloudpickle carries it.* in a module"):
        pickle.dumps(held, protocol)


def test_a_loss_of_other_values_than_there_are_now_does_not_travel(monkeypatch: pytest.MonkeyPatch) -> None:
    loss = of_a_module(0.5)
    sent = pickle.dumps(loss)
    monkeypatch.setitem(globals(), "K", 3.0)
    with pytest.raises(ValueError, match=r"of_a_module \(test_travel.py:\d+\) reads K from .*has changed since"):
        pickle.dumps(loss)
    with pytest.raises(ValueError, match="reads K from its surroundings, and that differs between two processes"):
        pickle.loads(sent)
    there = copy.deepcopy(loss)
    assert there == loss
    with pytest.raises(ValueError, match="reads K from its surroundings"):
        there.evaluate(**DATA)


def sent_from_main(how: str) -> None:
    script = ROOT / "tests" / "support" / "losses_of_main.py"
    done = subprocess.run([sys.executable, str(script), how], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert len(found) >= 8
    for name, here, there in found:
        assert here == there, name


def test_losses_of_main_reach_a_spawned_process() -> None:
    sent_from_main("spawn")


@pytest.mark.slow
def test_losses_of_main_reach_ray() -> None:
    pytest.importorskip("ray")
    sent_from_main("ray")


class Weighted:
    """A loss that is an object."""

    def __call__(self, t: Any, scale: float = 1.0) -> Any:
        return -t.logprob * scale * K


def of_two(k: float, t: Any, scale: float = 1.0) -> Any:
    return -t.logprob * scale * k * K


@pytest.mark.parametrize(
    ("function", "name"), [(Weighted(), "Weighted"), (functools.partial(functools.partial(of_two), 1.0), "of_two")]
)
def test_losses_of_what_is_no_function(function: Any, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    definition = define(function)
    assert definition.name == name
    for scale in (3.0, torch.tensor(3.0)):
        loss = definition(scale=scale)
        assert float(loss.evaluate(logprob=-2.0)) == 12.0
        assert float(elsewhere(loss).evaluate(logprob=-2.0)) == 12.0
    monkeypatch.setitem(globals(), "K", 5.0)
    assert float(definition(scale=3.0).evaluate(logprob=-2.0)) == 30.0

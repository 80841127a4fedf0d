"""Sends losses that are defined in __main__ to other processes; a program, run by test_travel.py.

`spawn` sends them by pickle to a process that imports this file, `ray` by cloudpickle to Ray's workers, which do not.
Prints a JSON list of [name, numbers here, numbers there].
"""

from __future__ import annotations

import functools
import json
import multiprocessing
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

import fastreward
from fastreward import losses

K = 2.0


def helper(x: Any) -> Any:
    return x * K


def refuse_negative(scale: float) -> None:
    if scale < 0:
        raise ValueError("scale: expected a number >= 0")


@losses.define(aggregation="token-sum", check=refuse_negative)
def scaled(t, scale=1.0):
    """Reads what its helper reads."""
    return -t.advantage * t.ratio * helper(scale)


@losses.define(pairs=True)
def paired(t, beta=0.5):
    return -beta * losses.seq_sum(t.chosen.logprob) + losses.seq_sum(t.rejected.logprob)


unnamed = losses.define(lambda t, scale=1.0: scale * t.advantage * t.logprob * K)


def closed_over(k: float) -> Any:
    @losses.define
    def loss(t, scale=1.0):
        return -t.advantage * t.ratio * k * scale

    return loss


@dataclass
class Config:
    loss: losses.Loss
    rate: float = 1e-3


Facts = tuple[list[float], str]


def facts(loss: losses.Loss) -> Facts:
    """Loss and gradient, and the key of its objective."""
    logprobs = torch.tensor([[-1.0, -0.5], [-2.0, -0.3]], requires_grad=True)
    old = torch.full((2, 2), -1.0)
    if loss.definition.pairs:
        total = fastreward.preference_loss(logprobs, old, loss=loss).loss
    else:
        total = fastreward.policy_loss(logprobs, old, torch.tensor([1.0, -1.0]), loss=loss).loss
    total.backward()
    assert logprobs.grad is not None
    ((key, *_),) = loss._plans.values()
    return [float(total.detach()), *logprobs.grad.flatten().tolist()], key


def of_config(config: Config) -> Facts:
    return facts(config.loss)


def by_name() -> list[losses.Loss]:
    """Losses that pickle can send: a module holds their definition."""
    tensor = torch.tensor([0.1, 0.3])
    return [losses.ppo(0.1, dual_clip=3.0), losses.ppo(tensor), scaled(0.5), scaled(tensor), paired(0.3), unnamed(2.0)]


def jobs(of: list[losses.Loss]) -> list[tuple[str, Callable[..., Facts], Any]]:
    """(name, function, argument): the loss alone, in a dataclass and in a partial."""
    plain = [(loss.name, facts, loss) for loss in of]
    return [
        *plain,
        ("in a dataclass", of_config, Config(of[2])),
        ("in a partial", functools.partial(facts, of[2]), None),
    ]


def call(function: Callable[..., Facts], argument: Any) -> Facts:
    return function() if argument is None else function(argument)


def spawned() -> list[tuple[str, Facts, Facts]]:
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return [(name, call(f, x), pool.apply(call, (f, x))) for name, f, x in jobs(by_name())]


def in_ray() -> list[tuple[str, Facts, Facts]]:
    import ray

    ray.init(num_cpus=1, include_dashboard=False, logging_level="error", configure_logging=False)
    try:
        remote = ray.remote(call)
        local = [closed_over(2.0)(0.5), closed_over(3.0)(0.5)]  # one name, two formulas
        sent = [*jobs([*by_name(), *local])]
        step = local[0]
        sent.append(("a step that closes over a loss", lambda: facts(step), None))
        found = [(name, call(f, x), ray.get(remote.remote(f, x))) for name, f, x in sent]
        there = ray.get(ray.remote(lambda loss: loss).remote(step))
        assert there == step  # the same one, back again
        assert there.formula == step.formula
        return found
    finally:
        ray.shutdown()


if __name__ == "__main__":
    print(json.dumps(spawned() if sys.argv[1] == "spawn" else in_ray()))

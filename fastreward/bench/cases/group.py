"""group_advantages: GRPO's advantages for rows that uid strings group, as verl's driver computes them."""

from __future__ import annotations

import uuid
from functools import partial
from random import Random
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastreward.bench import peers, roofline
from fastreward.bench.case import OURS, Case, Contender, Target
from fastreward.group import group_advantages
from fastreward.reference import group as reference
from fastreward.verify.error import distance

CASES = ("uid-strings",)
DTYPES = ("float32",)
SHAPE = (4096, 8)  # rows, rows of one group
QUICK = (256, 8)

_EPS = 1e-6


def build(case: str, dtype: torch.dtype, shape: tuple[int, ...], device: str) -> Case:
    """`shape` is (rows, group size); uids are random, rows shuffled, rewards 0 or 1 plus a little noise."""
    rows, size = shape
    random = Random(0)
    names = [str(uuid.UUID(int=random.getrandbits(128))) for _ in range(-(-rows // size))]
    uids = [names[b // size] for b in range(rows)]
    random.shuffle(uids)
    generator = torch.Generator().manual_seed(0)
    rewards = torch.randint(0, 2, (rows,), generator=generator) + 0.1 * torch.randn(rows, generator=generator)
    truth = reference.group_advantages(rewards, uids, eps=_EPS, singleton="raw")
    rewards = rewards.to(device)
    built = Case(
        operation="group",
        name=case,
        dtype=str(dtype).removeprefix("torch."),
        shape=shape,
        traffic=roofline.group_advantages(rows),
        error=lambda result: distance(result.cpu(), truth),
        contenders=[
            Contender(OURS, lambda: group_advantages(rewards, uids, eps=_EPS, singleton="raw")),
            Contender("torch eager", partial(_scatter, rewards, uids), tolerance=1e-3),
        ],
        tolerance=1e-5,
        inputs=[rewards],
        targets=(Target("speedup", 30.0, "verl"),),
    )
    index = np.array(uids, dtype=object)
    for name, function in (("verl", "outcome_advantage"), ("verl vectorized", "vectorized_outcome_advantage")):
        peers.add(built, name, partial(_verl, name, function, rewards, index))
    built.absent["torch.compile"] = "strings cannot be compiled"
    built.absent["TRL"] = "groups are contiguous there, without ids"
    built.absent["liger-kernel"] = "no such function"
    return built


def _scatter(rewards: Tensor, uids: list[str]) -> Tensor:
    """The obvious vectorised form: number the uids, then sums by group."""
    numbers: dict[str, int] = {}
    group = torch.tensor([numbers.setdefault(uid, len(numbers)) for uid in uids], device=rewards.device)
    zeros = rewards.new_zeros(len(numbers))
    count = zeros.index_add(0, group, torch.ones_like(rewards))
    centred = rewards - (zeros.index_add(0, group, rewards) / count)[group]
    std = (zeros.index_add(0, group, centred**2) / (count - 1)).sqrt()
    return torch.where(count[group] > 1, centred / (std[group] + _EPS), rewards)


def _verl(name: str, function: str, rewards: Tensor, index: Any) -> Contender:
    """One reward token per row: only the grouping is timed, not the broadcast over T."""
    algorithms = peers.load("verl", "verl.trainer.ppo.core_algos")
    advantage = getattr(algorithms, f"compute_grpo_{function}", None)
    if advantage is None:
        raise peers.Absent("not in this version")
    token_rewards, mask = rewards.unsqueeze(-1), torch.ones_like(rewards).unsqueeze(-1)
    return Contender(name, lambda: advantage(token_rewards, mask, index, epsilon=_EPS)[0].squeeze(-1), tolerance=1e-3)

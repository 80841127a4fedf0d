"""group_advantages: GRPO's advantages for rows that uid strings group, as verl's driver computes them.

uid-strings has `shape`'s rows; uid-strings-16x sixteen times as many, whose strings no longer fit into the caches.
prompt-and-turn has eight turns a row, some without a reward, and groups what agrees in uid and turn; the keys are
worked out in the call.
"""

from __future__ import annotations

import uuid
from collections import defaultdict
from collections.abc import Hashable, Sequence
from functools import partial
from random import Random
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastreward.bench import peers, roofline
from fastreward.bench.case import OURS, Case, Contender, Target
from fastreward.group import Groups, group_advantages
from fastreward.reference import group as reference
from fastreward.verify.error import distance

CASES = ("uid-strings", "uid-strings-16x", "prompt-and-turn")
DTYPES = ("float32",)
SHAPE = (4096, 8)  # rows, rows of one group
QUICK = (256, 8)

_EPS = 1e-6
_TURNS = 8


def build(case: str, dtype: torch.dtype, shape: tuple[int, ...], device: str) -> Case:
    """`shape` is (rows, group size); uids are random, rows shuffled, rewards 0 or 1 plus a little noise."""
    rows, size = shape
    rows *= 16 if case == "uid-strings-16x" else 1
    random = Random(0)
    names = [str(uuid.UUID(int=random.getrandbits(128))) for _ in range(-(-rows // size))]
    uids = [names[b // size] for b in range(rows)]
    random.shuffle(uids)
    generator = torch.Generator().manual_seed(0)
    if case == "prompt-and-turn":
        return _turns(case, dtype, shape, device, uids, generator)
    rewards = torch.randint(0, 2, (rows,), generator=generator) + 0.1 * torch.randn(rows, generator=generator)
    truth = _truth(rewards, uids)
    rewards = rewards.to(device)
    built = Case(
        operation="group",
        name=case,
        dtype=str(dtype).removeprefix("torch."),
        shape=(rows, size),
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


def _turns(
    case: str, dtype: torch.dtype, shape: tuple[int, ...], device: str, uids: list[str], generator: torch.Generator
) -> Case:
    rewards = torch.randn((len(uids), _TURNS), generator=generator)
    last = torch.randint(1, _TURNS + 1, (len(uids), 1), generator=generator)
    turns = torch.where(torch.arange(_TURNS) < last, torch.arange(_TURNS), -1)
    names = [(uid, k) for uid, row in zip(uids, turns.tolist(), strict=True) for k in row]
    there = turns.flatten() >= 0
    truth = torch.zeros(rewards.numel(), dtype=torch.float64)
    truth[there] = _truth(rewards.flatten()[there], [name for name in names if name[1] >= 0])
    on_device = rewards.to(device)
    ready = Groups.by(uids, turns).to(device)
    built = Case(
        operation="group",
        name=case,
        dtype=str(dtype).removeprefix("torch."),
        shape=(*shape, _TURNS),
        traffic=roofline.group_advantages(rewards.numel()),
        error=lambda result: distance(result.cpu().flatten(), truth),
        contenders=[
            Contender(OURS, lambda: group_advantages(on_device, Groups.by(uids, turns), eps=_EPS, singleton="raw")),
            Contender(
                f"{OURS}, groups made before", lambda: group_advantages(on_device, ready, eps=_EPS, singleton="raw")
            ),
            Contender("torch eager", partial(_scatter, on_device.flatten(), names, there.to(device)), tolerance=1e-3),
            Contender("Python loops", partial(_loops, rewards.flatten(), names), tolerance=1e-3),
        ],
        tolerance=1e-5,
        inputs=[on_device],
        targets=(Target("speedup", 30.0, "Python loops"),),
    )
    built.absent |= dict.fromkeys(("TRL", "verl", "liger-kernel"), "no such function")
    built.absent["torch.compile"] = "strings cannot be compiled"
    return built


def _truth(rewards: Tensor, names: Sequence[Hashable]) -> Tensor:
    """f64 [B], each group by the reference: it looks for a group's rows among all, which takes their square."""
    rows: dict[Hashable, list[int]] = {}
    for b, name in enumerate(names):
        rows.setdefault(name, []).append(b)
    truth = torch.zeros(len(rewards), dtype=torch.float64)
    for own in rows.values():
        truth[own] = reference.group_advantages(rewards[own], [0] * len(own), eps=_EPS, singleton="raw")
    return truth


def _loops(rewards: Tensor, names: Sequence[tuple[str, int]]) -> Tensor:
    """As agents' code has it: a dictionary of lists, then a row at a time."""
    scores: dict[Hashable, list[Tensor]] = defaultdict(list)
    for b, name in enumerate(names):
        if name[1] >= 0:
            scores[name].append(rewards[b])
    mean, std = {}, {}
    for key, of in scores.items():
        mean[key] = torch.stack(of).mean() if len(of) > 1 else torch.tensor(0.0)
        std[key] = torch.stack(of).std() if len(of) > 1 else torch.tensor(1.0)
    out = torch.zeros_like(rewards)
    for b, name in enumerate(names):
        if name[1] >= 0:
            out[b] = (rewards[b] - mean[name]) / (std[name] + _EPS)
    return out


def _scatter(rewards: Tensor, uids: Sequence[Hashable], there: Tensor | None = None) -> Tensor:
    """The obvious vectorised form: number the uids, then sums by group."""
    numbers: dict[Hashable, int] = {}
    group = torch.tensor([numbers.setdefault(uid, len(numbers)) for uid in uids], device=rewards.device)
    zeros = rewards.new_zeros(len(numbers))
    count = zeros.index_add(0, group, torch.ones_like(rewards))
    centred = rewards - (zeros.index_add(0, group, rewards) / count)[group]
    std = (zeros.index_add(0, group, centred**2) / (count - 1)).sqrt()
    advantages = torch.where(count[group] > 1, centred / (std[group] + _EPS), rewards)
    return advantages if there is None else advantages * there


def _verl(name: str, function: str, rewards: Tensor, index: Any) -> Contender:
    """One reward token per row: only the grouping is timed, not the broadcast over T."""
    algorithms = peers.load("verl", "verl.trainer.ppo.core_algos")
    advantage = getattr(algorithms, f"compute_grpo_{function}", None)
    if advantage is None:
        raise peers.Absent("not in this version")
    token_rewards, mask = rewards.unsqueeze(-1), torch.ones_like(rewards).unsqueeze(-1)
    return Contender(name, lambda: advantage(token_rewards, mask, index, epsilon=_EPS)[0].squeeze(-1), tolerance=1e-3)

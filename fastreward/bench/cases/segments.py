"""segments: sums of turns, turns' values on their tokens, and turn-level advantages, in a batch with tool output.

A row alternates between the model's turns and tool tokens that belong to none. Turn-level advantages are means of token
rewards over turns, normalised over turn k of a prompt's rollouts, and put back on the turn's tokens (MatchTIR's step
advantage, arXiv 2601.10712).
"""

from __future__ import annotations

from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor

from fastreward.bench import roofline
from fastreward.bench.case import OURS, Case, Contender, Target
from fastreward.bench.cases._steps import add_torch
from fastreward.group import group_advantages
from fastreward.segments import scatter_rewards, segment_ids, segment_reduce
from fastreward.verify import eager
from fastreward.verify.error import distance

CASES = ("reduce", "scatter", "turn-advantage")
DTYPES = ("float32",)
SHAPE = (512, 8192)
QUICK = (16, 512)

_GROUP = 8  # rollouts of a prompt
_EPS = 1e-6


@lru_cache(maxsize=1)
def _data(shape: tuple[int, ...], device: str) -> tuple[Tensor, Tensor, Tensor, int]:
    """Token rewards [B, T], turns i32 [B, T], values of turns [B, S], S.

    Turns have 100 to 500 tokens, tool output 50 to 150.
    """
    generator = torch.Generator().manual_seed(0)
    rows, columns = shape
    pieces = 2 * (columns // 150 + 1)
    lengths = torch.randint(100, 501, (rows, pieces), generator=generator)
    lengths[:, 1::2] = torch.randint(50, 151, (rows, pieces // 2), generator=generator)
    piece = torch.searchsorted(lengths.cumsum(-1), torch.arange(columns).expand(rows, -1).contiguous(), right=True)
    ends = torch.randint(columns // 2, columns + 1, (rows, 1), generator=generator)
    mask = (piece % 2 == 0) & (torch.arange(columns) < ends)
    turns = segment_ids(mask)
    segments = int(turns.max()) + 1
    rewards = torch.randn(shape, generator=generator)
    values = torch.randn((rows, segments), generator=generator)
    return rewards.to(device), turns.to(device), values.to(device), segments


def build(case: str, dtype: torch.dtype, shape: tuple[int, ...], device: str) -> Case:
    """`shape` is [B, T] of tokens; ids are there already."""
    rewards, turns, values, segments = _data(shape, device)
    forms: dict[str, tuple[Any, Any, Any, tuple[Tensor, ...]]] = {
        "reduce": (_reduce, partial(eager.segment_reduce, num_segments=segments), _reduce_loop, (rewards, turns)),
        "scatter": (_scatter, partial(eager.scatter_rewards, place="broadcast"), _scatter_loop, (values, turns)),
        "turn-advantage": (_credit, partial(_credit_eager, segments=segments), _credit_loop, (rewards, turns)),
    }
    ours, in_torch, loop, data = forms[case]
    bytes_of = {"reduce": roofline.segment_reduce, "scatter": roofline.segment_scatter}
    truth = in_torch(data[0].double(), turns)
    built = Case(
        operation="segments",
        name=case,
        dtype=str(dtype).removeprefix("torch."),
        shape=shape,
        traffic=bytes_of.get(case, roofline.segment_credit)(rewards.numel(), values.numel()),
        error=lambda result: distance(result, truth),
        contenders=[Contender(OURS, partial(ours, *data, segments))],
        tolerance=1e-5,
        inputs=[rewards, turns, values],
        targets=(Target("speedup", 50.0, "Python loops"), Target("speedup", 3.0, "torch eager")),
    )
    add_torch(built, in_torch, lambda form: partial(form, *data), 1e-3)
    built.contenders.append(Contender("Python loops", partial(loop, *data, segments), tolerance=1e-3))
    for peer in ("TRL", "verl", "liger-kernel"):
        built.absent[peer] = "no such function"
    return built


def _reduce(rewards: Tensor, turns: Tensor, segments: int) -> Tensor:
    return segment_reduce(rewards, turns, num_segments=segments)


def _scatter(values: Tensor, turns: Tensor, segments: int) -> Tensor:
    return scatter_rewards(values, turns, place="broadcast")


def _keys(rows: int, segments: int, device: torch.device) -> Tensor:
    """(prompt, turn) as one number, [B, S]."""
    prompt = torch.arange(rows, device=device).div(_GROUP, rounding_mode="floor")
    return prompt.unsqueeze(-1) * segments + torch.arange(segments, device=device)


def _credit(rewards: Tensor, turns: Tensor, segments: int) -> Tensor:
    sums = segment_reduce(rewards, turns, op="mean", num_segments=segments, empty=torch.nan)
    keys = _keys(rewards.shape[0], segments, rewards.device)
    advantages = group_advantages(sums.flatten(), keys.flatten(), eps=_EPS)
    return scatter_rewards(advantages.view_as(sums), turns, place="broadcast")


def _credit_eager(rewards: Tensor, turns: Tensor, segments: int) -> Tensor:
    x = eager.segment_reduce(rewards, turns, op="mean", num_segments=segments, empty=torch.nan)
    there, keys = ~x.isnan(), _keys(rewards.shape[0], segments, rewards.device)
    zeros = x.new_zeros(int(-(-rewards.shape[0] // _GROUP)) * segments)

    def over_group(values: Tensor) -> Tensor:
        return zeros.scatter_add(0, keys.flatten(), torch.where(there, values, 0.0).flatten())[keys]

    count = over_group(there.to(x.dtype))
    centred = x - over_group(x) / count
    std = (over_group(centred * centred) / (count - 1)).sqrt()
    advantages = torch.where(there & (count > 1), centred / (std + _EPS), 0.0)
    return eager.scatter_rewards(advantages, turns, place="broadcast")


# ------------------------------------------------------------------------------------------ as the papers' code has it
def _reduce_loop(rewards: Tensor, turns: Tensor, segments: int) -> Tensor:
    out = rewards.new_zeros(rewards.shape[0], segments)
    for b in range(rewards.shape[0]):
        for k in range(int(turns[b].max()) + 1):
            out[b, k] = rewards[b][turns[b] == k].sum()
    return out


def _scatter_loop(values: Tensor, turns: Tensor, segments: int) -> Tensor:
    out = values.new_zeros(turns.shape)
    for b in range(turns.shape[0]):
        for k in range(int(turns[b].max()) + 1):
            out[b][turns[b] == k] = values[b, k]
    return out


def _credit_loop(rewards: Tensor, turns: Tensor, segments: int) -> Tensor:
    scores: dict[tuple[int, int], list[Tensor]] = {}
    means: dict[tuple[int, int], Tensor] = {}
    for b in range(rewards.shape[0]):
        for k in range(int(turns[b].max()) + 1):
            means[b, k] = rewards[b][turns[b] == k].mean()
            scores.setdefault((b // _GROUP, k), []).append(means[b, k])
    out = torch.zeros_like(rewards)
    for (b, k), mean in means.items():
        group = torch.stack(scores[b // _GROUP, k])
        if len(group) > 1:
            out[b][turns[b] == k] = (mean - group.mean()) / (group.std() + _EPS)
    return out

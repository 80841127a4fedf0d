"""returns: GAE and discounted returns of [B, T], into given tensors and fresh, padded and packed."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from functools import cache, lru_cache, partial
from typing import Any

import torch
from torch import Tensor

from fastreward.bench import peers, roofline
from fastreward.bench.case import OURS, Case, Contender, Target
from fastreward.bench.cases._steps import worst
from fastreward.returns import discounted_returns, gae
from fastreward.verify import eager

CASES = ("gae-out", "gae-fresh", "gae-packed", "returns-out", "returns-fresh")
DTYPES = ("float32",)
SHAPE = (4096, 8192)
QUICK = (64, 512)

GAMMA, LAM = 0.99, 0.95
NUMBA = "numba, nine lines"
CHUNKED = "slime's chunked form"
#: Rows whose results are compared.
TRUTH_ROWS = 16


@lru_cache(maxsize=1)
def _data(shape: tuple[int, ...], device: str) -> tuple[Tensor, Tensor, Tensor]:
    """rewards, values f32 [B, T] and a ragged mask bool [B, T]; rewards are 0 where masked."""
    generator = torch.Generator(device=device).manual_seed(0)
    rewards, values = (torch.randn(shape, generator=generator, device=device) for _ in range(2))
    lengths = torch.randint(shape[1] // 4, shape[1] + 1, shape[:1], generator=generator, device=device)
    mask = torch.arange(shape[1], device=device) < lengths.unsqueeze(-1)
    return rewards.mul_(mask), values, mask


def build(case: str, dtype: torch.dtype, shape: tuple[int, ...], device: str) -> Case:
    """One of the two functions on [B, T] float32 with a mask, or on as many packed tokens in B sequences."""
    function, how = case.split("-")
    rewards, values, mask = _data(shape, device)
    pair = function == "gae"
    inputs = [rewards, values] if pair else [rewards]
    numbers: dict[str, float] = {"gamma": GAMMA, "lam": LAM} if pair else {"gamma": GAMMA}
    ours: Callable[..., Any] = gae if pair else discounted_returns
    plain: Callable[..., Any] = eager.gae if pair else eager.discounted_returns
    out: Any = None
    if how != "fresh":  # buffers that have been used before
        out = (torch.zeros_like(rewards), torch.zeros_like(rewards)) if pair else torch.zeros_like(rewards)
    given: dict[str, Any] = {**numbers, "out": out}
    given |= {"cu_seqlens": _bounds(mask)} if how == "packed" else {"mask": mask}
    flat = [x.view(-1) for x in inputs] if how == "packed" else inputs
    if how == "packed":
        given["out"] = tuple(x.view(-1) for x in out)
    truth = _first_rows(plain, inputs, mask, given.get("cu_seqlens"), numbers)
    built = Case(
        operation="returns",
        name=case,
        dtype=str(dtype).removeprefix("torch."),
        shape=shape,
        traffic=roofline.returns(rewards.numel(), len(inputs), len(inputs), 0 if how == "packed" else 1),
        error=partial(_error, truth),
        contenders=[Contender(OURS, partial(ours, *flat, **given))],
        tolerance=1e-4,
        inputs=[*inputs, mask, *([] if out is None else out if pair else [out])],
        targets=(
            Target("speedup", 4.0 if how != "fresh" else 2.0, NUMBA),
            Target("share", 0.6 if how != "fresh" else 0.3),
            Target("share", 0.85, device="cuda"),
        ),
    )
    if how == "packed":
        _add_packed_peers(built, flat, given["cu_seqlens"])
    else:
        _add_peers(built, pair, plain, inputs, mask, numbers)
    return built


def _add_peers(
    built: Case, pair: bool, plain: Callable[..., Any], inputs: list[Tensor], mask: Tensor, numbers: dict[str, float]
) -> None:
    built.contenders.append(Contender("torch eager", partial(plain, *inputs, mask, **numbers)))
    built.absent["torch.compile"] = "unrolls the loop over tokens, which takes minutes to compile"
    peers.add(built, NUMBA, partial(_numba, "gae" if pair else "returns", inputs, mask))
    if pair:
        peers.add(built, "verl", partial(_verl, inputs[0], inputs[1], mask))
        peers.add(built, "torchrl", partial(_torchrl, inputs[0], inputs[1], mask))
        built.contenders.append(Contender(CHUNKED, partial(_chunked, inputs[0], inputs[1], mask)))
    else:
        built.absent["verl"] = "only inside REINFORCE++'s estimator, by the loop of torch eager"
    built.absent["TRL"] = "its loop is verl's"
    built.absent["liger-kernel"] = "no such function"


def _add_packed_peers(built: Case, flat: list[Tensor], bounds: Tensor) -> None:
    peers.add(built, NUMBA, partial(_numba, "gae-packed", flat, bounds))
    for name in ("torch eager", "torch.compile", "verl", "torchrl", CHUNKED, "TRL"):
        built.absent[name] = "loops over the columns of padded rows: no packed form"
    built.absent["liger-kernel"] = "no such function"


def _bounds(mask: Tensor) -> Tensor:
    """Bounds of B sequences of unequal lengths that fill B T tokens."""
    rows, columns = mask.shape
    ends = mask.sum(-1).cumsum(0)
    bounds = torch.nn.functional.pad(ends * (rows * columns) // max(int(ends[-1]), 1), (1, 0))
    bounds[-1] = rows * columns
    return bounds


def _first_rows(
    plain: Callable[..., Any], inputs: list[Tensor], mask: Tensor, bounds: Tensor | None, numbers: dict[str, float]
) -> list[Tensor]:
    """The truth of the first rows or sequences, by the loop in float64, flat."""
    if bounds is None:
        found = plain(*(x[:TRUTH_ROWS].double() for x in inputs), mask[:TRUTH_ROWS], **numbers)
        return [x.reshape(-1) for x in ([found] if isinstance(found, Tensor) else found)]
    rows = []
    for a, b in zip(bounds[:3].tolist(), bounds[1:4].tolist(), strict=False):
        found = plain(*(x.view(1, -1)[:, a:b].double() for x in inputs), **numbers)
        rows.append([x.reshape(-1) for x in ([found] if isinstance(found, Tensor) else found)])
    return [torch.cat(parts) for parts in zip(*rows, strict=True)]


def _error(truth: list[Tensor], result: Tensor | tuple[Tensor, ...]) -> float:
    """Over the rows whose truth is known."""
    results = [result] if isinstance(result, Tensor) else list(result)
    return worst(truth[: len(results)], [x.reshape(-1)[: len(want)] for x, want in zip(results, truth, strict=False)])


def _verl(rewards: Tensor, values: Tensor, mask: Tensor) -> Contender:
    """Its estimator, which whitens too: a part of it, the loop alone, cannot be called."""
    algorithms = peers.load("verl", "verl.trainer.ppo.core_algos")
    whole = mask.float()
    return Contender("verl", partial(_returns_of_verl, algorithms, rewards, values, whole))


def _returns_of_verl(algorithms: Any, rewards: Tensor, values: Tensor, mask: Tensor) -> tuple[Tensor]:
    """Advantages before whitening, of the rows that are compared."""
    _, returns = algorithms.compute_gae_advantage_return(rewards, values, mask, GAMMA, LAM)
    return ((returns[:TRUTH_ROWS] - values[:TRUTH_ROWS]) * mask[:TRUTH_ROWS],)


def _torchrl(rewards: Tensor, values: Tensor, mask: Tensor) -> Contender:
    """Its vectorised form, on what a padded row is to it: an episode that ends with its last valid token."""
    functional = peers.load("torchrl", "torchrl.objectives.value.functional")
    ends = mask & ~torch.nn.functional.pad(mask[:, 1:], (0, 1))
    columns = [x.unsqueeze(-1) for x in (values * mask, torch.nn.functional.pad((values * mask)[:, 1:], (0, 1)))]
    flags = ends.unsqueeze(-1)

    def call() -> tuple[Tensor]:
        advantages, _ = functional.vec_generalized_advantage_estimate(
            GAMMA, LAM, *columns, rewards.unsqueeze(-1), flags, flags
        )
        return (advantages.squeeze(-1),)

    return Contender("torchrl", call)


def _chunked(rewards: Tensor, values: Tensor, mask: Tensor, width: int = 128) -> tuple[Tensor, Tensor]:
    """Written from what slime's `chunked_gae` computes: chunks times a triangle of powers, then one state per chunk.

    A padded row is to it as long as the longest: values and rewards behind its end are 0, and so are its advantages.
    """
    values = values * mask
    behind = torch.nn.functional.pad(values[:, 1:], (0, 1))
    spare = -rewards.shape[1] % width
    gaps = torch.nn.functional.pad((rewards + GAMMA * behind - values).flip(1), (0, spare))
    steps = torch.arange(width, device=gaps.device)
    distance = steps - steps.unsqueeze(-1)
    triangle = torch.where(distance >= 0, (GAMMA * LAM) ** distance.clamp(min=0).float(), 0.0)
    within = (gaps.view(-1, width) @ triangle).view(len(gaps), -1, width)
    decay = (GAMMA * LAM) ** (steps + 1.0)
    state = within.new_zeros(len(gaps), 1)
    for k in range(within.shape[1]):
        within[:, k] += state * decay
        state = within[:, k, -1:]
    advantages = within.view(gaps.shape)[:, : rewards.shape[1]].flip(1)
    return advantages, advantages + values


def _numba(name: str, inputs: list[Tensor], layout: Tensor) -> Contender:
    """layout: a mask, or the bounds of packed sequences."""
    if layout.device.type != "cpu":
        raise peers.Absent("runs on the CPU")
    if importlib.util.find_spec("numba") is None:
        raise peers.Absent("not installed")
    arrays = [x.numpy() for x in (*inputs, layout)]
    outputs = [torch.zeros_like(inputs[0]) for _ in inputs]
    loop = _numba_loops()[name]
    numbers = (GAMMA, LAM) if len(inputs) == 2 else (GAMMA,)

    def call() -> tuple[Tensor, ...]:
        import numba
        import numpy as np

        numba.set_num_threads(torch.get_num_threads())
        loop(*arrays, *map(np.float32, numbers), *(x.numpy() for x in outputs))
        return tuple(outputs)

    return Contender(NUMBA, call, compiled=True)


@cache
def _numba_loops() -> dict[str, Callable[..., None]]:
    """What a user writes who knows numba: rows in parallel, a loop over tokens in each."""
    import numba
    import numpy as np

    @numba.njit(parallel=True)
    def advantages(r: Any, v: Any, mask: Any, gamma: Any, lam: Any, out: Any, returns: Any) -> None:
        for b in numba.prange(r.shape[0]):
            following = running = np.float32(0)
            for t in range(r.shape[1] - 1, -1, -1):
                out[b, t] = returns[b, t] = 0
                if mask[b, t]:
                    running = r[b, t] + gamma * following - v[b, t] + gamma * lam * running
                    following = v[b, t]
                    out[b, t], returns[b, t] = running, running + v[b, t]

    @numba.njit(parallel=True)
    def packed(r: Any, v: Any, bounds: Any, gamma: Any, lam: Any, out: Any, returns: Any) -> None:
        for b in numba.prange(bounds.shape[0] - 1):
            following = running = np.float32(0)
            for t in range(bounds[b + 1] - 1, bounds[b] - 1, -1):
                running = r[t] + gamma * following - v[t] + gamma * lam * running
                following = v[t]
                out[t], returns[t] = running, running + v[t]

    @numba.njit(parallel=True)
    def discounted(r: Any, mask: Any, gamma: Any, out: Any) -> None:
        for b in numba.prange(r.shape[0]):
            running = np.float32(0)
            for t in range(r.shape[1] - 1, -1, -1):
                out[b, t] = 0
                if mask[b, t]:
                    running = r[b, t] + gamma * running
                    out[b, t] = running

    return {"gae": advantages, "gae-packed": packed, "returns": discounted}

"""A busy machine: calls on two threads beside the same on one, idle and with busy processes on the same two cores.

Where people train, other processes work: data loaders, rollouts, the trainer itself. Two threads must then never take
much longer than one. A case's name says what is called and how many processes are busy beside it.
The calls are those of the other operations' benchmarks, at the sizes at which waiting would show; each comes after a
short rest. Peers run in between, as torch's own operations do in training: their threads may still be spinning.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch

from fastreward import bench
from fastreward.bench.case import OURS, Case, Contender, Target


@dataclass(frozen=True, slots=True)
class _Call:
    """A case of another benchmark; its rows are `times` those of the shape asked for."""

    operation: str
    case: str
    times: float
    columns: int


_CALLS = {
    "loss-4M": _Call("policy_loss", "ppo", 1, 8192),
    "own-loss-32K": _Call("policy_loss", "own", 1 / 32, 2048),
    "tree-524K": _Call("prefix_tree", "build-g8-70", 1 / 2, 2048),
    "whiten-1M": _Call("whiten", "out", 2, 1024),
    "logprobs": _Call("logprobs", "forward", 1 / 8, 32_768),
}
_BUSY = (0, 1, 2)
CASES = tuple(f"{name}-{busy}-busy" for name in _CALLS for busy in _BUSY)
DTYPES = ("float32",)
SHAPE = (512,)  # rows of the loss over 4M tokens; the others' are in proportion
QUICK = (64,)

_THREADS = 2
_ALONE = f"{OURS}, one thread"
_REST = 0.002  # seconds
_LIFE = 120  # seconds after which a busy process ends by itself
_PROGRAM = """
import os, sys, time
parent, end = os.getppid(), time.monotonic() + float(sys.argv[1])
print("ready", flush=True)
while time.monotonic() < end and os.getppid() == parent:
    for _ in range(100_000):
        pass
"""


def build(case: str, dtype: torch.dtype, shape: tuple[int, ...], device: str) -> Case:
    """A call on two threads, on one, and torch.compile's on two where there is one."""
    name, busy, _ = case.rsplit("-", 2)
    inner = _inner(name, dtype, shape[0], device)
    calls = {contender.name: contender for contender in inner.contenders}
    contenders = [_on(_THREADS, calls[OURS]), replace(_on(1, calls[OURS]), name=_ALONE)]
    if "torch.compile" in calls:
        contenders.append(_on(_THREADS, calls["torch.compile"]))
    return replace(
        inner,
        operation="busy",
        name=case,
        contenders=contenders,
        inputs=list(inner.inputs),
        absent={} if "torch.compile" in calls else {"torch.compile": "torch has no such operation"},
        targets=(Target("ratio", 1.5, _ALONE),),
        beside=partial(busy_machine, int(busy)),
        tail=True,
    )


@lru_cache(maxsize=1)
def _inner(name: str, dtype: torch.dtype, rows: int, device: str) -> Case:
    """The case of the other benchmark: the same data, and one compilation, for every load."""
    call = _CALLS[name]
    return bench.operation(call.operation).build(
        call.case, dtype, (max(1, int(rows * call.times)), call.columns), device
    )


def _on(threads: int, contender: Contender) -> Contender:
    def prepare() -> None:
        contender.prepare()
        torch.set_num_threads(threads)
        time.sleep(_REST)

    def call() -> Any:
        return contender.call()

    return replace(contender, call=call, prepare=prepare)


@contextmanager
def busy_machine(processes: int) -> Iterator[None]:
    """This process on two cores, and so many busy ones beside it; they end with it, or when their time is over."""
    with ExitStack() as stack:
        threads = torch.get_num_threads()
        stack.callback(torch.set_num_threads, threads)
        stack.enter_context(_two_cores())
        for _ in range(processes):
            stack.enter_context(_busy_process())
        yield


@contextmanager
def _busy_process() -> Iterator[None]:
    command = [sys.executable, "-S", "-c", _PROGRAM, str(_LIFE)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            process.stdout.readline()  # it has begun
            yield
        finally:
            process.kill()


@contextmanager
def _two_cores() -> Iterator[None]:
    """All threads of this process, and what it starts, on two of its cores."""
    cores = os.sched_getaffinity(0)
    _keep_to(set(sorted(cores)[:_THREADS]))
    try:
        yield
    finally:
        _keep_to(cores)


def _keep_to(cores: set[int]) -> None:
    for task in Path("/proc/self/task").iterdir():
        try:
            os.sched_setaffinity(int(task.name), cores)
        except ProcessLookupError:  # a thread that has ended meanwhile
            continue

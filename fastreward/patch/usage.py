"""How much of a run fastreward serves: calls, tokens and seconds of each replaced function, in this process."""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

P = ParamSpec("P")
R = TypeVar("R")


@dataclass(slots=True)
class Usage:
    """What one replaced function has done since the patch was applied.

    Attributes:
        calls: calls that fastreward served.
        tokens: tokens in those calls, padding included.
        seconds: host seconds in them and in their backward, without what they spent in other replaced functions. On a
            GPU, where kernels run on after a call has returned, this is the time to launch them.
        handed_on: calls that went on to the trainer's own code, because it takes what fastreward does not.
    """

    calls: int = 0
    tokens: int = 0
    seconds: float = 0.0
    handed_on: int = 0


class _Frames(threading.local):
    """The replaced functions that are running in this thread, innermost last."""

    def __init__(self) -> None:
        self.open: list[_Frame] = []


@dataclass(slots=True)
class _Frame:
    usage: Usage
    start: float
    inner: float = 0.0  # seconds in replaced functions that this one called
    handed_on: bool = False


_frames = _Frames()


def counted(usage: Usage, function: Callable[P, R], tokens: Callable[P, int]) -> Callable[P, R]:
    """`function`, with each call entered in `usage`; `tokens`, called with the same arguments, says how many there are.

    Inside code that torch compiles a call is not counted: it would be a break in the graph.
    """

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        if torch.compiler.is_compiling():
            return function(*args, **kwargs)
        frame = _enter(usage)
        try:
            result = function(*args, **kwargs)
        finally:
            _leave(frame)
        if frame.handed_on:
            usage.handed_on += 1
            return result
        usage.calls += 1
        usage.tokens += tokens(*args, **kwargs)
        for x in result if isinstance(result, tuple) else (result,):
            _count_backward(usage, x)
        return result

    return call


def handed_on() -> None:
    """Called by a replacement before it calls the trainer's own function: the call is not one of fastreward's."""
    if not torch.compiler.is_compiling() and _frames.open:
        _frames.open[-1].handed_on = True


def is_handed_on() -> bool:
    """Whether the replacement that is running has handed its call on already."""
    return bool(_frames.open) and _frames.open[-1].handed_on


def is_inside_handed_on() -> bool:
    """Whether a replacement around the one that is running has handed its call on."""
    return any(frame.handed_on for frame in _frames.open[:-1])


def _enter(usage: Usage) -> _Frame:
    frame = _Frame(usage, time.perf_counter())
    _frames.open.append(frame)
    return frame


def _leave(frame: _Frame) -> None:
    elapsed = time.perf_counter() - frame.start
    _frames.open.pop()
    if not frame.handed_on:
        frame.usage.seconds += elapsed - frame.inner
        if _frames.open:
            _frames.open[-1].inner += elapsed


def _count_backward(usage: Usage, x: Any) -> None:
    """Add the time of the node that made `x` to `usage` when its backward runs."""
    node = x.grad_fn if isinstance(x, Tensor) else None
    if node is None:
        return
    metadata: dict[str, Any] = node.metadata  # type: ignore[assignment]  # a property, which its stub calls a method
    if metadata.setdefault("fastreward", node_mark := object()) is not node_mark:
        return  # another output of the same node
    started: list[float] = []
    node.register_prehook(lambda grads: started.append(time.perf_counter()))

    def ended(grads: Any, outputs: Any) -> None:
        usage.seconds += time.perf_counter() - started.pop()

    node.register_hook(ended)

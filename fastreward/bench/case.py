"""The parts of a benchmark: a case (one operation at one size), its contenders, its promises."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor

from fastreward.bench.roofline import Traffic

OURS = "fastreward"
PEERS = ("torch eager", "torch.compile", "TRL", "verl", "liger-kernel")


def nothing() -> None:
    """The preparation of a call that needs none."""


@dataclass(slots=True)
class Contender:
    """One way to do the work: `prepare` runs untimed before every call, `call` returns what `Case.error` reads."""

    name: str
    call: Callable[[], Any]
    prepare: Callable[[], None] = nothing
    tolerance: float | None = None  # largest error that still counts as the same computation; None: the case's
    compiled: bool = False  # its first call compiles


@dataclass(frozen=True, slots=True)
class Target:
    """A promise: a bound that fastreward was written to keep for one case, at its own size, on one kind of device."""

    kind: Literal["speedup", "share", "ratio", "memory", "first_call", "per_token"]
    bound: float
    peer: str = ""
    device: str = "cpu"

    @property
    def text(self) -> str:
        """The promise in words."""
        match self.kind:
            case "speedup":
                return f">= {self.bound:g}x {self.peer}"
            case "share":
                return f">= {self.bound:.0%} of the limit"
            case "ratio":
                return f"<= {self.bound:g}x the time of {self.peer}"
            case "per_token":
                return f"<= {self.bound:g} ns/token, {self.peer}"
            case "memory":
                return f"< {self.bound / 2**20:g} MiB besides its outputs"
            case "first_call":
                return f"first call < {self.bound * 1e3:g} ms"


@dataclass(slots=True)
class Case:
    """One operation at one size: data is built, `error` says how far a contender's result is from the truth."""

    operation: str
    name: str
    dtype: str
    shape: tuple[int, ...]
    traffic: Traffic
    error: Callable[[Any], float]
    contenders: list[Contender]
    tolerance: float
    inputs: list[Tensor]  # what a result may share memory with; anything else that it holds is an output
    absent: dict[str, str] = field(default_factory=dict)  # peer -> why it does not take part
    targets: tuple[Target, ...] = ()
    gemm: tuple[Tensor, Tensor] | None = None  # [M, K], [K, N]: a product like the operation's, whose rate is its limit
    beside: Callable[[], AbstractContextManager[None]] = nullcontext  # what goes on while the rounds run
    repeated: int = 1  # calls of a sample, which is their mean
    tail: bool = False  # slow calls matter: many rounds, in less time, and the machine's limit is measured before them

    @property
    def title(self) -> str:
        """Operation, case, shape and dtype on one line."""
        return f"{self.operation} {self.name} {list(self.shape)} {self.dtype}"


@dataclass(slots=True)
class Timing:
    """Measurements of one contender, in seconds and bytes."""

    name: str
    error: float
    first: float
    samples: list[float] = field(default_factory=list)
    peak: int | None = None  # peak extra memory besides the outputs

    @property
    def median(self) -> float:
        """Median of the samples."""
        ordered = sorted(self.samples)
        middle = len(ordered) // 2
        return ordered[middle] if len(ordered) % 2 else (ordered[middle - 1] + ordered[middle]) / 2

    @property
    def p99(self) -> float:
        """The sample that one in a hundred exceeds."""
        return sorted(self.samples)[int(0.99 * (len(self.samples) - 1))]


class EquivalenceError(AssertionError):
    """A contender does not compute what the case is about; nothing was timed."""

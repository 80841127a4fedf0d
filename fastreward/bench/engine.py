"""Runs a case: equivalence first, then interleaved rounds of all contenders beside the machine's own bandwidth."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from math import inf
from typing import Any

import torch
from torch import Tensor

from fastreward.bench import peers
from fastreward.bench.case import OURS, Case, Contender, EquivalenceError, Timing
from fastreward.bench.roofline import Bandwidth

_SMALLEST_PROBE = 16 << 20  # below this a loop measures its own call, not the memory
_LARGEST_PROBE = 1 << 30
_TAIL_ROUNDS, _TAIL_SECONDS = 401, 6.0  # at most, of a case whose slow calls matter
_L2_FLUSH = 512 << 20  # also long enough on the device for the host to queue the timed launches behind it


@dataclass(frozen=True, slots=True)
class Settings:
    """Length and number of the timed rounds; the budget is for one case."""

    seconds: float = 20.0
    min_rounds: int = 3
    max_rounds: int = 51


@dataclass(slots=True)
class Outcome:
    """A timed case, and the bandwidths measured between its rounds."""

    case: Case
    timings: list[Timing]
    bandwidth: Bandwidth
    rounds: int

    @property
    def ours(self) -> Timing:
        """fastreward's own row."""
        return self.timings[0]

    @property
    def limit(self) -> float:
        """Seconds that the bytes, or the flops, of this case take at the measured rates."""
        return self.case.traffic.seconds(self.bandwidth)

    def timing(self, name: str) -> Timing | None:
        """The row called `name`, None where it did not take part."""
        return next((t for t in self.timings if t.name == name), None)


def seconds_of(call: Callable[[], Any], device: str) -> tuple[float, Any]:
    """(seconds, result) of one call; on CUDA by events, behind a flush of the L2 that hides the launch."""
    if device == "cpu":
        start = time.perf_counter()
        result = call()
        return time.perf_counter() - start, result
    begin, end = torch.Event("cuda", enable_timing=True), torch.Event("cuda", enable_timing=True)
    _flush_buffer().zero_()
    begin.record()
    result = call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3, result


class Probe:
    """The machine's bandwidth on buffers of the case's size, by loops that everybody has: torch's sums and copies.

    Where the case has a GEMM, its rate too, by torch.mm into a reused buffer: in its own dtype and in float32, of which
    some CPUs do the second faster.
    """

    def __init__(self, nbytes: float, device: str, gemm: tuple[Tensor, Tensor] | None = None) -> None:
        size = int(min(max(nbytes, _SMALLEST_PROBE), _LARGEST_PROBE)) // 16 * 2  # int64 elements, a 16th for each half
        self.device = device
        self.source = torch.ones(size, dtype=torch.int64, device=device)
        self.target = torch.zeros(size, dtype=torch.int64, device=device)
        floats = self.source.view(torch.float32)
        self.reads: dict[str, Callable[[], Any]] = {"sum": self.source.sum, "amax": floats.amax}
        # A copy to elsewhere may first fetch what it overwrites; a loop in place has it in cache already.
        self.writes: dict[str, Callable[[], Any]] = {
            "copy": lambda: self.target.copy_(self.source),
            "in place": self.target.neg_,
        }
        self.products: dict[str, Callable[[], Any]] = {}
        self.flops = 0.0
        if gemm is not None:
            (m, k), n = gemm[0].shape, gemm[1].shape[1]
            for dtype in dict.fromkeys((gemm[0].dtype, torch.float32 if device == "cpu" else gemm[0].dtype)):
                a, b = (x.to(dtype) for x in gemm)
                self.products[f"gemm in {dtype}"] = partial(torch.mm, a, b, out=a.new_empty(m, n))
            self.flops = 2.0 * m * k * n
        self.loops = self.reads | self.writes | self.products
        self.samples: dict[str, list[float]] = {name: [] for name in self.loops}

    def round(self) -> None:
        """One more sample of each loop."""
        for name, loop in self.loops.items():
            self.samples[name].append(seconds_of(loop, self.device)[0])

    def bandwidth(self) -> Bandwidth:
        """Medians; of each kind the faster loop."""
        medians = {name: Timing(name, 0.0, 0.0, samples).median for name, samples in self.samples.items()}
        copy = 2 * self.source.nbytes / min(medians[name] for name in self.writes)
        read = self.source.nbytes / min(medians[name] for name in self.reads)
        flops = self.flops / min(medians[name] for name in self.products) if self.products else inf
        return Bandwidth(read if self.device == "cpu" else copy, copy, flops)  # a GPU has one limit: the copy


def run(case: Case, device: str, settings: Settings, step: Callable[[str], None]) -> Outcome:
    """Gate, warm-up and rounds of one case; `step` is told what happens next."""
    timings: list[Timing] = []
    taking_part: list[Contender] = []
    for contender in list(case.contenders):
        step(f"equivalence: {contender.name}")
        timing = gate(case, contender, device)
        if timing is not None:
            timings.append(timing)
            taking_part.append(contender)
    case.contenders = taking_part
    probe = Probe(max((x.nbytes for x in case.inputs), default=0), device, case.gemm)
    probe.round()
    for samples in probe.samples.values():
        samples.clear()
    for contender, timing in zip(taking_part, timings, strict=True):
        if contender.compiled or timing.first < 1.0:  # a first call of seconds has warmed everything already
            step(f"warm-up: {contender.name}")
            _sample(case, contender, device)
    if case.tail:
        settings = Settings(min(settings.seconds, _TAIL_SECONDS), settings.min_rounds, _TAIL_ROUNDS)
        for _ in range(settings.min_rounds):
            probe.round()
    rounds = 0
    with case.beside():
        started = time.perf_counter()
        while rounds < settings.min_rounds or (
            rounds < settings.max_rounds and time.perf_counter() - started < settings.seconds
        ):
            rounds += 1
            for contender, timing in zip(taking_part, timings, strict=True):
                if case.tail and sum(timing.samples) > settings.seconds / len(taking_part):
                    continue  # a slow one leaves the other rounds to the others
                step(f"round {rounds}: {contender.name}")
                timing.samples.append(_sample(case, contender, device))
            if not case.tail:
                probe.round()
    if device == "cuda":
        for contender, timing in zip(taking_part, timings, strict=True):
            timing.peak = _cuda_peak(case, contender)
    return Outcome(case, timings, probe.bandwidth(), rounds)


def gate(case: Case, contender: Contender, device: str) -> Timing | None:
    """First call of a contender and its error. Raises where ours is wrong; None for a peer that fails or is wrong."""
    contender.prepare()
    try:
        with peers.quietly():
            first, result = _first(contender, device)
    except Exception as error:
        if contender.name.startswith(OURS):
            raise
        reason = f"{type(error).__name__}: {str(error).strip().splitlines()[0][:100] if str(error).strip() else ''}"
        case.absent[contender.name] = f"failed: {reason}"
        return None
    error_ = case.error(result)
    tolerance = case.tolerance if contender.tolerance is None else contender.tolerance
    if not error_ <= tolerance:
        what = f"{error_:.3g} from the float64 reference, more than {tolerance:.3g}"
        if contender.name.startswith(OURS):
            raise EquivalenceError(f"{case.title}: {contender.name} is {what}; nothing was timed")
        case.absent[contender.name] = f"not equivalent: {what}"
        return None
    return Timing(contender.name, error_, first)


def outputs_bytes(result: Any, inputs: list[Tensor]) -> int:
    """Bytes of the tensors in a call's result that do not live in the inputs' memory."""
    known = {x.untyped_storage().data_ptr() for x in inputs}
    total = 0
    for x in tensors_in(result):
        storage = x.untyped_storage()
        if storage.data_ptr() not in known:
            known.add(storage.data_ptr())
            total += storage.nbytes()
    return total


def tensors_in(result: Any) -> list[Tensor]:
    """Every tensor that a call returned: alone, in tuples, lists and dicts, or as attributes of our results."""
    if isinstance(result, Tensor):
        return [result]
    if isinstance(result, dict):
        return [x for value in result.values() for x in tensors_in(value)]
    if isinstance(result, (tuple, list)):
        return [x for value in result for x in tensors_in(value)]
    return [x for value in getattr(result, "__dict__", {}).values() for x in tensors_in(value)]


def _first(contender: Contender, device: str) -> tuple[float, Any]:
    """Wall time of the very first call, compilation and launches included."""
    with _without_collection():
        start = time.perf_counter()
        result = contender.call()
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start, result


def _sample(case: Case, contender: Contender, device: str) -> float:
    gc.collect(0)  # what the last call left behind is not this call's business
    contender.prepare()
    with _without_collection():
        seconds, result = seconds_of(partial(_last_of, contender.call, case.repeated), device)
        del result
    return seconds / case.repeated


def _last_of(call: Callable[[], Any], times: int) -> Any:
    for _ in range(times - 1):
        call()
    return call()


@contextmanager
def _without_collection() -> Iterator[None]:
    """Turn the garbage collector off, as timeit does: a collection takes 0.1 s, and is not this call's doing."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def _cuda_peak(case: Case, contender: Contender) -> int:
    contender.prepare()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = contender.call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before - outputs_bytes(result, case.inputs)


_flush: list[Tensor] = []


def _flush_buffer() -> Tensor:
    if not _flush:
        _flush.append(torch.empty(_L2_FLUSH // 4, dtype=torch.float32, device="cuda"))
    return _flush[0]

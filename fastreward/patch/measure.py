"""Which of two implementations is faster on a device: measured when a patch is applied, and said in its report."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

_WARM_UPS, _RUNS = 2, 7


@dataclass(frozen=True, slots=True)
class Timing:
    """Median milliseconds of a forward and backward, theirs and ours; `ours_ms` is None where ours could not run."""

    what: str
    sample: str
    stock_ms: float
    ours_ms: float | None
    problem: str = ""

    @property
    def ours_wins(self) -> bool:
        """Whether fastreward ran and was faster."""
        return self.ours_ms is not None and self.ours_ms < self.stock_ms

    def __str__(self) -> str:
        if self.ours_ms is None:
            return f"fastreward could not run here: {self.problem}"
        return f"fastreward took {self.ours_ms:.3f} ms, TRL {self.stock_ms:.3f} ms (forward + backward, {self.sample})"


def linear_head(
    stock: Callable[..., Any],
    ours: Callable[..., Any],
    device: torch.device,
    *,
    tokens: int = 1024,
    hidden: int = 1024,
    vocab: int = 65_536,
    dtype: torch.dtype = torch.bfloat16,
) -> Timing:
    """Both sides of TRL's fused LM head, called with its arguments."""
    generator = torch.Generator(device).manual_seed(0)
    states = torch.randn(tokens, hidden, generator=generator, device=device).to(dtype).requires_grad_()
    weight = (torch.randn(vocab, hidden, generator=generator, device=device) / hidden**0.5).to(dtype).requires_grad_()
    targets = torch.randint(vocab, (tokens,), generator=generator, device=device)

    def step(function: Callable[..., Any]) -> None:
        logprobs, *_ = function(states, weight, None, targets, 1.0, 32_768, None, 1.0, ("log_probs", "entropy"))
        torch.autograd.grad(logprobs.sum(), (states, weight))

    return compare("fused LM head", f"[{tokens}, {hidden}] x [{vocab}, {hidden}], {dtype}", step, stock, ours, device)


def whole_logits(
    stock: Callable[..., Any],
    ours: Callable[..., Any],
    device: torch.device,
    *,
    tokens: int = 1024,
    vocab: int = 65_536,
    dtype: torch.dtype = torch.bfloat16,
) -> Timing:
    """Both sides of TRL's selective_log_softmax_and_entropy."""
    generator = torch.Generator(device).manual_seed(0)
    logits = torch.randn(1, tokens, vocab, generator=generator, device=device).to(dtype).requires_grad_()
    index = torch.randint(vocab, (1, tokens), generator=generator, device=device)

    def step(function: Callable[..., tuple[Tensor, Tensor]]) -> None:
        logprobs, _ = function(logits, index, False)
        torch.autograd.grad(logprobs.sum(), logits)

    return compare("log-probs of whole logits", f"[{tokens}, {vocab}], {dtype}", step, stock, ours, device)


def compare(
    what: str,
    sample: str,
    step: Callable[[Callable[..., Any]], None],
    stock: Callable[..., Any],
    ours: Callable[..., Any],
    device: torch.device,
) -> Timing:
    """Time `step` with either function, in turn. Whatever goes wrong in ours is a reason to keep theirs, and told."""
    try:
        for _ in range(_WARM_UPS):
            step(ours)
    except Exception as error:
        return Timing(what, sample, 0.0, None, f"{type(error).__name__}: {error}")
    for _ in range(_WARM_UPS):
        step(stock)
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(_RUNS):
        for function, taken in zip((stock, ours), times, strict=True):
            taken.append(_milliseconds(step, function, device))
    return Timing(what, sample, statistics.median(times[0]), statistics.median(times[1]))


def _milliseconds(
    step: Callable[[Callable[..., Any]], None], function: Callable[..., Any], device: torch.device
) -> float:
    _synchronize(device)
    start = time.perf_counter()
    step(function)
    _synchronize(device)
    return (time.perf_counter() - start) * 1e3


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)

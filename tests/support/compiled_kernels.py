"""Compiles the Triton kernels of log-probs, groups, rewards, segments and whitening; a program, for test_compile.py."""

from __future__ import annotations

from typing import Any

import compiled
import torch
from fastreward.kernels import group, logprobs, returns, rewards, segments, whiten

from fastreward._arguments.options import SEGMENT_OPS, GroupOptions, ReturnsInputs, ReturnsOptions, SegmentOptions
from fastreward._arguments.tokens import Tokens


def logprob_cases(everything: bool) -> dict[str, Any]:
    n, v = 16, 151936

    def run(
        dtype: torch.dtype,
        flags: int,
        vocab: int = v,
        kept: str = "",
        k: int = 0,
        rowwise: bool = False,
        cap: float = 0.0,
    ) -> None:
        x, labels = torch.zeros(n, vocab, dtype=dtype), torch.zeros(n, dtype=torch.long)
        keep = torch.ones(n, vocab, dtype=torch.bool) if kept == "mask" else None
        keep_ids = torch.zeros(n, 50, dtype=torch.long) if kept == "ids" else None
        ids = torch.zeros(n, k, dtype=torch.long) if k else None
        rows = (
            labels,
            torch.ones(n, dtype=torch.float64) if rowwise else 1.0,
            torch.ones(n, dtype=torch.bool),
            keep,
            keep_ids,
            ids,
        )
        values, _, id_logprobs = logprobs.forward(x, *rows, flags)
        logprobs.backward(x, *rows, values, id_logprobs, torch.zeros(7, n), torch.zeros(n, k) if k else None, x, cap)

    def slices() -> None:
        x, labels = torch.zeros(n, 4096, dtype=torch.bfloat16), torch.zeros(n, dtype=torch.long)
        state = torch.zeros(n, 8, dtype=torch.float64)
        logprobs.accumulate(x, labels, 0, 1.0, state, 31, torch.zeros(n))
        logprobs.finish(state, 1.0, 4096, 31)

    cases = {
        "bf16, logprobs and entropy": lambda: run(torch.bfloat16, 1),
        "bf16, all outputs": lambda: run(torch.bfloat16, 31),
        "f32, all outputs": lambda: run(torch.float32, 31, rowwise=True),
        "f32, kept mask and ids": lambda: run(torch.float32, 31, kept="mask", k=20),
        "bf16, kept ids": lambda: run(torch.bfloat16, 31, kept="ids", k=20),
        "slices": slices,
    }
    if everything:
        cases |= {
            "bf16, logprobs alone": lambda: run(torch.bfloat16, 0),
            "f16, softcap": lambda: run(torch.float16, 1, cap=0.02),
            "bf16, multiple of 8": lambda: run(torch.bfloat16, 1, vocab=151000 + 8),
            "bf16, odd": lambda: run(torch.bfloat16, 31, vocab=50257),
        }
    return {f"logprobs: {name}": call for name, call in cases.items()}


def small_cases(everything: bool) -> dict[str, Any]:
    def grouped(size: int, k: int = 1, **options: Any) -> None:
        b = 4096
        labels = None if size else torch.zeros(b, dtype=torch.long)
        weights = torch.ones(k) if k > 1 else None
        group.forward(torch.zeros(b, k), labels, size, torch.ones(b), weights, None, None, GroupOptions(**options))

    def white() -> None:
        x = torch.zeros(64, 512)
        whiten.forward(x, torch.ones(64, 512, dtype=torch.bool), False, 1, 1e-8, x)

    def placed() -> None:
        x = torch.zeros(64, 512)
        tokens = Tokens((64, 512), torch.ones(64, 512, dtype=torch.bool))
        rewards.token_rewards(torch.ones(64), x, x, tokens, "k3", "end", (0.1, 20.0, 10.0, -1.0, 1.0), x.clone())

    def counted(size: int, exponentials: bool) -> None:
        b = 4096
        group.statistics(torch.zeros(b), None if size else torch.zeros(b, dtype=torch.long), size, None, exponentials)

    def segmented(op: Any, weights: Any = None, packed: bool = False) -> None:
        shape = (64 * 512,) if packed else (64, 512)
        x, ids = torch.zeros(shape), torch.zeros(shape, dtype=torch.int32)
        w = None if weights is None else torch.zeros(shape, dtype=weights)
        bounds = torch.zeros(65, dtype=torch.int64) if packed else None
        values = segments.reduce(x, ids, w, bounds, 8, SegmentOptions(op), False)
        segments.adjoint(values, x, ids, w, bounds, SegmentOptions(op), x)

    def cut() -> None:
        mask = torch.zeros(64, 512, dtype=torch.bool)
        segments.ids(mask, None, None, True, None)
        segments.ids(mask, None, mask, False, None)

    cases: dict[str, Any] = {
        "segments: ids": cut,
        "segments: mean": lambda: segmented("mean", torch.bool),
        "segments: softmin": lambda: segmented("softmin", torch.float32, packed=True),
    }

    def recurring(numbers: Any, packed: bool = False, long: bool = False, **options: Any) -> None:
        chosen = ReturnsOptions(**options)
        count = 1 << 16 if long else 4096  # long: a program for each block
        x = torch.zeros(count) if packed else torch.zeros(4, count // 4)
        token = None if chosen.kind == "returns" else x
        bounds = torch.tensor([0, 96, count]) if packed else None
        inputs = ReturnsInputs(x, token, token, x if chosen.kind == "lambda" else None)
        tokens = Tokens(tuple(x.shape), torch.ones_like(x, dtype=torch.bool), bounds)
        returns.scan(inputs, tokens, numbers, chosen, x.clone(), x.clone())

    numbers = (0.99, 0.95, 1.0, 1.0, 1.0)
    cases |= {
        "returns: gae": lambda: recurring(numbers, kind="gae", move=True),
        "returns: vtrace": lambda: recurring(torch.ones(5).double(), packed=True, kind="vtrace", at_masked="zero"),
        "returns: long, gae": lambda: recurring(numbers, packed=True, long=True, kind="gae", move=True),
        "returns: soft": lambda: recurring(numbers, op="logsumexp"),
        "whiten": white,
        "token_rewards": placed,
        "group: statistics": lambda: counted(0, True),
        "group: labels, second-max over max": lambda: grouped(0, center="second-max", scale="max"),
        "group: neighbours": lambda: grouped(8),
    }
    if everything:
        cases["returns: long, max"] = lambda: recurring((1.0,) * 5, long=True, op="max", reverse=False)
        cases |= {
            f"segments: {op}": lambda op=op: segmented(op)
            for op in SEGMENT_OPS
            if op in ("last", "min", "logsumexp", "mean-exp")
        }
        cases |= {
            "group: components, batch-std": lambda: grouped(0, 3, scale="batch-std", normalize="normalize-then-sum"),
            "group: weighted sum": lambda: grouped(64, 3, center="length-weighted"),
            "group: large, leave-one-out": lambda: grouped(512, center="leave-one-out"),
        }
    return cases


if __name__ == "__main__":
    compiled.main(lambda everything: logprob_cases(everything) | small_cases(everything))

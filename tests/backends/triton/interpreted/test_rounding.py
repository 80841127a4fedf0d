"""What `fastreward verify` allows Triton's interpreter, and no hardware: float32 cut off to bfloat16, not rounded."""

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit
def _narrow(x, y, N: tl.constexpr):
    at = tl.arange(0, N)
    tl.store(y + at, tl.load(x + at).to(tl.bfloat16))


def test_the_interpreter_cuts_off_to_bfloat16() -> None:
    """If this fails the interpreter rounds by now, and verify's slack for it can go."""
    x = torch.randn(4096, generator=torch.Generator().manual_seed(0))
    y = torch.zeros(4096, dtype=torch.bfloat16)
    _narrow[(1,)](x, y, 4096)
    error = ((y.float() - x) / x).abs().max()
    assert bool((y.float().abs() <= x.abs()).all())
    assert 2.0**-8 < error < 2.0**-7

"""Large fresh outputs on the CPU live in memory that an earlier one has left."""

from __future__ import annotations

import threading

import pytest
import torch

import fastreward as fr
from fastreward._runtime import memory

SHAPE = (96, 40_000)  # 15 MB in float32


def gradient(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    (grad,) = torch.autograd.grad(fr.token_logprobs(logits, labels).logprobs.sum(), logits)
    return grad


def test_a_freed_gradient_is_the_next_ones_memory_and_a_live_one_never() -> None:
    logits = torch.randn(SHAPE, requires_grad=True)
    labels = torch.randint(0, SHAPE[1], SHAPE[:1])
    first = gradient(logits, labels)
    kept = first.clone()
    second = gradient(logits, labels)
    assert second.data_ptr() != first.data_ptr()
    assert torch.equal(second, first)
    address = second.data_ptr()
    del second
    third = gradient(logits, labels)
    assert third.data_ptr() == address
    assert torch.equal(third, kept)
    assert torch.equal(first, kept)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_tensors_are_like_any_other(dtype: torch.dtype) -> None:
    x = memory.empty((3, 5, 2_000_000), dtype)
    assert (x.shape, x.dtype, x.is_contiguous()) == ((3, 5, 2_000_000), dtype, True)
    x.zero_()[1, 2, -1] = 1
    view = x[1, 2]
    del x
    assert float(view.sum()) == 1  # the view keeps the memory


def test_strided() -> None:
    like = torch.empty(4, 3_000_001)[:, :-1]
    x = memory.empty_strided(like)
    assert (x.shape, x.stride()) == (like.shape, like.stride())
    assert memory.empty_strided(torch.empty(0, 7)[:, :3]).shape == (0, 3)


def test_freed_by_another_thread() -> None:
    for _ in range(8):
        holder = [memory.empty((4_000_000,), torch.float32).fill_(1.0)]
        thread = threading.Thread(target=holder.clear)
        thread.start()
        thread.join()
        assert not holder

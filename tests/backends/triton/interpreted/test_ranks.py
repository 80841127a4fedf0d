"""The Triton kernels under a vocabulary, rows and tokens that are split over two ranks, against the CPU's."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import rank_calls
import torch
from rank_pool import RankPool

LOGITS, LABELS = torch.randn(3, 11, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 10, 4])
TOKENS = torch.randn(2, 8, generator=torch.Generator().manual_seed(1))
KEPT = torch.tensor([[0, 9], [10, 2], [4, 5]])
CALLS: dict[str, list[dict[str, Any]]] = {
    "token_logprobs": [{"leaves": {"logits": x}, "args": (LABELS,)} for x in LOGITS.split([4, 7], -1)],
    "token_divergence": [
        {"leaves": {"logits": x, "teacher_logits": y}}
        for x, y in zip(LOGITS.split([4, 7], -1), LOGITS.flip(-1).split([4, 7], -1), strict=True)
    ],
    "gae": [{"args": (x, 2 * x), "options": {"gamma": 0.9, "at_masked": "zero"}} for x in TOKENS.split([3, 5], -1)],
    "whiten": [{"args": (x,)} for x in TOKENS.split(1)],
}
OPTIONS: dict[str, list[dict[str, Any]]] = {
    "token_logprobs": [{"outputs": ("logprobs", "entropy", "argmax", "rank")}, {"kept_tokens": KEPT}],
    "token_divergence": [{"divergence": "reverse-kl"}, {"divergence": "jsd", "outputs": ("entropy",)}],
}
UPSTREAM = {"token_logprobs": "logprobs", "token_divergence": "divergence"}


@pytest.fixture(scope="module")
def ranks() -> Iterator[RankPool]:
    pool = RankPool()
    yield pool
    pool.stop()


@pytest.mark.parametrize("operation", CALLS)
def test_what_the_cpu_gives(operation: str, ranks: RankPool) -> None:
    more = {"upstream": {UPSTREAM[operation]: torch.ones(3)}} if operation in UPSTREAM else {}
    for options in OPTIONS.get(operation, [{}]):
        requests = [
            {"operation": operation, **own, **more, "options": own.get("options", {}) | options}
            for own in CALLS[operation]
        ]
        plain = ranks.run(rank_calls.call, [{**x, "backend": "cpu"} for x in requests])
        triton = ranks.run(rank_calls.call, [{**x, "backend": "triton"} for x in requests])
        for a, b in zip(plain, triton, strict=True):
            for kind in ("out", "grads"):
                for name, x in a[kind].items():
                    torch.testing.assert_close(b[kind][name], x, rtol=1e-5, atol=1e-5)

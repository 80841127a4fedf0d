"""What runs over ranks on the reference's raw functions, as on the CPU's."""

from __future__ import annotations

from typing import Any

import pytest
import rank_calls
import torch
from rank_pool import RankPool

LOGITS, LABELS = torch.randn(4, 10, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 9, 4, 3])
TOKENS = torch.randn(3, 8, generator=torch.Generator().manual_seed(1))
OUTPUTS = ("logprobs", "entropy", "argmax", "rank")
CALLS: dict[str, list[dict[str, Any]]] = {
    "token_logprobs": [{"leaves": {"logits": x}, "args": (LABELS,)} for x in LOGITS.split([4, 6], -1)],
    "linear_token_logprobs": [
        {"leaves": {"hidden": LOGITS, "weight": x}, "args": (LABELS,)}
        for x in torch.randn(10, 10, generator=torch.Generator().manual_seed(2)).split([4, 6])
    ],
    "gae": [{"args": (x, 2 * x), "options": {"gamma": 0.9, "at_masked": "zero"}} for x in TOKENS.split([3, 5], -1)],
    "whiten": [{"args": (x,)} for x in TOKENS.split([1, 2])],
    "group_advantages": [{"args": (x, ["a", "b", "a", "b"])} for x in (LOGITS[0, :4], LOGITS[1, :4])],
}


@pytest.mark.parametrize("operation", CALLS)
def test_the_reference_gives_the_same(operation: str, ranks: RankPool) -> None:
    more = {"upstream": {"logprobs": torch.ones(4)}} if "logprobs" in operation else {}
    options = {"outputs": OUTPUTS} if "logprobs" in operation else {}
    requests = [
        {"operation": operation, **own, **more, "options": own.get("options", {}) | options} for own in CALLS[operation]
    ]
    plain = ranks.run(rank_calls.call, requests)
    reference = ranks.run(rank_calls.call, [{**x, "backend": "reference"} for x in requests])
    for a, b in zip(plain, reference, strict=True):
        for kind in ("out", "grads"):
            for name, x in b[kind].items():
                torch.testing.assert_close(a[kind][name], x, rtol=1e-5, atol=1e-5)

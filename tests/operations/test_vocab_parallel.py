"""token_logprobs over a vocabulary split across two gloo ranks: equal to the whole, gradients included."""

from __future__ import annotations

import os
from pathlib import Path

import torch
import torch.multiprocessing as mp
from vocab_ranks import OUTPUTS, problem, worker

import fastreward as fr


def test_two_ranks_equal_one(tmp_path: Path) -> None:
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    mp.spawn(worker, (str(tmp_path),), nprocs=2)
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)]
    logits, labels, mask = problem()
    whole = logits.requires_grad_()
    stats = fr.token_logprobs(whole, labels, mask=mask, temperature=0.8, outputs=OUTPUTS)
    (stats.logprobs.sum() + 0.5 * stats.entropy.sum()).backward()
    for name, a, b, expected in zip(OUTPUTS, ranks[0]["stats"], ranks[1]["stats"], stats, strict=True):
        assert torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0)), name
        assert torch.allclose(a.double(), expected.double(), atol=2e-6, equal_nan=True), name
    grad = torch.cat([ranks[0]["grad"], ranks[1]["grad"]], -1)
    assert torch.allclose(grad, whole.grad, atol=1e-6, equal_nan=True)
    x = torch.cat([torch.randn(4, 6, generator=torch.Generator().manual_seed(rank)) for rank in (0, 1)])
    assert torch.allclose(torch.cat([r["white"] for r in ranks]), fr.whiten(x, x > -1), atol=1e-6)

"""token_logprobs over a vocabulary split across two gloo ranks: equal to the whole, gradients included."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

import fastreward as fr

OUTPUTS = (
    "logprobs",
    "entropy",
    "logsumexp",
    "label_logit",
    "mean_logit",
    "log_sum_sq_probs",
    "max_logprob",
    "argmax",
    "rank",
)
CUT = 40  # uneven slices: 40 and 60 columns


def problem() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(2, 5, 100, generator=generator)
    logits[0, 0, :CUT] = -torch.inf
    logits[1, 3] = -torch.inf  # NaN, as unsharded
    labels = torch.randint(0, 100, (2, 5), generator=generator)
    labels[0, 0] = 70
    return logits, labels, torch.tensor([[1, 1, 0, 1, 1], [1, 1, 1, 1, 0]])


def worker(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    logits, labels, mask = problem()
    mine = (logits[..., :CUT] if rank == 0 else logits[..., CUT:]).clone().requires_grad_()
    stats = fr.token_logprobs(mine, labels, mask=mask, temperature=0.8, outputs=OUTPUTS, process_group=dist.group.WORLD)
    (stats.logprobs.sum() + 0.5 * stats.entropy.sum()).backward()
    twice = fr.token_logprobs(mine, labels, mask=mask, process_group=dist.group.WORLD).logprobs.sum()
    with pytest.raises(NotImplementedError, match="double backward"):
        torch.autograd.grad(twice, mine, create_graph=True)
    x = torch.randn(4, 6, generator=torch.Generator().manual_seed(rank))
    white = fr.whiten(x, x > -1, process_group=dist.group.WORLD)
    torch.save({"stats": [s.detach() for s in stats], "grad": mine.grad, "white": white}, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


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

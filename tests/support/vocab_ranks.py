"""What a rank of test_vocab_parallel.py runs: in a module that the process spawned for it can import."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

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

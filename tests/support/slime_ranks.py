"""What a rank of test_patch_slime_ranks.py runs: in a module that the process spawned for it can import."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any

import slime_formulas as formulas
import torch
import torch.distributed as dist
from torch import Tensor

from fastreward.patch import slime

PROMPTS, LENGTHS, VOCAB, CUT = [3, 1, 9, 2], [5, 1, 8, 14], 18, 7
#: Options under which losses, weights and masks all have a part.
ARGS: dict[str, Any] = {
    "entropy_coef": 0.01,
    "use_kl_loss": True,
    "kl_loss_coef": 0.1,
    "kl_loss_type": "k3",
    "use_tis": True,
    "rollout_temperature": 0.8,
}
ESTIMATORS = ("grpo", "ppo", "reinforce_plus_plus", "reinforce_plus_plus_baseline")


def worker(rank: int, folder: str) -> None:
    """Both ways to cut a batch in two, one after the other; what came of it is in a file."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    alone = dist.new_group([0]), dist.new_group([1])
    torch.save({"vocabulary": vocabulary(rank, folder), "context": context(rank, alone[rank])}, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def megatron(vocabulary: Any, contexts: int, context: int, context_group: Any) -> None:
    """What slime has imported by then."""
    core = ModuleType("megatron.core")
    core.mpu = SimpleNamespace(  # type: ignore[attr-defined]
        get_tensor_model_parallel_group=lambda: vocabulary,
        get_context_parallel_world_size=lambda: contexts,
        get_context_parallel_rank=lambda: context,
        get_context_parallel_group=lambda: context_group,
    )
    sys.modules["megatron.core"] = core


def batch() -> dict[str, Any]:
    """The same on both ranks."""
    made = formulas.batch(PROMPTS, LENGTHS, VOCAB)
    made["kl"] = [torch.randn(n, generator=torch.Generator().manual_seed(n)) for n in LENGTHS]
    for mask in made["loss_masks"]:
        mask[0] = 1
    return made


def vocabulary(rank: int, folder: str) -> dict[str, Any]:
    """Uneven slices of the vocabulary, whole sequences."""
    megatron(dist.group.WORLD, 1, 0, None)
    whole = batch()
    logits = (whole["logits"][..., :CUT] if rank == 0 else whole["logits"][..., CUT:]).clone().requires_grad_()
    loss, metrics = slime.loss(formulas.options(**ARGS), whole, logits, formulas.reducer(LENGTHS, whole["loss_masks"]))
    loss.backward()
    return {"loss": loss.detach(), "metrics": metrics, "grad": logits.grad}


# --------------------------------------------------------------------------------------------------------- contexts
def positions(total: int, rank: int) -> list[int]:
    """Of a sequence on a rank of two: its chunk and the one from behind, of four; the last are padding."""
    width = (total + 3) // 4
    return [*range(rank * width, (rank + 1) * width), *range((3 - rank) * width, (4 - rank) * width)]


def held(total: int, length: int, rank: int) -> list[int]:
    """The tokens of a response that a rank has the logits of."""
    before = total - length - 1
    return [p - before for p in positions(total, rank) if before <= p < total - 1]


def cut(values: list[Tensor], totals: list[int], rank: int) -> list[Tensor]:
    """What a rank holds of each response."""
    return [x[held(total, x.shape[0], rank)] for x, total in zip(values, totals, strict=True)]


def local_logits(logits: Tensor, totals: list[int], rank: int) -> Tensor:
    """[1, T / 2, V], NaN where a chunk reaches beyond its sequence."""
    rows, start = [], 0
    for total in totals:
        padded = torch.cat([logits[0, start : start + total], torch.full((total + 4, VOCAB), torch.nan)])
        rows.append(padded[positions(total, rank)])
        start += total
    return torch.cat(rows)[None]


def local_reducer(whole: dict[str, Any], rank: int) -> Callable[[Tensor], Tensor]:
    """slime's under context parallelism: a rank's part of the samples' means."""
    masks = cut(whole["loss_masks"], whole["total_lengths"], rank)
    counts = [max(int(m.sum()), 1) for m in whole["loss_masks"]]

    def reduce(x: Tensor) -> Tensor:
        parts = x.split([m.shape[0] for m in masks])
        return sum(((y * m).sum() / n for y, m, n in zip(parts, masks, counts, strict=True)), x.sum() * 0)

    return reduce


def context(rank: int, alone: Any) -> dict[str, Any]:
    """Slices of the sequences, the whole vocabulary."""
    megatron(alone, 2, rank, dist.group.WORLD)
    whole = batch()
    totals = whole["total_lengths"]
    mine = dict(whole)
    for key in ("log_probs", "rollout_log_probs", "ref_log_probs", "advantages", "values", "kl"):
        mine[key] = cut(whole[key], totals, rank)
    logits = local_logits(whole["logits"], totals, rank).requires_grad_()
    args = formulas.options(**ARGS)
    loss, metrics = slime.loss(args, mine, logits, local_reducer(whole, rank))
    loss.backward()
    found: dict[str, Any] = {"loss": loss.detach(), "metrics": metrics, "grad": logits.grad}
    for estimator in ESTIMATORS:
        data = dict(mine)
        slime.advantages(formulas.options(advantage_estimator=estimator, kl_coef=0.1, gamma=0.95, lambd=0.9), data)
        found[estimator] = data["advantages"], data["returns"]
    data = dict(mine)
    slime.advantages(formulas.options(fastreward_advantages="reinforce_plus_plus"), data)
    found["recipe"] = data["advantages"]
    surrogate = torch.ones(sum(x.shape[0] for x in mine["log_probs"]))
    given = {"train_log_probs": mine["log_probs"], "rollout_log_probs": mine["rollout_log_probs"]}
    given |= {key: mine[key] for key in ("loss_masks", "total_lengths", "response_lengths")}
    found["rejected"] = slime.tis(formulas.options(fastreward_tis="seq_mis(high=1.2)"), pg_loss=surrogate, **given)
    found["reduced"] = slime.pg_loss_reducer(totals, LENGTHS, whole["loss_masks"])(surrogate)
    for name in ("gspo", "deepseek_v3_2(threshold=1.0)"):
        try:
            slime.loss(formulas.options(fastreward_loss=name), mine, logits, local_reducer(whole, rank))
        except NotImplementedError as error:
            found[name] = str(error)
    return found

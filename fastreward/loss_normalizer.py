"""The denominator of a loss over the batches of several ranks."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastreward._arguments import check
from fastreward._arguments.arrays import accepts_arrays
from fastreward._arguments.groups import GroupIds, numbered_groups
from fastreward._arguments.options import AGGREGATIONS, Aggregation
from fastreward._arguments.tokens import token_bounds
from fastreward.distributed.ranks import Ranks, refused_together

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


@accepts_arrays
@refused_together
def loss_normalizer(
    mask: Tensor,
    *,
    aggregation: Aggregation = "token-mean",
    cu_seqlens: Tensor | None = None,
    group_ids: GroupIds | None = None,
    group_size: int | None = None,
    process_group: ProcessGroup | None = None,
    averaged: bool = False,
) -> Tensor:
    """What a loss over the batches of all data-parallel ranks is divided by: `normalizer=` of the losses.

    With it each rank's loss is its part of the whole's: the parts add up to the loss of all batches in one, and so do
    their gradients, whatever the ranks' lengths; a rank on which nothing counts has a loss of 0. For gradient
    accumulation give the mask of all micro-batches.

    Args:
        mask: [B, T], or packed [N] with cu_seqlens; bool, integer or float, nonzero = a token that counts (of
            preferences [P, 1]: the pairs, with "token-mean").
        aggregation: the loss's: token-mean (counted tokens), seq-mean-token-mean and seq-mean-token-sum (sequences with
            a counted token), seq-mean-token-sum-norm (those times the widest rank's T, or its longest sequence where
            packed), group-mean (groups with a counted token; each lies on one rank as a whole), token-sum (1).
        cu_seqlens: integers [B + 1], the packed sequences' bounds, from 0 to N.
        group_ids, group_size: as in `policy_loss`, for group-mean.
        process_group: the data-parallel ranks (not those that split the vocabulary or the sequences' tokens, which hold
            the same mask or parts of it). 48 bytes of each cross.
        averaged: DDP and FSDP average gradients over the ranks, where the parts' would have to be added up; True makes
            up for it, by as many ranks: the mean of the ranks' losses then is the whole's.

    Returns:
        float32 [], on the mask's device, at least 1 (over as many ranks, where averaged).

    Raises:
        TypeError, ValueError: wrong dtype, shape or name.
    """
    check.choice("aggregation", aggregation, AGGREGATIONS)
    averaged = check.flag("averaged", averaged)
    counted = check.constant("mask", check.reals("mask", mask)) != 0
    bounds = token_bounds(cu_seqlens, counted, "mask")
    if bounds is None and counted.ndim != 2:
        raise ValueError(f"mask: expected [B, T], or [N] with cu_seqlens, got shape {list(counted.shape)}")
    if bounds is None:
        there, width = counted.any(-1), counted.new_full((), counted.shape[1], dtype=torch.int64)
    else:
        before = torch.nn.functional.pad(counted.cumsum(0), (1, 0))[bounds]
        there, width = before.diff() > 0, torch.nn.functional.pad(bounds.diff(), (1, 0)).amax()
    groups = numbered_groups(group_ids, group_size, there.shape[0], counted)
    if aggregation == "group-mean" and groups is None:
        raise ValueError("group_ids: aggregation 'group-mean' is over groups; pass group_ids=... or group_size=...")
    of_groups = torch.zeros_like(width)
    if groups is not None:
        of_groups = torch.zeros_like(groups).index_add(0, groups, there.long()).count_nonzero()
    said = torch.stack([counted.sum(), there.sum(), width, of_groups])
    ranks = None if process_group is None else Ranks.of(process_group)
    same = {"aggregation": aggregation, "averaged": averaged}
    everyone = said.unsqueeze(0) if ranks is None else ranks.meet(*said.unbind(), same=same)
    tokens, sequences, _, all_groups = everyone.sum(0).double().unbind()
    total = {
        "token-mean": tokens,
        "token-sum": torch.ones_like(tokens),
        "seq-mean-token-mean": sequences,
        "seq-mean-token-sum": sequences,
        "seq-mean-token-sum-norm": sequences * everyone[:, 2].amax(),
        "group-mean": all_groups,
    }[aggregation].clamp(min=1.0)
    return (total / ranks.count if averaged and ranks is not None else total).float()

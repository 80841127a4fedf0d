"""Divergences over k ids of the vocabulary and one bucket for the rest: distributions of k + 1 events."""

from __future__ import annotations

import math
from typing import Final

import torch
from torch import Tensor

from fastreward._arguments import check
from fastreward._arguments.logits import check_distinct_ids, ids_of_tokens
from fastreward._loss_call.divergence import token_divergence
from fastreward._runtime.dispatch import select
from fastreward.language.define import Loss

#: What the ids have together at most, so that the rest's log-prob is finite.
_MOST: Final = math.exp(-1e-7)


def ids_of_buckets(token_ids: Tensor, labels: Tensor, vocab: int, mask: Tensor | None) -> Tensor:
    """[k] or [..., k], checked, to [N, k]; negative = no id."""
    ids = ids_of_tokens(token_ids, labels)
    if not ids.shape[1]:
        raise ValueError(f"token_ids: expected at least one id per token, got shape {list(token_ids.shape)}")
    if check.values_checked(token_ids, labels):
        check_distinct_ids("token_ids", token_ids, vocab, None if token_ids.ndim == 1 else mask)
    return ids


def given_logprobs(teacher_logprobs: Tensor, ids: Tensor, labels: Tensor, mask: Tensor | None) -> Tensor:
    """The teacher's log-probs [..., k], checked, to [N, k]; 0 where masked out."""
    check.floats("teacher_logprobs", teacher_logprobs)
    check.shape("teacher_logprobs", teacher_logprobs, (*labels.shape, ids.shape[1]), "one per token and id")
    check.same_device("teacher_logprobs", teacher_logprobs, "token_ids", ids)
    if check.values_checked(teacher_logprobs):
        anything = ids.reshape(teacher_logprobs.shape) < 0
        anything = anything if mask is None else anything | (mask == 0).unsqueeze(-1)
        check.every("teacher_logprobs", (teacher_logprobs <= 0) | anything, teacher_logprobs, "log-probs, at most 0")
    flat = teacher_logprobs.reshape(-1, ids.shape[1])
    return flat if mask is None else torch.where((mask != 0).reshape(-1, 1), flat, 0.0)


def bucket_divergence(
    student: Tensor,  # [N, k] log-probs of the ids
    teacher: Tensor,  # [N, k]
    ids: Tensor,  # [N, k], negative = no id
    divergence: Loss,
    tail: bool,
    mask: Tensor | None,  # [N] bool
) -> Tensor:
    """The divergence f32 [N]; 0 where masked out, and where a row has no id. Gradients flow to both sides."""
    absent = ids < 0
    counts = ~absent.all(-1) if mask is None else mask & ~absent.all(-1)
    x, y = _events(student, absent, tail), _events(teacher, absent, tail)
    found: tuple[Tensor, ...] = token_divergence(
        x,
        y,
        torch.full_like(ids[:, 0], -1),
        None,
        1.0,
        None,
        1.0,
        counts,
        [divergence.scalars[name] for name in sorted(divergence.scalars)],
        divergence.divergence_plan(),
        2 if y.requires_grad else 1 if x.requires_grad else 0,
        False,
        False,
        select("divergence", x),
    )
    return found[0][0]


def _events(logprobs: Tensor, absent: Tensor, tail: bool) -> Tensor:
    """Log-probs f32 of the ids and, with a tail, of the rest: what a softmax leaves, or renormalises, as it is."""
    there = logprobs.double().masked_fill(absent, -torch.inf)
    if tail:
        rest = (-there.exp().sum(-1, keepdim=True).clamp(max=_MOST)).log1p()
        there = torch.cat([there, rest], -1)
    return there.float()

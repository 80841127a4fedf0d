"""Divergence of a student's distribution from a teacher's, token by token, from the logits of both."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, NamedTuple

import torch
from torch import Tensor

from fastreward import divergences
from fastreward._arguments import check
from fastreward._arguments.arrays import accepts_arrays
from fastreward._arguments.logits import (
    check_logits,
    check_own_memory,
    check_rows,
    check_token_ids,
    row_mask,
    temperatures,
)
from fastreward._arguments.numbers import Number
from fastreward._loss_call.buckets import bucket_divergence, given_logprobs, ids_of_buckets
from fastreward._loss_call.divergence import STATISTICS, DivergenceStats, statistics_of
from fastreward._loss_call.divergence import token_divergence as op
from fastreward._runtime.dispatch import select
from fastreward._runtime.layout import INDICES, flags_of
from fastreward._runtime.logprobs import token_logprobs as logprobs_op
from fastreward.distributed.divergence import DivergenceShard, sharded_token_divergence
from fastreward.distributed.ranks import Ranks, refused_together
from fastreward.distributed.vocab_parallel import Shard, sharded_token_logprobs
from fastreward.divergences import Loss
from fastreward.language.divergence_programs import registered_programs

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

#: By their names here, with their defaults (a divergence can't be made while torch.compile traces).
_NAMED: Final = {
    "forward-kl": divergences.forward_kl(),
    "reverse-kl": divergences.reverse_kl(),
    "jsd": divergences.jsd(),
    "adaptive-kl": divergences.adaptive_kl(),
    "skewed-forward-kl": divergences.skewed_forward_kl(),
    "skewed-reverse-kl": divergences.skewed_reverse_kl(),
    "total-variation": divergences.total_variation(),
    "alpha": divergences.alpha(),
    "hellinger": divergences.hellinger(),
}
NAMES: Final = tuple(_NAMED)
#: What token_logprobs has to compute for an output.
_STATISTIC_OF: Final = {"entropy": "entropy", "teacher_entropy": "entropy", "top1_agreement": "argmax"}
_ARGMAX: Final = INDICES.index("argmax")
#: More ids than any vocabulary has: where it is split, its size is known when the ranks have met.
_UNKNOWN: Final = 2**62


@accepts_arrays
@refused_together
def token_divergence(
    logits: Tensor,
    teacher_logits: Tensor | None = None,
    *,
    divergence: str | Loss = "reverse-kl",
    temperature: Number = 1.0,
    teacher_temperature: Number | None = None,
    mask: Tensor | None = None,
    labels: Tensor | None = None,
    outputs: tuple[str, ...] = (),
    token_ids: Tensor | None = None,
    teacher_logprobs: Tensor | None = None,
    tail: bool = True,
    process_group: ProcessGroup | None = None,
    inplace_backward: bool = False,
) -> DivergenceStats:
    """Divergence between softmax(logits / temperature) and softmax(teacher_logits / teacher_temperature) per token.

    Both are read once from memory (on a GPU twice, unless it is a KL), and once more for the gradient, which is exact
    and written once. No tensor of the size of the logits is made but that gradient, and with inplace_backward not even
    that.

    Args:
        logits: the student's, [..., V] float32, bfloat16 or float16; any leading strides, unit stride along V.
        teacher_logits: the teacher's, same shape, of any of these dtypes. It gets a gradient too if it requires one.
            None: with teacher_logprobs.
        divergence: "forward-kl", "reverse-kl", "adaptive-kl", "jsd", "skewed-forward-kl", "skewed-reverse-kl",
            "total-variation", "alpha", "hellinger", each with its defaults; or one of `fastreward.divergences` with
            others, or your own (`fastreward.divergences.define`).
        temperature: a positive number or 0-d tensor, or one per token [...] (anything where masked out).
        teacher_temperature: the same; None: that of the student.
        mask: [...] bool, integer or float, nonzero = compute; other rows are not read, all theirs is 0.
        labels: [...] integers in [0, V) (anything where masked out), for the output logprobs.
        outputs: what to give besides, of entropy, teacher_entropy (nats), logprobs (the student's, of the labels),
            top1_agreement (1 where both have the same largest logit, else 0; NaN where the divergence is; no
            gradient).
        token_ids: integers [k] or [..., k] in [0, V), unique in a row, negative = padding: the divergence is over these
            ids alone, the student's or the teacher's likeliest, say. The other outputs stay those of the vocabulary.
        teacher_logprobs: with token_ids: the teacher's log-probs of them, [..., k] of any float dtype, at its
            temperature, where its logits are not at hand. It gets a gradient if it requires one.
        tail: with token_ids: what the ids leave of either side is one event more (at least 1e-7, as TRL has it), so
            that both sum to 1; False: both are renormalised over the ids. A token without an id has divergence 0.
        process_group: both logits are this rank's contiguous slice of the vocabulary, in rank order (of any width, 0
            too; set what only pads the vocabulary to -inf, or slice it off); labels are global, and all but the logits
            is the same on every rank. Per token 3 floats of either side cross, 2 more with outputs, then one sum, and
            one more for each side that gets a gradient (with token_ids their log-probs instead); never a logit. Results
            have the same bits on every rank; each rank's gradients are those of its slices.
        inplace_backward: the backward overwrites `logits` with its gradient. Only where nothing else needs the logits
            afterwards.

    Returns:
        DivergenceStats(divergence, entropy, teacher_entropy, logprobs, top1_agreement), float32 [...], None where not
        asked for. Gradients flow through divergence, entropy and logprobs to logits, through divergence alone to
        teacher_logits; no second derivatives.
        A log-prob below -10,000 counts as -10,000: a token that the teacher forbids (-inf) costs 10,000 nats times the
        student's probability in reverse_kl, and its gradient says so; where neither allows it, nothing. A row of only
        -inf, or with NaN or +inf, on either side gives NaN.

    Raises:
        TypeError, ValueError: wrong dtype, shape, device, label, id or name, before anything runs. Values are checked
            on the CPU; on a GPU only with FASTREWARD_DEBUG=1, under torch.compile never: there an illegal id gives NaN.
    """
    sliced = process_group is not None
    check_rows(logits, sliced=sliced)
    places = torch.zeros(logits.shape[:-1], dtype=torch.int64, device=logits.device) - 1 if labels is None else labels
    check_logits(logits, places, sliced=sliced)
    check_teacher(teacher_logits, token_ids, teacher_logprobs, teacher_temperature)
    if teacher_logits is not None:
        check_rows(teacher_logits, "teacher_logits", sliced=sliced)
        check.shape("teacher_logits", teacher_logits, logits.shape, "that of logits")
        check.same_device("teacher_logits", teacher_logits, "logits", logits)
    check_outputs(outputs, labels, teacher_logprobs)
    chosen, tail = chosen_divergence(divergence), check.flag("tail", tail)
    inplace_backward = check.flag("inplace_backward", inplace_backward)
    if inplace_backward:
        check_own_memory(logits)
        if teacher_logits is not None and logits.is_contiguous() and teacher_logits.is_contiguous():
            check.own_memory("teacher_logits", teacher_logits, [logits])  # as of self-distillation
    rows = row_mask(mask, places)
    scalar, per_token = temperatures(temperature, places, mask)
    if teacher_temperature is None:
        teacher_scalar, teacher_per_token = scalar, per_token
    else:
        teacher_scalar, teacher_per_token = temperatures(teacher_temperature, places, mask, "teacher_temperature")
    if sliced and registered_programs(chosen.divergence_plan()).adaptive:
        raise ValueError("divergence: adaptive_kl is not there over a vocabulary that is split over process_group")
    if labels is not None and not sliced and check.values_checked(logits, labels):
        check_token_ids("labels", labels, logits.shape[-1], mask)
    student = _Side(logits, per_token, scalar, inplace_backward)
    teacher = None if teacher_logits is None else _Side(teacher_logits, teacher_per_token, teacher_scalar, False)
    ranks = None if process_group is None else Ranks.of(process_group)
    if token_ids is not None:
        ids = ids_of_buckets(token_ids, places, _UNKNOWN if sliced else logits.shape[-1], mask)
        given = None if teacher_logprobs is None else given_logprobs(teacher_logprobs, ids, places, mask)
        found = _over_ids(student, teacher, given, ids, chosen, tail, places, rows, outputs, ranks)
    else:
        assert teacher is not None
        found = _over_vocabulary(student, teacher, chosen, places, rows, outputs, ranks)
    lead = tuple(places.shape)
    return DivergenceStats(**{name: x.reshape(lead) for name, x in found.items()})


class _Side(NamedTuple):
    """The logits of one side [..., V], their temperatures, and whether their gradient goes over them."""

    logits: Tensor
    temperature: Tensor | None  # f64 [N]
    scalar: float  # where that is None
    inplace: bool


def _over_vocabulary(
    student: _Side,
    teacher: _Side,
    chosen: Loss,
    labels: Tensor,
    rows: Tensor | None,
    outputs: tuple[str, ...],
    ranks: Ranks | None,
) -> dict[str, Tensor]:
    """The divergence [N] and the outputs."""
    call = DivergenceShard(
        labels.reshape(-1).long(),
        student.temperature,
        student.scalar,
        teacher.temperature,
        teacher.scalar,
        rows,
        [chosen.scalars[name] for name in sorted(chosen.scalars)],
        chosen.divergence_plan(),
        2 if teacher.logits.requires_grad else 1 if student.logits.requires_grad else 0,
        bool(outputs),
        student.inplace,
        select("divergence", student.logits),
    )
    if ranks is None:
        found, own, other, agreement = op(student.logits, teacher.logits, *call)
    else:
        sides = (student.logits, teacher.logits)
        found, own, other, agreement = sharded_token_divergence(*sides, call, ranks, labelled="logprobs" in outputs)
    return statistics_of(found[0], own, other, agreement, outputs)


def _over_ids(
    student: _Side,
    teacher: _Side | None,
    teacher_logprobs: Tensor | None,  # [N, k], instead of it
    ids: Tensor,  # [N, k], negative = padding
    chosen: Loss,
    tail: bool,
    labels: Tensor,
    rows: Tensor | None,
    outputs: tuple[str, ...],
    ranks: Ranks | None,
) -> dict[str, Tensor]:
    """The divergence [N] over the ids and their rest, and the outputs; either side's logits are read once."""
    flags = flags_of(tuple(name for output, name in _STATISTIC_OF.items() if output in outputs))
    wanted = labels.reshape(-1).long() if ranks is None or "logprobs" in outputs else torch.zeros_like(ids[:, 0])
    if ranks is not None:
        same = {"divergence": f"{chosen.divergence_plan()} {chosen.scalars}", "tail": tail}
        ranks.meet(same={**same, "teacher_logits": teacher is not None, "teacher_logprobs": teacher_logprobs})

    def read(side: _Side) -> tuple[Tensor, Tensor, Tensor]:
        call = Shard(
            wanted, side.temperature, side.scalar, rows, None, None, ids.clamp(min=0), flags, side.inplace,
            select("logprobs", side.logits),
        )  # fmt: skip
        if ranks is not None:
            return sharded_token_logprobs(side.logits, call, ranks)
        found: tuple[Tensor, Tensor, Tensor] = logprobs_op(side.logits, *call)
        return found

    own, places, own_logprobs = read(student)
    other, agreement = torch.empty_like(own), torch.empty_like(own[0])
    if teacher is not None:
        other, other_places, teacher_logprobs = read(teacher)
        agreement = (places[_ARGMAX] == other_places[_ARGMAX]).float()
        agreement = agreement if rows is None else agreement * rows
    assert teacher_logprobs is not None
    divergence = bucket_divergence(own_logprobs, teacher_logprobs, ids, chosen, tail, rows)
    return statistics_of(divergence, own, other, agreement, outputs)


# ---------------------------------------------------------------------------------------------------------- checks
def check_teacher(
    teacher: object, token_ids: object, teacher_logprobs: object, temperature: object, what: str = "teacher_logits"
) -> None:
    """One of the teacher's logits, called `what`, and its log-probs is given, and what goes with it."""
    if teacher_logprobs is None and teacher is None:
        raise ValueError(f"{what}: expected, or token_ids with teacher_logprobs")
    if teacher_logprobs is None:
        return
    if teacher is not None:
        raise ValueError(f"teacher_logprobs: stand for {what}; pass one of them")
    if token_ids is None:
        raise ValueError("token_ids: needed with teacher_logprobs: the ids that they are of")
    if temperature is not None:
        raise ValueError("teacher_temperature: teacher_logprobs are taken as they are, at the teacher's temperature")


def check_outputs(outputs: tuple[str, ...], labels: Tensor | None, teacher_logprobs: Tensor | None) -> None:
    """Names that there are, labels where they are needed, and nothing of a vocabulary that is not there."""
    if outputs:
        check.names("outputs", outputs, STATISTICS)
    if ("logprobs" in outputs) != (labels is not None):
        raise ValueError("labels: needed for the output 'logprobs', and only for it")
    for name in ("teacher_entropy", "top1_agreement"):
        if teacher_logprobs is not None and name in outputs:
            raise ValueError(f"outputs: {name!r} is of the teacher's whole vocabulary, not of teacher_logprobs")


def chosen_divergence(divergence: str | Loss) -> Loss:
    """By name, or as it is."""
    if isinstance(divergence, str):
        check.choice("divergence", divergence, NAMES)
        return _NAMED[divergence]
    if not isinstance(divergence, Loss):
        raise TypeError(
            "divergence: expected a name or what fastreward.divergences gives, as in divergences.jsd(0.1); "
            f"got {type(divergence).__name__}{', which has to be called' if callable(divergence) else ''}"
        )
    if divergence.tensors:
        raise ValueError(
            f"divergence: expected numbers as parameters, got a tensor for {', '.join(divergence.tensors)}"
        )
    return divergence

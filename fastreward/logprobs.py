"""Log-probs, entropy and the other statistics of every token, from the logits, in one pass over them."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

from torch import Tensor

from fastreward._arguments import check
from fastreward._arguments.arrays import accepts_arrays
from fastreward._arguments.logits import (
    check_kept_ids,
    check_logits,
    check_own_memory,
    check_token_ids,
    ids_of_tokens,
    kept_set,
    row_mask,
    temperatures,
)
from fastreward._arguments.numbers import Number
from fastreward._runtime.dispatch import select
from fastreward._runtime.layout import ALL_OUTPUTS, flags_of
from fastreward._runtime.logprobs import TokenStats, collect
from fastreward._runtime.logprobs import token_logprobs as op
from fastreward.distributed.ranks import Ranks, refused_together
from fastreward.distributed.vocab_parallel import Shard, sharded_token_logprobs

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


# ------------------------------------------------------------------------------------------------- public function
@accepts_arrays
@refused_together
def token_logprobs(
    logits: Tensor,
    labels: Tensor,
    *,
    temperature: Number = 1.0,
    mask: Tensor | None = None,
    outputs: tuple[str, ...] = ("logprobs",),
    token_ids: Tensor | None = None,
    kept_tokens: Tensor | None = None,
    process_group: ProcessGroup | None = None,
    inplace_backward: bool = False,
    keep: Tensor | None = None,
) -> TokenStats:
    """Log-prob of each label under softmax(logits / temperature), and the row's other statistics, in one pass.

    Args:
        logits: [..., V] float32, bfloat16 or float16; any leading strides, unit stride along V. Never copied.
        labels: [...] integers in [0, V) (anything where masked out).
        temperature: a positive number or 0-d tensor, or one per token [...] (anything where masked out).
        mask: [...] bool, integer or float, nonzero = compute; other rows are not read, all theirs is 0.
        outputs: any of logprobs, entropy (nats), logsumexp, label_logit, mean_logit (all of the tempered logits),
            log_sum_sq_probs (log of the sum of squared probabilities), max_logprob, argmax (first of equals), rank
            (number of tokens above the label; 0 = top), id_logprobs ([..., K], needs token_ids).
        token_ids: integers [K] or [..., K] in [0, V), whose log-probs id_logprobs gives.
        kept_tokens: the tokens that sampling kept (top-k, top-p): bool [..., V], or ids [..., k] in [0, V), unique in a
            row, negative = padding (anything where masked out). Probabilities are renormalised over them; with ids only
            those logits are read.
        process_group: the logits are this rank's contiguous slice of the vocabulary, in rank order (of any width, 0
            too; set what only pads the vocabulary to -inf, or slice it off), as is a boolean kept_tokens; labels and
            other ids are global, and all but the logits is the same on every rank. Per token 3 floats cross, one more
            for each of entropy, log_sum_sq_probs, mean_logit and argmax, two for rank, K for id_logprobs; never a
            logit. Results have the same bits on every rank; each rank's gradient is that of its slice.
        inplace_backward: the backward overwrites `logits` with its gradient (no second [..., V] tensor). Only where
            nothing else needs the logits afterwards.
        keep: the old name of kept_tokens, deprecated.

    Returns:
        TokenStats with the asked-for outputs, each [...] (id_logprobs [..., K]), float32 (argmax, rank int64).
        Gradients flow to logits through logprobs, entropy, logsumexp, log_sum_sq_probs and id_logprobs, together in one
        pass, but no second derivatives. A row of only -inf gives NaN, as torch, and so does one with NaN or +inf (whose
        argmax is unspecified, whose logsumexp is NaN or +inf); a label outside `kept_tokens` has log-prob -inf.

    Raises:
        TypeError, ValueError: wrong dtype, shape, device, label or name, before anything runs. Values are checked on
            the CPU; on a GPU only with FASTREWARD_DEBUG=1, under torch.compile never: there an illegal label or token
            id gives NaN, and a kept id outside [0, V) counts as padding.
    """
    _check_names(outputs, token_ids)
    if keep is not None:
        if kept_tokens is not None:
            raise ValueError("keep: is the old name of kept_tokens; pass kept_tokens alone")
        warnings.warn("keep: is called kept_tokens now", DeprecationWarning, stacklevel=3)
        kept_tokens = keep
    check_logits(logits, labels, sliced=process_group is not None)
    inplace_backward = check.flag("inplace_backward", inplace_backward)
    if inplace_backward:
        check_own_memory(logits)
    lead = tuple(labels.shape)
    rows = row_mask(mask, labels)
    scalar, per_token = temperatures(temperature, labels, mask)
    vocab = logits.shape[-1]
    keep_mask, keep_ids = kept_set(kept_tokens, logits)
    ids = None if token_ids is None else ids_of_tokens(token_ids, labels)
    flat = labels.reshape(-1).long()
    if process_group is not None:
        shard = Shard(
            flat, per_token, scalar, rows, keep_mask, keep_ids, ids, flags_of(outputs), inplace_backward,
            select("logprobs", logits),
        )  # fmt: skip
        return collect(outputs, *sharded_token_logprobs(logits, shard, Ranks.of(process_group)), lead)
    if check.values_checked(logits, labels):
        check_token_ids("labels", labels, vocab, mask)
        if token_ids is not None:
            check_token_ids("token_ids", token_ids, vocab, None if mask is None or token_ids.ndim == 1 else mask)
        if kept_tokens is not None and keep_ids is not None:
            check_kept_ids(kept_tokens, vocab, mask)
    backend = select("logprobs", logits)
    values, indices, id_logprobs = op(
        logits, flat, per_token, scalar, rows, keep_mask, keep_ids, ids, flags_of(outputs), inplace_backward, backend
    )
    return collect(outputs, values, indices, id_logprobs, lead)


# ---------------------------------------------------------------------------------------------------------- checks
def _check_names(outputs: tuple[str, ...], token_ids: Tensor | None) -> None:
    check.names("outputs", outputs, ALL_OUTPUTS)
    if ("id_logprobs" in outputs) != (token_ids is not None):
        raise ValueError("token_ids: needed for the output 'id_logprobs', and only for it")

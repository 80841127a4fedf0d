"""Rows of logits and what is given beside them: labels, temperatures, row masks, kept sets, further token ids."""

from __future__ import annotations

import torch
from torch import Tensor

from fastreward._arguments import check
from fastreward._arguments.numbers import Number, number
from fastreward._arguments.transforms import transformed

LOGITS_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
#: Between these a temperature and its reciprocal are finite in float64, and 0 logits stay 0.
_COLDEST, _HOTTEST = 1e-300, 1e300


def check_logits(logits: Tensor, labels: Tensor, *, sliced: bool = False) -> None:
    """Logits [..., V] that kernels take as they are, and integer labels [...]. sliced: V may be 0, others have more."""
    check_rows(logits, sliced=sliced)
    check.integers("labels", labels)
    check.shape("labels", labels, logits.shape[:-1], "the logits' shape without V")
    check.same_device("labels", labels, "logits", logits)


def check_rows(logits: Tensor, name: str = "logits", *, sliced: bool = False) -> None:
    """Logits [..., V] that kernels take as they are."""
    check.dtype(name, check.tensor(name, logits), LOGITS_DTYPES)
    if logits.ndim < 1 or (logits.shape[-1] == 0 and not sliced):
        raise ValueError(f"{name}: expected shape [..., V] with V > 0, got {list(logits.shape)}")
    check_unit_stride(logits, name)


def check_unit_stride(logits: Tensor, name: str = "logits") -> None:
    """A row of logits is contiguous."""
    if logits.stride(-1) != 1 and logits.shape[-1] > 1 and logits.numel():
        raise ValueError(f"{name}: expected unit stride along V, got {logits.stride(-1)}; call .contiguous() first")


def check_own_memory(logits: Tensor) -> None:
    """No two rows share an element, which an in-place gradient would overwrite before its second reading."""
    if transformed():
        raise NotImplementedError("fastreward: a gradient in place is not available under torch.func or dual tensors")
    steps = [(stride, size) for stride, size in zip(logits.stride(), logits.shape, strict=True) if size > 1]
    if torch.compiler.is_compiling():  # symbols can't be sorted: what `expand` makes is all that is seen
        steps = [step for step in steps if step[0] == 0]
    extent = 1
    for stride, size in [] if 0 in logits.shape else sorted(steps):
        if stride < extent:
            raise ValueError(
                "logits: expected rows that share no memory with inplace_backward=True, "
                f"got strides {list(logits.stride())} for shape {list(logits.shape)}"
            )
        extent += stride * (size - 1)


def check_token_ids(name: str, ids: Tensor, vocab: int, mask: Tensor | None) -> None:
    """All of `ids` [..., or ..., k] that are not masked out lie in the vocabulary."""
    ids = ids.long()  # a narrow dtype may not hold V
    if _all_below(ids, vocab):  # one pass finds whether, several where
        return
    good = (ids >= 0) & (ids < vocab) | _masked_out(mask, ids)
    check.every(name, good, ids, f"integers in [0, {vocab}), the vocabulary of logits")


def _all_below(ids: Tensor, limit: int) -> bool:
    """Whether ids that have an address lie in [0, limit)."""
    if type(ids) is not Tensor or transformed() or not ids.is_cpu or not ids.is_contiguous():
        return False
    from fastreward._core import ids_below

    return ids_below(ids.data_ptr(), ids.numel(), limit)


def temperatures(
    temperature: Number, labels: Tensor, mask: Tensor | None, name: str = "temperature"
) -> tuple[float, Tensor | None]:
    """(scalar, None) or (1.0, f64 [N]): a reciprocal that is rounded to f32 costs a large logit its last digits.

    Both have a finite reciprocal, which a 0 can be multiplied by. A temperature under the mask may be anything.
    """
    if not isinstance(temperature, Tensor) or (temperature.ndim == 0 and labels.ndim):
        value = number(name, temperature, labels, check.positive)
        if isinstance(value, Tensor):
            return 1.0, value.clamp(_COLDEST, _HOTTEST).repeat(labels.numel())
        return min(max(value, _COLDEST), _HOTTEST), None
    check.shape(name, temperature, labels.shape, "one per token, as labels")
    check.same_device(name, temperature, "labels", labels)
    if check.values_checked(temperature):
        good = (temperature > 0) & (temperature < torch.inf)
        good = good if mask is None else good | (mask == 0)
        check.every(name, good, temperature, "positive numbers")
    return 1.0, check.constant(name, temperature).reshape(-1).double().clamp(_COLDEST, _HOTTEST)


def row_mask(mask: Tensor | None, labels: Tensor) -> Tensor | None:
    """The mask [...] as bool [N]; None where every row is computed."""
    rows = check.mask(mask, "labels", labels)
    return None if rows is None else (rows if rows.dtype == torch.bool else rows != 0).reshape(-1)


def kept_set(kept_tokens: Tensor | None, logits: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """(boolean mask, None), (None, ids [N, k]) or (None, None)."""
    if kept_tokens is None:
        return None, None
    check.same_device("kept_tokens", check.tensor("kept_tokens", kept_tokens), "logits", logits)
    if kept_tokens.dtype == torch.bool:
        check.shape("kept_tokens", kept_tokens, logits.shape, "a boolean per logit")
        return kept_tokens.contiguous(), None
    if kept_tokens.dtype.is_floating_point or kept_tokens.dtype.is_complex:
        name = str(kept_tokens.dtype).removeprefix("torch.")
        raise TypeError(f"kept_tokens: expected a boolean mask [..., V] or integer ids [..., k], got dtype {name}")
    if kept_tokens.ndim != logits.ndim or kept_tokens.shape[:-1] != logits.shape[:-1]:
        raise ValueError(
            f"kept_tokens: expected a boolean [..., V] or ids [..., k] for logits {list(logits.shape)}, "
            f"got {list(kept_tokens.shape)}"
        )
    if kept_tokens.shape[-1] == 0:
        raise ValueError(f"kept_tokens: expected at least one id per token, got shape {list(kept_tokens.shape)}")
    return None, kept_tokens.reshape(-1, kept_tokens.shape[-1]).long().contiguous()


def check_kept_ids(ids: Tensor, vocab: int, mask: Tensor | None) -> None:
    """Kept ids [..., k] lie below V and are unique within a row, where it is not masked out."""
    if ids.shape[-1] == vocab and bool(((ids == 0) | (ids == 1)).all()):
        boolean = f"a boolean mask [..., {vocab}] (kept_tokens.bool(); integers are ids of kept tokens)"
        check.every("kept_tokens", _distinct(ids.long()) | _masked_out(mask, ids), ids, boolean)
    check_distinct_ids("kept_tokens", ids, vocab, mask)


def check_distinct_ids(name: str, ids: Tensor, vocab: int, mask: Tensor | None) -> None:
    """Ids [..., k] lie below V, negative = padding, and are unique within a row, where it is not masked out."""
    ids, anything = ids.long(), _masked_out(mask, ids)
    below = f"ids below {vocab}, the vocabulary of logits (negative = padding)"
    check.every(name, (ids < vocab) | anything, ids, below)
    check.every(name, _distinct(ids) | anything, ids, "ids unique within a row")


def _distinct(ids: Tensor) -> Tensor:
    """Where an id [..., k] is not that of a place before it; padding always is."""
    ordered, place = ids.sort(dim=-1, stable=True)
    repeats = torch.zeros_like(ids, dtype=torch.bool)
    repeats[..., 1:] = (ordered[..., 1:] == ordered[..., :-1]) & (ordered[..., 1:] >= 0)
    return ~torch.zeros_like(repeats).scatter(-1, place, repeats)


def _masked_out(mask: Tensor | None, ids: Tensor) -> Tensor:
    """Where `ids` [..., or ..., k] may be anything."""
    out = torch.zeros((), dtype=torch.bool, device=ids.device) if mask is None else mask == 0
    return out.unsqueeze(-1) if 0 < out.ndim < ids.ndim else out


def ids_of_tokens(token_ids: Tensor, labels: Tensor) -> Tensor:
    """[K] or [..., K] to [N, K] (row stride 0 where shared)."""
    check.integers("token_ids", token_ids)
    check.same_device("token_ids", token_ids, "labels", labels)
    lead = tuple(labels.shape)
    count = 1
    for n in lead:
        count *= n
    if token_ids.ndim == 0:
        raise ValueError("token_ids: expected ids [K], or [..., K] over the labels' shape, got a single number")
    if token_ids.ndim == 1:
        return token_ids.long().expand(count, -1)
    check.shape("token_ids", token_ids, (*lead, token_ids.shape[-1]), "ids [K], or [..., K] over the labels' shape")
    return token_ids.reshape(count, token_ids.shape[-1]).long()

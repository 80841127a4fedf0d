"""verl's log-probs, entropies and sums of squared probabilities of whole logits, each in one pass over them.

What is returned has verl's dtype: that of the logits, except in the chunked entropy, which is float32. It is computed
in float32 and rounded once. A gradient is never written into the logits: without flash-attn verl doesn't either,
whatever `inplace_backward` says. All of it runs inside torch.compile, in which verl's engines call the entropy.
"""

from __future__ import annotations

import os
from typing import Any, Final

import torch
from torch import Tensor

from fastreward._arguments.logits import LOGITS_DTYPES
from fastreward._arguments.transforms import transformed
from fastreward.logprobs import token_logprobs
from fastreward.patch.bindings import Entry
from fastreward.patch.usage import handed_on
from fastreward.patch.verl.replacement import TORCH, Replacement

_DEVICES: Final = ("cpu", "cuda")


def logprobs_from_logits(stock: Any, logits: Tensor, labels: Tensor, inplace_backward: bool = True) -> Tensor:
    """Log-prob of each label [...] under softmax(logits [..., V])."""
    if not _served(logits, labels) or _has_kernel(stock, logits):
        handed_on()
        return stock(logits, labels, inplace_backward)  # type: ignore[no-any-return]
    return token_logprobs(logits, labels, temperature=1.0).logprobs.to(logits.dtype)


def logprobs_of_labels(stock: Any, logits: Tensor, labels: Tensor) -> Tensor:
    """The same as verl's two forms of it without a kernel."""
    if not _served(logits, labels):
        handed_on()
        return stock(logits, labels)  # type: ignore[no-any-return]
    return token_logprobs(logits, labels, temperature=1.0).logprobs.to(logits.dtype)


def entropy_from_logits(stock: Any, logits: Tensor) -> Tensor:
    """Entropy [...] in nats of softmax(logits [..., V]); a logit of -inf adds nothing, where verl gives NaN."""
    if not _served(logits):
        handed_on()
        return stock(logits)  # type: ignore[no-any-return]
    return _entropy(logits).to(logits.dtype)


def entropy_from_logits_with_chunking(stock: Any, logits: Tensor, chunk_size: int = 2048) -> Tensor:
    """The same of logits [N, V], float32; there are no chunks, as nothing of the logits' size is made."""
    if not _served(logits) or logits.ndim != 2:
        handed_on()
        return stock(logits, chunk_size)  # type: ignore[no-any-return]
    return _entropy(logits)


def calculate_sum_pi_squared_from_logits(stock: Any, logits: Tensor) -> Tensor:
    """Sum of the squared probabilities [...] of softmax(logits [..., V])."""
    if not _served(logits):
        handed_on()
        return stock(logits)  # type: ignore[no-any-return]
    outputs = ("log_sum_sq_probs",)
    return (
        token_logprobs(logits, _no_labels(logits), temperature=1.0, outputs=outputs)
        .log_sum_sq_probs.exp()
        .to(logits.dtype)
    )


def _entropy(logits: Tensor) -> Tensor:
    return token_logprobs(logits, _no_labels(logits), temperature=1.0, outputs=("entropy",)).entropy


def _no_labels(logits: Tensor) -> Tensor:
    return torch.zeros(logits.shape[:-1], dtype=torch.long, device=logits.device)


def _served(logits: Tensor, labels: Tensor | None = None) -> bool:
    """Whether these are logits as fastreward takes them, with a label for each row."""
    return (
        type(logits) in (Tensor, torch.nn.Parameter)
        and logits.layout == torch.strided
        and logits.device.type in _DEVICES
        and logits.dtype in LOGITS_DTYPES
        and logits.ndim >= 2
        and logits.shape[-1] > 0
        and logits.stride(-1) == 1
        and not transformed()  # torch's own code has a forward-mode derivative, and runs under vmap
        and (labels is None or (type(labels) is Tensor and labels.shape == logits.shape[:-1]))
    )


def _has_kernel(stock: Any, logits: Tensor) -> bool:
    """Whether verl has a fused kernel for these, which is its own until both have been timed on a GPU."""
    if logits.device.type == "cpu":
        return False
    flash: bool = getattr(stock, "__globals__", {}).get("FLAH_ATTN_CROSS_ENTROPY_LOSS_AVAILABLE", False)
    return flash and os.environ.get("VERL_DISABLE_FLASH_ATTN_CE", "0") != "1"


def _rows(logits: Tensor, *_: Any, **__: Any) -> int:
    return logits.numel() // max(logits.shape[-1], 1)


_WHAT: Final = "fastreward.token_logprobs"
REPLACEMENTS: Final = (
    Replacement(
        f"{TORCH}.logprobs_from_logits",
        ("logits", "labels", "inplace_backward"),
        logprobs_from_logits,
        _WHAT,
        "one pass over the logits instead of a loop over the rows",
        _rows,
    ),
    *(
        Replacement(
            f"{TORCH}.{name}", ("logits", "labels"), logprobs_of_labels, _WHAT, "one pass over the logits", _rows
        )
        for name in ("logprobs_from_logits_v2", "logprobs_from_logits_naive")
    ),
    Replacement(
        f"{TORCH}.entropy_from_logits",
        ("logits",),
        entropy_from_logits,
        _WHAT,
        "one pass, no softmax in memory; inside torch.compile too",
        _rows,
    ),
    Replacement(
        f"{TORCH}.entropy_from_logits_with_chunking",
        ("logits", "chunk_size"),
        entropy_from_logits_with_chunking,
        _WHAT,
        "one pass, no copy in float32",
        _rows,
    ),
    Replacement(
        f"{TORCH}.calculate_sum_pi_squared_from_logits",
        ("logits",),
        calculate_sum_pi_squared_from_logits,
        _WHAT,
        "one pass instead of three",
        _rows,
    ),
)
KEPT: Final = (
    Entry(
        f"{TORCH}.logprobs_from_logits on a GPU with flash-attn",
        "flash-attn's kernel",
        "no GPU has timed fastreward's beside it",
    ),
    Entry(f"{TORCH}.log_probs_from_logits_response and kin", "verl's own", "they call logprobs_from_logits"),
    Entry("float64 logits, DTensor, nested tensors", "verl's own", "fastreward takes plain float32, bfloat16, float16"),
)

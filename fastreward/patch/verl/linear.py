"""verl's fused LM heads: hidden states to log-probs and entropies, without the logits."""

from __future__ import annotations

import functools
import inspect
import math
from dataclasses import dataclass
from numbers import Real
from types import ModuleType
from typing import Any, Final

import torch
from torch import Tensor

from fastreward._arguments.logits import LOGITS_DTYPES
from fastreward._arguments.transforms import transformed
from fastreward.linear_logprobs import linear_token_logprobs
from fastreward.patch.bindings import Entry, Report
from fastreward.patch.source import Unrecognised
from fastreward.patch.usage import handed_on
from fastreward.patch.verl.replacement import Replacement

_TORCH_HEAD: Final = "verl.utils.experimental.torch_functional"
_TRITON_HEAD: Final = "verl.utils.kernel.linear_cross_entropy"


def fused_linear(
    stock: Any,
    hidden_states: Tensor,  # [N, H] or [B, T, H]
    vocab_weights: Tensor,  # [V, H]
    input_ids: Tensor,  # [N] or [B, T]
    temperature: Any = 1.0,
    chunk_size: int = 512,
) -> tuple[Tensor, Tensor]:
    """(log-probs float32, entropies in the dtype of the hidden states), in the shape of input_ids."""
    number = _number(temperature)
    if number is None or not _served(hidden_states, vocab_weights, input_ids, ("cpu", "cuda")):
        handed_on()
        return stock(hidden_states, vocab_weights, input_ids, temperature, chunk_size)  # type: ignore[no-any-return]
    # verl's chunk_size is of rows; fastreward picks the tile that suits its own.
    logprobs, entropy = _head(hidden_states, vocab_weights, input_ids, number)
    return logprobs, entropy.to(hidden_states.dtype)


def linear_cross_entropy(
    stock: Any,
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    temperature: Any = 1.0,
    reduction: str = "none",
    dist_process_group: Any = None,
) -> tuple[Tensor, Tensor]:
    """(log-probs, entropies), float32 [N], whatever shape the labels have. verl's own kernel, on a GPU, is its own."""
    number, plain = _number(temperature), reduction.lower() == "none" and dist_process_group is None
    labelled = labels.shape == hidden.shape[:-1] or (labels.ndim == 1 and labels.numel() == hidden[..., 0].numel())
    flat, ids = hidden.reshape(-1, hidden.shape[-1]), labels.reshape(-1)
    if number is None or not plain or not labelled or not _served(flat, weight, ids, ("cpu",)):
        handed_on()
        return stock(hidden, weight, labels, temperature, reduction, dist_process_group)  # type: ignore[no-any-return]
    return _head(flat, weight, ids, number)


def _head(hidden: Tensor, weight: Tensor, labels: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    outputs = ("logprobs", "entropy")
    stats = linear_token_logprobs(hidden, weight, labels, temperature=temperature, outputs=outputs)
    return stats.logprobs, stats.entropy


def _served(hidden: Tensor, weight: Tensor, labels: Tensor, devices: tuple[str, ...]) -> bool:
    same = hidden.dtype == weight.dtype or torch.is_autocast_enabled(hidden.device.type)
    return (
        all(type(x) in (Tensor, torch.nn.Parameter) and x.layout == torch.strided for x in (hidden, weight, labels))
        and hidden.device.type in devices
        and same
        and hidden.dtype in LOGITS_DTYPES
        and weight.dtype in LOGITS_DTYPES
        and hidden.ndim in (2, 3)
        and labels.shape == hidden.shape[:-1]
        and not hasattr(weight, "ds_id")
        and not transformed()
    )


def _number(x: object) -> float | None:
    """A positive number, or a 0-d tensor of one without a gradient, as a float; None: verl's to take or to refuse."""
    if not isinstance(x, Tensor | Real) or (isinstance(x, Tensor) and (x.ndim or x.requires_grad)):
        return None
    number = float(x)
    return number if 0.0 < number < math.inf else None


# --------------------------------------------------------------------------------------- autograd functions of verl's
class _StandIn:
    """Stands where verl has an autograd function: `apply` is ours, all else is verl's."""

    def __init__(self, stock: Any, apply: Any) -> None:
        self._stock, self.apply = stock, apply

    def __getattr__(self, name: str) -> Any:
        if name == "_stock":  # of a copy that is being made
            raise AttributeError(name)
        return getattr(self._stock, name)


@dataclass(frozen=True, slots=True)
class _Function(Replacement):
    """A replacement of an autograd function, whose parameters are those of `forward`."""

    def stock(self, module: ModuleType) -> Any:
        return _function(self, module, self.name)

    def bound(self, stock: Any, report: Report) -> Any:
        ours = functools.partial(self.ours, stock.apply)
        return _StandIn(stock, report.counted(f"{self.target}.apply", ours, self.tokens))


@dataclass(frozen=True, slots=True)
class _Applied(Replacement):
    """A replacement of the name that verl has given to the `apply` of an autograd function."""

    of: str = ""

    def stock(self, module: ModuleType) -> Any:
        function, stock = _function(self, module, self.of), vars(module).get(self.name)
        if stock != function.apply:  # a method, made anew whenever it is looked up
            raise Unrecognised(f"it is not {self.of}.apply any more but {stock!r}")
        return stock

    def bound(self, stock: Any, report: Report) -> Any:
        return report.counted(self.target, functools.partial(self.ours, stock), self.tokens)


def _function(row: Replacement, module: ModuleType, name: str) -> Any:
    function = vars(module).get(name)
    if not (isinstance(function, type) and issubclass(function, torch.autograd.Function)):
        raise Unrecognised(f"{row.module} has no autograd function {name}")
    found = tuple(inspect.signature(function.forward).parameters)
    if found != ("ctx", *row.parameters):
        raise Unrecognised(f"{name}.forward takes {', '.join(found)}; expected ctx, {', '.join(row.parameters)}")
    return function


def _tokens(hidden: Tensor, *_: Any, **__: Any) -> int:
    return hidden.numel() // max(hidden.shape[-1], 1)


_WHAT: Final = "fastreward.linear_token_logprobs"
REPLACEMENTS: Final[tuple[Replacement, ...]] = (
    _Function(
        f"{_TORCH_HEAD}.FusedLinearForPPOFunction",
        ("hidden_states", "vocab_weights", "input_ids", "temperature", "chunk_size"),
        fused_linear,
        _WHAT,
        "behind FusedLinearForPPO(impl_backend='torch'): tiles instead of whole rows of logits, one pass over each",
        _tokens,
    ),
    _Applied(
        f"{_TRITON_HEAD}.linear_cross_entropy",
        ("hidden", "weight", "labels", "temperature", "reduction", "dist_process_group"),
        linear_cross_entropy,
        _WHAT,
        "on the CPU, where verl's Triton kernel does not run",
        _tokens,
        of="LinearCrossEntropy",
    ),
)
KEPT: Final = (
    Entry(
        f"{_TRITON_HEAD}.linear_cross_entropy on a GPU, over a process group, or reduced",
        "verl's own kernel",
        "no GPU has timed fastreward's beside it",
    ),
    Entry("FusedLinearForPPO(impl_backend='liger')", "liger-kernel's", "it is asked for by name"),
)

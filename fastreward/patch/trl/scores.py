"""Log-probs and entropies of TRL's trainers: what stands in for its fused LM head and its functions of whole logits.

TRL's trainers score through one class, `trl.trainer.utils._ChunkedLogProbFunction`, looked up by name at each call
inside the fused LM head; other code calls `selective_log_softmax`, `entropy_from_logits` and
`selective_log_softmax_and_entropy`. Everything around them (gathering sharded heads, autocast, shifting labels) is
TRL's own code, so its conventions cannot drift.
"""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable
from numbers import Real
from types import ModuleType
from typing import Any, Final

import torch
from torch import Tensor

from fastreward._arguments.logits import LOGITS_DTYPES
from fastreward._arguments.transforms import transformed
from fastreward.linear_logprobs import linear_token_logprobs
from fastreward.logprobs import token_logprobs
from fastreward.patch import measure
from fastreward.patch.bindings import Entry, Report
from fastreward.patch.trl.versions import FUNCTIONS, KERNEL
from fastreward.patch.usage import handed_on

#: TRL's names of the optional outputs, in the order in which its function returns them, and fastreward's.
_OUTPUTS: Final = {
    "entropy": "entropy",
    "log_sum_sq_probs": "log_sum_sq_probs",
    "mean_logits": "mean_logit",
    "is_top1": "argmax",
}

Serves = Callable[[torch.device], bool]


class Head:
    """Stands where TRL has its autograd function: hidden states and LM head straight to per-token statistics."""

    serves: Serves

    def __init__(self, stock: Any, report: Report, pair: bool = False) -> None:
        """pair: TRL 1.14's, which takes no names of outputs and gives log-probs and entropies."""
        self.stock, self.report, self.pair = stock, report, pair
        self.uncounted: Callable[..., tuple[Tensor | None, ...]] = self._apply_pair if pair else self._apply
        target = f"trl.trainer.utils.{KERNEL}"
        self.apply = report.counted(target, self.uncounted, lambda hidden, *_, **__: hidden.shape[0])

    def __getattr__(self, name: str) -> Any:
        """What else TRL's has, its `forward` for one."""
        if name.startswith("__") or name == "stock":
            raise AttributeError(name)
        return getattr(self.stock, name)

    def _apply_pair(self, *arguments: Any) -> tuple[Tensor | None, ...]:
        """(logprobs, entropy), f32 [N]."""
        complete = (*arguments, *(None, 1.0)[len(arguments) - 6 :], ("entropy",))
        return self._scores(arguments, *complete)[:2]

    def _apply(self, *arguments: Any) -> tuple[Tensor | None, ...]:
        """(logprobs, entropy, log_sum_sq_probs, mean_logits, is_top1), f32 [N] (is_top1 bool); None where not asked."""
        return self._scores(arguments, *arguments)

    def _scores(
        self,
        arguments: tuple[Any, ...],
        hidden: Tensor,  # [N, H]
        weight: Tensor,  # [V, H]
        bias: Tensor | None,  # [V]
        targets: Tensor,  # [N]
        temperature: float | Tensor,
        chunk_size: int,
        final_logit_softcapping: float | None = None,
        logit_scale: float = 1.0,
        outputs: tuple[str, ...] = tuple(_OUTPUTS),
    ) -> tuple[Tensor | None, ...]:
        """All outputs; those of `arguments` as TRL's own function takes them where it is called instead."""
        number = _number(temperature)
        capped = final_logit_softcapping is None or _number(final_logit_softcapping) is not None
        if number is None or not capped or not self.serves(hidden.device) or self._left(hidden, weight):
            handed_on()
            return self.stock.apply(*arguments)  # type: ignore[no-any-return]
        # TRL's chunk_size is tuned to its own kernels; fastreward picks the tile that suits its own.
        wanted = [name for name in _OUTPUTS if name in outputs]
        stats = linear_token_logprobs(
            hidden,
            _same_dtype(weight, hidden),
            targets,
            bias=None if bias is None else _same_dtype(bias, hidden),
            temperature=number,
            logit_scale=logit_scale,
            softcap=final_logit_softcapping,
            outputs=("logprobs", *(_OUTPUTS[name] for name in wanted)),
        )
        found = {name: getattr(stats, _OUTPUTS[name]) for name in wanted}
        if "is_top1" in found:
            found["is_top1"] = found["is_top1"] == targets
        if "log_sum_sq_probs" in found:  # TRL sends no gradient through it, and its losses count on that
            found["log_sum_sq_probs"] = found["log_sum_sq_probs"].detach()
        return (stats.logprobs, *(found.get(name) for name in _OUTPUTS))

    def _left(self, hidden: Tensor, weight: Tensor) -> bool:
        """Whether this head is TRL's to score; the reason goes into the report, and is said once."""
        if hasattr(weight, "ds_id"):
            # Partitioned again between forward and backward: only TRL's function gathers it in its backward.
            return self._say("an LM head partitioned by DeepSpeed ZeRO-3", "only TRL gathers it again in the backward")
        if hidden.dtype not in LOGITS_DTYPES or weight.dtype not in LOGITS_DTYPES:
            return self._say(
                f"an LM head in {weight.dtype} on {hidden.dtype}", "fastreward takes float32, bfloat16 and float16"
            )
        return False

    def _say(self, what: str, why: str) -> bool:
        entry = Entry(what, "TRL's own kernel", why)
        if entry not in self.report.kept:
            self.report.kept.append(entry)
            warnings.warn(f"fastreward leaves {what} to TRL: {why}", RuntimeWarning, stacklevel=5)
        return True


def _same_dtype(x: Tensor, hidden: Tensor) -> Tensor:
    """`x` as the projection needs it: under autocast as it is, else in the hidden states' dtype, as TRL casts it."""
    return x if torch.is_autocast_enabled(hidden.device.type) else x.to(hidden.dtype)


def compacts_here(stock: Serves) -> Serves:
    """Replaces `_use_triton` in trl.trainer.utils, where it decides whether rows without a label are projected."""

    def compacts(device: torch.device) -> bool:
        return device.type == "cpu" or stock(device)

    return compacts


class Logits:
    """Replacements of the functions that take whole logits. Anything they do not serve goes to TRL's own."""

    serves: Serves

    def __init__(self, utils: ModuleType, exact: bool, report: Report) -> None:
        self.stock: dict[str, Callable[..., Any]] = {name: getattr(utils, name) for name in FUNCTIONS}
        self._has_kernel: Callable[..., bool] = utils._supports_trl_loss_kernel
        self.exact = exact
        # One function each, made once, as undo() finds them by identity; under TRL's name, by which it is pickled.
        for name, stock in self.stock.items():
            served = report.counted(f"trl.trainer.utils.{name}", getattr(self, f"_{name}"), _rows)
            setattr(self, name, functools.wraps(stock)(served))

    def _selective_log_softmax(
        self, logits: Tensor, index: Tensor, temperature: float | Tensor = 1.0, row_mask: Tensor | None = None
    ) -> Tensor:
        """Log-probs of index [...] or [..., K] under softmax(logits [..., V] / temperature), in TRL's dtype."""
        number = _number(temperature)
        several = index.ndim == logits.ndim and index.shape[-1] > 0
        if number is None or not self._ours(logits, index[..., 0] if several else index, row_mask, several):
            handed_on()
            return self.stock["selective_log_softmax"](logits, index, temperature, row_mask)  # type: ignore[no-any-return]
        dtype = self._dtype(logits, index, row_mask)
        if not several:
            return token_logprobs(logits, index, temperature=number, mask=row_mask).logprobs.to(dtype)
        found = token_logprobs(
            logits, index[..., 0], temperature=number, outputs=("id_logprobs",), token_ids=index
        ).id_logprobs.to(dtype)
        return found if row_mask is None else found.masked_fill(row_mask == 0, 0.0)

    def _entropy_from_logits(self, logits: Tensor, chunk_size: int = 128) -> Tensor:
        """Entropy [...] in nats of softmax(logits [..., V]), in TRL's dtype."""
        index = torch.zeros(logits.shape[:-1], dtype=torch.long, device=logits.device)
        if not self._ours(logits, index):
            handed_on()
            return self.stock["entropy_from_logits"](logits, chunk_size)  # type: ignore[no-any-return]
        return token_logprobs(logits, index, outputs=("entropy",)).entropy.to(self._dtype(logits))

    def _selective_log_softmax_and_entropy(
        self,
        logits: Tensor,
        index: Tensor,
        entropy_requires_grad: bool = True,
        temperature: float | Tensor = 1.0,
        row_mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Both of them for index [...], in one pass over the logits."""
        number = _number(temperature)
        if number is None or not self._ours(logits, index, row_mask):
            handed_on()
            stock = self.stock["selective_log_softmax_and_entropy"]
            return stock(logits, index, entropy_requires_grad, temperature, row_mask)  # type: ignore[no-any-return]
        dtype = self._dtype(logits, index, row_mask)
        outputs = ("logprobs", "entropy")
        stats = token_logprobs(logits, index, temperature=number, mask=row_mask, outputs=outputs)
        entropy = stats.entropy.to(dtype)
        return stats.logprobs.to(dtype), entropy if entropy_requires_grad else entropy.detach()

    def _ours(
        self, logits: Tensor, index: Tensor, row_mask: Tensor | None = None, masks_are_applied_here: bool = False
    ) -> bool:
        """Whether fastreward takes this as it is: an index and a mask for each row, and no row of another kind.

        What broadcasts goes to TRL, whose gather and masked_fill have an answer for it.
        """
        return (
            self.serves(logits.device)
            and not transformed()  # torch's own code has a forward-mode derivative, and runs under vmap
            and type(logits) in (Tensor, torch.nn.Parameter)
            and logits.dtype in LOGITS_DTYPES
            and logits.ndim >= 2
            and logits.shape[-1] > 0
            and logits.stride(-1) == 1
            and not (self.exact and logits.dtype != torch.float32)
            and index.shape == logits.shape[:-1]
            and (row_mask is None or masks_are_applied_here or row_mask.shape == index.shape)
        )

    def _dtype(self, logits: Tensor, *args: Tensor | None) -> torch.dtype:
        """TRL's Triton kernel returns float32, its torch code the dtype of the logits."""
        return torch.float32 if self._has_kernel(logits, *args) else logits.dtype


def _rows(logits: Tensor, *_: Any, **__: Any) -> int:
    return math.prod(logits.shape[:-1])


def _number(x: object) -> float | None:
    """A positive number, or a 0-d tensor of one without a gradient, as a float; None: TRL's to take or to refuse."""
    if not isinstance(x, Tensor | Real) or (isinstance(x, Tensor) and (x.ndim or x.requires_grad)):
        return None
    number = float(x)
    return number if 0.0 < number < math.inf else None


# ------------------------------------------------------------------------------------------------- which kernel
def choose(head: Head, logits: Logits, report: Report) -> tuple[Serves, Serves]:
    """Where fastreward serves: always on the CPU; on CUDA where it is the faster of the two. Says so in the report."""
    if not torch.cuda.is_available():
        report.kept.append(
            Entry("models on a GPU", "TRL's own kernels", "torch sees no GPU here to time fastreward on")
        )
        return _on("cpu"), _on("cpu")
    head.serves = logits.serves = _on("cpu", "cuda")
    device = torch.device("cuda", torch.cuda.current_device())
    timings = (
        measure.linear_head(_with_outputs(head, head.stock.apply), _with_outputs(head, head.uncounted), device),
        measure.whole_logits(
            logits.stock["selective_log_softmax_and_entropy"], logits._selective_log_softmax_and_entropy, device
        ),
    )
    for timing in timings:
        entry = Entry(f"{timing.what} on CUDA", "fastreward" if timing.ours_wins else "TRL's own kernel", str(timing))
        (report.replaced if timing.ours_wins else report.kept).append(entry)
    torch.cuda.empty_cache()  # the sample's memory is the trainer's again
    first, second = (_on("cpu", *(("cuda",) if timing.ours_wins else ())) for timing in timings)
    return first, second


def _with_outputs(head: Head, function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` as the sample calls it: with names of outputs."""
    return (lambda *arguments: (*function(*arguments[:-1]),)) if head.pair else function


def _on(*kinds: str) -> Serves:
    return lambda device: device.type in kinds

"""The drop-in for TRL 1.16: the trainers' log-probs and entropies come from fastreward, their own loss code stays.

TRL's trainers score through one class, `trl.trainer.utils._ChunkedLogProbFunction`, looked up by name at each call
inside the fused LM head; other code calls `selective_log_softmax`, `entropy_from_logits` and
`selective_log_softmax_and_entropy`. Those names are what is rebound. Everything around them (gathering sharded heads,
autocast, shifting labels, the losses, the group statistics) is TRL's own code, so its conventions cannot drift.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import inspect
import math
import sys
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
from fastreward.patch.bindings import Entry, Patch, PatchRefused, Report, active, bindings, install, undo
from fastreward.patch.usage import handed_on

_SERIES: Final = "1.16"
_KERNEL, _COMPACT = "_ChunkedLogProbFunction", "_use_triton"
#: Functions of trl.trainer.utils that are rebound, with the parameters their replacements were written for.
_FUNCTIONS: Final = {
    "selective_log_softmax": ("logits", "index", "temperature", "row_mask"),
    "entropy_from_logits": ("logits", "chunk_size"),
    "selective_log_softmax_and_entropy": ("logits", "index", "entropy_requires_grad", "temperature", "row_mask"),
}
_KERNEL_PARAMETERS: Final = (
    "hidden", "weight", "bias", "targets", "temperature", "chunk_size", "final_logit_softcapping", "logit_scale",
    "outputs",
)  # fmt: skip
#: TRL's names of the optional outputs, in the order in which its function returns them, and fastreward's.
_OUTPUTS: Final = {
    "entropy": "entropy",
    "log_sum_sq_probs": "log_sum_sq_probs",
    "mean_logits": "mean_logit",
    "is_top1": "argmax",
}

Serves = Callable[[torch.device], bool]


def trl(*, exact: bool = False) -> Report:
    """Let TRL's trainers take their log-probs and entropies from fastreward; works for trainers that exist already.

    On CUDA TRL has kernels of its own: both are timed here on a small sample and the faster one is used; the report
    says which, with the times. Calling it again changes nothing. `fastreward.patch.undo()` takes it back.

    Args:
        exact: bfloat16 and float16 logits given to `selective_log_softmax` and `entropy_from_logits` keep torch's own
            low-precision log_softmax, bit for bit what TRL gives. Otherwise they are scored in float32 and rounded
            once, to the dtype that TRL returns.

    Returns:
        What was replaced, and what was left and why.

    Raises:
        PatchRefused: TRL is not a 1.16, has been rewritten by Unsloth or someone else, or lacks a name that is needed.
            Nothing is changed then.
    """
    present = active("trl")
    if present is not None and present.options == {"exact": exact}:
        return present.report
    if present is not None:
        undo("trl")
    version = _supported_version()
    utils = importlib.import_module("trl.trainer.utils")
    _check_bindings(utils)
    report = Report("trl", version)
    head = _Head(getattr(utils, _KERNEL), report)
    logits = _Logits(utils, exact, report)
    head.serves, logits.serves = _choose(head, logits, report)
    patch = Patch(report, {"exact": exact}, "trl")
    patch.single = [
        (utils, _KERNEL, head.stock, head),
        (utils, _COMPACT, getattr(utils, _COMPACT), _compacts(getattr(utils, _COMPACT))),
    ]
    patch.everywhere = [(stock, getattr(logits, name)) for name, stock in logits.stock.items()]
    _describe(report, logits, exact)
    return install("trl", patch)


# ---------------------------------------------------------------------------------------------------- replacements
class _Head:
    """Stands where TRL has its autograd function: hidden states and LM head straight to per-token statistics."""

    serves: Serves

    def __init__(self, stock: Any, report: Report) -> None:
        self.stock, self.report = stock, report
        self.apply = report.counted(
            f"trl.trainer.utils.{_KERNEL}", self._apply, lambda hidden, *_, **__: hidden.shape[0]
        )

    def _apply(
        self,
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
        """(logprobs, entropy, log_sum_sq_probs, mean_logits, is_top1), f32 [N] (is_top1 bool); None where not asked."""
        number = _number(temperature)
        capped = final_logit_softcapping is None or _number(final_logit_softcapping) is not None
        if number is None or not capped or not self.serves(hidden.device) or self._left(hidden, weight):
            handed_on()
            return self.stock.apply(  # type: ignore[no-any-return]
                hidden, weight, bias, targets, temperature, chunk_size, final_logit_softcapping, logit_scale, outputs
            )
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
            warnings.warn(f"fastreward leaves {what} to TRL: {why}", RuntimeWarning, stacklevel=4)
        return True


def _same_dtype(x: Tensor, hidden: Tensor) -> Tensor:
    """`x` as the projection needs it: under autocast as it is, else in the hidden states' dtype, as TRL casts it."""
    return x if torch.is_autocast_enabled(hidden.device.type) else x.to(hidden.dtype)


def _compacts(stock: Serves) -> Serves:
    """Replaces `_use_triton` in trl.trainer.utils, where it decides whether rows without a label are projected."""

    def compacts(device: torch.device) -> bool:
        return device.type == "cpu" or stock(device)

    return compacts


class _Logits:
    """Replacements of the functions that take whole logits. Anything they do not serve goes to TRL's own."""

    serves: Serves

    def __init__(self, utils: ModuleType, exact: bool, report: Report) -> None:
        self.stock: dict[str, Callable[..., Any]] = {name: getattr(utils, name) for name in _FUNCTIONS}
        self._has_kernel: Callable[..., bool] = utils._supports_trl_loss_kernel
        self.exact = exact
        # One bound method each, made once: undo() finds them by identity.
        for name in _FUNCTIONS:
            served = report.counted(f"trl.trainer.utils.{name}", getattr(self, f"_{name}"), _rows)
            setattr(self, name, served)

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


# ----------------------------------------------------------------------------------------------------------- checks
def _supported_version() -> str:
    try:
        version = importlib.metadata.version("trl")
    except importlib.metadata.PackageNotFoundError as error:
        raise PatchRefused("fastreward.patch.trl: trl is not installed") from error
    if not f"{version}.".startswith(f"{_SERIES}."):
        raise PatchRefused(
            f"fastreward.patch.trl: written for trl {_SERIES}.x, found {version}, whose internals may differ; "
            "nothing was changed"
        )
    if "unsloth" in sys.modules:
        raise PatchRefused(
            "fastreward.patch.trl: Unsloth is imported and has rewritten TRL's trainers from their source; "
            "a patch would not reach them, so nothing was changed"
        )
    return version


def _check_bindings(utils: ModuleType) -> None:
    needed = (_KERNEL, _COMPACT, "_supports_trl_loss_kernel", *_FUNCTIONS)
    missing = [name for name in needed if not hasattr(utils, name)]
    if missing:
        raise PatchRefused(f"fastreward.patch.trl: trl.trainer.utils has no {', '.join(missing)}; nothing was changed")
    kernel = getattr(utils, _KERNEL)
    if kernel is not importlib.import_module("trl.kernels").ChunkedLogProbFunction:
        raise PatchRefused(
            f"fastreward.patch.trl: trl.trainer.utils.{_KERNEL} is not TRL's own any more ({kernel!r}); "
            "nothing was changed"
        )
    expected = {_KERNEL: (kernel.forward, ("ctx", *_KERNEL_PARAMETERS))} | {
        name: (getattr(utils, name), parameters) for name, parameters in _FUNCTIONS.items()
    }
    for name, (function, parameters) in expected.items():
        found = tuple(inspect.signature(function).parameters)
        if found != parameters:
            raise PatchRefused(
                f"fastreward.patch.trl: trl.trainer.utils.{name} takes {found}, expected {parameters}; "
                "nothing was changed"
            )


# ----------------------------------------------------------------------------------------- which kernel, and report
def _choose(head: _Head, logits: _Logits, report: Report) -> tuple[Serves, Serves]:
    """Where fastreward serves: always on the CPU; on CUDA where it is the faster of the two. Says so in the report."""
    if not torch.cuda.is_available():
        report.kept.append(
            Entry("models on a GPU", "TRL's own kernels", "torch sees no GPU here to time fastreward on")
        )
        return _on("cpu"), _on("cpu")
    head.serves = logits.serves = _on("cpu", "cuda")
    device = torch.device("cuda", torch.cuda.current_device())
    timings = (
        measure.linear_head(head.stock.apply, head._apply, device),
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


def _on(*kinds: str) -> Serves:
    return lambda device: device.type in kinds


def _describe(report: Report, logits: _Logits, exact: bool) -> None:
    add, keep = report.replaced.append, report.kept.append
    add(
        Entry(
            f"trl.trainer.utils.{_KERNEL}",
            "fastreward.linear_token_logprobs",
            "the log-probs and entropies of the GRPO, RLOO, DPO, KTO, SFT and async GRPO trainers",
        )
    )
    add(Entry(f"trl.trainer.utils.{_COMPACT}", "also true on the CPU", "rows without a label skip the LM head"))
    for stock in logits.stock.values():
        places = sorted(f"{module.__name__}.{bound}" for module, bound in bindings("trl", stock))
        why = "one pass over the logits, for modules that are imported later too"
        add(Entry(", ".join(places), "fastreward.token_logprobs", why))
    keep(
        Entry(
            "trl.trainer.utils.nanstd and group advantages",
            "TRL's own",
            "what eps, ddof, NaN and groups of one give is for TRL to say",
        )
    )
    keep(Entry("policy losses and metrics", "TRL's own", "a second copy of a loss would drift from TRL's"))
    keep(Entry("trl.kernels.*", "TRL's own", "these names are public, and serve what fastreward does not take"))
    keep(
        Entry(
            "DistillationTrainer's divergence",
            "TRL's own",
            "it compares with a teacher's distribution, not with labels",
        )
    )
    keep(Entry("float64 logits", "TRL's own", "fastreward takes float32, bfloat16 and float16"))
    keep(
        Entry(
            "an index or row_mask that broadcasts, a temperature with a gradient, tensor subclasses",
            "TRL's own",
            "TRL's torch code takes whatever torch does",
        )
    )
    if exact:
        keep(
            Entry("bfloat16 and float16 logits", "torch's log_softmax", "exact=True asks for TRL's results bit for bit")
        )

"""The versions of TRL that the patch was written for, and what it looks for in each before it replaces anything."""

from __future__ import annotations

import hashlib
import importlib
import importlib.metadata
import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Final

from fastreward.patch.bindings import PatchRefused, is_own

KERNEL: Final = "_ChunkedLogProbFunction"
COMPACT: Final = "_use_triton"
#: Functions of trl.trainer.utils that are rebound, with the parameters their replacements were written for.
FUNCTIONS: Final = {
    "selective_log_softmax": ("logits", "index", "temperature", "row_mask"),
    "entropy_from_logits": ("logits", "chunk_size"),
    "selective_log_softmax_and_entropy": ("logits", "index", "entropy_requires_grad", "temperature", "row_mask"),
}
_OF_HEAD: Final = (
    "weight", "bias", "targets", "temperature", "chunk_size", "final_logit_softcapping", "logit_scale",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Seams:
    """Where one series of TRL can be cut.

    kernel: the parameters of the fused LM head. home: the module that defines it, and its name there. compact: whether
    a function decides if rows without a label are projected (else none are). pair: the head has no choice of outputs,
    it gives log-probs and entropies, and trainers import it by name. trainers: which score through it.
    """

    kernel: tuple[str, ...]
    home: tuple[str, str]
    compact: bool
    pair: bool
    trainers: str


_LIGER: Final = "async GRPO, and with use_liger_kernel=True the GRPO, DPO and KTO"  # else they have whole logits
_ALL: Final = "GRPO, RLOO, DPO, KTO, SFT and async GRPO"
_IN_KERNELS: Final = ("trl.kernels", "ChunkedLogProbFunction")
SEAMS: Final[dict[str, Seams]] = {
    "1.14": Seams(("last_hidden", *_OF_HEAD), ("trl.trainer.utils", KERNEL), compact=False, pair=True, trainers=_LIGER),
    "1.15": Seams(("hidden", *_OF_HEAD, "outputs"), _IN_KERNELS, compact=False, pair=False, trainers=_ALL),
    "1.16": Seams(("hidden", *_OF_HEAD, "outputs"), _IN_KERNELS, compact=True, pair=False, trainers=_ALL),
}

#: The methods that `losses=True` replaces: SHA-256 (first 16 digits) of the source texts it was written for.
LOSS_SOURCES: Final = {
    ("trl.trainer.grpo_trainer", "GRPOTrainer"): {"75bd01badfb43ed6", "80295546bbdbf6f7"},  # 1.14, 1.15 and 1.16
    ("trl.trainer.rloo_trainer", "RLOOTrainer"): {"c1f9fa0cd5a6948c"},
}
GAMMA_WEIGHTS_SOURCE: Final = "3b5fa9ea16cbd802"


def supported_version() -> tuple[str, Seams]:
    """The installed version of TRL and its seams; PatchRefused where it is not one of SEAMS."""
    try:
        version = importlib.metadata.version("trl")
    except importlib.metadata.PackageNotFoundError as error:
        raise PatchRefused("fastreward.patch.trl: trl is not installed") from error
    series = ".".join(version.split(".")[:2])
    if series not in SEAMS:
        raise PatchRefused(
            f"fastreward.patch.trl: written for trl {', '.join(SEAMS)}, found {version}, whose internals may differ; "
            "nothing was changed"
        )
    if "unsloth" in sys.modules:
        raise PatchRefused(
            "fastreward.patch.trl: Unsloth is imported and has rewritten TRL's trainers from their source; "
            "a patch would not reach them, so nothing was changed"
        )
    return version, SEAMS[series]


def check_bindings(utils: ModuleType, seams: Seams) -> None:
    """PatchRefused unless every name is there, is TRL's own and takes what it took."""
    needed = (KERNEL, *((COMPACT,) if seams.compact else ()), "_supports_trl_loss_kernel", *FUNCTIONS)
    missing = [name for name in needed if not hasattr(utils, name)]
    if missing:
        raise PatchRefused(f"fastreward.patch.trl: trl.trainer.utils has no {', '.join(missing)}; nothing was changed")
    home, name = seams.home
    kernel: Any = getattr(utils, KERNEL)
    own: Any = getattr(importlib.import_module(home), name, None)
    if kernel is not own or not hasattr(kernel, "forward"):
        raise PatchRefused(
            f"fastreward.patch.trl: trl.trainer.utils.{KERNEL} is not TRL's own any more ({kernel!r}); "
            "nothing was changed"
        )
    expected = {KERNEL: (kernel.forward, ("ctx", *seams.kernel))} | {
        name: (getattr(utils, name), parameters) for name, parameters in FUNCTIONS.items()
    }
    for name, (function, parameters) in expected.items():
        found = tuple(inspect.signature(function).parameters)
        if found != parameters:
            raise PatchRefused(
                f"fastreward.patch.trl: trl.trainer.utils.{name} takes {found}, expected {parameters}; "
                "nothing was changed"
            )
        if not is_own(function, "trl"):
            raise PatchRefused(
                f"fastreward.patch.trl: trl.trainer.utils.{name} is not TRL's own any more ({function!r}); "
                "nothing was changed"
            )


def digest(function: Callable[..., Any]) -> str:
    """Of the source text of a function of TRL's; "" where there is none, or someone has wrapped it."""
    if not is_own(function, "trl"):
        return ""
    try:
        return hashlib.sha256(inspect.getsource(function).encode()).hexdigest()[:16]
    except (OSError, TypeError):
        return ""

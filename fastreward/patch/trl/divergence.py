"""Divergences of whole logits in TRL's experimental trainers: GKD's, GOLD's and IW-OPD's, SDFT's and SDPO's."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Final

import torch
from torch import Tensor

from fastreward import divergences
from fastreward._arguments.logits import LOGITS_DTYPES
from fastreward._arguments.transforms import transformed
from fastreward.divergence import token_divergence
from fastreward.losses import Loss
from fastreward.patch.bindings import Report
from fastreward.patch.trl.versions import digest
from fastreward.patch.usage import handed_on


def divergence_of(beta: float) -> str | Loss:
    """TRL's beta (SDFT's alpha): 0 forward, 1 reverse KL, between them the Jensen-Shannon divergence of that weight."""
    return "forward-kl" if beta == 0 else "reverse-kl" if beta == 1 else divergences.jsd(beta)


# ---------------------------------------------------------------------------------------------------------- functions
def generalized_jsd_loss(call: Mapping[str, Any]) -> Tensor:
    """Of tokens whose label is not -100, reduced as TRL does, in its dtype."""
    student, labels, items = call["student_logits"], call["labels"], call["num_items_in_batch"]
    mask = None if labels is None else labels != -100
    found = token_divergence(
        student,
        call["teacher_logits"],
        divergence=divergence_of(call["beta"]),
        temperature=call["temperature"],
        mask=mask,
    )
    share: Any = 1
    if items is not None:
        share = items.to(student.device) if isinstance(items, Tensor) else items
    elif call["reduction"] == "batchmean":
        share = max(len(student), 1) if mask is None else mask.sum().clamp_min(1)
    elif call["reduction"] == "mean":  # over the vocabulary too
        share = student.shape[-1] * (found.divergence.numel() if mask is None else mask.sum())
    loss: Tensor = found.divergence.sum().to(student.dtype) / share
    return loss


def _jsd_is_ours(call: Mapping[str, Any]) -> bool:
    labels, logits = call["labels"], call["student_logits"]
    return (
        not call.get("logits_are_probs", False)
        and not call.get("top_k", 0)
        and (call["num_items_in_batch"] is not None or call["reduction"] in ("batchmean", "sum", "mean"))
        and (labels is None or (type(labels) is Tensor and labels.shape == logits.shape[:-1]))
        and isinstance(call["temperature"], int | float)
        and call["temperature"] > 0
        and _is_weight(call["beta"])
    )


def full_logit_loss(call: Mapping[str, Any]) -> Tensor:
    """[...], in the logits' dtype."""
    student = call["student_logits"]
    options: Any = {"divergence": divergence_of(call["distillation_alpha"])}
    return token_divergence(student, call["teacher_logits"], **options).divergence.to(student.dtype)


def topk_loss(call: Mapping[str, Any]) -> Tensor:
    """[...]: over the student's likeliest tokens, and the rest as one more or left out."""
    student, tail = call["student_logits"], bool(call["distillation_add_tail"])
    ids = student.detach().topk(call["distillation_topk"], dim=-1).indices
    options: Any = {"divergence": divergence_of(call["distillation_alpha"]), "token_ids": ids, "tail": tail}
    return token_divergence(student, call["teacher_logits"], **options).divergence.to(student.dtype)


def _alpha_is_ours(call: Mapping[str, Any]) -> bool:
    return _is_weight(call["distillation_alpha"])


def _is_weight(x: object) -> bool:
    return isinstance(x, int | float) and 0 <= x <= 1


# ---------------------------------------------------------------------------------------------------------- the table
@dataclass(frozen=True, slots=True)
class Function:
    """A function of TRL's over whole logits: where it is, the sources that ours was written for, and ours."""

    module: str
    owner: str  # the class whose static method it is; "": the module's own
    name: str
    sources: frozenset[str]
    ours: Callable[[Mapping[str, Any]], Tensor]
    serves: Callable[[Mapping[str, Any]], bool]

    @property
    def target(self) -> str:
        """Its dotted name."""
        return ".".join(filter(None, (self.module, self.owner, self.name)))

    def home(self, module: ModuleType) -> Any:
        """The module or the class that has it; None: there is none."""
        return getattr(module, self.owner, None) if self.owner else module

    def stock(self, module: ModuleType) -> Callable[..., Any] | None:
        """TRL's own, if its source is one that is known."""
        stock = getattr(self.home(module), self.name, None)
        return stock if stock is not None and digest(stock) in self.sources else None

    def bound(self, stock: Callable[..., Any], report: Report, exact: bool) -> Callable[..., Any]:
        """Ours under the name of TRL's; what it does not serve goes to TRL's."""
        signature = inspect.signature(stock)

        def served(*args: Any, **kwargs: Any) -> Any:
            bound = signature.bind(*args, **kwargs)
            bound.apply_defaults()
            call = bound.arguments
            if not _plain(call["student_logits"], call["teacher_logits"], exact) or not self.serves(call):
                handed_on()
                return stock(*args, **kwargs)
            return self.ours(call)

        return functools.wraps(stock)(report.counted(self.target, served, _rows))


def _plain(student: Any, teacher: Any, exact: bool) -> bool:
    """Logits of one shape and dtype on the CPU; in half precision only where TRL's rounding is not asked for."""
    both = (student, teacher)
    half = student.dtype != torch.float32
    return (
        all(type(x) in (Tensor, torch.nn.Parameter) and x.is_cpu and x.stride(-1) == 1 for x in both)
        and student.dtype in LOGITS_DTYPES
        and (student.shape, student.dtype) == (teacher.shape, teacher.dtype)
        and student.ndim >= 2
        and student.shape[-1] > 0
        and not (half and (exact or torch.is_autocast_enabled("cpu")))
        and not transformed()
    )


def _rows(student_logits: Tensor, *_: Any, **__: Any) -> int:
    return student_logits.shape[:-1].numel()


def _jsd(trainer: str, owner: str, source: str) -> Function:
    module = f"trl.experimental.{trainer}.{trainer}_trainer"
    return Function(module, owner, "generalized_jsd_loss", frozenset({source}), generalized_jsd_loss, _jsd_is_ours)


def _self_distillation(trainer: str) -> tuple[Function, ...]:
    rows = (
        ("compute_full_logit_self_distillation_loss", "2e3dbcf78604a517", full_logit_loss),
        ("compute_topk_self_distillation_loss", "5b1eda172798d2b9", topk_loss),
    )
    module = f"trl.experimental.{trainer}.loss_utils"
    return tuple(Function(module, "", name, frozenset({x}), ours, _alpha_is_ours) for name, x, ours in rows)


#: By the sources of TRL 1.16.
FUNCTIONS: Final = (
    _jsd("gkd", "GKDTrainer", "fa445e28549d31b6"),
    _jsd("gold", "GOLDTrainer", "9a75626174fcaa92"),
    _jsd("iw_opd", "IWOPDTrainer", "767d97345c801e70"),
    *_self_distillation("sdft"),
    *_self_distillation("sdpo"),
)

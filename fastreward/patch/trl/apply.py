"""Binds the parts of this folder in TRL's place, and keeps the account of it."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any, Final

from fastreward.patch.bindings import Entry, Patch, Report, active, bindings, exchange, install, undo
from fastreward.patch.imports import AfterImport, is_imported
from fastreward.patch.trl import distillation, divergence, objective
from fastreward.patch.trl.scores import Head, Logits, choose, compacts_here
from fastreward.patch.trl.trainers import GRPOLoss, RLOOLoss, TrainerLoss
from fastreward.patch.trl.versions import (
    COMPACT,
    GAMMA_WEIGHTS_SOURCE,
    KERNEL,
    LOSS_SOURCES,
    Seams,
    check_bindings,
    digest,
    supported_version,
)
from fastreward.patch.usage import Usage

_LOSSES: Final[dict[str, type[TrainerLoss]]] = {"GRPOTrainer": GRPOLoss, "RLOOTrainer": RLOOLoss}


def trl(*, exact: bool = False, losses: bool = False) -> Report:
    """Let TRL's trainers take their log-probs and entropies from fastreward; works for trainers that exist already.

    On CUDA TRL has kernels of its own: both are timed here on a small sample and the faster one is used; the report
    says which, with the times. Calling it again changes nothing. `fastreward.patch.undo()` takes it back.

    Args:
        exact: bfloat16 and float16 logits given to `selective_log_softmax` and `entropy_from_logits` keep torch's own
            low-precision log_softmax, bit for bit what TRL gives. Otherwise they are scored in float32 and rounded
            once, to the dtype that TRL returns.
        losses: GRPO's and RLOO's own loss and metrics come from fastreward too, in one pass over the tokens: every
            loss_type, and what is logged, to about 1e-6. Options that this does not cover go to TRL call by call, and
            subclasses with a `_compute_loss` of their own keep it; the report lists both. The divergences of
            DistillationTrainer and of the experimental GKD, GOLD, IW-OPD, SDFT and SDPO too, on the CPU; their values
            are those of float32 logits, also of half precision unless `exact` (a forbidden token costs 10,000 nats
            where TRL gives NaN).

    Returns:
        What was replaced, and what was left and why.

    Raises:
        PatchRefused: TRL is not a 1.14, 1.15 or 1.16, has been rewritten by Unsloth or someone else, or lacks a name
            that is needed. Nothing is changed then.
    """
    present, options = active("trl"), {"exact": exact, "losses": losses}
    if present is not None and present.options == options:
        return present.report
    if present is not None:
        undo("trl")
    version, seams = supported_version()
    utils = importlib.import_module("trl.trainer.utils")
    check_bindings(utils, seams)
    report = Report("trl", version)
    head = Head(getattr(utils, KERNEL), report, seams.pair)
    logits = Logits(utils, exact, report)
    head.serves, logits.serves = choose(head, logits, report)
    patch = Patch(report, options, "trl")
    patch.everywhere = [(stock, getattr(logits, name)) for name, stock in logits.stock.items()]
    if seams.pair:  # its trainers import the head by name
        patch.everywhere.append((head.stock, head))
    else:  # which trl.kernels, public, keeps
        patch.single.append((utils, KERNEL, head.stock, head))
    if seams.compact:
        patch.single.append((utils, COMPACT, getattr(utils, COMPACT), compacts_here(getattr(utils, COMPACT))))
    _describe(report, logits, exact, seams)
    if losses:
        patch.single += [*_losses(report), *_divergence(report)]
        whole = _WholeLogits(patch, exact)
        patch.imports = AfterImport(whole.rows, whole.serve)
        whole.start()
    else:
        report.kept.append(Entry("policy losses and metrics", "TRL's own", "losses=True was not asked for"))
    return install("trl", patch)


def _losses(report: Report) -> list[tuple[Any, str, Any, Any]]:
    """The methods to replace, as `Patch.single` has them; a source that is not known is left and told."""
    found = []
    for (module, name), known in LOSS_SOURCES.items():
        target = f"{module}.{name}._compute_loss"
        trainer = getattr(importlib.import_module(module), name)
        stock = trainer._compute_loss
        gamma = getattr(trainer, "get_gamma_weights", None)
        if digest(stock) not in known or (gamma is not None and digest(gamma) != GAMMA_WEIGHTS_SOURCE):
            report.kept.append(Entry(target, "TRL's own", "its source is not the one that losses=True was written for"))
            continue
        usage = report.usage.setdefault(target, Usage())
        run = report.counted(target, objective.run, objective.tokens)
        loss = _LOSSES[name](stock, run, _counter(usage), gamma)
        found.append((trainer, "_compute_loss", stock, loss.bound()))
        why = "loss, gradient and the sums of all metrics in one pass"
        report.replaced.append(Entry(target, "fastreward.policy_loss", why))
    if found:
        report.kept += _LEFT
    return found


def _divergence(report: Report) -> list[tuple[Any, str, Any, Any]]:
    """DistillationTrainer's function of hidden states, where there is one and its source is known."""
    (place, name), why = distillation.DIVERGENCE, "this version has none of its own"
    try:
        module = importlib.import_module(place)
    except ModuleNotFoundError:
        report.kept.append(Entry(place, "TRL's own", why))
        return []
    stock = getattr(module, name, None)
    if stock is None or digest(stock) not in distillation.SOURCES:
        why = why if stock is None else "its source is not the one that losses=True was written for"
        report.kept.append(Entry(f"{place}.{name}", "TRL's own", why))
        return []
    replacement = report.counted(f"{place}.{name}", distillation.DivergenceLoss(stock).__call__, distillation.tokens)
    why = "on the CPU: valid tokens alone, all of a row's statistics from one projection"
    report.replaced.append(Entry(f"{place}.{name}", "fastreward.linear_divergence", why))
    return [(module, name, stock, replacement)]


class _WholeLogits:
    """Functions of the experimental trainers over whole logits, each put in place when its module is imported."""

    def __init__(self, patch: Patch, exact: bool) -> None:
        self.patch, self.report, self.exact = patch, patch.report, exact
        self.rows: dict[str, list[divergence.Function]] = {}
        for row in divergence.FUNCTIONS:
            self.rows.setdefault(row.module, []).append(row)

    def start(self) -> None:
        """Serve what is imported already, and say what is not."""
        for name, rows in self.rows.items():
            if is_imported(name):
                self.serve(sys.modules[name])
            else:
                self.report.pending += [self._entry(row, f"as soon as {name} is imported") for row in rows]

    def serve(self, module: ModuleType) -> None:
        """Put in place what there is for a module that has just been imported."""
        rows = self.rows[module.__name__]
        targets = {row.target for row in rows}
        self.report.pending = [entry for entry in self.report.pending if entry.target not in targets]
        for row in rows:
            stock = row.stock(module)
            if stock is None:
                why = "its source is not the one that losses=True was written for"
                self.report.kept.append(Entry(row.target, "TRL's own", why))
                continue
            ours = row.bound(stock, self.report, self.exact)
            if row.owner:
                owner = row.home(module)
                own = vars(owner)[row.name]  # the static method, which undo() puts back
                replacement = staticmethod(ours)
                setattr(owner, row.name, replacement)
                self.patch.single.append((owner, row.name, own, replacement))
            else:
                self.patch.everywhere.append((stock, ours))
                exchange(self.patch.package, [(stock, ours)])
            entry = self._entry(row, "on the CPU: one pass over both logits, and one for the gradient")
            if entry not in self.report.replaced:
                self.report.replaced.append(entry)

    def _entry(self, row: divergence.Function, why: str) -> Entry:
        return Entry(row.target, "fastreward.token_divergence", why)


def _counter(usage: Usage) -> Callable[[], None]:
    def count() -> None:
        usage.handed_on += 1

    return count


#: What the losses leave, by call.
_LEFT: Final = (
    Entry(
        "cispo and sapo with importance_sampling_level='sequence', vespo with off_policy_mask_threshold or "
        "top_entropy_quantile, use_adaptive_entropy, a delta within the clip range",
        "TRL's own _compute_loss",
        "no published loss of that kind, or state that belongs to the method; decided by call",
    ),
    Entry(
        "subclasses with a _compute_loss of their own (GMPO, yours), AsyncGRPO, and the losses of SFT, DPO, KTO and "
        "the experimental trainers but for the divergences of whole logits",
        "TRL's own",
        "only the methods of GRPOTrainer and RLOOTrainer are replaced",
    ),
    Entry(
        "divergences of models on a GPU",
        "TRL's own",
        "its kernels and torch's serve there; fastreward's have not been timed beside them on one",
    ),
    Entry(
        "IW-OPD's loss with top_k, GOLD's of probabilities, reduction='none', ServerDistillation's and "
        "AsyncDistillation's divergences and those from SDFT's and SDPO's teacher servers",
        "TRL's own",
        "a value for each token of the vocabulary, or log-probs of a few ids that a server gives: nothing to fuse",
    ),
    Entry("get_high_entropy_mask, get_off_policy_mask", "TRL's own", "they are called as TRL calls them"),
)


def _describe(report: Report, logits: Logits, exact: bool, seams: Seams) -> None:
    add, keep = report.replaced.append, report.kept.append
    add(
        Entry(
            f"trl.trainer.utils.{KERNEL}",
            "fastreward.linear_token_logprobs",
            f"the log-probs and entropies of the {seams.trainers} trainers",
        )
    )
    if seams.compact:
        add(Entry(f"trl.trainer.utils.{COMPACT}", "also true on the CPU", "rows without a label skip the LM head"))
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
    keep(Entry("trl.kernels.*", "TRL's own", "these names are public, and serve what fastreward does not take"))
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


__all__ = ["trl"]

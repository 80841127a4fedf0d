"""verl's metrics with what fastreward has served: `fastreward.patch.verl(metrics=True)`, or FASTREWARD_VERL=metrics.

The driver's stand beside verl's timings, as `fastreward/calls`, `/tokens`, `/seconds`, `/handed_on` and `/share`; those
of the workers beside the losses of actor and critic, under verl's prefix of each. They count from the patch on; of
micro-batches and ranks verl logs the largest.
"""

from __future__ import annotations

import functools
import importlib
from dataclasses import dataclass
from typing import Any, Final

from fastreward.patch.bindings import Report
from fastreward.patch.verl.replacement import Replacement


@dataclass(frozen=True, slots=True)
class Logged(Replacement):
    """A function of verl's whose metrics get those of the report; its own work stays verl's, and is not counted."""

    def bound(self, stock: Any, report: Report) -> Any:
        """verl's, with more metrics."""

        @functools.wraps(stock)
        def call(*args: Any, **kwargs: Any) -> Any:
            result = stock(*args, **kwargs)
            return self.ours(report.metrics(), result)

        return call


def _of_the_driver(ours: dict[str, float], metrics: dict[str, Any]) -> dict[str, Any]:
    return metrics | ours


def _of_a_worker(ours: dict[str, float], result: tuple[Any, dict[str, Any]]) -> tuple[Any, dict[str, Any]]:
    loss, metrics = result
    of = importlib.import_module("verl.utils.metric")
    return loss, metrics | {name: of.Metric(of.AggregationType.MAX, x) for name, x in ours.items()}


_ITSELF: Final = "itself, with Report.metrics()"
_LOSS: Final = ("config", "model_output", "data", "dp_group")
REPLACEMENTS: Final = (
    Logged(
        "verl.trainer.ppo.metric_utils.compute_timing_metrics",
        ("batch", "timing_raw"),
        _of_the_driver,
        _ITSELF,
        "metrics=True asks for it",
    ),
    *(
        Logged(f"verl.workers.utils.losses.{name}", _LOSS, _of_a_worker, _ITSELF, "metrics=True asks for it")
        for name in ("ppo_loss", "value_loss")
    ),
)

"""OpenRLHF's status, with what fastreward has served in each process: `fastreward.patch.openrlhf(metrics=True)`."""

from __future__ import annotations

import functools
import inspect
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Final

from fastreward.patch.bindings import Report
from fastreward.patch.openrlhf.serving import Serving
from fastreward.patch.openrlhf.source import check_own
from fastreward.patch.source import Unrecognised


@dataclass(frozen=True, slots=True)
class Logged:
    """A method whose status gets the metrics: what it returns, or, with `given`, its argument of that name.

    process: what the names say whose they are.
    """

    module: str
    name: str
    process: str
    parameters: tuple[str, ...]
    given: str = ""

    what = "itself, with Report.metrics()"
    why = "metrics=True asks for it"
    method = True

    @property
    def target(self) -> str:
        """Its dotted name."""
        return f"{self.module}.{self.name}"

    @property
    def short(self) -> str:
        """What it is called in its class."""
        return self.name.rpartition(".")[2]

    def check_source(self, root: Path) -> None:
        """Only what it takes and returns matters, and that shows."""

    def owner(self, module: ModuleType) -> Any:
        """The class that has it; raises `Unrecognised` where there is none."""
        owner = getattr(module, self.name.partition(".")[0], None)
        if owner is None or self.short not in vars(owner):
            raise Unrecognised(f"{self.module} has no {self.name}")
        return owner

    def stock(self, module: ModuleType) -> Any:
        """OpenRLHF's own; raises `Unrecognised` where its parameters are others."""
        value = vars(self.owner(module))[self.short]
        check_own(value, self.module, self.name)
        found = tuple(inspect.signature(value).parameters)
        if found != self.parameters:
            raise Unrecognised(f"it takes {', '.join(found)}; expected {', '.join(self.parameters)}")
        return value

    def bound(self, stock: Any, module: ModuleType, serving: Serving) -> Any:
        """The method with the metrics of this process."""
        signature, report = inspect.signature(stock), serving.report

        @functools.wraps(stock)
        def logs(*args: Any, **kwargs: Any) -> Any:
            call = signature.bind(*args, **kwargs)
            call.arguments[self.given] = {**call.arguments[self.given], **_named(report, self.process)}
            return stock(*call.args, **call.kwargs)

        @functools.wraps(stock)
        def returns(*args: Any, **kwargs: Any) -> Any:
            return {**stock(*args, **kwargs), **_named(report, self.process)}

        return logs if self.given else returns


def _named(report: Report, process: str) -> dict[str, float]:
    """`fastreward/actor/calls` and so on: the statuses of all processes end in one."""
    return {name.replace("/", f"/{process}/"): value for name, value in report.metrics().items()}


# The trainer's own methods are out of reach: Ray has taken copies of them by the time their module is imported.
_LOG: Final = ("openrlhf.utils.logging_utils", ("self", "global_step", "logs_dict"), "logs_dict")
ROWS: Final = (
    *(Logged(_LOG[0], f"{logger}.log_train", "driver", *_LOG[1:]) for logger in ("WandbLogger", "TensorboardLogger")),
    Logged("openrlhf.trainer.ray.ppo_actor", "ActorPPOTrainer.ppo_train", "actor", ("self", "kl_ctl")),
    Logged("openrlhf.trainer.ray.ppo_critic", "CriticPPOTrainer.ppo_train", "critic", ("self",)),
)

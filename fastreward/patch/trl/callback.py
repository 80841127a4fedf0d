"""What a TRL run logs about the patch: a TrainerCallback with what fastreward has served since the last log."""

from __future__ import annotations

import importlib
import time
from dataclasses import asdict
from typing import Any

from fastreward.patch.bindings import Report, active


class Meter:
    """What a patch has served between two readings, as numbers to log."""

    def __init__(self) -> None:
        self._report: Report | None = None

    def restart(self) -> None:
        """Count from now on."""
        patch = active("trl")
        self._report = None if patch is None else patch.report
        if self._report is not None:
            self._before, self._since = asdict(self._report.total), time.perf_counter()

    def read(self) -> dict[str, float]:
        """`fastreward/calls`, `/tokens`, `/seconds`, `/handed_on` and `/share` since the last reading.

        Nothing where no patch is in place; one that has been applied since counts from its beginning.
        """
        patch = active("trl")
        if patch is None:
            return {}
        report = patch.report
        if report is not self._report:
            self._before, self._since = dict.fromkeys(asdict(report.total), 0), report.since
        total, now = asdict(report.total), time.perf_counter()
        found = {f"fastreward/{name}": float(x - self._before[name]) for name, x in total.items()}
        found["fastreward/share"] = found["fastreward/seconds"] / max(now - self._since, 1e-9)
        self._report, self._before, self._since = report, total, now
        return found


def trl_callback(trainer: Any = None) -> Any:
    """A TrainerCallback that adds to TRL's logs what the patch has served since the last log, in this process.

    The log that ends training, with `train_runtime`, has what was served in all of it.
    The numbers are those of `Report.metrics()`: `fastreward/calls`, `fastreward/tokens`, `fastreward/seconds`,
    `fastreward/handed_on` and `fastreward/share` (of the wall time). They are in `trainer.state.log_history`, and in
    what callbacks after this one log.

    Args:
        trainer: puts the callback in front of all of this trainer's, so that its reporters (wandb, tensorboard, ...)
            log the numbers too. None: it goes where you put it, as in `callbacks=[fastreward.patch.trl_callback()]`;
            transformers puts reporters before those.

    Raises:
        ImportError: transformers is not installed.
    """
    callback = _callback_class()()
    if trainer is not None:
        trainer.callback_handler.callbacks.insert(0, callback)
    return callback


def _callback_class() -> Any:
    base: Any = importlib.import_module("transformers").TrainerCallback

    class FastrewardCallback(base):  # type: ignore[misc]
        """Adds what the patch has served to what the trainer logs."""

        def __init__(self) -> None:
            self.interval, self.training = Meter(), Meter()

        def on_train_begin(self, *_: Any, **__: Any) -> None:
            self.interval.restart()
            self.training.restart()

        def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
            found = (self.training if "train_runtime" in (logs or {}) else self.interval).read()
            if logs is not None:
                logs.update(found)
            if state.log_history and state.log_history[-1].get("step") == state.global_step:
                state.log_history[-1].update(found)

    return FastrewardCallback

"""`make demo`: GRPO on a reasoning-gym task over a 151,936-word vocabulary, stock TRL and TRL on fastreward in turn.

Both sides start every round from the same weights and seed, so they sample the same completions and their losses can be
compared step by step. Ends with a table, demo_out/demo.png and demo_out/demo.json; exit code 1 where the numbers
differ, the run was trivial, or the speed-up is below what is asked for.
"""

from __future__ import annotations

import os
import warnings

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
warnings.filterwarnings("ignore")  # of trl, transformers and datasets: nothing here for the user to act on

import json  # noqa: E402
import statistics  # noqa: E402
import tempfile  # noqa: E402
import time  # noqa: E402
from collections.abc import Callable  # noqa: E402
from dataclasses import asdict, dataclass  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Annotated, Any  # noqa: E402

import rich  # noqa: E402
import typer  # noqa: E402
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn  # noqa: E402
from rich.table import Table  # noqa: E402

_STARTED = time.perf_counter()
SIDES = ("stock", "patched")
TOLERANCE = 1e-4
#: Metrics that hang on log-probs, entropies and gradients; the policy part of an on-policy loss hardly does.
DEPENDENT = ("kl", "entropy", "grad_norm")


def elapsed() -> float:
    """Seconds since this program began."""
    return time.perf_counter() - _STARTED


@dataclass(frozen=True)
class Settings:
    """What is run; the same for both sides."""

    rounds: int  # at most: none is begun that would not end within `budget`
    budget: float
    steps: int
    warm_up: int
    prompts: int
    generations: int
    completion: int
    hidden: int
    layers: int
    vocabulary: int
    learning_rate: float
    kl: float


@dataclass
class Result:
    """Every timed step of both sides, in the order of rounds, and what follows from them."""

    settings: Settings
    machine: dict[str, Any]
    steps: dict[str, list[Any]]
    warm_up_loss: tuple[float, float]
    seconds: float

    def median(self, side: str, name: str) -> float:
        """Median over the timed steps of all rounds."""
        return statistics.median(getattr(step, name) for step in self.steps[side])

    def ratio(self, name: str) -> float:
        """How many times less the patched side needs."""
        return self.median("stock", name) / self.median("patched", name)

    def comparable(self) -> list[tuple[Any, Any]]:
        """Pairs of steps on the same completions."""
        pairs = zip(self.steps["stock"], self.steps["patched"], strict=True)
        return [(a, b) for a, b in pairs if a.completions == b.completions]

    def loss_scale(self) -> float:
        """The largest loss, by size."""
        return max(abs(step.loss) for step in self.steps["stock"])

    def loss_difference(self) -> float:
        """The largest difference of the loss on the same completions."""
        return max((abs(a.loss - b.loss) for a, b in self.comparable()), default=float("nan"))

    def relative_difference(self, metric: str) -> float:
        """The largest difference of a logged metric on the same completions, as a share of its stock value."""
        pairs = [(a.metrics[metric], b.metrics[metric]) for a, b in self.comparable() if metric in a.metrics]
        return max((abs(a - b) / abs(a) for a, b in pairs), default=float("nan"))

    def rewards(self, name: str) -> list[float]:
        """What TRL logs about the rewards, step by step of the stock side."""
        return [step.metrics[name] for step in self.steps["stock"]]

    def failures(self, at_least: float) -> list[str]:
        """Why this run does not show what it should; empty when it does."""
        found = []
        if self.warm_up_loss[1] > self.warm_up_loss[0] / 2:
            found.append(f"the warm-up taught little: loss {self.warm_up_loss[0]:.1f} to {self.warm_up_loss[1]:.1f}")
        if max(self.rewards("frac_reward_zero_std")) == 1 or min(self.rewards("reward")) <= 0:
            found.append("a step in which no group's rewards vary, or none was earned: its advantages are all zero")
        if min(step.metrics["grad_norm"] for steps in self.steps.values() for step in steps) <= 0:
            found.append("a step without a gradient")
        if len(self.comparable()) < len(self.steps["stock"]):
            found.append(
                f"only {len(self.comparable())} of {len(self.steps['stock'])} steps sampled the same completions"
            )
        if not self.loss_difference() <= TOLERANCE * self.loss_scale():
            found.append(f"losses differ by {self.loss_difference():.1e}, more than {TOLERANCE:g} of the largest")
        for metric in DEPENDENT:
            if not self.relative_difference(metric) <= TOLERANCE:
                found.append(f"{metric} differs by {self.relative_difference(metric):.1e} of its value")
        if self.ratio("seconds") < at_least:
            found.append(f"the patched step is {self.ratio('seconds'):.2f}x faster; asked for is {at_least:g}x")
        return found


def run(settings: Settings) -> Result:
    """Build and warm up the model, then train both sides in turn."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns) as progress, tempfile.TemporaryDirectory() as folder:
        total = settings.warm_up + 2 * (1 + settings.rounds * settings.steps)
        bar = progress.add_task("importing torch, transformers, TRL", total=total)
        import training
        from transformers.utils import logging

        logging.disable_progress_bar()
        progress.update(bar, description="tokenizer, model, task")
        tokenizer = training.build_tokenizer(settings.vocabulary)
        task = training.Task.create(512, min_length=6)
        model = training.build_model(tokenizer, hidden=settings.hidden, layers=settings.layers)
        losses = []
        for loss in training.warm_up(model, tokenizer, task, steps=settings.warm_up):
            losses.append(loss)
            progress.update(bar, advance=1, description=f"supervised warm-up, loss {loss:.2f}")
        model.save_pretrained(Path(folder) / "warm")
        steps = _Rounds(settings, tokenizer, task, Path(folder), lambda **what: progress.update(bar, **what)).run()
    return Result(settings, _machine(), steps, (losses[0], losses[-1]), elapsed())


@dataclass
class _Rounds:
    """One untimed and then the timed rounds; every round trains each side from the same weights with the same seed."""

    settings: Settings
    tokenizer: Any
    task: Any
    folder: Path  # holds the warmed-up model in warm/
    show: Callable[..., None]

    def run(self) -> dict[str, list[Any]]:
        """The timed steps of both sides."""
        steps: dict[str, list[Any]] = {side: [] for side in SIDES}
        longest = 0.0
        checkpoint = self.folder / "warm"
        for number in range(self.settings.rounds + 1):
            if number > 2 and elapsed() + longest > self.settings.budget:
                break
            begun, following = elapsed(), self.folder / f"round{number}"
            for side in SIDES if number % 2 else SIDES[::-1]:  # who goes first alternates
                recorded = self._train(side, number, checkpoint, following)
                if number > 0:
                    steps[side] += recorded
            checkpoint = following  # the next round goes on from where stock TRL is now, on both sides
            longest = max(longest, elapsed() - begun)
        return steps

    def _train(self, side: str, number: int, checkpoint: Path, following: Path) -> list[Any]:
        import training

        from fastreward import patch

        self.show(
            description=f"{side}, " + (f"round {number} of {self.settings.rounds}" if number else "untimed round")
        )
        if side == "patched":
            patch.trl()
        try:
            return training.train(
                checkpoint,
                self.tokenizer,
                self.task,
                steps=self.settings.steps if number else 1,
                prompts=self.settings.prompts,
                generations=self.settings.generations,
                max_completion=self.settings.completion,
                learning_rate=self.settings.learning_rate,
                beta=self.settings.kl,
                seed=number,
                on_step=lambda _: self.show(advance=1),
                reference=self.folder / "warm",
                save_to=following if side == "stock" else None,
            )
        finally:
            patch.undo()


def _machine() -> dict[str, Any]:
    import torch
    import trl

    names = [
        line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line
    ]
    threads = torch.get_num_threads()
    return {"cpu": names[0] if names else "?", "threads": threads, "torch": torch.__version__, "trl": trl.__version__}


# ---- what it shows ---------------------------------------------------------------------------------------------------


def table(result: Result) -> Table:
    """The figures, stock beside patched."""
    settings, machine = result.settings, result.machine
    title = (
        f"GRPO on reasoning-gym spell_backward, vocabulary {settings.vocabulary:,}, {settings.prompts} prompts x "
        f"{settings.generations} completions, hidden {settings.hidden}, {settings.layers} layers, KL {settings.kl:g}\n"
        f"{machine['cpu']}, {machine['threads']} threads, torch {machine['torch']}, trl {machine['trl']}; "
        f"medians of {len(result.steps['stock'])} steps in {len(_by_round(result))} alternating rounds"
    )
    grid = Table("", "stock TRL", "fastreward", "ratio", title=title, title_justify="left")
    for name, field, scale, unit in (
        ("step", "seconds", 1.0, "s"),
        ("log-probs + loss + backward [1]", "scoring_seconds", 1.0, "s"),
        ("peak memory of that [2]", "scoring_peak_bytes", 2.0**-20, "MiB"),
    ):
        values = [f"{result.median(side, field) * scale:.2f} {unit}" for side in SIDES]
        grid.add_row(name, *values, f"[bold]{result.ratio(field):.2f}x[/bold]")
    grid.add_row("step, round by round", "", "", " ".join(f"{ratio:.2f}" for ratio in _by_round(result)))
    rewards, spread = result.rewards("reward"), result.rewards("reward_std")
    grid.add_row("reward, first and last step", f"{rewards[0]:.3f}  {rewards[-1]:.3f}", "", "")
    grid.add_row("reward deviation within groups", f"{min(spread):.3f} to {max(spread):.3f}", "", "")
    relative = result.loss_difference() / result.loss_scale()
    grid.add_row("largest difference of the loss [3]", "", f"{result.loss_difference():.1e}", f"{relative:.1e}")
    for metric in DEPENDENT:
        name = f"largest difference of {metric} [3]"
        grid.add_row(name, "", "", f"{result.relative_difference(metric):.1e}")
    return grid


NOTES = """\
[1] the policy's and the reference model's; the transformer's own forward and backward are in it, on both sides alike.
[2] growth of the process's resident set above its level when scoring began (Linux's high-water mark, reset each step).
[3] on the same completions; last column: as a share of the largest loss, of the metric's value."""


def _by_round(result: Result) -> list[float]:
    n = result.settings.steps
    medians = {
        side: [statistics.median(s.seconds for s in steps[i : i + n]) for i in range(0, len(steps), n)]
        for side, steps in result.steps.items()
    }
    return [a / b for a, b in zip(medians["stock"], medians["patched"], strict=True)]


def plot(result: Result, path: Path) -> None:
    """Both loss curves on top of each other, and where a step's time goes."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), width_ratios=(2, 1), layout="constrained")
    steps = range(1, len(result.steps["stock"]) + 1)
    left.plot(steps, [s.loss for s in result.steps["stock"]], color="#9aa5b1", linewidth=6, label="stock TRL")
    left.plot(steps, [s.loss for s in result.steps["patched"]], color="#c2410c", linewidth=1.6, label="fastreward")
    left.set(xlabel="training step", ylabel="GRPO loss", title=f"largest difference {result.loss_difference():.1e}")
    left.xaxis.get_major_locator().set_params(integer=True)
    left.legend(frameon=False)
    scoring = [result.median(side, "scoring_seconds") for side in SIDES]
    rest = [result.median(side, "seconds") - part for side, part in zip(SIDES, scoring, strict=True)]
    labels = ("stock TRL", "fastreward")
    right.bar(labels, scoring, color="#c2410c", label="log-probs + loss + backward")
    right.bar(labels, rest, bottom=scoring, color="#d9dee4", label="generation, optimizer, rest")
    right.set(ylabel="seconds per step (median)", title=f"{result.ratio('seconds'):.2f}x faster per step")
    right.legend(frameon=False, fontsize=8)
    right.margins(y=0.25)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)


def _save(result: Result, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    fields = ("seconds", "scoring_seconds", "scoring_peak_bytes")
    summary = {
        "settings": asdict(result.settings),
        "machine": result.machine,
        "median": {side: {name: result.median(side, name) for name in fields} for side in SIDES},
        "ratio": {name: result.ratio(name) for name in fields} | {"step_by_round": _by_round(result)},
        "largest_loss_difference": result.loss_difference(),
        "largest_loss": result.loss_scale(),
        "largest_relative_difference": {metric: result.relative_difference(metric) for metric in DEPENDENT},
        "warm_up_loss": result.warm_up_loss,
        "total_seconds": result.seconds,
        "steps": {
            side: [{k: v for k, v in asdict(s).items() if k != "completions"} for s in steps]
            for side, steps in result.steps.items()
        },
    }
    (folder / "demo.json").write_text(json.dumps(summary, indent=1))
    plot(result, folder / "demo.png")


def main(
    rounds: Annotated[int, typer.Option(min=1, help="Timed rounds at most, after one untimed.")] = 4,
    budget: Annotated[
        float, typer.Option(help="Seconds; a third or later round that would take longer is left out.")
    ] = 215,
    steps: Annotated[int, typer.Option(min=1, help="Training steps of each side in a round.")] = 3,
    warm_up: Annotated[int, typer.Option(min=1, help="Supervised steps before.")] = 60,
    prompts: Annotated[int, typer.Option(min=1, help="Prompts per step.")] = 2,
    generations: Annotated[int, typer.Option(min=2, help="Completions per prompt.")] = 8,
    completion: Annotated[int, typer.Option(min=1, help="Longest completion, in tokens.")] = 16,
    hidden: Annotated[int, typer.Option(help="Width of the model.")] = 128,
    layers: Annotated[int, typer.Option(min=1)] = 2,
    vocabulary: Annotated[int, typer.Option(min=2000, help="Words of the vocabulary.")] = 151_936,
    learning_rate: Annotated[float, typer.Option()] = 1e-3,
    kl: Annotated[
        float, typer.Option(min=1e-6, help="TRL's beta; above 0, so that the loss hangs on every log-prob.")
    ] = 0.1,
    at_least: Annotated[float, typer.Option(help="Fail where the patched step is not this much faster.")] = 1.5,
    output: Annotated[Path, typer.Option(help="Where demo.png and demo.json go.")] = Path("demo_out"),
) -> None:
    """Train with stock TRL and with TRL on fastreward, in turn, and compare time, memory and loss."""
    settings = Settings(
        rounds, budget, steps, warm_up, prompts, generations, completion, hidden, layers, vocabulary, learning_rate, kl
    )
    result = run(settings)
    _save(result, output)
    rich.print(table(result))
    print(NOTES)
    print(f"{result.seconds:.0f} s in all; {output / 'demo.png'}, {output / 'demo.json'}")
    failures = result.failures(at_least)
    for failure in failures:
        rich.print(f"[bold red]not shown:[/bold red] {failure}")
    raise typer.Exit(1 if failures else 0)


if __name__ == "__main__":
    typer.run(main)

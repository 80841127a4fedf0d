"""Tables and a plot of what was measured."""

from __future__ import annotations

import math
import platform
import shutil
import subprocess
from datetime import date
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from fastreward.bench import growing
from fastreward.bench.case import OURS, Timing
from fastreward.bench.run import Result
from fastreward.bench.targets import Verdict

_ABOVE = "; above 100 %: the rate was measured in a slower moment, or the data fits in a cache"
_OURS_COLOUR, _PEER_COLOUR = "#1b7f5c", "#9aa5b1"
_LIMIT = "limit"
_PEER_STYLE: dict[str, Any] = {"marker": "o", "markersize": 3, "linewidth": 1}
_STYLES: dict[str, dict[str, Any]] = {  # lines of a sweep
    OURS: {"marker": "o", "markersize": 3, "linewidth": 2, "color": _OURS_COLOUR},
    _LIMIT: {"linestyle": "--", "linewidth": 1, "color": "black"},
}


def print_case(console: Console, result: Result) -> None:
    """One case: a row per contender, then the peers that are not there and why."""
    outcome = result.outcome
    case, limit = outcome.case, outcome.limit
    table = Table(title=f"[bold]{case.title}[/]   {outcome.rounds} rounds", title_justify="left", show_edge=False)
    table.add_column("")
    headings = (
        "median ms",
        "GB/s",
        "of limit",
        "p99 ms" if case.tail else "extra MiB",
        "vs fastreward",
        "first ms",
        "error",
    )
    for heading in headings:
        table.add_column(heading, justify="right")
    for t in outcome.timings:
        ours = t.name == OURS
        table.add_row(
            f"[bold green]{t.name}[/]" if ours else t.name,
            f"{t.median * 1e3:.3g}" if t.median < 1 else f"{t.median * 1e3:.0f}",
            f"{case.traffic.total / t.median / 1e9:.1f}",
            f"{limit / t.median:.0%}",
            _extra(t, case.tail),
            "" if ours else f"{t.median / outcome.ours.median:.2f}x",
            f"{t.first * 1e3:.3g}" if t.first < 1 else f"{t.first * 1e3:.0f}",
            f"{t.error:.1e}",
        )
    bandwidth = outcome.bandwidth
    table.caption = (
        f"limit {limit * 1e3:.3g} ms: {case.traffic.total / 1e6:.4g} MB at {bandwidth.read / 1e9:.1f} GB/s read, "
        f"{bandwidth.copy / 1e9:.1f} GB/s copy, "
        + (f"{case.traffic.flops / 1e9:.4g} GFLOP at {bandwidth.flops / 1e9:.0f} GFLOP/s, " if case.gemm else "")
        + ("measured before the rounds, idle" if case.tail else "measured in the same rounds")
        + (_ABOVE if any(limit > 1.005 * t.median for t in outcome.timings) else "")
    )
    table.caption_justify = "left"
    console.print(table)
    for name, reason in case.absent.items():
        colour = "red" if reason.startswith(("failed", "not equivalent")) else "dim"
        console.print(f" [{colour}]{name}: {reason}[/]", highlight=False)
    console.print()


def _extra(timing: Timing, tail: bool) -> str:
    if tail:
        return f"{timing.p99 * 1e3:.3g}"
    return "-" if timing.peak is None else f"{timing.peak / 2**20:.1f}"


def print_summary(console: Console, results: list[Result]) -> None:
    """One row per case, with the verdict on every promise."""
    table = Table(title="[bold]Summary[/]", title_justify="left")
    for heading in ("case", "ms", "of limit", "fastest peer vs fastreward", "promises (docs/benchmarks.md)"):
        table.add_column(heading)
    for result in results:
        outcome = result.outcome
        peers = [t for t in outcome.timings if not t.name.startswith(OURS)]
        best = min(peers, key=lambda t: t.median, default=None)
        table.add_row(
            outcome.case.title,
            f"{outcome.ours.median * 1e3:.3g}",
            f"{outcome.limit / outcome.ours.median:.0%}",
            "-" if best is None else f"{best.name}, {best.median / outcome.ours.median:.2f}x",
            "\n".join(_verdict(v) for v in result.verdicts) or "[dim]none for this case[/]",
        )
    console.print(table)


def _verdict(verdict: Verdict) -> str:
    text = f"{verdict.target.text}: {verdict.measured}"
    if verdict.met is None:
        return f"[dim]not judged: {text}[/]"
    return f"[green]met[/] {text}" if verdict.met else f"[red]missed[/] {text}"


def machine(device: str) -> dict[str, Any]:
    """Facts about the run: machine, date, and which fastreward."""
    from fastreward import doctor

    facts: dict[str, Any] = {
        "date": date.today().isoformat(),
        "fastreward": doctor.version("fastreward"),
        "commit": _commit(Path(__file__).resolve().parents[1]),
        "cpu": doctor.cpu_model(),
        "threads": torch.get_num_threads(),
        "isa": doctor.isa(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "device": device,
    }
    if device == "cuda":
        facts["gpu"] = torch.cuda.get_device_name()
    return facts


def _commit(package: Path) -> str:
    """The commit: of a checkout as git tells it, of an installed package as its build has written it down."""
    if (package.parent / ".git").exists() and shutil.which("git") is not None:
        command = ["git", "-C", str(package.parent), "describe", "--always", "--dirty"]
        run = subprocess.run(command, capture_output=True, text=True, check=False)
        if run.stdout.strip():
            return run.stdout.strip()
    recorded = package / "_sources" / "commit.txt"
    return recorded.read_text().strip() if recorded.exists() else "not recorded by the build"


def plot(results: list[dict[str, Any]], path: Path) -> None:
    """Bars of the median time of every contender, one panel per case, the measured limit as a line."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    columns = min(2, len(results))
    rows = -(-len(results) // columns)
    figure, axes = pyplot.subplots(rows, columns, figsize=(7 * columns, 2.6 * rows), squeeze=False)
    for axis in axes.flat[len(results) :]:
        axis.set_axis_off()
    for axis, result in zip(axes.flat, results, strict=False):
        contenders = result["contenders"][::-1]
        times = [c["median_ms"] for c in contenders]
        colours = [_OURS_COLOUR if c["name"].startswith(OURS) else _PEER_COLOUR for c in contenders]
        axis.barh([c["name"] for c in contenders], times, color=colours)
        for position, c in enumerate(contenders):
            factor = "" if c["name"] == OURS else f"  ({c['fastreward_speedup']:.1f}x)"
            axis.text(c["median_ms"], position, f" {c['median_ms']:.3g} ms{factor}", va="center", fontsize=8)
        axis.axvline(result["limit_ms"], color="black", linestyle="--", linewidth=1)
        axis.set_xlim(0, max(*times, result["limit_ms"]) * 1.35)
        axis.set_title(f"{result['operation']} {result['case']} {result['shape']} {result['dtype']}", fontsize=9)
        axis.spines[["top", "right"]].set_visible(False)
    figure.supxlabel("median ms; dashed: the limit measured in the same run", fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def plot_sweep(results: list[dict[str, Any]], path: Path) -> None:
    """Time per token against B and against T, a row of panels for each case; the measured limit dashed."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    cases: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for result in results:
        cases.setdefault((result["operation"], result["case"], result["dtype"]), []).append(result)
    figure, axes = pyplot.subplots(len(cases), 2, figsize=(12, 3 * len(cases)), squeeze=False)
    for panels, (case, sized) in zip(axes, cases.items(), strict=True):
        dimensions = growing(case[0])
        for axis in panels[len(dimensions) :]:
            axis.set_axis_off()
        whole = max((result["shape"] for result in sized), key=math.prod)
        for axis, d in zip(panels, dimensions, strict=False):
            along = [r for r in sized if [*r["shape"][:d], *r["shape"][d + 1 :]] == [*whole[:d], *whole[d + 1 :]]]
            _lines(axis, sorted(along, key=lambda r: int(r["shape"][d])), d, dimensions)
            sizes = ", ".join("BT"[d] if k == d else str(size) for k, size in enumerate(whole))
            axis.set_title(f"{' '.join(case)} [{sizes}]", fontsize=9)
        panels[len(dimensions) - 1].legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    figure.supylabel("median ns per token (group: per rollout)", fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _lines(axis: Any, results: list[dict[str, Any]], along: int, dimensions: tuple[int, ...]) -> None:
    """A line for each contender and the limit's; what grows is counted."""
    lines: dict[str, list[tuple[int, float]]] = {}
    for result in results:
        count = math.prod(result["shape"][d] for d in dimensions)
        times = {c["name"]: c["median_ms"] for c in result["contenders"]} | {_LIMIT: result["limit_ms"]}
        for name, ms in times.items():
            lines.setdefault(name, []).append((result["shape"][along], ms * 1e6 / count))
    for name, points in lines.items():
        axis.plot(*zip(*points, strict=True), label=name, **_STYLES.get(name, _PEER_STYLE))
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    axis.set_xlabel("BT"[along], fontsize=8)
    axis.spines[["top", "right"]].set_visible(False)

"""A picture of a comparison."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import numpy as np
from torch import Tensor

from fastreward._arguments import check

_DOTS: Final = 20_000  # of more tokens every n-th is drawn
_BINS: Final = 80
_BLUE, _RED, _INK = "#2467b3", "#c4452f", "#22303c"


def draw(path: Path, per_token: dict[str, Tensor], cu_seqlens: Tensor, title: str, alarm: bool) -> None:
    """Log-probs of B against A's; how often each difference occurs; its size along the sequences."""
    check.output_file("path", path, picture=True)
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    a, b, difference = (per_token[name].numpy() for name in ("a", "b", "difference"))
    starts = cu_seqlens.numpy()
    position = np.arange(len(a)) - np.repeat(starts[:-1], np.diff(starts))
    known = np.isfinite(difference)
    with matplotlib.rc_context({"text.hinting": "none"}):
        figure, (left, middle, right) = pyplot.subplots(1, 3, figsize=(13, 4.2), layout="constrained")
        try:
            _against(left, a[known], b[known])
            _histogram(middle, difference[known])
            _along(right, position[known], np.abs(difference[known]))
            for axis in (left, middle, right):
                axis.spines[["top", "right"]].set_visible(False)
            figure.suptitle(title, fontsize=10, color=_RED if alarm else _INK)
            figure.savefig(path, dpi=110)
        except OSError as error:
            raise ValueError(f"{path}: {error.strerror or error}") from error
        finally:
            pyplot.close(figure)


def _against(axis: Any, a: Any, b: Any) -> None:
    every = max(1, len(a) // _DOTS)
    axis.scatter(a[::every], b[::every], s=3, alpha=0.4, color=_BLUE, linewidths=0, rasterized=True)
    low = min(a.min(initial=0.0), b.min(initial=0.0), -1e-3)
    axis.plot([low, 0], [low, 0], color=_INK, linewidth=0.8, linestyle="--")
    axis.set(xlabel="log-prob on A", ylabel="log-prob on B", title="both sides")


def _histogram(axis: Any, difference: Any) -> None:
    far = float(np.quantile(np.abs(difference), 0.995)) if len(difference) else 0.0
    bounds = (-far, far) if far > 0 else (-1.0, 1.0)
    axis.hist(np.clip(difference, *bounds), bins=_BINS, range=bounds, color=_BLUE)
    axis.set_yscale("symlog", linthresh=1)
    axis.set(xlabel="log B - log A", ylabel="tokens", title="differences (0.5 % beyond the ends)")


def _along(axis: Any, position: Any, size: Any) -> None:
    """Mean and largest |difference| of each stretch of positions."""
    if len(position):
        edges = np.unique(np.linspace(0, position.max() + 1, _BINS + 1).astype(int))
        bins = np.searchsorted(edges, position, side="right") - 1
        count = np.bincount(bins, minlength=len(edges) - 1)
        there = count > 0
        mean = np.bincount(bins, size, minlength=len(edges) - 1)[there] / count[there]
        largest = np.zeros(len(edges) - 1)
        np.maximum.at(largest, bins, size)
        axis.plot(edges[:-1][there], mean, color=_BLUE, label="mean", drawstyle="steps-post")
        axis.plot(edges[:-1][there], largest[there], color=_RED, label="largest", linewidth=0.8, drawstyle="steps-post")
        axis.legend(frameon=False, fontsize=8)
        axis.set_yscale("symlog", linthresh=1e-4)
    axis.set(xlabel="token of its sequence", ylabel="|log B - log A|", title="along the sequences")

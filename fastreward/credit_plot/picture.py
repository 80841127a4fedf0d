"""A picture of credit: for each rollout a line of coloured tokens per scheme, the same tokens below one another."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import torch

from fastreward._arguments import check
from fastreward.credit_plot.schemes import Scheme
from fastreward.prefix_tree.plot import NO_GLYPH
from fastreward.prefix_tree.rollouts import Rollouts

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_NEGATIVE, _NEUTRAL, _POSITIVE = "#c4452f", "#ffffff", "#2467b3"
_INK, _FAINT, _NOTHING = "#22303c", "#5c6b78", "#eef1f4"
_WRITTEN: Final = 40  # tokens of a rollout that are written above it; of more only positions
_ABREAST: Final = 24  # tokens of all rollouts that stand beside one another
_LINE: Final = 0.26  # inches
_ROUNDING: Final = 1e-5  # what rounding and an eps leave of a 0


def draw(
    path: Path,
    rollouts: Rollouts,
    schemes: Sequence[Scheme],
    rows: Sequence[int],
    *,
    decode: Callable[[list[int]], str] | None = None,
    metadata: dict[str, str] | None = None,
) -> None:
    """Draws the advantages of some rows under each scheme into a file.

    A scheme's strongest colour is its largest |advantage| in these rows, so that schemes of other scales can be
    compared; numbers are written where there is room. decode: token ids to text; else the ids are written.

    Raises:
        ValueError: a file that can't be written, or of another kind than .png, .svg and .pdf.
        ModuleNotFoundError: matplotlib is not installed.
    """
    check.output_file("path", path, picture=True)
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    tree = rollouts.tree()
    lengths = [int(n) for n in tree.lengths]
    abreast = sum(lengths[row] for row in rows) <= _ABREAST
    shape = (1, len(rows)) if abreast else (len(rows), 1)
    high = (len(schemes) * _LINE + 0.9) * shape[0] + 0.5
    widths = [max(lengths[row], 1) for row in rows] if abreast else [1]
    with matplotlib.rc_context({"text.hinting": "none"}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=NO_GLYPH)
        figure, grid = pyplot.subplots(
            *shape, figsize=(13, min(high, 200)), layout="constrained", squeeze=False, width_ratios=widths
        )
        try:
            shares = _shares(schemes, rows)
            for k, (row, ax) in enumerate(zip(rows, grid.flat, strict=True)):
                image = _draw_row(ax, rollouts, schemes, [x[k] for x in shares], row, lengths[row])
                _label(ax, rollouts, schemes, row, lengths[row], first=k == 0 or not abreast, decode=decode)
            bar = figure.colorbar(image, ax=grid, shrink=min(1.0, 2.5 / high), aspect=16, fraction=0.02, pad=0.01)
            bar.set_label("advantage / the scheme's\nlargest |advantage|", fontsize=8, color=_FAINT)
            bar.ax.tick_params(labelsize=7, colors=_FAINT)
            bar.outline.set_visible(False)
            figure.savefig(path, dpi=110, metadata=metadata)
        except OSError as error:
            raise ValueError(f"{path}: {error.strerror or error}") from error
        finally:
            pyplot.close(figure)


def _shares(schemes: Sequence[Scheme], rows: Sequence[int]) -> list[torch.Tensor]:
    """Advantages [rows, T] of each scheme over its largest."""
    chosen = [scheme.advantages[list(rows)] for scheme in schemes]
    largest = [float(x.nan_to_num(0.0, 0.0, 0.0).abs().max()) for x in chosen]
    return [x / (most if most > _ROUNDING else 1.0) for x, most in zip(chosen, largest, strict=True)]


def _draw_row(
    ax: Axes, rollouts: Rollouts, schemes: Sequence[Scheme], shares: Sequence[torch.Tensor], row: int, length: int
) -> Any:
    from matplotlib.colors import LinearSegmentedColormap, Normalize

    palette = LinearSegmentedColormap.from_list("advantage", [_NEGATIVE, _NEUTRAL, _POSITIVE])
    counted = np.ones(length, dtype=bool) if rollouts.mask is None else rollouts.mask[row, :length].numpy()
    cells = np.stack([x[:length].numpy() for x in shares]) if schemes else np.zeros((0, length))
    shown = np.where(counted, cells, np.nan)
    if not shown.size:
        shown = np.full((max(len(schemes), 1), 1), np.nan)
    colours = palette.with_extremes(bad=_NOTHING)
    image = ax.imshow(shown, cmap=colours, norm=Normalize(-1, 1), aspect="auto", interpolation="nearest")
    if length <= _WRITTEN:
        for k, scheme in enumerate(schemes):
            for t in np.flatnonzero(counted).tolist():
                style: dict[str, Any] = {
                    "ha": "center",
                    "va": "center",
                    "fontsize": 7,
                    "gid": f"{scheme.name}-{row}-{t}",
                }
                dark = abs(cells[k, t]) > 0.6
                ax.text(t, k, short(float(scheme.advantages[row, t])), color="white" if dark else _INK, **style)
    return image


def _label(
    ax: Axes, rollouts: Rollouts, schemes: Sequence[Scheme], row: int, length: int, *, first: bool,
    decode: Callable[[list[int]], str] | None,
) -> None:  # fmt: skip
    ax.set_title(f"sequence {row}, reward {float(rollouts.rewards[row]):.4g}", loc="left", fontsize=9, color=_INK)
    ax.tick_params(length=0, labelsize=8, colors=_INK)
    ax.spines[:].set_visible(False)
    ax.set_yticks(range(len(schemes)), [scheme.name for scheme in schemes] if first else [""] * len(schemes))
    if length <= _WRITTEN:
        tokens = [int(token) for token in rollouts.tokens[row, :length]]
        written = [_word(str(token) if decode is None else decode([token])) for token in tokens]
        turned = 0 if all(len(word) < 7 for word in written) and length < 20 else 60
        ax.set_xticks(range(length), written, rotation=turned, parse_math=False)
    for k in range(1, len(schemes)):
        ax.axhline(k - 0.5, color="white", linewidth=1)


def _word(text: str) -> str:
    """One line, of a few letters."""
    text = " ".join(text.replace("\n", "↵").split())
    return text if len(text) <= 14 else f"{text[:13]}…"


def short(x: float) -> str:
    """An advantage with its sign, in a few digits; 0 has none."""
    if abs(x) <= _ROUNDING:
        return "0"
    return f"{x:+.2f}" if 0.005 <= abs(x) < 100 else f"{x:+.{1 if abs(x) < 1 else 3}g}"

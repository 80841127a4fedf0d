"""A picture of one group of a prefix tree: tokens from left to right, values on the nodes, advantages on the edges."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from fastreward._arguments import check
from fastreward._arguments.arrays import as_tensor
from fastreward.prefix_tree.operations import TreeOperations
from fastreward.prefix_tree.views import HostForest, node_numbers, number, row_names, shortened, statistics

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.cm import ScalarMappable

Decode = Callable[[list[int]], str]

_NEGATIVE, _NEUTRAL, _POSITIVE = "#c4452f", "#b4bdc6", "#2467b3"
_INK, _FAINT = "#22303c", "#5c6b78"
NO_GLYPH = "Glyph .* missing from"  # matplotlib's warning of a letter that it draws as a box
_FONT = 7.5  # points
_DIGIT, _LETTER = 0.64 * _FONT, 0.54 * _FONT  # points that one is wide, on average
_HINTING = 0.06  # how much wider a text may get when the picture is saved with other dots per inch
_LEAST = 8  # letters of a shortened text
_BEND = 0.02  # share of the picture's width in which an edge gets to its node's height


@dataclass(frozen=True)
class _Node:
    """A node's place in the picture: its edge leads from (start, y of the parent) to (end, y)."""

    number: int
    parent: int  # -1 for the root
    start: int
    end: int
    share: float  # of the group's sequences that pass through it
    y: float
    slot: float | None  # the line of the sequences that end here
    value: float | None
    advantage: float | None


def plot(
    tree: TreeOperations,
    values: Tensor | None = None,
    advantages: Tensor | None = None,
    *,
    rewards: Tensor | None = None,
    group: int = 0,
    decode: Decode | None = None,
    ax: Axes | None = None,
    max_nodes: int = 400,
) -> Axes:
    """Draws one group of the tree from left to right; the horizontal axis counts tokens.

    A node is a dot at the end of its tokens, coloured by its value. The edge that leads to it is coloured by its
    advantage, the same distance from 0 as strong on either side, and as wide as many sequences pass through it. Labels
    that would lie on one another are left out.

    Args:
        values, advantages: [nodes], any real dtype.
        rewards: [B], written beside the sequences' ends.
        group: which one, by its number as they come in the batch.
        decode: token ids to text, such as a tokenizer's `decode`; else the ids themselves are written.
        ax: where to draw; a new pyplot figure of fitting size if None.
        max_nodes: the most nodes that are drawn.

    Raises:
        TypeError, ValueError: wrong shapes, a group that is not there, more than max_nodes nodes.
        ModuleNotFoundError: matplotlib is not installed.
    """
    check.require_matplotlib()
    forest = HostForest(tree)
    first, last = forest.extent(group)
    if last - first > max_nodes:
        raise ValueError(
            f"max_nodes: group {group} has {last - first:,} nodes, more than the {max_nodes:,} that are drawn; "
            "raise it, or draw a tree of some of the sequences"
        )
    nodes = _nodes(forest, first, last, _given(tree, "values", values), _given(tree, "advantages", advantages))
    ends = _end_labels(forest, nodes, _rewards(tree, rewards))
    ax = _axes(len(ends)) if ax is None else ax
    _prepare(ax, nodes, len(ends))
    edge_colours = _draw_edges(ax, nodes)
    node_colours = _draw_nodes(ax, nodes)
    _draw_scale(ax, node_colours, "value")
    _draw_scale(ax, edge_colours, "advantage")
    write_title(ax, tree, group, None if tree.num_groups == 1 else str(group))
    _draw_ends(ax, nodes, ends)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=NO_GLYPH)
        ax.figure.get_figure(root=True).draw_without_rendering()  # only now the axes have their size, and texts theirs
        _write(ax, [*_value_labels(nodes), *_advantage_labels(nodes), *_token_labels(ax, nodes, forest, decode)])
    return ax


# ------------------------------------------------------------------------------------------------------------ layout
def _given(tree: TreeOperations, name: str, values: Tensor | None) -> list[float] | None:
    return None if values is None else node_numbers(tree, name, values)


def _rewards(tree: TreeOperations, rewards: Tensor | None) -> list[float] | None:
    if rewards is None:
        return None
    given = as_tensor(rewards)
    check.shape("rewards", check.tensor("rewards", given), (tree.num_rows,), "one per sequence")
    numbers: list[float] = given.detach().double().tolist()
    return numbers


def _nodes(
    forest: HostForest, first: int, last: int, values: list[float] | None, advantages: list[float] | None
) -> dict[int, _Node]:
    """The group's nodes by number, in pre-order: each node where sequences end gets a line, from the top down."""
    field = {name: column[first:last].tolist() for name, column in forest.nodes.items()}
    slots: dict[int, float] = {}
    for n in range(first, last):
        if forest.ending(n):
            slots[n] = float(len(slots))
    y: dict[int, float] = {}
    below: dict[int, list[float]] = {}
    for n in reversed(range(first, last)):  # children before their parent
        lines = below.get(n, []) + ([slots[n]] if n in slots else [])
        y[n] = (min(lines) + max(lines)) / 2
        below.setdefault(field["parent"][n - first], []).append(y[n])
    return {
        n: _Node(
            n,
            field["parent"][n - first],
            field["edge_start"][n - first],
            field["edge_start"][n - first] + field["edge_length"][n - first],
            field["count"][n - first] / field["count"][0],
            y[n],
            slots.get(n),
            None if values is None else values[n],
            None if advantages is None else advantages[n],
        )
        for n in range(first, last)
    }


def _axes(lines: int) -> Axes:
    from matplotlib import pyplot

    line = min(0.46, max(0.24, 16 / max(lines, 1)))  # inches
    _, ax = pyplot.subplots(figsize=(13, 1.6 + line * max(lines, 3)), layout="constrained")
    return ax


def _prepare(ax: Axes, nodes: dict[int, _Node], lines: int) -> None:
    from matplotlib.ticker import MaxNLocator

    longest = _longest(nodes)
    ax.set_xlim(-0.015 * longest, 1.05 * longest)
    ax.set_ylim(max(lines, 1) - 0.4, -0.6)  # the first line is the highest
    ax.xaxis.set_major_locator(MaxNLocator(nbins="auto", integer=True))
    ax.set_xlabel("tokens", fontsize=9, color=_FAINT)
    ax.tick_params(labelsize=8, colors=_FAINT)
    ax.set_yticks([])
    ax.spines[["left", "top", "right"]].set_visible(False)
    ax.spines["bottom"].set_color(_NEUTRAL)


def _longest(nodes: dict[int, _Node]) -> int:
    return max(1, *(node.end for node in nodes.values()))


def _bend(node: _Node, longest: int) -> float:
    """How far an edge needs to get from its parent's height to its own."""
    return min(_BEND * longest, 0.5 * (node.end - node.start))


# ----------------------------------------------------------------------------------------------------- edges, nodes
def _draw_edges(ax: Axes, nodes: dict[int, _Node]) -> ScalarMappable | None:
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import LinearSegmentedColormap, Normalize

    found = _finite([node.advantage for node in nodes.values()])
    most = max(map(abs, found), default=0.0) or 1.0
    palette = LinearSegmentedColormap.from_list("advantage", [_NEGATIVE, _NEUTRAL, _POSITIVE])
    colours = ScalarMappable(Normalize(-most, most), palette.with_extremes(bad=_NEUTRAL))
    longest = _longest(nodes)
    # Narrow edges over wide ones, where they leave the same node.
    for node in sorted(nodes.values(), key=lambda node: -node.share):
        if node.parent >= 0:
            _draw_curve(
                ax,
                (node.start, nodes[node.parent].y),
                _bend(node, longest),
                (node.end, node.y),
                edgecolor=_NEUTRAL if node.advantage is None else colours.to_rgba(np.array(node.advantage)),
                linewidth=_width(node),
                gid=f"edge-{node.number}",
                zorder=2,
            )
    return colours if any(node.advantage is not None for node in nodes.values()) else None


def _draw_curve(ax: Axes, begin: tuple[float, float], bend: float, end: tuple[float, float], **style: Any) -> None:
    """A line that gets to the height of its end within `bend`, and goes straight on from there."""
    from matplotlib.patches import PathPatch
    from matplotlib.path import Path

    (x, y), (right, height) = begin, end
    points = [begin, (x + bend / 2, y), (x + bend / 2, height), (x + bend, height), (right, height)]
    path = Path(points, [Path.MOVETO, Path.CURVE4, Path.CURVE4, Path.CURVE4, Path.LINETO])
    ax.add_patch(PathPatch(path, fill=False, capstyle="round", **style))


def _width(node: _Node) -> float:
    return 1.2 + 6 * node.share


def _draw_nodes(ax: Axes, nodes: dict[int, _Node]) -> ScalarMappable | None:
    from matplotlib import colormaps
    from matplotlib.colors import Normalize

    x, y = [node.end for node in nodes.values()], [node.y for node in nodes.values()]
    style: dict[str, Any] = {"s": 46, "edgecolors": "white", "zorder": 4, "gid": "nodes", "clip_on": False}
    values = [node.value for node in nodes.values() if node.value is not None]
    if not values:
        ax.scatter(x, y, color=_INK, **style)
        return None
    found = _finite(values)
    low, high = min(found, default=0.0), max(found, default=1.0)
    if low == high:
        low, high = low - 0.5, high + 0.5
    return ax.scatter(
        x,
        y,
        c=values,
        cmap=colormaps["viridis"].with_extremes(bad=_NEUTRAL),
        norm=Normalize(low, high),
        plotnonfinite=True,
        **style,
    )


def _finite(values: Sequence[float | None]) -> list[float]:
    return [value for value in values if value is not None and abs(value) < float("inf")]


def _draw_scale(ax: Axes, colours: ScalarMappable | None, name: str) -> None:
    if colours is not None:
        bar = ax.figure.colorbar(colours, ax=ax, shrink=0.7, aspect=30, fraction=0.02, pad=0.02)
        bar.set_label(name, fontsize=9, color=_FAINT)
        bar.ax.tick_params(labelsize=8, colors=_FAINT)
        bar.outline.set_visible(False)


# ------------------------------------------------------------------------------------------------------------ labels
def write_title(ax: Axes, tree: TreeOperations, group: int, name: str | None, below: str = "") -> None:
    """Writes the sizes of the group, behind its name."""
    s, which = statistics(tree, group), "" if name is None else f"group {name}: "
    title = (
        f"{which}{number(s.sequences, 'sequence')}, {number(s.tokens, 'token')}, {s.unique_tokens:,} unique "
        f"({s.saved:.1%} saved), {number(s.branch_points, 'branch point')}{below}"
    )
    ax.set_title(title, loc="left", fontsize=10, color=_INK, parse_math=False)


def _end_labels(forest: HostForest, nodes: dict[int, _Node], rewards: list[float] | None) -> dict[int, str]:
    labels = {}
    for n, node in nodes.items():
        if node.slot is not None:
            rows = forest.ending(n)
            labels[n] = row_names(rows)
            if rewards is not None:
                each = [f"{rewards[row]:.4g}" for row in rows]
                labels[n] += f": reward {each[0] if len(set(each)) == 1 else shortened(each, separator=', ')}"
    return labels


def _draw_ends(ax: Axes, nodes: dict[int, _Node], labels: dict[int, str]) -> None:
    """The sequences at the right, each with a dotted line from where it ends."""
    right, longest = ax.get_xlim()[1], _longest(nodes)
    for n, label in labels.items():
        node = nodes[n]
        assert node.slot is not None
        style = {"edgecolor": _NEUTRAL, "linestyle": ":", "linewidth": 0.9, "zorder": 1, "gid": f"leader-{n}"}
        _draw_curve(ax, (node.end, node.y), _BEND * longest, (right, node.slot), **style)
        ax.annotate(
            label,
            (right, node.slot),
            xytext=(4, 0),
            textcoords="offset points",
            va="center",
            fontsize=8,
            color=_INK,
            annotation_clip=False,
            gid=f"end-{n}",
        )


@dataclass(frozen=True)
class _Label:
    """A text beside a node, at the first of its places where nothing is written yet."""

    gid: str
    text: str
    at: tuple[float, float]
    places: list[tuple[float, float, str, str]]  # points to the right and up, horizontal and vertical alignment
    color: str = _INK
    weight: str = "normal"


def _value_labels(nodes: dict[int, _Node]) -> list[_Label]:
    return [
        _Label(f"value-{n}", _short(node.value), (node.end, node.y), [(0, 5, "center", "bottom")], weight="bold")
        for n, node in nodes.items()
        if node.value is not None
    ]


def _advantage_labels(nodes: dict[int, _Node]) -> list[_Label]:
    labels = []
    for n, node in nodes.items():
        if node.advantage is not None and node.parent >= 0:
            color = _POSITIVE if node.advantage > 0 else _NEGATIVE if node.advantage < 0 else _FAINT
            down = -2 - _width(node) / 2
            places = [(-5.0, down, "right", "top"), (5.0, down, "left", "top")]
            labels.append(_Label(f"advantage-{n}", _short(node.advantage, "+"), (node.end, node.y), places, color))
    return labels


def _token_labels(ax: Axes, nodes: dict[int, _Node], forest: HostForest, decode: Decode | None) -> list[_Label]:
    """The tokens on the straight part of each edge, left of its node's value; where a leaf's don't fit, behind it."""
    longest, right = _longest(nodes), ax.get_xlim()[1]
    points = ax.get_window_extent().width * 72 / ax.figure.dpi / (right - ax.get_xlim()[0])  # of a token
    value = (
        0.0 if all(node.value is None for node in nodes.values()) else 3 * _DIGIT
    )  # half of what a value takes, and a gap
    wide = _DIGIT if decode is None else _LETTER
    labels = []
    for n, node in nodes.items():
        tokens = forest.edge_tokens(n)
        if not tokens:
            continue
        begin, up = node.start + _bend(node, longest), 2 + _width(node) / 2
        pieces, separator = ([str(t) for t in tokens], " ") if decode is None else (_one_line(decode(tokens)), "")
        text, x, offset = _fitting(pieces, separator, ((node.end - begin) * points - value) / wide), begin, 2.0
        if not text and not forest.children(n):
            x, offset = node.end, value + 6
            text = _fitting(pieces, separator, ((right - node.end) * points - offset) / wide)
        if text:
            labels.append(_Label(f"tokens-{n}", text, (x, node.y), [(offset, up, "left", "bottom")], _FAINT))
    return labels


def _write(ax: Axes, labels: list[_Label]) -> None:
    """Writes each label where it lies on no earlier one, or not at all."""
    from matplotlib.patheffects import withStroke

    taken: list[tuple[float, ...]] = []
    for label in labels:
        for right, up, horizontal, vertical in label.places:
            text = ax.annotate(
                label.text,
                label.at,
                xytext=(right, up),
                textcoords="offset points",
                ha=horizontal,
                va=vertical,
                color=label.color,
                weight=label.weight,
                fontsize=_FONT,
                gid=label.gid,
                parse_math=False,
                annotation_clip=False,
                path_effects=[withStroke(linewidth=2, foreground="white")],
                zorder=5,
            )
            left, bottom, end, top = text.get_window_extent().extents
            box = (left, bottom, end + _HINTING * (end - left), top)
            if not any(_overlap(box, other) for other in taken):
                taken.append(box)
                break
            text.remove()


def _overlap(a: tuple[float, ...], b: tuple[float, ...]) -> bool:
    """Whether two boxes (left, bottom, right, top) have a point in common."""
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def _short(x: float | None, sign: str = "") -> str:
    assert x is not None
    if x == 0:
        return "0"
    return f"{x:{sign}.2f}" if 0.005 <= abs(x) < 100 else f"{x:{sign}.{4 if abs(x) > 1 else 2}g}"


def _one_line(text: str) -> str:
    """Nothing that would begin a new line."""
    return " ".join(text.replace("\n", " ↵ ").split())


def _fitting(pieces: Sequence[str], separator: str, room: float) -> str:
    """The pieces in one line of at most `room` letters, shortened in the middle; nothing if that leaves too little."""
    whole = separator.join(pieces)
    if len(whole) <= room:
        return whole
    for kept in range(min(len(pieces) - 1, int(room)), 1, -1):
        tail = kept // 3
        text = separator.join([*pieces[: kept - tail], "…", *pieces[len(pieces) - tail :]])
        if _LEAST <= len(text) <= room:
            return text
    return ""

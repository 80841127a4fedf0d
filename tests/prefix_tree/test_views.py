"""Views of a prefix tree: statistics, drawings in text, networkx graphs, pictures."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from typing import Any

import matplotlib
import networkx
import numpy as np
import pytest
import torch
from matplotlib.colors import to_rgb, to_rgba
from rich.console import Console
from torch import Tensor

from fastreward import PrefixTree
from fastreward._arguments import check
from fastreward._runtime.layout import NODES
from fastreward.prefix_tree import plot as picture
from fastreward.prefix_tree import views

matplotlib.use("Agg")
from matplotlib import pyplot

_SEQUENCES = [[1, 2, 3, 4], [7, 8, 9], [1, 2, 5], [1, 2, 3, 4], [], [7, 8]]
_GROUPS = ["a", "b", "a", "a", "b", "b"]
_DRAWING = """\
PrefixTree: 6 sequences, 16 tokens, 8 of them unique (50.0% saved)
├── #0 root, count 3: rows 0, 2, 3
│   └── #1 [1 2], count 3: rows 0, 2, 3
│       ├── #2 [3 4], count 2: rows 0, 3
│       └── #3 [5], count 1: row 2
└── #4 root, count 3: rows 1, 4, 5; row 4 ends here
    └── #5 [7 8], count 2: rows 1, 5; row 5 ends here
        └── #6 [9], count 1: row 1"""


def _tree(sequences: list[list[int]] = _SEQUENCES, groups: list[str] | None = None) -> PrefixTree:
    longest = max(map(len, sequences), default=0)
    tokens = torch.tensor([row + [0] * (longest - len(row)) for row in sequences], dtype=torch.int64)
    lengths = torch.tensor([len(row) for row in sequences], dtype=torch.int64)
    groups = _GROUPS if sequences is _SEQUENCES else groups
    return PrefixTree(tokens.view(len(sequences), longest), group_ids=groups, lengths=lengths)


def _with_empty_places(tree: PrefixTree) -> PrefixTree:
    """The same tree as a GPU would hold it: with room behind the last node."""
    size, room = tree.num_nodes, 5
    behind = torch.zeros((len(NODES), room), dtype=torch.int64)
    behind[NODES.index("parent")] = -1
    tree.forest.nodes = torch.cat([tree.forest.nodes, behind], 1)
    tree.__dict__["num_nodes"] = size
    return tree


# -------------------------------------------------------------------------------------------------------- statistics
@pytest.mark.parametrize("room", [False, True])
def test_statistics(room: bool) -> None:
    s = (_with_empty_places(_tree()) if room else _tree()).statistics()
    assert (s.groups, s.sequences, s.distinct) == (2, 6, 5)
    assert (s.tokens, s.unique_tokens, s.saved, s.ideal_speedup) == (16, 8, 0.5, 2.0)
    assert (s.longest, s.mean_length) == (4, 16 / 6)
    assert s.mean_shared_prefix == (4 + 2 + 2 + 4 + 0 + 2) / 6
    assert (s.nodes, s.branch_points, s.max_depth, s.depth_histogram) == (7, 1, 2, (2, 2, 3))


def test_statistics_of_a_group() -> None:
    s = views.statistics(_tree(), 1)
    assert (s.groups, s.sequences, s.distinct, s.tokens, s.unique_tokens, s.saved) == (1, 3, 3, 5, 3, 1 - 3 / 5)
    assert (s.longest, s.mean_shared_prefix, s.nodes, s.branch_points) == (3, 4 / 3, 3, 0)
    assert s.depth_histogram == (1, 1, 1)
    with pytest.raises(ValueError, match=r"group: expected a number in \[0, 2\), the tree's groups, got 2"):
        views.statistics(_tree(), 2)


def test_statistics_of_nothing() -> None:
    s = _tree([]).statistics()
    assert (s.groups, s.sequences, s.tokens, s.saved, s.ideal_speedup, s.nodes) == (0, 0, 0, 0.0, 1.0, 0)
    assert (s.longest, s.mean_length, s.mean_shared_prefix, s.depth_histogram) == (0, 0.0, 0.0, ())
    s = _tree([[], []]).statistics()
    assert (s.groups, s.sequences, s.distinct, s.saved, s.nodes, s.depth_histogram) == (1, 2, 1, 0.0, 1, (1,))


def test_statistics_of_paths_and_branches() -> None:
    s = PrefixTree.from_paths([["a", "b", "c"], ["a", "d"]]).statistics()
    assert (s.tokens, s.unique_tokens, s.mean_shared_prefix, s.depth_histogram) == (5, 4, 1.0, (1, 1, 2, 1))
    s = _branches().statistics()
    assert (s.tokens, s.unique_tokens, s.branch_points, s.distinct) == (12, 7, 1, 3)
    assert s.mean_shared_prefix == (2 + 3 + 3) / 3


def _branches() -> PrefixTree:
    """Row 1 leaves row 0 after two tokens; row 2 is the first three tokens of row 1."""
    return PrefixTree.from_branches(torch.tensor([-1, 0, 1]), torch.tensor([0, 2, 3]), torch.tensor([4, 5, 3]))


def test_statistics_as_a_table() -> None:
    s = _tree().statistics()
    rows = [line.split("│")[1:3] for line in str(s).splitlines() if "│" in line]
    table = {name.strip(): value.strip() for name, value in rows}
    assert table == {
        "groups": "2",
        "sequences": "6",
        "distinct sequences": "5",
        "tokens": "16",
        "unique tokens": "8",
        "tokens saved": "50.0%",
        "ideal speed-up": "2.00x",
        "longest sequence": "4",
        "mean length": "2.7",
        "mean shared prefix": "2.3",
        "nodes": "7",
        "branch points": "1",
        "greatest depth": "2",
        "nodes at depth 0": "2",
        "nodes at depth 1": "2",
        "nodes at depth 2": "3",
    }
    console = Console(file=io.StringIO(), width=60)
    with console.capture() as capture:
        console.print(s)
    assert [line.rstrip() for line in capture.get().splitlines()] == str(s).splitlines()
    assert json.loads(json.dumps(s.as_dict())) == s.as_dict() | {"depth_histogram": [2, 2, 3]}


def test_a_deep_histogram_is_cut() -> None:
    s = PrefixTree.from_paths(torch.arange(40).view(1, 40)).statistics()
    assert s.max_depth == 40
    assert "nodes at depth 11" in str(s)
    assert "nodes at depth 12" not in str(s)
    assert [line.split("│")[2].strip() for line in str(s).splitlines() if "deeper nodes" in line] == ["29"]


# ----------------------------------------------------------------------------------------------------------- drawing
def test_drawing(monkeypatch: pytest.MonkeyPatch) -> None:
    assert str(_tree()) == _DRAWING
    assert str(_with_empty_places(_tree())) == _DRAWING
    for name, value in (("COLUMNS", "20"), ("FORCE_COLOR", "1"), ("TERM", "dumb")):
        monkeypatch.setenv(name, value)
    assert str(_tree()) == _DRAWING, "a drawing does not depend on the terminal"


def test_drawing_shortens() -> None:
    long = list(range(31))
    rows = [long, [*long, 50], *([60 + b] for b in range(2, 30, 2)), [5], [5]]
    lines = str(_tree(rows)).splitlines()
    assert lines[1] == "└── #0 root, count 18: rows 0-17"
    assert lines[2] == "    ├── #1 [0 1 2 3 4 ... 29 30] (31 tokens), count 2: rows 0, 1; row 0 ends here"
    assert lines[3] == "    │   └── #2 [50], count 1: row 1"
    assert lines[-1] == "    └── #17 [5], count 2: rows 16, 17"


@pytest.mark.parametrize(
    ("rows", "text"),
    [
        ([4], "row 4"),
        ([0, 1], "rows 0, 1"),
        ([0, 1, 2, 5, 7, 8], "rows 0-2, 5, 7, 8"),
        (list(range(0, 40, 2)), "rows 0, 2, 4, 6, 8, ..., 36, 38"),
    ],
)
def test_row_names(rows: list[int], text: str) -> None:
    assert views.row_names(rows) == text


def test_drawing_without_tokens() -> None:
    assert str(_branches()).splitlines()[1:] == [
        "└── #0 root, count 3: rows 0-2",
        "    └── #1 2 tokens, count 3: rows 0-2",
        "        ├── #2 2 tokens, count 1: row 0",
        "        └── #3 1 token, count 2: rows 1, 2; row 2 ends here",
        "            └── #4 2 tokens, count 1: row 1",
    ]
    assert str(_tree([])) == "PrefixTree: 0 sequences, 0 tokens, 0 of them unique (0.0% saved)"
    assert str(_tree([[], []])).splitlines()[1:] == ["└── #0 root, count 2: rows 0, 1"]


def test_drawing_two_that_end() -> None:
    tree = _tree([[1, 2], [1], [1]])
    assert str(tree).splitlines()[2] == "    └── #1 [1], count 3: rows 0-2; rows 1, 2 end here"


def test_drawing_of_packed_ignored_and_padded_tokens() -> None:
    """The ids come from where a row's sequence begins."""
    packed = PrefixTree(torch.tensor([9, 1, 2, 9, 1, 3]), cu_seqlens=torch.tensor([0, 3, 6]))
    padded = PrefixTree(
        torch.tensor([[0, 0, 9, 1, 2], [0, 9, 1, 3, 0]]),
        attention_mask=torch.tensor([[0, 0, 1, 1, 1], [0, 1, 1, 1, 0]]),
    )
    ignored = PrefixTree(
        torch.tensor([[9, 5, 1, 2], [9, 1, 6, 3]]), torch.tensor([[1, 0, 1, 1], [1, 1, 0, 1]]), ignore_masked=True
    )
    for tree in (packed, padded, ignored):
        assert [line.split("[")[1].split("]")[0] for line in str(tree).splitlines()[2:]] == ["9 1", "2", "3"]


def test_a_large_tree_is_not_drawn() -> None:
    text = str(_tree([[n] for n in range(200)]))
    assert "│ nodes              │   201 │" in text
    assert text.splitlines()[-1].startswith("Not drawn, as it has more than 200 nodes.")
    assert len(str(_tree([[n] for n in range(199)])).splitlines()) == 201


def test_a_deep_tree_is_drawn_without_wrapping() -> None:
    lines = str(PrefixTree.from_paths(torch.arange(150).view(1, 150))).splitlines()
    assert len(lines) == 152
    assert lines[-1] == " " * 4 * 150 + "└── #150 [149], count 1: row 0"


# ---------------------------------------------------------------------------------------------------------- networkx
@pytest.mark.parametrize("room", [False, True])
def test_networkx(room: bool) -> None:
    tree = _with_empty_places(_tree()) if room else _tree()
    value = torch.arange(tree.forest.nodes.shape[1], dtype=torch.float32) / 4
    graph = tree.to_networkx(value=value, twice=(2 * value).double().requires_grad_())
    assert isinstance(graph, networkx.DiGraph)
    assert sorted(graph.edges) == [(0, 1), (1, 2), (1, 3), (4, 5), (5, 6)]
    assert list(graph.nodes) == list(range(7))
    for n, attributes in graph.nodes(data=True):
        assert set(attributes) == {*NODES, "rows", "tokens", "value", "twice"}
        assert {name: attributes[name] for name in NODES} == {name: int(tree.forest.node(name)[n]) for name in NODES}
        assert (attributes["value"], attributes["twice"]) == (n / 4, n / 2)
        assert type(attributes["value"]) is float
    assert [graph.nodes[n]["tokens"] for n in graph] == [[], [1, 2], [3, 4], [5], [], [7, 8], [9]]
    assert [graph.nodes[n]["rows"] for n in graph] == [[0, 2, 3], [0, 2, 3], [0, 3], [2], [1, 4, 5], [1, 5], [1]]
    assert type(graph.nodes[1]["tokens"][0]) is int


def test_networkx_of_other_trees() -> None:
    graph = _branches().to_networkx()
    assert sorted(graph.edges) == [(0, 1), (1, 2), (1, 3), (3, 4)]
    assert "tokens" not in graph.nodes[1]
    assert graph.nodes[1]["edge_length"] == 2
    graph = PrefixTree.from_paths([["x", "y"], ["x", "z"]]).to_networkx(v=np.array([0.0, 1.0, 2.0, 3.0]))
    assert [graph.nodes[n]["tokens"] for n in graph] == [[], [0], [1], [2]]
    assert [graph.nodes[n]["v"] for n in graph] == [0.0, 1.0, 2.0, 3.0]
    assert len(_tree([]).to_networkx()) == 0


def test_networkx_checks() -> None:
    tree: Any = _tree()
    with pytest.raises(ValueError, match=r"value: expected shape \[7\] \(one per node\), got \[6\]"):
        tree.to_networkx(value=torch.zeros(6))
    with pytest.raises(TypeError, match="value: expected a torch tensor"):
        tree.to_networkx(value=[0.0] * 7)
    for name in ("parent", "rows", "tokens"):
        with pytest.raises(ValueError, match=f"{name}: expected another name"):
            tree.to_networkx(**{name: torch.zeros(7)})


# ---------------------------------------------------------------------------------------------------------- pictures
@pytest.fixture(autouse=True)
def _closed_figures() -> Iterator[None]:
    yield
    pyplot.close("all")


def _texts(ax: Any, kind: str) -> dict[int, str]:
    """Node -> what is written, for the labels of a kind."""
    found = {}
    for text in ax.texts:
        name, _, n = text.get_gid().partition("-")
        if name == kind:
            found[int(n)] = text.get_text()
    return found


def _patches(ax: Any, kind: str) -> dict[int, Any]:
    return {int(p.get_gid().split("-")[1]): p for p in ax.patches if p.get_gid().startswith(f"{kind}-")}


def _dots(ax: Any) -> Any:
    (dots,) = [c for c in ax.collections if c.get_gid() == "nodes"]
    return dots


_VALUES = torch.tensor([0.5, 0.5, 1.0, -0.5, 0.25, 0.0, 2.0])
_ADVANTAGES = torch.tensor([0.0, 0.0, 0.5, -1.0, 0.0, 0.25, -0.001])
_REWARDS = torch.tensor([1.0, 2.0, -0.5, 1.0, 0.75, 0.125])


@pytest.mark.parametrize("room", [False, True])
def test_picture_of_a_group(room: bool) -> None:
    tree, values, advantages = _tree(), _VALUES, _ADVANTAGES
    if room:
        tree = _with_empty_places(tree)
        values, advantages = (torch.cat([x, torch.full((5,), 99.0)]) for x in (values, advantages))
    ax = tree.plot(values, advantages, rewards=_REWARDS)
    dots = _dots(ax)
    # Lines from the top: node 2 (rows 0 and 3), node 3 (row 2); a parent lies in the middle of its children.
    assert dots.get_offsets().tolist() == [[0, 0.5], [2, 0.5], [4, 0], [3, 1]]
    assert dots.get_array().tolist() == [0.5, 0.5, 1.0, -0.5]
    assert dots.get_clim() == (-0.5, 1.0)
    assert _texts(ax, "value") == {0: "0.50", 1: "0.50", 2: "1.00", 3: "-0.50"}
    assert _texts(ax, "advantage") == {1: "0", 2: "+0.50", 3: "-1.00"}
    assert _texts(ax, "tokens") == {1: "1 2", 2: "3 4", 3: "5"}
    assert _texts(ax, "end") == {2: "rows 0, 3: reward 1", 3: "row 2: reward -0.5"}
    assert set(_patches(ax, "edge")) == {1, 2, 3}
    assert set(_patches(ax, "leader")) == {2, 3}
    assert ax.get_title(loc="left") == ("group 0: 3 sequences, 11 tokens, 5 unique (54.5% saved), 1 branch point")
    assert [bar.get_ylabel() for bar in ax.figure.axes[1:]] == ["value", "advantage"]


def test_picture_of_the_second_group() -> None:
    """Sequences that end at inner nodes have lines of their own, above what follows."""
    ax = _tree().plot(_VALUES, _ADVANTAGES, rewards=_REWARDS, group=1)
    assert _texts(ax, "end") == {4: "row 4: reward 0.75", 5: "row 5: reward 0.125", 6: "row 1: reward 2"}
    assert _dots(ax).get_offsets().tolist() == [[0, 0.75], [2, 1.5], [3, 2]]
    assert _texts(ax, "value") == {4: "0.25", 5: "0", 6: "2.00"}
    assert _texts(ax, "advantage") == {5: "+0.25", 6: "-0.001"}
    begin, end = _patches(ax, "leader")[5].get_path().vertices[[0, -1]].tolist()
    assert begin == [2, 1.5]
    assert end == [ax.get_xlim()[1], 1]


def test_edges_lead_from_parent_to_child() -> None:
    ax = _tree().plot(_VALUES, _ADVANTAGES)
    ends = {n: edge.get_path().vertices[[0, -1]].tolist() for n, edge in _patches(ax, "edge").items()}
    assert ends == {1: [[0, 0.5], [2, 0.5]], 2: [[2, 0.5], [4, 0]], 3: [[2, 0.5], [3, 1]]}
    width = {n: edge.get_linewidth() for n, edge in _patches(ax, "edge").items()}
    assert width[1] - width[2] == pytest.approx(width[2] - width[3])  # 3, 2 and 1 sequences
    assert width[1] > width[2] > width[3] > 0


def test_narrow_edges_lie_over_wide_ones() -> None:
    """Node 2 comes after node 1 in the tree, but is the wider of the two that leave the root."""
    edges = [p for p in _tree([[1], [2], [2], [2]]).plot().patches if p.get_gid().startswith("edge")]
    assert [p.get_gid() for p in edges] == ["edge-2", "edge-1"]


def test_colours_of_advantages_are_symmetric() -> None:
    ax = _tree().plot(_VALUES, _ADVANTAGES)
    colour = {n: edge.get_edgecolor()[:3] for n, edge in _patches(ax, "edge").items()}
    halfway = [(a + b) / 2 for a, b in zip(to_rgb(picture._NEUTRAL), to_rgb(picture._POSITIVE), strict=True)]
    assert colour[1] == pytest.approx(to_rgb(picture._NEUTRAL), abs=0.01)
    assert colour[2] == pytest.approx(halfway, abs=0.01)  # 0.5, where the most is 1.0
    assert colour[3] == pytest.approx(to_rgb(picture._NEGATIVE), abs=0.01)
    by_node = {int(t.get_gid().split("-")[1]): t.get_color() for t in ax.texts if t.get_gid().startswith("advantage")}
    assert by_node == {1: picture._FAINT, 2: picture._POSITIVE, 3: picture._NEGATIVE}


def test_picture_without_values() -> None:
    ax = _branches().plot()
    assert set(_patches(ax, "edge")) == {1, 2, 3, 4}
    assert all(edge.get_edgecolor() == to_rgba(picture._NEUTRAL) for edge in _patches(ax, "edge").values())
    assert _dots(ax).get_array() is None
    assert len(_dots(ax).get_offsets()) == 5
    assert len(ax.figure.axes) == 1, "nothing to explain, no scale"
    assert {t.get_gid() for t in ax.texts} == {"end-2", "end-3", "end-4"}
    assert ax.get_title(loc="left").startswith("3 sequences, 12 tokens, 7 unique")


def test_picture_of_values_that_are_not_finite() -> None:
    values = torch.tensor([torch.nan, torch.inf, 1.0, 3.0, 0.0, 0.0, 0.0])
    advantages = torch.tensor([torch.nan, torch.nan, -torch.inf, 2.0, 0.0, 0.0, 0.0])
    ax = _tree().plot(values, advantages)
    ax.figure.canvas.draw()
    assert _dots(ax).get_clim() == (1.0, 3.0)
    assert _dots(ax).get_facecolors()[0].tolist() == pytest.approx(to_rgba(picture._NEUTRAL))
    assert _texts(ax, "value") == {0: "nan", 1: "inf", 2: "1.00", 3: "3.00"}
    edges = _patches(ax, "edge")
    assert edges[1].get_edgecolor() == pytest.approx(to_rgba(picture._NEUTRAL))
    assert edges[2].get_edgecolor()[:3] == pytest.approx(to_rgb(picture._NEGATIVE))
    assert edges[3].get_edgecolor()[:3] == pytest.approx(to_rgb(picture._POSITIVE), abs=0.01)
    ax = _tree([[], []]).plot(torch.tensor([2.0]), torch.tensor([0.0]))
    ax.figure.canvas.draw()
    assert _dots(ax).get_clim() == (1.5, 2.5)


def test_picture_with_text_that_matplotlib_would_read_as_something_else() -> None:
    words = {1: "cost $5", 2: " and $6\n", 3: " x", 4: "\ty", 5: " 你好"}
    ax = _tree().plot(_VALUES, _ADVANTAGES, decode=lambda tokens: "".join(words[t] for t in tokens))
    assert not any(t.get_parse_math() for t in ax.texts if t.get_gid().startswith("tokens")), "$ is no formula"
    assert _texts(ax, "tokens") == {1: "cost $5 and $6 ↵", 2: "x y", 3: "你好"}


def test_picture_in_given_axes() -> None:
    _, (left, right) = pyplot.subplots(1, 2)
    assert _tree().plot(_VALUES, _ADVANTAGES, ax=right) is right
    assert len(_patches(right, "edge")) == 3
    assert not left.patches


def test_long_edges_are_shortened_to_their_length() -> None:
    """No two labels lie on one another, nor does a text leave its edge."""
    generator = torch.Generator().manual_seed(0)
    trunk = torch.randint(10_000, 99_999, (200,), generator=generator).tolist()
    cuts = torch.randint(5, 200, (15,), generator=generator).tolist()
    rows = [trunk, *(trunk[:cut] + [b] * int(4 + cut % 37) for b, cut in enumerate(cuts))]
    tree = _tree(rows)
    values = tree.aggregate(torch.arange(16.0) % 2)
    ax = tree.plot(values, tree.advantages(values))
    assert ax.figure.axes[0] is ax
    labels = [text for text in ax.texts if not text.get_gid().startswith("end")]
    assert len(_texts(ax, "value")) > tree.num_nodes / 2
    assert any("…" in text for text in _texts(ax, "tokens").values())
    boxes = [text.get_window_extent() for text in labels]
    for i, box in enumerate(boxes):
        assert not any(box.overlaps(other) for other in boxes[:i])
    inverse = ax.transData.inverted()
    for text in labels:
        kind, _, n = text.get_gid().partition("-")
        if kind == "tokens" and int(tree.children[int(n)]):
            right = inverse.transform(text.get_window_extent())[1, 0]
            assert right <= int(tree.edge_start[int(n)] + tree.edge_length[int(n)])


@pytest.mark.parametrize(
    ("pieces", "separator", "room", "text"),
    [
        (["12", "7"], " ", 4, "12 7"),
        (["12", "7"], " ", 3.9, ""),
        ([str(n) for n in range(10, 20)], " ", 14, "10 11 12 … 19"),
        ("a long sentence", "", 15, "a long sentence"),
        ("a long sentence", "", 10, "a long…nce"),
        ("a long sentence", "", 7, ""),
    ],
)
def test_fitting(pieces: list[str], separator: str, room: float, text: str) -> None:
    assert picture._fitting(pieces, separator, room) == text


@pytest.mark.parametrize(
    ("x", "sign", "text"),
    [(0.0, "+", "0"), (0.5, "", "0.50"), (-0.004, "+", "-0.004"), (123.4, "+", "+123.4"), (-0.0, "", "0")],
)
def test_numbers(x: float, sign: str, text: str) -> None:
    assert picture._short(x, sign) == text


def test_picture_checks() -> None:
    tree = _tree()
    cases: list[tuple[dict[str, Any], str]] = [
        ({"values": torch.zeros(3)}, r"values: expected shape \[7\]"),
        ({"advantages": torch.zeros(8)}, r"advantages: expected shape \[7\]"),
        ({"rewards": torch.zeros(5)}, r"rewards: expected shape \[6\]"),
        ({"group": 2}, r"group: expected a number in \[0, 2\)"),
        ({"group": -1}, r"group: expected a number in \[0, 2\)"),
        ({"max_nodes": 3}, "max_nodes: group 0 has 4 nodes, more than the 3 that are drawn"),
    ]
    for arguments, message in cases:
        with pytest.raises(ValueError, match=message):
            tree.plot(**arguments)
    assert len(_patches(tree.plot(max_nodes=4), "edge")) == 3
    with pytest.raises(ValueError, match=r"group: expected a number in \[0, 0\)"):
        _tree([]).plot()


def test_picture_without_matplotlib(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match="pip install matplotlib"):
        _tree().plot()


def test_numpy_in_pictures() -> None:
    values: Tensor = _VALUES.numpy()  # type: ignore[assignment]
    assert _dots(_tree().plot(values)).get_array().tolist() == [0.5, 0.5, 1.0, -0.5]

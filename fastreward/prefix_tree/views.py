"""Views of a prefix tree: statistics, a drawing in text, a networkx graph. They wait for the device."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text
from rich.tree import Tree
from torch import Tensor

from fastreward._arguments import check
from fastreward._arguments.arrays import as_tensor
from fastreward._runtime.layout import NODES
from fastreward.prefix_tree.operations import TreeOperations

if TYPE_CHECKING:
    import networkx

#: A drawing of more nodes than this is no help to anyone.
_MOST_DRAWN = 200
#: Lines of the histogram of depths.
_MOST_DEPTHS = 12


# -------------------------------------------------------------------------------------------------------- statistics
@dataclass(frozen=True)
class TreeStatistics:
    """Statistics of a prefix tree. Print it for a table.

    With PrefixTree.from_paths "tokens" are steps.
    """

    groups: int
    sequences: int
    distinct: int  # sequences, duplicates counted once
    tokens: int  # of all sequences
    unique_tokens: int  # what is left when each shared prefix is kept once
    saved: float  # share of tokens saved: 1 - unique_tokens / tokens; 0 without tokens
    ideal_speedup: float  # tokens / unique_tokens; 1 without tokens
    longest: int  # tokens of the longest sequence
    mean_length: float  # tokens of a sequence; 0 without sequences
    mean_shared_prefix: float  # tokens that a sequence has in common with another one; 0 without sequences
    nodes: int  # roots included
    branch_points: int  # nodes with two or more children
    max_depth: int  # nodes above the deepest one
    depth_histogram: tuple[int, ...]  # nodes at depth 0, 1, ...

    def as_dict(self) -> dict[str, Any]:
        """The fields by name, ready for JSON."""
        return asdict(self)

    def __rich__(self) -> Table:
        table = Table(title="Prefix tree", title_justify="left", show_header=False)
        table.add_column()
        table.add_column(justify="right")
        for name, value in self._lines():
            table.add_row(name, value)
        table.add_section()
        for name, value in self._depth_lines():
            table.add_row(name, value)
        return table

    def __str__(self) -> str:
        return _plain(self.__rich__(), 120)

    def _lines(self) -> list[tuple[str, str]]:
        return [
            ("groups", f"{self.groups:,}"),
            ("sequences", f"{self.sequences:,}"),
            ("distinct sequences", f"{self.distinct:,}"),
            ("tokens", f"{self.tokens:,}"),
            ("unique tokens", f"{self.unique_tokens:,}"),
            ("tokens saved", f"{self.saved:.1%}"),
            ("ideal speed-up", f"{self.ideal_speedup:.2f}x"),
            ("longest sequence", f"{self.longest:,}"),
            ("mean length", f"{self.mean_length:,.1f}"),
            ("mean shared prefix", f"{self.mean_shared_prefix:,.1f}"),
            ("nodes", f"{self.nodes:,}"),
            ("branch points", f"{self.branch_points:,}"),
            ("greatest depth", f"{self.max_depth:,}"),
        ]

    def _depth_lines(self) -> list[tuple[str, str]]:
        counts = self.depth_histogram
        lines = [(f"nodes at depth {depth}", f"{count:,}") for depth, count in enumerate(counts[:_MOST_DEPTHS])]
        if len(counts) > _MOST_DEPTHS:
            lines.append(("deeper nodes", f"{sum(counts[_MOST_DEPTHS:]):,}"))
        return lines


def statistics(tree: TreeOperations, group: int | None = None) -> TreeStatistics:
    """Statistics of a tree, or of one group: the groups are numbered as they come in the batch."""
    forest = HostForest(tree)
    first, last = (0, forest.size) if group is None else forest.extent(group)
    node = {name: column[first:last] for name, column in forest.nodes.items()}
    rows = forest.order if group is None else forest.order[slice(*forest.places(first))]
    sequences, lengths = len(rows), forest.length[rows]
    tokens, unique = int(lengths.sum()), int(node["edge_length"].sum())
    shared = node["edge_length"] * node["count"] * (node["count"] > 1)
    depths = torch.bincount(node["depth"]).tolist()
    return TreeStatistics(
        groups=int((node["parent"] < 0).sum()),
        sequences=sequences,
        distinct=len(set(forest.leaf[rows].tolist())),
        tokens=tokens,
        unique_tokens=unique,
        saved=1 - unique / tokens if tokens else 0.0,
        ideal_speedup=tokens / unique if tokens else 1.0,
        longest=int(lengths.max()) if sequences else 0,
        mean_length=tokens / sequences if sequences else 0.0,
        mean_shared_prefix=int(shared.sum()) / sequences if sequences else 0.0,
        nodes=last - first,
        branch_points=int((node["children"] > 1).sum()),
        max_depth=max(len(depths) - 1, 0),
        depth_histogram=tuple(depths),
    )


# ---------------------------------------------------------------------------------------------------------- networkx
def to_networkx(tree: TreeOperations, node_values: dict[str, Tensor]) -> networkx.DiGraph:
    """A graph with an edge from each node to each of its children.

    Attributes of a node: the fields of _layout.NODES (parent -1 for a root), `rows` (its sequences), `tokens` (those of
    its edge; not where the tree was made from_branches), and its `node_values`, [nodes] each, as floats.
    """
    import networkx

    forest = HostForest(tree)
    fields = {name: column.tolist() for name, column in forest.nodes.items()}
    for name, values in node_values.items():
        if name in (*NODES, "rows", "tokens"):
            raise ValueError(f"{name}: expected another name for these values, as every node has a {name!r} already")
        fields[name] = node_numbers(tree, name, values)
    graph = networkx.DiGraph()
    for n in range(forest.size):
        attributes = {name: values[n] for name, values in fields.items()} | {"rows": forest.rows(n)}
        tokens = forest.edge_tokens(n)
        graph.add_node(n, **attributes, **({} if tokens is None else {"tokens": tokens}))
        if fields["parent"][n] >= 0:
            graph.add_edge(fields["parent"][n], n)
    return graph


def node_numbers(tree: TreeOperations, name: str, values: Tensor) -> list[float]:
    """Values [nodes] as floats, without the empty places behind the last node."""
    given = as_tensor(values)
    check.shape(name, check.tensor(name, given), tree.parent.shape, "one per node")
    numbers: list[float] = given.detach()[: tree.num_nodes].double().tolist()
    return numbers


# ----------------------------------------------------------------------------------------------------------- drawing
def drawing(tree: TreeOperations) -> str:
    """A small tree with a line for each node; the statistics of a larger one."""
    forest = HostForest(tree)
    if forest.size > _MOST_DRAWN:
        return (
            f"{statistics(tree)}\n"
            f"Not drawn, as it has more than {_MOST_DRAWN} nodes. To see a part, print a PrefixTree of some sequences, "
            "such as tokens[tree.rows_of(node)]; tree.to_networkx() has every node."
        )
    head = Tree(Text(_summary(statistics(tree))))
    branches: list[Tree] = []
    for n, parent in enumerate(forest.nodes["parent"].tolist()):
        above = head if parent < 0 else branches[parent]
        branches.append(above.add(Text(_line(forest, n))))
    # Wide enough for every line, so that none is wrapped: 4 columns for each level, and the longest line.
    longest = max([len(str(head.label)), *(len(str(branch.label)) for branch in branches)])
    return _plain(head, 4 * (int(forest.nodes["depth"].max()) + 2 if branches else 1) + longest)


def _summary(s: TreeStatistics) -> str:
    return (
        f"PrefixTree: {number(s.sequences, 'sequence')}, {number(s.tokens, 'token')}, "
        f"{s.unique_tokens:,} of them unique ({s.saved:.1%} saved)"
    )


def _line(forest: HostForest, n: int) -> str:
    line = f"#{n} {_edge(forest, n)}, count {forest.count(n)}: {row_names(forest.rows(n))}"
    ending = forest.ending(n)
    if not ending or not forest.children(n):  # all of a leaf's sequences end there
        return line
    return f"{line}; {row_names(ending)} end{'s' if len(ending) == 1 else ''} here"


def _edge(forest: HostForest, n: int) -> str:
    """The tokens of a node: `[12 7 9]`, `[12 7 4 ... 8 9] (31 tokens)`, or only how many there are."""
    if int(forest.nodes["parent"][n]) < 0:
        return "root"
    tokens, length = forest.edge_tokens(n), int(forest.nodes["edge_length"][n])
    if tokens is None:
        return number(length, "token")
    text = shortened([str(token) for token in tokens])
    return f"[{text}]" if "..." not in text else f"[{text}] ({length} tokens)"


def shortened(words: Sequence[str], most: int = 8, separator: str = " ") -> str:
    """The words in one line; of more than `most` only the first ones and the last two."""
    if len(words) > most:
        words = [*words[: most - 3], "...", *words[-2:]]
    return separator.join(words)


def row_names(rows: Sequence[int]) -> str:
    """`row 4`, or `rows 0-3, 7`."""
    runs: list[list[int]] = []
    for row in rows:
        if runs and row == runs[-1][-1] + 1:
            runs[-1].append(row)
        else:
            runs.append([row])
    names = [f"{run[0]}-{run[-1]}" if len(run) > 2 else ", ".join(map(str, run)) for run in runs]
    return f"row{'' if len(rows) == 1 else 's'} {shortened(names, separator=', ')}"


def number(count: int, what: str) -> str:
    """`1 token`, `2,000 tokens`."""
    return f"{count:,} {what}{'' if count == 1 else 's'}"


def _plain(thing: RenderableType, width: int) -> str:
    """As text without colours, whatever the terminal is."""
    console = Console(file=io.StringIO(), width=width, color_system=None, force_terminal=False, legacy_windows=False)
    with console.capture() as capture:
        console.print(thing)
    return "\n".join(line.rstrip() for line in capture.get().rstrip("\n").split("\n"))


# ------------------------------------------------------------------------------------------------------------ forest
class HostForest:
    """A tree's arrays on the CPU, without the empty places that they have behind the last node on a GPU."""

    def __init__(self, tree: TreeOperations) -> None:
        self.size = tree.num_nodes
        self.nodes = {name: tree.forest.node(name)[: self.size].cpu() for name in NODES}
        self.leaf, self.order, self.start, self.length = tree.forest.rows.cpu()
        tokens = tree.forest.sequences.tokens
        self._tokens = None if tokens is None else tokens.cpu()

    def extent(self, group: int) -> tuple[int, int]:
        """The first node of a group, and the one behind its last."""
        roots = (self.nodes["parent"] < 0).nonzero().flatten()
        if not 0 <= group < len(roots):
            raise ValueError(f"group: expected a number in [0, {len(roots)}), the tree's groups, got {group}")
        root = int(roots[group])
        return root, int(self.nodes["tout"][root])

    def count(self, n: int) -> int:
        """Sequences through node n."""
        return int(self.nodes["count"][n])

    def children(self, n: int) -> int:
        """Child nodes of node n."""
        return int(self.nodes["children"][n])

    def places(self, n: int) -> tuple[int, int]:
        """Where the sequences through node n lie in `order`."""
        begin = int(self.nodes["row_begin"][n])
        return begin, begin + self.count(n)

    def rows(self, n: int) -> list[int]:
        """The sequences through node n, ascending."""
        return sorted(self.order[slice(*self.places(n))].tolist())

    def ending(self, n: int) -> list[int]:
        """The sequences that end at node n, ascending."""
        return self._ends.get(n, [])

    def edge_tokens(self, n: int) -> list[int] | None:
        """The token ids of node n's edge; None where the tree has no tokens."""
        if self._tokens is None:
            return None
        row = int(self.nodes["first_row"][n])
        begin = int(self.start[row]) + int(self.nodes["edge_start"][n])
        tokens: list[int] = self._tokens[begin : begin + int(self.nodes["edge_length"][n])].tolist()
        return tokens

    @cached_property
    def _ends(self) -> dict[int, list[int]]:
        ends: dict[int, list[int]] = {}
        for row, leaf in enumerate(self.leaf.tolist()):
            ends.setdefault(leaf, []).append(row)
        return ends

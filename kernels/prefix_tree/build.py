"""Trees from tokens and from branches, on the GPU, in arrays with room for the most nodes that there can be: 3 B."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastreward._runtime.layout import NODES, ROWS

from .._shared.launch import OPTIONS, on_device_of
from .branches import parents_of_branches
from .forest import (
    CHILDREN,
    COUNT,
    DEPTH,
    EDGE_LENGTH,
    EDGE_START,
    FIRST_ROW,
    LEAF,
    PARENT,
    ROOT,
    ROW_BEGIN,
    TOKEN_BEGIN,
    TOKEN_TOUT,
    TOUT,
    count_up_to,
    field,
    put,
)
from .nodes import numbered
from .parents import parents_of_tokens

# --------------------------------------------------------------------------------------------------------- config
NODES_PER_ROW = 3  # a group's root, a node that is split, and a row's own
LANES = 128
WARPS = 4


# --------------------------------------------------------------------------------------------------------- kernel
@triton.jit
def _link(nodes, stride, links, n, ok):
    """The number of the last of the links that a node has become."""
    length = field(nodes, stride, EDGE_LENGTH, n, ok)
    return tl.load(links + n, mask=ok, other=0) + tl.maximum(length, 1) - 1


@triton.jit(do_not_specialize=["places", "B", "link_places"])
def _links_kernel(
    nodes,  # i64 [F, places]
    links,  # i64 [places]: the number of each node's first link, ascending
    rows,  # i64 [4, B]; LEAF in and out
    out,  # i64 [F, link_places], out
    places, B, link_places,
    LANES: tl.constexpr,
):  # fmt: skip
    """Each node as a chain of links, one for each of its tokens."""
    x = tl.program_id(0).to(tl.int64) * LANES + tl.arange(0, LANES)
    ok = x < link_places
    n = tl.maximum(count_up_to(links, x, tl.zeros_like(x), tl.zeros_like(x) + places) - 1, 0)
    number = x - tl.load(links + n)
    count, length = field(nodes, places, COUNT, n, ok), field(nodes, places, EDGE_LENGTH, n, ok)
    real = ok & (count > 0)
    parent = field(nodes, places, PARENT, n, real)
    below = real & (parent >= 0)
    above = tl.where(below, _link(nodes, places, links, parent, below), -1)
    token, token_tout = field(nodes, places, TOKEN_BEGIN, n, ok), field(nodes, places, TOKEN_TOUT, n, ok)
    # Behind a subtree comes the next unique token's link, with as many roots before it as before the subtree's own.
    first = tl.load(links + n, mask=ok, other=0)
    roots = first - token + (length == 0).to(tl.int64)
    children = tl.where(number + 1 < length, 1, field(nodes, places, CHILDREN, n, real))
    root = tl.load(links + field(nodes, places, ROOT, n, real), mask=real, other=0)
    edge_start = field(nodes, places, EDGE_START, n, real)
    put(out, link_places, PARENT, x, tl.where(real & (number > 0), x - 1, above), ok)
    put(out, link_places, DEPTH, x, tl.where(length > 0, edge_start + number + 1, 0), ok)
    put(out, link_places, EDGE_START, x, tl.where(real, edge_start + number, 0), ok)
    put(out, link_places, EDGE_LENGTH, x, tl.minimum(length, 1), ok)
    put(out, link_places, COUNT, x, count, ok)
    put(out, link_places, FIRST_ROW, x, field(nodes, places, FIRST_ROW, n, real), ok)
    put(out, link_places, TOUT, x, tl.where(real, token_tout + roots, x + 1), ok)
    put(out, link_places, TOKEN_BEGIN, x, tl.where(real, token + number, token), ok)
    put(out, link_places, TOKEN_TOUT, x, token_tout, ok)
    put(out, link_places, CHILDREN, x, tl.where(real, children, 0), ok)
    put(out, link_places, ROW_BEGIN, x, field(nodes, places, ROW_BEGIN, n, ok), ok)
    put(out, link_places, ROOT, x, tl.where(real, root, x), ok)
    row = x < B
    put(rows, B, LEAF, x, _link(nodes, places, links, field(rows, B, LEAF, x, row), row), row)


# --------------------------------------------------------------------------------------------------------- launch
def build(
    tokens: Tensor | None,  # flat, i64 or i32
    parent_row: Tensor | None,  # [B] i64, or
    branch_position: Tensor | None,  # [B] i64
    starts: Tensor,  # [B] i64
    lengths: Tensor,  # [B] i64
    group: Tensor,  # [B] i64
    ordered_groups: bool,
    compress: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """nodes i64 [F, places], rows i64 [4, B], sizes i64 [3]: nodes, groups, unique tokens.

    Parents of branches that form a circle raise nothing here: their rows hang off the root.
    """
    count = starts.shape[0]
    rows = torch.empty((len(ROWS), count), dtype=torch.int64, device=starts.device)
    if count == 0:
        empty = torch.empty((len(NODES), 0), dtype=torch.int64, device=starts.device)
        return empty, rows, torch.zeros(3, dtype=torch.int64, device=starts.device)
    with on_device_of(starts):
        if tokens is not None:
            work = parents_of_tokens(tokens, starts, lengths, group, rows)
        else:
            assert parent_row is not None
            assert branch_position is not None
            work = parents_of_branches(parent_row, branch_position, starts, lengths, group, rows)
        nodes, sizes = numbered(rows, work, group, ordered_groups, NODES_PER_ROW * count)
        if not compress:
            assert tokens is not None
            nodes = _links(nodes, rows, sizes, tokens.shape[0] + count)
    return nodes, rows, sizes


def _links(nodes: Tensor, rows: Tensor, sizes: Tensor, places: int) -> Tensor:
    """The nodes as one for each token, i64 [F, places]; rows and sizes follow."""
    is_root = (nodes[PARENT.value] < 0).long()
    links = nodes[TOKEN_BEGIN.value] + is_root.cumsum(0) - is_root
    out = torch.empty((len(NODES), places), dtype=torch.int64, device=nodes.device)
    _links_kernel[(triton.cdiv(places, LANES),)](
        nodes, links, rows, out, nodes.shape[1], rows.shape[1], places, LANES=LANES, num_warps=WARPS, **OPTIONS
    )
    sizes[0] = sizes[1] + sizes[2]
    return out

"""Device functions of the prefix trees: fields of their arrays, searches in sorted ones, steps from leaf to root."""

from __future__ import annotations

import triton
import triton.language as tl

from fastreward._runtime.layout import NODES, ROWS

# Rows of `nodes` i64 [F, places] and of `rows` i64 [4, B].
PARENT = tl.constexpr(NODES.index("parent"))
DEPTH = tl.constexpr(NODES.index("depth"))
EDGE_START = tl.constexpr(NODES.index("edge_start"))
EDGE_LENGTH = tl.constexpr(NODES.index("edge_length"))
COUNT = tl.constexpr(NODES.index("count"))
FIRST_ROW = tl.constexpr(NODES.index("first_row"))
TOUT = tl.constexpr(NODES.index("tout"))
TOKEN_BEGIN = tl.constexpr(NODES.index("token_begin"))
TOKEN_TOUT = tl.constexpr(NODES.index("token_tout"))
CHILDREN = tl.constexpr(NODES.index("children"))
ROW_BEGIN = tl.constexpr(NODES.index("row_begin"))
ROOT = tl.constexpr(NODES.index("root"))

LEAF = tl.constexpr(ROWS.index("leaf"))
ORDER = tl.constexpr(ROWS.index("order"))
START = tl.constexpr(ROWS.index("start"))
LENGTH = tl.constexpr(ROWS.index("length"))


@triton.jit
def column(data, stride, FIELD: tl.constexpr):
    """Where the values of a field begin: `stride` behind those of the one before."""
    return data + tl.cast(stride, tl.int64) * FIELD


@triton.jit
def field(data, stride, FIELD: tl.constexpr, at, ok):
    """A field of each place `at`; 0 where not ok."""
    return tl.load(column(data, stride, FIELD) + at, mask=ok, other=0)


@triton.jit
def put(data, stride, FIELD: tl.constexpr, at, value, ok):
    """Stores a field of each place `at`."""
    tl.store(column(data, stride, FIELD) + at, value, mask=ok)


@triton.jit
def number(known, given, AT: tl.constexpr, GIVEN: tl.constexpr):
    """A number that the host knows, or has on the device, f64 []."""
    if GIVEN:
        known = tl.load(given + AT)
    return known


@triton.jit
def any_of(condition):
    """Whether some lane's condition holds."""
    return tl.max(condition.to(tl.int32)) > 0


@triton.jit
def count_up_to(ascending, x, low, high):
    """Per lane the number of values <= x, known to lie in [low, high]: i64."""
    open_ = low < high
    while any_of(open_):
        middle = (low + high) // 2
        below = tl.load(ascending + middle, mask=open_, other=0) <= x
        low = tl.where(open_ & below, middle + 1, low)
        high = tl.where(open_ & (~below), middle, high)
        open_ = low < high
    return low


@triton.jit
def lanes_in(ascending, ends, at, fewest, most):
    """Per lane the last place of an ascending array whose value is <= at, and the first and last of these places.

    ends: [2], the least and the greatest of `at` that matter; fewest, most: [2], bounds of the number of values up to
    these. The two are searched first: mostly they fall into the same place, and the lanes have nothing to do.
    """
    place = tl.maximum(count_up_to(ascending, ends, fewest, most) - 1, 0)
    low, high = tl.min(place, axis=0), tl.max(place, axis=0)
    return count_up_to(ascending, at, tl.zeros_like(at) + low + 1, tl.zeros_like(at) + high + 1) - 1, low, high


@triton.jit
def climb(nodes, stride, n, position, ok):
    """Per lane the node at or above n whose edge holds a position of the sequence."""
    below = ok & (field(nodes, stride, EDGE_START, n, ok) > position)
    while any_of(below):
        n = tl.where(below, field(nodes, stride, PARENT, n, below), n)
        below = below & (field(nodes, stride, EDGE_START, n, below) > position)
    return n


@triton.jit
def group_at(nodes, stride, rows, B, place):
    """(first node, end of the nodes) of the group whose sequences begin at a place of `order`; (0, 0) where none does.

    One program for each place thus finds every group, and nobody has to know how many there are.
    """
    leaf = tl.load(column(rows, B, LEAF) + tl.load(column(rows, B, ORDER) + place))
    root = tl.load(column(nodes, stride, ROOT) + leaf)
    begins = tl.load(column(nodes, stride, ROW_BEGIN) + root) == place
    end = tl.load(column(nodes, stride, TOUT) + root)
    return tl.where(begins, root, 0), tl.where(begins, end, 0)

"""Scratch arrays of a prefix tree's build, and the hash tables in which rows find each other."""

from __future__ import annotations

import triton
import triton.language as tl

from .forest import any_of

#: Fields of `work` i64 [WORK, B], one number per row each.
WORK = 19
FIRST = tl.constexpr(0)  # first row of its group
FOUND = tl.constexpr(1)  # the row that it has been found to branch off; itself, or negative, where none
SHARED = tl.constexpr(2)  # tokens that it shares with that row
HANGS = tl.constexpr(3)  # the row whose own part of the tree holds that branch point
NEAR = tl.constexpr(4)  # while parents are found: a row with the same whole blocks,
BLOCKS = tl.constexpr(5)  # their number,
RUN = tl.constexpr(6)  # and how many tokens of the next one are the same
EARLIEST = tl.constexpr(7)  # B - the first row below, zero at first
OWN = tl.constexpr(8)  # nodes that it has brought into the tree, zero at first
NODES_BELOW = tl.constexpr(9)  # these, and those of the rows below it; zero at first, as the next two
TOKENS_BELOW = tl.constexpr(10)
ROWS_BELOW = tl.constexpr(11)
BEGIN = tl.constexpr(12)  # the records of its own part of the tree
END = tl.constexpr(13)
NUMBER = tl.constexpr(14)  # of the first node that it has brought in,
TOKEN = tl.constexpr(15)  # the unique tokens before that node,
LEVEL = tl.constexpr(16)  # the nodes above it,
PLACE = tl.constexpr(17)  # and where its rows begin in `order`
GROUP = tl.constexpr(18)  # place of its group among the groups, in the first row of each

NONE = tl.constexpr(2**63 - 1)  # the key of no record
LOW = tl.constexpr(2**32 - 1)  # the half of a key that is not its row

_GOLDEN: tl.constexpr = tl.constexpr(0x9E3779B97F4A7C15)


@triton.jit
def record_key(row, cut):
    """Sorted, a row's cuts come together, the deepest first."""
    return (row << 32) | (~cut & LOW)


@triton.jit
def cut_of(key):
    """Tokens of the row before a record's cut."""
    return ~key & LOW


@triton.jit
def mix(x):
    """A bijection of u64 in which every bit depends on every other: the finaliser of splitmix64."""
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB
    return x ^ (x >> 31)


@triton.jit
def token_hash(token, position):
    """i64, to be added up over a prefix: different (token, position) have different ones."""
    return mix(token.to(tl.int64).to(tl.uint64) + position.to(tl.uint64) * _GOLDEN).to(tl.int64, bitcast=True)


@triton.jit
def prefix_key(total, length, first, BITS: tl.constexpr):
    """u64 key of a prefix: the sum of its tokens' hashes, its length, its group. BITS < 64 provokes collisions."""
    salt = mix(first.to(tl.uint64) + length.to(tl.uint64) * _GOLDEN)
    return mix(total.to(tl.uint64, bitcast=True) ^ salt) >> (64 - BITS)


@triton.jit
def enter(table, size, most, key, row, B, ok):
    """The slot of each key (u64) in a hash table, claimed where it is new; then the row is one of the key's rows.

    table: i64 [2, size + 1], zero at first: keys, and B - the first row of each. size: a power of two above the number
    of keys. Which slot a key gets is a race, which row is its first is not. Key 0, which looks like a free slot, has
    the last one for itself. After `most` slots of others a key shares the next one, lest a full table hang the device.
    """
    key = key.to(tl.int64, bitcast=True)
    slot = tl.where(ok & (key == 0), size, key & (size - 1))
    claim = tl.where(ok, key, 0)  # lanes that are not ok exchange 0 for 0
    waiting = ok
    tries = tl.full([], 0, tl.int64)
    while any_of(waiting) & (tries < most):
        held = tl.atomic_cas(table + slot, tl.zeros_like(claim), claim, sem="relaxed")
        waiting = waiting & (held != 0) & (held != key)
        slot = tl.where(waiting, (slot + 1) & (size - 1), slot)
        tries += 1
    tl.atomic_max(table + size + 1 + slot, B - row, mask=ok, sem="relaxed")
    return slot


@triton.jit
def first_of(table, size, slot, B, ok):
    """The first row that was entered at a slot."""
    return B - tl.load(table + size + 1 + slot, mask=ok, other=0)

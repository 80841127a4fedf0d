"""Prefix trees: a batch of sequences as one compressed radix forest."""

from fastreward.prefix_tree.packed import PackedTree
from fastreward.prefix_tree.tree import PrefixTree

__all__ = ["PackedTree", "PrefixTree"]

"""Prefix trees on the GPU: built without a host sync, in arrays with room for the most nodes that there can be.

`build.py` puts a build together: `parents.py` finds which row each row branches off (`branches.py` does so for given
branches), `records.py` and `nodes.py` number the nodes that follow from it. `aggregate.py` and `values.py` compute on
nodes, `tokens.py` and `scatter.py` between nodes and tokens. Numbers are the CPU backend's; places behind the nodes
are empty: no parent, no tokens, no sequences.
"""

from .aggregate import aggregate, aggregate_backward
from .build import build
from .scatter import collect, layout, scatter_reduce
from .tokens import broadcast_to_tokens, gather, lengths, node_of_token, starts, unique_of_token
from .values import advantages, propagate, propagate_backward

__all__ = [
    "advantages",
    "aggregate",
    "aggregate_backward",
    "broadcast_to_tokens",
    "build",
    "collect",
    "gather",
    "layout",
    "lengths",
    "node_of_token",
    "propagate",
    "propagate_backward",
    "scatter_reduce",
    "starts",
    "unique_of_token",
]

"""How many graphs torch.compile needs for calls of changing sizes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from operation_rows import Row, copies, evaluated
from torch import Tensor
from torch._dynamo.backends.registry import lookup_backend


def graphs(
    row: Row, calls: Sequence[dict[str, Any]], backend: str = "aot_eager", *, marked: bool = False, **options: Any
) -> int:
    """How many graphs the calls need; each gives what the eager call gives. marked: every size is marked dynamic."""
    torch._dynamo.reset()
    compiled_graphs = 0

    def counting(module: Any, inputs: Any) -> Any:
        nonlocal compiled_graphs
        graph = lookup_backend(backend)(module, inputs)
        compiled_graphs += 1  # only those that torch keeps: it may begin anew
        return graph

    compiled = torch.compile(lambda **arguments: row(**arguments), fullgraph=True, backend=counting, **options)
    for arguments in calls:
        expected, given = evaluated(row, copies(arguments)), copies(arguments)
        for x in given.values() if marked else ():
            for k in range(x.ndim if isinstance(x, Tensor) else 0):
                torch._dynamo.mark_dynamic(x, k)
        for got, wanted in zip(evaluated(compiled, given), expected, strict=True):
            torch.testing.assert_close(got, wanted, rtol=1e-6, atol=1e-7, equal_nan=True)
    return compiled_graphs

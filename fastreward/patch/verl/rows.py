"""verl.utils.tensordict_utils: rows of a batch, as micro-batches are cut.

verl takes a nested tensor apart into all of its sequences for each micro-batch, and looks at each index by itself. Here
the chosen ones are found by the offsets, and copied as they lie.
"""

from __future__ import annotations

from typing import Any, Final

import torch
from torch import Tensor

from fastreward._arguments.transforms import transformed
from fastreward.patch.verl.padding import nested
from fastreward.patch.verl.replacement import NotServed, Replacement

_MODULE: Final = "verl.utils.tensordict_utils"
_LONG: Final = 512  # elements of a row, from where copying it takes longer than finding it


def index_select_tensor_dict(_: Any, batch: Any, indices: Any) -> Any:
    """The rows of each field, nested ones too; what has none as it is."""
    chosen = _whole_numbers(indices)
    if batch is None or transformed():
        raise NotServed
    rows = chosen.tolist()
    size = len(batch)
    if not rows or not all(0 <= row < size for row in rows):
        raise NotServed  # counted from the end, an error, or nothing
    found = {}
    for key, field in batch.items():
        if not isinstance(field, Tensor):
            found[key] = field[chosen] if field.shape else field
        elif field.is_nested:
            found[key] = _sequences(field, rows)
        else:
            long = field.is_cpu and not field.requires_grad and field[0].numel() >= _LONG
            found[key] = _copied(field, rows) if long else field[chosen]
    return type(batch)(source=found, batch_size=len(rows))


def _whole_numbers(indices: Any) -> Tensor:
    chosen = torch.tensor(indices) if isinstance(indices, list) else indices
    if type(chosen) is not Tensor or chosen.ndim != 1 or chosen.dtype not in (torch.int64, torch.int32):
        raise NotServed  # a mask, or an error
    return chosen


def _copied(field: Tensor, rows: list[int]) -> Tensor:
    """Rows of [B, ...]: a few long ones, whose copying torch's indexing would share among threads and wait for them."""
    return torch.cat([field[row : row + 1] for row in rows])


def _sequences(field: Any, rows: list[int]) -> Tensor:
    """The sequences of a nested tensor [B, j, ...], one after the other in memory."""
    if field.requires_grad or field.layout != torch.jagged or getattr(field, "_ragged_idx", 0) != 1:
        raise NotServed
    if field.lengths() is not None:  # sequences with gaps between them
        raise NotServed
    values, offsets = field.values(), field.offsets().tolist()
    return nested([values[offsets[row] : offsets[row + 1]] for row in rows])


def _tokens(batch: Any, indices: Any) -> int:
    """Rows are copied here, and no token is looked at."""
    return 0


REPLACEMENTS: Final = (
    Replacement(
        f"{_MODULE}.index_select_tensor_dict",
        ("batch", "indices"),
        index_select_tensor_dict,
        "runs of tokens, copied as they lie",
        "nested tensors are not taken apart into all sequences",
        _tokens,
    ),
)

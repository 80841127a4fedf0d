"""Files of log-probs, top-k log-probs or logits: .safetensors, .npz, .pt and .jsonl, as a mapping of names to tensors.

Tensors of .safetensors and .pt are maps of the file: what is not read costs no memory.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor

from fastreward._arguments.arrays import as_tensor

SUFFIXES: Final = (".safetensors", ".npz", ".pt", ".jsonl")
#: By the names of the format's header; bfloat16 has no NumPy type, so its bits are read.
_DTYPES: Final = {
    "F64": ("<f8", torch.float64),
    "F32": ("<f4", torch.float32),
    "F16": ("<f2", torch.float16),
    "BF16": ("<i2", torch.bfloat16),
    "I64": ("<i8", torch.int64),
    "I32": ("<i4", torch.int32),
    "I16": ("<i2", torch.int16),
    "I8": ("|i1", torch.int8),
    "U8": ("|u1", torch.uint8),
    "BOOL": ("|b1", torch.bool),
}
#: Of a record in .jsonl: one number for each token, or one list for each token.
_FLAT: Final = ("logprobs", "tokens", "mask")
_WIDE: Final = ("top_logprobs", "top_ids", "logits")


def read(path: Path) -> Any:
    """What is in the file: a mapping of names to tensors (of .jsonl padded, with lengths), or one tensor.

    Raises:
        ValueError: no such file, another ending, or content that is not what the ending says; says where.
    """
    readers = {".safetensors": _safetensors, ".npz": _npz, ".pt": _pt, ".jsonl": _jsonl}
    if path.suffix not in readers:
        raise ValueError(
            f"{path}: expected a file that ends in {', '.join(SUFFIXES)}, got {path.suffix or 'no ending'!r}"
        )
    try:
        return readers[path.suffix](path)
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror or error}") from error
    except Exception as error:  # a broken file raises whatever its reader raises
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise ValueError(f"{path}: not a {path.suffix} file that can be read: {reason}") from error


def _safetensors(path: Path) -> dict[str, Tensor]:
    """Eight bytes with the length of a JSON header, the header, then the tensors one behind the other."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > size - 8:
            raise ValueError(f"its header should have {length} bytes, the file has {size}")
        header = json.loads(file.read(length))
    found = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        if entry["dtype"] not in _DTYPES:
            raise ValueError(f"{name} has the dtype {entry['dtype']}; expected one of {', '.join(_DTYPES)}")
        (begin, end), shape, (stored, dtype) = entry["data_offsets"], entry["shape"], _DTYPES[entry["dtype"]]
        if end > size - 8 - length or end - begin != math.prod(shape) * dtype.itemsize:
            raise ValueError(f"{name} should lie in the bytes {begin} to {end}, which does not fit")
        if begin == end:
            found[name] = torch.empty(shape, dtype=dtype)
            continue
        # Copy on write: torch wants memory that may be written to, the file is never changed.
        bits = np.memmap(path, stored, "c", 8 + length + begin, tuple(shape) or (1,))
        found[name] = torch.from_numpy(bits).view(dtype).reshape(shape)
    return found


def _npz(path: Path) -> dict[str, Any]:
    arrays = np.load(path, allow_pickle=False)
    if not isinstance(arrays, np.lib.npyio.NpzFile):
        raise ValueError("one array, not an archive of named ones")
    with arrays:
        return {name: as_tensor(arrays[name]) for name in arrays.files if arrays[name].dtype.kind in "fiub"}


def _pt(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except RuntimeError:  # the format before 1.6 can't be mapped
        return torch.load(path, map_location="cpu", weights_only=True)


# ------------------------------------------------------------------------------------------------------------- jsonl
def _jsonl(path: Path) -> dict[str, Tensor]:
    records = []
    with path.open(encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                try:
                    records.append(_record(json.loads(line)))
                except (ValueError, TypeError) as error:
                    raise ValueError(f"line {number}: {error}") from error
                if set(records[-1]) != set(records[0]):
                    raise ValueError(f"line {number}: has {_names(records[-1])}, line 1 has {_names(records[0])}")
    if not records:
        raise ValueError("no line has anything in it")
    lengths = [len(next(iter(record.values()))) for record in records]
    found = {name: _padded([record[name] for record in records], lengths) for name in records[0]}
    return found | {"lengths": torch.tensor(lengths, dtype=torch.int64)}


def _names(record: Mapping[str, Any]) -> str:
    return ", ".join(record)


def _record(content: Any) -> dict[str, np.ndarray[Any, Any]]:
    """The arrays [T] or [T, k] of a sequence's record, all of one length; other keys are left aside."""
    if not isinstance(content, dict):
        raise ValueError(f"expected a dictionary with {', '.join((*_FLAT, *_WIDE))}, got {type(content).__name__}")
    content = dict(content)
    if "token_ids" in content:
        content.setdefault("tokens", content.pop("token_ids"))
    for key in ("top_logprobs", "logprobs"):
        if isinstance(top := content.get(key), list) and any(isinstance(x, dict) for x in top):
            del content[key]
            content["top_logprobs"], content["top_ids"] = _by_id(key, top)
    found = {name: _flat(name, content[name]) for name in _FLAT if name in content}
    found |= {name: _wide(name, content[name]) for name in _WIDE if name in content}
    if not found:
        raise ValueError(f"expected one of the keys {', '.join((*_FLAT, *_WIDE))}, got {', '.join(content) or 'none'}")
    first = next(iter(found))
    for name, x in found.items():
        if len(x) != len(found[first]):
            raise ValueError(f"{name} has {len(x)} entries, {first} has {len(found[first])}")
    return found


def _flat(name: str, column: Any) -> np.ndarray[Any, Any]:
    if not isinstance(column, list):
        raise ValueError(f"{name}: expected a list, got {type(column).__name__}")
    for x in column:
        if not isinstance(x, int | float | None):
            raise ValueError(f"{name}: expected numbers, got {x!r}")
    return np.array(
        [math.nan if x is None else x for x in column], dtype=np.float64 if name == "logprobs" else np.int64
    )


def _wide(name: str, column: Any) -> np.ndarray[Any, Any]:
    """[T, k]; what a token has fewer of is filled with -inf, ids with -1."""
    if not isinstance(column, list) or not all(isinstance(row, list) for row in column):
        raise ValueError(f"{name}: expected a list of lists, one for each token")
    ids = name == "top_ids"
    whole = np.full(
        (len(column), max(map(len, column), default=0)), -1 if ids else -math.inf, np.int64 if ids else np.float64
    )
    for t, row in enumerate(column):
        for x in row:
            if not isinstance(x, int | float):
                raise ValueError(f"{name}: expected numbers, got {x!r}")
        whole[t, : len(row)] = row
    return whole


def _by_id(name: str, top: Sequence[Any]) -> tuple[list[list[float]], list[list[int]]]:
    """Log-probs and ids of the form {id: log-prob} for each token, or {id: {"logprob": ...}} as vLLM has it.

    None, as vLLM has it of a prompt's first token: nothing is known.
    """
    logprobs: list[list[float]] = []
    ids: list[list[int]] = []
    for entries in top:
        if not isinstance(entries, dict | None):
            raise ValueError(f"{name}: expected a dictionary for each token, got {type(entries).__name__}")
        given = entries or {}
        for key in given:
            if not key.removeprefix("-").isdecimal():
                raise ValueError(f"{name}: expected ids of the vocabulary, got {key!r}")
        ids.append([int(key) for key in given])
        logprobs.append([float(x["logprob"] if isinstance(x, dict) else x) for x in given.values()])
    return logprobs, ids


def _padded(rows: Sequence[np.ndarray[Any, Any]], lengths: Sequence[int]) -> Tensor:
    """[B, T] or [B, T, k]."""
    width = max((row.shape[1] for row in rows if row.ndim == 2), default=0)
    lead = (len(rows), max(lengths))
    shape = (*lead, width) if rows[0].ndim == 2 else lead
    fill = -1 if rows[0].dtype == np.int64 else -math.inf if rows[0].ndim == 2 else 0
    whole = np.full(shape, fill, rows[0].dtype)
    for b, row in enumerate(rows):
        if row.ndim == 2:
            whole[b, : len(row), : row.shape[1]] = row
        else:
            whole[b, : len(row)] = row
    return torch.from_numpy(whole)

"""What the equality tests of the patches compare with, and report from: `make compat` writes docs/compat.md of it.

A test calls `largest("trl.trainer.utils.selective_log_softmax", ours, theirs)`: it fails where the two differ by more
than the tolerance. Where FASTREWARD_COMPAT names a file, the difference is appended to it as a line of JSON, under the
name that the patch's report has for the replaced function.
"""

from __future__ import annotations

import importlib.metadata
import json
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import astuple, is_dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor


def largest(
    target: str,
    ours: Any,
    theirs: Any,
    *,
    rtol: float = 1e-6,
    atol: float = 1e-6,
    version: str | None = None,
    what: str = "",
) -> float:
    """The largest |ours - theirs| / max(1, |theirs|), after a check that |ours - theirs| <= atol + rtol |theirs|.

    `target` is the dotted name of the function that was replaced, as the patch's report has it; its first part is the
    trainer. `ours` and `theirs` are tensors, arrays, numbers, None, or tuples, lists, dicts and dataclasses of them, of
    the same structure and shapes: values, and the gradients beside them, go into one call. They are compared in
    float64. NaN equals NaN, an infinity its own kind. `version` is for a trainer that isn't installed here, whose
    formula the test has written out: the commit that it was read at. `what` names the case in an error.
    """
    pairs = list(_pairs(ours, theirs, target))
    assert pairs, f"{target}: nothing was compared"
    found = max(_difference(path, mine, other, rtol, atol, what) for path, mine, other in pairs)
    _record(target, found, version)
    return found


def _pairs(ours: Any, theirs: Any, path: str) -> Iterator[tuple[str, Any, Any]]:
    """The leaves of two structures, side by side, each with the way to it."""
    if is_dataclass(theirs) and not isinstance(theirs, type):
        ours, theirs = astuple(ours), astuple(theirs)
    if isinstance(theirs, Mapping):
        assert set(ours) == set(theirs), f"{path}: names {sorted(ours)}, expected {sorted(theirs)}"
        for name in theirs:
            yield from _pairs(ours[name], theirs[name], f"{path}[{name!r}]")
    elif isinstance(theirs, list | tuple):
        assert len(ours) == len(theirs), f"{path}: {len(ours)} values, expected {len(theirs)}"
        for i, (mine, other) in enumerate(zip(ours, theirs, strict=True)):
            yield from _pairs(mine, other, f"{path}[{i}]")
    elif ours is None or theirs is None:
        assert ours is theirs, f"{path}: {ours!r}, expected {theirs!r}"
    else:
        yield path, ours, theirs


def _difference(path: str, ours: Any, theirs: Any, rtol: float, atol: float, what: str) -> float:
    ours, theirs = _double(ours), _double(theirs)
    where = f"{path}{f' ({what})' if what else ''}"
    assert ours.shape == theirs.shape, f"{where}: shape {list(ours.shape)}, expected {list(theirs.shape)}"
    same = (ours == theirs) | (ours.isnan() & theirs.isnan())
    error = torch.where(same, 0.0, (ours - theirs).abs()).nan_to_num(nan=math.inf, posinf=math.inf)
    # An infinity of theirs allows nothing: `same` has let its own kind pass already.
    excess = error - (atol + rtol * theirs.abs().nan_to_num(posinf=0.0))
    if error.numel() and bool((excess > 0).any()):
        worst = np.unravel_index(int(excess.argmax()), tuple(error.shape))
        index = tuple(int(i) for i in worst)
        raise AssertionError(
            f"{where}: at {list(index)} {ours[index].item():.9g}, expected {theirs[index].item():.9g} "
            f"(atol={atol:g}, rtol={rtol:g}); {int((excess > 0).sum())} of {error.numel()} differ"
        )
    scale = theirs.abs().nan_to_num(nan=1.0, posinf=1.0).clamp(min=1.0)
    return (error / scale).max().item() if error.numel() else 0.0


def _double(x: Any) -> Tensor:
    return x.detach().cpu().double() if isinstance(x, Tensor) else torch.as_tensor(np.asarray(x, dtype=np.float64))


def _record(target: str, difference: float, version: str | None) -> None:
    path = os.environ.get("FASTREWARD_COMPAT")
    if path:
        trainer = target.partition(".")[0]
        version = version or importlib.metadata.version(trainer)
        line = {"trainer": trainer, "version": version, "target": target, "difference": difference}
        # One write of one line: the workers of pytest-xdist append to the same file.
        with Path(path).open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

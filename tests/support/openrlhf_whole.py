"""OpenRLHF's own package on a machine without a GPU: its modules, with empty stand-ins for what needs one.

deepspeed, vllm and flash-attn install on GPUs only, and OpenRLHF imports them where it doesn't use them here. The
stand-ins have no behaviour, but for flash-attn's unpadding, which is written out in torch. What else OpenRLHF needs and
isn't installed is stood in for likewise: pylatexenc grades mathematics, torchdata loads data, aiohttp calls servers;
nothing of it is reached.
"""

from __future__ import annotations

import importlib
import importlib.machinery
import importlib.util
import sys
import types
from typing import Any

import torch
from torch import Tensor

_NEEDED = ("deepspeed", "vllm", "flash_attn", "pylatexenc", "torchdata", "aiohttp")


class _StandIn(types.ModuleType):
    """A package whose every name is a class of its own, and that has any module."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.__path__: list[str] = []
        self.__spec__ = importlib.machinery.ModuleSpec(name, None)
        self.__version__ = "0.29.0"

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


class _Finder:
    """Finds any module below the packages that are stood in for."""

    def __init__(self, packages: tuple[str, ...]) -> None:
        self.packages = packages

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name.partition(".")[0] in self.packages and not name.startswith("flash_attn.ops"):  # whose kernels it tries
            return importlib.machinery.ModuleSpec(name, self, is_package=True)  # type: ignore[arg-type]
        return None

    def create_module(self, spec: Any) -> types.ModuleType:
        return _StandIn(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        if module.__name__ == "flash_attn.bert_padding":
            vars(module).update(
                unpad_input=unpad_input, pad_input=pad_input, index_first_axis=_index, rearrange=_flatten
            )


def stand_ins() -> tuple[str, ...]:
    """Make `import openrlhf...` work in this process; the packages that are now stood in for."""
    missing = tuple(name for name in _NEEDED if name not in sys.modules and importlib.util.find_spec(name) is None)
    if missing:
        sys.meta_path.append(_Finder(missing))  # type: ignore[arg-type]
    return missing


def unpad_input(x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor, int, Tensor]:
    """x [B, S, ...], mask [B, S] -> the rows where the mask is set, their indices, bounds, longest, lengths."""
    lengths = mask.sum(-1, dtype=torch.int32)
    indices = mask.flatten().nonzero().flatten()
    bounds = torch.nn.functional.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
    return x.flatten(0, 1)[indices], indices, bounds, int(lengths.max()), lengths


def pad_input(x: Tensor, indices: Tensor, batch: int, length: int) -> Tensor:
    """The way back: zeros elsewhere."""
    return x.new_zeros(batch * length, *x.shape[1:]).index_put((indices,), x).unflatten(0, (batch, length))


def _index(x: Tensor, indices: Tensor) -> Tensor:
    return x[indices]


def _flatten(x: Tensor, pattern: str) -> Tensor:
    assert pattern == "b s ... -> (b s) ..."
    return x.flatten(0, 1)

"""Which backend serves a call: by the tensor's device, `with fastreward.backend(name)`, or FASTREWARD_BACKEND.

A choice that cannot serve is an error that says why; nothing falls back in silence.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import threading
from collections.abc import Container, Iterator
from contextlib import contextmanager
from functools import cache
from types import ModuleType
from typing import TYPE_CHECKING, Final, Literal, cast, overload

import torch

from fastreward._runtime.errors import BackendError

if TYPE_CHECKING:
    from fastreward._runtime import protocols

Backend = Literal["reference", "cpu", "triton", "cuda"]
BACKENDS: Final[tuple[Backend, ...]] = ("reference", "cpu", "triton", "cuda")
OPERATIONS: Final = (
    "logprobs",
    "linear_logprobs",
    "policy_loss",
    "logits_policy_loss",
    "linear_policy_loss",
    "preference_loss",
    "value_loss",
    "correction",
    "group",
    "divergence",
    "linear_divergence",
    "whiten",
    "segments",
    "rewards",
    "returns",
    "prefix_tree",
)

#: CUDA C++ kernels that have passed their tests on hardware, and where. Others are experimental: by hand only.
CUDA_PASSED_ON: Final[dict[str, str]] = {}

_PACKAGES: Final[dict[Backend, str]] = {
    "reference": "fastreward.reference",
    "cpu": "fastreward.cpu",
    "triton": "fastreward.kernels",
    "cuda": "fastreward.cuda",
}
#: The kernels of operations that are made of others': losses of the loss language are programs, whatever their shape.
_KERNELS: Final = {
    "linear_logprobs": "logprobs",
    "linear_divergence": "divergence",
    "policy_loss": "program",
    "linear_policy_loss": "program",
    "preference_loss": "program",
    "value_loss": "program",
    "correction": "program",
    "prefix_tree_build": "prefix_tree",
}
#: Parts of operations that a backend has no kernels of, on whatever machine, and what serves instead.
_ABSENT: Final = {
    ("prefix_tree_build", "cuda"): (
        "no CUDA C++ kernel builds or packs trees, Triton's do; build and pack under fastreward.backend('triton'), "
        "and what is computed on the tree may be cuda's"
    ),
}


class _Choice:
    """The backend that one `with` block has chosen, and its thread. Two of them are never equal."""

    def __init__(self, name: Backend, thread: int) -> None:
        self.name, self.thread = name, thread


_VARIABLE: Final = os.environ.encodekey("FASTREWARD_BACKEND")
_ENVIRONMENT: Final[Container[object]] = os.environ._data  # type: ignore[attr-defined]

# Innermost last; process-wide, as torch.compile can trace and guard a list but no context variable.
_chosen_by_hand: list[_Choice] = []


@contextmanager
def backend(name: Backend) -> Iterator[None]:
    """Choose the backend of every fastreward call inside the block: reference, cpu, triton or cuda.

    A thread that is in no block of its own, such as a worker, follows the block that was entered last, wherever that
    was; so does a call inside torch.compile.
    """
    # Dynamo would keep a thread's number as a constant.
    choice = _Choice(_known(name), 0 if torch.compiler.is_compiling() else threading.get_ident())
    _chosen_by_hand.append(choice)
    try:
        yield
    finally:
        _chosen_by_hand.remove(choice)  # not the last one, which may be another thread's


def select(operation: str, tensor: torch.Tensor, maker: Backend | None = None) -> Backend:
    """Backend for `operation` on `tensor`'s device; raises BackendError where none can serve.

    maker: of an operation on what a backend has made (a tree): that one, where none is chosen by hand and no CUDA C++
    kernels have passed.
    """
    device = "cpu" if tensor.is_cpu else tensor.device.type
    name = _by_hand() or _from_environment() or _default(operation, device, maker)
    if torch.compiler.is_compiling():  # Dynamo can't look for packages; the kernels themselves will complain
        return name
    reason = unavailable(operation, name, device)
    if reason is not None:
        raise BackendError(f"fastreward: backend {name!r} cannot serve {operation} on {tensor.device}: {reason}")
    return name


@overload
def implementation(operation: Literal["logprobs", "linear_logprobs"], name: str) -> protocols.LogprobsKernels: ...
@overload
def implementation(operation: Literal["divergence", "linear_divergence"], name: str) -> protocols.DivergenceKernels: ...
@overload
def implementation(operation: Literal["group"], name: str) -> protocols.GroupKernels: ...
@overload
def implementation(operation: Literal["whiten"], name: str) -> protocols.WhitenKernels: ...
@overload
def implementation(operation: Literal["segments"], name: str) -> protocols.SegmentsKernels: ...
@overload
def implementation(operation: Literal["rewards"], name: str) -> protocols.RewardsKernels: ...
@overload
def implementation(operation: Literal["returns"], name: str) -> protocols.ReturnsKernels: ...
@overload
def implementation(operation: Literal["program"], name: str) -> protocols.ProgramKernels: ...
@overload
def implementation(operation: Literal["logits_policy_loss"], name: str) -> protocols.LogitsPolicyLossKernels: ...
@overload
def implementation(operation: Literal["prefix_tree"], name: Literal["cpu"]) -> protocols.PrefixTreeHostKernels: ...
@overload
def implementation(operation: Literal["prefix_tree"], name: str) -> protocols.PrefixTreeKernels: ...
@overload
def implementation(operation: Literal["prefix_tree_build"], name: str) -> protocols.PrefixTreeBuildKernels: ...
@overload
def implementation(operation: str, name: str) -> object: ...
def implementation(operation: str, name: str) -> object:
    """The module that holds the raw functions of `operation` in backend `name`."""
    return _load(module(operation, name))


@cache
def module(operation: str, name: str) -> str:
    """The name of that module."""
    if name == "reference" and operation == "logits_policy_loss":
        operation = "program"  # two calls there, no kernel of its own
    return f"{_PACKAGES[cast(Backend, name)]}.{_KERNELS.get(operation, operation)}"


def generated(operation: str) -> bool:
    """Whether its GPU kernels are written at run time, for the loss at hand, so that no build has them."""
    return _KERNELS.get(operation, operation) in ("program", "logits_policy_loss", "divergence")


def absent(operation: str, name: str) -> str | None:
    """Why backend `name` has no kernels of `operation`, on whatever machine; None where it has."""
    return _ABSENT.get((operation, name)) or _ABSENT.get((_KERNELS.get(operation, operation), name))


def interpreted() -> bool:
    """True when Triton runs in its interpreter, so that its kernels take CPU tensors."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@cache
def unavailable(operation: str, name: Backend, device: str) -> str | None:
    """Why backend `name` cannot serve `operation` on `device` tensors; None where it can."""
    if absent(operation, name) is not None:
        return absent(operation, name)
    if name == "reference":
        return None
    if name == "cpu":
        return "its kernels take CPU tensors" if device != "cpu" else None
    if name == "triton":
        if importlib.util.find_spec("triton") is None:
            return "triton is not installed"
        if device == "cpu" and not interpreted():
            return "Triton takes CPU tensors only with TRITON_INTERPRET=1 set before import"
        return None
    if device != "cuda":
        return "its kernels take CUDA tensors"
    return cast("str | None", _load(_PACKAGES[name]).missing(generated(operation)))


def _default(operation: str, device: str, maker: Backend | None = None) -> Backend:
    if device == "cuda" and operation in CUDA_PASSED_ON and unavailable(operation, "cuda", device) is None:
        return "cuda"
    return maker or ("cpu" if device == "cpu" else "triton")


def _by_hand() -> Backend | None:
    """The choice of this thread's innermost block; of any thread's, where this one is in none."""
    if not _chosen_by_hand:
        return None
    choices = list(_chosen_by_hand)  # other threads come and go
    if not torch.compiler.is_compiling():
        thread = threading.get_ident()
        choices = [choice for choice in choices if choice.thread == thread] or choices
    return choices[-1].name if choices else None


def _from_environment() -> Backend | None:
    # os.environ itself raises and catches two exceptions to say that a variable is not set.
    if not torch.compiler.is_compiling() and _VARIABLE not in _ENVIRONMENT:
        return None
    name = os.environ.get("FASTREWARD_BACKEND")
    return _known(name) if name else None


def _known(name: str) -> Backend:
    if name not in BACKENDS:
        raise ValueError(f"fastreward: unknown backend {name!r}; expected one of {', '.join(BACKENDS)}")
    return name


@cache
def _load(module: str) -> ModuleType:
    return importlib.import_module(module)

"""How CuPy is asked to launch a kernel, with a stand-in for CuPy: on which device, with how much shared memory."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from checkout import CSRC

from fastreward.cuda import _launch

OPT_IN, STATIC = 232_448, 800  # an H100's, and those of logits_policy_loss


class Kernel:
    """A cupy.RawKernel: the most dynamic shared memory that it may be launched with is set, and launches checked."""

    shared_size_bytes = STATIC

    def __init__(self, log: list[str], current: list[int]) -> None:
        self._log, self._current = log, current
        self._most: dict[int, int] = {}

    @property
    def max_dynamic_shared_size_bytes(self) -> int:
        return self._most.get(self._current[-1], (48 << 10) - STATIC)

    @max_dynamic_shared_size_bytes.setter
    def max_dynamic_shared_size_bytes(self, size: int) -> None:
        assert size + STATIC <= OPT_IN, "CUDA_ERROR_INVALID_VALUE"
        self._most[self._current[-1]] = size
        self._log.append(f"allow {size} on {self._current[-1]}")

    def __call__(self, grid: tuple[int], block: tuple[int], arguments: tuple[Any], shared_mem: int) -> None:
        assert shared_mem <= self.max_dynamic_shared_size_bytes, "CUDA_ERROR_INVALID_VALUE"
        self._log.append(f"launch on {self._current[-1]}")


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """What happened; `launch` below is a launch of one kernel on some device."""
    events: list[str] = []
    current = [0]

    class Device:
        def __init__(self, index: int) -> None:
            self.index = index

        def __enter__(self) -> None:
            current.append(self.index)

        def __exit__(self, *exception: object) -> None:
            current.pop()

    kernel = Kernel(events, current)

    def raw_module(**options: Any) -> Any:
        def get_function(name: str) -> Kernel:
            events.append(f"compile {name} on {current[-1]}")
            return kernel

        return SimpleNamespace(get_function=get_function)

    stream = SimpleNamespace(null=nullcontext())
    cuda = SimpleNamespace(Device=Device, Stream=stream, ExternalStream=lambda *handle: nullcontext())
    monkeypatch.setitem(sys.modules, "cupy", SimpleNamespace(cuda=cuda, RawModule=raw_module))
    monkeypatch.setattr(_launch.importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda index: SimpleNamespace(cuda_stream=0))
    properties = SimpleNamespace(shared_memory_per_block_optin=OPT_IN)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    caches = (_launch._text_kernel, _launch._text_module, _launch._allow_all_shared_memory)
    for cache in caches:
        cache.cache_clear()
    yield events
    for cache in caches:
        cache.cache_clear()


def launch(shared: int, index: int = 0) -> None:
    _launch.launch_text("// nothing", "kernel", 1, 32, _launch.pack(0), torch.device("cuda", index), shared=shared)


@pytest.mark.parametrize("shared", [0, 40_000, 47_104, 47_105, 48_353, 49_152, 49_153, 75_968, OPT_IN - STATIC])
def test_any_row_that_fits_is_launched(shared: int, log: list[str]) -> None:
    """What a kernel declares itself counts too: 49,152 bytes more are beyond the 48 KiB that need no asking."""
    launch(shared)
    assert log[-1] == "launch on 0"
    assert (f"allow {OPT_IN - STATIC} on 0" in log) == (shared > _launch.MAX_SHARED_BYTES)


def test_a_launch_takes_nothing_from_another_one(log: list[str]) -> None:
    """The permission is given once, whatever is asked for: no thread finds less between its asking and its launch."""
    for shared in (64_128, 75_968, 50_000, 200_000):
        launch(shared)
    assert [event for event in log if event.startswith("allow")] == [f"allow {OPT_IN - STATIC} on 0"]


def test_a_kernel_is_compiled_and_allowed_on_its_tensors_device(log: list[str]) -> None:
    launch(100_000, index=3)
    assert log == ["compile kernel on 3", f"allow {OPT_IN - STATIC} on 3", "launch on 3"]
    launch(100_000, index=1)
    assert log[3:] == [f"allow {OPT_IN - STATIC} on 1", "launch on 1"]  # CuPy compiles for 1 where it is called there


def test_counters_belong_to_one_call() -> None:
    """One that was kept would lie in the memory of a CUDA graph, if that is where the first call was made."""
    first, second = (_launch.counter(torch.device("cpu")) for _ in range(2))
    assert first.tolist() == second.tolist() == [0]
    assert first.data_ptr() != second.data_ptr()


def test_no_module_keeps_a_tensor() -> None:
    """Nothing on a device outlives the call that made it, in either GPU backend."""
    folders = (CSRC.parent / "kernels", CSRC.parent / "fastreward" / "cuda")
    for path in (p for folder in folders for p in folder.glob("*.py")):
        assert not re.search(r"^_?\w+: (Final\[)?dict\[.*Tensor\]+ = ", path.read_text(), re.MULTILINE), path

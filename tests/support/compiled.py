"""Compiles Triton kernels for real GPUs on a machine without one: what the programs compiled_*.py share.

Raw functions are called as on a GPU, on CPU tensors; Triton believes in a device of the asked-for architecture and
compiles what each call would launch, with the specialisation of the real arguments, but launches nothing. Prints one
JSON object per kernel: registers, stack and local bytes, and what its machine code (SASS) loads and stores.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
WIDE = re.compile(r"\bLDG\.E(\.\w+)*\.128\b")
WIDE_STORE = re.compile(r"\bSTG\.E(\.\w+)*\.128\b")
#: The architecture for which most variants are built.
FULL = 90

Cases = Mapping[str, Callable[[], object]]


class Device:
    """As much of a Triton driver as compiling needs."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return self.capability  # a device for each architecture: kernels are kept by device

    def get_current_stream(self, device: int) -> int:
        return 0


def main(cases: Callable[[bool], Cases]) -> None:
    """Compiles cases(everything) for the architectures of the command line; everything: for FULL."""
    compiled: list[tuple[str, Any]] = []
    run = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        compiled.append((self.fn.__name__, run(self, *args, grid=grid, warmup=True, **kwargs)))

    JITFunction.run = compile_only
    codes: dict[str, Future[dict[str, Any]]] = {}
    with ThreadPoolExecutor(2) as pool:  # disassembles while the next kernel is compiled
        lines = []
        for capability in (int(argument) for argument in sys.argv[1:] if argument.isdigit()):
            driver.set_active(Device(capability))
            for case, call in cases(capability == FULL).items():
                compiled.clear()
                call()
                for kernel, binary in compiled:
                    if binary.hash not in codes:
                        codes[binary.hash] = pool.submit(figures, binary.asm["cubin"])
                    line = {"case": case, "kernel": kernel, "sm": capability, "warps": binary.metadata.num_warps}
                    lines.append((line, codes[binary.hash]))
        for line, code in lines:
            print(json.dumps(line | code.result()), flush=True)


def figures(cubin: bytes) -> dict[str, Any]:
    """What one kernel uses."""
    usage, sass = machine_code(cubin)
    streaming = [body for body in loops(sass) if any(WIDE.search(line) for line in body)]
    return {
        "registers": usage["REG"],
        "stack": usage["STACK"],
        "local": usage["LOCAL"],
        "spills": sum(bool(re.search(r"\b(LDL|STL)\b", line)) for line in sass),
        "wide_loads": sum(bool(WIDE.search(line)) for line in sass),
        "wide_stores": sum(bool(WIDE_STORE.search(line)) for line in sass),
        "wide_loads_in_loops": sum(bool(WIDE.search(line)) for body in streaming for line in body),
        "barriers_in_loops": sum("BAR.SYNC" in line for body in streaming for line in body),
        "streams": streams(sass),
        "whole": work(sass),
    }


def streams(sass: list[str]) -> list[dict[str, int]]:
    """What one pass of a thread through each innermost loop that loads does; wide: its 16-byte loads."""
    return [work(body) | {"wide": sum(bool(WIDE.search(line)) for line in body)} for body in inner_loops(sass)]


def work(body: list[str]) -> dict[str, int]:
    """Instructions, those of the unit for exp2, log2 and 1 / x, bytes loaded and stored."""
    code = [line for line in body if re.match(r"\s*/\*[0-9a-f]{4,}\*/", line) and not re.search(r"\bNOP\b", line)]
    return {
        "instructions": len(code),
        "mufu": sum("MUFU" in line for line in code),
        "loaded": sum(_bytes(line) for line in code if re.search(r"\bLDG\b", line)),
        "stored": sum(_bytes(line) for line in code if re.search(r"\bSTG\b", line)),
    }


def _bytes(line: str) -> int:
    """What a load or a store of global memory moves."""
    width = re.search(r"\b(?:LDG|STG)\S*?\.(256|128|64|[US]16|[US]8)\b", line)  # [R2.64] behind it is an address
    return 4 if width is None else int(width[1].lstrip("US")) // 8


def machine_code(cubin: bytes) -> tuple[dict[str, int], list[str]]:
    """(resource usage by name, SASS lines) of a kernel."""
    usage, sass = dumped(cubin)
    return {name: int(n) for name, n in re.findall(r"\b(REG|STACK|LOCAL|SHARED):(\d+)", usage)}, sass.splitlines()


def dumped(cubin: bytes) -> tuple[str, str]:
    """What cuobjdump says of resources, and the disassembly."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()

        def tool(*command: str) -> str:
            return subprocess.run([*command, file.name], capture_output=True, text=True, check=True).stdout

        return tool(str(TOOLS / "cuobjdump"), "--dump-resource-usage"), tool(str(TOOLS / "nvdisasm"), "-c")


def inner_loops(sass: list[str]) -> list[list[str]]:
    """The bodies of those that load and have no other such loop inside."""
    loading = [body for body in loops(sass) if any(re.search(r"\bLDG\b", line) for line in body)]
    return [a for a in loading if not any(b is not a and set(b) <= set(a) for b in loading)]


def loops(sass: list[str]) -> list[list[str]]:
    """The bodies of backward branches."""
    labels: dict[str, int] = {}
    bodies = []
    for i, line in enumerate(sass):
        if label := re.match(r"\s*(\.L_x_\d+):", line):
            labels[label[1]] = i
        elif (jump := re.search(r"\bBRA\b.*`\((\.L_x_\d+)\)", line)) and jump[1] in labels:
            bodies.append(sass[labels[jump[1]] : i + 1])
    return bodies

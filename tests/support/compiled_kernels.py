"""Compiles the Triton kernels for real GPUs on a machine without one; a program, for test_compile.py.

The raw functions are called as on a GPU, on CPU tensors; Triton believes in a device of the asked-for architecture and
compiles what each call would launch, with the specialisation of the real arguments, but launches nothing. Prints one
JSON object per kernel: registers, stack and local bytes, and what its machine code (SASS) loads and stores.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import triton
from fastreward.kernels import group, logprobs, whiten
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from fastreward._arguments.options import GroupOptions

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
WIDE = re.compile(r"\bLDG\.E(\.\w+)*\.128\b")
WIDE_STORE = re.compile(r"\bSTG\.E(\.\w+)*\.128\b")


class Device:
    """As much of a Triton driver as compiling needs."""

    def __init__(self, capability: int) -> None:
        self.target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def machine_code(cubin: bytes) -> tuple[dict[str, int], list[str]]:
    """(resource usage by name, SASS lines)."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()

        def tool(*command: str) -> str:
            return subprocess.run([*command, file.name], capture_output=True, text=True, check=True).stdout

        usage = tool(str(TOOLS / "cuobjdump"), "--dump-resource-usage")
        sass = tool(str(TOOLS / "nvdisasm"), "-c").splitlines()
    return {name: int(n) for name, n in re.findall(r"\b(REG|STACK|LOCAL|SHARED):(\d+)", usage)}, sass


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


def report(case: str, kernel: str, capability: int, compiled: Any) -> dict[str, Any]:
    usage, sass = machine_code(compiled.asm["cubin"])
    streaming = [body for body in loops(sass) if any(WIDE.search(line) for line in body)]
    return {
        "case": case,
        "kernel": kernel,
        "sm": capability,
        "registers": usage["REG"],
        "stack": usage["STACK"],
        "local": usage["LOCAL"],
        "spills": sum(bool(re.search(r"\b(LDL|STL)\b", line)) for line in sass),
        "wide_loads": sum(bool(WIDE.search(line)) for line in sass),
        "wide_stores": sum(bool(WIDE_STORE.search(line)) for line in sass),
        "wide_loads_in_loops": sum(bool(WIDE.search(line)) for body in streaming for line in body),
        "barriers_in_loops": sum("BAR.SYNC" in line for body in streaming for line in body),
    }


def logprob_cases(everything: bool) -> dict[str, Any]:
    n, v = 16, 151936

    def run(
        dtype: torch.dtype,
        flags: int,
        vocab: int = v,
        kept: str = "",
        k: int = 0,
        rowwise: bool = False,
        cap: float = 0.0,
    ) -> None:
        x, labels = torch.zeros(n, vocab, dtype=dtype), torch.zeros(n, dtype=torch.long)
        keep = torch.ones(n, vocab, dtype=torch.bool) if kept == "mask" else None
        keep_ids = torch.zeros(n, 50, dtype=torch.long) if kept == "ids" else None
        ids = torch.zeros(n, k, dtype=torch.long) if k else None
        rows = (
            labels,
            torch.ones(n, dtype=torch.float64) if rowwise else 1.0,
            torch.ones(n, dtype=torch.bool),
            keep,
            keep_ids,
            ids,
        )
        values, _, id_logprobs = logprobs.forward(x, *rows, flags)
        logprobs.backward(x, *rows, values, id_logprobs, torch.zeros(7, n), torch.zeros(n, k) if k else None, x, cap)

    def slices() -> None:
        x, labels = torch.zeros(n, 4096, dtype=torch.bfloat16), torch.zeros(n, dtype=torch.long)
        state = torch.zeros(n, 8, dtype=torch.float64)
        logprobs.fold(x, labels, 0, 1.0, state, 31, torch.zeros(n))
        logprobs.finish(state, 1.0, 4096, 31)

    cases = {
        "bf16, logprobs and entropy": lambda: run(torch.bfloat16, 1),
        "bf16, all outputs": lambda: run(torch.bfloat16, 31),
        "f32, all outputs": lambda: run(torch.float32, 31, rowwise=True),
        "f32, kept mask and ids": lambda: run(torch.float32, 31, kept="mask", k=20),
        "bf16, kept ids": lambda: run(torch.bfloat16, 31, kept="ids", k=20),
        "slices": slices,
    }
    if everything:
        cases |= {
            "bf16, logprobs alone": lambda: run(torch.bfloat16, 0),
            "f16, softcap": lambda: run(torch.float16, 1, cap=0.02),
            "bf16, multiple of 8": lambda: run(torch.bfloat16, 1, vocab=151000 + 8),
            "bf16, odd": lambda: run(torch.bfloat16, 31, vocab=50257),
        }
    return {f"logprobs: {name}": call for name, call in cases.items()}


def small_cases(everything: bool) -> dict[str, Any]:
    def grouped(size: int, k: int = 1, **options: Any) -> None:
        b = 4096
        labels = None if size else torch.zeros(b, dtype=torch.long)
        weights = torch.ones(k) if k > 1 else None
        group.forward(torch.zeros(b, k), labels, size, torch.ones(b), weights, None, None, GroupOptions(**options))

    def white() -> None:
        x = torch.zeros(64, 512)
        whiten.forward(x, torch.ones(64, 512, dtype=torch.bool), False, 1, 1e-8, x)

    cases = {
        "whiten": white,
        "group: labels, second-max over max": lambda: grouped(0, center="second-max", scale="max"),
        "group: neighbours": lambda: grouped(8),
    }
    if everything:
        cases |= {
            "group: components, batch-std": lambda: grouped(0, 3, scale="batch-std", normalize="normalize-then-sum"),
            "group: weighted sum": lambda: grouped(64, 3, center="length-weighted"),
            "group: large, leave-one-out": lambda: grouped(512, center="leave-one-out"),
        }
    return cases


def main(capabilities: list[int]) -> None:
    compiled: list[tuple[str, Any]] = []
    run = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        compiled.append((self.fn.__name__, run(self, *args, grid=grid, warmup=True, **kwargs)))

    JITFunction.run = compile_only
    for capability in capabilities:
        for function in (m for module in (logprobs, group, whiten) for m in vars(module).values()):
            if isinstance(function, JITFunction):
                function.device_caches.clear()
        driver.set_active(Device(capability))
        everything = capability == 90
        cases = logprob_cases(everything) | small_cases(everything)
        for case, call in cases.items():
            compiled.clear()
            call()
            for kernel, binary in compiled:
                print(json.dumps(report(case, kernel, capability, binary)), flush=True)


if __name__ == "__main__":
    main([int(argument) for argument in sys.argv[1:]])

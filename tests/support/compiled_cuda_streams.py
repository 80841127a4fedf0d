"""Compiles the CUDA C++ kernels that stream, for docs/gpu.md; a program, for tools/machine_code.py.

Arguments: architectures, and after `--` the cases that are wanted. A line per case: registers, warps, and its passes.
NVRTC compiles, as for CuPy. These kernels have the code for a row's ends, and for tokens that do not count, inside
their loops: what is counted is one way through a loop, that of whole vectors or of tokens that all count.
"""

from __future__ import annotations

import ctypes
import json
import re
import sys
from collections.abc import Callable
from functools import cache
from typing import Final, NamedTuple

import compiled
import divergence_checks
import program_checks as checks
from cuda_compilers import nvrtc_library

from fastreward.cuda import _launch
from fastreward.cuda.program.divergence_source import Forward, LogitsType, forward_source, gradient_source
from fastreward.cuda.program.source import source
from fastreward.language.divergence_programs import DivergencePrograms, register_programs, registered_programs

HALF: Final[tuple[LogitsType, LogitsType]] = ("BF16", "BF16")
ONE_READ: Final = Forward(True, False, False, False, False, True)
TWO_READS: Final = Forward(False, False, False, False, False, False)
#: Of a way through a loop: bytes loaded and stored, and of exponentials and logarithms as many as are asked for.
Kind = tuple[int, int, int]


class Case(NamedTuple):
    """A text, which of its kernels is meant, its warps, and what a thread does at least in each of its loops."""

    text: Callable[[], str]
    kernel: str
    warps: int
    loops: tuple[Kind, ...]


def cases() -> dict[str, Case]:
    """By what a reader calls them."""
    half, single = (_whole(f"#define FASTREWARD_ONLY_{kind}\n", "logprobs") for kind in ("BF16", "F32"))
    kl, jsd = _programs("reverse_kl"), _programs("jsd")
    one = _generated(lambda: forward_source(kl.values[1], *HALF, ONE_READ))
    two = _generated(lambda: forward_source(jsd.values[1], *HALF, TWO_READS))
    kl_gradient = _generated(lambda: gradient_source(kl.student, *HALF, "BF16"))
    jsd_gradient = _generated(lambda: gradient_source(jsd.student, *HALF, "BF16"))
    return {
        "log-probs, bf16": Case(half, "logprobs_forward_bf16_lean", 16, ((32, 0, 16),)),
        "log-probs and entropy, bf16": Case(half, "logprobs_forward_bf16_entropy", 16, ((32, 0, 16),)),
        "log-probs and all else, f32": Case(single, "logprobs_forward_f32_everything", 16, ((32, 0, 8),)),
        "log-probs' gradient, bf16": Case(half, "logprobs_backward_bf16", 8, ((64, 64, 32),)),
        "log-probs' gradient, f32": Case(single, "logprobs_backward_f32", 8, ((64, 64, 16),)),
        "reverse KL, bf16": Case(one, "divergence", 8, ((64, 0, 32),)),
        "reverse KL's gradient, bf16": Case(kl_gradient, "divergence", 8, ((32, 16, 8),)),
        "Jensen-Shannon, bf16": Case(two, "divergence", 8, ((64, 0, 32), (32, 0, 24))),
        "Jensen-Shannon's gradient, bf16": Case(jsd_gradient, "divergence", 8, ((32, 16, 24),)),
        "PPO": Case(_loss("ppo"), "program_pass_1", 8, ((48, 16, 4),)),
        "GSPO": Case(_loss("gspo"), "program_pass_1", 8, ((32, 0, 4),)),
        "FIPO: a discounted sum from the end": Case(_loss("fipo"), "program_pass_1", 8, ((32, 16, 4),)),
        "sums of segments: from the start": Case(_loss("segments"), "program_pass_1", 8, ((48, 32, 0),)),
        "sums of segments: from the end": Case(_loss("segments"), "program_pass_2", 8, ((48, 32, 4),)),
    }


def _whole(head: str, name: str) -> Callable[[], str]:
    return lambda: head + _launch.source_text(name)


def _generated(text: Callable[[], str]) -> Callable[[], str]:
    return lambda: _launch.whole_text(text())


def _loss(name: str) -> Callable[[], str]:
    return _generated(lambda: source(checks.PROGRAMS[name]().program))


def _programs(name: str) -> DivergencePrograms:
    return registered_programs(register_programs(divergence_checks.DIVERGENCES[name]))


# ----------------------------------------------------------------------------------------------------------- compile
@cache
def machine_code(text: str, architecture: str) -> dict[str, tuple[int, list[str]]]:
    """(registers, SASS lines) by kernel."""
    lib, program = nvrtc_library(), ctypes.c_void_p()
    if lib is None:
        raise RuntimeError("libnvrtc is not here: pip install nvidia-cuda-nvrtc")
    options = [*_launch.NVRTC_OPTIONS, f"--gpu-architecture=sm_{architecture}", "--diag-suppress=177"]
    encoded = (ctypes.c_char_p * len(options))(*(o.encode() for o in options))
    assert lib.nvrtcCreateProgram(ctypes.byref(program), text.encode(), b"kernels.cu", 0, None, None) == 0
    assert lib.nvrtcCompileProgram(program, len(options), encoded) == 0
    size = ctypes.c_size_t()
    lib.nvrtcGetCUBINSize(program, ctypes.byref(size))
    code = ctypes.create_string_buffer(size.value)
    lib.nvrtcGetCUBIN(program, code)
    lib.nvrtcDestroyProgram(ctypes.byref(program))
    usage, sass = compiled.dumped(code.raw)
    registers = dict(re.findall(r"Function (\w+):\s*REG:(\d+)", usage))
    _, *parts = re.split(r"\n\s*\.section\s+\.text\.(\w+)", sass)
    return {name: (int(registers[name]), body.splitlines()) for name, body in zip(parts[::2], parts[1::2], strict=True)}


def passes(case: Case, lines: list[str]) -> list[dict[str, int]]:
    """The shortest way through any loop that does what is asked for, for each of the case's."""
    found = []
    for loaded, stored, mufu in case.loops:
        fitting = (ways(body, mufu).get((loaded, stored, mufu)) for body in compiled.inner_loops(lines))
        length = min((n for n in fitting if n is not None), default=None)
        if length is None:
            raise LookupError(f"{case.kernel}: no loop loads {loaded} bytes, stores {stored} and has {mufu} mufu")
        found.append({"instructions": length, "mufu": mufu, "loaded": loaded, "stored": stored})
    return found


def ways(body: list[str], most: int) -> dict[Kind, int]:
    """Instructions of the shortest way of each kind through a loop; mufu are counted up to `most`."""
    places = {label[1]: i for i, line in enumerate(body) if (label := re.match(r"\s*(\.L_x_\d+):", line))}
    meeting: dict[str, str] = {}
    onwards: list[tuple[int, ...]] = []
    for i, line in enumerate(body):
        if sync := re.search(r"\bBSSY\S* (B\d+), `\((\.L_x_\d+)\)", line):
            meeting[sync[1]] = sync[2]
        onwards.append(_next(line, i, places, meeting))
    known: list[dict[Kind, int]] = [{} for _ in range(len(body) + 1)]  # behind it no way leads back
    for i in range(len(body) - 1, -1, -1):
        own = compiled.work(body[i : i + 1])
        for k in onwards[i]:
            for (loaded, stored, mufu), length in (known[k] if k else {(0, 0, 0): 0}).items():
                kind = loaded + own["loaded"], stored + own["stored"], min(mufu + own["mufu"], most)
                known[i][kind] = min(known[i].get(kind, sys.maxsize), length + own["instructions"])
    return known[0]


def _next(line: str, i: int, places: dict[str, int], meeting: dict[str, str]) -> tuple[int, ...]:
    """Where an instruction may go on to, forwards; 0: the loop is over and begins anew."""
    conditional = re.match(r"\s*/\*[0-9a-f]{4,}\*/\s*@", line) is not None
    target: int | None = i + 1
    if jump := re.search(r"\bBRA\b.*`\((\.L_x_\d+)\)", line):
        target = places.get(jump[1])
    elif sync := re.search(r"\bBSYNC\S* (B\d+)", line):
        target = places.get(meeting.get(sync[1], ""), i + 1)
    elif re.search(r"\b(EXIT|RET)\b", line):
        target = None
    onwards = [target] if target is not None and (target > i or target == 0) else []
    return tuple([*onwards, i + 1] if conditional and i + 1 not in onwards else onwards)


def main() -> None:
    wanted = sys.argv[sys.argv.index("--") + 1 :] if "--" in sys.argv else []
    for architecture in (argument for argument in sys.argv[1:] if argument.isdigit()):
        for name, case in cases().items():
            if not wanted or name in wanted:
                registers, lines = machine_code(case.text(), architecture)[case.kernel]
                found = {"case": name, "sm": int(architecture), "registers": registers, "warps": case.warps}
                print(json.dumps(found | {"passes": passes(case, lines)}), flush=True)


if __name__ == "__main__":
    main()

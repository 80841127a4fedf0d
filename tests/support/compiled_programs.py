"""Compiles loss and divergence programs; a program, for test_program_compile.py.

Prints besides how many kernels were compiled for PPO calls of many shapes and parameters.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import compiled
import divergence_checks
import program_checks as checks
import torch
from fastreward.kernels import divergence, logits_policy_loss, program
from fastreward.kernels.program import module
from fastreward.kernels.program.source import generate

from fastreward import losses
from fastreward._arguments.divergence import DivergenceCall
from fastreward._arguments.tokens import Tokens
from fastreward.language.divergence_programs import register_programs, registered_programs
from fastreward.language.node import Level

ALIGNED, PACKED, SHORT, SHORT_ODD = (64, 2048, False), (64, 2048, True), (64, 100, False), (64, 15, False)

#: A few rows that programs share in a pass with scans.
FEW = (4, 1 << 14, False)


def loss(name: str, rows: int, width: int, packed: bool) -> None:
    named = checks.PROGRAMS[name]()
    program.run(named.program, *checks.make_call(named, rows, width, packed=packed).on("cpu"))


def backward(rows: int, width: int, packed: bool) -> None:
    (tokens,) = checks.make_call(checks.PROGRAMS["ppo"](), rows, width, packed=packed).sides
    program.scale(torch.zeros(tokens.shape), torch.zeros(rows), torch.ones(()), tokens)
    program.broadcast_to_tokens(torch.zeros(rows), torch.ones(()), tokens)


def logits(dtype: torch.dtype, entropy: bool, vocab: int = 151936) -> None:
    gradient = checks.logits_gradient(losses.ppo(dual_clip=3.0), entropy=entropy, advantage=Level.TOKEN)
    x, tokens = torch.zeros(6, vocab, dtype=dtype), Tokens((2, 3), torch.ones(2, 3, dtype=torch.bool))
    own = {Level.TOKEN: (2, 3), Level.SEQUENCE: (2,), Level.BATCH: ()}
    inputs = [None if n.name in ("logprob", "entropy") else torch.zeros(own[n.level]) for n in gradient.program.inputs]
    scalars, labels = [0.5] * len(gradient.program.scalars), torch.zeros(6, dtype=torch.long)
    given = (inputs, tokens, scalars, None, torch.ones(()), x, gradient.gradients, entropy)
    logits_policy_loss.run(gradient.program, x, labels, 1.0, *given)
    logits_policy_loss.rescale(x, torch.ones(()), torch.ones(()))


def divergences(name: str, dtypes: tuple[torch.dtype, torch.dtype], *, statistics: bool, vocab: int = 151936) -> None:
    """Forward, gradient and slices."""
    call = DivergenceCall(torch.zeros(6, dtype=torch.long), 1.0, 1.0, torch.ones(6, dtype=torch.bool), [])
    chosen = divergence_checks.DIVERGENCES[name]
    call = call._replace(parameters=[chosen.scalars[key] for key in sorted(chosen.scalars)])
    programs = registered_programs(register_programs(chosen))
    sides = [torch.zeros(6, vocab, dtype=dtype) for dtype in dtypes]
    _, student, teacher, _ = divergence.forward(programs, *sides, call, 1, statistics)
    inputs, at_label = dict.fromkeys(("upstream", "total", "a", "b"), torch.zeros(6)), torch.zeros(6)
    program = programs.statistics if statistics else programs.student
    known = (call, student, teacher)
    divergence.backward(
        program, programs.parameters, *sides, *known, inputs, at_label if statistics else None, sides[0]
    )
    divergence.sums(programs, *sides, call, 1, student, teacher)


def cases(everything: bool) -> dict[str, Any]:
    found = {name: lambda name=name: loss(name, *ALIGNED) for name in ("ppo", "gspo", "sapo", "real", "dpo", "fipo")}
    found["logits, f32"] = lambda: logits(torch.float32, False)
    found["logits, bf16"] = lambda: logits(torch.bfloat16, True)
    half, single = (torch.bfloat16,) * 2, (torch.float32,) * 2
    found["divergence, bf16"] = lambda: divergences("reverse_kl", half, statistics=False)
    found["divergence, f32, two reads"] = lambda: divergences("jsd", single, statistics=True)
    if everything:
        found["divergence, bf16, all outputs"] = lambda: divergences("reverse_kl", half, statistics=True)
        found["divergence, mixed"] = lambda: divergences("jeffreys", (half[0], single[0]), statistics=True)
        for name, layout in {"packed": PACKED, "short": SHORT, "short and odd": SHORT_ODD}.items():
            found[f"ppo, {name}"] = lambda layout=layout: loss("ppo", *layout)
            found[f"backward, {name}"] = lambda layout=layout: backward(*layout)
        found["backward"] = lambda: backward(*ALIGNED)
        found["gspo, packed"] = lambda: loss("gspo", *PACKED)
        found["real, short"] = lambda: loss("real", *SHORT)
        for name, layout in {"packed": PACKED, "short": SHORT, "short and odd": SHORT_ODD}.items():
            found[f"fipo, {name}"] = lambda layout=layout: loss("fipo", *layout)
            found[f"segments, {name}"] = lambda layout=layout: loss("segments", *layout)
        for name in ("fipo", "segments"):
            found[f"{name}, shared"] = lambda name=name: loss(name, *FEW)
        for name in ("ppo, everything", "gdro", "jepo", "aot", "segments"):
            found[name] = lambda name=name: loss(name, *ALIGNED)
        found["logits, odd vocabulary"] = lambda: logits(torch.bfloat16, False, 50257)
    return found


def variants() -> dict[str, int]:
    """Kernels compiled for PPO: of aligned long rows, of any padded rows, and packed ones besides."""
    module.load.cache_clear()
    counts = {}
    shapes = {
        "aligned": [(64, 2048, False), (7, 1024, False), (1, 40000, False), (512, 516, False), (3, 4096, False)],
        "padded": [(64, 2047, False), (5, 12, False), (9, 13, False), (2, 1, False), (700, 333, False)],
        "packed": [(64, 2048, True), (3, 70, True), (17, 5000, True), (200, 90, True)],
    }
    kernel = None
    for name, layouts in shapes.items():
        for k, (rows, width, packed) in enumerate(layouts):
            tuned = losses.ppo(clip_low=0.1 + 0.01 * k, dual_clip=2.0 + k, delta=3.0)
            named = checks.policy(tuned, Level.TOKEN, deferred=True)
            shape = (rows * width,) if packed else (rows, width)
            bounds = torch.arange(rows + 1) * width if packed else None
            tokens = Tokens(shape, torch.ones(shape, dtype=torch.bool), bounds)
            x = torch.zeros(shape)
            scalars = named.program.scalar_values(named.parameters)
            program.run(named.program, [x] * len(named.program.inputs), [tokens], scalars, None)
            kernel = module.load("program", generate(named.program).source).tokens_1
        counts[name] = len(kernel.device_caches[compiled.FULL][0])
    return counts


if __name__ == "__main__":
    compiled.main(cases)
    if str(compiled.FULL) in sys.argv:
        print(json.dumps({"case": "variants", **variants()}), flush=True)

"""Compiles the kernels that stream, for docs/gpu.md; a program, for tools/machine_code.py and test_machine_code.py.

Arguments: architectures, and after `--` the cases that are wanted. A line per case: registers, warps, and its passes.
"""

from __future__ import annotations

import contextlib
import io
import json
import sys
from collections.abc import Callable
from typing import NamedTuple

import compiled
import compiled_kernels
import compiled_programs as programs
import torch

HALF, SINGLE = torch.bfloat16, torch.float32


class Case(NamedTuple):
    """A call, which of the kernels that it launches is meant, and its passes: as many loops, those of the most 16-byte
    loads, then of the most bytes; or 0, where a program has one tile and no loop."""

    call: Callable[[], object]
    kernel: str
    passes: int = 1


def cases() -> dict[str, Case]:
    """By what a reader calls them."""
    raw = compiled_kernels.logprob_cases(True) | compiled_kernels.small_cases(True)

    def divergence(name: str, dtype: torch.dtype, statistics: bool = False) -> Callable[[], object]:
        return lambda: programs.divergences(name, (dtype, dtype), statistics=statistics)

    def loss(name: str) -> Callable[[], object]:
        return lambda: programs.loss(name, *programs.ALIGNED)

    alone, entropy = raw["logprobs: bf16, logprobs alone"], raw["logprobs: bf16, logprobs and entropy"]
    return {
        "log-probs, bf16": Case(alone, "_forward_kernel"),
        "log-probs and entropy, bf16": Case(entropy, "_forward_kernel"),
        "log-probs and all else, f32": Case(raw["logprobs: f32, all outputs"], "_forward_kernel"),
        "log-probs and all else of a slice, bf16": Case(raw["logprobs: slices"], "_accumulate_kernel"),
        "log-probs' gradient, bf16": Case(alone, "_backward_kernel"),
        "log-probs' gradient, f32": Case(raw["logprobs: f32, all outputs"], "_backward_kernel"),
        "reverse KL, bf16": Case(divergence("reverse_kl", HALF), "divergence_forward"),
        "reverse KL and all else, bf16": Case(divergence("reverse_kl", HALF, True), "divergence_forward"),
        "reverse KL, f32": Case(divergence("reverse_kl", SINGLE), "divergence_forward"),
        "reverse KL's gradient, bf16": Case(divergence("reverse_kl", HALF), "divergence_gradient"),
        "reverse KL of a slice, bf16": Case(divergence("reverse_kl", HALF), "divergence_sums"),
        "Jensen-Shannon, bf16": Case(divergence("jsd", HALF), "divergence_forward", 2),
        "Jensen-Shannon, f32": Case(divergence("jsd", SINGLE), "divergence_forward", 2),
        "Jensen-Shannon's gradient, bf16": Case(divergence("jsd", HALF), "divergence_gradient"),
        "Jensen-Shannon's gradient, f32": Case(divergence("jsd", SINGLE), "divergence_gradient"),
        "logits to PPO's gradient, bf16": Case(lambda: programs.logits(HALF, False), "logits_gradient", 2),
        "logits to PPO's gradient, f32": Case(lambda: programs.logits(SINGLE, False), "logits_gradient", 2),
        "their scale put right, bf16": Case(lambda: programs.logits(HALF, False), "_rescale_kernel"),
        "PPO": Case(loss("ppo"), "tokens_1"),
        "GSPO": Case(loss("gspo"), "tokens_1"),
        "DPO": Case(loss("dpo"), "tokens_1_chosen"),
        "FIPO: a discounted sum from the end": Case(loss("fipo"), "tokens_1"),
        "the same, of tiles alone": Case(lambda: programs.loss("fipo", *programs.FEW), "maps_1"),
        "sums of segments: from the start": Case(loss("segments"), "tokens_1"),
        "sums of segments: from the end": Case(loss("segments"), "tokens_2"),
        "a loss's stored gradient, scaled": Case(lambda: programs.backward(*programs.ALIGNED), "_scale_kernel"),
        "a sequence's value, to its tokens": Case(
            lambda: programs.backward(*programs.ALIGNED), "_broadcast_to_tokens_kernel"
        ),
        "GAE": Case(raw["returns: gae"], "_scan_kernel"),
        "scores and KL to rewards": Case(raw["token_rewards"], "_token_rewards_kernel", 0),
        "means of segments": Case(raw["segments: mean"], "_spans_kernel"),
        "means' adjoint": Case(raw["segments: mean"], "_adjoint_kernel", 0),
        "whitening, statistics": Case(raw["whiten"], "_statistics_kernel"),
        "whitening": Case(raw["whiten"], "_apply_kernel", 0),
    }


def main() -> None:
    wanted = sys.argv[sys.argv.index("--") + 1 :] if "--" in sys.argv else []
    chosen = {name: case for name, case in cases().items() if not wanted or name in wanted}
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        compiled.main(lambda everything: {name: case.call for name, case in chosen.items()})
    told = set()
    for line in map(json.loads, printed.getvalue().splitlines()):
        case, key = chosen[line["case"]], (line["case"], line["sm"])
        if line["kernel"] != case.kernel or key in told:
            continue
        told.add(key)
        loops = line["streams"]
        most = sorted(loops, key=lambda loop: (-loop["wide"], -loop["loaded"] - loop["stored"]))[: case.passes]
        passes = [loop for loop in loops if loop in most] if case.passes else [line["whole"]]
        passes = [{name: n for name, n in loop.items() if name != "wide"} for loop in passes]
        print(json.dumps({name: line[name] for name in ("case", "sm", "registers", "warps")} | {"passes": passes}))


if __name__ == "__main__":
    main()

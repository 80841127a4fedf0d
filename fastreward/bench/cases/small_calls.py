"""Small calls: every operation at a size whose work takes microseconds, so that what is left is the call itself.

The calls are those of the operations' own benchmarks, beside the eager form of each and nothing else.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Final

import torch

from fastreward import bench
from fastreward.bench import peers
from fastreward.bench.case import OURS, Case, Target

#: (case, shape, how many times the eager form's speed is promised) by operation.
_CALLS: Final[dict[str, tuple[str, tuple[int, ...], float | None]]] = {
    "logprobs": ("forward", (16, 1000), 0.33),
    "linear_logprobs": ("backward", (16, 64, 1000), None),
    "divergence": ("reverse-kl", (16, 1000), None),
    "linear_divergence": ("reverse-kl+gradient", (16, 64, 1000), None),
    "policy_loss": ("ppo", (8, 128), 1.1),
    "preference_loss": ("dpo", (8, 128), None),
    "logits_policy_loss": ("fresh", (16, 1000), None),
    "linear_policy_loss": ("backward", (16, 64, 1000), None),
    "correction": ("tis", (8, 128), None),
    "group": ("uid-strings", (64, 8), None),
    "whiten": ("fresh", (8, 128), None),
    "returns": ("gae-fresh", (8, 128), None),
    "segments": ("turn-advantage", (8, 128), None),
    "rewards": ("k1-fresh", (8, 128), None),
    "value_loss": ("clipped", (8, 128), None),
    "prefix_tree": ("credit-g8-70", (16, 128), None),
}
CASES = tuple(_CALLS)
DTYPES = ("float32",)
SHAPE = QUICK = (1,)  # each case has its own
_EAGER = "torch eager"
_REPEATED = 100  # calls of a sample


def build(case: str, dtype: torch.dtype, shape: tuple[int, ...], device: str) -> Case:
    """The operation's own case at its small size; `shape` says nothing here."""
    name, size, speed = _CALLS[case]
    with peers.left_out():
        inner = bench.operation(case).build(name, dtype, size, device)
    return replace(
        inner,
        operation="small_calls",
        name=case,
        contenders=[contender for contender in inner.contenders if contender.name in (OURS, _EAGER)],
        absent={name: why for name, why in inner.absent.items() if name == _EAGER},
        targets=() if speed is None else (Target("speedup", speed, _EAGER),),
        repeated=_REPEATED,
    )

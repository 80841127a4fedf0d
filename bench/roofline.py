"""The bytes formulas, and this machine's limits by them: `python bench/roofline.py [rows] [vocab]`.

The formulas live in fastreward.bench.roofline, so that `fastreward bench` has them in an installed wheel.
"""

from __future__ import annotations

import sys

from fastreward.bench import roofline
from fastreward.bench.engine import Probe


def main(rows: int = 2048, vocab: int = 151_936) -> None:
    probe = Probe(1 << 30, "cpu")
    for _ in range(6):
        probe.round()
    bandwidth = probe.bandwidth()
    print(f"read {bandwidth.read / 1e9:.1f} GB/s, copy {bandwidth.copy / 1e9:.1f} GB/s (read + written)")
    for name, traffic in (
        (f"logprobs forward [{rows}, {vocab}] f32", roofline.logprobs_forward(rows, vocab, 4)),
        (f"logprobs forward [{rows}, {vocab}] bf16", roofline.logprobs_forward(rows, vocab, 2)),
        (f"logprobs forward + backward [{rows}, {vocab}] f32", roofline.logprobs_forward_backward(rows, vocab, 4)),
        (f"logprobs forward + backward [{rows}, {vocab}] bf16", roofline.logprobs_forward_backward(rows, vocab, 2)),
        ("policy_loss forward + backward [512, 8192]", roofline.policy_loss_forward_backward(512 * 8192)),
        ("correction_weights [512, 8192]", roofline.correction(512 * 8192)),
        ("whiten [4096, 8192]", roofline.whiten(4096 * 8192)),
    ):
        print(f"{name:<50} {traffic.total / 1e6:9.1f} MB  {traffic.seconds(bandwidth) * 1e3:8.2f} ms")


if __name__ == "__main__":
    main(*(int(argument) for argument in sys.argv[1:3]))

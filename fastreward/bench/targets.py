"""Judges a timed case by its promises."""

from __future__ import annotations

import math
from dataclasses import dataclass

from fastreward.bench.case import Target
from fastreward.bench.engine import Outcome


@dataclass(frozen=True, slots=True)
class Verdict:
    """One promise, what was measured, and whether it holds; `met` is None where it could not be measured."""

    target: Target
    measured: str
    met: bool | None


def judge(outcome: Outcome, device: str, at_own_size: bool) -> list[Verdict]:
    """A verdict per promise; a promise holds for its own size and device only."""
    chosen = [t for t in outcome.case.targets if t.device == device]
    if not at_own_size:
        return [Verdict(t, "another size", None) for t in chosen]
    return [_judge(outcome, target) for target in chosen]


def _judge(outcome: Outcome, target: Target) -> Verdict:
    ours = outcome.ours
    if target.kind in ("speedup", "ratio", "per_token"):
        peer = outcome.timing(target.peer)
        if peer is None:
            return Verdict(target, outcome.case.absent.get(target.peer, "not here"), None)
        if target.kind == "per_token":
            value = peer.median * 1e9 / math.prod(outcome.case.shape)
            return Verdict(target, f"{value:.2f} ns", value <= target.bound)
        if target.kind == "speedup":
            value = peer.median / ours.median
            return Verdict(target, f"{value:.2f}x", value >= target.bound)
        value = ours.median / peer.median
        return Verdict(target, f"{value:.2f}x", value <= target.bound)
    if target.kind == "share":
        value = outcome.limit / ours.median
        return Verdict(target, f"{value:.0%}", value >= target.bound)
    if target.kind == "memory":
        if ours.peak is None:
            return Verdict(target, "not measured", None)
        return Verdict(target, f"{ours.peak / 2**20:.2f} MiB", ours.peak < target.bound)
    return Verdict(target, f"{ours.first * 1e3:.1f} ms", ours.first < target.bound)

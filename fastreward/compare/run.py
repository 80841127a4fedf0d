"""A whole comparison, in order."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from fastreward.compare import diagnose, report
from fastreward.compare.load import Side, load
from fastreward.compare.measure import Options, measure
from fastreward.compare.pair import pair
from fastreward.compare.report import Comparison


def run(
    given: tuple[Any, Any],
    keys: tuple[str | None, str | None],
    beside: Mapping[str, Any],
    temperatures: tuple[float, float],
    tolerance: float,
    top: int,
    step: Callable[[int, int], None] | None,
) -> Comparison:
    """See fastreward.compare."""
    a, b = (load(name, x, key, **beside) for name, x, key in zip("AB", given, keys, strict=True))
    for side, temperature in zip((a, b), temperatures, strict=True):
        if temperature != 1.0 and side.logits is None:
            raise ValueError(
                f"temperature_{side.name.lower()}: expected 1 for log-probs, got {temperature}; only logits take one"
            )
    pairs, notes = pair(a, b)
    options, told = Options(temperatures, top), step or _nobody
    found = measure(a, b, pairs, options, told)
    aligned, moved = diagnose.align(a, b, pairs, found)
    right = found if aligned is pairs else measure(a, b, aligned, options, told)
    faults = [*([moved] if moved else []), *diagnose.faults(a, b, right)]
    totals, per_token, first = report.summary(found, pairs, tolerance)
    unknown = int(per_token["difference"].isnan().sum())
    if unknown:
        notes = (*notes, f"{unknown} tokens are in one side's top-k alone: they have no difference")
    return Comparison(
        _kind(a, b),
        pairs.sequences,
        len(pairs),
        totals,
        per_token,
        pairs.cu_seqlens,
        first,
        tuple(faults),
        diagnose.verdict(found, faults),
        notes,
    )


def _kind(a: Side, b: Side) -> str:
    kinds = {a.kind, b.kind}
    return "logprobs" if "logprobs" in kinds else "top-k" if "top-k" in kinds else "logits"


def _nobody(done: int, total: int) -> None:
    pass

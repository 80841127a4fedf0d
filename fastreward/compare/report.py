"""The result of a comparison: numbers in all and per token, faults, and how they are shown."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from fastreward.compare.diagnose import Fault, compared, correlation
from fastreward.compare.measure import PerToken
from fastreward.compare.pair import Pairs
from fastreward.correction import correction_weights

#: Name, what it is. Not all are there: that depends on what the sides say.
TOTALS: Final = {
    "kl_ab": "KL(A || B), exact",
    "kl_ba": "KL(B || A), exact",
    "tv": "total variation, exact",
    "kl_ab_at_least": "KL(A || B), at least: top-k and one bucket for the rest",
    "kl_ba_at_least": "KL(B || A), at least",
    "tv_at_least": "total variation, at least",
    "tv_at_most": "total variation, at most",
    "kl_k1": "KL(A || B), estimated: mean of l = log A - log B",
    "kl_k2": "KL(A || B), estimated: mean of l^2 / 2",
    "kl_k3": "KL(A || B), estimated: mean of e^-l - 1 + l",
    "tv_estimate": "total variation, estimated: mean of |1 - e^-l| / 2",
    "difference_mean": "mean of log B - log A",
    "difference_median": "median of |log B - log A|",
    "difference_p99": "99th percentile of it",
    "difference_max": "largest",
    "correlation": "correlation of the log-probs",
    "equal_share": "share of values that are equal to the last bit",
    "top1_agreement": "share of tokens with the same likeliest id",
    "overlap": "share of A's largest ids that are B's too",
    "entropy_a": "entropy of A (nats)",
    "entropy_b": "entropy of B (nats)",
    "ess_tokens": "effective sample size of the weights B / A, share of tokens",
    "ess_sequences": "the same with a weight per sequence",
}
#: Per token, of what is measured.
PER_TOKEN: Final = (
    *("kl_ab", "kl_ba", "tv", "kl_ab_at_least", "kl_ba_at_least", "tv_at_least", "tv_at_most"),
    *("top1_agreement", "overlap", "entropy_a", "entropy_b", "equal"),
)
_WORST: Final = 5  # tokens that a report shows
_FAR: Final = 1e4  # nats: what an infinite difference counts as in a weight


@dataclass(frozen=True)
class Comparison:
    """How far side A (a rollout engine) is from side B (the trainer). Tensors are on the CPU, whatever was given.

    kind: "logits", "top-k" or "logprobs": the most that both sides say.
    totals: over all tokens, by the names of `fastreward.compare.report.TOTALS`; those that the kind allows. Without
        tokens the log-probs compared are those of A's likeliest id of each token, and there are no estimates.
    per_token: [N] of the tokens that count, sequence by sequence: a, b (log-probs, f64), difference (b - a) and, as the
        kind allows, kl_ab, kl_ba, tv (or their bounds), top1_agreement, overlap, entropy_a, entropy_b, equal.
    cu_seqlens: i64 [B + 1], where a sequence's tokens are among these N.
    first_difference: i64 [B], the first token of each sequence that differs by more than the tolerance (by 0: that is
        not equal to the last bit); -1 where none does. Counted in tokens that count.
    faults: the likeliest first; empty where none was found.
    """

    kind: str
    sequences: int
    tokens: int
    totals: dict[str, float]
    per_token: dict[str, Tensor]
    cu_seqlens: Tensor
    first_difference: Tensor
    faults: tuple[Fault, ...]
    verdict: str
    notes: tuple[str, ...]

    def __str__(self) -> str:
        console = Console(width=120, force_terminal=False, color_system=None)
        with console.capture() as captured:
            show(console, self)
        return captured.get().rstrip()

    def to_dict(self, per_token: bool = False) -> dict[str, Any]:
        """For JSON, with what is not finite as None; per_token: the numbers of every token too."""
        facts: dict[str, Any] = {
            "kind": self.kind,
            "sequences": self.sequences,
            "tokens": self.tokens,
            "verdict": self.verdict,
            "faults": [{"name": f.name, "side": f.side, "value": f.value, "evidence": f.evidence} for f in self.faults],
            "notes": list(self.notes),
            "totals": {name: _finite(x) for name, x in self.totals.items()},
            "first_difference": self.first_difference.tolist(),
            "worst": self.worst(),
        }
        if per_token:
            facts["cu_seqlens"] = self.cu_seqlens.tolist()
            facts["per_token"] = {name: [_finite(v) for v in x.tolist()] for name, x in self.per_token.items()}
        return facts

    def worst(self, most: int = _WORST) -> list[dict[str, Any]]:
        """The tokens that differ most: sequence, token (of those that count), a, b, difference."""
        size = self.per_token["difference"].abs().nan_to_num(-1.0, posinf=math.inf)
        chosen = size.sort(descending=True, stable=True).indices[:most]
        sequence = torch.searchsorted(self.cu_seqlens, chosen, right=True) - 1
        return [
            {
                "sequence": int(s),
                "token": int(at - self.cu_seqlens[s]),
                **{name: _finite(float(self.per_token[name][at])) for name in ("a", "b", "difference")},
            }
            for s, at in zip(sequence, chosen, strict=True)
            if size[at] > 0
        ]

    def plot(self, path: str | Path) -> None:
        """Draws both sides' log-probs against each other, their differences, and those along the sequences.

        Raises:
            ValueError: a file that can't be written, or of another kind than .png, .svg and .pdf.
            ModuleNotFoundError: matplotlib is not installed.
        """
        from fastreward.compare.plot import draw

        draw(Path(path), self.per_token, self.cu_seqlens, self.verdict, bool(self.faults))


# ------------------------------------------------------------------------------------------------------------ totals
def summary(found: PerToken, pairs: Pairs, tolerance: float) -> tuple[dict[str, float], dict[str, Tensor], Tensor]:
    """(totals, per token, first difference of each sequence)."""
    a, b = compared(found)
    difference = torch.where((a == b) | ((a == -torch.inf) & (b == -torch.inf)), 0.0, b - a)
    per_token = {"a": a, "b": b, "difference": difference} | {x: found[x] for x in PER_TOKEN if x in found}
    totals = {name: _mean(per_token[name]) for name in TOTALS if name in per_token}
    if bool((~found["chosen_a"].isnan() & ~found["chosen_b"].isnan()).any()):
        totals |= _estimates(difference) | _sample_sizes(difference, pairs)
    totals |= _differences(a, b, difference)
    totals["equal_share"] = _mean(found["equal"])
    differs = (found["equal"] < 1.0) if tolerance == 0.0 else (difference.abs() > tolerance) | difference.isnan()
    ordered = {name: totals[name] for name in TOTALS if name in totals}
    return ordered, per_token, _first(differs, pairs)


def _differences(a: Tensor, b: Tensor, difference: Tensor) -> dict[str, float]:
    known = difference[~difference.isnan()]
    size = known.abs().sort().values
    if not len(size):
        return {name: math.nan for name in TOTALS if name.startswith("difference")} | {"correlation": math.nan}
    return {
        "difference_mean": float(known.mean()),
        "difference_median": float(size[(len(size) - 1) // 2]),
        "difference_p99": float(size[math.ceil(0.99 * len(size)) - 1]),
        "difference_max": float(size[-1]),
        "correlation": correlation(a, b),
    }


def _estimates(difference: Tensor) -> dict[str, float]:
    """Of KL(A || B) and TV, from tokens that A has chosen."""
    ratio = difference.exp()
    return {
        "kl_k1": _mean(-difference),
        "kl_k2": _mean(0.5 * difference * difference),
        "kl_k3": _mean(ratio - 1.0 - difference),
        "tv_estimate": _mean(0.5 * (ratio - 1.0).abs()),
    }


def _sample_sizes(difference: Tensor, pairs: Pairs) -> dict[str, float]:
    """Of importance weights e^difference per token, and of their products per sequence."""
    known = ~difference.isnan()
    if not bool(known.any()):
        return {}
    tokens = difference[known].clamp(-_FAR, _FAR)
    there = pairs.sequence[known]
    sums = torch.zeros(pairs.sequences, dtype=torch.float64).index_add(0, there, tokens)
    return {
        "ess_tokens": _sample_size(tokens),
        "ess_sequences": _sample_size(sums[torch.bincount(there, minlength=len(sums)) > 0]),
    }


def _sample_size(log_weights: Tensor) -> float:
    """(mean w)^2 / mean w^2, which no common factor of the weights changes: the largest is 1."""
    moved = (log_weights - log_weights.max()).float().unsqueeze(-1)
    _, _, metrics = correction_weights(moved, torch.zeros_like(moved))
    return float(metrics["rollout_is_eff_sample_size"])


def _first(differs: Tensor, pairs: Pairs) -> Tensor:
    """The first token of each sequence that differs, -1 for none."""
    nowhere = len(pairs) + 1
    position = torch.where(differs, pairs.position, nowhere)
    first = torch.full((pairs.sequences,), nowhere).scatter_reduce(0, pairs.sequence, position, "amin")
    return torch.where(first == nowhere, -1, first)


def _mean(x: Tensor) -> float:
    known = x[~x.isnan()]
    return float(known.mean()) if len(known) else math.nan


def _finite(x: float) -> float | None:
    return x if math.isfinite(x) else None


# ------------------------------------------------------------------------------------------------------------- shown
def show(console: Console, result: Comparison) -> None:
    """The verdict with its evidence, the totals, the tokens that differ most."""
    colour = "red" if result.faults else "green"
    console.print(f"[bold {colour}]{result.verdict}[/]", highlight=False)
    for fault in result.faults:
        console.print(f"  [bold]{fault.name}[/]: {fault.evidence}", highlight=False)
    for note in result.notes:
        console.print(f"  [dim]{note}[/]", highlight=False)
    table = Table(title=f"{result.kind}: {result.tokens} tokens in {result.sequences} sequences", title_justify="left")
    table.add_column("")
    table.add_column("", justify="right")
    for name, value in result.totals.items():
        table.add_row(TOTALS[name], f"{value:.4g}")
    differing = result.first_difference[result.first_difference >= 0]
    table.add_row("sequences that differ", f"{len(differing)}")
    if len(differing):
        table.add_row("their first differing token, median", f"{int(differing.median())}")
    console.print(table)
    worst = result.worst()
    if worst:
        tokens = Table(title="Largest differences", title_justify="left")
        for heading in ("sequence", "token", "A", "B", "B - A"):
            tokens.add_column(heading, justify="right")
        for x in worst:
            numbers = ("-inf" if x[name] is None else f"{x[name]:.4f}" for name in ("a", "b"))
            tokens.add_row(str(x["sequence"]), str(x["token"]), *numbers, _difference(x))
        console.print(tokens)


def _difference(x: dict[str, Any]) -> str:
    return f"{x['difference']:+.4f}" if x["difference"] is not None else "-inf" if x["b"] is None else "+inf"

"""Rollout correction in the loss language: weights, what is rejected, and metrics of the gap between two engines."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Final, Literal

from fastreward.language.functions import (
    abs,
    batch_max,
    batch_mean,
    batch_min,
    batch_sum,
    clip,
    exp,
    expm1,
    log,
    maximum,
    seq_max,
    seq_mean,
    seq_sum,
    sqrt,
    where,
)
from fastreward.language.graph import Graph
from fastreward.language.node import Level, Node
from fastreward.language.program import Program, program
from fastreward.language.terms import Terms, measured

Mode = Literal["truncate", "mask", "icepop"]
CorrectionLevel = Literal["token", "sequence", "geometric"]

#: Rejection criteria under verl's names: where the divergence estimate is taken, and which one it is.
REJECTIONS: Final = (
    *(f"{place}_k{k}" for place in ("token", "seq_sum", "seq_mean") for k in (1, 2, 3)),
    "seq_max_k2",
    "seq_max_k3",
)
_CLAMP: Final = 20.0  # verl's SAFETY_BOUND on log-ratios


@dataclass(frozen=True, slots=True)
class Formula:
    """Key of a call's formula; thresholds are run-time scalars, those `on_device` inputs of the program."""

    mode: Mode | None
    level: CorrectionLevel
    low: bool
    high: bool
    clamp: bool
    normalize: bool
    unscored: bool
    reject: tuple[str, ...]
    on_device: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, eq=False)
class Plan:
    """A program with its parameters in order; its outputs are the weights (of any mode) and what is kept (if any goes).

    per_token: whether these two have a value per token (True) or per sequence (False); None: there is no such output.
    """

    program: Program
    parameters: tuple[str, ...]
    metrics: tuple[str, ...]
    per_token: tuple[bool | None, bool | None]


class _Correction:
    """The nodes of one formula."""

    def __init__(self, formula: Formula) -> None:
        self.formula, self.graph = formula, Graph(on_device=formula.on_device)
        t = Terms(self.graph, {"old_logprob": Level.TOKEN, "rollout_logprob": Level.TOKEN})
        self.length, self.old, rollout = t.length, t.old_logprob, t.rollout_logprob
        # A NaN is a token that the engine could not score: no evidence of a gap.
        self.rollout = where(rollout == rollout, rollout, self.old) if formula.unscored else rollout
        self.log_ratio = self.old - self.rollout

    def parameter(self, name: str) -> Node:
        return self.graph.parameter(name)

    # ----------------------------------------------------------------------------------------------- reductions
    def per_row(self, x: Node) -> Node:
        """Mean over the sequence's tokens; 0 for an empty one, also of what it has per sequence."""
        return seq_mean(x) if x.level == Level.TOKEN else where(self.length > 0.0, x, 0.0)

    def over_rows(self, x: Node) -> Node:
        """Mean over all sequences, empty ones included, as verl takes it."""
        return self.graph.reduce("batch_sum", x) / self.parameter("rows")

    def over_tokens(self, x: Node) -> Node:
        """Mean over the valid tokens; what is per sequence counts for each of its tokens."""
        return batch_sum(seq_sum(x)) / maximum(batch_sum(self.length), 1.0)

    def deviation(self, x: Node) -> Node:
        """Standard deviation over the valid tokens, ddof 0."""
        return sqrt(self.over_tokens((x - self.over_tokens(x)) ** 2))

    def any_token(self, condition: Node) -> Node:
        """1 for sequences with a valid token where the condition holds, else 0."""
        if condition.level == Level.TOKEN:
            return maximum(seq_max(_one(condition)), 0.0)
        return where(self.length > 0.0, _one(condition), 0.0)

    # -------------------------------------------------------------------------------------------------- weights
    def level_log_ratio(self) -> Node:
        """Log-ratio of tokens, of sequences, or its mean over the sequence's tokens; not clamped."""
        if self.formula.level == "token":
            return self.log_ratio
        return seq_sum(self.log_ratio) if self.formula.level == "sequence" else seq_mean(self.log_ratio)

    def bound(self, name: Literal["low", "high"], missing: float) -> Node:
        given = {"low": self.formula.low, "high": self.formula.high}[name]
        return self.parameter(name) if given else self.graph.constant(missing)

    def weights(self) -> tuple[Node, Node, Node]:
        """(weights within their bounds, before them, whether they were inside)."""
        log_ratio = self.level_log_ratio()
        limit = self.parameter("clamp")
        raw = exp(clip(log_ratio, -limit, limit) if self.formula.clamp else log_ratio)
        low, high = self.bound("low", -math.inf), self.bound("high", math.inf)
        inside = (raw >= low) & (raw <= high)
        return clip(raw, low, high) if self.formula.mode == "truncate" else where(inside, raw, 0.0), raw, inside

    def weight_metrics(self, weights: Node, raw: Node) -> dict[str, Node]:
        """verl's compute_is_metrics; its lower threshold is 1 / high where none is given."""
        high = self.bound("high", math.inf)
        low = self.bound("low", 0.0) if self.formula.low or not self.formula.high else 1.0 / high
        if self.formula.level == "token":
            top, bottom = batch_max(weights), batch_min(weights)
            above, below = self.over_tokens(_one(raw > high)), self.over_tokens(_one(raw < low))
        else:
            log_ratio = self.level_log_ratio()
            top = exp(clip(self.graph.reduce("batch_max", log_ratio), high=_CLAMP))
            bottom = exp(self.graph.reduce("batch_min", log_ratio))
            above, below = (self.over_rows(_one(c)) for c in (log_ratio > log(high), log_ratio < log(low)))
        bounded = clip(weights, 0.0, high)
        mean = self.over_tokens(bounded)
        rows, raw_rows = self.per_row(weights), self.per_row(raw)
        row_mean = self.over_rows(rows)
        squares = self.graph.reduce("batch_sum", (rows - row_mean) ** 2)
        return {
            "rollout_is_mean": self.over_tokens(weights),
            "rollout_is_max": top,
            "rollout_is_min": bottom,
            "rollout_is_ratio_fraction_high": above,
            "rollout_is_ratio_fraction_low": below,
            "rollout_is_std": self.deviation(bounded),
            "rollout_is_eff_sample_size": 1.0 / self.over_tokens((bounded / (mean + 1e-8)) ** 2),
            "rollout_is_seq_mean": row_mean,
            "rollout_is_seq_std": sqrt(squares / maximum(self.parameter("rows") - 1.0, 1.0)),
            "rollout_is_seq_max": self.graph.reduce("batch_max", rows),
            "rollout_is_seq_min": self.graph.reduce("batch_min", rows),
            "rollout_is_seq_max_deviation": self.graph.reduce("batch_max", abs(rows - 1.0)),
            "rollout_is_seq_fraction_high": self.over_rows(_one(raw_rows > high)),
            "rollout_is_seq_fraction_low": self.over_rows(_one(raw_rows < low)),
        }

    def norm_factor(self, weights: Node) -> Node:
        """Mean weight of the tokens, or of the sequences that have one; 1 where that vanishes."""
        mean = batch_mean(weights)
        return where(mean > 1e-8, mean, 1.0)

    # ------------------------------------------------------------------------------------------------ rejection
    def statistic(self, option: str) -> Node:
        """The divergence estimate that `option` looks at, per token or per sequence."""
        place, kind = option.rsplit("_", 1)
        gap = clip(self.log_ratio, -_CLAMP, _CLAMP)
        token = {"k1": -gap, "k2": 0.5 * gap * gap, "k3": expm1(gap) - gap}[kind]
        if place == "seq_max":
            return where(self.length > 0.0, seq_max(token), 0.0)
        return token if place == "token" else {"seq_sum": seq_sum, "seq_mean": seq_mean}[place](token)

    def limits(self, option: str) -> tuple[Node | None, Node]:
        """(low, high) of the statistic; only k1, whose thresholds are ratios, has a lower one."""
        high = self.parameter(f"{option}.high")
        return (log(self.parameter(f"{option}.low")), log(high)) if option.endswith("k1") else (None, high)

    def passes(self, option: str) -> Node:
        low, high = self.limits(option)
        x = self.statistic(option)
        return x <= high if low is None else (x >= low) & (x <= high)

    def rejection_metrics(self, option: str) -> dict[str, Node]:
        """verl's compute_rs_metrics, and the shares that the option rejects."""
        x, (low, high), passed = self.statistic(option), self.limits(option), self.passes(option)
        rows = self.per_row(x)
        row_mean, count = batch_mean(rows), batch_sum(1.0, self.graph)
        values = {
            "mean": self.over_tokens(x),
            "max": batch_max(x),
            "min": batch_min(x),
            "fraction_high": batch_mean(_one(x > high)),  # over tokens, or over sequences: as the statistic is
            "fraction_low": self.graph.constant(0.0) if low is None else batch_mean(_one(x < low)),
            "std": self.deviation(clip(x, 0.0 if low is None else low, high)),
            "seq_mean": row_mean,
            "seq_std": sqrt(batch_sum((rows - row_mean) ** 2) / maximum(count - 1.0, 1.0)),
            "seq_max": batch_max(rows),
            "seq_min": batch_min(rows),
            "seq_max_deviation": batch_max(abs(rows)),
            "seq_fraction_high": batch_mean(_one(rows > high)),
            **({} if low is None else {"seq_fraction_low": batch_mean(_one(rows < low))}),
            "masked_fraction": self.over_tokens(_one(~passed)),
            "seq_masked_fraction": batch_mean(self.any_token(~passed)),
        }
        return {f"rollout_rs_{option}_{name}": value for name, value in values.items()}

    # -------------------------------------------------------------------------------------------------- the gap
    def gap_metrics(self) -> dict[str, Node]:
        """verl's compute_offpolicy_metrics."""
        train, roll = seq_mean(self.old), seq_mean(self.rollout)
        gap, d = roll - train, self.log_ratio
        total = clip(seq_sum(d), -_CLAMP, _CLAMP)
        return {
            "training_ppl": self.over_rows(exp(-train)),
            "training_log_ppl": self.over_rows(-train),
            "kl": self.over_tokens(-d),
            "k3_kl": self.over_tokens(expm1(d) - d),
            "rollout_ppl": self.over_rows(exp(-roll)),
            "rollout_log_ppl": self.over_rows(-roll),
            "log_ppl_diff": self.over_rows(gap),
            "log_ppl_abs_diff": self.over_rows(abs(gap)),
            "log_ppl_diff_max": self.graph.reduce("batch_max", gap),
            "log_ppl_diff_min": self.graph.reduce("batch_min", gap),
            "ppl_ratio": self.over_rows(exp(gap)),
            "chi2_token": self.over_tokens(exp(2.0 * clip(d, -_CLAMP, _CLAMP))) - 1.0,
            "chi2_seq": self.over_rows(exp(2.0 * total)) - 1.0,
        }


def _one(condition: Node) -> Node:
    return where(condition, 1.0, 0.0)


@lru_cache(maxsize=256)
def plan(formula: Formula) -> Plan:
    """The program of a formula; kept, as tracing takes milliseconds."""
    c = _Correction(formula)
    metrics: dict[str, Node] = {}
    weights: Node | None = None
    kept = c.graph.truth(True)
    for option in formula.reject:
        metrics |= c.rejection_metrics(option)
        kept = kept & c.passes(option)
    if formula.reject:
        metrics["rollout_rs_masked_fraction"] = c.over_tokens(_one(~kept))
        metrics["rollout_rs_seq_masked_fraction"] = c.over_rows(c.any_token(~kept))
    if formula.mode is not None:
        weights, raw, inside = c.weights()
        metrics |= c.weight_metrics(weights, raw)
        if formula.mode != "truncate":
            metrics["rollout_is_oob_ratio"] = c.over_tokens(_one(~inside))
        if formula.mode == "mask":
            kept = kept & inside
        if formula.normalize:
            metrics["rollout_is_batch_norm_factor"] = c.norm_factor(weights)
            weights = weights / metrics["rollout_is_batch_norm_factor"]
    metrics |= c.gap_metrics()
    metrics = {name: measured(value) for name, value in metrics.items()}
    outputs = [weights, None if kept.op == "constant" else _one(kept)]
    thresholds = [f"{option}.{side}" for option in formula.reject for side in ("low", "high")]
    first, second = (None if x is None else x.level == Level.TOKEN for x in outputs)
    built = program([x for x in outputs if x is not None], list(metrics.values()))
    return Plan(built, ("rows", "clamp", "low", "high", *thresholds), tuple(metrics), (first, second))


@lru_cache(maxsize=8)
def sequence_mask_plan(unscored: bool, on_device: tuple[str, ...] = ()) -> Program:
    """DeepSeek-V3.2's off-policy sequence mask: 1 where kept, per sequence."""
    graph = Graph(on_device=on_device)
    levels = {"logprob": Level.TOKEN, "rollout_logprob": Level.TOKEN, "advantage": Level.SEQUENCE}
    t = Terms(graph, levels)
    gap = t.rollout_logprob - t.logprob
    if unscored:
        gap = where(gap == gap, gap, 0.0)
    advantage = graph.input("advantage", Level.SEQUENCE)
    keep = (advantage >= 0.0) | (seq_mean(gap) <= graph.parameter("threshold"))
    return program([_one(keep)], [])

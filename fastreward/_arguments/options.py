"""Options that the public functions hand to every backend."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from fastreward._arguments import check

Aggregation = Literal[
    "token-mean",
    "token-sum",
    "seq-mean-token-mean",
    "seq-mean-token-sum",
    "seq-mean-token-sum-norm",
    "group-mean",
]
PairAggregation = Literal["mean", "sum", "group-mean"]
Empty = Literal["raise", "zero"]
KL = Literal["k1", "abs", "k2", "k3", "k1+", "abs+", "k3+", "k3-corrected"]
#: Estimates of a KL that serve as a penalty in rewards, where nothing is differentiated.
RewardKL = Literal["k1", "abs", "k2", "k3"]
Center = Literal["none", "mean", "leave-one-out", "length-weighted", "second-max", "tensor"]
Scale = Literal["none", "std", "batch-std", "max", "tensor"]
Singleton = Literal["zero", "raw", "nan"]
Normalize = Literal["sum-then-normalize", "normalize-then-sum"]
TreeOp = Literal["mean", "sum", "max", "min", "logsumexp", "any"]
Over = Literal["sequences", "children"]
TreeMode = Literal["td", "sibling", "root", "td+root", "all-ancestors", "depth-weighted"]
TokenOp = Literal["sum", "mean", "first"]
Place = Literal["broadcast", "start", "end"]
SegmentBy = Literal["runs", "labels"]
SegmentOp = Literal["sum", "mean", "min", "max", "first", "last", "count", "logsumexp", "mean-exp", "softmin"]
SegmentDiff = Literal["backward", "forward", "lookahead"]
SegmentPlace = Literal["end", "start", "broadcast", "spread"]
AtMasked = Literal["carry", "decay", "reset", "zero"]
MaskedRewards = Literal["to-last-valid", "drop"]
ReturnsKind = Literal["returns", "gae", "lambda", "vtrace"]
ReturnsOp = Literal["sum", "min", "max", "logsumexp"]
#: (initial value, lower bound, upper bound) of a recurrence from the roots; f64 [] where only a kernel may read it.
Rules = tuple[float | Tensor, float | Tensor, float | Tensor]

AGGREGATIONS: tuple[Aggregation, ...] = get_args(Aggregation)
EMPTY: tuple[Empty, ...] = get_args(Empty)
PAIR_AGGREGATIONS: tuple[PairAggregation, ...] = get_args(PairAggregation)
KLS: tuple[KL, ...] = get_args(KL)
REWARD_KLS: tuple[RewardKL, ...] = get_args(RewardKL)
CENTERS: tuple[Center, ...] = ("none", "mean", "leave-one-out", "length-weighted", "second-max", "tensor")
SCALES: tuple[Scale, ...] = ("none", "std", "batch-std", "max", "tensor")
SINGLETONS: tuple[Singleton, ...] = ("zero", "raw", "nan")
NORMALIZES: tuple[Normalize, ...] = ("sum-then-normalize", "normalize-then-sum")
TREE_OPS: tuple[TreeOp, ...] = get_args(TreeOp)
OVERS: tuple[Over, ...] = get_args(Over)
TREE_MODES: tuple[TreeMode, ...] = get_args(TreeMode)
TOKEN_OPS: tuple[TokenOp, ...] = get_args(TokenOp)
PLACES: tuple[Place, ...] = get_args(Place)
SEGMENT_BYS: tuple[SegmentBy, ...] = get_args(SegmentBy)
SEGMENT_OPS: tuple[SegmentOp, ...] = get_args(SegmentOp)
SEGMENT_DIFFS: tuple[SegmentDiff, ...] = get_args(SegmentDiff)
SEGMENT_PLACES: tuple[SegmentPlace, ...] = get_args(SegmentPlace)
AT_MASKED: tuple[AtMasked, ...] = get_args(AtMasked)
MASKED_REWARDS: tuple[MaskedRewards, ...] = get_args(MaskedRewards)
RETURNS_KINDS: tuple[ReturnsKind, ...] = get_args(ReturnsKind)
RETURNS_OPS: tuple[ReturnsOp, ...] = get_args(ReturnsOp)
#: The types of segments' ids and labels, of weights and of marks, as C++ and CUDA C++ number them.
INTEGER_KINDS: Final = {torch.int32: 1, torch.int64: 2}
WEIGHT_KINDS: Final = {torch.bool: 1, torch.float32: 2}
MARK_KINDS: Final = {torch.bool: 1, torch.int32: 2}


@dataclass(frozen=True, slots=True)
class GroupOptions:
    """How rewards of one group become advantages."""

    center: Center = "mean"
    scale: Scale = "std"
    ddof: int = 1
    eps: float | Tensor = 1e-6  # f64 [] where only a kernel may read it
    eps_inside: bool = False
    singleton: Singleton = "zero"
    normalize: Normalize = "sum-then-normalize"

    def numbers(self, center_values: object, scale_values: object) -> tuple[int, int, int]:
        """Center, scale and singleton as the kernels number them: their positions in CENTERS, SCALES, SINGLETONS.

        Where no statistic of the group is used, a group of one is like any other: len(SINGLETONS), no rule for it.
        """
        center = self.center if center_values is None else "tensor"
        scale = self.scale if scale_values is None else "tensor"
        of_group = center not in ("none", "tensor") or scale in ("std", "max")
        singleton = SINGLETONS.index(self.singleton) if of_group else len(SINGLETONS)
        return CENTERS.index(center), SCALES.index(scale), singleton


@dataclass(frozen=True, slots=True)
class AggregateOptions:
    """How the values of sequences become those of the nodes above them."""

    op: TreeOp = "mean"
    over: Over = "sequences"
    normalized: bool = False  # logsumexp: of the mean, not of the sum
    scale: float | Tensor = 1.0  # logsumexp: log(sum(exp(scale * v))) / scale; f64 [] where only a kernel may read it
    discount: float | Tensor = 1.0  # factor per token between a sequence's end and the node's


@dataclass(frozen=True, slots=True)
class AdvantageOptions:
    """Options of a node's advantage: its value, and the baseline."""

    mode: TreeMode = "td"
    scale: Literal["std", "none"] = "std"
    ddof: int = 1
    eps: float | Tensor = 1e-6
    singleton: Literal["zero", "raw"] = "zero"


@dataclass(frozen=True, slots=True)
class SegmentOptions:
    """How the values of a segment's tokens become one."""

    op: SegmentOp = "sum"
    temperature: float | Tensor = 1.0  # softmin; f64 [] where only a kernel may read it
    empty: float | Tensor = 0.0  # of a segment without a token, but for sum and count


@dataclass(frozen=True, slots=True)
class ReturnsOptions:
    """Which recurrence runs over the tokens of a row, and how masked tokens take part."""

    kind: ReturnsKind = "returns"
    at_masked: AtMasked = "carry"
    op: ReturnsOp = "sum"  # logsumexp: soft, with the scale among the numbers; negative: a soft minimum
    reverse: bool = True
    move: bool = False  # rewards on masked tokens count at the valid token before them

    @property
    def timed(self) -> bool:
        """Whether masked tokens take time: they are tokens with reward 0 and value 0."""
        return self.at_masked in ("decay", "zero")

    def scans(self, inputs: ReturnsInputs, numbers: Sequence[float] | Tensor) -> bool:
        """Whether it has an associative form: a sum, or a minimum or maximum that the host knows to be undiscounted."""
        if self.op in ("sum", "logsumexp"):
            return self.op == "sum"
        return inputs.gamma is None and not isinstance(numbers, Tensor) and numbers[0] == 1.0

    def text(self) -> str:
        """All of it as one argument of an op."""
        return f"{self.kind}|{self.at_masked}|{self.op}|{int(self.reverse)}|{int(self.move)}"

    @staticmethod
    def of(text: str) -> ReturnsOptions:
        """The options whose `text` it is."""
        kind, at_masked, op, reverse, move = text.split("|")
        return ReturnsOptions(
            next(x for x in RETURNS_KINDS if x == kind),
            next(x for x in AT_MASKED if x == at_masked),
            next(x for x in RETURNS_OPS if x == op),
            reverse == "1",
            move == "1",
        )


class ReturnsInputs(NamedTuple):
    """Tensors that a recurrence reads, f32 in the tokens' shape where nothing else is said; None where absent."""

    rewards: Tensor
    values: Tensor | None = None
    log_ratios: Tensor | None = None
    next_values: Tensor | None = None
    gamma: Tensor | None = None  # also [B]; instead of the number
    lam: Tensor | None = None  # also [B]
    terminated: Tensor | None = None  # bool
    done: Tensor | None = None  # bool
    beyond: Tensor | None = None  # [B]: the recurrence's value, or the state's, after the last valid token

    def check_finite(self, mask: Tensor | None) -> None:
        """That what counts is finite; a log-ratio may be infinite, as it is bounded."""
        for name, x in (("rewards", self.rewards), ("values", self.values), ("next_values", self.next_values)):
            if x is not None:
                check.counted_finite(name, x, mask)
        if self.log_ratios is not None and check.nan_refused():
            good = ~self.log_ratios.isnan() if mask is None else ~self.log_ratios.isnan() | (mask == 0)
            check.every("log_ratios", good, self.log_ratios, "numbers where mask is set")

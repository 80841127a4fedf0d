"""Options that the public functions hand to every backend."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from torch import Tensor

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

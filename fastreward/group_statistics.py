"""Statistics of groups of rollouts: baselines, spreads, ranks and win rates, several in one call."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final, Literal, get_args

import torch
from torch import Tensor

from fastreward._arguments import check
from fastreward._arguments.arrays import accepts_arrays
from fastreward._arguments.groups import GroupIds, Groups, Membership, membership
from fastreward._runtime.custom_op import custom_op
from fastreward._runtime.dispatch import implementation, select
from fastreward._runtime.layout import GROUP_STATISTICS
from fastreward.distributed.ranks import Ranks, refused_together
from fastreward.distributed.rollouts import Rollouts, labels_of_all_ranks

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

Ties = Literal["average", "min", "max", "ordinal"]
Per = Literal["entry", "group"]


@custom_op("group_statistics")
def _group_statistics(
    x: Tensor,  # [N] f32 or f64
    group_index: Tensor | None,  # [N] i64
    group_size: int,
    weights: Tensor | None,  # [N] f32
    exponentials: bool,
    backend: str,
) -> Tensor:  # [8, N] f64
    result: Tensor = implementation("group", backend).statistics(x, group_index, group_size, weights, exponentials)
    return result


@_group_statistics.register_fake
def _(x: Tensor, *_: Any) -> Tensor:
    return x.new_empty((len(GROUP_STATISTICS), x.shape[0]), dtype=torch.float64)


# ------------------------------------------------------------------------------------------------- one call's groups
@dataclass(frozen=True)
class _Order:
    """The entries of each group in ascending order, by two stable sorts: the bits depend on a group's entries only."""

    values: Tensor  # [N]: group after group, what is not there at a group's end
    start: Tensor  # [N] i64, for each entry of the batch: where its group begins,
    place: Tensor  # where it stands itself, equal ones in the order of the batch,
    below: Tensor  # how many of its group are below it,
    equal: Tensor  # and how many are equal to it, itself among them

    @classmethod
    def of(cls, x: Tensor, groups: Membership) -> _Order:
        places = torch.arange(x.shape[0], device=x.device)
        index = places.div(groups.group_size, rounding_mode="floor") if groups.index is None else groups.index
        by_value = x.argsort(stable=True)
        order = by_value[index[by_value].argsort(stable=True)]
        index, values = index[order], x[order]
        other_group = torch.ones_like(places, dtype=torch.bool)
        other_group[1:] = index[1:] != index[:-1]
        other = other_group.clone()
        other[1:] |= values[1:] != values[:-1]
        run = other.cumsum(0) - 1
        start = torch.where(other_group, places, 0).cummax(0).values
        first = torch.where(other, places, 0).cummax(0).values
        equal = torch.zeros_like(places).index_add(0, run, torch.ones_like(places))[run]
        back = torch.empty_like(places).scatter_(0, order, places)
        return cls(values, *(found[back] for found in (start, places, first - start, equal)))


@dataclass(frozen=True)
class _Call:
    """What the statistics of one call are made of, as far as they are asked for; statistics by GROUP_STATISTICS."""

    value: Tensor  # [N] f64, NaN = not there
    group: dict[str, Tensor]  # [N] each
    batch: dict[str, Tensor]  # of everyone
    successes: Tensor  # [N]: entries of the group that are above 0
    order: _Order | None
    ddof: int
    q: float
    k: int
    ties: Ties

    @property
    def ordered(self) -> _Order:
        assert self.order is not None
        return self.order


def _call(
    names: Sequence[str], x: Tensor, groups: Membership, weights: Tensor | None, backend: str, **options: Any
) -> _Call:
    exponentials = any("logsumexp" in name for name in names)

    def statistics(of: Tensor, index: Tensor | None, size: int) -> dict[str, Tensor]:
        found = _group_statistics(of, index, size, weights, exponentials, backend)
        return dict(zip(GROUP_STATISTICS, found.unbind(), strict=True))

    value, here = x.double(), (groups.index, groups.group_size)
    group = statistics(x, *here)
    batch = statistics(x, None, max(1, x.shape[0])) if "batch-mean" in names or "batch-std" in names else group
    successes = group["count"]
    if "pass-at-k" in names:
        won = statistics(torch.where(x.isnan(), torch.nan, (x > 0).to(x.dtype)), *here)
        successes = (won["mean"] * won["count"]).round()
    ordered = any(name in names for name in ("rank", "win-rate", "quantile"))
    return _Call(value, group, batch, successes, _Order.of(value, groups) if ordered else None, **options)


def _where(there: Tensor, x: Tensor) -> Tensor:
    return torch.where(there, x, torch.nan)


def _std(found: dict[str, Tensor], ddof: int) -> Tensor:
    freedom = found["count"] - ddof
    return _where(freedom > 0, (found["squares"] / freedom).sqrt())


def _leave_one_out_std(c: _Call) -> Tensor:
    """From the sum of squares about the mean, less this entry's part; what rounding leaves of equal others is 0."""
    n = c.group["count"]
    whole = c.group["squares"]
    others = whole - (c.value - c.group["mean"]).square() * n / (n - 1)
    others = torch.where(others > 1e-13 * whole, others, 0.0)
    return _where((n - 1 > c.ddof) & ~c.value.isnan(), (others / (n - 1 - c.ddof)).sqrt())


def _others_max(c: _Call) -> Tensor:
    largest, second = c.group["max"], c.group["second"]
    return _where((c.group["count"] > 1) & ~c.value.isnan(), torch.where(c.value == largest, second, largest))


def _leave_one_out_logsumexp(c: _Call) -> Tensor:
    """The sum of the others as it is where the entry is the largest; else there is nothing to cancel."""
    largest, rest = c.group["max"], c.group["rest"]
    others = largest + (1.0 + (rest - largest).exp() - (c.value - largest).exp()).log()
    return _where((c.group["count"] > 1) & ~c.value.isnan(), torch.where(c.value == largest, rest, others))


def _rank(c: _Call) -> Tensor:
    equal = c.ordered.equal - 1
    ahead = {"min": 0 * equal, "average": equal / 2, "max": equal, "ordinal": c.ordered.place - c.ordered.start}
    below = 0 * c.ordered.below if c.ties == "ordinal" else c.ordered.below
    return _where(~c.value.isnan(), (below + ahead[c.ties]).double())


def _win_rate(c: _Call) -> Tensor:
    others = c.group["count"] - 1
    return _where((others > 0) & ~c.value.isnan(), (c.ordered.below + (c.ordered.equal - 1) / 2) / others)


def _quantile(c: _Call) -> Tensor:
    last = c.group["count"] - 1
    place = last.clamp(min=0) * c.q
    low = place.floor()
    at = c.ordered.start + low.long()
    below = c.ordered.values[at]
    above = c.ordered.values[c.ordered.start + torch.minimum(low + 1, last.clamp(min=0)).long()]
    return _where(last >= 0, below + (place - low) * (above - below))


def _pass_at_k(c: _Call) -> Tensor:
    """1 - C(n - c, k) / C(n, k), the binomials as logarithms."""
    n, wrong = c.group["count"], c.group["count"] - c.successes
    log_none = _log_choose(wrong, c.k) - _log_choose(n, c.k)
    return _where(n >= c.k, torch.where(wrong < c.k, 1.0, torch.where(c.successes == 0, 0.0, -log_none.expm1())))


def _log_choose(n: Tensor, k: int) -> Tensor:
    n = n.clamp(min=k)
    return torch.lgamma(n + 1) - torch.lgamma(n - k + 1) - math.lgamma(k + 1)


#: Statistics that all entries of a group share.
_OF_GROUP: Final[dict[str, Callable[[_Call], Tensor]]] = {
    "count": lambda c: c.group["count"],
    "mean": lambda c: c.group["mean"],
    "weighted-mean": lambda c: c.group["weighted_mean"],
    "std": lambda c: _std(c.group, c.ddof),
    "max": lambda c: _where(c.group["count"] > 0, c.group["max"]),
    "second-max": lambda c: _where(c.group["count"] > 1, c.group["second"]),
    "min": lambda c: _where(c.group["count"] > 0, c.group["min"]),
    "logsumexp": lambda c: _where(c.group["count"] > 0, torch.logaddexp(c.group["max"], c.group["rest"])),
    "quantile": _quantile,
    "pass-at-k": _pass_at_k,
    "batch-mean": lambda c: c.batch["mean"],
    "batch-std": lambda c: _std(c.batch, c.ddof),
}
#: Statistics of each entry among those of its group.
_OF_ENTRY: Final[dict[str, Callable[[_Call], Tensor]]] = {
    "leave-one-out": lambda c: c.group["mean"] + (c.group["mean"] - c.value) / (c.group["count"] - 1),
    "leave-one-out-std": _leave_one_out_std,
    "others-max": _others_max,
    "leave-one-out-logsumexp": _leave_one_out_logsumexp,
    "rank": _rank,
    "win-rate": _win_rate,
}
STATISTICS: Final = (*_OF_GROUP, *_OF_ENTRY)


# ---------------------------------------------------------------------------------------------------------- the call
@accepts_arrays
@refused_together
def group_statistics(
    x: Tensor,
    group_ids: GroupIds | None = None,
    statistics: Sequence[str] = ("mean", "std"),
    *,
    group_size: int | None = None,
    mask: Tensor | None = None,
    weights: Tensor | None = None,
    ddof: int = 1,
    q: float = 0.5,
    k: int = 1,
    ties: Ties = "average",
    per: Per = "entry",
    process_group: ProcessGroup | None = None,
) -> dict[str, Tensor]:
    """Statistics of each entry's group, by name; several cost little more than one.

    Args:
        x: [B], or in the shape of Groups; finite, NaN = not there: counts in no statistic. float32 or float64; bool,
            integers and half precision are converted, exactly.
        group_ids, group_size: as of `group_advantages`.
        statistics: names. Of the group: "count", "mean", "weighted-mean" (needs weights; OPO's, with the lengths),
            "std", "max", "second-max" (equal ones counted apart), "min", "logsumexp", "quantile" (linear between the
            two nearest), "pass-at-k" (x > 0 is a success; 1 - C(n - c, k) / C(n, k), arXiv 2107.03374), "batch-mean"
            and "batch-std" of all entries. Of the entry among the others of its group: "leave-one-out" (their mean),
            "leave-one-out-std", "others-max", "leave-one-out-logsumexp" (JEPO, arXiv 2503.19618), "rank" (how many are
            below it, from 0), "win-rate" (comparisons won, ties counted half, of count - 1).
        mask: in the shape of x, nonzero = there; others are as if NaN.
        weights: in the shape of x, at least 0, for "weighted-mean".
        ddof: of "std", "batch-std" and "leave-one-out-std", which divide by count - ddof.
        q: of "quantile", in [0, 1].
        k: of "pass-at-k".
        ties: "rank" among equal ones: their "average", the "min", the "max", or "ordinal", as they come in the batch.
        per: "entry" gives values in the shape of x, to all entries of a group; "group" one value for each group, in
            the order of `Groups` (first-seen), for statistics of the group. Counting groups waits for a GPU.
        process_group: groups may straddle ranks, and the batch is that of all of them; as of `group_advantages`. Each
            rank gets what belongs to its own entries, or groups.

    Returns:
        {name: float32}. NaN where there is nothing to make the statistic of: no entry, of one entry what concerns
        others, no more than ddof, fewer than k; and for an entry that is not there what is its own. Variances are
        two-pass in float64. x is a constant.

    Raises:
        TypeError, ValueError: wrong dtype, shape or name, both or none of group_ids and group_size; on the CPU also
            for values that are not finite, weights below 0.
    """
    x = check.constant("x", check.rewards("x", x))
    check.names("statistics", statistics, STATISTICS)
    check.choice("ties", ties, get_args(Ties))
    check.choice("per", per, get_args(Per))
    if (wrong := [name for name in statistics if name in _OF_ENTRY]) and per == "group":
        raise ValueError(f"statistics: {wrong[0]!r} is a statistic of an entry; expected per='entry'")
    if ("weighted-mean" in statistics) != (weights is not None):
        raise ValueError("weights: needed for 'weighted-mean', and only for it")
    groups = membership(group_ids, group_size, x, "x")
    check.shape("x", x, groups.shape, "one per entry of the groups")
    there = _there(x, mask, groups)
    value = torch.where(there, x, torch.nan).flatten()
    weight = None if weights is None else _weights(weights, x, there)
    everyone, everywhere = None, groups
    if process_group is not None:
        labels = labels_of_all_ranks(groups.index, group_ids)
        columns = {"group_ids": labels, "weights": weight}
        same = {"statistics": statistics, "group_size": groups.group_size, "ddof": ddof, "q": q, "k": k, "ties": ties}
        everyone = Rollouts("x", Ranks.of(process_group), value, columns, same)
        value, (index, weight) = everyone.values, everyone.columns
        everywhere = replace(groups, index=index)
    call = _call(
        statistics,
        value,
        everywhere,
        weight,
        select("group", x),
        ddof=check.whole("ddof", ddof, "the divisor of a variance is count - ddof"),
        q=_fraction("q", q),
        k=_count("k", k),
        ties=ties,
    )
    found = {name: (_OF_GROUP | _OF_ENTRY)[name](call).float() for name in statistics}
    if everyone is not None:
        found = {name: everyone.own(values) for name, values in found.items()}
    if per == "group":
        first = _first(group_ids, group_size, x)
        return {name: values[first] for name, values in found.items()}
    return {name: values.view(groups.shape) for name, values in found.items()}


def _there(x: Tensor, mask: Tensor | None, groups: Membership) -> Tensor:
    """bool like x: what counts, and is finite."""
    there = ~x.isnan()
    if groups.partial and groups.index is not None:
        there = there & (groups.index >= 0).view(groups.shape)
    if mask is not None:
        check.shape("mask", check.tensor("mask", mask), x.shape, "as x")
        check.same_device("mask", mask, "x", x)
        there = there & (check.constant("mask", mask) != 0)
    if check.values_checked(x):
        check.every("x", x.isfinite() | ~there, x, "finite numbers, or NaN for what is not there")
    return there


def _weights(weights: Tensor, x: Tensor, there: Tensor) -> Tensor:
    weights = check.constant("weights", check.reals("weights", weights))
    check.shape("weights", weights, x.shape, "as x")
    check.same_device("weights", weights, "x", x)
    if check.values_checked(weights):
        good = weights.isfinite() & (weights >= 0)
        check.every("weights", good | ~there, weights, "finite numbers >= 0")
    return weights.flatten().contiguous()


def _fraction(name: str, value: Any) -> float:
    result = check.finite(name, value)
    if not 0 <= result <= 1:
        raise ValueError(f"{name}: expected a number in [0, 1], got {value!r}")
    return result


def _count(name: str, value: object) -> int:
    result = check.whole(name, value, "samples that are drawn")
    if result < 1:
        raise ValueError(f"{name}: expected an integer of at least 1, got {value!r}")
    return result


def _first(group_ids: GroupIds | None, group_size: int | None, x: Tensor) -> Tensor:
    """i64 [groups]: an entry of each group."""
    if group_ids is None:
        return torch.arange(0, x.shape[0], group_size or 1, device=x.device)
    groups = group_ids if isinstance(group_ids, Groups) else Groups(group_ids)
    return groups.first.to(x.device)

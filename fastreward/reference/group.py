"""Group-normalised advantages and statistics of groups in float64 torch, one group at a time: the truth."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from typing import Protocol

import torch
from torch import Tensor


def group_advantages(
    rewards: Tensor,
    group_ids: Tensor | Sequence[Hashable] | None = None,
    *,
    group_size: int | None = None,
    center: str | Tensor = "mean",
    scale: str | Tensor = "std",
    ddof: int = 1,
    eps: float = 1e-6,
    eps_inside: bool = False,
    singleton: str = "zero",
    lengths: Tensor | None = None,
    component_weights: Tensor | Sequence[float] | None = None,
    normalize: str = "sum-then-normalize",
) -> Tensor:
    """Advantages [B] in float64 from rewards [B] or [B, K] (NaN = not scored); arguments as fastreward's.

    0 / 0 is 0: where nothing is left after centring, no divisor makes something of it.
    """
    r = rewards.double() if rewards.ndim == 2 else rewards.double().unsqueeze(-1)
    weights = (
        torch.ones(r.shape[1]).double() if component_weights is None else torch.as_tensor(component_weights).double()
    )
    keys = _keys(group_ids, group_size, len(r))

    def normalised(x: Tensor) -> Tensor:
        return _normalise(x, keys, center, scale, ddof, eps, eps_inside, singleton, lengths)

    unscored = torch.isnan(r).all(-1)
    if normalize == "sum-then-normalize":
        out = normalised(torch.where(unscored, torch.nan, (r * weights).nansum(-1)))
    else:
        columns = torch.stack([normalised(column) for column in r.unbind(-1)], -1)
        out = (torch.where(torch.isnan(r), 0.0, columns) * weights).sum(-1)
    return torch.where(unscored, 0.0, out)


def _keys(group_ids: Tensor | Sequence[Hashable] | None, group_size: int | None, count: int) -> list[Hashable]:
    if group_size is not None:
        return [b // group_size for b in range(count)]
    assert group_ids is not None
    return list(group_ids.tolist() if isinstance(group_ids, Tensor) else group_ids)


def _normalise(
    x: Tensor,
    keys: list[Hashable],
    center: str | Tensor,
    scale: str | Tensor,
    ddof: int,
    eps: float,
    eps_inside: bool,
    singleton: str,
    lengths: Tensor | None,
) -> Tensor:
    out = torch.zeros_like(x)
    scored = ~torch.isnan(x)
    of_group = not (isinstance(center, Tensor) or center == "none") or (
        not isinstance(scale, Tensor) and scale in ("std", "max")
    )
    for key in dict.fromkeys(keys):
        rows = torch.tensor([b for b, k in enumerate(keys) if k == key and scored[b]], dtype=torch.long)
        n = len(rows)
        if n == 0:
            continue
        if n == 1 and of_group:  # of one there is no statistic
            out[rows] = {"zero": torch.zeros(1).double(), "raw": x[rows], "nan": torch.full((1,), torch.nan).double()}[
                singleton
            ]
            continue
        values = x[rows]
        centred = values - _center(values, rows, center, lengths)
        divisor = _scale(values, centred, x[scored], rows, scale, ddof, eps, eps_inside)
        out[rows] = torch.where((centred == 0) & (divisor == 0), 0.0, centred / divisor)
    return out


def _center(values: Tensor, rows: Tensor, center: str | Tensor, lengths: Tensor | None) -> Tensor:
    n = len(values)
    if isinstance(center, Tensor):
        return center.double()[rows]
    if center == "none":
        return torch.zeros_like(values)
    if center == "mean":
        return _mean(values).expand(n)
    shifted = values - values[0]
    if center == "leave-one-out":
        return values[0] + (shifted.sum() - shifted) / (n - 1)
    if center == "length-weighted":
        assert lengths is not None
        weight = lengths.double()[rows]
        if weight.sum() == 0:  # no tokens, no baseline: nobody is better than it
            return values
        return (values[0] + (weight * shifted).sum() / weight.sum()).expand(n)
    return torch.stack([torch.cat([values[:i], values[i + 1 :]]).max() for i in range(n)])  # second-max


def _mean(values: Tensor) -> Tensor:
    """The mean; of equal values exactly their value, whatever its rounding."""
    return values[0] + (values - values[0]).mean()


def _scale(
    values: Tensor,
    centred: Tensor,
    everyone: Tensor,
    rows: Tensor,
    scale: str | Tensor,
    ddof: int,
    eps: float,
    eps_inside: bool,
) -> Tensor:
    if isinstance(scale, Tensor):
        return scale.double()[rows]
    if scale == "none":
        return torch.ones(()).double()
    if scale == "max":
        return centred.abs().max() + eps
    population = values if scale == "std" else everyone
    freedom = len(population) - ddof
    variance = ((population - _mean(population)) ** 2).sum() / freedom if freedom > 0 else torch.tensor(torch.inf)
    return (variance + eps).sqrt() if eps_inside else variance.sqrt() + eps


def group_statistics(
    x: Tensor,
    group_ids: Tensor | Sequence[Hashable] | None = None,
    *,
    statistic: str,
    group_size: int | None = None,
    weights: Tensor | None = None,
    ddof: int = 1,
    q: float = 0.5,
    k: int = 1,
    ties: str = "average",
) -> Tensor:
    """One of fastreward's group statistics, [B] in float64, from x [B] (NaN = not there)."""
    values = x.double()
    keys = _keys(group_ids, group_size, len(values))
    out = torch.full_like(values, torch.nan)
    if statistic == "count":
        out = torch.zeros_like(values)
    if statistic.startswith("batch-"):
        keys, statistic = [0] * len(values), statistic.removeprefix("batch-")
    for b in range(len(values)):
        members = [i for i, key in enumerate(keys) if key == keys[b] and not torch.isnan(values[i])]
        given = values[torch.tensor(members, dtype=torch.long)]
        weight = None if weights is None else weights.double()[torch.tensor(members, dtype=torch.long)]
        if statistic in ("rank", "win-rate", "others-max") or statistic.startswith("leave-one-out"):
            if b in members:
                at = members.index(b)
                out[b] = _of_entry(statistic, given[at], torch.cat([given[:at], given[at + 1 :]]), at, ties, ddof)
        elif members:
            out[b] = _of_group(statistic, given, weight, ddof, q, k)
    return out


def _of_group(statistic: str, given: Tensor, weights: Tensor | None, ddof: int, q: float, k: int) -> Tensor:
    n, ordered = len(given), given.sort().values
    nothing = torch.tensor(torch.nan).double()
    if statistic == "count":
        return torch.tensor(n).double()
    if statistic == "mean":
        return _mean(given)
    if statistic == "weighted-mean":
        assert weights is not None
        return (weights * given).sum() / weights.sum()
    if statistic == "std":
        return ((given - _mean(given)) ** 2).sum().div(n - ddof).sqrt() if n > ddof else nothing
    if statistic == "second-max":
        return ordered[-2] if n > 1 else nothing
    if statistic == "logsumexp":
        return given.logsumexp(0)
    if statistic == "quantile":
        return given.quantile(q)
    if statistic == "pass-at-k":
        right = int((given > 0).sum())
        return torch.tensor(1 - math.comb(n - right, k) / math.comb(n, k)).double() if n >= k else nothing
    return ordered[{"min": 0, "max": -1}[statistic]]


def _of_entry(statistic: str, own: Tensor, others: Tensor, at: int, ties: str, ddof: int) -> Tensor:
    """Of an entry among the others of its group, `at` of which stand before it in the batch."""
    below, equal = (others < own).sum().double(), (others == own).sum().double()
    if statistic == "rank":
        before = (others[:at] == own).sum().double()
        return below + {"min": 0.0 * equal, "average": equal / 2, "max": equal, "ordinal": before}[ties]
    if len(others) == 0:
        return torch.tensor(torch.nan).double()
    if statistic == "leave-one-out":
        return _mean(others)
    if statistic == "leave-one-out-std":
        return _of_group("std", others, None, ddof, 0.5, 1)
    if statistic == "leave-one-out-logsumexp":
        return others.logsumexp(0)
    return others.max() if statistic == "others-max" else (below + equal / 2) / len(others)


class _Options(Protocol):
    """The fields of fastreward's GroupOptions read here (the reference imports nothing but torch)."""

    @property
    def center(self) -> str: ...
    @property
    def scale(self) -> str: ...
    @property
    def ddof(self) -> int: ...
    @property
    def eps(self) -> float | Tensor: ...
    @property
    def eps_inside(self) -> bool: ...
    @property
    def singleton(self) -> str: ...
    @property
    def normalize(self) -> str: ...


def forward(
    rewards: Tensor,
    group_index: Tensor | None,
    group_size: int,
    lengths: Tensor | None,
    component_weights: Tensor | None,
    center_values: Tensor | None,
    scale_values: Tensor | None,
    options: _Options,
) -> Tensor:
    """Raw form: advantages f32 [B] from rewards [B, K]; one of group_index i64 [B] or group_size > 0."""
    out = group_advantages(
        rewards.cpu(),
        None if group_index is None else group_index.cpu(),
        group_size=group_size or None,
        center=options.center if center_values is None else center_values.cpu(),
        scale=options.scale if scale_values is None else scale_values.cpu(),
        ddof=options.ddof,
        eps=float(options.eps),
        eps_inside=options.eps_inside,
        singleton=options.singleton,
        lengths=None if lengths is None else lengths.cpu(),
        component_weights=None if component_weights is None else component_weights.cpu(),
        normalize=options.normalize,
    )
    return out.float().to(rewards.device)


def statistics(
    x: Tensor, group_index: Tensor | None, group_size: int, weights: Tensor | None, exponentials: bool
) -> Tensor:
    """Raw form: f64 [8, N], count to rest as fastreward's layout.GROUP_STATISTICS names them."""
    values = x.cpu().double()
    keys = _keys(None if group_index is None else group_index.cpu(), group_size or None, len(values))
    found = torch.empty((8, len(values))).double()
    for key in dict.fromkeys(keys):
        rows = torch.tensor([b for b, k in enumerate(keys) if k == key])
        given = values[rows][~torch.isnan(values[rows])]
        weight = None if weights is None else weights.cpu().double()[rows][~torch.isnan(values[rows])]
        found[:, rows] = _raw_statistics(given, weight).unsqueeze(-1)
    return found.to(x.device)


def _raw_statistics(given: Tensor, weights: Tensor | None) -> Tensor:
    n, ordered = len(given), given.sort().values
    if n == 0:
        return torch.tensor([0, torch.nan, 0, torch.nan, -torch.inf, -torch.inf, torch.inf, -torch.inf]).double()
    mean = _mean(given)
    weighted = torch.tensor(torch.nan) if weights is None else (weights * given).sum() / weights.sum()
    second = ordered[-2] if n > 1 else torch.tensor(-torch.inf)
    squares = ((given - mean) ** 2).sum()
    rest = ordered[:-1].logsumexp(0)
    return torch.stack([torch.tensor(n), mean, squares, weighted, ordered[-1], second, ordered[0], rest]).double()

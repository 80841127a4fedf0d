"""What two sides say of the same tokens, token by token: one read of each, a chunk of tokens at a time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from fastreward.compare.load import Side
from fastreward.compare.pair import Pairs
from fastreward.divergence import token_divergence
from fastreward.logprobs import token_logprobs

PerToken = dict[str, Tensor]
Step = Callable[[int, int], None]

#: A logit, or a log-prob, that is no larger forbids its token: -inf, or what stands for it.
FORBIDDEN: Final = -1e4
#: Log-probs may be this much above 0 by rounding.
_ABOVE_ZERO: Final = 1e-2
#: Numbers of each side in a chunk: 16 MiB of float32.
_CHUNK: Final = 1 << 22
#: From here on steps of float16 are longer than those in which differences of float32 logits come.
_ON_NO_GRID: Final = 2.0**-4
#: What the probabilities of a top-k may sum up wrongly by: a rest of no more is none.
_REST: Final = 1e-6


@dataclass(frozen=True)
class Options:
    """How logits are read."""

    temperatures: tuple[float, float] = (1.0, 1.0)
    top: int = 20


@dataclass(frozen=True)
class _Rows:
    """One side of a chunk of n tokens."""

    side: Side
    tokens: Tensor | None  # i64 [n]
    logprobs: Tensor | None  # [n]
    top_logprobs: Tensor | None  # f64 [n, k], falling, NaN where there is none
    top_ids: Tensor | None  # i64 [n, k]; of logits the largest too
    logits: Tensor | None  # [n, V]
    temperature: float
    logsumexp: Tensor | None = None  # f64 [n], of the tempered logits

    def at(self, ids: Tensor) -> Tensor:
        """Log-probs of ids [n, k] (negative: none), f64, NaN where they are not known."""
        if self.logits is not None:
            assert self.logsumexp is not None
            inside = (ids >= 0) & (ids < self.logits.shape[1])
            raw = self.logits.gather(1, torch.where(inside, ids, 0)).double()
            return torch.where(inside, raw / self.temperature - self.logsumexp.unsqueeze(-1), torch.nan)
        assert self.top_ids is not None
        assert self.top_logprobs is not None
        same = (self.top_ids.unsqueeze(1) == ids.unsqueeze(2)) & (ids >= 0).unsqueeze(2)  # [n, ids, own ids]
        found = torch.where(same, self.top_logprobs.unsqueeze(1), 0.0).nan_to_num(0.0, neginf=-torch.inf).sum(-1)
        return torch.where(same.any(-1), found, torch.nan)

    def chosen(self) -> Tensor:
        """Log-probs of the tokens, f64 [n], NaN where they are not known."""
        if self.logprobs is not None:
            return self.logprobs.double()
        if self.tokens is None:
            return torch.full((len(self.best),), torch.nan, dtype=torch.float64)
        return self.at(self.tokens.unsqueeze(-1)).squeeze(-1)

    def largest(self) -> Tensor:
        """Log-prob of the likeliest id, f64 [n]."""
        return self.at(self.best[:, :1]).squeeze(-1)

    @property
    def best(self) -> Tensor:
        """The largest ids, from the largest on, i64 [n, k]."""
        assert self.top_ids is not None
        return self.top_ids


def measure(a: Side, b: Side, pairs: Pairs, options: Options, step: Step) -> PerToken:
    """Per pair of tokens, [N] each: see the functions below; `step` is told how many of how many are done.

    Raises:
        ValueError: another vocabulary; NaN where a token counts; log-probs above 0; a token id beyond the vocabulary.
    """
    if a.logits is not None and b.logits is not None and a.logits.shape[-1] != b.logits.shape[-1]:
        raise ValueError(
            f"B: logits: expected a vocabulary of {a.logits.shape[-1]}, as A has, got {b.logits.shape[-1]}; "
            "slice off what only pads it"
        )
    if a.kind == "logprobs" or b.kind == "logprobs":
        for side, other in ((a, b), (b, a)):
            if side.logprobs is None and side.tokens is None and other.tokens is None:
                raise ValueError(
                    f"tokens: needed to find the log-probs of {other.name} in the {side.kind} of {side.name}"
                )
    size = max(1, _CHUNK // max(_width(a), _width(b)))
    parts: list[PerToken] = []
    for start in range(0, max(len(pairs), 1), size):
        chunk = pairs.where(torch.arange(start, min(start + size, len(pairs))))
        parts.append(_of_chunk(a, b, chunk, options))
        step(min(start + size, len(pairs)), len(pairs))
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def signal(side: Side, places: Tensor, chosen: bool) -> Tensor:
    """A number of each token that both sides should agree on, f64: the log-prob of its label, or the largest one."""
    size = max(1, _CHUNK // _width(side))
    parts = []
    for start in range(0, len(places), size):
        rows = _rows(side, places[start : start + size], None, 1.0, 1)
        parts.append(rows.chosen() if chosen else rows.largest())
    return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.float64)


def _width(side: Side) -> int:
    x = side.top_logprobs if side.logits is None else side.logits
    return 1 if x is None else x.shape[-1] if side.logits is not None else max(1, 4 * x.shape[-1] ** 2)


def _of_chunk(a: Side, b: Side, pairs: Pairs, options: Options) -> PerToken:
    tokens = [None if side.tokens is None else side.tokens[at] for side, at in ((a, pairs.a), (b, pairs.b))]
    first, second = (
        _checked(_rows(side, at, other if own is None else own, temperature, options.top), at)
        for side, at, own, other, temperature in zip(
            (a, b), (pairs.a, pairs.b), tokens, tokens[::-1], options.temperatures, strict=True
        )
    )
    of_a, of_b = first.chosen(), second.chosen()
    found = {"chosen_a": of_a, "chosen_b": of_b}
    if a.kind == "logprobs" or b.kind == "logprobs":
        found |= {"signal_a": of_a, "signal_b": of_b, "signal_is_chosen": torch.ones(0)}
        return found | {"equal": (of_a == of_b).double()} | _grids(of_a.unsqueeze(-1), of_b.unsqueeze(-1))
    found |= {"signal_a": first.largest(), "signal_b": second.largest()}
    found |= _shared(first, second)
    if first.logits is not None and second.logits is not None:
        return found | _exact(first, second)
    return found


# -------------------------------------------------------------------------------------------------------------- rows
def _rows(side: Side, places: Tensor, tokens: Tensor | None, temperature: float, top: int) -> _Rows:
    """tokens: where they are not the side's own; top: how many ids of the largest logits."""
    if tokens is None and side.tokens is not None:
        tokens = side.tokens[places]
    logprobs = None if side.logprobs is None else side.rows(side.logprobs, places)
    if side.logits is not None:
        logits = side.rows(side.logits, places)
        logits = logits.float() if logits.dtype == torch.float64 else logits
        labels = torch.zeros(len(places), dtype=torch.int64)
        total = token_logprobs(logits, labels, temperature=temperature, outputs=("logsumexp",)).logsumexp
        assert total is not None
        ids = logits.topk(min(top, logits.shape[1]), -1).indices
        return _Rows(side, tokens, logprobs, None, ids, logits, temperature, total.double())
    if side.top_logprobs is None or side.top_ids is None:
        return _Rows(side, tokens, logprobs, None, None, None, temperature)
    values, ids = side.rows(side.top_logprobs, places).double(), side.rows(side.top_ids, places).long()
    order = torch.where(ids < 0, -torch.inf, values).sort(dim=-1, descending=True, stable=True).indices
    values, ids = (x.gather(-1, order) for x in (torch.where(ids < 0, torch.nan, values), ids))
    return _Rows(side, tokens, logprobs, values, ids, None, temperature)


def _checked(rows: _Rows, places: Tensor) -> _Rows:
    _check(rows, places)
    return rows


def _check(rows: _Rows, places: Tensor) -> None:
    if rows.logits is not None:
        assert rows.logsumexp is not None
        _every(rows, places, rows.logsumexp.isfinite(), "logits: expected numbers, one above -inf", rows.logsumexp)
        if rows.tokens is not None and rows.logprobs is None:
            vocab = rows.logits.shape[1]
            inside = (rows.tokens >= 0) & (rows.tokens < vocab)
            _every(rows, places, inside, f"tokens: expected ids in [0, {vocab}), the vocabulary", rows.tokens)
    for what, x in (("logprobs", rows.logprobs), ("top_logprobs", rows.top_logprobs)):
        if x is None:
            continue
        good = x <= _ABOVE_ZERO
        if x.ndim > 1:
            good |= rows.best < 0
            wrong = (~good).to(torch.uint8).argmax(-1, keepdim=True)
            good, x = good.all(-1), x.gather(-1, wrong).squeeze(-1)
        _every(rows, places, good, f"{what}: expected log-probs, at most 0 where a token counts (see mask)", x)


def _every(rows: _Rows, places: Tensor, good: Tensor, expected: str, value: Tensor) -> None:
    if bool(good.all()):
        return
    at = int((~good).nonzero()[0])
    place = int(places[at])
    sequence = int(torch.searchsorted(rows.side.bounds, place, right=True)) - 1
    where = f"sequence {sequence}, token {place - int(rows.side.bounds[sequence])}"
    raise ValueError(f"{rows.side.name}: {expected}; got {value[at].item():g} in {where}")


# -------------------------------------------------------------------------------------------------------- both sides
def _grids(of_a: Tensor, of_b: Tensor) -> PerToken:
    """Of values [n, k] that should be the same: how many bfloat16 and float16 hold exactly, and how many are so near.

    Near: within half a step of the dtype. What is not finite does not count, as every dtype has it, nor what is near 0:
    a difference of float32 logits lies on any grid there.
    """
    values = of_a.double(), of_b.double()
    counted = torch.ones_like(values[0], dtype=torch.bool)
    for x in values:
        counted &= x.isfinite() & (x.abs() >= _ON_NO_GRID)
    found = {"values": counted.sum(-1).double()}
    for dtype, half in ((torch.bfloat16, 2.0**-8), (torch.float16, 2.0**-11)):
        name = str(dtype).removeprefix("torch.")
        for side, x in zip("ab", values, strict=True):
            found[f"{name}_{side}"] = (counted & (x.to(dtype).double() == x)).sum(-1).double()
        close = (values[0] - values[1]).abs() <= 1.001 * half * torch.maximum(values[0].abs(), values[1].abs())
        found[f"{name}_near"] = (counted & close).sum(-1).double()
    return found


def _shared(first: _Rows, second: _Rows) -> PerToken:
    """Of the ids that both sides know: overlap, how one side's log-probs go with the other's, bounds of KL and TV."""
    ids = second.best if first.logits is not None and second.logits is None else first.best
    la, lb = first.at(ids), second.at(ids)
    known = ~(la.isnan() | lb.isnan())
    in_a, in_b = la > FORBIDDEN, lb > FORBIDDEN
    both = known & in_a & in_b
    best = torch.where(known, la, -torch.inf).argmax(-1, keepdim=True)
    found = {
        "top_a": torch.where(known, la, torch.nan).gather(1, best).squeeze(-1),
        "top_b": torch.where(known, lb, torch.nan).gather(1, best).squeeze(-1),
        "overlap": _overlap(first.best, second.best),
        "forbidden_a": (known & ~in_a & in_b).sum(-1).double(),
        "forbidden_b": (known & in_a & ~in_b).sum(-1).double(),
    }
    found |= _relation(la, lb, both)
    if first.logits is not None and second.logits is not None:  # as they were given, not as softmax leaves them
        found |= _grids(first.logits.gather(1, ids), second.logits.gather(1, ids))
    else:
        found |= _grids(la, lb)
    if first.logits is None or second.logits is None:
        found |= _bounds(la, lb, known)
        equal = torch.where(known, (la == lb).double(), 0.0).sum(-1) / known.sum(-1).clamp(min=1)
        found["equal"] = torch.where(known.any(-1), equal, 0.0)
    return found


def _overlap(ours: Tensor, theirs: Tensor) -> Tensor:
    """Share of the shorter list of largest ids that is in as long a part of the other one."""
    k = min(ours.shape[1], theirs.shape[1])
    ours, theirs = ours[:, :k], theirs[:, :k]
    shorter = torch.minimum((ours >= 0).sum(-1), (theirs >= 0).sum(-1))
    same = (ours.unsqueeze(2) == theirs.unsqueeze(1)) & (ours >= 0).unsqueeze(2)
    return same.any(-1).sum(-1).clamp(max=shorter).double() / shorter.clamp(min=1)


def _relation(la: Tensor, lb: Tensor, both: Tensor) -> PerToken:
    """Sums of squares and products about the row's means, the mean of la - lb, and how far it varies in the row."""
    count = both.sum(-1, keepdim=True)
    x, y = (torch.where(both, z, 0.0) for z in (la, lb))
    x, y = (torch.where(both, z - z.sum(-1, keepdim=True) / count.clamp(min=1), 0.0) for z in (x, y))
    difference = torch.where(both, la - lb, 0.0)
    offset = difference.sum(-1, keepdim=True) / count.clamp(min=1)
    spread = torch.where(both, difference - offset, 0.0).square().sum(-1) / (count.squeeze(-1) - 1).clamp(min=1)
    enough = count.squeeze(-1) > 1
    return {
        "aa": (x * x).sum(-1),
        "bb": (y * y).sum(-1),
        "ab": (x * y).sum(-1),
        "offset": torch.where(enough, offset.squeeze(-1), torch.nan),
        "spread": torch.where(enough, spread.sqrt(), torch.nan),
    }


def _bounds(la: Tensor, lb: Tensor, known: Tensor) -> PerToken:
    """KL and TV of the shared ids and one bucket for all others, which are no larger than the true ones; TV at most."""
    log_p, log_q = (torch.where(known, x.clamp(min=FORBIDDEN), -torch.inf) for x in (la, lb))
    p, q = log_p.exp(), log_q.exp()
    rest_p, rest_q = ((1.0 - x.sum(-1)).clamp(min=_REST) for x in (p, q))
    apart = (p - q).abs().sum(-1)

    def kl(x: Tensor, log_x: Tensor, log_y: Tensor, rest: Tensor, other: Tensor) -> Tensor:
        terms = torch.where(known & (x > 0), x * (log_x - log_y), 0.0)
        return (terms.sum(-1) + rest * (rest / other).log()).clamp(min=0.0)

    return {
        "kl_ab_at_least": kl(p, log_p, log_q, rest_p, rest_q),
        "kl_ba_at_least": kl(q, log_q, log_p, rest_q, rest_p),
        "tv_at_least": 0.5 * (apart + (rest_p - rest_q).abs()),
        "tv_at_most": (0.5 * (apart + rest_p + rest_q)).clamp(max=1.0),
    }


def _exact(first: _Rows, second: _Rows) -> PerToken:
    """Over the whole vocabulary."""
    x, y = first.logits, second.logits
    assert x is not None
    assert y is not None
    ours, theirs = first.temperature, second.temperature
    forward = token_divergence(x, y, divergence="forward-kl", temperature=ours, teacher_temperature=theirs)
    apart = token_divergence(x, y, divergence="total-variation", temperature=ours, teacher_temperature=theirs)
    reverse = token_divergence(
        x,
        y,
        divergence="reverse-kl",
        temperature=ours,
        teacher_temperature=theirs,
        outputs=("entropy", "teacher_entropy", "top1_agreement"),
    )
    assert reverse.entropy is not None
    assert reverse.teacher_entropy is not None
    assert reverse.top1_agreement is not None
    out_a, out_b = x <= FORBIDDEN, y <= FORBIDDEN
    return {
        "kl_ab": reverse.divergence.double(),
        "kl_ba": forward.divergence.double(),
        "tv": apart.divergence.double(),
        "entropy_a": reverse.entropy.double(),
        "entropy_b": reverse.teacher_entropy.double(),
        "top1_agreement": reverse.top1_agreement.double(),
        "forbidden_a": (out_a & ~out_b).sum(-1).double(),
        "forbidden_b": (out_b & ~out_a).sum(-1).double(),
        "equal": (x == y).sum(-1).double() / x.shape[1],
    }

"""What may be wrong between the two sides: each fault is looked for by what it leaves in the numbers.

The bounds below were chosen on distributions like those of language models, so that a fault is named where it explains
the greater part of the difference, and rounding, other weights and other policies are not taken for one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final, Literal

import torch
from torch import Tensor

from fastreward.compare.load import Side
from fastreward.compare.measure import FORBIDDEN, PerToken, signal
from fastreward.compare.pair import Pairs, flipped

Name = Literal["padding", "shift", "temperature", "processed", "kept-set", "rounding"]

FEWEST: Final = 16  # tokens that say anything
_SHIFTS: Final = (1, -1, 2, -2, 3, -3)
_ROUNDING: Final = (0.02, 0.3)  # nats: |difference| that a bfloat16 forward leaves, median and 99th percentile
_FLOAT32: Final = (1e-4, 1e-3)
_ONE_WAY: Final = 8  # tokens that chance does not move all the same way
_CERTAIN: Final = 1e-3  # nearer to a log-prob of 0 rounding is all that the odds tell


@dataclass(frozen=True)
class Fault:
    """What is likely wrong, and what says so."""

    name: Name
    side: str  # whose numbers are off, as far as the numbers can tell: "A" or "B"
    value: float | str  # tokens of a shift, temperature, least kept mass, share of tokens, a dtype
    evidence: str


# --------------------------------------------------------------------------------------------------------- alignment
def align(a: Side, b: Side, pairs: Pairs, found: PerToken) -> tuple[Pairs, Fault | None]:
    """Pairs that belong together, and how they were found where `pairs` do not.

    found: what was measured of `pairs`. Places that it does not have are read only where its own do not fit.
    """
    by_mask = _by_mask(a, b, pairs)
    x, y = found["signal_a"], found["signal_b"]
    now = correlation(x, y)
    if len(pairs) < FEWEST or now > 0.8 or by_mask is not None:
        return pairs, by_mask
    for by in _SHIFTS:
        moved, then = pairs.shifted(by), correlation(*_shifted(pairs, x, y, by))
        if len(moved) >= FEWEST and _better(now, then):
            tokens = f"{abs(by)} token{'s' if abs(by) > 1 else ''}"
            where, back = ("later", "left") if by > 0 else ("earlier", "right")
            text = f"A's values stand {tokens} {where} than B's: correlation {then:.3f} moved to the {back}"
            text += f", {now:.3f} as given"
            return moved, Fault("shift", "A", float(by), text)
    return _other_end(a, b, pairs, found, now) or _edges(a, pairs, found, now) or (pairs, None)


def _better(before: float, after: float) -> bool:
    """Whether a correlation is so much better that the other places were the right ones."""
    return after > 0.7 and after - before > 0.2 and 1 - after < 0.3 * (1 - before)


def _shifted(pairs: Pairs, x: Tensor, y: Tensor, by: int) -> tuple[Tensor, Tensor]:
    """Values of the pairs as Pairs.shifted has them."""
    places = Pairs(torch.arange(len(x)), torch.arange(len(y)), pairs.sequence, pairs.sequences).shifted(by)
    return x[places.a], y[places.b]


def _by_mask(a: Side, b: Side, pairs: Pairs) -> Fault | None:
    """Both say which of their tokens count, and have them elsewhere: they have been paired by that already."""
    if len(a.lead) == 1 or a.lead != b.lead or torch.equal(pairs.a, pairs.b):
        return None
    by = (pairs.a - pairs.b)[pairs.position == 0]
    if bool((by == by[0]).all()) and abs(int(by[0])) <= max(_SHIFTS):
        text = f"by their own masks A's tokens begin {int(by[0]):+d} places beside B's in every sequence"
        return Fault("shift", "A", float(by[0]), text)
    left = "A" if float(by.double().mean()) > 0 else "B"
    return Fault("padding", left, "left", _padding_text(left, "by their own masks, which the comparison goes by"))


def _other_end(a: Side, b: Side, pairs: Pairs, found: PerToken, now: float) -> tuple[Pairs, Fault] | None:
    """The tokens that the mask names stand at the other end of one side's rows."""
    chosen = "signal_is_chosen" in found
    for name, side, places in (("A", a, pairs.a), ("B", b, pairs.b)):
        moved = flipped(side, places, pairs.sequence)
        if moved is None:
            continue
        x = signal(side, moved, chosen)
        then = correlation(x, found["signal_b"]) if name == "A" else correlation(found["signal_a"], x)
        if _better(now, then):
            left = name if float((moved - places).double().mean()) > 0 else "BA"["AB".index(name)]
            why = f"correlation {then:.3f} with {name}'s rows at their other end, {now:.3f} as given"
            of_a, of_b = (moved, pairs.b) if name == "A" else (pairs.a, moved)
            tried = Pairs(of_a, of_b, pairs.sequence, pairs.sequences)
            return tried, Fault("padding", left, "left", _padding_text(left, why))
    return None


def _edges(a: Side, pairs: Pairs, found: PerToken, now: float) -> tuple[Pairs, Fault] | None:
    """Rows that nothing masks: what is the same number over and over at one end is padding there."""
    if len(a.lead) == 1 or len(pairs) != a.places or not torch.equal(pairs.a, pairs.b):
        return None
    x, y = (found[f"signal_{name}"].view(a.lead) for name in "ab")
    for left, before, behind in (("A", _run(x), _run(y.flip(-1))), ("B", _run(y), _run(x.flip(-1)))):
        agree = before == behind
        if not bool((before > 0).any()) or float(agree.double().mean()) < 0.9:
            continue
        column = torch.arange(a.lead[1])
        kept = pairs.where(((column < a.lead[1] - before.unsqueeze(-1)) & agree.unsqueeze(-1)).reshape(-1))
        by = before[kept.sequence]
        of_a, of_b = (kept.a + by, kept.b) if left == "A" else (kept.a, kept.b + by)
        then = correlation(x.reshape(-1)[of_a], y.reshape(-1)[of_b])
        if then > 0.7:
            why = f"one number fills those ends; correlation {then:.3f} without them, {now:.3f} as given"
            tried = Pairs(of_a, of_b, kept.sequence, kept.sequences)
            return tried, Fault("padding", left, "left", _padding_text(left, why))
    return None


def _padding_text(left: str, why: str) -> str:
    return f"{left} is padded on the left, {'B' if left == 'A' else 'A'} on the right: {why}"


def _run(x: Tensor) -> Tensor:
    """How many numbers at the beginning of a row [B, T] are the same, 0 for one."""
    same = (x == x[:, :1]).to(torch.int64).cumprod(-1).sum(-1)
    return torch.where(same > 1, same, 0)


# ------------------------------------------------------------------------------------------------------------ values
def faults(a: Side, b: Side, found: PerToken) -> list[Fault]:
    """Of tokens that belong together."""
    if len(found["chosen_a"]) < FEWEST:
        return []
    wide = "offset" in found
    told = [
        _kept_set(found),
        *(_within_rows(found) if wide else _of_chosen(found)),
        *_rounding(found, a.kind == b.kind == "logits"),
    ]
    return [fault for fault in told if fault is not None]


def compared(found: PerToken) -> tuple[Tensor, Tensor]:
    """The log-probs of both sides that are compared, f64 [N]: of the tokens, else of A's likeliest id."""
    x, y = found["chosen_a"], found["chosen_b"]
    if "top_a" not in found:
        return x, y
    unknown = x.isnan() | y.isnan()
    if not bool(unknown.all()):
        return x, y
    return found["top_a"], found["top_b"]


def _kept_set(found: PerToken) -> Fault | None:
    """-inf on one side alone."""
    if "forbidden_a" in found:
        counts = {"A": found["forbidden_a"], "B": found["forbidden_b"]}
        text = "{share} of the tokens have ids that are -inf on {side} and not on {other} ({mean:.4g} ids on average)"
    else:
        x, y = found["chosen_a"], found["chosen_b"]
        counts = {
            "A": ((x <= FORBIDDEN) & (y > FORBIDDEN)).double(),
            "B": ((y <= FORBIDDEN) & (x > FORBIDDEN)).double(),
        }
        text = "{share} of the tokens are -inf on {side} and not on {other}"
    side = max(counts, key=lambda name: float(counts[name].sum()))
    share = float((counts[side] > 0).double().mean())
    if share == 0.0:
        return None
    other = "B" if side == "A" else "A"
    mean = float(counts[side][counts[side] > 0].mean())
    written = text.format(share=_percent(share), side=side, other=other, mean=mean)
    written += f": {side} keeps a set of tokens (top-k, top-p) that {other} does not"
    offset = found.get("offset")
    if offset is not None and bool((counts[side] > 0).any()):
        inside = offset[counts[side] > 0].abs()
        inside = inside[inside.isfinite()]
        if len(inside):
            kept = math.exp(-float(inside.median()))
            written += f"; inside it the log-probs differ by a constant of the token, as of a kept mass of {kept:.3f}"
    return Fault("kept-set", other, share, written)


def _within_rows(found: PerToken) -> list[Fault | None]:
    """From the ids that both sides know of a token: a temperature stretches them, a kept set moves all by the same."""
    aa, bb, ab = (found[x].sum() for x in ("aa", "bb", "ab"))
    informative = found["bb"] > 1e-2
    if int(informative.sum()) < FEWEST:
        return []
    slopes = (found["aa"][informative] / found["bb"][informative]).sqrt()
    slope = float(slopes.median())
    before = float(aa - 2 * ab + bb)
    after = float(aa - 2 * slope * ab + slope * slope * bb)
    fits = float(ab / (aa * bb).sqrt())
    if abs(math.log(slope)) > 0.01 and fits > 0.9 and after < 0.2 * before:
        low, high = torch.quantile(slopes[:100_000], torch.tensor([0.25, 0.75], dtype=slopes.dtype)).tolist()
        return [_temperature(slope, f"half of the tokens between {1 / high:.4g} and {1 / low:.4g}", 1 - after / before)]
    # What is renormalised has lost ids: whole logits without -inf have lost none.
    whole = "kl_ab" in found and not bool((found["forbidden_a"] + found["forbidden_b"]).any())
    return [_moved(found["offset"], found["spread"])] if fits > 0.8 and not whole else []


def _moved(offset: Tensor, spread: Tensor) -> Fault | None:
    """All ids of a token moved by the same, and always the same way: noise moves some up and others down."""
    known = offset.isfinite() & spread.isfinite()
    clear = offset[known & (offset.abs() > (3 * spread).clamp(min=2e-3))]
    up, down = float(clear.clamp(min=0).sum()), float((-clear).clamp(min=0).sum())
    if len(clear) < max(0.1 * len(offset), _ONE_WAY) or min(up, down) > 0.05 * max(up, down):
        return None
    why = f"on {_percent(len(clear) / len(offset))} of the tokens by the same for all ids"
    return _processed("A" if up > down else "B", (clear if up > down else -clear).clamp(min=0), why)


def _of_chosen(found: PerToken) -> list[Fault | None]:
    """From the log-probs of the chosen tokens alone."""
    x, y = found["chosen_a"], found["chosen_b"]
    finite = (x > FORBIDDEN) & (y > FORBIDDEN)
    x, y = x[finite].clamp(max=0.0), y[finite].clamp(max=0.0)
    if len(x) < FEWEST:
        return []
    slope, explained, fits = _odds(x, y)
    processed = _one_sided(x, y, slope)
    if processed is not None:
        return [processed]
    if abs(math.log(slope)) > 0.03 and explained > 0.6 and fits > 0.8:
        return [_temperature(slope, "a regression of the log-odds; top-k log-probs would tell exactly", explained)]
    return []


def _odds(x: Tensor, y: Tensor) -> tuple[float, float, float]:
    """(slope of A's log-odds on B's, share of the difference that a line explains, correlation).

    A temperature multiplies differences of log-probs: log p - log(1 - p) shows it, where log p itself saturates.
    """
    inside = (x < -_CERTAIN) & (y < -_CERTAIN)
    x, y = (z[inside] - torch.log(-torch.expm1(z[inside])) for z in (x, y))
    if len(x) < FEWEST:
        return 1.0, 0.0, 0.0
    cx, cy = x - x.mean(), y - y.mean()
    total = float((x - y).square().sum())
    if total == 0.0 or float(cx.norm()) == 0.0 or float(cy.norm()) == 0.0:
        return 1.0, 0.0, 1.0
    slope = float(cx.norm() / cy.norm())
    left = float((cx - slope * cy).square().sum())
    return slope, 1 - left / total, float((cx * cy).sum() / (cx.norm() * cy.norm()))


def _one_sided(x: Tensor, y: Tensor, slope: float) -> Fault | None:
    """Log-probs renormalised over what one side keeps are never below the other's, and at times exactly 0."""
    if not 0.7 < slope < 1.4:
        return None
    for name, difference, ours, theirs in (("A", x - y, x, y), ("B", y - x, y, x)):
        low, high = _quantile(difference, 0.01), _quantile(difference, 0.99)
        alone = float(((ours == 0) & (theirs < -5e-3)).double().mean())
        moved = float((difference > max(-3 * low, 2e-3)).double().mean())
        often = moved > max(0.05, _ONE_WAY / len(x))
        one_way = high > 5 * max(-low, 1e-4) and often and correlation(x, y) > 0.5
        if one_way or (alone > 0.01 and high > max(-low, 1e-4)):
            why = f"{name}'s log-probs are the larger ones on {_percent(moved)} of the tokens, and next to never below"
            if alone:
                why += f"; exactly 0 on {_percent(alone)} where the other side is not certain (one token was kept)"
            return _processed(name, difference.clamp(min=0.0), why)
    return None


def _processed(side: str, difference: Tensor, why: str) -> Fault:
    mass = math.exp(-_quantile(difference, 0.95))
    other = "B" if side == "A" else "A"
    return Fault(
        "processed", side, mass,
        f"{side}'s log-probs are renormalised over the tokens that sampling kept (top-k, top-p), {other}'s are raw: "
        f"{side} is above {other} by 0 to {-math.log(mass):.3g} (kept mass {mass:.3f} and more, on 95 %), {why}",
    )  # fmt: skip


def _temperature(slope: float, how: str, explained: float) -> Fault:
    return Fault(
        "temperature", "B", 1 / slope,
        f"A is B's distribution at a temperature of {1 / slope:.3g} (B is A's at {slope:.3g}), {how}; "
        f"that explains {_percent(explained)} of the squared difference: one side has not applied its temperature",
    )  # fmt: skip


def _rounding(found: PerToken, logits: bool) -> list[Fault | None]:
    """The values of one side alone lie on the grid of a low-precision dtype."""
    values = float(found["values"].sum())
    if values < FEWEST:
        return []
    for dtype in ("bfloat16", "float16"):
        share = {name: float(found[f"{dtype}_{name.lower()}"].sum()) / values for name in "AB"}
        low, high = min(share, key=share.__getitem__), max(share, key=share.__getitem__)
        if share[high] > 0.999 and share[low] < 0.5:
            near = float(found[f"{dtype}_near"].sum()) / values
            text = (
                f"all {'logits' if logits else 'log-probs'} of {high} are numbers of {dtype}, of {low} "
                f"{_percent(share[low])}; {_percent(near)} of the differences are within half a step of it"
            )
            return [Fault("rounding", high, dtype, text)]
    return []


# ------------------------------------------------------------------------------------------------------------ pieces
def verdict(found: PerToken, faults: list[Fault]) -> str:
    """One sentence."""
    if faults:
        return f"likely fault: {', then '.join(dict.fromkeys(f.name for f in faults))}"
    if not len(found["equal"]):
        return "no fault found: there is nothing to compare"
    if bool((found["equal"] == 1.0).all()):
        return "no fault found: both sides are the same to the last bit"
    x, y = compared(found)
    difference = (x - y).abs()
    difference = difference[difference.isfinite()]
    if len(difference) < FEWEST:
        return f"no fault found, but in {len(difference)} tokens most would not be seen"
    middle, high = _quantile(difference, 0.5), _quantile(difference, 0.99)
    seen = f"median difference {middle:.2g}, 99th percentile {high:.2g}"
    for name, bounds in (("float32", _FLOAT32), ("bfloat16", _ROUNDING)):
        if middle <= bounds[0] and high <= bounds[1]:
            return f"no fault found: the differences are of the size of rounding in {name} ({seen})"
    return f"no fault found, but the differences are larger than rounding: other weights, or another policy ({seen})"


def correlation(x: Tensor, y: Tensor) -> float:
    """Of what is finite in both; 0 where nothing varies."""
    finite = x.isfinite() & y.isfinite()
    x, y = (z[finite].clamp(min=-50.0) for z in (x, y))
    if len(x) < 2:
        return 0.0
    x, y = x - x.mean(), y - y.mean()
    scale = float(x.norm() * y.norm())
    return float((x * y).sum()) / scale if scale else 0.0


def _quantile(x: Tensor, share: float) -> float:
    """The smallest of x that at least this share of it does not exceed."""
    return float(x.kthvalue(min(len(x), max(1, math.ceil(share * len(x))))).values)


def _percent(share: float) -> str:
    return f"{100 * share:.3g} %"

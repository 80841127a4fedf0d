"""Returns, GAE, lambda-returns and V-trace in float64 torch, one row and one token at a time: the truth."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor


class _Row(NamedTuple):
    """A row as Python numbers, what is not given filled in: ones, zeros, nothing."""

    mask: list[bool]
    rewards: list[float]
    values: list[float]
    log_ratios: list[float]
    next_values: list[float] | None
    gamma: list[float]
    lam: list[float]
    terminated: list[bool]
    done: list[bool]  # or terminated
    beyond: float | None


# ------------------------------------------------------------------------------------------------------ the textbook
def _discounted(row: _Row, places: list[int], beyond: float | None, op: Callable[[float, float], float]) -> list[float]:
    """y_t = op(x_t, gamma_t y_{t+1}) over `places`, in the order of the recurrence; None: nothing yet."""
    found: list[float | None] = []
    carry = beyond
    for t in places:
        later = None if carry is None else row.gamma[t] * carry
        carry = later
        if row.mask[t]:
            carry = row.rewards[t] if later is None else op(row.rewards[t], later)
        found.append(carry)
    return [0.0 if y is None else y for y in found]


def _next_value(row: _Row, places: list[int], k: int, beyond: float | None) -> float:
    """Value of the state after places[k], of places from last to first."""
    if row.mask[places[k]] and row.next_values is not None:
        return row.next_values[places[k]]
    if k == 0:
        return 0.0 if beyond is None else beyond
    return row.values[places[k - 1]]


def _gae(row: _Row, places: list[int], beyond: float | None) -> list[tuple[float, float]]:
    """(advantage, return) of each place."""
    found, advantage = [], 0.0
    for k, t in enumerate(places):
        bootstrap = 0.0 if row.terminated[t] else row.gamma[t] * _next_value(row, places, k, beyond)
        delta = row.rewards[t] + bootstrap - row.values[t]
        advantage = delta + (0.0 if row.done[t] else row.gamma[t] * row.lam[t] * advantage)
        found.append((advantage, advantage + row.values[t]))
    return found


def _lambda(row: _Row, places: list[int]) -> list[float]:
    """r + gamma ((1 - lam) V' + lam G'); the last return of a sequence bootstraps from V' alone."""
    found: list[float] = []
    for k, t in enumerate(places):
        value = _next_value(row, places, k, None)
        after = value if k == 0 or row.done[t] else (1 - row.lam[t]) * value + row.lam[t] * found[-1]
        found.append(row.rewards[t] + (0.0 if row.terminated[t] else row.gamma[t] * after))
    return found


def _vtrace(
    row: _Row, places: list[int], beyond: float | None, rho_bar: float, c_bar: float
) -> list[tuple[float, float]]:
    """(target, advantage) of each place (arXiv 1802.01561, equation 1 and section 4.2)."""
    found, above = [], 0.0  # above: target less value of the next place
    for k, t in enumerate(places):
        ratio = math.exp(min(row.log_ratios[t], 700.0))
        rho, c = min(rho_bar, ratio), row.lam[t] * min(c_bar, ratio)
        value, go_on = _next_value(row, places, k, beyond), 0.0 if row.done[t] else 1.0
        discount = 0.0 if row.terminated[t] else row.gamma[t]
        delta = rho * (row.rewards[t] + discount * value - row.values[t])
        advantage = rho * (row.rewards[t] + discount * (value + go_on * above) - row.values[t])
        above = delta + discount * c * go_on * above
        found.append((row.values[t] + above, advantage))
    return found


# ------------------------------------------------------------------------------------------------------ masked tokens
def _sequences(mask: list[bool], at_masked: str, reverse: bool) -> list[list[int]]:
    """Places of the independent sequences of a row, each in the order of the recurrence."""
    order = list(range(len(mask)))[:: -1 if reverse else 1]
    valid = [t for t in order if mask[t]]
    if not valid:
        return []
    if at_masked == "carry":
        return [valid]
    if at_masked == "reset":
        runs = [[valid[0]]]
        for t in valid[1:]:
            if abs(t - runs[-1][-1]) == 1:
                runs[-1].append(t)
            else:
                runs.append([t])
        return runs
    return [order[order.index(valid[0]) :]]


def _moved(rewards: list[float], mask: list[bool], move: bool) -> list[float]:
    """Rewards of valid tokens; with those of the masked tokens that follow them, if they move."""
    found, pending = [0.0] * len(rewards), 0.0
    for t in reversed(range(len(rewards))):
        if mask[t]:
            found[t], pending = rewards[t] + pending, 0.0
        elif move and math.isfinite(rewards[t]):
            pending += rewards[t]
    return found


# ----------------------------------------------------------------------------------------------------------- raw form
class _Inputs(Protocol):
    """The fields of fastreward's ReturnsInputs (the reference imports nothing but torch)."""

    @property
    def rewards(self) -> Tensor: ...
    @property
    def values(self) -> Tensor | None: ...
    @property
    def log_ratios(self) -> Tensor | None: ...
    @property
    def next_values(self) -> Tensor | None: ...
    @property
    def gamma(self) -> Tensor | None: ...
    @property
    def lam(self) -> Tensor | None: ...
    @property
    def terminated(self) -> Tensor | None: ...
    @property
    def done(self) -> Tensor | None: ...
    @property
    def beyond(self) -> Tensor | None: ...


class _Tokens(Protocol):
    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def mask(self) -> Tensor | None: ...
    @property
    def cu_seqlens(self) -> Tensor | None: ...


class _Options(Protocol):
    @property
    def kind(self) -> str: ...
    @property
    def at_masked(self) -> str: ...
    @property
    def op(self) -> str: ...
    @property
    def reverse(self) -> bool: ...
    @property
    def move(self) -> bool: ...


def truth(
    inputs: _Inputs, tokens: _Tokens, numbers: Sequence[float] | Tensor, options: _Options
) -> tuple[Tensor, Tensor]:
    """Both results of `scan` in float64; the second is 0 where there is one only."""
    numbers = numbers.tolist() if isinstance(numbers, Tensor) else list(numbers)
    first = torch.zeros(tokens.shape, dtype=torch.float64).reshape(-1)
    second = torch.zeros_like(first)
    for b, places in enumerate(_rows(tokens)):
        row = _row(inputs, tokens, numbers, options, b, places)
        for k, sequence in enumerate(_sequences(row.mask, options.at_masked, options.reverse)):
            for t, (y, z) in zip(sequence, _results(row, sequence, k, numbers, options), strict=True):
                if row.mask[t] or options.at_masked == "decay":
                    first[places[t]], second[places[t]] = y, z
    return first.reshape(tokens.shape), second.reshape(tokens.shape)


def _results(
    row: _Row, places: list[int], k: int, numbers: Sequence[float], options: _Options
) -> list[tuple[float, float]]:
    """Both results at each place of a row's sequence k."""
    _, _, scale, rho_bar, c_bar = numbers
    beyond = row.beyond if k == 0 else None
    if options.kind == "gae":
        return _gae(row, places, beyond)
    if options.kind == "vtrace":
        return _vtrace(row, places, beyond, rho_bar, c_bar)
    if options.kind == "lambda":
        return [(y, 0.0) for y in _lambda(row, places)]
    return [(y, 0.0) for y in _discounted(row, places, beyond, _op(options.op, scale))]


def _op(op: str, scale: float) -> Callable[[float, float], float]:
    if op == "sum":
        return lambda a, b: a + b
    if op in ("min", "max"):
        return min if op == "min" else max
    pick = max if scale > 0 else min
    return lambda a, b: pick(a, b) + scale * math.log1p(math.exp(-abs(a - b) / abs(scale)))


def _rows(tokens: _Tokens) -> Iterator[range]:
    """Flat places of each row's tokens."""
    if tokens.cu_seqlens is None:
        rows, columns = tokens.shape
        yield from (range(b * columns, (b + 1) * columns) for b in range(rows))
    else:
        bounds = tokens.cu_seqlens.tolist()
        yield from (range(a, b) for a, b in itertools.pairwise(bounds))


def _row(inputs: _Inputs, tokens: _Tokens, numbers: Sequence[float], options: _Options, b: int, places: range) -> _Row:
    mask = [x != 0 for x in _numbers(tokens.mask, tokens, b, places, 1.0)]

    def masked(x: Tensor | None, otherwise: float = 0.0) -> list[Any]:
        return [y if m else 0.0 for y, m in zip(_numbers(x, tokens, b, places, otherwise), mask, strict=True)]

    terminated = [x != 0 for x in masked(inputs.terminated)]
    done = [x != 0 or end for x, end in zip(masked(inputs.done), terminated, strict=True)]
    return _Row(
        mask,
        _moved(_numbers(inputs.rewards, tokens, b, places, 0.0), mask, options.move),
        masked(inputs.values),
        masked(inputs.log_ratios),
        None if inputs.next_values is None else masked(inputs.next_values),
        _numbers(inputs.gamma, tokens, b, places, numbers[0]),
        _numbers(inputs.lam, tokens, b, places, numbers[1]),
        terminated,
        done,
        None if inputs.beyond is None else float(inputs.beyond[b]),
    )


def _numbers(x: Tensor | None, tokens: _Tokens, b: int, places: range, otherwise: float) -> list[float]:
    """Values of a row's tokens; x: per token or [B]."""
    if x is None:
        return [otherwise] * len(places)
    if tuple(x.shape) != tuple(tokens.shape):
        return [float(x[b])] * len(places)
    flat: list[float] = x.reshape(-1)[places.start : places.stop].double().tolist()
    return flat


def scan(
    inputs: _Inputs,
    tokens: _Tokens,
    numbers: Sequence[float] | Tensor,
    options: _Options,
    out: Tensor,
    second: Tensor | None,
) -> None:
    """Raw form, into f32 `out` and `second`."""
    first, other = truth(inputs, tokens, numbers, options)
    out.copy_(first)
    if second is not None:
        second.copy_(other)

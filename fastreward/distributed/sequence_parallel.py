"""Recurrences over rows that are split over ranks (context parallelism): one affine carry per row and rank crosses.

What lies beyond a rank's tokens is put behind them as one more token, whose result is what the next rank's first has:
so masked tokens, done, terminated and every convention are the kernel's business, on each rank as on one process.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any, Final, Literal, NamedTuple

import torch
from torch import Tensor

from fastreward._arguments import check
from fastreward._arguments.options import ReturnsInputs, ReturnsOptions
from fastreward._arguments.tokens import Tokens
from fastreward._runtime.dispatch import implementation
from fastreward.distributed.ranks import Ranks

Sharding = Literal["contiguous", "zigzag"]
SHARDINGS: Final[tuple[Sharding, ...]] = ("contiguous", "zigzag")

#: Numbers of a call where nothing is discounted: gamma, lam, scale, rho_bar, c_bar.
_PLAIN: Final = [1.0, 1.0, 1.0, 1.0, 1.0]


class Shard(NamedTuple):
    """One rank's part of a call."""

    inputs: ReturnsInputs
    mask: Tensor | None
    cu_seqlens: Tensor | None
    numbers: Sequence[float] | Tensor  # gamma, lam, scale, rho_bar, c_bar
    options: ReturnsOptions
    sharding: Sharding
    backend: str
    whiten: bool = False  # what comes after it, in one more collective

    @property
    def same(self) -> dict[str, object]:
        """What is alike on every rank."""
        names = ("gamma", "lam", "temperature", "rho_bar", "c_bar")
        numbers = [self.numbers] if isinstance(self.numbers, Tensor) else self.numbers
        return {**asdict(self.options), **dict(zip(names, numbers, strict=False)), "whiten": self.whiten}


def sharded_scan(shard: Shard, ranks: Ranks) -> tuple[Tensor, Tensor | None]:
    """Both results (None where there is one) of this rank's tokens, f32 in their shape."""
    inputs, options = shard.inputs, shard.options
    pieces = _Pieces(shard, ranks)
    valid = torch.ones_like(inputs.rewards, dtype=torch.bool) if shard.mask is None else shard.mask != 0
    edges = _Edges(pieces, valid.reshape(-1))
    scan = _Scan(shard, pieces, valid.reshape(-1))
    place = edges.place(options.at_masked)
    at_place = _at(valid, place)
    value = torch.where(at_place != 0, _at(inputs.values, place), 0.0)  # a masked token takes time without a value
    pending = edges.leading(inputs.rewards) if options.move else torch.zeros_like(value)
    told = pieces.gather(torch.stack([edges.tokens.double(), edges.any.double(), at_place, value, pending], -1))
    if options.move:
        scan.move(pieces.own(_pending(told)), edges.last)
    scan.beyond(pieces.chain(told, _NextPlace(options)))
    # Where the next place has the result y, ours has `without + slope * y`.
    without, slope = scan.carried(place, value), _at(scan.slopes(), place)
    told = torch.cat([told, pieces.gather(torch.stack([without, slope], -1))], -1)
    return scan.results(pieces.chain(told, _NextResult(options))[:, 0])


# ----------------------------------------------------------------------------------------------------------- pieces
class _Pieces:
    """A rank's rows as pieces of all ranks' rows: one of each, or two (zigzag), one behind the other.

    shape: [R, T] or [N] with bounds [R + 1], R pieces.
    """

    def __init__(self, shard: Shard, ranks: Ranks) -> None:
        x, bounds = shard.inputs.rewards, shard.cu_seqlens
        self.ranks, self.reverse = ranks, shard.options.reverse
        self.each = 2 if shard.sharding == "zigzag" else 1
        self.rows = x.shape[0] if bounds is None else bounds.shape[0] - 1
        if self.each == 2:
            _check_even(x, bounds)
        rows = ranks.meet(self.rows, SHARDINGS.index(shard.sharding), same=shard.same)
        if check.values_checked(x) and not bool((rows == rows[0]).all()):
            raise ValueError(
                "rewards: expected as many rows and the same sharding on every rank of process_group, got rows "
                + ", ".join(map(str, rows[:, 0].tolist()))
            )
        self.bounds = bounds
        self.shape: tuple[int, ...] = tuple(x.shape)
        if self.each == 2:
            if bounds is None:
                self.shape = (2 * x.shape[0], x.shape[1] // 2)
            else:
                middle = bounds[:-1] + bounds.diff().div(2, rounding_mode="floor")
                self.bounds = torch.cat([torch.stack([bounds[:-1], middle], -1).flatten(), bounds[-1:]])
        count = self.rows * self.each
        padded = self.bounds is None
        starts = torch.arange(count + 1, device=x.device) * self.shape[1] if padded else self.bounds
        assert starts is not None
        self.starts, self.ends = starts[:-1], starts[1:]
        self.row_of = torch.arange(count, device=x.device).repeat_interleave(starts.diff(), output_size=x.numel())

    # -------------------------------------------------------------------------------------------- rows and their ends
    def per_row(self, x: Tensor) -> Tensor:
        """[B] to one for each piece."""
        return x.repeat_interleave(self.each) if self.each > 1 else x

    def extended(self, x: Tensor, beyond: Tensor) -> Tensor:
        """Tokens with one more behind each piece, on the side that the recurrence comes from."""
        beyond = beyond.to(x.dtype)
        if self.bounds is None:
            column, own = beyond.unsqueeze(-1), x.reshape(self.shape)
            return torch.cat([own, column] if self.reverse else [column, own], -1)
        out = x.new_empty(x.shape[0] + beyond.shape[0])
        numbers = torch.arange(beyond.shape[0], device=x.device)
        out[self._places()] = x
        out[(self.ends if self.reverse else self.starts) + numbers] = beyond
        return out

    def stripped(self, x: Tensor) -> Tensor:
        """The tokens [N] of what was extended."""
        if self.bounds is None:
            return (x[:, :-1] if self.reverse else x[:, 1:]).reshape(-1)
        return x[self._places()]

    def extended_bounds(self) -> Tensor | None:
        """Bounds of what was extended, where it is packed."""
        return None if self.bounds is None else self.bounds + torch.arange(len(self.bounds), device=self.bounds.device)

    def _places(self) -> Tensor:
        return torch.arange(self.row_of.shape[0], device=self.row_of.device) + self.row_of + int(not self.reverse)

    # -------------------------------------------------------------------------------------------------- all the pieces
    def gather(self, x: Tensor) -> Tensor:
        """[pieces in the order of time, B, F] of every rank's [R, F]."""
        shaped = self.ranks.gather(x.view(self.rows, self.each, x.shape[-1]))
        first = shaped[:, :, 0]
        return first if self.each == 1 else torch.cat([first, shaped[:, :, 1].flip(0)])

    def own(self, x: Tensor) -> Tensor:
        """[R, ...] of [pieces in the order of time, B, ...]."""
        parts = [x[self.ranks.rank]] if self.each == 1 else [x[self.ranks.rank], x[len(x) - 1 - self.ranks.rank]]
        return torch.stack(parts, 1).flatten(0, 1)

    def chain(self, told: Tensor, step: _NextPlace | _NextResult) -> Tensor:
        """What arrives at each own piece, [R, F]: the state that `step` makes of those before it in the recurrence."""
        order = range(len(told) - 1, -1, -1) if self.reverse else range(len(told))
        state, found = told.new_zeros((told.shape[1], step.fields)), [told] * len(told)
        for p in order:
            found[p] = state
            state = step(state, _Told(*told[p].unbind(-1)))
        return self.own(torch.stack(found))


def _check_even(x: Tensor, bounds: Tensor | None) -> None:
    wrong = x.shape[-1] % 2 if bounds is None else 0
    if bounds is not None and check.values_checked(bounds):
        wrong = int((bounds.diff() % 2).sum())
    if wrong:
        raise ValueError(
            "sharding: expected an even number of tokens a row for 'zigzag', two chunks of one length, "
            f"got {list(x.shape)}"
        )


class _Edges:
    """Where a rank's pieces begin and end to count: flat places i64 [R], -1 where there is none."""

    def __init__(self, pieces: _Pieces, valid: Tensor) -> None:
        count, self.pieces, self.valid = valid.shape[0], pieces, valid
        self.places = torch.arange(count, device=valid.device)
        self.tokens = pieces.ends > pieces.starts
        none = torch.full_like(pieces.starts, -1)
        self.last = none.scatter_reduce(0, pieces.row_of, torch.where(valid, self.places, -1), "amax")
        first = (none + count + 1).scatter_reduce(0, pieces.row_of, torch.where(valid, self.places, count), "amin")
        self.any = self.last >= 0
        self.first = torch.where(self.any, first, -1)

    def place(self, at_masked: str) -> Tensor:
        """The token whose result the next piece goes on with."""
        reverse = self.pieces.reverse
        if at_masked == "carry":
            return self.first if reverse else self.last
        return torch.where(self.tokens, self.pieces.starts if reverse else self.pieces.ends - 1, -1)

    def leading(self, rewards: Tensor) -> Tensor:
        """Rewards f64 [R] of the masked tokens before the first that counts: they go to the piece before."""
        end = torch.where(self.any, self.first, self.pieces.ends)[self.pieces.row_of]
        x = rewards.reshape(-1).double()
        own = torch.where(~self.valid & (self.places < end) & x.isfinite(), x, 0.0)
        return own.new_zeros(self.tokens.shape).index_add(0, self.pieces.row_of, own)


def _at(x: Tensor | None, place: Tensor) -> Tensor:
    """f64 [R]: x, one per token, at a place of each piece; 0 where it has none."""
    if x is None or not x.numel():
        return torch.zeros(place.shape, dtype=torch.float64, device=place.device)
    return torch.where(place >= 0, x.reshape(-1)[place.clamp(min=0)].double(), 0.0)


# ----------------------------------------------------------------------------------------------- from piece to piece
class _Told(NamedTuple):
    """What each piece tells of itself, [B] each."""

    tokens: Tensor  # whether it has any
    any: Tensor  # whether one counts
    at_place: Tensor  # whether the one at its place does
    value: Tensor  # there
    pending: Tensor  # rewards for the piece before
    without: Tensor | None = None  # the result at its place, where nothing lies beyond
    slope: Tensor | None = None  # and the factor of the result beyond


class _Step:
    """How a piece changes the state [B, fields] in which the recurrence comes to it; the first field: is there one."""

    fields = 0

    def __init__(self, options: ReturnsOptions) -> None:
        self.at_masked, self.timed = options.at_masked, options.timed

    def passes(self, there: Tensor, piece: _Told) -> tuple[Tensor, Tensor]:
        """(whether what was there is replaced, whether there is a place to go on with)."""
        tokens, counts, at_place = piece.tokens != 0, piece.any != 0, piece.at_place != 0
        if self.at_masked == "carry":
            return counts, there | counts
        if self.timed:
            return tokens & (there | counts), there | counts
        return tokens, torch.where(tokens, at_place, there)


class _NextPlace(_Step):
    """State: whether there is a next place, its value, whether any token beyond counts."""

    fields = 3

    def __call__(self, state: Tensor, piece: _Told) -> Tensor:
        replaced, there = self.passes(state[:, 0] != 0, piece)
        value = torch.where(there, torch.where(replaced, piece.value, state[:, 1]), 0.0)
        return torch.stack([there.double(), value, state[:, 2].maximum(piece.any)], -1)


class _NextResult(_Step):
    """State: the next place's result, and whether there is one."""

    fields = 2

    def __call__(self, state: Tensor, piece: _Told) -> Tensor:
        assert piece.without is not None
        assert piece.slope is not None
        replaced, there = self.passes(state[:, 1] != 0, piece)
        result = torch.where(replaced, piece.without + piece.slope * state[:, 0], state[:, 0])
        return torch.stack([torch.where(there, result, 0.0), there.double()], -1)


def _pending(told: Tensor) -> Tensor:
    """Rewards that come to each piece from those after it in time, [pieces, B]."""
    coming, found = told.new_zeros(told.shape[1]), []
    for piece in (_Told(*fields.unbind(-1)) for fields in told.flip(0)):
        found.append(coming)
        coming = piece.pending + torch.where(piece.any != 0, 0.0, coming)
    return torch.stack(found[::-1])


# -------------------------------------------------------------------------------------------------------- the kernels
class _Scan:
    """The recurrence over a rank's tokens with one more beyond each piece."""

    def __init__(self, shard: Shard, pieces: _Pieces, valid: Tensor) -> None:
        self.inputs, self.numbers, self.options = shard.inputs, shard.numbers, replace(shard.options, move=False)
        self.kernels, self.pieces, self.valid = implementation("returns", shard.backend), pieces, valid
        self.rewards = shard.inputs.rewards.reshape(-1)

    def move(self, coming: Tensor, last: Tensor) -> None:
        """Rewards of masked tokens to the valid ones before them; those from other ranks to the last."""
        shape, x = self.pieces.shape, self.inputs.rewards
        tokens, moved = Tokens(shape, self.valid.view(shape), self.pieces.bounds), torch.empty_like(x).view(shape)
        self.kernels.scan(
            ReturnsInputs(x.view(shape)), tokens, [0.0, *_PLAIN[1:]], ReturnsOptions(move=True), moved, None
        )
        self.rewards = moved.view(-1)
        if self.rewards.numel():
            self.rewards.index_add_(0, last.clamp(min=0), torch.where(last >= 0, coming, 0.0).float())

    def beyond(self, state: Tensor) -> None:
        """What lies beyond each piece, [R, 3]: see `_NextPlace`."""
        self.there, self.value, self.counts = state[:, 0] != 0, state[:, 1], state[:, 2] != 0

    def carried(self, place: Tensor, value: Tensor) -> Tensor:
        """What goes on from the place where the next result is 0, f64 [R]; V-trace's is the target less the value."""
        first, _ = self._run(torch.zeros_like(value), self._also_at_gaps())
        return _at(first, place) - value if self.options.kind == "vtrace" else _at(first, place)

    def slopes(self) -> Tensor:
        """How much of the next result comes to each token, [N]."""
        rewards = self.pieces.extended(torch.zeros_like(self.rewards), self.there)
        rates = self.pieces.extended(self._rates(), torch.zeros_like(self.value))
        options = replace(self._also_at_gaps(), kind="returns")
        return self._scan(ReturnsInputs(rewards, gamma=rates), _PLAIN, options)[0]

    def results(self, result: Tensor) -> tuple[Tensor, Tensor | None]:
        """What the caller gets, where the next places have these results."""
        first, second = self._run(result, self.options)
        shape = self.inputs.rewards.shape
        return first.view(shape), None if second is None else second.view(shape)

    def _also_at_gaps(self) -> ReturnsOptions:
        """The same recurrence, whose results are also given at masked tokens that take time."""
        return replace(self.options, at_masked="decay") if self.options.at_masked == "zero" else self.options

    def _run(self, result: Tensor, options: ReturnsOptions) -> tuple[Tensor, Tensor | None]:
        given: dict[str, Any] = {}
        for name, x in self.inputs._asdict().items():
            if name in ("rewards", "beyond") or x is None:
                continue
            if x.shape != self.inputs.rewards.shape:  # [B]
                given[name] = self.pieces.per_row(x)
                continue
            behind = self.value if name == "values" else torch.zeros_like(self.value)
            given[name] = self.pieces.extended(x.reshape(-1), behind)
        if self.inputs.beyond is not None:
            given["beyond"] = torch.where(self.counts, 0.0, self.pieces.per_row(self.inputs.beyond))
        rewards = self.pieces.extended(self.rewards, torch.where(self.there, self._reward(result), 0.0))
        return self._scan(ReturnsInputs(rewards, **given), self.numbers, options)

    def _reward(self, result: Tensor) -> Tensor:
        """The reward with which a token that nothing follows has this result."""
        if self.options.kind != "vtrace":
            return result + self.value if self.options.kind == "gae" else result
        bar = self.numbers[3]
        return self.value + result / (bar.clamp(max=1.0) if isinstance(bar, Tensor) else min(bar, 1.0))

    def _rates(self) -> Tensor:
        """f32 [N]: what a token's result owes to the next one's."""
        inputs = self.inputs
        rate = self._coefficient(inputs.gamma, 0)
        if self.options.kind == "returns":
            return rate
        rate = rate * self._coefficient(inputs.lam, 1)
        if inputs.log_ratios is not None:
            ratio = torch.where(self.valid, inputs.log_ratios.reshape(-1), 0.0).exp()
            rate = rate * ratio.minimum(torch.as_tensor(self.numbers[4], dtype=ratio.dtype, device=ratio.device))
        for ends in (inputs.terminated, inputs.done):
            rate = rate if ends is None else torch.where(self.valid & ends.reshape(-1), 0.0, rate)
        return rate

    def _coefficient(self, given: Tensor | None, place: int) -> Tensor:
        if given is None:
            number = torch.as_tensor(self.numbers[place], dtype=torch.float32, device=self.rewards.device)
            return number.expand(self.rewards.shape)
        if given.shape == self.inputs.rewards.shape:
            return given.reshape(-1)
        return self.pieces.per_row(given)[self.pieces.row_of]

    def _scan(
        self, inputs: ReturnsInputs, numbers: Sequence[float] | Tensor, options: ReturnsOptions
    ) -> tuple[Tensor, Tensor | None]:
        pieces = self.pieces
        mask = pieces.extended(self.valid, self.there)
        tokens = Tokens(tuple(mask.shape), mask, pieces.extended_bounds())
        out = torch.empty_like(inputs.rewards)
        second = torch.empty_like(out) if options.kind in ("gae", "vtrace") else None
        self.kernels.scan(inputs, tokens, numbers, options, out, second)
        return pieces.stripped(out), None if second is None else pieces.stripped(second)

"""Checks of a backend's raw function of `returns` against the float64 reference: numbers, and bits."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product
from types import ModuleType
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from fastreward._arguments.options import AT_MASKED, RETURNS_KINDS, RETURNS_OPS, ReturnsInputs, ReturnsOptions
from fastreward._arguments.tokens import Tokens
from fastreward.reference import returns as reference

NUMBERS = (0.97, 0.9, 0.7, 1.1, 0.9)  # gamma, lam, scale, rho_bar, c_bar


@dataclass(frozen=True)
class Call:
    """Arguments of `scan`, on the CPU."""

    inputs: ReturnsInputs
    tokens: Tokens
    options: ReturnsOptions
    numbers: tuple[float, ...] = NUMBERS

    def results(self, module: ModuleType, device: str) -> list[Tensor]:
        def moved(x: Any) -> Any:
            return x.to(device) if isinstance(x, Tensor) else x

        tokens = Tokens(self.tokens.shape, moved(self.tokens.mask), moved(self.tokens.cu_seqlens))
        outputs = [torch.full(tokens.shape, torch.nan, device=device) for _ in range(self.count)]
        module.scan(
            ReturnsInputs(*map(moved, self.inputs)), tokens, self.numbers, self.options, outputs[0],
            outputs[1] if self.count == 2 else None,
        )  # fmt: skip
        return [x.cpu() for x in outputs]

    @property
    def count(self) -> int:
        return 2 if self.options.kind in ("gae", "vtrace") else 1


def options() -> Iterator[ReturnsOptions]:
    """Every kind at every kind of masked token, moved or not; every op; both directions."""
    for kind, at_masked, move in product(RETURNS_KINDS, AT_MASKED, (False, True)):
        yield ReturnsOptions(kind, at_masked, move=move)
    for op, at_masked in product(RETURNS_OPS, AT_MASKED):
        yield ReturnsOptions("returns", at_masked, op, reverse=False)
        if op != "sum":
            yield ReturnsOptions("returns", at_masked, op)


def call(shape: tuple[int, int], chosen: ReturnsOptions, *, packed: bool, form: int) -> Call:
    """A ragged batch with holes; `form` says which of the optional arguments there are."""
    g = torch.Generator().manual_seed(31 * form + shape[1])
    rows, columns = shape
    lengths = torch.randint(0, columns + 1, (rows,), generator=g)
    lengths[0] = columns
    mask = torch.arange(columns) < lengths.unsqueeze(1)
    mask &= (torch.rand(shape, generator=g) < 0.8) | (torch.rand((rows, 1), generator=g) < 0.4)
    mask[-1] &= torch.arange(columns) > columns // 2

    def normal() -> Tensor:
        return torch.randn(shape, generator=g)

    gae = chosen.kind in ("gae", "vtrace")
    inputs = ReturnsInputs(
        normal(),
        normal() if gae else None,
        normal() * 0.5 if chosen.kind == "vtrace" else None,
        normal() if chosen.kind == "lambda" or (gae and form % 4 == 1) else None,
        torch.rand(rows, generator=g) if form % 3 == 1 else torch.rand(shape, generator=g) if form % 3 == 2 else None,
        torch.rand(shape, generator=g) if form % 4 == 2 else None,
        torch.rand(shape, generator=g) < 0.1 if form % 4 == 3 else None,
        torch.rand(shape, generator=g) < 0.1 if form % 2 else None,
        torch.randn(rows, generator=g) if chosen.kind != "lambda" and form % 2 else None,
    )
    made = Call(inputs, Tokens(shape, None if form == 5 else mask), chosen)
    return pack(made, lengths) if packed else made


def pack(padded: Call, lengths: Tensor) -> Call:
    """The first tokens of each row, packed."""
    there = torch.arange(padded.tokens.shape[1]) < lengths.unsqueeze(1)
    bounds = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))

    def packed(x: Tensor | None) -> Tensor | None:
        return x if x is None or x.ndim == 1 else x[there]

    tokens = Tokens((int(bounds[-1]),), packed(padded.tokens.mask), bounds)
    return Call(ReturnsInputs(*map(packed, padded.inputs)), tokens, padded.options)  # type: ignore[arg-type]


def under_the_mask(given: Call, value: float) -> Call:
    """The same with `value` wherever it may not matter."""
    mask = given.tokens.mask
    if mask is None:
        return given

    def spoilt(name: str, x: Tensor | None) -> Tensor | None:
        if x is None or tuple(x.shape) != given.tokens.shape or (name == "rewards" and given.options.move):
            return x
        if name in ("gamma", "lam") and given.options.timed:
            return x
        return torch.where(mask, x, True if x.dtype == torch.bool else value)

    inputs = ReturnsInputs(**{k: spoilt(k, x) for k, x in given.inputs._asdict().items()})  # type: ignore[arg-type]
    return replace(given, inputs=inputs)


def check_numbers(
    module: ModuleType, device: str, shape: tuple[int, int], chosen: ReturnsOptions, *, packed: bool, form: int
) -> None:
    """Against the reference, and the same bits whatever lies under the mask."""
    given = call(shape, chosen, packed=packed, form=form)
    truth = reference.truth(given.inputs, given.tokens, NUMBERS, chosen)
    got = given.results(module, device)
    for x, want in zip(got, truth, strict=False):
        scale = max(1.0, float(want.abs().max())) if want.numel() else 1.0
        torch.testing.assert_close(
            x.double(), want, atol=2e-6 * scale, rtol=0, msg=lambda m: f"{chosen} {packed=} {form=}: {m}"
        )
    for x, y in zip(got, under_the_mask(given, torch.nan).results(module, device), strict=True):
        assert torch.equal(x, y), (chosen, packed, form)


def padded_by(given: Call, left: int, right: int) -> Call:
    """A padded call with more masked columns on both sides."""
    mask = torch.ones(given.tokens.shape) if given.tokens.mask is None else given.tokens.mask.float()

    def wider(x: Tensor | None) -> Tensor | None:
        return x if x is None or x.ndim == 1 else torch.nn.functional.pad(x, (left, right))

    tokens = Tokens((mask.shape[0], mask.shape[1] + left + right), wider(mask))
    return Call(ReturnsInputs(*map(wider, given.inputs)), tokens, given.options)  # type: ignore[arg-type]


def check_bits(module: ModuleType, device: str, shape: tuple[int, int], chosen: ReturnsOptions) -> None:
    """A row's bits do not depend on padding, left or right, nor on the rows beside it, nor on packing."""
    given = call(shape, chosen, packed=False, form=4)
    want = given.results(module, device)
    columns = slice(13, 13 + shape[1])
    for x, y in zip(padded_by(given, 13, 40).results(module, device), want, strict=True):
        valid = given.tokens.mask if chosen.at_masked == "decay" else slice(None)
        assert torch.equal(x[:, columns][valid], y[valid]), chosen
    full = torch.full((shape[0],), shape[1])
    for x, y in zip(pack(given, full).results(module, device), want, strict=True):
        assert torch.equal(x.reshape(shape), y), chosen
    one = Call(
        ReturnsInputs(*(None if x is None else x[1:2] for x in given.inputs)),  # type: ignore[arg-type]
        Tokens((1, shape[1]), None if given.tokens.mask is None else given.tokens.mask[1:2]),
        chosen,
    )
    for x, y in zip(one.results(module, device), want, strict=True):
        assert torch.equal(x[0], y[1]), chosen


#: What `check_blocks` is put through: options, packed, form.
BLOCKS = (
    (ReturnsOptions("gae", move=True), True, 2),
    (ReturnsOptions("gae", "reset"), False, 0),
    (ReturnsOptions("vtrace", "zero", move=True), False, 3),
    (ReturnsOptions("lambda", "decay"), True, 2),
    (ReturnsOptions("returns", "decay", reverse=False), True, 1),
    (ReturnsOptions("returns", move=True), False, 4),
    (ReturnsOptions("vtrace"), False, 5),
    (ReturnsOptions("returns", "reset", "min"), False, 3),
    (ReturnsOptions("returns", "decay", "max", reverse=False), True, 0),
)


def with_long_gaps(given: Call) -> Call:
    """A padded call of two rows that have whole blocks without a valid token: inside the first, around the second's.

    Without a mask it is one without next values: those of the tokens themselves go from block to block.
    """
    if given.tokens.mask is None:
        return replace(given, inputs=given.inputs._replace(next_values=None))
    mask, columns = given.tokens.mask.clone(), given.tokens.shape[1]
    mask[0, columns // 4 : columns // 4 + columns // 2 + 1] = False
    mask[1] = (torch.arange(columns) - columns // 2).abs() < columns // 20
    return replace(given, tokens=Tokens(given.tokens.shape, mask))


def check_blocks(
    module: ModuleType, device: str, columns: int, chosen: ReturnsOptions, packed: bool, form: int
) -> None:
    """A program per block gives the bits of a program per row; minima and maxima, undiscounted, are the reference's."""
    given = with_long_gaps(call((2, columns), chosen, packed=False, form=form))
    given = pack(given, torch.tensor([columns - 3, columns])) if packed else given
    if chosen.op != "sum":
        given = replace(given, numbers=(1.0, *NUMBERS[1:]))
        want = reference.truth(given.inputs, given.tokens, given.numbers, chosen)[0].float()
        assert torch.equal(given.results(module, device)[0], want), (chosen, packed, form)
    with mock.patch.object(module, "few_and_long", return_value=False):
        rows = given.results(module, device)
    with mock.patch.object(module, "few_and_long", return_value=True):
        for x, y in zip(given.results(module, device), rows, strict=True):
            assert torch.equal(x.view(torch.int32), y.view(torch.int32)), (chosen, packed, form)


def check_products_beyond_float32(module: ModuleType, device: str) -> None:
    """Rewards of 0 stay 0 under any discount."""
    x, got = torch.zeros(1, 21, device=device), torch.empty(1, 21, device=device)
    x[0, 2] = 1.0
    module.scan(ReturnsInputs(x), Tokens((1, 21)), (1e10, *NUMBERS[1:]), ReturnsOptions(), got, None)
    torch.testing.assert_close(got[0, :3].cpu(), torch.tensor([1e20, 1e10, 1.0]))
    assert not got[0, 3:].any()

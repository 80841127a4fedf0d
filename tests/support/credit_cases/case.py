"""A case, and small random data for it."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

ROWS, COLUMNS = 8, 6
Arguments = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """A recipe, the loops that it is compared with, and what holds for it.

    options: further arguments of both, the same for every seed. tolerance: relative and absolute, against the loops;
    1e-6 is float32's. unmoved_by_shift, unmoved_by_scale: arguments to which a constant (for each group its own) may be
    added, or which may be multiplied by 4, without a change, but for an eps; scales_with: the result is multiplied by 4
    with these. law: further assertions on (arguments, result): sums that telescope, bounds. of_the_batch: a statistic
    of the whole batch is in it, so a group is not on its own. rows_matter: rows may not change places (arguments name
    rows). places_matter: columns may not move (absolute positions). fixed: arguments with 8 entries that are not rows.
    """

    recipe: Callable[..., Any]
    reference: Callable[..., Any]
    make: Callable[[random.Random], Arguments]
    options: Arguments = field(default_factory=dict)
    tolerance: float = 2e-6
    unmoved_by_shift: tuple[str, ...] = ()
    unmoved_by_scale: tuple[str, ...] = ()
    scales_with: tuple[str, ...] = ()
    law: Callable[[Arguments, Tensor], None] | None = None
    of_the_batch: bool = False
    rows_matter: bool = False
    places_matter: bool = False
    fixed: tuple[str, ...] = ()

    def arguments(self, seed: int) -> Arguments:
        return self.make(random.Random(seed)) | self.options

    def __call__(self, arguments: Arguments) -> Tensor:
        result: Tensor = self.recipe(**arguments)
        return result

    def expected(self, arguments: Arguments) -> Tensor:
        """The loops' answer, float64."""
        return torch.tensor(self.reference(**{name: _plain(x) for name, x in arguments.items()}), dtype=torch.float64)


def _plain(x: Any) -> Any:
    """Tensors as nested lists, also in a sequence of them."""
    if isinstance(x, Tensor):
        return x.tolist()
    return [_plain(item) for item in x] if isinstance(x, list | tuple) else x


# ---------------------------------------------------------------------------------------------------------------- data
def groups(rng: random.Random) -> list[str]:
    """Of 4, 3 and 1, mixed."""
    return rng.sample("aaaabbbc", ROWS)


def scores(rng: random.Random, *, binary: bool = False, nan: bool = False) -> Tensor:
    """[B]: 0 or 1, or multiples of 1/8 from -1 to 2; with nan, two of them are not there."""
    values = [float(rng.randrange(2)) if binary else rng.randrange(-8, 17) / 8 for _ in range(ROWS)]
    for b in rng.sample(range(ROWS), 2) if nan else ():
        values[b] = float("nan")
    return torch.tensor(values)


def rollout_mask(rng: random.Random, columns: int = COLUMNS) -> Tensor:
    """bool [B, columns]: a full row, an empty one, one with a token, and ragged ones with holes."""
    rows = [[True] * columns, [False] * columns, [t == columns // 2 for t in range(columns)]]
    while len(rows) < ROWS:
        length = rng.randrange(1, columns + 1)
        rows.append([t < length and rng.random() < 0.8 for t in range(columns)])
    return torch.tensor(rng.sample(rows, ROWS))


def floats(rng: random.Random, *shape: int, low: float = -1.0, high: float = 1.0, mask: Tensor | None = None) -> Tensor:
    """float32 of `shape`, [B] or the mask's shape and `shape`; NaN where the mask is 0."""
    sizes = (*(mask.shape if mask is not None else () if shape else (ROWS,)), *shape)
    x = torch.empty(sizes).flatten()
    for i in range(len(x)):
        x[i] = rng.uniform(low, high)
    x = x.view(sizes)
    return x if mask is None else x.masked_fill(~mask.view(*mask.shape, *(1 for _ in shape)), torch.nan)


def logprobs(rng: random.Random, mask: Tensor, *shape: int) -> Tensor:
    """float32 of the mask's shape and `shape`, from -2 to -0.05."""
    return floats(rng, *shape, low=-2.0, high=-0.05, mask=mask)


def segments(rng: random.Random, mask: Tensor) -> Tensor:
    """Integers of the mask's shape: steps 0, 1, ... from left to right, -1 where the mask is 0."""
    return torch.tensor([_steps(rng, row) for row in mask.tolist()])


def _steps(rng: random.Random, row: Sequence[bool]) -> list[int]:
    found, step, begun = [], 0, False
    for here in row:
        step += begun and here and rng.random() < 0.5
        begun |= here
        found.append(step if here else -1)
    return found

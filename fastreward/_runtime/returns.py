"""Custom ops of returns, GAE, lambda-returns and V-trace; they have no gradient."""

from __future__ import annotations

from typing import Any, Final

import torch
from torch import Tensor

from fastreward._arguments.numbers import joined_all
from fastreward._arguments.options import ReturnsInputs, ReturnsOptions
from fastreward._arguments.tokens import Tokens
from fastreward._runtime.custom_op import custom_op
from fastreward._runtime.dispatch import implementation
from fastreward._runtime.memory import empty, empty_like

#: Kinds with two results.
_PAIRS: Final = ("gae", "vtrace")


@custom_op("returns_", mutates_args=("out", "second"))
def returns_(
    inputs: ReturnsInputs,  # [B, T], or [N] with cu_seqlens
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    numbers: list[float],  # gamma, lam, scale, rho_bar, c_bar
    given_numbers: Tensor | None,  # f64 [5]: instead of them, where the host does not know all
    options: str,
    whiten: bool,
    out: Tensor,
    second: Tensor | None,
    backend: str,
) -> None:
    _scan(inputs, mask, cu_seqlens, numbers, given_numbers, options, whiten, out, second, backend)
    for x in (out, second):
        if x is not None:
            torch.autograd.graph.increment_version(x)


@returns_.register_fake
def _(*_: Any) -> None:
    return None


@custom_op("returns")
def returns(
    inputs: ReturnsInputs,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    numbers: list[float],
    given_numbers: Tensor | None,
    options: str,
    whiten: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:  # the second is [0] where there is one result
    out = empty_like(inputs.rewards)
    second = empty_like(inputs.rewards) if _has_pair(options) else None
    _scan(inputs, mask, cu_seqlens, numbers, given_numbers, options, whiten, out, second, backend)
    return out, empty((0,), out.dtype, out.device) if second is None else second


@returns.register_fake
def _(inputs_rewards: Tensor, options: str) -> tuple[Tensor, Tensor]:
    out = torch.empty_like(inputs_rewards)
    return out, torch.empty_like(out) if _has_pair(options) else out.new_empty((0,))


def _has_pair(options: str) -> bool:
    return options.split("|")[0] in _PAIRS


def _scan(
    inputs: ReturnsInputs,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    numbers: list[float],
    given: Tensor | None,
    options: str,
    whiten: bool,
    out: Tensor,
    second: Tensor | None,
    backend: str,
) -> None:
    tokens = Tokens(tuple(inputs.rewards.shape), mask, cu_seqlens)
    known = joined_all(numbers, given, backend)
    implementation("returns", backend).scan(inputs, tokens, known, ReturnsOptions.of(options), out, second)
    if whiten:
        implementation("whiten", backend).forward(out, mask, True, 1, 1e-8, out)

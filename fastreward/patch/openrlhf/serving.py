"""What the replacements share: which calls they take, and the way on to OpenRLHF's own function for all others."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

from fastreward._arguments.transforms import transformed
from fastreward._runtime.masks import zeros_and_ones
from fastreward.patch.bindings import Report
from fastreward.patch.usage import handed_on

P = ParamSpec("P")
R = TypeVar("R")


class NotServed(Exception):
    """This call is OpenRLHF's: nothing has been done yet."""


def need(condition: bool) -> None:
    """Hands the call on unless this holds."""
    if not condition:
        raise NotServed


@dataclass(frozen=True, slots=True)
class Serving:
    """Makes the replacements of one applied patch. devices: the kinds of device whose tensors they take."""

    report: Report
    devices: tuple[str, ...]

    def replacement(
        self,
        target: str,
        ours: Callable[P, R],
        stock: Callable[P, R],
        tokens: Callable[P, int],
        *,
        refusals: tuple[type[Exception], ...] = (TypeError, ValueError),
    ) -> Callable[P, R]:
        """`ours`, counted as `target`; what it or fastreward refuses goes to `stock`, which answers or refuses itself.

        refusals: besides NotServed, and told once. fastreward checks before it acts, so a refused call has changed
        nothing.
        """

        handed: tuple[type[Exception], ...] = (NotServed, *refusals)

        @functools.wraps(stock)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            try:
                return ours(*args, **kwargs)
            except handed as refusal:
                error = refusal
            handed_on()  # outside of the except clause, so that an error of theirs does not show ours as its context
            result = stock(*args, **kwargs)
            if not isinstance(error, NotServed):
                self.report.refused(target, error)
            return result

        return self.report.counted(target, call, tokens)

    def takes(self, x: Any, *dtypes: torch.dtype) -> None:
        """That `x` is an ordinary tensor of one of these dtypes, on a device that is served."""
        need(type(x) in (Tensor, torch.nn.Parameter) and x.dtype in dtypes and x.device.type in self.devices)
        need(not transformed())  # torch's own code has a forward-mode derivative, and runs under vmap

    def tokens(self, x: Any, *constants: Any) -> None:
        """That `x` is f32 [B, T], and the constants are floating tensors like it, without a gradient."""
        self.takes(x, torch.float32)
        need(x.ndim == 2 and x.numel() > 0)
        for other in constants:
            self.takes(other, torch.float32, torch.bfloat16, torch.float16)
            need(other.shape == x.shape and other.device == x.device)
            need(not (torch.is_grad_enabled() and other.requires_grad))

    def mask(self, mask: Any, like: Tensor) -> None:
        """That the mask has the shape of `like` and is 0 or 1 everywhere, for OpenRLHF multiplies by it.

        On a GPU, where looking would wait for it, it is taken to be.
        """
        self.takes(mask, torch.bool, torch.uint8, torch.int32, torch.int64, torch.float32)
        need(mask.shape == like.shape and mask.device == like.device and not mask.requires_grad)
        if mask.dtype == torch.bool or mask.device.type != "cpu":
            return
        need(zeros_and_ones(mask))


def elements(x: Tensor, *_: Any, **__: Any) -> int:
    """Tokens of a call whose first argument has one element for each."""
    return x.numel()

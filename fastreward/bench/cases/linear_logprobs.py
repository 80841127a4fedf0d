"""linear_token_logprobs: log-probs and entropy from hidden states and the LM head, forward and forward + backward.

The GEMMs are everybody's same library calls; what differs is what happens between them, and the memory.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor

from fastreward.bench import peers, roofline
from fastreward.bench.case import OURS, Case, Contender
from fastreward.bench.cases._steps import Tensors, worst_of_rows
from fastreward.linear_logprobs import linear_token_logprobs
from fastreward.reference import logprobs as reference
from fastreward.verify import eager
from fastreward.verify.error import sampled_rows

CASES = ("forward", "backward")
DTYPES = ("float32", "bfloat16")
SHAPE = (512, 512, 151_936)
QUICK = (64, 64, 4096)

_TRL_CHUNK = 8192
_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.05, torch.float16: 0.01}


@lru_cache(maxsize=1)
def _data(dtype: torch.dtype, shape: tuple[int, ...], device: str) -> Tensors:
    """hidden [N, H], weight [V, H], labels [N], upstream gradient of the log-probs [N]."""
    rows, width, vocab = shape
    generator = torch.Generator(device=device).manual_seed(0)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, device=device)

    weight = (normal(vocab, width) * (2 / width**0.5)).to(dtype)
    labels = torch.randint(0, vocab, (rows,), generator=generator, device=device)
    return normal(rows, width).to(dtype), weight, labels, normal(rows)


def build(case: str, dtype: torch.dtype, shape: tuple[int, ...], device: str) -> Case:
    """One case of CASES at `shape` [N, H, V]."""
    rows, width, vocab = shape
    hidden, weight, labels, upstream = _data(dtype, shape, device)
    backward = case == "backward"
    built = Case(
        operation="linear_logprobs",
        name=case,
        dtype=str(dtype).removeprefix("torch."),
        shape=shape,
        traffic=roofline.linear_logprobs(rows, width, vocab, hidden.element_size(), backward),
        error=partial(worst_of_rows, _truth(hidden, weight, labels, upstream, backward), backward),
        contenders=[],
        tolerance=_TOLERANCE[dtype],
        inputs=[hidden, weight, labels, upstream],
        gemm=(hidden, weight[:_TRL_CHUNK].t()),
    )
    for name, make in (
        (OURS, _ours),
        ("torch eager", lambda: _eager),
        ("torch.compile", lambda: peers.compiled(_eager)),
        ("TRL", _trl),
        ("verl", _verl),
        ("liger-kernel", _liger),
    ):
        peers.add(built, name, partial(_contender, name, make, (hidden, weight, labels), upstream, backward, dtype))
    return built


def _contender(
    name: str,
    make: Callable[[], Callable[..., Any]],
    inputs: Tensors,
    upstream: Tensor,
    backward: bool,
    dtype: torch.dtype,
) -> Contender:
    function = make()

    def forward() -> Tensors:
        with torch.no_grad():
            return tuple(function(*inputs))

    def forward_backward() -> Tensors:
        hidden, weight = (x.detach().requires_grad_() for x in inputs[:2])
        logprobs, entropy = function(hidden, weight, inputs[2])
        grads = torch.autograd.grad(logprobs, (hidden, weight), upstream.to(logprobs.dtype))
        return (logprobs.detach(), entropy.detach(), *grads)

    tolerance = None if name == OURS else max(10 * _TOLERANCE[dtype], 0.1 if dtype != torch.float32 else 0.0)
    call = forward_backward if backward else forward
    return Contender(name, call, tolerance=tolerance, compiled=name == "torch.compile")


def _ours() -> Callable[..., Any]:
    return partial(linear_token_logprobs, outputs=("logprobs", "entropy"))


def _eager(hidden: Tensor, weight: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    return eager.logprobs_and_entropy(eager.linear_logits(hidden, weight).float(), labels)


def _trl() -> Callable[..., Any]:
    kernels = peers.load("TRL", "trl.kernels")

    def call(hidden: Tensor, weight: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        function = kernels.ChunkedLogProbFunction.apply
        logprobs, entropy, *_ = function(hidden, weight, None, labels, 1.0, _TRL_CHUNK, None, 1.0, ("entropy",))
        return logprobs, entropy

    return call


def _verl() -> Callable[..., Any]:
    fused = peers.load("verl", "verl.utils.experimental.torch_functional").FusedLinearForPPO()

    def call(hidden: Tensor, weight: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        logprobs, entropy = fused(hidden.unsqueeze(0), weight, labels.unsqueeze(0))
        return logprobs.squeeze(0), entropy.squeeze(0)

    return call


def _liger() -> Callable[..., Any]:
    function = peers.load("liger-kernel", "liger_kernel.ops").LigerFusedLinearScaledCrossEntropyFunction

    def call(hidden: Tensor, weight: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        nll, entropy = function.apply(hidden, weight, labels, 1.0, -100, 1, True)
        return -nll, entropy

    return call


def _truth(hidden: Tensor, weight: Tensor, labels: Tensor, upstream: Tensor, backward: bool) -> tuple[Tensor, Tensors]:
    """Rows that are looked at, and what they should be (the weight's gradient needs all rows: `verify` looks at it)."""
    rows = sampled_rows(len(labels), hidden.device)
    h = hidden[rows].double().requires_grad_(backward)
    out = reference.token_logprobs(eager.linear_logits(h, weight.double()), labels[rows])
    expected = [out["logprobs"].detach(), out["entropy"].detach()]
    if backward:
        expected += torch.autograd.grad(out["logprobs"], h, upstream[rows].double())
    return rows, tuple(expected)

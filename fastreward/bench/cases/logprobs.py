"""token_logprobs: forward, forward with entropy, and forward + backward in place and with a fresh gradient."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor

from fastreward.bench import peers, roofline
from fastreward.bench.case import OURS, Case, Contender, Target
from fastreward.bench.cases._steps import Tensors, worst_of_rows
from fastreward.logprobs import token_logprobs
from fastreward.reference import logprobs as reference
from fastreward.verify import eager
from fastreward.verify.error import sampled_rows

CASES = ("forward", "forward+entropy", "backward-inplace", "backward-fresh")
DTYPES = ("float32", "bfloat16")
SHAPE = (2048, 151_936)
QUICK = (64, 8192)

_WITHOUT_ENTROPY = f"{OURS} (no entropy)"
_TRL_SEQUENCES = 8  # TRL takes [B, T, V], verl [N, V]
#: Peers answer in the logits' dtype: entropies near 12 in bf16 are up to 0.4 nat off.
_PEER_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.02}
_TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}


@lru_cache(maxsize=1)
def _data(dtype: torch.dtype, shape: tuple[int, int], device: str) -> tuple[Tensor, Tensor, Tensor]:
    """logits [N, V], labels [N], upstream gradient [N]; kept for the next case of the same size."""
    generator = torch.Generator(device=device).manual_seed(0)
    logits = torch.empty(shape, dtype=dtype, device=device)
    for start in range(0, shape[0], 64):  # in blocks: no float32 copy of a bf16 matrix
        block = logits[start : start + 64]
        block.copy_(torch.randn(block.shape, generator=generator, device=device) * 2)
    labels = torch.randint(0, shape[1], shape[:1], generator=generator, device=device)
    return logits, labels, torch.randn(shape[0], generator=generator, device=device)


def build(case: str, dtype: torch.dtype, shape: tuple[int, ...], device: str) -> Case:
    """One case of CASES on logits `shape` [N, V]."""
    rows, vocab = shape
    logits, labels, upstream = _data(dtype, (rows, vocab), device)
    backward, entropy = case.startswith("backward"), case == "forward+entropy"
    formula = roofline.logprobs_forward_backward if backward else roofline.logprobs_forward
    built = Case(
        operation="logprobs",
        name=case,
        dtype=str(dtype).removeprefix("torch."),
        shape=shape,
        traffic=formula(rows, vocab, logits.element_size(), 1 + entropy),
        error=partial(worst_of_rows, _truth(logits, labels, upstream, backward, entropy), backward),
        contenders=[],
        tolerance=_TOLERANCE[dtype] if backward else _TOLERANCE[torch.float32],
        inputs=[logits, labels, upstream],
        targets=_targets(case, dtype),
    )
    if backward:
        _ours_backward(built, logits, labels, upstream, case == "backward-inplace")
    else:
        _ours_forward(built, logits, labels, entropy)
    for name, function in _peers(built, entropy, device).items():
        call = partial(_backward, function, logits, labels, upstream) if backward else partial(function, logits, labels)
        built.contenders.append(
            Contender(name, call, tolerance=_PEER_TOLERANCE[dtype], compiled=name == "torch.compile")
        )
    return built


# ------------------------------------------------------------------------------------------------------- contenders
def _ours_forward(case: Case, logits: Tensor, labels: Tensor, entropy: bool) -> None:
    plain = ("logprobs",)
    outputs = ("logprobs", "entropy") if entropy else plain
    case.contenders.append(Contender(OURS, lambda: tuple(token_logprobs(logits, labels, outputs=outputs))))
    if entropy:  # timed in the same rounds: what the entropy costs
        alone = Contender(_WITHOUT_ENTROPY, lambda: tuple(token_logprobs(logits, labels, outputs=plain)))
        case.contenders.append(alone)


def _ours_backward(case: Case, logits: Tensor, labels: Tensor, upstream: Tensor, inplace: bool) -> None:
    work = torch.empty_like(logits) if inplace else logits

    def call() -> Tensors:
        leaf = work.detach().requires_grad_()
        logprobs = token_logprobs(leaf, labels, inplace_backward=inplace).logprobs
        (grad,) = torch.autograd.grad(logprobs, leaf, upstream)
        return logprobs.detach(), grad

    def restore() -> None:
        if inplace:
            work.copy_(logits)

    case.inputs.append(work)
    case.contenders.append(Contender(OURS, call, restore))


def _backward(function: Callable[..., Any], logits: Tensor, labels: Tensor, upstream: Tensor) -> Tensors:
    leaf = logits.detach().requires_grad_()
    (logprobs,) = function(leaf, labels)
    (grad,) = torch.autograd.grad(logprobs, leaf, upstream.to(logprobs.dtype))
    return logprobs.detach(), grad


def _peers(case: Case, entropy: bool, device: str) -> dict[str, Callable[..., Any]]:
    """Peer -> f(logits, labels) giving (logprobs,) or (logprobs, entropy)."""
    found: dict[str, Callable[..., Any]] = {"torch eager": _obvious(entropy)}
    wide = _obvious(entropy)
    found["torch.compile"] = peers.compiled(lambda logits, labels: wide(logits.float(), labels))
    for name, find in (("TRL", _trl), ("verl", _verl)):
        try:
            found[name] = find(entropy)
        except peers.Absent as reason:
            case.absent[name] = str(reason)
    case.absent["liger-kernel"] = "no such function from logits" if device == "cuda" else "Triton only, no CPU form"
    return found


def _obvious(entropy: bool) -> Callable[..., Any]:
    if entropy:
        return eager.logprobs_and_entropy
    return lambda logits, labels: (eager.gather_minus_logsumexp(logits, labels),)


def _trl(entropy: bool) -> Callable[..., Any]:
    utils = peers.load("TRL", "trl.trainer.utils")

    def call(logits: Tensor, labels: Tensor) -> Tensors:
        sequences = _TRL_SEQUENCES if len(labels) % _TRL_SEQUENCES == 0 else 1
        logits, labels = logits.view(sequences, -1, logits.shape[-1]), labels.view(sequences, -1)
        logprobs = utils.selective_log_softmax(logits, labels).flatten()
        return (logprobs, utils.entropy_from_logits(logits).flatten()) if entropy else (logprobs,)

    return call


def _verl(entropy: bool) -> Callable[..., Any]:
    functions = peers.load("verl", "verl.utils.torch_functional")

    def call(logits: Tensor, labels: Tensor) -> Tensors:
        logprobs = functions.logprobs_from_logits(logits, labels, inplace_backward=False)
        return (logprobs, functions.entropy_from_logits(logits)) if entropy else (logprobs,)

    return call


# ------------------------------------------------------------------------------------------------------------ truth
def _truth(logits: Tensor, labels: Tensor, upstream: Tensor, backward: bool, entropy: bool) -> tuple[Tensor, Tensors]:
    """Rows that are looked at, and what they should be (the reference holds [rows, V] in float64: a few rows do)."""
    rows = sampled_rows(len(labels), logits.device)
    x = logits[rows].double().requires_grad_(backward)
    out = reference.token_logprobs(x, labels[rows])
    expected = [out["logprobs"]] + ([out["entropy"]] if entropy else [])
    if backward:
        expected += torch.autograd.grad(out["logprobs"], x, upstream[rows].double())
    return rows, tuple(e.detach() for e in expected)


def _targets(case: str, dtype: torch.dtype) -> tuple[Target, ...]:
    if case == "forward":
        read = (Target("share", 0.75),) if dtype == torch.float32 else ()
        speed = [Target("speedup", *t) for t in ((1.5, "torch.compile"), (4.0, "TRL"), (4.0, "verl"))]
        return (*speed, *read, Target("memory", 1 << 20), Target("share", 0.9, device="cuda"))
    if case == "forward+entropy":
        return (Target("ratio", 1.15, _WITHOUT_ENTROPY), Target("share", 0.9, device="cuda"))
    if case == "backward-inplace":
        inplace = (Target("speedup", 4.0, "torch.compile"), Target("memory", 8 << 20))
        return (*inplace, Target("share", 0.85, device="cuda"))
    return (Target("speedup", 2.0, "torch.compile"), Target("share", 0.85, device="cuda"))

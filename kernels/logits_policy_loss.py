"""From logits to the gradient of a loss for the logits in one kernel, for losses whose gradient at a token needs no
other token's log-prob first.

Fused: log-softmax, gather, entropy, all operators of the loss and of its derivative, the backward of log-softmax.
A row of logits is read from memory once: its second sweep finds it in the L2 cache, as far as the rows in flight fit
there, and goes backwards, so that what does not fit is at least not all of it. Nothing but log-prob and entropy is
stored between, and the loss and its metrics are then `program.run` on those (16 bytes a token).

Bytes a row, e = bytes per logit: 2 e V (e V read, e V written; e V more from L2); a masked row is only written, and a
token without a gradient (clipped, zero advantage) is read once. Where the loss needs lengths or group sums of what is
known before, a pass over the mask or over those comes first.

Raw form: `run`. `rescale` corrects a stored gradient when the upstream one turns out different, on the device.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastreward._arguments.tokens import Tokens
from fastreward.language.program import Program

from ._shared.launch import OPTIONS, in_units, load_width, on_device_of, temperature_arguments
from .program.logits_source import generate
from .program.module import load
from .program.run import Call

__all__ = ["rescale", "run"]

# --------------------------------------------------------------------------------------------------------- config
# 8 warps and blocks of 4096 columns, as in logprobs.py: a token's log-prob has the same bits here and there, so that
# the ratio to log-probs from there is exactly 1 before the first update. Programs take the rows in turn; there are so
# many that each SM has 16 KiB of loads in flight, and more where the rows that are then in flight fit half the L2.
WARPS = 8
LANES = 32 * WARPS
BLOCK = 4096
IN_FLIGHT = 16384  # bytes per SM
MOST_PER_SM = 4
RESCALE_PROGRAMS = 1056


def _programs(logits: Tensor) -> int:
    """How many programs share the rows; results do not depend on it."""
    if not logits.is_cuda:  # interpreted, or compiled for a GPU that is not there
        return min(logits.shape[0], 3)
    device = torch.cuda.get_device_properties(logits.device)
    sms, row = device.multi_processor_count, logits.shape[1] * logits.element_size()
    enough: int = triton.cdiv(IN_FLIGHT, BLOCK * logits.element_size())
    fitting = device.L2_cache_size // 2 // (sms * row)
    return min(logits.shape[0], sms * max(enough, min(fitting, MOST_PER_SM)))


# --------------------------------------------------------------------------------------------------------- kernel
@triton.jit(do_not_specialize=["grad_units", "N", "vocab_units"])
def _rescale_kernel(
    grad_logits, grad_units,  # [N, V], in and out; row stride grad_units * GRAD_UNIT
    upstream, applied,  # f32 []
    N, vocab_units,  # V = vocab_units * VEC
    BLOCK: tl.constexpr, VEC: tl.constexpr, GRAD_UNIT: tl.constexpr,
):  # fmt: skip
    """Nothing at all where the two scales are equal; else 2 bytes a byte of gradient. A 0 stays 0."""
    wanted = tl.load(upstream)
    there = tl.load(applied)
    if wanted == there:
        return
    factor = wanted / there
    V = vocab_units * VEC
    columns = tl.arange(0, BLOCK)
    for row in range(tl.program_id(0), N, tl.num_programs(0)):
        grad_row = grad_logits + tl.cast(row, tl.int64) * grad_units * GRAD_UNIT
        for start in range(0, V, BLOCK):
            here = start + columns
            x = tl.load(grad_row + here, mask=here < V, other=0.0).to(tl.float32)
            tl.store(grad_row + here, tl.where(x == 0.0, 0.0, x * factor).to(grad_row.dtype.element_ty), mask=here < V)


# --------------------------------------------------------------------------------------------------------- launch
def run(
    program: Program,  # of losses._objective.TokenGradient: outputs are derivatives for what `gradients` names
    logits: Tensor,  # [N, V] f32, bf16 or f16, unit column stride; N tokens in the order of `tokens`
    labels: Tensor,  # i64 [N]
    inv_temperature: Tensor | float,  # f64 [N], stride 0 allowed
    inputs: Sequence[Tensor | None],  # one per program.inputs, as in program.run; None for logprob and entropy
    tokens: Tokens,
    scalars: Sequence[float],  # values of program.scalars
    groups: Tensor | None,  # i64 [B], numbers 0 .. G - 1 in any order
    scale: Tensor,  # f32 []: the upstream gradient of the loss
    out: Tensor,  # [N, V], dtype of logits, unit column stride; may be logits
    gradients: Sequence[str],  # of "logprob", "entropy", in this order
    entropy: bool,  # whether entropies are computed: wherever the program reads them or has their gradient
) -> tuple[Tensor, Tensor]:
    """Writes d loss / d logits * scale into `out`; 0 in masked rows, which are not read.

    Returns log-probs f32 [N], and entropies f32 [N] or [0] where not `entropy`; 0 where masked out. An illegal label
    has log-prob NaN, and its row a gradient of NaN.
    """
    size, vocab = logits.shape
    logprobs = torch.empty(size, dtype=torch.float32, device=logits.device)
    entropies = torch.empty(size if entropy else 0, dtype=torch.float32, device=logits.device)
    if size == 0 or vocab == 0:
        return logprobs, entropies
    generated = generate(program, tuple(gradients))
    module = load("logits", generated.source)
    call = Call(program, inputs, [tokens], scalars, groups, like=logits)
    (tokens,) = call.sides
    call.launch(module, generated, len(generated.launches) - 1)
    call.named["row_of_token"] = _row_of_token(tokens, size)
    vec = load_width(logits)
    inv_t, inv_t_stride, has_inv_t = temperature_arguments(inv_temperature)
    units, unit = in_units(logits.stride(0), vec)
    out_units, out_unit = in_units(out.stride(0), vec)
    packed = tokens.cu_seqlens is not None
    with on_device_of(logits):
        module.logits_gradient[(_programs(logits),)](
            *(call.argument(a, tokens) for a in generated.launches[-1].arguments),
            logits, labels.contiguous(), inv_t, scale, logprobs, entropies, out,
            units, inv_t_stride, out_units, size, vocab // vec, 1 if packed else tokens.shape[1], tokens.rows,
            PACKED=packed, HAS_MASK=tokens.mask is not None, HAS_INV_T=has_inv_t, ENTROPY=entropy,
            STEPS=BLOCK // (LANES * vec), LANES=LANES, VEC=vec, LOGITS_UNIT=unit, GRAD_UNIT=out_unit,
            num_warps=WARPS, **OPTIONS,
        )  # fmt: skip
    return logprobs, entropies


def _row_of_token(tokens: Tokens, size: int) -> Tensor | None:
    """i64 [N]: which sequence a packed token belongs to."""
    if tokens.cu_seqlens is None:
        return None
    at = torch.arange(size, device=tokens.cu_seqlens.device)
    last = max(tokens.rows - 1, 0)
    return torch.searchsorted(tokens.cu_seqlens[1:].contiguous(), at, right=True).clamp_(max=last)


def rescale(
    grad: Tensor,  # [N, V], in and out, unit column stride
    upstream: Tensor,  # f32 []: the scale that is wanted
    applied: Tensor,  # f32 []: the scale that `run` was given; what 0 has erased cannot be brought back
) -> None:
    """Multiplies a stored gradient by upstream / applied; the device compares, and does nothing where they agree.

    A 0 stays 0 whatever the ratio is: masked rows of an upstream gradient that has overflowed, everything of scale 0.
    """
    size, vocab = grad.shape
    if size == 0 or vocab == 0:
        return
    vec = load_width(grad)
    units, unit = in_units(grad.stride(0), vec)
    with on_device_of(grad):
        _rescale_kernel[(min(size, RESCALE_PROGRAMS),)](
            grad, units, upstream, applied, size, vocab // vec,
            BLOCK=BLOCK, VEC=vec, GRAD_UNIT=unit, num_warps=WARPS, **OPTIONS,
        )  # fmt: skip

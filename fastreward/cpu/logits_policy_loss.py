"""CPU backend of `logits_policy_loss`: torch tensors to pointers for csrc/cpu/logits_policy_loss.cpp."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import isfinite

import torch
from torch import Tensor

from fastreward import _core
from fastreward._arguments.tokens import Tokens
from fastreward.cpu import program as programs
from fastreward.cpu.logprobs import _rows
from fastreward.cpu.program.encode import ByKey, encode
from fastreward.language.program import Program, TokenPart, token_part


def run(
    program: Program,  # its outputs: the loss's derivatives for what `gradients` names, per token
    logits: Tensor,  # [N, V] f32/bf16/f16, unit column stride, any row stride
    labels: Tensor,  # [N] i64
    inv_temperature: float | Tensor,  # scalar or [N] f64
    inputs: Sequence[Tensor | None],  # of the program, f32; None for logprob and entropy
    tokens: Tokens,  # N of them; a masked one's row is not read, its gradient is 0
    scalars: Sequence[float],
    groups: Tensor | None,  # [B] i64
    scale: Tensor,  # [] f32, multiplies the gradient
    out: Tensor,  # [N, V] like logits, or logits itself
    gradients: Sequence[str],  # of "logprob", "entropy", in this order
    entropy: bool,  # whether entropies are computed: wherever the program reads them or has their gradient
) -> tuple[Tensor, Tensor]:
    """Writes the logits' gradient to `out`; (logprobs f32 [N], entropy f32 [N], or [0] where not asked for)."""
    split = _split(program)
    rows = logits.shape[0]
    mask = None if tokens.mask is None else (tokens.mask.reshape(-1) != 0)
    described, alive = _rows(logits, labels, inv_temperature, mask, None, None, None)
    logprobs = torch.empty(rows, dtype=torch.float32, device="cpu")
    entropies = torch.empty(rows if entropy else 0, dtype=torch.float32, device="cpu")
    values = _before(split, program, inputs, tokens, scalars, groups)
    named = split.names
    given = [
        logprobs if name in ("logprob", "entropy") else values[~source] if source < 0 else inputs[source]
        for name, source in zip(named, split.part.sources, strict=True)
    ]
    code = encode(split.part.token)
    _core.logits_policy_loss(
        rows=described,
        code=code.code,
        inputs=[0 if x is None else x.data_ptr() for x in given],
        logprob=_place("logprob", named),
        entropy=_place("entropy", named),
        logprob_gradient=_place("logprob", gradients),
        entropy_gradient=_place("entropy", gradients),
        scalars=[scalars[k] for k in split.part.scalars[1]],
        scale=float(scale),
        logprobs=logprobs.data_ptr(),
        entropies=entropies.data_ptr() if entropy else 0,
        grad_logits=out.data_ptr(),
        grad_stride=out.stride(0),
    )
    del alive
    return logprobs, entropies


def _place(name: str, names: Sequence[str]) -> int:
    return names.index(name) if name in names else -1


def rescale(grad: Tensor, upstream: Tensor, applied: Tensor) -> None:
    """grad [N, V] *= upstream / applied, rounded once; nothing is done where they are equal. A 0 stays 0."""
    if bool(upstream == applied):
        return
    factor = float(upstream.double() / applied)
    if isfinite(factor):
        grad.mul_(factor)
    else:  # a loss scale that overflowed
        grad.copy_(torch.where(grad == 0, 0.0, grad * factor))


def _before(
    split: _Split,
    program: Program,
    inputs: Sequence[Tensor | None],
    tokens: Tokens,
    scalars: Sequence[float],
    groups: Tensor | None,
) -> list[Tensor]:
    """Values that the last pass reads of its sequences, once a token [N] f32."""
    part = split.part
    if not part.before.outputs and not part.before.batch:
        return []
    by_name = {(n.name, n.level): x for n, x in zip(program.inputs, inputs, strict=True)}
    given = [x for n in part.before.inputs if (x := by_name[n.name, n.level]) is not None]
    own = [scalars[k] for k in part.scalars[0]]
    rows, batch = programs.run(part.before, given, [tokens], own, groups)
    count = torch.Size(tokens.shape).numel()
    return [x.reshape(-1).contiguous() for x in (*map(tokens.broadcast, rows), *(x.expand(count) for x in batch))]


@dataclass(frozen=True, eq=False)
class _Split:
    """A program in two parts."""

    part: TokenPart
    names: tuple[str, ...]  # of the token part's inputs


def _split(program: Program) -> _Split:
    return _split_by_key(ByKey(program.key, program))


@lru_cache(maxsize=256)
def _split_by_key(key: ByKey) -> _Split:
    part = token_part(key.program)
    return _Split(part, tuple(n.name or "" for n in part.token.inputs))

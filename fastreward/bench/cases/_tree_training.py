"""A training step of a small Qwen2 on a packed prefix tree, beside the same step on the flat batch."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastreward.bench import peers, roofline
from fastreward.bench.case import OURS, Case, Contender, Target
from fastreward.bench.cases._rollouts import rollouts
from fastreward.logprobs import token_logprobs
from fastreward.policy_loss import policy_loss
from fastreward.prefix_tree import PrefixTree

_FLAT = "flat batch"
_HIDDEN, _LAYERS, _VOCAB = 256, 4, 512
_ROWS, _TOKENS = 8, 512  # of the step: attention on a CPU is dense, and slow


def small_model(attention: str = "sdpa", seed: int = 0) -> Any:
    """A random Qwen2 of four layers."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=_VOCAB,
        hidden_size=_HIDDEN,
        intermediate_size=4 * _HIDDEN,
        num_hidden_layers=_LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=4096,
        use_cache=False,
    )
    config._attn_implementation = attention
    return Qwen2ForCausalLM(config)


def flat_loss(model: Any, tokens: Tensor, mask: Tensor, old_logprobs: Tensor, advantages: Tensor) -> Tensor:
    """PPO's loss of the batch [B, T] as a trainer computes it."""
    logits = model(input_ids=tokens).logits[:, :-1]
    logprobs = token_logprobs(logits, tokens[:, 1:], mask=mask[:, 1:]).logprobs
    return policy_loss(logprobs, old_logprobs[:, 1:], advantages[:, 1:], mask[:, 1:]).loss


def packed_loss(model: Any, packed: Any, mask: Tensor, old_logprobs: Tensor, advantages: Tensor) -> Tensor:
    """The loss from the unique tokens."""
    attention = packed.attention_mask()
    inputs = {"input_ids": packed.token_ids[None], "position_ids": packed.position_ids[None]}
    logits = model(**inputs, attention_mask=attention).logits
    logprobs = packed.to_tokens(packed.token_logprobs(logits).logprobs)
    return policy_loss(logprobs[:, 1:], old_logprobs[:, 1:], advantages[:, 1:], mask[:, 1:]).loss


def training_case(case: str, shape: tuple[int, ...], group: int, share: float, device: str) -> Case:
    """Loss and gradients of every parameter; the limit is the GEMMs of the unique tokens."""
    rows, length = min(shape[0], _ROWS), min(shape[1], _TOKENS)
    data = rollouts(rows, length, group, share, device)
    tokens = data.tokens % _VOCAB
    tree = PrefixTree(tokens, data.mask, data.group_ids, lengths=torch.full((rows,), length, device=device))
    advantages = data.rewards.unsqueeze(1).expand_as(tokens).contiguous()
    try:
        model = small_model().to(device)
    except ImportError as error:
        raise peers.Absent(f"needs transformers: {error}") from error
    with torch.no_grad():
        old = torch.zeros(tokens.shape, device=device)
        old[:, 1:] = token_logprobs(model(input_ids=tokens).logits[:, :-1], tokens[:, 1:]).logprobs
    truth = _step(model, partial(flat_loss, model, tokens, data.mask, old, advantages))

    def difference(result: tuple[Tensor, ...]) -> float:
        return max(float((a - b).abs().max()) for a, b in zip(result, truth, strict=True))

    def ours() -> tuple[Tensor, ...]:
        return _step(model, lambda: packed_loss(model, tree.pack(), data.mask, old, advantages))

    parameters = sum(p.numel() for p in model.parameters() if p.ndim == 2)
    unique = tree.num_tokens
    return Case(
        operation="prefix_tree",
        name=case,
        dtype="float32",
        shape=(rows, length),
        traffic=roofline.Traffic(4.0 * parameters, 4.0 * parameters, 6.0 * parameters * unique),
        error=difference,
        contenders=[
            Contender(OURS, ours),
            Contender(_FLAT, lambda: _step(model, partial(flat_loss, model, tokens, data.mask, old, advantages))),
        ],
        tolerance=1e-5,
        inputs=[tokens],
        targets=(Target("speedup", 0.5 * rows * length / unique, _FLAT),),
        absent={"ideal": f"{rows * length / unique:.2f}x: {rows * length} tokens, {unique} of them unique"},
        gemm=(torch.randn(unique, _HIDDEN, device=device), torch.randn(_HIDDEN, 4 * _HIDDEN, device=device)),
    )


def _step(model: Any, loss: Any) -> tuple[Tensor, ...]:
    """(loss, gradient of each parameter)."""
    value = loss()
    return value.detach(), *torch.autograd.grad(value, list(model.parameters()))

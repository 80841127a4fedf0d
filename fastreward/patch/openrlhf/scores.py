"""Log-probs and entropies: openrlhf.models.utils' two functions, and the end of Actor.forward, in one pass over logits.

OpenRLHF converts all logits to float32 and scales them in place, then reads them for the entropy and again for the
log-probs, prompts included. Here they are read once as the model gave them, and only where a token counts.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from fastreward._arguments.logits import LOGITS_DTYPES
from fastreward.logprobs import token_logprobs
from fastreward.patch.openrlhf.serving import NotServed, Serving, need


def log_probs(serving: Serving, logits: Tensor, labels: Tensor, temperature: float = 1.0) -> Tensor:
    """log_probs_from_logits: of labels [...] under softmax(logits [..., V] / temperature), in the logits' dtype.

    OpenRLHF divides `logits` by the temperature in place, which whoever has saved them for a backward finds out there.
    Here they stay what they are.
    """
    _logits(serving, logits)
    return token_logprobs(logits, labels, temperature=temperature).logprobs.to(logits.dtype)


def entropy(serving: Serving, logits: Tensor) -> Tensor:
    """compute_entropy: in nats, [...] of logits [..., V], in their dtype."""
    _logits(serving, logits)
    labels = torch.zeros(logits.shape[:-1], dtype=torch.long, device=logits.device)
    return token_logprobs(logits, labels, outputs=("entropy",)).entropy.to(logits.dtype)


def _logits(serving: Serving, logits: Tensor) -> None:
    serving.takes(logits, *LOGITS_DTYPES)
    need(logits.ndim >= 2 and logits.shape[-1] > 0 and logits.stride(-1) == 1)


def actor_forward(
    serving: Serving,
    own: ModuleType,  # openrlhf.models.actor
    actor: Any,
    sequences: Tensor,  # [B, S]
    action_mask: Tensor | None = None,  # [B, A], of the last A predicted tokens
    attention_mask: Tensor | None = None,  # [B, S]
    return_output: bool = False,
    allgather_logits: bool = False,
    return_logprobs: bool = False,
    ring_attn_group: Any = None,
    packed_seq_lens: list[int] | None = None,
    return_entropy: bool = False,
    **mm_inputs: Any,
) -> Any:
    """Actor.forward where it returns log-probs: the same model call, and one pass over its logits.

    output["logits"] stay as the model gave them (OpenRLHF leaves its scaled float32 ones there), and where there is an
    action mask the entropy is 0 outside of it.
    """
    need(action_mask is not None or return_logprobs)  # else whole logits are wanted
    need(attention_mask is not None and not mm_inputs and not getattr(actor, "is_vlm", False))
    need(return_output or not return_entropy)
    assert attention_mask is not None
    packing, temperature = getattr(actor, "packing_samples", None), actor.temperature
    need(packing is not None and isinstance(temperature, int | float))
    counted = _counted(sequences, action_mask)
    layout = _Packed if packing else _Padded
    tokens = layout(own, sequences, attention_mask, counted, ring_attn_group)
    output = actor.model(
        tokens.ids, attention_mask=tokens.attention_mask, position_ids=tokens.position_ids, **mm_inputs
    )
    found, spread = _scored(serving, own, output["logits"], tokens, temperature, return_entropy)
    if spread is not None:
        output.entropy = tokens.padded(spread)[:, :-1]
    log_probs = tokens.padded(found)[:, :-1]
    if action_mask is not None:
        log_probs = log_probs[:, -action_mask.shape[1] :] * action_mask.float()
    return (log_probs, output) if return_output else log_probs


def _counted(sequences: Tensor, action_mask: Tensor | None) -> Tensor:
    """Bool [B, S]: whether the token that follows is wanted; none follows the last."""
    batch, length = sequences.shape
    counted = torch.ones(batch, length, dtype=torch.bool, device=sequences.device)
    counted[:, length - 1 :] = False
    if action_mask is not None:
        need(action_mask.ndim == 2 and action_mask.shape[0] == batch and 0 < action_mask.shape[1] < length)
        counted[:, : length - 1 - action_mask.shape[1]] = False
        counted[:, -1 - action_mask.shape[1] : -1] = action_mask != 0
    return counted


def _scored(
    serving: Serving, own: ModuleType, logits: Tensor, tokens: _Padded | _Packed, temperature: float, entropy: bool
) -> tuple[Tensor, Tensor | None]:
    """(log-probs, entropies or None), f32 in the tokens' layout."""
    try:
        logits = logits.to(torch.float32) if logits.dtype == torch.float64 else logits  # as OpenRLHF does
        _logits(serving, logits)
        outputs = ("logprobs", "entropy") if entropy else ("logprobs",)
        stats = token_logprobs(logits, tokens.labels, temperature=temperature, mask=tokens.counted, outputs=outputs)
        return stats.logprobs, stats.entropy if entropy else None
    except NotServed:
        pass
    except (TypeError, ValueError) as error:
        serving.report.refused(f"{own.__name__}.Actor.forward", error)
    # Such as the DTensor of a tensor-parallel head. The model has run already, so no other way leads back to theirs.
    scaled = logits.to(torch.float32) / temperature
    return own.log_probs_from_logits(scaled, tokens.labels), own.compute_entropy(scaled) if entropy else None


class _Padded:
    """Sequences as they come, [B, S]."""

    def __init__(
        self, own: ModuleType, sequences: Tensor, attention_mask: Tensor, counted: Tensor, ring_attn_group: Any
    ) -> None:
        self.ids, self.attention_mask, self.counted = sequences, attention_mask, counted
        self.labels = sequences.roll(-1, dims=1)
        self.position_ids = attention_mask.long().cumsum(-1) - 1
        self.position_ids.masked_fill_(attention_mask == 0, 1)

    def padded(self, x: Tensor) -> Tensor:
        """[B, S] of what was computed per token."""
        return x


class _Packed:
    """Sequences one after the other without their padding, [1, N], or this rank's slice of them."""

    attention_mask = None

    def __init__(
        self, own: ModuleType, sequences: Tensor, attention_mask: Tensor, counted: Tensor, ring_attn_group: Any
    ) -> None:
        self.ids, self.position_ids, self.labels, padding, indices = own.unpad_and_slice_tensor(
            sequences, attention_mask, ring_attn_group
        )
        # A rank of a ring has a slice, whose bounds are that function's business.
        self.counted = counted.flatten()[indices].unsqueeze(0) if ring_attn_group is None else None
        self._gather = own.gather_and_pad_tensor
        self._place = (ring_attn_group, padding, indices, *sequences.shape)

    def padded(self, x: Tensor) -> Tensor:
        """[B, S] of what was computed per token, zeros at the padding."""
        result: Tensor = self._gather(x, *self._place)
        return result

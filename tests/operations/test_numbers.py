"""Numbers that a formula takes at run time: floats and 0-d tensors of every dtype, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import fastreward as fr
from fastreward import losses

B, T, V = 2, 3, 7
LABELS = torch.zeros(B, T, dtype=torch.int64)
LP = torch.linspace(-2.0, -0.1, B * T).reshape(B, T)
LOGITS = torch.linspace(-3.0, 3.0, B * T * V).sin().reshape(B, T, V)
HIDDEN, WEIGHT = LOGITS[..., :4].contiguous(), LOGITS[0, 0].unsqueeze(-1).expand(V, 4).contiguous()


def policy(**options: Any) -> Tensor:
    return fr.policy_loss(LP, LP - 0.3, torch.ones(B), ref_logprobs=LP + 0.2, kl="k3", entropy=-LP, **options).loss


def linear(**options: Any) -> Tensor:
    return fr.linear_token_logprobs(HIDDEN, WEIGHT, LABELS, **options).logprobs


def preference(**options: Any) -> Tensor:
    return fr.preference_loss(LP, LP - 0.5, loss=losses.simpo(), **options).loss


def correction(**options: Any) -> Tensor:
    return fr.correction_weights(LP, LP.flip(0), **options)[0]


def rejected(x: Any) -> Tensor:
    return fr.correction_weights(LP, LP.flip(0), reject={"token_k1": x})[1]


def rewards(**options: Any) -> Tensor:
    return fr.token_rewards(torch.ones(B), None, logprobs=LP, ref_logprobs=LP.flip(0), **options)


def logits_loss(**options: Any) -> Tensor:
    return fr.logits_policy_loss(LOGITS, LABELS, LP, torch.ones(B), **options).loss


def divergence(**options: Any) -> Tensor:
    return fr.token_divergence(LOGITS, LOGITS.flip(0), **options).divergence


def from_heads(**options: Any) -> Tensor:
    return fr.linear_divergence(HIDDEN, WEIGHT, HIDDEN.flip(0), WEIGHT, **options).divergence


#: By the name of the argument: a call of it, and a value that is refused (None: every finite number is right).
CALLS: dict[str, tuple[Callable[[Any], Tensor], float | None]] = {
    "policy_loss kl_coef": (lambda x: policy(kl_coef=x), None),
    "policy_loss entropy_coef": (lambda x: policy(entropy_coef=x), None),
    "policy_loss normalizer": (lambda x: policy(normalizer=x), 0.0),
    "logits_policy_loss scale": (lambda x: logits_loss(scale=x), -1.0),
    "logits_policy_loss temperature": (lambda x: logits_loss(temperature=x), 0.0),
    "token_logprobs temperature": (lambda x: fr.token_logprobs(LOGITS, LABELS, temperature=x).logprobs, -1.0),
    "linear_token_logprobs temperature": (lambda x: linear(temperature=x), 0.0),
    "linear_token_logprobs logit_scale": (lambda x: linear(logit_scale=x), None),
    "linear_token_logprobs softcap": (lambda x: linear(softcap=x), 0.0),
    "preference_loss normalizer": (lambda x: preference(normalizer=x), -2.0),
    "correction_weights low": (lambda x: correction(low=x, mode="icepop"), -1.0),
    "correction_weights high": (lambda x: correction(high=x), 0.0),
    "correction_weights log_ratio_clamp": (lambda x: correction(log_ratio_clamp=x), 0.0),
    "correction_weights reject['token_k1']": (rejected, 0.0),
    "off_policy_sequence_mask threshold": (
        lambda x: fr.off_policy_sequence_mask(LP, LP + 1.0, -torch.ones(B), threshold=x),
        None,
    ),
    "group_advantages eps": (lambda x: fr.group_advantages(torch.arange(4.0), group_size=2, eps=x), -1.0),
    "segment_reduce temperature": (
        lambda x: fr.segment_reduce(LP, LABELS, op="softmin", num_segments=1, temperature=x),
        0.0,
    ),
    "segment_diff decay": (lambda x: fr.segment_diff(LP, mode="lookahead", decay=x), None),
    "segment_diff threshold": (lambda x: fr.segment_diff(LP, mode="lookahead", threshold=x), -1.0),
    "token_rewards kl_coef": (lambda x: rewards(kl_coef=x), None),
    "token_rewards kl_clamp": (lambda x: rewards(kl_coef=0.5, kl_clamp=x), 0.0),
    "token_rewards kl_value_clamp": (lambda x: rewards(kl_coef=0.5, kl_value_clamp=x), -1.0),
    "token_rewards clip[0]": (lambda x: rewards(clip=(x, None)), None),
    "token_divergence temperature": (lambda x: divergence(temperature=x), 0.0),
    "token_divergence teacher_temperature": (lambda x: divergence(teacher_temperature=x), -1.0),
    "linear_divergence temperature": (lambda x: from_heads(temperature=x), 0.0),
    "linear_divergence teacher_temperature": (lambda x: from_heads(teacher_temperature=x), -1.0),
    "linear_divergence logit_scale": (lambda x: from_heads(logit_scale=x), None),
    "linear_divergence teacher_logit_scale": (lambda x: from_heads(teacher_logit_scale=x), None),
    "linear_divergence softcap": (lambda x: from_heads(softcap=x), 0.0),
    "linear_divergence teacher_softcap": (lambda x: from_heads(teacher_softcap=x), -1.0),
    "value_loss clip": (lambda x: fr.value_loss(LP, LP.flip(0), LP + 1.0, clip=x).loss, 0.0),
    "value_loss delta": (lambda x: fr.value_loss(LP, LP, LP + 1.0, loss="huber", delta=x).loss, -1.0),
    "whiten eps": (lambda x: fr.whiten(LP, eps=x), -1.0),
    "discounted_returns gamma": (lambda x: fr.discounted_returns(LP, gamma=x), None),
    "discounted_returns temperature": (lambda x: fr.discounted_returns(LP, op="min", temperature=x), 0.0),
    "gae lam": (lambda x: fr.gae(LP, LP, lam=x)[0], None),
    "vtrace rho_bar": (lambda x: fr.vtrace(LP, LP, LP, rho_bar=x)[0], 0.0),
}
NAMES = pytest.mark.parametrize("name", CALLS)


@NAMES
def test_a_tensor_is_read_as_the_number_it_is(name: str) -> None:
    call, _ = CALLS[name]
    for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.uint8):
        x = torch.tensor(1.75 if dtype.is_floating_point else 2, dtype=dtype)
        assert torch.equal(call(x), call(x.item()))


@NAMES
def test_a_tensor_is_refused_as_the_number_is(name: str) -> None:
    call, bad = CALLS[name]
    argument = name.split(" ", 1)[1].replace("[", r"\[").replace("]", r"\]")
    for value in [float("nan"), float("inf"), *([] if bad is None else [bad])]:
        for x in (value, torch.tensor(value)):
            with pytest.raises(ValueError, match=f"^{argument}: expected"):
                call(x)
    with pytest.raises(ValueError, match=rf"^{argument}: expected .*\.detach\(\)"):
        call(torch.tensor(0.5, requires_grad=True))
    with pytest.raises((ValueError, TypeError), match=f"^{argument}: expected"):
        call(torch.tensor([0.5, 0.5, 0.5, 0.5, 0.5]))
    with pytest.raises(TypeError, match=f"^{argument}: expected a real number"):
        call(torch.tensor(0.5 + 1j))


def test_bounds_in_the_wrong_order_are_refused_as_tensors_too() -> None:
    with pytest.raises(ValueError, match=r"^low: expected at most high, 0.5, got 2.0"):
        fr.correction_weights(LP, LP, low=torch.tensor(2.0), high=torch.tensor(0.5))


def test_a_symbol_is_checked_while_it_is_traced() -> None:
    def step(x: Tensor, temperature: float) -> Tensor:
        return fr.token_logprobs(x, LABELS, temperature=temperature).logprobs

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend="eager")
    for temperature in (0.5, 0.7):
        compiled(LOGITS, temperature)
    with pytest.raises(Exception, match="temperature: expected a positive number"):
        compiled(LOGITS, -1.0)

"""linear_policy_loss against plain float64 torch: losses, gradients, scales, dtypes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from logit_losses import LOSSES, TOLERANCE, VOCAB, batch, close, truth
from torch import Tensor

import fastreward as fr

HIDDEN = 24


def head_batch() -> dict[str, Tensor]:
    data = {k: v for k, v in batch().items() if k != "logits"}
    hidden, weight = torch.randn(4, 11, HIDDEN), torch.randn(VOCAB, HIDDEN) * 0.4
    return {"hidden": hidden, "weight": weight, "bias": torch.randn(VOCAB) * 0.1, **data}


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("masked", [True, False])
def test_linear_loss_and_gradients(name: str, masked: bool, backend: str) -> None:
    data, loss = head_batch(), LOSSES[name]
    if not masked:
        data["mask"] = torch.ones_like(data["mask"])
    leaves = {k: data[k].double().requires_grad_() for k in ("hidden", "weight", "bias")}
    logits = 4.0 * torch.tanh((leaves["hidden"] @ leaves["weight"].t() + leaves["bias"]) * 0.5 / 4.0)
    expected, grads = truth(data, loss, leaves, logits, temperature=0.9, entropy_coef=0.02, upstream=1.7)
    own = {k: data[k].clone().requires_grad_() for k in leaves}
    with fr.backend(backend):
        result = fr.linear_policy_loss(
            **{**data, **own},
            loss=loss,
            temperature=0.9,
            logit_scale=0.5,
            softcap=4.0,
            entropy_coef=0.02,
            chunk_size=7,
            group_ids=[0, 1, 1, 0],
            return_token_loss=True,
        )
        actual = torch.autograd.grad(result.loss * 1.7, list(own.values()))
    close(result.loss, expected, 3e-6)
    for key, grad in zip(own, actual, strict=True):
        close(grad, grads[key], 5e-6)
    assert result.token_loss is not None
    assert result.token_loss.shape == data["labels"].shape


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_linear_upstream_scale_before_and_after(backend: str) -> None:
    """The gradient is that of the upstream that came, whatever was expected."""
    data, found = head_batch(), []
    for scale in (1.0, 2.0, 0.25):
        weight = data["weight"].clone().requires_grad_()
        with fr.backend(backend):
            result = fr.linear_policy_loss(**{**data, "weight": weight}, scale=scale)
            found.append(torch.autograd.grad(3.0 * result.loss, weight)[0])
    for other in found[1:]:
        close(other, found[0], 1e-6)


def test_linear_policy_loss_needs_only_what_is_asked() -> None:
    data = head_batch()
    data["hidden"].requires_grad_()
    result = fr.linear_policy_loss(**data)
    (grad,) = torch.autograd.grad(result.loss, data["hidden"])
    assert grad.shape == data["hidden"].shape
    with torch.no_grad():
        assert not fr.linear_policy_loss(**data).loss.requires_grad


def test_linear_policy_loss_in_bfloat16_is_as_good_as_two_calls() -> None:
    data = head_batch()
    data.pop("bias")
    half = {k: v.bfloat16() if k in ("hidden", "weight") else v for k, v in data.items()}
    leaves = {k: half[k].double().requires_grad_() for k in ("hidden", "weight")}
    expected, grads = truth(data, LOSSES["ppo"], leaves, leaves["hidden"] @ leaves["weight"].t())
    own = {k: half[k].clone().requires_grad_() for k in leaves}
    result = fr.linear_policy_loss(**{**half, **own}, loss=LOSSES["ppo"])
    close(result.loss, expected, 5e-2)
    for grad, key in zip(torch.autograd.grad(result.loss, list(own.values())), own, strict=True):
        close(grad, grads[key], 5e-2)
        assert grad.dtype == torch.bfloat16


@pytest.mark.parametrize(("dtype", "upstream"), [(torch.float16, 65536.0), (torch.bfloat16, 1.0038)])
@pytest.mark.parametrize("early", [False, True])
def test_linear_upstream_is_not_rounded_to_the_models_dtype(dtype: torch.dtype, upstream: float, early: bool) -> None:
    """65536 is infinite in float16, 1.0038 is 1 in bfloat16."""
    data = head_batch()
    data.pop("bias")
    half = {k: v.to(dtype) if k in ("hidden", "weight") else v for k, v in data.items()}
    leaves = {k: half[k].double().requires_grad_() for k in ("hidden", "weight")}
    logits = leaves["hidden"] @ leaves["weight"].t()
    _, grads = truth(data, LOSSES["reinforce"], leaves, logits, aggregation="token-mean", upstream=upstream)
    own = {k: half[k].clone().requires_grad_() for k in leaves}
    counted = int(data["mask"].sum())
    result = fr.linear_policy_loss(
        **{**half, **own},
        loss=LOSSES["reinforce"],
        aggregation="token-mean",
        normalizer=1e4,  # so that the gradient itself is no overflow
        scale=upstream if early else 1.0,
    )
    for grad, key in zip(torch.autograd.grad(result.loss * upstream, list(own.values())), own, strict=True):
        close(grad.double() * 1e4 / counted, grads[key], 2 * TOLERANCE[dtype])


@pytest.mark.parametrize(
    ("message", "change"),
    [
        (r"chunk_size: expected a positive number of tokens", {"chunk_size": 0}),
        (r"weight: expected shape \[V, 24\]", {"weight": torch.zeros(VOCAB, 3)}),
        (r"softcap: expected a positive number", {"softcap": 0.0}),
    ],
)
def test_linear_messages(message: str, change: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=message):
        fr.linear_policy_loss(**{**head_batch(), **change})

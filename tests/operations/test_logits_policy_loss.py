"""logits_policy_loss against plain float64 torch: losses, gradients, layouts, scales."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from logit_losses import LOSSES, TOLERANCE, VOCAB, batch, close, truth
from torch import Tensor

import fastreward as fr
from fastreward import losses
from fastreward.reference.policy_loss import aggregate


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("inplace", [False, True], ids=["fresh", "inplace"])
@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_loss_and_gradient(name: str, dtype: torch.dtype, inplace: bool, backend: str) -> None:
    data, loss = batch(dtype=dtype), LOSSES[name]
    leaf = data["logits"].double().requires_grad_()
    expected, grads = truth(data, loss, {"logits": leaf}, leaf, temperature=0.8, entropy_coef=0.02)
    own = {**data, "logits": data["logits"].clone().requires_grad_()}
    with fr.backend(backend):
        result = fr.logits_policy_loss(
            **own, loss=loss, temperature=0.8, entropy_coef=0.02, inplace=inplace, group_ids=[0, 1, 1, 0]
        )
        (grad,) = torch.autograd.grad(result.loss, own["logits"])
    close(result.loss, expected, 2e-6)
    close(grad, grads["logits"], TOLERANCE[dtype])
    assert not grad[~data["mask"]].any()
    assert grad.dtype == dtype
    if inplace:
        assert grad.data_ptr() == own["logits"].data_ptr()
    assert result.metrics["token_count"] == data["mask"].sum()


@pytest.mark.parametrize("aggregation", ["token-mean", "seq-mean-token-mean", "seq-mean-token-sum-norm", "group-mean"])
def test_every_kind_of_row_weight(aggregation: str) -> None:
    data, loss = batch(), LOSSES["ppo"]
    leaf = data["logits"].double().requires_grad_()
    expected, grads = truth(data, loss, {"logits": leaf}, leaf, aggregation=aggregation)
    own = data["logits"].clone().requires_grad_()
    result = fr.logits_policy_loss(
        **{**data, "logits": own}, loss=loss, aggregation=aggregation, group_ids=[0, 1, 1, 0]
    )
    (grad,) = torch.autograd.grad(result.loss, own)
    close(result.loss, expected, 2e-6)
    close(grad, grads["logits"], 2e-6)


@pytest.mark.parametrize("scale", [1.0, 0.25])
@pytest.mark.parametrize("upstream", [1.0, 0.25, 3.0, 0.0])
@pytest.mark.parametrize("inplace", [False, True])
def test_upstream_scale_before_and_after(scale: float, upstream: float, inplace: bool) -> None:
    """Given beforehand, arriving later, or both: the gradient is the upstream one times the loss's."""
    data, loss = batch(), LOSSES["ppo"]
    leaf = data["logits"].double().requires_grad_()
    _, grads = truth(data, loss, {"logits": leaf}, leaf, upstream=upstream)
    own = data["logits"].clone().requires_grad_()
    result = fr.logits_policy_loss(**{**data, "logits": own}, loss=loss, scale=scale, inplace=inplace)
    (grad,) = torch.autograd.grad(result.loss * upstream, own)
    close(grad, grads["logits"], 3e-6)


def test_a_loss_scale_that_overflowed_leaves_masked_rows_zero() -> None:
    data = batch()
    own = data["logits"].requires_grad_()
    (grad,) = torch.autograd.grad(fr.logits_policy_loss(**data, loss=losses.reinforce()).loss * torch.inf, own)
    assert not grad[~data["mask"]].any()
    assert not grad[data["mask"]].isfinite().any()


def test_in_float16_a_scale_given_beforehand_keeps_small_gradients() -> None:
    """Where one that arrives later finds that they have become 0."""
    data = batch(dtype=torch.float16)
    own, counted = data["logits"].requires_grad_(), data["mask"]

    def grad(scale: float) -> Tensor:
        loss = fr.logits_policy_loss(**data, loss=losses.reinforce(), normalizer=1e4, scale=scale).loss
        return torch.autograd.grad(loss * 65536.0, own)[0]

    late, early = grad(1.0), grad(65536.0)
    assert (late[counted] == 0).double().mean() > 0.01
    assert (early[counted] == 0).double().mean() < 1e-3


@pytest.mark.parametrize("inplace", [False, True])
def test_logits_that_need_no_gradient_stay_as_they_are(inplace: bool) -> None:
    data = batch()
    kept = data["logits"].clone()
    loss = fr.logits_policy_loss(**data, inplace=inplace).loss
    assert not loss.requires_grad
    data["logits"].requires_grad_()
    with torch.no_grad():
        assert torch.equal(fr.logits_policy_loss(**data, inplace=inplace).loss, loss)
    assert torch.equal(data["logits"], kept)


def test_numbers_that_differ_in_the_seventh_digit() -> None:
    """Scalars of the two parts of a program are told apart by all their digits."""

    @losses.define
    def close_ones(t: losses.Terms, *, s: float = 1.0) -> losses.Node:
        return t.advantage * (t.logprob * (s * 1000002.0) - t.ratio * (s * 1000001.0))

    data = batch()
    own = data["logits"].requires_grad_()
    fused = fr.logits_policy_loss(**data, loss=close_ones())
    logprobs = fr.token_logprobs(own, data["labels"], mask=data["mask"]).logprobs
    rest = {k: data[k] for k in ("old_logprobs", "advantages", "mask")}
    apart = fr.policy_loss(logprobs, **rest, loss=close_ones())
    close(*(torch.autograd.grad(x.loss, own)[0] for x in (fused, apart)), 1e-6)


@pytest.mark.parametrize("inplace", [False, True])
def test_views_packed_rows_and_temperatures(inplace: bool) -> None:
    """logits[:, :-1] of a model's output is not copied, and in place only its own rows are written."""
    data = batch(4, 12)
    whole = torch.randn(4, 13, VOCAB)
    whole[:, :-1] = data["logits"]
    temperature = 0.5 + torch.rand(4, 12)
    leaf = data["logits"].double().requires_grad_()
    expected, grads = truth(data, LOSSES["ppo"], {"logits": leaf}, leaf, temperature=temperature)
    rest = {k: v for k, v in data.items() if k != "logits"}
    model_output = whole.clone().requires_grad_()
    result = fr.logits_policy_loss(
        (model_output * 1.0)[:, :-1], **rest, loss=LOSSES["ppo"], temperature=temperature, inplace=inplace
    )
    result.loss.backward()
    close(result.loss, expected, 2e-6)
    close(model_output.grad[:, :-1], grads["logits"], 3e-6)
    assert not model_output.grad[:, -1].any()
    inside = torch.arange(12) < torch.tensor([12, 1, 0, 6]).unsqueeze(-1)
    packed = data["logits"][inside].clone().requires_grad_()
    result = fr.logits_policy_loss(
        packed,
        *(data[k][inside] for k in ("labels", "old_logprobs")),
        data["advantages"],
        loss=LOSSES["ppo"],
        temperature=temperature[inside],
        cu_seqlens=torch.tensor([0, 12, 13, 13, 19]),
        inplace=inplace,
    )
    (grad,) = torch.autograd.grad(result.loss, packed)
    close(result.loss, expected, 2e-6)
    close(grad, grads["logits"][inside], 3e-6)


def test_minus_infinity_in_the_logits_and_garbage_under_the_mask() -> None:
    """A first block of only -inf (kept sets, padded vocabularies) gives liger-kernel 0.8.5 a NaN."""
    data, loss = batch(), LOSSES["ppo"]
    data["labels"] = data["labels"].clamp(min=200)
    data["logits"][..., :200] = -torch.inf
    leaf = data["logits"].double().requires_grad_()
    expected, grads = truth(data, loss, {"logits": leaf}, leaf)
    data["logits"][~data["mask"]] = torch.nan
    data["labels"][~data["mask"]] = -100
    data["old_logprobs"][~data["mask"]] = torch.inf
    for inplace in (False, True):
        own = data["logits"].clone().requires_grad_()
        result = fr.logits_policy_loss(**{**data, "logits": own}, loss=loss, inplace=inplace)
        (grad,) = torch.autograd.grad(result.loss, own)
        close(result.loss, expected, 2e-6)
        close(grad[data["mask"]], grads["logits"][data["mask"]], 3e-6)
        assert not grad[~data["mask"]].any()


def test_extras_kl_and_weights_reach_the_fused_gradient() -> None:
    @losses.define
    def gated(t, power=0.5):
        return -t.extra("gate") * t.advantage * t.ratio * power

    data = batch()
    gate, weights = torch.rand(4, 11), torch.rand(4, 11)
    ref = data["old_logprobs"] - 0.1
    leaf = data["logits"].double().requires_grad_()
    logprobs = torch.log_softmax(leaf, -1).gather(-1, data["labels"].unsqueeze(-1)).squeeze(-1)
    ratio = (logprobs - data["old_logprobs"]).exp()
    gap = ref - logprobs
    token = -gate * data["advantages"].unsqueeze(-1) * ratio * 0.7 * weights + 0.3 * (gap.exp() - gap - 1)
    expected = aggregate(torch.where(data["mask"], token, 0.0), data["mask"], "token-mean")
    (grad,) = torch.autograd.grad(expected, leaf)
    own = data["logits"].clone().requires_grad_()
    result = fr.logits_policy_loss(
        **{**data, "logits": own},
        loss=gated(power=0.7),
        extra={"gate": gate},
        weights=weights,
        ref_logprobs=ref,
        kl="k3",
        kl_coef=0.3,
    )
    (actual,) = torch.autograd.grad(result.loss, own)
    close(result.loss, expected.detach(), 3e-6)
    close(actual, grad, 3e-6)


@pytest.mark.usefixtures("threads")
def test_bits_do_not_depend_on_threads_batch_or_padding() -> None:
    data = batch(4, 11)

    def run(d: dict[str, Tensor]) -> Tensor:
        own = d["logits"].clone().requires_grad_()
        result = fr.logits_policy_loss(**{**d, "logits": own}, loss=LOSSES["ppo"], aggregation="token-sum")
        return torch.autograd.grad(result.loss, own)[0]

    first = run(data)
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        assert torch.equal(run(data), first)
    assert torch.equal(run({k: v[[3, 0]] for k, v in data.items()}), first[[3, 0]])
    wide = {k: torch.nn.functional.pad(v, (0, 5)) for k, v in data.items() if v.ndim == 2}
    wide |= {"logits": torch.nn.functional.pad(data["logits"], (0, 0, 0, 5)), "advantages": data["advantages"]}
    assert torch.equal(run(wide)[:, :11], first)


def test_metrics_are_policy_losses() -> None:
    data = batch()
    rest = {k: v for k, v in data.items() if k not in ("logits", "labels")}
    stats = fr.token_logprobs(data["logits"], data["labels"], mask=data["mask"])
    apart = fr.policy_loss(stats.logprobs, **rest, loss=LOSSES["ppo"], return_token_loss=True)
    fused = fr.logits_policy_loss(**data, loss=LOSSES["ppo"], return_token_loss=True)
    assert fused.metrics.names == apart.metrics.names
    torch.testing.assert_close(fused.metrics.values_tensor, apart.metrics.values_tensor)
    torch.testing.assert_close(fused.token_loss, apart.token_loss)


class TestRefusals:
    def test_a_second_backward(self) -> None:
        data = batch()
        own = data["logits"].requires_grad_()
        loss = fr.logits_policy_loss(**data).loss
        torch.autograd.grad(loss, own, retain_graph=True)
        with pytest.raises(RuntimeError, match="exists once"):
            torch.autograd.grad(loss, own)

    def test_second_derivatives(self) -> None:
        data = batch()
        own = data["logits"].requires_grad_()
        with pytest.raises(NotImplementedError, match="double backward"):
            torch.autograd.grad(fr.logits_policy_loss(**data).loss, own, create_graph=True)

    @pytest.mark.parametrize(
        ("error", "message", "change"),
        [
            (ValueError, r"labels: expected shape \[4, 11\]", {"labels": torch.zeros(4, 3).long()}),
            (ValueError, r"labels: expected integers in \[0, 311\)", {"labels": torch.full((4, 11), 311)}),
            (ValueError, r"old_logprobs: expected shape \[4, 11\] \(as labels\)", {"old_logprobs": torch.zeros(4)}),
            (ValueError, r"scale: expected a positive number", {"scale": 0.0}),
            (ValueError, r"scale: expected a positive number", {"scale": torch.tensor(0.0)}),
            (ValueError, r"scale: expected a positive number", {"scale": torch.tensor(torch.nan)}),
            (ValueError, r"temperature: expected a positive number", {"temperature": -1.0}),
            (
                ValueError,
                r"share no memory",
                {"logits": torch.zeros(1, 1, VOCAB).expand(4, 11, VOCAB), "inplace": True},
            ),
            (ValueError, r"mask: expected at least one counted token", {"mask": torch.zeros(4, 11)}),
            (TypeError, r"loss: dpo is a loss over pairs", {"loss": losses.dpo()}),
        ],
    )
    def test_messages(self, error: type[Exception], message: str, change: dict[str, Any]) -> None:
        with pytest.raises(error, match=message):
            fr.logits_policy_loss(**{**batch(), **change})

"""Extras that get a gradient, as FlowRL's log Z does: values and gradients against float64 torch, forms, refusals."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from public_loss_checks import check_differentiable_extras, learned_scale
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

import fastreward as fr
from fastreward import losses

ROWS, LENGTH = 5, 6
LENGTHS = torch.tensor([6, 2, 0, 1, 4])
MASK = torch.arange(LENGTH) < LENGTHS.unsqueeze(-1)
BOUNDS = torch.cat([torch.zeros(1, dtype=torch.int64), LENGTHS.cumsum(0)])
FLOWRL = losses.flowrl(0.7)


def noise(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


OLD = -noise(ROWS, LENGTH, seed=0).abs()
LP, REF = OLD + 0.2 * noise(ROWS, LENGTH, seed=1), OLD + 0.2 * noise(ROWS, LENGTH, seed=2)
ADVANTAGES, LOG_Z = noise(ROWS, seed=3), noise(ROWS, seed=4)


def call(lp: Tensor, log_z: Any, loss: losses.Loss = FLOWRL, **options: Any) -> fr.PolicyLoss:
    given: dict[str, Any] = {"mask": MASK, "ref_logprobs": REF, "extra": {"log_z": log_z}, "loss": loss}
    return fr.policy_loss(lp, OLD, ADVANTAGES, **{**given, **options})


def truth(lp: Tensor, log_z: Tensor, beta: float = 0.7) -> Tensor:
    """FlowRL's loss in the dtype of its arguments, a mean over the sequences that have a token."""
    rows = [
        ((lp[k, :n] - OLD[k, :n]).sum().exp().clamp(max=10).detach())
        * (log_z[k] + lp[k, :n].mean() - beta * ADVANTAGES[k] - REF[k, :n].mean()).square()
        for k, n in enumerate(LENGTHS.tolist())
        if n
    ]
    return torch.stack(rows).mean()


def gradients(loss: Tensor, *leaves: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(1.7 * loss, leaves)


WANTED = gradients(truth(x := LP.double().requires_grad_(), z := LOG_Z.double().requires_grad_()), x, z)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("packed", [False, True])
def test_gradient(backend: str, packed: bool) -> None:
    lp, log_z = LP.clone().requires_grad_(), LOG_Z.clone().requires_grad_()
    with fr.backend(backend):
        if packed:
            tokens = (lp[MASK], OLD[MASK], ADVANTAGES)
            result = fr.policy_loss(
                *tokens, loss=FLOWRL, ref_logprobs=REF[MASK], cu_seqlens=BOUNDS, extra={"log_z": log_z}
            )
        else:
            result = call(lp, log_z)
    torch.testing.assert_close(result.loss, truth(LP.double(), LOG_Z.double()).float())
    found = gradients(result.loss, lp, log_z)
    assert not found[1][2]  # a sequence without a token
    for got, want in zip(found, WANTED, strict=True):
        torch.testing.assert_close(got, want.float())


def test_numerical_gradient() -> None:
    """Of the loss itself, in float64: the step of a finite difference is too small for the float32 of the operation."""

    def value(log_z: Tensor) -> Tensor:
        terms = {"logprob": LP, "old_logprob": OLD, "ref_logprob": REF, "advantage": ADVANTAGES, "log_z": log_z}
        return FLOWRL.evaluate(mask=MASK, **terms)

    assert torch.autograd.gradcheck(value, (LOG_Z.double().requires_grad_(),))


@pytest.mark.parametrize("packed", [False, True])
def test_losses_per_token_and_several_extras(packed: bool) -> None:
    with fr.backend("cpu"):
        check_differentiable_extras("cpu", in_one_row=packed)


def test_each_gets_its_own_gradient() -> None:
    """Two extras, a loss per token, weights and another aggregation: against torch."""
    weights = noise(ROWS, seed=7).abs()

    def expected(scale: Tensor, log_z: Tensor) -> Tensor:
        gap = log_z.unsqueeze(1) + LP.double() - 0.7 * ADVANTAGES.unsqueeze(1) - REF
        return ((scale * weights).unsqueeze(1) * gap.square() * MASK).sum() / MASK.sum()

    leaves = [x.double().requires_grad_() for x in (noise(ROWS, seed=5), LOG_Z)]
    want = gradients(expected(*leaves), *leaves)
    own = [x.detach().float().requires_grad_() for x in leaves]
    extra = {"scale": own[0], "log_z": own[1]}
    for lp in (LP, LP.clone().requires_grad_()):  # whether or not the policy is trained as well
        loss = call(lp, None, learned_scale(True), extra=extra, weights=weights, aggregation="token-mean").loss
        for got, exact in zip(gradients(loss, *own), want, strict=True):
            torch.testing.assert_close(got, exact.float())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_gradient_has_the_dtype_of_the_extra(dtype: torch.dtype) -> None:
    log_z = LOG_Z.to(dtype).requires_grad_()
    exact = log_z.detach().float().requires_grad_()
    (found,), (want,) = gradients(call(LP, log_z).loss, log_z), gradients(call(LP, exact).loss, exact)
    assert found.dtype == dtype
    assert torch.equal(found, want.to(dtype))


def test_one_for_all_sequences() -> None:
    one = torch.tensor(0.3, requires_grad=True)
    each = torch.full((ROWS,), 0.3).requires_grad_()
    (found,), (want,) = gradients(call(LP, one).loss, one), gradients(call(LP, each).loss, each)
    torch.testing.assert_close(found, want.sum())
    assert torch.equal(call(LP, 0.3).loss, call(LP, each).loss)


def test_as_many_packed_tokens_as_sequences() -> None:
    """[N] and [B] are then the same shape; an extra that gets a gradient is per sequence."""
    mask = torch.tensor([[True, True], [False, False], [True, False]])
    each = torch.full((3, 2), 0.4)
    padded, flat = (LOG_Z[:3].clone().requires_grad_() for _ in range(2))
    rest: dict[str, Any] = {"loss": FLOWRL, "ref_logprobs": REF[:3, :2], "extra": {"log_z": padded}}
    want = fr.policy_loss(LP[:3, :2], OLD[:3, :2], each, mask, **rest).loss
    rest |= {"ref_logprobs": REF[:3, :2][mask], "extra": {"log_z": flat}, "cu_seqlens": torch.tensor([0, 2, 2, 3])}
    found = fr.policy_loss(LP[:3, :2][mask], OLD[:3, :2][mask], each[mask], **rest).loss
    assert torch.equal(found, want)
    assert torch.equal(*gradients(found, flat), *gradients(want, padded))


def test_arrays_are_constants() -> None:
    result = fr.policy_loss(
        LP.numpy(), OLD.numpy(), ADVANTAGES.numpy(), MASK.numpy(), loss=FLOWRL, ref_logprobs=REF.numpy(),
        extra={"log_z": LOG_Z.numpy()},
    )  # fmt: skip
    assert isinstance(result.loss, np.ndarray)
    np.testing.assert_allclose(result.loss, float(call(LP, LOG_Z).loss), rtol=1e-6)


def test_through_logits_and_hidden_states() -> None:
    """A loss from logits or hidden states gives the extra the gradient that `policy_loss` gives it."""
    hidden, head = noise(ROWS, LENGTH, 8, seed=8), noise(11, 8, seed=9)
    labels = torch.arange(ROWS * LENGTH).reshape(ROWS, LENGTH) % 11
    for loss in (FLOWRL, learned_scale(True)):
        rest: dict[str, Any] = {"loss": loss, "ref_logprobs": REF}

        def extras(loss: losses.Loss = loss) -> dict[str, Tensor]:
            names = ("log_z", "scale") if loss.name == "learned_scale" else ("log_z",)
            return {name: LOG_Z.clone().requires_grad_() for name in names}

        states, own = hidden.clone().requires_grad_(), extras()
        lp = fr.token_logprobs(states @ head.T, labels, mask=MASK).logprobs
        want = gradients(fr.policy_loss(lp, OLD, ADVANTAGES, MASK, extra=own, **rest).loss, states, *own.values())
        for linear in (False, True):
            leaf, own = hidden.clone().requires_grad_(), extras()
            given = (leaf, head) if linear else (leaf @ head.T,)
            function = fr.linear_policy_loss if linear else fr.logits_policy_loss
            result = function(*given, labels, OLD, ADVANTAGES, MASK, extra=own, **rest)
            for got, exact in zip(gradients(result.loss, leaf, *own.values()), want, strict=True):
                torch.testing.assert_close(got, exact, rtol=1e-4, atol=1e-5)


def test_what_lies_under_the_mask_never_matters() -> None:
    lp, log_z = LP.clone(), LOG_Z.clone()
    lp[~MASK], log_z[2] = torch.nan, torch.inf
    leaves = lp.requires_grad_(), log_z.requires_grad_()
    found = gradients(call(*leaves).loss, *leaves)
    for got, want in zip(found, WANTED, strict=True):
        torch.testing.assert_close(got, want.float())


def test_nothing_that_counts() -> None:
    log_z = LOG_Z.clone().requires_grad_()
    result = call(LP, log_z, mask=torch.zeros_like(MASK), empty="zero")
    assert not result.loss
    assert torch.equal(*gradients(result.loss, log_z), torch.zeros(ROWS))
    none = torch.zeros(0, requires_grad=True)
    rest = {"ref_logprobs": REF[:0], "empty": "zero", "extra": {"log_z": none}, "loss": FLOWRL}
    assert gradients(fr.policy_loss(LP[:0], OLD[:0], ADVANTAGES[:0], **rest).loss, none)[0].shape == (0,)


def test_opcheck() -> None:
    levels = (("old_logprob", 3), ("advantage", 2), ("ref_logprob", 3), ("log_z", 2), ("logprob", 3))
    key, inputs, _, _, extras = FLOWRL.policy_plan(levels, "seq-mean-token-mean")
    assert extras == ("log_z",)
    given = {"old_logprob": OLD, "advantage": ADVANTAGES, "ref_logprob": REF}
    tensors = [given[name] for name, _ in inputs]
    numbers = [float(LENGTH), 0.0, 0.0, *(value for _, value in sorted(FLOWRL.scalars.items()))]
    leaves = LP.clone().requires_grad_(), None, LOG_Z[None].clone().requires_grad_()
    torch.library.opcheck(
        torch.ops.fastreward.objective, (*leaves, tensors, MASK, *[None] * 4, numbers, None, key, "cpu")
    )


def test_compiled_is_eager() -> None:
    def step(lp: Tensor, log_z: Tensor, mask: Tensor) -> Tensor:
        return call(lp, log_z, mask=mask).loss * 1.7

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    leaves = LP.clone().requires_grad_(), LOG_Z.clone().requires_grad_()
    for got, want in zip(torch.autograd.grad(compiled(*leaves, MASK), leaves), WANTED, strict=True):
        torch.testing.assert_close(got, want.float())


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")
def test_transforms() -> None:
    def loss(lp: Tensor, log_z: Tensor) -> Tensor:
        return call(lp, log_z).loss

    found = torch.func.grad(lambda *x: 1.7 * loss(*x), (0, 1))(LP, LOG_Z)
    for got, want in zip(found, WANTED, strict=True):
        torch.testing.assert_close(got, want.float())
    (row,) = torch.func.jacrev(lambda z: loss(LP, z).reshape(1))(LOG_Z)
    torch.testing.assert_close(1.7 * row, WANTED[1].float())
    log_z = LOG_Z.clone().requires_grad_()
    (slope,) = torch.autograd.grad(loss(LP, log_z).square(), log_z, create_graph=True)
    with pytest.raises(NotImplementedError, match="double backward"):
        slope.sum().backward()
    with pytest.raises(NotImplementedError, match="vmap"):
        torch.func.vmap(lambda z: loss(LP, z))(LOG_Z.expand(2, -1))
    for own in (LOG_Z, log_z):
        with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="forward"):
            loss(LP, forward_ad.make_dual(own, torch.ones(ROWS)))


@losses.define
def shifted(t: losses.Terms) -> losses.Node:
    return (t.value + t.extra("shift", per="sequence", differentiable=True) - t.returns) ** 2


def test_loss_of_a_critic() -> None:
    shift = LOG_Z.clone().requires_grad_()
    found = fr.value_loss(LP, None, REF, MASK, loss=shifted(), clip=None, extra={"shift": shift}).loss
    exact = LOG_Z.double().requires_grad_()
    error = (LP.double() + exact.unsqueeze(-1) - REF)[MASK]
    (got,), (want,) = gradients(found, shift), gradients(error.square().mean(), exact)
    torch.testing.assert_close(got, want.float())


def test_in_a_checkpoint() -> None:
    leaves = LP.clone().requires_grad_(), LOG_Z.clone().requires_grad_()
    loss = checkpoint(lambda *x: call(*x).loss, *leaves, use_reentrant=False)
    for got, want in zip(gradients(loss, *leaves), WANTED, strict=True):
        torch.testing.assert_close(got, want.float())


# ------------------------------------------------------------------------------------------------------------- refusals
@losses.define
def reads(t: losses.Terms, per: str = "sequence", differentiable: bool = True, use: str = "value") -> losses.Node:
    x = t.extra("x", per=per, differentiable=differentiable)  # type: ignore[arg-type]
    return -t.logprob * (losses.stop_gradient(x) if use == "constant" else x)


def test_refusals() -> None:
    def given(loss: losses.Loss, x: Tensor) -> fr.PolicyLoss:
        return fr.policy_loss(LP, None, None, MASK, loss=loss, extra={"x": x})

    x = LOG_Z.clone().requires_grad_()
    assert reads().differentiable == ("x",)
    assert not reads(differentiable=False).differentiable
    given(reads(), x)
    with pytest.raises(ValueError, match=r"extra\['x'\]: expected a constant, as no gradient flows to it"):
        given(reads(differentiable=False), x)
    with pytest.raises(ValueError, match=r"expected shape \[5\] \(one per sequence\)"):
        given(reads(), LP.clone().requires_grad_())
    with pytest.raises(ValueError, match="differentiable: expected per='sequence' with it, got 'token'"):
        given(reads("token"), x)
    with pytest.raises(ValueError, match="its gradient for x is zero everywhere: every use is inside stop_gradient"):
        given(reads(use="constant"), x)
    with pytest.raises(ValueError, match=r"extra\['x'\]: expected numbers where mask is set"):
        given(reads(), torch.full((ROWS,), torch.nan).requires_grad_())


def test_shown_with_its_derivative() -> None:
    assert "d/d log_z = " in str(FLOWRL)

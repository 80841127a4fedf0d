"""torch.func's transforms, forward-mode dual tensors and second derivatives, through every public operation.

Each is right, or refused in our own words; none is silently zero.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

import fastreward as fr
from fastreward.prefix_tree import packed

# torch's own, at its first forward-mode derivative.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")

FORWARD = r"^fastreward: \w+ has no forward-mode derivative"
VMAP = r"^fastreward: [\w ]+ does not run under torch.func.vmap; pass the batch dimension directly"
CONSTANT = r"^\w+: expected a constant, .*\.detach\(\)"
SECOND = r"^fastreward: gradients of gradients"

B, T, V, H = 2, 3, 11, 5
generator = torch.Generator().manual_seed(5)


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator)


LABELS = torch.randint(0, V, (B, T), generator=generator)
OLD, ROLLOUT, ADVANTAGES = -normal(B, T).abs(), -normal(B, T).abs(), normal(B)
MASK = torch.tensor([[1, 1, 0], [1, 1, 1]])
SEGMENTS = torch.tensor([[0, 0, 1], [-1, 2, 2]])
TOKENS = torch.tensor([[1, 2, 3], [1, 2, 4]])
TREE = fr.PrefixTree(TOKENS, MASK)
PACKED = TREE.pack()
NODES, UNIQUE = TREE.num_nodes, TREE.num_tokens


@dataclass(frozen=True, eq=False)
class Operation:
    """call: of `inputs`, the tensors that are differentiated.

    gradient: whether they have one, else they are constants; decision: whether its gradient is 0 wherever there is one;
    linear: second derivatives are there.
    """

    call: Callable[..., Tensor]
    inputs: tuple[Tensor, ...]
    gradient: bool = True
    decision: bool = False
    linear: bool = False

    def scalar(self, *inputs: Tensor) -> Tensor:
        out = self.call(*inputs)
        return (out * torch.linspace(0.3, 1.7, out.numel()).reshape(out.shape)).sum()


TEACHER, HEAD = normal(B, T, H), normal(V, H)

OPERATIONS = {
    "token_logprobs": Operation(
        lambda x: torch.stack([*fr.token_logprobs(x, LABELS, mask=MASK, outputs=("logprobs", "entropy"))]),
        (normal(B, T, V),),
    ),
    "linear_token_logprobs": Operation(
        lambda h, w: fr.linear_token_logprobs(h, w, LABELS, mask=MASK).logprobs, (normal(B, T, H), normal(V, H))
    ),
    "policy_loss": Operation(
        lambda x, h: fr.policy_loss(x, OLD, ADVANTAGES, MASK, entropy=h, entropy_coef=0.1).loss,
        (-normal(B, T).abs(), normal(B, T).abs()),
    ),
    "logits_policy_loss": Operation(
        lambda x: fr.logits_policy_loss(x, LABELS, OLD, ADVANTAGES, MASK).loss, (normal(B, T, V),)
    ),
    "linear_policy_loss": Operation(
        lambda h, w: fr.linear_policy_loss(h, w, LABELS, OLD, ADVANTAGES, MASK).loss, (normal(B, T, H), normal(V, H))
    ),
    "preference_loss": Operation(
        lambda a, b: fr.preference_loss(a, b, ref_chosen_logprobs=OLD, ref_rejected_logprobs=ROLLOUT).loss,
        (-normal(B, T).abs(), -normal(B, T).abs()),
    ),
    "correction_weights": Operation(
        lambda a, b: fr.correction_weights(a, b, MASK)[0], (OLD.clone(), ROLLOUT.clone()), gradient=False
    ),
    "off_policy_sequence_mask": Operation(
        lambda x: fr.off_policy_sequence_mask(x, ROLLOUT, ADVANTAGES, MASK, threshold=0.1).float(),
        (OLD.clone(),),
        gradient=False,
        decision=True,
    ),
    "group_advantages": Operation(lambda r: fr.group_advantages(r, group_size=2), (normal(4),), gradient=False),
    "segment_ids": Operation(lambda x: fr.segment_ids(x).float(), (normal(B, T),), gradient=False, decision=True),
    "segment_reduce": Operation(
        lambda x: fr.segment_reduce(x, SEGMENTS, op="mean", weights=MASK, num_segments=3), (normal(B, T),), linear=True
    ),
    "segment_diff": Operation(lambda x: fr.segment_diff(x, first="value"), (normal(B, T),), linear=True),
    "scatter_rewards": Operation(
        lambda x: fr.scatter_rewards(x, SEGMENTS, place="spread"), (normal(B, 3),), linear=True
    ),
    "token_divergence": Operation(
        lambda x, y: fr.token_divergence(x, y, divergence="jsd", mask=MASK).divergence,
        (normal(B, T, V), normal(B, T, V)),
    ),
    "linear_divergence": Operation(
        lambda h, w: fr.linear_divergence(h, w, TEACHER, HEAD, divergence="jsd", mask=MASK).divergence,
        (normal(B, T, H), normal(V, H)),
    ),
    "value_loss": Operation(lambda v: fr.value_loss(v, OLD, ROLLOUT, MASK).loss, (normal(B, T),)),
    "token_rewards": Operation(
        lambda s, x: fr.token_rewards(s, MASK, logprobs=x, ref_logprobs=ROLLOUT, kl_coef=0.1),
        (normal(B), OLD.clone()),
        gradient=False,
    ),
    "group_statistics": Operation(
        lambda x: fr.group_statistics(x, group_size=2, statistics=("mean",))["mean"], (normal(4),), gradient=False
    ),
    "loss_normalizer": Operation(fr.loss_normalizer, (normal(B, T),), gradient=False, decision=True),
    "whiten": Operation(lambda x: fr.whiten(x, MASK), (normal(B, T),), gradient=False),
    "discounted_returns": Operation(lambda r: fr.discounted_returns(r, MASK), (normal(B, T),), gradient=False),
    "gae": Operation(lambda r, v: torch.stack(fr.gae(r, v, MASK)), (normal(B, T), normal(B, T)), gradient=False),
    "lambda_returns": Operation(
        lambda r, v: fr.lambda_returns(r, MASK, next_values=v), (normal(B, T), normal(B, T)), gradient=False
    ),
    "vtrace": Operation(lambda w, r, v: torch.stack(fr.vtrace(w, r, v, MASK)), (normal(B, T),) * 3, gradient=False),
    "PrefixTree.aggregate": Operation(lambda x: TREE.aggregate(x), (normal(B),)),
    "PrefixTree.advantages": Operation(lambda x: TREE.advantages(x), (normal(NODES),), gradient=False),
    "PrefixTree.propagate": Operation(lambda a, b: TREE.propagate(a, b), (normal(NODES), normal(NODES))),
    "PrefixTree.to_tokens": Operation(lambda x: TREE.to_tokens(x), (normal(NODES),)),
    "PrefixTree.from_tokens": Operation(lambda x: TREE.from_tokens(x), (normal(B, T),), linear=True),
    "PrefixTree.unique_to_tokens": Operation(lambda x: TREE.unique_to_tokens(x), (normal(UNIQUE),), linear=True),
    "PackedTree.token_logprobs": Operation(lambda x: PACKED.token_logprobs(x).logprobs, (normal(UNIQUE, V),)),
    "PackedTree.to_tokens": Operation(lambda x: PACKED.to_tokens(x), (normal(UNIQUE),), linear=True),
    "PackedTree.trl_row": Operation(lambda x: PACKED.trl_row(x)["advantages"], (normal(B),), linear=True),
    "PackedTree.from_tokens": Operation(lambda x: PACKED.from_tokens(x), (normal(B, T),), linear=True),
}
#: Whose gradient exists once, made with the loss.
HANDED_OVER = [OPERATIONS["logits_policy_loss"], OPERATIONS["linear_policy_loss"]]
#: Public, and without a floating-point tensor that could be differentiated.
WITHOUT_TENSORS = {
    "backend",
    "balance_partitions",
    "compare",
    "credit_page",
    "PrefixTree.from_branches",
    "PrefixTree.__init__",
}

every_operation = pytest.mark.parametrize("operation", OPERATIONS.values(), ids=OPERATIONS)
with_gradient = pytest.mark.parametrize(
    "operation", [x for x in OPERATIONS.values() if x.gradient], ids=[k for k, x in OPERATIONS.items() if x.gradient]
)
constants = pytest.mark.parametrize(
    "operation",
    [x for x in OPERATIONS.values() if not x.gradient and not x.decision],
    ids=[k for k, x in OPERATIONS.items() if not x.gradient and not x.decision],
)


def test_every_public_operation_has_a_row() -> None:
    functions = {name for name in fr.__all__ if inspect.isfunction(getattr(fr, name))}
    methods = {
        f"{kind.__name__}.{name}"
        for kind in (fr.PrefixTree, packed.PackedTree)
        for name, method in inspect.getmembers(kind)
        if hasattr(getattr(method, "__func__", method), "__wrapped__")  # takes arrays
    }
    assert functions | methods == set(OPERATIONS) | WITHOUT_TENSORS


def truth(operation: Operation) -> tuple[Tensor, ...]:
    """The gradients of the scalar, by an ordinary backward."""
    leaves = tuple(x.clone().requires_grad_() for x in operation.inputs)
    return torch.autograd.grad(operation.scalar(*leaves), leaves)


def jacobian(operation: Operation) -> tuple[Tensor, ...]:
    leaves = tuple(x.clone().requires_grad_() for x in operation.inputs)
    rows = []
    count = operation.call(*leaves).numel()
    for k in range(count):
        out = operation.call(*leaves).reshape(-1)[k]
        rows.append(torch.autograd.grad(out, leaves, allow_unused=True, materialize_grads=True))
    return tuple(map(torch.stack, zip(*rows, strict=True)))


def numbers(operation: Operation) -> tuple[int, ...]:
    return tuple(range(len(operation.inputs)))


@with_gradient
def test_reverse_mode(operation: Operation) -> None:
    want = truth(operation)
    assert all(x.any() for x in want)
    for got in (
        torch.func.grad(operation.scalar, numbers(operation))(*operation.inputs),
        torch.func.vjp(operation.scalar, *operation.inputs)[1](torch.tensor(1.0)),
    ):
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-7)


@with_gradient
def test_jacobians(operation: Operation) -> None:
    want = jacobian(operation)

    def check(got: Any) -> None:
        for g, w in zip(got, want, strict=True):
            torch.testing.assert_close(g.reshape(w.shape), w, rtol=1e-6, atol=1e-7)

    def vectorized() -> Any:
        return torch.autograd.functional.jacobian(operation.call, operation.inputs, vectorize=True)

    check(torch.func.jacrev(operation.call, numbers(operation))(*operation.inputs))
    if operation in HANDED_OVER:
        with pytest.raises(NotImplementedError, match=VMAP):
            vectorized()
    else:
        check(vectorized())


@every_operation
def test_forward_mode_is_refused(operation: Operation) -> None:
    call, inputs, first = operation.call, operation.inputs, operation.inputs[0]
    tangents = tuple(map(torch.ones_like, inputs))
    with pytest.raises(NotImplementedError, match=FORWARD):
        torch.func.jvp(call, inputs, tangents)
    with pytest.raises(NotImplementedError, match=FORWARD):
        torch.func.jacfwd(call)(*inputs)
    for k, x in enumerate(inputs):  # each of them alone, whether or not it has a gradient as well
        for leaf in [x, x.clone().requires_grad_()] if operation.gradient else [x]:
            with forward_ad.dual_level():
                dual = (*inputs[:k], forward_ad.make_dual(leaf, torch.ones_like(x)), *inputs[k + 1 :])
                with pytest.raises(NotImplementedError, match=FORWARD):
                    call(*dual)
    # Seen below another transform too.
    with pytest.raises(NotImplementedError, match=FORWARD):
        torch.func.jvp(
            lambda x: torch.func.grad(lambda y: (call(x, *inputs[1:]) * y.sum()).sum())(x.detach()),
            (first,),
            tangents[:1],
        )


@every_operation
def test_forward_mode_past_a_constant(operation: Operation) -> None:
    inputs = operation.inputs
    want = operation.scalar(*inputs)

    def constant(x: Tensor) -> Tensor:
        return operation.scalar(x.detach(), *inputs[1:]) + 2 * x.sum()

    value, tangent = torch.func.jvp(constant, (inputs[0],), (torch.ones_like(inputs[0]),))
    torch.testing.assert_close(value, want + 2 * inputs[0].sum())
    torch.testing.assert_close(tangent, torch.tensor(2.0 * inputs[0].numel()))
    with forward_ad.dual_level():
        torch.testing.assert_close(operation.scalar(*inputs), want)


@every_operation
def test_vmap_is_refused(operation: Operation) -> None:
    batches = tuple(x.expand(2, *x.shape) for x in operation.inputs)
    with pytest.raises(NotImplementedError, match=VMAP):
        torch.func.vmap(operation.call)(*batches)
    with pytest.raises(NotImplementedError, match=VMAP):
        torch.func.vmap(torch.func.grad(operation.scalar))(*batches)


@with_gradient
def test_second_derivatives(operation: Operation) -> None:
    leaves = tuple(x.clone().requires_grad_() for x in operation.inputs)

    def twice() -> tuple[Tensor, ...]:
        first = torch.autograd.grad(operation.scalar(*leaves).square(), leaves, create_graph=True)
        return torch.autograd.grad(sum(x.square().sum() for x in first), leaves)

    def twice_func() -> Any:
        def slope(*inputs: Tensor) -> Tensor:
            first = torch.func.grad(lambda *x: operation.scalar(*x).square(), numbers(operation))(*inputs)
            return sum((x.square().sum() for x in first), torch.zeros(()))

        return torch.func.grad(slope, numbers(operation))(*operation.inputs)

    if not operation.linear:
        for call in (twice, twice_func):
            with pytest.raises(NotImplementedError, match=SECOND):
                call()
        return
    (gradient,) = truth(operation)  # g; the square's is 2 <g, x> g, whose square's is 8 <g, x> |g|^2 g
    want = 8 * (gradient * operation.inputs[0]).sum() * gradient.square().sum() * gradient
    for got in (twice(), twice_func()):
        torch.testing.assert_close(got[0], want)


@with_gradient
def test_hessian_is_refused(operation: Operation) -> None:
    with pytest.raises(NotImplementedError, match=FORWARD):
        torch.func.hessian(operation.scalar)(*operation.inputs)


@constants
def test_a_gradient_of_a_constant_is_refused(operation: Operation) -> None:
    with pytest.raises(ValueError, match=CONSTANT):
        operation.call(*(x.clone().requires_grad_() for x in operation.inputs))
    with pytest.raises(ValueError, match=CONSTANT):
        torch.func.grad(operation.scalar)(*operation.inputs)
    with torch.no_grad():  # nobody expects one
        operation.call(*(x.clone().requires_grad_() for x in operation.inputs))


@every_operation
def test_constants_made_inside_a_transform(operation: Operation) -> None:
    """Tensors of torch.func's have no memory of their own; nothing looks for it where they are constants."""
    factor = torch.ones(())
    value, tangent = torch.func.jvp(
        lambda f: operation.scalar(*((x * f).detach() for x in operation.inputs)) * f, (factor,), (factor,)
    )
    want = operation.scalar(*operation.inputs)
    torch.testing.assert_close(value, want)
    torch.testing.assert_close(tangent, want)  # of the factor outside alone
    slope = torch.func.grad(lambda f: operation.scalar(*((x * f).detach() for x in operation.inputs)) * f)(factor)
    torch.testing.assert_close(slope, want)


def test_masks_made_inside_a_transform() -> None:
    def step(x: Tensor) -> Tensor:
        mask, logprobs = x.detach() > -10.0, -x.square()
        white = fr.whiten(x.detach(), mask)
        return fr.policy_loss(logprobs, logprobs.detach(), white, mask).loss

    x = OPERATIONS["whiten"].inputs[0]
    leaf = x.clone().requires_grad_()
    torch.testing.assert_close(torch.func.grad(step)(x), *torch.autograd.grad(step(leaf), leaf))
    with pytest.raises(NotImplementedError, match=r"whiten\(out=\) is not available under torch.func"):
        torch.func.grad(lambda y: fr.whiten(y.detach(), out=torch.empty(B, T)).sum() + y.sum())(x)


@pytest.mark.parametrize("name", ["token_logprobs", "logits_policy_loss", "PackedTree.token_logprobs"])
def test_gradients_in_place_are_refused(name: str) -> None:
    call = {
        "token_logprobs": lambda x: fr.token_logprobs(x, LABELS, inplace_backward=True).logprobs.sum(),
        "logits_policy_loss": lambda x: fr.logits_policy_loss(x, LABELS, OLD, ADVANTAGES, inplace=True).loss,
        "PackedTree.token_logprobs": lambda x: PACKED.token_logprobs(x, inplace_backward=True).logprobs.sum(),
    }[name]
    with pytest.raises(NotImplementedError, match=r"^fastreward: a gradient in place"):
        torch.func.grad(call)(OPERATIONS[name].inputs[0])

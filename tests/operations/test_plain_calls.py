"""A plain call goes around the dispatcher; whoever wants to see the ops still does, and the numbers are the same."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import fastreward


class _Ops(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


class _Functions(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


def _policy(x: Tensor) -> Tensor:
    torch.manual_seed(1)
    old, advantages, mask = -torch.rand(x.shape), torch.randn(x.shape[0]), torch.rand(x.shape) > 0.3
    return fastreward.policy_loss(x, old, advantages, mask).loss


def _preference(x: Tensor) -> Tensor:
    torch.manual_seed(1)
    refs = {f"ref_{side}_logprobs": -torch.rand(x.shape) for side in ("chosen", "rejected")}
    return fastreward.preference_loss(x, x.flip(0), **refs).loss


def _stats(x: Tensor) -> Tensor:
    return fastreward.token_logprobs(x, torch.zeros(x.shape[0], dtype=torch.int64)).logprobs.sum()


_CALLS = pytest.mark.parametrize("call", [_policy, _preference, _stats])


def _gradient(call: Callable[[Tensor], Tensor], around: AbstractContextManager[Any] | None = None) -> tuple[Any, ...]:
    torch.manual_seed(0)
    x = (-torch.rand(6, 5)).requires_grad_()
    if around is None:
        loss = call(x)
    else:
        with around:
            loss = call(x)
    loss.backward()
    return loss.detach(), x.grad


@_CALLS
@pytest.mark.parametrize("mode", [_Ops, _Functions])
def test_modes_see_the_op_and_the_same_numbers(call: Callable[[Tensor], Tensor], mode: Any) -> None:
    listening = mode()
    through_the_op, direct = _gradient(call, listening), _gradient(call)
    assert any("fastreward" in name for name in listening.seen)
    assert all(torch.equal(a, b) for a, b in zip(through_the_op, direct, strict=True))


@_CALLS
def test_profiles_show_the_op(call: Callable[[Tensor], Tensor]) -> None:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        _gradient(call)
    assert any(event.key.startswith("fastreward::") for event in profile.key_averages())


@_CALLS
@pytest.mark.parametrize("listened", ["forward", "backward"])
def test_a_checkpoint_computes_again_with_a_listener_or_without(
    call: Callable[[Tensor], Tensor], listened: str
) -> None:
    torch.manual_seed(0)
    x = (-torch.rand(6, 5)).requires_grad_()
    with _Ops() if listened == "forward" else nullcontext():
        loss: Any = checkpoint(call, x, use_reentrant=False)
    with _Ops() if listened == "backward" else nullcontext():
        loss.backward()
    assert x.grad is not None
    assert torch.equal(x.grad, _gradient(call)[1])


@_CALLS
def test_nothing_is_recorded_where_torch_leaves_autograd_out(call: Callable[[Tensor], Tensor]) -> None:
    x = (-torch.rand(6, 5)).requires_grad_()
    with torch.inference_mode(), torch.enable_grad():
        assert not call(x).requires_grad
    with torch._C._AutoDispatchBelowAutograd():  # as inside the kernel of another op
        assert not call(x).requires_grad


@_CALLS
@pytest.mark.filterwarnings("ignore")
def test_traces_hold_the_op(call: Callable[[Tensor], Tensor]) -> None:
    with torch.no_grad():
        graph = torch.jit.trace(call, (-torch.rand(6, 5),), check_trace=False).graph
    assert "fastreward::" in str(graph)


def test_a_lazy_negation_is_read_as_what_it_stands_for() -> None:
    plain = -torch.rand(4, 5)
    lazy = torch._neg_view(-plain)
    assert lazy.is_neg()
    assert lazy.is_contiguous()
    old, advantages = -torch.rand(4, 5), torch.randn(4)
    a, b = (fastreward.policy_loss(x, old, advantages).loss for x in (plain, lazy))
    assert torch.equal(a, b)


@_CALLS
def test_a_subclass_sees_the_op(call: Callable[[Tensor], Tensor]) -> None:
    seen: list[str] = []

    class Named(Tensor):
        @classmethod
        def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(str(func))
            return super().__torch_function__(func, types, args, kwargs or {})

    call((-torch.rand(6, 5)).as_subclass(Named))
    assert any("fastreward" in name for name in seen)


def packed_logprobs(flag: Any) -> Any:
    packed = fastreward.PrefixTree(torch.tensor([[1, 2], [1, 3]])).pack()
    return packed.token_logprobs(torch.randn(len(packed), 5), inplace_backward=flag)


FLAGS: dict[str, Callable[[Any], Any]] = {
    "shift_mean": lambda flag: fastreward.whiten(torch.randn(2, 3), shift_mean=flag),
    "inplace_backward": lambda flag: fastreward.token_logprobs(
        torch.randn(2, 5), torch.tensor([1, 2]), inplace_backward=flag
    ),
    "inplace_backward of a packed tree": packed_logprobs,
    "batch_normalize": lambda flag: fastreward.correction_weights(
        -torch.rand(2, 3), -torch.rand(2, 3), batch_normalize=flag
    ),
    "eps_inside": lambda flag: fastreward.group_advantages(torch.randn(4), group_size=2, eps_inside=flag),
    "unscored": lambda flag: fastreward.off_policy_sequence_mask(
        -torch.rand(2, 3), -torch.rand(2, 3), torch.randn(2), threshold=1.0, unscored=flag
    ),
    "inplace": lambda flag: fastreward.logits_policy_loss(
        torch.randn(1, 3, 5), torch.ones(1, 3, dtype=torch.long), -torch.rand(1, 3), torch.randn(1), inplace=flag
    ),
}


@pytest.mark.parametrize("name", FLAGS)
@pytest.mark.parametrize("value", ["no", b"", [], object()])
def test_a_flag_is_a_truth_value(name: str, value: object) -> None:
    """Texts are true whatever they say; torch's dispatcher, which would refuse them, sees no plain call."""
    with pytest.raises(TypeError, match=f"^{name.split()[0]}: expected True or False, got "):
        FLAGS[name](value)


@pytest.mark.parametrize("name", FLAGS)
@pytest.mark.parametrize("value", [0, np.False_, None, torch.tensor(False)])
def test_a_flag_may_be_a_truth_value_of_another_library(name: str, value: object) -> None:
    FLAGS[name](value)

"""What the ranks of tests/distributed run: any operation with `process_group=`, and the gradients of its arguments."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import fields
from typing import Any

import torch

import fastreward as fr


def call(
    group: Any,
    *,
    operation: str,
    args: Sequence[Any] = (),
    named: Mapping[str, Any] | None = None,
    options: Mapping[str, Any] | None = None,
    leaves: Mapping[str, Any] | None = None,
    upstream: Mapping[str, torch.Tensor] | None = None,
    copied: bool = False,
    backend: str | None = None,
) -> dict[str, Any]:
    """An operation over the group (None: on one process): its tensors by name, and the gradients of `leaves`.

    leaves: arguments that want a gradient, by name; the first ones where `args` follow. copied: they are no leaves of
    autograd themselves. backend: by hand. upstream: by output; None: 1 for the `loss`, if there is one.
    """
    function: Any = fr
    for name in operation.split("."):
        function = getattr(function, name)
    leaves = {name: x.clone().requires_grad_() for name, x in (leaves or {}).items()}
    given = dict(options or {}) if group is None else {**(options or {}), "process_group": group}
    inputs = {name: x * 1.0 if copied else x for name, x in leaves.items()}
    given |= dict(named or {})
    with fr.backend(backend) if backend is not None else nullcontext():  # type: ignore[arg-type]
        found = tensors(function(*inputs.values(), *args, **given) if args else function(**inputs, **given))
    total = found.get("loss") if upstream is None else sum((found[k] * x).sum() for k, x in upstream.items())
    if total is not None and leaves:
        total.backward()
    grads = {name: x.grad for name, x in leaves.items()}
    return {"out": {name: x.detach() for name, x in found.items()}, "grads": grads}


def inplace(group: Any, *, logits: torch.Tensor, labels: torch.Tensor, **options: Any) -> dict[str, Any]:
    """token_logprobs whose gradient goes where the logits were: (was it there, the gradient)."""
    leaf = logits.clone().requires_grad_()
    memory = leaf * 1.0
    stats = fr.token_logprobs(memory, labels, inplace_backward=True, process_group=group, **options)
    stats.logprobs.square().sum().backward()
    assert leaf.grad is not None
    return {"same": torch.equal(memory.detach(), leaf.grad), "grad": leaf.grad}


def sharded_head(group: Any, *, hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> dict[str, Any]:
    """A DTensor head as the words of the error say: whole, and its local rows over the mesh's group."""
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh = DeviceMesh.from_group(group, "cpu")
    head = distribute_tensor(weight, mesh, [Shard(0)]).requires_grad_()
    refused = ""
    try:
        fr.linear_token_logprobs(hidden, head, labels)
    except TypeError as error:
        refused = str(error)
    whole = fr.linear_token_logprobs(hidden, head.full_tensor(), labels).logprobs
    local = fr.linear_token_logprobs(hidden, head.to_local(), labels, process_group=mesh.get_group()).logprobs
    local.square().sum().backward()
    assert head.grad is not None
    grad = head.grad.full_tensor()  # type: ignore[attr-defined]
    return {"refused": refused, "whole": whole.detach(), "local": local.detach(), "grad": grad}


def twice(group: Any, *, logits: torch.Tensor, labels: torch.Tensor) -> None:
    """A second derivative, which is refused."""
    leaf = logits.clone().requires_grad_()
    total = fr.token_logprobs(leaf, labels, process_group=group).logprobs.sum()
    torch.autograd.grad(total, leaf, create_graph=True)


def tensors(result: Any) -> dict[str, torch.Tensor]:
    """The tensors of a result by name."""
    if isinstance(result, torch.Tensor):
        return {"result": result}
    if isinstance(result, tuple):
        return {str(k): x for k, x in enumerate(result)}
    if isinstance(result, dict):
        return result
    if isinstance(result, fr.PolicyLoss):
        found = {"loss": result.loss, "metrics": result.metrics.values_tensor}
        return found | ({} if result.token_loss is None else {"token_loss": result.token_loss}) | dict(result.tokens)
    if isinstance(result, fr.DivergenceStats):
        named = {field.name: getattr(result, field.name) for field in fields(result)}
        return {name: x for name, x in named.items() if x is not None}
    return dict(result.__dict__)

"""The public losses on any device and backend, gradients through autograd, against the reference backend on the CPU.

For the interpreted Triton kernels and for real GPUs, as public_checks.py. Here the truth comes through the same public
function, so what is held is the backend; that the function is right is for the tests of its own name.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from public_checks import close, labels_for, noise
from torch import Tensor

import fastreward as fr
from fastreward import losses

LOSSES = {
    "ppo": losses.ppo(dual_clip=3.0),  # a gradient token by token
    "cispo": losses.cispo(),
    "gspo": losses.gspo(),  # sums over log-probs
    "real": losses.real(),  # of a group
}
_HALF = {torch.float32: 3e-6, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
_LENGTHS = torch.tensor([11, 1, 0, 5])


def placed(x: Any, device: str) -> Any:
    """Tensors on `device`, anything else as it is; a copy in any case, which a call may write over."""
    return x.to(device, copy=True) if isinstance(x, Tensor) else x


def compare(
    function: Callable[..., Any],
    device: str,
    given: dict[str, Any],
    leaves: Sequence[str],
    *,
    tolerance: float = 3e-6,
    upstream: float = 1.0,
) -> None:
    """Loss, metrics and the gradients of `leaves`."""

    def run(place: str) -> tuple[Any, tuple[Tensor, ...]]:
        arguments = {name: placed(x, place) for name, x in given.items()}
        own = [arguments[name].requires_grad_() for name in leaves]
        result = function(**arguments)
        return result, torch.autograd.grad(result.loss * upstream, own)

    with fr.backend("reference"):
        want, wanted = run("cpu")
    got, gradients = run(device)
    assert got.loss.device.type == device
    close(got.loss, want.loss, "loss", tolerance)
    for name in want.metrics:
        close(got.metrics[name], want.metrics[name], name, tolerance)
    for name, gradient, exact in zip(leaves, gradients, wanted, strict=True):
        assert gradient.dtype == exact.dtype
        size = max(float(exact.float().abs().max()), 1e-30)  # the largest element becomes 1
        close(gradient.float() / size, exact.float() / size, f"gradient of {name}", tolerance)


def batch(vocab: int) -> dict[str, Any]:
    """What the losses from logits and from hidden states share: four sequences, one of them empty."""
    mask = torch.arange(11) < _LENGTHS.unsqueeze(1)
    return {
        "labels": labels_for(vocab, 4, 11),
        "old_logprobs": -noise(4, 11, seed=2).abs() - 4,
        "advantages": torch.tensor([1.0, -0.5, 1.0, -2.0]),
        "mask": mask,
        "group_ids": [0, 1, 1, 0],
    }


def packed(data: dict[str, Any], *per_token: str) -> dict[str, Any]:
    """The same tokens in one row, without the padding."""
    counted = data["mask"]
    bounds = torch.cat([torch.zeros(1, dtype=torch.int64), _LENGTHS.cumsum(0)])
    rows = {name: data[name][counted] for name in ("labels", "old_logprobs", *per_token)}
    return {**data, **rows, "mask": None, "cu_seqlens": bounds}


def check_logits_policy_loss(
    device: str, name: str, dtype: torch.dtype, vocab: int = 311, *, in_place: bool = False, in_one_row: bool = False
) -> None:
    """With the upstream gradient that was expected, and with another one, for which the stored gradient is rescaled."""
    data = {**batch(vocab), "logits": (noise(4, 11, vocab, seed=5) * 2).to(dtype)}
    data = packed(data, "logits") if in_one_row else data
    options: dict[str, Any] = {"loss": LOSSES[name], "temperature": 0.8, "entropy_coef": 0.02, "scale": 0.5}

    def function(logits: Tensor, **arguments: Any) -> Any:
        return fr.logits_policy_loss(logits * 1, inplace=in_place, **arguments, **options)

    for upstream in (0.5, 3.0):
        compare(function, device, data, ["logits"], tolerance=2 * _HALF[dtype], upstream=upstream)


def check_linear_policy_loss(device: str, name: str, vocab: int = 311, width: int = 24) -> None:
    data = {**batch(vocab), "hidden": noise(4, 11, width, seed=5), "weight": noise(vocab, width, seed=6) * 0.3}

    def function(**arguments: Any) -> Any:
        return fr.linear_policy_loss(loss=LOSSES[name], chunk_size=16, scale=2.0, **arguments)

    compare(function, device, data, ["hidden", "weight"], tolerance=1e-5, upstream=2.0)


def check_under_the_mask(device: str, loss: losses.Loss) -> None:
    """What lies there changes nothing, per token or per sequence; where all of it does, 0 with gradients of zeros."""
    old = -noise(4, 11, seed=2).abs()
    mask = torch.arange(11) < _LENGTHS.unsqueeze(1)
    data: dict[str, Any] = {
        "logprobs": old + 0.2 * noise(4, 11, seed=3),
        "old_logprobs": old,
        "advantages": torch.tensor([1.0, -0.5, 2.0, -2.0]),
        "ref_logprobs": old + 0.1,
        "entropy": noise(4, 11, seed=4).abs(),
    }
    hidden = {name: x.masked_fill(~(mask if x.ndim == 2 else mask.any(-1)), torch.nan) for name, x in data.items()}
    options: dict[str, Any] = {"loss": loss, "kl": "k3", "kl_coef": 0.1, "entropy_coef": 0.1, "empty": "zero"}

    def function(**given: Tensor) -> Any:
        return fr.policy_loss(**given, group_ids=[0, 1, 1, 0], **options)

    compare(function, device, {**hidden, "mask": mask}, ["logprobs", "entropy"])
    clean, found = (
        function(**{name: placed(x, device) for name, x in given.items()}, mask=mask.to(device))
        for given in (data, hidden)
    )
    assert torch.equal(clean.loss, found.loss)
    assert torch.equal(clean.metrics.values_tensor, found.metrics.values_tensor)
    nothing = {**{name: torch.full_like(x, torch.nan) for name, x in data.items()}, "mask": torch.zeros_like(mask)}
    compare(function, device, nothing, ["logprobs", "entropy"])
    assert not function(**{name: placed(x, device) for name, x in nothing.items()}).loss


def check_differentiable_extras(device: str, *, in_one_row: bool = False) -> None:
    """Gradients for log-probs and for two extras per sequence, of a loss per sequence and of one per token."""
    mask = torch.arange(11) < _LENGTHS.unsqueeze(1)
    old = -noise(4, 11).abs()
    data: dict[str, Any] = {
        "logprobs": old + 0.3 * noise(4, 11, seed=1),
        "old_logprobs": old,
        "ref_logprobs": old + 0.3 * noise(4, 11, seed=2),
    }
    if in_one_row:
        bounds = torch.cat([torch.zeros(1, dtype=torch.int64), _LENGTHS.cumsum(0)])
        data = {**{name: x[mask] for name, x in data.items()}, "cu_seqlens": bounds}
    else:
        data["mask"] = mask
    data |= {"advantages": noise(4, seed=3), "log_z": noise(4, seed=4), "scale": noise(4, seed=5).abs()}
    for per_token in (False, True):

        def function(log_z: Tensor, scale: Tensor, **given: Any) -> Any:
            loss, extra = learned_scale(per_token), {"log_z": log_z, "scale": scale}  # noqa: B023
            return fr.policy_loss(**given, loss=loss, extra=extra)

        compare(function, device, data, ["logprobs", "log_z", "scale"], upstream=0.7)


@losses.define
def learned_scale(t: losses.Terms, per_token: bool) -> losses.Node:
    """FlowRL's loss times a scale that is trained too; per token its gap is that token's."""
    if not per_token:
        return t.extra("scale", per="sequence", differentiable=True) * losses.flowrl(0.7)(t)
    gap = t.extra("log_z", per="sequence", differentiable=True) + t.logprob - 0.7 * t.advantage - t.ref_logprob
    return t.extra("scale", per="sequence", differentiable=True) * gap * gap


def check_preference_loss(device: str, loss: losses.Loss, *, in_one_row: bool = False) -> None:
    """Sides of different lengths, a pair that has no token, weights."""
    data: dict[str, Any] = {"weights": noise(4, seed=9).abs()}
    for k, (side, width) in enumerate((("chosen", 13), ("rejected", 7))):
        lengths = torch.tensor([width, 3, 0, 5])
        mask = torch.arange(width) < lengths.unsqueeze(1)
        tokens = -noise(4, width, seed=k).abs() - 0.1
        values = {f"{side}_logprobs": tokens, f"ref_{side}_logprobs": tokens + 0.3 * noise(4, width, seed=3 + k)}
        if in_one_row:
            data |= {name: x[mask] for name, x in values.items()}
            data[f"{side}_cu_seqlens"] = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
        else:
            data |= {**values, f"{side}_mask": mask}

    def function(**arguments: Any) -> Any:
        return fr.preference_loss(loss=loss, return_pair_loss=True, **arguments)

    compare(function, device, data, ["chosen_logprobs", "rejected_logprobs"])


def check_correction(device: str, mode: Any, level: Any, *, in_one_row: bool = False) -> None:
    """Weights, what is kept, and all metrics."""
    old = -noise(4, 11).abs()
    data: dict[str, Any] = {"old_logprobs": old, "rollout_logprobs": old + 0.4 * noise(4, 11, seed=1)}
    mask = torch.arange(11) < _LENGTHS.unsqueeze(1)
    if in_one_row:
        bounds = torch.cat([torch.zeros(1, dtype=torch.int64), _LENGTHS.cumsum(0)])
        data = {**{name: x[mask] for name, x in data.items()}, "cu_seqlens": bounds}
    else:
        data["mask"] = mask
    options: dict[str, Any] = {"mode": mode, "level": level, "reject": {"token_k2": 0.5, "seq_mean_k3": 0.2}}

    def run(place: str) -> tuple[Tensor, Tensor, Any]:
        return fr.correction_weights(**{name: placed(x, place) for name, x in data.items()}, **options)

    with fr.backend("reference"):
        want, kept, metrics = run("cpu")
    got, keep, measured = run(device)
    close(got, want, "weights")
    assert torch.equal(keep.cpu(), kept)
    for name in metrics:
        close(measured[name], metrics[name], name)


def check_value_loss(device: str, loss: Any) -> None:
    """Loss, every metric and the gradient, ragged and packed, with a clip that only a kernel may read."""
    values, old, moved = noise(3, 40), noise(3, 40, seed=1), noise(3, 40, seed=2)
    mask = torch.arange(40) < torch.tensor([[40], [0], [17]])
    clip = torch.tensor(0.4, dtype=torch.float64)

    def run(on: str, packed: bool) -> list[Tensor]:
        leaf = values.to(on).requires_grad_()
        given = [x[mask.to(on)] if packed else x for x in (leaf, old.to(on), (old + moved).to(on))]
        layout: dict[str, Tensor] = {"cu_seqlens": torch.tensor([0, 40, 40, 57], device=on)} if packed else {}
        counted = None if packed else mask.to(on)
        result = fr.value_loss(*given, counted, clip=clip.to(on), loss=loss, explained_variance=True, **layout)
        return [result.loss, result.metrics.values_tensor, *torch.autograd.grad(result.loss, leaf)]

    with fr.backend("reference"):
        want = run("cpu", False)
    for packed in (False, True):
        for name, x, w in zip(("loss", "metrics", "gradient"), run(device, packed), want, strict=True):
            close(x, w, name)

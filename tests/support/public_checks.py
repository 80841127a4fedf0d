"""The public functions on any device, gradients through autograd, against the float64 reference on the CPU.

For the interpreted Triton kernels and for real GPUs; the raw kernels have their own, finer checks (raw_checks.py).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import fastreward as fr
from fastreward._runtime.layout import DIFFERENTIABLE
from fastreward.reference import group as group_reference
from fastreward.reference import logprobs as logprobs_reference
from fastreward.reference import policy_loss as policy_reference
from fastreward.reference import segments as segments_reference
from fastreward.reference import whiten as whiten_reference


def close(got: Tensor, want: Tensor, what: str, tolerance: float = 3e-6) -> None:
    """Equal up to `tolerance`, relative to the largest value where that is above 1, with NaN in the same places."""
    got, want = got.detach().cpu().double(), want.detach().cpu().double()
    scale = max(1.0, float(want.nan_to_num(0.0).abs().max())) if want.numel() else 1.0
    torch.testing.assert_close(
        got, want, atol=tolerance * scale, rtol=0.0, equal_nan=True, msg=lambda m: f"{what}: {m}"
    )


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def labels_for(vocab: int, *shape: int) -> Tensor:
    return torch.randint(0, vocab, shape, generator=torch.Generator().manual_seed(9))


def total(outputs: dict[str, Tensor]) -> Tensor:
    """A combination of outputs in which every token and every output has its own weight."""
    parts = []
    for i, x in enumerate(outputs.values()):
        weights = torch.linspace(-1.0, 1.0 + i, x.numel(), dtype=x.dtype, device=x.device)
        parts.append((x.flatten() * weights).sum())
    return torch.stack(parts).sum()


#: f(log p, log q) of what one read gives, and of what takes two.
DIVERGENCES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "reverse-kl": lambda log_p, log_q: log_p.exp() * (log_p - log_q),
    "hellinger": lambda log_p, log_q: ((log_p / 2).exp() - (log_q / 2).exp()) ** 2 / 2,
}


# ------------------------------------------------------------------------------------------------- log-probs
def check_token_logprobs(device: str, vocab: int = 301, inplace: bool = False) -> None:
    logits, labels = noise(2, 5, vocab) * 3, labels_for(vocab, 2, 5)
    temperature, mask = torch.linspace(0.5, 2.0, 10).view(2, 5), torch.arange(10).view(2, 5) % 4 != 1
    ids = labels_for(vocab, 2, 5, 3)
    exact = logits.double().requires_grad_()
    want = logprobs_reference.token_logprobs(exact, labels, temperature=temperature, mask=mask, token_ids=ids)
    (want_grad,) = torch.autograd.grad(total({n: want[n] for n in DIFFERENTIABLE}), exact)
    leaf = logits.to(device).requires_grad_()
    stats = fr.token_logprobs(
        leaf * 1 if inplace else leaf,
        labels.to(device),
        temperature=temperature.to(device),
        mask=mask.to(device),
        token_ids=ids.to(device),
        outputs=(*DIFFERENTIABLE, "argmax", "rank"),
        inplace_backward=inplace,
    )
    for name in DIFFERENTIABLE:
        assert getattr(stats, name).device.type == device
        close(getattr(stats, name), want[name], name)
    assert torch.equal(stats.argmax.cpu(), want["argmax"])
    assert torch.equal(stats.rank.cpu(), want["rank"])
    (grad,) = torch.autograd.grad(total({n: getattr(stats, n) for n in DIFFERENTIABLE}), leaf)
    close(grad, want_grad, "gradient of logits")


def check_divergence(device: str, name: str, inplace: bool = False, vocab: int = 301) -> None:
    """Of logits that are slices of a longer batch; every output, and gradients for both sides."""
    formula = DIVERGENCES[name]
    logits, teacher = noise(2, 6, vocab) * 3, noise(2, 6, vocab, seed=1) * 3
    labels, mask = labels_for(vocab, 2, 5), torch.arange(10).view(2, 5) % 4 != 1
    temperature, of_teacher = torch.linspace(0.5, 2.0, 10).view(2, 5), 1.3
    exact = [x.double().requires_grad_() for x in (logits, teacher)]
    log_p = (exact[0][:, :-1] / temperature.unsqueeze(-1)).log_softmax(-1)
    log_q = (exact[1][:, 1:] / of_teacher).log_softmax(-1)
    want = {
        "divergence": formula(log_p, log_q).sum(-1),
        "entropy": -(log_p.exp() * log_p).sum(-1),
        "logprobs": log_p.gather(-1, labels.unsqueeze(-1)).squeeze(-1),
    }
    want = {key: torch.where(mask, x, 0.0) for key, x in want.items()}
    want_grads = torch.autograd.grad(total(want), exact)
    leaves = [x.to(device).requires_grad_() for x in (logits, teacher)]
    stats = fr.token_divergence(
        (leaves[0] * 1 if inplace else leaves[0])[:, :-1], leaves[1][:, 1:], divergence=name, mask=mask.to(device),
        temperature=temperature.to(device), teacher_temperature=of_teacher, labels=labels.to(device),
        outputs=("entropy", "teacher_entropy", "logprobs", "top1_agreement"), inplace_backward=inplace,
    )  # fmt: skip
    for key, x in want.items():
        close(getattr(stats, key), x, key)
    assert stats.teacher_entropy is not None
    assert stats.top1_agreement is not None
    close(stats.teacher_entropy, torch.where(mask, -(log_q.exp() * log_q).sum(-1), 0.0), "teacher_entropy")
    same = (log_p.argmax(-1) == log_q.argmax(-1)) & mask
    assert torch.equal(stats.top1_agreement.cpu(), same.float())
    grads = torch.autograd.grad(total({key: getattr(stats, key) for key in want}), leaves)
    for side, got, exactly in zip(("logits", "teacher_logits"), grads, want_grads, strict=True):
        close(got, exactly, f"gradient of {side}")


def check_linear(device: str, dtype: torch.dtype, vocab: int = 301, width: int = 32, **options: Any) -> None:
    """As good as float64 from the same logits in f32; in bf16 within what rounding the logits to bf16 moves."""
    tolerance = 1e-5 if dtype == torch.float32 else 3e-2
    rows, options = 21, dict(options)
    inputs = [noise(rows, width).to(dtype), (noise(vocab, width, seed=1) * 0.3).to(dtype)]
    bias = noise(vocab, seed=2).to(dtype) if options.pop("bias", False) else None
    labels, mask = labels_for(vocab, rows), torch.arange(rows) % 5 != 2
    exact = [x.double().requires_grad_() for x in (*inputs, *([bias] if bias is not None else []))]
    logits = torch.nn.functional.linear(*exact) * options.get("logit_scale", 1.0)
    cap = options.get("softcap")
    logits = logits if cap is None else cap * torch.tanh(logits / cap)
    want = logprobs_reference.token_logprobs(logits, labels, temperature=0.7, mask=mask)
    names = ("logprobs", "entropy", "logsumexp")
    want_grads = torch.autograd.grad(total({n: want[n] for n in names}), exact)
    leaves = [x.detach().to(dtype).to(device).requires_grad_() for x in exact]
    stats = fr.linear_token_logprobs(
        leaves[0],
        leaves[1],
        labels.to(device),
        bias=leaves[2] if bias is not None else None,
        temperature=0.7,
        mask=mask.to(device),
        outputs=(*names, "rank"),
        chunk_size=128,
        **options,
    )
    for name in names:
        close(getattr(stats, name), want[name], name, tolerance)
    if dtype == torch.float32:
        assert torch.equal(stats.rank.cpu(), want["rank"])
    grads = torch.autograd.grad(total({n: getattr(stats, n) for n in names}), leaves)
    for name, grad, exact_grad in zip(("hidden", "weight", "bias"), grads, want_grads, strict=False):
        assert grad.dtype == dtype
        close(grad, exact_grad, f"gradient of {name}", tolerance)


# ------------------------------------------------------------------------------------------------- losses, groups
def check_policy_loss(device: str, packed: bool) -> None:
    old, mask = -noise(6, 37).abs(), noise(6, 37, seed=3) > -0.5
    mask[2] = False
    tokens = {"lp": old + 0.4 * noise(6, 37, seed=1), "old": old, "ref": old - 0.1, "entropy": old.abs(), "mask": mask}
    advantages = noise(6, seed=4)
    settings: dict[str, Any] = {"kl": "k3", "kl_coef": 0.05, "entropy_coef": 0.01, "aggregation": "seq-mean-token-mean"}

    def run(place: str, dtype: torch.dtype, reference: bool) -> tuple[Tensor, list[Tensor]]:
        x = {k: v.to(place) if k == "mask" else v.to(place, dtype) for k, v in tokens.items()}
        if packed and not reference:
            x = {k: v.flatten() for k, v in x.items()}
        leaves = [x["lp"].requires_grad_(), x["entropy"].requires_grad_()]
        given = {**settings, "ref_logprobs": x["ref"], "entropy": leaves[1], "mask": x["mask"]}
        per_sequence = advantages.to(place, dtype)
        if reference:
            loss = policy_reference.policy_loss(leaves[0], x["old"], per_sequence, **given)[0]
        else:
            bounds = {"cu_seqlens": torch.arange(7, device=place) * 37} if packed else {}
            loss = fr.policy_loss(leaves[0], x["old"], per_sequence, **given, **bounds).loss
        return loss, [g.reshape(6, 37) for g in torch.autograd.grad(loss * 1.7, leaves)]

    want, want_grads = run("cpu", torch.float64, True)
    loss, grads = run(device, torch.float32, False)
    close(loss, want, "loss")
    for name, grad, exact in zip(("logprobs", "entropy"), grads, want_grads, strict=True):
        close(grad * mask.sum(), exact * mask.sum(), f"gradient of {name}")


def check_group(device: str) -> None:
    rewards = noise(24)
    rewards[3] = torch.nan
    ids = torch.arange(24) % 5 * 1_000_003 - 7
    want = group_reference.group_advantages(rewards, ids)
    for given in (ids.to(device), [f"uid-{i}" for i in ids.tolist()]):
        close(fr.group_advantages(rewards.to(device), given), want, "advantages")
    want = group_reference.group_advantages(rewards, group_size=6, center="leave-one-out", scale="none")
    got = fr.group_advantages(rewards.to(device), group_size=6, center="leave-one-out", scale="none")
    close(got, want, "leave-one-out")
    turns = torch.arange(24).view(8, 3) % 5 - 1  # -1: no such turn
    groups, scores = fr.Groups.by(ids[:8].to(device), turns.to(device)), noise(8, 3)
    for name in ("std", "leave-one-out-logsumexp", "win-rate", "quantile"):
        found = fr.group_statistics(scores.to(device), groups, (name,))[name]
        there = turns.flatten() >= 0
        labels = (ids[:8, None] * 10 + turns).flatten()
        want = group_reference.group_statistics(scores.flatten()[there], labels[there], statistic=name)
        close(found.flatten()[there], want, name)


def check_whiten(device: str) -> None:
    x, mask = noise(5, 40) + 3, noise(5, 40, seed=1) > 0
    want, given = whiten_reference.whiten(x, mask), x.to(device)
    close(fr.whiten(given, mask.to(device)), want, "fresh")
    out = torch.empty_like(given)
    close(fr.whiten(given, mask.to(device, torch.float16), out=out), want, "out")
    assert fr.whiten(given, mask.to(device), out=given) is given
    close(given, want, "in place")


def check_segments(device: str) -> None:
    """Turns of a mask, their rewards, and back to the tokens, with gradients, padded and packed."""
    mask, x = noise(5, 40, seed=1) > -0.8, noise(5, 40)
    turns = segments_reference.segment_ids(mask)
    count = int(turns.max()) + 1
    exact = x.double().requires_grad_()
    options: dict[str, Any] = {"op": "softmin", "temperature": 0.5, "num_segments": count}
    want = segments_reference.segment_reduce(exact, turns, **options)
    placed = segments_reference.scatter_rewards(want, turns, place="spread")
    (want_grad,) = torch.autograd.grad(total({"values": want, "tokens": placed}), exact)
    for packed in (False, True):
        shape = (-1,) if packed else (5, 40)
        bounds = torch.arange(6, device=device) * 40 if packed else None
        leaf = x.to(device).requires_grad_()
        ids = fr.segment_ids(mask.to(device).reshape(shape), cu_seqlens=bounds)
        assert torch.equal(ids.cpu().view(5, 40), turns)
        values = fr.segment_reduce(leaf.reshape(shape), ids, cu_seqlens=bounds, **options)
        tokens = fr.scatter_rewards(values, ids, place="spread", cu_seqlens=bounds)
        close(values, want, "values")
        close(tokens.view(5, 40), placed, "tokens")
        (grad,) = torch.autograd.grad(total({"values": values, "tokens": tokens}), leaf)
        close(grad, want_grad, "gradient")
    ends = fr.scatter_rewards(noise(5).to(device), mask=mask.to(device))
    close(ends, segments_reference.scatter_rewards(noise(5).unsqueeze(-1), None, mask=mask), "outcomes")


# ------------------------------------------------------------------------------------------------- bad values
def check_messages(device: str) -> None:
    """What is checked wherever values may be read: on a GPU with FASTREWARD_DEBUG=1."""
    logits, labels = noise(2, 3, 10).to(device), torch.tensor([[0, 1, 2], [3, 10, 4]], device=device)
    with pytest.raises(ValueError, match=r"labels: expected integers in \[0, 10\).*got 10 at index \[1, 1\]"):
        fr.token_logprobs(logits, labels)
    with pytest.raises(ValueError, match=r"kept_tokens: expected ids below 10.*got 11 at index \[0, 0, 1\]"):
        fr.token_logprobs(logits, labels.clamp(max=9), kept_tokens=torch.tensor([3, 11], device=device).expand(2, 3, 2))
    tokens = noise(2, 3).to(device)
    advantages = torch.tensor([[1.0, 2.0, torch.nan], [1.0, torch.nan, 3.0]], device=device)
    mask = torch.tensor([[1, 1, 0], [1, 1, 1]], device=device)
    with pytest.raises(ValueError, match=r"advantages: .* where mask is set, got nan at (index )?\[1, 1\]"):
        fr.policy_loss(tokens, tokens, advantages, mask)
    with pytest.raises(ValueError, match=r"mask: expected at least one counted token, got an all-zero mask"):
        fr.policy_loss(tokens, tokens, tokens, torch.zeros_like(mask))
    packed, bounds = tokens.flatten(), torch.tensor([0, 2, 5], device=device)
    with pytest.raises(ValueError, match=r"cu_seqlens: expected bounds from 0 to 6"):
        fr.policy_loss(packed, packed, packed, cu_seqlens=bounds)
    with pytest.raises(ValueError, match=r"mask: expected at least 2 counted positions"):
        fr.whiten(tokens, torch.zeros_like(mask))

"""What lies under a mask never matters: not in the logits or hidden states, labels, temperatures, kept sets or ids, nor
in the gradient that comes back for such a token. No error, the same bits elsewhere, 0 there."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import fastreward as fr
from fastreward import losses

B, T, V, H = 2, 4, 9, 6
MASK = torch.tensor([[1, 0, 1, 1], [0, 1, 0, 1]], dtype=torch.bool)
OUT = ~MASK
BOUNDS = torch.tensor([0, T, B * T])
OUTPUTS = ("logprobs", "entropy", "logsumexp", "log_sum_sq_probs", "rank", "argmax", "mean_logit")


def inputs(seed: int = 0) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return {
        "logits": torch.randn(B, T, V, generator=g),
        "hidden": torch.randn(B, T, H, generator=g),
        "weight": torch.randn(V, H, generator=g),
        "labels": torch.randint(0, V, (B, T), generator=g),
        "temperature": torch.rand(B, T, generator=g) + 0.5,
        "upstream": torch.randn(B, T, generator=g),
        "keep_ids": torch.stack([torch.randperm(V, generator=g)[:3] for _ in range(B * T)]).reshape(B, T, 3),
        "keep_mask": torch.rand(B, T, V, generator=g) < 0.8,
        "token_ids": torch.randint(0, V, (B, T, 2), generator=g),
    }


def spoiled(kind: str, given: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same inputs with something illegal under the mask."""
    out = {name: x.clone() for name, x in given.items()}
    wrong: dict[str, list[tuple[str, Any]]] = {
        "nan": [("logits", torch.nan), ("hidden", torch.nan), ("temperature", torch.nan), ("upstream", torch.nan)],
        "inf": [("logits", torch.inf), ("hidden", torch.inf), ("temperature", torch.inf), ("upstream", torch.inf)],
        "small": [("logits", -torch.inf), ("hidden", -torch.inf), ("temperature", 0.0), ("keep_mask", False)],
        "ids": [("labels", -100), ("keep_ids", V + 3), ("token_ids", -1), ("temperature", -1.0)],
        "huge ids": [("labels", 10**9), ("keep_ids", 2), ("token_ids", 10**9)],  # 2, 2, 2: not unique
    }
    for name, value in wrong[kind]:
        out[name][OUT] = value
    return out


KINDS = ("nan", "inf", "small", "ids", "huge ids")


def token_logprobs(d: dict[str, Tensor], **options: Any) -> tuple[Tensor, ...]:
    stats = fr.token_logprobs(
        d["logits"], d["labels"], temperature=d["temperature"], mask=MASK, outputs=OUTPUTS, **options
    )
    return tuple(stats)


def with_ids(d: dict[str, Tensor]) -> tuple[Tensor, ...]:
    stats = fr.token_logprobs(
        d["logits"], d["labels"], temperature=d["temperature"], mask=MASK, token_ids=d["token_ids"],
        outputs=("logprobs", "id_logprobs"),
    )  # fmt: skip
    return stats.logprobs, stats.id_logprobs.sum(-1)


def linear(d: dict[str, Tensor]) -> tuple[Tensor, ...]:
    stats = fr.linear_token_logprobs(
        d["hidden"], d["weight"], d["labels"], temperature=d["temperature"], mask=MASK, outputs=OUTPUTS
    )
    return tuple(stats)


def policy(d: dict[str, Tensor], packed: bool, name: str, loss: losses.Loss) -> tuple[Tensor, ...]:
    old, shape = torch.full((B, T), -2.0), (lambda x: x.flatten(0, 1)) if packed else (lambda x: x)
    options = {"cu_seqlens": BOUNDS} if packed else {}
    head = (d["logits"],) if name == "logits" else (d["hidden"], d["weight"])
    first = (shape(head[0]), *head[1:])
    call = fr.logits_policy_loss if name == "logits" else fr.linear_policy_loss
    result = call(  # type: ignore[operator]
        *first, shape(d["labels"]), shape(old), torch.tensor([1.0, -1.0]), shape(MASK),
        temperature=shape(d["temperature"]), loss=loss, entropy_coef=0.1, return_token_loss=True, **options,
    )  # fmt: skip
    assert result.token_loss is not None
    return result.loss, result.token_loss.reshape(B, T), result.metrics.values_tensor


def fused(name: str, packed: bool) -> Callable[[dict[str, Tensor]], tuple[Tensor, ...]]:
    return lambda d: policy(d, packed, name, losses.ppo())


CALLS: dict[str, Callable[[dict[str, Tensor]], tuple[Tensor, ...]]] = {
    "token_logprobs": token_logprobs,
    "token_logprobs, kept ids": lambda d: token_logprobs(d, kept_tokens=d["keep_ids"]),
    "token_logprobs, keep mask": lambda d: token_logprobs(d, kept_tokens=d["keep_mask"]),
    "token_logprobs, ids": with_ids,
    "linear_token_logprobs": linear,
    "logits_policy_loss": fused("logits", False),
    "logits_policy_loss, packed": fused("logits", True),
    "logits_policy_loss, gspo": lambda d: policy(d, False, "logits", losses.gspo()),
    "linear_policy_loss": fused("linear", False),
    "linear_policy_loss, packed": fused("linear", True),
}


def run(call: Callable[[dict[str, Tensor]], tuple[Tensor, ...]], d: dict[str, Tensor]) -> list[Tensor]:
    """Outputs, then gradients for logits, hidden and weight."""
    leaves = {name: d[name].clone().requires_grad_() for name in ("logits", "hidden", "weight")}
    out = call({**d, **leaves})
    floats = [x for x in out if x.requires_grad]
    upstream = [d["upstream"] if x.ndim else torch.ones(()) for x in floats]
    grads = torch.autograd.grad(floats, list(leaves.values()), upstream, allow_unused=True)
    return [*(x.detach() for x in out), *(x for x in grads if x is not None)]


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", CALLS)
def test_nothing_leaks(name: str, kind: str, backend: fr._dispatch.Backend) -> None:
    given = inputs()
    with fr.backend(backend):
        clean, dirty = run(CALLS[name], given), run(CALLS[name], spoiled(kind, given))
    for want, got in zip(clean, dirty, strict=True):
        assert torch.equal(got, want)
        if got.ndim >= 2 and got.shape[:2] == (B, T):
            assert not got[OUT].any()


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # Dynamo's own, at a graph break
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("name", ["token_logprobs, kept ids", "linear_token_logprobs", "logits_policy_loss"])
def test_nothing_leaks_compiled(name: str) -> None:
    given = inputs()
    clean = run(CALLS[name], given)
    compiled = torch.compile(CALLS[name], backend="aot_eager")
    for kind in ("nan", "ids"):
        for want, got in zip(clean, run(compiled, spoiled(kind, given)), strict=True):
            torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)


def test_a_legal_neighbour_is_still_checked() -> None:
    """Illegal where the mask counts is an error, whatever the mask is."""
    for name, value, message in (
        ("labels", -100, "labels: expected integers"),
        ("temperature", 0.0, "temperature: expected positive"),
        ("keep_ids", V, "kept_tokens: expected ids below"),
        ("keep_ids", 1, "kept_tokens: expected ids unique"),
        ("token_ids", V, "token_ids: expected integers"),
    ):
        d = inputs()
        d[name][0, 2] = value
        with pytest.raises(ValueError, match=message):
            fr.token_logprobs(
                d["logits"], d["labels"], temperature=d["temperature"], mask=MASK, kept_tokens=d["keep_ids"],
                token_ids=d["token_ids"], outputs=("id_logprobs",),
            )  # fmt: skip


@pytest.mark.parametrize("name", ["logits", "linear"])
def test_what_keep_drops_may_have_any_label_and_temperature(name: str) -> None:
    """policy_loss's keep counts as a mask, also for the labels (-100) and temperatures of its sequence."""
    d = inputs()
    keep, every = torch.tensor([True, False]), torch.ones(B, T)
    head = (d["logits"],) if name == "logits" else (d["hidden"], d["weight"])
    call: Any = fr.logits_policy_loss if name == "logits" else fr.linear_policy_loss

    def run_with(labels: Tensor, temperature: Tensor) -> tuple[Tensor, ...]:
        leaves = [x.clone().requires_grad_() for x in head]
        old, advantages = torch.full((B, T), -2.0), torch.tensor([1.0, -1.0])
        result = call(*leaves, labels, old, advantages, every, keep=keep, temperature=temperature)
        return result.loss.detach(), *torch.autograd.grad(result.loss, leaves)

    want = run_with(d["labels"], d["temperature"])
    labels, temperature = d["labels"].clone(), d["temperature"].clone()
    labels[1], temperature[1] = -100, 0.0
    for a, b in zip(run_with(labels, temperature), want, strict=True):
        assert torch.equal(a, b)
    with pytest.raises(ValueError, match="labels: expected integers"):
        call(*head, labels, torch.zeros(B, T), torch.ones(B), every)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_temperature_per_token_with_a_mask(backend: fr._dispatch.Backend) -> None:
    """Every counted token has its own temperature, not that of the token in its place among all of them."""
    d = inputs()
    with fr.backend(backend):
        got = [fr.token_logprobs(d["logits"], d["labels"], temperature=d["temperature"], mask=MASK).logprobs]
        logits = d["hidden"] @ d["weight"].t()
        got.append(
            fr.linear_token_logprobs(
                d["hidden"], d["weight"], d["labels"], temperature=d["temperature"], mask=MASK
            ).logprobs
        )
    for x, z in zip(got, (d["logits"], logits), strict=True):
        tempered = (z.double() / d["temperature"].double().unsqueeze(-1)).log_softmax(-1)
        want = tempered.gather(-1, d["labels"].unsqueeze(-1)).squeeze(-1) * MASK
        torch.testing.assert_close(x.double(), want, rtol=1e-6, atol=2e-6)


def test_packed_tokens_without_credit() -> None:
    """A masked-out token inside a packed tree has log-prob 0 and gives its row of logits no gradient."""
    tokens = torch.tensor([[1, 2, 3, 4], [1, 2, 5, 6]])
    mask = torch.tensor([[1, 0, 1, 1], [1, 0, 0, 1]])
    packed = fr.PrefixTree(tokens, mask).pack()
    credit = packed.credited & (packed.parent >= 0)
    assert (~packed.credited).any()
    logits = torch.randn(len(packed), V, generator=torch.Generator().manual_seed(1))
    read = torch.zeros(len(packed), dtype=torch.bool)
    read[packed.parent[credit]] = True
    logits[~read] = torch.nan  # rows that predict no token with credit
    leaf = logits.requires_grad_()
    stats = packed.token_logprobs(leaf, outputs=("logprobs", "entropy"))
    want = torch.zeros(len(packed), dtype=torch.float64)
    above = packed.parent[credit]
    want[credit] = logits.detach().double().log_softmax(-1)[above, packed.token_ids[credit]]
    torch.testing.assert_close(stats.logprobs.detach().double(), want, rtol=1e-6, atol=2e-6)
    assert not stats.logprobs[~credit].any()
    assert not stats.entropy[~credit].any()
    upstream = torch.where(credit, 1.0, torch.nan)
    (grad,) = torch.autograd.grad([stats.logprobs, stats.entropy], leaf, [upstream, upstream])
    assert not grad[~read].any()
    assert grad.isfinite().all()
    assert grad[read].any(-1).all()

"""return_tokens=: what happened at each token, against plain torch, and that asking changes nothing else."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import fastreward as fr
from fastreward import losses

B, T = 4, 9
LENGTHS = torch.tensor([9, 4, 1, 6])
MASK = torch.arange(T) < LENGTHS[:, None]


@losses.define
def reporting(t: Any, cap: float = 2.0) -> Any:
    """Reports per token, per sequence, for the batch, conditions, and under the name of a token's own."""
    capped = losses.minimum(t.ratio, cap)
    t.report(capped=capped, over=t.ratio > cap, mean_advantage=losses.seq_mean(t.advantage), ratio=t.log_ratio)
    t.report(best=losses.batch_max(t.advantage))
    return -t.advantage * capped


@pytest.fixture
def data() -> dict[str, Tensor]:
    torch.manual_seed(0)
    old = -torch.rand(B, T) * 2
    given = {name: old + 0.5 * torch.randn(B, T) for name in ("logprobs", "ref_logprobs")}
    return {**given, "old_logprobs": old, "advantages": torch.randn(B, T), "mask": MASK}


def trained(data: dict[str, Tensor], loss: Any, *names: str, **options: Any) -> tuple[fr.PolicyLoss, Tensor]:
    leaf = data["logprobs"].clone().requires_grad_()
    result = fr.policy_loss(**{**data, "logprobs": leaf}, loss=loss, return_tokens=names, **options)
    (grad,) = torch.autograd.grad(result.loss, leaf)
    return result, grad


def ratio_of(data: dict[str, Tensor]) -> Tensor:
    return (data["logprobs"] - data["old_logprobs"]).double().exp()


def clips(low: Tensor, high: Tensor, dual: Any = False) -> Tensor:
    """Codes from conditions."""
    code = torch.zeros(B, T)
    code[low], code[high] = float(fr.Clip.LOW), float(fr.Clip.HIGH)
    return torch.where(torch.as_tensor(dual), torch.tensor(float(fr.Clip.DUAL)), code)


def expected(name: str, data: dict[str, Tensor]) -> Tensor:
    """The clip codes of each loss, from its paper's formula."""
    ratio, advantage = ratio_of(data), data["advantages"]
    if name == "gspo":
        log = ((data["logprobs"] - data["old_logprobs"]) * MASK).sum(-1, keepdim=True) / LENGTHS[:, None]
        ratio, advantage = log.exp().expand(B, T), (advantage * MASK).sum(-1, keepdim=True) / LENGTHS[:, None]
    bounds = {"gspo": (0.97, 1.04), "cispo": (0.0, 1.3)}.get(name, (0.8, 1.28))
    dual = (advantage < 0) & (ratio > 1.5) if name == "dual clip" else False
    return clips((ratio < bounds[0]) & (advantage < 0), (ratio > bounds[1]) & (advantage > 0), dual)


LOSSES = {
    "ppo": losses.ppo(0.2, 0.28),
    "dual clip": losses.ppo(0.2, 0.28, dual_clip=1.5),
    "gspo": losses.gspo(0.03, 0.04),
    "cispo": losses.cispo(clip_high=1.3, convention="trl"),
}


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("name", LOSSES)
def test_against_plain_torch(data: dict[str, Tensor], name: str, backend: str) -> None:
    data["logprobs"][1, 4:] = float("nan")  # under the mask
    with fr.backend(backend):
        result, grad = trained(data, LOSSES[name], "clip", "ratio", "kl", "loss", "logprob", return_token_loss=True)
        plain, plain_grad = trained(data, LOSSES[name])
    tokens = {k: v.double() for k, v in result.tokens.items()}
    assert list(tokens) == ["clip", "ratio", "kl", "loss", "logprob"]
    gap = (data["ref_logprobs"] - data["logprobs"]).double()
    wanted = {"ratio": ratio_of(data), "kl": gap.exp() - gap - 1, "logprob": data["logprobs"].double()}
    clean = {k: v.nan_to_num() for k, v in data.items()}
    wanted["clip"] = expected(name, clean).double()
    assert result.token_loss is not None
    wanted["loss"] = result.token_loss.double()
    for key, value in wanted.items():
        torch.testing.assert_close(tokens[key], torch.where(MASK, value, 0.0), rtol=1e-5, atol=1e-6)
    assert len(tokens["clip"][MASK].unique()) > 1
    for which in ("low", "high", "dual"):
        if f"clip_fraction_{which}" in result.metrics and name != "gspo":  # whose fractions are over sequences
            share = (tokens["clip"][MASK] == fr.Clip[which.upper()]).double().mean()
            torch.testing.assert_close(result.metrics[f"clip_fraction_{which}"].double(), share, rtol=1e-6, atol=1e-7)
    assert torch.equal(result.loss, plain.loss)
    assert torch.equal(result.metrics.values_tensor, plain.metrics.values_tensor)
    assert torch.equal(grad, plain_grad)
    assert not plain.tokens


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_a_loss_reports(data: dict[str, Tensor], backend: str) -> None:
    """Values per sequence and for the batch take another pass over the tokens, and change no bit of the gradient."""
    names = ("capped", "over", "mean_advantage", "ratio", "best")
    with fr.backend(backend):
        result, grad = trained(data, reporting(1.2), *names)
        assert torch.equal(grad, trained(data, reporting(1.2))[1])
    ratio, advantage = ratio_of(data), data["advantages"]
    mean = (advantage * MASK).sum(-1) / LENGTHS
    wanted = {
        "capped": ratio.clamp(max=1.2), "over": (ratio > 1.2).double(), "mean_advantage": mean[:, None].expand(B, T),
        "ratio": data["logprobs"] - data["old_logprobs"], "best": advantage[MASK].max().expand(B, T),
    }  # fmt: skip
    for name, value in wanted.items():
        torch.testing.assert_close(result.tokens[name].double(), torch.where(MASK, value.double(), 0.0))


@pytest.mark.parametrize("name", ["ppo", "gspo"])
def test_packed_is_padded(data: dict[str, Tensor], name: str) -> None:
    names, (padded, _) = ("clip", "ratio", "loss"), trained(data, LOSSES[name], "clip", "ratio", "loss")
    packed = {k: x[MASK] for k, x in data.items() if k != "mask"}
    bounds = torch.nn.functional.pad(LENGTHS.cumsum(0), (1, 0))
    result, _ = trained(packed, LOSSES[name], *names, cu_seqlens=bounds)
    for key in names:
        assert torch.equal(result.tokens[key], padded.tokens[key][MASK])


def test_from_logits_and_hidden_states(data: dict[str, Tensor]) -> None:
    hidden, weight = torch.randn(B, T, 5), torch.randn(11, 5)
    labels, names = torch.randint(0, 11, (B, T)), ("logprob", "entropy", "ratio", "clip")
    rest = {k: data[k] for k in ("old_logprobs", "advantages", "mask")} | {"loss": LOSSES["ppo"]}
    logits = hidden @ weight.T
    stats = fr.token_logprobs(logits, labels, mask=MASK, outputs=("logprobs", "entropy"))
    whole = fr.policy_loss(stats.logprobs, **rest, entropy=stats.entropy, return_tokens=names).tokens
    for trains in (False, True):
        head = (hidden.clone().requires_grad_(trains), weight, labels)
        found = (
            fr.logits_policy_loss(logits.clone().requires_grad_(trains), labels, **rest, return_tokens=names),
            fr.linear_policy_loss(*head, **rest, return_tokens=names),
        )
        for result in found:
            for name in names:
                torch.testing.assert_close(result.tokens[name], whole[name], rtol=1e-4, atol=1e-5)


def test_arrays_come_back_as_arrays(data: dict[str, Tensor]) -> None:
    arrays = {k: x.numpy() for k, x in data.items()}
    tokens = fr.policy_loss(**arrays, return_tokens=["clip"]).tokens  # type: ignore[arg-type]
    assert type(tokens["clip"]).__name__ == "ndarray"


@pytest.mark.parametrize(
    ("names", "error", "message"),
    [
        ("ratio", TypeError, r"return_tokens: expected a tuple of names, got 'ratio'; write \('ratio',\)"),
        ((1,), TypeError, r"return_tokens: expected a tuple of names, got \(1,\)"),
        (
            ("ratios",),
            ValueError,
            r"expected one of 'logprob', 'ratio', 'clip', 'loss', .*_high', got 'ratios'",
        ),
        (("kl",), ValueError, "got 'kl'; pass ref_logprobs="),
        (("entropy",), ValueError, "got 'entropy'; pass entropy="),
    ],
)
def test_refused(data: dict[str, Tensor], names: Any, error: type[Exception], message: str) -> None:
    del data["ref_logprobs"]
    with pytest.raises(error, match=message):
        fr.policy_loss(**data, return_tokens=names)


def test_a_loss_without_a_clip(data: dict[str, Tensor]) -> None:
    with pytest.raises(ValueError, match=r"got 'clip'; reinforce \(score.py:\d+\) reports no clip"):
        trained(data, losses.reinforce(), "clip")

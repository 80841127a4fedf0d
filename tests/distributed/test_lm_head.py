"""An LM head whose rows are split over ranks: statistics, and the gradients for hidden states, weight and bias."""

from __future__ import annotations

from typing import Any

import pytest
import rank_calls
import torch
from criterion import close_to_one_process
from rank_pool import RankPool

import fastreward as fr

OUTPUTS = ("logprobs", "entropy", "logsumexp", "mean_logit", "log_sum_sq_probs", "max_logprob", "argmax", "rank")
V, H = 70, 24
CUTS = ([35, 35], [20, 50], [70], [23, 23, 24], [30, 0, 40])
CAPPED = {"softcap": 3.0, "logit_scale": 0.7, "temperature": 1.3, "chunk_size": 16}


def problem(dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """Hidden states [3, 5, H], head, bias, labels, a mask under which there is NaN."""
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(3, 5, H, generator=generator)
    weight, bias = torch.randn(V, H, generator=generator), torch.randn(V, generator=generator)
    labels = torch.randint(0, V, (3, 5), generator=generator)
    mask = torch.rand(3, 5, generator=generator) > 0.3
    hidden[~mask], labels[~mask] = torch.nan, -7
    given = {"hidden": hidden.to(dtype), "weight": weight.to(dtype), "bias": bias.to(dtype)}
    return given | {"labels": labels, "mask": mask}


def leaves(p: dict[str, torch.Tensor], cuts: list[int]) -> list[dict[str, torch.Tensor]]:
    """The head's slices, and the hidden states of all."""
    weights, biases = p["weight"].split(cuts), p["bias"].split(cuts)
    return [{"hidden": p["hidden"], "weight": w, "bias": b} for w, b in zip(weights, biases, strict=True)]


@pytest.mark.parametrize("options", [{}, CAPPED], ids=["plain", "capped"])
@pytest.mark.parametrize("cuts", CUTS, ids=str)
def test_statistics_and_gradients(cuts: list[int], options: dict[str, Any], ranks: RankPool) -> None:
    p = problem()
    upstream = {name: torch.randn(3, 5) for name in ("logprobs", "entropy", "log_sum_sq_probs")}
    request = {
        "operation": "linear_token_logprobs", "named": {"labels": p["labels"]}, "upstream": upstream,
        "options": {"mask": p["mask"], "outputs": OUTPUTS, **options},
    }  # fmt: skip
    one = rank_calls.call(None, leaves=leaves(p, [V])[0], **request)
    found = ranks.run(rank_calls.call, [{**request, "leaves": own} for own in leaves(p, cuts)])
    for name in OUTPUTS:
        assert all(torch.equal(rank["out"][name], found[0]["out"][name]) for rank in found), name
        close_to_one_process(found[0]["out"][name], one["out"][name], name)
    for name in ("weight", "bias"):
        close(torch.cat([rank["grads"][name] for rank in found]), one["grads"][name], name)
    for rank in found:
        close(rank["grads"]["hidden"], one["grads"]["hidden"], "hidden")


def close(got: torch.Tensor, expected: torch.Tensor, what: str) -> None:
    """A sum over tokens or columns, in another order."""
    size = float(expected.abs().nan_to_num().max())
    eps = torch.finfo(expected.dtype).eps
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-6 + 4 * eps * size, equal_nan=True, msg=what)


def test_each_slices_part_of_the_gradient(ranks: RankPool) -> None:
    """Where the model sums it: the parts add up to the whole's."""
    p, cuts = problem(), [30, 0, 40]
    request = {
        "operation": "linear_token_logprobs", "named": {"labels": p["labels"]},
        "upstream": {"logprobs": torch.randn(3, 5)}, "options": {"mask": p["mask"]},
    }  # fmt: skip
    one = rank_calls.call(None, leaves=leaves(p, [V])[0], **request)
    request["options"] = {"mask": p["mask"], "sum_hidden_grad": False}
    found = ranks.run(rank_calls.call, [{**request, "leaves": own} for own in leaves(p, cuts)])
    assert not found[1]["grads"]["hidden"].any()
    close(sum(rank["grads"]["hidden"] for rank in found), one["grads"]["hidden"], "hidden")


def test_bfloat16(ranks: RankPool) -> None:
    p = problem(torch.bfloat16)
    request = {
        "operation": "linear_token_logprobs", "named": {"labels": p["labels"]},
        "upstream": {"logprobs": torch.randn(3, 5)}, "options": {"mask": p["mask"]},
    }  # fmt: skip
    one = rank_calls.call(None, leaves=leaves(p, [V])[0], **request)
    found = ranks.run(rank_calls.call, [{**request, "leaves": own} for own in leaves(p, [20, 50])])
    close_to_one_process(found[0]["out"]["logprobs"], one["out"]["logprobs"], "logprobs")
    for rank in found:
        close(rank["grads"]["hidden"], one["grads"]["hidden"], "hidden")


def test_nobody_counts(ranks: RankPool) -> None:
    p = problem()
    request = {
        "operation": "linear_token_logprobs", "named": {"labels": p["labels"]},
        "upstream": {"logprobs": torch.ones(3, 5)}, "options": {"mask": torch.zeros(3, 5)},
    }  # fmt: skip
    for rank in ranks.run(rank_calls.call, [{**request, "leaves": own} for own in leaves(p, [20, 50])]):
        assert not rank["out"]["logprobs"].any()
        assert not any(x.any() for x in rank["grads"].values())


def test_a_refused_argument_ends_the_call_everywhere(ranks: RankPool) -> None:
    p = problem()
    request = {"operation": "linear_token_logprobs", "named": {"labels": p["labels"]}, "options": {"mask": p["mask"]}}
    own = leaves(p, [20, 50])
    own[1]["hidden"] = own[1]["hidden"][..., :5]
    first, second = ranks.ask(rank_calls.call, [{**request, "leaves": x} for x in own])
    assert first.error == "ValueError: process_group: rank 1 of it has refused its arguments; its own error says why"
    assert second.error is not None
    assert "weight: expected shape [V, 5]" in second.error
    answers = ranks.ask(
        rank_calls.call, [{**request, "leaves": x, "named": {"labels": p["labels"].clamp(min=0) + 65}} for x in
                          leaves(p, [20, 50])]
    )  # fmt: skip
    for answer in answers:
        assert answer.error is not None
        assert "labels: expected integers in [0, 70)" in answer.error


LOSSES = {
    "ppo": (fr.losses.ppo, {}),
    "entropy": (fr.losses.ppo, {"entropy_coef": 0.1}),
    "gspo": (fr.losses.gspo, {}),
    "kl": (fr.losses.cispo, {"kl": "k3", "kl_coef": 0.05, "aggregation": "seq-mean-token-mean"}),
}


def loss_arguments(name: str, mask: torch.Tensor) -> dict[str, Any]:
    """What a policy loss takes besides the log-probs."""
    make, options = LOSSES[name]
    given = {"old_logprobs": torch.randn(3, 5) - 4, "advantages": torch.randn(3), "mask": mask, "loss": make()}
    return given | options | ({"ref_logprobs": torch.randn(3, 5) - 4} if "kl" in options else {})


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("cuts", [[35, 35], [30, 0, 40]], ids=str)
def test_losses_from_hidden_states(name: str, cuts: list[int], ranks: RankPool) -> None:
    """Bitwise the same loss on every rank."""
    p = problem()
    options = loss_arguments(name, p["mask"]) | CAPPED
    request = {"operation": "linear_policy_loss", "named": {"labels": p["labels"]}, "options": options}
    one = rank_calls.call(None, leaves=leaves(p, [V])[0], **request)
    found = ranks.run(rank_calls.call, [{**request, "leaves": own} for own in leaves(p, cuts)])
    assert all(torch.equal(rank["out"]["loss"], found[0]["out"]["loss"]) for rank in found)
    assert all(torch.equal(rank["out"]["metrics"], found[0]["out"]["metrics"]) for rank in found)
    close(found[0]["out"]["loss"], one["out"]["loss"], "loss")
    for part in ("weight", "bias"):
        close(torch.cat([rank["grads"][part] for rank in found]), one["grads"][part], part)
    for rank in found:
        close(rank["grads"]["hidden"], one["grads"]["hidden"], "hidden")


@pytest.mark.parametrize("inplace", [False, True], ids=["fresh", "inplace"])
@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("cuts", [[35, 35], [20, 50], [30, 0, 40]], ids=str)
def test_losses_from_logits(name: str, cuts: list[int], inplace: bool, ranks: RankPool) -> None:
    """Bitwise the same loss on every rank."""
    p = problem()
    logits = 3 * torch.randn(3, 5, V)
    logits[~p["mask"]] = torch.nan
    request = {
        "operation": "logits_policy_loss", "named": {"labels": p["labels"]}, "copied": inplace,
        "options": loss_arguments(name, p["mask"]) | {"inplace": inplace, "temperature": torch.rand(3, 5) + 0.5},
    }  # fmt: skip
    one = rank_calls.call(None, leaves={"logits": logits}, **request)
    found = ranks.run(rank_calls.call, [{**request, "leaves": {"logits": x}} for x in logits.split(cuts, -1)])
    assert all(torch.equal(rank["out"]["loss"], found[0]["out"]["loss"]) for rank in found)
    close(found[0]["out"]["loss"], one["out"]["loss"], "loss")
    close(torch.cat([rank["grads"]["logits"] for rank in found], -1), one["grads"]["logits"], "logits")

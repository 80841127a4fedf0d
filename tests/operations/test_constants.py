"""Arguments that are constants by contract: one that requires a gradient is an error, not a gradient lost."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import fastreward as fr
from fastreward import losses, recipes

# torch's own, at its first forward-mode derivative.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")

B, T, V = 2, 3, 7
LABELS = torch.zeros(B, T, dtype=torch.int64)


def lp() -> Tensor:
    return torch.linspace(-2.0, -0.1, B * T).reshape(B, T)


def ones(*shape: int) -> Tensor:
    return torch.ones(shape)


@losses.define
def scaled(t: Any, factor: Tensor | float = 1.0) -> Any:
    return -t.advantage * t.logprob * factor * t.extra("teacher")


@losses.define
def correcting(t: Any) -> Any:
    return -t.advantage * t.logprob * losses.exp(t.rollout_logprob)


@losses.define(pairs=True)
def pairs(t: Any) -> Any:
    chosen = losses.seq_sum(t.chosen.logprob * t.chosen.weight * t.chosen.extra("quality"))
    rejected = losses.seq_sum(t.rejected.logprob * t.rejected.weight)
    return (rejected - chosen) * t.extra("margin")


def policy(**changed: Any) -> dict[str, Any]:
    return {"logprobs": lp(), "old_logprobs": lp(), "advantages": ones(B), **changed}


def preference(**changed: Any) -> dict[str, Any]:
    side = {"chosen_weights": ones(B, T), "rejected_weights": ones(B, T), "chosen_extra": {"quality": ones(B, T)}}
    both = {"chosen_logprobs": lp(), "rejected_logprobs": lp() - 1, "loss": pairs(), "extra": {"margin": ones(B)}}
    return both | side | changed


def tree() -> fr.PrefixTree:
    return fr.PrefixTree(torch.tensor([[1, 2, 3], [1, 2, 4]]))


#: The call, of an argument that it names, and that argument's value.
CALLS: dict[str, tuple[Callable[[Tensor], object], Tensor]] = {
    "token_logprobs temperature": (
        lambda x: fr.token_logprobs(torch.zeros(B, T, V), LABELS, temperature=x),
        ones(B, T),
    ),
    "token_logprobs mask": (lambda x: fr.token_logprobs(torch.zeros(B, T, V), LABELS, mask=x), ones(B, T)),
    "linear_token_logprobs temperature": (
        lambda x: fr.linear_token_logprobs(ones(B, T, 4), ones(V, 4), LABELS, temperature=x),
        ones(B, T),
    ),
    "policy_loss old_logprobs": (lambda x: fr.policy_loss(**policy(old_logprobs=x)), lp()),
    "policy_loss advantages": (lambda x: fr.policy_loss(**policy(advantages=x)), ones(B)),
    "policy_loss advantages per token": (lambda x: fr.policy_loss(**policy(advantages=x)), ones(B, T)),
    "policy_loss mask": (lambda x: fr.policy_loss(**policy(mask=x)), ones(B, T)),
    "policy_loss keep": (lambda x: fr.policy_loss(**policy(keep=x)), ones(B)),
    "policy_loss weights": (lambda x: fr.policy_loss(**policy(weights=x)), ones(B, T)),
    "policy_loss weights per sequence": (lambda x: fr.policy_loss(**policy(weights=x)), ones(B)),
    "policy_loss ref_logprobs": (
        lambda x: fr.policy_loss(**policy(ref_logprobs=x, kl="k3", kl_coef=0.1)),
        lp(),
    ),
    "policy_loss rollout_logprobs": (
        lambda x: fr.policy_loss(**policy(rollout_logprobs=x, loss=correcting())),
        lp(),
    ),
    "policy_loss extra['teacher']": (
        lambda x: fr.policy_loss(**policy(extra={"teacher": x}, loss=scaled())),
        lp(),
    ),
    "policy_loss extra['teacher'] per sequence": (
        lambda x: fr.policy_loss(**policy(extra={"teacher": x}, loss=scaled())),
        ones(B),
    ),
    "policy_loss extra['teacher'] number": (
        lambda x: fr.policy_loss(**policy(extra={"teacher": x}, loss=scaled())),
        ones(),
    ),
    "policy_loss kl_coef": (
        lambda x: fr.policy_loss(**policy(ref_logprobs=lp(), kl="k3", kl_coef=x)),
        ones(),
    ),
    "policy_loss entropy_coef": (
        lambda x: fr.policy_loss(**policy(entropy=ones(B, T), entropy_coef=x)),
        ones(),
    ),
    "token_logprobs temperature number": (
        lambda x: fr.token_logprobs(torch.zeros(B, T, V), LABELS, temperature=x),
        ones(),
    ),
    "linear_token_logprobs softcap": (
        lambda x: fr.linear_token_logprobs(ones(B, T, 4), ones(V, 4), LABELS, softcap=x),
        ones(),
    ),
    "linear_token_logprobs logit_scale": (
        lambda x: fr.linear_token_logprobs(ones(B, T, 4), ones(V, 4), LABELS, logit_scale=x),
        ones(),
    ),
    "correction_weights high": (lambda x: fr.correction_weights(lp(), lp(), high=2 * x), ones()),
    "group_advantages eps": (lambda x: fr.group_advantages(ones(4), group_size=2, eps=x), ones()),
    "group_advantages mask": (lambda x: fr.group_advantages(ones(4), group_size=2, mask=x), ones(4)),
    "group_statistics mask": (lambda x: fr.group_statistics(ones(4), group_size=2, mask=x), ones(4)),
    "whiten eps": (lambda x: fr.whiten(lp(), eps=x), ones()),
    "PrefixTree.aggregate discount": (lambda x: tree().aggregate(ones(B), discount=x), ones()),
    "policy_loss normalizer": (lambda x: fr.policy_loss(**policy(normalizer=x)), ones()),
    "logits_policy_loss temperature": (
        lambda x: fr.logits_policy_loss(torch.zeros(B, T, V), LABELS, lp(), ones(B), temperature=x),
        ones(B, T),
    ),
    "logits_policy_loss weights": (
        lambda x: fr.logits_policy_loss(torch.zeros(B, T, V), LABELS, lp(), ones(B), weights=x),
        ones(B, T),
    ),
    "logits_policy_loss scale": (
        lambda x: fr.logits_policy_loss(torch.zeros(B, T, V), LABELS, lp(), ones(B), scale=x),
        ones(),
    ),
    "linear_policy_loss advantages": (
        lambda x: fr.linear_policy_loss(ones(B, T, 4), ones(V, 4), LABELS, lp(), x),
        ones(B),
    ),
    "loss factor": (lambda x: scaled(factor=x), ones(B)),
    "loss factor number": (lambda x: scaled(factor=x), ones()),
    "preference_loss ref_chosen_logprobs": (
        lambda x: fr.preference_loss(lp(), lp(), ref_chosen_logprobs=x, ref_rejected_logprobs=lp()),
        lp(),
    ),
    "preference_loss rejected_weights": (lambda x: fr.preference_loss(**preference(rejected_weights=x)), ones(B, T)),
    "preference_loss chosen_extra['quality']": (
        lambda x: fr.preference_loss(**preference(chosen_extra={"quality": x})),
        ones(B, T),
    ),
    "preference_loss extra['margin']": (lambda x: fr.preference_loss(**preference(extra={"margin": x})), ones(B)),
    "preference_loss extra['margin'] number": (
        lambda x: fr.preference_loss(**preference(extra={"margin": x})),
        ones(),
    ),
    "preference_loss weights": (lambda x: fr.preference_loss(**preference(weights=x)), ones(B)),
    "preference_loss chosen_mask": (lambda x: fr.preference_loss(**preference(chosen_mask=x)), ones(B, T)),
    "correction_weights old_logprobs": (lambda x: fr.correction_weights(x, lp()), lp()),
    "correction_weights rollout_logprobs": (lambda x: fr.correction_weights(lp(), x), lp()),
    "group_advantages rewards": (lambda x: fr.group_advantages(x, group_size=2), ones(4)),
    "group_advantages rewards of components": (lambda x: fr.group_advantages(x, group_size=2), ones(4, 2)),
    "group_advantages center": (lambda x: fr.group_advantages(ones(4), group_size=2, center=x), ones(4)),
    "group_advantages scale": (lambda x: fr.group_advantages(ones(4), group_size=2, scale=x), ones(4)),
    "group_advantages lengths": (
        lambda x: fr.group_advantages(ones(4), group_size=2, center="length-weighted", lengths=x),
        ones(4),
    ),
    "group_statistics x": (lambda x: fr.group_statistics(x, group_size=2), ones(4)),
    "group_statistics weights": (
        lambda x: fr.group_statistics(ones(4), None, ("weighted-mean",), group_size=2, weights=x),
        ones(4),
    ),
    "group_advantages component_weights": (
        lambda x: fr.group_advantages(ones(4, 2), group_size=2, component_weights=x),
        ones(2),
    ),
    "group_advantages component_weights[1]": (
        lambda x: fr.group_advantages(ones(4, 2), group_size=2, component_weights=[1.0, x]),
        torch.tensor(1.0),
    ),
    "token_rewards scores": (lambda x: fr.token_rewards(x, ones(B, T)), ones(B)),
    "token_rewards mask": (lambda x: fr.token_rewards(ones(B), x), ones(B, T)),
    "token_rewards logprobs": (
        lambda x: fr.token_rewards(ones(B), None, logprobs=x, ref_logprobs=lp(), kl_coef=0.1),
        lp(),
    ),
    "token_rewards kl_coef": (
        lambda x: fr.token_rewards(ones(B), None, logprobs=lp(), ref_logprobs=lp(), kl_coef=x),
        ones(),
    ),
    "token_divergence temperature": (
        lambda x: fr.token_divergence(torch.zeros(B, T, V), torch.zeros(B, T, V), temperature=x),
        ones(B, T),
    ),
    "token_divergence teacher_temperature": (
        lambda x: fr.token_divergence(torch.zeros(B, T, V), torch.zeros(B, T, V), teacher_temperature=x),
        ones(),
    ),
    "linear_divergence teacher_hidden": (
        lambda x: fr.linear_divergence(ones(B, T, 4), ones(V, 4), x, ones(V, 3)),
        ones(B, T, 3),
    ),
    "linear_divergence teacher_weight": (
        lambda x: fr.linear_divergence(ones(B, T, 4), ones(V, 4), ones(B, T, 3), x),
        ones(V, 3),
    ),
    "linear_divergence teacher_bias": (
        lambda x: fr.linear_divergence(ones(B, T, 4), ones(V, 4), ones(B, T, 3), ones(V, 3), teacher_bias=x),
        ones(V),
    ),
    "linear_divergence teacher_softcap": (
        lambda x: fr.linear_divergence(ones(B, T, 4), ones(V, 4), ones(B, T, 3), ones(V, 3), teacher_softcap=x),
        ones(),
    ),
    "linear_divergence teacher_temperature": (
        lambda x: fr.linear_divergence(ones(B, T, 4), ones(V, 4), ones(B, T, 3), ones(V, 3), teacher_temperature=x),
        ones(B, T),
    ),
    "value_loss old_values": (lambda x: fr.value_loss(lp(), x, lp()), lp()),
    "value_loss returns": (lambda x: fr.value_loss(lp(), lp(), x), lp()),
    "value_loss clip": (lambda x: fr.value_loss(lp(), lp(), lp(), clip=x), ones()),
    "whiten x": (fr.whiten, lp()),
    "segment_ids mask": (lambda x: fr.segment_ids(LABELS, by="labels", mask=x), ones(B, T)),
    "segment_reduce weights": (lambda x: fr.segment_reduce(lp(), LABELS, weights=x), ones(B, T)),
    "segment_reduce temperature": (
        lambda x: fr.segment_reduce(lp(), LABELS, op="softmin", temperature=x),
        ones(),
    ),
    "segment_diff mask": (lambda x: fr.segment_diff(lp(), mask=x), ones(B, T)),
    "scatter_rewards mask": (lambda x: fr.scatter_rewards(ones(B), mask=x), ones(B, T)),
    "discounted_returns rewards": (fr.discounted_returns, lp()),
    "discounted_returns initial": (lambda x: fr.discounted_returns(lp(), initial=x), ones(B)),
    "discounted_returns gamma": (lambda x: fr.discounted_returns(lp(), gamma=x), ones(B, T)),
    "gae values": (lambda x: fr.gae(lp(), x), lp()),
    "gae next_values": (lambda x: fr.gae(lp(), lp(), next_values=x), ones(B)),
    "gae done": (lambda x: fr.gae(lp(), lp(), done=x), ones(B, T)),
    "vtrace log_ratios": (lambda x: fr.vtrace(x, lp(), lp()), lp()),
    "PrefixTree.aggregate weights": (lambda x: tree().aggregate(ones(B), weights=x), ones(B)),
    "PrefixTree.aggregate child_weights": (
        lambda x: (t := tree()).aggregate(ones(B), over="children", child_weights=x[: t.num_nodes]),
        ones(4),
    ),
    "PrefixTree.advantages node_values": (lambda x: tree().advantages(x), ones(4)),
    "PrefixTree.to_tokens row_values": (lambda x: tree().to_tokens(ones(4), row_values=x), ones(B)),
    "recipes.tempo rewards": (lambda x: recipes.tempo(torch.tensor([[1, 2], [1, 3]]), None, x, group_size=2), ones(B)),
}


@pytest.mark.parametrize("case", CALLS)
def test_a_constant_that_requires_grad_is_refused(case: str) -> None:
    call, value = CALLS[case]
    argument = case.split()[1]
    call(value)
    with pytest.raises(
        ValueError, match=rf"{argument.replace('[', '.').replace(']', '.')}: expected a constant, .*\.detach\(\)"
    ):
        call(value.clone().requires_grad_())
    with pytest.raises(ValueError, match="expected a constant"):
        torch.func.grad(lambda x: (call(x), x.sum())[1])(value)
    with pytest.raises(NotImplementedError, match="has no forward-mode derivative"):
        torch.func.jvp(lambda x: (call(x), x.sum())[1], (value,), (value,))
    call(value.clone().requires_grad_().detach())
    with torch.no_grad():
        call(value.clone().requires_grad_())


def test_under_compile() -> None:
    """The check neither breaks the graph nor lets a gradient through."""
    step = torch.compile(lambda x, old: fr.policy_loss(x, old, ones(B)).loss, backend="eager", fullgraph=True)
    step(lp().requires_grad_(), lp())
    with pytest.raises(Exception, match="expected a constant"):
        step(lp().requires_grad_(), lp().requires_grad_())

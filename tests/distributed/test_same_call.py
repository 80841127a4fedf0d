"""Ranks that call with different arguments: all of them get an error that says which, and none is left waiting."""

from __future__ import annotations

from typing import Any

import pytest
import rank_calls
import torch
from rank_pool import RankPool

Call = dict[str, Any]
G = torch.Generator().manual_seed(0)
LOGITS, LABELS = torch.randn(3, 10, generator=G), torch.tensor([0, 9, 4])
HIDDEN, HEAD = torch.randn(3, 6, generator=G), torch.randn(10, 6, generator=G)
IDS, REWARDS = torch.tensor([[1], [2], [3]]), torch.randn(4, generator=G)
TOKENS = torch.randn(2, 4, generator=G)


def logits(rank: int, **options: Any) -> Call:
    leaves = {"logits": LOGITS.split([4, 6], -1)[rank]}
    return {"operation": "token_logprobs", "leaves": leaves, "args": (LABELS,), "options": options}


def head(rank: int, hidden: torch.Tensor = HIDDEN, **options: Any) -> Call:
    leaves = {"hidden": hidden, "weight": HEAD.split([4, 6])[rank][:, : hidden.shape[1]]}
    upstream = {"logprobs": torch.ones(3)}
    call = {"operation": "linear_token_logprobs", "leaves": leaves, "args": (LABELS,), "upstream": upstream}
    return {**call, "options": options}


def constant_hidden(rank: int) -> Call:
    return {**head(rank), "leaves": {"weight": HEAD[4:]}, "args": (), "named": {"hidden": HIDDEN, "labels": LABELS}}


def loss(rank: int, operation: str, old: torch.Tensor = LABELS * 0.0, **options: Any) -> Call:
    leaves = (logits if operation == "logits_policy_loss" else head)(rank)["leaves"]
    options["cu_seqlens"] = torch.tensor([0, 3])
    return {"operation": operation, "leaves": leaves, "args": (LABELS, old, torch.ones(3)), "options": options}


def of(operation: str, *args: Any, **options: Any) -> Call:
    return {"operation": operation, "args": args, "options": options}


def groups(**options: Any) -> Call:
    return of("group_advantages", REWARDS, **({"group_ids": ["a", "a", "b", "b"]} | options))


NAN = torch.tensor([0.0, torch.nan, 0.0])
CASES: dict[str, tuple[Call, Call]] = {
    "outputs": (logits(0, outputs=("logprobs", "entropy")), logits(1)),
    "temperature": (logits(0), logits(1, temperature=2.0)),
    "mask": (logits(0, mask=torch.tensor([0, 1, 1])), logits(1)),
    "labels": (logits(0), {**logits(1), "args": (torch.tensor([0, 8, 4]),)}),
    "kept_tokens": (logits(0, kept_tokens=LABELS.unsqueeze(-1)), logits(1)),
    "kept_tokens, one out of range": (
        logits(0, kept_tokens=LABELS.unsqueeze(-1)),
        logits(1, kept_tokens=LABELS.unsqueeze(-1) * 5),
    ),
    "token_ids": (
        logits(0, outputs=("id_logprobs",), token_ids=IDS),
        logits(1, outputs=("id_logprobs",), token_ids=IDS.expand(3, 2)),
    ),
    "token_ids, one out of range": (
        logits(0, outputs=("id_logprobs",), token_ids=IDS),
        logits(1, outputs=("id_logprobs",), token_ids=IDS * 9),
    ),
    "outputs of a head": (head(0, outputs=("logprobs", "rank")), head(1)),
    "temperature of a head": (head(0, temperature=torch.tensor([1.0, 2.0, 3.0])), head(1)),
    "logit_scale": (head(0), head(1, logit_scale=0.5)),
    "softcap": (head(0, softcap=30.0), head(1)),
    "sum_hidden_grad": (head(0), head(1, sum_hidden_grad=False)),
    "hidden": (head(0), head(1, HIDDEN[:, :5])),
    "hidden, once a constant": (head(0), constant_hidden(1)),
    "outputs of a loss": (loss(0, "logits_policy_loss", entropy_coef=0.1), loss(1, "logits_policy_loss")),
    "center": (groups(center="leave-one-out"), groups()),
    "center, once given": (groups(center=REWARDS), groups()),
    "group_ids, or group_size": (groups(), groups(group_ids=None, group_size=2)),
    "component_weights": (groups(component_weights=[2.0]), groups()),
    "eps": (groups(eps=1e-4), groups()),
    "statistics": (
        of("group_statistics", REWARDS, [1, 1, 2, 2], statistics=("mean", "count")),
        of("group_statistics", REWARDS, [1, 1, 2, 2], statistics=("mean",)),
    ),
    "ddof": (of("whiten", TOKENS), of("whiten", TOKENS, ddof=0)),
    "gamma": (of("discounted_returns", TOKENS), of("discounted_returns", TOKENS, gamma=0.9)),
    "at_masked": (of("gae", TOKENS, TOKENS, at_masked="decay"), of("gae", TOKENS, TOKENS)),
    "whiten": (of("gae", TOKENS, TOKENS, whiten=True), of("gae", TOKENS, TOKENS)),
    "aggregation": (of("loss_normalizer", TOKENS), of("loss_normalizer", TOKENS, aggregation="token-sum")),
}


@pytest.mark.parametrize("name", CASES)
def test_every_rank_hears_what_differs(name: str, ranks: RankPool) -> None:
    argument = name.replace(",", "").split()[0]
    for answer in ranks.ask(rank_calls.call, CASES[name]):
        assert answer.error is not None
        assert answer.error.startswith(f"ValueError: {argument}: expected the same on every rank of process_group, got")


def test_the_error_says_what_each_rank_has(ranks: RankPool) -> None:
    (first, second) = ranks.ask(rank_calls.call, CASES["temperature"])
    assert first.error == second.error
    assert first.error is not None
    assert first.error.endswith("got 1.0 on rank 0, 2.0 on rank 1")


@pytest.mark.parametrize("operation", ["logits_policy_loss", "linear_policy_loss"])
def test_what_one_rank_finds_after_the_others_have_met(operation: str, ranks: RankPool) -> None:
    """The linear one's backward would wait for it."""
    first, second = ranks.ask(rank_calls.call, [loss(0, operation), loss(1, operation, NAN)])
    assert first.error == "ValueError: process_group: rank 1 of it has refused its arguments; its own error says why"
    assert second.error is not None
    assert second.error.startswith("ValueError: old_logprobs: expected numbers where mask is set, got nan")


def test_what_may_differ(ranks: RankPool) -> None:
    """A mask, a bias, memory for the result: each rank's own affair."""
    calls = [
        (head(0, bias=torch.zeros(4)), head(1)),
        (of("whiten", TOKENS, torch.ones(2, 4)), of("whiten", TOKENS, out=TOKENS.clone())),
        (groups(mask=torch.ones(4), center=REWARDS), of("group_advantages", REWARDS[:0], [], center=REWARDS[:0])),
        (of("gae", TOKENS, TOKENS, torch.ones(2, 4)), of("gae", TOKENS, TOKENS)),
    ]
    for pair in calls:
        ranks.run(rank_calls.call, pair)

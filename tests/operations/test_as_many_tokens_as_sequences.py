"""Packed batches with as many tokens as sequences, where [N] is [B]: what is per sequence is not read per token."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import numpy as np
import pytest
import torch
from torch import Tensor

import fastreward as fr
from fastreward import losses, recipes

SINGLE: Final = torch.arange(5)  # each sequence has its one token
EMPTY_BETWEEN: Final = torch.tensor([0, 0, 3, 3, 4])  # the second has three tokens, the last has one
X: Final = torch.tensor([-0.5, -1.0, -0.2, -2.0])
OLD: Final = torch.tensor([-0.7, -0.9, -0.4, -1.5])
CREDIT: Final = torch.tensor([4.0, 3.0, -2.0, 1.0])
HIDDEN: Final = torch.eye(4)[:, :3].contiguous()
HEAD: Final = torch.tensor([[1.0, 2.0, 0.0], [0.0, 1.0, 3.0]])
LABELS: Final = torch.tensor([0, 1, 1, 0])
REWARDS: Final = torch.tensor([1.0, 2.0, 3.0, 4.0])


@losses.define
def weighted(t: losses.Terms) -> losses.Node:
    """Its extra may be per token or per sequence."""
    return -t.extra("credit") * t.logprob


@losses.define
def weighted_sequences(t: losses.Terms) -> losses.Node:
    """Says that its extra is one per sequence."""
    return -t.extra("credit", per="sequence") * t.logprob


@losses.define(pairs=True)
def weighted_side(t: losses.PairTerms) -> losses.Node:
    return losses.seq_sum(t.rejected.logprob * t.rejected.weight) - losses.seq_sum(t.chosen.logprob)


@losses.define(pairs=True)
def credited_side(t: losses.PairTerms) -> losses.Node:
    return losses.seq_sum(t.rejected.logprob * t.rejected.extra("credit")) - losses.seq_sum(t.chosen.logprob)


@losses.define(pairs=True)
def credited_sequences(t: losses.PairTerms) -> losses.Node:
    credit = t.rejected.extra("credit", per="sequence")
    return losses.seq_sum(t.rejected.logprob) * credit - losses.seq_sum(t.chosen.logprob)


# Calls with tokens in a shape: [N] with bounds, or [B, 1] without; c is per sequence.
def _policy(shape: Any, bounds: Tensor | None, advantages: Any = None, **options: Any) -> Any:
    return fr.policy_loss(X.view(shape), OLD.view(shape), advantages, cu_seqlens=bounds, **options).loss


def _ones(shape: Any, bounds: Tensor | None, **options: Any) -> Any:
    return _policy(shape, bounds, torch.full(shape, 0.7), **options)


def _of_logits(shape: Any, bounds: Tensor | None, c: Any) -> Any:
    logits = (HIDDEN @ HEAD.T).view(*shape, 2)
    return fr.logits_policy_loss(logits, LABELS.view(shape), OLD.view(shape), c, cu_seqlens=bounds).loss


def _of_hidden(shape: Any, bounds: Tensor | None, c: Any) -> Any:
    hidden = HIDDEN.view(*shape, 3)
    return fr.linear_policy_loss(hidden, HEAD, LABELS.view(shape), OLD.view(shape), c, cu_seqlens=bounds).loss


def _pair(shape: Any, bounds: Tensor | None, **options: Any) -> Any:
    x = X.view(shape)
    return fr.preference_loss(OLD.unsqueeze(-1), x, rejected_cu_seqlens=bounds, **options).loss


def _returns(shape: Any, bounds: Tensor | None, **options: Any) -> Any:
    return fr.discounted_returns(REWARDS.view(shape), cu_seqlens=bounds, **options).flatten()


def _gae(shape: Any, bounds: Tensor | None, **options: Any) -> Any:
    return fr.gae(REWARDS.view(shape), X.view(shape), cu_seqlens=bounds, **options)[0].flatten()


def _clip_cov(shape: Any, bounds: Tensor | None, c: Any) -> Any:
    return recipes.clip_cov(X.view(shape), OLD.view(shape), c, cu_seqlens=bounds, share=1.0, cov_low=-9.0).loss


def _weighted_recipe(shape: Any, bounds: Tensor | None, c: Any) -> Any:
    return recipes.cispo(X.view(shape), OLD.view(shape), torch.full(shape, 0.7), weights=c, cu_seqlens=bounds).loss


CALLS: Final[dict[str, Callable[[Any, Tensor | None, Any], Any]]] = {
    "advantages": _policy,
    "advantages of logits": _of_logits,
    "advantages of hidden": _of_hidden,
    "weights": lambda shape, bounds, c: _ones(shape, bounds, weights=c),
    "keep": lambda shape, bounds, c: _ones(shape, bounds, keep=c > 0),
    "extra": lambda shape, bounds, c: _policy(shape, bounds, extra={"credit": c}, loss=weighted()),
    "weights of values": lambda shape, bounds, c: (
        fr.value_loss(X.view(shape), None, REWARDS.view(shape), clip=None, weights=c, cu_seqlens=bounds).loss
    ),
    "weights of a side": lambda shape, bounds, c: _pair(shape, bounds, rejected_weights=c, loss=weighted_side()),
    "extra of a side": lambda shape, bounds, c: _pair(
        shape, bounds, rejected_extra={"credit": c}, loss=credited_side()
    ),
    "gamma": lambda shape, bounds, c: _returns(shape, bounds, gamma=c),
    "lam": lambda shape, bounds, c: _gae(shape, bounds, lam=c),
    "next_values": lambda shape, bounds, c: _gae(shape, bounds, next_values=c),
    "recipes.clip_cov": _clip_cov,
    "recipes.cispo": _weighted_recipe,
}
DECLARED: Final[dict[str, Callable[[Any, Tensor | None, Any], Any]]] = {
    "extra": lambda shape, bounds, c: _policy(shape, bounds, extra={"credit": c}, loss=weighted_sequences()),
    "extra of a side": lambda shape, bounds, c: _pair(
        shape, bounds, rejected_extra={"credit": c}, loss=credited_sequences()
    ),
}
AMBIGUOUS: Final = r"\[4\] may be one per token or one per sequence, .* some of the packed sequences are empty; leave"


@pytest.mark.parametrize("call", [*CALLS.values(), *DECLARED.values()], ids=[*CALLS, *(f"{x}, said" for x in DECLARED)])
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_of_single_tokens_both_are_the_same(backend: str, call: Callable[..., Tensor]) -> None:
    with fr.backend(backend):
        torch.testing.assert_close(call((4,), SINGLE, CREDIT), call((4, 1), None, CREDIT), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", CALLS)
def test_beside_empty_sequences_it_is_an_error_that_says_what_to_do(name: str) -> None:
    with pytest.raises(ValueError, match=AMBIGUOUS):
        CALLS[name]((4,), EMPTY_BETWEEN, CREDIT)
    if "side" not in name:  # that of the other side would still have four sequences
        there = EMPTY_BETWEEN.diff() > 0
        CALLS[name]((4,), EMPTY_BETWEEN.unique_consecutive(), CREDIT[there])


@pytest.mark.parametrize("name", [name for name in CALLS if name not in ("next_values", "recipes.clip_cov")])
def test_numbers_that_are_the_same_either_way_are_taken(name: str) -> None:
    same = torch.full((4,), 0.5)
    found = CALLS[name]((4,), EMPTY_BETWEEN, same)
    if "side" not in name:
        there = EMPTY_BETWEEN.diff() > 0
        torch.testing.assert_close(found, CALLS[name]((4,), EMPTY_BETWEEN.unique_consecutive(), same[there]))


def test_next_values_of_sequences_are_others_than_those_of_tokens() -> None:
    """A sequence's comes behind its last token, whatever the numbers are."""
    with pytest.raises(ValueError, match="next_values: " + AMBIGUOUS):
        CALLS["next_values"]((4,), EMPTY_BETWEEN, torch.zeros(4))


@pytest.mark.parametrize("call", [_policy, CALLS["extra"], CALLS["gamma"]])
def test_numpy(call: Callable[..., Tensor]) -> None:
    with pytest.raises(ValueError, match=AMBIGUOUS):
        call((4,), EMPTY_BETWEEN.numpy(), CREDIT.numpy())
    assert np.isclose(float(call((4,), SINGLE.numpy(), CREDIT.numpy()).sum()), call((4, 1), None, CREDIT).sum())


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_a_loss_that_says_per_sequence_gets_it_per_sequence(backend: str) -> None:
    with fr.backend(backend):
        found = DECLARED["extra"]((4,), EMPTY_BETWEEN, CREDIT)
        of_sides = DECLARED["extra of a side"]((4,), EMPTY_BETWEEN, CREDIT)
    per_token = torch.tensor([3.0, 3.0, 3.0, 1.0])
    torch.testing.assert_close(found, -(per_token * X).mean())
    torch.testing.assert_close(of_sides, ((per_token * X).sum() - OLD.sum()) / 4)


def test_a_nan_among_those_counts_where_its_sequence_does() -> None:
    nan = torch.tensor([torch.nan, 3.0, torch.nan, 1.0])  # of the empty sequences
    assert DECLARED["extra"]((4,), EMPTY_BETWEEN, nan).isfinite()
    with pytest.raises(
        ValueError, match=r"extra\['credit'\]: expected numbers where mask is set, got nan at index \[1\]"
    ):
        DECLARED["extra"]((4,), EMPTY_BETWEEN, torch.tensor([1.0, torch.nan, 1.0, 1.0]))


def test_reference_logprobs_are_per_token() -> None:
    """Their sums over a sequence, as TRL precomputes them, would be taken off each token."""
    x = torch.randn(3, 4)
    with pytest.raises(
        ValueError, match=r"ref_chosen_logprobs: expected shape \[3, 4\] \(as chosen_logprobs\), got \[3\]"
    ):
        fr.preference_loss(x, x, ref_chosen_logprobs=x.sum(1), ref_rejected_logprobs=x.sum(1))

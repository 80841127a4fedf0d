"""Scans along a sequence in the loss language: what they are, what masks do to them, gradients, passes, refusals."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import fastreward
from fastreward import losses
from fastreward._arguments.options import Aggregation
from fastreward.language.node import Level, Node
from fastreward.language.objective import PolicyCall, policy_objective
from fastreward.language.program import Program
from fastreward.losses import define, exp, segment_mean, segment_sum, seq_cumsum, seq_discounted_sum, seq_shift

INF, NAN = torch.inf, torch.nan
MASK = torch.tensor([[1, 1, 0, 1, 1], [0, 1, 1, 0, 0], [0, 0, 0, 0, 0]]) != 0
X = torch.tensor([[1.0, 2.0, NAN, 4.0, 8.0], [INF, 3.0, 5.0, NAN, NAN], [NAN] * 5])


def token_values(make: Any, x: Tensor = X, mask: Tensor = MASK, backend: str = "cpu", **extra: Tensor) -> Tensor:
    """What a backend computes of `make(x)` for each token."""

    @define
    def loss(t):
        value = make(t.logprob, *(t.extra(name) for name in extra))
        t.report(value=value)
        return t.logprob

    zeros = torch.zeros_like(x)
    with fastreward.backend(backend):
        result = fastreward.policy_loss(
            x.clone().requires_grad_(), zeros, zeros, mask, loss=loss(), extra=extra, return_tokens=("value",)
        )
    assert result.tokens is not None
    return result.tokens["value"]


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize(
    ("make", "first", "second"),
    [
        (seq_cumsum, [1, 3, 0, 7, 15], [0, 3, 8, 0, 0]),
        (lambda x: seq_cumsum(x, reverse=True), [15, 14, 0, 12, 8], [0, 8, 5, 0, 0]),
        (lambda x: seq_discounted_sum(x, 0.5), [4, 6, 0, 8, 8], [0, 5.5, 5, 0, 0]),
        (lambda x: seq_discounted_sum(x, 0.5, reverse=False), [1, 2.5, 0, 5.25, 10.625], [0, 3, 6.5, 0, 0]),
        (lambda x: seq_discounted_sum(x, 0.0), [1, 2, 0, 4, 8], [0, 3, 5, 0, 0]),
        (seq_shift, [0, 1, 0, 2, 4], [0, 0, 3, 0, 0]),
        (lambda x: seq_shift(x, reverse=True), [2, 4, 0, 8, 0], [0, 5, 0, 0, 0]),
        (lambda x: seq_cumsum(losses.where(x > 3.0, 1.0, 0.0)), [0, 0, 0, 1, 2], [0, 0, 1, 0, 0]),
        (lambda x: seq_cumsum(losses.seq_sum(x)), [15, 30, 0, 45, 60], [0, 8, 16, 0, 0]),
        (lambda x: seq_discounted_sum(x, x), [75, 74, 0, 36, 8], [0, 18, 5, 0, 0]),  # one gamma a token
    ],
)
def test_masked_tokens_are_passed_over(backend: str, make: Any, first: list[float], second: list[float]) -> None:
    want = torch.tensor([first, second, [0] * 5], dtype=torch.float32)
    assert torch.equal(token_values(make, backend=backend), want)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_segments_are_runs(backend: str) -> None:
    """Of the tokens that count; an id that comes again is another segment, one below 0 is none; nothing leaks."""
    ids = torch.tensor([[3.0, 3, 9, 3, 0, 0, -1, -1, 3, 3], [0.0, 0, 1, 1, 1, -2, 1, 0, 0, 0]])
    x = torch.tensor([[1.0, 2, NAN, 4, 5, 6, 7, 8, 9, INF], [INF, 1, 2, 3, 4, -INF, 5, 6, 7, 8]])
    mask = torch.ones(2, 10)
    mask[0, 2] = 0
    mask[1, 9] = 0
    total = token_values(segment_sum, x, mask, backend, ids=ids)
    want = [[7, 7, 0, 7, 11, 11, 0, 0, INF, INF], [INF, INF, 9, 9, 9, 0, 5, 13, 13, 0]]
    assert torch.equal(total, torch.tensor(want))
    mean = token_values(segment_mean, x, mask, backend, ids=ids)
    count = torch.tensor([[3.0, 3, 1, 3, 2, 2, 1, 1, 2, 2], [2.0, 2, 3, 3, 3, 1, 1, 2, 2, 1]])
    torch.testing.assert_close(mean, torch.tensor(want) / count)


def test_a_segment_has_the_same_bits_everywhere() -> None:
    x, ids = torch.randn(3, 3000), torch.arange(3000).div(700, rounding_mode="floor").float().expand(3, 3000)
    total = token_values(segment_sum, x, torch.ones(3, 3000), ids=ids)
    for k in range(5):
        own = total[:, ids[0] == k]
        assert torch.equal(own, own[:, :1].expand(own.shape))
        torch.testing.assert_close(own[:, 0], x[:, ids[0] == k].double().sum(-1).float())


def test_long_sums_keep_their_digits() -> None:
    """A hundred thousand tokens, to a few units in the last place; an infinity reaches all that come after it."""
    x = torch.rand(2, 100_000) + 0.5
    mask = torch.ones(2, 100_000)
    for gamma, units in ((1.0, 3), (0.9999, 10)):
        total = token_values(lambda x, gamma=gamma: seq_discounted_sum(x, gamma), x, mask).double()
        want = x.double().clone()
        for t in range(99_998, -1, -1):
            want[:, t] += gamma * want[:, t + 1]
        assert float(((total - want) / want).abs().max()) < units * 2.0**-24
    x[0, 50_000] = INF
    total = token_values(seq_cumsum, x, mask)
    assert torch.equal(total.isinf(), torch.stack([torch.arange(100_000) >= 50_000, torch.zeros(100_000) > 0]))


def test_gradients_with_everything_at_once() -> None:
    """Packed and padded, through gamma and through segments, against autograd over `evaluate`."""

    @define(aggregation="seq-mean-token-sum")
    def loss(t, gamma=0.9):
        turns = segment_mean(t.log_ratio, t.extra("turn"))
        ahead = seq_discounted_sum(exp(turns) * t.advantage, gamma)
        through = seq_discounted_sum(t.logprob, losses.sigmoid(t.entropy), reverse=False)
        return -ahead * exp(t.log_ratio) + seq_shift(through) * losses.seq_mean(t.logprob)

    g = torch.Generator().manual_seed(0)
    lengths = torch.tensor([5, 0, 130, 2049, 1])
    width = int(lengths.max())
    inside = torch.arange(width) < lengths.unsqueeze(1)
    mask = inside & (torch.rand(inside.shape, generator=g) < 0.8)
    lp, old, entropy, adv = 0.2 * torch.randn(4, *inside.shape, generator=g)
    turn = (torch.rand(inside.shape, generator=g) < 0.1).cumsum(-1) - 1.0
    leaves = [x.double().requires_grad_() for x in (lp, entropy)]
    names = {"old_logprob": old.double(), "advantage": adv.double(), "turn": turn.double()}
    token = loss().evaluate(mask=mask, logprob=leaves[0], entropy=leaves[1], **names)
    want = torch.autograd.grad(token.sum() / mask.any(-1).sum(), leaves)
    bounds = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    for packed in (False, True):
        laid = (lambda x: x[inside]) if packed else (lambda x: x)
        given = [laid(x).clone().requires_grad_() for x in (lp, entropy)]
        result = fastreward.policy_loss(
            given[0], laid(old), laid(adv), laid(mask), entropy=given[1], loss=loss(), extra={"turn": laid(turn)},
            cu_seqlens=bounds if packed else None,
        )  # fmt: skip
        got = torch.autograd.grad(result.loss, given)
        torch.testing.assert_close(result.loss.double(), token.sum() / mask.any(-1).sum(), rtol=1e-5, atol=1e-6)
        for a, b in zip(got, want, strict=True):
            scale = float(b.abs().max())
            torch.testing.assert_close(a.double(), laid(b), rtol=1e-5, atol=2e-6 * scale)


def test_the_other_side_of_a_pair_has_its_own() -> None:
    @define(pairs=True)
    def loss(t):
        ahead = [losses.seq_sum(losses.tanh(seq_cumsum(side.log_ratio))) for side in (t.chosen, t.rejected)]
        return -losses.logsigmoid(ahead[0] - ahead[1])

    chosen, rejected = torch.randn(3, 4), torch.randn(3, 6)
    leaves = [x.requires_grad_() for x in (chosen, rejected)]
    zeros = [torch.zeros_like(x) for x in leaves]
    got = fastreward.preference_loss(
        *leaves, ref_chosen_logprobs=zeros[0], ref_rejected_logprobs=zeros[1], loss=loss()
    ).loss
    ahead = [x.cumsum(-1).tanh().sum(-1) for x in leaves]
    want = -torch.nn.functional.logsigmoid(ahead[0] - ahead[1]).mean()
    torch.testing.assert_close(got, want)
    for a, b in zip(torch.autograd.grad(got, leaves), torch.autograd.grad(want, leaves), strict=True):
        torch.testing.assert_close(a, b)


# -------------------------------------------------------------------------------------------------------------- passes
def planned(function: Any, aggregation: Aggregation = "token-sum") -> Program:
    levels = [(name, Level.TOKEN) for name in ("logprob", "old_logprob", "advantage")]
    call = PolicyCall(tuple(levels), aggregation, deferred=aggregation == "token-sum")
    return policy_objective(define(function)(), call).program


def ways(program: Program) -> list[bool]:
    return [step.reverse for stage in program.stages for step in stage.tokens]


def test_a_weight_from_what_follows_is_one_pass() -> None:
    program = planned(lambda t: -losses.stop_gradient(exp(seq_discounted_sum(t.log_ratio, 0.9))) * t.ratio)
    assert ways(program) == [True]
    assert not program.kept


@pytest.mark.parametrize("reverse", [False, True])
def test_a_scan_is_not_done_twice_where_the_first_pass_only_counts_tokens(reverse: bool) -> None:
    def weighted(t: Any) -> Node:
        return -losses.stop_gradient(exp(seq_cumsum(t.log_ratio, reverse))) * t.ratio

    program = planned(weighted, "token-mean")
    first, second = (stage.tokens[0] for stage in program.stages)
    assert not first.body
    assert [n.op for n in second.body if n.op.startswith("scan")] == ["scan_reverse" if reverse else "scan"]
    assert not program.kept


def test_a_gradient_through_a_scan_goes_back_in_a_second_pass() -> None:
    """Which reads one tensor: what has come back to the scan; all else is done while the inputs are at hand."""
    program = planned(lambda t: seq_cumsum(t.logprob - t.old_logprob) ** 2 * t.advantage)
    assert ways(program) == [False, True]
    first, second = (stage.tokens[0] for stage in program.stages)
    assert len(program.kept) == 1
    assert [n.name for n in second.inputs] == ["kept.0"]
    assert {n.name for n in first.inputs} == {"logprob", "old_logprob", "advantage"}


def test_scans_of_one_way_share_a_pass_and_reductions_cut() -> None:
    def both(t: Any) -> Node:
        return losses.stop_gradient(seq_cumsum(seq_shift(seq_cumsum(t.logprob)))) * t.logprob

    def between(t: Any) -> Node:
        return losses.stop_gradient(seq_cumsum(t.logprob / losses.seq_sum(t.advantage), reverse=True)) * t.logprob

    assert ways(planned(both)) == [False]
    assert ways(planned(between)) == [False, True]


def test_programs_differ_by_direction_and_by_what_is_kept() -> None:
    keys = [
        planned(lambda t, reverse=reverse: seq_cumsum(t.logprob, reverse) * t.logprob).key for reverse in (False, True)
    ]
    assert len(set(keys)) == 2


def test_print_shows_scans() -> None:
    @define
    def loss(t, gamma=0.5):
        return seq_discounted_sum(t.logprob, gamma) + segment_sum(t.logprob, t.extra("turn"))

    text = str(loss())
    assert "loss = scan_reverse(logprob, gamma) + segment_sum(logprob, turn)" in text
    assert "d/d logprob = segment_sum(1, turn) + scan(1, gamma)" in text


# ------------------------------------------------------------------------------------------------------------ refusals
def test_what_a_scan_can_not_take_is_named() -> None:
    @define(pairs=True)
    def per_pair(t):
        return losses.seq_sum(seq_cumsum(t.extra("margin")) * t.chosen.logprob)

    with pytest.raises(TypeError, match="seq_cumsum: expected a term per token of one side, got one per pair"):
        str(per_pair())

    @define
    def of_a_number(t):
        return seq_cumsum(1.0) * t.logprob

    with pytest.raises(TypeError, match=r"seq_cumsum: expected a term of the loss \(t.logprob, ...\), got 1.0"):
        str(of_a_number())

    @define
    def by_a_string(t):
        return seq_discounted_sum(t.logprob, "0.9")

    with pytest.raises(TypeError, match=r"expected a term or a number, got '0.9'"):
        str(by_a_string())


def test_logits_take_a_loss_with_scans() -> None:
    """Log-probs first, then the loss: its gradient is not one token's own."""

    @define
    def loss(t):
        return -losses.stop_gradient(exp(0.1 * seq_cumsum(t.log_ratio, reverse=True))) * t.ratio * t.advantage

    logits, labels = torch.randn(3, 7, 11), torch.randint(11, (3, 7))
    old, adv, mask = torch.randn(3, 7), torch.randn(3), torch.rand(3, 7) < 0.8
    leaves = [logits.clone().requires_grad_() for _ in range(2)]
    got = fastreward.logits_policy_loss(leaves[0], labels, old, adv, mask, loss=loss()).loss
    lp = leaves[1].log_softmax(-1).gather(-1, labels.unsqueeze(-1)).squeeze(-1)
    want = fastreward.policy_loss(lp, old, adv, mask, loss=loss()).loss
    torch.testing.assert_close(got, want)
    for a, b in zip(torch.autograd.grad(got, leaves[0]), torch.autograd.grad(want, leaves[1]), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)

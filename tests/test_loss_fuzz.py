"""Random losses: `policy_loss` on the CPU, with the derived gradients, against evaluation and autograd in float64."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any, get_args

import pytest
import torch
from torch import Tensor

import fastreward
from fastreward import losses
from fastreward._options import Aggregation
from fastreward.losses import Node
from fastreward.reference.policy_loss import aggregate

AGGREGATIONS: tuple[Aggregation, ...] = get_args(Aggregation)
GROUPS = torch.tensor([0, 0, 1, 1, 1, 2])
SHAPE = (len(GROUPS), 9)

#: Of values and a random generator, by name for a failure's sake. What is multiplied is bounded, so that sums are too.
OPERATORS: dict[str, Callable[[random.Random, Node, Node], Node]] = {
    "add": lambda r, x, y: x + y,
    "sub": lambda r, x, y: x - y,
    "mul": lambda r, x, y: losses.tanh(x) * y,
    "square": lambda r, x, y: losses.tanh(x) ** 2 - y,
    "div": lambda r, x, y: x / (losses.abs(y) + 0.5),
    "where": lambda r, x, y: losses.where(x > y, x, y * x),
    "maximum": lambda r, x, y: losses.maximum(x, y),
    "minimum": lambda r, x, y: losses.minimum(y, x),
    "clip": lambda r, x, y: losses.clip(x, -0.7, 0.9) * y,
    "sigmoid": lambda r, x, y: losses.sigmoid(x) - y,
    "logsigmoid": lambda r, x, y: losses.logsigmoid(x) + y,
    "stop_gradient": lambda r, x, y: losses.stop_gradient(x) - 0.5 * x * losses.tanh(y),
    "seq": lambda r, x, y: r.choice((losses.seq_mean, losses.seq_max, losses.seq_min))(x) * losses.tanh(y),
    "seq of a product": lambda r, x, y: r.choice((losses.seq_max, losses.seq_min))(losses.tanh(x) * y + x),
    "rows": lambda r, x, y: losses.seq_mean(x) * losses.tanh(losses.seq_mean(y)),
    "group": lambda r, x, y: r.choice(GROUP)(losses.seq_mean(losses.tanh(x))) * losses.sigmoid(y),
    "group of two": lambda r, x, y: r.choice(GROUP)(losses.seq_mean(x * losses.tanh(y))),
    "group extreme": lambda r, x, y: r.choice(GROUP[:2])(losses.seq_mean(x)) * losses.tanh(y),
    "batch": lambda r, x, y: r.choice(BATCH)(losses.tanh(x)) * y,
}
GROUP = (
    losses.group_max,
    losses.group_min,
    losses.group_mean,
    losses.group_sum,
    losses.group_sum_others,
    losses.group_logsumexp,
)
BATCH = (losses.batch_mean, losses.batch_max, losses.batch_min)


def random_loss(seed: int) -> losses.Loss:
    """A loss of up to 15 operators that depends on logprob and entropy, per token or per sequence."""

    def value(t: Any, r: random.Random, depth: int) -> Node:
        if depth == 0:
            terms = (t.logprob, t.entropy, t.ratio, t.log_ratio, t.advantage, t.old_logprob, 0.1 * t.length)
            return r.choice(terms)
        return r.choice(list(OPERATORS.values()))(r, value(t, r, depth - 1), value(t, r, depth - 1))

    def loss(t: Any) -> Node:
        r = random.Random(seed)  # anew: a loss is traced more than once
        return value(t, r, r.choice((2, 3, 4))) + 0.05 * losses.seq_mean(t.logprob * t.entropy)

    return losses.define(loss)()


def data() -> tuple[dict[str, Tensor], Tensor]:
    """(terms, mask) with holes, a sequence of one token and one of none."""
    g = torch.Generator().manual_seed(3)
    old = -2 * torch.rand(SHAPE, generator=g)
    terms = {
        "logprob": old + 0.3 * torch.randn(SHAPE, generator=g),
        "entropy": torch.rand(SHAPE, generator=g),
        "old_logprob": old,
        "advantage": torch.randn(SHAPE[0], generator=g),
    }
    mask = torch.rand(SHAPE, generator=g) > 0.3
    mask[1], mask[3] = torch.arange(SHAPE[1]) == 4, False
    return terms, mask


def expected(loss: losses.Loss, aggregation: Aggregation) -> tuple[Tensor, ...]:
    """(loss, token losses, gradients for logprob and entropy) in float64."""
    terms, mask = data()
    wide = {name: x.double() for name, x in terms.items()}
    leaves = [wide[name].requires_grad_() for name in ("logprob", "entropy")]
    token = loss.evaluate(mask=mask, group_ids=GROUPS, **wide)
    if token.ndim == 1:
        token = torch.where(mask, token.unsqueeze(-1), 0.0)
    total = aggregate(token, mask, aggregation, None, GROUPS)
    return (total.detach(), token.detach(), *torch.autograd.grad(total, leaves))


def actual(loss: losses.Loss, aggregation: Aggregation) -> tuple[Tensor, ...]:
    """The same of policy_loss on the CPU backend."""
    terms, mask = data()
    leaves = [terms[name].requires_grad_() for name in ("logprob", "entropy")]
    with fastreward.backend("cpu"):
        result = fastreward.policy_loss(
            leaves[0],
            terms["old_logprob"],
            terms["advantage"],
            mask,
            loss=loss,
            entropy=leaves[1],
            group_ids=GROUPS,
            aggregation=aggregation,
            return_token_loss=True,
        )
        gradients = torch.autograd.grad(result.loss, leaves)
    assert result.token_loss is not None
    return (result.loss.detach(), result.token_loss, *gradients)


@pytest.mark.parametrize("seed", range(160))
def test_a_random_loss(seed: int) -> None:
    loss, aggregation = random_loss(seed), AGGREGATIONS[seed % len(AGGREGATIONS)]
    for name, x, y in zip(
        ("loss", "token_loss", "d/d logprob", "d/d entropy"),
        actual(loss, aggregation),
        expected(loss, aggregation),
        strict=True,
    ):
        scale = max(1.0, float(y.abs().max()))
        torch.testing.assert_close(
            x.double(), y, rtol=1e-4, atol=1e-5 * scale, msg=lambda m, name=name: f"{name}: {m}\n{loss}"
        )

"""Random losses through every entry, with the derived gradients, against evaluation and autograd in float64.

Each is traced with log-prob and entropy read with a gradient, only as a constant, only in a report, or not at all, and
called with random options together: KL, entropy bonus, weights, keep, normalizer, packed tokens, every aggregation.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable
from typing import Any, Final, Literal, get_args

import pytest
import torch
from torch import Tensor

import fastreward
from fastreward import losses
from fastreward._arguments.options import KL, Aggregation
from fastreward.language.node import walk
from fastreward.losses import Node
from fastreward.reference.policy_loss import _kl as kl_estimate
from fastreward.reference.policy_loss import aggregate

AGGREGATIONS: Final[tuple[Aggregation, ...]] = get_args(Aggregation)
GROUPS = torch.tensor([0, 0, 1, 1, 1, 2])
ROWS, WIDTH, VOCAB, HIDDEN = len(GROUPS), 9, 7, 5
SHAPE = (ROWS, WIDTH)
Mode = Literal["gradient", "constant", "report", "absent"]
#: How a loss reads log-probs and entropy; one of the two has a gradient.
MODES: Final[list[tuple[Mode, Mode]]] = [(a, b) for a in get_args(Mode) for b in get_args(Mode) if "gradient" in (a, b)]
ENTRIES = ("policy_loss", "logits_policy_loss", "linear_policy_loss")

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
    "scan": lambda r, x, y: SCANS[r.randrange(len(SCANS))](x, r) * losses.tanh(y),
    "scan of scans": lambda r, x, y: 0.3 * SCANS[r.randrange(len(SCANS))](losses.tanh(x * y), r),
    "gamma": lambda r, x, y: losses.seq_discounted_sum(x, losses.sigmoid(y), r.random() < 0.5),
    "segments": lambda r, x, y: r.choice(SEGMENTS)(losses.tanh(x), losses.where(y > 0.4, -1.0, losses.sign(y))) * y,
    "batch": lambda r, x, y: r.choice(BATCH)(losses.tanh(x)) * y,
}
#: Those that keep the gradient of a token its own, so that the calls from logits are the fused ones.
LOCAL = tuple(OPERATORS)[:12]
GROUP = (
    losses.group_max,
    losses.group_min,
    losses.group_mean,
    losses.group_sum,
    losses.group_sum_others,
    losses.group_logsumexp,
)
SCANS: tuple[Callable[[Node, random.Random], Node], ...] = (
    lambda x, r: losses.seq_cumsum(x, r.random() < 0.5),
    lambda x, r: losses.seq_discounted_sum(x, 0.8, r.random() < 0.5),
    lambda x, r: losses.seq_shift(x, r.random() < 0.5),
)
SEGMENTS = (losses.segment_sum, losses.segment_mean)
BATCH = (losses.batch_mean, losses.batch_max, losses.batch_min)


def random_loss(seed: int) -> losses.Loss:
    """A loss of up to 15 operators, per token or per sequence, that reads logprob and entropy as MODES says."""
    logprob, entropy = MODES[seed % len(MODES)]
    operators = [OPERATORS[name] for name in (LOCAL if seed % 2 else OPERATORS)]

    def read(x: Node, mode: Mode) -> Node:
        return x if mode == "gradient" else losses.stop_gradient(x)

    def leaf(t: Any, r: random.Random) -> Node:
        names = ["advantage", "old_logprob", "length", "ref_logprob", "rollout_logprob", "weight", "gate", "scale"]
        names += 2 * ["logprob", "ratio", "log_ratio"] if logprob in ("gradient", "constant") else []
        names += 3 * ["entropy"] if entropy in ("gradient", "constant") else []
        name = r.choice(names)
        if name in ("gate", "scale"):
            return t.extra(name, per="token" if name == "gate" else "sequence")
        mode = {"entropy": entropy, "logprob": logprob, "ratio": logprob, "log_ratio": logprob}.get(name, "gradient")
        return read(0.1 * t.length if name == "length" else getattr(t, name), mode)

    def value(t: Any, r: random.Random, depth: int) -> Node:
        if depth == 0:
            return leaf(t, r)
        return r.choice(operators)(r, value(t, r, depth - 1), value(t, r, depth - 1))

    def loss(t: Any) -> Node:
        r = random.Random(seed)  # anew: a loss is traced more than once
        if "report" in (logprob, entropy):
            t.report(measured=t.logprob if logprob == "report" else t.entropy)
        differentiable = t.advantage + 1.5
        for mode, name in ((logprob, "logprob"), (entropy, "entropy")):
            if mode in ("gradient", "constant"):
                differentiable = differentiable * read(getattr(t, name), mode)
        one = value(t, r, r.choice((2, 3, 4)))
        return one + 0.05 * (differentiable if seed % 2 else losses.seq_mean(differentiable))

    return losses.define(loss)()


@dataclasses.dataclass(frozen=True)
class Case:
    """A loss with the other options of a call, and its data; constants are f32 and padded."""

    loss: losses.Loss
    reported: str | None
    aggregation: Aggregation
    mask: Tensor
    keep: Tensor | None
    kl: KL | None
    entropy_coef: float
    normalizer: float | None
    packed: bool
    constants: dict[str, Tensor] = dataclasses.field(repr=False)  # by term
    leaves: dict[str, dict[str, Tensor]] = dataclasses.field(repr=False)  # of each entry, f32

    @property
    def counted(self) -> Tensor:
        keep = torch.ones(()) != 0 if self.keep is None else self.keep
        return self.mask & (keep.unsqueeze(-1) if keep.ndim == 1 else keep)

    @property
    def applies_weight(self) -> bool:
        """Whether the weights are in the formula: touching them is not enough, as in weight - weight."""
        return any(n.name == "weight" for n in walk([self.loss.trace(self.loss.terms())]))


def case(seed: int) -> Case:
    """Terms with holes, a sequence of one token and one of none; every option is there or not by chance."""
    r, g = random.Random(1000 + seed), torch.Generator().manual_seed(3)

    def some(shape: tuple[int, ...] = SHAPE, scale: float = 0.3) -> Tensor:
        return scale * torch.randn(shape, generator=g)

    loss = random_loss(seed)
    hidden, head = some((*SHAPE, HIDDEN), 1.0), some((VOCAB, HIDDEN), 0.7)
    logits = hidden @ head.t()
    labels = torch.randint(0, VOCAB, SHAPE, generator=g)
    logprob, entropy = statistics(logits.double(), labels)
    old = (logprob + some()).float()
    constants = {
        "labels": labels,
        "old_logprob": old,
        "advantage": some(SHAPE[:1], 1.0) if seed % 3 else some(scale=1.0),
        "ref_logprob": (logprob + some()).float(),
        "rollout_logprob": old + some(scale=0.1),
        "weight": some(scale=1.0).abs() if seed % 4 else some(SHAPE[:1], 1.0).abs(),
        "gate": some(scale=1.0),
        "scale": some(SHAPE[:1]),
    }
    mask = torch.rand(SHAPE, generator=g) > 0.3
    mask[1], mask[3] = torch.arange(WIDTH) == 4, False
    return Case(
        loss,
        next(
            (
                name
                for name, mode in zip(("logprob", "entropy"), MODES[seed % len(MODES)], strict=True)
                if mode == "report"
            ),
            None,
        ),
        AGGREGATIONS[seed % len(AGGREGATIONS)],
        mask,
        r.choice((None, None, torch.arange(ROWS) != 2, torch.rand(SHAPE, generator=g) > 0.2)),
        r.choice((None, None, *get_args(KL))),
        r.choice((0.0, 0.0, 0.1)),
        r.choice((None, None, 5.0)),
        r.random() < 0.3,
        {k: v for k, v in constants.items() if k != "weight" or loss.asks("weight") or r.random() < 0.5},
        {
            "policy_loss": {"logprob": logprob.float(), "entropy": entropy.float()},
            "logits_policy_loss": {"logits": logits},
            "linear_policy_loss": {"hidden": hidden, "head": head},
        },
    )


def statistics(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probs of the labels and entropy, by autograd's own operations."""
    distribution = torch.log_softmax(logits, -1)
    return distribution.gather(-1, labels.unsqueeze(-1)).squeeze(-1), -(distribution.exp() * distribution).sum(-1)


def expected(c: Case, entry: str) -> tuple[Tensor, ...]:
    """(loss, token losses, gradients for the entry's leaves) in float64."""
    leaves = {name: x.double().requires_grad_() for name, x in c.leaves[entry].items()}
    constants = {name: x.double() for name, x in c.constants.items()}
    if entry == "policy_loss":
        logprob, entropy = leaves["logprob"], leaves["entropy"]
    else:
        logits = leaves["logits"] if entry == "logits_policy_loss" else leaves["hidden"] @ leaves["head"].t()
        logprob, entropy = statistics(logits, c.constants["labels"])
    read = {name: x for name, x in constants.items() if c.loss.asks(name)}
    read |= {"old_logprob": constants["old_logprob"], "logprob": logprob, "entropy": entropy}
    token = c.loss.evaluate(mask=c.counted, group_ids=GROUPS, **read)
    token = token.unsqueeze(-1) if token.ndim == 1 else token
    if "weight" in constants and not c.applies_weight:
        weight = constants["weight"]
        token = token * (weight if weight.ndim == 2 else weight.unsqueeze(-1))
    if c.kl is not None:
        ratio = (logprob - constants["old_logprob"]).exp()
        token = token + 0.3 * kl_estimate(c.kl, constants["ref_logprob"] - logprob, ratio)
    token = torch.where(c.counted, token - c.entropy_coef * entropy, 0.0)
    total = aggregate(token, c.counted, c.aggregation, c.normalizer, GROUPS)
    gradients = torch.autograd.grad(total, list(leaves.values()), allow_unused=True, materialize_grads=True)
    return (total.detach(), token.detach(), *gradients)


def actual(c: Case, entry: str) -> tuple[Tensor, ...]:
    """The same of the entry on the CPU backend."""
    leaves = {name: x.clone().requires_grad_() for name, x in c.leaves[entry].items()}

    def laid_out(x: Tensor) -> Tensor:
        """Per token packed where wanted, all else as it is."""
        return x.reshape(-1, *x.shape[2:]) if c.packed and x.shape[:2] == SHAPE else x

    terms = {k: laid_out(x) for k, x in (leaves | c.constants).items()}
    first = {"policy_loss": ("logprob",), "logits_policy_loss": ("logits", "labels")}
    names = (*first.get(entry, ("hidden", "head", "labels")), "old_logprob", "advantage")
    options: dict[str, Any] = {
        "loss": c.loss,
        "aggregation": c.aggregation,
        "normalizer": c.normalizer,
        "kl": c.kl,
        "kl_coef": 0.3 if c.kl else 0.0,
        "ref_logprobs": terms["ref_logprob"],
        "rollout_logprobs": terms["rollout_logprob"] if c.loss.asks("rollout_logprob") else None,
        "entropy_coef": c.entropy_coef,
        "weights": terms.get("weight"),
        "keep": None if c.keep is None else laid_out(c.keep),
        "group_ids": GROUPS,
        "extra": {name: terms[name] for name in ("gate", "scale") if c.loss.asks(name)},
        "cu_seqlens": torch.arange(ROWS + 1) * WIDTH if c.packed else None,
        "return_token_loss": True,
    }
    if entry == "policy_loss":
        options["entropy"] = terms["entropy"] if c.entropy_coef or c.loss.asks("entropy") else None
    with fastreward.backend("cpu"):
        result = getattr(fastreward, entry)(*(terms[n] for n in names), laid_out(c.mask), **options)
        gradients = torch.autograd.grad(result.loss, list(leaves.values()), allow_unused=True, materialize_grads=True)
    if c.reported is not None:
        logprob, entropy = c.leaves["policy_loss"].values()
        mean = (logprob if c.reported == "logprob" else entropy)[c.counted].mean()
        torch.testing.assert_close(result.metrics["measured"], mean, rtol=1e-5, atol=1e-6)
    assert result.token_loss is not None
    return (result.loss.detach(), result.token_loss.reshape(SHAPE), *gradients)


@pytest.mark.parametrize("seed", range(12 * len(MODES)))
def test_a_random_loss(seed: int) -> None:
    c = case(seed)
    for entry in ENTRIES:
        names = ("loss", "token_loss", *(f"d/d {name}" for name in c.leaves[entry]))
        for name, x, y in zip(names, actual(c, entry), expected(c, entry), strict=True):
            scale = max(1.0, float(y.abs().max()))
            torch.testing.assert_close(
                x.double(),
                y,
                rtol=1e-4,
                atol=1e-5 * scale,
                msg=lambda m, what=f"{entry}: {name}": f"{what}: {m}\n{c}\n{c.loss}",
            )


@losses.define
def _constant(t: Any) -> Node:
    t.report(measured=t.entropy)
    return t.advantage * losses.stop_gradient(t.ratio * t.entropy)


@pytest.mark.parametrize("entry", ENTRIES)
def test_a_loss_that_nothing_can_change_is_refused(entry: str) -> None:
    c = dataclasses.replace(case(1), loss=_constant(), kl=None)
    with pytest.raises(ValueError, match="its gradient for logprob and entropy is zero everywhere"):
        actual(c, entry)

"""The policy losses of the language against their references, written out: values, gradients, hard cases."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from reference_losses import along as reference_along
from reference_losses import later as reference_later
from reference_losses import policy as reference
from torch import Tensor

import fastreward
from fastreward.language.define import Definition, Loss, define
from fastreward.language.node import Node
from fastreward.language.objective import kl
from fastreward.language.terms import Terms
from fastreward.losses import along, score, selection, sequence, token

BACKENDS = ("reference", "cpu")


# ------------------------------------------------------------------------------------------------------------- batches
@dataclasses.dataclass
class Batch:
    """Token terms [B, T] and row terms [B], float32; garbage under the mask."""

    lp: Tensor
    old: Tensor
    ref: Tensor
    teacher: Tensor
    adv: Tensor  # [B, T] or [B]
    reward: Tensor  # [B], 0 or 1
    score: Tensor  # [B], any number
    mask: Tensor
    groups: Tensor
    selected: Tensor
    importance: Tensor
    answer: Tensor
    score_token: Tensor
    expert: Tensor
    weights: Tensor
    segment_ids: Tensor
    log_z: Tensor  # [B]

    def double(self) -> Batch:
        """The same numbers in float64, lp differentiable."""
        names = [f.name for f in dataclasses.fields(self)]
        values = {n: getattr(self, n) for n in names}
        copy = Batch(**{n: x.double() if x.is_floating_point() else x for n, x in values.items()})
        copy.lp = copy.lp.detach().requires_grad_()
        return copy

    def with_advantages(self, adv: Tensor) -> Batch:
        return dataclasses.replace(self, adv=adv)


def batch(spread: float = 0.3, *, seed: int = 0, rows: int = 8, length: int = 11) -> Batch:
    """Ragged rows with holes, one of them empty; groups of 3, 2 (not side by side), 1 and the rest."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    lp = -randn(rows, length).abs() - 0.01
    old = -(lp - spread * randn(rows, length)).abs()
    lengths = torch.randint(min(2, length), length + 1, (rows, 1), generator=generator)
    mask = torch.arange(length) < lengths
    if rows > 4:
        mask[0, 1] = False  # a hole, as a tool's tokens leave it
        mask[4] = False
    last = mask & (mask.flip(-1).cumsum(-1).flip(-1) == 1)
    made = Batch(
        lp=lp,
        old=old,
        ref=-(lp + 0.5 * randn(rows, length)).abs(),
        teacher=-(lp + 0.5 * randn(rows, length)).abs(),
        adv=randn(rows, length),
        reward=torch.tensor([1.0, 0, 0, 1, 1, 1, 0, 0])[:rows],
        score=randn(rows),
        mask=mask,
        groups=torch.tensor([7, 3, 7, 3, 7, 7, 11, 3])[:rows],
        selected=torch.rand(rows, length, generator=generator) < 0.3,
        importance=torch.rand(rows, length, generator=generator),
        answer=mask & (mask.flip(-1).cumsum(-1).flip(-1) <= 2),
        score_token=last & (torch.arange(rows) != 1).unsqueeze(-1),
        expert=torch.arange(rows) % 3 == 1,
        weights=torch.rand(rows, length, generator=generator) + 0.5,
        segment_ids=torch.arange(length).expand(rows, length) // 3 % 3 - 1.0,
        log_z=torch.linspace(-2.0, 1.5, rows),
    )
    garbage = torch.tensor([math.nan, math.inf, -math.inf, 7.0, -1e30])
    for field in ("lp", "old", "ref", "teacher", "adv", "importance", "weights"):
        x = getattr(made, field)
        x[~mask] = garbage[torch.arange(int((~mask).sum())) % len(garbage)]
    return made


def zeros(spread: float = 0.3) -> Batch:
    """Advantages 0 in one row and here and there."""
    b = batch(spread, seed=1)
    b.adv[3] = 0.0
    b.adv[:, ::3] = 0.0
    b.reward[:] = 0.0
    b.score[:] = 0.0
    return b


def outliers() -> Batch:
    """Advantages far from the others, on top of a large mean: whitened, one is above 10 and one above 3."""
    b = batch(1.0, seed=16, length=40)
    b.adv[b.mask] += 9.0
    inside = b.mask.nonzero()
    for k, value in ((3, 37.0), (90, 28.0)):
        b.adv[tuple(inside[k])] = value
    z = (b.adv[b.mask] - b.adv[b.mask].mean()) / b.adv[b.mask].std(correction=0)
    top = z.topk(3).values
    assert 10 < top[0] < b.adv[b.mask].mean() + 3
    assert b.adv[b.mask].mean() - 3 < top[1] < 10
    assert top[2] < 3
    return b


def extreme(size: float) -> Batch:
    """Log-ratios of +-size beside small ones, on tokens with either sign of the advantage."""
    b = batch(seed=2)
    columns = torch.arange(b.lp.shape[1])
    far = torch.full_like(b.lp, -0.5 - size)
    for k, (name, other) in enumerate((("lp", "old"), ("old", "lp"), ("lp", "ref"), ("ref", "lp"))):
        here = b.mask & (columns % 5 == k)
        getattr(b, name)[here] = far[here]
        getattr(b, other)[here] = -0.5
    b.lp[5, b.mask[5]], b.old[5, b.mask[5]] = -0.5, -0.5 - size  # a whole row: its mean is as far off
    return b


def singletons() -> Batch:
    b = batch(seed=3)
    return dataclasses.replace(b, groups=torch.arange(len(b.groups)) * 5 - 9)


def one_token() -> Batch:
    return batch(seed=4, rows=4, length=1)


SCENES: dict[str, Callable[[], Batch]] = {
    "ragged": batch,
    "far": lambda: batch(2.0, seed=5),
    "advantage-0": zeros,
    "outliers": outliers,
    "30": lambda: extreme(30.0),
    "200": lambda: extreme(200.0),
    "singletons": singletons,
    "one-token": one_token,
}


# --------------------------------------------------------------------------------------------------------------- cases
@dataclasses.dataclass(frozen=True)
class Case:
    """A loss, its reference on a batch, what the reference's advantages are, and what else the loss reads."""

    loss: Loss
    reference: Callable[..., Tensor]
    reads: tuple[str, ...] = ()  # extras by the name of the batch's field
    advantage: str = "adv"
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    ref: bool = False
    scenes: tuple[str, ...] = tuple(SCENES)
    rollout: bool = False  # the loss applies `weights` in its own way
    extras: dict[str, str] = dataclasses.field(default_factory=lambda: {"teacher": "teacher_logprob"})  # their names

    @property
    def groups(self) -> bool:
        return self.loss.name in {"real", "pacs", "jepo", "brain", "gdro", "gvpo"}

    def expected(self, b: Batch, weights: Tensor | None = None) -> Tensor:
        """The reference's value, [B, T] or [B]."""
        extras = {n: getattr(b, n) for n in self.reads}
        if self.groups:
            extras["groups"] = b.groups
        if self.ref:
            extras["ref"] = b.ref
        if self.rollout:
            extras["is_weight"] = weights
        return self.reference(b.lp, b.old, getattr(b, self.advantage), b.mask, **self.options, **extras)

    def extra(self, b: Batch) -> dict[str, Tensor]:
        return {self.extras.get(n, n): getattr(b, n) for n in self.reads}


def largest_covariances(lp: Tensor, old: Tensor, adv: Tensor, mask: Tensor, *, kl_coef: float, share: float) -> Tensor:
    """KL-Cov on the tokens that it selects itself."""
    covariance = reference.covariance(lp, adv, mask)
    ordered = covariance[mask].sort(descending=True).values
    last = ordered[max(1, int(share * len(ordered))) - 1] if len(ordered) else math.inf
    return reference.kl_cov(lp, old, adv, mask, selected=(covariance >= last) & mask, kl_coef=kl_coef)


def drawn_covariances(
    lp: Tensor, old: Tensor, adv: Tensor, mask: Tensor, *, importance: Tensor, share: float, **bounds: float
) -> Tensor:
    """Clip-Cov without the candidates whose lots are the largest."""
    candidates = reference.cov_mask(lp, old, adv, mask, method="clip", **bounds)
    number = reference.cov_count(mask, share)
    order = torch.where(candidates, importance.double(), -1.0).flatten().argsort(descending=True)[:number]
    drawn = torch.zeros(mask.numel(), dtype=torch.bool).index_fill(0, order, True).reshape(mask.shape) & candidates
    clips = {name: bounds[name] for name in ("clip_low", "clip_high") if name in bounds}
    return reference.clip_cov(lp, old, adv, mask, selected=drawn, **clips)


CASES = {
    "ppo": Case(token.ppo(0.2, 0.28), reference.ppo, options={"clip_high": 0.28}),
    "ppo-dual": Case(token.ppo(dual_clip=3.0), reference.ppo, options={"dual_clip": 3.0}),
    "ppo-delta": Case(token.ppo(delta=1.8), reference.ppo, options={"delta": 1.8}),
    "ppo-clamp-5": Case(
        token.ppo(dual_clip=2.0, log_ratio_clamp=5.0), reference.ppo, options={"dual_clip": 2.0, "log_ratio_clamp": 5.0}
    ),
    "ppo-unclamped": Case(
        token.ppo(log_ratio_clamp=None),
        reference.ppo,
        options={"log_ratio_clamp": None},
        scenes=("ragged", "far", "advantage-0", "30"),
    ),
    "psr": Case(token.psr(), reference.psr, advantage="reward"),
    "nsr": Case(token.nsr(), reference.nsr, advantage="reward"),
    "w_reinforce": Case(token.w_reinforce(), reference.w_reinforce, advantage="reward"),
    "w_reinforce-0.3": Case(
        token.w_reinforce(0.3, 0.1, 0.4),
        reference.w_reinforce,
        advantage="reward",
        options={"positive_weight": 0.3, "clip_low": 0.1, "clip_high": 0.4},
    ),
    "stable_reinforce": Case(token.stable_reinforce(), reference.stable_reinforce),
    "stable_reinforce-code": Case(
        token.stable_reinforce(advantage_filter="code"),
        reference.stable_reinforce,
        options={"advantage_filter": "code"},
    ),
    "stable_reinforce-none": Case(
        token.stable_reinforce(pre_clip=50.0, advantage_filter=None),
        reference.stable_reinforce,
        options={"pre_clip": 50.0, "advantage_filter": None},
    ),
    "visurf": Case(token.visurf(), reference.visurf, ("expert",)),
    "tw_grpo": Case(token.tw_grpo(), reference.tw_grpo, ("importance",)),
    "clip_cov": Case(token.clip_cov(), reference.clip_cov, ("selected",)),
    "clip_cov-own": Case(
        token.clip_cov(share=0.1, cov_low=0.05, cov_high=2.0),
        drawn_covariances,
        ("importance",),
        options={"share": 0.1, "cov_low": 0.05, "cov_high": 2.0},
        extras={"importance": "lots"},
    ),
    "clip_cov-all": Case(
        token.clip_cov(0.1, 0.3, 1.0, 0.05, 2.0),
        drawn_covariances,
        ("importance",),
        options={"clip_low": 0.1, "clip_high": 0.3, "share": 1.0, "cov_low": 0.05, "cov_high": 2.0},
        extras={"importance": "lots"},
    ),
    "kl_cov": Case(token.kl_cov(0.7), reference.kl_cov, ("selected",), options={"kl_coef": 0.7}),
    "kl_cov-own": Case(token.kl_cov(0.7, 0.1), largest_covariances, options={"kl_coef": 0.7, "share": 0.1}),
    "kl_cov-one": Case(token.kl_cov(), largest_covariances, options={"kl_coef": 1.0, "share": 0.0002}),
    "sapo": Case(token.sapo(), reference.sapo),
    "sapo-tau": Case(token.sapo(0.7, 1.6), reference.sapo, options={"tau_pos": 0.7, "tau_neg": 1.6}),
    "reinforce": Case(score.reinforce(), reference.reinforce),
    "gpg": Case(score.gpg(), reference.gpg),
    "sft": Case(score.sft(), reference.sft),
    "raft": Case(score.raft(), reference.raft),
    "verifree": Case(score.verifree(), reference.verifree, ("answer", "reward")),
    "cispo": Case(score.cispo(0.3, 0.5), reference.cispo, options={"clip_low": 0.3, "clip_high": 0.5}),
    "cispo-trl": Case(
        score.cispo(clip_high=5.0, convention="trl"), reference.cispo, options={"clip_high": 5.0, "convention": "trl"}
    ),
    "cispo-tinker": Case(
        score.cispo(0.2, 4.0, convention="tinker"),
        reference.cispo,
        options={"clip_low": 0.2, "clip_high": 4.0, "convention": "tinker"},
    ),
    "dispo": Case(score.dispo(), reference.dispo),
    "dispo-narrow": Case(
        score.dispo(0.1, 0.5, 0.6, 0.3),
        reference.dispo,
        options={"pos_low": 0.1, "pos_high": 0.5, "neg_low": 0.6, "neg_high": 0.3},
    ),
    "dppo_tv": Case(score.dppo_tv(0.05, 0.1), reference.dppo_tv, options={"low": 0.05, "high": 0.1}),
    "dppo_kl": Case(
        score.dppo_kl(0.02, 0.05, 10.0), reference.dppo_kl, options={"low": 0.02, "high": 0.05, "cap": 10.0}
    ),
    "dro": Case(score.dro(0.3), reference.dro, options={"beta": 0.3}),
    "vespo": Case(score.vespo(), reference.vespo, rollout=True),
    "vespo-k": Case(
        score.vespo(1.5, 2.0, 2.5, 0.7),
        reference.vespo,
        rollout=True,
        options={"k_pos": 1.5, "lambda_pos": 2.0, "k_neg": 2.5, "lambda_neg": 0.7},
    ),
    "sdpo": Case(score.sdpo(), reference.sdpo, ("teacher",)),
    "sdpo-plain": Case(score.sdpo(None), reference.sdpo, ("teacher",), options={"is_clip": None}),
    "gspo": Case(sequence.gspo(0.03, 0.04), reference.gspo, options={"clip_low": 0.03, "clip_high": 0.04}),
    "gspo-unbounded": Case(
        sequence.gspo(0.1, 0.1, log_ratio_max=None),
        reference.gspo,
        options={"clip_low": 0.1, "clip_high": 0.1, "log_ratio_max": None},
        scenes=("ragged", "far", "advantage-0", "30"),
    ),
    "gspo_token": Case(
        sequence.gspo_token(0.03, 0.04), reference.gspo_token, options={"clip_low": 0.03, "clip_high": 0.04}
    ),
    "gmpo": Case(sequence.gmpo(), reference.gmpo, rollout=True),
    "gmpo-unclamped": Case(
        sequence.gmpo(0.2, 0.3, log_ratio_clamp=None),
        reference.gmpo,
        rollout=True,
        options={"clip_low": 0.2, "clip_high": 0.3, "log_ratio_clamp": None},
        scenes=("ragged", "far", "advantage-0", "30"),
    ),
    "laser": Case(sequence.laser(), reference.laser, ("score_token", "reward")),
    "laser-ref": Case(
        sequence.laser(0.2, 0.8, None),
        reference.laser,
        ("score_token", "reward"),
        ref=True,
        options={"beta": 0.2, "temperature": 0.8, "constant": None},
    ),
    "dft": Case(score.dft(), reference_later.dft),
    "topr": Case(score.topr(), reference_later.topr),
    "vapo": Case(token.vapo(), reference_later.vapo, ("reward",)),
    "vapo-0.5": Case(
        token.vapo(0.1, 0.3, 0.5),
        reference_later.vapo,
        ("reward",),
        options={"clip_low": 0.1, "clip_high": 0.3, "nll_coef": 0.5},
    ),
    "echo": Case(
        token.echo(0.3, 0.1, 0.4),
        reference_later.echo,
        ("selected",),
        options={"alpha": 0.3, "clip_low": 0.1, "clip_high": 0.4},
        extras={"selected": "observation"},
    ),
    "loglinear_ppo": Case(
        token.loglinear_ppo(0.1, 0.3),
        reference_later.loglinear_ppo,
        ("importance",),
        options={"clip_low": 0.1, "clip_high": 0.3},
        extras={"importance": "interpolation"},
    ),
    "cfpo": Case(token.cfpo(), reference_later.cfpo),
    "cfpo-wide": Case(token.cfpo(1.3), reference_later.cfpo, options={"epsilon": 1.3}),
    "kpop": Case(score.kpop(), reference_later.kpop),
    "kpop-narrow": Case(score.kpop(1e-3), reference_later.kpop, options={"threshold": 1e-3}),
    "bapo": Case(along.bapo(), reference_later.bapo),
    "bapo-easy": Case(along.bapo(0.1), reference_later.bapo, options={"target": 0.1}),
    "bapo-steps": Case(
        along.bapo(1.5, 0.7, 0.9, 1.05, 1.53, 0.1, 2.0),
        reference_later.bapo,
        options={"target": 1.5, "lows": (0.7, 0.9, 0.07), "highs": (1.05, 1.53, 0.1), "dual_clip": 2.0},
    ),
    "flowrl": Case(
        sequence.flowrl(0.7, 0.8, 1.28),
        reference_later.flowrl,
        ("log_z",),
        ref=True,
        options={"beta": 0.7, "bounds": (0.8, 1.28)},
    ),
    "flowrl-15": Case(sequence.flowrl(), reference_later.flowrl, ("log_z",), ref=True),
    "a2po": Case(sequence.a2po(0.3), reference_later.a2po, ref=True, options={"beta": 0.3}),
    "gvpo": Case(sequence.gvpo(), reference_later.gvpo),
    "kto": Case(sequence.kto(), reference_later.kto, ref=True, advantage="reward"),
    "kto-weighted": Case(
        sequence.kto(0.5, 1.5, 0.7, 1.3),
        reference_later.kto,
        ref=True,
        advantage="score",
        options={"beta": 0.5, "reference_point": 1.5, "desirable_weight": 0.7, "undesirable_weight": 1.3},
    ),
    "fipo": Case(along.fipo(), reference_along.fipo),
    "fipo-both-ways": Case(
        along.fipo(0.1, 0.3, 0.8, 0.8, 1.2, 3.0, 10.0),
        reference_along.fipo,
        options={"clip_low": 0.1, "clip_high": 0.3, "gamma": 0.8, "weight_low": 0.8, "safety": 3.0, "delta": 10.0},
    ),
    "fipo-plain": Case(along.fipo(safety=None), reference_along.fipo, options={"safety": None}),
    "m2po": Case(along.m2po(), reference_along.m2po),
    "m2po-wide": Case(
        along.m2po(0.2, 0.1, 0.3), reference_along.m2po, options={"tau": 0.2, "clip_low": 0.1, "clip_high": 0.3}
    ),
    "m2po-tiny": Case(along.m2po(1e-9), reference_along.m2po, options={"tau": 1e-9}),
    "segment_ppo": Case(along.segment_ppo(), reference_along.segment_ppo, ("segment_ids",)),
    "segment_ppo-product": Case(
        along.segment_ppo(0.3, 0.4, average=False, log_ratio_max=5.0),
        reference_along.segment_ppo,
        ("segment_ids",),
        options={"clip_low": 0.3, "clip_high": 0.4, "average": False, "log_ratio_max": 5.0},
    ),
    "real": Case(sequence.real(), reference.real, advantage="reward"),
    "real-centred": Case(sequence.real(0.8), reference.real, options={"tau": 0.8}),
    "real-bce": Case(sequence.real(variant="bce"), reference.real, advantage="reward", options={"variant": "bce"}),
    "pacs": Case(sequence.pacs(), reference.pacs, advantage="reward"),
    "pacs-mean": Case(
        sequence.pacs(2.0, "mean"), reference.pacs, advantage="reward", options={"beta": 2.0, "method": "mean"}
    ),
    "pacs-std": Case(sequence.pacs(center="std"), reference.pacs, advantage="reward", options={"center": "std"}),
    "pacs-none": Case(
        sequence.pacs(center="none", balanced=False),
        reference.pacs,
        advantage="reward",
        options={"center": "none", "balanced": False},
    ),
    "jepo": Case(sequence.jepo(), reference.jepo, ("answer",)),
    "jepo-0.2": Case(sequence.jepo(0.2), reference.jepo, ("answer",), options={"sft_coef": 0.2}),
    "brain": Case(sequence.brain(), reference.brain, advantage="score"),
    "brain-prior": Case(sequence.brain(0.4), reference.brain, advantage="score", ref=True, options={"gamma": 0.4}),
    "gdro": Case(sequence.gdro(), reference.gdro, advantage="score", ref=True),
    "gdro-ties": Case(
        sequence.gdro(0.5, 0.3), reference.gdro, advantage="reward", ref=True, options={"beta": 0.5, "tau": 0.3}
    ),
}
ALL = [pytest.param(case, scene, id=f"{name}-{scene}") for name, case in CASES.items() for scene in case.scenes]


def definitions() -> dict[str, Definition[Any]]:
    found = {}
    for module in (token, score, sequence, along):
        for name, x in vars(module).items():
            if isinstance(x, Definition) and x.function.__module__ == module.__name__:
                found[name] = x
    return found


def test_every_loss_has_a_case() -> None:
    assert {case.loss.name for case in CASES.values()} | {"sdpo_topk"} == set(definitions())


@pytest.mark.parametrize("definition", definitions().values(), ids=lambda d: d.name)
def test_docstrings_say_where_a_loss_comes_from(definition: Definition[Any]) -> None:
    text = definition.__doc__ or ""
    assert "ggregation" in text
    assert definition.name == "sft" or any(
        word in text for word in ("erified in code", "econstructed", "note", "Known form", "Read in")
    )


# ----------------------------------------------------------------------------------------------------- the expressions
def evaluated(case: Case, b: Batch, weights: Tensor | None) -> Tensor:
    terms = {"logprob": b.lp, "old_logprob": b.old, "advantage": getattr(b, case.advantage), **case.extra(b)}
    if case.ref:
        terms["ref_logprob"] = b.ref
    if weights is not None:
        terms["weight"] = weights
    return case.loss.evaluate(mask=b.mask, group_ids=b.groups if case.groups else None, **terms)


@pytest.mark.parametrize(("case", "scene"), ALL)
def test_expression_equals_its_reference(case: Case, scene: str) -> None:
    b = SCENES[scene]().double()
    for weights in (None, b.weights) if case.rollout else (None,):
        expected, found = case.expected(b, weights), evaluated(case, b, weights)
        counted = b.mask if expected.dim() == 2 else b.mask.any(-1)
        assert_near(found[counted], expected[counted], 1e-9)
        upstream = torch.linspace(-1, 2, expected.numel(), dtype=torch.float64).reshape(expected.shape) * counted
        ours, theirs = (torch.autograd.grad((x * upstream)[counted].sum(), b.lp)[0] for x in (found, expected))
        assert_near(ours[b.mask], theirs[b.mask], 1e-9)


def assert_near(found: Tensor, expected: Tensor, tolerance: float) -> None:
    """Every element to `tolerance` of its own size, at least of 1."""
    assert torch.isfinite(expected).all(), "the reference itself left the range"
    error = (found.double() - expected).abs() / expected.abs().clamp(min=1.0)
    worst = error.max().item() if error.numel() else 0.0
    assert worst <= tolerance, (
        f"error {worst:.3e}; {found.flatten()[error.argmax()]} for {expected.flatten()[error.argmax()]}"
    )


# --------------------------------------------------------------------------------------------------------- the backends
def aggregate(value: Tensor, b: Batch, aggregation: str) -> Tensor:
    """Section 0's aggregations written out; a loss per sequence counts in each of its tokens."""
    count = b.mask.sum(-1)
    value = value if value.dim() == 2 else value.unsqueeze(-1).expand(b.mask.shape)
    total = torch.where(b.mask, value, 0.0).sum(-1)
    rows = count > 0
    mean = total[rows] / count[rows]
    if aggregation == "token-mean":
        return total.sum() / count.sum()
    if aggregation == "seq-mean-token-mean":
        return mean.mean()
    if aggregation == "seq-mean-token-sum":
        return total.sum() / rows.sum()
    assert aggregation == "group-mean"
    groups = b.groups[rows]
    return torch.stack([mean[groups == g].mean() for g in groups.unique()]).mean()


def run(case: Case, b: Batch, backend: str, aggregation: str | None = None, **options: Any) -> tuple[Tensor, Tensor]:
    """(loss, gradient for the log-probs under an upstream gradient of 0.7)."""
    lp = b.lp.clone().requires_grad_()
    needs_groups = case.groups or (aggregation or case.loss.aggregation) == "group-mean"
    with fastreward.backend(backend):
        result = fastreward.policy_loss(
            lp,
            b.old,
            getattr(b, case.advantage),
            b.mask,
            loss=case.loss,
            aggregation=aggregation,
            group_ids=b.groups if needs_groups else None,
            extra=case.extra(b),
            ref_logprobs=b.ref if case.ref else None,
            **options,
        )
        (0.7 * result.loss).backward()
    assert lp.grad is not None
    return result.loss.detach(), lp.grad


def compare(found: tuple[Tensor, Tensor], expected: Tensor, b: Batch, double: Batch, what: str) -> None:
    """Loss and gradient against float64: every number to 2e-5 of itself, 5e-6 at least."""
    gradient = 0.7 * torch.autograd.grad(expected, double.lp)[0]
    assert torch.count_nonzero(found[1][~b.mask]) == 0, f"{what}: a gradient under the mask"
    for name, ours, theirs in (("loss", found[0], expected.detach()), ("gradient", found[1], gradient)):
        assert torch.isfinite(theirs).all(), "the reference itself left the range"
        told = functools.partial("{}: {}: {}".format, what, name)
        torch.testing.assert_close(ours.double(), theirs, rtol=2e-5, atol=5e-6, msg=told)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("case", "scene"), ALL)
def test_backend(case: Case, scene: str, backend: str) -> None:
    b = SCENES[scene]()
    double = b.double()
    expected = aggregate(case.expected(double), double, case.loss.aggregation)
    compare(run(case, b, backend), expected, b, double, "its own aggregation")
    for aggregation in ("token-mean", "seq-mean-token-sum") if scene in ("ragged", "far") else ():
        expected = aggregate(case.expected(double), double, aggregation)
        compare(run(case, b, backend, aggregation), expected, b, double, aggregation)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_weights_of_tokens_and_rows(case: Case, backend: str) -> None:
    b = batch(seed=6)
    double = b.double()
    rows = torch.linspace(0.2, 1.7, len(b.groups))
    for weights in (b.weights, rows):
        theirs = weights.double()
        if case.rollout:
            value = case.expected(double, theirs)
        else:
            value = case.expected(double)
            value = value if value.dim() == 2 else value.unsqueeze(-1)
            value = value * torch.where(b.mask, theirs if theirs.dim() == 2 else theirs.unsqueeze(-1), 0.0)
        expected = aggregate(value, double, "seq-mean-token-mean")
        compare(run(case, b, backend, "seq-mean-token-mean", weights=weights), expected, b, double, str(weights.dim()))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_advantages_per_row(case: Case, backend: str) -> None:
    b = batch(seed=7)
    b = b.with_advantages(b.score) if case.advantage == "adv" else b
    double = b.double()
    expected = aggregate(case.expected(double), double, case.loss.aggregation)
    compare(run(case, b, backend), expected, b, double, "rows")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_packed_is_padded(case: Case, backend: str) -> None:
    b = batch(seed=8)
    loss, gradient = run(case, b, backend)
    tokens, rows, inside = b.mask.numel(), len(b.groups), torch.ones_like(b.mask)
    inside[:, -2:] = b.mask[:, -2:].any()  # the last columns may be padding that packing leaves out
    inside[2, 4:] = b.mask[2, 4:]
    flat = {
        f.name: x[inside] if x.numel() == tokens else x for f in dataclasses.fields(b) for x in (getattr(b, f.name),)
    }
    assert rows * b.mask.shape[1] > inside.sum()
    bounds = torch.cat([torch.zeros(1, dtype=torch.int64), inside.sum(-1).cumsum(0)])
    found = run(case, Batch(**flat), backend, cu_seqlens=bounds)
    torch.testing.assert_close(found[0], loss, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(found[1], gradient[inside], rtol=1e-6, atol=1e-7)


# ----------------------------------------------------------------------------------------------------------- the edges
def exact_log(ratio: float) -> float:
    """A float64 whose exp in torch is exactly `ratio`."""
    x = math.log(ratio)
    for _ in range(8):
        for y in (x, math.nextafter(x, -math.inf), math.nextafter(x, math.inf)):
            if torch.tensor(y, dtype=torch.float64).exp().item() == ratio:
                return y
        x = math.nextafter(x, math.inf)
    raise AssertionError(f"no float64 has exp {ratio}")


CLIPPED = {
    "ppo": (lambda low, high: token.ppo(low, high), reference.ppo),
    "gspo_token": (lambda low, high: sequence.gspo_token(low, high), reference.gspo_token),
    "gspo": (lambda low, high: sequence.gspo(low, high), reference.gspo),
    "cispo": (lambda low, high: score.cispo(low, high), reference.cispo),
}


@pytest.mark.parametrize("name", CLIPPED)
@pytest.mark.parametrize("sign", [-1.0, 0.0, 1.0])
def test_ratio_exactly_at_an_edge(name: str, sign: float) -> None:
    make, written_out = CLIPPED[name]
    edges = [exact_log(0.75), exact_log(1.25)]
    lp = torch.tensor([[edges[0]], [edges[1]]], dtype=torch.float64, requires_grad=True)
    old, mask = torch.zeros(2, 1, dtype=torch.float64), torch.ones(2, 1)
    adv = torch.full((2, 1), sign, dtype=torch.float64)
    found = make(0.25, 0.25).evaluate(mask=mask, logprob=lp, old_logprob=old, advantage=adv)
    expected = written_out(lp, old, adv, mask, clip_low=0.25, clip_high=0.25)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    gradients = [torch.autograd.grad(x.sum(), lp)[0] for x in (found, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-15, atol=0)
    if sign and name == "ppo":
        assert gradients[0].abs().tolist() == [[0.75], [1.25]]  # an edge belongs to the inside


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", CLIPPED)
def test_edges_of_no_width_on_backends(name: str, backend: str) -> None:
    """clip widths 0 put the ratio 1 of every token exactly on both edges, in float32 as well."""
    make, written_out = CLIPPED[name]
    b = batch(seed=9)
    b.old[b.mask] = b.lp[b.mask]
    double = b.double()
    value = written_out(double.lp, double.old, double.adv, double.mask, clip_low=0.0, clip_high=0.0)
    case = Case(make(0.0, 0.0), written_out)
    expected = aggregate(value, double, case.loss.aggregation)
    compare(run(case, b, backend), expected, b, double, "on both edges")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("gap", [-0.5, 0.5])
def test_gmpo_at_its_edges(gap: float, backend: str) -> None:
    """Its edges lie in log space, where float32 hits them exactly."""
    b = batch(seed=10)
    b.lp[b.mask], b.old[b.mask] = -1.0, -1.0 - gap
    double = b.double()
    case = Case(sequence.gmpo(0.5, 0.5), reference.gmpo, options={"clip_low": 0.5, "clip_high": 0.5})
    expected = aggregate(case.expected(double), double, case.loss.aggregation)
    compare(run(case, b, backend), expected, b, double, "on an edge")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "name", ["ppo", "psr", "nsr", "stable_reinforce-none", "tw_grpo", "gspo_token", "gmpo", "dppo_tv", "dppo_kl"]
)
def test_clip_fractions_count_the_tokens_whose_gradient_is_cut(name: str, backend: str) -> None:
    case, b = CASES[name], batch(1.0, seed=15)
    lp = b.lp.clone().requires_grad_()
    with fastreward.backend(backend):
        result = fastreward.policy_loss(
            lp, b.old, getattr(b, case.advantage), b.mask, loss=case.loss, extra=case.extra(b)
        )
        result.loss.backward()
    assert lp.grad is not None
    adv = reference.clean(b.mask, getattr(b, case.advantage)) - float(name == "nsr")
    cut = (lp.grad == 0) & b.mask
    for side, sign in (("low", -1), ("high", 1)):
        share = (cut & (adv.sign() == sign)).sum() / b.mask.sum()
        assert result.metrics[f"clip_fraction_{side}"].item() == pytest.approx(share.item(), abs=1e-6)
        assert share > 0 or (name, side) in {("psr", "low"), ("nsr", "high")}


# ------------------------------------------------------------------------------------------------------------------ KL
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("scene", ["ragged", "far", "30", "200"])
@pytest.mark.parametrize("kind", ["k1", "abs", "k2", "k3", "k1+", "abs+", "k3+", "k3-corrected"])
def test_kl_terms(kind: str, scene: str, backend: str) -> None:
    b = SCENES[scene]()
    double = b.double()
    estimator = reference.kl(
        double.lp,
        double.old,
        double.adv,
        double.mask,
        ref=double.ref,
        kind=kind.removesuffix("-corrected"),
        convention="fastreward",
        bias_correction=kind.endswith("corrected"),
    )
    case = Case(score.reinforce(), reference.reinforce)
    expected = aggregate(case.expected(double) + 0.3 * estimator, double, "token-mean")
    found = run(dataclasses.replace(case, ref=True), b, backend, "token-mean", kl=kind, kl_coef=0.3)
    compare(found, expected, b, double, kind)


@pytest.mark.parametrize("scene", ["ragged", "far", "30", "200"])
@pytest.mark.parametrize(
    ("convention", "kind", "clamps"),
    [
        *(("verl", kind, {"clamp": None}) for kind in ("k1", "abs", "k2", "k1+", "abs+")),
        ("verl", "k3", {"clamp": 20.0, "value_clamp": 10.0}),
        *(("trl", kind, {"clamp": None}) for kind in ("k3", "k3+")),
        *(("openrlhf", kind, {"clamp": None, "value_clamp": 10.0}) for kind in ("k1", "k2", "k3")),
    ],
)
def test_kl_in_the_trainers_conventions(convention: str, kind: Any, clamps: dict[str, Any], scene: str) -> None:
    b = SCENES[scene]().double()

    @define
    def estimate(t: Terms) -> Node:
        return kl(t, kind, **clamps)

    found = estimate().evaluate(mask=b.mask, logprob=b.lp, ref_logprob=b.ref)
    expected = reference.kl(b.lp, b.old, b.adv, b.mask, ref=b.ref, kind=kind, convention=convention)
    assert_near(found[b.mask], expected[b.mask], 1e-9)
    ours, theirs = (torch.autograd.grad(x[b.mask].sum(), b.lp)[0] for x in (found, expected))
    assert_near(ours[b.mask], theirs[b.mask], 1e-9)


# -------------------------------------------------------------------------------------------------------- SDPO, top k
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("tail", [True, False])
@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.5, 1.0])
def test_sdpo_topk(alpha: float, tail: bool, backend: str) -> None:
    """Positions as rows, ids as their tokens; some positions have fewer ids, one has none."""
    logits = torch.randn(2, 9, 40, generator=torch.Generator().manual_seed(0)) * 2
    student, teacher = (x.log_softmax(-1)[:, :6].contiguous() for x in logits)
    mask = torch.arange(6) < torch.tensor([6, 6, 3, 6, 0, 1, 6, 5, 6]).unsqueeze(-1)
    for x in (student, teacher):
        x[~mask] = math.nan
    weights = torch.linspace(0.5, 2.0, 9)
    lp = student.clone().requires_grad_()
    with fastreward.backend(backend):
        result = fastreward.policy_loss(
            lp,
            torch.zeros_like(student),
            torch.zeros(9),
            mask,
            loss=sequence.sdpo_topk(alpha, tail),
            weights=weights,
            extra={"teacher_logprob": teacher},
        )
        result.loss.backward()
    double = student.double().requires_grad_()
    value = reference.sdpo_topk(
        double, None, None, mask, teacher=teacher.double(), alpha=alpha, tail=tail, is_weight=weights
    )
    expected = value[mask.any(-1)].mean()
    assert abs(result.loss.item() - expected.item()) <= 2e-6
    gradient = torch.autograd.grad(expected, double)[0]
    torch.testing.assert_close(lp.grad.double(), torch.where(mask, gradient, 0.0), rtol=1e-5, atol=2e-6)


# ------------------------------------------------------------------------------------- what the methods are known to be
def test_brain_of_two_with_a_clear_winner_is_dpo() -> None:
    b = batch(seed=11).double()
    b = dataclasses.replace(b, groups=torch.arange(8) // 2, score=torch.tensor([1e3, 0] * 4, dtype=torch.float64))
    found = reference.brain(b.lp, b.old, b.score, b.mask, groups=b.groups)
    s = reference.seq_sum(b.mask, reference.log_ratio(b.mask, b.lp, b.old))
    assert found[0].item() == pytest.approx(-torch.nn.functional.logsigmoid(s[0] - s[1]).item())


def test_gdro_of_two_with_a_clear_winner_is_dpo() -> None:
    b = batch(seed=11).double()
    b = dataclasses.replace(b, groups=torch.arange(8) // 2, score=torch.tensor([0.0, 1] * 4, dtype=torch.float64))
    found = reference.gdro(b.lp, b.old, b.score, b.mask, groups=b.groups, ref=b.ref, beta=0.1, tau=1e-3)
    s = 0.1 * reference.seq_sum(b.mask, reference.log_ratio(b.mask, b.lp, b.ref))
    assert found[0].item() == pytest.approx(-torch.nn.functional.logsigmoid(s[1] - s[0]).item())


def test_gspo_is_gspo_token_with_one_advantage_a_row() -> None:
    b = batch(seed=12).double()
    rows = b.mask.any(-1)
    pair = []
    for form in (sequence.gspo, sequence.gspo_token):
        value = form(0.03, 0.04).evaluate(mask=b.mask, logprob=b.lp, old_logprob=b.old, advantage=b.score)
        mean = aggregate(value, b, "seq-mean-token-mean")
        pair.append((mean, torch.autograd.grad(mean, b.lp)[0][rows]))
    torch.testing.assert_close(pair[0], pair[1])


def test_jepo_keeps_its_baseline_where_one_rollout_is_far_likelier() -> None:
    """The likeliest rollout's baseline is made of the others, however far below it they are."""
    lp = torch.tensor([[-1.0, -1.0], [-1.0, -2000.0], [-1.0, -2001.0]], dtype=torch.float64, requires_grad=True)
    answer = torch.tensor([[0, 1]] * 3)
    terms = {"logprob": lp, "answer": answer, "mask": torch.ones(3, 2)}
    found = sequence.jepo().evaluate(group_ids=torch.zeros(3, dtype=torch.int64), **terms)
    gradient = torch.autograd.grad(found[0], lp)[0][:, 0]
    others = [-2000 + math.log1p(math.exp(-1)) - math.log(2), -1 - math.log(2), -1 - math.log(2)]
    expected = [-(-1 - math.log(3) - other) for other in others]
    assert gradient.tolist() == pytest.approx(expected)


# ------------------------------------------------------------------------------------------------------------ selection
@pytest.mark.parametrize("share", [0.0002, 0.1, 0.5, 1.0])
def test_kl_cov_selection(share: float) -> None:
    b = batch(seed=13)
    found = selection.cov_mask(b.lp, b.adv, b.mask, method="kl", share=share)
    expected = reference.cov_mask(b.lp, b.old, b.adv, b.mask, method="kl", ratio=share)
    assert torch.equal(found, expected)
    assert found.sum() == reference.cov_count(b.mask, share)


@pytest.mark.parametrize("share", [0.0002, 0.1, 1.0])
def test_clip_cov_selection(share: float) -> None:
    b = batch(seed=13)
    bounds = {"cov_low": 0.1, "cov_high": 2.0}

    def draw(seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        options = {"method": "clip", "share": share, "old_logprobs": b.old, "generator": generator, **bounds}
        return selection.cov_mask(b.lp, b.adv, b.mask, **options)

    candidates = reference.cov_mask(b.lp, b.old, b.adv, b.mask, method="clip", **bounds)
    assert 3 < candidates.sum() < b.mask.sum()
    found = draw(0)
    assert found.sum() == min(reference.cov_count(b.mask, share), int(candidates.sum()))
    assert not (found & ~candidates).any()
    assert torch.equal(found, draw(0))
    if share < 1:
        assert torch.stack([draw(seed) for seed in range(40)]).any(0).sum() > 2 * found.sum()


def test_cov_mask_refuses_what_it_cannot_use() -> None:
    b = batch()
    with pytest.raises(ValueError, match="old_logprobs: needed for method='clip'"):
        selection.cov_mask(b.lp, b.adv, b.mask, method="clip")
    with pytest.raises(ValueError, match="method: "):
        selection.cov_mask(b.lp, b.adv, b.mask, method="top")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="share: expected a positive number"):
        selection.cov_mask(b.lp, b.adv, b.mask, method="kl", share=0)


def test_nothing_selected_from_nothing() -> None:
    b = batch()
    for mask in (torch.zeros_like(b.mask), b.mask):
        rows = 0 if mask is b.mask else len(mask)
        found = selection.cov_mask(b.lp[:rows], b.adv[:rows], mask[:rows], method="kl")
        assert found.shape == mask[:rows].shape
        assert not found.any()


def test_tw_grpo_importance() -> None:
    logprobs = torch.randn(6, 5, 13, generator=torch.Generator().manual_seed(1)).mul(2).log_softmax(-1)
    mask = torch.arange(5) < torch.tensor([5, 3, 4, 5, 2, 1]).unsqueeze(-1)
    logprobs[~mask] = math.nan
    found = selection.tw_grpo_importance(logprobs, mask, group_size=3)
    expected = reference.tw_grpo_importance(logprobs, mask, torch.arange(6) // 3)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)
    assert found.amin() == 0
    assert found.amax() == pytest.approx(1, abs=1e-6)
    with pytest.raises(ValueError, match="group_size: expected a positive divisor of the 6 rows, got 4"):
        selection.tw_grpo_importance(logprobs, mask, group_size=4)


# ----------------------------------------------------------------------------------------------------------- parameters
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: token.ppo(clip_low=-0.2), r"clip_low: expected a number >= 0, got -0.2"),
        (lambda: token.ppo(dual_clip=1.0), r"dual_clip: expected None or a number > 1, got 1.0"),
        (lambda: token.ppo(clip_high=math.nan), r"clip_high: expected a number >= 0, got nan"),
        (lambda: token.sapo(tau_pos=0.0), r"tau_pos: expected a positive number, got 0.0"),
        (lambda: score.cispo(convention="swift"), r"convention: expected 'verl', 'trl' or 'tinker', got 'swift'"),
        (lambda: score.cispo(5.0, 4.0, "tinker"), r"clip_low: expected at most clip_high, 4.0, got 5.0"),
        (
            lambda: along.bapo(high_step=1e-4),
            r"high_step: expected at most 200 steps from high_start to high_end, got 8000",
        ),
        (lambda: along.bapo(high_end=math.inf), r"high_step: expected at most 200 steps .*, got inf"),
        (lambda: score.dro(-0.1), r"beta: expected a positive number, got -0.1"),
        (lambda: sequence.gmpo(clip_low=-1.0), r"clip_low: expected a number >= 0, got -1.0"),
        (lambda: sequence.sdpo_topk(1.5), r"alpha: expected a number in \[0, 1\], got 1.5"),
        (lambda: sequence.real(variant="softmax"), r"variant: expected 'anchor' or 'bce', got 'softmax'"),
        (lambda: sequence.pacs(center="median"), r"center: expected 'leave-one-out', 'std' or 'none', got 'median'"),
        (
            lambda: token.stable_reinforce(advantage_filter="3"),
            r"advantage_filter: expected 'paper', 'code' or None, got",
        ),
    ],
)
def test_bad_parameters_are_refused(make: Callable[[], Loss], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_parameters_are_run_time_scalars() -> None:
    """Other numbers, even one per sequence, make no other formula."""
    assert token.ppo(0.1, 0.3).structure == token.ppo(0.2, 0.2).structure
    assert score.dispo(neg_high=3.0).structure == score.dispo().structure
    assert token.ppo(dual_clip=3.0).structure != token.ppo().structure
    b = batch()
    widths = torch.linspace(0.1, 0.4, len(b.groups))
    found = token.ppo(clip_high=widths).evaluate(mask=b.mask, logprob=b.lp, old_logprob=b.old, advantage=b.adv)
    for row, width in enumerate(widths.tolist()):
        expected = reference.ppo(b.lp, b.old, b.adv, b.mask, clip_high=width)
        torch.testing.assert_close(found[row][b.mask[row]], expected[row][b.mask[row]])

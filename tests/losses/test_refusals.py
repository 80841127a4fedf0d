"""What the loss language refuses, with the line at fault and what to write instead."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from losses_of_a_few_tokens import make, plain_ppo
from torch import Tensor

import fastreward
from fastreward import losses
from fastreward.language import objective as objective_module
from fastreward.language.node import Level
from fastreward.losses import (
    define,
    exp,
    seq_mean,
    seq_sum,
    stop_gradient,
    where,
)


def refused(function: Callable[..., object], error: type[Exception], *parts: str, **extra: Tensor) -> None:
    loss = define(function)()  # type: ignore[arg-type]
    data = {k: v.float() for k, v in make().items()}
    with pytest.raises(error) as caught:
        fastreward.policy_loss(data["logprob"], data["old_logprob"], data["advantage"], loss=loss, extra=extra or None)
    for part in parts:
        assert part in str(caught.value)


def test_errors_name_the_line_and_say_what_to_write() -> None:
    def branches(t):
        if t.advantage > 0:
            return t.logprob
        return -t.logprob

    def uses_math(t):
        return math.exp(t.logprob)

    def uses_torch(t):
        return torch.exp(t.logprob)

    def misspells(t):
        return t.logprobs

    def indexes(t):
        return t.logprob[0]

    def third_root(t):
        return t.ratio**0.3

    here = "test_refusals.py:"
    refused(branches, TypeError, here, "in branches", "where(condition, a, b)")
    refused(uses_math, TypeError, here, "in uses_math", "fastreward.losses")
    refused(uses_torch, TypeError, here, "fastreward.losses.exp")
    refused(misspells, AttributeError, here, "did you mean t.logprob")
    refused(indexes, TypeError, here, "can't be indexed")
    refused(third_root, TypeError, here, "exp(0.3 * log(x))")


@pytest.mark.parametrize(
    ("function", "part"),
    [
        (lambda t: np.exp(t.logprob), "use fastreward.losses.exp"),
        (lambda t: np.where(t.ratio > 1, 1.0, 0.0), "use fastreward.losses.where"),
        (lambda t: np.mean(t.ratio), "seq_mean, group_mean or batch_mean"),
        (lambda t: np.asarray(t.ratio), "no array"),
        (lambda t: np.ones(3) * t.ratio, "extra={...}"),
        (lambda t: torch.ones(3) * t.ratio, "extra={...}"),
        (lambda t: t.ratio * torch.ones(3), "extra={...}"),
        (lambda t: torch.clamp(t.ratio, 0, 1), "use clip"),
        (lambda t: 2**t.ratio, "exp(x * math.log(2))"),
        (lambda t, power=2: t.ratio**power, "write exp(y * log(x)), or name the parameter in define(static="),
        (lambda t: t.ratio % 2, "does not round"),
        (lambda t: 2 // t.ratio, "does not round"),
        (lambda t: round(t.ratio), "does not round"),
        (lambda t: math.floor(t.ratio), "does not round"),
        (lambda t: t.ratio @ t.ratio, "seq_sum(x * y)"),
        (lambda t: t.ratio ^ 2, "x ** 2"),
        (lambda t: len(t.ratio), "t.length"),
        (lambda t: 1 in t.ratio, "can't be searched"),
        (lambda t: seq_sum(1.0), "seq_sum: expected a term of the loss (t.logprob, ...), got 1.0"),
        (lambda t: losses.batch_mean(1.0), "batch_mean: expected a term of the loss"),
        (lambda t: losses.batch_max(1.0), "batch_max: expected a term of the loss"),
        (lambda t: seq_mean(t), "got Terms; take one of its terms, as in t.logprob"),
        (lambda t: exp(t), "got Terms; take one of its terms, as in t.logprob"),
        (lambda t: losses.group_mean(t.logprob), "group_mean takes what is per sequence"),
        (lambda t: losses.group_size(1), "group_size: expected the loss's terms"),
        (lambda t: t.ratio * losses.ppo(), "got Loss; call it with the terms"),
        (lambda t: losses.ppo(clip_high=torch.ones(4))(t), "clip_high: a tensor can't be a parameter of a loss inside"),
        (lambda t: losses.ppo()(1), "expected a loss's terms"),
        (lambda t: None, "expected the loss to return a term, got None"),
        (lambda t: (t.ratio, t.ratio), "expected the loss to return a term, got tuple"),
        (lambda t: t.ratio > 1, "where(condition, 1.0, 0.0)"),
    ],
)  # fmt: skip
def test_what_the_language_has_not_is_refused_with_a_remedy(function: Callable[..., object], part: str) -> None:
    refused(function, TypeError, f"test_refusals.py:{function.__code__.co_firstlineno}", part)


def test_methods_of_arrays_are_refused_with_a_remedy() -> None:
    refused(lambda t: t.ratio.exp(), AttributeError, "test_refusals.py:", "use fastreward.losses.exp")
    refused(lambda t: t.ratio.mean(), AttributeError, "seq_mean, group_mean or batch_mean")
    refused(lambda t: t.ratio.detach(), AttributeError, "use stop_gradient")
    refused(lambda t: t.ratio.shape, AttributeError, "no .shape", "help(fastreward.losses)")


def test_metrics_of_every_loss_are_not_a_losss_own() -> None:
    def reports(t):
        t.report(clip_fraction_low=t.ratio > 1, own=t.ratio)
        t.report(ratio_mean=t.ratio)
        return t.logprob

    refused(reports, ValueError, "test_refusals.py:", "'ratio_mean' is a metric of every loss already")


@pytest.mark.parametrize(
    ("make_loss", "error", "message"),
    [
        (lambda: losses.ppo("a"), TypeError, "ppo: clip_low: expected a number or a [B] tensor, got 'a'"),
        (lambda: losses.ppo(None), TypeError, "ppo: clip_low: expected a number or a [B] tensor, got None"),
        (lambda: losses.ppo(True), TypeError, "ppo: clip_low: expected a number or a [B] tensor, got True"),
        (lambda: losses.dpo("a"), TypeError, "dpo: beta: expected a number"),
        (lambda: losses.pacs(balanced=1), TypeError, "pacs: balanced: expected True or False, got 1"),
        (lambda: losses.ppo([0.1]), TypeError, "ppo: clip_low: expected a number or a [B] tensor, got list"),
        (lambda: losses.ppo(clip=0.1), TypeError, "ppo: got an unexpected keyword argument 'clip'"),
        (lambda: losses.ppo(log_ratio_clamp=torch.tensor(3.0)), TypeError, "expected a number or None (it decides"),
        (lambda: losses.simpo(gamma=math.nan), ValueError, "simpo: gamma: expected a number, got nan"),
        (lambda: plain_ppo(clip_low=math.nan), ValueError, "plain_ppo: clip_low: expected a number, got nan"),
        (lambda: losses.rpo(eta=math.nan), ValueError, "eta: expected a number >= 0, got nan"),
        (lambda: losses.tgdpo(alpha=-3), ValueError, "alpha: expected a number >= 0"),
        (lambda: losses.simpo(sft_weight=-1), ValueError, "sft_weight: expected a number >= 0"),
        # A tensor keeps the others' checks on, and is looked at itself.
        (lambda: losses.pacs(torch.ones(3), method="bogus"), ValueError, "method: expected 'sum' or 'mean'"),
        (lambda: losses.cispo(torch.ones(3), convention="bogus"), ValueError, "convention: expected"),
        (lambda: losses.ppo(torch.tensor([0.1, -5.0])), ValueError, "clip_low: expected a number >= 0, got -5.0"),
        (lambda: losses.ppo(torch.tensor([0.1, math.nan])), ValueError, "clip_low: expected a number >= 0"),
        (lambda: losses.dpo(label_smoothing=torch.zeros(3), variant="exo_pair"), ValueError, "a number above 0"),
    ],
)  # fmt: skip
def test_bad_parameters_are_named(make_loss: Callable[[], object], error: type[Exception], message: str) -> None:
    with pytest.raises(error) as caught:
        make_loss()
    assert message in str(caught.value)


def test_parameters_that_are_not_known_yet_do_not_hide_the_others() -> None:
    """Inside another loss a parameter may be a term; what its default would break is not held against it."""

    def smoothed(variant: str) -> losses.Loss:
        @define(pairs=True)
        def outer(t, share=0.1):
            return losses.dpo(label_smoothing=share, variant=variant)(t)

        return outer()

    assert "label_smoothing" not in str(smoothed("exo_pair"))
    with pytest.raises(ValueError, match="variant: expected one of"):
        str(smoothed("exo"))
    losses.cispo(torch.tensor([0.1, 0.5]), torch.tensor([0.2, 0.6]), convention="tinker")


def test_evaluate_names_what_it_can_not_use() -> None:
    data = make()
    with pytest.raises(ValueError, match=r"advantages: ppo does not read it \(did you mean 'advantage'\?\)"):
        losses.ppo().evaluate(**data, advantages=data["advantage"])
    with pytest.raises(ValueError, match=r"ppo: clip_low: expected \[4\], one per sequence, got shape \[3\]"):
        losses.ppo(torch.tensor([0.1, 0.2, 0.3])).evaluate(**data)
    losses.ppo().evaluate(**data, weight=data["advantage"])  # a term, that this loss leaves alone


def test_evaluate_names_missing_terms_as_it_takes_them() -> None:
    with pytest.raises(ValueError, match=r"ppo reads the term 'old_logprob', which was not passed; pass old_logprob=$"):
        losses.ppo().evaluate(logprob=-1.0, advantage=1.0)
    with pytest.raises(ValueError, match=r"which was not passed; pass rejected_ref_logprob=$"):
        losses.dpo().evaluate(chosen_logprob=-1.0, rejected_logprob=-1.0, chosen_ref_logprob=-1.0)
    with pytest.raises(ValueError, match=r"which was not passed; pass consistency=$"):
        losses.cream().evaluate(**{f"{side}_{x}logprob": -1.0 for side in ("chosen", "rejected") for x in ("", "ref_")})


POLICY_LOSSES = [x for x in vars(losses).values() if isinstance(x, losses.Definition) and not x.pairs]
PAIR_LOSSES = [x for x in vars(losses).values() if isinstance(x, losses.Definition) and x.pairs]


@pytest.mark.parametrize("definition", [*POLICY_LOSSES, *PAIR_LOSSES], ids=lambda d: d.name)
def test_evaluate_takes_numbers_and_one_token_a_sequence(definition: losses.Definition[Any]) -> None:
    needed = {name: 0.1 for name, p in definition.__signature__.parameters.items() if p.default is p.empty}
    loss, g = definition(**needed), torch.Generator().manual_seed(0)
    arrays, group_ids = {}, [0, 0, 1]
    for name, level, side in sorted(objective_module.inputs_asked(loss)):
        prefix = ("chosen_", "rejected_")[side] if loss.definition.pairs and (side or level == Level.TOKEN) else ""
        arrays[prefix + name] = (-torch.rand(3, generator=g), level)
    padded = {name: x.unsqueeze(-1) if level == Level.TOKEN else x for name, (x, level) in arrays.items()}
    expected = loss.evaluate(**padded, group_ids=group_ids)
    result = loss.evaluate(**{name: x for name, (x, _) in arrays.items()}, group_ids=group_ids)
    assert result.shape == (3,)
    torch.testing.assert_close(result, expected.reshape(3), equal_nan=True)
    first = {name: x[:1] for name, x in padded.items()}
    number = loss.evaluate(**{name: float(x[0]) for name, (x, _) in arrays.items()}, group_ids=[0])
    assert number.shape == ()
    torch.testing.assert_close(number, loss.evaluate(**first, group_ids=[0]).reshape(()), equal_nan=True)


def test_evaluate_of_numbers() -> None:
    value = losses.ppo().evaluate(logprob=-1.0, old_logprob=-1.2, advantage=2.0)
    assert float(value) == pytest.approx(-2.0 * 1.2)  # clipped
    x = torch.tensor(-1.0, requires_grad=True)
    losses.reinforce().evaluate(logprob=x, advantage=np.float32(3.0)).backward()
    assert x.grad == -3.0
    found = losses.ppo().evaluate(logprob=[-1.0, -1.0], old_logprob=np.array([-1.0, -1.2]), advantage=-1.0)
    torch.testing.assert_close(found, torch.tensor([1.0, math.exp(0.2)], dtype=torch.float64))
    with pytest.raises(ValueError, match=r"mask: expected \[B, T\], got shape \[2\]"):
        losses.ppo().evaluate(logprob=[-1.0, -1.0], old_logprob=-1.0, advantage=1.0, mask=[1, 0])


def test_what_a_loss_reads_is_named_exactly() -> None:
    """In messages: all that it may read, its own terms and extras alone."""

    @define
    def own(t, scale=1.0):
        t.report(seen=t.rollout_logprob)
        value = -t.extra("gate", per="sequence") * t.logprob * scale
        return value if t.has("weight") else value * t.extra("other")

    reads = "own does not read it; it reads gate, logprob, other, rollout_logprob$"
    x = torch.zeros(2, 3)
    extra = {"gate": torch.ones(2), "other": x, "bogus": x}
    for scale in (2.0, torch.tensor([1.0, 2.0])):
        with pytest.raises(ValueError, match=rf"extra\['bogus'\]: {reads}"):
            fastreward.policy_loss(
                x, x, x, loss=own(scale), extra=extra, rollout_logprobs=x, ref_logprobs=x, weights=None
            )
        with pytest.raises(ValueError, match=rf"bogus: {reads}"):
            own(scale).evaluate(logprob=x, rollout_logprob=x, **extra)
    with pytest.raises(ValueError, match=r"rollout_logprobs: ppo does not read it; it reads advantage, logprob, old_"):
        fastreward.policy_loss(x, x, x, rollout_logprobs=x)

    @define(pairs=True)
    def chosen_only(t, scale=1.0):
        return -scale * seq_sum(t.chosen.logprob * t.chosen.weight) + t.extra("margin") * seq_sum(t.rejected.logprob)

    reads = r"chosen_only does not read it; it reads chosen\.logprob, chosen\.weight, margin, rejected\.logprob$"
    pair = {"loss": chosen_only(), "extra": {"margin": torch.ones(2)}, "chosen_weights": x}
    with pytest.raises(ValueError, match=f"rejected_weights: {reads}"):
        fastreward.preference_loss(x, x, rejected_weights=x, **pair)
    with pytest.raises(ValueError, match=rf"rejected_extra\['gate'\]: {reads}"):
        fastreward.preference_loss(x, x, rejected_extra={"gate": x}, ref_chosen_logprobs=x, **pair)


def test_missing_terms_are_named_with_their_argument() -> None:
    refused(lambda t: t.logprob - t.ref_logprob, ValueError, "reads the term 'ref_logprob'", "pass ref_logprobs=")
    refused(lambda t: t.logprob * t.extra("gate"), ValueError, "reads the term 'gate'", 'extra={"gate": ...}')
    refused(
        lambda t: t.logprob * t.extra("score", per="sequence"), ValueError, "once per sequence", score=torch.ones(4, 6)
    )


def test_a_loss_without_a_gradient_is_refused() -> None:
    refused(lambda t: t.advantage * t.old_logprob, ValueError, "gradient", "zero", "does not depend on logprob")
    refused(lambda t: 3.0, ValueError, "test_refusals.py:", "does not depend on logprob")
    refused(lambda t: -stop_gradient(t.ratio) * t.advantage, ValueError, "stop_gradient")
    refused(lambda t: where(t.ratio > 1, 1.0, 0.0), ValueError, "zero")


def test_group_losses_need_groups_and_sequence_values() -> None:
    refused(lambda t: seq_mean(t.logprob) - losses.group_mean(seq_mean(t.logprob)), ValueError, "group_ids")
    refused(lambda t: losses.group_mean(t.logprob), TypeError, "per sequence", "seq_mean")


def test_what_a_loss_returns_and_takes_is_checked() -> None:
    refused(lambda t: t.ratio > 1, TypeError, "condition")
    refused(lambda t: None, TypeError, "expected the loss to return a term")
    with pytest.raises(TypeError, match=r"call it: ppo\(\)"):
        fastreward.policy_loss(*(torch.zeros(1, 1) for _ in range(3)), loss=losses.ppo)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="clip_low"):
        losses.ppo(clip_low=-2.0)
    with pytest.raises(ValueError, match="no parameter"):
        define(static=("nothing",))(lambda t: t.logprob)

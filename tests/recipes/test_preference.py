"""Preference recipes: each is the operation's call that it says it is; what they compute on the way is right."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fastreward import PolicyLoss, losses, preference_loss, recipes

PAIRS = 6
Data = dict[str, Any]
LABELS: Any = {"group_ids": ["a", "b", "a", "c", "b", "a"]}


def data() -> Data:
    made: Data = {}
    for side, width in (("chosen", 7), ("rejected", 9)):
        mask = torch.arange(width) < torch.randint(2, width + 1, (PAIRS, 1))
        made[side] = (-1 - torch.rand(PAIRS, width)).requires_grad_()
        made[f"ref_{side}"] = made[side].detach() + 0.5 * torch.randn(PAIRS, width)
        made[f"{side}_mask"] = mask
        for name in ("stats", "rm", "better", "worse"):
            made[f"{side}_{name}"] = -2 * torch.rand(PAIRS, width)
    return made | {"one": torch.rand(PAIRS), "two": torch.rand(PAIRS), "three": 3 * torch.rand(PAIRS)}


def sides(d: Data) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return d["chosen"], d["rejected"], d["ref_chosen"], d["ref_rejected"]


def masks(d: Data) -> Data:
    return {"chosen_mask": d["chosen_mask"], "rejected_mask": d["rejected_mask"]}


def op(d: Data, loss: losses.Loss, *, ref: bool = True, **options: Any) -> PolicyLoss:
    refs = {"ref_chosen_logprobs": d["ref_chosen"], "ref_rejected_logprobs": d["ref_rejected"]} if ref else {}
    return preference_loss(d["chosen"], d["rejected"], loss=loss, **refs, **masks(d), **options)


def extras(d: Data, **names: str) -> Data:
    """chosen_extra and rejected_extra: name of the loss -> name of the data."""
    return {f"{side}_extra": {k: d[f"{side}_{v}"] for k, v in names.items()} for side in ("chosen", "rejected")}


def variant(name: str, **parameters: Any) -> tuple[Callable[..., PolicyLoss], Callable[[Data], PolicyLoss]]:
    """Of a recipe that is dpo(variant=...)."""
    recipe, kind = name.split(":")
    return (
        lambda d: getattr(recipes, recipe)(*sides(d), **parameters, **masks(d)),
        lambda d: op(d, losses.dpo(variant=kind, **parameters)),
    )


SAME: dict[str, tuple[Callable[[Data], PolicyLoss], Callable[[Data], PolicyLoss]]] = {
    "dpo": (
        lambda d: recipes.dpo(*sides(d), beta=0.3, **masks(d), aggregation="sum", weights=d["one"]),
        lambda d: op(d, losses.dpo(0.3), aggregation="sum", weights=d["one"]),
    ),
    "dpo with token weights": (
        lambda d: recipes.dpo(
            *sides(d), **masks(d), chosen_weights=-d["chosen_stats"], rejected_weights=-d["rejected_stats"]
        ),
        lambda d: op(d, losses.dpo(), chosen_weights=-d["chosen_stats"], rejected_weights=-d["rejected_stats"]),
    ),
    "cdpo": (
        lambda d: recipes.cdpo(*sides(d), label_smoothing=0.2, **masks(d)),
        lambda d: op(d, losses.dpo(label_smoothing=0.2)),
    ),
    "robust_dpo": variant("robust_dpo:robust", label_smoothing=0.15),
    "hinge_dpo": variant("hinge_dpo:hinge", beta=0.2),
    "ipo": variant("ipo:ipo", beta=0.2),
    "exo": variant("exo:exo_pair", label_smoothing=0.05),
    "nca": variant("nca:nca_pair", beta=0.2),
    "bco": variant("bco:bco_pair", beta=0.2),
    "aot": variant("aot:aot", label_smoothing=0.1),
    "aot_unpaired": variant("aot_unpaired:aot_unpaired", beta=0.3),
    "apo_zero": variant("apo_zero:apo_zero", beta=0.2),
    "apo_down": variant("apo_down:apo_down", beta=0.2),
    "sppo_hard": variant("sppo_hard:sppo_hard", beta=0.2),
    "discopop": variant("discopop:discopop", discopop_tau=0.5),
    "dpo_norm": variant("dpo_norm:sigmoid_norm", beta=2.0),
    "f_dpo": (
        lambda d: recipes.f_dpo(*sides(d), f_divergence="alpha", alpha=0.3, **masks(d)),
        lambda d: op(d, losses.dpo(f_divergence="alpha", alpha=0.3)),
    ),
    "ld_dpo": (
        lambda d: recipes.ld_dpo(*sides(d), d["chosen_mask"], d["rejected_mask"], ld_alpha=0.4),
        lambda d: op(
            d,
            losses.dpo(),
            **dict(
                zip(
                    ("chosen_weights", "rejected_weights"),
                    losses.ld_dpo_weights(d["chosen_mask"], d["rejected_mask"], 0.4),
                    strict=True,
                )
            ),
        ),
    ),
    "wpo": (
        lambda d: recipes.wpo(*sides(d), d["chosen_stats"], d["rejected_stats"], **masks(d)),
        lambda d: op(d, losses.dpo(wpo=True), **extras(d, log_sum_sq_probs="stats")),
    ),
    "simpo": (
        lambda d: recipes.simpo(d["chosen"], d["rejected"], gamma=1.4, sft_weight=0.2, **masks(d)),
        lambda d: op(d, losses.simpo(2.0, 1.4, sft_weight=0.2), ref=False),
    ),
    "alphapo": (
        lambda d: recipes.alphapo(d["chosen"], d["rejected"], alpha=-0.5, gamma=1.4, **masks(d)),
        lambda d: op(d, losses.alphapo(-0.5, 0.1, 1.4), ref=False),
    ),
    "cpo": (
        lambda d: recipes.cpo(d["chosen"], d["rejected"], variant="ipo", sft_weight=0.2, **masks(d)),
        lambda d: op(d, losses.cpo(variant="ipo", sft_weight=0.2), ref=False),
    ),
    "orpo": (
        lambda d: recipes.orpo(d["chosen"], d["rejected"], beta=0.3, **masks(d)),
        lambda d: op(d, losses.orpo(0.3), ref=False),
    ),
    "rpo": (
        lambda d: recipes.rpo(*sides(d), eta=0.1, **masks(d)),
        lambda d: op(d, losses.rpo(0.05, 0.1)),
    ),
    "cream": (
        lambda d: recipes.cream(*sides(d), d["one"], **masks(d)),
        lambda d: op(d, losses.cream(), extra={"consistency": d["one"]}),
    ),
    "cream with one number": (
        lambda d: recipes.cream(*sides(d), torch.tensor(0.7), **masks(d)),
        lambda d: op(d, losses.cdpo(label_smoothing=0.3)),
    ),
    "dno": (
        lambda d: recipes.dno(*sides(d), d["one"], d["two"], **masks(d)),
        lambda d: op(d, losses.dno(), extra={"win_rate_chosen": d["one"], "win_rate_rejected": d["two"]}),
    ),
    "mm_dpo by the margins": (
        lambda d: recipes.mm_dpo(*sides(d), margin=d["three"], k=0.7, weight=0.5, **masks(d)),
        lambda d: op(d, losses.mm_dpo(0.1, 0.5), extra={"margin_factor": 1 - torch.exp(-0.7 * d["three"])}),
    ),
    "mm_dpo by the batch": (
        lambda d: recipes.mm_dpo(*sides(d), selected=d["one"] > 0.4, sft_weight=0.1, **masks(d)),
        lambda d: op(
            d, losses.mm_dpo(sft_weight=0.1, implicit_beta=True), extra={"selected": (d["one"] > 0.4).float()}
        ),
    ),
    "sppo": (
        lambda d: recipes.sppo(*sides(d), d["one"], d["two"], beta=0.1, **masks(d)),
        lambda d: op(d, losses.sppo(0.1), extra={"win_rate_chosen": d["one"], "win_rate_rejected": d["two"]}),
    ),
    "gpo": (
        lambda d: recipes.gpo(*sides(d), d["one"], d["two"], beta=0.1, **masks(d)),
        lambda d: op(d, losses.gpo(0.1), extra={"score_chosen": d["one"], "score_rejected": d["two"]}),
    ),
    "mah_dpo": (
        lambda d: recipes.mah_dpo(*sides(d), **masks(d), **LABELS),
        lambda d: op(d, losses.mah_dpo(), **LABELS),
    ),
    "tgdpo": (
        lambda d: recipes.tgdpo(*sides(d), d["chosen_rm"], d["rejected_rm"], alpha=0.9, **masks(d)),
        lambda d: op(d, losses.tgdpo(0.9), **extras(d, rm_logprob="rm")),
    ),
    "treg": (
        lambda d: recipes.treg(
            *sides(d),
            d["chosen_better"],
            d["chosen_worse"],
            d["rejected_better"],
            d["rejected_worse"],
            alpha=0.5,
            **masks(d),
        ),
        lambda d: op(d, losses.treg(0.5), **extras(d, better_logprob="better", worse_logprob="worse")),
    ),
}


@pytest.mark.parametrize("name", SAME)
def test_is_the_operation_s_call(name: str) -> None:
    made = []
    for call in SAME[name]:
        torch.manual_seed(3)
        d = data()
        result = call(d)
        gradients = torch.autograd.grad(1.7 * result.loss, [d["chosen"], d["rejected"]])
        made.append([result.loss.detach(), *gradients, *result.metrics.values_tensor])
        names = result.metrics.names
    for a, b in zip(*made, strict=True):
        assert torch.equal(a, b) or (
            name.startswith(("cdpo", "cream with", "mm_dpo by the m")) and torch.allclose(a, b)
        )
    assert all(x.abs().sum() > 0 for x in made[0][1:3])
    assert "reward_margin" in names


def test_every_recipe_is_compared() -> None:
    of_the_file = {r.name for r in recipes.RECIPES.values() if r.family == "preference"}
    assert {name.partition(" ")[0] for name in SAME} | {"tpo"} == of_the_file


def test_mah_dpo_is_the_mean_over_dimensions() -> None:
    d = data()
    got = recipes.mah_dpo(*sides(d), **masks(d), **LABELS)
    torch.testing.assert_close(got.loss, recipes.dpo(*sides(d), **masks(d), **LABELS, aggregation="group-mean").loss)


# ------------------------------------------------------------------------------------------------------- MM-DPO's draw
def drawn(generator: torch.Generator, monkeypatch: pytest.MonkeyPatch, d: Data) -> Tensor:
    """Which pairs mm_dpo selects."""
    seen: list[Tensor] = []

    def spy(*args: Any, extra: dict[str, Tensor], **kwargs: Any) -> PolicyLoss:
        seen.append(extra["selected"])
        return preference_loss(*args, extra=extra, **kwargs)

    monkeypatch.setattr("fastreward.recipes.preference.preference_loss", spy)
    recipes.mm_dpo(*sides(d), **masks(d), generator=generator)
    return seen[0]


def test_mm_dpo_draws_pairs_near_the_mean(monkeypatch: pytest.MonkeyPatch) -> None:
    """0.8 of 10 pairs; the one whose margin is 3 standard deviations off hardly ever."""
    lengths = torch.ones(10, 1)
    margins = torch.tensor([[0.0, 0.1, -0.1, 0.2, -0.2, 0.1, 0.0, -0.1, 0.05, 6.0]]).T
    d: Data = {
        "chosen": margins - 9,
        "rejected": lengths * -9,
        "ref_chosen": lengths * -9,
        "ref_rejected": lengths * -9,
    }
    d |= {"chosen_mask": torch.ones(10, 1), "rejected_mask": torch.ones(10, 1)}
    generator = torch.Generator().manual_seed(0)
    counts = torch.zeros(10)
    for _ in range(300):
        selected = drawn(generator, monkeypatch, d)
        assert selected.sum() == 8
        assert set(selected.tolist()) == {0.0, 1.0}
        counts += selected
    # Nine pairs of nearly one weight and one of exp(-2.84^2 / 2) = 0.018 of it: eight of ten are drawn with it in
    # about 0.018 * (1/9 + ... + 1/2) = 3 % of all draws.
    assert counts[9] < 30
    assert (counts[:9] > 230).all()


def test_mm_dpo_draws_from_its_generator(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(3)
    d = data()
    same = [drawn(torch.Generator().manual_seed(s), monkeypatch, d) for s in (1, 1, *range(2, 12))]
    assert torch.equal(same[0], same[1])
    assert any(not torch.equal(same[0], other) for other in same[2:])
    assert all(x.sum() == int(0.8 * PAIRS) for x in same)


def test_mm_dpo_reads_no_masked_token_for_its_draw(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(3)
    d = data()
    want = drawn(torch.Generator().manual_seed(5), monkeypatch, d)
    hidden = {
        k: d[k].detach().masked_fill(~d[f"{k.removeprefix('ref_')}_mask"], torch.nan)
        for k in ("chosen", "ref_rejected")
    }
    assert torch.equal(drawn(torch.Generator().manual_seed(5), monkeypatch, d | hidden), want)


def test_mm_dpo_of_one_pair_and_packed() -> None:
    d = data()
    first = recipes.mm_dpo(*(x[:1] for x in sides(d)), **{k: v[:1] for k, v in masks(d).items()})
    assert first.loss.isfinite()
    bounds = {
        f"{side}_cu_seqlens": torch.tensor([0, *d[f"{side}_mask"].sum(-1).cumsum(0).tolist()])
        for side in ("chosen", "rejected")
    }
    packed = [x[d[f"{side}_mask"]] for x, side in zip(sides(d), ("chosen", "rejected") * 2, strict=True)]
    with pytest.raises(ValueError, match="selected: needed for packed"):
        recipes.mm_dpo(*packed, **bounds)
    got = recipes.mm_dpo(*packed, selected=d["one"] > 0.5, **bounds)
    torch.testing.assert_close(got.loss, recipes.mm_dpo(*sides(d), selected=d["one"] > 0.5, **masks(d)).loss)


@pytest.mark.parametrize("variant", ["sigmoid", "hinge", "ipo", "tpo-l"])
def test_tpo(variant: str) -> None:
    """TRL's formula in float64: the pair's loss, and the likelihood of a gold response."""
    torch.manual_seed(3)
    d = data()
    gold, gold_mask = (-1 - torch.rand(PAIRS, 5)).requires_grad_(), torch.arange(5) < torch.randint(1, 6, (PAIRS, 1))
    leaves = (d["chosen"], d["rejected"], gold)
    options: Any = {"beta": 0.3, "variant": variant, "gamma": 0.2, "nll_coef": 0.7}
    result = recipes.tpo(*leaves, gold_mask=gold_mask, **options, **masks(d))

    own = [x.detach().double().requires_grad_() for x in leaves]
    counts = [d[f"{side}_mask"].sum(-1) for side in ("chosen", "rejected")]
    sums = [(x * d[f"{side}_mask"]).sum(-1) for x, side in zip(own, ("chosen", "rejected"), strict=False)]
    gap, mean_gap = sums[0] - sums[1], sums[0] / counts[0] - sums[1] / counts[1]
    pairs = {
        "sigmoid": -torch.nn.functional.logsigmoid(0.3 * gap),
        "hinge": torch.relu(1 - 0.3 * gap),
        "ipo": (mean_gap - 1 / 0.6).square(),
        "tpo-l": -torch.nn.functional.logsigmoid(0.3 * (mean_gap - 0.2 / 0.3)),
    }[variant]
    expected = pairs.mean() + 0.7 * -own[2][gold_mask].mean()
    torch.testing.assert_close(result.loss.double(), expected, rtol=1e-5, atol=1e-6)
    found, wanted = torch.autograd.grad(result.loss, leaves), torch.autograd.grad(expected, own)
    for got, want in zip(found, wanted, strict=True):
        torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-7)


def test_tpo_of_packed_responses() -> None:
    torch.manual_seed(4)
    d, gold = data(), -1 - torch.rand(PAIRS, 5)
    mask, packed = torch.arange(5) < torch.tensor([[5], [1], [3], [0], [2], [4]]), {}
    bounds = torch.cat([torch.zeros(1, dtype=torch.int64), mask.sum(-1).cumsum(0)])
    for side in ("chosen", "rejected"):
        lengths = d[f"{side}_mask"].sum(-1)
        packed[f"{side}_logprobs"] = d[side][d[f"{side}_mask"]]
        packed[f"{side}_cu_seqlens"] = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    want = recipes.tpo(d["chosen"], d["rejected"], gold, gold_mask=mask, **masks(d))
    found = recipes.tpo(**packed, gold_logprobs=gold[mask], gold_cu_seqlens=bounds)
    assert torch.equal(found.loss, want.loss)


def test_tpo_names_its_own_arguments() -> None:
    x = -torch.rand(2, 3)
    with pytest.raises(ValueError, match="variant: expected one of 'sigmoid', 'hinge', 'ipo', 'tpo-l', got 'exo'"):
        recipes.tpo(x, x, x, variant="exo")
    with pytest.raises(ValueError, match=r"gold_mask: expected shape \[2, 3\] \(as gold_logprobs\), got \[2, 2\]"):
        recipes.tpo(x, x, x, gold_mask=torch.ones(2, 2))
    with pytest.raises(ValueError, match=r"gold_cu_seqlens: expected \[B \+ 1\] bounds over packed gold_logprobs"):
        recipes.tpo(x, x, x, gold_cu_seqlens=torch.tensor([0, 3]))
    with pytest.raises(ValueError, match="gold_logprobs: expected a response for each of 2 pairs, got 1"):
        recipes.tpo(x, x, x[:1])

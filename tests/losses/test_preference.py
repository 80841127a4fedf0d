"""The preference losses of the language against their float64 references: values, gradients, options, messages."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from reference_losses import preference as reference
from torch import Tensor

import fastreward
from fastreward import losses
from fastreward.language.define import Loss
from fastreward.language.node import Node
from fastreward.losses import PairTerms, define, preference, reference_free
from fastreward.preference_loss import preference_loss

PAIRS = 9
SIDES = ("chosen", "rejected")
Data = dict[str, Tensor]


# -------------------------------------------------------------------------------------------------------------- cases
@dataclass(frozen=True)
class Case:
    """A loss, its reference with the same parameters, and the extras that they read.

    token_extras: per side, by name. pair_extras: their makers. weighted: with token weights.
    """

    loss: Loss
    reference: Callable[..., Tensor]
    settings: dict[str, Any] = field(default_factory=dict)
    token_extras: tuple[str, ...] = ()
    pair_extras: dict[str, Callable[[int], Tensor]] = field(default_factory=dict)
    groups: bool = False
    weighted: bool = False


def share(count: int) -> Tensor:
    return torch.rand(count)


def chosen_pairs(count: int) -> Tensor:
    return (torch.arange(count) % 3 != 1).float()


def dpo_case(**settings: Any) -> Case:
    return Case(preference.dpo(**settings), reference.dpo, settings)


WIN_RATES = {"win_rate_chosen": share, "win_rate_rejected": share}
SCORES = {"score_chosen": torch.randn, "score_rejected": torch.randn}
CASES: dict[str, Case] = {
    **{
        f"dpo-{variant}": dpo_case(variant=variant, **settings)
        for variant, settings in {
            **{name: {} for name in reference.VARIANTS if name != "exo_pair"},
            "exo_pair": {"label_smoothing": 1e-3},
        }.items()
    },
    "dpo-beta": dpo_case(beta=0.7),
    "dpo-smoothed": dpo_case(label_smoothing=0.2),
    "dpo-robust-smoothed": dpo_case(variant="robust", label_smoothing=0.2),
    "dpo-mean": dpo_case(length_normalize=True, beta=2.0),
    **{
        f"dpo-{variant}-{divergence}": dpo_case(variant=variant, f_divergence=divergence)
        for divergence in reference.F_DIVERGENCES[1:]
        for variant in ("sigmoid", "sigmoid_norm", "hinge")
    },
    "dpo-alpha-1": dpo_case(f_divergence="alpha", alpha=1.0),
    "dpo-alpha-2": dpo_case(f_divergence="alpha", alpha=2.0),
    "dpo-aot-smoothed": dpo_case(variant="aot", label_smoothing=0.2),
    "dpo-weighted": Case(preference.dpo(), reference.dpo, weighted=True),
    "dpo-weighted-aot": Case(preference.dpo(variant="aot"), reference.dpo, {"variant": "aot"}, weighted=True),
    "dpo-weighted-mean": Case(
        preference.dpo(length_normalize=True), reference.dpo, {"length_normalize": True}, weighted=True
    ),
    "dpo-wpo": Case(preference.dpo(wpo=True), reference.dpo, token_extras=("log_sum_sq_probs",)),
    "simpo": Case(reference_free.simpo(), reference.simpo),
    "simpo-hinge": Case(reference_free.simpo(variant="hinge"), reference.simpo, {"variant": "hinge"}),
    "simpo-sft": Case(
        reference_free.simpo(2.5, 1.4, label_smoothing=0.1, sft_weight=0.3),
        reference.simpo,
        {"beta": 2.5, "gamma": 1.4, "label_smoothing": 0.1, "sft_weight": 0.3},
    ),
    "alphapo": Case(reference_free.alphapo(0.25), reference.alphapo, {"alpha": 0.25}),
    "alphapo-negative": Case(
        reference_free.alphapo(-0.5, 2.5, 1.4, label_smoothing=0.1),
        reference.alphapo,
        {"alpha": -0.5, "beta": 2.5, "gamma": 1.4, "label_smoothing": 0.1},
    ),
    **{
        f"cpo-{variant}": Case(reference_free.cpo(variant=variant), reference.cpo, {"variant": variant})
        for variant in ("sigmoid", "hinge", "ipo")
    },
    "cpo-smoothed": Case(
        reference_free.cpo(0.4, label_smoothing=0.1, sft_weight=0.3),
        reference.cpo,
        {"beta": 0.4, "label_smoothing": 0.1, "sft_weight": 0.3},
    ),
    "orpo": Case(reference_free.orpo(), reference.orpo),
    "orpo-beta": Case(reference_free.orpo(0.7), reference.orpo, {"beta": 0.7}),
    "rpo": Case(preference.rpo(), reference.rpo),
    "cdpo": Case(preference.cdpo(), reference.cdpo),
    "cdpo-weighted": Case(preference.cdpo(), reference.dpo, {"label_smoothing": 0.1}, weighted=True),
    "cream": Case(preference.cream(), reference.cream, pair_extras={"consistency": share}),
    "dno": Case(preference.dno(), reference.dno, pair_extras=WIN_RATES),
    "mm_dpo": Case(
        preference.mm_dpo(weight=0.5, sft_weight=0.2),
        reference.mm_dpo,
        {"weight": 0.5, "sft_weight": 0.2},
        pair_extras={"margin_factor": share},
    ),
    "mm_dpo-floor": Case(
        preference.mm_dpo(weight=5.0), reference.mm_dpo, {"weight": 5.0}, pair_extras={"margin_factor": torch.randn}
    ),
    "mm_dpo-implicit": Case(
        preference.mm_dpo(implicit_beta=True), reference.mm_dpo, pair_extras={"selected": chosen_pairs}
    ),
    "sppo": Case(preference.sppo(), reference.sppo, pair_extras=WIN_RATES),
    "gpo": Case(preference.gpo(beta=0.1), reference.gpo, {"beta": 0.1}, pair_extras=SCORES),
    "mah_dpo": Case(preference.mah_dpo(), reference.mah_dpo, groups=True),
    "tgdpo": Case(preference.tgdpo(), reference.tgdpo, token_extras=("rm_logprob",)),
    "treg": Case(preference.treg(), reference.treg, token_extras=("better_logprob", "worse_logprob")),
    "treg-simpo": Case(
        preference.treg(alpha=0.5, base="simpo", beta=2.0, gamma=0.5),
        reference.treg,
        {"alpha": 0.5, "base": "simpo", "beta": 2.0, "gamma": 0.5},
        token_extras=("better_logprob", "worse_logprob"),
    ),
}


# --------------------------------------------------------------------------------------------------------------- data
def make(widths: tuple[int, int] = (13, 8), *, spread: float = 0.5, pairs: int = PAIRS) -> Data:
    """Log-probs of both sides with ragged masks; pair 2's chosen and pair 5's rejected side are empty.

    Pair 0 has a single token a side; the log-ratio of one token of pair 1 is `spread` times 10.
    """
    data: Data = {}
    for side, width, empty in zip(SIDES, widths, (2, 5), strict=True):
        mask = torch.rand(pairs, width) > 0.35
        mask[:, 0] = True
        mask[0, 1:] = False
        mask[empty] = False
        logprobs = -torch.rand(pairs, width) * 3
        ref = logprobs - spread * torch.randn(pairs, width)
        ref[1, 0] = logprobs[1, 0] + 10 * spread
        data |= {side: logprobs, f"ref_{side}": ref, f"{side}_mask": mask}
        for name in ("log_sum_sq_probs", "rm_logprob", "better_logprob", "worse_logprob", "weights"):
            data[f"{side}_{name}"] = -torch.rand(pairs, width) * 2 if name != "weights" else torch.rand(pairs, width)
    data["dimension_ids"] = torch.arange(pairs) * 7 % 3
    return data


def garbage_under_mask(data: Data) -> Data:
    """NaN and inf wherever a mask is 0."""
    result = dict(data)
    for side in SIDES:
        hidden = ~data[f"{side}_mask"]
        for name, x in data.items():
            if x.ndim == 2 and x.is_floating_point() and x.shape == hidden.shape and side in name:
                result[name] = torch.where(hidden, torch.where(torch.rand(x.shape) > 0.5, torch.nan, torch.inf), x)
    return result


def pair_extras(case: Case, pairs: int = PAIRS) -> Data:
    return {name: maker(pairs) for name, maker in case.pair_extras.items()}


def reference_loss(case: Case, data: Data, extras: Data) -> Tensor:
    """The reference's loss per pair [P]."""
    named = {f"{side}_{name}": data[f"{side}_{name}"] for name in case.token_extras for side in SIDES}
    if case.weighted:
        named |= {f"{side}_weights": data[f"{side}_weights"] for side in SIDES}
    if case.groups:
        named["dimension_ids"] = data["dimension_ids"]
    places = ("chosen", "rejected", "ref_chosen", "ref_rejected", "chosen_mask", "rejected_mask")
    return case.reference(*(data[name] for name in places), **case.settings, **named, **extras)


def evaluated(case: Case, data: Data, extras: Data) -> Tensor:
    """Loss.evaluate, [P]."""
    named = {f"{side}_{name}": data[f"{side}_{name}"] for name in case.token_extras for side in SIDES}
    for side in SIDES:
        named[f"{side}_logprob"] = data[side]
        named[f"{side}_ref_logprob"] = data[f"ref_{side}"]
        if case.weighted:
            named[f"{side}_weight"] = data[f"{side}_weights"]
    groups = data["dimension_ids"] if case.groups else None
    return case.loss.evaluate(mask=(data["chosen_mask"], data["rejected_mask"]), group_ids=groups, **named, **extras)


def with_gradients(function: Callable[[Data], Tensor], data: Data, upstream: Tensor) -> list[Tensor]:
    """[loss per pair, gradients of sum(upstream * loss) for both sides]."""
    leaves = {side: data[side].double().requires_grad_() for side in SIDES}
    loss = function({**data, **leaves})
    return [loss.detach(), *torch.autograd.grad((upstream * loss).sum(), list(leaves.values()), materialize_grads=True)]


# ------------------------------------------------------------------------------------------- the definition, in float64
@pytest.mark.parametrize("spread", [0.5, 3.0, 20.0])
@pytest.mark.parametrize("name", CASES)
def test_definition_equals_its_reference(name: str, spread: float) -> None:
    """Values per pair, and gradients for a non-uniform upstream gradient."""
    case, data = CASES[name], make(spread=spread)
    extras, upstream = pair_extras(case), torch.rand(PAIRS).double() - 0.3
    ours = with_gradients(lambda d: evaluated(case, d, extras), garbage_under_mask(data), upstream)
    theirs = with_gradients(lambda d: reference_loss(case, d, extras), data, upstream)
    assert all(bool(g.abs().max() > 0) for g in theirs[1:2])
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


# ------------------------------------------------------------------------------------- fused, with the derived gradient
@pytest.fixture(params=["reference", "cpu"])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    with fastreward.backend(request.param):
        yield request.param


def fused(case: Case, data: Data, extras: Data, weights: Tensor, scale: float) -> tuple[Tensor, list[Tensor], Any]:
    """(loss of each pair, gradients of scale * loss for both sides, metrics) of preference_loss."""
    leaves = {side: data[side].clone().requires_grad_() for side in SIDES}
    per_side = [{name: data[f"{side}_{name}"] for name in case.token_extras} for side in SIDES]
    token_weights = [data[f"{side}_weights"] if case.weighted else None for side in SIDES]
    references = [data[f"ref_{side}"] if case.loss.reads("ref_logprob") else None for side in SIDES]
    result = preference_loss(
        leaves["chosen"],
        leaves["rejected"],
        loss=case.loss,
        ref_chosen_logprobs=references[0],
        ref_rejected_logprobs=references[1],
        chosen_mask=data["chosen_mask"],
        rejected_mask=data["rejected_mask"],
        chosen_weights=token_weights[0],
        rejected_weights=token_weights[1],
        weights=weights,
        group_ids=data["dimension_ids"] if case.groups else None,
        extra=extras,
        chosen_extra=per_side[0],
        rejected_extra=per_side[1],
        return_pair_loss=True,
    )
    grads = torch.autograd.grad(result.loss * scale, list(leaves.values()), materialize_grads=True)
    assert result.token_loss is not None
    return result.token_loss, list(grads), result.metrics


def check_fused(name: str, data: Data) -> None:
    """preference_loss against the reference: pair losses, and gradients under pair weights and an upstream gradient."""
    case, pairs = CASES[name], len(data["chosen"])
    extras, weights, scale = pair_extras(case, pairs), torch.rand(pairs) - 0.3, 0.37
    losses, grads, metrics = fused(case, garbage_under_mask(data), extras, weights, scale)
    counted = data["chosen_mask"].any(-1) | data["rejected_mask"].any(-1)
    upstream = scale * weights.double() / counted.sum()
    expected, *expected_grads = with_gradients(lambda d: reference_loss(case, d, extras), data, upstream)
    close(losses, expected * weights.double())
    assert expected_grads[0].any()
    for ours, theirs in zip(grads, expected_grads, strict=True):
        close(ours, theirs)
    assert metrics["pair_count"] == counted.sum()


def close(ours: Tensor, expected: Tensor) -> None:
    """Each to 2e-5, or to 3e-6 of the largest: what float32 tokens leave of a difference of sums."""
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours.double(), expected, rtol=2e-5, atol=3e-6 * float(expected.abs().max()))


@pytest.mark.parametrize("spread", [0.5, 3.0])
@pytest.mark.parametrize("name", CASES)
@pytest.mark.usefixtures("backend")
def test_fused_equals_the_reference(name: str, spread: float) -> None:
    check_fused(name, make(spread=spread))


@pytest.mark.parametrize("size", [30.0, -30.0, 200.0, -200.0])
@pytest.mark.parametrize("name", CASES)
@pytest.mark.usefixtures("backend")
def test_extreme_log_ratios(name: str, size: float) -> None:
    """One token of one side of pairs 1 (chosen) and 3 (rejected)."""
    data = make()
    data["ref_chosen"][1, 0] = data["chosen"][1, 0] - size
    data["ref_rejected"][3, 0] = data["rejected"][3, 0] - size
    check_fused(name, data)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.usefixtures("backend")
def test_single_tokens(name: str) -> None:
    """T = 1 on both sides, one side of pairs 2 and 5 empty."""
    check_fused(name, make((1, 1)))


@pytest.mark.usefixtures("backend")
def test_single_pair() -> None:
    data = make(pairs=6)
    for name in ("dpo-sigmoid", "dpo-aot", "simpo-sft", "mah_dpo"):
        check_fused(name, {key: x[4:5] for key, x in data.items()})


@pytest.mark.parametrize("variant", ["sigmoid", "aot", "aot_unpaired", "sft"])
def test_pairs_without_a_token_do_not_count(variant: str, backend: str) -> None:
    """Neither in the mean nor among the ranks."""
    data = make(pairs=12)
    data["chosen_mask"][7] = data["rejected_mask"][7] = False
    case = CASES[f"dpo-{variant}"]
    kept = torch.arange(12) != 7
    losses, grads, metrics = fused(case, garbage_under_mask(data), {}, torch.ones(12), 1.0)
    without = {key: x[kept] for key, x in data.items()}
    expected, expected_grads, _ = fused(case, without, {}, torch.ones(11), 1.0)
    torch.testing.assert_close(losses[kept], expected)
    assert losses[7] == 0
    assert metrics["pair_count"] == 11
    for ours, theirs in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(ours[kept], theirs)
        assert not ours[7].any()


@pytest.mark.usefixtures("backend")
def test_packed_equals_padded() -> None:
    data = make()
    clean = {key: x for key, x in data.items() if key in {*SIDES, "ref_chosen", "ref_rejected"}}
    padded = preference_loss(
        clean["chosen"],
        clean["rejected"],
        ref_chosen_logprobs=clean["ref_chosen"],
        ref_rejected_logprobs=clean["ref_rejected"],
        chosen_mask=data["chosen_mask"],
        rejected_mask=data["rejected_mask"],
    )
    masks = {side: data[f"{side}_mask"] for side in SIDES}
    bounds = {side: torch.nn.functional.pad(mask.sum(-1).cumsum(0), (1, 0)) for side, mask in masks.items()}
    packed = preference_loss(
        data["chosen"][masks["chosen"]],
        data["rejected"][masks["rejected"]],
        ref_chosen_logprobs=data["ref_chosen"][masks["chosen"]],
        ref_rejected_logprobs=data["ref_rejected"][masks["rejected"]],
        chosen_cu_seqlens=bounds["chosen"],
        rejected_cu_seqlens=bounds["rejected"],
    )
    torch.testing.assert_close(packed.loss, padded.loss, rtol=1e-6, atol=0)
    for name, value in padded.metrics.items():
        torch.testing.assert_close(packed.metrics[name], value, rtol=1e-6, atol=1e-6)


def test_ld_dpo_weights(backend: str) -> None:
    data = make()
    weights = preference.ld_dpo_weights(data["chosen_mask"], data["rejected_mask"], 0.4)
    data |= dict(zip(("chosen_weights", "rejected_weights"), weights, strict=True))
    ours, _, _ = fused(CASES["dpo-weighted"], data, {}, torch.ones(PAIRS), 1.0)
    close(ours, reference_loss(CASES["dpo-sigmoid"], data, {"ld_alpha": 0.4}))  # type: ignore[dict-item]
    with pytest.raises(ValueError, match="ld_alpha: expected a number in"):
        preference.ld_dpo_weights(data["chosen_mask"], data["rejected_mask"], 1.5)


def test_metrics_are_rewards(backend: str) -> None:
    """beta S of both sides, their margin, and how often the chosen one is larger."""
    data = make()
    s_w = reference.seq_sum(data["chosen"], data["ref_chosen"], data["chosen_mask"])
    s_l = reference.seq_sum(data["rejected"], data["ref_rejected"], data["rejected_mask"])
    _, _, metrics = fused(CASES["dpo-beta"], data, {}, torch.ones(PAIRS), 1.0)
    assert float(metrics["reward_chosen"]) == pytest.approx(0.7 * float(s_w.mean()), rel=1e-5)
    assert float(metrics["reward_rejected"]) == pytest.approx(0.7 * float(s_l.mean()), rel=1e-5)
    assert float(metrics["reward_margin"]) == pytest.approx(0.7 * float((s_w - s_l).mean()), rel=1e-5)
    assert float(metrics["reward_accuracy"]) == pytest.approx(float((s_w > s_l).double().mean()))


def test_parameters_per_pair(backend: str) -> None:
    """beta as a tensor: one value for each pair."""
    data, beta = make(), torch.rand(PAIRS) + 0.05
    ours, _, _ = fused(Case(preference.dpo(beta), reference.dpo), data, {}, torch.ones(PAIRS), 1.0)
    close(ours, reference_loss(Case(preference.dpo(), reference.dpo, {"beta": beta.double()}), data, {}))


def test_composed_losses(backend: str) -> None:
    """A loss called with the terms of another: its numbers are constants there."""

    @define(pairs=True)
    def mixed(t: PairTerms, share: float = 0.3) -> Node:
        smooth = preference.dpo(variant="exo_pair", label_smoothing=1e-3)(t)
        return share * smooth + (1.0 - share) * preference.dpo(f_divergence="alpha", alpha=2.0)(t)

    data = make()
    ours, _, _ = fused(Case(mixed(), reference.dpo), data, {}, torch.ones(PAIRS), 1.0)
    parts = [reference_loss(CASES[name], data, {}) for name in ("dpo-exo_pair", "dpo-alpha-2")]
    close(ours, 0.3 * parts[0] + 0.7 * parts[1])


# ------------------------------------------------------------------------------------------------------------ messages
@pytest.mark.parametrize(
    ("make_loss", "message"),
    [
        (lambda: preference.dpo(beta=0.0), "beta: expected a positive number, got 0.0"),
        (lambda: preference.dpo(variant="sigmod"), r"variant: .*did you mean 'sigmoid'\?"),
        (lambda: preference.dpo(variant="exo_pair"), "label_smoothing: expected a number above 0"),
        (lambda: preference.dpo(variant="robust", label_smoothing=0.5), "label_smoothing: expected a number below 0.5"),
        (lambda: preference.dpo(variant="hinge", label_smoothing=0.1), "label_smoothing: taken by sigmoid, robust"),
        (lambda: preference.dpo(f_divergence="kl"), "f_divergence: expected one of"),  # type: ignore[arg-type]
        (lambda: preference.dpo(variant="apo_zero", f_divergence="js"), "f_divergence: 'js' goes with sigmoid"),
        (lambda: preference.dpo(variant="ipo", length_normalize=True), "length_normalize: ipo divides by lengths"),
        (lambda: preference.dpo(variant="aot", wpo=True), "wpo: pairs have no weight of their own where 'aot'"),
        (lambda: preference.dpo(discopop_tau=0.0), "discopop_tau: expected a positive number"),
        (lambda: reference_free.simpo(variant="ipo"), "variant: expected one of 'sigmoid', 'hinge'"),
        (lambda: reference_free.simpo(variant="hinge", label_smoothing=0.1), "label_smoothing: taken by sigmoid"),
        (lambda: preference.cdpo(label_smoothing=1.0), r"label_smoothing: expected a number in \[0, 1\)"),
        (lambda: preference.treg(base="orpo"), "base: expected one of 'dpo', 'simpo'"),
    ],
)
def test_bad_parameters(make_loss: Callable[[], Loss], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_loss()


def test_terms_that_are_not_passed() -> None:
    data = make()
    with pytest.raises(ValueError, match=r"reads the term .ref_logprob., .* pass ref_chosen_logprobs="):
        preference_loss(data["chosen"], data["rejected"])
    for loss, term in ((preference.cream(), "consistency"), (preference.tgdpo(), "rm_logprob")):
        with pytest.raises(ValueError, match=f"reads the term '{term}', which was not passed"):
            preference_loss(
                data["chosen"],
                data["rejected"],
                loss=loss,
                ref_chosen_logprobs=data["ref_chosen"],
                ref_rejected_logprobs=data["ref_rejected"],
            )


def test_every_loss_says_where_it_is_from() -> None:
    """A docstring with the source and how sure the formula is."""
    for name in (*preference.__all__, *reference_free.__all__):
        text = getattr(losses, name).__doc__
        assert "Code:" in text or "code:" in text or "Notes" in text, name

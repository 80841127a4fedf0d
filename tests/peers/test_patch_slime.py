"""slime's hooks: called as slime calls them, against its formulas in float64."""

from __future__ import annotations

import importlib
import math
from types import SimpleNamespace
from typing import Any

import pytest
import slime_formulas as formulas
import torch
from compat import largest

import fastreward as fr
from fastreward import patch, recipes
from fastreward.patch import hooks, slime
from fastreward.patch.slime.policy import _facts
from fastreward.recipes import RECIPES

PROMPTS, LENGTHS, VOCAB = [3, 1, 4, 2], [5, 1, 8, 6], 17


@pytest.fixture(autouse=True)
def _no_account() -> Any:
    yield
    patch.undo()


@pytest.fixture
def batch() -> dict[str, Any]:
    return formulas.batch(PROMPTS, LENGTHS, VOCAB)


def same(name: str, ours: Any, theirs: Any, what: str = "", **tolerance: float) -> None:
    largest(
        f"slime.{name}", ours, theirs, version=formulas.VERSION, what=what, **{"rtol": 2e-6, "atol": 2e-6} | tolerance
    )


def both(args: Any, batch: dict[str, Any], *, reducer: Any = None) -> tuple[Any, Any, Any, Any]:
    """(loss, metrics, gradient) of ours and slime's."""
    mine = batch["logits"].clone().requires_grad_()
    lengths, masks = batch["response_lengths"], batch["loss_masks"]
    reduce = reducer or formulas.reducer(lengths, masks, args.calculate_per_token_loss)
    loss, metrics = slime.loss(args, batch, mine, reduce)
    (3.0 * loss).backward()
    theirs = batch["logits"].double().requires_grad_()
    expected, expected_metrics = formulas.policy_loss(args, batch, theirs)
    (3.0 * expected).backward()
    return (loss, mine.grad), (expected, theirs.grad), metrics, expected_metrics


def load(path: str) -> Any:
    """As slime does."""
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(module), name)


@pytest.mark.parametrize("name", ["advantages", "loss", "tis", "pg_loss_reducer", "rewards"])
def test_the_paths_of_its_options_are_found(name: str) -> None:
    assert load(f"fastreward.patch.slime.{name}") is getattr(slime, name)


# ------------------------------------------------------------------------------------------------------------ the loss
@pytest.mark.parametrize(
    "changed",
    [
        {},
        {"calculate_per_token_loss": True, "eps_clip_c": 3.0},
        {"entropy_coef": 0.01, "rollout_temperature": 0.7},
        {"use_kl_loss": True, "kl_loss_coef": 0.1, "kl_loss_type": "k1"},
        {"use_kl_loss": True, "kl_loss_coef": 0.1, "kl_loss_type": "k2", "use_unbiased_kl": True},
        {"use_kl_loss": True, "kl_loss_coef": 0.1, "kl_loss_type": "k3", "use_unbiased_kl": True},
        {"use_kl_loss": True, "kl_loss_coef": 0.1, "kl_loss_type": "low_var_kl"},
        {"use_kl_loss": True, "kl_loss_coef": 0.0, "kl_loss_type": "k3"},
        {"use_rollout_logprobs": True},
        {"use_tis": True, "tis_clip": 1.2, "tis_clip_low": 0.8},
        {"advantage_estimator": "gspo", "eps_clip": 0.1, "eps_clip_high": 0.1},
        {"advantage_estimator": "gspo", "eps_clip_c": 1.2},
        {"advantage_estimator": "cispo", "use_tis": True},
    ],
    ids=lambda changed: "-".join(f"{k}={v}" for k, v in changed.items()) or "default",
)
def test_the_loss_is_slimes(batch: dict[str, Any], changed: dict[str, Any]) -> None:
    ours, theirs, metrics, expected = both(formulas.options(**changed), batch)
    same("loss", ours, theirs)
    same("loss", metrics, expected)
    assert not any(x.requires_grad for x in metrics.values())


def test_advantages_of_their_own_at_each_token(batch: dict[str, Any]) -> None:
    batch["advantages"] = [torch.randn(n) for n in LENGTHS]
    for estimator in ("grpo", "gspo", "cispo"):
        ours, theirs, metrics, expected = both(formulas.options(advantage_estimator=estimator), batch)
        same("loss", [ours, metrics], [theirs, expected], estimator)


def test_without_old_log_probs_the_ratio_is_1(batch: dict[str, Any]) -> None:
    del batch["log_probs"]
    args = formulas.options(use_tis=True)
    logits = batch["logits"].clone().requires_grad_()
    loss, _ = slime.loss(args, batch, logits, formulas.reducer(LENGTHS, batch["loss_masks"]))
    loss.backward()
    totals = batch["total_lengths"]
    batch["log_probs"] = [
        x.detach()
        for x in formulas.responses(batch["logits"].double(), batch["unconcat_tokens"], totals, LENGTHS, 1.0)[0]
    ]
    theirs = batch["logits"].double().requires_grad_()
    expected, _ = formulas.policy_loss(args, batch, theirs)
    expected.backward()
    same("loss", [loss, logits.grad], [expected, theirs.grad])


def test_what_lies_under_a_mask_never_matters(batch: dict[str, Any]) -> None:
    args = formulas.options(use_tis=True)
    clean = both(args, batch)[0]
    for key in ("log_probs", "rollout_log_probs", "advantages"):
        batch[key] = [torch.where(m == 0, math.nan, x) for x, m in zip(batch[key], batch["loss_masks"], strict=True)]
    logits = batch["logits"].clone().requires_grad_()
    loss, _ = slime.loss(
        args, batch, logits, slime.pg_loss_reducer(batch["total_lengths"], LENGTHS, batch["loss_masks"])
    )
    (3.0 * loss).backward()
    torch.testing.assert_close((loss, logits.grad), clean)


@pytest.mark.parametrize("name", ["advantages", "log_probs", "logits", "rollout_log_probs"])
def test_a_nan_that_counts_gives_slimes_nan(batch: dict[str, Any], name: str) -> None:
    """slime's user sees a loss of NaN, as without us, and no exception; the gradient is NaN where slime's is."""
    place = batch[name][3] if name != "logits" else batch[name][0, 2]
    place[int(batch["loss_masks"][3].nonzero()[0]) if name != "logits" else 0] = math.nan
    (loss, gradient), (expected, theirs), _, _ = both(formulas.options(use_tis=True, entropy_coef=0.1), batch)
    assert loss.isnan()
    assert expected.isnan()
    assert torch.equal(gradient.isnan(), theirs.isnan())
    assert 0 < int(gradient.isnan().sum()) < gradient.numel()


def test_a_nan_that_counts_gives_the_nan_of_slimes_advantages(batch: dict[str, Any]) -> None:
    batch["kl"] = [torch.randn(n) for n in LENGTHS]
    batch["values"][3][2] = batch["kl"][0][1] = math.nan
    for estimator in ("ppo", "reinforce_plus_plus"):
        args = formulas.options(advantage_estimator=estimator, kl_coef=0.1, gamma=0.9, lambd=0.8)
        expected = formulas.advantages(args, batch)
        slime.advantages(args, batch)
        for found, theirs in zip((batch["advantages"], batch["returns"]), expected, strict=True):
            assert torch.cat(theirs).isnan().any()
            same("advantages", found, theirs, estimator)


def test_a_batch_that_is_masked_out_as_a_whole_flows_zeros(batch: dict[str, Any]) -> None:
    batch["loss_masks"] = [torch.zeros_like(m) for m in batch["loss_masks"]]
    ours, theirs, *_ = both(formulas.options(), batch)
    assert ours[0] == 0
    assert not ours[1].any()
    same("loss", ours, theirs)


def test_responses_without_a_token() -> None:
    batch = formulas.batch([3, 2], [0, 4], VOCAB)
    ours, theirs, *_ = both(formulas.options(), batch)
    same("loss", ours, theirs)
    empty = formulas.batch([3], [0], VOCAB)
    logits = empty["logits"].clone().requires_grad_()
    loss, _ = slime.loss(formulas.options(), empty, logits, formulas.reducer([0], empty["loss_masks"]))
    loss.backward()
    assert logits.grad is not None
    assert not logits.grad.any()


def test_bf16_logits(batch: dict[str, Any]) -> None:
    batch["logits"] = batch["logits"].bfloat16()
    ours, theirs, *_ = both(formulas.options(), batch)
    same("loss", ours[0], theirs[0])
    torch.testing.assert_close(ours[1].double(), theirs[1], rtol=2**-8, atol=1e-4)


def test_another_reducer_for_the_surrogate(batch: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTREWARD_SLIME_PG_LOSS_REDUCER", "seq-mean-token-sum-norm(length=8)")
    args = formulas.options(
        entropy_coef=0.1, custom_pg_loss_reducer_function_path="fastreward.patch.slime.pg_loss_reducer"
    )
    loss, metrics = slime.loss(args, batch, batch["logits"], formulas.reducer(LENGTHS, batch["loss_masks"]))
    _, expected = formulas.policy_loss(args, batch, batch["logits"].double())
    per_token = formulas.options(calculate_per_token_loss=True)
    summed = formulas.policy_loss(per_token, batch, batch["logits"].double())[1]["pg_loss"]
    same("pg_loss_reducer", metrics["pg_loss"], summed / 8)
    same(
        "loss", [loss, metrics["entropy_loss"]], [summed / 8 - 0.1 * expected["entropy_loss"], expected["entropy_loss"]]
    )


LOSSES = [
    name
    for name, r in RECIPES.items()
    if r.returns == "loss" and hooks.fits(r, dict.fromkeys(("logprobs", "old_logprobs", "advantages", "mask"), 1))
]


def test_the_recipes_that_fit_are_most_of_the_policy_losses() -> None:
    assert {"ppo", "dapo", "cispo", "dispo", "gspo", "gmpo", "sapo", "vespo", "dppo_tv", "clip_cov", "sft"} <= set(
        LOSSES
    )
    assert not {"dpo", "real", "jepo", "tw_grpo"} & set(LOSSES)


@pytest.mark.parametrize("name", LOSSES)
def test_every_recipe_that_fits_is_that_recipe(batch: dict[str, Any], name: str) -> None:
    args = formulas.options(fastreward_loss=name)
    logits = batch["logits"].clone().requires_grad_()
    torch.manual_seed(1)
    loss, metrics = slime.loss(args, batch, logits, formulas.reducer(LENGTHS, batch["loss_masks"], True))
    loss.backward()
    own = batch["logits"].clone().requires_grad_()
    logprobs, _ = formulas.responses(own, batch["unconcat_tokens"], batch["total_lengths"], LENGTHS, 1.0)
    known = {"logprobs": torch.cat(logprobs), "mask": torch.cat(batch["loss_masks"])}
    known |= {"old_logprobs": torch.cat(batch["log_probs"]), "advantages": torch.cat(batch["advantages"])}
    bounds = torch.tensor([0, *LENGTHS]).cumsum(0)
    call = hooks.arguments("", RECIPES[name], known, {})
    torch.manual_seed(1)  # clip_cov draws
    expected = RECIPES[name].function(**call, cu_seqlens=bounds, aggregation="token-sum", normalizer=1)
    expected.loss.backward()
    torch.testing.assert_close((loss, logits.grad), (expected.loss, own.grad), rtol=1e-5, atol=1e-6)
    assert metrics["pg_loss"] == loss


@pytest.mark.parametrize("name", ["gmpo", "vespo", "ppo"])
def test_means_over_samples_of_losses_that_read_weights_themselves(batch: dict[str, Any], name: str) -> None:
    args = formulas.options(fastreward_loss=name)
    loss, _ = slime.loss(args, batch, batch["logits"], formulas.reducer(LENGTHS, batch["loss_masks"]))
    logits, totals = batch["logits"], batch["total_lengths"]
    logprobs, _ = formulas.responses(logits, batch["unconcat_tokens"], totals, LENGTHS, 1.0)
    given = [torch.cat(x) for x in (logprobs, batch["log_probs"], batch["advantages"], batch["loss_masks"])]
    bounds = torch.tensor([0, *LENGTHS]).cumsum(0)
    expected = RECIPES[name].function(*given, cu_seqlens=bounds, aggregation="seq-mean-token-mean", normalizer=1)
    torch.testing.assert_close(loss, expected.loss)


def test_a_recipe_with_options_and_what_the_batch_has_for_it(
    batch: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    reduce = formulas.reducer(LENGTHS, batch["loss_masks"])

    def value(**changed: Any) -> torch.Tensor:
        return slime.loss(formulas.options(**changed), batch, batch["logits"], reduce)[0]

    ppo = value(fastreward_loss="ppo(clip_low=0.2, clip_high=0.28)")
    torch.testing.assert_close(ppo, value())
    monkeypatch.setenv("FASTREWARD_SLIME_LOSS", "deepseek_v3_2(threshold=0.1)")
    masked = value()
    assert masked != ppo
    assert value(fastreward_loss="ppo(clip_low=0.2, clip_high=0.28)") == ppo  # the argument before the environment
    batch["rewards"] = [1.0, 0.0, 1.0, 0.0]
    kept = value(fastreward_loss="psr")
    batch["advantages"] = [torch.full((n,), r) for n, r in zip(LENGTHS, batch["rewards"], strict=True)]
    torch.testing.assert_close(kept, value(fastreward_loss="ppo"))


@pytest.mark.parametrize(
    ("changed", "error", "words"),
    [
        ({"fastreward_loss": "no_such"}, ValueError, "no such recipe"),
        ({"fastreward_loss": "rloo"}, ValueError, "returns response advantages"),
        ({"fastreward_loss": "jepo"}, ValueError, "jepo needs answer"),
        ({"fastreward_loss": "real"}, ValueError, "group"),
        ({"fastreward_loss": "dapo(clip=1)"}, TypeError, "clip"),
        ({"fastreward_loss": "dapo(aggregation='token-mean')"}, TypeError, "aggregation follow from slime's"),
        ({"fastreward_loss": "dapo", "use_opsm": True}, NotImplementedError, "use_opsm"),
        ({"fastreward_loss": "dapo", "rollout_top_p": 0.9}, NotImplementedError, "rollout_top_p"),
        ({"fastreward_loss": "dapo(1)"}, ValueError, "with keywords"),
        ({"fastreward_loss": 3}, TypeError, "expected a name"),
    ],
)
def test_what_does_not_fit_is_refused_with_the_reason(
    batch: dict[str, Any], changed: dict[str, Any], error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        slime.loss(formulas.options(**changed), batch, batch["logits"], formulas.reducer(LENGTHS, batch["loss_masks"]))


def test_an_option_that_is_not_ours_goes_on_to_slime(batch: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = SimpleNamespace(policy_loss_function=lambda *_: (torch.tensor(7.0), {}))
    monkeypatch.setitem(__import__("sys").modules, "slime.backends.megatron_utils.loss", theirs)  # type: ignore[arg-type]
    loss, _ = slime.loss(formulas.options(use_opsm=True), batch, batch["logits"], formulas.reducer(LENGTHS, []))
    assert loss == 7
    assert patch.status()["slime"].usage["slime.loss"].handed_on == 1


def test_a_prompt_of_one_token_at_least(batch: dict[str, Any]) -> None:
    batch["response_lengths"] = batch["total_lengths"]
    with pytest.raises(ValueError, match=r"response_lengths: .* got 8 of 8 at \[0\]"):
        slime.loss(formulas.options(), batch, batch["logits"], formulas.reducer(LENGTHS, batch["loss_masks"]))


@pytest.mark.parametrize(
    ("name", "facts"),
    [("ppo", (False, True)), ("sapo", (False, False)), ("gspo", (True, True)), ("vespo", (True, False))],
)
def test_what_is_known_of_a_loss(name: str, facts: tuple[bool, bool]) -> None:
    made = RECIPES[name].loss()
    assert made is not None
    assert _facts(made) == facts


# ------------------------------------------------------------------------------------------------------------- weights
def test_tis_is_slimes(batch: dict[str, Any]) -> None:
    args = formulas.options(tis_clip=1.3, tis_clip_low=0.7)
    loss, mask = torch.randn(sum(LENGTHS)), torch.cat(batch["loss_masks"])
    ours = correct(args, batch, loss)
    theirs = formulas.tis(args, batch, loss.double())
    same("tis", ours[0] * mask, theirs[0] * mask)
    same("tis", ours[1], theirs[1])
    same("tis", {k: x * mask for k, x in ours[2].items()}, {k: x * mask for k, x in theirs[2].items()})


def correct(args: Any, batch: dict[str, Any], loss: torch.Tensor) -> Any:
    """As slime calls it."""
    given = {"train_log_probs": batch["log_probs"]}
    given |= {key: batch[key] for key in ("rollout_log_probs", "loss_masks", "total_lengths", "response_lengths")}
    return slime.tis(args=args, pg_loss=loss, **given)


@pytest.mark.parametrize(
    "name", [name for name, r in RECIPES.items() if r.family == "correction" and r.returns == "weights"]
)
def test_every_correction_is_that_recipe(batch: dict[str, Any], name: str) -> None:
    loss = torch.randn(sum(LENGTHS), requires_grad=True)
    weighted, masks, metrics = correct(formulas.options(fastreward_tis=name), batch, loss)
    old, rollout, mask = (torch.cat(batch[k]) for k in ("log_probs", "rollout_log_probs", "loss_masks"))
    bounds = torch.tensor([0, *LENGTHS]).cumsum(0)
    weights, keep, _ = RECIPES[name].function(old, rollout, mask, cu_seqlens=bounds)
    torch.testing.assert_close(weighted, loss * weights)
    torch.testing.assert_close(torch.cat(masks), mask * keep)
    assert [m.shape[0] for m in masks] == LENGTHS
    assert masks[0].dtype == batch["loss_masks"][0].dtype
    upstream = torch.randn_like(weighted)
    assert torch.equal(torch.autograd.grad(weighted, loss, upstream)[0], upstream * weights)
    assert set(metrics) == {"tis", "tis_clipfrac", "tis_abs"}


@pytest.mark.parametrize("per_token", [False, True])
def test_the_reducer_is_slimes(batch: dict[str, Any], per_token: bool) -> None:
    x = torch.randn(sum(LENGTHS), requires_grad=True)
    ours = slime.pg_loss_reducer(batch["total_lengths"], LENGTHS, batch["loss_masks"], per_token)(x)
    y = x.detach().double().requires_grad_()
    theirs = formulas.reducer(LENGTHS, batch["loss_masks"], per_token)(y)
    same("pg_loss_reducer", [ours, *torch.autograd.grad(ours, x)], [theirs, *torch.autograd.grad(theirs, y)])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("token-sum", 6.0),
        ("seq-mean-token-sum", 6.0),
        ("seq-mean-token-mean", 2 + 0.5),
        ("seq-mean-token-sum-norm(length=4)", 1.5),
    ],
)
def test_reductions_by_name(monkeypatch: pytest.MonkeyPatch, text: str, expected: float) -> None:
    monkeypatch.setenv("FASTREWARD_SLIME_PG_LOSS_REDUCER", text)
    masks = [torch.tensor([1, 0, 1]), torch.tensor([1, 1, 1, 1])]
    x = torch.tensor([1.0, math.nan, 3.0, 1.0, 1.0, -1.0, 1.0])
    assert slime.pg_loss_reducer([4, 6], [3, 4], masks)(x) == expected


@pytest.mark.parametrize(
    "text", ["token-mean", "token-sum(length=3)", "seq-mean-token-sum-norm", "seq-mean-token-sum-norm(length=0)"]
)
def test_reductions_that_there_are_not(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv("FASTREWARD_SLIME_PG_LOSS_REDUCER", text)
    with pytest.raises(ValueError, match="FASTREWARD_SLIME_PG_LOSS_REDUCER"):
        slime.pg_loss_reducer([4], [3], [torch.ones(3)])


# ---------------------------------------------------------------------------------------------------------- advantages
@pytest.mark.parametrize(
    "estimator", ["grpo", "gspo", "cispo", "ppo", "reinforce_plus_plus", "reinforce_plus_plus_baseline"]
)
def test_advantages_are_slimes(batch: dict[str, Any], estimator: str) -> None:
    args = formulas.options(advantage_estimator=estimator, kl_coef=0.1, gamma=0.95, lambd=0.9)
    for mask in batch["loss_masks"]:
        mask[0] = 1  # slime's reinforce_plus_plus asserts one
    batch["kl"] = [torch.randn(n) for n in LENGTHS]
    expected = formulas.advantages(args, batch)
    assert slime.advantages(args, batch) is None  # type: ignore[func-returns-value]
    same("advantages", (batch["advantages"], batch["returns"]), expected)


def test_advantages_of_a_recipe(batch: dict[str, Any]) -> None:
    batch["kl"] = [torch.zeros(n) for n in LENGTHS]
    args = formulas.options(fastreward_advantages="reinforce_plus_plus(gamma=0.9)")
    slime.advantages(args, batch)
    mask = torch.nn.utils.rnn.pad_sequence(batch["loss_masks"], batch_first=True)
    expected = recipes.reinforce_plus_plus(fr.token_rewards(torch.tensor(batch["rewards"]), mask), mask, gamma=0.9)
    for row, got, n in zip(expected, batch["advantages"], LENGTHS, strict=True):
        assert torch.equal(got, row[:n])


def test_advantages_in_groups_that_the_data_names(batch: dict[str, Any]) -> None:
    batch["kl"] = [torch.zeros(n) for n in LENGTHS]
    args = formulas.options(fastreward_advantages="rloo")
    with pytest.raises(ValueError, match="compares responses to the same prompt"):
        slime.advantages(args, batch)
    batch["group_ids"] = [5, 6, 5, 6]
    slime.advantages(args, batch)
    expected = recipes.rloo(torch.tensor(batch["rewards"]), [5, 6, 5, 6])
    assert [x[0].item() for x in batch["advantages"]] == expected.tolist()
    assert [x.shape[0] for x in batch["advantages"]] == LENGTHS


ADVANTAGES = [
    name
    for name, r in RECIPES.items()
    if r.returns in ("advantages", "response advantages")
    and hooks.fits(
        r,
        dict.fromkeys(("rewards", "mask", "lengths", "group_ids", "old_logprobs", "logprobs", "ref_logprobs",
                       "rollout_logprobs", "teacher_logprobs", "values", "token_rewards"), 1),
    )
]  # fmt: skip


@pytest.mark.parametrize("name", ADVANTAGES)
def test_every_advantage_that_fits_runs(batch: dict[str, Any], name: str) -> None:
    batch |= {"kl": [torch.zeros(n) for n in LENGTHS], "group_ids": [0, 0, 1, 1], "rewards": [1.0, 0.0, 0.5, 1.0]}
    batch["teacher_log_probs"] = [x + 0.1 for x in batch["log_probs"]]
    batch["loss_masks"] = [torch.ones_like(m) for m in batch["loss_masks"]]
    slime.advantages(formulas.options(fastreward_advantages=name), batch)
    assert [x.shape[0] for x in batch["advantages"]] == LENGTHS
    assert all(x.isfinite().all() for x in batch["advantages"])


def test_an_estimator_that_is_not_known(batch: dict[str, Any]) -> None:
    batch["kl"] = [torch.zeros(n) for n in LENGTHS]
    with pytest.raises(ValueError, match="advantage_estimator: slime's 'new'"):
        slime.advantages(formulas.options(advantage_estimator="new"), batch)


# ------------------------------------------------------------------------------------------------------------- rewards
def samples(raw: list[float], groups: list[int] | None = None) -> list[SimpleNamespace]:
    return [
        SimpleNamespace(get_reward_value=lambda _, x=x: x, response_length=3 + i, group_index=groups and groups[i])
        for i, x in enumerate(raw)
    ]


RAW = [1.0, 0.0, 0.5, 1.0, 0.0, 0.0, 0.0, 0.25]


@pytest.mark.parametrize(
    "changed", [{}, {"grpo_std_normalization": False}, {"advantage_estimator": "reinforce_plus_plus_baseline"}]
)
def test_rewards_are_normalised_as_slime_does(changed: dict[str, Any]) -> None:
    args = formulas.options(**changed)
    raw, rewards = slime.rewards(args, samples(RAW))
    assert raw == RAW
    same("rewards", rewards, formulas.rewards(args, RAW))
    shuffled = [0, 1, 0, 1, 1, 0, 1, 0]
    by_group = slime.rewards(args, samples(RAW, shuffled))[1]
    order = sorted(range(8), key=shuffled.__getitem__)
    same("rewards", [by_group[i] for i in order], formulas.rewards(args, [RAW[i] for i in order]))


def test_rewards_that_are_not_normalised() -> None:
    for changed in ({"rewards_normalization": False}, {"advantage_estimator": "ppo"}):
        assert slime.rewards(formulas.options(**changed), samples(RAW)) == (RAW, RAW)
    assert slime.rewards(formulas.options(), []) == ([], [])


@pytest.mark.parametrize("name", ["rloo", "opo", "maxrl", "grpo(trainer='trl')"])
def test_rewards_of_a_recipe(name: str) -> None:
    groups = [0, 1, 0, 1, 1, 0, 1, 0]
    rewards = slime.rewards(formulas.options(fastreward_rewards=name), samples(RAW, groups))[1]
    found, options = RECIPES[name.partition("(")[0]], {"trainer": "trl"} if "(" in name else {}
    given = {"rewards": torch.tensor(RAW), "group_ids": groups, "lengths": torch.arange(3, 11)}
    assert rewards == found.function(**hooks.arguments("", found, given, options)).tolist()


# ---------------------------------------------------------------------------------------------------------- the account
def test_status_has_them_from_their_first_call_on(batch: dict[str, Any]) -> None:
    assert "slime" not in patch.status()
    slime.pg_loss_reducer(batch["total_lengths"], LENGTHS, batch["loss_masks"])
    report = patch.status()["slime"]
    assert report.usage["slime.pg_loss_reducer"].tokens == sum(LENGTHS)
    assert [(e.target, e.what) for e in report.replaced] == [
        ("slime.pg_loss_reducer", "fastreward.patch.slime.weights.pg_loss_reducer")
    ]
    assert report.replaced[0].why.startswith("The sum over samples of their means")

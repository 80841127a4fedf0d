"""What holds for every recipe: its example runs, its loss is the one it declares, its metadata is complete."""

from __future__ import annotations

import inspect
import pickle
import re
import subprocess
import sys
from collections.abc import Callable
from typing import Any, get_args

import numpy as np
import pytest
import torch
from credit_cases import MARKS

import fastreward as fr
from fastreward import losses, recipes
from fastreward.recipes import RECIPES, Recipe, correction, mixed, preference, ratio, reference_free, score, sequence
from fastreward.recipes._catalogue import registry
from fastreward.recipes._catalogue.example import RETURNED
from fastreward.recipes._catalogue.registry import FAMILIES, NOTATION, RETURNS, VERIFIED, by_family
from fastreward.recipes._shared import factory, options

#: Names that are kept for recipes of advantages: not to be taken by a loss.
ADVANTAGES = {
    "grpo", "rloo", "dr_grpo", "reinforce_plus_plus", "remax", "opo", "gpg", "gdpo", "pass_at_k", "lite_ppo", "bnpo",
    "tempo",
}  # fmt: skip
#: The families whose recipes make losses, or what a loss of theirs takes; the others make rewards, credit and the like.
OF_LOSSES = ("token", "sequence", "preference", "correction")
CALLED = {"policy_loss": fr.policy_loss, "preference_loss": fr.preference_loss}
every = pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES.keys())


@every
def test_arguments_come_in_one_order(recipe: Recipe) -> None:
    """Which tokens, which of them count, what was reached, which belong together; a loss has its operation's order."""
    order = ("segment_ids", "mask", "rewards", "group_ids")
    kind = inspect.Parameter.KEYWORD_ONLY
    names = [p.name for p in inspect.signature(recipe.function).parameters.values() if p.kind != kind]
    given = [name for name in names if name in order]
    if recipe.family not in OF_LOSSES:
        assert given == [name for name in order if name in given]


def run_example(recipe: Recipe) -> dict[str, Any]:
    names: dict[str, Any] = {}
    exec(recipe.example(), names)
    return names


def losses_used(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> list[losses.Loss]:
    """The losses that the recipe passes to an operation while its example runs."""
    seen: list[losses.Loss] = []
    for module in (correction, factory, mixed, preference, ratio, reference_free, score, sequence):
        for name, operation in CALLED.items():
            if hasattr(module, name):
                monkeypatch.setattr(module, name, recorder(operation, seen))
    run_example(recipe)
    return seen


def recorder(operation: Callable[..., Any], seen: list[losses.Loss]) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        seen.append(kwargs["loss"])
        return operation(*args, **kwargs)

    return call


def trained(recipe: Recipe) -> tuple[str, ...]:
    """What gets a gradient in its example."""
    if recipe.family == "preference":
        return ("chosen_logprobs", "rejected_logprobs")
    if recipe.family == "divergence":
        return ("logits",)
    return ("predicted",) if recipe.returns == "values" else ("logprobs",)


# ------------------------------------------------------------------------------------------------------------ examples
@every
def test_example_trains(recipe: Recipe, capsys: pytest.CaptureFixture[str]) -> None:
    names = run_example(recipe)
    result_loss = names["result"].loss if "result" in names else names["loss"]
    assert result_loss.isfinite()
    for side in trained(recipe):
        gradient = names[side].grad
        assert gradient.isfinite().all()
        assert gradient.abs().sum() > 0, side
    loss, gradient_sum = (float(x) for x in capsys.readouterr().out.splitlines()[-1].split())
    assert loss == pytest.approx(result_loss.item())
    assert gradient_sum > 0
    assert f"recipes.{recipe.name}(" in recipe.example()
    assert all(len(line) <= 125 for line in recipe.example().splitlines())


@every
def test_example_makes_what_is_declared(recipe: Recipe) -> None:
    if recipe.family in OF_LOSSES:
        assert recipe.returns in ("loss", "weights", "mask")
        return
    assert recipe.returns not in ("loss", "weights")
    names = run_example(recipe)
    made = names[RETURNED[recipe.returns][0]]
    if recipe.returns == "distillation loss":
        assert made.shape == ()
        assert made.requires_grad
        return
    if recipe.returns in ("decision", "ends", "mask"):
        assert made.dtype == torch.bool
        return
    assert made.dtype == torch.float32
    assert not made.requires_grad
    assert made.count_nonzero() > 0
    if recipe.returns in ("advantages", "token rewards", "token weights", "values"):
        assert made.shape == (names["predicted"] if recipe.returns == "values" else names["logprobs"]).shape
        if "mask" in names:
            assert made[~names["mask"]].count_nonzero() == 0
    elif recipe.returns == "node values":
        assert made.shape == (names["tree"].num_nodes,)
    elif recipe.returns == "statistics":
        assert made.shape[0] == names["logprobs"].shape[0]
    elif recipe.returns != "logits":
        assert made.shape == names["logprobs"].shape[:1]


@every
def test_declared_loss_is_the_one_that_runs(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    declared, used = recipe.loss(), losses_used(recipe, monkeypatch)
    if declared is None:
        assert used == []
        return
    loss, *beside = used
    assert [x.name for x in beside] == (["sft"] if recipe.name == "tpo" else [])
    assert loss.definition is declared.definition is recipe.definition
    assert dict(loss.parameters) == dict(declared.parameters)
    assert str(declared).startswith(f"{declared.name}(")


@every
def test_aggregation_is_what_the_loss_was_published_with(recipe: Recipe) -> None:
    parameter = inspect.signature(recipe.function).parameters.get("aggregation")
    if parameter is None or recipe.definition is losses.ppo:
        return
    if recipe.name == "luspo":  # GSPO's loss summed over the tokens of a sequence is what LUSPO is
        assert parameter.default == "seq-mean-token-sum"
        return
    assert parameter.default == recipe.definition.aggregation  # type: ignore[union-attr]


def test_defaults_are_the_loss_s_but_where_the_method_has_its_own() -> None:
    own: dict[tuple[str, str], object] = {}
    for recipe in RECIPES.values():
        if recipe.definition is None:
            continue
        known = inspect.signature(recipe.definition).parameters
        for name, p in inspect.signature(recipe.function).parameters.items():
            if name in known and p.default is not p.empty and p.default != known[name].default:
                own[recipe.name, name] = p.default
    assert own == {
        ("dual_clip_ppo", "dual_clip"): 3.0,
        ("dapo", "clip_high"): 0.28,
        ("intellect_2", "delta"): 4.0,
        ("robust_dpo", "label_smoothing"): 0.1,
        ("exo", "label_smoothing"): 1e-3,
        ("tpo", "beta"): 0.01,
        ("dpo_norm", "beta"): 5.0,
    }


# ------------------------------------------------------------------------------------------------------------ metadata
@every
def test_metadata_is_complete(recipe: Recipe) -> None:
    assert recipe.family in FAMILIES
    assert recipe.verified in VERIFIED
    for text in (recipe.title, recipe.where, recipe.summary):
        assert text == text.strip() != ""
    if recipe.source.startswith("arXiv"):
        assert re.fullmatch(r"arXiv \d{4}\.\d{5}", recipe.source)
        assert recipe.url == f"https://arxiv.org/abs/{recipe.source[6:]}"
    else:
        assert recipe.source == "common knowledge" or (recipe.url or "").startswith("https://")
    first = recipe.documentation.splitlines()[0]
    assert first.endswith(".")
    assert len(first) <= 116
    assert getattr(recipes, recipe.name) is recipe.function
    assert recipe.name in recipes.__all__
    assert (recipe.loss() is None) == (recipe.definition is None)


def test_families_and_marks() -> None:
    assert set(FAMILIES) == set(get_args(registry.Family)) == set(NOTATION)
    assert set(RETURNS) == set(get_args(registry.Returns)) == set(RETURNED)
    assert set(VERIFIED) == set(get_args(registry.Verified))
    listed = [r for members in by_family().values() for r in members]
    assert len(listed) == len(RECIPES) == len({r.name for r in listed})


def test_marks_are_those_of_the_formulas() -> None:
    """What was not read in code, as the recipes name their sources."""
    marks = {name: r.verified for name, r in RECIPES.items() if r.verified != "code"}
    assert marks == {
        "visurf": "reconstructed",
        "segment_ppo": "reconstructed",
        "raft": "reconstructed",
        "topr": "note",
        "kimi_k1_5": "note",
        "vapo_loss": "note",
        "echo": "note",
        "kpop": "note",
        "cfpo": "note",
        "gvpo": "note",
        "brain": "reconstructed",
        "jepo": "paper",
        "dispo": "note",
        "gdro": "note",
        "dno": "note",
        "treg": "note",
        "tempo": "note",
        "tvm": "reconstructed",
        "treerpo": "note",
        "portool": "reconstructed",
        "diffusion_tree": "note",
        "tree_opo": "note",
        **MARKS,
    }


def test_no_loss_takes_an_advantage_s_name() -> None:
    assert not ADVANTAGES & {name for name, r in RECIPES.items() if not r.returns.endswith("advantages")}


def test_every_loss_has_a_recipe() -> None:
    defined = {name for name, x in vars(losses).items() if isinstance(x, losses.Definition)}
    assert len(defined) > 40
    assert defined == {r.definition.name for r in RECIPES.values() if r.definition is not None}


def test_every_variant_of_dpo_has_a_recipe() -> None:
    variants = {loss.parameters["variant"] for r in RECIPES.values() if (loss := r.loss()) and loss.name == "dpo"}
    assert variants == set(losses.preference._VARIANTS) - {"sft"}  # which is recipes.sft on the chosen responses


@pytest.mark.parametrize(
    ("typed", "operation", "given"),
    [
        (
            options.PolicyOptions,
            fr.policy_loss,
            {"logprobs", "old_logprobs", "advantages", "mask", "loss", "aggregation"},
        ),
        (
            options.PairOptions,
            fr.preference_loss,
            {"chosen_logprobs", "rejected_logprobs", "loss", "ref_chosen_logprobs", "ref_rejected_logprobs"}
            | {"extra", "chosen_extra", "rejected_extra"},
        ),
        (
            options.CorrectionOptions,
            fr.correction_weights,
            {"old_logprobs", "rollout_logprobs", "mask", "mode", "level", "low", "high", "reject"},
        ),
    ],
)
def test_options_are_the_operation_s(typed: type, operation: Callable[..., Any], given: set[str]) -> None:
    """A keyword that is added to an operation has to be added to the recipes' options."""
    assert set(typed.__annotations__) | given == set(inspect.signature(operation).parameters)


@every
def test_arguments_have_the_operation_s_names(recipe: Recipe) -> None:
    parameters = list(inspect.signature(recipe.function).parameters)
    start = {
        "preference": ["chosen_logprobs", "rejected_logprobs"],
        "correction": ["old_logprobs", "rollout_logprobs"],
    }.get(recipe.family, ["logprobs"])
    if recipe.name in ("off_policy_sequence_mask", "deepseek_v3_2"):
        start = ["logprobs"]
    if recipe.family not in OF_LOSSES:
        start = []
    if recipe.family == "tree":
        start = {
            "tempo": ["tokens", "mask", "rewards"],
            "slate": ["tree", "step_rewards"],
            "arpo_branch": ["entropy", "initial_entropy"],
        }.get(recipe.name, ["tree", "rewards"])
    assert parameters[: len(start)] == start
    assert (recipe.operation is None) == ("options" not in parameters)


# ------------------------------------------------------------------------------------------------------ package, arrays
def test_recipes_are_loaded_when_asked_for() -> None:
    program = (
        "import sys, fastreward\n"
        "assert not [m for m in sys.modules if m.startswith('fastreward.recipes')]\n"
        "assert fastreward.recipes.dapo.__name__ == 'dapo'\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_arrays_go_in_and_come_out() -> None:
    logprobs, old = -1 - np.random.rand(4, 6).astype(np.float32), -1 - np.random.rand(4, 6).astype(np.float32)
    rewards, keep = np.array([1.0, 0.0, 1.0, 0.0], np.float32), np.array([True, True, False, True])
    result = recipes.psr(logprobs, old, rewards, keep=keep)
    want = recipes.psr(*(torch.from_numpy(x) for x in (logprobs, old, rewards)), keep=torch.from_numpy(keep))
    assert isinstance(result.loss, np.ndarray)
    assert result.loss == want.loss.numpy()
    weights, kept, _ = recipes.tis(old, logprobs)
    assert isinstance(weights, np.ndarray)
    assert kept.all()


# ------------------------------------------------------------------------------------------------------------- rewards
OF_REWARDS = [
    r for r in RECIPES.values() if r.family in OF_LOSSES and "rewards" in inspect.signature(r.function).parameters
]


@pytest.mark.parametrize("recipe", OF_REWARDS, ids=[r.name for r in OF_REWARDS])
def test_a_sequence_without_a_reward_is_not_there(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    """NaN = not scored: the loss of the others, and no gradient for this one. Rewards of any dtype count alike."""
    original, calls = getattr(recipes, recipe.name), []
    monkeypatch.setattr(
        recipes, recipe.name, lambda *args, **kwargs: calls.append((args, kwargs)) or original(*args, **kwargs)
    )
    run_example(recipe)
    bound = inspect.signature(original).bind(*calls[-1][0], **calls[-1][1])
    options = bound.arguments.pop("options", {})
    given = {**bound.arguments, **options}
    given["logprobs"] = given["logprobs"].detach()
    given["rewards"] = given["rewards"].round()
    as_bool = original(**given | {"rewards": given["rewards"].bool()}).loss
    assert torch.equal(as_bool, original(**given | {"rewards": given["rewards"].double()}).loss)

    def first_three(x: Any) -> Any:
        if isinstance(x, dict):
            return {name: first_three(value) for name, value in x.items()}
        return x[:3] if isinstance(x, torch.Tensor | list) and len(x) == 4 else x

    expected = original(**first_three(given)).loss
    logprobs, rewards = given["logprobs"].clone().requires_grad_(), given["rewards"].clone()
    rewards[3] = torch.nan
    found = original(**given | {"logprobs": logprobs, "rewards": rewards}).loss
    torch.testing.assert_close(found.detach(), expected)
    found.backward()
    assert not logprobs.grad[3].any()
    assert logprobs.grad[:3].isfinite().all()


@every
def test_pickles_as_its_name(recipe: Recipe) -> None:
    assert pickle.loads(pickle.dumps(recipe)) is recipe
    assert pickle.loads(pickle.dumps(recipe.function)) is recipe.function

"""Recipes that a decorator makes of a loss: their types, their signature, and what Python knows of them."""

from __future__ import annotations

import inspect
import pickle
import pydoc
import re
import subprocess
import sys
import typing
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from checkout import ROOT

from fastreward import recipes
from fastreward.recipes import RECIPES, Recipe
from fastreward.recipes._catalogue.registry import RETURNS, by_returns, names_by_returns

every = pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES.keys())
#: Calls, and for each what mypy says of it: "" nothing.
CALLS = [
    ("sapo(x, x, x)", ""),
    ("sapo(x, x, x, x, tau_pos=2.0, aggregation='token-mean', normalizer=3.0)", ""),
    ("sapo(logprobs=x, old_logprobs=x, advantages=x, mask=x, weights=x)", ""),
    ("sapo(x, x, x, taupos=2.0)", 'Unexpected keyword argument "taupos"'),
    ("sapo(x, x, x, aggregation='mean')", 'Argument "aggregation" to "__call__"'),
    ("sapo(x, x, x, x, 2.0)", "Too many positional arguments"),
    ("sapo(x, None, x)", "Argument 2"),
    ("dro(x, x, x)", 'Missing named argument "beta"'),
    ("psr(x, x, rewards=x, clip_low=0.1)", ""),
    ("psr(x, x, advantages=x)", 'Unexpected keyword argument "advantages"'),
    ("gspo(x, x, x, log_ratio_max=None)", ""),
    ("gspo(x, x, x, log_ratio_max='none')", 'Argument "log_ratio_max" to "__call__"'),
    ("dpo(x, x, x, x, beta=0.2, aggregation='sum', chosen_mask=x)", ""),
    ("dpo(x, x, x, x, bata=0.2)", 'Unexpected keyword argument "bata"'),
    ("dpo(x, x)", "Missing positional arguments"),
    ("cream(x, x, x, x, x)", ""),
    ("cream(x, x, x, x, consistency=x, beta=0.2)", ""),
    ("cream(x, x, x, x)", 'Missing positional argument "consistency"'),
    ("tis(x, x, x, high=3.0, batch_normalize=True)", ""),
    ("tis(x, x, low=0.5)", 'Unexpected keyword argument "low"'),
    ("reinforce(x, None, x)", ""),
    ("tempo(x, None, x, group_size=2)", ""),
    ("grop(x, x, x)", 'Module has no attribute "grop"'),
]


@pytest.mark.slow
def test_mypy_sees_what_a_recipe_takes(tmp_path: Path) -> None:
    program = ["from torch import Tensor", "from fastreward import recipes", "x: Tensor"]
    start = len(program) + 1
    path = tmp_path / "calls.py"
    path.write_text("\n".join([*program, *(f"recipes.{call}" for call, _ in CALLS)]) + "\n")
    # With the project's settings and cache, which hold torch already where `make lint` has run.
    out = subprocess.run([sys.executable, "-m", "mypy", str(path)], cwd=ROOT, capture_output=True, text=True).stdout
    # By the file's name: out of its cache mypy repeats what it said of the same text, under the path of that time.
    said = {int(m[1]): m[0] for m in re.finditer(rf"^.*\b{path.name}:(\d+): error: .*$", out, re.MULTILINE)}
    for number, (call, expected) in enumerate(CALLS, start):
        assert (number in said) == bool(expected), f"{call}: {said.get(number)}\n{out}"
        assert expected in said.get(number, ""), call


@every
def test_python_knows_a_recipe_as_its_definition(recipe: Recipe) -> None:
    function = recipe.function
    assert function.__name__ == function.__qualname__ == recipe.name
    assert pickle.loads(pickle.dumps(function)) is function
    hints, signature = typing.get_type_hints(function), inspect.signature(function)
    assert list(hints) == [*signature.parameters, "return"]
    kinds = [p.kind for p in signature.parameters.values()]
    assert kinds == sorted(kinds)
    assert f"{recipe.name}({next(iter(signature.parameters))}" in pydoc.render_doc(function, renderer=pydoc.plaintext)
    assert f"def {recipe.name}(" in inspect.getsource(function)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: recipes.sapo(x, x), r"sapo\(\) missing 1 required positional argument: 'advantages'"),
        (lambda x: recipes.dro(x, x, x), r"dro\(\) missing 1 required keyword-only argument: 'beta'"),
        (lambda x: recipes.sapo(x, x, x, taupos=1.0), "unexpected keyword argument 'taupos'"),
        (lambda x: recipes.cream(x, x, x, x), r"cream\(\) missing 1 required positional argument: 'consistency'"),
        (lambda x: recipes.dpo(x, x, x, x, x), r"dpo\(\) takes 4 positional arguments but 5 were given"),
        (lambda x: recipes.tis(x, x, mode="mask"), "multiple values for keyword argument 'mode'"),
    ],
)
def test_a_wrong_call_names_the_recipe(call: Callable[[torch.Tensor], object], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        call(torch.zeros(2, 3))


def test_a_term_may_be_passed_by_name() -> None:
    x, term = -torch.rand(2, 3), torch.tensor([0.2, 0.7])
    by_place, by_name = recipes.cream(x, 2 * x, x, x, term), recipes.cream(x, 2 * x, x, x, consistency=term)
    assert torch.equal(by_place.loss, by_name.loss)


# --------------------------------------------------------------------------------------------------------- the grouping
def test_the_help_lists_every_recipe_by_what_it_returns() -> None:
    text, listed = pydoc.render_doc(recipes, renderer=pydoc.plaintext), by_returns()
    assert sorted(r.name for of in listed.values() for members in of.values() for r in members) == sorted(RECIPES)
    assert all(listed.values())
    assert list(listed) == [heading for heading in dict.fromkeys(RETURNS.values()) if heading in listed]
    for line in names_by_returns().splitlines():
        assert line.strip() in text


@pytest.mark.parametrize(("written", "near"), [("grop", "grpo_loss"), ("cisop", "cispo"), ("qqqqqq", "lists all")])
def test_an_unknown_name_is_told_the_nearest(written: str, near: str) -> None:
    with pytest.raises(AttributeError, match=f"no attribute '{written}'.*{near}"):
        getattr(recipes, written)


def test_the_parameters_that_a_recipe_fixes_are_still_told_with_a_warning() -> None:
    with pytest.warns(DeprecationWarning, match=r"read Recipe.loss\(\).parameters"):
        assert recipes.RECIPES["robust_dpo"].fixed == {"variant": "robust"}
    with pytest.warns(DeprecationWarning, match="Recipe.fixed"):
        assert recipes.RECIPES["cispo"].fixed == {}

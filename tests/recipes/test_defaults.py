"""The recipes' defaults against the formula pages: tests/recipes/published_defaults/, written out by hand."""

from __future__ import annotations

import inspect
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch

import fastreward as fr
from fastreward import losses, recipes
from fastreward.correction import DEFAULT_BOUNDS
from fastreward.language.objective import kl
from fastreward.recipes import RECIPES

TABLE: dict[str, dict[str, Any]] = {}
SILENT: dict[str, dict[str, Any]] = {}
for _page in sorted(Path(__file__).with_name("published_defaults").glob("*.toml")):
    _tables = tomllib.loads(_page.read_text(encoding="utf-8"))
    SILENT |= _tables.pop("silent", {})
    TABLE |= _tables
OPERATIONS: dict[str, dict[str, Any]] = TABLE.pop("operations")
BOUNDS: dict[str, dict[str, float]] = TABLE.pop("bounds")
#: What says which tokens and rollouts there are: no setting of a method.
PLACES = {"mask", "group_ids", "group_size", "cu_seqlens"}


def defaults(name: str) -> dict[str, Any]:
    """The options of a recipe that have a default other than None."""
    parameters = inspect.signature(getattr(recipes, name)).parameters.values()
    named = {p.name: p.default for p in parameters if p.kind == p.KEYWORD_ONLY and p.name not in PLACES}
    return {n: x for n, x in named.items() if x is not inspect.Parameter.empty and x is not None}


def agrees(found: Any, page: Any) -> bool:
    if isinstance(page, dict):
        return bool(page["from"] <= found <= page["to"])
    if isinstance(page, list):
        return found in page or (isinstance(found, tuple) and list(found) == page)
    return bool(found == page) and isinstance(found, bool) == isinstance(page, bool)


@pytest.mark.parametrize("name", RECIPES)
def test_defaults_are_those_of_the_page(name: str) -> None:
    found, table = defaults(name), {**TABLE.get(name, {}), **SILENT.get(name, {})}
    if "kl_coef" not in found:
        table.pop("kl_coef", None)  # an option of the operation: below
    assert set(found) == set(table), "an option is in no part of the table, or in the table alone"
    wrong = {n: (x, table[n]) for n, x in found.items() if not agrees(x, table[n])}
    assert not wrong, f"(default, page): {wrong}"


@pytest.mark.parametrize("name", OPERATIONS)
def test_defaults_of_operations(name: str) -> None:
    operation = {"cov_mask": losses.cov_mask, "kl": kl}.get(name) or getattr(fr, name)
    parameters = inspect.signature(operation).parameters
    assert {n: parameters[n].default for n in OPERATIONS[name]} == OPERATIONS[name]


def test_default_bounds_of_importance_weights() -> None:
    assert {mode: (b.get("low"), b["high"]) for mode, b in BOUNDS.items()} == DEFAULT_BOUNDS
    old = torch.zeros(1, 2)
    rollout = old - torch.log(torch.tensor([[8.0, 0.25]]))
    found = {m: fr.correction_weights(old, rollout, mode=m)[0][0].tolist() for m in ("truncate", "mask", "icepop")}
    assert found == {"truncate": [2.0, 0.25], "mask": [0.0, 0.25], "icepop": [0.0, 0.0]}


def test_the_table_speaks_of_recipes() -> None:
    assert set(TABLE) | set(SILENT) <= set(RECIPES)
    for name in set(TABLE) & set(SILENT):
        assert not set(TABLE[name]) & set(SILENT[name])


def test_kl_coefs_of_methods_that_have_one() -> None:
    """Where a reference is passed and no kl_coef is."""
    lp = -torch.rand(4, 5) - 0.1
    old, ref, adv = lp - 0.1 * torch.rand(4, 5), lp + torch.rand(4, 5) - 0.5, torch.randn(4)
    found = {}
    for name, recipe in RECIPES.items():
        parameters = inspect.signature(recipe.function).parameters.values()
        required = {p.name for p in parameters if p.default is p.empty and p.kind != p.VAR_KEYWORD}
        if required - set(recipe.settings) != {"logprobs", "old_logprobs", "advantages"} or recipe.family == "sequence":
            continue  # reads more
        settings = dict(recipe.settings)
        call = getattr(recipes, name)
        own, without = (call(lp, old, adv, ref_logprobs=ref, **settings, **o).loss for o in ({}, {"kl_coef": 0.0}))
        if own != without:
            one = call(lp, old, adv, ref_logprobs=ref, **settings, kl_coef=1.0).loss
            found[name] = round(((own - without) / (one - without)).item(), 5)
    pages = [(n, t) for n, t in [*TABLE.items(), *SILENT.items()] if "kl_coef" not in defaults(n)]
    assert found == {n: t["kl_coef"] for n, t in pages if "kl_coef" in t}

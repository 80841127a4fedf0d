"""Recipes of rewards and credit, beside plain loops, and what holds for all of them (tests/support/credit_cases)."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from credit_cases import CASES, MARKS
from credit_cases.case import ROWS, Arguments, Case
from torch import Tensor

import fastreward as fr
from fastreward.recipes import RECIPES

FAMILIES = ("token_credit", "turn_credit", "group_advantage", "reward_shaping", "likelihood", "distillation")
OF_FAMILIES = {r.name: r for r in RECIPES.values() if r.family in FAMILIES}
ONE_OF_EACH = {case.recipe.__name__: case for case in CASES.values()}
OF_TURNS = [
    "grpo",
    "dr_grpo",
    "rloo",
    "lite_ppo",
    "gpg",
    "gdpo",
    "pass_at_k",
    "pass_at_k_training",
    "maxrl",
    "bnpo",
]
LEFT, RIGHT = 2, 3
MAY_BE_INFINITE = ("logits", "vocab_logprobs", "errors")  # probabilities of 0; of critiques whether it is 0
every = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())


# ------------------------------------------------------------------------------------------------------------- changes
def changed(arguments: Arguments, names: tuple[str, ...], change: Callable[[Tensor], Tensor]) -> Arguments:
    return arguments | {name: change(arguments[name]) for name in names}


def rows(arguments: Arguments, case: Case, chosen: list[int]) -> Arguments:
    """The call on some of the rows, in this order."""

    def pick(name: str, x: Any) -> Any:
        if name in case.fixed or not isinstance(x, Tensor | list | tuple) or len(x) != ROWS:
            return x
        return x[chosen] if isinstance(x, Tensor) else [x[b] for b in chosen]

    return {name: pick(name, x) for name, x in arguments.items()}


def aligned(arguments: Arguments) -> dict[str, list[str]]:
    """Each mask, or segment_ids where there is none, and the arguments that have its sizes first."""
    masks = [name for name, x in arguments.items() if isinstance(x, Tensor) and x.ndim == 2 and name.endswith("mask")]
    masks = masks or [name for name in arguments if name == "segment_ids"]
    of = {mask: arguments[mask].shape for mask in masks}
    return {
        mask: [n for n, x in arguments.items() if n != mask and isinstance(x, Tensor) and x.shape[:2] == shape]
        for mask, shape in of.items()
    }


def counts(name: str, x: Tensor) -> Tensor:
    """Where a mask counts, or a segment is."""
    return x >= 0 if name == "segment_ids" else x != 0


def padded(x: Tensor) -> Tensor:
    """More columns on both sides, of what is not there."""
    filler = torch.nan if x.is_floating_point() else False if x.dtype == torch.bool else -1
    sides = (x.new_full((x.shape[0], n, *x.shape[2:]), filler) for n in (LEFT, RIGHT))
    return torch.cat([next(sides), x, next(sides)], 1)


def packed(arguments: Arguments) -> tuple[Arguments, Tensor]:
    """Every mask and what is aligned with it as [N] and a cu_seqlens; and the places [B, T] that the first mask's had.

    A row ends with its last token that counts. The first mask's bounds are cu_seqlens, the others' <name>_cu_seqlens.
    """
    result, kept = dict(arguments), {}
    for mask, names in aligned(arguments).items():
        ahead = counts(mask, arguments[mask]).flip(1).cumsum(1).flip(1) > 0
        for name in (mask, *names):
            result[name] = arguments[name][ahead]
        bounds = torch.nn.functional.pad(ahead.sum(1).cumsum(0), (1, 0))
        result[mask.replace("mask", "cu_seqlens") if kept else "cu_seqlens"] = bounds
        kept.setdefault("places", ahead)
    return result, kept["places"]


def other_under(counted: Tensor, x: Tensor) -> Tensor:
    """`x` with other numbers where the mask is 0."""
    if not x.is_floating_point():
        return x
    return torch.where(counted.view(*counted.shape, *(1 for _ in x.shape[2:])), x, 7.0)


def shifts(arguments: Arguments) -> Tensor:
    """A constant for each row, the same in a group."""
    labels = arguments.get("group_ids", [0] * ROWS)
    return torch.tensor([0.5 * (1 + sorted(set(labels)).index(label)) for label in labels])


def along_rows(x: Tensor, of_row: Tensor) -> Tensor:
    return x + of_row.view(-1, *(1 for _ in x.shape[1:]))


# --------------------------------------------------------------------------------------------------------------- tests
@every
def test_is_the_loops(case: Case) -> None:
    for seed in (0, 1):
        arguments = case.arguments(seed)
        got, want = case(arguments), case.expected(arguments)
        if got.dtype == torch.bool:
            assert got.double().tolist() == want.tolist()
            continue
        assert got.dtype == torch.float32
        assert not got.requires_grad
        torch.testing.assert_close(got.double(), want, rtol=case.tolerance, atol=case.tolerance, equal_nan=True)


@every
def test_rows_are_on_their_own(case: Case) -> None:
    """In another order they give the same; a group without the others gives the same bits."""
    arguments = case.arguments(2)
    result = case(arguments)
    if not case.rows_matter:
        order = [3, 0, 7, 5, 1, 6, 2, 4]
        torch.testing.assert_close(
            case(rows(arguments, case, order)), result[order], rtol=2e-6, atol=2e-6, equal_nan=True
        )
    if not (case.of_the_batch or case.rows_matter):
        labels = arguments.get("group_ids", range(ROWS))
        group = [b for b in range(ROWS) if labels[b] == labels[0]]
        assert same_bits(case(rows(arguments, case, group)), result[group])


@every
def test_what_is_under_a_mask_does_not_matter(case: Case) -> None:
    """Nor how much of it there is, on either side."""
    arguments = case.arguments(3)
    result, masks = case(arguments), aligned(arguments)
    for mask, names in masks.items():
        counted = counts(mask, arguments[mask])
        other = changed(arguments, tuple(names), lambda x, of=counted: other_under(of, x))
        assert same_bits(case(other), result)
        if case.places_matter:
            continue
        wide = case(changed(arguments, (mask, *names), padded))
        if result.shape == counted.shape:
            assert not wide[:, :LEFT].any()
            assert not wide[:, -RIGHT:].any()
            wide = wide[:, LEFT:-RIGHT]
            assert not result[~counted].any()
        assert same_bits(wide, result)


@every
def test_packed_is_padded(case: Case) -> None:
    if "cu_seqlens" not in inspect.signature(case.recipe).parameters:
        return
    arguments = case.arguments(3)
    result = case(arguments)
    flat, places = packed(arguments)
    want = result[places] if result.shape[:2] == places.shape else result
    torch.testing.assert_close(case(flat), want, rtol=2e-6, atol=2e-6, equal_nan=True)


@every
def test_no_rows_and_no_columns(case: Case) -> None:
    if case.of_the_batch:  # which has to be there
        return
    arguments = case.arguments(3)
    assert case(rows(arguments, case, [])).shape[0] == 0
    names = {name for pair in aligned(arguments).items() for name in (pair[0], *pair[1])}
    empty = case(changed(arguments, tuple(names), lambda x: x[:, :0]))
    assert empty.shape[0] == ROWS
    assert not empty.isinf().any()


@pytest.mark.parametrize("case", ONE_OF_EACH.values(), ids=ONE_OF_EACH)
def test_what_is_refused_is_refused_in_words(case: Case) -> None:
    """Infinity, nothing, and a row less than other arguments have (it would broadcast or end in torch's errors)."""
    arguments = case.arguments(5)
    sized = {n: x for n, x in arguments.items() if isinstance(x, Tensor | list) and n not in case.fixed}
    of_rows = [name for name, x in sized.items() if len(x) == ROWS and name != "objectives"]
    parameters = inspect.signature(case.recipe).parameters
    words = rf"^({'|'.join(parameters)}): expected .* got "  # of its own arguments
    for name, x in arguments.items():
        if isinstance(x, Tensor) and x.is_floating_point() and name not in MAY_BE_INFINITE:
            with pytest.raises(ValueError, match=words):
                case(arguments | {name: torch.full_like(x, torch.inf)})
        if isinstance(x, Tensor) and name in of_rows and len(of_rows) > 1:
            with pytest.raises(ValueError, match=words):
                case(arguments | {name: x[:-1]})
        if parameters[name].annotation == "Tensor" and name != "mask":
            with pytest.raises((TypeError, ValueError)):
                case(arguments | {name: None})


@pytest.mark.parametrize("name", OF_TURNS)
def test_turns_in_groups_are_rows_in_groups(name: str) -> None:
    """[B, S] with Groups of that shape; an infinity under the mask, and in no group, is not there."""
    recipe = RECIPES[name].function
    rewards = torch.tensor([[1.0, 0.0], [0.0, torch.inf], [0.5, torch.inf], [1.0, 0.25]])
    groups = fr.Groups.by(["a", "a", "b", "b"], torch.tensor([[0, 1], [0, 1], [0, -1], [0, 1]]))
    mask = torch.ones(4, 2)
    mask[1, 1] = 0
    options = {"k": 1} if name == "pass_at_k_training" else {}
    got = recipe(rewards, groups, mask=mask, **options)
    there = (mask != 0) & (groups.index >= 0)
    want = recipe(rewards[there], groups.index[there], **options)
    torch.testing.assert_close(got[there], want)
    assert not got[~there].any()


@every
def test_shift_scale_and_the_method_s_own_law(case: Case) -> None:
    arguments = case.arguments(4)
    result = case(arguments)

    def is_now(want: Tensor, names: tuple[str, ...], change: Callable[[Tensor], Tensor]) -> None:
        got = case(changed(arguments, names, change))
        torch.testing.assert_close(got, want, rtol=2e-3, atol=2e-5, equal_nan=True)

    if case.unmoved_by_shift:
        is_now(result, case.unmoved_by_shift, lambda x: along_rows(x, shifts(arguments)))
    if case.unmoved_by_scale:
        is_now(result, case.unmoved_by_scale, lambda x: 4 * x)
    if case.scales_with:
        is_now(4 * result, case.scales_with, lambda x: 4 * x)
    if case.law is not None:
        case.law(arguments, result)


def same_bits(x: Tensor, y: Tensor) -> bool:
    return torch.equal(x.nan_to_num(12345.0), y.nan_to_num(12345.0))


def test_every_recipe_has_a_case() -> None:
    assert {case.recipe.__name__ for case in CASES.values()} == set(OF_FAMILIES)
    assert all(name.partition(",")[0] == case.recipe.__name__ for name, case in CASES.items())
    assert set(MARKS) <= set(OF_FAMILIES)

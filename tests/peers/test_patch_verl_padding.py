"""verl's padding helpers under the patch: the same values, offsets, gradients and errors as its own."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from verl_stock import recognised

from fastreward import patch
from fastreward.patch.verl import padding as rows

pytest.importorskip("verl")
TensorDict = pytest.importorskip("tensordict").TensorDict
padding = importlib.import_module("verl.workers.utils.padding")
tu = importlib.import_module("verl.utils.tensordict_utils")
NAMES = ("no_padding_2_padding", "response_from_nested", "response_to_nested", "left_right_2_no_padding")
STOCK: dict[str, Callable[..., Any]] = {name: getattr(padding, name) for name in NAMES}
PROMPTS, RESPONSES = [3, 1, 4, 2, 2], [2, 5, 0, 1, 5]  # one response is empty
T, R = 6, 5


@pytest.fixture(autouse=True, scope="module")
def _patched() -> Iterator[None]:
    patch.undo()
    patch.verl()
    yield
    patch.undo()


def nested(lengths: list[int], *trailing: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(sum(lengths))
    pieces = [torch.randn((n, *trailing), generator=generator).to(dtype) for n in lengths]
    return torch.nested.as_nested_tensor(pieces, layout=torch.jagged)


def usage(name: str) -> Any:
    return patch.status()["verl"].usage[f"verl.workers.utils.padding.{name}"]


def skip_unless_recognised(name: str) -> None:
    if vars(padding)[name] is STOCK[name]:
        assert not recognised(next(row for row in rows.REPLACEMENTS if row.name == name), padding)
        pytest.skip(f"verl {patch.status()['verl'].version} has another {name}")


def served(name: str, *arguments: Any) -> Any:
    skip_unless_recognised(name)
    before = usage(name).calls, usage(name).handed_on
    result = getattr(padding, name)(*arguments)
    assert (usage(name).calls, usage(name).handed_on) == (before[0] + 1, before[1])
    return result


def batch(kind: str) -> Any:
    if kind == "padded":
        prompt_mask = torch.arange(T) >= T - torch.tensor(PROMPTS)[:, None]
        response_mask = torch.arange(R) < torch.tensor(RESPONSES)[:, None]
        return TensorDict(
            {
                "prompts": prompt_mask.long(),
                "responses": response_mask.long(),
                "attention_mask": torch.cat([prompt_mask, response_mask], dim=1).long(),
            },
            batch_size=len(PROMPTS),
        )
    data = TensorDict({"prompts": nested(PROMPTS), "responses": nested(RESPONSES)}, batch_size=len(PROMPTS))
    if kind == "nested to a length":
        tu.assign_non_tensor_data(data, "max_response_len", 9)
    return data


def of_leaf(function: Callable[..., Tensor], values: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    """Result, and gradient of the values under a random upstream gradient."""
    leaf = values.detach().clone().requires_grad_()
    result = function(leaf, *rest)
    flat = result.values() if result.is_nested else result
    upstream = torch.randn(flat.shape, generator=torch.Generator().manual_seed(7)).to(flat.dtype)
    return result, torch.autograd.grad(flat, leaf, upstream)[0]


def as_sequences(leaf: Tensor) -> Tensor:
    lengths = torch.tensor(PROMPTS) + torch.tensor(RESPONSES)
    offsets = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
    return torch.nested.nested_tensor_from_jagged(leaf, offsets)


def same_nested(ours: Tensor, theirs: Tensor) -> None:
    assert ours.is_nested
    assert ours.values().equal(theirs.values())
    assert ours.offsets().equal(theirs.offsets())
    assert (ours.dtype, ours.offsets().dtype, ours.layout) == (theirs.dtype, theirs.offsets().dtype, theirs.layout)
    assert ours.to_padded_tensor(-1).equal(theirs.to_padded_tensor(-1))


@pytest.mark.parametrize("kind", ["padded", "nested", "nested to a length"])
@pytest.mark.parametrize("trailing", [(), (3,)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("as_nested", [False, True])
def test_no_padding_2_padding(kind: str, trailing: tuple[int, ...], dtype: torch.dtype, as_nested: bool) -> None:
    total = sum(PROMPTS) + sum(RESPONSES)
    values = torch.randn((total, *trailing), generator=torch.Generator().manual_seed(0)).to(dtype)
    wrap = as_sequences if as_nested else torch.clone
    data = batch(kind)
    ours = of_leaf(lambda leaf: served("no_padding_2_padding", wrap(leaf), data), values)
    theirs = of_leaf(lambda leaf: STOCK["no_padding_2_padding"](wrap(leaf), data), values)
    assert all(x.equal(y) and x.dtype == y.dtype for x, y in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("trailing", [(), (2,)])
def test_response_from_nested(trailing: tuple[int, ...]) -> None:
    values = torch.randn((sum(PROMPTS) + sum(RESPONSES), *trailing), generator=torch.Generator().manual_seed(0))
    mask = nested(RESPONSES)
    ours = of_leaf(lambda leaf: served("response_from_nested", as_sequences(leaf), mask), values)
    theirs = of_leaf(lambda leaf: STOCK["response_from_nested"](as_sequences(leaf), mask), values)
    same_nested(ours[0].detach(), theirs[0].detach())
    assert ours[1].equal(theirs[1])


@pytest.mark.parametrize("trailing", [(), (2,)])
def test_response_to_nested(trailing: tuple[int, ...]) -> None:
    values = torch.randn((len(RESPONSES), R, *trailing), generator=torch.Generator().manual_seed(0))
    mask = nested(RESPONSES)
    ours = of_leaf(lambda leaf: served("response_to_nested", leaf, mask), values)
    theirs = of_leaf(lambda leaf: STOCK["response_to_nested"](leaf, mask), values)
    same_nested(ours[0].detach(), theirs[0].detach())
    assert ours[1].equal(theirs[1])


def left_right(holes: bool, empty_row: bool, extras: bool) -> Any:
    prompt = torch.arange(T) >= T - torch.tensor(PROMPTS)[:, None]
    response = torch.arange(R) < torch.tensor(RESPONSES)[:, None]
    mask = torch.cat([prompt, response], dim=1).long()
    if holes:
        mask[1, T + 1] = 0
    if empty_row:
        mask[2] = 0
    generator = torch.Generator().manual_seed(0)
    data = {
        "input_ids": torch.randint(0, 99, mask.shape, generator=generator),
        "attention_mask": mask,
        "response_mask": response.long(),
        "position_ids": (mask.cumsum(1) - 1).clamp(min=0),
    }
    if extras:
        data["routed_experts"] = torch.randint(0, 8, (*mask.shape, 2, 3), generator=generator)
        data["teacher_logprobs"] = torch.randn((*mask.shape, 4), generator=generator)
        data["teacher_ids"] = torch.randint(0, 99, (*mask.shape, 4), generator=generator)
    return TensorDict(data, batch_size=len(PROMPTS))


@pytest.mark.parametrize("holes", [False, True])
@pytest.mark.parametrize("empty_row", [False, True])
@pytest.mark.parametrize("extras", [False, True])
def test_left_right_2_no_padding(holes: bool, empty_row: bool, extras: bool) -> None:
    ours = served("left_right_2_no_padding", left_right(holes, empty_row, extras))
    theirs = STOCK["left_right_2_no_padding"](left_right(holes, empty_row, extras))
    names = list(theirs.keys())
    assert list(ours.keys()) == names
    for name in names:
        x, y = ours[name], theirs[name]
        if not isinstance(y, Tensor):
            assert x == y
        elif y.is_nested:
            same_nested(x, y)
        else:
            assert x.equal(y)
    indices = [tu.get_non_tensor_data(data, "indices", None) for data in (ours, theirs)]
    assert indices[0].equal(indices[1])


def test_positions_of_several_kinds_are_verls() -> None:
    skip_unless_recognised("left_right_2_no_padding")
    data = left_right(False, False, False)
    data["position_ids"] = data["position_ids"].unsqueeze(1).expand(-1, 4, -1).clone()
    before = usage("left_right_2_no_padding").handed_on
    found = padding.left_right_2_no_padding(data.clone())
    assert usage("left_right_2_no_padding").handed_on == before + 1
    same_nested(found["position_ids"], STOCK["left_right_2_no_padding"](data.clone())["position_ids"])


def test_errors_are_verls() -> None:
    data = batch("padded")
    no_prompt = batch("padded")
    no_prompt["attention_mask"][1, :T] = 0
    missing = left_right(False, False, False)
    del missing["position_ids"]
    total = sum(PROMPTS) + sum(RESPONSES)
    for name, arguments in (
        ("no_padding_2_padding", (torch.zeros(total + 1), data)),
        ("no_padding_2_padding", (torch.zeros(total - PROMPTS[1]), no_prompt)),
        ("left_right_2_no_padding", (missing,)),
    ):
        with pytest.raises(AssertionError) as theirs:
            STOCK[name](*arguments)
        with pytest.raises(AssertionError) as ours:
            getattr(padding, name)(*arguments)
        assert str(ours.value) == str(theirs.value)


def test_what_is_cut_off_is_cut_by_verl() -> None:
    """A response longer than max_response_len: torch's pad takes a negative size and cuts."""
    data = batch("nested")
    tu.assign_non_tensor_data(data, "max_response_len", 3)
    values = torch.randn(sum(PROMPTS) + sum(RESPONSES))
    assert padding.no_padding_2_padding(values, data).equal(STOCK["no_padding_2_padding"](values, data))
    wide = torch.randn(len(RESPONSES), R - 2)
    found = padding.response_to_nested(wide, nested(RESPONSES))
    same_nested(found, STOCK["response_to_nested"](wide, nested(RESPONSES)))

"""patch.trl(losses=True): divergences of whole logits in TRL's experimental trainers beside its own, with gradients."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from compat import largest
from torch import Tensor

import fastreward as fr
from fastreward.patch.trl.divergence import FUNCTIONS, Function

pytest.importorskip("trl")
B, T, V = 2, 5, 67


def _imported(row: Function) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return importlib.import_module(row.module)
        except ImportError:
            return None


STOCKS = {row: stock for row in FUNCTIONS if (module := _imported(row)) and (stock := row.stock(module)) is not None}
if not STOCKS:
    pytest.skip("this version of TRL has none whose source is known", allow_module_level=True)
JSD = [row for row in STOCKS if row.owner]
SELF = [row for row in STOCKS if not row.owner]


@pytest.fixture
def report() -> Iterator[Any]:
    yield fr.patch.trl(losses=True)
    fr.patch.undo()


def patched(row: Function) -> Callable[..., Any]:
    found: Callable[..., Any] = getattr(row.home(_imported(row)), row.name)
    return found


def logits(dtype: torch.dtype = torch.float32) -> list[Tensor]:
    torch.manual_seed(0)
    return [(2 * torch.randn(B, T, V)).to(dtype).requires_grad_() for _ in range(2)]


def check(report: Any, row: Function, given: list[Tensor], options: dict[str, Any], handed_on: int = 0) -> None:
    """Values and the gradients of both sides, and who has computed them."""
    found, expected = (f(*given, **options) for f in (patched(row), STOCKS[row]))
    upstream = torch.linspace(0.5, 1.5, found.numel()).view(found.shape).to(found.dtype)
    ours, theirs = ((x.detach(), *torch.autograd.grad(x, given, upstream)) for x in (found, expected))
    if given[0].dtype == torch.float32:
        largest(row.target, ours, theirs, rtol=2e-6, atol=2e-6)
    else:
        for mine, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(mine, other, rtol=3e-2, atol=3e-2)
    assert report.usage[row.target].handed_on == handed_on


@pytest.mark.parametrize("row", JSD, ids=lambda row: row.owner)
@pytest.mark.parametrize(
    "options",
    [
        {"beta": 0.0, "temperature": 0.7},
        {"beta": 1.0, "num_items_in_batch": 7},
        {"beta": 0.1, "reduction": "sum"},
        {"beta": 0.5, "reduction": "mean", "temperature": 2},
        {"beta": 0.5, "num_items_in_batch": torch.tensor(9)},
    ],
    ids=["forward", "reverse", "sum", "mean", "items"],
)
@pytest.mark.parametrize("labelled", [True, False])
def test_generalized_jsd(report: Any, row: Function, options: dict[str, Any], labelled: bool) -> None:
    labels = torch.tensor([[-100, -100, 3, 4, 5], [-100, 1, 2, -100, -100]]) if labelled else None
    check(report, row, logits(), {"labels": labels, **options})


@pytest.mark.parametrize("row", JSD, ids=lambda row: row.owner)
def test_generalized_jsd_without_a_token(report: Any, row: Function) -> None:
    check(report, row, logits(), {"labels": torch.full((B, T), -100)})


@pytest.mark.parametrize("row", SELF, ids=lambda row: row.target)
@pytest.mark.parametrize("alpha", [0.0, 0.5, 0.8, 1.0])
def test_self_distillation(report: Any, row: Function, alpha: float) -> None:
    options = {"distillation_alpha": alpha}
    for tail in (True, False) if "topk" in row.name else (None,):
        check(report, row, logits(), options if tail is None else options | _topk(tail))


def _topk(tail: bool) -> dict[str, Any]:
    return {"distillation_topk": 6, "distillation_add_tail": tail}


@pytest.mark.parametrize("row", STOCKS, ids=lambda row: row.target)
def test_low_precision(report: Any, row: Function) -> None:
    """In float32 and rounded once, where TRL's rounds at every step."""
    check(report, row, logits(torch.bfloat16), _defaults(row))


@pytest.mark.parametrize("row", STOCKS, ids=lambda row: row.target)
def test_what_is_trls(row: Function) -> None:
    report = fr.patch.trl(losses=True, exact=True)
    check(report, row, logits(torch.bfloat16), _defaults(row), handed_on=1)
    if row.owner:
        check(report, row, logits(), {"reduction": "none"}, handed_on=2)
    fr.patch.undo()
    assert patched(row) is STOCKS[row]


def _defaults(row: Function) -> dict[str, Any]:
    return {} if row.owner else {"distillation_alpha": 0.5} | (_topk(True) if "topk" in row.name else {})


@pytest.mark.parametrize("row", SELF, ids=lambda row: row.target)
def test_where_its_trainer_has_taken_it(report: Any, row: Function) -> None:
    trainer = row.module.rpartition(".")[0].rpartition(".")[2]
    module = pytest.importorskip(f"trl.experimental.{trainer}.{trainer}_trainer")
    assert getattr(module, row.name) is patched(row) is not STOCKS[row]
    assert any(row.target in entry.target for entry in report.replaced)

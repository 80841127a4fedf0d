"""Ours go by the names of what they replace; what someone has wrapped around a trainer's function is left alone."""

from __future__ import annotations

import copy
import functools
import importlib
import inspect
import pickle
import warnings
from collections.abc import Iterator
from typing import Any

import pytest

from fastreward import patch

for package in ("verl", "openrlhf", "trl", "peft"):
    pytest.importorskip(package)
from openrlhf_whole import stand_ins  # noqa: E402
from verl_stock import imported  # noqa: E402

stand_ins()
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what transformers, peft and ray warn about is theirs
    MODULES = {
        "verl": [imported(f"verl.{name}") for name in ("trainer.ppo.core_algos", "utils.torch_functional")],
        "openrlhf": [importlib.import_module(f"openrlhf.models.{name}") for name in ("utils", "loss")],
        "trl": [importlib.import_module("trl.trainer.utils")],
    }
    GRPO = importlib.import_module("trl.trainer.grpo_trainer").GRPOTrainer
HEAD = imported("verl.utils.experimental.torch_functional")
FUNCTIONS = {
    "verl": ("verl.utils.torch_functional", "masked_whiten"),
    "openrlhf": ("openrlhf.models.utils", "compute_reward"),
    "trl": ("trl.trainer.utils", "selective_log_softmax"),
}


@pytest.fixture(autouse=True)
def _taken_out() -> Iterator[None]:
    patch.undo()
    yield
    patch.undo()


def own_functions(trainer: str) -> dict[tuple[str, str], Any]:
    return {
        (module.__name__, name): x
        for module in MODULES[trainer]
        for name, x in vars(module).items()
        if inspect.isfunction(x) and x.__module__ == module.__name__
    }


@pytest.mark.parametrize("trainer", MODULES)
def test_every_replaced_function_is_pickled_and_shown_as_the_trainers(trainer: str) -> None:
    """By its name a function travels to another process, where it is whatever is bound there."""
    stock = own_functions(trainer)
    getattr(patch, trainer)()
    replaced = {key: x for key, x in own_functions(trainer).items() if stock[key] is not x}
    assert FUNCTIONS[trainer] in replaced
    for key, ours in replaced.items():
        assert pickle.loads(pickle.dumps(ours)) is ours, key
        assert inspect.signature(ours) == inspect.signature(stock[key]), key
        assert inspect.getdoc(ours) == inspect.getdoc(stock[key]), key


def test_the_method_of_trls_trainer_keeps_its_signature() -> None:
    stock = GRPO._compute_loss
    patch.trl(losses=True)
    assert GRPO._compute_loss is not stock
    assert inspect.signature(GRPO._compute_loss) == inspect.signature(stock)
    assert GRPO._compute_loss.__qualname__ == stock.__qualname__


@pytest.mark.parametrize(
    ("trainer", "module", "name"),
    [("trl", MODULES["trl"][0], "_ChunkedLogProbFunction"), ("verl", HEAD, "FusedLinearForPPOFunction")],
)
def test_what_stands_for_an_autograd_function_has_all_of_it(trainer: str, module: Any, name: str) -> None:
    stock = getattr(module, name)
    getattr(patch, trainer)()
    ours = getattr(module, name)
    assert ours.forward is stock.forward
    assert copy.copy(ours).backward is stock.backward


def wrapped(function: Any) -> Any:
    """As a profiler or someone's own patch has it: under the function's own name, module and signature."""

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    return call


@pytest.mark.parametrize("trainer", ["verl", "openrlhf"])
def test_what_someone_has_wrapped_is_left_alone_and_told(trainer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module, name = FUNCTIONS[trainer]
    mine = wrapped(getattr(importlib.import_module(module), name))
    monkeypatch.setattr(importlib.import_module(module), name, mine)
    told: list[str] = []
    report = getattr(patch, trainer)(tell=told.append)
    assert getattr(importlib.import_module(module), name) is mine
    assert [entry.why for entry in report.kept if entry.target == f"{module}.{name}"] == [
        f"someone has wrapped {mine!r} around it"
    ]
    assert any(f"{module}.{name}" in line for line in told)


def test_what_someone_has_wrapped_of_trls_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    utils = MODULES["trl"][0]
    with monkeypatch.context() as patched:
        patched.setattr(utils, "entropy_from_logits", wrapped(utils.entropy_from_logits))
        with pytest.raises(patch.PatchRefused, match="entropy_from_logits is not TRL's own any more"):
            patch.trl()
    mine = wrapped(GRPO._compute_loss)
    monkeypatch.setattr(GRPO, "_compute_loss", mine)
    report = patch.trl(losses=True)
    assert GRPO._compute_loss is mine
    assert any(entry.target.endswith("GRPOTrainer._compute_loss") for entry in report.kept)

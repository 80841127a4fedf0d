"""slime's hooks on two processes: a vocabulary that is split over ranks, and sequences that are."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import slime_formulas as formulas
import slime_ranks
import torch
import torch.multiprocessing as mp
from compat import largest
from slime_ranks import ARGS, CUT, ESTIMATORS, LENGTHS, batch, cut, held, local_logits

RANKS = (0, 1)


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each rank has computed."""
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    folder: Path = tmp_path_factory.mktemp("ranks")
    mp.spawn(slime_ranks.worker, args=(str(folder),), nprocs=2)
    return [torch.load(folder / f"{rank}.pt") for rank in RANKS]


@pytest.fixture(scope="module")
def expected() -> dict[str, Any]:
    """slime's formulas of the whole batch."""
    whole = batch()
    logits = whole["logits"].double().requires_grad_()
    loss, metrics = formulas.policy_loss(formulas.options(**ARGS), whole, logits)
    loss.backward()
    return {"loss": loss, "metrics": metrics, "grad": logits.grad}


def same(name: str, ours: Any, theirs: Any) -> None:
    largest(f"slime.{name}", ours, theirs, version=formulas.VERSION, rtol=2e-6, atol=2e-6)


def test_a_vocabulary_over_two_ranks(found: list[dict[str, Any]], expected: dict[str, Any]) -> None:
    mine = [x["vocabulary"] for x in found]
    for part in mine:
        same("loss", [part["loss"], part["metrics"]], [expected["loss"], expected["metrics"]])
    same("loss", torch.cat([part["grad"] for part in mine], -1), expected["grad"])
    assert mine[0]["grad"].shape[-1] == CUT
    assert torch.equal(mine[0]["loss"], mine[1]["loss"])


def test_sequences_over_two_ranks(found: list[dict[str, Any]], expected: dict[str, Any]) -> None:
    mine = [x["context"] for x in found]
    added = {name: sum(part["metrics"][name] for part in mine) for name in mine[0]["metrics"]}
    same("loss", [sum(part["loss"] for part in mine), added], [expected["loss"], expected["metrics"]])
    for rank, part in zip(RANKS, mine, strict=True):
        theirs = local_logits(expected["grad"], batch()["total_lengths"], rank)
        same("loss", part["grad"], theirs.nan_to_num(nan=0.0))


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_advantages_of_slices(found: list[dict[str, Any]], estimator: str) -> None:
    whole = batch()
    args = formulas.options(advantage_estimator=estimator, kl_coef=0.1, gamma=0.95, lambd=0.9)
    for rank in RANKS:
        theirs = [cut(x, whole["total_lengths"], rank) for x in formulas.advantages(args, whole)]
        same("advantages", list(found[rank]["context"][estimator]), theirs)


def test_a_recipe_sees_whole_responses(found: list[dict[str, Any]]) -> None:
    from fastreward.patch import slime, undo

    whole = batch()
    slime.advantages(formulas.options(fastreward_advantages="reinforce_plus_plus"), whole)
    undo()
    for rank in RANKS:
        theirs = cut(whole["advantages"], whole["total_lengths"], rank)
        torch.testing.assert_close(found[rank]["context"]["recipe"], theirs)


def test_rejection_by_whole_sequences_of_which_a_rank_holds_slices(found: list[dict[str, Any]]) -> None:
    from fastreward.patch import slime, undo

    whole = batch()
    given = {"train_log_probs": whole["log_probs"], "rollout_log_probs": whole["rollout_log_probs"]}
    given |= {key: whole[key] for key in ("loss_masks", "total_lengths", "response_lengths")}
    args = formulas.options(fastreward_tis="seq_mis(high=1.2)")
    weighted, masks, metrics = slime.tis(args, pg_loss=torch.ones(sum(LENGTHS)), **given)
    undo()
    assert any(not m.any() for m in masks)
    assert any(m.any() for m in masks)
    for rank in RANKS:
        own, own_masks, own_metrics = found[rank]["context"]["rejected"]
        assert all(torch.equal(x, y) for x, y in zip(own_masks, masks, strict=True))  # whole ones, on each rank
        for x, y in [(own, weighted), *((own_metrics[key], metrics[key]) for key in metrics)]:
            theirs = torch.cat(cut(list(y.split(LENGTHS)), whole["total_lengths"], rank))
            torch.testing.assert_close(x, theirs)


def test_the_reducer_of_slices(found: list[dict[str, Any]]) -> None:
    whole = batch()
    theirs = formulas.reducer(LENGTHS, whole["loss_masks"])(torch.ones(sum(LENGTHS)))
    same("pg_loss_reducer", sum(x["context"]["reduced"] for x in found), theirs)


def test_losses_over_whole_sequences_are_refused_on_slices(found: list[dict[str, Any]]) -> None:
    for name in ("gspo", "deepseek_v3_2(threshold=1.0)"):
        assert "reads whole sequences, which context parallelism has cut" in found[0]["context"][name]


def test_the_ranks_hold_every_token_once() -> None:
    for total, length in [(8, 5), (2, 1), (17, 8), (16, 14), (5, 0)]:
        assert sorted(held(total, length, 0) + held(total, length, 1)) == list(range(length))

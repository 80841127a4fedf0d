"""The OpenRLHF drop-in in the experience maker: penalties, group baselines, GAE, returns and normalisation."""

from __future__ import annotations

import copy
import importlib
import math
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from compat import largest
from openrlhf_whole import stand_ins

pytest.importorskip("openrlhf")
pytest.importorskip("peft")
pytest.importorskip("ray")
stand_ins()
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]

from fastreward import patch  # noqa: E402

MAKER = "openrlhf.trainer.ppo_utils.experience_maker"
PENALTY = "openrlhf.trainer.ppo_utils.length_penalty"
METHODS = ("compute_advantages_and_returns", "get_advantages_and_returns", "get_cumulative_returns")
ESTIMATORS = ("gae", "reinforce", "rloo", "reinforce_baseline", "group_norm", "dr_grpo", "flash_reinforce")
GROUP = 4


@pytest.fixture(autouse=True, scope="module")
def _unpatched() -> Iterator[None]:
    patch.undo()
    yield
    patch.undo()


@pytest.fixture
def report() -> Any:
    """Of the patch, with an account of this test's calls alone."""
    report = patch.openrlhf()
    for usage in report.usage.values():
        usage.calls = usage.handed_on = 0
    return report


def target(method: str) -> str:
    return f"{MAKER}.RemoteExperienceMaker.{method}"


def arguments(estimator: str, **options: Any) -> Any:
    """What OpenRLHF's command line makes of its options, as far as it is read."""
    given = {"gamma": 1.0, "lambd": 1.0, "no_std_norm": False, "clip_range": None, "n": GROUP} | options
    advantage = SimpleNamespace(
        estimator=estimator, gamma=given["gamma"], lambd=given["lambd"], no_std_norm=given["no_std_norm"]
    )
    reward = SimpleNamespace(
        clip_range=given["clip_range"],
        overlong_buffer_len=given.get("overlong_buffer_len"),
        overlong_penalty_factor=0.7,
        stop_properly_penalty_coef=given.get("stop_properly_penalty_coef"),
    )
    return SimpleNamespace(
        algo=SimpleNamespace(advantage=advantage),
        rollout=SimpleNamespace(n_samples_per_prompt=given["n"], max_new_tokens=20),
        reward=reward,
    )


def maker(args: Any, kl_coef: float = 0.05) -> Any:
    """OpenRLHF's experience maker, without models."""
    module = importlib.import_module(MAKER)
    strategy = SimpleNamespace(args=args)
    return module.RemoteExperienceMaker(None, None, None, None, SimpleNamespace(value=kl_coef), strategy, None)


def experiences(seed: int = 0, mask: torch.dtype = torch.int64, prompt: int = 3) -> list[Any]:
    """Micro-batches of other widths, rollouts in mixed order, tool tokens inside, a prompt before, padding behind."""
    make = importlib.import_module("openrlhf.trainer.ppo_utils.experience").Experience
    g = torch.Generator().manual_seed(seed)
    order, found = torch.randperm(3 * GROUP, generator=g).tolist(), []
    for begin, end, width in ((0, 5, 23), (5, 6, 11), (6, 12, 31)):
        rows = end - begin
        m = (torch.rand(rows, width, generator=g) < 0.75).to(mask)
        m[:, :prompt], m[:, prompt], m[0, width - 4 :] = 0, 1, 0
        rewards = torch.randint(-8, 9, (rows,), generator=g) / 4
        found.append(
            make(
                action_mask=m,
                values=torch.randn(rows, width, generator=g) * m,
                kl=0.1 * torch.randn(rows, width, generator=g) * m,
                rewards=rewards,
                response_length=m.sum(-1),
                truncated=torch.rand(rows, generator=g) < 0.4,
                index=order[begin:end],
                info={"reward": rewards},
            )
        )
    return found


def seen(experience: Any) -> dict[str, Any]:
    """What training reads of an experience: per token under the mask."""
    m = experience.action_mask != 0
    return {
        "advantages": experience.advantages[m],
        "returns": experience.returns[m],
        "rewards": experience.rewards,
        "kl": experience.kl,
        "info": dict(experience.info),
    }


def both(args: Any, given: list[Any], kl_coef: float = 0.05) -> tuple[list[Any], list[Any], Any]:
    """What ours and OpenRLHF's make of the same experiences, and our report."""
    patch.undo()
    theirs = maker(copy.deepcopy(args), kl_coef).compute_advantages_and_returns(copy.deepcopy(given))
    report = patch.openrlhf()
    ours = maker(copy.deepcopy(args), kl_coef).compute_advantages_and_returns(copy.deepcopy(given))
    return ours, theirs, report


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_advantages_and_returns(estimator: str) -> None:
    args = arguments(estimator, gamma=0.97 if estimator in ("gae", "reinforce") else 1.0, lambd=0.9)
    ours, theirs, report = both(args, experiences())
    assert report.total.handed_on == 0
    assert report.usage[target("compute_advantages_and_returns")].calls == 1
    loop = "get_advantages_and_returns" if estimator == "gae" else "get_cumulative_returns"
    assert report.usage[target(loop)].calls == 3
    largest(target("compute_advantages_and_returns"), list(map(seen, ours)), list(map(seen, theirs)), atol=5e-6)
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.advantages.shape == other.advantages.shape
        assert mine.advantages.data_ptr() != mine.returns.data_ptr()
        assert mine.returns.untyped_storage().nbytes() == mine.returns.nbytes, "a view would carry others to the actors"


@pytest.mark.parametrize(
    "options",
    [
        {"no_std_norm": True},
        {"clip_range": (-1.0, 1.0)},
        {"overlong_buffer_len": 8},
        {"stop_properly_penalty_coef": 0.25},
        {"overlong_buffer_len": 6.5, "stop_properly_penalty_coef": -0.5},
    ],
)
@pytest.mark.parametrize("mask", [torch.bool, torch.int64, torch.float32])
def test_options(options: dict[str, Any], mask: torch.dtype) -> None:
    ours, theirs, report = both(arguments("reinforce_baseline", **options), experiences(1, mask))
    assert report.total.handed_on == 0
    largest(target("compute_advantages_and_returns"), list(map(seen, ours)), list(map(seen, theirs)), atol=5e-6)
    largest(f"{PENALTY}.apply_overlong_penalty", [e.rewards for e in ours], [e.rewards for e in theirs], atol=0, rtol=0)


@pytest.mark.filterwarnings("ignore:fastreward.patch. a call of:RuntimeWarning")  # NaN, as OpenRLHF gives it
@pytest.mark.parametrize(("estimator", "want"), [("rloo", math.nan), ("group_norm", math.nan), ("dr_grpo", 0.0)])
def test_a_group_of_one_is_openrlhfs(estimator: str, want: float) -> None:
    ours, theirs, _ = both(arguments(estimator, n=1), experiences(), kl_coef=0.0)
    largest(target("compute_advantages_and_returns"), list(map(seen, ours)), list(map(seen, theirs)), what=estimator)
    advantages = torch.cat([e.advantages[e.action_mask != 0] for e in ours])
    assert advantages.isnan().all() if math.isnan(want) else (advantages == want).all()


@pytest.mark.filterwarnings("ignore:fastreward.patch. a call of:RuntimeWarning")  # NaN, as OpenRLHF gives it
@pytest.mark.parametrize("estimator", ["rloo", "group_norm", "reinforce_baseline"])
def test_a_reward_of_nan_spoils_its_group_alone(estimator: str) -> None:
    given = experiences(2)
    given[0].rewards[1] = math.nan
    args = arguments(estimator)
    args.algo.advantage.no_std_norm = True
    ours, theirs, _ = both(args, given)
    spoilt = {name: [torch.cat([e.info["return"].isnan() for e in x])] for name, x in (("o", ours), ("t", theirs))}
    assert torch.equal(spoilt["o"][0], spoilt["t"][0])
    assert int(spoilt["o"][0].sum()) == GROUP


def test_gamma_is_1_where_openrlhf_says_so() -> None:
    args = arguments("rloo", gamma=0.5)
    ours, theirs, _ = both(args, experiences(3))
    largest(target("compute_advantages_and_returns"), list(map(seen, ours)), list(map(seen, theirs)), atol=5e-6)


def test_what_others_have_bound_is_called() -> None:
    """A subclass's own returns, and a function of the module that someone has replaced."""
    module = importlib.import_module(MAKER)
    patch.openrlhf()

    class Doubled(module.RemoteExperienceMaker):  # type: ignore[misc]
        def get_cumulative_returns(self, rewards: Any, action_mask: Any, gamma: float) -> Any:
            return 2 * super().get_cumulative_returns(rewards, action_mask, gamma)

    args = arguments("dr_grpo")
    plain = maker(args).compute_advantages_and_returns(experiences(4))
    strategy = SimpleNamespace(args=args)
    doubled = Doubled(None, None, None, None, SimpleNamespace(value=0.05), strategy, None)
    for x, y in zip(doubled.compute_advantages_and_returns(experiences(4)), plain, strict=True):
        torch.testing.assert_close(x.advantages, 2 * y.advantages)


def test_an_unknown_estimator_is_openrlhfs_to_refuse(report: Any) -> None:
    with pytest.raises(Exception, match="Unkown advantage_estimator"):
        maker(arguments("mine")).compute_advantages_and_returns(experiences())


# ---- one row of tokens -----------------------------------------------------------------------------------------------
def test_decay_through_masked_tokens(report: Any) -> None:
    """Tool tokens inside take time (cases 2.2 and 2.8)."""
    m = maker(arguments("gae"))
    mask = torch.tensor([[1, 0, 0, 1]])
    rewards, values = torch.tensor([[0.0, 0.0, 0.0, 1.0]]), torch.tensor([[0.5, 9.0, 9.0, 0.2]])
    advantages, returns = m.get_advantages_and_returns(values, rewards, mask, 0.9, 0.8)
    torch.testing.assert_close(advantages[0, 0], torch.tensor(-0.10809), atol=1e-5, rtol=0)
    torch.testing.assert_close(returns[0, 0], torch.tensor(0.39191), atol=1e-5, rtol=0)
    found = m.get_cumulative_returns(rewards, torch.tensor([[1, 0, 1, 1]]), 0.9)
    torch.testing.assert_close(found, torch.tensor([[0.729, 0.81, 0.9, 1.0]]))
    assert report.total.handed_on == 0


def test_nan_values_under_the_mask_stay_there(report: Any) -> None:
    mask, nan = torch.tensor([[1, 1, 0]]), math.nan
    advantages, returns = maker(arguments("gae")).get_advantages_and_returns(
        torch.tensor([[0.0, 0.0, nan]]), torch.tensor([[0.0, 1.0, nan]]), mask, 1.0, 0.95
    )
    torch.testing.assert_close(advantages, torch.tensor([[0.95, 1.0, 0.0]]))
    torch.testing.assert_close(returns, torch.tensor([[0.95, 1.0, 0.0]]))


@pytest.mark.parametrize("case", ["weights", "bfloat16", "float64", "no mask"])
def test_loops_that_are_openrlhfs(case: str, report: Any) -> None:
    e = experiences()[0]
    mask = {"weights": e.action_mask * 2, "no mask": None}.get(case, e.action_mask)
    dtype = {"bfloat16": torch.bfloat16, "float64": torch.float64}.get(case, torch.float32)
    m, values, rewards = maker(arguments("gae")), e.values.to(dtype), e.kl.to(dtype)
    got = m.get_advantages_and_returns(values, rewards, mask, 0.9, 0.8)
    assert report.usage[target("get_advantages_and_returns")].handed_on == 1
    patch.undo()
    want = m.get_advantages_and_returns(values, rewards, mask, 0.9, 0.8)
    assert [x.dtype for x in got] == [dtype] * 2
    assert all(torch.equal(x, y) for x, y in zip(got, want, strict=True))


def test_penalties_that_are_openrlhfs(report: Any) -> None:
    penalty = importlib.import_module(PENALTY)
    with pytest.raises(AssertionError, match="must be >= overlong_buffer_len"):
        penalty.apply_overlong_penalty(experiences(), 5, 8)
    with pytest.raises(AssertionError, match=r"must be in \[0, 1\]"):
        penalty.apply_stop_properly_penalty(experiences(), 1.5)
    listed = experiences()
    for e in listed:
        e.truncated = None
    assert penalty.apply_stop_properly_penalty(listed, 0.5) == 0


def test_penalties_count_and_change_the_rewards_in_place() -> None:
    penalty, counts, rewards = importlib.import_module(PENALTY), [], []
    for patched in (False, True):
        if patched:
            patch.openrlhf()
        else:
            patch.undo()
        given = experiences(5)
        held = [e.rewards for e in given]
        counts.append((penalty.apply_overlong_penalty(given, 20, 9, 0.3),))
        counts[-1] += (penalty.apply_stop_properly_penalty(given, 0.5),)
        assert all(e.rewards is x for e, x in zip(given, held, strict=True))
        rewards.append(held)
    assert counts[0] == counts[1]
    assert min(counts[0]) > 0
    largest(f"{PENALTY}.apply_stop_properly_penalty", rewards[1], rewards[0], atol=0, rtol=0)

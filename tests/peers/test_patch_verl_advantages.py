"""verl's advantages and rewards under the patch, beside its own functions: values, dtypes, errors, configurations.

verl's function in float64 is the truth: in float32 its own rounding is divided by standard deviations of near nothing.
Results are compared where the mask is set; under it ours are 0, and finite whatever lies there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from compat import largest
from torch import Tensor

from fastreward import patch
from fastreward.patch.verl import batch as verl_batch

pytest.importorskip("verl")
from verl_stock import imported

core = imported("verl.trainer.ppo.core_algos")
functional = imported("verl.utils.torch_functional")
trainer = imported("verl.trainer.ppo.ray_trainer")
CORE, TORCH = core.__name__, functional.__name__

#: Estimators of outcomes: those that take an index, by name -> the function's name.
OUTCOME = {
    "grpo": "compute_grpo_outcome_advantage",
    "grpo_vectorized": "compute_grpo_vectorized_outcome_advantage",
    "gdpo": "compute_gdpo_outcome_advantage",
    "grpo_passk": "compute_grpo_passk_outcome_advantage",
    "rloo": "compute_rloo_outcome_advantage",
    "rloo_vectorized": "compute_rloo_vectorized_outcome_advantage",
    "opo": "compute_opo_outcome_advantage",
    "reinforce_plus_plus_baseline": "compute_reinforce_plus_plus_baseline_outcome_advantage",
    "gpg": "compute_gpg_outcome_advantage",
}
CONFIG = imported("verl.trainer.config").AlgoConfig


@pytest.fixture(autouse=True)
def _taken_out() -> Iterator[None]:
    patch.undo()
    yield
    patch.undo()


def masks(rows: int, columns: int, kind: str, generator: torch.Generator) -> Tensor:
    """Ragged rows, with holes, an empty one and a full one, as verl has them: int64, a view of a wider mask, bool."""
    length = torch.randint(0, columns + 1, (rows, 1), generator=generator)
    mask = torch.arange(columns) < length
    mask &= torch.rand(rows, columns, generator=generator) < 0.8
    mask[0], mask[-1] = True, False
    if kind == "view":
        wide = torch.zeros(rows, columns + 3, dtype=torch.int64)
        wide[:, 3:] = mask
        return wide[:, -columns:]
    return mask.to({"bool": torch.bool, "int64": torch.int64, "float32": torch.float32, "int32": torch.int32}[kind])


def uids(rows: int, generator: torch.Generator, *, singletons: bool = True) -> np.ndarray:
    """Groups of several sizes, one of them of one, in any order."""
    numbers = torch.randint(0, max(1, rows // 4), (rows,), generator=generator)
    numbers = numbers if not singletons else torch.where(torch.arange(rows) == rows // 2, 10_000, numbers)
    if not singletons:
        numbers = torch.arange(rows) % max(1, rows // 3)
    return np.array([f"uid-{n:05d}" for n in numbers.tolist()], dtype=object)


def truth(function: Callable[..., Any], arguments: dict[str, Any]) -> Any:
    """What verl gives in float64, with 0 in the place of what lies under the mask."""
    mask = arguments["response_mask"]
    exact = {
        name: x.masked_fill(mask == 0, 0.0).double() if isinstance(x, Tensor) and x.shape == mask.shape else x
        for name, x in arguments.items()
    }
    exact["response_mask"] = mask.long() if mask.dtype == torch.bool else mask  # of which verl takes 1 - mask
    exact = {n: x.double() if isinstance(x, Tensor) and x.dtype == torch.float32 else x for n, x in exact.items()}
    return function(**exact)


def compare(name: str, arguments: dict[str, Any], **tolerance: float) -> None:
    """The patched function beside verl's own, on the tokens that count; ours is 0 elsewhere, and served."""
    stock = getattr(core, name)
    expected = truth(stock, arguments)
    report = patch.verl()
    found = getattr(core, name)(**arguments)
    usage = report.usage[f"{CORE}.{name}"]
    assert (usage.calls, usage.handed_on) == (1, 0)
    there = arguments["response_mask"] != 0
    for x in found:
        assert x.dtype == torch.float32
        assert x.shape == there.shape
        assert bool((x[~there] == 0).all())
    assert (found[0] is found[1]) == (expected[0] is expected[1])
    largest(f"{CORE}.{name}", [x[there] for x in found], [x[there] for x in expected], **tolerance)


# ---- advantages ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("name", OUTCOME)
def test_estimators_of_outcomes(name: str, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    rows, columns = [(9, 7), (24, 13), (2, 3), (40, 5)][seed]
    mask = masks(rows, columns, ["int64", "bool", "view", "float32"][seed], generator)
    scores = torch.randint(0, 3, (rows,), generator=generator).float() + [0.0, 0.5, 0.0, -1.0][seed]
    rewards = torch.zeros(rows, columns)
    rewards[torch.arange(rows), mask.long().sum(-1).clamp(min=1) - 1] = scores
    rewards[1, -1] = 0.25  # on a token under the mask or not: it counts
    index = uids(rows, generator, singletons=name != "grpo_passk" and seed != 2)
    arguments: dict[str, Any] = {"token_level_rewards": rewards, "response_mask": mask, "index": index}
    if name == "grpo_passk":
        arguments["config"] = CONFIG(norm_adv_by_std_in_grpo=seed % 2 == 0)
        arguments["index"] = np.array([f"{i % max(1, rows // 3)}" for i in range(rows)], dtype=object)
    if name in ("grpo", "grpo_vectorized", "gdpo") and seed % 2:
        arguments["norm_adv_by_std_in_grpo"] = False
    # Rewards on the masked tokens are outcomes too, so that the truth may not blank them.
    expected = getattr(core, OUTCOME[name])(**arguments | {"token_level_rewards": rewards.double()})
    report = patch.verl()
    found = getattr(core, OUTCOME[name])(**arguments)
    assert report.usage[f"{CORE}.{OUTCOME[name]}"].handed_on == 0
    assert report.usage[f"{CORE}.{OUTCOME[name]}"].tokens == rows * columns
    assert found[0] is found[1]
    assert found[0].dtype == torch.float32
    largest(f"{CORE}.{OUTCOME[name]}", found[0], expected[0] * (mask != 0))


@pytest.mark.parametrize("scaled", [True, False])
def test_gdpo_of_several_rewards(scaled: bool) -> None:
    generator = torch.Generator().manual_seed(3)
    rows, columns = 12, 6
    mask = masks(rows, columns, "int64", generator)
    mask[:, 0] = 1
    config = CONFIG(gdpo_reward_keys=["accuracy", "format"], gdpo_reward_weights=[1.0, 0.3])
    arguments = {
        "token_level_rewards": torch.rand(rows, columns, generator=generator),
        "response_mask": mask,
        "index": uids(rows, generator),
        "norm_adv_by_std_in_grpo": scaled,
        "config": config,
        "non_tensor_batch": {
            "accuracy": np.array(torch.randint(0, 2, (rows,), generator=generator).tolist(), dtype=object),
            "format": torch.rand(rows, generator=generator).numpy(),
        },
        "batch": {
            "prompts": torch.zeros(rows, 4, dtype=torch.long),
            "attention_mask": torch.cat([torch.ones(rows, 4, dtype=torch.long), mask], 1),
        },
    }
    compare("compute_gdpo_outcome_advantage", arguments, rtol=1e-5, atol=1e-5)
    patch.undo()
    arguments["non_tensor_batch"]["format"] = arguments["non_tensor_batch"]["format"].tolist()
    compare("compute_gdpo_outcome_advantage", arguments, rtol=1e-5, atol=1e-5)
    patch.undo()
    with pytest.raises(AssertionError, match="gdpo_reward_keys"):
        core.compute_gdpo_outcome_advantage(**arguments | {"config": CONFIG()})
    patch.verl()
    with pytest.raises(AssertionError, match="gdpo_reward_keys"):
        core.compute_gdpo_outcome_advantage(**arguments | {"config": CONFIG()})
    with pytest.raises(AssertionError, match="'style' not found"):
        core.compute_gdpo_outcome_advantage(**arguments | {"config": CONFIG(gdpo_reward_keys=["style"])})


def scan_arguments(seed: int, kind: str) -> dict[str, Any]:
    """Rewards and values with what must not matter under the mask."""
    generator = torch.Generator().manual_seed(seed)
    rows, columns = [(6, 9), (17, 33), (3, 1), (2, 4)][seed]
    mask = masks(rows, columns, kind, generator)
    values, rewards = (torch.randn(rows, columns, generator=generator) for _ in range(2))
    nothing = torch.tensor([math.nan, math.inf, 1e30])[torch.arange(rows * columns).view(rows, columns) % 3]
    return {
        "token_level_rewards": torch.where(mask != 0, rewards, nothing),
        "response_mask": mask,
        "values": torch.where(mask != 0, values, nothing),
        "reward_baselines": torch.randn(rows, generator=generator),
    }


@pytest.mark.parametrize(("seed", "kind"), [(0, "int64"), (1, "view"), (2, "bool"), (3, "float32")])
@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 1.0), (0.99, 0.95), (0.9, 0.0)])
def test_gae(seed: int, kind: str, gamma: float, lam: float) -> None:
    arguments = scan_arguments(seed, kind) | {"gamma": gamma, "lam": lam}
    del arguments["reward_baselines"]
    compare("compute_gae_advantage_return", arguments, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize(("seed", "kind"), [(0, "int64"), (1, "view"), (2, "bool"), (3, "int32")])
@pytest.mark.parametrize("gamma", [1.0, 0.9])
def test_reinforce_plus_plus(seed: int, kind: str, gamma: float) -> None:
    arguments = scan_arguments(seed, kind) | {"config": CONFIG(gamma=gamma)}
    del arguments["reward_baselines"], arguments["values"]
    compare("compute_reinforce_plus_plus_outcome_advantage", arguments, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize(("seed", "kind"), [(0, "int64"), (1, "view"), (2, "bool"), (3, "float32")])
def test_remax(seed: int, kind: str) -> None:
    arguments = scan_arguments(seed, kind)
    del arguments["values"]
    compare("compute_remax_outcome_advantage", arguments, rtol=2e-6, atol=2e-6)


BASELINES = (
    "compute_optimal_token_baseline_advantage",
    "compute_multi_turn_optimal_token_baseline_advantage",
)


@pytest.mark.parametrize("tail", [True, False])
@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize(("seed", "kind"), [(0, "int64"), (1, "view"), (2, "int64"), (3, "int32")])
@pytest.mark.parametrize("name", BASELINES)
def test_the_optimal_token_baseline(name: str, seed: int, kind: str, weighted: bool, tail: bool) -> None:
    """With holes, without them, groups of one, an empty response, and equally long ones."""
    generator = torch.Generator().manual_seed(seed)
    rows, columns = [(9, 7), (24, 13), (3, 1), (12, 6)][seed]
    mask = masks(rows, columns, kind, generator)
    if seed == 3:  # no holes
        mask = (torch.arange(columns) < mask.sum(-1, keepdim=True)).int()
    nothing = torch.where(mask != 0, 0.0, math.nan)
    arguments = {
        "token_level_rewards": torch.randn(rows, columns, generator=generator) + nothing,
        "response_mask": mask,
        "index": uids(rows, generator),
        "old_log_probs": -3 * torch.rand(rows, columns, generator=generator) + nothing,
        "sum_pi_squared": torch.rand(rows, columns, generator=generator) + nothing,
        "rollout_is_weights": 0.5 + torch.rand(rows, columns, generator=generator) if weighted else None,
        "handle_zero_tail": tail,
    }
    compare(name, arguments, rtol=5e-6, atol=5e-6)


def test_a_longest_response_alone_beyond_the_second_keeps_its_returns() -> None:
    patch.verl()
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    rewards, lp, squares = torch.ones(2, 4), torch.full((2, 4), -1.0), torch.full((2, 4), 0.5)
    index = np.array(["a", "a"], dtype=object)
    for name in BASELINES:
        found, returns = getattr(core, name)(rewards, mask, index, lp, squares)
        assert torch.equal(found[0, 2:], returns[0, 2:])
        assert not torch.equal(found[0, :2], returns[0, :2])


def test_a_response_alone_keeps_verls_rules() -> None:
    """n = 1: a score of 2 stays 2 (less the epsilon under the deviation of 1), and is 0 for rloo_vectorized."""
    patch.verl()
    rewards, mask, index = torch.tensor([[0.0, 2.0]]), torch.ones(1, 2, dtype=torch.long), np.array(["a"], dtype=object)
    for name, expected in (("grpo", 2 / 1.000001), ("rloo", 2.0), ("rloo_vectorized", 0.0), ("opo", 2.0)):
        found, _ = getattr(core, OUTCOME[name])(rewards, mask, index)
        torch.testing.assert_close(found, torch.full((1, 2), expected), rtol=1e-7, atol=0.0)


def test_nan_under_the_mask_is_no_reward() -> None:
    patch.verl()
    rewards = torch.tensor([[1.0, math.nan], [0.0, 0.0]])
    mask = torch.tensor([[1, 0], [1, 1]])
    found, _ = core.compute_grpo_outcome_advantage(rewards, mask, np.array(["a", "a"], dtype=object))
    torch.testing.assert_close(found, torch.tensor([[0.7071058, 0.0], [-0.7071058, -0.7071058]]))


@pytest.mark.parametrize("rows", [0, 3])
def test_empty_batches(rows: int) -> None:
    rewards, mask = torch.zeros(rows, 0 if rows else 4), torch.zeros(rows, 0 if rows else 4, dtype=torch.long)
    index = np.array(["a"] * rows, dtype=object)
    expected = core.compute_grpo_outcome_advantage(rewards, mask, index)
    patch.verl()
    largest(
        f"{CORE}.compute_grpo_outcome_advantage", core.compute_grpo_outcome_advantage(rewards, mask, index), expected
    )


# ---- what is verl's --------------------------------------------------------------------------------------------------


def outcome(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """What a call gives, or the error that it raises."""
    try:
        return function(*args, **kwargs)
    except Exception as error:
        return type(error), str(error)


def halves(x: Tensor) -> Tensor:
    return x * 0.5


REWARDS, MASK = torch.tensor([[0.0, 1.0], [2.0, 0.5], [0.25, 0.0]]), torch.tensor([[1, 1], [1, 0], [1, 1]])
INDEX = np.array(["a", "b", "a"], dtype=object)


@pytest.mark.parametrize(
    "arguments",
    [
        (REWARDS.double(), MASK, INDEX),
        (REWARDS.bfloat16(), MASK, INDEX),
        (REWARDS, halves(MASK.float()), INDEX),
        (REWARDS, 2 * MASK, INDEX),
        (REWARDS, MASK.to(torch.int8) - 1, INDEX),
        (REWARDS, MASK[:, :1], INDEX),
        (REWARDS, MASK, torch.tensor([0, 1, 0])),
        (REWARDS, MASK, ["a", "b", "a"]),
        (REWARDS, MASK, np.array([1.0, 2.0, 1.0])),
        (REWARDS, MASK, np.array([("a", 1), ("b", 1), ("a", 1), 0], dtype=object)[:3]),
        (REWARDS, MASK, INDEX[:2]),
        (torch.tensor([[0.0, math.nan], [1.0, 1.0], [0.0, 0.0]]), MASK, INDEX),
        (torch.tensor([[0.0, math.inf], [1.0, 1.0], [0.0, 0.0]]), MASK, INDEX),
        (REWARDS.clone().requires_grad_(), MASK, INDEX),
    ],
    ids=str,
)
def test_other_kinds_go_to_verl_with_its_results_and_errors(arguments: tuple[Any, ...]) -> None:
    expected = outcome(core.compute_grpo_outcome_advantage, *arguments)
    report = patch.verl()
    found = outcome(core.compute_grpo_outcome_advantage, *arguments)
    assert report.usage[f"{CORE}.compute_grpo_outcome_advantage"].calls == 0
    if isinstance(expected[0], type):
        assert found == expected
    else:
        torch.testing.assert_close(found, expected, rtol=0.0, atol=0.0, equal_nan=True)


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("compute_grpo_passk_outcome_advantage", (REWARDS, MASK, INDEX)),  # no config
        ("compute_grpo_passk_outcome_advantage", (REWARDS, MASK, INDEX, 1e-6, True, CONFIG())),  # a group of one
        ("compute_reinforce_plus_plus_outcome_advantage", (REWARDS, MASK)),
        ("compute_gae_advantage_return", (REWARDS, REWARDS, torch.zeros_like(MASK), 0.9, 0.9)),
        ("compute_gae_advantage_return", (REWARDS, REWARDS, MASK * torch.tensor([[1, 0], [0, 0], [0, 0]]), 0.9, 0.9)),
        ("compute_grpo_outcome_advantage", (REWARDS,)),
    ],
)
def test_errors_are_verls(name: str, arguments: tuple[Any, ...]) -> None:
    expected = outcome(getattr(core, name), *arguments)
    assert isinstance(expected[0], type), expected
    patch.verl()
    assert outcome(getattr(core, name), *arguments) == expected


# ---- rewards ---------------------------------------------------------------------------------------------------------
KINDS = ["kl", "k1", "abs", "mse", "k2", "low_var_kl", "k3", "k1+", "k3+", "k2+", "abs+"]


def logprobs(seed: int, *shape: int) -> tuple[Tensor, Tensor]:
    """Two policies, some tokens of them far apart."""
    generator = torch.Generator().manual_seed(seed)
    first = -torch.rand(*shape, generator=generator) * 2
    second = first + torch.randn(*shape, generator=generator)
    second.view(-1)[::5] = first.view(-1)[::5] + 3.0  # k3 above 10
    second.view(-1)[::7] -= 30.0
    return first, second


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(5, 7), (12,), (2, 3, 4), (0, 3)])
def test_kl_penalty(kind: str, shape: tuple[int, ...]) -> None:
    first, second = logprobs(0, *shape)
    expected = core.kl_penalty(first.double(), second.double(), kind)
    report = patch.verl()
    found = core.kl_penalty(first, second, kl_penalty=kind)
    assert report.usage[f"{CORE}.kl_penalty"].handed_on == 0
    assert found.dtype == torch.float32
    largest(f"{CORE}.kl_penalty", found, expected, rtol=2e-6, atol=2e-6, what=kind)


@pytest.mark.parametrize("shape", [(4, 6), (30,)])
@pytest.mark.parametrize("kind", KINDS)
def test_the_gradient_of_kl_penalty(kind: str, shape: tuple[int, ...]) -> None:
    first, second = logprobs(1, *shape)
    second.view(-1)[::11] = first.view(-1)[::11]  # where |d| has no slope
    weight = torch.randn(*shape)

    def results() -> tuple[Tensor, Tensor]:
        x = first.clone().requires_grad_()
        kl = core.kl_penalty(x, second, kind)
        return kl.detach(), torch.autograd.grad((weight * kl).sum(), x)[0]

    expected = results()
    report = patch.verl()
    largest(f"{CORE}.kl_penalty", results(), expected, rtol=2e-6, atol=2e-6, what=kind)
    assert report.usage[f"{CORE}.kl_penalty"].handed_on == (kind in ("kl", "k1"))


def test_a_kl_whose_reference_is_trained_too_is_verls() -> None:
    first, second = (x.requires_grad_() for x in logprobs(1, 3, 4))
    report = patch.verl()
    core.kl_penalty(first, second, "k3").sum().backward()
    assert second.grad is not None
    assert report.usage[f"{CORE}.kl_penalty"].handed_on == 1


@pytest.mark.parametrize("kind", ["full", "k4", "full+"])
def test_estimators_that_verl_has_not(kind: str) -> None:
    first, second = logprobs(0, 2, 3)
    patch.verl()
    with pytest.raises(NotImplementedError):
        core.kl_penalty(first, second, kind)


def test_compute_rewards() -> None:
    first, second = logprobs(2, 6, 5)
    scores = torch.randn(6, 5)
    expected = core.compute_rewards(scores.double(), first.double(), second.double(), 0.07)
    before = scores.clone()
    patch.verl()
    largest(f"{CORE}.compute_rewards", core.compute_rewards(scores, first, second, 0.07), expected)
    assert torch.equal(scores, before)


@pytest.mark.parametrize("kind", ["kl", "abs", "mse", "low_var_kl", "k3+"])
@pytest.mark.parametrize("controller", ["fixed", "adaptive"])
def test_apply_kl_penalty(kind: str, controller: str) -> None:
    generator = torch.Generator().manual_seed(4)
    mask = masks(7, 9, "view", generator)
    first, second = logprobs(4, 7, 9)
    batch = {
        "response_mask": mask,
        "token_level_scores": torch.randn(7, 9, generator=generator) * (mask != 0),
        "old_log_probs": first,
        "ref_log_prob": second,
    }

    def results(dtype: torch.dtype) -> tuple[Any, dict[str, float], float]:
        tensors = {name: x.to(dtype) if x.is_floating_point() else x.clone() for name, x in batch.items()}
        control = (
            core.FixedKLController(0.05) if controller == "fixed" else core.AdaptiveKLController(0.05, 0.1, 1000.0)
        )
        data = imported("verl").DataProto.from_dict(tensors=tensors)
        data, metrics = trainer.apply_kl_penalty(data, kl_ctrl=control, kl_penalty=kind)
        return data.batch["token_level_rewards"], metrics, control.value

    expected = results(torch.float64)
    report = patch.verl()
    found = results(torch.float32)
    target = "verl.trainer.ppo.ray_trainer.apply_kl_penalty"
    assert (report.usage[target].calls, report.usage[target].tokens) == (1, 63)
    assert found[0].dtype == torch.float32
    largest(target, found, expected, rtol=2e-6, atol=2e-6, what=kind)


@pytest.mark.parametrize("dtype", [torch.int64, torch.float32])
def test_a_few_rows_at_a_time_are_all_at_once(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(4)
    mask = masks(7, 9, "view", generator).to(dtype)
    first, second = logprobs(4, 7, 9)
    tensors = {
        "response_mask": mask,
        "token_level_scores": torch.randn(7, 9, generator=generator),
        "old_log_probs": first,
        "ref_log_prob": second,
    }
    patch.verl()
    found = []
    for tokens in (1 << 20, 20, 1):
        monkeypatch.setattr(verl_batch, "_CACHED", tokens)
        data = imported("verl").DataProto.from_dict(tensors=dict(tensors))
        data, metrics = trainer.apply_kl_penalty(data, core.FixedKLController(0.1), "low_var_kl")
        found.append((data.batch["token_level_rewards"], metrics["actor/reward_kl_penalty"]))
        assert verl_batch.flags(mask, first).equal(mask != 0)
    for rewards, kl in found[1:]:
        assert rewards.equal(found[0][0])
        assert kl == found[0][1]
    weights = mask.clone()
    weights[6, 0] = 2
    with pytest.raises(verl_batch.NotServed):
        verl_batch.flags(weights, first)  # verl multiplies by it


def test_a_nan_under_the_mask_does_not_reach_the_penalty() -> None:
    first, second = logprobs(4, 2, 3)
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    data = imported("verl").DataProto.from_dict(
        tensors={
            "response_mask": mask,
            "token_level_scores": torch.ones(2, 3),
            "old_log_probs": first.masked_fill(mask == 0, math.nan),
            "ref_log_prob": second,
        }
    )
    patch.verl()
    data, metrics = trainer.apply_kl_penalty(data, core.FixedKLController(0.1))
    assert math.isfinite(metrics["actor/reward_kl_penalty"])
    assert bool((data.batch["token_level_rewards"][mask == 0] == 1).all())


# ---- over a mask -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["int64", "bool", "view", "float32", "int32"])
@pytest.mark.parametrize("axis", [None, -1, 1, 0])
@pytest.mark.parametrize("name", ["masked_sum", "masked_mean"])
def test_sums_and_means(name: str, axis: int | None, kind: str) -> None:
    generator = torch.Generator().manual_seed(5)
    mask = masks(6, 11, kind, generator)
    values = torch.randn(6, 11, generator=generator).masked_fill(mask == 0, math.nan)
    expected = getattr(functional, name)(values.double(), mask, axis)
    report = patch.verl()
    found = getattr(functional, name)(values, mask, axis)
    assert report.usage[f"{TORCH}.{name}"].handed_on == 0
    assert found.dtype == torch.float32
    largest(f"{TORCH}.{name}", found, expected)


@pytest.mark.parametrize("kind", ["int64", "bool", "float32"])
@pytest.mark.parametrize("flag", [True, False])
@pytest.mark.parametrize("name", ["masked_var", "masked_whiten"])
def test_variance_and_whitening(name: str, flag: bool, kind: str) -> None:
    generator = torch.Generator().manual_seed(6)
    mask = masks(6, 11, kind, generator)
    values = 3 + torch.randn(6, 11, generator=generator)
    expected = getattr(functional, name)(values.double(), mask, flag)
    report = patch.verl()
    found = getattr(functional, name)(values, mask, flag)
    assert report.usage[f"{TORCH}.{name}"].handed_on == 0
    if found.ndim:
        found, expected = found[mask != 0], expected[mask != 0]
    largest(f"{TORCH}.{name}", found, expected, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("counted", [0, 1])
@pytest.mark.parametrize("name", ["masked_var", "masked_whiten"])
def test_too_few_for_a_variance_is_verls_error(name: str, counted: int) -> None:
    mask = torch.zeros(2, 3, dtype=torch.long)
    mask[0, :counted] = 1
    expected = outcome(getattr(functional, name), torch.randn(2, 3), mask)
    assert expected[0] is ValueError
    patch.verl()
    assert outcome(getattr(functional, name), torch.randn(2, 3), mask) == expected


def test_a_mean_that_is_trained_is_verls() -> None:
    values = torch.randn(2, 3, requires_grad=True)
    report = patch.verl()
    functional.masked_mean(values, torch.ones(2, 3)).backward()
    assert values.grad is not None
    assert report.usage[f"{TORCH}.masked_mean"].handed_on == 1


# ---- through the trainer ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", sorted({*core.ADV_ESTIMATOR_REGISTRY} - {"optimal_token_baseline", "tir_optimal_token_baseline"})
)
def test_compute_advantage_of_the_trainer_runs_ours(name: str) -> None:
    """By the registry, and for gae and grpo by attribute."""
    generator = torch.Generator().manual_seed(7)
    rows, columns = 12, 8
    mask = masks(rows, columns, "int64", generator)
    index = uids(rows, generator, singletons=False)
    config = CONFIG(adv_estimator=name, gdpo_reward_keys=["accuracy"])
    tensors = {
        "token_level_rewards": torch.randn(rows, columns, generator=generator) * mask,
        "response_mask": mask,
        "values": torch.randn(rows, columns, generator=generator) * mask,
        "prompts": torch.zeros(rows, 2, dtype=torch.long),
        "attention_mask": torch.cat([torch.ones(rows, 2, dtype=torch.long), mask], 1),
    }

    if name == "remax":
        tensors["reward_baselines"] = torch.randn(rows, generator=generator)

    def results() -> list[Tensor]:
        others = {"uid": index, "accuracy": np.arange(rows) % 3}
        data = imported("verl").DataProto.from_dict(
            tensors={key: x.clone() for key, x in tensors.items()}, non_tensors=others
        )
        data = trainer.compute_advantage(data, name, gamma=0.95, lam=0.9, config=config)
        return [data.batch[key] * mask for key in ("advantages", "returns")]

    expected = results()
    report = patch.verl()
    largest("verl.trainer.ppo.ray_trainer.compute_advantage", results(), expected, rtol=2e-5, atol=2e-5, what=name)
    assert report.total.calls == 1
    assert report.total.handed_on == 0

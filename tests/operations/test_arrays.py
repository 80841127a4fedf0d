"""Arrays in, arrays out, with the numbers that tensors give: every public callable that takes tensors.

The callables are found in the modules, so that a new one without a row here fails.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard

import fastreward as fr
from fastreward import losses, recipes
from fastreward.language.define import Definition
from fastreward.recipes import RECIPES

#: Public names that take no tensors: results, a context manager, a module of functions, the language's own classes.
TAKES_NONE = {
    fr: {
        "BackendError",
        "Clip",
        "DivergenceStats",
        "EmaBaseline",
        "Groups",
        "PolicyLoss",
        "TokenStats",
        "backend",
        "balance_partitions",  # gives lists; tests/operations/test_balance.py has its arrays
        "compare",  # gives tensors; tests/compare has its arrays
        "credit_page",
        "losses",
    },
    losses: {"Loss", "Node", "PairTerms", "Terms", "Definition", "define"},
    recipes: {"RECIPES", "Recipe"},
}


def numbers(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) - 1


LOGITS, HIDDEN, HEAD, LABELS = numbers(4, 6, 11), numbers(4, 6, 5), numbers(11, 5), torch.arange(24).reshape(4, 6) % 11
TEACHER = LOGITS.flip(0)
LOGPROBS, OLD, OTHER = numbers(4, 6, seed=1), numbers(4, 6, seed=2), numbers(4, 6, seed=3)
ADVANTAGES = torch.tensor([1.0, -1.0, 0.5, -0.5])
MASK = torch.arange(6) < torch.tensor([[6], [4], [5], [6]])
TOKENS = torch.tensor([[5, 1, 2, 7, 8, 9], [5, 1, 3, 4, 0, 0], [6, 2, 2, 1, 3, 0], [6, 2, 4, 4, 1, 2]])
IDS = torch.tensor([7, 7, -8, -8])


def tree_values(tokens: Any, mask: Any, rewards: Any, group_ids: Any) -> Any:
    tree = fr.PrefixTree(tokens, mask, group_ids)
    values = tree.aggregate(rewards)
    return values, tree.advantages(values, "td"), tree.to_tokens(values)


#: name -> (function, positional arguments, others).
CALLS: dict[str, tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]] = {
    "token_logprobs": (
        fr.token_logprobs,
        (LOGITS, LABELS),
        {"mask": MASK, "temperature": numbers(4, 6).exp(), "outputs": ("logprobs", "entropy", "argmax")},
    ),
    "linear_token_logprobs": (
        fr.linear_token_logprobs, (HIDDEN, HEAD, LABELS), {"bias": HEAD[:, 0].clone(), "mask": MASK},
    ),
    "policy_loss": (
        fr.policy_loss,
        (LOGPROBS, OLD, ADVANTAGES, MASK),
        {"loss": losses.real(), "aggregation": "group-mean", "group_ids": IDS, "weights": OTHER.exp()},
    ),
    "logits_policy_loss": (fr.logits_policy_loss, (LOGITS, LABELS, OLD, ADVANTAGES, MASK), {"ref_logprobs": OTHER}),
    "linear_policy_loss": (fr.linear_policy_loss, (HIDDEN, HEAD, LABELS, OLD, ADVANTAGES, MASK), {}),
    "preference_loss": (
        fr.preference_loss,
        (LOGPROBS, OTHER),
        {"ref_chosen_logprobs": OLD, "ref_rejected_logprobs": OTHER - 1, "chosen_mask": MASK, "rejected_mask": MASK},
    ),
    "correction_weights": (fr.correction_weights, (LOGPROBS, OLD, MASK), {"level": "sequence"}),
    "off_policy_sequence_mask": (
        fr.off_policy_sequence_mask, (LOGPROBS, OLD, ADVANTAGES, MASK), {"threshold": 0.1},
    ),
    "group_advantages": (
        fr.group_advantages,
        (numbers(4, 2), IDS),
        {"center": numbers(4), "component_weights": torch.tensor([1.0, 0.5]), "mask": torch.tensor([1, 1, 1, 0])},
    ),
    "token_rewards": (
        fr.token_rewards, (ADVANTAGES, MASK), {"logprobs": LOGPROBS, "ref_logprobs": OLD, "kl_coef": 0.1, "kl": "k2"},
    ),
    "group_statistics": (
        fr.group_statistics,
        (numbers(4), IDS, ("weighted-mean", "rank", "std")),
        {"weights": numbers(4).exp(), "mask": torch.tensor([1, 1, 1, 0])},
    ),
    "token_divergence": (
        fr.token_divergence,
        (LOGITS, TEACHER),
        {"labels": LABELS, "mask": MASK, "outputs": ("entropy", "logprobs", "top1_agreement")},
    ),
    "linear_divergence": (
        fr.linear_divergence,
        (HIDDEN, HEAD, HIDDEN.flip(0), HEAD.flip(0)),
        {"teacher_bias": HEAD[:, 0].clone(), "mask": MASK},
    ),
    "value_loss": (fr.value_loss, (LOGPROBS, OLD, OTHER, MASK), {"loss": "huber"}),
    "whiten": (fr.whiten, (OLD, MASK), {}),
    "loss_normalizer": (fr.loss_normalizer, (MASK,), {"aggregation": "seq-mean-token-sum-norm"}),
    "segment_ids": (fr.segment_ids, (TOKENS,), {"separators": [2, 4], "mask": MASK}),
    "segment_reduce": (fr.segment_reduce, (OLD, TOKENS - 1), {"op": "max", "weights": MASK, "empty": -9.0}),
    "segment_diff": (fr.segment_diff, (OLD,), {"mask": MASK, "first": ADVANTAGES, "rewards": OTHER}),
    "scatter_rewards": (fr.scatter_rewards, (numbers(4, 9), TOKENS - 1), {"mask": MASK, "place": "spread"}),
    "discounted_returns": (fr.discounted_returns, (OLD, MASK), {"gamma": ADVANTAGES}),
    "gae": (fr.gae, (OLD, OTHER, MASK), {"next_values": ADVANTAGES, "lam": 0.5}),
    "lambda_returns": (fr.lambda_returns, (OLD, MASK), {"next_values": OTHER}),
    "vtrace": (fr.vtrace, (LOGPROBS, OLD, OTHER, MASK), {"done": MASK}),
    "PrefixTree": (tree_values, (TOKENS, MASK, ADVANTAGES, IDS), {}),
    "cov_mask": (
        losses.cov_mask, (LOGPROBS, ADVANTAGES, MASK), {"method": "clip", "old_logprobs": OLD, "cov_low": 0.1},
    ),
    "tw_grpo_importance": (losses.tw_grpo_importance, (LOGITS.log_softmax(-1), MASK), {"group_size": 2}),
    "ld_dpo_weights": (losses.ld_dpo_weights, (MASK, MASK.flip(0), 0.4), {}),
}  # fmt: skip


def takes_tensors(module: Any, name: str) -> bool:
    """Whether a public name needs a row: it can be called, and neither is a loss nor takes terms of one."""
    value = getattr(module, name)
    if name in TAKES_NONE[module] or not callable(value) or isinstance(value, Definition):
        return False
    return "Node" not in str(inspect.signature(value).return_annotation)


def test_every_public_callable_has_a_row() -> None:
    for module, rows in ((fr, CALLS), (losses, CALLS), (recipes, RECIPES)):
        public = {name for name in module.__all__ if takes_tensors(module, name)}
        assert public <= rows.keys(), f"{module.__name__}: {public - rows.keys()}"
        assert TAKES_NONE[module] & set(module.__all__) <= set(dir(module))
    wanted = {name for module in (fr, losses) for name in module.__all__ if takes_tensors(module, name)}
    assert CALLS.keys() == wanted


# ----------------------------------------------------------------------------------------------------- forms of arrays
def read_only(x: Any) -> Any:
    x = x.copy()
    x.flags.writeable = False
    return x


def field(x: Any) -> Any:
    """A field of an array of records, whose strides no count of elements makes."""
    records = np.zeros(x.shape, dtype=[("a", "u1"), ("x", x.dtype)])
    records["x"] = x
    return records["x"]


FORMS: dict[str, Callable[[Any], Any]] = {
    "as it is": lambda x: x,
    "Fortran's order": np.asfortranarray,
    "strided": lambda x: np.repeat(x, 2, axis=-1)[..., ::2],
    "backwards": lambda x: x[..., ::-1].copy()[..., ::-1],
    "big-endian": lambda x: x.astype(x.dtype.newbyteorder(">")),
    "read-only": read_only,
    "of records": field,
}


def convert(x: Any, change: Callable[[torch.Tensor], Any]) -> Any:
    """`x` with every tensor changed, in containers too."""
    if isinstance(x, torch.Tensor):
        return change(x)
    if isinstance(x, tuple | list):
        return type(x)(convert(item, change) for item in x)
    if type(x) is dict:
        return {name: convert(value, change) for name, value in x.items()}
    return x


def leaves(x: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Tensors and arrays of a result, by where they are."""
    if isinstance(x, torch.Tensor | np.ndarray | np.generic):
        yield path, x
    elif isinstance(x, tuple | list):
        for i, item in enumerate(x):
            yield from leaves(item, f"{path}[{i}]")
    elif isinstance(x, Mapping):
        for name, value in x.items():
            yield from leaves(value, f"{path}[{name!r}]")
    elif is_dataclass(x):
        for f in fields(x):
            yield from leaves(getattr(x, f.name), f"{path}.{f.name}")
    elif isinstance(x, fr.TokenStats):
        yield from leaves(tuple(x), path)


def assert_arrays_of(found: Any, expected: Any) -> None:
    tensors, arrays = dict(leaves(expected)), dict(leaves(found))
    assert tensors
    assert tensors.keys() == arrays.keys()
    for path, tensor in tensors.items():
        assert isinstance(arrays[path], np.ndarray | np.generic), f"{path}: {type(arrays[path])}"
        assert arrays[path].dtype == tensor.detach().numpy().dtype
        np.testing.assert_allclose(arrays[path], tensor.detach().numpy(), rtol=1e-6, atol=1e-6, err_msg=path)


def seeded(function: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    torch.manual_seed(0)
    return function(*args, **kwargs)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", CALLS)
def test_arrays_in_arrays_out(name: str, form: str) -> None:
    function, args, kwargs = CALLS[name]
    expected = seeded(function, args, kwargs)
    rows_have_steps = form in ("Fortran's order", "strided")

    def given(x: torch.Tensor) -> Any:
        array = FORMS["as it is" if (x is LOGITS or x is TEACHER) and rows_have_steps else form](x.numpy())
        np.testing.assert_array_equal(array, x.numpy())
        return array

    if rows_have_steps and args[0] is LOGITS:  # too large to be copied without a word
        stepped = (FORMS[form](args[0].numpy()), *convert(args[1:], torch.Tensor.numpy))
        with pytest.raises(ValueError, match="unit stride"):
            function(*stepped, **convert(kwargs, torch.Tensor.numpy))
    assert_arrays_of(seeded(function, convert(args, given), convert(kwargs, given)), expected)


@pytest.mark.parametrize("name", CALLS)
def test_float64_arrays_give_the_same_or_are_told_apart(name: str) -> None:
    """NumPy's default dtype: taken where nothing is lost, else refused by argument and dtype."""
    function, args, kwargs = CALLS[name]

    def given(x: torch.Tensor) -> Any:
        return x.double().numpy() if x.dtype == torch.float32 else x.numpy()

    try:
        found = seeded(function, convert(args, given), convert(kwargs, given))
    except TypeError as error:
        assert "float64" in str(error), error  # noqa: PT017
    else:
        for (_, a), (path, b) in zip(leaves(found), leaves(seeded(function, args, kwargs)), strict=True):
            np.testing.assert_allclose(a, b.detach().numpy(), rtol=1e-5, atol=1e-6, err_msg=path)


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_take_arrays(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The recipe's own example, its call made again with arrays."""
    original, calls = getattr(recipes, name), []

    def recorder(*args: Any, **kwargs: Any) -> Any:
        calls.append((args, kwargs))
        return original(*args, **kwargs)

    monkeypatch.setattr(recipes, name, recorder)
    exec(RECIPES[name].example(), {})
    args, kwargs = convert(calls[-1], lambda x: x.detach())
    arrays = convert((args, kwargs), lambda x: FORMS["backwards"](x.numpy()))
    if not any(leaves(arrays)):
        pytest.skip("takes answers as texts, and no arrays")
    assert_arrays_of(seeded(original, *arrays), seeded(original, args, kwargs))


# --------------------------------------------------------------------------------------------------------------- edges
def test_empty_arrays_and_memory_maps(tmp_path: Any) -> None:
    assert fr.group_advantages(np.zeros(0), np.zeros(0, dtype=np.int64)).shape == (0,)
    assert fr.token_logprobs(np.zeros((0, 3, 5), np.float32), np.zeros((0, 3), np.int64)).logprobs.shape == (0, 3)
    np.save(tmp_path / "rewards.npy", ADVANTAGES.numpy())
    mapped = np.load(tmp_path / "rewards.npy", mmap_mode="r")
    found = fr.group_advantages(mapped, group_size=2)
    assert isinstance(found, np.ndarray)
    assert found.tolist() == fr.group_advantages(ADVANTAGES, group_size=2).tolist()


@pytest.mark.parametrize("form", ["backwards", "big-endian", "read-only", "of records"])
def test_out_is_never_a_copy(form: str) -> None:
    out = FORMS[form](np.zeros((4, 6), np.float32))
    with pytest.raises(ValueError, match="out: expected"):
        fr.whiten(OLD.numpy(), out=out)


@pytest.mark.parametrize("dtype", [object, np.longdouble, "U3"])
def test_arrays_that_are_no_numbers_of_torch(dtype: Any) -> None:
    message = r"x: expected a torch tensor \(or a NumPy or CuPy array of numbers\), got ndarray of "
    with pytest.raises(TypeError, match=message):
        fr.whiten(np.ones((2, 3)).astype(dtype))


# ------------------------------------------------------------------------------------------------- distributed tensors
WHAT_TO_PASS = r": expected a plain tensor, got a DTensor .*\.full_tensor\(\), or .*\.to_local\(\) with process_group="


@pytest.fixture(scope="module")
def mesh() -> Iterator[Any]:
    """A mesh of this process alone."""
    if not dist.is_available():
        pytest.skip("torch without torch.distributed")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


@pytest.mark.parametrize("name", CALLS)
def test_distributed_tensors_are_refused(name: str, mesh: Any) -> None:
    """A kernel would take this rank's part for all of it; each argument alone, and the words say what to pass."""
    function, args, kwargs = CALLS[name]

    def distributed(x: torch.Tensor) -> torch.Tensor:
        return DTensor.from_local(x, mesh, [Shard(x.ndim - 1) if x.ndim else Replicate()])

    given = [((*args[:k], convert(x, distributed), *args[k + 1 :]), kwargs) for k, x in enumerate(args)]
    given += [(args, {**kwargs, key: convert(x, distributed)}) for key, x in kwargs.items()]
    for own, named in given:
        if not any(isinstance(x, DTensor) for x in (*own, *named.values())):
            continue
        with pytest.raises(TypeError, match=WHAT_TO_PASS):
            function(*own, **named)


def test_distributed_tensors_inside_of_objects(mesh: Any) -> None:
    ids, rewards = (DTensor.from_local(x, mesh, [Replicate()]) for x in (IDS, ADVANTAGES))
    for call in (
        lambda: fr.Groups(ids),
        lambda: fr.Groups.by(ids, ids),
        lambda: fr.EmaBaseline()(rewards, IDS),
        lambda: fr.EmaBaseline()(ADVANTAGES, ids),
        lambda: fr.PrefixTree(TOKENS, MASK, IDS).aggregate(rewards),
        lambda: fr.policy_loss(LOGPROBS, OLD, ADVANTAGES, MASK, loss=losses.real(), group_ids=ids),
        lambda: fr.rewards.clip(rewards, 0.0, 1.0),
    ):
        with pytest.raises(TypeError, match=WHAT_TO_PASS):
            call()

"""group_advantages against the float64 reference, and the trainers' conventions."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from criterion import assert_as_good_as_torch
from hypothesis import given, settings
from hypothesis import strategies as st
from raw_checks import check_group_corners

import fastreward as fr
from fastreward.cpu import group as cpu
from fastreward.reference import group as reference
from fastreward.reference.group import group_advantages as truth_of

CENTERS = ["mean", "leave-one-out", "length-weighted", "second-max", "none"]
INFINITY = float("inf")
SCALES = ["std", "batch-std", "max", "none"]


@pytest.fixture(params=["cpu", "reference"])
def _backend(request: pytest.FixtureRequest):
    with fr.backend(request.param):
        yield


def check(rewards: torch.Tensor, *args: Any, **options: Any) -> torch.Tensor:
    got, truth = fr.group_advantages(rewards, *args, **options), truth_of(rewards, *args, **options)
    assert got.dtype == torch.float32
    assert_as_good_as_torch(got, truth, truth, str(options))
    return got


@pytest.mark.usefixtures("_backend")
class TestNumbers:
    @pytest.mark.parametrize(("center", "scale"), list(itertools.product(CENTERS, SCALES)))
    @pytest.mark.parametrize("normalize", ["sum-then-normalize", "normalize-then-sum"])
    def test_every_center_and_scale(self, center: str, scale: str, normalize: str) -> None:
        rewards = torch.randn(24, 3)
        rewards[torch.rand(24, 3) < 0.2] = torch.nan
        rewards[5] = torch.nan
        lengths = torch.randint(1, 50, (24,)) if center == "length-weighted" else None
        ids = torch.randint(0, 6, (24,)) * 1_000_003 - 5
        check(
            rewards,
            ids,
            center=center,
            scale=scale,
            normalize=normalize,
            lengths=lengths,
            component_weights=[1, 0.5, 2],
        )
        check(rewards[:, 0].clone(), ids, center=center, scale=scale, lengths=lengths)

    @pytest.mark.parametrize("singleton", ["zero", "raw", "nan"])
    def test_singletons(self, singleton: str) -> None:
        got = check(torch.tensor([1.0, 2.0, 4.0]), ["a", "b", "b"], singleton=singleton)
        assert {"zero": got[0] == 0, "raw": got[0] == 1, "nan": torch.isnan(got[0])}[singleton]

    @pytest.mark.parametrize("normalize", ["sum-then-normalize", "normalize-then-sum"])
    def test_raw_singletons_of_weighted_components(self, normalize: str) -> None:
        """The second component of group b has one score: normalised on its own, that is a singleton too."""
        rewards = torch.tensor([[1.0, 3.0], [2.0, torch.nan], [4.0, 5.0], [torch.nan, 7.0]])
        options = {"singleton": "raw", "component_weights": [2.0, -0.5], "scale": "none", "normalize": normalize}
        got = check(rewards, ["a", "b", "b", "c"], **options)
        b = [-0.75, 0.75] if normalize == "sum-then-normalize" else [-2.0, 2.0 - 2.5]
        assert got.tolist() == [0.5, *b, -3.5]

    @pytest.mark.parametrize(("ddof", "eps", "inside"), [(1, 1e-4, False), (0, 1e-8, False), (1, 1e-3, True)])
    def test_std_conventions(self, ddof: int, eps: float, inside: bool) -> None:
        check(torch.randn(32), group_size=8, ddof=ddof, eps=eps, eps_inside=inside)

    def test_given_center_and_scale(self) -> None:
        check(torch.randn(8), group_size=4, center=torch.randn(8), scale=torch.rand(8) + 0.5)

    def test_constant_groups_are_exactly_zero(self) -> None:
        assert not check(torch.full((16,), 0.1), group_size=8).any()

    def test_low_variance_far_from_zero(self) -> None:
        """E[x^2] - E[x]^2 loses everything here (verl#6348)."""
        check(1e6 + torch.randn(64).double() * 1e-3, group_size=8)

    def test_corners(self, request: pytest.FixtureRequest) -> None:
        check_group_corners({"cpu": cpu, "reference": reference}[request.node.callspec.params["_backend"]], "cpu")

    def test_strided_arguments(self) -> None:
        """Every per-rollout argument is read by its own strides, rewards by rows and by columns."""
        rewards, wide = torch.randn(3, 12).T, torch.rand(12, 5) + 0.5
        options = {"component_weights": torch.tensor([1.0, 9.0, -0.5, 9.0, 2.0, 9.0])[::2], "group_size": 4}
        check(rewards, **options, center=wide[:, 1], scale=wide[:, 3])
        check(rewards, **options, center="length-weighted", lengths=(wide[:, 2] * 10).long())
        check(rewards[:, 1], torch.tensor([3, 0, 5, 0] * 6)[::2], center=wide[:, 0].double(), scale="std")

    def test_mask_says_who_is_there(self) -> None:
        rewards, mask = torch.randn(12, 2), torch.arange(12) % 3
        absent = rewards.clone()
        absent[mask == 0] = torch.nan
        rewards[mask == 0] = torch.inf  # does not matter
        center = torch.randn(12).masked_fill(mask == 0, torch.nan)
        for form in (mask, mask.bool(), mask.float(), mask.double()):
            for options in ({}, {"center": center}, {"scale": "batch-std", "normalize": "normalize-then-sum"}):
                got = fr.group_advantages(rewards, group_size=6, mask=form, **options)
                assert torch.equal(got, check(absent, group_size=6, **options))
                assert not got[mask == 0].any()
                assert got[mask != 0].all()

    @pytest.mark.parametrize("what", ["center", "scale", "lengths"])
    def test_what_belongs_to_unscored_rollouts_does_not_matter(self, what: str) -> None:
        rewards = torch.tensor([1.0, torch.nan, 4.0, 2.0, torch.nan, torch.nan])
        given = torch.tensor([1.0, torch.nan, 2.0, 3.0, torch.inf, -1.0])
        options = {what: given} | ({"center": "length-weighted"} if what == "lengths" else {})
        got = fr.group_advantages(rewards, group_size=3, **options)
        assert torch.isfinite(got).all()
        assert torch.equal(
            got, fr.group_advantages(rewards, group_size=3, **options | {what: given.nan_to_num(7, 7, 7)})
        )

    @pytest.mark.parametrize("count", [0, 1])
    def test_tiny_batches(self, count: int) -> None:
        assert fr.group_advantages(torch.randn(count), torch.zeros(count, dtype=torch.long)).shape == (count,)


@pytest.mark.parametrize(
    "dtype", [torch.bool, torch.uint8, torch.int8, torch.int32, torch.int64, torch.float16, torch.bfloat16]
)
def test_rewards_of_every_dtype_are_converted_exactly(dtype: torch.dtype) -> None:
    rewards = torch.tensor([[0.0, 1.0], [1.0, 1.0], [3.0, 0.0], [100.0, 7.0]]).to(dtype)
    expected = fr.group_advantages(rewards.double(), group_size=2)
    assert expected.all()
    assert torch.equal(fr.group_advantages(rewards, group_size=2), expected)
    large = torch.tensor([2**53, 2**53 - 1])  # a float32 would take them for equal
    assert fr.group_advantages(large, group_size=2, scale="none").tolist() == [0.5, -0.5]


def test_strings_integers_and_sizes_agree() -> None:
    rewards = torch.randn(4096)
    by_size = fr.group_advantages(rewards, group_size=8)
    names = [f"uid-{i // 8}" for i in range(4096)]
    assert torch.equal(by_size, fr.group_advantages(rewards, names))
    assert torch.equal(by_size, fr.group_advantages(rewards, torch.arange(4096) // 8 * 977))
    extremes = torch.tensor([-(2**63), 2**63 - 1])[torch.arange(4096) % 2]
    assert torch.equal(fr.group_advantages(rewards, extremes), fr.group_advantages(rewards, ["a", "b"] * 2048))


def test_members_need_not_be_neighbours() -> None:
    rewards, ids = torch.randn(40), torch.randint(0, 7, (40,))
    order = torch.randperm(40)
    shuffled = fr.group_advantages(rewards[order], ids[order])
    assert torch.allclose(fr.group_advantages(rewards, ids)[order], shuffled, atol=1e-6)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.floats(-1e3, 1e3, width=32), st.integers(0, 4)), min_size=1, max_size=40))
def test_any_batch(rows: list[tuple[float, int]]) -> None:
    rewards = torch.tensor([r for r, _ in rows])
    check(rewards, torch.tensor([g for _, g in rows]), scale="none")


def test_trl_convention() -> None:
    """TRL 1.16: nan-aware mean and std (ddof 1) per contiguous group, + 1e-4, unscored rows 0."""
    rewards = torch.randn(12)
    grouped = rewards.view(-1, 4)
    expected = ((grouped - grouped.mean(1, keepdim=True)) / (grouped.std(1, keepdim=True) + 1e-4)).flatten()
    assert torch.allclose(fr.group_advantages(rewards, group_size=4, eps=1e-4), expected, atol=1e-6)


@pytest.mark.parametrize(
    ("error", "message", "arguments"),
    [
        (ValueError, "group_ids, group_size: expected exactly one", {}),
        (ValueError, "group_ids, group_size: expected exactly one", {"group_ids": [0] * 6, "group_size": 2}),
        (ValueError, "group_size: expected a positive divisor of the 6 rollouts, got 4", {"group_size": 4}),
        (ValueError, r"group_ids: expected 6 ids", {"group_ids": ["a"]}),
        (
            ValueError,
            r"center: expected one of.*did you mean 'leave-one-out'",
            {"group_size": 2, "center": "leave_one_out"},
        ),
        (ValueError, r"lengths: needed for center='length-weighted'", {"group_size": 2, "center": "length-weighted"}),
        (ValueError, r"lengths: needed .* and only for it", {"group_size": 2, "lengths": torch.ones(6)}),
        (ValueError, r"component_weights: expected shape \[1\]", {"group_size": 2, "component_weights": [1, 2]}),
        (
            TypeError,
            r"group_ids: expected hashable labels: unhashable type: 'list'",
            {"group_ids": [[1], [1], [2], [2], [3], [3]]},
        ),
        (TypeError, r"group_ids: expected integers \[B\] or a sequence of hashables, got 3", {"group_ids": 3}),
        (TypeError, r"group_size: expected an integer \(rollouts of a group\), got 2\.0", {"group_size": 2.0}),
        (TypeError, r"ddof: expected an integer", {"group_size": 2, "ddof": "a"}),
        (TypeError, r"rewards: expected real numbers, got complex64", {"group_size": 2, "rewards": torch.ones(6) * 1j}),
        (
            ValueError,
            r"rewards: expected finite numbers, or NaN for what is not scored, got -inf at index \[4, 1\]",
            {"group_size": 2, "rewards": torch.tensor([[1, 2]] * 4 + [[3, -INFINITY]] * 2)},
        ),
        (
            ValueError,
            r"lengths: expected finite numbers >= 0, got -2\.0 at index \[3\]",
            {"group_size": 2, "center": "length-weighted", "lengths": torch.tensor([1, 0, 1, -2, 1, 1])},
        ),
        (
            ValueError,
            r"lengths: expected finite numbers >= 0, got nan at index \[1\]",
            {
                "group_size": 2,
                "center": "length-weighted",
                "lengths": torch.tensor([1, INFINITY - INFINITY, 1, 1, 1, 1]),
            },
        ),
        (
            ValueError,
            r"center: expected finite numbers, got inf at index \[0\]",
            {"group_size": 2, "center": torch.full((6,), INFINITY)},
        ),
        (
            ValueError,
            r"scale: expected finite numbers, got inf at index \[0\]",
            {"group_size": 2, "scale": torch.full((6,), INFINITY)},
        ),
        (
            ValueError,
            r"component_weights: expected finite numbers, got nan at index \[0\]",
            {"group_size": 2, "component_weights": torch.tensor([float("nan")])},
        ),
        (
            ValueError,
            r"component_weights\[0\]: expected a finite number, got nan",
            {"group_size": 2, "component_weights": [float("nan")]},
        ),
        (
            TypeError,
            r"component_weights\[0\]: expected a real number",
            {"group_size": 2, "component_weights": [torch.ones(()) * 1j]},
        ),
        (TypeError, "component_weights: expected a tensor or a sequence", {"group_size": 2, "component_weights": 1.0}),
        (
            TypeError,
            "lengths: expected real numbers, got complex64",
            {"group_size": 2, "center": "length-weighted", "lengths": torch.ones(6) * 1j},
        ),
        (
            ValueError,
            r"center: expected finite numbers, got inf at index \[0\]",
            {"group_size": 2, "center": torch.full((6,), 1e39, dtype=torch.float64)},
        ),
        (ValueError, r"mask: expected shape \[6\] \(one per rollout\)", {"group_size": 2, "mask": torch.ones(6, 1)}),
    ],
)
def test_messages(error: type[Exception], message: str, arguments: dict[str, Any]) -> None:
    with pytest.raises(error, match=message):
        fr.group_advantages(**{"rewards": torch.randn(6), **arguments})


@pytest.mark.parametrize("ids", [torch.tensor([7, -1, 7, -1, 2, 2]), ["a", "b", "a", "b", "c", "c"]])
def test_compiles_in_one_graph(ids: Any) -> None:
    rewards = torch.randn(6)
    compiled = torch.compile(fr.group_advantages, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(rewards, ids), fr.group_advantages(rewards, ids))


def test_opcheck() -> None:
    arguments = (
        torch.randn(6, 2),
        torch.tensor([0, 0, 1, 1, 1, 2]),
        0,
        None,
        None,
        None,
        None,
        "mean|std|zero|sum-then-normalize",
        1,
        1e-6,
        None,
        False,
        "cpu",
    )
    torch.library.opcheck(torch.ops.fastreward.group_advantages, arguments)


def test_numpy_and_uid_arrays() -> None:
    np = pytest.importorskip("numpy")
    uids = np.array(["a", "b", "a", "b"], dtype=object)
    got = fr.group_advantages(np.array([1.0, 2.0, 3.0, 5.0]), uids)
    assert isinstance(got, np.ndarray)
    assert np.allclose(got, [-0.7071, -0.7071, 0.7071, 0.7071], atol=1e-4)

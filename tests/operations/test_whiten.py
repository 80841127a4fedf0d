"""whiten against the float64 reference, verl's formula, and its bits."""

from __future__ import annotations

import pytest
import torch
from criterion import MASK_DTYPES, assert_as_good_as_torch
from raw_checks import check_whiten_corners

import fastreward as fr
from fastreward.cpu import whiten as cpu
from fastreward.reference import whiten as reference
from fastreward.reference.whiten import whiten as truth_of

BUFFER = torch.randn(4)


@pytest.fixture(params=["cpu", "reference"])
def _backend(request: pytest.FixtureRequest):
    with fr.backend(request.param):
        yield


@pytest.mark.usefixtures("_backend")
@pytest.mark.parametrize("shift_mean", [True, False])
@pytest.mark.parametrize("mask_dtype", [None, *MASK_DTYPES])
@pytest.mark.parametrize("shape", [(5, 1031), (3, 4, 7), (300,)])
def test_numbers(shape: tuple[int, ...], mask_dtype: torch.dtype | None, shift_mean: bool) -> None:
    x = torch.randn(shape) * 5 + 1000
    mask = None if mask_dtype is None else (torch.rand(shape) > 0.4).to(mask_dtype)
    if mask is not None:
        x[mask == 0] = torch.nan
    truth = truth_of(x, mask, shift_mean=shift_mean, ddof=0, eps=1e-3)
    assert_as_good_as_torch(fr.whiten(x, mask, shift_mean=shift_mean, ddof=0, eps=1e-3), truth, truth)


def test_corners() -> None:
    for module in (cpu, reference):
        check_whiten_corners(module, "cpu")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_converted_exactly(dtype: torch.dtype) -> None:
    x, out = torch.randn(4, 9).to(dtype), torch.empty(4, 9)
    assert torch.equal(fr.whiten(x), fr.whiten(x.float()))
    assert torch.equal(fr.whiten(x, out=out), out)
    assert out.std() == pytest.approx(1.0)


@pytest.mark.usefixtures("_backend")
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("inplace", [False, True])
def test_values_that_are_not_finite(value: float, inplace: bool) -> None:
    """Where they count they are an error, before anything is written; under the mask they are nothing."""
    x, mask = torch.randn(3, 5), torch.ones(3, 5)
    x[1, 2] = value
    before = x.clone()
    with pytest.raises(
        ValueError, match=rf"x: expected finite values where mask is set, got {value} at index \[1, 2\]"
    ):
        fr.whiten(x, mask, out=x if inplace else None)
    with pytest.raises(ValueError, match="x: expected finite values"):
        fr.whiten(x, out=x if inplace else None)
    torch.testing.assert_close(x, before, rtol=0, atol=0, equal_nan=True)
    mask[1, 2] = 0
    assert fr.whiten(x, mask).isfinite().all()


def test_equals_verls_masked_whiten() -> None:
    x, mask = torch.randn(8, 100), (torch.rand(8, 100) > 0.3).float()
    mean = (x * mask).sum() / mask.sum()
    variance = ((x - mean) ** 2 * mask).sum() / mask.sum() * mask.sum() / (mask.sum() - 1)
    expected = (x - mean) * torch.rsqrt(variance + 1e-8) * mask
    assert torch.allclose(fr.whiten(x, mask), expected, atol=1e-5)


@pytest.mark.usefixtures("threads")
def test_bits_over_threads_and_right_padding() -> None:
    x, mask = torch.randn(64, 3000), torch.rand(64, 3000) > 0.2
    first = fr.whiten(x, mask)
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        assert torch.equal(fr.whiten(x, mask), first)
    wide = fr.whiten(torch.nn.functional.pad(x, (0, 99)), torch.nn.functional.pad(mask, (0, 99)))
    assert torch.equal(wide[:, :3000], first)


def test_out_and_in_place() -> None:
    x = torch.randn(16, 500)
    expected, out = fr.whiten(x), torch.empty(16, 500)
    assert fr.whiten(x, out=out) is out
    assert torch.equal(out, expected)
    assert fr.whiten(x, out=x) is x
    assert torch.equal(x, expected)


@pytest.mark.parametrize("inplace", [False, True])
def test_autograd_sees_what_out_has_overwritten(inplace: bool) -> None:
    leaf = torch.randn(4, 5, requires_grad=True)
    needed = leaf.exp()  # whose backward reads its own result
    with torch.no_grad():
        fr.whiten(needed if inplace else torch.randn(4, 5), out=needed)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        needed.sum().backward()


def test_compiles_in_one_graph() -> None:
    x, out = torch.randn(16, 500), torch.empty(16, 500)
    expected = fr.whiten(x)

    def fresh(x: torch.Tensor) -> torch.Tensor:
        return fr.whiten(x * 1)

    def into(x: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        return fr.whiten(x, out=out)

    assert torch.equal(torch.compile(fresh, fullgraph=True, backend="aot_eager")(x), expected)
    compiled = torch.compile(into, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x, out), expected)
    assert torch.equal(out, expected)
    assert torch.equal(compiled(x, x), expected)
    assert torch.equal(x, expected)


@pytest.mark.parametrize(
    ("error", "message", "arguments"),
    [
        (
            ValueError,
            r"mask: expected at least 2 counted positions for ddof=1, got 1",
            {"mask": torch.tensor([1, 0, 0])},
        ),
        (ValueError, r"mask: expected at least 2 counted positions", {"mask": torch.zeros(3)}),
        (ValueError, r"mask: expected shape \[3\]", {"mask": torch.zeros(2)}),
        (TypeError, r"x: expected dtype float32, float16, bfloat16, got float64", {"x": torch.zeros(3).double()}),
        (ValueError, r"out: expected shape \[3\]", {"out": torch.zeros(4)}),
        (ValueError, r"out: expected a contiguous tensor", {"out": torch.zeros(6)[::2]}),
        (ValueError, r"out: expected a tensor without requires_grad", {"out": torch.zeros(3, requires_grad=True)}),
        (ValueError, r"out: .*memory that overlaps a part of x", {"x": BUFFER[:3], "out": BUFFER[1:]}),
        (TypeError, r"ddof: expected an integer", {"ddof": 0.5}),
    ],
)
def test_messages(error: type[Exception], message: str, arguments: dict[str, torch.Tensor]) -> None:
    with pytest.raises(error, match=message):
        fr.whiten(**{"x": torch.randn(3), **arguments})


def test_opcheck() -> None:
    x, mask = torch.randn(4, 9), torch.rand(4, 9) > 0.3
    torch.library.opcheck(torch.ops.fastreward.whiten, (x, mask, True, 1, 1e-8, None, "cpu"))
    torch.library.opcheck(torch.ops.fastreward.whiten_, (x, mask, True, 1, 1e-8, None, torch.empty(4, 9), "cpu"))
    torch.library.opcheck(torch.ops.fastreward.whiten_, (None, mask, True, 1, 1e-8, None, x.clone(), "cpu"))


def test_numpy_in_numpy_out() -> None:
    np = pytest.importorskip("numpy")
    assert isinstance(fr.whiten(np.random.default_rng(0).normal(size=(3, 5)).astype(np.float32)), np.ndarray)
    frozen = np.zeros(3, np.float32)
    frozen.flags.writeable = False
    with pytest.raises(ValueError, match="out: expected an array that may be written to"):
        fr.whiten(np.arange(3, dtype=np.float32), out=frozen)

"""The test criterion: no further from float64 truth than the same computation in torch at the input's dtype, + 1e-6."""

from __future__ import annotations

import torch
from torch import Tensor

#: What a mask may be (bool, integer or float).
MASK_DTYPES = (
    *(torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64),
    *(torch.float16, torch.bfloat16, torch.float32, torch.float64),
)


def assert_as_good_as_torch(
    got: Tensor, truth: Tensor, torch_same_dtype: Tensor, what: str = "", slack: float = 1e-6
) -> None:
    """Compares where the truth is finite; elsewhere NaN and infinities must be the very same."""
    assert got.shape == truth.shape, f"{what}: shape {list(got.shape)}, expected {list(truth.shape)}"
    got, truth, same = got.detach().double(), truth.detach().double(), torch_same_dtype.detach().double()
    finite = torch.isfinite(truth)
    assert torch.equal(torch.isnan(got), torch.isnan(truth)), f"{what}: NaN in other places"
    infinite = torch.isinf(truth)
    assert torch.equal(got[infinite], truth[infinite]), f"{what}: infinities differ"
    if not finite.any():
        return
    error = (got - truth)[finite].abs().max().item()
    usable = finite & torch.isfinite(same)
    torch_error = (same - truth)[usable].abs().max().item() if usable.any() else 0.0
    scale = max(1.0, truth[finite].abs().max().item())
    assert error <= torch_error + slack * scale, f"{what}: error {error:.3e}, torch's {torch_error:.3e}"


def close_to_one_process(got: Tensor, expected: Tensor, what: str = "") -> None:
    """What ranks give is within 1e-6 of what one process gives, or a rounding of the dtype; integers are equal."""
    assert got.dtype == expected.dtype, f"{what}: {got.dtype}, expected {expected.dtype}"
    if not got.dtype.is_floating_point:
        assert torch.equal(got, expected), f"{what}: {got} instead of {expected}"
        return
    rounding = torch.finfo(got.dtype).eps
    torch.testing.assert_close(
        got, expected, rtol=rounding, atol=1e-6, equal_nan=True, msg=lambda text: f"{what}: {text}"
    )

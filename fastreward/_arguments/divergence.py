"""What a call of token_divergence gives every backend besides the logits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor


class DivergenceCall(NamedTuple):
    """What a backend is given besides the logits of both sides."""

    labels: Tensor  # [N] i64; outside [0, V): no label
    inv_temperature: float | Tensor  # a number or f64 [N]
    inv_teacher_temperature: float | Tensor
    mask: Tensor | None  # [N] bool; False: the row is not read, everything of it is 0
    parameters: Sequence[float]  # of the divergence

    def rows(self, start: int, count: int) -> DivergenceCall:
        """Of rows start .. start + count."""

        def own(x: Any) -> Any:
            return x[start : start + count] if isinstance(x, Tensor) and x.ndim else x

        labels, inverse, of_teacher, mask, parameters = self
        return DivergenceCall(own(labels), own(inverse), own(of_teacher), own(mask), parameters)

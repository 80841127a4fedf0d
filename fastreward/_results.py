"""What the losses return."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from fastreward._layout import METRICS


class Metrics(Mapping[str, Tensor]):
    """A loss's metrics: one device tensor `values_tensor` [M] f32, read by name without a host synchronisation."""

    def __init__(self, values: Tensor, names: tuple[str, ...] = METRICS) -> None:
        self.values_tensor, self.names = values, names

    def __getitem__(self, name: str) -> Tensor:
        return self.values_tensor[self.names.index(name)] if name in self.names else self._missing(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)

    def __repr__(self) -> str:
        return f"Metrics({', '.join(self.names)})"

    def floats(self) -> dict[str, float]:
        """All of them as Python floats, in one transfer."""
        return dict(zip(self.names, self.values_tensor.tolist(), strict=True))

    def _map_tensors(self, function: Callable[[Tensor], Any]) -> Metrics:
        return Metrics(function(self.values_tensor), self.names)

    def _missing(self, name: str) -> Tensor:
        raise KeyError(f"no metric {name!r}; there are {', '.join(self.names)}")


@dataclass(frozen=True, slots=True)
class PolicyLoss:
    """loss: scalar f32 with gradient; metrics: by name; token_loss: before aggregation, if asked for."""

    loss: Tensor
    metrics: Metrics
    token_loss: Tensor | None = None

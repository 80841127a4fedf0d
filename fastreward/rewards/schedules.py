"""Weights of rewards that change while a run goes on: annealed ones, and multipliers of constraints."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from fastreward._arguments import check

Shape = Literal["linear", "cosine", "exponential"]


def anneal(step: int, steps: int, *, start: float = 1.0, end: float = 0.0, shape: Shape = "linear") -> float:
    """A weight that goes from `start` at step 0 to `end`.

    linear, cosine: at step `steps`, and stays. exponential: end + (start - end) e^(-step / steps), with which
    Trust-GRPO (SophiaVL-R1, arXiv 2505.17018) fades the reward of the thinking out.
    """
    check.choice("shape", shape, ("linear", "cosine", "exponential"))
    at = check.not_negative("step", step) / check.positive("steps", steps)
    done = min(at, 1.0)
    left = {"linear": 1.0 - done, "cosine": 0.5 * (1.0 + math.cos(math.pi * done)), "exponential": math.exp(-at)}[shape]
    return end + (start - end) * left


class LagrangeMultipliers:
    """Weights of constrained rewards, which grow while a constraint is missed (arXiv 2310.04373, constrained RLHF).

    mu_k = sigmoid(lambda_k), or tanh(lambda_k) for "equal" constraints, whose weight may be negative. `update` takes a
    step of gradient descent with momentum on sum_k mu_k (mean R_k - threshold_k), so that mu_k falls where the mean is
    above its threshold and rises below it. `weights` are those of the advantages (or rewards):
    (K - sum mu) of what is not constrained, and mu_k of each constrained one; normalise each first, as
    `group_advantages` or `whiten` do.

    Args:
        thresholds: [K], what the mean of each constrained reward should be.
        kind: "at-least", or "equal".
        lr, momentum: of the descent (the code's: 1e-2, 0.1).
    """

    def __init__(
        self,
        thresholds: Sequence[float],
        *,
        kind: Literal["at-least", "equal"] = "at-least",
        lr: float = 1e-2,
        momentum: float = 0.1,
    ) -> None:
        check.choice("kind", kind, ("at-least", "equal"))
        self.thresholds = torch.tensor([check.finite("thresholds", x) for x in thresholds], dtype=torch.float64)
        self.kind, self.lr, self.momentum = kind, check.positive("lr", lr), check.not_negative("momentum", momentum)
        self._lambda = torch.zeros_like(self.thresholds)
        self._velocity: Tensor | None = None

    @property
    def values(self) -> Tensor:
        """mu, float64 [K]."""
        return self._lambda.tanh() if self.kind == "equal" else self._lambda.sigmoid()

    @property
    def weights(self) -> tuple[float, list[float]]:
        """(weight of what is not constrained, weight of each constrained reward)."""
        mu = self.values
        return float(len(mu) - mu.sum()), mu.tolist()

    def update(self, means: Sequence[float] | Tensor) -> None:
        """A step, from the mean of each constrained reward [K] over the batch (over all ranks, where there are more).

        A mean that is NaN, of a reward that nobody has scored, moves nothing.
        """
        found = torch.as_tensor(means, dtype=torch.float64).detach().cpu()
        check.shape("means", found, self.thresholds.shape, "one per threshold")
        mu = self.values
        slope = 1.0 - mu.square() if self.kind == "equal" else mu * (1.0 - mu)
        gradient = (slope * (found - self.thresholds)).nan_to_num(0.0)
        # As torch.optim.SGD: the first step has no momentum to begin with.
        self._velocity = gradient if self._velocity is None else self.momentum * self._velocity + gradient
        self._lambda = self._lambda - self.lr * self._velocity

    def state_dict(self) -> dict[str, Any]:
        """What `load_state_dict` takes: multipliers and momentum."""
        return {"lambda": self._lambda, "velocity": self._velocity}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state_dict` was taken."""
        check.shape("lambda", state["lambda"], self.thresholds.shape, "one per threshold")
        self._lambda, self._velocity = state["lambda"], state["velocity"]

    def __repr__(self) -> str:
        shown = ", ".join(f"{x:.3g}" for x in self.values.tolist())
        return f"LagrangeMultipliers({self.kind}, mu=[{shown}])"

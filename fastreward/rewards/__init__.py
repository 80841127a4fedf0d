"""Rewards before they are advantages: from scores to tokens, and what becomes of scores before that.

To tokens, compiled, on every backend:
    token_rewards        a score on a token of its sequence, less a KL penalty on each
Element by element, in plain torch, with gradients:
    affine, clip         scale * R + shift; bounds
    sigmoid, logsigmoid  bounded, and bounded above, around a center
    standardize          with a mean and deviation that are given
    tiers, ramp          step functions and linear ones
    overlong             DAPO's length penalty, TRL's and verl's
    denoise              for a verifier's known error rates
Several rewards of a response, [B, K]:
    combine              sum, mean, min, max, product, geometric mean, mean less variance
    gate, priority_gate  a reward that counts only where another one holds
    pareto_mask          the rows that no other dominates
Weights that change during a run:
    anneal               linear, cosine, exponential
    LagrangeMultipliers  of constraints

NaN means "not scored", everywhere.
"""

from __future__ import annotations

from fastreward.rewards.combining import combine, gate, pareto_mask, priority_gate
from fastreward.rewards.schedules import LagrangeMultipliers, anneal
from fastreward.rewards.shaping import (
    affine,
    clip,
    denoise,
    logsigmoid,
    overlong,
    ramp,
    sigmoid,
    standardize,
    tiers,
)
from fastreward.rewards.token_rewards import token_rewards

__all__ = [
    "LagrangeMultipliers",
    "affine",
    "anneal",
    "clip",
    "combine",
    "denoise",
    "gate",
    "logsigmoid",
    "overlong",
    "pareto_mask",
    "priority_gate",
    "ramp",
    "sigmoid",
    "standardize",
    "tiers",
    "token_rewards",
]

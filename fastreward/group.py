"""Group-normalised advantages: rewards of a group's rollouts, centred and scaled."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastreward._arguments import check
from fastreward._arguments.arrays import accepts_arrays
from fastreward._arguments.groups import GroupIds, Membership, membership
from fastreward._arguments.groups import Groups as Groups
from fastreward._arguments.numbers import Number, joined, number, split, stacked
from fastreward._arguments.options import CENTERS, NORMALIZES, SCALES, SINGLETONS, GroupOptions, Normalize, Singleton
from fastreward._runtime.custom_op import custom_op
from fastreward._runtime.dispatch import implementation, select
from fastreward.distributed.ranks import Ranks, refused_together
from fastreward.distributed.rollouts import Rollouts, labels_of_all_ranks

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


@custom_op("group_advantages")
def _group_advantages(
    rewards: Tensor,  # [B, K] f32 or f64
    group_index: Tensor | None,  # [B] i64
    group_size: int,
    lengths: Tensor | None,  # [B] f32
    component_weights: Tensor | None,  # [K] f32
    center_values: Tensor | None,  # [B] f32
    scale_values: Tensor | None,  # [B] f32
    modes: str,  # center, scale, singleton and normalize, joined by "|"
    ddof: int,
    eps: float,
    given_eps: Tensor | None,  # f64 []: instead of it, where the host does not know it
    eps_inside: bool,
    backend: str,
) -> Tensor:  # [B] f32
    center, scale, singleton, normalize = modes.split("|")
    options = GroupOptions(
        center=next(c for c in CENTERS if c == center),
        scale=next(s for s in SCALES if s == scale),
        ddof=ddof,
        eps=joined(eps, given_eps, backend),
        eps_inside=eps_inside,
        singleton=next(s for s in SINGLETONS if s == singleton),
        normalize=next(n for n in NORMALIZES if n == normalize),
    )
    result: Tensor = implementation("group", backend).forward(
        rewards, group_index, group_size, lengths, component_weights, center_values, scale_values, options
    )
    return result


@_group_advantages.register_fake
def _(rewards: Tensor, *_: Any) -> Tensor:
    return rewards.new_empty((rewards.shape[0],), dtype=torch.float32)


@accepts_arrays
@refused_together
def group_advantages(
    rewards: Tensor,
    group_ids: GroupIds | None = None,
    *,
    group_size: int | None = None,
    center: str | Tensor = "mean",
    scale: str | Tensor = "std",
    ddof: int = 1,
    eps: Number = 1e-6,
    eps_inside: bool = False,
    singleton: Singleton = "zero",
    lengths: Tensor | None = None,
    component_weights: Tensor | Sequence[Number] | None = None,
    normalize: Normalize = "sum-then-normalize",
    mask: Tensor | None = None,
    process_group: ProcessGroup | None = None,
) -> Tensor:
    """Advantages of rollouts against their own group: (reward - center) / scale. GRPO by default (arXiv 2402.03300).

    Args:
        rewards: [B] or [B, K] components, finite; NaN = not scored. A rollout without any score gets advantage 0 and
            counts in no statistic. float32 or float64; bool, integers and half precision are converted, exactly. With
            `Groups` over turns in their shape, [B, S] or [B, S, K]; what is [B] below is then [B, S] too.
        group_ids: integers [B], or any sequence of B hashables (uid strings), or `Groups`; groups need not be
            contiguous.
        group_size: instead of group_ids, equal contiguous groups of this size.
        center: "mean", "leave-one-out" (RLOO, arXiv 2402.14740), "length-weighted" (OPO, arXiv 2505.23585; needs
            lengths; a group without any length gets 0), "second-max" (the best of the others), "none", or a baseline
            [B].
        scale: "std" of the group, "batch-std" of all scored rollouts, "max" (largest distance from the center), "none"
            (Dr.GRPO, arXiv 2503.20783), or a divisor [B].
        ddof, eps, eps_inside: std is sqrt(var) with `ddof`, divided by (std + eps), or by sqrt(var + eps); eps is a
            number or a 0-d tensor. A reward equal to its center gives 0 whatever the divisor, so eps may be 0; a group
            of no more than ddof gives 0.
        singleton: a group with one scored rollout gives "zero", its "raw" reward, or "nan", where center or scale is a
            statistic of the group; where neither is, it is like any other.
        lengths: [B] response lengths, at least 0, for center="length-weighted".
        component_weights: [K], default 1.
        normalize: "sum-then-normalize", or "normalize-then-sum" (each component on its own; GDPO, arXiv 2601.05242).
        mask: [B], nonzero = the rollout is there; others are as if not scored.
        process_group: groups may straddle ranks: integers and strings name the same group on each, group_size those of
            a rank. Every rank gets the bits that one process would get from all rollouts in rank order: what crosses is
            each rank's rewards, ids and what else is per rollout (16 bytes each, more with components, lengths, ...);
            the host waits once for how many there are. Batches may differ in size.

    Returns:
        [B] float32, or [B, S]. Statistics are two-pass in float64. Rewards are constants.

    Raises:
        TypeError, ValueError: wrong dtype, shape or name, both or none of group_ids and group_size; on the CPU also
            for values that are not finite (lengths: negative) where a rollout is scored.
    """
    rewards = check.rewards("rewards", rewards)
    groups = membership(group_ids, group_size, rewards, "rewards")
    if rewards.shape != groups.shape and rewards.shape[:-1] != groups.shape:
        shape = "[B] or [B, K]" if not isinstance(group_ids, Groups) else f"{list(groups.shape)} or [..., K]"
        raise ValueError(f"rewards: expected shape {shape}, got {list(rewards.shape)}")
    for name, value, allowed in (("singleton", singleton, SINGLETONS), ("normalize", normalize, NORMALIZES)):
        check.choice(name, value, allowed)
    components = _components(rewards, mask, groups)
    center_name, center_values = _mode("center", center, CENTERS, components, groups)
    scale_name, scale_values = _mode("scale", scale, SCALES, components, groups)
    if (center_name == "length-weighted") != (lengths is not None):
        raise ValueError("lengths: needed for center='length-weighted', and only for it")
    ddof = check.whole("ddof", ddof, "the divisor of a variance is count - ddof")
    rows: Sequence[Tensor | None] = (
        components,
        groups.index,
        None if lengths is None else _per_rollout("lengths", lengths, components, groups, at_least=0.0),
        center_values,
        scale_values,
    )
    everyone = None
    if process_group is not None:
        labels = labels_of_all_ranks(groups.index, group_ids)
        columns = dict(zip(("group_ids", "lengths", "center", "scale"), (labels, *rows[2:]), strict=True))
        everyone = Rollouts(
            "rewards", Ranks.of(process_group), components, columns,
            {
                "group_size": groups.group_size, "center": center_name, "scale": scale_name, "singleton": singleton,
                "normalize": normalize, "ddof": ddof, "eps": eps, "eps_inside": eps_inside,
                "component_weights": component_weights,
            },
        )  # fmt: skip
        rows = [everyone.values, *everyone.columns]
    advantages: Tensor = _group_advantages(
        rows[0],
        rows[1],
        groups.group_size,
        rows[2],
        _weights(component_weights, components),
        rows[3],
        rows[4],
        "|".join((center_name, scale_name, singleton, normalize)),
        ddof,
        *split(number("eps", eps, rewards, check.not_negative)),
        check.flag("eps_inside", eps_inside),
        select("group", rewards),
    )
    return (advantages if everyone is None else everyone.own(advantages)).view(groups.shape)


def _components(rewards: Tensor, mask: Tensor | None, groups: Membership) -> Tensor:
    """[N, K], contiguous; NaN where the mask is 0, and in no group."""
    components = check.constant("rewards", rewards)
    components = components.unsqueeze(-1) if rewards.shape == groups.shape else components
    if mask is not None:
        check.shape("mask", check.tensor("mask", mask), groups.shape, "one per rollout")
        check.same_device("mask", mask, "rewards", rewards)
        components = components.masked_fill((check.constant("mask", mask) == 0).unsqueeze(-1), torch.nan)
    if groups.partial and groups.index is not None:
        components = components.masked_fill((groups.index < 0).view(*groups.shape, 1), torch.nan)
    if check.values_checked(components) and not math.isfinite(
        components.nansum().item()
    ):  # one pass finds whether, two where
        check.every("rewards", ~components.isinf(), components, "finite numbers, or NaN for what is not scored")
    return components.flatten(0, -2).contiguous()


def _mode(
    name: str, value: str | Tensor, allowed: Sequence[str], components: Tensor, groups: Membership
) -> tuple[str, Tensor | None]:
    if isinstance(value, Tensor):
        return "tensor", _per_rollout(name, value, components, groups)
    check.choice(name, value, [mode for mode in allowed if mode != "tensor"])
    return value, None


def _per_rollout(name: str, x: Tensor, components: Tensor, groups: Membership, at_least: float = -math.inf) -> Tensor:
    """f32 [N], contiguous; finite and no less than `at_least` where a rollout is scored."""
    x = check.reals(name, x)
    check.shape(name, x, groups.shape, "one per rollout")
    check.same_device(name, x, "rewards", components)
    if check.values_checked(x):
        unscored = components.isnan().all(-1).view(groups.shape)
        lower = "" if at_least == -math.inf else f" >= {at_least:g}"
        check.every(name, (x.isfinite() & (x >= at_least)) | unscored, x, f"finite numbers{lower}")
    return check.constant(name, x).flatten().contiguous()


def _weights(weights: Tensor | Sequence[Number] | None, components: Tensor) -> Tensor | None:
    if weights is None:
        return None
    tensor = weights if isinstance(weights, Tensor) else stacked("component_weights", weights, components, check.finite)
    tensor = check.constant("component_weights", check.reals("component_weights", tensor))
    check.same_device("component_weights", tensor, "rewards", components)
    check.shape("component_weights", tensor, components.shape[1:], "one per reward component")
    if check.values_checked(tensor):
        check.every("component_weights", tensor.isfinite(), tensor, "finite numbers")
    return tensor.contiguous()

"""Advantages: --custom-advantage-function-path; rewards of groups: --custom-reward-post-process-path."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, MutableMapping, Sequence
from typing import Any, Final

import torch
from torch import Tensor

from fastreward._arguments.tokens import broadcast_to_tokens
from fastreward.group import group_advantages
from fastreward.patch.hooks import arguments, chosen, hook, recipe
from fastreward.patch.slime.layout import Layout, joined, parallel
from fastreward.recipes import Recipe
from fastreward.returns import discounted_returns, gae
from fastreward.rewards import token_rewards

#: slime's names of what recipes call otherwise.
_NAMES: Final = {"ref_log_probs": "ref_logprobs", "rollout_log_probs": "rollout_logprobs", "values": "values",
                 "teacher_log_probs": "teacher_logprobs"}  # fmt: skip


@hook("slime", lambda args, rollout_data: sum(map(int, rollout_data["response_lengths"])))
def advantages(args: Any, rollout_data: MutableMapping[str, Any]) -> None:
    """slime's advantages under its advantage_estimator, or a recipe's; sets "advantages" and "returns".

    `args.fastreward_advantages`, or FASTREWARD_SLIME_ADVANTAGES, names a recipe that returns advantages per token or
    per response, with its options: "reinforce_plus_plus(gamma=0.99)", "opd(coef=0.5)". Neither: what slime computes
    (grpo, gspo, cispo: each reward on its tokens; ppo: GAE with args.gamma, args.lambd and the KL in the rewards;
    reinforce_plus_plus; reinforce_plus_plus_baseline). Whitening (normalize_advantages) stays slime's.

    A recipe that compares the responses to one prompt needs "group_ids" in rollout_data, one per sample, and whole
    groups on each data-parallel rank; slime gives neither: name such a recipe in `fastreward_rewards`, for `rewards`.

    Args:
        args: slime's.
        rollout_data: of this rank: rewards (numbers), kl, response_lengths, total_lengths, loss_masks, and where they
            are read log_probs, ref_log_probs, rollout_log_probs, values; lists with one entry for each sample. Under
            context parallelism kl, log-probs and values are slices; so are the results.

    Raises:
        ValueError: no such recipe, or one that needs what rollout_data does not have.
    """
    layout = Layout.of(rollout_data["total_lengths"], rollout_data["response_lengths"], parallel())
    kl = layout.whole(rollout_data["kl"])
    rewards = torch.as_tensor(rollout_data["rewards"], dtype=torch.float32).to(kl.device)
    bounds = layout.whole_bounds(kl.device)
    name, options = chosen("advantages", args, "FASTREWARD_SLIME_ADVANTAGES")
    if name is None:
        own, returns = _slimes(args, rollout_data, layout, rewards, kl, bounds)
    else:
        found = recipe("fastreward_advantages", name, ("advantages", "response advantages"))
        own = returns = _of_recipe(found, options, args, rollout_data, layout, rewards, kl)
    for key, x in (("advantages", own), ("returns", returns)):
        rollout_data[key] = layout.split(layout.own_part(x))


def _slimes(
    args: Any, data: Mapping[str, Any], layout: Layout, rewards: Tensor, kl: Tensor, bounds: Tensor
) -> tuple[Tensor, Tensor]:
    """Advantages and returns [tokens of the whole responses]."""
    if args.advantage_estimator in ("grpo", "gspo", "cispo"):
        spread = broadcast_to_tokens(rewards, kl.shape, bounds)
        return spread, spread
    penalty = -float(args.kl_coef) * kl
    if args.advantage_estimator == "reinforce_plus_plus_baseline":
        both = broadcast_to_tokens(rewards, kl.shape, bounds) + penalty
        return both, both
    if args.advantage_estimator == "reinforce_plus_plus":
        placed = penalty + token_rewards(rewards, joined(data["loss_masks"], kl.device), cu_seqlens=bounds)
        returns = discounted_returns(placed, gamma=float(args.gamma), cu_seqlens=bounds)
        return returns, returns
    if args.advantage_estimator != "ppo":
        raise ValueError(
            f"advantage_estimator: slime's {args.advantage_estimator!r} is not known here; name a recipe in "
            "fastreward_advantages"
        )
    placed = penalty + token_rewards(rewards, torch.ones_like(kl, dtype=torch.bool), cu_seqlens=bounds)
    values = layout.whole(data["values"]).float()
    return gae(placed, values, gamma=float(args.gamma), lam=float(args.lambd), cu_seqlens=bounds)


def _of_recipe(
    found: Recipe,
    options: dict[str, Any],
    args: Any,
    data: Mapping[str, Any],
    layout: Layout,
    rewards: Tensor,
    kl: Tensor,
) -> Tensor:
    """The recipe's advantages, on every token of the whole responses; 0 under the mask where it has no say there."""
    rows = _Rows(layout.lengths, kl.device)
    given = _known(args, data, layout, rows)
    mask = given["mask"]
    given |= {"rewards": rewards, "kl": rows.padded(kl), "lengths": (mask != 0).sum(-1)}
    given["token_rewards"] = token_rewards(rewards, mask) - float(args.kl_coef) * rows.padded(kl) * (mask != 0)
    if found.returns == "response advantages" and "old_logprobs" not in inspect.signature(found.function).parameters:
        del given["mask"]  # of responses there, and all are there
    result = found.function(**arguments("fastreward_advantages", found, given, options))
    return rows.packed(result if result.ndim == 2 else result.unsqueeze(-1).expand(mask.shape))


def _known(args: Any, data: Mapping[str, Any], layout: Layout, rows: _Rows) -> dict[str, Any]:
    """What a recipe may ask for by its names, tokens padded [B, T]; of slime's other keys those of a recipe's name."""
    cut, other = {}, {}
    for key, x in data.items():
        if isinstance(x, list) and x and all(isinstance(entry, Tensor) and entry.ndim for entry in x):
            widths = [entry.shape[0] for entry in x]
            if widths == layout.counts:
                cut[key] = rows.padded(layout.whole(x))
            elif widths == layout.lengths:
                cut[key] = rows.padded(torch.cat(x))
        elif isinstance(x, list) and x and all(isinstance(entry, int | float) for entry in x):
            other[key] = torch.tensor(x, device=rows.device)
        else:
            other[key] = x
    policy = "rollout_log_probs" if getattr(args, "use_rollout_logprobs", False) else "log_probs"
    known = {ours: cut.get(theirs) for theirs, ours in _NAMES.items()}
    known |= {"logprobs": cut.get(policy), "old_logprobs": cut.get(policy)}
    mask = rows.padded(joined(data["loss_masks"], rows.device))
    return other | cut | known | {"mask": mask}


class _Rows:
    """Packed responses as rows [B, T] and back."""

    def __init__(self, lengths: list[int], device: torch.device) -> None:
        self.device = device
        self._shape = (len(lengths), max(lengths, default=0))
        self._there = torch.arange(self._shape[1]) < torch.tensor(lengths).unsqueeze(-1)
        self._there = self._there.to(device)

    def padded(self, packed: Tensor) -> Tensor:
        """[B, T], 0 beyond a response's end."""
        return packed.new_zeros(self._shape).masked_scatter(self._there, packed)

    def packed(self, padded: Tensor) -> Tensor:
        """[tokens]."""
        return padded[self._there]


@hook("slime", lambda args, samples: sum(int(getattr(sample, "response_length", 0)) for sample in samples))
def rewards(args: Any, samples: Sequence[Any]) -> tuple[list[float], list[float]]:
    """slime's normalisation of rewards in their groups, or a recipe's advantages of responses.

    `args.fastreward_rewards`, or FASTREWARD_SLIME_REWARDS, names a recipe that returns advantages per response, with
    its options: "rloo", "opo", "maxrl". Neither: what slime does under rewards_normalization and
    grpo_std_normalization. This runs where slime has all samples of a batch, before ranks share them.

    Args:
        args: slime's.
        samples: slime's, with get_reward_value(args), response_length and group_index (None: n_samples_per_prompt
            samples in a row belong together).

    Returns:
        The rewards as they were, and as they train, in the order of the samples. A response alone in its group gets
        NaN where slime gives NaN.
    """
    raw = [float(sample.get_reward_value(args)) for sample in samples]
    if not raw:
        return raw, raw
    scores, groups = torch.tensor(raw), _groups(args, samples)
    name, options = chosen("rewards", args, "FASTREWARD_SLIME_REWARDS")
    if name is not None:
        found = recipe("fastreward_rewards", name, ("response advantages",))
        lengths = torch.tensor([int(getattr(sample, "response_length", 0)) for sample in samples])
        given = {"rewards": scores, "group_ids": groups, "lengths": lengths}
        return raw, found.function(**arguments("fastreward_rewards", found, given, options)).tolist()
    grouped = args.advantage_estimator in ("grpo", "gspo", "cispo", "reinforce_plus_plus_baseline")
    if not (grouped and args.rewards_normalization):
        return raw, raw
    scaled = args.advantage_estimator != "reinforce_plus_plus_baseline" and args.grpo_std_normalization
    rule: dict[str, Any] = {"scale": "std", "eps": 1e-6, "singleton": "nan"} if scaled else {"scale": "none"}
    return raw, group_advantages(scores, groups, **rule).tolist()


def _groups(args: Any, samples: Sequence[Any]) -> list[Any]:
    named = [sample.group_index for sample in samples if getattr(sample, "group_index", None) is not None]
    if len(named) < len(samples):
        return [i // int(args.n_samples_per_prompt) for i in range(len(samples))]
    return named

"""Published methods under verl's own configuration: every recipe that returns advantages, or a loss of log-probs.

    algorithm.adv_estimator=fastreward.tempo
    actor_rollout_ref.actor.policy_loss.loss_mode=fastreward.dispo

Options stand behind the name, as in a call: "fastreward.dispo(pos_high=5.0)", on a command line of Hydra's in quotes
(loss_mode='"fastreward.dispo(pos_high=5.0)"'). verl makes a dataclass of the actor's configuration, which refuses keys
that it doesn't know; the algorithm's is read as it is, so that an estimator's options may stand there too:
+algorithm.fastreward.eps=1e-5. An option that the method does not have is an error that names those it has.

An estimator's arguments are verl's under their own names: rewards (a response's sum of token_level_rewards),
token_rewards, mask, group_ids (uid), lengths, old_logprobs, ref_logprobs, rollout_logprobs, values, tokens (responses),
tree (a PrefixTree of them), log_sum_sq_probs, greedy_rewards, weights (rollout_is_weights). Any other, such as
step_scores, is looked for under its name in the batch, where a reward function's extra results are.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import torch
from torch import Tensor

from fastreward.patch.verl.aggregation import finished, normalised
from fastreward.patch.verl.batch import flags, lengths, outcomes, over_tokens
from fastreward.patch.verl.replacement import CORE, NotServed, Registration, Replacement
from fastreward.prefix_tree import PrefixTree

if TYPE_CHECKING:
    from fastreward.recipes import Recipe

PREFIX: Final = "fastreward."
_PER_TOKEN, _PER_RESPONSE = "advantages", "response advantages"
#: verl's names of its metrics, and whose sum each is among ours.
_METRICS: Final = {
    "ppo_kl": ("kl_old_k1",),
    "pg_clipfrac": ("clip_fraction_low", "clip_fraction_high"),
    "pg_clipfrac_lower": ("clip_fraction_dual",),
}
#: What a policy loss of verl's is called with, by our names.
_OF_LOSS: Final = ("logprobs", "old_logprobs", "advantages", "mask")


# ------------------------------------------------------------------------------------------------------- the registries
def estimators() -> dict[str, Callable[..., Any]]:
    """Those that verl's ADV_ESTIMATOR_REGISTRY gets."""
    return {PREFIX + r.name: functools.partial(_estimate, r) for r in _recipes(_PER_TOKEN, _PER_RESPONSE)}


def policy_losses() -> dict[str, Callable[..., Any]]:
    """Those that verl's POLICY_LOSS_REGISTRY gets: what they read is what verl passes."""
    from fastreward.patch.hooks import BY_SEQUENCE

    found = [r for r in _recipes("loss") if r.operation == "fastreward.policy_loss" and set(_data(r)) <= {*_OF_LOSS}]
    found = [r for r in found if r.name not in BY_SEQUENCE]
    return {PREFIX + r.name: functools.partial(_lose, r) for r in found}


def _recipes(*returns: str) -> list[Recipe]:
    # Not at the head of the file: verl imports it in the middle of its own import, recipes or not.
    from fastreward.recipes import RECIPES

    return [recipe for recipe in RECIPES.values() if recipe.returns in returns]


def _data(recipe: Recipe) -> list[str]:
    """The required arguments."""
    parameters = inspect.signature(recipe.function).parameters.values()
    return [p.name for p in parameters if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD]


# ----------------------------------------------------------------------------------------------------------- advantages
def _estimate(
    recipe: Recipe,
    token_level_rewards: Tensor,
    response_mask: Tensor,
    config: Any = None,
    index: Any = None,
    batch: Any = None,
    non_tensor_batch: Any = None,
    fastreward: Mapping[str, Any] | None = None,
    **others: Any,
) -> tuple[Tensor, Tensor]:
    """The recipe's advantages on the tokens, for the returns too."""
    options = _plain(None if config is None else config.get("fastreward", None)) | dict(fastreward or {})
    _check_options(recipe, options)
    mask = flags(response_mask, token_level_rewards)
    tensors = {} if batch is None else batch
    given = _Given(token_level_rewards.float(), mask, index, tensors, {**(non_tensor_batch or {}), **others})
    parameters = inspect.signature(recipe.function).parameters
    names = [name for name in parameters if name not in options and name in given and name != "group_size"]
    if recipe.returns == _PER_RESPONSE and "old_logprobs" not in parameters and "mask" in names:
        names.remove("mask")  # it is of responses there, and all are there
    missing = [name for name in _data(recipe) if name not in names and name not in options]
    if missing:
        raise ValueError(f"{PREFIX}{recipe.name} needs {', '.join(missing)}; the batch has {', '.join(sorted(given))}")
    found = recipe.function(**{name: given[name] for name in names}, **options)
    advantages = over_tokens(found, mask) if found.ndim == 1 else found
    return advantages, advantages


class _Given(Mapping[str, Any]):
    """What a batch of verl's has, by the names of the recipes' arguments; made when it is asked for."""

    def __init__(self, rewards: Tensor, mask: Tensor, index: Any, batch: Any, others: Mapping[str, Any]) -> None:
        self._tensors, self._others = batch, others
        self._made: dict[str, Callable[[], Any]] = {
            "rewards": lambda: outcomes(rewards, mask),
            "token_rewards": lambda: rewards,
            "mask": lambda: mask,
            "lengths": lambda: lengths(mask),
        }
        if index is not None:
            self._made["group_ids"] = lambda: _values(index)
        theirs = {
            "old_log_probs": ("old_logprobs", "logprobs"),
            "ref_log_prob": ("ref_logprobs",),
            "rollout_log_probs": ("rollout_logprobs",),
            "teacher_log_probs": ("teacher_logprobs",),
            "responses": ("tokens",),
            "reward_baselines": ("greedy_rewards",),
            "rollout_is_weights": ("weights",),
        }
        for name, ours in theirs.items():
            if self._has(name):
                self._made |= dict.fromkeys(ours, functools.partial(self._named, name))
        if self._has("sum_pi_squared"):
            self._made["log_sum_sq_probs"] = lambda: self._named("sum_pi_squared").log()
        if self._has("responses"):
            self._made["tree"] = lambda: PrefixTree(self["tokens"], mask, self._made.get("group_ids", lambda: None)())

    def __getitem__(self, name: str) -> Any:
        return self._made[name]() if name in self._made else self._named(name)

    def __iter__(self) -> Iterator[str]:
        return iter({*self._made, *map(str, self._tensors.keys()), *map(str, self._others)})

    def __len__(self) -> int:
        return len(list(iter(self)))

    def _has(self, name: str) -> bool:
        return name in self._tensors.keys() or name in self._others  # noqa: SIM118 (of a TensorDict)

    def _named(self, name: str) -> Any:
        if name in self._tensors.keys():  # noqa: SIM118
            return self._tensors[name]
        return _values(self._others[name])


def _values(x: Any) -> Any:
    """An array as a tensor where it holds numbers, as a list where it holds labels."""
    if not isinstance(x, np.ndarray):
        return x
    if x.dtype != object:
        return torch.from_numpy(x) if x.dtype.kind in "fiub" else x.tolist()
    labels = x.tolist()
    return torch.tensor(labels) if all(isinstance(label, int | float) for label in labels) else labels


# --------------------------------------------------------------------------------------------------------------- losses
def _lose(
    recipe: Recipe,
    old_log_prob: Tensor,
    log_prob: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    loss_agg_mode: str = "token-mean",
    config: Any = None,
    rollout_is_weights: Tensor | None = None,
    fastreward: Mapping[str, Any] | None = None,
) -> tuple[Tensor, dict[str, Any]]:
    """The recipe's loss, aggregated as verl's configuration says, with verl's metrics and the recipe's own."""
    options = dict(fastreward or {})
    _check_options(recipe, options)
    mode = options.pop("aggregation", loss_agg_mode)
    try:
        how = normalised(log_prob.shape[-1], mode, **getattr(config, "global_batch_info", {}))
    except NotServed as problem:
        raise ValueError(f"{PREFIX}{recipe.name}: {problem}") from None
    given = dict(zip(_OF_LOSS, (log_prob, old_log_prob, advantages, response_mask), strict=True))
    found = recipe.function(**given, **options, **how.options, weights=rollout_is_weights, empty="zero")
    values = found.metrics.floats()
    if not values["token_count"]:
        values = dict.fromkeys(values, 0.0)
    metrics = values | {name: sum(values.get(x, 0.0) for x in of) for name, of in _METRICS.items()}
    return finished(found, how, (log_prob,)), {f"actor/{name}": x for name, x in metrics.items()}


# -------------------------------------------------------------------------------------------------------------- options
def _check_options(recipe: Recipe, options: Mapping[str, Any]) -> None:
    """That the recipe has them."""
    parameters = inspect.signature(recipe.function).parameters.values()
    known = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY and p.name != "cu_seqlens"]
    unknown = [name for name in options if name not in known]
    if unknown:
        raise ValueError(
            f"{PREFIX}{recipe.name}: no option {', '.join(map(repr, unknown))}; it has {', '.join(known) or 'none'}"
        )


def _plain(options: Any) -> dict[str, Any]:
    """A mapping of OmegaConf's as a dictionary, its lists as lists."""
    if options is None:
        return {}
    if not isinstance(options, Mapping):
        raise ValueError(f"algorithm.fastreward: expected options by name, got {options!r}")
    return {str(k): list(x) if isinstance(x, Sequence) and not isinstance(x, str) else x for k, x in options.items()}


# ----------------------------------------------------------------------------------------------- what chooses in verl's
def get_adv_estimator_fn(stock: Any, name_or_enum: Any) -> Any:
    """verl's, which finds a name of ours with options too."""
    return _found(stock, name_or_enum)


def get_policy_loss_fn(stock: Any, name: Any) -> Any:
    """The same."""
    return _found(stock, name)


def _found(stock: Any, name: Any) -> Any:
    if not _is_ours(name) or "(" not in name:
        return stock(name)
    from fastreward.patch.hooks import parsed

    method, options = parsed(name, name.removeprefix(PREFIX))
    return functools.partial(stock(PREFIX + method), fastreward=options)


def _is_ours(name: Any) -> bool:
    return isinstance(name, str) and name.startswith(PREFIX)


def compute_advantage(
    stock: Any,
    data: Any,
    adv_estimator: Any,
    gamma: float = 1.0,
    lam: float = 1.0,
    num_repeat: int = 1,
    norm_adv_by_std_in_grpo: bool = True,
    config: Any = None,
) -> Any:
    """verl's; an estimator of ours is given the whole batch, as verl does for GDPO alone."""
    if not _is_ours(adv_estimator):
        return stock(data, adv_estimator, gamma, lam, num_repeat, norm_adv_by_std_in_grpo, config)
    verls = stock.__globals__
    if "response_mask" not in data.batch.keys():  # noqa: SIM118 (of a TensorDict)
        data.batch["response_mask"] = verls["compute_response_mask"](data)
    estimate = verls["core_algos"].get_adv_estimator_fn(adv_estimator)
    data.batch["advantages"], data.batch["returns"] = estimate(
        token_level_rewards=data.batch["token_level_rewards"],
        response_mask=data.batch["response_mask"],
        config=config,
        index=data.non_tensor_batch.get("uid"),
        batch=data.batch,
        non_tensor_batch=data.non_tensor_batch,
    )
    return data


_CHOICE: Final = "names with options"
_ADVANTAGE: Final = ("data", "adv_estimator", "gamma", "lam", "num_repeat", "norm_adv_by_std_in_grpo", "config")
REPLACEMENTS: Final = (
    Replacement(
        f"{CORE}.get_adv_estimator_fn", ("name_or_enum",), get_adv_estimator_fn, "itself", _CHOICE, counted=False
    ),
    Replacement(f"{CORE}.get_policy_loss_fn", ("name",), get_policy_loss_fn, "itself", _CHOICE, counted=False),
    Replacement(
        "verl.trainer.ppo.ray_trainer.compute_advantage",
        _ADVANTAGE,
        compute_advantage,
        "itself",
        "the batch for estimators of fastreward's",
        counted=False,
    ),
)
_NAMES: Final = "names for verl's configuration"
REGISTRATIONS: Final = (
    Registration(f"{CORE}.ADV_ESTIMATOR_REGISTRY", estimators, "fastreward.recipes", _NAMES),
    Registration(f"{CORE}.POLICY_LOSS_REGISTRY", policy_losses, "fastreward.recipes", _NAMES),
)

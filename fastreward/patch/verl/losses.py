"""verl's policy losses: value, gradient and metrics of each in one pass, instead of some ninety tensor operations."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import torch
from torch import Tensor

from fastreward import losses
from fastreward.losses import Loss
from fastreward.patch.bindings import Entry
from fastreward.patch.verl import formulas
from fastreward.patch.verl.aggregation import Normalised, check_tokens, finished, normalised
from fastreward.patch.verl.formulas import CLIPPED
from fastreward.patch.verl.replacement import CORE, NotServed, Replacement
from fastreward.policy_loss import policy_loss

Metrics = Mapping[str, tuple[str, ...]]
#: verl's names of its metrics, and whose sum each is among those of `policy_loss`; of none: verl gives 0.
_PPO: Final[Metrics] = {
    "pg_clipfrac": CLIPPED,
    "ppo_kl": ("kl_old_k1",),
    "pg_clipfrac_lower": ("clip_fraction_dual",),
}
_OWN: Final[Metrics] = {name: (name,) for name in ("pg_clipfrac", "ppo_kl", "pg_clipfrac_lower")}
_DPPO: Final[Metrics] = {**_OWN, "ppo_kl": ("kl_old_k1",)}  # the log-ratio within +-20
_KL: Final[Metrics] = {"ppo_kl": ("ppo_kl",)}


@dataclass(frozen=True, slots=True)
class Served:
    """How a policy loss of verl's is computed.

    Attributes:
        loss: of verl's ActorConfig.
        metrics: of the result.
        aggregation: what loss_agg_mode is where it is not given.
        fixed: the aggregation whatever loss_agg_mode says.
        reads_old: whether old log-probs are looked at.
        float32: whether verl's result is that whatever it is given.
        selected: of the configuration, old and new log-probs, advantages and mask, which tokens the loss treats apart.
    """

    loss: Callable[[Any], Loss]
    metrics: Metrics = field(default_factory=dict)
    aggregation: str = "token-mean"
    fixed: str | None = None
    reads_old: bool = True
    float32: bool = False
    selected: Callable[[Any, Tensor, Tensor, Tensor], Tensor] | None = None

    def __call__(
        self,
        stock: Any,
        old_log_prob: Tensor,
        log_prob: Tensor,
        advantages: Tensor,
        response_mask: Tensor,
        loss_agg_mode: str | None = None,
        config: Any = None,
        rollout_is_weights: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Any]]:
        """(loss [] with its gradient for log_prob, verl's metrics as floats)."""
        mode = self.aggregation if loss_agg_mode is None else loss_agg_mode
        return self._computed(old_log_prob, log_prob, advantages, response_mask, mode, config, rollout_is_weights)

    def _computed(
        self, old: Tensor, new: Tensor, advantages: Tensor, mask: Tensor, mode: str, config: Any, weights: Tensor | None
    ) -> tuple[Tensor, dict[str, Any]]:
        _check_config(config)
        constants = (old, advantages) if weights is None else (old, advantages, weights)
        check_tokens(mask, new, *constants)
        if self.fixed == "rows":  # the mean over the rows, those without a token among them
            how = Normalised("seq-mean-token-mean", new.shape[0])
        else:
            how = normalised(new.shape[-1], self.fixed or mode, **config.global_batch_info)
        extra = None if self.selected is None else {"selected": self.selected(config, new, advantages, mask)}
        found = policy_loss(
            new,
            old if self.reads_old else None,
            advantages,
            mask,
            loss=self.loss(config),
            weights=weights,
            extra=extra,
            empty="zero",
            **how.options,
        )
        inputs = (new, mask, *(constants if self.reads_old else constants[1:]))
        loss = finished(found, how, [found.loss] if self.float32 else inputs)
        if not self.metrics:
            return loss, {}
        values = found.metrics.floats()
        counted = values["token_count"] > 0
        sums = {name: sum(values[x] for x in of) if counted else 0.0 for name, of in self.metrics.items()}
        return loss, {f"actor/{name}": float(x) for name, x in sums.items()}


def _check_config(config: Any) -> None:
    # verl asserts, each loss something else, for what is no ActorConfig.
    if not isinstance(config, importlib.import_module("verl.workers.config").ActorConfig):
        raise NotServed("a configuration that is no ActorConfig")


# ------------------------------------------------------------------------------------------- losses of a configuration
@functools.lru_cache(maxsize=64)
def _made(definition: Callable[..., Loss], *parameters: float) -> Loss:
    return definition(*parameters)


def _clip(config: Any) -> tuple[float, float]:
    low, high = config.clip_ratio_low, config.clip_ratio_high
    return config.clip_ratio if low is None else low, config.clip_ratio if high is None else high


def _clipped(definition: Callable[..., Loss], cap: float | None = None) -> Callable[[Any], Loss]:
    """The loss with the configuration's clip range, and its clip_ratio_c, `cap` where it has none."""

    def loss(config: Any) -> Loss:
        return _made(definition, *_clip(config), *(() if cap is None else (config.get("clip_ratio_c", cap),)))

    return loss


def _dro(config: Any) -> Loss:
    beta = config.policy_loss.dro_beta
    if beta is None:
        raise NotServed("dro without a beta, which verl refuses")
    return _made(formulas.dro, beta)


def _kl_cov(config: Any) -> Loss:
    coefficient = config.policy_loss.ppo_kl_coef
    return _made(formulas.kl_cov, 1.0 if coefficient is None else coefficient)


def _largest_covariances(config: Any, log_prob: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
    """The tokens that KL-Cov penalises, bool [B, T]: by verl's own operations, as ranks leave no room for rounding."""
    share = config.policy_loss.kl_cov_ratio
    share = 0.0002 if share is None else share
    if share <= 0:
        raise NotServed("a share of 0, which verl refuses")
    counted = mask > 0
    a, x = (y[counted].detach().cpu() for y in (advantages, log_prob))
    chosen = torch.zeros_like(counted)
    if len(a):
        covariances = (a - a.mean()) * (x - x.mean())
        largest = torch.topk(covariances, max(1, int(len(a) * share))).indices
        places = counted.flatten().nonzero().squeeze(-1)
        chosen.view(-1)[places[largest.to(places.device)]] = True
    return chosen


SERVED: Final[dict[str, Served]] = {
    "compute_policy_loss_vanilla": Served(_clipped(losses.ppo, 3.0), _PPO),
    "compute_policy_loss_dppo_tv": Served(_clipped(formulas.dppo_tv, 20.0), _DPPO, float32=True),
    "compute_policy_loss_dppo_kl": Served(_clipped(formulas.dppo_kl, 20.0), _DPPO, float32=True),
    "compute_policy_loss_gspo": Served(
        _clipped(formulas.gspo),
        {"pg_clipfrac": CLIPPED, "ppo_kl": ("ppo_kl",), "pg_clipfrac_lower": ()},
        "seq-mean-token-mean",
    ),
    "compute_policy_loss_sapo": Served(
        lambda config: _made(losses.sapo, config.tau_pos, config.tau_neg),
        {"pg_clipfrac": (), "ppo_kl": ("kl_old_k1",), "pg_clipfrac_lower": ()},
        "seq-mean-token-mean",
        fixed="seq-mean-token-mean",
    ),
    "compute_policy_loss_gpg": Served(lambda config: _made(losses.gpg), reads_old=False),
    "compute_policy_loss_kl_cov": Served(_kl_cov, _KL, selected=_largest_covariances),
    "compute_policy_loss_geo_mean": Served(_clipped(formulas.geo_mean), _OWN, fixed="rows"),
    "compute_policy_loss_dro": Served(_dro, _KL),
    "compute_policy_loss_cispo": Served(
        _clipped(formulas.cispo),
        {"pg_clipfrac": ("pg_clipfrac",), "ppo_kl": ("kl_old_k1",), "pg_clipfrac_lower": ()},
    ),
}


def reinforce(
    stock: Any,
    rollout_log_prob: Tensor,
    log_prob: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    loss_agg_mode: str | None = None,
    config: Any = None,
    rollout_is_weights: Tensor | None = None,
) -> tuple[Tensor, dict[str, Any]]:
    """verl's REINFORCE, which calls the old log-probs another name."""
    inputs = (rollout_log_prob, log_prob, advantages, response_mask)
    return _REINFORCE(stock, *inputs, loss_agg_mode, config, rollout_is_weights)


_REINFORCE: Final = Served(lambda config: _made(formulas.reinforce), _KL, "seq-mean-token-sum")
_PARAMETERS: Final = (
    *("log_prob", "advantages", "response_mask"),
    *("loss_agg_mode", "config", "rollout_is_weights"),
)
_WHY: Final = "loss, metrics and gradient in one pass, one host read instead of three"
REPLACEMENTS: Final = (
    *(
        Replacement(f"{CORE}.{name}", ("old_log_prob", *_PARAMETERS), served, "fastreward.policy_loss", _WHY)
        for name, served in SERVED.items()
    ),
    Replacement(
        f"{CORE}.compute_policy_loss_reinforce",
        ("rollout_log_prob", *_PARAMETERS),
        reinforce,
        "fastreward.policy_loss",
        _WHY,
    ),
)
KEPT: Final = (
    Entry(f"{CORE}.compute_policy_loss_clip_cov", "verl's own", "it draws tokens at random, from verl's generator"),
    Entry(
        f"{CORE}.compute_policy_loss_bypass_mode and compute_entropy_loss",
        "verl's own",
        "they only call functions that are replaced",
    ),
    Entry(f"{CORE}.compute_policy_loss", "verl's own", "deprecated; nothing of verl's calls it"),
)

"""slime's policy loss from its logits: --custom-loss-function-path with --loss-type custom_loss.

The reduction stays slime's own: `sum_of_sample_mean` is linear, so its derivative is a weight per token, with which the
loss and its gradient are made in one pass.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor

from fastreward._runtime.layout import Clip
from fastreward.language.node import Node, walk
from fastreward.language.ops import OF_OTHERS
from fastreward.language.terms import CLIP_FRACTIONS, Terms
from fastreward.logprobs import token_logprobs
from fastreward.losses import Loss, cispo, clip, define, exp, expm1, minimum, ppo, seq_mean, where
from fastreward.losses.token import clipped_surrogate
from fastreward.patch.hooks import BY_SEQUENCE, arguments, chosen, hook, recipe
from fastreward.patch.slime import weights as correction
from fastreward.patch.slime.layout import Layout, joined, parallel
from fastreward.patch.usage import handed_on
from fastreward.policy_loss import PolicyLoss, policy_loss
from fastreward.recipes import Recipe

Reducer = Callable[[Tensor], Tensor]
Result = tuple[Tensor, dict[str, Tensor]]

#: Options of slime's policy loss that are not ours, with the value that turns them off.
_NOT_OURS: Final = {"use_opsm": False, "use_score_centering": False, "rollout_top_p": 1.0, "allgather_cp": False}
_ONE_SUM: Final[dict[str, Any]] = {"aggregation": "token-sum", "normalizer": 1, "empty": "zero"}


# ------------------------------------------------------------------------------------------------ slime's own formulas
@define
def _sequence_ratio(t: Terms, clip_low: float, clip_high: float, dual_clip: float | None = None) -> Node:
    """PPO-clip on the sequence's ratio exp(mean of d), with each token's own advantage."""
    value = clipped_surrogate(t, exp(seq_mean(t.log_ratio)), t.advantage, clip_low, clip_high)
    return value if dual_clip is None else where(t.advantage < 0, minimum(value, -t.advantage * dual_clip), value)


@define(static=("kind", "unbiased"))
def _reference_kl(t: Terms, *, kind: str, unbiased: bool) -> Node:
    """k1, k2, k3 or low_var_kl (k3 within +-10) of logprob against ref_logprob; unbiased: times the ratio."""
    d = t.logprob - t.ref_logprob
    if kind in ("k1", "k2"):
        estimate = d if kind == "k1" else 0.5 * d * d
        return exp(t.log_ratio) * estimate if unbiased else estimate
    if unbiased:  # r e^-d does not depend on logprob: as a product its derivative would be lost in rounding
        ratio = exp(t.log_ratio)
        estimate = exp(t.ref_logprob - t.old_logprob) - ratio + ratio * d
    else:
        estimate = expm1(-d) + d
    return clip(estimate, -10.0, 10.0) if kind == "low_var_kl" else estimate


# ------------------------------------------------------------------------------------------------------- the function
@hook("slime", lambda args, batch, logits, sum_of_sample_mean: sum(map(int, batch["response_lengths"])))
def loss(args: Any, batch: Mapping[str, Any], logits: Tensor, sum_of_sample_mean: Reducer) -> Result:
    """slime's policy loss, or a recipe's, with log-probs and entropy in one pass over vocabulary-parallel logits.

    `args.fastreward_loss` (a key of slime's --custom-config-path), or FASTREWARD_SLIME_LOSS, names a recipe that
    returns a loss, with its options: "dispo", "sapo(tau_neg=1.1)". Neither: what slime computes under its own options
    (advantage_estimator grpo, gspo, cispo, ...; eps_clip, eps_clip_high, eps_clip_c). Entropy bonus, KL loss, TIS
    (use_tis, with --custom-tis-function-path) and --custom-pg-loss-reducer-function-path are slime's in either case.

    Args:
        args: slime's.
        batch: unconcat_tokens, log_probs, advantages, loss_masks, total_lengths, response_lengths, and where they are
            read ref_log_probs, rollout_log_probs; lists with one tensor for each sample. What else a recipe needs is
            taken from the key of its name.
        logits: [1, T, V / ranks], f32, bf16 or f16: packed, this rank's slice of the vocabulary; under context
            parallelism its two chunks of each sequence.
        sum_of_sample_mean: slime's reduction of [N], the response tokens here, to a scalar; has to be linear.

    Returns:
        The loss [] and slime's metrics by their names. Tokens under a loss mask of 0 count in neither.

    Raises:
        ValueError: no such recipe, or one that needs what the batch does not have.
        NotImplementedError: a recipe beside use_opsm, use_score_centering, top-p replay or allgather_cp (without a
            recipe those calls go on to slime's own function), or one that reads whole sequences, which context
            parallelism has cut.
    """
    name, options = chosen("loss", args, "FASTREWARD_SLIME_LOSS")
    foreign = [key for key, off in _NOT_OURS.items() if getattr(args, key, off) != off]
    if foreign and name is not None:
        raise NotImplementedError(f"fastreward_loss: {name} is not available with slime's {', '.join(foreign)}")
    if foreign:
        return _slimes_own(args, batch, logits, sum_of_sample_mean)
    responses = _responses(args, batch, logits)
    weight = _weight(_reducer(args, batch, sum_of_sample_mean), responses)
    tis, tis_metrics = _tis(args, batch, responses)
    formula = _own_formula(args) if name is None else recipe("fastreward_loss", name, ("loss",))
    surrogate, clipped = _surrogate(formula, responses, weight if tis is None else weight * tis, batch, options)
    counts = responses.mask != 0  # slime's reduction multiplies by the mask, and a NaN stays one

    def reduced(x: Tensor) -> Tensor:
        return sum_of_sample_mean(torch.where(counts, x, 0.0))

    entropy_loss = reduced(responses.entropy)
    total, metrics = surrogate - float(args.entropy_coef) * entropy_loss, {}
    if args.use_kl_loss:
        kl, coef = _kl(args, batch, responses, sum_of_sample_mean), float(args.kl_loss_coef)
        total, metrics["kl_loss"] = total + coef * kl if coef else total, kl.detach()
    with torch.no_grad():
        measured = {"pg_clipfrac": clipped, "ppo_kl": _ppo_kl(args, responses), **tis_metrics}
        if responses.rollout is not None:
            measured["train_rollout_logprob_abs_diff"] = (responses.compared - responses.rollout).abs()
        metrics |= {key: reduced(x) for key, x in measured.items()}
    own = {"loss": total.detach(), "pg_loss": surrogate.detach(), "entropy_loss": entropy_loss.detach()}
    return total, own | metrics


@dataclass(frozen=True, slots=True, eq=False)
class _Responses:
    """The response tokens of this rank, [N]: of the policy being trained, and what slime has of them."""

    layout: Layout
    bounds: Tensor
    mask: Tensor
    logprobs: Tensor
    entropy: Tensor
    old: Tensor
    rollout: Tensor | None
    advantages: Tensor
    compared: Tensor  # whose gap to `rollout` slime reports


def _responses(args: Any, batch: Mapping[str, Any], logits: Tensor) -> _Responses:
    ranks = parallel()
    layout = Layout.of(batch["total_lengths"], batch["response_lengths"], ranks)
    rows, flat = layout.logit_rows(logits.device), logits.squeeze(0)
    labels = torch.zeros(flat.shape[0], dtype=torch.int64, device=flat.device)
    labels[rows] = layout.labels(batch["unconcat_tokens"]).to(labels)
    wanted = torch.zeros_like(labels, dtype=torch.bool)
    wanted[rows] = True
    stats = token_logprobs(
        flat,
        labels,
        temperature=float(getattr(args, "rollout_temperature", 1.0)),
        mask=wanted,
        outputs=("logprobs", "entropy"),
        process_group=ranks.vocabulary,
    )
    logprobs, entropy = stats.logprobs[rows], stats.entropy[rows]
    rollout = torch.cat(batch["rollout_log_probs"]) if batch.get("rollout_log_probs") else None
    before = rollout if args.use_rollout_logprobs else torch.cat(batch["log_probs"]) if batch.get("log_probs") else None
    old = logprobs.detach() if before is None else before
    return _Responses(
        layout,
        layout.bounds(flat.device),
        layout.local(batch["loss_masks"]),
        logprobs,
        entropy if args.entropy_coef else entropy.detach(),
        old,
        rollout,
        joined(batch["advantages"], flat.device),
        logprobs.detach() if args.use_rollout_logprobs else old,
    )


def _reducer(args: Any, batch: Mapping[str, Any], sum_of_sample_mean: Reducer) -> Reducer:
    path = getattr(args, "custom_pg_loss_reducer_function_path", None)
    if path is None:
        return sum_of_sample_mean
    made: Reducer = _loaded(path)(
        batch["total_lengths"], batch["response_lengths"], batch["loss_masks"], args.calculate_per_token_loss
    )
    return made


def _weight(reducer: Reducer, responses: _Responses) -> Tensor:
    """The reduction's derivative: what a token's loss counts in it."""
    with torch.enable_grad():
        ones = torch.ones_like(responses.logprobs, dtype=torch.float32, requires_grad=True)
        return torch.autograd.grad(reducer(ones), ones)[0]


def _loaded(path: str) -> Callable[..., Any]:
    module, _, name = path.rpartition(".")
    function: Callable[..., Any] = getattr(importlib.import_module(module), name)
    return function


def _slimes_own(args: Any, batch: Mapping[str, Any], logits: Tensor, sum_of_sample_mean: Reducer) -> Result:
    handed_on()
    result: Result = _loaded("slime.backends.megatron_utils.loss.policy_loss_function")(
        args, batch, logits, sum_of_sample_mean
    )
    return result


# ------------------------------------------------------------------------------------------------------------ the parts
def _own_formula(args: Any) -> Loss:
    low, high, dual = float(args.eps_clip), float(args.eps_clip_high), getattr(args, "eps_clip_c", None)
    if args.advantage_estimator == "cispo":
        return cispo(low, high, log_ratio_clamp=None)
    if args.advantage_estimator == "gspo":
        return _sequence_ratio(low, high, dual)
    return ppo(low, high, dual, log_ratio_clamp=None)


def _surrogate(
    formula: Loss | Recipe, responses: _Responses, weight: Tensor, batch: Mapping[str, Any], options: dict[str, Any]
) -> tuple[Tensor, Tensor]:
    """The weighted sum of the losses of the tokens, and which of these a clip changed, f32 [N]."""
    made = formula if isinstance(formula, Loss) else formula.loss()
    name = formula.name
    sequences, clips = (True, False) if made is None else _facts(made)
    if responses.layout.is_cut and (sequences or name in BY_SEQUENCE):
        raise NotImplementedError(
            f"fastreward_loss: {name} reads whole sequences, which context parallelism has cut; "
            "train it with context_parallel_size 1"
        )
    advantages = responses.advantages
    if made is not None and made.reads("weight"):  # in a way of its own, but linear in the advantages
        advantages, weight = advantages * weight, torch.ones_like(weight)
    if name in BY_SEQUENCE:
        advantages = advantages[responses.bounds[:-1].clamp(max=max(advantages.shape[0] - 1, 0))]
    call: dict[str, Any] = {"cu_seqlens": responses.bounds, "weights": weight, **_ONE_SUM}
    call["return_tokens"] = ("clip", "ratio") if clips else ()
    if isinstance(formula, Loss):
        call["cu_seqlens"] = responses.layout.filled_bounds(advantages.device)
        result = policy_loss(responses.logprobs, responses.old, advantages, responses.mask, loss=formula, **call)
        return result.loss, _clipped(result.tokens, formula)
    if options.keys() & call.keys():
        raise TypeError(f"fastreward_loss: {', '.join(options.keys() & call.keys())} follow from slime's own options")
    given = _given(batch, responses) | {"advantages": advantages}
    result = formula.function(**arguments("fastreward_loss", formula, given, options), **call)
    return result.loss, _clipped(result.tokens, None) if clips else torch.zeros_like(weight)


def _clipped(tokens: Mapping[str, Tensor], formula: Loss | None) -> Tensor:
    """1 for tokens that a clip changed, f32 [N]: of CISPO any whose ratio is out of bounds, else by the advantage."""
    if formula is not None and formula.definition is cispo:
        low, high = float(formula.parameters["clip_low"]), float(formula.parameters["clip_high"])
        return ((tokens["ratio"] < 1 - low) | (tokens["ratio"] > 1 + high)).float()
    return ((tokens["clip"] == Clip.LOW) | (tokens["clip"] == Clip.HIGH)).float()


def _facts(loss: Loss) -> tuple[bool, bool]:
    """Whether a loss depends on other tokens than its own, and whether it reports which of them it clips."""
    t = loss.terms()
    value = loss.trace(t)
    others = any(node.op in OF_OTHERS for node in walk([value]))
    return others, any(name in t.reported for name in CLIP_FRACTIONS)


def _given(batch: Mapping[str, Any], responses: _Responses) -> dict[str, Any]:
    """What a recipe of a loss may ask for, by its names."""
    extra = {k: _joined(responses.layout, x) for k, x in batch.items() if isinstance(x, list | Tensor) and len(x)}
    return extra | {
        "logprobs": responses.logprobs,
        "old_logprobs": responses.old,
        "rollout_logprobs": responses.rollout,
        "teacher_logprobs": extra.get("teacher_log_probs"),
        "mask": responses.mask,
    }


def _joined(layout: Layout, x: Any) -> Any:
    """A list of tensors per sample in one, a list of numbers as a tensor; other things as they are."""
    if isinstance(x, list) and all(isinstance(entry, Tensor) for entry in x):
        cut = [entry.shape[0] if entry.ndim else -1 for entry in x]
        return torch.cat(x) if cut == layout.counts else x
    if isinstance(x, list) and all(isinstance(entry, int | float) for entry in x):
        return torch.tensor(x)
    return x


def _tis(args: Any, batch: Mapping[str, Any], responses: _Responses) -> tuple[Tensor | None, dict[str, Tensor]]:
    """The weights of the rollout correction, where slime's options ask for it, and its metrics per token."""
    measured = getattr(args, "get_mismatch_metrics", False)
    if not (args.use_tis or measured):
        return None, {}
    train = batch.get("log_probs") or responses.layout.split(responses.logprobs.detach())
    path = getattr(args, "custom_tis_function_path", None)
    function = correction.tis if path is None else _loaded(path)
    weights, masks, metrics = function(
        args=args,
        pg_loss=torch.ones_like(responses.old),
        train_log_probs=train,
        rollout_log_probs=batch["rollout_log_probs"],
        loss_masks=batch["loss_masks"],
        total_lengths=batch["total_lengths"],
        response_lengths=batch["response_lengths"],
    )
    weights = weights * (responses.layout.local(masks) != 0)
    return weights, {"ois": torch.exp(-_ppo_kl(args, responses)), **metrics}


def _ppo_kl(args: Any, responses: _Responses) -> Tensor:
    """old - new log-prob per token; of GSPO the mean over the sequence."""
    gap = responses.old - responses.logprobs.detach()
    if args.advantage_estimator != "gspo" or responses.layout.is_cut:
        return gap
    valid = responses.mask != 0
    means = [
        torch.where(there, x, 0.0).sum() / there.sum().clamp(min=1)
        for x, there in zip(responses.layout.split(gap), responses.layout.split(valid), strict=True)
    ]
    return torch.cat([mean.expand(n) for mean, n in zip(means, responses.layout.counts, strict=True)] or [gap])


def _kl(args: Any, batch: Mapping[str, Any], responses: _Responses, sum_of_sample_mean: Reducer) -> Tensor:
    """slime's KL to the reference model, reduced."""
    formula = _reference_kl(kind=args.kl_loss_type, unbiased=bool(getattr(args, "use_unbiased_kl", False)))
    logprobs = responses.logprobs if float(args.kl_loss_coef) else responses.logprobs.detach()
    weight, reference = _weight(sum_of_sample_mean, responses), joined(batch["ref_log_probs"], responses.mask.device)
    result: PolicyLoss = policy_loss(
        logprobs,
        responses.old,
        None,
        responses.mask,
        loss=formula,
        ref_logprobs=reference,
        weights=weight,
        cu_seqlens=responses.layout.filled_bounds(logprobs.device),
        **_ONE_SUM,
    )
    return result.loss

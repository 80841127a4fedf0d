"""What slime computes, written out in float64: for each sample of its lists, one after the other.

Read in slime at commit 00c2d6d (backends/megatron_utils/loss.py, cp_utils.py, utils/ppo_utils.py, ray/rollout.py).
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

VERSION = "00c2d6d"


def options(**changed: Any) -> SimpleNamespace:
    """slime's arguments, as its parser has them by default where that is how GRPO is trained."""
    default = {
        "advantage_estimator": "grpo",
        "calculate_per_token_loss": False,
        "entropy_coef": 0.0,
        "eps_clip": 0.2,
        "eps_clip_c": None,
        "eps_clip_high": 0.28,
        "gamma": 1.0,
        "get_mismatch_metrics": False,
        "grpo_std_normalization": True,
        "kl_coef": 0.0,
        "kl_loss_coef": 0.0,
        "kl_loss_type": "k1",
        "lambd": 1.0,
        "n_samples_per_prompt": 4,
        "rewards_normalization": True,
        "rollout_temperature": 1.0,
        "tis_clip": 2.0,
        "tis_clip_low": 0.0,
        "use_kl_loss": False,
        "use_rollout_logprobs": False,
        "use_tis": False,
    }
    return SimpleNamespace(**default | changed)


def batch(prompts: list[int], lengths: list[int], vocab: int, *, seed: int = 0) -> dict[str, Any]:
    """Samples as slime's lists, f32, some tokens masked out; "logits" [1, T, vocab] of the whole sequences."""
    g = torch.Generator().manual_seed(seed)
    totals = [p + n for p, n in zip(prompts, lengths, strict=True)]

    def logprobs() -> list[Tensor]:
        return [-3 * torch.rand(n, generator=g) for n in lengths]

    logits = 2 * torch.randn(1, sum(totals), vocab, generator=g)
    tokens = [torch.randint(0, vocab, (n,), generator=g) for n in totals]
    own = responses(logits.double(), tokens, totals, lengths, 1.0)[0]
    masks = [(torch.rand(n, generator=g) < 0.8).to(torch.int32) for n in lengths]
    for mask in masks[1:]:
        mask[:1] = 1  # the first may have none, the others have a token
    return {
        "logits": logits,
        "unconcat_tokens": tokens,
        "total_lengths": totals,
        "response_lengths": lengths,
        "loss_masks": masks,
        "log_probs": [(x + 0.3 * torch.randn(x.shape, generator=g)).float() for x in own],
        "rollout_log_probs": [(x + 0.5 * torch.randn(x.shape, generator=g)).float() for x in own],
        "ref_log_probs": logprobs(),
        "advantages": [torch.randn(1, generator=g).expand(n).contiguous() for n in lengths],
        "values": [torch.randn(n, generator=g) for n in lengths],
        "rewards": torch.randn(len(lengths), generator=g).tolist(),
    }


# --------------------------------------------------------------------------------------------------------- the loss
def responses(
    logits: Tensor, tokens: list[Tensor], totals: list[int], lengths: list[int], temperature: float
) -> tuple[list[Tensor], list[Tensor]]:
    """Log-prob and entropy of each response token."""
    logprobs, entropies, end = [], [], 0
    for sequence, total, length in zip(tokens, totals, lengths, strict=True):
        end += total
        rows = (logits[0, end - length - 1 : end - 1] / temperature).log_softmax(-1)
        logprobs.append(rows.gather(-1, sequence[total - length :, None]).squeeze(-1))
        entropies.append(-(rows.exp() * rows).sum(-1))
    return logprobs, entropies


def reducer(lengths: list[int], masks: list[Tensor], per_token: bool = False) -> Callable[[Tensor], Tensor]:
    """The sum over samples of the means (sums) over their tokens."""

    def reduce(x: Tensor) -> Tensor:
        parts = [
            (y * m).sum() / (1 if per_token else max(int(m.sum()), 1))
            for y, m in zip(x.split(lengths), masks, strict=True)
        ]
        return sum(parts, x.sum() * 0)

    return reduce


def policy_loss(args: Any, batch: dict[str, Any], logits: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss and its metrics, of f64 logits."""
    lengths, masks = batch["response_lengths"], batch["loss_masks"]
    reduce = reducer(lengths, masks, args.calculate_per_token_loss)
    new, entropy = responses(
        logits, batch["unconcat_tokens"], batch["total_lengths"], lengths, args.rollout_temperature
    )
    old = [x.double() for x in batch["rollout_log_probs" if args.use_rollout_logprobs else "log_probs"]]
    gap = [o - n for o, n in zip(old, new, strict=True)]
    if args.advantage_estimator == "gspo":
        means = [(d * m).sum() / max(int(m.sum()), 1) for d, m in zip(gap, masks, strict=True)]
        gap = [mean.expand(n) for mean, n in zip(means, lengths, strict=True)]
    minus_d, logprobs, advantages = torch.cat(gap), torch.cat(new), torch.cat(batch["advantages"]).double()
    ratio = torch.exp(-minus_d)
    bounded = ratio.clamp(1 - args.eps_clip, 1 + args.eps_clip_high)
    if args.advantage_estimator == "cispo":
        loss, clipped = -bounded.detach() * advantages * logprobs, bounded != ratio
    else:
        loss = torch.maximum(-ratio * advantages, -bounded * advantages)
        clipped = -bounded * advantages > -ratio * advantages
        if args.eps_clip_c is not None:
            loss = torch.where(advantages < 0, torch.minimum(loss, -args.eps_clip_c * advantages), loss)
    metrics = {"pg_clipfrac": reduce(clipped.double()), "ppo_kl": reduce(minus_d)}
    if args.use_tis:
        loss, _, measured = tis(args, batch, loss)
        metrics |= {"ois": reduce(ratio)} | {key: reduce(x) for key, x in measured.items()}
    surrogate, bonus = reduce(loss), reduce(torch.cat(entropy))
    total = surrogate - args.entropy_coef * bonus
    if args.use_kl_loss:
        weight = torch.exp(logprobs - torch.cat(old)) if getattr(args, "use_unbiased_kl", False) else 1.0
        metrics["kl_loss"] = reduce(kl(logprobs, torch.cat(batch["ref_log_probs"]).double(), args.kl_loss_type, weight))
        total = total + args.kl_loss_coef * metrics["kl_loss"]
    compared = logprobs if args.use_rollout_logprobs else torch.cat(old)
    metrics["train_rollout_logprob_abs_diff"] = reduce((compared - torch.cat(batch["rollout_log_probs"])).abs())
    return total, {"loss": total, "pg_loss": surrogate, "entropy_loss": bonus, **metrics}


def kl(logprobs: Tensor, reference: Tensor, kind: str, weight: Any) -> Tensor:
    """An estimate per token, times a weight; low_var_kl within +-10."""
    d = logprobs - reference
    estimate = {"k1": d, "k2": d**2 / 2}.get(kind, torch.exp(-d) - 1 + d) * weight
    return estimate.clamp(-10, 10) if kind == "low_var_kl" else estimate


def tis(args: Any, batch: dict[str, Any], loss: Tensor) -> tuple[Tensor, list[Tensor], dict[str, Tensor]]:
    """Truncated importance sampling."""
    ratio = torch.exp(torch.cat(batch["log_probs"]).double() - torch.cat(batch["rollout_log_probs"]).double())
    weight = ratio.clamp(args.tis_clip_low, args.tis_clip)
    measured = {"tis": ratio, "tis_clipfrac": (weight != ratio).double(), "tis_abs": (ratio - 1).abs()}
    return loss * weight, batch["loss_masks"], measured


# ------------------------------------------------------------------------------------------------------- advantages
def advantages(args: Any, data: dict[str, Any]) -> tuple[list[Tensor], list[Tensor]]:
    """Advantages and returns of each sample, before whitening."""
    made = [_advantages_of(args, data, i) for i in range(len(data["rewards"]))]
    return [a for a, _ in made], [r for _, r in made]


def _advantages_of(args: Any, data: dict[str, Any], i: int) -> tuple[Tensor, Tensor]:
    kl, reward, mask = data["kl"][i].double(), data["rewards"][i], data["loss_masks"][i]
    if args.advantage_estimator in ("grpo", "gspo", "cispo"):
        return (torch.full_like(kl, reward),) * 2
    if args.advantage_estimator == "reinforce_plus_plus_baseline":
        return (reward - args.kl_coef * kl,) * 2
    token_rewards = -args.kl_coef * kl
    values = data["values"][i].double() if args.advantage_estimator == "ppo" else torch.zeros_like(kl)
    token_rewards[-1 if args.advantage_estimator == "ppo" else int(mask.nonzero()[-1])] += reward
    discount = args.gamma * (args.lambd if args.advantage_estimator == "ppo" else 1.0)
    out, following, value_after = torch.zeros_like(kl), 0.0, 0.0
    for t in reversed(range(kl.shape[0])):
        delta = token_rewards[t] + args.gamma * value_after - values[t]
        following = delta + discount * following
        out[t], value_after = following, values[t]
    return out, out + values


def rewards(args: Any, raw: list[float]) -> list[float]:
    """Normalised in groups of n_samples_per_prompt."""
    grouped = torch.tensor(raw).double().view(-1, args.n_samples_per_prompt)
    centred = grouped - grouped.mean(-1, keepdim=True)
    if args.advantage_estimator != "reinforce_plus_plus_baseline" and args.grpo_std_normalization:
        centred = centred / (grouped.std(-1, keepdim=True) + 1e-6)
    return centred.flatten().tolist()

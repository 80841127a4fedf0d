"""Which functions of OpenRLHF's are replaced by what, and which are not and why."""

from __future__ import annotations

from typing import Any, Final

from fastreward.patch.bindings import Entry
from fastreward.patch.openrlhf import balancing, estimates, experience, length_penalties, losses, scores
from fastreward.patch.openrlhf.replacement import Replacement

_UTILS: Final = "openrlhf.models.utils"
_LOSS: Final = "openrlhf.models.loss"
_ACTOR: Final = "openrlhf.models.actor"
_MAKER: Final = "openrlhf.trainer.ppo_utils.experience_maker"
_BALANCING: Final = "openrlhf.utils.seqlen_balancing"
_PENALTY: Final = "openrlhf.trainer.ppo_utils.length_penalty"


def _rows(logits: Any, *_: Any, **__: Any) -> int:
    return int(logits[..., 0].numel())


def _of_second(first: Any, second: Any, *_: Any, **__: Any) -> int:
    """Tokens of a method's first argument, [B, T]."""
    return int(second.numel())


def _of_kl(r: Any, kl_coef: Any, kl: Any, *_: Any, **__: Any) -> int:
    return int(kl.numel())


def _of_experiences(maker: Any, experiences: Any) -> int:
    return sum(e.action_mask.numel() for e in experiences)


def _responses(experiences: Any, *_: Any, **__: Any) -> int:
    return sum(len(e.rewards) for e in experiences)


REPLACEMENTS: Final = (
    Replacement(
        _UTILS, "log_probs_from_logits", ("14e31c0805e3c270",),
        scores.log_probs, "fastreward.token_logprobs",
        "one pass over the logits, which are not divided in place",
        reads=((_UTILS, "_logsumexp_by_chunk"),), tokens=_rows,
    ),
    Replacement(
        _UTILS, "compute_entropy", ("b487adf2769b525f",),
        scores.entropy, "fastreward.token_logprobs", "one pass over the logits, nothing compiled", tokens=_rows,
    ),
    Replacement(
        _UTILS, "compute_approx_kl", ("632064b21f55033c",),
        estimates.approx_kl, "fastreward.token_rewards, fastreward.policy_loss", "value and gradient in one pass",
    ),
    Replacement(
        _UTILS, "compute_reward", ("6af99a4dc77903d4",),
        estimates.reward, "fastreward.token_rewards", "the last action is found without copies of the mask",
        tokens=_of_kl,
    ),
    Replacement(
        _UTILS, "masked_mean", ("52a78503a33a35d1",),
        estimates.mean, "fastreward.policy_loss", "one pass, nothing kept for the backward but the gradient",
    ),
    Replacement(
        _LOSS, "aggregate_loss", ("ee4fa51233c66424",),
        losses.aggregated, "fastreward.policy_loss", "one pass with the gradient",
        reads=((_UTILS, "masked_mean"),),
    ),
    Replacement(
        _LOSS, "PolicyLoss.forward", ("0a8ee79ad88cd22d",),
        losses.policy, "fastreward.policy_loss", "loss, gradient and metrics in one pass",
        reads=((_LOSS, "PolicyLoss.__init__"), (_LOSS, "aggregate_loss"), (_UTILS, "masked_mean")), tokens=_of_second,
    ),
    Replacement(
        _LOSS, "ValueLoss.forward", ("af41eeb07b045c11",),
        losses.value, "fastreward.value_loss", "loss and gradient in one pass",
        reads=((_LOSS, "ValueLoss.__init__"), (_LOSS, "aggregate_loss"), (_UTILS, "masked_mean")), tokens=_of_second,
    ),
    Replacement(
        _ACTOR, "Actor.forward", ("925d59a6c6d426de",),
        scores.actor_forward, "fastreward.token_logprobs",
        "no float32 copy of the logits, log-probs and entropy in one pass, prompts skipped",
        reads=((_UTILS, "log_probs_from_logits"), (_UTILS, "compute_entropy")),
        tokens=_of_second, refusals=(), with_module=True,
    ),
    Replacement(
        _MAKER, "RemoteExperienceMaker.compute_advantages_and_returns", ("865cc358017725c7",),
        experience.all_advantages, "fastreward.group_advantages", "the batch is normalised without copies of it",
        tokens=_of_experiences, refusals=(), with_module=True,
    ),
    Replacement(
        _MAKER, "RemoteExperienceMaker.get_advantages_and_returns", ("a56c14a1aa00176b",),
        experience.advantages_and_returns, "fastreward.gae", "one pass instead of a loop over tokens",
        tokens=_of_second,
    ),
    Replacement(
        _MAKER, "RemoteExperienceMaker.get_cumulative_returns", ("0ce6cecbf91ab3e1",),
        experience.cumulative_returns, "fastreward.discounted_returns", "one pass instead of a loop over tokens",
        tokens=_of_second,
    ),
    Replacement(
        _PENALTY, "apply_overlong_penalty", ("4636e17872a8ac05",),
        length_penalties.overlong, "torch, all responses at once", "no look at each response's length",
        tokens=_responses,
    ),
    Replacement(
        _PENALTY, "apply_stop_properly_penalty", ("a6526d77ec13e89b",),
        length_penalties.stop_properly, "torch, all responses at once", "no look at each response's flag",
        tokens=_responses,
    ),
    Replacement(
        _BALANCING, "karmarkar_karp", ("563a5315693a0dea",),
        balancing.karmarkar_karp, "fastreward.balance_partitions", "largest differencing in C++; the same parts",
        tokens=balancing.no_tokens,
    ),
)  # fmt: skip

_OWN: Final = "OpenRLHF's own"
KEPT: Final = (
    Entry("openrlhf.models.loss.DPOLoss, PairWiseLoss, LogExpLoss", _OWN, "they are sums over a handful of numbers"),
    Entry("openrlhf.models.loss.GPTLMLoss", _OWN, "nothing in OpenRLHF 0.11.2 makes one; SFTLoss is served by its sum"),
    Entry("masked_mean(dim=...)", _OWN, "a mean for each row is three short passes already"),
    Entry("is_correction_gating=binary_kl", _OWN, "whether a KL of 0 rounds below the bound of 0 is for torch to say"),
    Entry("Actor.forward with images, or for whole logits", _OWN, "there the logits themselves are wanted"),
    Entry(
        "float64, other masks than 0 and 1, constants with a gradient", _OWN, "torch's code takes whatever torch does"
    ),
    Entry(
        "openrlhf.utils.seqlen_balancing.get_minimum_num_micro_batch_size",
        _OWN,
        "its first fit is what decides the count",
    ),
)

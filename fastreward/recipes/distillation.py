"""Distillation on the student's own samples, as advantages: what a teacher thinks of each token that was sampled.

lp = logprobs of the student, which made the samples, t = teacher_logprobs of the same tokens (both an output of
`fastreward.token_logprobs`). Recipes take tensors of tokens, [B, T] or packed [N], and return float32 advantages in
that shape, 0 where the mask is 0: constants, for `policy_loss(..., advantages)`. They add to others by plain
arithmetic: examples/compose_advantages.py. Of several teachers (MOPD) pass the log-probs of each prompt's own.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastreward._arguments import check
from fastreward._arguments.numbers import Number, number, single
from fastreward._arguments.tokens import broadcast_to_tokens
from fastreward.recipes._catalogue.registry import recipe
from fastreward.recipes._shared.tokens import beside, on_tokens, token_values, total
from fastreward.returns import discounted_returns

__all__ = ["iw_opd", "opd", "rlsd", "sdar"]


@recipe(
    "OPD, MOPD (on-policy distillation, of several teachers)",
    "arXiv 2601.02780",
    code="NeMo-RL advantage_estimator.py `OPDAdvantageEstimator`, slime, ms-swift advantage.py",
)
def opd(
    old_logprobs: Tensor,
    teacher_logprobs: Tensor,
    mask: Tensor | None = None,
    *,
    advantages: Tensor | None = None,
    coef: Number = 1.0,
) -> Tensor:
    """A = coef (t - lp) + advantages: a step down the reverse KL, in one sample, beside that of the rewards.

    MOPD takes it under REINFORCE with IcePop's weights: `policy_loss(..., loss=losses.reinforce(), weights=weights,
    keep=keep)`, both from `recipes.icepop`.

    Args:
        old_logprobs: of the student, [B, T] or [N].
        teacher_logprobs: its shape.
        mask: its shape; nonzero = a token of the response.
        advantages: [B], or the shape of the tokens, of the rewards; None: distillation alone.
        coef: of the distillation.
    """
    old = token_values("old_logprobs", old_logprobs, mask)
    gap = _gap(teacher_logprobs, "old_logprobs", old, mask) * number("coef", coef, old, check.finite)
    return gap if advantages is None else gap + on_tokens("advantages", advantages, "old_logprobs", old, mask)


@recipe(
    "IW-OPD (importance-weighted on-policy distillation)",
    "arXiv 2606.22600",
    code="TRL experimental/iw_opd/iw_opd_trainer.py `_compute_iw_opd_loss`",
)
def iw_opd(
    rollout_logprobs: Tensor,
    teacher_logprobs: Tensor,
    mask: Tensor | None = None,
    *,
    gamma: Number = 0.5,
    eps: Number = 1e-8,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """A = (1 + gamma P_t / P) (t - lp), P_t = sum of |t - lp| from the token on, P = that of the response.

    Later tokens, whose prefix has left what the teacher would write, count less. TRL trains with -A lp.

    Args:
        rollout_logprobs: of the student, as the inference engine reported them, [B, T] or [N].
        teacher_logprobs: its shape.
        mask: its shape; nonzero = a token of the response.
        gamma: what the first token counts more than the last.
        eps: the least P, so that a response on which both agree divides by no 0.
        cu_seqlens: [B + 1], of packed responses.
    """
    rollout = token_values("rollout_logprobs", rollout_logprobs, mask)
    gap = _gap(teacher_logprobs, "rollout_logprobs", rollout, mask)
    gamma, eps = number("gamma", gamma, gap, check.finite), number("eps", eps, gap, check.positive)
    whole = total(gap.abs(), "rollout_logprobs", cu_seqlens).clamp(min=eps)
    share = discounted_returns(gap.abs(), mask, cu_seqlens=cu_seqlens) / broadcast_to_tokens(
        whole, gap.shape, cu_seqlens
    )
    return ((1 + gamma * share) * gap).float()


@recipe(
    "RLSD (self-distilled RLVR)",
    "arXiv 2604.03128",
    code="ms-swift advantage.py `apply_rlsd_reweight`",
)
def rlsd(
    advantages: Tensor,
    old_logprobs: Tensor,
    teacher_logprobs: Tensor,
    mask: Tensor | None = None,
    *,
    lam: Number = 0.5,
    clip: Number = 0.2,
    negative_only: bool = False,
) -> Tensor:
    """A_t = A (1 - lam + lam clip(exp(sign(A) (t - lp)), 1 - clip, 1 + clip)).

    The reward says which way, the teacher how far: no sign changes. The teacher is the policy itself, told the answer.

    Args:
        advantages: [B], GRPO's, or the shape of the tokens.
        old_logprobs: of the student, [B, T] or [N].
        teacher_logprobs: its shape.
        mask: its shape; nonzero = a token of the response.
        lam: 0 is GRPO; runs have let it fall from 0.5 to 0 in the first 50 steps.
        clip: how far a weight may be from 1.
        negative_only: only A < 0 is weighted.
    """
    old = token_values("old_logprobs", old_logprobs, mask)
    base = on_tokens("advantages", advantages, "old_logprobs", old, mask)
    lam, clip = number("lam", lam, old, check.finite), single("clip", clip, old, check.not_negative)
    evidence = (base.sign() * _gap(teacher_logprobs, "old_logprobs", old, mask)).exp()
    evidence = evidence.clamp(min=1 - clip, max=1 + clip)
    weights = 1 + lam * (evidence - 1)
    return base * (torch.where(base < 0, weights, 1.0) if check.flag("negative_only", negative_only) else weights)


@recipe(
    "SDAR (self-distilled agentic RL)",
    "Self-Distilled Agentic RL, in github.com/modelscope/ms-swift",
    code="ms-swift advantage.py `compute_sdar_loss`",
)
def sdar(
    logprobs: Tensor,
    teacher_logprobs: Tensor,
    mask: Tensor | None = None,
    *,
    beta: Number = 5.0,
) -> Tensor:
    """A = sigmoid(beta (t - lp)): with -A lp the gradient of the method's loss, sg(A) (t - lp).

    Tokens of which the teacher is surer are made likelier. The method adds it, with a small coefficient, to a GRPO
    loss; on samples of the current policy that is `advantages + coef * recipes.sdar(...)`.

    Args:
        logprobs: of the student, [B, T] or [N]; they are read as constants.
        teacher_logprobs: its shape; the teacher was told more.
        mask: its shape; nonzero = a token of the response.
        beta: how sharp the gate is.
    """
    student = token_values("logprobs", check.tensor("logprobs", logprobs).detach(), mask)
    gate = (number("beta", beta, student, check.finite) * _gap(teacher_logprobs, "logprobs", student, mask)).sigmoid()
    return gate if mask is None else torch.where(mask != 0, gate, 0.0)


def _gap(teacher_logprobs: Tensor, name: str, student: Tensor, mask: Tensor | None) -> Tensor:
    """t - lp, 0 under the mask."""
    return beside("teacher_logprobs", teacher_logprobs, name, student, mask) - student

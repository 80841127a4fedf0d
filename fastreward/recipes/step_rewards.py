"""Rewards of steps: from scores of a reward model, and an outcome, to rewards of tokens.

Scores of steps are step_scores [B, K], one for each step, and segment_ids [B, T] (or packed [N] with cu_seqlens) say
which tokens a step has: `fastreward.segment_ids(tokens, separators=...)` makes them. "At the end of a step" is its last
token that counts. What a step has that is not there, or has no token that counts, never matters. r_t = reward of a
token, R = rewards [B] of the outcomes. Recipes return constants: float32 in the shape of the tokens, 0 where the mask
is 0, unless they say so; they go to `fastreward.gae` or `discounted_returns`. A KL penalty is the loss's (kl=), or
`fastreward.token_rewards` makes one that adds to them. NaN in rewards: not scored; the response's tokens get 0.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from fastreward._arguments import check
from fastreward._arguments.numbers import Number, number
from fastreward.recipes._catalogue.registry import recipe
from fastreward.recipes._shared.steps import Steps, steps_of
from fastreward.recipes._shared.tokens import beside, token_values
from fastreward.segments import segment_diff

__all__ = ["clip_delta", "g_ra", "implicit_prm", "implicit_prm_score", "lare", "ppr", "vsrm"]

Form = Literal["single", "accumulative"]


# ------------------------------------------------------------------------------------------------- implicit rewards
@recipe(
    "Implicit PRM (free process rewards)",
    "arXiv 2412.01981",
    code="PRIME-RL/ImplicitPRM eval/prm_eval_utils.py",
    passes=("ref_logprobs=ref_logprobs",),
)
def implicit_prm(
    rm_logprobs: Tensor,
    segment_ids: Tensor,
    mask: Tensor | None = None,
    *,
    ref_logprobs: Tensor | None = None,
    coef: Number = 0.001,
    form: Form = "single",
    num_segments: int | None = None,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """r = coef (sum of rm_lp - ref_lp over the step), at its end; "accumulative": over this step and all before.

    Args:
        rm_logprobs: of the response by the reward model, [B, T] or [N].
        segment_ids: steps, in its shape.
        mask: its shape; nonzero = a token of the response.
        ref_logprobs: by the model that it was made from; None: 0, as where there is none.
        coef: the paper trains with 0.1 or less, and scores with this.
        form: "single", or "accumulative".
        num_segments: K; needed on a GPU, as in `fastreward.segment_reduce`.
        cu_seqlens: [B + 1], of packed responses.
    """
    steps, scores = _implicit(rm_logprobs, segment_ids, mask, ref_logprobs, coef, form, num_segments, cu_seqlens)
    return steps.scatter(scores, "end")


@recipe(
    "Implicit PRM's score of a response",
    "arXiv 2412.01981",
    code="PRIME-RL/ImplicitPRM eval/prm_eval_utils.py",
    returns="rewards",
    passes=("ref_logprobs=ref_logprobs",),
)
def implicit_prm_score(
    rm_logprobs: Tensor,
    segment_ids: Tensor,
    mask: Tensor | None = None,
    *,
    ref_logprobs: Tensor | None = None,
    coef: Number = 0.001,
    form: Form = "single",
    op: Literal["min", "mean", "sum"] = "min",
    num_segments: int | None = None,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """R = the least, mean or sum of the steps' `recipes.implicit_prm`; NaN, not scored, without a step.

    Args:
        rm_logprobs, segment_ids, mask, ref_logprobs, coef, form, num_segments, cu_seqlens: as there.
        op: "min", "mean" or "sum" over the steps.
    """
    check.choice("op", op, ("min", "mean", "sum"))
    steps, scores = _implicit(rm_logprobs, segment_ids, mask, ref_logprobs, coef, form, num_segments, cu_seqlens)
    count = steps.count[:, 0]
    if op == "min":
        value = torch.nn.functional.pad(torch.where(steps.there, scores, torch.inf), (0, 1), value=torch.inf).amin(-1)
    else:
        value = scores.sum(-1) / (count if op == "mean" else 1)
    return torch.where(count > 0, value, torch.nan).float()


def _implicit(
    rm_logprobs: Tensor,
    segment_ids: Tensor,
    mask: Tensor | None,
    ref_logprobs: Tensor | None,
    coef: Number,
    form: Form,
    num_segments: int | None,
    cu_seqlens: Tensor | None,
) -> tuple[Steps, Tensor]:
    """The steps, and a score of each [B, K]."""
    check.choice("form", form, ("single", "accumulative"))
    own = token_values("rm_logprobs", rm_logprobs, mask)
    ratio = own if ref_logprobs is None else own - beside("ref_logprobs", ref_logprobs, "rm_logprobs", own, mask)
    steps = steps_of("num_segments", num_segments, segment_ids, mask, None, cu_seqlens)
    sums = number("coef", coef, own, check.finite) * steps.sums(ratio)
    return steps, torch.where(steps.there, sums.cumsum(-1), 0.0) if form == "accumulative" else sums


# ------------------------------------------------------------------------------------------------ shaped and combined
@recipe(
    "Clip and Delta",
    "arXiv 2410.15115",
    note="notes that quote section 4 of the paper; eta and alpha were not seen",
    passes=("rewards=rewards",),
    settings={"eta": 0.5},
)
def clip_delta(
    step_scores: Tensor,
    segment_ids: Tensor,
    mask: Tensor | None = None,
    *,
    eta: Number,
    rewards: Tensor | None = None,
    alpha: Number = 1.0,
    mode: Literal["clip", "delta", "clip-delta"] = "clip-delta",
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """r = alpha (c_k - c_{k+1}) at the end of step k, c = min(p - eta, 0), and R on the last token.

    The sum from a step on is c of that step: longer responses do not earn more. The last step gets 0, so that the one
    before it keeps its c. mode "clip": alpha c_k; "delta": c = p.

    Args:
        step_scores: p, [B, K]: a process reward model's.
        segment_ids: steps, [B, T] or [N].
        mask: its shape; nonzero = a token of the response.
        eta: what a step has to reach.
        rewards: [B], 0 or 1; None: no outcome.
        alpha: of the process rewards.
        mode: "clip", "delta" or "clip-delta", which the paper found best.
        cu_seqlens: [B + 1], of packed responses.
    """
    check.choice("mode", mode, ("clip", "delta", "clip-delta"))
    steps = steps_of("step_scores", step_scores, segment_ids, mask, rewards, cu_seqlens)
    p = steps.values("step_scores", step_scores)
    if mode != "delta":
        p = (p - number("eta", eta, p, check.finite)).clamp(max=0.0)
    if mode != "clip":
        p = -segment_diff(p, mode="forward", mask=steps.there, drop_last=True)
    return _with_outcome(number("alpha", alpha, p, check.finite) * p, steps)


def _with_outcome(scores: Tensor, steps: Steps) -> Tensor:
    """[B, K] at the ends of the steps, and the outcome, where there is one, on the last token; float32."""
    reward = steps.scatter(scores, "end")
    return reward if steps.rewards is None else reward + steps.at_end(steps.rewards)


@recipe(
    "PPR, ReNorm (hybrid reward normalization)",
    "arXiv 2509.25598",
    reconstructed="the abstract, and a reviewer's remark that 1/2 is subtracted from both rewards; where these are "
    "placed is our guess",
    passes=("rewards=rewards",),
)
def ppr(
    step_scores: Tensor,
    segment_ids: Tensor,
    mask: Tensor | None = None,
    *,
    rewards: Tensor,
    step_center: Number = 0.5,
    outcome_center: Number = 0.5,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """r = (p_k - step_center) + (R - outcome_center) at the end of step k: good steps of wrong answers earn nothing.

    Trained with PPO and GAE.

    Args:
        step_scores: p, [B, K], in [0, 1]: a judge's, by principles.
        segment_ids: steps, [B, T] or [N].
        mask: its shape; nonzero = a token of the response.
        rewards: [B], in [0, 1].
        step_center, outcome_center: as in the formula.
        cu_seqlens: [B + 1], of packed responses.
    """
    steps = steps_of("step_scores", step_scores, segment_ids, mask, rewards, cu_seqlens)
    p = steps.values("step_scores", step_scores)
    outcome = steps.outcomes - number("outcome_center", outcome_center, p, check.finite)
    return steps.scatter(p - number("step_center", step_center, p, check.finite) + outcome.unsqueeze(-1), "end")


@recipe(
    "G-RA (gated reward accumulation)",
    "arXiv 2508.10548",
    note="notes on the paper, and another's code",
    passes=("rewards=rewards",),
)
def g_ra(
    step_scores: Tensor,
    segment_ids: Tensor,
    mask: Tensor | None = None,
    *,
    rewards: Tensor,
    threshold: Number = 0.0,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """r = 1[R > threshold] p_k at the end of step k, and R on the last token: first what matters most.

    Args:
        step_scores: p, [B, K]: rewards of lower priority, such as an action's format.
        segment_ids: steps, [B, T] or [N].
        mask: its shape; nonzero = a token of the response.
        rewards: [B], of the highest priority: the outcome. Of software agents: 0 without a patch.
        threshold: what R has to exceed.
        cu_seqlens: [B + 1], of packed responses.
    """
    steps = steps_of("step_scores", step_scores, segment_ids, mask, rewards, cu_seqlens)
    p = steps.values("step_scores", step_scores)
    passed = steps.outcomes > number("threshold", threshold, p, check.finite)
    return _with_outcome(torch.where(passed.unsqueeze(-1), p, 0.0), steps)


@recipe(
    "VSRM (verifiable stepwise reward)",
    "arXiv 2508.10293",
    code="1benwu1/VSRM-Efficient-LRMs rollout_postprocess.py, reward_manager/naive.py",
    passes=("rewards=rewards",),
)
def vsrm(
    step_values: Tensor,
    segment_ids: Tensor,
    mask: Tensor | None = None,
    *,
    rewards: Tensor,
    decay: Number = 0.7,
    horizon: int = 4,
    threshold: Number = 1e-5,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """r = V_{k+1} - V_k at the end of step k, or where that is 0, decay^j times the next of them that is not; R last.

    Steps that change nothing are credited with the next change, if it is within `horizon` steps. The response's last
    token has R alone. Trained with PPO, gamma = lam = 1 and a KL coefficient of 0.001.

    Args:
        step_values: V, [B, K]: the share of right answers when the thinking is cut off after the step (five samples).
        segment_ids: steps, [B, T] or [N].
        mask: its shape; nonzero = a token of the response.
        rewards: [B].
        decay, horizon, threshold: as in `fastreward.segment_diff`, mode "lookahead".
        cu_seqlens: [B + 1], of packed responses.
    """
    steps = steps_of("step_values", step_values, segment_ids, mask, rewards, cu_seqlens)
    v = steps.values("step_values", step_values)
    change = segment_diff(v, mode="lookahead", mask=steps.there, decay=decay, horizon=horizon, threshold=threshold)
    return steps.scatter(change, "end") + steps.at_end(steps.outcomes)  # the last step's own change is 0


@recipe(
    "LaRe (latent reward, redistributed returns)",
    "arXiv 2412.11120",
    code="thu-rllab/LaRe mujoco/reward_model/RD.py, mpe/models/policy/ppo.py",
    passes=("step_scores=step_scores",),
)
def lare(
    segment_ids: Tensor,
    mask: Tensor | None = None,
    *,
    step_scores: Tensor | None = None,
    rewards: Tensor | None = None,
    num_segments: int | None = None,
    per_step: bool = True,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """r = f_k K at the end of step k: what a model, trained so that the mean of f is R / K, gives each of the K steps.

    Without the model: R / K, the uniform redistribution. The model is trained with (mean of f - R / K)^2, f made from
    latent factors that a language model has proposed.

    Args:
        segment_ids: steps, [B, T] or [N].
        mask: its shape; nonzero = a token of the response.
        step_scores: f, [B, K]; or
        rewards: [B], to be spread evenly. One of these two.
        num_segments: K, with rewards; needed on a GPU, as in `fastreward.segment_reduce`.
        per_step: False: f as it is.
        cu_seqlens: [B + 1], of packed responses.
    """
    if (step_scores is None) == (rewards is None):
        raise ValueError("step_scores, rewards: expected exactly one of them")
    if step_scores is None:
        steps = steps_of("num_segments", num_segments, segment_ids, mask, rewards, cu_seqlens)
        return steps.scatter((steps.outcomes.unsqueeze(-1) / steps.count.clamp(min=1)).expand_as(steps.tokens), "end")
    steps = steps_of("step_scores", step_scores, segment_ids, mask, None, cu_seqlens)
    factor = steps.count if check.flag("per_step", per_step) else 1
    return steps.scatter(factor * steps.values("step_scores", step_scores), "end")

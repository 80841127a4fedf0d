"""Credit from values of steps: what a step adds to the chance of success, as more rollouts or probes tell.

Values of steps are step_values [B, K], one for each step, and segment_ids [B, T] (or packed [N] with cu_seqlens) say
which tokens a step has, as in step_rewards.py. Recipes return constants: float32 in the shape of the tokens, 0 where
the mask is 0. NaN in rewards: not scored; such a response is in no statistic, and its tokens get 0.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastreward._arguments import check
from fastreward._arguments.groups import GroupIds
from fastreward._arguments.numbers import Number, number
from fastreward.group import group_advantages
from fastreward.recipes._catalogue.registry import recipe
from fastreward.recipes._shared.steps import Steps, responses_of, steps_of, whitened
from fastreward.recipes._shared.tokens import beside, per_response, token_values
from fastreward.returns import discounted_returns
from fastreward.segments import scatter_rewards, segment_diff

__all__ = ["spae", "spo_chain", "spo_cuts", "spo_mask", "vine_ppo"]


@recipe(
    "SPO-chain (segment policy optimization)",
    "arXiv 2505.23564",
    code="AIFrameResearch/SPO math_episode_generator_with_mc_advantages.py, ppo_trainer.py",
)
def spo_chain(
    step_values: Tensor,
    segment_ids: Tensor,
    old_logprobs: Tensor,
    mask: Tensor | None,
    rewards: Tensor,
    *,
    start_values: Tensor | None = None,
    prob_threshold: Number = 0.9,
    whiten: bool = True,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """A = V_k - V_{k-1} on the tokens of segment k with exp(old_lp) < prob_threshold, whitened over these; V_K = R.

    Segments end where V was estimated (`recipes.spo_cuts`). Tokens that are sure get 0; leave them out of the loss too:
    keep=recipes.spo_mask(...).

    Args:
        step_values: V, [B, K]: the mean reward of rollouts (nine) from the end of each segment; that of a response's
            last segment is R and is not read.
        segment_ids: segments, [B, T] or [N].
        old_logprobs, mask: its shape; nonzero = a token of the response.
        rewards: [B].
        start_values: [B], from the prompt; None: the first segment gets 0, as in the released code without a cut there.
        prob_threshold: from where on a token is sure.
        whiten: False: as they are, to whiten over all ranks by `fastreward.whiten`.
        cu_seqlens: [B + 1], of packed responses.
    """
    steps = steps_of("step_values", step_values, segment_ids, mask, rewards, cu_seqlens)
    v = torch.where(
        steps.final, steps.outcomes.unsqueeze(-1), steps.values("step_values", step_values, among=~steps.final)
    )
    first = "zero" if start_values is None else per_response("start_values", start_values, "segment_ids", v)
    gains = steps.scatter(segment_diff(v, mask=steps.there, first=first))
    unsure = _unsure(old_logprobs, steps, prob_threshold)
    gains = gains.masked_fill(~unsure, 0.0)
    if not check.flag("whiten", whiten):
        return gains
    return whitened(gains, unsure | (steps.mask & ~unsure.any()))  # none: all are 0, but whitening needs tokens


@recipe(
    "SPO's probability mask",
    "arXiv 2505.23564",
    code="AIFrameResearch/SPO ppo_trainer.py",
    returns="mask",
)
def spo_mask(old_logprobs: Tensor, mask: Tensor | None = None, *, prob_threshold: Number = 0.9) -> Tensor:
    """keep = exp(old_lp) < prob_threshold: tokens that were sure anyway are no decisions.

    Args:
        old_logprobs: [B, T] or [N].
        mask: its shape; nonzero = a token of the response; others are not kept.
        prob_threshold: from where on a token is sure.
    """
    old = token_values("old_logprobs", check.tensor("old_logprobs", old_logprobs).detach(), mask)
    unsure = old.exp() < number("prob_threshold", prob_threshold, old, check.finite)
    return unsure if mask is None else unsure & (mask != 0)


@recipe(
    "SPO-chain's cuts",
    "arXiv 2505.23564",
    code="AIFrameResearch/SPO math_episode_generator_with_mc_advantages.py",
    returns="ends",
)
def spo_cuts(
    old_logprobs: Tensor,
    mask: Tensor | None = None,
    *,
    interval: int = 5,
    prob_threshold: Number = 0.9,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """ends = before the first, the sixth, the eleventh, ... token with exp(old_lp) < prob_threshold, and at the end.

    Segments for `recipes.spo_chain`: `fastreward.segment_ids(mask, ends=ends)`. The value of each is estimated where it
    ends; where the first token is unsure, that of the prompt too, for start_values.

    Args:
        old_logprobs: [B, T] or [N].
        mask: its shape; nonzero = a token of the response.
        interval: unsure tokens of a segment.
        prob_threshold: from where on a token is sure.
        cu_seqlens: [B + 1], of packed responses.

    Returns:
        Truth values in the shape of the tokens: a segment ends with this one.
    """
    interval = check.whole("interval", interval, "unsure tokens of a segment")
    if interval < 1:
        raise ValueError(f"interval: expected at least 1, got {interval}")
    unsure = spo_mask(old_logprobs, mask, prob_threshold=prob_threshold)
    tokens = responses_of("old_logprobs", unsure, mask, None, cu_seqlens)
    so_far = discounted_returns(unsure, tokens.mask, reverse=False, cu_seqlens=cu_seqlens)
    segment = (so_far / interval).ceil().int()  # from 0, or from 1 where the first token is unsure
    ids = segment.masked_fill(~tokens.mask, -1)
    columns = unsure.shape[-1] // interval + 2
    there = ids.new_ones((tokens.rows, columns))
    return scatter_rewards(there, ids, place="end", mask=tokens.mask, cu_seqlens=cu_seqlens) != 0


def _unsure(old_logprobs: Tensor, steps: Steps, prob_threshold: Number) -> Tensor:
    """Bool in the shape of tokens: those that count and were less likely than the threshold."""
    like = torch.zeros_like(steps.mask, dtype=torch.float32)
    old = beside("old_logprobs", check.tensor("old_logprobs", old_logprobs).detach(), "segment_ids", like, steps.mask)
    return spo_mask(old, steps.mask, prob_threshold=prob_threshold)


@recipe(
    "VinePPO",
    "arXiv 2410.01679",
    code="McGill-NLP/VinePPO math_episode_generator_with_mc_advantages.py",
)
def vine_ppo(
    step_values: Tensor,
    segment_ids: Tensor,
    mask: Tensor | None,
    rewards: Tensor,
    *,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """A = V_{k+1} - V_k on the tokens of step k, V = the value where the step begins; R - V_K on those of the last.

    The sum over the steps is R - V_0. Trained with PPO's loss.

    Args:
        step_values: V, [B, K]: the mean reward of rollouts (nine) from where each step begins; NaN: not estimated,
            that of the next step is taken (after the last one R), so that the step gets 0.
        segment_ids: steps, [B, T] or [N].
        mask: its shape; nonzero = a token of the response.
        rewards: [B].
        cu_seqlens: [B + 1], of packed responses.
    """
    steps = steps_of("step_values", step_values, segment_ids, mask, rewards, cu_seqlens)
    known = ~check.tensor("step_values", step_values).isnan()
    v = steps.values("step_values", step_values, among=known)
    return steps.scatter(segment_diff(v, mode="forward", mask=steps.there & known, last=steps.outcomes.nan_to_num(0.0)))


@recipe(
    "SPAE (step potential advantage estimation)",
    "arXiv 2601.03823",
    note="the potential in released code, the advantage in notes on the paper; that h is scaled per response is our "
    "reading",
    passes=("group_ids",),
)
def spae(
    accuracies: Tensor,
    confidences: Tensor,
    segment_ids: Tensor,
    mask: Tensor | None,
    rewards: Tensor,
    *,
    group_ids: GroupIds | None = None,
    group_size: int | None = None,
    alpha: Number = 0.5,
    xi: Number = 0.5,
    saturation: Number = 0.9,
    whiten: bool = True,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """A = whiten((R - mean) f_k + xi (exp(h_k) - mean exp(h))) on step k, of potentials P = 1.5 a c + 0.5 a - c.

    f_k = 1 - alpha (1 - exp(-C_k)), C_k = how many steps before have P > saturation: what comes after the answer was
    known counts less. h = P_k - P_{k-1} (0 for the first), from 0 to 1 in the response; mean exp(h) is the batch's.

    Args:
        accuracies, confidences: a and c, [B, K], in [0, 1]: where each step ends, of probes (five, of ten tokens): the
            mean probability of the right answer's tokens, and exp(-mean entropy).
        segment_ids: steps, [B, T] or [N]; they end with a full stop and an empty line.
        mask: its shape; nonzero = a token of the response.
        rewards: [B].
        group_ids, group_size: one of them, as in `fastreward.group_advantages`.
        alpha, xi, saturation: as in the formula.
        whiten: over the tokens of steps in the batch.
        cu_seqlens: [B + 1], of packed responses.
    """
    steps = steps_of("accuracies", accuracies, segment_ids, mask, rewards, cu_seqlens)
    a, c = steps.values("accuracies", accuracies), steps.values("confidences", confidences)
    potential = 1.5 * a * c + 0.5 * a - c
    known = (steps.there & (potential > number("saturation", saturation, a, check.finite))).double()
    before = known.cumsum(-1) - known
    factor = 1 - number("alpha", alpha, a, check.finite) * (1 - (-before).exp())
    rise = _to_unit(segment_diff(potential, mask=steps.there).double(), steps.there).exp()
    rise = rise - torch.where(steps.there, rise, 0.0).sum() / steps.there.sum().clamp(min=1)
    outcome = group_advantages(steps.outcomes, group_ids, group_size=group_size, scale="none").unsqueeze(-1)
    advantages = steps.scatter(outcome * factor + number("xi", xi, a, check.finite) * rise)
    return whitened(advantages, steps.in_step) if check.flag("whiten", whiten) else advantages


def _to_unit(x: Tensor, there: Tensor) -> Tensor:
    """Rows to [0, 1]; 0 where they have one value only."""
    if not x.shape[1]:
        return x
    low = torch.where(there, x, torch.inf).amin(-1, keepdim=True)
    high = torch.where(there, x, -torch.inf).amax(-1, keepdim=True)
    return torch.where(there & (high > low), (x - low) / (high - low), 0.0)

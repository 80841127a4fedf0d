"""Credit of turns: what each turn of a dialogue, or each call of a tool, was worth.

Turns are segments of the response, from `fastreward.segment_ids`: segment_ids [B, T] in [-1, S) (or [N], with
cu_seqlens) is the turn of each token, numbered from 0 in each response, -1 = none. Values of turns are [B, S]; NaN = no
value, and what lies beyond a response's last turn does not count. group_ids or group_size says which responses are to
the same prompt, as in `fastreward.group_advantages`. Recipes return advantages per token, in the shape of segment_ids,
which are the same on all tokens of a turn, 0 elsewhere.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from fastreward._arguments import check
from fastreward._arguments.groups import GroupIds, Groups
from fastreward._arguments.numbers import Number, number
from fastreward.group import group_advantages
from fastreward.group_statistics import group_statistics
from fastreward.recipes._catalogue.registry import recipe
from fastreward.recipes._shared.groups import prompts
from fastreward.recipes._shared.tokens import beside
from fastreward.recipes._shared.turns import Norm, TurnLabels, Turns, against, over_row, turns_of
from fastreward.segments import segment_reduce

__all__ = [
    "gigpo",
    "hgpo",
    "igpo",
    "istar",
    "match_tir",
    "pro_rag",
    "rlvmr",
    "turn_baseline",
]


# ------------------------------------------------------------------------------------------ returns from a turn on
@recipe(
    "Returns from a turn on, against those of the other responses",
    "J. Schulman et al., High-dimensional continuous control, arxiv.org/abs/1506.02438, with RLOO's baseline",
    reconstructed="policy gradient with a baseline that does not depend on the response itself",
    passes=("group_ids",),
)
def turn_baseline(
    turn_rewards: Tensor,
    segment_ids: Tensor,
    group_ids: GroupIds | None = None,
    *,
    group_size: int | None = None,
    gamma: Number = 1.0,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """A = G_k - mean of G_k over the other responses to the prompt, G_k = r_k + gamma G_{k+1}, 0 of an ended one.

    Unbiased where the policy decides when to stop: the baseline is made of other responses only, all of them, however
    many turns they have. Rewards that are normalised over "turn k of every response" and then added up are not: the
    baseline of a later turn is subtracted from those alone that go on, and so the number of turns carries reward.

    Args:
        turn_rewards: [B, S], NaN = none.
        segment_ids, group_ids, group_size, cu_seqlens: as at the head of `fastreward.recipes.turn_credit`.
        gamma: discount per turn.
    """
    turns, rewards = turns_of("turn_rewards", turn_rewards, segment_ids, cu_seqlens)
    returns = turns.returns(rewards, gamma).nan_to_num(0.0)
    groups = Groups.by(prompts(group_ids, group_size, len(returns)), turns.number)
    advantages = group_advantages(returns, groups, center="leave-one-out", scale="none", singleton="raw")
    return turns.tokens(advantages)


@recipe(
    "MatchTIR (the response and the turn, each in its group)",
    "arXiv 2601.10712",
    code="quchangle1/MatchTIR core_algos.py",
    passes=("group_ids",),
)
def match_tir(
    turn_rewards: Tensor,
    segment_ids: Tensor,
    group_ids: GroupIds | None = None,
    *,
    group_size: int | None = None,
    lam: Number = 0.9,
    eps: Number = 1e-6,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """A = (norm of sum_j r_j over the responses + norm of D_k over turn k of each) / 2, D_k = r_k + lam D_{k+1}.

    norm = (x - mean) / (std + eps). A response or turn alone in its group keeps its value. As the mean has the response
    itself in it, turns that few responses reach get less: (n - 1) / n of n.

    Args:
        turn_rewards: [B, S], the mean match of a turn's tool calls with those of the reference; of the last turn the
            answer's F1 (`recipes.match_tir_rewards`). NaN = none.
        segment_ids, group_ids, group_size, cu_seqlens: as at the head of `fastreward.recipes.turn_credit`.
        lam: discount per turn.
        eps: as in the formula.
    """
    turns, rewards = turns_of("turn_rewards", turn_rewards, segment_ids, cu_seqlens)
    groups = prompts(group_ids, group_size, len(rewards))
    of_response = against(over_row(rewards, "sum"), groups, "mean-std", eps, singleton="raw")
    returns = turns.returns(rewards, lam)
    of_turn = against(returns, Groups.by(groups, turns.number), "mean-std", eps, singleton="raw")
    return turns.tokens((of_response.unsqueeze(-1) + of_turn) / 2)


@recipe(
    "IGPO (information gain-based policy optimization)",
    "arXiv 2510.14967",
    note="notes that quote the paper; the separate norm as a port of the code has it",
    passes=("group_ids",),
)
def igpo(
    turn_rewards: Tensor,
    segment_ids: Tensor,
    group_ids: GroupIds | None = None,
    *,
    group_size: int | None = None,
    norm: Literal["joint", "separate"] = "joint",
    gamma: Number = 1.0,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """A = x_k + gamma x_{k+1} + ..., x = (r - mean) / sqrt(var + 1e-8) over all turns of all responses to the prompt.

    The variance is biased. norm "separate": gains and outcomes each on their own. The mean is subtracted once for each
    turn that follows, so the number of turns itself carries reward, which it does not in `turn_baseline`.

    Args:
        turn_rewards: [B, S], what each turn has added to the answer's likelihood, and the outcome at the last turn:
            `fastreward.segment_reduce(recipes.igpo_gain(...), segment_ids, op="last")`. NaN = none.
        segment_ids, group_ids, group_size, cu_seqlens: as at the head of `fastreward.recipes.turn_credit`.
        norm: as above.
        gamma: discount per turn.
    """
    check.choice("norm", norm, ("joint", "separate"))
    turns, rewards = turns_of("turn_rewards", turn_rewards, segment_ids, cu_seqlens)
    keys = () if norm == "joint" else (turns.last.long(),)
    groups = turns.of_prompts(prompts(group_ids, group_size, len(rewards)), *keys)
    scaled = against(rewards, groups, "mean-std", 1e-8, singleton="zero", ddof=0, eps_inside=True)
    return turns.tokens(turns.returns(scaled, gamma))


# ------------------------------------------------------------------------------------------- episode and step together
def _episode(turns: Turns, rewards: Tensor, groups: Groups, norm: Norm, eps: Number, across_turns: bool) -> Tensor:
    """[B, S]: outcomes in the group, whose statistics are over all turns, or over the responses."""
    if check.flag("across_turns", across_turns):
        return against(turns.on_turns(rewards), turns.of_prompts(groups), norm, eps, singleton="raw")
    return against(rewards, groups, norm, eps, singleton="raw").unsqueeze(-1).expand(turns.there.shape)


@recipe(
    "GiGPO (group-in-group policy optimization)",
    "arXiv 2505.10978",
    code="verl-agent core_gigpo.py",
    passes=("states=states", "group_ids=group_ids"),
)
def gigpo(
    turn_rewards: Tensor,
    segment_ids: Tensor,
    rewards: Tensor,
    *,
    states: TurnLabels,
    group_ids: GroupIds | None = None,
    group_size: int | None = None,
    gamma: Number = 0.95,
    weight: Number = 1.0,
    norm: Norm = "mean",
    eps: Number = 1e-6,
    across_turns: bool = True,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """A = norm of R over the prompt + weight norm of D_k over the turns in the same state, D_k = r_k + gamma D_{k+1}.

    norm "mean": x - mean; "mean-std": (x - mean) / (std + eps). A turn alone in its state gets 0 of the second part, a
    response alone keeps R.

    Args:
        turn_rewards: [B, S], the environment's, NaN = none.
        segment_ids, group_ids, group_size, cu_seqlens: as at the head of `fastreward.recipes.turn_credit`.
        rewards: [B], of the outcomes; NaN = not scored.
        states: what was observed before each turn: integers [B, S], or B lists of labels (strings, hashes), of which
            equal ones are one state of the prompt; -1 and None: none.
        gamma: discount per turn.
        weight, norm, eps: as above.
        across_turns: mean and std of R are over all turns (the code's), so that responses with many turns count more;
            False: over the responses.
    """
    turns, own = turns_of("turn_rewards", turn_rewards, segment_ids, cu_seqlens)
    groups = prompts(group_ids, group_size, len(own))
    episode = _episode(turns, turns.outcomes("rewards", rewards), groups, norm, eps, across_turns)
    same_state = turns.of_prompts(groups, turns.labels("states", states))
    step = against(turns.returns(own, gamma), same_state, norm, eps, singleton="zero")
    return turns.tokens(episode + number("weight", weight, own, check.finite) * step)


@recipe(
    "HGPO (hierarchy of groups: the same last states)",
    "HGPO, a recipe of verl-agent, github.com/langfengQ/verl-agent/tree/master/recipe/hgpo",
    code="verl-agent core_hgpo.py",
    passes=("states=states", "group_ids=group_ids"),
)
def hgpo(
    turn_rewards: Tensor,
    segment_ids: Tensor,
    *,
    states: TurnLabels,
    group_ids: GroupIds | None = None,
    group_size: int | None = None,
    rewards: Tensor | None = None,
    history: int = 2,
    alpha: Number = 1.0,
    gamma: Number = 0.95,
    norm: Norm = "mean-std",
    eps: Number = 1e-6,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """A = sum w_k A_k / (sum w_k + eps), w_k = (k + 1)^alpha, A_k = norm of D over turns with the same last k states.

    k = 1, ..., history + 1, the own state and those before it; those whose A_k is 0 are left out. D_j = r_j + gamma
    D_{j+1}; norm "mean": x - mean, "mean-std": (x - mean) / (std + eps), the std biased.

    Args:
        turn_rewards: [B, S], the environment's, NaN = none.
        segment_ids, group_ids, group_size, cu_seqlens: as at the head of `fastreward.recipes.turn_credit`.
        states: as in `recipes.gigpo`.
        rewards: [B], of the outcomes: adds their norm over the prompt's turns (std unbiased) as k = 0.
        history: states before the own one, at least 0.
        alpha: 0 weighs all histories alike.
        gamma: discount per turn.
        norm, eps: as above.
    """
    turns, own = turns_of("turn_rewards", turn_rewards, segment_ids, cu_seqlens)
    history = check.whole("history", history, "states before the own one")
    groups, returns = prompts(group_ids, group_size, len(own)), turns.returns(own, gamma)
    state = turns.labels("states", states).index.to(own.device)
    power = number("alpha", alpha, own, check.finite)
    total, weights = torch.zeros_like(own), torch.zeros_like(own)
    levels: list[tuple[int, Tensor]] = []
    if rewards is not None:
        levels.append((0, _episode(turns, turns.outcomes("rewards", rewards), groups, norm, eps, True)))
    for k in range(1, history + 2):
        before = torch.nn.functional.pad(state, (k - 1, 0), value=-1)[:, : state.shape[1]]
        groups = turns.of_prompts(groups, before)
        levels.append((k, against(returns, groups, norm, eps, singleton="zero", ddof=0)))
    for k, found in levels:
        weight = torch.where(found != 0, float(k + 1) ** power, 0.0)
        total, weights = total + weight * found, weights + weight
    return turns.tokens(total / (weights + number("eps", eps, own, check.not_negative)).clamp(min=1e-38))


@recipe(
    "RLVMR (verifiable meta-reasoning rewards)",
    "arXiv 2507.22844",
    code="core_rlvmr.py",
    passes=("tags=tags", "group_ids=group_ids"),
)
def rlvmr(
    turn_rewards: Tensor,
    segment_ids: Tensor,
    rewards: Tensor,
    *,
    tags: TurnLabels,
    group_ids: GroupIds | None = None,
    group_size: int | None = None,
    weight: Number = 1.0,
    norm: Norm = "mean",
    eps: Number = 1e-6,
    across_turns: bool = True,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """A = norm of R over the prompt + weight norm of r_k over its turns with the same tag.

    norm "mean": x - mean; "mean-std": (x - mean) / (std + eps); a value alone in its group stays. Half the sum of both
    with "mean-std" is the paper's form.

    Args:
        turn_rewards: [B, S]: of a planning turn, c if the response succeeds; exploring, c for an action not yet taken;
            reflecting, c where the turn before was invalid and the action changes; else 0. NaN = none.
        segment_ids, group_ids, group_size, cu_seqlens: as at the head of `fastreward.recipes.turn_credit`.
        rewards: [B], of the outcomes; NaN = not scored.
        tags: what each turn does: integers [B, S], or B lists of labels; -1 and None: nothing, no second part (in the
            code such turns have a tag of their own).
        weight, norm, eps: as above.
        across_turns: as in `recipes.gigpo`.
    """
    turns, own = turns_of("turn_rewards", turn_rewards, segment_ids, cu_seqlens)
    groups = prompts(group_ids, group_size, len(own))
    episode = _episode(turns, turns.outcomes("rewards", rewards), groups, norm, eps, across_turns)
    same_tag = turns.of_prompts(groups, turns.labels("tags", tags))
    step = against(own, same_tag, norm, eps, singleton="raw")
    return turns.tokens(episode + number("weight", weight, own, check.finite) * step)


@recipe(
    "iStar (implicit step rewards of a trained reward model; OPRL)",
    "arXiv 2509.19199",
    code="Tongyi-ConvAI/Qwen-Character core_istar.py; the statistics as in the paper, over all steps",
    passes=("prm_logprobs=prm_logprobs", "old_logprobs=old_logprobs", "group_ids=group_ids"),
)
def istar(
    segment_ids: Tensor,
    rewards: Tensor,
    *,
    prm_logprobs: Tensor,
    old_logprobs: Tensor,
    group_ids: GroupIds | None = None,
    group_size: int | None = None,
    beta: Number = 0.05,
    alpha: Number = 1.0,
    norm: Norm = "mean-std",
    eps: Number = 1e-6,
    num_segments: int | None = None,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """A = norm of R over the responses + alpha norm of s_k over all turns, s_k = beta sum of (prm_lp - old_lp).

    norm "mean-std": (x - mean) / (std + eps); "mean", the code's default: x - mean. A response alone keeps R, a turn
    alone s_k. (The code's statistics see only the first turn of each response, by mistake.)

    Args:
        segment_ids, group_ids, group_size, cu_seqlens: as at the head of `fastreward.recipes.turn_credit`.
        rewards: [B], of the outcomes; NaN = not scored.
        prm_logprobs, old_logprobs: in the shape of segment_ids, of the implicit reward model and of the policy.
        beta, alpha, norm, eps: as above.
        num_segments: more than any of segment_ids; default: the largest + 1, which a GPU has to be told.
    """
    check.integers("segment_ids", segment_ids)
    mask = segment_ids >= 0
    prm = beside("prm_logprobs", prm_logprobs, "segment_ids", segment_ids, mask)
    ratio = prm - beside("old_logprobs", old_logprobs, "segment_ids", segment_ids, mask)
    sums = segment_reduce(ratio, segment_ids, num_segments=num_segments, cu_seqlens=cu_seqlens)
    turns, sums = turns_of("prm_logprobs", sums, segment_ids, cu_seqlens)
    scores = number("beta", beta, sums, check.finite) * sums
    groups = prompts(group_ids, group_size, len(scores))
    episode = against(turns.outcomes("rewards", rewards), groups, norm, eps, singleton="raw")
    step = against(scores, turns.of_prompts(groups), norm, eps, singleton="raw")
    return turns.tokens(episode.unsqueeze(-1) + number("alpha", alpha, scores, check.finite) * step)


@recipe(
    "ProRAG (process supervision beside the outcome)",
    "arXiv 2601.21912",
    code="lilinwz/ProRAG trainer.py",
    passes=("group_ids",),
)
def pro_rag(
    turn_rewards: Tensor,
    segment_ids: Tensor,
    rewards: Tensor,
    group_ids: GroupIds | None = None,
    *,
    group_size: int | None = None,
    beta: Number = 0.3,
    eps: Number = 1e-4,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """A = (R - mean) / (std + eps) + beta (r_k - mean) / sqrt(var + 1e-8), the second over all tokens of the group.

    The second mean and (biased) variance weigh each turn by its tokens. A response alone gets 0 of the first.

    Args:
        turn_rewards: [B, S], the process reward model's, +1 or -2 for the turn's format; NaN = none.
        segment_ids, group_ids, group_size, cu_seqlens: as at the head of `fastreward.recipes.turn_credit`.
        rewards: [B], of the outcomes, 2 F1 (0 below 0.2) and +-1 for the format; NaN = not scored.
        beta, eps: as in the formula.
    """
    turns, own = turns_of("turn_rewards", turn_rewards, segment_ids, cu_seqlens)
    groups = prompts(group_ids, group_size, len(own))
    outcome = against(turns.outcomes("rewards", rewards), groups, "mean-std", eps, singleton="zero")
    of_prompt, tokens = turns.of_prompts(groups), turns.lengths()

    def mean(x: Tensor) -> Tensor:
        return group_statistics(x, of_prompt, ("weighted-mean",), weights=tokens)["weighted-mean"]

    centred = own - mean(own)
    process = (centred / (mean(centred.square()) + 1e-8).sqrt()).nan_to_num(0.0)
    return turns.tokens(outcome.unsqueeze(-1) + number("beta", beta, own, check.finite) * process)

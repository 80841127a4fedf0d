"""Rewards of an agent's trajectories: calls of tools, answers found by searching, judged traces, masks drawn in turns.

All return a reward per response, for `fastreward.group_advantages`, but `match_tir_rewards` and `r3_rag`, which return
rewards per token.
Turns and segment_ids as at the head of `fastreward.recipes.turn_credit`; NaN where there is nothing, or no score.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from fastreward._arguments import check
from fastreward._arguments.groups import GroupIds
from fastreward._arguments.numbers import Number, number
from fastreward.group_statistics import group_statistics
from fastreward.recipes._catalogue.registry import recipe
from fastreward.recipes._shared.groups import given
from fastreward.recipes._shared.tokens import per_response
from fastreward.recipes._shared.turns import Turns, outcomes, over_row, scores, turns_of
from fastreward.segments import scatter_rewards, segment_diff, segment_reduce

__all__ = [
    "chat_r1",
    "long_trace_rl",
    "match_tir_rewards",
    "medsam_agent",
    "r3_rag",
    "search_r2",
    "sub_search",
]


@recipe(
    "MatchTIR's rewards (calls matched with those of a reference)",
    "arXiv 2601.10712",
    code="quchangle1/MatchTIR tool.py",
    returns="token rewards",
)
def match_tir_rewards(
    call_scores: Tensor,
    call_turns: Tensor,
    segment_ids: Tensor,
    rewards: Tensor,
    *,
    assignment: Literal["hard", "soft"] = "hard",
    reg: Number = 0.1,
    iterations: int = 100,
    num_segments: int | None = None,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """r_k = mean over turn k's calls of their scores with the reference calls that they are matched with; last, R.

    On the last token of each turn; `fastreward.segment_reduce(..., op="last")` makes them turn_rewards. hard: pairs by
    falling score, each call once, scores above 0; a call without a partner gets 0. soft: sum_q T_pq S_pq, T the plan of
    optimal transport between the calls (each 1 / P, and 1 / Q) with cost -S and entropy reg.

    Args:
        call_scores: [B, P, Q], S in [0, 1] of each call with each reference call; NaN = there is no such pair.
        call_turns: integers [B, P], the turn of each call, -1 = there is none.
        segment_ids, cu_seqlens: as at the head of `fastreward.recipes.turn_credit`.
        rewards: [B], F1 of the answers, of the last turns.
        assignment, reg: as above.
        iterations: of Sinkhorn's algorithm.
        num_segments: more than any of segment_ids; default: the largest + 1, which a GPU has to be told.
    """
    check.choice("assignment", assignment, ("hard", "soft"))
    check.integers("call_turns", call_turns)
    check.integers("segment_ids", segment_ids)
    if cu_seqlens is None and segment_ids.ndim != 2:
        raise ValueError(f"segment_ids: expected shape [B, T], or [N] with cu_seqlens, got {list(segment_ids.shape)}")
    lengths = segment_reduce(
        torch.ones_like(segment_ids, dtype=torch.float32),
        segment_ids,
        op="count",
        num_segments=num_segments,
        cu_seqlens=cu_seqlens,
    )
    turns = Turns.of(segment_ids, lengths.shape[1], cu_seqlens)
    outcome = per_response("rewards", rewards, "segment_ids", lengths)
    score = check.constant("call_scores", check.reals("call_scores", call_scores))
    if score.ndim != 3 or score.shape[0] != len(lengths):
        raise ValueError(f"call_scores: expected shape [{len(lengths)}, P, Q], got {list(score.shape)}")
    if check.values_checked(score):
        check.every("call_scores", score.isfinite() | score.isnan(), score, "finite numbers, or NaN for no pair")
    check.shape("call_turns", call_turns, score.shape[:2], "[B, P]")
    if check.values_checked(call_turns):
        check.segment_ids("call_turns", call_turns, lengths.shape[1])
    if assignment == "hard":
        matched = _greedy(score)
    else:
        matched = _transported(
            score, number("reg", reg, score, check.positive), check.whole("iterations", iterations, "")
        )
    found = segment_reduce(matched, call_turns, op="mean", num_segments=lengths.shape[1])
    return scatter_rewards(torch.where(turns.last, outcome.unsqueeze(-1), found), segment_ids, cu_seqlens=cu_seqlens)


def _greedy(score: Tensor) -> Tensor:
    """[B, P]: each call's partner's score; the best pair first, then the best of what is left."""
    left, found = score.nan_to_num(0.0).clamp(min=0), score.new_zeros(score.shape[:2])
    calls, partners = score.shape[1:]
    for _ in range(min(calls, partners)):
        best, at = left.flatten(1).max(-1, keepdim=True)
        found.scatter_add_(1, at // partners, best)  # 0 where nothing is left
        left = left.scatter(1, (at // partners).unsqueeze(-1).expand(-1, 1, partners), 0.0)
        left = left.scatter(2, (at % partners).unsqueeze(-1).expand(-1, calls, 1), 0.0)
    return found


def _transported(score: Tensor, reg: Number, iterations: int) -> Tensor:
    """[B, P]: sum over q of T S, T by Sinkhorn's algorithm on logarithms."""
    there = ~score.isnan()
    calls, partners = there.any(2, keepdim=True), there.any(1, keepdim=True)
    s = torch.where(there, score, 0.0).double()
    kernel = torch.where(there, s / reg, -torch.inf)
    share = -calls.sum(1, keepdim=True).log(), -partners.sum(2, keepdim=True).log()
    u, v = torch.zeros_like(s[:, :, :1]), torch.zeros_like(s[:, :1])
    for _ in range(iterations):
        u = torch.where(calls, share[0] - (kernel + v).logsumexp(2, keepdim=True), 0.0)
        v = torch.where(partners, share[1] - (kernel + u).logsumexp(1, keepdim=True), 0.0)
    return ((u + kernel + v).exp() * s).sum(-1).float()


@recipe(
    "R3-RAG (relevance of the documents, scaled by the outcome)",
    "arXiv 2505.23794",
    code="Yuan-Li-FNLP/R3-RAG experience_maker.py",
    returns="token rewards",
)
def r3_rag(
    turn_rewards: Tensor,
    segment_ids: Tensor,
    rewards: Tensor,
    *,
    well_formed: Tensor | None = None,
    right_factor: Number = 1.6,
    right_final: Number = 2.0,
    wrong_factor: Number = 0.8,
    wrong_final: Number = 0.0,
    unanswered_factor: Number = 0.9,
    malformed: Number = -0.9,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """r_k = relevance times 1.6 (right), 0.8 (wrong) or 0.9 (no answer); of the last step 2 (right) or 0 (wrong).

    On the last token of each step. The method trains with `fastreward.gae`, KL 0.01 and rewards normalised by running
    statistics.

    Args:
        turn_rewards: [B, S], relevance of the documents that a step has found, in [0, 1]; NaN = none.
        segment_ids, cu_seqlens: as at the head of `fastreward.recipes.turn_credit`.
        rewards: [B], of the answer: above 0 = right, NaN = there is none.
        well_formed: [B, S], 0 = malformed.
        right_factor, wrong_factor, unanswered_factor: of the relevance.
        right_final, wrong_final: the reward of the last step.
        malformed: the reward of a malformed step.
    """
    turns, relevance = turns_of("turn_rewards", turn_rewards, segment_ids, cu_seqlens)
    answer = turns.outcomes("rewards", rewards).unsqueeze(-1)
    good, none, one = answer > 0, answer.isnan(), torch.ones_like(answer)

    def times(x: Tensor, name: str, factor: Number) -> Tensor:
        return (x * number(name, factor, answer, check.finite)).float()

    scaled = torch.where(
        good, times(relevance, "right_factor", right_factor), times(relevance, "wrong_factor", wrong_factor)
    )
    scaled = torch.where(none, times(relevance, "unanswered_factor", unanswered_factor), scaled)
    final = torch.where(good, times(one, "right_final", right_final), times(one, "wrong_final", wrong_final))
    reward = torch.where(turns.last & ~none, final, scaled)
    if well_formed is not None:
        formed = turns.values("well_formed", well_formed)
        reward = torch.where(formed != 0, reward, times(one, "malformed", malformed))
    return scatter_rewards(reward, segment_ids, cu_seqlens=cu_seqlens)


@recipe(
    "Search-R2 (outcome and density of the evidence)",
    "arXiv 2602.03647",
    reconstructed="the abstract: outcome correctness coupled with the information density of the retrieved evidence",
    passes=("evidence=evidence",),
)
def search_r2(rewards: Tensor, *, evidence: Tensor, weight: Number = 1.0) -> Tensor:
    """R = outcome (1 + weight mean of the evidence).

    Args:
        rewards: [B], of the outcomes; NaN = not scored.
        evidence: [B, K], 1 for a useful chunk, 0 for another; NaN = there is none. Without any the mean is 0.
        weight: as in the formula.
    """
    outcome = given("rewards", rewards).float()
    density = over_row(scores("evidence", evidence, outcome), "mean", empty=0.0)
    return (outcome * (1 + number("weight", weight, outcome, check.finite) * density)).float()


@recipe(
    "SubSearch (quality of the sub-questions)",
    "arXiv 2604.07415",
    code="RoxanaPetcu/SubSearch qa_em.py",
    passes=("answerability=answerability", "decomposition=decomposition"),
)
def sub_search(
    rewards: Tensor,
    *,
    answerability: Tensor,
    decomposition: Tensor,
    format_rewards: Tensor | None = None,
    beta: Number = 0.2,
    high: Number = 1.0,
) -> Tensor:
    """R = min(EM + beta (1 - EM) (mean of answerability + mean of decomposition) / 2 + format, high).

    Intrinsic rewards count only as far as the answer is not right.

    Args:
        rewards: [B], exact match of the answer; NaN = not scored.
        answerability: [B, K], per step: the mean cosine of its sub-questions with their three nearest documents.
        decomposition: [B, K], per step: of one child max(0, 1 - |sim - 0.85| / 0.15), of more how the children cover
            their parent without overlap. NaN in either = no such step; without any 0.
        format_rewards: [B], as 0.2 for the structure, 0.1 for the answer's form, 0.1 for retrieving; None: 0.
        beta: its largest value; the code warms up and decays it (`fastreward.rewards.anneal`).
        high: the cap.
    """
    outcome = given("rewards", rewards).float()
    means = [
        over_row(scores(name, x, outcome), "mean", empty=0.0)
        for name, x in (("answerability", answerability), ("decomposition", decomposition))
    ]
    reward = outcome + number("beta", beta, outcome, check.finite) * (means[0] + means[1]) / 2 * (1 - outcome)
    if format_rewards is not None:
        reward = reward + per_response("format_rewards", format_rewards, "rewards", outcome)
    return reward.clamp(max=number("high", high, outcome, check.finite)).float()


@recipe(
    "ChatR1 (intent-aware reward)",
    "arXiv 2510.13312",
    reconstructed="the abstract: F1 of the answer and a reward of queries that hit the user's intent; how is our guess",
    passes=("intents=intents",),
)
def chat_r1(rewards: Tensor, *, intents: Tensor, alpha: Number = 0.5) -> Tensor:
    """R = F1 of the answer + alpha max over the queries of F1(query, gold rewrite).

    Args:
        rewards: [B], of the answers; NaN = not scored.
        intents: [B, K], of each query; NaN = there is none. Without any the maximum is 0.
        alpha: as in the formula.
    """
    outcome = given("rewards", rewards).float()
    best = over_row(scores("intents", intents, outcome), "max", empty=0.0)
    return (outcome + number("alpha", alpha, outcome, check.finite) * best).float()


@recipe(
    "LongTraceRL (rubrics over the trace)",
    "arXiv 2605.31584",
    code="THU-KEG/LongTraceRL sglang_rollout.py",
    passes=("group_ids",),
)
def long_trace_rl(
    rewards: Tensor,
    rubrics: Tensor,
    group_ids: GroupIds | None = None,
    *,
    group_size: int | None = None,
    mode: Literal["positive", "negative", "always", "longrlvr"] = "positive",
    rho: Number = 0.3,
    eta: Number = 0.5,
) -> Tensor:
    """R = (1 - rho) outcome + rho rubric / largest rubric of the group; 0 where the outcome is 0.

    mode "always": also where it is 0; "negative": only there, and elsewhere the outcome; "longrlvr": outcome + eta F +
    (1 - eta) outcome F, F = rubric / largest. A largest of 0 or less divides nothing.

    Args:
        rewards: [B], of the outcomes; NaN = not scored.
        rubrics: [B], NaN = not scored: 0.
        group_ids, group_size: as in `fastreward.group_advantages`.
        mode, rho, eta: as above; eta is our guess.
    """
    check.choice("mode", mode, ("positive", "negative", "always", "longrlvr"))
    outcome = given("rewards", rewards).float()
    rubric = outcomes("rubrics", rubrics, outcome)
    largest = group_statistics(rubric, group_ids, ("max",), group_size=group_size)["max"]
    share = torch.where(largest > 0, rubric / largest, rubric).nan_to_num(0.0)
    if mode == "longrlvr":
        eta = number("eta", eta, outcome, check.finite)
        return (outcome + eta * share + (1 - eta) * outcome * share).float()
    rho = number("rho", rho, outcome, check.finite)
    mixed = (1 - rho) * outcome + rho * share
    alone = {"positive": outcome == 0, "negative": outcome != 0, "always": torch.zeros_like(outcome, dtype=torch.bool)}
    return torch.where(alone[mode], outcome, mixed).float()


@recipe(
    "MedSAM-Agent (quality of the mask, and few turns)",
    "arXiv 2602.03320",
    reconstructed="the abstract: the mask's IoU, and a reward for turns that improve it; form and weights are ours",
)
def medsam_agent(
    turn_scores: Tensor,
    *,
    start: Number = 0.0,
    threshold: Number = 0.01,
    weight: Number = 0.5,
    turn_cost: Number = 0.0,
) -> Tensor:
    """R = last IoU + weight (share of turns whose IoU gain is >= threshold) - turn_cost turns.

    Args:
        turn_scores: [B, S], IoU of the mask after each turn; NaN = no such turn. Without any turn R is NaN.
        start: IoU before the first turn.
        threshold, weight, turn_cost: as in the formula.
    """
    iou = check.constant("turn_scores", check.reals("turn_scores", turn_scores))
    if iou.ndim != 2:
        raise ValueError(f"turn_scores: expected shape [B, S], got {list(iou.shape)}")
    iou = scores("turn_scores", iou, iou)
    there = ~iou.isnan()
    gains = segment_diff(iou.nan_to_num(0.0), mask=there, first=start)
    enough = (gains >= number("threshold", threshold, iou, check.finite)).float()
    useful = over_row(torch.where(there, enough, torch.nan), "mean")
    bonus = number("weight", weight, iou, check.finite) * useful
    cost = number("turn_cost", turn_cost, iou, check.finite) * there.sum(-1)
    return (over_row(iou, "last") + bonus - cost).float()

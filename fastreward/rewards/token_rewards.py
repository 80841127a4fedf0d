"""Rewards per token: a score per sequence on one of its tokens, less a KL penalty on each."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from fastreward._arguments import check
from fastreward._arguments.arrays import accepts_arrays
from fastreward._arguments.numbers import Number, joined_all, may_differ_from_0, number, split_all
from fastreward._arguments.options import PLACES, REWARD_KLS, Place, RewardKL
from fastreward._arguments.tokens import Tokens, token_bounds
from fastreward._runtime.custom_op import custom_op
from fastreward._runtime.dispatch import implementation, select
from fastreward._runtime.memory import empty


@custom_op("token_rewards_", mutates_args=("out",))
def _token_rewards_(
    scores: Tensor,
    logprobs: Tensor | None,
    ref_logprobs: Tensor | None,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    kl: str,
    place: str,
    known: list[float],
    given: Tensor | None,  # f64: instead of them, where the host does not know them all
    out: Tensor,
    backend: str,
) -> None:
    _forward(scores, logprobs, ref_logprobs, mask, cu_seqlens, kl, place, known, given, out, backend)
    torch.autograd.graph.increment_version(out)


@_token_rewards_.register_fake
def _(*_: Any) -> None:
    return None


@custom_op("token_rewards")
def _token_rewards(
    scores: Tensor,
    logprobs: Tensor | None,
    ref_logprobs: Tensor | None,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    kl: str,
    place: str,
    known: list[float],
    given: Tensor | None,
    backend: str,
) -> Tensor:
    like = mask if logprobs is None else logprobs
    assert like is not None
    out = empty(like.shape, torch.float32, like.device)
    _forward(scores, logprobs, ref_logprobs, mask, cu_seqlens, kl, place, known, given, out, backend)
    return out


@_token_rewards.register_fake
def _(logprobs: Tensor | None, mask: Tensor | None) -> Tensor:
    like = mask if logprobs is None else logprobs
    assert like is not None
    return like.new_empty(like.shape, dtype=torch.float32)


def _forward(
    scores: Tensor,
    logprobs: Tensor | None,
    ref_logprobs: Tensor | None,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    kl: Any,
    place: Any,
    known: list[float],
    given: Tensor | None,
    out: Tensor,
    backend: str,
) -> None:
    tokens = Tokens(tuple(out.shape), mask, cu_seqlens)
    numbers = joined_all(known, given, backend)
    implementation("rewards", backend).token_rewards(scores, logprobs, ref_logprobs, tokens, kl, place, numbers, out)


@accepts_arrays
def token_rewards(
    scores: Tensor,
    mask: Tensor | None,
    *,
    logprobs: Tensor | None = None,
    ref_logprobs: Tensor | None = None,
    kl: RewardKL = "k1",
    kl_coef: Number = 0.0,
    kl_clamp: Number | None = 20.0,
    kl_value_clamp: Number | None = None,
    clip: tuple[Number | None, Number | None] | None = None,
    place: Place = "end",
    cu_seqlens: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Rewards per token: each sequence's score on its last valid token, less kl_coef * KL(policy || reference) on each.

    What `discounted_returns` and `gae` take, in one pass (PPO's reward in InstructGPT, arXiv 2203.02155).

    Args:
        scores: [B], of any real dtype; NaN: not scored, nothing is placed. Rounded to float32.
        mask: [B, T], or [N] with cu_seqlens: bool, integer or float; nonzero = a token that the policy generated. What
            lies under a zero never matters. A sequence without a valid token gets 0 everywhere. None: all tokens of
            `logprobs` count.
        logprobs, ref_logprobs: of the policy that sampled and of the reference, as mask, of any floating dtype. Needed
            where kl_coef is not 0.
        kl: the estimate from x = ref_logprobs - logprobs: k1: -x. abs: |x|. k2: x^2 / 2. k3: e^x - x - 1
            (http://joschu.net/blog/kl-approx.html).
        kl_coef: its coefficient (0.05 and the like), which a controller may change at every step.
        kl_clamp: x is clamped to +- this first, as `policy_loss` does (None: not at all; verl: 20 for k3 alone).
        kl_value_clamp: so is the estimate (verl: 10 for k3; OpenRLHF: 10 for all).
        clip: (lowest, highest) of the scores, None: no bound (OpenRLHF's reward_clip_range).
        place: "end": on the last valid token; "start": on the first; "broadcast": on each.
        cu_seqlens: integers [B + 1], the packed sequences' bounds, from 0 to N.
        out: where the result goes, float32 in the tokens' shape, contiguous, memory of its own.

    kl_coef, the clamps and the bounds are numbers or 0-d tensors; another value compiles nothing.

    Returns:
        float32 in the tokens' shape, 0 where mask is. All arguments are constants.

    Raises:
        TypeError, ValueError: wrong dtype, shape, device or name, an argument or `out` that needs a gradient, `out`
            that overlaps an argument, kl_coef without log-probs; on the CPU (on a GPU with FASTREWARD_DEBUG=1) also for
            a NaN among log-probs where the mask is set, which on the CPU is seen once `out` has been written.
    """
    check.choice("kl", kl, REWARD_KLS)
    check.choice("place", place, PLACES)
    given = {"logprobs": logprobs, "ref_logprobs": ref_logprobs}
    terms = {name: check.floats(name, x) for name, x in given.items() if x is not None}
    reference, like = next(iter(terms.items())) if terms else ("mask", check.tensor("mask", mask))
    counted = check.mask(mask, reference, like)
    bounds = token_bounds(cu_seqlens, like, reference)
    if bounds is None and like.ndim != 2:
        raise ValueError(f"{reference}: expected [B, T], or [N] with cu_seqlens, got shape {list(like.shape)}")
    scores = _scores(scores, Tokens(tuple(like.shape), None, bounds).rows, reference, like)
    numbers = _numbers(kl_coef, kl_clamp, kl_value_clamp, clip, like)
    penalized = may_differ_from_0(kl_coef)
    for name in given:
        if name in terms:
            check.shape(name, terms[name], like.shape, f"as {reference}")
            check.same_device(name, terms[name], reference, like)
            terms[name] = check.constant(name, terms[name]).contiguous()
        elif penalized:
            raise ValueError(f"{name}: needed where kl_coef is not 0")
    if counted is None and not penalized:
        counted = torch.ones(like.shape, dtype=torch.bool, device=like.device)
    backend = select("rewards", like)
    pair = (terms["logprobs"], terms["ref_logprobs"]) if penalized else (None, None)
    if penalized and backend != "cpu" and check.values_checked(like):  # there the kernel sees it
        check.numbers_where_set(terms, counted)
    arguments = (scores, *pair, counted, bounds, kl, place, *split_all(numbers))
    if out is None:
        rewards: Tensor = _token_rewards(*arguments, backend)
        return rewards
    check.own_memory("out", check.output("token_rewards", "out", out, like, reference), (*arguments[:4], bounds))
    _token_rewards_(*arguments, out, backend)
    return out


def _scores(scores: Tensor, rows: int, reference: str, like: Tensor) -> Tensor:
    scores = check.reals("scores", scores)
    check.shape("scores", scores, (rows,), "one per sequence")
    check.same_device("scores", scores, reference, like)
    return check.constant("scores", scores).contiguous()


def _numbers(
    kl_coef: Number,
    kl_clamp: Number | None,
    kl_value_clamp: Number | None,
    clip: tuple[Number | None, Number | None] | None,
    like: Tensor,
) -> list[Number]:
    """The numbers of a call as layout.REWARD_NUMBERS names them."""
    clamps = {"kl_clamp": kl_clamp, "kl_value_clamp": kl_value_clamp}
    if clip is not None and (not isinstance(clip, tuple | list) or len(clip) != 2):
        raise TypeError(f"clip: expected (lowest, highest), got {clip!r}")
    low, high = (None, None) if clip is None else clip
    found = [
        number("kl_coef", kl_coef, like, check.finite),
        *(math.inf if x is None else number(name, x, like, check.positive) for name, x in clamps.items()),
        -math.inf if low is None else number("clip[0]", low, like, check.finite),
        math.inf if high is None else number("clip[1]", high, like, check.finite),
    ]
    lowest, highest = found[3:]
    if isinstance(lowest, float) and isinstance(highest, float) and lowest > highest:
        raise ValueError(f"clip: expected a lowest score that is not above the highest, got {clip!r}")
    return found

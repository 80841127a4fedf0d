"""Losses, each written once in one small language and run fused on every backend.

A loss is called with its parameters and passed on: `policy_loss(..., loss=losses.ppo(0.2, 0.28))`. `print` shows its
formula and derivative, `help(losses.ppo)` what it computes and where that was read.

Over log-probs, for `policy_loss`, `logits_policy_loss` and `linear_policy_loss`:
    ppo                           the clipped ratio, with dual clip and upper bound
    sapo, cfpo                    a soft gate, a quadratic penalty instead of the clip
    clip_cov, kl_cov              the few tokens of large covariance left out, or pulled back (`cov_mask` selects them)
    tw_grpo                       tokens weighted by importance (`tw_grpo_importance`)
    stable_reinforce, visurf      a bounded ratio and no outliers; given answers among the rollouts
    psr, nsr, w_reinforce         right answers alone, wrong ones alone, both with weights
    reinforce, gpg, sft, raft     the log-prob times the advantage, or without one
    dft, topr                     the log-prob times the probability; wrong answers as far as they are likely
    vapo, echo, loglinear_ppo     the clipped ratio and right answers' likelihood, tool outputs', a policy between
    cispo, dispo                  the clipped ratio as a constant weight of the log-prob
    dppo_tv, dppo_kl, kpop        bounds on a divergence
    vespo, dro                    a gate on the sequence's ratio; a quadratic pull
    sdpo, sdpo_topk               distillation from a teacher, on the sampled token or over k ids
    verifree, jepo, laser         reference answers; a bound on their likelihood; the model rates itself
    gspo, gspo_token, gmpo        one ratio for each sequence
    fipo, segment_ppo             a weight from what follows; one ratio for each segment (turn, step)
    m2po, bapo                    without the tokens farthest from the old policy; bounds that balance good and bad
    a2po, gvpo, kto               regressions of the log-ratio on rewards; desirable responses and others, unpaired
    flowrl                        the same with a learned log Z of the prompt, which gets a gradient
    real, pacs, brain, gdro       the rewards of a group as labels, probabilities or ranks
Over pairs, for `preference_loss`:
    dpo                           with its variants: hinge, IPO, EXO, NCA, APO, AOT, robust, f-divergences, ...
    cdpo, cream, dno              soft labels
    rpo, sppo, gpo                with a likelihood term; regressions
    simpo, alphapo, cpo, orpo     without a reference
    mm_dpo, mah_dpo               a margin that scales beta; several rewards
    tgdpo, treg                   token rewards (`ld_dpo_weights`: LD-DPO's token weights)

To write one, `define` makes a loss of a function over `Terms` (or `PairTerms`), with these:
    exp, log, clip, where, maximum, sigmoid, ...           operators, under NumPy's names
    seq_sum seq_mean seq_max seq_min                       over a sequence's tokens
    seq_cumsum seq_discounted_sum seq_shift                along a sequence's tokens, from either end
    segment_sum segment_mean                               over the token's segment: a turn, a step
    group_sum group_mean group_max group_min group_size    over the sequences of a group
    group_sum_others group_cumsum group_logsumexp
    batch_sum batch_mean batch_max batch_min batch_match   over the batch
    batch_largest                                          the smallest of a share of the largest
    batch_threshold                                        above it tokens are dropped, for a mean below a bound
    kl                                                     an estimate of the KL to the reference
    stop_gradient                                          a constant for the derivative
"""

from __future__ import annotations

from typing import TYPE_CHECKING as _TYPE_CHECKING

from fastreward.language.define import Definition, Loss, define
from fastreward.language.functions import *  # noqa: F403
from fastreward.language.messages import FUNCTIONS as _FUNCTIONS
from fastreward.language.node import Node
from fastreward.language.objective import kl
from fastreward.language.terms import PairTerms, Terms
from fastreward.losses.along import bapo, fipo, m2po, segment_ppo
from fastreward.losses.preference import (
    cdpo,
    cream,
    dno,
    dpo,
    gpo,
    ld_dpo_weights,
    mah_dpo,
    mm_dpo,
    rpo,
    sppo,
    tgdpo,
    treg,
)
from fastreward.losses.reference_free import alphapo, cpo, orpo, simpo
from fastreward.losses.score import (
    cispo,
    dft,
    dispo,
    dppo_kl,
    dppo_tv,
    dro,
    gpg,
    kpop,
    raft,
    reinforce,
    sdpo,
    sft,
    topr,
    verifree,
    vespo,
)
from fastreward.losses.selection import cov_mask, tw_grpo_importance
from fastreward.losses.sequence import (
    a2po,
    brain,
    flowrl,
    gdro,
    gmpo,
    gspo,
    gspo_token,
    gvpo,
    jepo,
    kto,
    laser,
    pacs,
    real,
    sdpo_topk,
)
from fastreward.losses.token import (
    cfpo,
    clip_cov,
    echo,
    kl_cov,
    loglinear_ppo,
    nsr,
    ppo,
    psr,
    sapo,
    stable_reinforce,
    tw_grpo,
    vapo,
    visurf,
    w_reinforce,
)

__all__ = [
    "Definition",
    "Loss",
    "Node",
    "PairTerms",
    "Terms",
    "a2po",
    "alphapo",
    "bapo",
    "brain",
    "cdpo",
    "cfpo",
    "cispo",
    "clip_cov",
    "cov_mask",
    "cpo",
    "cream",
    "define",
    "dft",
    "dispo",
    "dno",
    "dpo",
    "dppo_kl",
    "dppo_tv",
    "dro",
    "echo",
    "fipo",
    "flowrl",
    "gdro",
    "gmpo",
    "gpg",
    "gpo",
    "gspo",
    "gspo_token",
    "gvpo",
    "jepo",
    "kl",
    "kl_cov",
    "kpop",
    "kto",
    "laser",
    "ld_dpo_weights",
    "loglinear_ppo",
    "m2po",
    "mah_dpo",
    "mm_dpo",
    "nsr",
    "orpo",
    "pacs",
    "ppo",
    "psr",
    "raft",
    "real",
    "reinforce",
    "rpo",
    "sapo",
    "sdpo",
    "sdpo_topk",
    "segment_ppo",
    "sft",
    "simpo",
    "sppo",
    "stable_reinforce",
    "tgdpo",
    "topr",
    "treg",
    "tw_grpo",
    "tw_grpo_importance",
    "vapo",
    "verifree",
    "vespo",
    "visurf",
    "w_reinforce",
]
__all__ += sorted(_FUNCTIONS)

if not _TYPE_CHECKING:

    def __getattr__(name: str) -> object:
        import difflib

        near = ", ".join(difflib.get_close_matches(name, __all__))
        hint = f"did you mean {near}? " if near else ""
        methods = "`fastreward recipes` lists published methods"
        raise AttributeError(f"module 'fastreward.losses' has no attribute {name!r}; {hint}{methods}")

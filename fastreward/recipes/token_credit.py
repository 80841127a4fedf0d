"""Credit of tokens: from scores that tokens have of their own, and an outcome, to advantages or rewards per token.

Scores of tokens are [B, T], or packed [N] with cu_seqlens; r_t = reward of a token, R = rewards [B] of the outcomes.
What is made of steps is in step_rewards.py, step_credit.py and step_values.py. Recipes return constants: float32 in the
shape of the tokens, 0 where the mask is 0, unless they say so. NaN in rewards: not scored; such a response is in no
statistic, and its tokens get 0. In a group of one nothing is centred on the others: its outcome gives 0, as
`group_advantages` has it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from fastreward import losses
from fastreward._arguments import check
from fastreward._arguments.groups import GroupIds, numbered_groups
from fastreward._arguments.numbers import Number, number
from fastreward._arguments.tokens import one_per_token
from fastreward.group import group_advantages
from fastreward.group_statistics import group_statistics
from fastreward.recipes._catalogue.registry import recipe
from fastreward.recipes._shared.groups import finite_or_nan
from fastreward.recipes._shared.steps import Responses, responses_of, whitened
from fastreward.recipes._shared.tokens import beside, on_tokens, token_values
from fastreward.returns import discounted_returns

__all__ = ["capo", "effective_ranks", "nthr", "prime", "rlfr", "thr", "tw_grpo_weights", "verl_shaping"]

Vote = Literal["intersection", "majority", "union", "average", "first"]


# ---------------------------------------------------------------------------------------------------- reward models
@recipe(
    "PRIME (process reinforcement through implicit rewards)",
    "arXiv 2502.01456",
    code="PRIME-RL/PRIME core_algos.py, dp_prime.py; verl-recipe prime/prime_core_algos.py",
    passes=("group_ids",),
)
def prime(
    rm_logprobs: Tensor,
    ref_logprobs: Tensor,
    mask: Tensor | None,
    rewards: Tensor,
    *,
    group_ids: GroupIds | None = None,
    group_size: int | None = None,
    beta: Number = 0.05,
    lam: Number = 0.0,
    granularity: Literal["token", "whole"] = "token",
    use_gt: bool = False,
    keep_last: bool = False,
    batch_norm: bool = True,
    process_coef: Number = 5.0,
    outcome_coef: Number = 5.0,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """A = whiten(sum over the tokens from t on of process_coef P_t + outcome_coef O), P and O each less the others'.

    r_t = beta (rm_lp - ref_lp) + lam r_{t+1}; P_t = (r_t - mean of the group's responses' means) n / (n - 1), O = R
    less the mean of the others, on the last token.

    Args:
        rm_logprobs: of the response by the implicit reward model, [B, T] or [N].
        ref_logprobs: by the model that it was made from.
        mask: their shape; nonzero = a token of the response.
        rewards: [B], 0 or 1.
        group_ids, group_size: one of them, as in `fastreward.group_advantages`.
        beta, lam: as in the formula; lam = 0 is what was run.
        granularity: "token", or "whole": the sum of r_t on the last token.
        use_gt: the last token's ratio is replaced by what the others' sum lacks of R (verl's prime_use_gt, which needs
            lam > 0 to have an effect).
        keep_last: the last token keeps its r_t, as in the authors' first code; in verl's it has none.
        batch_norm: r_t by the batch's largest |sum of r from t on|.
        process_coef, outcome_coef: of the two parts.
        cu_seqlens: [B + 1], of packed responses.
    """
    check.choice("granularity", granularity, ("token", "whole"))
    own = token_values("rm_logprobs", rm_logprobs, mask)
    tokens = responses_of("rm_logprobs", own, mask, rewards, cu_seqlens)
    ratio = own - beside("ref_logprobs", ref_logprobs, "rm_logprobs", own, mask)
    ratio = number("beta", beta, own, check.finite) * ratio.masked_fill(~tokens.mask, 0.0)
    if check.flag("use_gt", use_gt):
        ratio = ratio + tokens.at_end(tokens.outcomes - tokens.total(ratio))
    process = discounted_returns(ratio, tokens.mask, gamma=lam, cu_seqlens=cu_seqlens)
    if granularity == "whole":
        process = tokens.at_end(tokens.total(process))
    elif not check.flag("keep_last", keep_last):
        process = process.masked_fill(tokens.is_last(), 0.0)
    if check.flag("batch_norm", batch_norm) and process.numel():
        ahead = discounted_returns(process, tokens.mask, cu_seqlens=cu_seqlens)
        least, most = ahead.aminmax()
        process = process / (torch.maximum(-least, most) + 1e-6)
    outcome = group_advantages(tokens.outcomes, group_ids, group_size=group_size, center="leave-one-out", scale="none")
    total = number("process_coef", process_coef, own, check.finite) * _less_others(
        process, tokens, group_ids, group_size
    ) + number("outcome_coef", outcome_coef, own, check.finite) * tokens.at_end(outcome)
    return whitened(discounted_returns(total, tokens.mask, cu_seqlens=cu_seqlens), tokens.mask)


def _less_others(x: Tensor, tokens: Responses, group_ids: GroupIds | None, group_size: int | None) -> Tensor:
    """Tokens less the mean of their group's responses' means, by the factor that leaves a response's own mean out."""
    found = group_statistics(tokens.means(x), group_ids, ("mean", "count"), group_size=group_size)
    mean, count = found["mean"].nan_to_num(0.0), found["count"]
    factor = torch.where(count > 1, count / (count - 1), 0.0)
    return tokens.on_tokens(factor) * (x - tokens.on_tokens(mean))


# ----------------------------------------------------------------------------------------------- scores of the model's
@recipe(
    "RLFR (flow environment)",
    "arXiv 2510.10201",
    code="Jinghaoleven/RLFR experience_maker.py, models/utils.py",
    passes=("group_ids",),
)
def rlfr(
    deviations: Tensor,
    mask: Tensor | None,
    rewards: Tensor,
    *,
    group_ids: GroupIds | None = None,
    group_size: int | None = None,
    weight: Number = 0.01,
    threshold: Number = 0.6,
    top: int = 15,
    eps: Number = 1e-9,
) -> Tensor:
    """A = (R - mean) / (std + eps) - weight (sum of u from t on), u the velocity deviations that stand out.

    u = (s - min) / (max - min) over the response; 0 where it is no more than `threshold`, and, where `top` or more are
    left, outside of the `top` largest (of equal ones the first). The code takes the second smallest value for the
    minimum, which is the response's own wherever a row has padding, whose 0 is the smallest.

    Args:
        deviations: [B, T], at least 0: how far the hidden states of each token are from where the flow model says.
        mask: [B, T]; nonzero = a token of the response.
        rewards: [B].
        group_ids, group_size: one of them, as in `fastreward.group_advantages`.
        weight, threshold, top, eps: as in the formula.
    """
    s = token_values("deviations", deviations, mask)
    tokens = responses_of("deviations", s, mask, rewards, None)
    bound, weight = number("threshold", threshold, s, check.finite), number("weight", weight, s, check.finite)
    top = check.whole("top", top, "tokens of a response")
    nothing = ~tokens.mask
    low = s.masked_fill(nothing, torch.inf).amin(-1, keepdim=True) if s.shape[1] else s
    high = s.masked_fill(nothing, -torch.inf).amax(-1, keepdim=True) if s.shape[1] else s
    u = ((s - low) / (high - low)).masked_fill(nothing | (high <= low), 0.0)
    u = _largest(u.masked_fill(u <= bound, 0.0), top)
    outcome = group_advantages(tokens.outcomes, group_ids, group_size=group_size, eps=eps)
    return discounted_returns(tokens.at_end(outcome) - weight * u, tokens.mask)


def _largest(x: Tensor, count: int) -> Tensor:
    """The `count` largest of each row, of equal ones the first; 0 elsewhere."""
    if count < 1 or count >= x.shape[1]:
        return x if count > 0 else torch.zeros_like(x)
    least = x.topk(count, dim=-1).values[:, -1:]
    above, equal = x > least, x == least
    among = equal.cumsum(-1) <= count - above.sum(-1, keepdim=True)
    return x.masked_fill(~(above | (equal & among)), 0.0)


@recipe(
    "VERL (velocity-exploiting rank learning)",
    "arXiv 2509.23808",
    code="hf618/VERL reward_manager_versions.py, ray_trainer.py `compute_advantage`",
    passes=("averages=averages",),
)
def verl_shaping(
    advantages: Tensor,
    ranks: Tensor,
    mask: Tensor,
    *,
    averages: Tensor,
    gain: Number = 2.0,
    scale: Number = 1.0,
    kappa: Number = 2.0,
    place: Literal["end", "broadcast"] = "end",
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """A + min(relu(aux), |A| / kappa), aux = scale (w tanh d(ER) + (1 - w) tanh d(ERV)), w = sigmoid(gain d(ERA)).

    d(x) = (x - average) / |average|, in [-5, 5]: how far the effective rank of the response's hidden states (ER), its
    velocity (ERV) and its acceleration (ERA) are from their running averages. Growing acceleration asks for more
    exploration (ER), falling for more of what works (ERV).

    Args:
        advantages: [B], or [B, T] or [N], GRPO's or PPO's.
        ranks: [B, 3]: ER, ERV and ERA of each response, of `recipes.effective_ranks`.
        mask: [B, T] or [N]; nonzero = a token of the response.
        averages: [3], of the batches before (the authors' keep 0.7 of the old one, or 0.3).
        gain, scale, kappa: as in the formula; the code's own gain is 1.5.
        place: "end", the last token alone gets it, as in the code; "broadcast": all do, as the paper has it.
        cu_seqlens: [B + 1], of packed responses.
    """
    check.choice("place", place, ("end", "broadcast"))
    counted = check.constant("mask", check.tensor("mask", mask)) != 0
    tokens = replace(responses_of("mask", counted, None, None, cu_seqlens), mask=counted)
    base = _spread("advantages", advantages, tokens)
    ranks, averages = (finite_or_nan(n, x).float() for n, x in (("ranks", ranks), ("averages", averages)))
    check.shape("ranks", ranks, (tokens.rows, 3), "effective rank, velocity, acceleration of each response")
    check.shape("averages", averages, (3,), "of each of ranks")
    distance = ((ranks - averages) / (averages.abs() + 1e-8)).clamp(-5.0, 5.0)
    rank, velocity, acceleration = distance.unbind(-1)
    explore = (number("gain", gain, base, check.finite) * acceleration).sigmoid()
    bonus = explore * rank.tanh() + (1 - explore) * velocity.tanh()
    bonus = (number("scale", scale, base, check.finite) * bonus).relu()
    given = tokens.at_end(bonus) if place == "end" else tokens.on_tokens(bonus)
    return base + torch.minimum(given, base.abs() / number("kappa", kappa, base, check.positive))


@recipe(
    "VERL's effective ranks",
    "arXiv 2509.23808",
    code="hf618/VERL metrics_utils.py, metrics_calculator.py",
    returns="statistics",
    settings={"stride": 2},
)
def effective_ranks(hidden: Tensor, mask: Tensor, *, stride: int = 40, max_tokens: int | None = 512) -> Tensor:
    """ER = exp(entropy of the singular values' shares) of the centred hidden states; ERV, ERA: how prefixes change it.

    m_j = ER of the first j stride tokens. ERV = mean of d_j = m_j - mean of those before, ERA = mean of d_j - d_{j-1};
    0 where there are too few prefixes. For `recipes.verl_shaping`. Row by row, as most of the time goes to eigenvalues,
    for which it waits on a GPU.

    Args:
        hidden: [B, T, D], hidden states of one layer; half precision too.
        mask: [B, T]; nonzero = a token of the response.
        stride: tokens from one prefix to the next.
        max_tokens: of the longest prefix; None: any.

    Returns:
        float32 [B, 3]: ER, ERV, ERA.
    """
    counted = check.constant("mask", check.tensor("mask", mask)) != 0
    if counted.ndim != 2:
        raise ValueError(f"mask: expected shape [B, T], got {list(counted.shape)}")
    stride = check.whole("stride", stride, "tokens from one prefix to the next")
    if stride < 1:
        raise ValueError(f"stride: expected at least 1, got {stride}")
    longest = counted.shape[-1] if max_tokens is None else check.whole("max_tokens", max_tokens, "tokens of a prefix")
    h = _per_token("hidden", hidden, counted)
    found = [_ranks(states[there], stride, longest) for states, there in zip(h, counted, strict=True)]
    return torch.stack(found).float() if found else h.new_zeros((0, 3), dtype=torch.float32)


def _ranks(h: Tensor, stride: int, longest: int) -> Tensor:
    """ER, ERV and ERA of one response, [tokens, D]: f64 [3]."""
    prefixes = range(stride, min(h.shape[0], longest) + 1, stride)
    m = torch.stack([_effective_rank(h[:k]) for k in prefixes]) if prefixes else h.new_zeros(0)
    before = m.cumsum(0)[:-1] / torch.arange(1, max(len(prefixes), 1), device=h.device)
    velocity = m[1:] - before
    changes = [x.mean() if x.numel() else h.new_zeros(()) for x in (velocity, velocity.diff())]
    return torch.stack([_effective_rank(h), *changes])


def _effective_rank(h: Tensor) -> Tensor:
    """Of the rows of h less their mean; 0 of fewer than two."""
    if h.shape[0] < 2:
        return h.new_zeros(())
    h = h - h.mean(0)
    gram = h @ h.mT if h.shape[0] < h.shape[1] else h.mT @ h
    singular = torch.linalg.eigvalsh(gram).clamp(min=0.0).sqrt()
    share = singular / singular.sum().clamp(min=1e-300)
    return (-torch.xlogy(share, share)).sum().exp()


def _spread(name: str, x: Tensor, tokens: Responses) -> Tensor:
    """[B], or in the shape of tokens, on the tokens that count: float32, a constant."""
    like = torch.zeros_like(tokens.mask, dtype=torch.float32)
    per_token = one_per_token(name, check.tensor(name, x), like.shape, tokens.cu_seqlens)
    if tokens.cu_seqlens is not None and not per_token:
        x = check.constant(name, check.reals(name, x))
        check.shape(name, x, (tokens.cu_seqlens.shape[0] - 1,), "one per response, or per token")
        return tokens.on_tokens(x)
    return on_tokens(name, x, "mask", like, tokens.mask)


@recipe(
    "TW-GRPO's weights (focused thinking)",
    "arXiv 2505.24718",
    code="longmalongma/TW-GRPO grpo_trainer.py",
    returns="token weights",
    passes=("group_size=2",),
)
def tw_grpo_weights(vocab_logprobs: Tensor, mask: Tensor, *, group_size: int, alpha: Number = 1.4) -> Tensor:
    """w = 1 + (alpha - 1) u: tokens count more where the group's next-token distributions disagree.

    u, in [0, 1], is `losses.tw_grpo_importance`; weights for any loss: `policy_loss(..., weights=w)`. The authors' own
    is `recipes.tw_grpo`, which takes u.

    Args:
        vocab_logprobs: [B, T, V], of the whole vocabulary; groups are contiguous.
        mask: [B, T]; nonzero = a token of the response.
        group_size: responses of a group.
        alpha: the largest weight; the authors' scripts have 1.5.
    """
    if check.floats("vocab_logprobs", vocab_logprobs).ndim != 3:
        raise ValueError(f"vocab_logprobs: expected shape [B, T, V], got {list(vocab_logprobs.shape)}")
    check.shape("mask", check.tensor("mask", mask), vocab_logprobs.shape[:2], "[B, T] of vocab_logprobs")
    importance = losses.tw_grpo_importance(vocab_logprobs, mask, group_size=group_size)
    weights = 1 + (number("alpha", alpha, importance, check.finite) - 1) * importance
    return torch.where(mask != 0, weights, 0.0)


# ------------------------------------------------------------------------------------------------- errors and influence
@recipe(
    "CAPO (verifiable generative credit assignment)",
    "arXiv 2508.02298",
    note="detailed notes; what is normalised over (all tokens of the group), ddof and eps are our guess",
    passes=("group_ids",),
)
def capo(
    errors: Tensor,
    mask: Tensor | None,
    rewards: Tensor,
    *,
    group_ids: GroupIds | None = None,
    group_size: int | None = None,
    vote: Vote = "majority",
    outcome_weight: Number = 2.0,
    process_weight: Number = 1.0,
    ddof: int = 1,
    eps: Number = 1e-6,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """A = (r - mean) / (std + eps) over the tokens of the group, r_t = outcome_weight R - process_weight error_t.

    Args:
        errors: [B, T] or [N], nonzero = the token is in a step that a critique calls wrong; or of several critiques,
            [B, T, C] or [N, C].
        mask: [B, T] or [N]; nonzero = a token of the response.
        rewards: [B], 0 or 1.
        group_ids, group_size: one of them, as in `fastreward.group_advantages`.
        vote: which tokens of several critiques are wrong: those of all ("intersection"), of half of them or more
            ("majority"), of any ("union"), of the "first"; "average": the share that says so.
        outcome_weight, process_weight: as in the formula; so that no error turns a right answer into a wrong one.
        ddof, eps: of the std.
        cu_seqlens: [B + 1], of packed responses.
    """
    check.choice("vote", vote, ("intersection", "majority", "union", "average", "first"))
    wrong = (check.constant("errors", check.tensor("errors", errors)) != 0).float()
    wrong = wrong if wrong.ndim == (3 if cu_seqlens is None else 2) else wrong.unsqueeze(-1)
    if not wrong.shape[-1]:
        raise ValueError("errors: expected at least one critique, got none")
    share = wrong[..., 0] if vote == "first" else wrong.mean(-1)
    least = {"intersection": 1.0, "majority": 0.5, "union": 1e-9}.get(vote)
    tokens = responses_of("errors", share, mask, rewards, cu_seqlens)
    voted = share if least is None else (share >= least).float()
    outcome_weight = number("outcome_weight", outcome_weight, share, check.finite)
    process_weight = number("process_weight", process_weight, share, check.finite)
    reward = outcome_weight * tokens.on_tokens(tokens.outcomes) - process_weight * voted
    return tokens.normalized(reward, group_ids, group_size, ddof=ddof, eps=eps)


@dataclass(frozen=True, slots=True)
class _Influence:
    """Of tokens on the right responses of their group: s_t = g_t^T M h_t, and what else is said of a group."""

    tokens: Responses
    score: Tensor  # [B, T] float64, 0 where no token is
    right: Tensor  # [B] bool
    share: Tensor  # [B] float64, of the right ones in the group
    count: Tensor  # [B] float64, of right ones
    least: Tensor  # [B] float64, of the right ones' mean scores; NaN without any


def _influence(
    residuals: Tensor,
    hidden: Tensor,
    mask: Tensor,
    rewards: Tensor,
    group_ids: GroupIds | None,
    group_size: int | None,
) -> _Influence:
    counted = check.constant("mask", check.tensor("mask", mask)) != 0
    tokens = responses_of("mask", counted, None, rewards, None)
    tokens = replace(tokens, mask=tokens.mask & counted)
    g, h = (_per_token(name, x, tokens.mask) for name, x in (("residuals", residuals), ("hidden", hidden)))
    index = numbered_groups(group_ids, group_size, counted.shape[0], counted)
    if index is None:
        raise ValueError("group_ids, group_size: expected exactly one of them")
    right = tokens.outcomes > 0
    own = g.mT @ h * right.view(-1, 1, 1)
    of_group = torch.zeros_like(own).index_add_(0, index, own)[index]
    score = (g @ of_group * h).sum(-1)
    scored = torch.where(tokens.outcomes.isnan(), torch.nan, right.double())
    found = group_statistics(scored, index, ("mean", "count"))
    share, count = found["mean"].double(), (found["mean"] * found["count"]).double().round()
    means = torch.where(right, tokens.means(score), torch.nan)
    least = group_statistics(means, index, ("min",))["min"].double()
    return _Influence(tokens, score, right, share, count, least)


def _per_token(name: str, x: Tensor, mask: Tensor) -> Tensor:
    """[B, T, D] float64, a constant: finite where the mask is set, 0 elsewhere."""
    x = check.constant(name, check.floats(name, x)).double()
    if x.ndim != 3 or x.shape[:2] != mask.shape:
        raise ValueError(f"{name}: expected shape [{mask.shape[0]}, {mask.shape[1]}, D], got {list(x.shape)}")
    check.same_device(name, x, "mask", mask)
    counted = mask.unsqueeze(-1)
    if check.values_checked(x):
        check.every(name, x.isfinite() | ~counted, x, "finite numbers where mask is set")
    return torch.where(counted, x, 0.0)


@recipe(
    "NTHR (negative token hidden reward)",
    "arXiv 2505.18830",
    note="an implementation note",
    passes=("residuals=residuals", "hidden=hidden", "rewards=rewards", "group_ids"),
)
def nthr(
    advantages: Tensor,
    mask: Tensor,
    *,
    residuals: Tensor,
    hidden: Tensor,
    rewards: Tensor,
    group_ids: GroupIds | None = None,
    group_size: int | None = None,
    beta: Number = 1.0,
) -> Tensor:
    """A, times 2 |1/2 - p| on tokens of wrong responses whose influence s on the right ones is above tau.

    s_t = g_t^T M h_t, M = sum of g h^T over the tokens of the group's right responses; tau = beta (least of the right
    responses' mean s), p = the share of right responses. Pushing such a token down would push right answers down.

    Args:
        advantages: [B], or [B, T].
        mask: [B, T]; nonzero = a token of the response.
        residuals: g, [B, T, V]: 1 at the sampled token less the policy's probabilities, over some ids (the method
            takes those that the group has sampled, and does not renormalise).
        hidden: h, [B, T, D], last hidden states.
        rewards: [B], above 0 = right.
        group_ids, group_size: one of them, as in `fastreward.group_advantages`.
        beta: of the threshold.
    """
    found = _influence(residuals, hidden, mask, rewards, group_ids, group_size)
    base = _spread("advantages", advantages, found.tokens)
    tau = number("beta", beta, base, check.finite) * found.least
    tokens, pushed = found.tokens, ~found.right & (found.share > 0) & (found.share < 1) & ~found.least.isnan()
    damped = tokens.on_tokens(pushed).bool() & (found.score > tau.unsqueeze(-1))
    return torch.where(damped, base * tokens.on_tokens(2 * (0.5 - found.share).abs()), base)


@recipe(
    "THR (token hidden reward)",
    "arXiv 2510.03669",
    reconstructed="notes on the paper; the scale of the influence, the factor and the threshold are our guess",
    passes=("residuals=residuals", "hidden=hidden", "rewards=rewards", "group_ids"),
)
def thr(
    advantages: Tensor,
    mask: Tensor,
    *,
    residuals: Tensor,
    hidden: Tensor,
    rewards: Tensor,
    group_ids: GroupIds | None = None,
    group_size: int | None = None,
    p: Number = 0.1,
    beta: Number = 1.0,
) -> Tensor:
    """A 1[|THR| > tau] (1 + p sign(THR)), THR = s of `recipes.nthr` by the right responses, negative in wrong ones.

    p > 0 leans to exploitation, p < 0 to exploration. tau = beta |least of the right responses' mean s|. A group
    without a right response stays as it is.

    Args:
        advantages: [B], or [B, T].
        mask, residuals, hidden, rewards, group_ids, group_size: as in `recipes.nthr`.
        p: how far it leans.
        beta: of the threshold.
    """
    found = _influence(residuals, hidden, mask, rewards, group_ids, group_size)
    base, tokens = _spread("advantages", advantages, found.tokens), found.tokens
    p, beta = number("p", p, base, check.finite), number("beta", beta, base, check.finite)
    signed = torch.where(found.right, 1.0, -1.0) / found.count.clamp(min=1)
    score = found.score * signed.unsqueeze(-1)
    dominant = score.abs() > (beta * (found.least / found.count.clamp(min=1)).abs()).unsqueeze(-1)
    compared = tokens.on_tokens(~found.least.isnan()).bool()
    return torch.where(compared, torch.where(dominant, base * (1 + p * score.sign()), 0.0).float(), base)

"""Divergences of two distributions over the vocabulary, for `fastreward.token_divergence`, and `define` for your own.

p is the student's distribution, q the teacher's. A divergence is a sum over the vocabulary of a function of log p and
log q, written in the loss language: its gradient is derived, and both run fused.

    forward_kl()                  KL(q || p) = sum q (log q - log p)
    reverse_kl()                  KL(p || q) = sum p (log p - log q)
    jsd(beta=0.5)                 beta KL(q || m) + (1 - beta) KL(p || m), m = beta q + (1 - beta) p
    skewed_forward_kl(alpha)      KL(q || alpha q + (1 - alpha) p)
    skewed_reverse_kl(alpha)      KL(p || alpha p + (1 - alpha) q)
    adaptive_kl(alpha=0.5)        share KL(q || p) + (1 - share) KL(p || q), share: where the difference lies
    total_variation()             sum |p - q| / 2
    alpha(alpha=0.5)              (1 - sum p^alpha q^(1 - alpha)) / (alpha (1 - alpha))
    hellinger()                   sum (sqrt p - sqrt q)^2 / 2, the squared Hellinger distance

One of your own:

    @fastreward.divergences.define
    def chi_squared(t):
        return t.q * (t.p / t.q - 1.0) ** 2
"""

from __future__ import annotations

from fastreward.language.define import Loss, define
from fastreward.language.divergence_programs import HEAD_SHARE
from fastreward.language.functions import abs as _abs
from fastreward.language.functions import exp, expm1, log, maximum, minimum, stop_gradient, where
from fastreward.language.node import Node
from fastreward.language.terms import Terms

__all__ = [
    "Loss",
    "adaptive_kl",
    "alpha",
    "define",
    "forward_kl",
    "hellinger",
    "jsd",
    "reverse_kl",
    "skewed_forward_kl",
    "skewed_reverse_kl",
    "total_variation",
]


def _check_share(**parameters: float) -> None:
    for name, value in parameters.items():
        if not 0.0 < value < 1.0:
            raise ValueError(f"{name}: expected a number between 0 and 1, both excluded, got {value!r}")


def _relative(x: Node, log_x: Node, log_y: Node) -> Node:
    """x (log x - log y), whose derivative for log x is itself: without the x besides it.

    Those sum to the whole mass of x, which a softmax keeps at 1: they would cancel in the gradient, in floats only
    nearly.
    """
    return x * (log_x - log_y) - (x - stop_gradient(x))


@define
def forward_kl(t: Terms) -> Node:
    """KL(q || p) = sum_j q_j (log q_j - log p_j), that of supervised distillation: mass-covering.

    Hinton et al. (arXiv:1503.02531). Verified in code: TRL 1.16 `trl/kernels/chunked_divergence.py`.
    """
    return _relative(t.q, t.log_q, t.log_p)


@define
def reverse_kl(t: Terms) -> Node:
    """KL(p || q) = sum_j p_j (log p_j - log q_j): mode-seeking.

    MiniLLM (arXiv:2306.08543). Verified in code: TRL 1.16 `trl/kernels/chunked_divergence.py`.
    """
    return _relative(t.p, t.log_p, t.log_q)


@define(check=_check_share)
def jsd(t: Terms, beta: float = 0.5) -> Node:
    """beta KL(q || m) + (1 - beta) KL(p || m), m = beta q + (1 - beta) p: the generalised Jensen-Shannon divergence.

    GKD (arXiv:2306.13649). Verified in code: TRL 1.16 `trl/kernels/chunked_divergence.py`, whose beta 0 and 1 are
    forward_kl and reverse_kl.
    """
    # A constant in the gradient: what comes through the mixture adds up to the mass of either side.
    log_m = stop_gradient(log(maximum(beta * t.q + (1.0 - beta) * t.p, 1e-37)))
    return beta * _relative(t.q, t.log_q, log_m) + (1.0 - beta) * _relative(t.p, t.log_p, log_m)


@define(check=_check_share)
def skewed_forward_kl(t: Terms, alpha: float = 0.1) -> Node:
    """KL(q || m), m = alpha q + (1 - alpha) p.

    DistiLLM (arXiv:2402.03898). Notes: ROLL `distill_config.py`.
    """
    mixture = maximum(alpha * t.q + (1.0 - alpha) * t.p, 1e-37)
    return t.q * (t.log_q - log(mixture))


@define(check=_check_share)
def skewed_reverse_kl(t: Terms, alpha: float = 0.1) -> Node:
    """KL(p || m), m = alpha p + (1 - alpha) q.

    DistiLLM (arXiv:2402.03898). Notes: ROLL `distill_config.py`.
    """
    mixture = maximum(alpha * t.p + (1.0 - alpha) * t.q, 1e-37)
    return t.p * (t.log_p - log(mixture))


@define(check=_check_share)
def adaptive_kl(t: Terms, alpha: float = 0.5) -> Node:
    """share KL(q || p) + (1 - share) KL(p || q): forward where the head differs, reverse where the tail does.

    The tail is the teacher's tokens that, from the least likely on (those of one probability in the order of ids), have
    at most alpha of its mass together, the head all others; share is what the head has of sum_j |p_j - q_j|, a constant
    in the gradient.

    AKL (arXiv:2404.02657). Verified in code: ROLL `various_divergence.py`.
    """
    share = t.extra(HEAD_SHARE, per="sequence")
    return share * _relative(t.q, t.log_q, t.log_p) + (1.0 - share) * _relative(t.p, t.log_p, t.log_q)


@define
def total_variation(t: Terms) -> Node:
    """sum_j |p_j - q_j| / 2: the largest difference in the probability of any set of tokens; gradient 0 where equal."""
    return 0.5 * _abs(t.p - t.q)


@define(check=_check_share)
def alpha(t: Terms, alpha: float = 0.5) -> Node:
    """(1 - sum_j p_j^alpha q_j^(1 - alpha)) / (alpha (1 - alpha)): towards reverse_kl for alpha to 1, forward_kl for 0.

    Amari's alpha-divergence, in Minka's parametrisation (MSR-TR-2005-173).
    """
    # With x the side of the smaller weight w: the division by w is of what is small by it, not of what has cancelled.
    # A weight below 1e-20 would leave float32, and its divergence has the limit's digits.
    forward = alpha <= 0.5
    small = maximum(minimum(alpha, 1.0 - alpha), 1e-20)
    x, log_ratio = where(forward, t.q, t.p), where(forward, t.log_p - t.log_q, t.log_q - t.log_p)
    between = where(forward, t.p - t.q, t.q - t.p)
    return (between - x * expm1(minimum(small * log_ratio, 80.0)) / small) / (1.0 - small)


@define
def hellinger(t: Terms) -> Node:
    """sum_j (sqrt p_j - sqrt q_j)^2 / 2: the squared Hellinger distance, between 0 and 1."""
    difference = exp(0.5 * t.log_p) - exp(0.5 * t.log_q)
    return 0.5 * difference * difference

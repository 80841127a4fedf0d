"""Positions of the per-token statistics in the tensors that every backend exchanges.

All backends of `logprobs` return their results in two tensors, `values` f32 [8, N] and `indices` i64 [2, N]; these
names say which row is which. The C++, CUDA and Triton sources use the same numbers.
"""

from __future__ import annotations

from enum import IntEnum
from typing import Final

#: Rows of `values` [8, N].
VALUES: Final = (
    "logprobs",
    "entropy",
    "logsumexp",
    "label_logit",
    "mean_logit",
    "log_sum_sq_probs",
    "max_logprob",
    "max_logit",  # raw and unrounded, for the backward: p from a rounded logsumexp is wrong where logits are large
)
#: Rows of `indices` [2, N].
INDICES: Final = ("argmax", "rank")
#: Per-row accumulator of a vocabulary slice, `state` f64 [N, 8]: what may be merged across slices or ranks.
STATE: Final = (
    "max",  # largest raw logit, -inf before the first column
    "sum_exp",  # sum of exp(t), t = (x - max) * inv_temperature
    "sum_t_exp",  # sum of t * exp(t), the entropy's numerator (t clamped so that -inf contributes 0)
    "sum_sq_exp",  # sum of exp(t)^2
    "sum_logit",  # sum of raw logits
    "label_logit",  # raw logit of the label, NaN until its slice was seen
    "argmax",  # first column that holds the maximum
    "rank",  # columns with a logit strictly above the label's
)

#: What callers may ask for.
OUTPUT_VALUES: Final = VALUES[:-1]
ALL_OUTPUTS: Final = (*OUTPUT_VALUES, *INDICES, "id_logprobs")
DIFFERENTIABLE: Final = ("logprobs", "entropy", "logsumexp", "log_sum_sq_probs", "id_logprobs")

#: Bit of each optional statistic in `flags`; logprobs, logsumexp and label_logit are always computed.
FLAG: Final = {
    "entropy": 1,
    "log_sum_sq_probs": 2,
    "mean_logit": 4,
    "argmax": 8,
    "rank": 16,
}

#: Names of the first entries of `PolicyLoss.metrics`, in order, as far as a call has them; those that a loss reports
#: itself follow. Metrics' docstring says what they are.
METRICS: Final = (
    "clip_fraction_low",
    "clip_fraction_high",
    "clip_fraction_dual",
    "kl_old_k1",
    "kl_old_k3",
    "kl_ref_k1",
    "kl_ref_k3",
    "ratio_mean",
    "ratio_min",
    "ratio_max",
    "entropy_mean",
    "token_count",
)


class Clip(IntEnum):
    """Which clip acted on a token: the values of `PolicyLoss.tokens["clip"]`.

    NONE: none did, and the token teaches as its advantage says. LOW, HIGH, DUAL: it is one of those that the metrics
    clip_fraction_low, clip_fraction_high and clip_fraction_dual count.
    """

    NONE = 0
    LOW = 1
    HIGH = 2
    DUAL = 3


#: The same for `value_loss`.
VALUE_METRICS: Final = ("value_mean", "return_mean", "explained_variance", "token_count")
#: As METRICS, for `preference_loss`, where all are always there.
PAIR_METRICS: Final = ("pair_count", "chosen_logprob", "rejected_logprob", "chosen_tokens", "rejected_tokens")

#: Numbers of a call of `token_rewards`, in order; no bound is an infinite one.
REWARD_NUMBERS: Final = ("kl_coef", "kl_clamp", "kl_value_clamp", "low", "high")


#: Rows of what `group`'s statistics return, f64 [8, N]: for each entry, statistics of the scored entries of its group.
GROUP_STATISTICS: Final = (
    "count",
    "mean",  # NaN of none; of equal values exactly their value
    "squares",  # sum of squared deviations from the mean
    "weighted_mean",  # NaN without any weight
    "max",  # -inf of none
    "second",  # the second largest, equal ones counted apart; -inf of one
    "min",  # +inf of none
    "rest",  # log of the sum of exp of all but one of the largest; where asked for
)


def flags_of(outputs: tuple[str, ...]) -> int:
    """Bit set of the optional statistics that `outputs` asks for (see FLAG)."""
    return sum(bit for name, bit in FLAG.items() if name in outputs)


#: Fields of a prefix tree's nodes, rows of `nodes` i64 [F, nodes] (csrc/cpu/prefix_tree/prefix_tree.hpp).
NODES: Final = (
    "parent",  # -1 for a root
    "depth",  # nodes above it
    "edge_start",  # tokens of a sequence before the node's own
    "edge_length",  # its own tokens, 0 for a root
    "count",  # sequences that pass through it or end there
    "first_row",  # the first of them
    "tout",  # end of its subtree's numbers
    "token_begin",  # unique tokens of the forest before its own
    "token_tout",  # the same at the end of its subtree
    "children",  # child nodes
    "row_begin",  # its sequences are order[row_begin : row_begin + count]
    "root",  # root of its group
)
#: Fields of its sequences, rows of `rows` i64 [4, B].
ROWS: Final = (
    "leaf",  # the node where the sequence ends
    "order",  # not of row b: the row at place b of the pre-order of leaves, ties in row order
    "start",  # flat index of its first token
    "length",  # its tokens
)

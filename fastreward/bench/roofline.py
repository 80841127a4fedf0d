"""The bytes that an operation cannot avoid moving, and its flops: the formulas behind every share of the limit.

A limit is never a data sheet's: `Traffic.seconds` divides by what was measured in the same run.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import inf

_LABEL = 8  # bytes of an int64 label or index
_STAT = 4  # bytes of a float32 statistic


@dataclass(frozen=True, slots=True)
class Bandwidth:
    """Bytes per second of this machine, measured in the run that it judges. `copy` counts the read and the write."""

    read: float
    copy: float
    flops: float = inf  # of its GEMMs, per second


@dataclass(frozen=True, slots=True)
class Traffic:
    """Bytes that have to be read and written once each; `flops` where arithmetic is the limit (a GEMM)."""

    read: float
    written: float
    flops: float = 0.0

    @property
    def total(self) -> float:
        """Bytes read plus bytes written."""
        return self.read + self.written

    def seconds(self, bandwidth: Bandwidth) -> float:
        """Least time: each written byte goes beside a read one at copy bandwidth, the other reads at read bandwidth.

        Where there are GEMMs, their time if that is longer.
        """
        paired = min(self.read, self.written)
        excess = self.read - paired
        moving = (2 * paired + (self.written - paired)) / bandwidth.copy + excess / bandwidth.read
        return max(moving, self.flops / bandwidth.flops)


def logprobs_forward(rows: int, vocab: int, itemsize: int, statistics: int = 1) -> Traffic:
    """Each logit read once; per row one label in and a few statistics out."""
    return Traffic(rows * (vocab * itemsize + _LABEL), rows * statistics * _STAT)


def logprobs_forward_backward(rows: int, vocab: int, itemsize: int, statistics: int = 1) -> Traffic:
    """Forward as above; the backward reads each logit once more and writes its gradient once (in place or fresh)."""
    forward = logprobs_forward(rows, vocab, itemsize, statistics)
    matrix = rows * vocab * itemsize
    return Traffic(forward.read + matrix + rows * (_LABEL + 2 * statistics * _STAT), forward.written + matrix)


def divergence(rows: int, vocab: int, itemsize: int, backward: bool) -> Traffic:
    """Both sides' logits read once per pass, the student's gradient written once; per row a few statistics."""
    read, matrix = rows * vocab * itemsize * 2, rows * vocab * itemsize
    if not backward:
        return Traffic(read, rows * _STAT)
    return Traffic(2 * read + rows * 2 * _STAT, matrix + rows * _STAT)


def linear_logprobs(rows: int, hidden: int, vocab: int, itemsize: int, backward: bool) -> Traffic:
    """hidden and weight read once per pass, their gradients written once; 2 N H V flops per GEMM, 1 of 4 forward."""
    operands = (rows * hidden + vocab * hidden) * itemsize
    gemm = 2.0 * rows * hidden * vocab
    if not backward:
        return Traffic(operands + rows * _LABEL, rows * _STAT, gemm)
    return Traffic(2 * operands + rows * _LABEL, operands + rows * _STAT, 4 * gemm)


def linear_divergence(rows: int, hidden: int, vocab: int, itemsize: int, backward: bool) -> Traffic:
    """Both sides' operands read once per pass, the student's gradients written once; 2 of 6 GEMMs forward."""
    operands = (rows * hidden + vocab * hidden) * itemsize
    gemm = 2.0 * rows * hidden * vocab
    if not backward:
        return Traffic(2 * operands, rows * _STAT, 2 * gemm)
    return Traffic(4 * operands, operands + rows * _STAT, 6 * gemm)


def policy_loss_forward_backward(tokens: int, per_token_inputs: int = 3, mask_itemsize: int = 1) -> Traffic:
    """Log-probs, old log-probs, advantages and the mask read once, the gradient written once."""
    return Traffic(tokens * (4 * per_token_inputs + mask_itemsize), tokens * 4)


def preference_loss_forward_backward(tokens: int, mask_itemsize: int = 1) -> Traffic:
    """Policy and reference log-probs and the mask read once; gradients are written once, and read the mask again."""
    return Traffic(tokens * (8 + 2 * mask_itemsize), tokens * 4)


def logits_policy_loss(rows: int, vocab: int, itemsize: int) -> Traffic:
    """Each logit read once, its gradient written once."""
    matrix = rows * vocab * itemsize
    return Traffic(matrix + rows * (_LABEL + 13), matrix)


def linear_policy_loss(rows: int, hidden: int, vocab: int, itemsize: int) -> Traffic:
    """hidden and weight read once, their gradients written once; three GEMMs: logits, and each factor's gradient."""
    operands = (rows * hidden + vocab * hidden) * itemsize
    return Traffic(operands + rows * (_LABEL + 13), operands, 6.0 * rows * hidden * vocab)


def group_advantages(rows: int, components: int = 1) -> Traffic:
    """Rewards and group indices in, advantages out (naming the groups, on the host, is what costs)."""
    return Traffic(rows * (4 * components + _LABEL), rows * 4)


def correction(tokens: int, mask_itemsize: int = 1) -> Traffic:
    """Both log-probs and the mask read once; the weights and what is kept written once."""
    return Traffic(tokens * (8 + mask_itemsize), tokens * 5)


def token_rewards(tokens: int, mask_itemsize: int = 1) -> Traffic:
    """Both log-probs and the mask read once, the rewards written once."""
    return Traffic(tokens * (8 + mask_itemsize), tokens * 4)


def value_loss_forward_backward(tokens: int, mask_itemsize: int = 1) -> Traffic:
    """Values, old values, returns and the mask read once, the gradient written once."""
    return Traffic(tokens * (12 + mask_itemsize), tokens * 4)


def whiten(elements: int, mask_itemsize: int = 1) -> Traffic:
    """Two reads (the variance needs the mean or a second look) and one write, the mask with each read."""
    return Traffic(elements * 2 * (4 + mask_itemsize), elements * 4)


def segment_reduce(tokens: int, segments: int) -> Traffic:
    """Values and i32 ids of tokens in, one value for each segment out."""
    return Traffic(tokens * 8, segments * 4)


def segment_scatter(tokens: int, segments: int) -> Traffic:
    """I32 ids of tokens and values of segments in, a value for each token out."""
    return Traffic(tokens * 4 + segments * 4, tokens * 4)


def segment_credit(tokens: int, segments: int) -> Traffic:
    """A reduction and a scatter; what is between them is as small as the segments are few."""
    return Traffic(tokens * 12 + segments * 16, tokens * 4 + segments * 16)


def returns(tokens: int, read: int, written: int, mask_itemsize: int = 1) -> Traffic:
    """So many arrays of tokens read and written once, and the mask read."""
    return Traffic(tokens * (4 * read + mask_itemsize), tokens * 4 * written)


def prefix_tree_build(tokens: int, unique: int) -> Traffic:
    """Tokens that are shared read once for each sequence (what is new need not be read), each token's node written."""
    return Traffic((tokens - unique) * 8, tokens * 4)


def prefix_tree_credit(tokens: int, mask_itemsize: int = 1) -> Traffic:
    """The mask read, each token's advantage written; a path is walked, so that no token's node is read."""
    return Traffic(tokens * mask_itemsize, tokens * 4)


def prefix_tree_pack(tokens: int, unique: int) -> Traffic:
    """Unique tokens read, six i64 written for each of them, and each token's place among them."""
    return Traffic(unique * 8, unique * 48 + tokens * 8)

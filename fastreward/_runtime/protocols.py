"""Protocols that a backend implements: one per operation, whose methods are the raw functions of its module.

Arguments are validated already. Functions never synchronise the device and allocate only what they return.
`layout.py` names the rows of the tensors that backends exchange. mypy holds every backend to these protocols
(tests/package/backend_protocols.py).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from torch import Tensor

from fastreward._arguments.divergence import DivergenceCall
from fastreward._arguments.options import (
    AdvantageOptions,
    AggregateOptions,
    GroupOptions,
    Place,
    ReturnsInputs,
    ReturnsOptions,
    RewardKL,
    Rules,
    SegmentOptions,
    TokenOp,
)
from fastreward._arguments.tokens import Tokens


class LogprobsKernels(Protocol):
    """Statistics of rows of logits, their joint gradient, and the same of a vocabulary in slices."""

    def forward(
        self,
        logits: Tensor,  # [N, V] f32, bf16 or f16, unit column stride, any row stride
        labels: Tensor,  # [N] i64
        inv_temperature: float | Tensor,  # a number or [N] f64, stride 0 allowed
        mask: Tensor | None,  # [N] bool; False: the row is not read, its outputs are 0
        keep_mask: Tensor | None,  # [N, V] bool
        keep_ids: Tensor | None,  # [N, k] i64, outside [0, V) = padding
        token_ids: Tensor | None,  # [N, K] i64, row stride 0 allowed
        flags: int,  # layout.FLAG
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(values f32 [8, N], indices i64 [2, N], id_logprobs f32 [N, K])."""

    def backward(
        self,
        logits: Tensor,
        labels: Tensor,  # outside [0, V): no term for the label
        inv_temperature: float | Tensor,
        mask: Tensor | None,
        keep_mask: Tensor | None,
        keep_ids: Tensor | None,
        token_ids: Tensor | None,
        values: Tensor,  # [8, N] f32, the forward's
        id_logprobs: Tensor,  # [N, K] f32
        grad_values: Tensor,  # [8, N] f32
        grad_ids: Tensor | None,  # [N, K] f32
        grad_logits: Tensor,  # [N, V], out, dtype of logits; may be logits
        inv_softcap: float = 0.0,
    ) -> None:
        """Write every element of grad_logits: 0 in masked rows and in columns that are not kept."""

    def accumulate(
        self,
        logits: Tensor,  # [N, Vc]: columns vocab_start .. vocab_start + Vc of the full rows
        labels: Tensor,  # [N] i64, ids of the full vocabulary
        vocab_start: int,
        inv_temperature: float | Tensor,
        state: Tensor,  # [N, 8] f64 (layout.STATE), in and out
        flags: int,
        label_logits: Tensor | None,  # [N] f32 raw, what rank compares with
    ) -> None:
        """Merge a slice of the vocabulary into `state`."""

    def finish(
        self, state: Tensor, inv_temperature: float | Tensor, vocab_size: int, flags: int
    ) -> tuple[Tensor, Tensor]:
        """(values f32 [8, N], indices i64 [2, N]) of the merged state."""


class DivergenceKernels(Protocol):
    """Divergences of two distributions over the vocabulary by programs of the loss language, and their gradient."""

    def forward(
        self,
        programs: Any,  # language.divergence_programs.DivergencePrograms
        logits: Tensor,  # [N, V] f32, bf16 or f16, unit column stride, any row stride
        teacher_logits: Tensor,  # the same, of any of these dtypes
        call: DivergenceCall,
        sums: int,  # of which derivatives: none, those for log p, those for log q too
        statistics: bool,  # whether entropies, log-probs of the labels and agreement are wanted
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(programs.values[sums]'s outputs f32 [1 + sums, N], both sides' values f32 [8, N], agreement f32 [N])."""

    def sums(
        self,
        programs: Any,
        logits: Tensor,  # [N, V of a slice of the vocabulary]
        teacher_logits: Tensor,  # the same columns
        call: DivergenceCall,
        count: int,  # `sums` of forward
        student: Tensor,  # [8, N] f32, of the whole vocabulary
        teacher: Tensor,
    ) -> Tensor:
        """What the slice adds to forward's outputs, f64 [1 + count, N]; 0 in masked rows."""

    def head_share(
        self,
        logits: Tensor,
        teacher_logits: Tensor,
        call: DivergenceCall,
        student: Tensor,  # [8, N] f32, the forward's
        teacher: Tensor,
        alpha: float,  # what the teacher's tail has of its mass, at most
    ) -> Tensor:
        """What lies in the teacher's head of sum |p - q|, f32 [N]: 1/2 of none, 0 in masked rows."""

    def backward(
        self,
        program: Any,  # its output: the gradient per token of the vocabulary
        parameters: Sequence[str],  # names of call.parameters
        logits: Tensor,
        teacher_logits: Tensor,
        call: DivergenceCall,
        student: Tensor,  # [8, N] f32, the forward's
        teacher: Tensor,
        inputs: Mapping[str, Tensor],  # f32 [N] each, what the program reads of a row
        label_gradients: Tensor | None,  # f32 [N], added at the label
        grad_logits: Tensor,  # [N, V], out; may be either side's logits
    ) -> None:
        """Write every element of grad_logits: 0 in masked rows."""


class GroupKernels(Protocol):
    """Group-normalised advantages, and statistics of groups."""

    def forward(
        self,
        rewards: Tensor,  # [B, K] f32 or f64, NaN = not scored
        group_index: Tensor | None,  # [B] i64, any labels; or
        group_size: int,  # > 0: groups of so many neighbours
        lengths: Tensor | None,  # [B] f32
        component_weights: Tensor | None,  # [K] f32
        center_values: Tensor | None,  # [B] f32
        scale_values: Tensor | None,  # [B] f32
        options: GroupOptions,
    ) -> Tensor:
        """Advantages f32 [B]."""

    def statistics(
        self,
        x: Tensor,  # [N] f32 or f64, NaN = not there
        group_index: Tensor | None,  # [N] i64, any labels; or
        group_size: int,  # > 0: groups of so many neighbours
        weights: Tensor | None,  # [N] f32, at least 0
        exponentials: bool,  # whether "rest" is asked for
    ) -> Tensor:
        """f64 [8, N] (layout.GROUP_STATISTICS)."""


class WhitenKernels(Protocol):
    """Whitening in one call, or statistics that ranks can merge and the affine map that follows from them."""

    def forward(self, x: Tensor, mask: Tensor | None, shift_mean: bool, ddof: int, eps: float, out: Tensor) -> None:
        """Whiten x, contiguous, into `out`, which may be x; 0 where the mask is 0."""

    def statistics(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """(count, mean, sum of squared deviations) of the valid positions, f64 [3]."""

    def apply(self, x: Tensor, mask: Tensor | None, affine: Tensor, out: Tensor) -> None:
        """(x - affine[0]) * affine[1] + affine[2] on the valid positions, 0 elsewhere; affine f64 [3]."""


class SegmentsKernels(Protocol):
    """Segments of rows of tokens: [B, T], or [N] where packed with cu_seqlens i64 [B + 1]. All tensors contiguous."""

    def ids(
        self,
        mask: Tensor | None,  # bool, tokens: nonzero = may be in a segment
        labels: Tensor | None,  # i32 or i64, tokens: below 0 = none; a segment is a run of one label
        marks: Tensor | None,  # bool or i32, tokens: how many segments end at a token; or else
        tail: bool,  # whether what comes after the last of those ends is a segment
        cu_seqlens: Tensor | None,
    ) -> Tensor:
        """i32, tokens: each token's segment in its row, -1 = none. One of the three tensors is given, at least."""

    def reduce(
        self,
        x: Tensor,  # f32, tokens
        segment_ids: Tensor | None,  # i32 or i64, tokens; outside [0, segments) = none; None: all are in segment 0
        weights: Tensor | None,  # bool or f32, tokens; 0: the token is not there, and not read
        cu_seqlens: Tensor | None,
        segments: int,
        options: SegmentOptions,
        checked: bool,  # whether a NaN that counts is an error, to be raised where values may be looked at
    ) -> Tensor:
        """F32 [B, segments]."""

    def adjoint(
        self,
        values: Tensor,  # f32 [B, segments]
        x: Tensor | None,  # as reduce had it, for ops whose derivative depends on it
        segment_ids: Tensor | None,  # None: every token is in segment 0
        weights: Tensor | None,  # one of the two is given
        cu_seqlens: Tensor | None,
        options: SegmentOptions,
        out: Tensor,  # f32, tokens
    ) -> None:
        """Write reduce's derivative for x, times `values`: for sum, mean, first and last they are put on tokens."""


class RewardsKernels(Protocol):
    """Rewards per token from scores per sequence."""

    def token_rewards(
        self,
        scores: Tensor,  # [B] f32, NaN = not scored
        logprobs: Tensor | None,  # f32 as the tokens, contiguous, with
        ref_logprobs: Tensor | None,
        tokens: Tokens,
        kl: RewardKL,
        place: Place,
        numbers: Sequence[float] | Tensor,  # layout.REWARD_NUMBERS; f64 where only a kernel may read them
        out: Tensor,  # f32 as the tokens, contiguous
    ) -> None:
        """Write the scores at their place, less kl_coef * KL on valid tokens; 0 elsewhere."""


class ReturnsKernels(Protocol):
    """Linear recurrences over the tokens of a row: returns, GAE, lambda-returns, V-trace."""

    def scan(
        self,
        inputs: ReturnsInputs,
        tokens: Tokens,
        numbers: Sequence[float] | Tensor,  # gamma, lam, scale, rho_bar, c_bar; f64 [5] where a kernel has to read them
        options: ReturnsOptions,
        out: Tensor,  # f32 in tokens.shape: returns, advantages (gae), targets (vtrace)
        second: Tensor | None,  # the same: returns (gae), advantages (vtrace)
    ) -> None:
        """Write every element of the results."""


class ProgramKernels(Protocol):
    """Programs of the loss language (fastreward.language.program.Program, which lies above this room)."""

    def run(
        self,
        program: Any,
        inputs: Sequence[Tensor],  # one per program.inputs, contiguous f32: as the tokens of its side, [B] or []
        sides: Sequence[Tokens],
        scalars: Sequence[float],  # values of program.scalars
        groups: Tensor | None,  # [B] i64: numbers 0, 1, ... of the sequences' groups
    ) -> tuple[list[Tensor], Tensor]:
        """(outputs f32, each as its tokens or [B]; batch values f32 [M])."""

    def threshold(self, x: Tensor, bound: float | Tensor, tokens: Tokens, share: bool) -> Tensor:
        """The largest of the valid x up to which their mean is below the bound, the smallest where none is; f32 [].

        share: the smallest of the floor(bound * count) largest, at least of one. NaN are left out; inf of none.
        """

    def scale(self, saved: Tensor, sequence_weight: Tensor | None, grad_loss: Tensor, tokens: Tokens) -> Tensor:
        """saved * sequence_weight[sequence] * grad_loss, f32 like saved; a 0 stays 0."""

    def broadcast_to_tokens(self, sequence_values: Tensor, grad_loss: Tensor, tokens: Tokens) -> Tensor:
        """sequence_values[sequence] * grad_loss on valid tokens, 0 elsewhere; f32 in tokens.shape."""


class LogitsPolicyLossKernels(Protocol):
    """From logits to the gradient of a loss for them."""

    def run(
        self,
        program: Any,  # its outputs: the loss's derivatives for what `gradients` names, per token
        logits: Tensor,  # [N, V] f32, bf16 or f16, unit column stride; N tokens in the order of `tokens`
        labels: Tensor,  # [N] i64
        inv_temperature: float | Tensor,
        inputs: Sequence[Tensor | None],  # as of ProgramKernels.run; None for logprob and entropy
        tokens: Tokens,
        scalars: Sequence[float],
        groups: Tensor | None,
        scale: Tensor,  # [] f32, the upstream gradient of the loss
        out: Tensor,  # [N, V] like logits; may be logits
        gradients: Sequence[str],  # of "logprob", "entropy", in this order
        entropy: bool,  # whether entropies are computed: wherever the program reads them or has their gradient
    ) -> tuple[Tensor, Tensor]:
        """Write the logits' gradient into `out`; (log-probs f32 [N], entropies f32 [N], or [0] without `entropy`)."""

    def rescale(self, grad: Tensor, upstream: Tensor, applied: Tensor) -> None:
        """grad [N, V] *= upstream / applied, nothing where they are equal; a 0 stays 0."""


class PrefixTreeKernels(Protocol):
    """Values on prefix trees, kept in `nodes` i64 [F, nodes] and `rows` i64 [4, B] (layout.NODES, layout.ROWS)."""

    def aggregate(
        self,
        values: Tensor,  # [B] f32 or f64
        weights: Tensor | None,  # [B] like values
        child_weights: Tensor | None,  # [nodes] like values
        nodes: Tensor,
        rows: Tensor,
        options: AggregateOptions,
    ) -> Tensor:
        """[nodes], the dtype of values."""

    def aggregate_backward(
        self,
        grad: Tensor,  # [nodes]
        values: Tensor,
        weights: Tensor | None,
        child_weights: Tensor | None,
        nodes: Tensor,
        rows: Tensor,
        options: AggregateOptions,
    ) -> Tensor:
        """Gradient for values, [B]; for mean, sum and logsumexp."""

    def advantages(self, values: Tensor, nodes: Tensor, rows: Tensor, options: AdvantageOptions) -> Tensor:
        """[nodes] from node values [nodes]; 0 for roots, without a value and with nothing to compare it with."""

    def propagate(self, scale: Tensor, shift: Tensor, nodes: Tensor, rows: Tensor, rules: Rules) -> Tensor:
        """x[root] = initial, x[n] = clamp(scale[n] * x[parent] + shift[n], low, high); all [nodes], f32 or f64."""

    def propagate_backward(
        self, grad: Tensor, scale: Tensor, shift: Tensor, nodes: Tensor, rows: Tensor, rules: Rules
    ) -> tuple[Tensor, Tensor]:
        """Gradients for scale and shift; none passes a bound that has cut, nor NaN."""

    def broadcast_to_tokens(
        self,
        values: Tensor,
        nodes: Tensor,
        rows: Tensor,
        extents: Tensor,
        mask: Tensor | None,
        place: Place,
        count: int,
        row_values: Tensor | None = None,
    ) -> Tensor:
        """Node values to flat tokens [count]; row_values [B]: added on every token of a row that gets credit."""

    def collect(
        self, tokens: Tensor, nodes: Tensor, rows: Tensor, extents: Tensor, mask: Tensor | None, place: Place
    ) -> Tensor:
        """Transpose of broadcast_to_tokens: flat tokens to node values [nodes], summed."""

    def gather(
        self, unique: Tensor, nodes: Tensor, rows: Tensor, extents: Tensor, mask: Tensor | None, count: int
    ) -> Tensor:
        """Values of unique tokens to flat tokens [count]; 0 outside of the sequences and where masked."""

    def scatter_reduce(
        self,
        tokens: Tensor,
        nodes: Tensor,
        rows: Tensor,
        extents: Tensor,
        mask: Tensor | None,
        op: TokenOp,
        unique: int,
    ) -> Tensor:
        """Flat tokens to unique tokens [unique]: sum, mean or first of the valid ones, 0 where there is none."""

    def node_of_token(self, nodes: Tensor, rows: Tensor, extents: Tensor, count: int) -> Tensor:
        """i32 [count]: each token's node, -1 outside of the sequences."""

    def unique_of_token(self, nodes: Tensor, rows: Tensor, extents: Tensor, count: int) -> Tensor:
        """i64 [count]: each token's unique token, -1 outside of the sequences."""


class PrefixTreeBuildKernels(Protocol):
    """Prefix trees from sequences, and what packings are made of."""

    def starts(self, mask: Tensor, extents: Tensor) -> Tensor:
        """Flat index of each row's first valid token, i64 [B]; where its extent begins if there is none."""

    def lengths(self, mask: Tensor, extents: Tensor, starts: Tensor | None) -> Tensor:
        """Tokens from each row's start to its last valid one, i64 [B]."""

    def build(
        self,
        tokens: Tensor | None,  # flat, i64 or i32; or
        parent_row: Tensor | None,  # [B] i64, and
        branch_position: Tensor | None,  # [B] i64
        starts: Tensor,  # [B] i64
        lengths: Tensor,  # [B] i64
        group: Tensor,  # [B] i64
        ordered_groups: bool,
        compress: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(nodes, rows, sizes i64 [3]: nodes, groups, unique tokens)."""

    def layout(self, tokens: Tensor, nodes: Tensor, rows: Tensor, unique: int) -> tuple[Tensor, ...]:
        """i64 [unique] each: token id, position, parent (-1: none), end of the subtree, sequences, flat index."""


class PrefixTreeHostKernels(PrefixTreeKernels, PrefixTreeBuildKernels, Protocol):
    """Trees on the CPU, where packings are planned."""

    def bins(self, nodes: Tensor, rows: Tensor, max_tokens: int, by_rows: bool) -> tuple[Tensor, int]:
        """(bin of each row i64 [B], bins); or bins = -1 - b where row b is longer than max_tokens."""

    def blocks(self, tout: Tensor, block: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """kv blocks of each q block: counts i32 [n], indices i32 [n, n] of partial ones, then of full ones."""

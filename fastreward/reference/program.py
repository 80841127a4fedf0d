"""Programs of the loss language in float64 torch, node by node: slow, obvious, and differentiable by autograd.

A node is anything with op, args, level (0 scalar, 1 batch, 2 sequence, 3 token), side, value, name and id. Token values
are [B, T], sequence values [B, 1], everything else [1, 1].
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

#: The operators, by name.
ELEMENTWISE: dict[str, Callable[..., Tensor]] = {
    "add": torch.add,
    "sub": torch.sub,
    "mul": torch.mul,
    "div": torch.div,
    "neg": torch.neg,
    "abs": torch.abs,
    "sign": lambda x: torch.where(x.isnan(), x, torch.sign(x)),
    "sqrt": torch.sqrt,
    "exp": torch.exp,
    "expm1": torch.expm1,
    "log": torch.log,
    "log1p": torch.log1p,
    "log1mexp": lambda x: torch.where(x > -0.5, torch.log(-torch.expm1(x)), torch.log1p(-torch.exp(x))),
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "logsigmoid": torch.nn.functional.logsigmoid,
    # As the backends have it: a tie goes to the first argument, where torch shares the gradient.
    "minimum": lambda x, y: torch.where((x > y) | y.isnan(), y, x),
    "maximum": lambda x, y: torch.where((x < y) | y.isnan(), y, x),
    "clip": lambda x, low, high: torch.where(x < low, low, torch.where(x > high, high, x)),
    "where": torch.where,
    "stop_gradient": torch.detach,
    "lt": torch.lt,
    "le": torch.le,
    "gt": torch.gt,
    "ge": torch.ge,
    "eq": torch.eq,
    "ne": torch.ne,
    "and": torch.logical_and,
    "or": torch.logical_or,
    "not": torch.logical_not,
    "outside": lambda x, low, high: (x < low) | (x > high),
}


class Values:
    """Values of nodes, computed when they are asked for.

    inputs: by (name, side), [B, T], [B] or []. masks: bool [B, T], one per side. groups: int64 [B]. scalars: by name.
    dtype: another than float64 shows what plain torch would have given.
    """

    def __init__(
        self,
        inputs: Mapping[tuple[str, int], Tensor],
        masks: Sequence[Tensor],
        groups: Tensor | None = None,
        scalars: Mapping[str, float] | None = None,
        dtype: torch.dtype = torch.float64,
    ) -> None:
        self._inputs, self._masks, self._groups, self._scalars = inputs, masks, groups, scalars or {}
        self._dtype = dtype
        self._known: dict[int, Tensor] = {}
        self._counting = torch.stack([mask.any(-1, keepdim=True) for mask in masks]).any(0)  # that count

    def set(self, node: Any, value: float) -> None:
        """Gives a SCALAR node its value; of a condition 1 or 0."""
        self._known[node.id] = self._number(value) != 0 if node.boolean else self._number(value)

    def of(self, node: Any) -> Tensor:
        """[B, T] of a token node (of its side), [B, 1] of a sequence's, [1, 1] of any other."""
        waiting = [node]
        while waiting:
            top = waiting[-1]
            missing = [a for a in top.args if a.id not in self._known]
            if missing and top.id not in self._known:
                waiting.extend(missing)
                continue
            waiting.pop()
            if top.id not in self._known:
                self._known[top.id] = self._compute(top)
        return self._known[node.id]

    def _number(self, value: float) -> Tensor:
        return torch.full((1, 1), value, dtype=self._dtype, device=self._masks[0].device)

    def _compute(self, node: Any) -> Tensor:
        args = [self._known[a.id] for a in node.args]
        if node.op == "constant":
            return self._number(node.value) != 0 if node.boolean else self._number(node.value)
        if node.op == "parameter":
            return self._number(self._scalars[node.name])
        if node.op == "input":
            return self._input(node)
        if node.op.startswith("seq_"):
            return self._over_tokens(node, *args)
        if node.op == "segment_sum":
            return self._over_segments(node, *args)
        if node.op.startswith(("scan", "shift")):
            return self._along(node, *args)
        if node.op.startswith("group_"):
            return self._over_group(node.op, *args)
        if node.op == "batch_permute":
            x, source, target = (a.expand(self._masks[0].shape[0], 1).squeeze(-1) for a in args)
            out = torch.empty(len(x), dtype=torch.int64, device=x.device)
            out[target.argsort(stable=True)] = source.argsort(stable=True)
            return x[out].unsqueeze(-1)
        if node.op in ("batch_threshold", "batch_largest"):
            counted = args[0].expand(self._masks[node.side].shape)[self._masks[node.side]]
            return _threshold(counted.detach(), args[1], node.op == "batch_largest").reshape(1, 1)
        if node.op.startswith("batch_"):
            return _reduce(node.op, args[0].expand(self._masks[0].shape[0], 1)).reshape(1, 1)
        return self._elementwise(node, args)

    def _elementwise(self, node: Any, args: Sequence[Tensor]) -> Tensor:
        """The operator; what does not count keeps its value and gets no gradient, where autograd's 0 * inf is NaN."""
        operator = ELEMENTWISE[node.op]
        if node.level < 2 or not any(x.requires_grad for x in args):
            result: Tensor = operator(*args)
            return result
        valid = self._masks[node.side] if node.level == 3 else self._counting
        value = operator(*(x.detach() for x in args))
        return torch.where(valid, operator(*(torch.where(valid, x, torch.ones_like(x)) for x in args)), value)

    def _input(self, node: Any) -> Tensor:
        x = self._inputs[node.name, node.side].to(self._dtype)
        if node.level == 3:
            return torch.where(self._masks[node.side], x, 0.0)  # what lies under the mask leaks nowhere
        return x.reshape(-1, 1)

    def _over_tokens(self, node: Any, x: Tensor | None = None) -> Tensor:
        mask = self._masks[node.side]
        if x is None:
            length: Tensor = mask.sum(-1, keepdim=True).to(self._dtype)
            return length
        neutral: float = {"seq_sum": 0.0, "seq_max": -torch.inf, "seq_min": torch.inf}[node.op]
        return _reduce(node.op, torch.where(mask, x, neutral).mT).mT

    def _along(self, node: Any, x: Tensor, by: Tensor | None = None) -> Tensor:
        """Scans and shifts, token by token; those that do not count are passed over."""
        mask = self._masks[node.side]
        x = torch.where(mask, x, 0.0)
        y, found = x.new_zeros(len(mask)), list(x.mT)
        by = None if by is None else by.expand(mask.shape)
        width = mask.shape[1]
        for t in reversed(range(width)) if node.op.endswith("reverse") else range(width):
            here = x[:, t]
            if by is not None:
                c = by[:, t]
                here = here + torch.where((c == 0) & ~y.isfinite(), 0.0, c * y)
            found[t] = y if by is None else here
            y = torch.where(mask[:, t], here, y)
        return torch.stack(found, -1) if found else x

    def _over_segments(self, node: Any, x: Tensor, ids: Tensor) -> Tensor:
        """The sum over each run of equal ids, among the tokens that count; 0 below 0."""
        mask = self._masks[node.side]
        rows = []
        for row, own, counts in zip(x.expand(mask.shape), ids.expand(mask.shape), mask, strict=True):
            places = counts.nonzero().flatten()
            starts = torch.ones_like(places)
            starts[1:] = (own[places][1:] != own[places][:-1]).long()
            run = starts.cumsum(0) - 1
            sums = row.new_zeros(len(places)).index_add(0, run, row[places])[run]
            rows.append(torch.zeros_like(row).index_put((places,), torch.where(own[places] >= 0, sums, 0.0)))
        return torch.stack(rows) if rows else x.expand(mask.shape)

    def _over_group(self, op: str, x: Tensor, key: Tensor | None = None) -> Tensor:
        assert self._groups is not None
        together = self._groups.unsqueeze(0) == self._groups.unsqueeze(1)  # [sequence, other sequence]
        values = x.expand(len(self._groups), 1).mT
        if op == "group_sum_others":
            together = together & ~torch.eye(len(self._groups), dtype=torch.bool, device=x.device)
        if key is not None:
            keys, at = key.expand(len(self._groups), 1), torch.arange(len(self._groups), device=x.device)
            above = (keys.mT > keys) | ((keys.mT == keys) & (at.unsqueeze(0) <= at.unsqueeze(1)))
            below = (keys.mT < keys) | ((keys.mT == keys) & (at.unsqueeze(0) >= at.unsqueeze(1)))
            together = together & (above if op == "group_sum_before" else below)
        neutral = {"group_max": -torch.inf, "group_min": torch.inf}.get(op, 0.0)
        kind = op if op in ("group_max", "group_min") else "group_sum"
        return _reduce(kind, torch.where(together, values, neutral).mT).mT


def _reduce(op: str, x: Tensor) -> Tensor:
    """[n, k] to [1, k]; of nothing 0, -inf or inf."""
    if op.endswith("sum"):
        return x.sum(0, keepdim=True)
    empty = x.new_full((1, x.shape[1]), -torch.inf if op.endswith("max") else torch.inf)
    x = torch.cat([empty, x])
    return x.amax(0, keepdim=True) if op.endswith("max") else x.amin(0, keepdim=True)


def _threshold(x: Tensor, bound: Tensor, share: bool) -> Tensor:
    """The largest x up to which their mean is below `bound`, the smallest where it never is; inf of none. No NaN.

    share: the smallest of the floor(bound * count) largest, at least of one.
    """
    x = x[~x.isnan()].sort().values
    if not len(x):
        return torch.full((), torch.inf, dtype=x.dtype, device=x.device)
    if share:
        return x[-max(1, min(len(x), math.floor(float(bound) * len(x))))]
    means = x.cumsum(0) / torch.arange(1, len(x) + 1, device=x.device)
    whole = torch.cat([x[1:] != x[:-1], torch.ones_like(x[:1], dtype=torch.bool)])  # all of an equal run
    kept = whole & (means < bound.reshape(()))
    return x[kept].max() if kept.any() else x[0]


def threshold(x: Tensor, bound: float | Tensor, tokens: Any, share: bool) -> Tensor:
    """Raw form, f32 []."""
    counted = x if tokens.mask is None else x[tokens.mask != 0]
    return _threshold(counted.double().flatten(), torch.as_tensor(bound, dtype=torch.float64), share).float()


def run(
    program: Any,
    inputs: Sequence[Tensor],
    sides: Sequence[Any],
    scalars: Sequence[float],
    groups: Tensor | None,
) -> tuple[list[Tensor], Tensor]:
    """Raw form: (outputs f32 as their tokens or [B], batch values f32 [M]).

    sides: one per set of tokens, each with mask (or None), cu_seqlens (or None) and shape, that of its token tensors.
    """
    layouts = [_Padding(side, inputs) for side in sides]
    given = {
        (node.name, node.side): layouts[node.side].padded(x) if node.level == 3 else x
        for node, x in zip(program.inputs, inputs, strict=True)
    }
    values = Values(given, [x.valid for x in layouts], groups)
    for node, value in zip(program.scalars, scalars, strict=True):
        values.set(node, value)
    for node, source in program.kept:
        given[node.name, node.side] = values.of(source).double()
    outputs = []
    for node in program.outputs:
        x = values.of(node)
        if node.level == 3:
            outputs.append(layouts[node.side].flat(torch.where(layouts[node.side].valid, x, 0.0)).float())
        else:
            outputs.append(x.expand(len(layouts[0].valid), 1).squeeze(-1).float())
    batch = [values.of(node).reshape(()) for node in program.batch]
    return outputs, torch.stack(batch).float() if batch else torch.zeros(0)


class _Padding:
    """Packed [N] to padded [B, T] and back; padded tensors pass through."""

    def __init__(self, side: Any, like: Sequence[Tensor]) -> None:
        device = like[0].device if like else torch.device("cpu")
        mask = torch.ones(side.shape, dtype=torch.bool, device=device) if side.mask is None else side.mask != 0
        self.inside: Tensor | None = None
        if side.cu_seqlens is not None:
            lengths = side.cu_seqlens.diff()
            width = int(lengths.max()) if len(lengths) else 0
            self.inside = torch.arange(width, device=device) < lengths.unsqueeze(-1)
        self.valid = self.padded(mask)

    def padded(self, x: Tensor) -> Tensor:
        return x if self.inside is None else x.new_zeros(self.inside.shape).masked_scatter(self.inside, x)

    def flat(self, x: Tensor) -> Tensor:
        return x if self.inside is None else x[self.inside]


def scale(saved: Tensor, sequence_weight: Tensor | None, grad_loss: Tensor, tokens: Any) -> Tensor:
    """saved * sequence_weight of the token's sequence * grad_loss; 0 where `saved` is 0, whatever the others are."""
    layout = _Padding(tokens, [saved])
    factor = grad_loss.double().reshape(1, 1)
    if sequence_weight is not None:
        factor = factor * sequence_weight.double().unsqueeze(-1)
    padded = layout.padded(saved)
    return layout.flat(torch.where(padded == 0, 0.0, padded * factor)).float()


def broadcast_to_tokens(sequence_values: Tensor, grad_loss: Tensor, tokens: Any) -> Tensor:
    """sequence_values of the token's sequence * grad_loss on valid tokens, 0 elsewhere; a 0 stays 0."""
    layout = _Padding(tokens, [sequence_values])
    values = torch.where(sequence_values == 0, 0.0, sequence_values.double() * grad_loss.double()).unsqueeze(-1)
    return layout.flat(torch.where(layout.valid, values, 0.0)).float()

"""The operations as users write them in plain torch, in the input's own dtype.

The yardstick of `fastreward verify` (no backend may be further from the truth than these) and the peer called
"torch eager" in `fastreward bench`. Nothing else imports this file.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from typing import Any, Final

import torch
from torch import Tensor


# -------------------------------------------------------------------------------------------------- log-probs
def token_logprobs(
    logits: Tensor,
    labels: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    mask: Tensor | None = None,
    token_ids: Tensor | None = None,
    kept_tokens: Tensor | None = None,
) -> dict[str, Tensor]:
    """Every output of fastreward.token_logprobs through log_softmax, in the dtype of logits [..., V]."""
    z = logits / (temperature.unsqueeze(-1).to(logits.dtype) if isinstance(temperature, Tensor) else temperature)
    kept = _kept(kept_tokens, logits)
    if kept is not None:
        z = z.masked_fill(~kept, -torch.inf)
    logp = z.log_softmax(-1)
    p = logp.exp()
    label = z.gather(-1, labels.unsqueeze(-1))
    inside = z if kept is None else z.masked_fill(~kept, 0.0)
    out = {
        "logprobs": logp.gather(-1, labels.unsqueeze(-1)).squeeze(-1),
        "entropy": -(p * logp.masked_fill(p == 0, 0.0)).sum(-1),
        "logsumexp": z.logsumexp(-1),
        "label_logit": label.squeeze(-1),
        "mean_logit": inside.sum(-1) / (logits.shape[-1] if kept is None else kept.sum(-1)),
        "log_sum_sq_probs": (p * p).sum(-1).log(),
        "max_logprob": logp.amax(-1),
        "argmax": z.argmax(-1),
        "rank": (z > label).sum(-1),
    }
    if token_ids is not None:
        out["id_logprobs"] = logp.gather(-1, token_ids.expand(*logits.shape[:-1], token_ids.shape[-1]))
    if mask is None:
        return out
    rows = mask != 0
    return {name: x.masked_fill(~(rows.unsqueeze(-1) if x.ndim > rows.ndim else rows), 0) for name, x in out.items()}


def linear_logits(
    hidden: Tensor,
    weight: Tensor,
    *,
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
) -> Tensor:
    """The logits [..., V] of an LM head, in the dtype of hidden [..., H]: scale first, then the soft cap."""
    logits = hidden @ weight.t()
    if bias is not None:
        logits = logits + bias
    logits = logits * logit_scale
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def gather_minus_logsumexp(logits: Tensor, labels: Tensor) -> Tensor:
    """The obvious log-prob, which the benchmark compiles. logits [N, V], labels [N]."""
    return logits.gather(-1, labels.unsqueeze(-1)).squeeze(-1) - logits.logsumexp(-1)


def logprobs_and_entropy(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The obvious log-prob and entropy of logits [N, V], labels [N]."""
    lse = logits.logsumexp(-1)
    entropy = lse - (logits.softmax(-1) * logits).sum(-1)
    return logits.gather(-1, labels.unsqueeze(-1)).squeeze(-1) - lse, entropy


def _kept(kept_tokens: Tensor | None, logits: Tensor) -> Tensor | None:
    if kept_tokens is None or kept_tokens.dtype == torch.bool:
        return kept_tokens
    counts = torch.zeros(logits.shape, dtype=torch.int64, device=logits.device)
    return counts.scatter_add(-1, kept_tokens.clamp(min=0), (kept_tokens >= 0).long()) > 0


# ------------------------------------------------------------------------------------------------ policy loss
def policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor | None = None,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = None,
    delta: float | None = None,
    aggregation: str = "token-mean",
    normalizer: float | None = None,
    ref_logprobs: Tensor | None = None,
    kl: str | None = None,
    kl_coef: float = 0.0,
    entropy: Tensor | None = None,
    entropy_coef: float = 0.0,
    weights: Tensor | None = None,
    group_ids: Tensor | None = None,
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Loss, token loss [B, T] and a few metrics of the PPO family (log-ratio clamped to +-20), in the input dtype."""
    valid = torch.ones_like(logprobs, dtype=torch.bool) if mask is None else mask != 0

    def clean(x: Tensor) -> Tensor:
        return x.masked_fill(~valid, 0.0)

    lp = clean(logprobs)
    adv = clean(advantages.unsqueeze(-1).expand_as(lp) if advantages.ndim == 1 else advantages)
    log_ratio = (lp - clean(old_logprobs)).clamp(-20.0, 20.0)
    ratio = log_ratio.exp()
    first = -adv * (ratio if delta is None else ratio.clamp(max=delta))
    second = -adv * ratio.clamp(1 - clip_low, 1 + clip_high)
    token = torch.where(first >= second, first, second)
    if dual_clip is not None:
        token = torch.where(adv < 0, torch.minimum(token, -adv * dual_clip), token)
    if weights is not None:
        token = token * clean(weights)
    if kl is not None and ref_logprobs is not None:
        gap = (clean(ref_logprobs) - lp).clamp(-20.0, 20.0)
        token = token + kl_coef * _kl(kl, gap, ratio)
    if entropy is not None:
        token = token - entropy_coef * clean(entropy)
    token = token * valid
    count = valid.sum().clamp(min=1)
    metrics = {
        "kl_old_k1": (-log_ratio * valid).sum() / count,
        "kl_old_k3": ((ratio - log_ratio - 1) * valid).sum() / count,
        "ratio_mean": (ratio * valid).sum() / count,
    }
    return _aggregate(token, valid, aggregation, normalizer, group_ids), token, metrics


def _kl(kind: str, gap: Tensor, ratio: Tensor) -> Tensor:
    squared = gap * gap / 2
    if kind == "k3-corrected":
        return (gap.exp() - gap - 1) * ratio
    value = {"k1": -gap, "abs": gap.abs(), "k2": squared, "k3": gap.exp() - gap - 1}[kind.removesuffix("+")]
    return squared - squared.detach() + value.detach() if kind.endswith("+") else value


def _aggregate(
    token: Tensor, valid: Tensor, aggregation: str, normalizer: float | None, group_ids: Tensor | None
) -> Tensor:
    lengths = valid.sum(-1)
    sequences = (lengths > 0).sum()
    rows = token.sum(-1)
    if aggregation in ("seq-mean-token-mean", "group-mean"):
        rows = rows / lengths.clamp(min=1)
    groups = lengths.new_zeros(())
    if aggregation == "group-mean" and group_ids is not None:
        members = (group_ids.unsqueeze(0) == group_ids.unsqueeze(1)) & (lengths > 0)
        rows = rows / members.sum(-1).clamp(min=1)
        groups = ((lengths > 0) / members.sum(-1).clamp(min=1)).sum().round()
    denominator = {
        "group-mean": groups,
        "token-sum": torch.ones_like(sequences),
        "token-mean": lengths.sum(),
        "seq-mean-token-mean": sequences,
        "seq-mean-token-sum": sequences,
        "seq-mean-token-sum-norm": sequences * token.shape[-1],
    }[aggregation]
    return rows.sum() / (denominator.clamp(min=1) if normalizer is None else normalizer)


# ------------------------------------------------------------------------------------------ groups, whitening
def group_advantages(
    rewards: Tensor,
    group_ids: Tensor | Sequence[Hashable] | None = None,
    *,
    group_size: int | None = None,
    component_weights: Tensor | None = None,
    normalize: str = "sum-then-normalize",
    **options: Any,
) -> Tensor:
    """Advantages [B] from rewards [B] or [B, K], one group at a time, in the rewards' dtype."""
    r = rewards if rewards.ndim == 2 else rewards.unsqueeze(-1)
    w = torch.ones(r.shape[1], dtype=r.dtype) if component_weights is None else component_weights.to(r.dtype)
    if group_size is not None:
        keys: list[Hashable] = [b // group_size for b in range(r.shape[0])]
    else:
        assert group_ids is not None
        keys = list(group_ids.tolist() if isinstance(group_ids, Tensor) else group_ids)
    unscored = r.isnan().all(-1)
    if normalize == "sum-then-normalize":
        total = (r * w).nansum(-1).masked_fill(unscored, torch.nan)
        return _normalise(total, keys, **options).masked_fill(unscored, 0.0)
    columns = torch.stack([_normalise(c, keys, **options) for c in r.unbind(-1)], -1)
    return (columns.masked_fill(r.isnan(), 0.0) * w).sum(-1).masked_fill(unscored, 0.0)


def _normalise(
    x: Tensor,
    keys: list[Hashable],
    center: str | Tensor = "mean",
    scale: str | Tensor = "std",
    ddof: int = 1,
    eps: float = 1e-6,
    eps_inside: bool = False,
    singleton: str = "zero",
    lengths: Tensor | None = None,
) -> Tensor:
    out = torch.zeros_like(x)
    members: dict[Hashable, list[int]] = {}
    for b, key in enumerate(keys):
        if not bool(x[b].isnan()):
            members.setdefault(key, []).append(b)
    everyone = x[~x.isnan()]
    of_group = not (isinstance(center, Tensor) or center == "none") or (
        isinstance(scale, str) and scale in ("std", "max")
    )
    for rows in members.values():
        v = x[rows]
        if len(rows) == 1 and of_group:
            out[rows] = {"zero": torch.zeros_like(v), "raw": v, "nan": v * torch.nan}[singleton]
            continue
        d = v - _center(v, rows, center, lengths)
        if isinstance(scale, Tensor):
            d = d / scale[rows]
        elif scale == "max":
            d = d / (d.abs().max() + eps)
        elif scale != "none":
            variance = (v if scale == "std" else everyone).var(correction=ddof)
            d = d / ((variance + eps).sqrt() if eps_inside else variance.sqrt() + eps)
        out[rows] = d
    return out


def _center(v: Tensor, rows: list[int], center: str | Tensor, lengths: Tensor | None) -> Tensor:
    if isinstance(center, Tensor):
        return center[rows]
    if center == "leave-one-out":
        return (v.sum() - v) / (len(rows) - 1)
    if center == "length-weighted":
        assert lengths is not None
        return (lengths[rows] * v).sum() / lengths[rows].sum()
    if center == "second-max":
        top = v.topk(2).values
        first = torch.arange(len(rows)) == v.argmax()
        return torch.where(first, top[1], top[0])
    return v.mean() if center == "mean" else torch.zeros_like(v)


def value_loss(
    values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor | None = None, *, clip: float | None = 0.2
) -> Tensor:
    """PPO's clipped value loss, token-mean, as the trainers write it."""
    loss = (values - returns) ** 2
    if clip is not None:
        clipped = torch.minimum(torch.maximum(values, old_values - clip), old_values + clip)
        loss = torch.maximum(loss, (clipped - returns) ** 2)
    return 0.5 * (loss.mean() if mask is None else torch.where(mask != 0, loss, 0.0).sum() / (mask != 0).sum())


def whiten(
    x: Tensor, mask: Tensor | None = None, *, shift_mean: bool = True, ddof: int = 1, eps: float = 1e-8
) -> Tensor:
    """(x - mean) * rsqrt(var + eps) over the valid positions, 0 elsewhere, in the dtype of x."""
    valid = torch.ones_like(x, dtype=torch.bool) if mask is None else mask != 0
    count = valid.sum()
    mean = torch.where(valid, x, 0.0).sum() / count
    variance = (torch.where(valid, x - mean, 0.0) ** 2).sum() / (count - ddof)
    white = (x - mean) * torch.rsqrt(variance + eps)
    return torch.where(valid, white if shift_mean else white + mean, 0.0)


def token_rewards(
    scores: Tensor,
    mask: Tensor,
    *,
    logprobs: Tensor | None = None,
    ref_logprobs: Tensor | None = None,
    kl: str = "k1",
    kl_coef: float = 0.0,
    kl_clamp: float | None = 20.0,
    kl_value_clamp: float | None = None,
    clip: tuple[float | None, float | None] | None = None,
    place: str = "end",
) -> Tensor:
    """Rewards [B, T], as verl's and OpenRLHF's trainers put them together: a score's place, a KL, a mask."""
    counted = mask != 0
    if clip is not None:
        scores = scores.clamp(*clip)
    scores = scores.float().nan_to_num(0.0)
    if place == "broadcast":
        rewards = scores.unsqueeze(-1) * counted
    else:
        flags = counted.long()
        at = flags.argmax(-1) if place == "start" else flags.shape[-1] - 1 - flags.flip(-1).argmax(-1)
        rewards = torch.zeros(counted.shape, device=scores.device)
        rewards = rewards.scatter(-1, at.unsqueeze(-1), (scores * counted.any(-1)).unsqueeze(-1))
    if logprobs is None or ref_logprobs is None or kl_coef == 0:
        return rewards
    gap = ref_logprobs.float() - logprobs.float()
    gap = gap if kl_clamp is None else gap.clamp(-kl_clamp, kl_clamp)
    estimate = {"k1": -gap, "abs": gap.abs(), "k2": 0.5 * gap.square()}.get(kl)
    estimate = gap.exp() - gap - 1.0 if estimate is None else estimate
    estimate = estimate if kl_value_clamp is None else estimate.clamp(-kl_value_clamp, kl_value_clamp)
    return rewards - torch.where(counted, kl_coef * estimate, 0.0)


# -------------------------------------------------------------------------------------------------- returns
def discounted_returns(rewards: Tensor, mask: Tensor | None = None, *, gamma: float = 1.0) -> Tensor:
    """Reverse loop over time [B, T], masked tokens skipped, as trainers write it."""
    valid = torch.ones_like(rewards, dtype=torch.bool) if mask is None else mask != 0
    running, found = rewards.new_zeros(rewards.shape[0]), torch.zeros_like(rewards)
    for t in reversed(range(rewards.shape[1])):
        running = torch.where(valid[:, t], rewards[:, t] + gamma * running, running)
        found[:, t] = torch.where(valid[:, t], running, 0.0)
    return found


def gae(
    rewards: Tensor, values: Tensor, mask: Tensor | None = None, *, gamma: float = 1.0, lam: float = 1.0
) -> tuple[Tensor, Tensor]:
    """(advantages, returns) [B, T] by the same loop."""
    valid = torch.ones_like(rewards, dtype=torch.bool) if mask is None else mask != 0
    following, running = rewards.new_zeros(rewards.shape[0]), rewards.new_zeros(rewards.shape[0])
    advantages = torch.zeros_like(rewards)
    for t in reversed(range(rewards.shape[1])):
        here, value = valid[:, t], values[:, t]
        running = torch.where(here, rewards[:, t] + gamma * following - value + gamma * lam * running, running)
        following = torch.where(here, value, following)
        advantages[:, t] = torch.where(here, running, 0.0)
    return advantages, torch.where(valid, advantages + values, 0.0)


def vtrace(
    log_ratios: Tensor, rewards: Tensor, values: Tensor, *, gamma: float = 1.0, lam: float = 1.0
) -> tuple[Tensor, Tensor]:
    """(targets, advantages) [B, T] by a loop, every token valid."""
    clipped = log_ratios.exp().clamp(max=1.0)
    following = torch.nn.functional.pad(values[:, 1:], (0, 1))
    delta = clipped * (rewards + gamma * following - values)
    above, targets, after = rewards.new_zeros(rewards.shape[0]), torch.empty_like(values), torch.empty_like(values)
    for t in reversed(range(rewards.shape[1])):
        after[:, t] = following[:, t] + above
        above = delta[:, t] + gamma * lam * clipped[:, t] * above
        targets[:, t] = values[:, t] + above
    return targets, clipped * (rewards + gamma * after - values)


# -------------------------------------------------------------------------------------------------- prefix trees
def tree_aggregate(
    tree: Any,
    values: Tensor,
    op: str,
    *,
    over: str = "sequences",
    weights: Tensor | None = None,
    scale: float = 1.0,
    normalized: bool = False,
    discount: float = 1.0,
) -> Tensor:
    """PrefixTree.aggregate node by node, in the dtype of values [B]."""
    w = torch.ones_like(values) if weights is None else weights.to(values.dtype)
    parent, lengths = tree.parent.tolist(), tree.lengths
    out: list[Tensor] = [values.new_zeros(())] * tree.num_nodes
    for n in reversed(range(tree.num_nodes)):
        rows = tree.rows_of(n)
        if over == "children":
            rows = rows[tree.leaf[rows] == n]
        decay = discount ** (lengths[rows] - tree.edge_start[n] - tree.edge_length[n]).to(values.dtype)
        parts, share = values[rows] * decay, w[rows]
        if over == "children":
            below = [out[c] * discount ** float(tree.edge_length[c]) for c in range(tree.num_nodes) if parent[c] == n]
            parts = torch.cat([parts, torch.stack(below)]) if below else parts
            share = torch.cat([share, torch.ones_like(parts[len(share) :])])
        out[n] = _tree_reduce(parts, share, op, scale, normalized)
    return torch.stack(out) if out else values.new_zeros(0)


def _tree_reduce(parts: Tensor, weights: Tensor, op: str, scale: float, normalized: bool) -> Tensor:
    if op in ("mean", "sum"):
        total = (weights * parts).sum()
        return total / weights.sum() if op == "mean" else total
    if op == "any":
        return (parts != 0).any().to(parts.dtype)
    if op != "logsumexp":
        return parts.amax() if op == "max" else parts.amin()
    total = (scale * parts + weights.log()).logsumexp(0)
    return (total - weights.sum().log() if normalized else total) / scale


def tree_advantages(
    tree: Any,
    values: Tensor,
    mode: str,
    *,
    scale: str = "std",
    ddof: int = 1,
    eps: float = 1e-6,
    singleton: str = "zero",
) -> Tensor:
    """PrefixTree.advantages node by node, in the dtype of values [nodes]."""
    parent = tree.parent.tolist()
    out = torch.zeros_like(values)
    for n, above in enumerate(parent):
        if above < 0:
            continue
        ancestors = [above]
        while parent[ancestors[-1]] >= 0:
            ancestors.append(parent[ancestors[-1]])
        v = values[n]
        if mode == "sibling":
            siblings = values[[c for c, p in enumerate(parent) if p == above]]
            if len(siblings) == 1:
                out[n] = v if singleton == "raw" else 0.0
            else:
                out[n] = (v - siblings.mean()) / (siblings.std(correction=ddof) + eps if scale == "std" else 1.0)
            continue
        count = tree.count[[*ancestors, n]].to(values.dtype)
        out[n] = {
            "td": v - values[above],
            "root": v - values[ancestors[-1]],
            "td+root": (v - values[above]) + (v - values[ancestors[-1]]),
            "all-ancestors": v - values[ancestors].mean(),
            "depth-weighted": v - (count * values[[*ancestors, n]]).sum() / count.sum(),
        }[mode]
    return out


def tree_propagate(
    tree: Any,
    scale: Tensor,
    shift: Tensor,
    *,
    initial: float = 0.0,
    low: float | None = None,
    high: float | None = None,
) -> Tensor:
    """PrefixTree.propagate node by node, in the dtype of scale [nodes]."""
    out: list[Tensor] = []
    for n, above in enumerate(tree.parent.tolist()):
        x = scale.new_full((), initial) if above < 0 else scale[n] * out[above] + shift[n]
        out.append(x if above < 0 or low is high is None else x.clamp(low, high))
    return torch.stack(out) if out else torch.zeros_like(scale)


def tree_to_tokens(tree: Any, values: Tensor, mask: Tensor | None, place: str = "broadcast") -> Tensor:
    """PrefixTree.to_tokens as a gather from values [nodes]."""
    node = tree.node_of_token.long()
    there = node >= 0
    if place != "broadcast":
        position = tree.unique_of_token - tree.token_begin[node.clamp(min=0)]
        there = there & (position == (0 if place == "start" else tree.edge_length[node.clamp(min=0)] - 1))
    if mask is not None:
        there = there & (mask != 0)
    return torch.where(there, values[node.clamp(min=0)], 0.0)


def tree_from_tokens(tree: Any, values: Tensor, mask: Tensor | None, op: str = "sum") -> Tensor:
    """PrefixTree.from_tokens as a scatter, in the dtype of values."""
    there = tree.unique_of_token >= 0
    if mask is not None:
        there = there & (mask != 0)
    index, x = tree.unique_of_token[there], values[there]
    none = values.new_zeros(tree.num_tokens)
    if op == "first":
        for i in reversed(range(len(x))):
            none[index[i]] = x[i]
        return none
    total = none.scatter_add(0, index, x)
    return total if op == "sum" else total / none.scatter_add(0, index, torch.ones_like(x)).clamp(min=1)


def tree_unique_to_tokens(tree: Any, unique: Tensor, mask: Tensor | None) -> Tensor:
    """PrefixTree.unique_to_tokens as a gather."""
    there = tree.unique_of_token >= 0
    if mask is not None:
        there = there & (mask != 0)
    return torch.where(there, unique[tree.unique_of_token.clamp(min=0)], 0.0)


# ------------------------------------------------------------------------------------------------- segments
def segment_reduce(
    x: Tensor,
    segment_ids: Tensor,
    *,
    op: str = "sum",
    weights: Tensor | None = None,
    num_segments: int,
    temperature: float = 1.0,
    empty: float = 0.0,
) -> Tensor:
    """Segments' values [B, S] by scatter and gather over [B, S + 1], whose last column is for tokens of none."""
    there = segment_ids >= 0 if weights is None else (segment_ids >= 0) & (weights != 0)
    ids = torch.where(there, segment_ids.long(), num_segments)
    w = there.to(x.dtype) if weights is None else torch.where(there, weights.to(x.dtype), 0.0)
    x = torch.where(there, x, 0.0)

    def added(values: Tensor) -> Tensor:
        return x.new_zeros(x.shape[0], num_segments + 1).scatter_add(1, ids, values)[:, :-1]

    def extreme(values: Tensor, how: str) -> Tensor:
        none = values.new_zeros(x.shape[0], num_segments + 1)
        return none.scatter_reduce(1, ids, values, how, include_self=False)[:, :-1]

    weight, some = added(w), added(there.to(x.dtype)) > 0
    if op in ("sum", "count"):
        return added(w * x) if op == "sum" else weight
    if op in ("min", "max"):
        out = extreme(x, "amin" if op == "min" else "amax")
    elif op in ("first", "last"):
        at = extreme(torch.arange(x.shape[1], device=x.device).expand(x.shape), "amin" if op == "first" else "amax")
        out = x.gather(1, at)
    elif op in ("mean", "mean-exp"):
        out = added(w * (x if op == "mean" else x.exp())) / weight
    else:
        y = x if op == "logsumexp" else -x / temperature
        top = extreme(y.detach(), "amax")
        parts = w * (y - torch.nn.functional.pad(top, (0, 1)).gather(1, ids)).exp()
        out = added(parts).log() + top if op == "logsumexp" else added(parts * x) / added(parts)
    return torch.where(some, out, empty)


def scatter_rewards(values: Tensor, segment_ids: Tensor, *, place: str = "end", mask: Tensor | None = None) -> Tensor:
    """Values [B, S] on their tokens [B, T]."""
    there = segment_ids >= 0 if mask is None else (segment_ids >= 0) & (mask != 0)
    segments, tokens = values.shape[1], torch.arange(segment_ids.shape[1], device=values.device)
    ids = torch.where(there, segment_ids.long(), segments)
    own = torch.nn.functional.pad(values, (0, 1)).gather(1, ids)
    if place == "broadcast":
        return own
    none = torch.zeros(values.shape[0], segments + 1, dtype=torch.int64, device=values.device)
    if place == "spread":
        return own / none.scatter_add(1, ids, torch.ones_like(ids)).gather(1, ids)
    how = "amax" if place == "end" else "amin"
    at = none.scatter_reduce(1, ids, tokens.expand(ids.shape), how, include_self=False).gather(1, ids)
    return torch.where(there & (at == tokens), own, 0.0)


# ------------------------------------------------------------------------------------------------------- divergences
def token_divergence(
    logits: Tensor,
    teacher_logits: Tensor,
    divergence: str,
    temperature: float | Tensor = 1.0,
    teacher_temperature: float | Tensor | None = None,
    mask: Tensor | None = None,
    labels: Tensor | None = None,
    token_ids: Tensor | None = None,
    tail: bool = True,
) -> dict[str, Tensor]:
    """The divergence [...] between the two softmaxes, with the statistics where there are labels."""
    other = temperature if teacher_temperature is None else teacher_temperature
    log_p, log_q = _tempered(logits, temperature, mask), _tempered(teacher_logits, other, mask)
    both = (log_p, log_q) if token_ids is None else (_over_ids(x, token_ids, tail) for x in (log_p, log_q))
    out = {"divergence": _DIVERGENCES[divergence](*both).sum(-1)}
    if labels is not None:
        out["entropy"] = -(log_p.exp() * log_p).sum(-1)
        out["teacher_entropy"] = -(log_q.exp() * log_q).sum(-1).detach()
        out["logprobs"] = log_p.gather(-1, labels.unsqueeze(-1)).squeeze(-1)
    return out if mask is None else {name: torch.where(mask, x, 0.0) for name, x in out.items()}


def _tempered(logits: Tensor, temperature: float | Tensor, mask: Tensor | None) -> Tensor:
    """Log-probs in float32 at least; a forbidden token's is -10,000."""
    scale = temperature.unsqueeze(-1) if isinstance(temperature, Tensor) else temperature
    tempered = (logits if logits.dtype == torch.float64 else logits.float()) / scale
    if mask is not None:
        tempered = torch.where(mask.unsqueeze(-1), tempered, 0.0)
    return torch.log_softmax(tempered, -1).clamp(min=-1e4)


def _over_ids(log_probs: Tensor, ids: Tensor, tail: bool) -> Tensor:
    """Of the ids [..., k] alone, renormalised or with what they leave as one event more."""
    own = log_probs.gather(-1, ids)
    if not tail:
        return own.log_softmax(-1)
    rest = torch.log1p(-own.exp().sum(-1, keepdim=True).clamp(max=math.exp(-1e-7)))
    return torch.cat([own, rest], -1)


def _against_mixture(first: Tensor, other: Tensor, share: float) -> Tensor:
    """Terms of KL(first || share first + (1 - share) other)."""
    return first.exp() * (first - (share * first.exp() + (1 - share) * other.exp()).clamp(min=1e-37).log())


def _adaptive_kl(p: Tensor, q: Tensor, alpha: float = 0.5) -> Tensor:
    """Forward and reverse KL, weighted by where the teacher's sorted probabilities differ from the student's."""
    ordered, order = q.exp().sort(stable=True)
    tail = ordered.cumsum(-1) <= alpha
    between = (p.exp() - q.exp()).abs().gather(-1, order).detach()
    share = torch.where(tail, 0.0, between).sum(-1, keepdim=True) / between.sum(-1, keepdim=True)
    return share * q.exp() * (q - p) + (1.0 - share) * p.exp() * (p - q)


_DIVERGENCES: Final[dict[str, Callable[[Tensor, Tensor], Tensor]]] = {
    "forward-kl": lambda p, q: q.exp() * (q - p),
    "reverse-kl": lambda p, q: p.exp() * (p - q),
    "adaptive-kl": _adaptive_kl,
    "jsd": lambda p, q: (_against_mixture(q, p, 0.5) + _against_mixture(p, q, 0.5)) / 2,
    "skewed-forward-kl": lambda p, q: _against_mixture(q, p, 0.1),
    "skewed-reverse-kl": lambda p, q: _against_mixture(p, q, 0.1),
    "total-variation": lambda p, q: (p.exp() - q.exp()).abs() / 2,
    "alpha": lambda p, q: 2 * (p.exp() + q.exp()) - 4 * ((p + q) / 2).exp(),
    "hellinger": lambda p, q: ((p / 2).exp() - (q / 2).exp()) ** 2 / 2,
}

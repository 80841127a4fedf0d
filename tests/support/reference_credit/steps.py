"""Credit of steps."""

from __future__ import annotations

import math

from reference_credit.token_credit import ahead, less_others, members, normalized, of_tokens, scored, whitened

Row = list[float]
Rows = list[list[float]]
Ids = list[list[int]]


def _steps(segment_ids: Ids, places: list[list[int]]) -> list[dict[int, list[int]]]:
    """Of each response: the tokens of each step that has any, from left to right."""
    found: list[dict[int, list[int]]] = []
    for b, tokens in enumerate(places):
        own: dict[int, list[int]] = {}
        for t in tokens:
            if segment_ids[b][t] >= 0:
                own.setdefault(segment_ids[b][t], []).append(t)
        found.append(own)
    return found


def _blank(mask: Rows) -> Rows:
    return [[0.0] * len(row) for row in mask]


def _others(values: dict[int, float], b: int) -> float | None:
    rest = [x for j, x in values.items() if j != b]
    return sum(rest) / len(rest) if rest else None


# ---------------------------------------------------------------------------------------------------- rewards of steps
def _implicit(
    rm_logprobs: Rows, segment_ids: Ids, mask: Rows, ref_logprobs: Rows | None, coef: float, form: str
) -> list[dict[int, tuple[float, int]]]:
    found = []
    for b, own in enumerate(_steps(segment_ids, scored(mask, None))):
        total, scores = 0.0, {}
        for k, tokens in own.items():
            ratio = sum(rm_logprobs[b][t] - (ref_logprobs[b][t] if ref_logprobs else 0.0) for t in tokens)
            total += ratio
            scores[k] = (coef * (total if form == "accumulative" else ratio), tokens[-1])
        found.append(scores)
    return found


def implicit_prm(
    rm_logprobs: Rows, segment_ids: Ids, mask: Rows, ref_logprobs: Rows | None = None,
    coef: float = 0.001, form: str = "single", num_segments: int = 0,
) -> Rows:  # fmt: skip
    found = _blank(mask)
    for b, scores in enumerate(_implicit(rm_logprobs, segment_ids, mask, ref_logprobs, coef, form)):
        for score, end in scores.values():
            found[b][end] = score
    return found


def implicit_prm_score(
    rm_logprobs: Rows, segment_ids: Ids, mask: Rows, ref_logprobs: Rows | None = None,
    coef: float = 0.001, form: str = "single", op: str = "min", num_segments: int = 0,
) -> Row:  # fmt: skip
    found = []
    for own in _implicit(rm_logprobs, segment_ids, mask, ref_logprobs, coef, form):
        scores = [score for score, _ in own.values()]
        found.append(
            math.nan if not scores else min(scores) if op == "min"
            else sum(scores) / (len(scores) if op == "mean" else 1)
        )  # fmt: skip
    return found


def _placed(values: list[dict[int, float]], mask: Rows, segment_ids: Ids, rewards: Row | None) -> Rows:
    """At the ends of steps, and the outcome on the last token."""
    places = scored(mask, rewards)
    found = _blank(mask)
    for b, own in enumerate(_steps(segment_ids, places)):
        for k, tokens in own.items():
            found[b][tokens[-1]] = values[b][k]
        if rewards and places[b]:
            found[b][places[b][-1]] += rewards[b]
    return found


def clip_delta(
    step_scores: Rows, segment_ids: Ids, mask: Rows, eta: float, rewards: Row | None = None,
    alpha: float = 1.0, mode: str = "clip-delta",
) -> Rows:  # fmt: skip
    values = []
    for b, own in enumerate(_steps(segment_ids, scored(mask, rewards))):
        order = list(own)
        c = {k: step_scores[b][k] if mode == "delta" else min(step_scores[b][k] - eta, 0.0) for k in order}
        r = dict(c)
        if mode != "clip":
            for i, k in enumerate(order):
                if i == len(order) - 1:
                    r[k] = 0.0
                elif i < len(order) - 2:
                    r[k] = c[k] - c[order[i + 1]]
        values.append({k: alpha * x for k, x in r.items()})
    return _placed(values, mask, segment_ids, rewards)


def ppr(
    step_scores: Rows, segment_ids: Ids, mask: Rows, rewards: Row,
    step_center: float = 0.5, outcome_center: float = 0.5,
) -> Rows:  # fmt: skip
    found = _blank(mask)
    for b, own in enumerate(_steps(segment_ids, scored(mask, rewards))):
        for k, tokens in own.items():
            found[b][tokens[-1]] = step_scores[b][k] - step_center + rewards[b] - outcome_center
    return found


def g_ra(step_scores: Rows, segment_ids: Ids, mask: Rows, rewards: Row, threshold: float = 0.0) -> Rows:
    own = _steps(segment_ids, scored(mask, rewards))
    values = [{k: step_scores[b][k] if rewards[b] > threshold else 0.0 for k in x} for b, x in enumerate(own)]
    return _placed(values, mask, segment_ids, rewards)


def vsrm(
    step_values: Rows, segment_ids: Ids, mask: Rows, rewards: Row,
    decay: float = 0.7, horizon: int = 4, threshold: float = 1e-5,
) -> Rows:  # fmt: skip
    places = scored(mask, rewards)
    found = _blank(mask)
    for b, own in enumerate(_steps(segment_ids, places)):
        order = list(own)
        v = [step_values[b][k] for k in order]
        n = len(v)
        d = [v[j + 1] - v[j] for j in range(n - 1)]
        for j in range(n - 1):
            r = 0.0
            for k in range(j, j + horizon + 1):
                if k == n - 1:
                    r = (v[-1] - v[j]) * decay ** (n - j - 1)
                    break
                if abs(d[k]) >= threshold:
                    r = d[k] * decay ** (k - j)
                    break
            found[b][own[order[j]][-1]] = r
        if places[b]:
            found[b][places[b][-1]] = rewards[b]
    return found


def lare(
    segment_ids: Ids, mask: Rows, step_scores: Rows | None = None, rewards: Row | None = None, per_step: bool = True,
    num_segments: int = 0,
) -> Rows:  # fmt: skip
    found = _blank(mask)
    for b, own in enumerate(_steps(segment_ids, scored(mask, rewards))):
        for k, tokens in own.items():
            if step_scores is None:
                found[b][tokens[-1]] = rewards[b] / len(own)
            else:
                found[b][tokens[-1]] = step_scores[b][k] * (len(own) if per_step else 1)
    return found


# ----------------------------------------------------------------------------------------------------- scores of steps
def _soft(p: Row, temperature: float) -> Row:
    """p times softmax(-p / temperature)."""
    if not p:
        return []
    least = min(p)
    weights = [math.exp((least - x) / temperature) for x in p]
    return [x * w / sum(weights) for x, w in zip(p, weights, strict=True)]


def pure(
    step_scores: Rows, segment_ids: Ids, mask: Rows, group_ids: list[str], rewards: Row | None = None,
    temperature: float = 0.1, weighted: bool = True, baseline: str = "token", outcome_coef: float = 1.0,
    keep_ends: bool = False,
) -> Rows:  # fmt: skip
    outcomes = rewards or [0.0] * len(mask)
    places = scored(mask, outcomes)
    own = _steps(segment_ids, places)
    p = []
    for b, steps in enumerate(own):
        raw = [step_scores[b][k] for k in steps]
        soft = _soft(raw, temperature) if weighted else [x / len(raw) for x in raw]
        p.append(dict(zip(steps, soft, strict=True)))
    less = less_others(outcomes, group_ids)
    r = _blank(mask)
    for group in members(group_ids, outcomes).values():
        for b in group:
            rest = [j for j in group if j != b and places[j]]
            if baseline == "token":
                length = sum(len(places[j]) for j in rest)
                base = sum(sum(p[j].values()) for j in rest) / length if length else 0.0
            else:
                base = _others({j: sum(p[j].values()) / len(p[j]) for j in group if p[j]} | {b: 0.0}, b) or 0.0
            for k, tokens in own[b].items():
                r[b][tokens[-1]] = p[b][k] - base * (len(tokens) - 1 if baseline == "token" else 1)
            if places[b] and rewards:
                r[b][places[b][-1]] += outcome_coef * less[b]
    found = ahead(r, places)
    if not keep_ends:
        for b, steps in enumerate(own):
            for tokens in steps.values():
                found[b][tokens[-1]] = 0.0
    return found


def pure_verl(
    step_scores: Rows, segment_ids: Ids, mask: Rows, group_ids: list[str], rewards: Row | None = None,
    form: str = "min", temperature: float = 0.1, outcome_coef: float = 1.0, capped: bool = False,
    columns: float | None = None, whiten: bool = False,
) -> Rows:  # fmt: skip
    outcomes = rewards or [0.0] * len(mask)
    places = scored(mask, outcomes)
    returns = _blank(mask)
    for b, steps in enumerate(_steps(segment_ids, places)):
        raw = [step_scores[b][k] for k in steps]
        r = dict(zip((x[-1] for x in steps.values()), raw if form == "min" else _soft(raw, temperature), strict=True))
        if rewards and places[b]:
            last = places[b][-1]
            r[last] = r.get(last, 0.0) + outcome_coef * rewards[b]
        for t in places[b]:
            later = [x for s, x in r.items() if s >= t] + ([0.0] if capped and form == "min" else [])
            returns[b][t] = (min(later) if form == "min" else sum(later)) if later else 0.0
    found = _blank(mask)
    for group in members(group_ids, outcomes).values():
        for b in group:
            rest = [j for j in group if j != b and places[j]]
            size = sum(len(places[j]) for j in rest) if columns is None else columns * len(rest)
            base = sum(sum(returns[j]) for j in rest) / size if size else 0.0
            for t in places[b]:
                found[b][t] = returns[b][t] - base
    return whitened(found, places) if whiten else found


def tp_grpo(
    verdicts: Rows, segment_ids: Ids, mask: Rows, rewards: Row, group_ids: list[str],
    alpha: float = 1.0, ddof: int = 1, eps: float = 1e-6,
) -> Rows:  # fmt: skip
    places, outcome = scored(mask, rewards), normalized(rewards, group_ids, eps, ddof)
    found = of_tokens(outcome, places, len(mask[0]))
    own = _steps(segment_ids, places)
    for group in members(group_ids, rewards).values():
        accuracy = sum(rewards[b] > 0 for b in group) / len(group)
        for b in group:
            for k, tokens in own[b].items():
                for t in tokens:
                    if not verdicts[b][k]:
                        found[b][t] = outcome[b] - alpha * accuracy if rewards[b] > 0 else 0.0
    return found


def spark(
    verdicts: Rows, segment_ids: Ids, mask: Rows, rewards: Row, group_ids: list[str],
    variant: str = "selective", step_weight: float = 0.4, ddof: int = 1, eps: float = 1e-6,
) -> Rows:  # fmt: skip
    places = scored(mask, rewards)
    own = _steps(segment_ids, places)
    if variant == "augmented":
        shares = [sum(bool(verdicts[b][k]) for k in x) / len(x) if x else 0.0 for b, x in enumerate(own)]
        rewards = [(1 - step_weight) * r + step_weight * s for r, s in zip(rewards, shares, strict=True)]
        return of_tokens(normalized(rewards, group_ids, eps, ddof), places, len(mask[0]))
    outcome = normalized(rewards, group_ids, eps, ddof)
    found = _blank(mask)
    for b, steps in enumerate(own):
        for k, tokens in steps.items():
            for t in tokens:
                if (outcome[b] >= 0) == bool(verdicts[b][k]):
                    found[b][t] = outcome[b]
    return found


def fine_grained_rlhf(
    values: Rows, old_logprobs: Rows, ref_logprobs: Rows, mask: Rows,
    relevance: Rows | None = None, relevance_ids: Ids | None = None,
    factuality: Rows | None = None, factuality_ids: Ids | None = None, completeness: Row | None = None,
    relevance_weight: float = 0.3, factuality_weight: float = 0.5, completeness_weight: float = 0.3,
    completeness_mean: float = -0.4468, completeness_std: float = 8.3012,
    kl_coef: float = 0.3, gamma: float = 1.0, lam: float = 0.95, by_root_of_std: bool = True,
) -> Rows:  # fmt: skip
    places = scored(mask, None)
    r = _blank(mask)
    for verdicts, ids, weight in (
        (relevance, relevance_ids, relevance_weight),
        (factuality, factuality_ids, factuality_weight),
    ):
        if verdicts is not None and ids is not None:
            for b, steps in enumerate(_steps(ids, places)):
                for k, tokens in steps.items():
                    r[b][tokens[-1]] += weight if verdicts[b][k] else -weight
    for b, tokens in enumerate(places):
        for t in tokens:
            r[b][t] -= kl_coef * (old_logprobs[b][t] - ref_logprobs[b][t])
        if completeness is not None and tokens:
            r[b][tokens[-1]] += completeness_weight * (completeness[b] - completeness_mean) / completeness_std
    r = _scaled(r, places, by_root_of_std, shift_mean=False)
    advantages = _blank(mask)
    for b, tokens in enumerate(places):
        following, advantage = 0.0, 0.0
        for t in reversed(tokens):
            advantage = r[b][t] + gamma * following - values[b][t] + gamma * lam * advantage
            following, advantages[b][t] = values[b][t], advantage
    return _scaled(advantages, places, by_root_of_std, shift_mean=True)


def _scaled(x: Rows, places: list[list[int]], root: bool, shift_mean: bool) -> Rows:
    counted = [x[b][t] for b, tokens in enumerate(places) for t in tokens]
    mean = sum(counted) / len(counted)
    variance = sum((v - mean) ** 2 for v in counted) / len(counted)
    found = [[0.0] * len(row) for row in x]
    for b, tokens in enumerate(places):
        for t in tokens:
            centred = (x[b][t] - mean) / math.sqrt((math.sqrt(variance) if root else variance) + 1e-8)
            found[b][t] = centred if shift_mean else centred + mean
    return found


# ----------------------------------------------------------------------------------------------------- values of steps
def spo_chain(
    step_values: Rows, segment_ids: Ids, old_logprobs: Rows, mask: Rows, rewards: Row,
    start_values: Row | None = None, prob_threshold: float = 0.9, whiten: bool = True,
) -> Rows:  # fmt: skip
    places = scored(mask, rewards)
    found = _blank(mask)
    unsure = [[t for t in x if math.exp(old_logprobs[b][t]) < prob_threshold] for b, x in enumerate(places)]
    for b, steps in enumerate(_steps(segment_ids, places)):
        base = start_values[b] if start_values else None
        for i, (k, tokens) in enumerate(steps.items()):
            value = rewards[b] if i == len(steps) - 1 else step_values[b][k]
            for t in tokens:
                if t in unsure[b]:
                    found[b][t] = 0.0 if base is None else value - base
            base = value
    return whitened(found, unsure if any(unsure) else places) if whiten else found


def spo_mask(old_logprobs: Rows, mask: Rows, prob_threshold: float = 0.9) -> list[list[bool]]:
    return [
        [bool(m) and math.exp(x) < prob_threshold for m, x in zip(*rows, strict=True)]
        for rows in zip(mask, old_logprobs, strict=True)
    ]


def spo_cuts(old_logprobs: Rows, mask: Rows, interval: int = 5, prob_threshold: float = 0.9) -> list[list[bool]]:
    found = [[False] * len(row) for row in mask]
    for b, tokens in enumerate(scored(mask, None)):
        unsure = [i for i, t in enumerate(tokens) if math.exp(old_logprobs[b][t]) < prob_threshold]
        for i in unsure[::interval]:
            if i:
                found[b][tokens[i - 1]] = True
        if tokens:
            found[b][tokens[-1]] = True
    return found


def vine_ppo(step_values: Rows, segment_ids: Ids, mask: Rows, rewards: Row) -> Rows:
    found = _blank(mask)
    for b, steps in enumerate(_steps(segment_ids, scored(mask, rewards))):
        following = rewards[b]
        for k, tokens in reversed(steps.items()):
            value = following if math.isnan(step_values[b][k]) else step_values[b][k]
            for t in tokens:
                found[b][t] = following - value
            following = value
    return found


def spae(
    accuracies: Rows, confidences: Rows, segment_ids: Ids, mask: Rows, rewards: Row, group_ids: list[str],
    alpha: float = 0.5, xi: float = 0.5, saturation: float = 0.9, whiten: bool = True,
) -> Rows:  # fmt: skip
    places, outcome = scored(mask, rewards), normalized(rewards, group_ids, scale=False)
    own = _steps(segment_ids, places)
    factors, rises = [], []
    for b, steps in enumerate(own):
        phi = [1.5 * accuracies[b][k] * confidences[b][k] + 0.5 * accuracies[b][k] - confidences[b][k] for k in steps]
        factors.append([1 - alpha * (1 - math.exp(-sum(x > saturation for x in phi[:i]))) for i in range(len(phi))])
        change = [phi[i] - phi[i - 1] if i else 0.0 for i in range(len(phi))]
        low, high = min(change, default=0.0), max(change, default=0.0)
        rises.append([math.exp((x - low) / (high - low) if high > low else 0.0) for x in change])
    mean = sum(x for row in rises for x in row) / sum(len(row) for row in rises)
    found = _blank(mask)
    for b, steps in enumerate(own):
        for i, tokens in enumerate(steps.values()):
            for t in tokens:
                found[b][t] = outcome[b] * factors[b][i] + xi * (rises[b][i] - mean)
    return whitened(found, [[t for x in steps.values() for t in x] for steps in own]) if whiten else found

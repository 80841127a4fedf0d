"""Programs of the loss language, and checks of a backend's raw functions that run them, against the float64 reference.

Run on the CPU by tests/backends/cuda/test_program_emulated.py; `module` and `device` may be any backend's.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from raw_checks import STEP, Logits, close
from torch import Tensor

from fastreward import losses
from fastreward._arguments.tokens import Tokens
from fastreward.language import functions as f
from fastreward.language.graph import Graph
from fastreward.language.node import Level, Node
from fastreward.language.objective import (
    Objective,
    PolicyCall,
    TokenGradient,
    policy_objective,
    token_gradient,
)
from fastreward.language.ops import OPS
from fastreward.language.pair_objective import PairCall, pair_objective
from fastreward.language.program import Program, program
from fastreward.reference import logprobs as reference_logprobs
from fastreward.reference import program as reference

MASKS = {
    "none": None,
    "bool": torch.bool,
    "uint8": torch.uint8,
    "int32": torch.int32,
    "int64": torch.int64,
    "float32": torch.float32,
}
_T, _R, _B = Level.TOKEN, Level.SEQUENCE, Level.BATCH


# ------------------------------------------------------------------------------------------------------------ programs
@dataclass(frozen=True)
class Named:
    """A program with its scalars' parameters, where it comes from a loss."""

    program: Program
    parameters: dict[str, float]
    objective: Objective | None = None


def policy(loss: Any, advantage: Level = _R, terms: Sequence[str] = (), rows: Sequence[str] = (), **call: Any) -> Named:
    """A policy loss's objective; `terms` and `rows` are passed besides the usual, per token and per sequence."""
    levels = [("logprob", _T), ("old_logprob", _T), ("advantage", advantage)]
    levels += [(name, _T) for name in terms] + [(name, _R) for name in rows]
    call.setdefault("aggregation", loss.aggregation)
    objective = policy_objective(loss, PolicyCall(tuple(levels), **call))
    given = {"call.width": 7.0, "call.kl_coef": 0.3, "call.entropy_coef": 0.02, **loss.scalars}
    return Named(objective.program, {k: float(given[k]) for k in objective.parameters}, objective)


def pair(loss: Any, rows: Sequence[str] = (), **call: Any) -> Named:
    """A preference loss's objective."""
    side = (("logprob", _T), ("ref_logprob", _T))
    objective = pair_objective(loss, PairCall((side, side), tuple((n, _R) for n in rows), "mean", **call))
    return Named(objective.program, {**dict.fromkeys(objective.parameters, 0.0), **loss.scalars}, objective)


PROGRAMS: dict[str, Callable[[], Named]] = {
    "ppo": lambda: policy(losses.ppo(dual_clip=3.0, delta=2.0), _T, deferred=True),
    "ppo, everything": lambda: policy(
        losses.ppo(), _T, ("ref_logprob", "entropy", "weight"), kl="k3", entropy_bonus=True, normalizer=True,
        packed=True, token_loss=True, aggregation="seq-mean-token-sum-norm",
        tokens=("logprob", "entropy", "ratio", "clip", "kl"),
    ),
    "sapo": lambda: policy(losses.sapo(), deferred=True),
    "gspo": lambda: policy(losses.gspo()),
    "real": lambda: policy(losses.real()),
    "flowrl": lambda: policy(losses.flowrl(), rows=("log_z",), terms=("ref_logprob",)),
    "bapo": lambda: policy(losses.bapo(1.5, high_end=1.4), _T, deferred=True),
    "gdro": lambda: policy(losses.gdro(), terms=("ref_logprob",)),
    "jepo": lambda: policy(losses.jepo(), rows=("reward",), terms=("answer",)),
    "fipo": lambda: policy(losses.fipo(delta=3.0), deferred=True),
    "segments": lambda: policy(losses.segment_ppo(), terms=("segment_ids",), token_loss=True),
    "dpo": lambda: pair(losses.dpo(label_smoothing=0.1), pair_loss=True),
    "aot": lambda: pair(losses.dpo(variant="aot")),
}  # fmt: skip


def prologue_program() -> Named:
    """Reductions before the first pass, batch values that tokens read, and outputs that need no operator."""
    g = Graph()
    x, r, s, k = (g.input(n, level) for n, level in (("x", _T), ("r", _R), ("s", _R), ("k", _B)))
    total = g.reduce("group_sum", r * s)
    best = g.reduce("batch_max", r)
    scaled = x * (total + best) + k * g.parameter("p") + f.exp(s)
    outputs = [x, r, scaled, total, -s, f.where(x > best, 1.0, 0.0), g.reduce("batch_sum", r) * k]
    return Named(program(outputs, [best, k, g.parameter("p"), g.constant(2.5), k * best]), {"p": 1.5})


def ties_program() -> Named:
    """Operators that choose, on whole numbers, which are often equal: between tokens, rows and the batch."""
    g = Graph()
    x, y, z = (g.input(f"whole {n}", _T) for n in "xyz")
    r, s, q = (g.input(f"whole {n}", _R) for n in "rsq")
    k = g.input("whole k", _B)
    outputs = []
    for a, b in ((x, y), (x, r), (r, x), (x, k), (r, s), (r, k)):
        outputs += [f.minimum(a, b), f.maximum(a, b), f.sign(a - b), f.abs(a - b)]
        outputs += [f.where(g.call(op, a, b), a + 7.0, b - 7.0) for op in ("lt", "le", "gt", "ge", "eq", "ne")]
        outputs += [f.where((a <= b) & (a >= b), a, z), f.where((a < b) | ~(a <= b), a, 0.0), f.where(a - b, z, b)]
    for a, low, high in ((x, y, z), (x, r, k), (x, y, r), (r, s, q), (r, s, k), (r, g.constant(-1.0), q)):
        inside = (f.minimum(low, high), f.maximum(low, high))
        outputs += [f.clip(a, low, high), f.clip(a, *inside), f.where(g.call("outside", a, low, high), 5.0, a)]
    return Named(program(outputs, [f.where(k <= 1.0, k, 9.0)]), {})


def random_program(seed: int, size: int = 60) -> Named:
    """A graph of some `size` random operators and reductions over all levels, whose values stay in f32's comfort."""
    rng, g = random.Random(seed), Graph()
    nodes: list[Node] = [g.input(n, _T) for n in ("a", "b", "c")] + [g.input(n, _R) for n in ("r", "s")]
    nodes += [g.input("k", _B), g.parameter("p"), g.parameter("q"), g.constant(0.7)]
    conditions: list[Node] = [nodes[0] > nodes[1], nodes[3] <= nodes[4], nodes[6] > nodes[7]]
    used: set[int] = set()
    while len(nodes) < size // 3:
        x, y, z = (rng.choice(nodes[-8:] if rng.random() < 0.6 else nodes) for _ in range(3))
        made = rng.choice(_STEPS)(rng, x, y, z, conditions)
        if made is None or made.op == "constant":
            continue
        used |= {x.id, y.id, z.id}
        nodes.append(f.clip(made, -4.0, 4.0) if rng.random() < 0.7 else f.tanh(made))
    ends = [n for n in nodes if n.id not in used or n.id == nodes[-1].id]
    tensors, batch = [n for n in ends if n.level >= _R], [n for n in ends if n.level <= _B]
    sums = [g.reduce("batch_sum", g.reduce("seq_sum", n)) for n in tensors if n.level == _T][:2]
    return Named(program([*tensors, nodes[0]], [*batch, *sums, nodes[5]]), {"p": 0.6, "q": -0.4})


def scan_program(seed: int, size: int = 8) -> Named:
    """Scans of scans in both directions, of tokens and of rows, with coefficients of every level, and segments."""
    rng, g = random.Random(seed), Graph()
    nodes: list[Node] = [g.input(n, _T) for n in ("a", "b", "c")] + [g.input("r", _R), g.input("k", _B)]
    ids = g.input("whole", _T)
    for _ in range(size):
        x, y = (rng.choice(nodes) for _ in range(2))
        by = rng.choice(
            [
                0.95,
                0.0,
                1.0,
                g.parameter("p"),
                f.tanh(nodes[3]),
                f.tanh(nodes[4]),
                f.where(y > 0.5, 0.0, 0.9),
                f.tanh(y),
            ]
        )
        made = rng.choice((
            lambda x=x, by=by: g.along(rng.choice(("scan", "scan_reverse")), x, by),
            lambda x=x, by=by: g.along(rng.choice(("scan", "scan_reverse")), f.tanh(x * nodes[0]), by),
            lambda x=x, by=by: f.seq_shift(f.where(g.valid(), x, 0.0) + nodes[1], rng.random() < 0.5),
            lambda x=x, by=by: rng.choice((f.segment_sum, f.segment_mean))(x, ids),
            lambda x=x, by=by: f.seq_mean(x) + x if x.level == _T else x + nodes[2],
        ))()  # fmt: skip
        nodes.append(f.tanh(0.2 * made) + 0.1 * made if made.op in ("scan", "scan_reverse") else made)
    outputs = [n for n in nodes[5:] if n.level >= _R]
    sums = [g.reduce("batch_sum", g.reduce("seq_sum", n)) for n in outputs[-2:] if n.level == _T]
    return Named(program([*outputs, f.seq_max(f.seq_cumsum(nodes[0]))], sums), {"p": -0.7})


def _compare(rng: random.Random, x: Node, y: Node, z: Node, conditions: list[Node]) -> Node | None:
    op = rng.choice(("lt", "le", "gt", "ge", "eq", "ne"))
    first = x.graph.call(op, x, y)
    if first.op != "constant":
        second = rng.choice(conditions)
        joined = rng.choice((first & second, first | ~second, x.graph.call("outside", x, -1.0, 1.0)))
        conditions.append(joined)
    return None


def _cross_sequence(rng: random.Random, x: Node, y: Node, z: Node, conditions: list[Node]) -> Node | None:
    g = x.graph
    if x.level < _R:
        return None
    row = x if x.level == _R else f.seq_mean(x)
    key = g.input(rng.choice("rs"), _R)  # computed ones may be equal but for rounding, and rank otherwise in float64
    op = rng.choice(("group_sum", "group_max", "group_min", "group_sum_others", "before", "after", "batch_permute"))
    if op in ("before", "after"):
        return g.reduce(f"group_sum_{op}", row, key)
    return g.reduce(op, row, key, g.input("s", _R)) if op == "batch_permute" else g.reduce(op, row)


def _over(rng: random.Random, x: Node, y: Node, z: Node, conditions: list[Node]) -> Node | None:
    g = x.graph
    if x.level == _T:
        op = rng.choice(("seq_sum", "seq_max", "seq_min"))
        return g.reduce(op, x) if op != "seq_sum" else g.reduce(op, x) / f.maximum(g.length(), 1.0)
    if x.level == _R and rng.random() < 0.5:
        return g.reduce(rng.choice(("batch_sum", "batch_max", "batch_min")), f.where(g.valid(), x, 0.0))
    return None


_STEPS: tuple[Callable[..., Node | None], ...] = (
    lambda rng, x, y, z, c: x + y,
    lambda rng, x, y, z, c: x - y * z,
    lambda rng, x, y, z, c: -(x * y),
    lambda rng, x, y, z, c: x / (f.abs(y) + 0.5),
    lambda rng, x, y, z, c: f.where(rng.choice(c), x, y),
    lambda rng, x, y, z, c: f.where(rng.choice(c), x * y, 0.0),
    lambda rng, x, y, z, c: f.clip(x, f.minimum(y, z), f.maximum(y, z)),
    lambda rng, x, y, z, c: f.exp(f.clip(x, -2.0, 2.0)) - f.expm1(f.minimum(y, 1.0)),
    lambda rng, x, y, z, c: f.log(f.abs(x) + 0.3) + f.log1p(f.maximum(y, -0.5)),
    lambda rng, x, y, z, c: f.sigmoid(x) * f.sqrt(f.abs(y) + 0.1),
    lambda rng, x, y, z, c: f.logsigmoid(x * 20.0) + f.sign(y) * f.softplus(z),
    _compare,
    _cross_sequence,
    _cross_sequence,
    _over,
)


# --------------------------------------------------------------------------------------------------------------- calls
@dataclass
class Call:
    """Arguments of a run, on the CPU."""

    inputs: list[Tensor]
    sides: list[Tokens]
    scalars: list[float]
    groups: Tensor

    def on(self, device: str) -> tuple[Any, ...]:
        """As `run` takes them, on `device`."""
        sides = [Tokens(s.shape, _to(s.mask, device), _to(s.cu_seqlens, device)) for s in self.sides]
        return [x.to(device) for x in self.inputs], sides, self.scalars, self.groups.to(device)


def _to(x: Tensor | None, device: str) -> Tensor | None:
    return None if x is None else x.to(device)


def make_call(named: Named, rows: int, width: int, *, mask: str = "bool", packed: bool = False, seed: int = 0) -> Call:
    """Random inputs; NaN and infinities under the mask. One row in four is empty, none with mask "none"."""
    g = torch.Generator().manual_seed(seed)
    sides = [_tokens(rows, width, mask, packed, g) for _ in range(named.program.sides)]
    inputs = []
    for node in named.program.inputs:
        side = sides[node.side]
        shape = {_T: side.shape, _R: (rows,), _B: ()}[node.level]
        x = _values(node.name or "", shape, g)
        if node.level == _T and side.mask is not None:
            junk = torch.tensor([torch.nan, torch.inf, -torch.inf, 1e38])
            x = torch.where(side.mask != 0, x, junk[torch.randint(4, side.shape, generator=g)])
        inputs.append(x)
    groups = torch.randint(max(1, rows // 3), (rows,), generator=g)
    groups = groups.unique(return_inverse=True)[1] if rows else groups
    return Call(inputs, sides, named.program.scalar_values(named.parameters), groups)


def _tokens(rows: int, width: int, mask: str, packed: bool, g: torch.Generator) -> Tokens:
    bounds = None
    if packed:
        lengths = torch.randint(width + 1, (rows,), generator=g)
        bounds = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    shape = (rows, width) if bounds is None else (int(bounds[-1]),)
    dtype = MASKS[mask]
    if dtype is None:
        return Tokens(shape, None, bounds)
    keep = torch.rand(shape, generator=g) < 0.7
    empty = torch.rand(rows, generator=g) < 0.25
    keep &= ~(empty.unsqueeze(1) if bounds is None else empty.repeat_interleave(bounds.diff()))
    values = keep.to(dtype)
    if dtype == torch.float32:
        values = torch.where(keep, 0.5, -0.0)
    if dtype == torch.int64:
        values = values << 40  # a count in the upper half
    return Tokens(shape, values, bounds)


def _values(name: str, shape: tuple[int, ...], g: torch.Generator) -> Tensor:
    x = torch.randn(shape, generator=g)
    if name == "segment_ids":
        return (torch.rand(shape, generator=g) * 3).floor() - 1.0
    if name.startswith("whole"):
        return x.round() + 0.0
    if name.endswith("logprob"):
        return -x.abs() - 0.1
    if name in ("call.width", "call.normalizer", "weight", "entropy"):
        return x.abs() + 0.5
    return x if name != "reward" and name != "answer" else (x > 0).float()


# -------------------------------------------------------------------------------------------------------------- checks
def check_run(module: ModuleType, device: str, named: Named, call: Call, tolerance: float = 3e-6) -> None:
    """Outputs and batch values against the reference's, and the same bits the second time."""
    p = named.program
    got, got_batch = module.run(p, *call.on(device))
    want, want_batch = reference.run(p, call.inputs, call.sides, call.scalars, call.groups)
    for i, (a, b) in enumerate(zip(got, want, strict=True)):
        size = float(b.nan_to_num(0.0, 0.0, 0.0).abs().max()) if b.numel() else 0.0
        assert a.dtype == torch.float32
        close(a, b, tolerance * (0.1 + size), tolerance * 10, f"output {i}")
    close(got_batch, want_batch, tolerance, 10 * tolerance, "batch values")
    again, again_batch = module.run(p, *call.on(device))
    assert all(same_bits(a, b) for a, b in zip([*got, got_batch], [*again, again_batch], strict=True))


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal, NaN where NaN."""
    return torch.equal(a.nan_to_num(123.0), b.nan_to_num(123.0)) and torch.equal(a.isnan(), b.isnan())


def check_functions(module: ModuleType, device: str, tolerance: float = 2e-6) -> None:
    """Every function of the language of numbers near 0, where they cancel, and far off, where they overflow."""
    far = [0.0, 1e-30, 1e-7, 1e-3, 0.3, 0.7, 1.0, 3.0, 20.0, 80.0, 95.0, 200.0, torch.inf]
    x = torch.tensor([*far, *(-v for v in far), torch.nan])
    g = Graph()
    a, b = g.input("a", _T), g.input("b", _T)
    table = [g.call(op, *(a, b)[: row.arity]) for op, row in OPS.items() if row.arity < 3 and row.symbol is None]
    outputs = [*table, f.softplus(a), f.relu(a)]
    p = program(outputs, [])
    pairs = torch.cartesian_prod(x, x).T.contiguous()
    sides = [Tokens((1, pairs.shape[1]))]
    inputs = [pairs["ab".index(str(n.name))][None] for n in p.inputs]
    got, _ = module.run(p, [v.to(device) for v in inputs], sides, [], None)
    want, _ = reference.run(p, inputs, sides, [], None)
    for k, (here, there) in enumerate(zip(got, want, strict=True)):
        close(here, there, 1e-37, tolerance, f"function {k}")


def check_backward(module: ModuleType, device: str, call: Call, seed: int = 0) -> None:
    """`scale` and `broadcast_to_tokens` on the call's first side."""
    g = torch.Generator().manual_seed(seed)
    side, (_, on_device, *_) = call.sides[0], call.on(device)
    rows, grad = side.rows, torch.tensor(-1.7)
    counted = torch.ones(side.shape, dtype=torch.bool) if side.mask is None else side.mask != 0
    saved = torch.where(
        counted & (torch.rand(side.shape, generator=g) < 0.8), torch.randn(side.shape, generator=g), 0.0
    )
    weight = torch.randn(rows, generator=g)
    spread = weight.clone()
    if rows > 1:
        weight[1] = torch.inf
    per_token = _of_rows(weight, side)
    got = module.scale(saved.to(device), weight.to(device), grad.to(device), on_device[0])
    close(got, torch.where(saved == 0, 0.0, saved * (per_token * grad)), 0.0, 3e-7, "scale")
    got = module.scale(saved.to(device), None, grad.to(device), on_device[0])
    close(got, saved * grad, 0.0, 3e-7, "scale without weights")
    got = module.broadcast_to_tokens(spread.to(device), grad.to(device), on_device[0])
    close(got, torch.where(counted, _of_rows(spread, side) * grad, 0.0), 0.0, 3e-7, "broadcast_to_tokens")


def check_overflow(module: ModuleType, device: str) -> None:
    """An upstream gradient that has overflowed leaves a gradient of 0 at 0, in `scale` and in `broadcast_to_tokens`."""
    overflowed, nothing = torch.tensor(torch.inf).to(device), torch.zeros(3, 5).to(device)
    assert not module.scale(nothing, None, overflowed, Tokens((3, 5))).any()
    assert not module.broadcast_to_tokens(nothing[:, 0].contiguous(), overflowed, Tokens((3, 5))).any()


def _of_rows(x: Tensor, side: Tokens) -> Tensor:
    if side.cu_seqlens is None:
        return x.unsqueeze(1).expand(side.shape)
    return x.repeat_interleave(side.cu_seqlens.diff())


# -------------------------------------------------------------------------------------------------- logits_policy_loss
def logits_gradient(loss: Any, *, entropy: bool = False, advantage: Level = _R, **call: Any) -> TokenGradient:
    """The gradient per token of a policy loss, with an entropy bonus where wanted."""
    read = entropy or loss.asks("entropy")
    levels = [("logprob", _T), ("old_logprob", _T), ("advantage", advantage), *([("entropy", _T)] if read else [])]
    call.setdefault("aggregation", loss.aggregation)
    gradient = token_gradient(loss, PolicyCall(tuple(levels), entropy_bonus=entropy, **call))
    assert gradient is not None
    return gradient


@losses.define
def _entropy_as_weight(t: Any) -> Any:
    return -t.advantage * t.logprob * losses.stop_gradient(t.entropy)


@losses.define
def _entropy_alone(t: Any) -> Any:
    return -t.advantage * t.entropy


@losses.define
def _logprob_as_weight(t: Any) -> Any:
    return t.entropy * losses.stop_gradient(t.ratio)


@losses.define
def _entropy_reported(t: Any) -> Any:
    t.report(h=t.entropy)
    return -t.advantage * t.ratio


#: Gradients for what a loss reads, and for less: each term alone, as a constant, and only measured.
GRADIENTS: dict[str, Callable[[], TokenGradient]] = {
    "both": lambda: logits_gradient(losses.ppo(), entropy=True),
    "entropy as a constant": lambda: logits_gradient(_entropy_as_weight()),
    "entropy alone": lambda: logits_gradient(_entropy_alone()),
    "logprob as a constant": lambda: logits_gradient(_logprob_as_weight()),
    "entropy measured": lambda: logits_gradient(_entropy_reported()),
}


def check_logits(
    module: ModuleType,
    device: str,
    gradient: TokenGradient,
    case: Logits,
    *,
    in_place: bool = False,
    packed: bool = False,
    seed: int = 0,
) -> tuple[Tensor, Tensor]:
    """Log-probs, entropies and the logits' gradient against the reference's; the case's rows are two sequences or more.

    Returns (gradient, log-probs) as the module gave them.
    """
    g, p = torch.Generator().manual_seed(seed), gradient.program
    count, dtype = case.logits.shape[0], case.logits.dtype
    if packed:
        bounds = torch.tensor([0, 0, count // 3, count])
        tokens = Tokens((count,), case.mask, bounds)
    else:
        tokens = Tokens((1, count), None if case.mask is None else case.mask[None])
    values, *_ = reference_logprobs.forward(
        case.logits, case.labels, case.inv_temperature, case.mask, None, None, None, 1
    )
    near = (values[0] + 0.3 * torch.randn(count, generator=g)).nan_to_num(-1.0, -1.0, -1.0)
    given = {"logprob": values[0], "entropy": values[1], "old_logprob": near}
    inputs = []
    for node in p.inputs:
        shape = {_T: tokens.shape, _R: (tokens.rows,), _B: ()}[node.level]
        x = given.get(node.name or "")
        inputs.append(_values(node.name or "", shape, g) if x is None else x.reshape(shape))
    numbers = {"call.width": 7.0, "call.kl_coef": 0.1, "call.entropy_coef": 0.02}
    scalars = p.scalar_values({k: numbers.get(k, 0.2) for k in gradient.parameters})
    scale = torch.tensor(1.75)
    outputs = [x.reshape(-1) for x in reference.run(p, inputs, [tokens], scalars, None)[0]]
    upstream = torch.zeros(8, count)
    for name, output in zip(gradient.gradients, outputs, strict=True):
        upstream[("logprob", "entropy").index(name)] = output * scale
    want = torch.empty(case.logits.shape, dtype=torch.float64)
    args = (case.labels, case.inv_temperature, case.mask, None, None, None)
    reference_logprobs.backward(case.logits, *args, values, torch.empty(count, 0), upstream, None, want)

    logits, labels, inverse, *_ = case.arguments(device)
    out = logits if in_place else torch.full_like(logits, torch.nan)
    on = Tokens(tokens.shape, _to(tokens.mask, device), _to(tokens.cu_seqlens, device))
    passed = [None if n.name in ("logprob", "entropy") else x.to(device) for n, x in zip(p.inputs, inputs, strict=True)]
    logprobs, entropy = module.run(
        p, logits, labels, inverse, passed, on, scalars, None, scale.to(device), out,
        gradient.gradients, gradient.entropy,
    )  # fmt: skip
    close(logprobs, values[0], 3e-6, 1e-6, "logprobs")
    close(entropy, values[1] if gradient.entropy else torch.zeros(0), 3e-6, 1e-6, "entropy")
    size = max(float(upstream.nan_to_num(0.0, 0.0, 0.0).abs().max()), 1e-3)
    close(out, want, 5e-6 * size, 4e-6 + 1.01 * STEP[dtype], "gradient")
    return out, logprobs


def check_rescale(module: ModuleType, device: str, dtype: torch.dtype, rows: int, vocab: int) -> None:
    """Times upstream / applied, at any alignment; untouched where the two are equal; what is 0 stays 0."""
    wide = torch.randn(rows, vocab + 5).to(dtype)
    for grad in (wide[:, :vocab].contiguous(), wide[:, 3 : 3 + vocab]):
        changed = torch.full_like(wide, 7.0).to(device)[:, 1 : 1 + vocab]
        changed.copy_(grad)
        same = changed.clone()
        module.rescale(same, torch.tensor(0.3).to(device), torch.tensor(0.3).to(device))
        assert torch.equal(same.cpu(), grad)
        module.rescale(changed, torch.tensor(3.0).to(device), torch.tensor(-2.0).to(device))
        assert torch.equal(changed.cpu(), (grad.float() * -1.5).to(dtype))
        around = changed._base if changed._base is not None else changed
        assert (around[:, 0] == 7.0).all()
        assert (around[:, 1 + vocab :] == 7.0).all()
        masked = changed.fill_(0.5)
        masked[::2] = 0.0
        module.rescale(masked, torch.tensor(torch.inf).to(device), torch.tensor(1.0).to(device))
        assert (masked[::2] == 0.0).all()
        assert masked[1::2].isinf().all()
        erased = changed.fill_(0.0)
        module.rescale(erased, torch.tensor(1.0).to(device), torch.tensor(0.0).to(device))
        assert (erased == 0.0).all()

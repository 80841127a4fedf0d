"""batch_threshold: the selection on every backend against sorting, in losses, and what it refuses."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import pytest
import torch
from torch import Tensor

import fastreward
from fastreward import losses
from fastreward._arguments.tokens import Tokens
from fastreward._runtime import selection
from fastreward.cpu import program as cpu
from fastreward.language.node import Level
from fastreward.language.objective import PolicyCall, policy_objective
from fastreward.losses import batch_threshold, define, where
from fastreward.reference import program as reference

INF, NAN = torch.inf, torch.nan


def by_sorting(x: Tensor, mask: Tensor, bound: float) -> float:
    """One value after the other from the top, equal ones together, in float64."""
    values = sorted(v for v in x[mask].double().tolist() if v == v)
    if not values:
        return INF
    while sum(values) / len(values) >= bound and values[0] < values[-1]:
        values = [v for v in values if v < values[-1]]
    return values[-1]


SCENES: dict[str, Callable[[], Tensor]] = {
    "normal": lambda: torch.randn(7, 300),
    "squares": lambda: torch.randn(3, 900) ** 2,
    "few values": lambda: torch.randint(-3, 4, (5, 200)) * 0.5,
    "one value": lambda: torch.full((2, 50), 0.3),
    "zeros of both signs": lambda: torch.tensor([[0.0, -0.0, -1.0, 1.0, -0.0, 0.0]]),
    "tiny": lambda: torch.randn(4, 100) * 1e-41,
    "huge": lambda: torch.randn(4, 100) * 1e37,
    "every size": lambda: torch.randn(4, 500) * torch.logspace(-38, 30, 500),
    "infinities": lambda: torch.tensor([[1.0, INF, 2.0, 0.5, 3.0, INF, NAN]]),
    "neighbours": lambda: 1.0 + torch.arange(64.0).reshape(4, 16) * 2.0**-23,
    "one token": lambda: torch.tensor([[2.5]]),
}


@pytest.mark.parametrize("module", [cpu, reference, selection], ids=["cpu", "reference", "gpu"])
@pytest.mark.parametrize("name", SCENES)
def test_the_threshold_is_that_of_a_sort(name: str, module: ModuleType) -> None:
    torch.manual_seed(3)
    x = SCENES[name]()
    masks = [
        None,
        torch.rand(x.shape) < 0.6,
        torch.zeros(x.shape, dtype=torch.int64),
        (torch.rand(x.shape) < 0.5).float(),
    ]
    finite = x[x.isfinite()].double()
    bounds = [0.0, 0.04, float(finite.mean()), float(finite.median()), float(finite.min()), float(finite.max()) * 2]
    for mask in masks:
        counted = torch.ones(x.shape, dtype=torch.bool) if mask is None else mask != 0
        for bound in torch.tensor(bounds).tolist():
            got = module.threshold(x, bound, Tokens(tuple(x.shape), mask), False)
            assert float(module.threshold(x, torch.tensor(bound), Tokens(tuple(x.shape), mask), False)) == float(got)
            assert got.dtype == torch.float32
            assert got.shape == ()
            assert float(got) == by_sorting(x, counted, bound), (mask, bound)


@pytest.mark.parametrize("module", [cpu, reference, selection], ids=["cpu", "reference", "gpu"])
@pytest.mark.parametrize("name", SCENES)
def test_the_largest_are_those_of_a_sort(name: str, module: ModuleType) -> None:
    torch.manual_seed(4)
    x = SCENES[name]()
    for mask in (None, torch.rand(x.shape) < 0.6, torch.zeros(x.shape, dtype=torch.bool)):
        counted = x.isnan().logical_not() if mask is None else mask & ~x.isnan()
        ordered = x[counted].sort(descending=True).values
        for share in (1e-9, 0.0002, 0.1, 1 / 3, 1.0):
            got = float(module.threshold(x, share, Tokens(tuple(x.shape), mask), True))
            largest = max(1, int(share * len(ordered)))
            assert got == (float(ordered[largest - 1]) if len(ordered) else INF)


def test_large_batches_and_threads(threads: None) -> None:
    """Blocks of several threads, packed; the same to the bit, and what sorting says."""
    x = torch.randn(1_200_000) ** 2
    tokens = Tokens((len(x),), torch.rand(len(x)) < 0.9, torch.tensor([0, 5, 5, 700_000, len(x)]))
    bound = 0.31
    want = reference.threshold(x, bound, tokens, False)
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        assert torch.equal(cpu.threshold(x, bound, tokens, False), want)
    assert torch.equal(selection.threshold(x, bound, tokens, False), want)
    kept = x[tokens.mask & (x <= want)].double()  # type: ignore[operator]
    more = x[tokens.mask & (x <= x[tokens.mask & (x > want)].min())].double()  # type: ignore[operator]
    assert kept.mean() < 0.31 <= more.mean()


@define
def two_thresholds(t, first=0.1, second=0.1):
    """One of a computed value, one of what is left of another after the first."""
    size = losses.abs(t.log_ratio)
    near = size <= batch_threshold(size, keep_mean_below=first)
    gain = where(near, t.advantage * t.ratio, 1.0)
    t.report(near=near)
    return -where(gain > batch_threshold(gain, keep_mean_below=second), 0.0, gain) * t.ratio


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_thresholds_of_thresholds_in_a_loss(backend: str, packed: bool) -> None:
    g = torch.Generator().manual_seed(0)
    lp, old, adv = 0.3 * torch.randn(3, 6, 50, generator=g)
    mask = torch.rand(6, 50, generator=g) < 0.8
    loss, leaf = two_thresholds(), lp.double().requires_grad_()
    token = loss.evaluate(mask=mask, logprob=leaf, old_logprob=old.double(), advantage=adv.double())
    assert 0.1 < float((token[mask] == 0).double().mean()) < 0.9
    wanted = token.sum() / mask.sum()
    (want,) = torch.autograd.grad(wanted, leaf)
    bounds = torch.arange(7) * 50 if packed else None
    given = [x.reshape(-1) if packed else x for x in (lp, old, adv, mask)]
    given[0] = given[0].clone().requires_grad_()
    with fastreward.backend(backend):
        result = fastreward.policy_loss(*given, loss=loss, cu_seqlens=bounds)
        (got,) = torch.autograd.grad(result.loss, given[0])
    torch.testing.assert_close(result.loss.double(), wanted, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(got.double(), want.reshape(got.shape), rtol=1e-4, atol=1e-7)


def test_what_is_compared_is_what_was_selected_from() -> None:
    """The values come from the program before: no other rounding can put one on the threshold's other side."""
    levels = tuple((name, Level.TOKEN) for name in ("logprob", "old_logprob", "advantage"))
    objective = policy_objective(losses.m2po(), PolicyCall(levels, "token-mean", deferred=True))
    ((before, _),) = objective.before
    assert [n.name for n in before.program.inputs] == ["logprob", "old_logprob"]
    assert {"thresholded.0", "threshold.0"} <= {n.name for n in objective.program.inputs}
    assert "thresholded.0" not in {name for name, _ in objective.inputs}
    assert len(objective.program.stages) == 1


def test_a_compiled_call_and_sources() -> None:
    lp, old, adv = torch.randn(3, 4, 9)
    plain = fastreward.policy_loss(lp, old, adv, loss=losses.m2po()).loss
    loss = losses.m2po()
    compiled = torch.compile(lambda *x: fastreward.policy_loss(*x, loss=loss).loss, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(lp, old, adv), plain)
    for backend in ("triton", "cuda"):
        text = losses.m2po().source(backend)  # type: ignore[arg-type]
        assert "threshold_0" in text
        assert "batch_threshold" in str(losses.m2po())


def test_what_a_threshold_can_not_take_is_named() -> None:
    @define
    def of_sequences(t):
        return where(batch_threshold(losses.seq_mean(t.logprob), keep_mean_below=0.1) > 0.0, t.logprob, 0.0)

    with pytest.raises(TypeError, match="batch_threshold takes a term per token"):
        str(of_sequences())

    @define
    def bound_per_token(t):
        return where(batch_threshold(t.logprob, keep_mean_below=t.advantage) > 0.0, t.logprob, 0.0)

    with pytest.raises(TypeError, match="got a bound per token or sequence"):
        str(bound_per_token())

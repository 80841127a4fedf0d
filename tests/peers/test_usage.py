"""The account of what replaced functions have served: calls, tokens, seconds, and what was handed on."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from fastreward.patch import bindings, usage
from fastreward.patch.bindings import Report, Status
from fastreward.patch.usage import handed_on


class Clock:
    """A clock that goes on only where a test says so."""

    def __init__(self) -> None:
        self.now = 100.0

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    for module in (bindings, usage):
        monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=lambda: clock.now))
    return clock


def test_calls_tokens_and_seconds_are_counted_without_those_of_functions_within(clock: Clock) -> None:
    report = Report("trainer", "1", since=clock.now)
    inner = report.counted("inner", lambda x: clock.sleep(2.0), len)

    def outside(x: list[int]) -> None:
        clock.sleep(1.0)
        inner(x[1:])

    outer = report.counted("outer", outside, len)
    outer([1, 2, 3])
    outer([1])
    assert (report.usage["outer"].calls, report.usage["outer"].tokens) == (2, 4)
    assert (report.usage["inner"].calls, report.usage["inner"].tokens) == (2, 2)
    assert (report.usage["outer"].seconds, report.usage["inner"].seconds) == (2.0, 4.0)
    clock.sleep(6.0)
    assert report.share == 0.5
    assert report.metrics() == {
        "fastreward/calls": 4,
        "fastreward/tokens": 6,
        "fastreward/seconds": 6,
        "fastreward/handed_on": 0,
        "fastreward/share": 0.5,
    }


@pytest.mark.parametrize(("number", "listed"), [(10, False), (9, True)])
def test_many_functions_without_a_call_are_counted(number: int, listed: bool) -> None:
    report = Report("trainer", "1")
    functions = {f"f{i}": report.counted(f"f{i}", lambda x: None, len) for i in range(number)}
    functions["f0"]([1, 2])
    text = str(Status(trainer=report))
    assert "f0: 1, 2, " in text
    assert ("f5: 0, 0, " in text) is listed
    assert ("9 others, not called so far; status()['trainer']" in text) is not listed


def test_a_call_that_is_handed_on_is_none_of_ours(clock: Clock) -> None:
    report = Report("trainer", "1")

    def function(x: int) -> None:
        if x < 0:
            handed_on()
            clock.sleep(1.0)

    counted = report.counted("f", function, lambda x: x)
    counted(3)
    counted(-1)
    assert report.usage["f"] == usage.Usage(calls=1, tokens=3, seconds=0.0, handed_on=1)


def test_a_call_that_raises_leaves_the_account_in_order() -> None:
    report = Report("trainer", "1")
    failing = report.counted("failing", lambda x: 1 // x, lambda x: x)
    with pytest.raises(ZeroDivisionError):
        failing(0)
    failing(1)
    assert report.usage["failing"].calls == 1


def test_the_backward_counts_too(clock: Clock) -> None:
    class Slow(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):  # type: ignore[no-untyped-def]
            return x.clone(), x.clone()

        @staticmethod
        def backward(ctx, first, second):  # type: ignore[no-untyped-def]
            clock.sleep(1.0)
            return first + second

    report = Report("trainer", "1")
    counted = report.counted("slow", Slow.apply, torch.Tensor.numel)
    first, second = counted(torch.ones(5, requires_grad=True))
    assert report.usage["slow"].seconds == 0
    (first + second).sum().backward()
    assert report.usage["slow"].seconds == 1  # once, though both outputs come from one node


def test_status_prints_a_row_for_each_function() -> None:
    report = Report("trainer", "1")
    report.counted("module.f", lambda x: x, lambda x: 1000)(0)
    assert "module.f: 1, 1,000, 0.000, " in str(Status(trainer=report))
    assert str(Status()) == "fastreward.patch: no patch is in place in this process"

"""returns: the right numbers of known cases, the float64 reference, trainers' loops, bits, and bad input."""

from __future__ import annotations

import math
from typing import Any

import pytest
import returns_checks
import torch
from torch import Tensor, tensor

import fastreward as fr
from fastreward._arguments.options import ReturnsOptions
from fastreward.cpu import returns as cpu
from fastreward.reference import returns as reference

BUFFER = torch.zeros(2, 8)


@pytest.fixture(params=["cpu", "reference"])
def _backend(request: pytest.FixtureRequest):
    with fr.backend(request.param):
        yield


# ------------------------------------------------------------------------------------------------------- known numbers
HOLE = {"rewards": [0, 0, 0, 1], "values": [0.5, 9, 9, 0.2], "mask": [1, 0, 0, 1], "gamma": 0.9, "lam": 0.8}
TAIL = {"rewards": [0, 0, 0, 1], "values": [0.0] * 4, "mask": [1, 1, 0, 0], "gamma": 0.9, "lam": 0.9}
END = {"rewards": [0, 0, 1], "values": [0.5] * 3, "gamma": 0.99, "lam": 0.95}
CORNER = {"rewards": [1, 2, 3], "values": [0.5] * 3, "mask": [1, 1, 1]}
GAE: dict[str, tuple[dict[str, Any], list[float], list[float] | None]] = {
    "value under the mask": (
        {"rewards": [0, 1, 0], "values": [0, 0, 100], "mask": [1, 1, 0], "lam": 0.95}, [0.95, 1, 0], [0.95, 1, 0]
    ),
    "NaN under the mask": (
        {"rewards": [0, 1, 0], "values": [0, 0, math.nan], "mask": [1, 1, 0], "lam": 0.95}, [0.95, 1, 0], [0.95, 1, 0]
    ),
    "hole: carry": (HOLE, [0.256, 0, 0, 0.8], [0.756, 0, 0, 1]),
    "hole: decay": (
        HOLE | {"at_masked": "decay"}, [-0.108090, 0.54432, 0.756, 0.8], [0.391910, 0.54432, 0.756, 1]
    ),
    "hole: zero": (HOLE | {"at_masked": "zero"}, [-0.108090, 0, 0, 0.8], [0.391910, 0, 0, 1]),
    "hole: reset": (HOLE | {"at_masked": "reset"}, [-0.5, 0, 0, 0.8], [0, 0, 0, 1]),
    "tail: moved": (TAIL, [0.81, 1, 0, 0], None),
    "tail: moved, no discount": (TAIL | {"gamma": 0.0}, [0, 1, 0, 0], None),
    "tail: dropped": (TAIL | {"masked_rewards": "drop"}, [0, 0, 0, 0], None),
    "terminated": (END, [0.432568, 0.46525, 0.5], None),
    "terminated, by a flag": (END | {"next_values": [2.0], "terminated": [0, 0, 1]}, [0.432568, 0.46525, 0.5], None),
    "truncated": (END | {"next_values": [2.0]}, [2.183957, 2.32744, 2.48], None),
    "truncated, every next value": (END | {"next_values": [0.5, 0.5, 2.0], "done": [0, 0, 1]},
                                    [2.183957, 2.32744, 2.48], None),
    "gamma 0": (CORNER | {"gamma": 0.0}, [0.5, 1.5, 2.5], None),
    "lam 0": (CORNER | {"gamma": 0.9, "lam": 0.0}, [0.95, 1.95, 2.5], None),
    "both 1": (CORNER, [5.5, 4.5, 2.5], None),
    "all masked": (CORNER | {"mask": [0, 0, 0]}, [0, 0, 0], [0, 0, 0]),
}  # fmt: skip
RETURNS: dict[str, tuple[dict[str, Any], list[float]]] = {
    "no valid token": ({"rewards": [0, 0, 5], "mask": [0, 0, 0]}, [0, 0, 0]),
    "KL-shaped": ({"rewards": [-0.01, 0.98, -0.5], "mask": [1, 1, 0], "masked_rewards": "drop"}, [0.97, 0.98, 0]),
    "NaN KL": ({"rewards": [-0.01, 0.98, math.nan], "mask": [1, 1, 0]}, [0.97, 0.98, 0]),
    "hole: carry": ({"rewards": [0, 0, 0, 1], "mask": [1, 0, 1, 1], "gamma": 0.9}, [0.81, 0, 0.9, 1]),
    "hole: decay": (
        {"rewards": [0, 0, 0, 1], "mask": [1, 0, 1, 1], "gamma": 0.9, "at_masked": "decay"}, [0.729, 0.81, 0.9, 1]
    ),
    "hole: reset": (
        {"rewards": [0, 0, 0, 1], "mask": [1, 0, 1, 1], "gamma": 0.9, "at_masked": "reset"}, [0, 0, 0.9, 1]
    ),
    "reward in a hole": ({"rewards": [0, 7, 0, 1], "mask": [1, 0, 1, 1], "gamma": 0.5}, [7.25, 0, 0.5, 1]),
    "prompt's reward": ({"rewards": [7, 0, 1], "mask": [0, 1, 1]}, [0, 1, 1]),
    "from the left": (
        {"rewards": [1, 2, 0, 1, 5], "mask": [1, 0, 1, 1, 0], "gamma": 0.9, "reverse": False}, [3, 0, 2.7, 8.43, 0]
    ),
    "large discount": ({"rewards": [1, 0, 0, 0, 0, 0, 0, 0, 0], "gamma": 1e5}, [1, 0, 0, 0, 0, 0, 0, 0, 0]),
    "large discounts": (
        {"rewards": [0.0] * 8 + [1], "gamma": [1e30, 1e30, 1e-30, 1e-30] * 2 + [1.0]}, [1, 0, 0, 0, 1, 0, 0, 0, 1]
    ),
    "initial": ({"rewards": [1, 1, 9], "mask": [1, 1, 0], "gamma": 0.5, "initial": [8.0], "masked_rewards": "drop"},
                [3.5, 5, 0]),
    "min": ({"rewards": [3, 0, 0, 2, 0], "mask": [1, 0, 1, 1, 0], "op": "min"}, [0, 0, 0, 2, 0]),
    "min, positive steps": ({"rewards": [3, 0, 4, 5, 0], "mask": [1, 0, 1, 1, 0], "op": "min"}, [3, 0, 4, 5, 0]),
    "min, below 0": ({"rewards": [1, 0, 2], "mask": [1, 0, 1], "op": "min", "gamma": -0.5}, [-1, 0, 2]),
    "max, below 0": ({"rewards": [1, 0, 2], "mask": [1, 0, 1], "op": "max", "gamma": -0.5, "at_masked": "zero"},
                     [1, 0, 2]),
    "max": ({"rewards": [-3, 0, -4], "mask": [1, 0, 1], "op": "max"}, [-3, 0, -4]),
    "soft min": ({"rewards": [1, 2], "op": "min", "temperature": 0.5},
                 [-0.5 * math.log(math.exp(-2) + math.exp(-4)), 2]),
    "hard soft min": ({"rewards": [1, 1, 2], "op": "min", "temperature": 1e-300}, [1, 1, 2]),
    "logsumexp": ({"rewards": [1, 0, 2], "mask": [1, 0, 1], "op": "logsumexp"},
                  [math.log(math.exp(1) + math.exp(2)), 0, 2]),
}  # fmt: skip


def batched(arguments: dict[str, Any], packed: bool) -> dict[str, Any]:
    """Two rows of the same, or three packed sequences, one of them empty."""
    times = 3 if packed else 2

    def both(name: str, x: Any) -> Any:
        if not isinstance(x, list):
            return x
        one = tensor(x)
        if name == "mask":
            one = one.bool()
        if len(x) == 1 < len(arguments["rewards"]):
            return one.expand(times)
        return torch.cat([one, one]) if packed else torch.stack([one, one])

    made = {name: both(name, x) for name, x in arguments.items()}
    n = len(arguments["rewards"])
    return made | {"cu_seqlens": tensor([0, n, n, 2 * n])} if packed else made


def equal_rows(got: Tensor, want: list[float]) -> None:
    torch.testing.assert_close(got.reshape(2, -1), tensor([want, want]).float(), atol=2e-6, rtol=0)


@pytest.mark.usefixtures("_backend")
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", GAE)
def test_gae_of_known_cases(name: str, packed: bool) -> None:
    arguments, advantages, returns = GAE[name]
    got = fr.gae(**batched(arguments, packed))
    equal_rows(got[0], advantages)
    if returns is not None:
        equal_rows(got[1], returns)


@pytest.mark.usefixtures("_backend")
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", RETURNS)
def test_returns_of_known_cases(name: str, packed: bool) -> None:
    arguments, want = RETURNS[name]
    equal_rows(fr.discounted_returns(**batched(arguments, packed)), want)


@pytest.mark.usefixtures("_backend")
@pytest.mark.parametrize("shape", [(0, 4), (3, 0), (0, 0)])
def test_empty(shape: tuple[int, int]) -> None:
    x = torch.zeros(shape)
    assert fr.discounted_returns(x).shape == shape
    assert [y.shape for y in fr.gae(x, x, x)] == [shape, shape]
    bounds = torch.zeros(shape[0] + 1, dtype=torch.int64)
    assert fr.discounted_returns(torch.zeros(0), cu_seqlens=bounds).shape == (0,)


# ------------------------------------------------------------------------------------------------------------- numbers
@pytest.mark.parametrize("form", range(6))
def test_numbers_cpu(form: int) -> None:
    for k, chosen in enumerate(returns_checks.options()):
        shape = ((3, 40), (12, 23), (2, 1))[(k + form) % 3]
        returns_checks.check_numbers(cpu, "cpu", shape, chosen, packed=(k + form) % 2 == 0, form=form)


@pytest.mark.parametrize("kind", ["returns", "gae", "lambda", "vtrace"])
def test_numbers_over_blocks_cpu(kind: Any) -> None:
    """More rows than lanes, rows of several blocks, unequal ones."""
    for form, at_masked in enumerate(("carry", "decay", "reset")):
        chosen = ReturnsOptions(kind, at_masked, move=form == 0)  # type: ignore[arg-type]
        returns_checks.check_numbers(cpu, "cpu", (11, 700), chosen, packed=form != 1, form=form)


@pytest.mark.parametrize("chosen", [x for x in returns_checks.options() if x.reverse or x.op == "sum"], ids=str)
def test_bits(chosen: ReturnsOptions) -> None:
    returns_checks.check_bits(cpu, "cpu", (3, 270), chosen)


def test_bits_of_moved_rewards_from_the_left() -> None:
    r, mask = torch.randn(2, 61), torch.rand(2, 61) > 0.5
    wide, given = (torch.nn.functional.pad(x, (3, 7)) for x in (r, mask))
    want = fr.discounted_returns(r, mask, gamma=0.9, reverse=False)
    assert torch.equal(fr.discounted_returns(wide, given, gamma=0.9, reverse=False)[:, 3:-7], want)


@pytest.mark.usefixtures("threads")
def test_bits_over_threads() -> None:
    r, v, mask = torch.randn(40, 900), torch.randn(40, 900), torch.rand(40, 900) > 0.1
    want = fr.gae(r, v, mask, gamma=0.99, lam=0.95)
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        assert all(map(torch.equal, fr.gae(r, v, mask, gamma=0.99, lam=0.95), want))


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int32, torch.int64, torch.float32, torch.bfloat16])
def test_masks(dtype: torch.dtype) -> None:
    r, mask = torch.randn(9, 40), torch.rand(9, 40) > 0.3
    assert torch.equal(fr.discounted_returns(r, mask.to(dtype)), fr.discounted_returns(r, mask))
    given = r.double().numpy(), mask.numpy()
    assert (fr.discounted_returns(*given) == fr.discounted_returns(r, mask).numpy()).all()


# ------------------------------------------------------------------------------------------------------ other functions
def test_what_is_the_same_by_other_names() -> None:
    r, v, mask = torch.randn(5, 60), torch.randn(5, 60), torch.rand(5, 60) > 0.2
    options = {"gamma": 0.97, "lam": 0.9}
    advantages, returns = fr.gae(r, v, mask, **options)
    targets, _ = fr.vtrace(torch.zeros_like(r), r, v, mask, **options)
    torch.testing.assert_close(targets, returns)
    following = torch.zeros_like(v)  # the value of the next valid token
    for b in range(5):
        places = mask[b].nonzero().squeeze(1)
        following[b, places[:-1]] = v[b, places[1:]]
    torch.testing.assert_close(fr.lambda_returns(r, mask, next_values=following, **options), returns)
    torch.testing.assert_close(fr.gae(r, v, mask, next_values=following, **options)[0], advantages)
    per_token = {name: torch.full((5, 60), x) for name, x in options.items()}
    torch.testing.assert_close(fr.gae(r, v, mask, **per_token)[0], advantages, atol=2e-5, rtol=0)
    assert torch.equal(
        fr.gae(r, v, mask, **{k: tensor(x, dtype=torch.float64) for k, x in options.items()})[0], advantages
    )


def test_whitened() -> None:
    r, v, mask = torch.randn(7, 50), torch.randn(7, 50), torch.rand(7, 50) > 0.2
    advantages, returns = fr.gae(r, v, mask)
    white, same = fr.gae(r, v, mask, whiten=True)
    assert torch.equal(white, fr.whiten(advantages, mask))
    assert torch.equal(same, returns)
    with pytest.raises(ValueError, match="mask: expected at least 2 counted positions"):
        fr.gae(r, v, torch.zeros_like(mask), whiten=True)


def test_verls_gae() -> None:
    verl = pytest.importorskip("verl.trainer.ppo.core_algos")
    r, v = torch.randn(6, 80), torch.randn(6, 80)
    mask = ((torch.rand(6, 80) > 0.2) & (torch.arange(80) < torch.randint(40, 81, (6, 1)))).float()
    white, returns = verl.compute_gae_advantage_return(r, v, mask, 0.98, 0.9)
    ours = fr.gae(r, v, mask, gamma=0.98, lam=0.9, masked_rewards="drop", whiten=True)
    for got, want in zip(ours, (white, returns), strict=True):
        torch.testing.assert_close(got[mask > 0], want[mask > 0], atol=5e-6, rtol=0)


def test_openrlhfs_convention() -> None:
    r, v, mask = torch.randn(4, 50), torch.randn(4, 50), (torch.rand(4, 50) > 0.3).float()
    last, following, want = torch.zeros(4), torch.zeros(4), []
    for t in reversed(range(50)):
        masked = v[:, t] * mask[:, t]
        last = r[:, t] * mask[:, t] + 0.98 * following - masked + 0.98 * 0.9 * last
        following = masked
        want.append(last)
    got, returns = fr.gae(r, v, mask, gamma=0.98, lam=0.9, at_masked="decay", masked_rewards="drop")
    torch.testing.assert_close(got, torch.stack(want[::-1], 1), atol=5e-6, rtol=0)
    torch.testing.assert_close(returns, got + v * mask)


# ---------------------------------------------------------------------------------------------------- out, and compiled
@pytest.mark.usefixtures("_backend")
def test_out() -> None:
    r, v, mask = torch.randn(4, 30), torch.randn(4, 30), torch.rand(4, 30) > 0.2
    first, second = torch.empty(4, 30), torch.empty(4, 30)
    assert fr.discounted_returns(r, mask, out=first) is first
    assert torch.equal(first, fr.discounted_returns(r, mask))
    got = fr.gae(r, v, mask, out=(first, second))
    assert got[0] is first
    assert got[1] is second
    assert all(map(torch.equal, got, fr.gae(r, v, mask)))


def test_large_results_are_written_past_the_caches() -> None:
    """Rows that begin, end and have holes inside of a line of memory: as each row alone, which stays in the caches."""
    r, v, mask = torch.randn(3, 5_999_999), torch.randn(3, 5_999_999), torch.ones(3, 5_999_999, dtype=torch.bool)
    mask[:2, -100:] = mask[1, 5000:6001] = mask[2, :77] = False
    got = fr.gae(r, v, mask, gamma=0.5, lam=0.9)
    for b in range(3):
        alone = fr.gae(r[b : b + 1], v[b : b + 1], mask[b : b + 1], gamma=0.5, lam=0.9)
        assert all(torch.equal(x[b], y[0]) for x, y in zip(got, alone, strict=True))
    packed = fr.discounted_returns(r.view(-1), gamma=0.5, cu_seqlens=torch.tensor([0, 3, 1_000_001, 17_999_997]))
    for b, (begin, end) in enumerate([(0, 3), (3, 1_000_001), (1_000_001, 17_999_997)]):
        assert torch.equal(packed[begin:end], fr.discounted_returns(r.view(1, -1)[:, begin:end], gamma=0.5)[0]), b


def test_out_compiles_in_one_graph() -> None:
    r, mask, out = torch.randn(4, 30), torch.rand(4, 30) > 0.2, torch.empty(4, 30)
    compiled = torch.compile(lambda r, out: fr.discounted_returns(r, mask, out=out), fullgraph=True, backend="eager")
    want = fr.discounted_returns(r, mask)
    assert torch.equal(compiled(r, out), want)
    assert torch.equal(out, want)


def test_opcheck() -> None:
    r, v, mask = torch.randn(2, 9), torch.randn(2, 9), torch.rand(2, 9) > 0.3
    gae = (r, v, *[None] * 7, mask, None, [0.9, 0.8, 1.0, 1.0, 1.0], None, ReturnsOptions("gae").text(), False)
    plain = (r, *[None] * 8, mask, None, [0.9, 0.8, 1.0, 1.0, 1.0], None, ReturnsOptions().text(), False)
    torch.library.opcheck(torch.ops.fastreward.returns, (*gae, "cpu"))
    torch.library.opcheck(torch.ops.fastreward.returns_, (*gae, torch.empty(2, 9), torch.empty(2, 9), "cpu"))
    torch.library.opcheck(torch.ops.fastreward.returns_, (*plain, torch.empty(2, 9), None, "cpu"))


# ----------------------------------------------------------------------------------------------------------- bad input
@pytest.mark.usefixtures("_backend")
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("name", ["rewards", "values", "next_values"])
def test_values_that_are_not_finite(name: str, value: float) -> None:
    arguments = {k: torch.randn(3, 5) for k in ("rewards", "values", "next_values")}
    arguments[name][1, 2] = value
    message = rf"{name}: expected finite values where mask is set, got {value} at index \[1, 2\]"
    with pytest.raises(ValueError, match=message):
        fr.gae(**arguments)
    mask = torch.ones(3, 5)
    mask[1, 2] = 0
    assert all(x.isfinite().all() for x in fr.gae(**arguments, mask=mask))


@pytest.mark.parametrize(
    ("error", "message", "arguments"),
    [
        (ValueError, r"values: expected shape \[2, 4\] \(as rewards\), got \[2, 3\]", {"values": torch.zeros(2, 3)}),
        (ValueError, r"gamma: expected a number, \[2\] .* or \[2, 4\]", {"gamma": torch.zeros(3)}),
        (ValueError, r"gamma: expected finite values where mask is set, got nan at index \[1\]",
         {"gamma": tensor([0.0, torch.nan])}),
        (ValueError, r"lam: expected a finite number", {"lam": math.inf}),
        (ValueError, r"next_values: expected shape \[2\]", {"next_values": torch.zeros(3)}),
        (ValueError, r"next_values: expected finite numbers", {"next_values": tensor([0.0, torch.nan])}),
        (ValueError, r"at_masked: expected one of 'carry', .*did you mean 'carry'", {"at_masked": "cary"}),
        (ValueError, r"masked_rewards: expected one of", {"masked_rewards": "move"}),
        (ValueError, r"terminated: expected shape", {"terminated": torch.zeros(2)}),
        (ValueError, r"rewards: expected \[B, T\], or \[N\] with cu_seqlens", {"rewards": torch.zeros(4)}),
        (ValueError, r"cu_seqlens: expected \[B \+ 1\] bounds over packed rewards", {"cu_seqlens": tensor([0, 2])}),
        (TypeError, r"whiten: expected True or False", {"whiten": "no"}),
        (TypeError, r"out: expected a pair \(advantages, returns\)", {"out": torch.zeros(2, 4)}),
        (ValueError, r"out\[1\]: expected shape", {"out": (torch.zeros(2, 4), torch.zeros(2, 3))}),
        (ValueError, r"out\[0\]: expected memory of its own", {"values": BUFFER[:1].view(2, 4),
                                                                "out": (BUFFER[:1].view(2, 4), torch.zeros(2, 4))}),
        (TypeError, r"out\[0\]: expected a torch tensor", {"out": (None, torch.zeros(2, 4))}),
        (ValueError, r"out\[1\]: expected a tensor without requires_grad",
         {"out": (torch.zeros(2, 4), torch.zeros(2, 4, requires_grad=True))}),
    ],
)  # fmt: skip
def test_messages(error: type[Exception], message: str, arguments: dict[str, Any]) -> None:
    with pytest.raises(error, match=message):
        fr.gae(**{"rewards": torch.zeros(2, 4), "values": torch.zeros(2, 4), **arguments})


def test_messages_of_other_functions() -> None:
    x = torch.zeros(2, 4)
    with pytest.raises(ValueError, match='temperature: expected None for op="sum"'):
        fr.discounted_returns(x, temperature=1.0)
    with pytest.raises(ValueError, match="temperature: expected a positive number"):
        fr.discounted_returns(x, op="min", temperature=0.0)
    with pytest.raises(ValueError, match="log_ratios: expected numbers where mask is set, got nan"):
        fr.vtrace(x + torch.nan, x, x)
    assert fr.vtrace(x + torch.inf, x, x)[0].isfinite().all()
    with pytest.raises(ValueError, match="rho_bar: expected a positive number"):
        fr.vtrace(x, x, x, rho_bar=-1.0)
    with pytest.raises(ValueError, match=r"out: expected memory of its own"):
        fr.discounted_returns(x, out=x)
    bounds = tensor([0, 4, 6])
    with pytest.raises(ValueError, match=r"out: expected memory of its own"):
        fr.discounted_returns(torch.ones(6), cu_seqlens=bounds, out=bounds.view(torch.float32))


def test_the_reference_is_float64() -> None:
    given = returns_checks.call((2, 9), ReturnsOptions("gae"), packed=False, form=0)
    assert all(x.dtype == torch.float64 for x in reference.truth(given.inputs, given.tokens, [1.0] * 5, given.options))

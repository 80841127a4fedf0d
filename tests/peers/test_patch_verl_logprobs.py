"""verl's log-probs, entropies and fused LM heads, patched, beside verl's own: values, gradients, dtypes, compiled."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

import fastreward
from fastreward.patch.bindings import Report
from fastreward.patch.verl import linear, logprobs

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]

pytest.importorskip("verl", reason="verl is not installed (`make test` installs it)", exc_type=ImportError)
functional = importlib.import_module("verl.utils.torch_functional")
heads = importlib.import_module("verl.utils.experimental.torch_functional")
triton_head = importlib.import_module("verl.utils.kernel.linear_cross_entropy")
core = importlib.import_module("verl.trainer.ppo.core_algos")

LABELLED = ("logprobs_from_logits", "logprobs_from_logits_v2", "logprobs_from_logits_naive")
OTHERS = ("entropy_from_logits", "entropy_from_logits_with_chunking", "calculate_sum_pi_squared_from_logits")
STOCK: dict[str, Callable[..., Any]] = {name: getattr(functional, name) for name in (*LABELLED, *OTHERS)}
VOCABULARY = 97
LOOSE: dict[str, Any] = {"rtol": 1e-5, "atol": 5e-6, "check_dtype": False}


HEAD = f"{heads.__name__}.FusedLinearForPPOFunction.apply"


@pytest.fixture
def report() -> Iterator[Report]:
    """The patch in place, and its account."""
    yield fastreward.patch.verl()
    fastreward.patch.undo("verl")


@pytest.fixture
def ours(report: Report) -> dict[str, Callable[..., Any]]:
    found = {name: getattr(functional, name) for name in STOCK}
    assert all(found[name] is not STOCK[name] for name in STOCK)
    return found


def called(report: Report, target: str) -> tuple[int, int]:
    """Calls that were served, and that were handed on."""
    usage = report.usage[target]
    return usage.calls, usage.handed_on


def logits_of(*lead: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return (4 * torch.randn(*lead, VOCABULARY, generator=g)).to(dtype)


def labels_of(*lead: int) -> Tensor:
    return torch.randint(VOCABULARY, lead, generator=torch.Generator().manual_seed(1))


def run(function: Callable[..., Any], logits: Tensor, *arguments: Any, **named: Any) -> tuple[Tensor, Tensor]:
    """(the result, the gradient for the logits under uneven upstream gradients)."""
    leaf = logits.detach().clone().requires_grad_()
    result = function(leaf, *arguments, **named)
    upstream = torch.linspace(-1.5, 2.0, result.numel()).reshape(result.shape).to(result.dtype)
    return result.detach(), torch.autograd.grad(result, leaf, upstream)[0]


def call(name: str, function: Callable[..., Any], logits: Tensor) -> tuple[Tensor, Tensor]:
    return run(function, logits, *([labels_of(*logits.shape[:-1])] if name in LABELLED else []))


def exactly(name: str, logits: Tensor) -> tuple[Tensor, Tensor]:
    """verl's own in float64; its chunked entropy computes in float32, whatever it is given."""
    same = name.removesuffix("_with_chunking")
    return call(same, STOCK[same], logits.double())


@pytest.mark.parametrize("lead", [(11,), (1,), (3, 5)])
@pytest.mark.parametrize("name", STOCK)
def test_values_and_gradients(name: str, lead: tuple[int, ...], ours: Any, report: Report) -> None:
    if name.endswith("chunking") and len(lead) > 1:
        pytest.skip("verl's takes packed logits alone")
    logits = logits_of(*lead)
    found, expected = (call(name, f, logits) for f in (ours[name], STOCK[name]))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=5e-6)
    truth = exactly(name, logits)
    torch.testing.assert_close(tuple(x.double() for x in found), truth, rtol=1e-6, atol=1e-6)
    assert called(report, f"{logprobs.TORCH}.{name}") == (1, 0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", STOCK)
def test_half_precision_has_verls_dtype_and_no_larger_an_error(name: str, dtype: torch.dtype, ours: Any) -> None:
    logits = logits_of(13, dtype=dtype)
    truth = exactly(name, logits)
    found, theirs = (call(name, f, logits) for f in (ours[name], STOCK[name]))
    for x, y, exact in zip(found, theirs, truth, strict=True):
        assert x.dtype == y.dtype
        off, limit = ((z.double() - exact).abs().max() for z in (x, y))
        assert off <= limit + 1e-6


@pytest.mark.parametrize("name", STOCK)
def test_logits_of_minus_infinity(name: str, ours: Any) -> None:
    logits = logits_of(6)
    gone = torch.rand(6, VOCABULARY, generator=torch.Generator().manual_seed(3)) < 0.4
    gone[torch.arange(6), labels_of(6)] = False
    found = call(name, ours[name], logits.masked_fill(gone, -math.inf))
    # What is never sampled is as if it were not there; verl's entropy and its gradient are NaN.
    truth = exactly(name, logits.masked_fill(gone, -1e4))
    torch.testing.assert_close(tuple(x.double() for x in found), truth, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", STOCK)
def test_views_are_read_where_they_are(name: str, ours: Any) -> None:
    if name.endswith("chunking"):
        pytest.skip("verl's takes packed logits alone")

    def inside(function: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *given: function(*(x[:, 2:-1] for x in given))

    found, expected = (call(name, inside(f), logits_of(3, 7)) for f in (ours[name], STOCK[name]))
    assert found[0].shape == (3, 4)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=5e-6)


@pytest.mark.parametrize("inplace_backward", [True, False])
def test_the_logits_stay_what_they_are(inplace_backward: bool, ours: Any) -> None:
    # Another loss of the same logits, such as an entropy bonus, still needs them in its backward.
    logits, leaf = logits_of(9), logits_of(9).requires_grad_()
    scores = ours["logprobs_from_logits"](logits=leaf, labels=labels_of(9), inplace_backward=inplace_backward)
    entropy = ours["entropy_from_logits"](leaf)
    scores.sum().backward(retain_graph=True)
    assert torch.equal(leaf.detach(), logits)
    alone = leaf.grad.clone()  # type: ignore[union-attr]
    entropy.sum().backward()
    (expected,) = torch.autograd.grad(ours["entropy_from_logits"](leaf).sum(), leaf)
    torch.testing.assert_close(leaf.grad, alone + expected)


def test_an_empty_batch(ours: Any) -> None:
    assert ours["logprobs_from_logits"](logits_of(0), labels_of(0)).shape == (0,)
    assert ours["entropy_from_logits"](logits_of(0)).shape == (0,)


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("logprobs_from_logits", (logits_of(5).double(), labels_of(5))),
        ("logprobs_from_logits_v2", (logits_of(5).t().contiguous().t(), labels_of(5))),
        ("entropy_from_logits", (logits_of(),)),
        ("calculate_sum_pi_squared_from_logits", (logits_of(5).double(),)),
    ],
)
def test_what_ours_does_not_take_is_verls(name: str, arguments: Any, ours: Any, report: Report) -> None:
    assert torch.equal(ours[name](*arguments), STOCK[name](*arguments))
    assert called(report, f"{logprobs.TORCH}.{name}") == (0, 1)


def test_a_label_that_there_is_not_is_verls_to_refuse(ours: Any, report: Report) -> None:
    with pytest.raises(RuntimeError, match="out of bounds"):
        ours["logprobs_from_logits"](logits_of(2), torch.tensor([0, VOCABULARY]))
    assert called(report, f"{logprobs.TORCH}.logprobs_from_logits")[0] == 0


# ------------------------------------------------------------------------------------------------------ what calls them
def test_the_functions_over_whole_sequences_are_served(ours: Any, report: Report) -> None:
    ids, logits, length = labels_of(2, 9), logits_of(2, 9), 4
    found = functional.log_probs_from_logits_response(ids, logits, length)
    expected = STOCK["logprobs_from_logits"](logits[:, -length - 1 : -1], ids[:, -length:])
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=5e-6)
    assert called(report, f"{logprobs.TORCH}.logprobs_from_logits") == (1, 0)


@pytest.mark.parametrize("mode", ["token-mean", "seq-mean-token-mean"])
def test_verls_entropy_loss_is_made_of_ours(mode: str, report: Report) -> None:
    mask = torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0], [0, 0, 0, 0]], dtype=torch.bool)
    logits = logits_of(3, 4)
    found = run(core.compute_entropy_loss, logits, mask, mode)
    assert called(report, f"{logprobs.TORCH}.entropy_from_logits") == (1, 0)
    assert called(report, f"{core.__name__}.agg_loss") == (1, 0)
    fastreward.patch.undo("verl")
    expected = run(core.compute_entropy_loss, logits, mask, mode)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("name", OTHERS)
def test_compiled_with_dynamic_shapes(name: str, ours: Any) -> None:
    """verl's engines compile the entropy when they are made: once, for packed batches of any length."""
    torch._dynamo.reset()
    counter, compilations = CompileCounterWithBackend("aot_eager"), []
    compiled = torch.compile(ours[name], dynamic=True, backend=counter, fullgraph=True)
    for rows in (5, 8, 13, 21):
        logits = logits_of(rows, seed=rows)
        truth = exactly(name, logits)
        torch.testing.assert_close(call(name, compiled, logits), truth, **LOOSE)
        with torch.no_grad():
            torch.testing.assert_close(compiled(logits), truth[0], **LOOSE)
        compilations.append(counter.frame_count)
    assert compilations == compilations[:1] * 4  # the first length has compiled for all of them


def test_half_precision_is_compiled_too(ours: Any) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(ours["entropy_from_logits"], dynamic=True, backend="aot_eager")
    logits = logits_of(6, dtype=torch.bfloat16)
    values, gradient = run(compiled, logits)
    expected, eager = run(ours["entropy_from_logits"], logits)
    assert torch.equal(values, expected)
    assert torch.equal(gradient, eager)


# --------------------------------------------------------------------------------------------- an engine of verl's own
def engine_outputs(engine: Any, logits: Tensor, *, entropy: bool, chunked: bool) -> dict[str, Tensor]:
    """What verl's FSDP engine makes of the logits [13, V] of a packed batch; only itself is a stand-in."""
    tensordicts = importlib.import_module("verl.utils.tensordict_utils")
    tokens = torch.arange(13) % 11
    ids = torch.nested.nested_tensor_from_jagged(tokens, torch.tensor([0, 5, 6, 13]))
    asked = {"use_remove_padding": True, "calculate_entropy": entropy, "calculate_sum_pi_squared": True}
    settings = SimpleNamespace(
        entropy_checkpointing=False,
        entropy_from_logits_with_chunking=chunked,
        entropy_from_logits_chunk_size=4,
    )
    itself = SimpleNamespace(
        engine_config=settings,
        compute_entropy_from_logits=getattr(functional, OTHERS[chunked]),
        _gather_and_unpad_packed=lambda x, pad_size: x,
    )
    arguments = {
        "input_ids_rmpad_rolled": torch.roll(tokens, -1),
        "temperature_rmpad": torch.linspace(0.6, 1.4, 13),
        "pad_size": 0,
    }
    output, batch = SimpleNamespace(logits=logits.unsqueeze(0)), tensordicts.get_tensordict({"input_ids": ids}, asked)
    found = engine.FSDPEngineWithLMHead.prepare_model_outputs(itself, output, arguments, batch, None)
    return {name: x.values() for name, x in found.items()}


@pytest.mark.parametrize("entropy", [False, True])
@pytest.mark.parametrize("chunked", [False, True])
def test_the_fsdp_engine_is_served(entropy: bool, chunked: bool) -> None:
    engine = importlib.import_module("verl.workers.engine.fsdp.transformer_impl")
    results = []
    for patched in (False, True):
        report = fastreward.patch.verl() if patched else None
        leaf = logits_of(13).requires_grad_()
        found = engine_outputs(engine, leaf, entropy=entropy, chunked=chunked)
        total = found["log_probs"].square().sum() + (0.3 * found["entropy"].sum() if entropy else 0.0)
        results.append((found, torch.autograd.grad(total, leaf)[0]))
    fastreward.patch.undo("verl")
    torch.testing.assert_close(results[1], results[0], rtol=1e-5, atol=5e-6)
    assert report is not None
    for name in ("logprobs_from_logits", "calculate_sum_pi_squared_from_logits", OTHERS[chunked]):
        assert called(report, f"{logprobs.TORCH}.{name}") == (int(entropy or name not in OTHERS[:2]), 0)


# ------------------------------------------------------------------------------------------------------- fused LM heads
def head(*lead: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(5)
    hidden, weight = torch.randn(*lead, 24, generator=g), torch.randn(VOCABULARY, 24, generator=g)
    return hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_(), labels_of(*lead)


def scored(function: Callable[..., Any], hidden: Tensor, weight: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    """(log-probs, entropies, gradients for hidden and weight of both together)."""
    scores, entropy = function(hidden, weight, *rest)
    total = (scores.flatten().double() * torch.linspace(-1, 2, scores.numel())).sum()
    total = total + (entropy.flatten().double() * torch.linspace(1, -0.5, entropy.numel())).sum()
    return scores.detach(), entropy.detach(), *torch.autograd.grad(total, (hidden, weight))


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("lead", [(9,), (2, 5)])
def test_the_torch_head(lead: tuple[int, ...], temperature: float, report: Report) -> None:
    layer, given = heads.FusedLinearForPPO(chunk_size=4), head(*lead)
    found = scored(layer, *given, temperature)
    assert called(report, HEAD) == (1, 0)
    fastreward.patch.undo("verl")
    expected = scored(layer, *given, temperature)
    for x, y in zip(found, expected, strict=True):
        assert x.dtype == y.dtype
        assert x.shape == y.shape
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-5)


def test_the_torch_head_in_half_precision(report: Report) -> None:
    given, layer = head(9, dtype=torch.bfloat16), heads.FusedLinearForPPO()
    found = scored(layer, *given, 0.8)
    fastreward.patch.undo("verl")
    theirs = scored(layer, *given, 0.8)
    wide = [x.detach().float().requires_grad_() for x in given[:2]]
    truth = scored(layer, *wide, given[2], 0.8)
    for x, y, exact in zip(found, theirs, truth, strict=True):
        assert x.dtype == y.dtype
        assert (x - exact).abs().max() <= (y - exact).abs().max() + 1e-6


def test_verls_triton_head_on_the_cpu(report: Report) -> None:
    hidden, weight, ids = head(2, 5)
    found = scored(triton_head.linear_cross_entropy, hidden, weight, ids, 0.7, "none")
    logits = hidden.double() @ weight.double().t() / 0.7
    both = lambda *_: (  # noqa: E731
        STOCK["logprobs_from_logits"](logits, ids).flatten(),
        STOCK["entropy_from_logits"](logits).flatten(),
    )
    expected = scored(both, hidden, weight)
    assert found[0].dtype == found[1].dtype == torch.float32
    for x, y in zip(found, expected, strict=True):
        torch.testing.assert_close(x.double(), y.double(), rtol=1e-5, atol=1e-5)


def test_heads_that_ours_does_not_take_are_verls(report: Report) -> None:
    hidden, weight, ids = (x.detach() for x in head(6))
    warm = torch.linspace(0.5, 2.0, 6).unsqueeze(-1)
    scores, _ = heads.FusedLinearForPPO()(hidden, weight, ids, warm)
    expected = STOCK["logprobs_from_logits"](hidden @ weight.t() / warm, ids)
    torch.testing.assert_close(scores, expected, rtol=1e-5, atol=1e-5)
    assert called(report, HEAD) == (0, 1)
    with pytest.raises(Exception, match=r"NVTX|CUDA"):
        triton_head.linear_cross_entropy(hidden, weight, ids, 1.0, "none", "a group of processes")
    assert called(report, f"{triton_head.__name__}.linear_cross_entropy")[0] == 0


def test_the_report_says_what_is_left(report: Report) -> None:
    kept = {entry.target for entry in report.kept}
    assert {entry.target for entry in (*logprobs.KEPT, *linear.KEPT)} <= kept

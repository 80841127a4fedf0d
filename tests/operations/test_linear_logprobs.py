"""linear_token_logprobs: equal to token_logprobs on the full logits, in values and gradients, tile by tile."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from criterion import assert_as_good_as_torch
from torch import Tensor

import fastreward as fr
from fastreward import linear_logprobs
from fastreward._runtime import lm_head
from fastreward.reference.logprobs import token_logprobs as truth_of

OUTPUTS = ("logprobs", "entropy", "logsumexp", "label_logit", "mean_logit", "log_sum_sq_probs", "max_logprob")
N, H, V = 13, 24, 301


def problem(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    hidden = torch.randn(N, H).to(dtype).requires_grad_()
    weight = (torch.randn(V, H) * 0.5).to(dtype).requires_grad_()
    bias = torch.randn(V).to(dtype).requires_grad_()
    return hidden, weight, bias, torch.randint(0, V, (N,))


def head(hidden: Tensor, weight: Tensor, bias: Tensor | None, scale: float, softcap: float | None) -> Tensor:
    return head_of(hidden @ weight.t(), bias, scale, softcap)


def head_of(logits: Tensor, bias: Tensor | None, scale: float, softcap: float | None) -> Tensor:
    logits = (logits if bias is None else logits + bias) * scale
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("chunk_size", [None, 64, 301, 1000])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"softcap": 5.0},
        {"logit_scale": 0.3, "softcap": 8.0, "bias": True},
        {"temperature": torch.linspace(0.5, 2, N), "bias": True, "logit_scale": -0.7},
        {"mask": torch.arange(N) % 3 != 0, "temperature": 0.6},
    ],
    ids=["plain", "softcap", "all", "temperature", "mask"],
)
def test_equals_float64_truth(backend: str, chunk_size: int | None, options: dict[str, Any]) -> None:
    hidden, weight, bias, labels = problem()
    options = dict(options)
    used_bias = bias if options.pop("bias", False) else None
    scale, softcap = options.pop("logit_scale", 1.0), options.pop("softcap", None)
    with fr.backend(backend):
        stats = fr.linear_token_logprobs(
            hidden,
            weight,
            labels,
            bias=used_bias,
            logit_scale=scale,
            softcap=softcap,
            outputs=(*OUTPUTS, "argmax", "rank"),
            chunk_size=chunk_size,
            **options,
        )
    leaves = [x for x in (hidden, weight, used_bias) if x is not None]
    exact = [x.detach().double().requires_grad_() for x in leaves]
    truth = truth_of(
        head(exact[0], exact[1], exact[2] if used_bias is not None else None, scale, softcap), labels, **options
    )
    same = fr.token_logprobs(
        head(*(leaves if used_bias is not None else [*leaves, None]), scale, softcap),
        labels,
        outputs=OUTPUTS,
        **options,
    )
    for name in OUTPUTS:
        assert_as_good_as_torch(getattr(stats, name), truth[name], getattr(same, name), name, slack=2e-6)
    assert torch.equal(stats.argmax, truth["argmax"])
    assert torch.equal(stats.rank, truth["rank"])
    upstream = {name: torch.randn(N) for name in ("logprobs", "entropy", "logsumexp", "log_sum_sq_probs")}
    loss = sum((getattr(stats, n) * g).sum() for n, g in upstream.items())
    grads = torch.autograd.grad(loss, leaves)
    loss = sum((truth[n] * g).sum() for n, g in upstream.items())
    truths = torch.autograd.grad(loss, exact)
    loss = sum((getattr(same, n) * g).sum() for n, g in upstream.items())
    sames = torch.autograd.grad(loss, leaves)
    for name, grad, exact_grad, same_grad in zip(("hidden", "weight", "bias"), grads, truths, sames, strict=False):
        assert_as_good_as_torch(grad, exact_grad, same_grad, f"gradient of {name}", slack=3e-6)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_more_of_everything_than_a_tile(dtype: torch.dtype, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles of 16 rows and 64 columns, sums of 8 products: gradients are added up over all of them."""
    monkeypatch.setattr(linear_logprobs, "_CPU_TILE", (16, 64))
    monkeypatch.setattr(lm_head, "_CPU_SUM", 8)
    rows = 45
    hidden = torch.randn(rows, H).to(dtype).requires_grad_()
    weight = (torch.randn(V, H) * 0.5).to(dtype).requires_grad_()
    bias = torch.randn(V).to(dtype).requires_grad_()
    leaves, labels, g = (hidden, weight, bias), torch.randint(0, V, (rows,)), torch.randn(rows)
    options = {"mask": torch.arange(rows) % 5 != 1, "temperature": torch.linspace(0.5, 2, rows)}
    with fr.backend(backend):
        stats = fr.linear_token_logprobs(hidden, weight, labels, bias=bias, outputs=("logprobs", "entropy"), **options)
        grads = torch.autograd.grad((stats.logprobs * g + stats.entropy * g.flip(0)).sum(), leaves)
    exact = [x.detach().double().requires_grad_() for x in leaves]
    truth = truth_of(exact[0] @ exact[1].t() + exact[2], labels, **options)
    wanted = torch.autograd.grad((truth["logprobs"] * g + truth["entropy"] * g.flip(0)).sum(), exact)
    share = 2e-6 if dtype == torch.float32 else 0.03  # of the largest: the GEMMs round the logits to bfloat16
    for found, right in zip(grads, wanted, strict=True):
        torch.testing.assert_close(found.double(), right, rtol=share, atol=share * float(right.abs().max()))


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_log_probs_of_other_ids(dtype: torch.dtype, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ids in every tile, under a mask and a softcap, whose gradient joins that of the label and the entropy."""
    monkeypatch.setattr(linear_logprobs, "_CPU_TILE", (16, 64))
    rows = 45
    hidden = torch.randn(rows, H).to(dtype).requires_grad_()
    weight = (torch.randn(V, H) * 0.5).to(dtype).requires_grad_()
    leaves, labels, ids = (hidden, weight), torch.randint(0, V, (rows,)), torch.rand(rows, V).topk(30).indices
    options = {"mask": torch.arange(rows) % 5 != 1, "temperature": torch.linspace(0.5, 2, rows)}
    ids[1], g = 10**9, torch.randn(rows, 30)
    with fr.backend(backend):
        outputs = ("entropy", "id_logprobs")
        stats = fr.linear_token_logprobs(*leaves, labels, softcap=9.0, outputs=outputs, token_ids=ids, **options)
        grads = torch.autograd.grad((stats.id_logprobs * g).sum() + stats.entropy.sum(), leaves)
    exact = [x.detach().double().requires_grad_() for x in leaves]
    truth = truth_of(head(*exact, None, 1.0, 9.0), labels, token_ids=ids.clamp(max=V - 1), **options)
    wanted = torch.autograd.grad((truth["id_logprobs"] * g).sum() + truth["entropy"].sum(), exact)
    share = 2e-6 if dtype == torch.float32 else 0.03
    for found, right in zip((stats.id_logprobs, *grads), (truth["id_logprobs"].detach(), *wanted), strict=True):
        torch.testing.assert_close(found.double(), right, rtol=share, atol=share * float(right.abs().max()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_of_no_token_are_0(dtype: torch.dtype) -> None:
    hidden, weight, bias, labels = problem(dtype)
    stats = fr.linear_token_logprobs(hidden, weight, labels, bias=bias, mask=torch.zeros(N))
    torch.empty(V, H).fill_(torch.nan)  # what fresh memory may hold
    for grad in torch.autograd.grad(stats.logprobs.sum(), (hidden, weight, bias)):
        assert not grad.any()


def test_bfloat16_accumulates_in_float32() -> None:
    """As good as the full bf16 logits: rounding each tile's product to bf16 would lose digits with every tile."""
    hidden, weight, _, labels = problem(torch.bfloat16)
    full = fr.token_logprobs(hidden @ weight.t(), labels, outputs=("logprobs", "entropy"))
    tiled = fr.linear_token_logprobs(hidden, weight, labels, outputs=("logprobs", "entropy"), chunk_size=16)
    exact = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    truth = truth_of(exact[0] @ exact[1].t(), labels)
    g = torch.randn(N)
    grads = [
        torch.autograd.grad((s.logprobs * g + s.entropy * g.flip(0)).sum(), (hidden, weight)) for s in (full, tiled)
    ]
    truths = torch.autograd.grad((truth["logprobs"] * g + truth["entropy"] * g.flip(0)).sum(), exact)
    for name, own, same, right in zip(("hidden", "weight"), grads[1], grads[0], truths, strict=True):
        assert own.dtype == torch.bfloat16
        assert_as_good_as_torch(own, right, same, name, slack=2**-9)
    assert_as_good_as_torch(tiled.logprobs, truth["logprobs"], full.logprobs, slack=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.usefixtures("threads")
def test_bits(dtype: torch.dtype) -> None:
    """Batch, place, padding and threads change no bit of a token, nor of its gradient, where the GEMM keeps to that."""
    width, vocab, rows = 896, 20_000, 200
    hidden, weight = torch.randn(rows, width).to(dtype), (torch.randn(vocab, width) * 0.05).to(dtype)
    labels, g = torch.randint(0, vocab, (rows,)), torch.randn(rows)
    _skip_where_the_gemm_has_moods(hidden, weight)

    def bits(pick: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        x = hidden[pick].requires_grad_()
        stats = fr.linear_token_logprobs(x, weight, labels[pick], mask=mask, outputs=("logprobs", "entropy"))
        (stats.logprobs * g[pick] + stats.entropy).sum().backward()
        return torch.stack([s.detach() for s in stats]), x.grad

    values, grads = bits(torch.arange(rows))
    for pick in (torch.arange(1), torch.arange(7), torch.arange(3, 68), torch.randperm(rows)):
        for count in (1, 2):
            torch.set_num_threads(count)
            part, part_grads = bits(pick)
            assert torch.equal(part, values[:, pick])
            assert torch.equal(part_grads, grads[pick])
    mask = torch.rand(rows) < 0.3
    masked, masked_grads = bits(torch.arange(rows), mask)
    assert torch.equal(masked[:, mask], values[:, mask])
    assert torch.equal(masked_grads[mask], grads[mask])


def _skip_where_the_gemm_has_moods(hidden: Tensor, weight: Tensor) -> None:
    """The GEMMs are the vendor's: bits can be promised only where its own are steady for the shapes it is asked for."""
    h, w = hidden[:, :512], weight[:, :512]
    products = [(h, w.t()), (h.float(), w.t().float()), (torch.randn(len(h), 512), weight[:512].float())]
    for a, b in products:
        torch.set_num_threads(2)
        whole = a @ b
        for threads, rows in itertools.product((1, 2), (16, 65, 100)):
            torch.set_num_threads(threads)
            if not torch.equal(a[3 : 3 + rows] @ b, whole[3 : 3 + rows]):
                pytest.skip(f"torch.mm on this CPU ({a.dtype}) gives a row other bits in other batches")


@pytest.mark.parametrize("options", [{"softcap": 30.0}, {"logit_scale": 0.13}, {"bias": True}], ids=str)
def test_low_precision_is_rounded_once(options: dict[str, Any]) -> None:
    """After a bf16 GEMM, scale and cap in float32, as TRL has it: in bf16 the error would be twice as large."""
    hidden, weight = (torch.randn(64, 64) * 1.5).bfloat16(), torch.randn(2000, 64).bfloat16()
    labels, options = torch.randint(0, 2000, (64,)), dict(options)
    bias = torch.randn(2000).bfloat16() if options.pop("bias", False) else None
    scale, cap = options.get("logit_scale", 1.0), options.get("softcap")
    wide = (hidden @ weight.t()).float()
    expected = truth_of(head_of(wide, bias, scale, cap), labels)["logprobs"]
    got = fr.linear_token_logprobs(hidden, weight, labels, bias=bias, **options).logprobs
    assert_as_good_as_torch(got, expected, expected, slack=2e-6)


def test_outputs_may_be_edited_before_the_backward() -> None:
    hidden, weight, _, labels = problem()
    logprobs = fr.linear_token_logprobs(hidden, weight, labels).logprobs
    logprobs.masked_fill_(torch.arange(N) > 3, 0.0)
    logprobs.sum().backward()
    assert hidden.grad[:4].any()
    assert not hidden.grad[4:].any()


def test_second_derivatives_are_refused() -> None:
    hidden, weight, _, labels = problem()
    out = fr.linear_token_logprobs(hidden, weight, labels).logprobs.sum()
    with pytest.raises(NotImplementedError, match="double backward"):
        torch.autograd.grad(torch.autograd.grad(out, hidden, create_graph=True)[0].sum(), hidden)


@pytest.mark.parametrize("masked", [False, True])
def test_compiles_in_one_graph(masked: bool) -> None:
    """A mask's count depends on its values: Dynamo has to be told that such sizes are fine."""
    from torch._dynamo import config

    hidden, weight, bias, labels = problem()
    mask = torch.arange(N) % 3 != 0 if masked else None

    def step(x: Tensor) -> Tensor:
        stats = fr.linear_token_logprobs(x * 1.5, weight, labels, bias=bias, mask=mask, outputs=("logprobs", "entropy"))
        return (stats.logprobs - 0.1 * stats.entropy).sum()

    (eager,) = torch.autograd.grad(step(hidden), hidden)
    with config.patch(capture_dynamic_output_shape_ops=masked):
        (compiled,) = torch.autograd.grad(torch.compile(step, fullgraph=True, backend="aot_eager")(hidden), hidden)
    assert torch.allclose(eager, compiled, atol=1e-6)


def test_masked_rows_cost_nothing_and_give_nothing() -> None:
    hidden, weight, _, labels = problem()
    mask = torch.arange(N) < 4
    poisoned = hidden.detach().clone()
    poisoned[4:] = torch.nan
    poisoned.requires_grad_()
    stats = fr.linear_token_logprobs(
        poisoned, weight, labels.masked_fill(~mask, -100), mask=mask, outputs=("logprobs", "entropy")
    )
    assert not stats.logprobs[4:].any()
    (stats.logprobs + stats.entropy).sum().backward()
    assert torch.isfinite(weight.grad).all()
    assert not poisoned.grad[4:].any()
    nothing = fr.linear_token_logprobs(hidden, weight, labels, mask=torch.zeros(N)).logprobs
    assert not nothing.any()
    nothing.sum().backward()
    assert not hidden.grad.any()


def test_only_the_needed_gradients() -> None:
    hidden, weight, _, labels = problem()
    fr.linear_token_logprobs(hidden.detach(), weight, labels).logprobs.sum().backward()
    fr.linear_token_logprobs(hidden, weight.detach(), labels).logprobs.sum().backward()
    assert hidden.grad is not None
    assert weight.grad is not None


@pytest.mark.parametrize("options", [{}, {"softcap": 5.0}], ids=["plain", "softcap"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_never_more_than_one_tile_of_logits(dtype: torch.dtype, options: dict[str, Any]) -> None:
    """Every tensor that torch allocates during forward and backward, seen from below the custom ops by its profiler."""
    rows, vocab = 256, 20_000
    hidden = torch.randn(rows, 8).to(dtype).requires_grad_()
    weight, labels = torch.randn(vocab, 8).to(dtype), torch.randint(0, vocab, (rows,))
    with torch.profiler.profile(profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        fr.linear_token_logprobs(hidden, weight, labels, chunk_size=512, **options).logprobs.sum().backward()
    sizes = [event.nbytes() for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    tile = rows * 512
    assert max(sizes) >= tile * dtype.itemsize, "the tile itself was not seen"
    assert max(sizes) <= tile * 4
    # One tile each in forward and backward; in a low precision with its float32 copy, which a plain forward needs not.
    tiles = 2 if dtype == torch.float32 else 4 if options else 3
    assert sum(size >= tile * dtype.itemsize for size in sizes) == tiles


def test_no_chunk_is_a_sliver() -> None:
    """A GEMM of a few rows adds in another order than one of many."""
    for total in (1, 16, 1025, 15_361, 40_000):
        sizes = [chunk.stop - chunk.start for chunk in lm_head._chunks(total, 1024)]
        assert sum(sizes) == total
        assert max(sizes) <= 1024
        assert min(sizes) >= min(total, 16)
    assert not list(lm_head._chunks(0, 1024))


def test_autocast_runs_the_gemms_in_its_dtype() -> None:
    hidden, weight, _, labels = problem()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = fr.linear_token_logprobs(hidden, weight, labels).logprobs
    exact = fr.linear_token_logprobs(hidden, weight, labels).logprobs
    assert 0 < (low - exact).abs().max() < 0.2
    low.sum().backward()
    assert hidden.grad.dtype == torch.float32


def test_opcheck() -> None:
    hidden, weight, bias, labels = problem()
    cap = torch.tensor(2.0, dtype=torch.float64)
    ids = torch.rand(N, V).topk(3).indices
    arguments = (hidden, weight, bias, labels, ids, None, 0.7, 1.0, None, 0.0, cap, 3, [8, 100], torch.float32, "cpu")
    torch.library.opcheck(torch.ops.fastreward.linear_token_logprobs, arguments)
    leaves = (hidden.detach(), weight.detach(), bias.detach())
    values, _, found = torch.ops.fastreward.linear_token_logprobs(*leaves, *arguments[3:])
    grads = torch.randn_like(values), torch.randn_like(found)
    backward = (*leaves, *arguments[3:11], [8, 100], torch.float32, values, found, *grads, [True, False, True], "cpu")
    torch.library.opcheck(torch.ops.fastreward.linear_token_logprobs_backward, backward)


@pytest.mark.parametrize(
    ("error", "message", "arguments"),
    [
        (ValueError, r"weight: expected shape \[V, 24\]", {"weight": torch.randn(V, 3)}),
        (TypeError, r"weight: expected hidden's dtype", {"weight": torch.randn(V, H).bfloat16()}),
        (ValueError, r"labels: expected integers in \[0, 301\)", {"labels": torch.full((N,), V)}),
        (ValueError, r"outputs: expected one of", {"outputs": ("logprob",)}),
        (ValueError, r"token_ids: needed for the output 'id_logprobs'", {"outputs": ("id_logprobs",)}),
        (
            ValueError,
            r"token_ids: expected integers in \[0, 301\).* got 301 at index \[1\]",
            {"outputs": ("id_logprobs",), "token_ids": torch.tensor([4, 301])},
        ),
        (ValueError, r"softcap: expected a positive number", {"softcap": -1.0}),
        (ValueError, r"chunk_size: expected a positive number", {"chunk_size": 0}),
        (TypeError, r"chunk_size: expected an integer \(columns of a tile\), got 7\.5", {"chunk_size": 7.5}),
        (TypeError, r"outputs: expected a tuple of names, got 'logprobs'", {"outputs": "logprobs"}),
        (ValueError, r"weight: expected at least one token of vocabulary", {"weight": torch.zeros(0, H)}),
        (TypeError, r"bias: expected dtype float32, bfloat16, float16, got int64", {"bias": torch.zeros(V).long()}),
        (ValueError, r"bias: expected shape \[301\]", {"bias": torch.zeros(3)}),
    ],
)
def test_messages(error: type[Exception], message: str, arguments: dict[str, Any]) -> None:
    hidden, weight, _, labels = problem()
    with pytest.raises(error, match=message):
        fr.linear_token_logprobs(**{"hidden": hidden, "weight": weight, "labels": labels, **arguments})

"""token_divergence on a real GPU: values, gradients and slices against the float64 reference, bits, graphs.

`pytest -m gpu`.
"""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any

import divergence_checks as checks
import public_checks
import pytest
import torch

import fastreward as fr
import fastreward.cuda

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
]


PACKAGES: dict[fr.Backend, str] = {"triton": "fastreward.kernels", "cuda": "fastreward.cuda"}


@pytest.fixture(params=PACKAGES)
def backend(request: pytest.FixtureRequest) -> Any:
    reason = fastreward.cuda.missing(generated=True) if request.param == "cuda" else None
    if reason is not None:
        pytest.skip(f"cuda: {reason}")
    if request.param == "triton":
        pytest.importorskip("triton")
    return request.param


@pytest.fixture
def module(backend: Any) -> ModuleType:
    return importlib.import_module(f"{PACKAGES[backend]}.divergence")


@pytest.mark.parametrize("name", checks.DIVERGENCES)
@pytest.mark.parametrize("kind", checks.KINDS)
def test_rows_of_every_kind(kind: str, name: str, module: ModuleType) -> None:
    for k, vocab in enumerate((1003, 8193, 50_257, 151_936)):
        dtypes = (checks.DTYPES[k % 3], checks.DTYPES[(k + len(name)) % 3])
        case = checks.make_case(name, kind, dtypes, 5, vocab)
        checks.check_forward(module, "cuda", case, statistics=k % 2 == 0, sums=k % 3)
        checks.check_backward(module, "cuda", case, in_place=k % 2 == 1)


@pytest.mark.parametrize("name", ["reverse_kl", "jsd"])
@pytest.mark.parametrize("vocab", [1003, 8193])
def test_small_rows(vocab: int, name: str, module: ModuleType) -> None:
    """What compute-sanitizer looks at: rows that are masked, aligned or not, and slices."""
    case = checks.make_case(name, "masked", (torch.bfloat16, torch.float32), 4, vocab)
    checks.check_forward(module, "cuda", case, statistics=True)
    checks.check_backward(module, "cuda", case)
    checks.check_slices(module, "cuda", case, vocab // 3)


@pytest.mark.parametrize("name", ["reverse_kl", "jsd"])
@pytest.mark.parametrize("dtype", checks.DTYPES)
def test_sizes_slices_and_bits(dtype: torch.dtype, name: str, module: ModuleType) -> None:
    for vocab in (1, 3, 8, 4097):
        case = checks.make_case(name, "plain", (dtype, dtype), 2, vocab)
        checks.check_forward(module, "cuda", case, statistics=True)
        checks.check_backward(module, "cuda", case)
    checks.check_slices(module, "cuda", checks.make_case(name, "masked", (dtype, dtype), 4, 50_000), 17_000)
    checks.check_bits(module, "cuda", checks.make_case(name, "infinities", (dtype, dtype), 300, 50_000))


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("name", public_checks.DIVERGENCES)
def test_public(name: str, inplace: bool, backend: Any) -> None:
    with fr.backend(backend):
        for vocab in (301, 50_257):
            public_checks.check_divergence("cuda", name, inplace, vocab)


@pytest.mark.parametrize("name", ["reverse-kl", "jsd"])
def test_nothing_synchronises_and_graphs_capture(name: str, backend: Any) -> None:
    """A training step under a CUDA graph: the same bits when it is replayed on other logits."""
    with fr.backend(backend):
        check_graphs(name)


def check_graphs(name: str) -> None:
    x, y = (torch.randn(7, 5000, device="cuda") for _ in range(2))
    leaf = x.clone().requires_grad_()

    def step() -> tuple[torch.Tensor, torch.Tensor]:
        found = fr.token_divergence(leaf, y, divergence=name).divergence
        return found, torch.autograd.grad(found.sum(), leaf)[0]

    step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        leaf.copy_(torch.randn_like(leaf))
    graph.replay()
    for got, want in zip(captured, step(), strict=True):
        assert torch.equal(got, want)

"""csrc/cpu/divergence: one read by moments beside the program's second one, gradients by products beside programs'."""

from __future__ import annotations

from typing import Any

import divergence_checks as checks
import pytest
import torch
from torch import Tensor

import fastreward as fr
from fastreward.cpu import divergence

KLS = ("reverse_kl", "forward_kl", "jeffreys")


@pytest.mark.parametrize("name", checks.DIVERGENCES)
def test_rows_of_every_kind(name: str) -> None:
    for i, kind in enumerate(checks.KINDS if name in (*KLS, "jsd") else checks.FEW_KINDS):
        k = i + list(checks.DIVERGENCES).index(name)
        dtypes = (checks.DTYPES[k % 3], checks.DTYPES[k // 3 % 3])
        case = checks.make_case(name, kind, dtypes, 5, 9000 if kind == "empty_block" else 4113)
        checks.check_forward(divergence, "cpu", case, statistics=k % 2 == 0, sums=k % 3)
        checks.check_backward(divergence, "cpu", case, in_place=k % 4 == 0)


@pytest.mark.parametrize("name", KLS)
def test_sizes_slices_and_bits(name: str) -> None:
    for vocab in (1, 2, 7, 2048, 2049, 6151):
        case = checks.make_case(name, "plain", (torch.float32, torch.float32), 2, vocab)
        checks.check_forward(divergence, "cpu", case, statistics=True)
        checks.check_backward(divergence, "cpu", case)
    checks.check_slices(divergence, "cpu", checks.make_case(name, "masked", (torch.bfloat16,) * 2, 4, 5000), 1700)
    checks.check_bits(divergence, "cpu", checks.make_case(name, "infinities", (torch.float32,) * 2, 4, 5000))


def _both_ways(monkeypatch: pytest.MonkeyPatch, x: Tensor, y: Tensor, name: str, **given: Any) -> list[list[Tensor]]:
    """Values, entropies and both gradients: by moments and products, and by programs."""
    ways = []
    for ours in (True, False):
        with monkeypatch.context() as patch:
            if not ours:
                patch.setattr(divergence, "moments", lambda *_: None)
                patch.setattr(divergence, "products", lambda *_: None)
            leaves = [s.clone().requires_grad_() for s in (x, y)]
            found = fr.token_divergence(*leaves, divergence=name, outputs=("entropy",), **given)
            assert found.entropy is not None
            grads = torch.autograd.grad((found.divergence + 0.3 * found.entropy).sum(), leaves)
            ways.append([found.divergence.detach(), found.entropy.detach(), *grads])
    return ways


@pytest.mark.parametrize("name", ["reverse-kl", "forward-kl", "adaptive-kl"])
@pytest.mark.parametrize("temperatures", [(1.0, 1.0), (0.7, 0.7), (0.3, 2.0)])
def test_the_same_as_by_programs(monkeypatch: pytest.MonkeyPatch, name: str, temperatures: tuple[float, float]) -> None:
    """Also where tokens are forbidden: by both sides in whole blocks, the first one too, and by one side alone."""
    x, y = torch.randn(5, 8200) * 3, torch.randn(5, 8200) * 3
    x[0, :2500], y[0, :2500] = -torch.inf, -torch.inf
    x[1, 6100:], y[1, 7000:] = -torch.inf, -torch.inf
    y[2, 3], x[3, 8000] = -torch.inf, -torch.inf
    x[3, 7000], y[4, 5000] = 60.0, 70.0  # the largest come late
    given = dict(zip(("temperature", "teacher_temperature"), temperatures, strict=True))
    for ours, programs in zip(*_both_ways(monkeypatch, x, y, name, **given), strict=True):
        scale = max(1.0, float(programs.abs().max()))
        torch.testing.assert_close(ours, programs, rtol=2e-6, atol=8e-6 * scale)


@pytest.mark.parametrize("name", ["reverse-kl", "forward-kl"])
def test_what_is_far_apart_is_read_again(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Finite log-probs below -10,000 count as that, at large logits and at small temperatures."""
    x, y = torch.randn(4, 4100), torch.randn(4, 4100)
    x[0] *= 1e4
    y[1] *= 1e4
    y[2, 17], x[2, 17], x[3, 4090], y[3, 4090] = -2e4, 5.0, -9.5e3, 6.0
    for temperature in (1.0, 1e-3):
        ours, programs = _both_ways(monkeypatch, x, y, name, temperature=temperature)
        for a, b in zip(ours, programs, strict=True):
            torch.testing.assert_close(a, b, rtol=2e-6, atol=4e-6 * max(1.0, float(b.abs().max())))
    truth = (x.double().log_softmax(-1).clamp(min=-1e4), y.double().log_softmax(-1).clamp(min=-1e4))
    p, q = truth if name == "reverse-kl" else truth[::-1]
    found = fr.token_divergence(x, y, divergence=name).divergence
    torch.testing.assert_close(found.double(), (p.exp() * (p - q)).sum(-1), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("temperature", [1.0, 0.8])
@pytest.mark.parametrize("offset", [0.0, 1e4])
def test_sides_that_are_nearly_equal(temperature: float, offset: float) -> None:
    """A divergence of 1e-6 in a vocabulary of which both normalisers are about e^12."""
    x = torch.randn(4, 40_000) + offset
    y = x + 2e-3 * torch.randn(4, 40_000)
    p, q = ((z.double() / temperature).log_softmax(-1) for z in (x, y))
    for name, truth in (("reverse-kl", p.exp() * (p - q)), ("forward-kl", q.exp() * (q - p))):
        found = fr.token_divergence(x, y, divergence=name, temperature=temperature).divergence
        torch.testing.assert_close(found.double(), truth.sum(-1), rtol=1e-6, atol=5e-8)


def test_rows_without_a_distribution() -> None:
    x, y = torch.randn(7, 3000), torch.randn(7, 3000)
    x[0], y[1], x[2, 5], y[3, 2900], x[4, 9], y[5] = -torch.inf, -torch.inf, torch.nan, torch.nan, torch.inf, torch.nan
    for name in ("reverse-kl", "forward-kl", "adaptive-kl"):
        found = fr.token_divergence(x, y, divergence=name).divergence
        assert found[:6].isnan().all(), name
        assert found[6].isfinite()


def test_bits_depend_on_the_row_alone(request: pytest.FixtureRequest) -> None:
    """Not on what is asked for besides, on padding, the place in memory or the number of threads."""
    request.getfixturevalue("threads")
    x, y = torch.randn(40, 5003), torch.randn(40, 5003)
    for name in ("reverse-kl", "forward-kl", "jsd"):
        torch.set_num_threads(1)
        alone = torch.stack([fr.token_divergence(a, b, divergence=name).divergence for a, b in zip(x, y, strict=True)])
        torch.set_num_threads(2)
        leaf = x.clone().requires_grad_()
        found = fr.token_divergence(leaf, y, divergence=name, outputs=("entropy", "top1_agreement"))
        assert torch.equal(found.divergence.detach(), alone), name
        gap = torch.full((40, 5010), torch.nan)
        gap[:, 3:5006] = x
        moved = fr.token_divergence(gap[:, 3:5006], y, divergence=name).divergence
        assert torch.equal(moved, alone), name

"""kernels/policy_loss.py under Triton's interpreter, against float64 torch written out here, gradients by autograd."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from fastreward.kernels import policy_loss as kernels
from torch import Tensor

from fastreward._layout import METRICS
from fastreward._options import AGGREGATIONS, KLS, PolicyOptions

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


def batch(rows: int, length: int, seed: int = 0, spread: float = 0.4) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)
    lp = -torch.rand(rows, length, generator=g) * 3
    b = {
        "lp": lp,
        "old": lp + spread * torch.randn(rows, length, generator=g),
        "adv": torch.randn(rows, length, generator=g),
        "ref": lp + 0.3 * torch.randn(rows, length, generator=g),
        "entropy": torch.rand(rows, length, generator=g),
        "weights": torch.rand(rows, length, generator=g) + 0.5,
    }
    mask = torch.rand(rows, length, generator=g) < 0.7
    if rows > 2:
        mask[1] = False
    for x in b.values():
        x[~mask] = torch.nan  # must leak nowhere
    b["mask"] = mask
    return b


def truth(b: dict[str, Tensor], o: PolicyOptions, normalizer: float | None = None) -> tuple[Any, ...]:
    m = b["mask"]
    x = {k: torch.where(m, v.double(), 0.0) for k, v in b.items() if k != "mask"}
    lp, entropy = x["lp"].requires_grad_(), x["entropy"].requires_grad_()
    bound = o.log_ratio_clamp or torch.inf
    d = (lp - x["old"]).clamp(-bound, bound)
    r = d.exp()
    f1 = -x["adv"] * (r if o.delta is None else r.clamp(max=o.delta))
    f2 = -x["adv"] * r.clamp(1 - o.clip_low, 1 + o.clip_high)
    f = torch.where(f1 >= f2, f1, f2)
    dual = torch.zeros_like(m)
    if o.dual_clip is not None:
        dual = (x["adv"] < 0) & (f > -x["adv"] * o.dual_clip)
        f = torch.where(dual, -x["adv"] * o.dual_clip, f)
    gap = (x["ref"] - lp).clamp(-20, 20)
    k3 = gap.exp() - gap - 1
    token = f * x["weights"] - o.entropy_coef * entropy
    if o.kl:
        token = token + o.kl_coef * {"k1": -gap, "k2": gap**2 / 2, "k3": k3}[o.kl]
    token = torch.where(m, token, 0.0)
    n, lengths = m.sum().clamp(min=1), m.sum(1)
    rows = (lengths > 0).sum().clamp(min=1)
    total = {
        "token-mean": (token.sum(), n),
        "seq-mean-token-mean": ((token.sum(1) / lengths.clamp(min=1)).sum(), rows),
        "seq-mean-token-sum": (token.sum(), rows),
        "seq-mean-token-sum-norm": (token.sum(), rows * m.shape[1]),
    }[o.aggregation]
    loss = total[0] / (total[1] if normalizer is None else normalizer)
    g_lp, g_entropy = torch.autograd.grad(loss, (lp, entropy))
    means = {
        "clip_fraction_low": (r < 1 - o.clip_low) & (x["adv"] < 0),
        "clip_fraction_high": (r > 1 + o.clip_high) & (x["adv"] > 0),
        "clip_fraction_dual": dual,
        "kl_old_k1": -d,
        "kl_old_k3": r - d - 1,
        "kl_ref_k1": -gap,
        "kl_ref_k3": k3,
        "ratio_mean": r,
        "entropy_mean": entropy,
    }
    metrics = {k: torch.where(m, v.double(), 0.0).sum() / n for k, v in means.items()}
    metrics["ratio_min"], metrics["ratio_max"] = r[m].min(), r[m].max()
    metrics["token_count"] = m.sum()
    return loss, torch.stack([metrics[k].detach().double() for k in METRICS]), token, g_lp, g_entropy


def run(b: dict[str, Tensor], o: PolicyOptions, cu: Tensor | None = None, normalizer: Tensor | None = None) -> Any:
    loss, metrics, saved, row_weight, token = kernels.forward(
        b["lp"], b["old"], b["adv"], b["mask"], b["ref"], b["entropy"], b["weights"], cu, o, True, normalizer
    )
    grad, grad_entropy = kernels.backward(saved, b["mask"], row_weight, torch.tensor(1.7), cu, o)
    return loss, metrics, token, grad, grad_entropy


def compare(got: Any, want: Any) -> None:
    for a, w, scale in zip(got, want, (1, 1, 1, 1.7, 1.7), strict=True):
        torch.testing.assert_close(a.double(), w.double().detach() * scale, rtol=3e-6, atol=1e-6)


def packed(b: dict[str, Tensor], lengths: list[int]) -> tuple[dict[str, Tensor], Tensor]:
    inside = torch.arange(b["lp"].shape[1]) < torch.tensor(lengths).unsqueeze(1)
    cu = torch.tensor([0, *itertools.accumulate(lengths)])
    return {k: v[inside].contiguous() for k, v in b.items()}, cu


OPTIONS = [
    PolicyOptions(
        clip_high=0.28,
        aggregation=aggregation,
        kl=kl,
        kl_coef=0.1 if kl else 0.0,
        dual_clip=3.0 if i % 2 else None,
        delta=1.5 if i == 2 else None,
        log_ratio_clamp=0.9 if i == 3 else 20.0,
        entropy_coef=0.01,
    )
    for i, (aggregation, kl) in enumerate(zip(AGGREGATIONS, (None, *KLS), strict=True))
]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: o.aggregation)
@pytest.mark.parametrize("shape", [(3, 1100), (11, 70), (20, 9)], ids=str)
def test_padded(options: PolicyOptions, shape: tuple[int, int]) -> None:
    b = batch(*shape)
    compare(run(b, options), truth(b, options))


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: o.aggregation)
def test_packed(options: PolicyOptions) -> None:
    lengths = [1100, 0, 5, 900]
    b = batch(4, 1100)
    inside = torch.arange(1100) < torch.tensor(lengths).unsqueeze(1)
    b["mask"] &= inside
    flat, cu = packed(b, lengths)
    loss, metrics, token, grad, grad_entropy = truth(b, options)
    compare(run(flat, options, cu), (loss, metrics, token[inside], grad[inside], grad_entropy[inside]))


def test_sequence_advantages_mask_dtypes_normalizer_and_repeatability() -> None:
    b = batch(5, 600)
    options = PolicyOptions(aggregation="seq-mean-token-sum")
    b["adv"] = torch.randn(5, generator=torch.Generator().manual_seed(1))
    want = truth({**b, "adv": b["adv"].unsqueeze(1).expand(5, 600)}, options, normalizer=7.5)
    first = None
    for dtype in (torch.bool, torch.uint8, torch.int64, torch.float32):
        got = run({**b, "mask": b["mask"].to(dtype)}, options, normalizer=torch.tensor(7.5))
        for a, w, scale in zip(got[:4], want[:4], (1, 1, 1, 1.7), strict=True):
            torch.testing.assert_close(a.double(), w.double().detach() * scale, rtol=3e-6, atol=1e-6)
        assert got[4].numel() == 0
        first = first or got
        assert all(torch.equal(x, y) for x, y in zip(first, got, strict=True))


def test_plain_ppo_without_optional_terms() -> None:
    b = batch(3, 40)
    b = {k: torch.where(b["mask"], v, 0.0) if k != "mask" else torch.ones_like(v) for k, v in b.items()}
    zero = {**b, "weights": torch.ones(3, 40), "ref": b["lp"], "entropy": torch.zeros(3, 40)}
    loss, metrics, saved, _, token = kernels.forward(
        b["lp"], b["old"], b["adv"], None, None, None, None, None, PolicyOptions(), False, None
    )
    want = truth(zero, PolicyOptions())
    torch.testing.assert_close(loss.double(), want[0].detach(), rtol=3e-6, atol=1e-6)
    torch.testing.assert_close(metrics.double(), want[1], rtol=3e-6, atol=1e-6)
    assert token.numel() == 0
    assert saved.isfinite().all()


def test_nothing_counted_and_nothing_there() -> None:
    b = batch(3, 30)
    b["mask"][:] = False
    loss, metrics, token, grad, _ = run(b, PolicyOptions())
    assert loss == 0
    for x in (metrics, token, grad):
        assert not x.any()
    empty = {k: v[:0] for k, v in batch(3, 30).items()}
    loss, metrics, *_ = run(empty, PolicyOptions())
    assert loss == 0
    assert not metrics.any()


def test_a_nan_that_counts_is_seen() -> None:
    b = batch(3, 30)
    b["mask"][:] = True
    b = {k: v.nan_to_num() if k != "mask" else v for k, v in b.items()}
    b["lp"][0, 0] = torch.nan
    loss, _, _, grad, _ = run(b, PolicyOptions(delta=2.0, dual_clip=3.0))
    assert loss.isnan()
    assert grad[0, 0].isnan()
    assert grad[0, 1:].isfinite().all()


def test_small_k3_keeps_its_digits() -> None:
    b = batch(2, 30, spread=1e-4)
    options = PolicyOptions()
    torch.testing.assert_close(run(b, options)[1][4].double(), truth(b, options)[1][4], rtol=1e-3, atol=0)


def test_bounds_that_lie_are_not_followed() -> None:
    flat, _ = packed(batch(2, 20), [20, 20])
    cu = torch.tensor([-5, 30, 4000])
    loss, *_ = run({**flat, "mask": torch.zeros(40)}, PolicyOptions(), cu)
    assert loss == 0

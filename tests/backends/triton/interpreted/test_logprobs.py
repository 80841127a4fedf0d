"""kernels/logprobs under Triton's interpreter, against float64 torch written out here.

Tolerance everywhere: the error of the same computation in torch at the same input dtype, plus 1e-6 (relative to the
value where it is large); one gradient rounding more where the output is bf16 or f16.
"""

from __future__ import annotations

import pytest
import raw_checks
import torch
from fastreward.kernels import logprobs as kernels
from torch import Tensor

from fastreward._runtime.layout import FLAG, INDICES, STATE, VALUES

# The interpreter computes in NumPy, which warns of the infinities that these kernels are meant to handle.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

ALL = sum(FLAG.values())
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def rows(n: int, vocab: int, dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    logits = (torch.randn(n, vocab, generator=g) * 4 + 10).to(dtype)
    return logits, torch.randint(vocab, (n,), generator=g)


def truth(
    x: Tensor, labels: Tensor, inv: Tensor | float, kept: Tensor | None = None, at: torch.dtype = torch.float64
) -> dict[str, Tensor]:
    scale = torch.as_tensor(inv, dtype=at).expand(x.shape[0]).unsqueeze(-1)
    z = x.to(at) * scale
    if kept is not None:
        z = z.masked_fill(~kept, -torch.inf)
    logp = z.log_softmax(-1)
    p = logp.exp()
    label = z.gather(-1, labels.unsqueeze(-1))
    columns = torch.ones_like(z, dtype=torch.bool) if kept is None else kept
    return {
        "logprobs": logp.gather(-1, labels.unsqueeze(-1)).squeeze(-1),
        "entropy": -torch.where(p > 0, p * logp, p).sum(-1),
        "logsumexp": z.logsumexp(-1),
        "label_logit": label.squeeze(-1),
        "mean_logit": torch.where(columns, z, 0.0).sum(-1) / columns.sum(-1),
        "log_sum_sq_probs": (p * p).sum(-1).log(),
        "max_logprob": logp.amax(-1),
        "max_logit": torch.where(columns, x.to(z.dtype), -torch.inf).amax(-1),
        "argmax": z.argmax(-1),
        "rank": (z > label).sum(-1),
        "logp": logp,
    }


def close(got: Tensor, want: Tensor, torch_gave: Tensor, name: str) -> None:
    """Within torch's own error in f32, plus 1e-6, plus the rounding of the f32 output."""
    error = (torch_gave.double() - want).abs().nan_to_num(0.0, 0.0).max()
    torch.testing.assert_close(
        got.double(), want, rtol=1.2e-7, atol=1e-6 + float(error), equal_nan=True, msg=lambda text: f"{name}: {text}"
    )


def check(
    got: tuple[Tensor, ...],
    x: Tensor,
    labels: Tensor,
    inv: Tensor | float,
    kept: Tensor | None = None,
    ids: Tensor | None = None,
    only: Tensor | slice = slice(None),
) -> None:
    """(values, indices[, id_logprobs]) against float64, in the rows `only`."""
    want, torch_gave = truth(x, labels, inv, kept), truth(x, labels, inv, kept, torch.float32)
    for name, row in zip(VALUES, got[0], strict=True):
        close(row[only], want[name][only], torch_gave[name][only], name)
    for name, row in zip(INDICES, got[1], strict=True):
        assert row[only].tolist() == want[name][only].tolist(), name
    if ids is not None:
        close(got[2][only], *(t["logp"].gather(-1, ids)[only] for t in (want, torch_gave)), "id_logprobs")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab", [1, 37, 9001])
def test_forward(dtype: torch.dtype, vocab: int) -> None:
    x, labels = rows(3, vocab, dtype)
    ids = torch.randint(vocab, (3, 5), generator=torch.Generator().manual_seed(1))
    inv = torch.tensor([1.0, 0.5, 3.0])
    check(kernels.forward(x, labels, inv, None, None, None, ids, ALL), x, labels, inv, None, ids)


def test_strided_rows_scalar_temperature_shared_ids_and_row_mask() -> None:
    storage, labels = rows(4, 2 * 601, torch.bfloat16)
    x = storage[:, :601]
    ids = torch.tensor([[3, 600, 3]]).expand(4, -1)
    mask = torch.tensor([True, False, True, True])
    labels %= 601
    values, indices, id_logprobs = got = kernels.forward(x, labels, 0.7, mask, None, None, ids, ALL)
    check(got, x, labels, 0.7, None, ids, mask)
    for out in (values[:, 1], indices[:, 1], id_logprobs[1]):
        assert not out.any()


def test_only_what_is_asked_for() -> None:
    x, labels = rows(2, 50, torch.float32)
    full, full_indices, _ = kernels.forward(x, labels, 1.0, None, None, None, None, ALL)
    for name, flag in FLAG.items():
        values, indices, none = kernels.forward(x, labels, 1.0, None, None, None, None, flag)
        assert none.shape == (2, 0)
        always = {"logprobs", "logsumexp", "label_logit", "max_logprob", "max_logit"}
        for i, value in enumerate(VALUES):
            assert torch.equal(values[i], full[i] if value in always | {name} else torch.zeros(2)), value
        for i, value in enumerate(INDICES):
            assert torch.equal(indices[i], full_indices[i] if value == name else torch.zeros(2).long()), value


def test_keep_mask_and_keep_ids_agree_with_the_truth() -> None:
    x, labels = rows(4, 5000, torch.bfloat16)
    g = torch.Generator().manual_seed(2)
    ids = torch.stack([torch.randperm(5000, generator=g)[:150] for _ in range(4)])
    ids[0, 100:] = -1
    kept = torch.zeros(4, 5001, dtype=torch.bool).scatter_(1, torch.where(ids < 0, 5000, ids), True)[:, :5000]
    labels = torch.stack([ids[0, 3], ids[1, 149], ids[2, 0], (~kept[3]).nonzero()[0, 0]])
    asked = torch.stack([ids[:, 7], labels, torch.full((4,), 11)], 1)
    for keep_mask, keep_ids in ((kept, None), (None, ids)):
        got = kernels.forward(x, labels, 0.8, None, keep_mask, keep_ids, asked, ALL)
        check(got, x, labels, 0.8, kept, asked)
        assert got[0][0, 3] == -torch.inf


@pytest.mark.parametrize("dtype", DTYPES)
def test_infinities_nan_and_illegal_labels(dtype: torch.dtype) -> None:
    x, labels = rows(7, 4200, dtype)
    x[0] = -torch.inf
    x[1, :4199] = -torch.inf
    labels[1] = 4199
    x[2, ::2] = -torch.inf
    labels[2] = 4
    x[3, 5] = torch.nan
    x[4, 5] = torch.inf
    labels[5], labels[6] = -1, 4200
    asked = torch.tensor([[-3, 4200, 1]]).expand(7, -1)
    values, indices, ids = got = kernels.forward(x, labels, 1.0, None, None, None, asked, ALL)
    v = dict(zip(VALUES, values, strict=True))
    check(got, x, labels.clamp(0, 4199), 1.0, only=torch.tensor([1, 2]))
    assert v["logsumexp"][0] == v["mean_logit"][0] == -torch.inf
    assert v["logsumexp"][4] == torch.inf
    assert indices[0, 0] == 0
    for name in ("logprobs", "entropy", "log_sum_sq_probs", "max_logprob"):
        assert v[name][[0, 3, 4]].isnan().all(), name
    assert v["logprobs"][1].abs() < 1e-7
    assert v["entropy"][1].abs() < 1e-7
    assert v["logprobs"][2] == -torch.inf
    assert v["logprobs"][5:].isnan().all()
    assert v["label_logit"][5:].isnan().all()
    assert not indices[1, 5:].any()
    want, torch_gave = (truth(x, labels.clamp(0, 4199), 1.0, at=at)["entropy"] for at in (torch.float64, torch.float32))
    close(v["entropy"][5:], want[5:], torch_gave[5:], "entropy beside an illegal label")
    assert ids[:, :2].isnan().all()
    assert ids[5, 2].isfinite()


def test_first_of_equal_maxima_and_large_negative_rows() -> None:
    x = torch.full((3, 9000), -1.0e4)
    x[0, [8999, 4500, 77]] = 2.0
    x[1, [5000, 4096]] = -9.0e3
    _, indices, _ = kernels.forward(x, torch.zeros(3).long(), 1.0, None, None, None, None, ALL)
    assert indices.tolist() == [[77, 4096, 0], [3, 2, 0]]
    values, _, _ = kernels.forward(x, torch.zeros(3).long(), 1.0, None, None, None, None, 0)
    torch.testing.assert_close(values[2].double(), truth(x, torch.zeros(3).long(), 1.0)["logsumexp"], rtol=1e-6, atol=0)


def test_bits_do_not_depend_on_the_batch() -> None:
    x, labels = rows(6, 5003, torch.bfloat16)
    whole = kernels.forward(x, labels, 0.9, None, None, None, None, ALL)[0]
    order = torch.tensor([4, 1, 5])
    part = kernels.forward(x[order].contiguous(), labels[order], 0.9, None, None, None, None, ALL)[0]
    assert torch.equal(whole[:, order], part)


def test_fold_and_finish_in_slices() -> None:
    x, labels = rows(5, 9100, torch.bfloat16)
    x[0, :3000] = -torch.inf
    x[1, 6000:] = -torch.inf
    inv = torch.tensor([0.6]).expand(5)
    state = torch.zeros(5, len(STATE), dtype=torch.float64)
    state[:, 0], state[:, 5] = -torch.inf, torch.nan
    labels[0], labels[1], labels[4] = 3500, 17, 9100
    label_x = x.gather(1, labels.clamp(max=9099).unsqueeze(1)).squeeze(1).float()
    label_x[4] = torch.nan
    for start, stop in ((0, 3000), (3000, 7100), (7100, 9100)):
        kernels.accumulate(x[:, start:stop], labels, start, inv, state, ALL, label_x)
    values, indices = kernels.finish(state, inv, 9100, ALL)
    legal = labels.clamp(max=9099)
    check((values, indices), x, legal, 0.6, only=slice(4))
    assert values[0, 4].isnan()
    assert indices[1, 4] == 0
    whole = torch.zeros_like(state)
    whole[:, 0], whole[:, 5] = -torch.inf, torch.nan
    kernels.accumulate(x, labels, 0, 0.6, whole, ALL, None)
    check(kernels.finish(whole, 0.6, 9100, ALL), x, legal, 0.6, only=slice(4))


def gradient(
    x: Tensor,
    labels: Tensor,
    inv: Tensor | float,
    kept: Tensor | None,
    ids: Tensor,
    g: Tensor,
    g_ids: Tensor,
    cap: float,
) -> Tensor:
    """Autograd through the float64 statistics of softcap(raw); x = cap * tanh(raw / cap)."""
    raw = (torch.atanh(x.double() / cap) * cap if cap else x.double()).requires_grad_()
    z = (torch.tanh(raw / cap) * cap if cap else raw) * torch.as_tensor(inv, dtype=torch.float64).reshape(-1, 1)
    if kept is not None:
        z = z.masked_fill(~kept, -torch.inf)
    logp = z.log_softmax(-1)
    finite = torch.where(logp == -torch.inf, 0.0, logp)
    p = logp.exp()
    entropy = -(p * finite).sum(-1)
    chosen = finite.gather(-1, labels.unsqueeze(-1)).squeeze(-1)
    total = (g[0] * chosen + g[1] * entropy + g[2] * z.logsumexp(-1) + g[5] * (p * p).sum(-1).log()).sum()
    total = total + (g_ids * finite.gather(-1, ids)).sum()
    return torch.autograd.grad(total, raw)[0]


@pytest.mark.parametrize("kind", ["keep_mask", "keep_ids", "kept_ties", "empty_block"])
def test_kept_sets_without_the_label_and_the_ids(kind: str) -> None:
    """What is dropped gets no gradient, be it the label's column or that of an id whose log-prob is asked for."""
    case = raw_checks.logits_case(kind, torch.float32, 4, 3000)
    raw_checks.check_logprobs_forward(kernels, "cpu", case)
    raw_checks.check_logprobs_backward(kernels, "cpu", case)


@pytest.mark.parametrize("keep", [None, "mask", "ids"])
@pytest.mark.parametrize(
    ("dtype", "inplace"),
    [(torch.float32, True), (torch.bfloat16, False), (torch.bfloat16, True), (torch.float16, True)],
)
def test_backward(dtype: torch.dtype, keep: str | None, inplace: bool) -> None:
    n, vocab = 4, 4600
    x, labels = rows(n, vocab, dtype)
    g = torch.Generator().manual_seed(3)
    kept_ids = torch.stack([torch.randperm(vocab, generator=g)[:70] for _ in range(n)])
    kept = torch.zeros(n, vocab, dtype=torch.bool).scatter_(1, kept_ids, True)
    labels = kept_ids[:, 5].clone()
    ids = kept_ids[:, [1, 5, 9, 1]].contiguous()
    mask = torch.tensor([True, True, False, True])
    inv = torch.tensor([1.0, 0.5, 2.0, 1.3])
    keep_mask, keep_ids = (kept if keep == "mask" else None), (kept_ids if keep == "ids" else None)
    values, _, id_logprobs = kernels.forward(x, labels, inv, mask, keep_mask, keep_ids, ids, ALL)
    up, up_ids = torch.randn(7, n, generator=g), torch.randn(n, 4, generator=g)
    want = gradient(x, labels, inv, kept if keep else None, ids, up.double(), up_ids.double(), 0.0)
    want[2] = 0
    out = x.clone() if inplace else torch.full_like(x, torch.nan)
    kernels.backward(
        out if inplace else x, labels, inv, mask, keep_mask, keep_ids, ids, values, id_logprobs, up, up_ids, out
    )
    # The interpreter truncates f32 to bf16, where the GPU rounds to nearest: one bit more.
    rounding = {torch.float32: 2e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10}[dtype]
    torch.testing.assert_close(out.double(), want, rtol=rounding, atol=3e-6)
    if keep:
        assert not out[~kept].any()


def test_backward_softcap_infinite_logits_and_unasked_entropy() -> None:
    x, labels = rows(3, 700, torch.float32)
    x = (x - 10) / 2
    none = torch.zeros(3, 0)
    for flags in (0, ALL):
        values, _, _ = kernels.forward(x, labels, 1.0, None, None, None, None, flags)
        up = torch.zeros(7, 3)
        up[0] = torch.tensor([1.0, -2.0, 0.5])
        if flags:
            up[1], up[5] = 0.3, -0.2
        out = torch.empty_like(x)
        kernels.backward(x, labels, 1.0, None, None, None, None, values, none, up, None, out, 1 / 20.0)
        want = gradient(x, labels, 1.0, None, labels.unsqueeze(1), up.double(), torch.zeros(3, 1).double(), 20.0)
        torch.testing.assert_close(out.double(), want, rtol=1e-5, atol=2e-6)
    x[:, 1::2] = -torch.inf
    x[2] = -torch.inf
    labels = torch.zeros(3).long()
    values, _, _ = kernels.forward(x, labels, 1.0, None, None, None, None, ALL)
    kernels.backward(x, labels, 1.0, None, None, None, None, values, none, torch.ones(7, 3), None, out)
    assert out[:2].isfinite().all()
    assert not out[:2, 1::2].any()
    assert out[2].isnan().all()


def test_backward_of_a_slice_ignores_labels_outside() -> None:
    x, labels = rows(3, 6000, torch.float32)
    values, _, _ = kernels.forward(x, labels, 1.0, None, None, None, None, ALL)
    up = torch.randn(7, 3, generator=torch.Generator().manual_seed(5))
    up[5] = 0
    want = gradient(x, labels, 1.0, None, labels.unsqueeze(1), up.double(), torch.zeros(3, 1).double(), 0.0)
    out = torch.empty_like(x)
    for start, stop in ((0, 2500), (2500, 6000)):
        tile = x[:, start:stop]
        kernels.backward(
            tile, labels - start, 1.0, None, None, None, None, values, torch.zeros(3, 0), up, None, out[:, start:stop]
        )
    torch.testing.assert_close(out.double(), want, rtol=2e-6, atol=3e-6)


def test_no_rows() -> None:
    x = torch.zeros(0, 10)
    values, indices, ids = kernels.forward(x, torch.zeros(0).long(), 1.0, None, None, None, None, ALL)
    assert (values.shape, indices.shape, ids.shape) == ((8, 0), (2, 0), (0, 0))
    kernels.backward(x, torch.zeros(0).long(), 1.0, None, None, None, None, values, ids, values, None, x)


@pytest.mark.parametrize(("dtype", "vocab"), [(torch.float32, 4113), (torch.bfloat16, 40), (torch.float16, 40)])
def test_extreme_temperatures(dtype: torch.dtype, vocab: int) -> None:
    raw_checks.check_extreme_temperatures(kernels, "cpu", dtype, vocab)


@pytest.mark.parametrize("kind", ["keep_mask", "keep_ids", "empty_block"])
def test_columns_that_take_no_part(kind: str) -> None:
    """Not kept, the label of a row and its gradient among them; a block of -inf between two finite ones."""
    case = raw_checks.logits_case(kind, torch.float32, 4, 9001)
    raw_checks.check_logprobs_forward(kernels, "cpu", case)
    raw_checks.check_logprobs_backward(kernels, "cpu", case)

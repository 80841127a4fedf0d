"""token_logprobs against the float64 reference: values, gradients, bits, layouts and messages."""

from __future__ import annotations

import pytest
import torch
from criterion import assert_as_good_as_torch
from torch import Tensor

import fastreward as fr
from fastreward._runtime.layout import ALL_OUTPUTS, DIFFERENTIABLE, OUTPUT_VALUES
from fastreward.reference.logprobs import token_logprobs as truth_of

BACKENDS = ["cpu", "reference"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Around the vector widths and the block of 4096 columns, and one real vocabulary.
VOCABS = [1, 7, 16, 33, 4095, 4097, 9001]


def in_torch(
    logits: Tensor, labels: Tensor, temperature: float | Tensor, ids: Tensor, keep: Tensor | None
) -> dict[str, Tensor]:
    """What a trainer would write, at the logits' own dtype."""
    z = logits / (temperature.unsqueeze(-1).to(logits.dtype) if isinstance(temperature, Tensor) else temperature)
    if keep is not None:
        z = z.masked_fill(~keep, -torch.inf)
    logp = torch.log_softmax(z, -1)
    p = logp.exp()
    return {
        "logprobs": logp.gather(-1, labels.unsqueeze(-1)).squeeze(-1),
        "entropy": -torch.where(p > 0, p * logp, 0.0).sum(-1),
        "logsumexp": torch.logsumexp(z, -1),
        "label_logit": z.gather(-1, labels.unsqueeze(-1)).squeeze(-1),
        "mean_logit": z.mean(-1),
        "log_sum_sq_probs": (p * p).sum(-1).log(),
        "max_logprob": logp.amax(-1),
        "id_logprobs": logp.gather(-1, ids),
    }


def check(
    logits: Tensor,
    labels: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    mask: Tensor | None = None,
    keep: Tensor | None = None,
    ids: Tensor | None = None,
    inplace: bool = False,
) -> None:
    """All outputs and the gradient of a random combination of the differentiable ones."""
    lead = labels.shape
    ids = torch.randint(0, logits.shape[-1], (*lead, 3)) if ids is None else ids
    leaf = logits.detach().clone().requires_grad_()
    x = leaf * 1 if inplace else leaf
    stats = fr.token_logprobs(
        x,
        labels,
        temperature=temperature,
        mask=mask,
        kept_tokens=keep,
        token_ids=ids,
        outputs=ALL_OUTPUTS,
        inplace_backward=inplace,
    )
    exact = logits.detach().double().requires_grad_()
    truth = truth_of(exact, labels, temperature=temperature, mask=mask, kept_tokens=keep, token_ids=ids)
    boolean = keep if keep is None or keep.dtype == torch.bool else kept_mask(keep, logits)
    own = logits.detach().clone().requires_grad_()
    same = in_torch(own, labels, temperature, ids, boolean)
    upstream = {name: torch.randn(truth[name].shape) for name in DIFFERENTIABLE}
    for name in ALL_OUTPUTS:
        got = getattr(stats, name)
        if name in ("argmax", "rank"):
            assert torch.equal(got, truth[name]), name
        else:
            counted = slice(None) if mask is None else mask != 0
            assert_as_good_as_torch(got[counted], truth[name][counted], same[name][counted], name)
            if mask is not None:
                assert not got[mask == 0].any(), name

    def total(out: dict[str, Tensor]) -> Tensor:
        weight = 1.0 if mask is None else (mask != 0).float()
        parts = []
        for name, g in upstream.items():
            good = torch.isfinite(out[name].detach().double())
            w = weight if isinstance(weight, float) or name != "id_logprobs" else weight.unsqueeze(-1)
            parts.append(torch.where(good, out[name], 0.0).mul(g.to(out[name].dtype) * w).sum())
        return torch.stack([part.double() for part in parts]).sum()

    total({name: getattr(stats, name) for name in upstream}).backward()
    total({name: truth[name] for name in upstream}).backward()
    total({name: same[name] for name in upstream}).backward()
    assert leaf.grad is not None
    assert leaf.grad.dtype == logits.dtype
    rounding = {torch.float32: 1e-6, torch.bfloat16: 2**-9, torch.float16: 2**-11}[logits.dtype]
    assert_as_good_as_torch(
        leaf.grad,
        exact.grad,
        torch.nan_to_num(own.grad, nan=0.0) if keep is not None else own.grad,
        "gradient",
        slack=max(1e-6, rounding if own.grad.isnan().any() else 1e-6),
    )


def kept_mask(ids: Tensor, logits: Tensor) -> Tensor:
    rows = torch.zeros(logits.shape, dtype=torch.int64)
    return rows.scatter_add(-1, ids.clamp(min=0), (ids >= 0).long()) > 0


@pytest.fixture(params=BACKENDS)
def _backend(request: pytest.FixtureRequest):
    with fr.backend(request.param):
        yield


@pytest.mark.usefixtures("_backend")
class TestNumbers:
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("vocab", VOCABS)
    def test_all_outputs_and_gradients(self, dtype: torch.dtype, vocab: int) -> None:
        check((torch.randn(5, vocab) * 4).to(dtype), torch.randint(0, vocab, (5,)))

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_temperature_per_token_and_mask(self, dtype: torch.dtype) -> None:
        mask = torch.tensor([[1, 0, 1], [0, 0, 1]])
        check(
            (torch.randn(2, 3, 501) * 3).to(dtype),
            torch.randint(0, 501, (2, 3)),
            temperature=torch.rand(2, 3) + 0.4,
            mask=mask,
        )

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_in_place_backward(self, dtype: torch.dtype) -> None:
        check(torch.randn(6, 5000).to(dtype), torch.randint(0, 5000, (6,)), inplace=True, temperature=0.7)

    @pytest.mark.parametrize("kind", ["mask", "ids"])
    def test_kept_sets(self, kind: str) -> None:
        logits, labels = torch.randn(6, 777) * 3, torch.randint(0, 777, (6,))
        ids = torch.stack([torch.randperm(777)[:20] for _ in range(6)])
        ids[:, 0] = labels
        ids[1, 5:] = -1
        ids[2, 0] = (labels[2] + 1) % 777  # this label may not be kept: log-prob -inf
        ids[2, 1:] = torch.tensor([c for c in range(777) if c not in (int(labels[2]), int(ids[2, 0]))][:19])
        check(logits, labels, keep=ids if kind == "ids" else kept_mask(ids, logits), ids=ids[:, :3].clamp(min=0))

    def test_infinite_and_huge_logits(self) -> None:
        logits = torch.randn(5, 6000) * 3
        logits[0, :5000] = -torch.inf
        logits[1, 5000:] = -torch.inf
        logits[2] = 3e4
        logits[3, 17] = 3e38
        labels = torch.tensor([5500, 20, 5, 17, 0])
        check(logits, labels)

    def test_rows_without_a_finite_logit_are_nan_as_in_torch(self) -> None:
        logits = torch.full((2, 50), -torch.inf)
        logits[1] = 0
        stats = fr.token_logprobs(logits, torch.tensor([3, 4]), outputs=("logprobs", "entropy", "logsumexp"))
        expected = torch.log_softmax(logits, -1)[[0, 1], [3, 4]]
        assert torch.isnan(stats.logprobs[0])
        assert torch.isnan(stats.entropy[0])
        assert stats.logsumexp[0] == -torch.inf
        assert torch.allclose(stats.logprobs[1], expected[1])

    @pytest.mark.parametrize("bad", [torch.nan, torch.inf])
    def test_nan_and_plus_infinity_stay_visible(self, bad: float) -> None:
        logits = torch.randn(2, 5000)
        logits[0, 4500] = bad
        logprobs = fr.token_logprobs(logits, torch.tensor([3, 4])).logprobs
        assert not torch.isfinite(logprobs[0])
        assert torch.isfinite(logprobs[1])

    @pytest.mark.parametrize("shape", [(0, 9), (2, 0, 9), (9,)])
    def test_empty_batches_and_single_rows(self, shape: tuple[int, ...]) -> None:
        logits = torch.randn(shape, requires_grad=True)
        stats = fr.token_logprobs(logits, torch.zeros(shape[:-1], dtype=torch.long), outputs=("logprobs", "entropy"))
        assert stats.logprobs.shape == shape[:-1]
        stats.logprobs.sum().backward()
        assert logits.grad is not None
        assert logits.grad.shape == shape

    def test_layouts_without_a_copy(self) -> None:
        base = torch.randn(3, 6, 2, 40)
        labels = torch.randint(0, 30, (3, 6, 2))
        for view, its_labels in [
            (base[:, :-1, 0, :30], labels[:, :-1, 0]),
            (base[:, 2:5, 1, :30], labels[:, 2:5, 1]),
            (base[..., :30], labels),
            (base.transpose(0, 1)[..., :30], labels.transpose(0, 1)),
            (base[:1, :1, 0, :30].expand(3, 6, 30), labels[..., 0]),
        ]:
            plain = view.detach().clone().contiguous().requires_grad_()
            strided = view.detach().requires_grad_()
            results = [fr.token_logprobs(x, its_labels, outputs=("logprobs", "entropy")) for x in (plain, strided)]
            for a, b in zip(*results, strict=True):
                assert torch.equal(a, b)
            grads = [
                torch.autograd.grad((r.logprobs * 2 + r.entropy).sum(), x)[0]
                for r, x in zip(results, (plain, strided), strict=True)
            ]
            assert torch.equal(*grads)

    def test_in_place_backward_leaves_the_gaps_of_a_view_alone(self) -> None:
        base = torch.randn(3, 6, 40)
        last, view = base[:, -1].clone(), base[:, :-1]
        labels = torch.randint(0, 40, (3, 5))
        plain = view.detach().clone().requires_grad_()
        fr.token_logprobs(plain, labels).logprobs.sum().backward()
        strided = view.detach().requires_grad_()
        fr.token_logprobs(strided, labels, inplace_backward=True).logprobs.sum().backward()
        assert torch.equal(base[:, :-1], plain.grad)
        assert torch.equal(base[:, -1], last)

    @pytest.mark.parametrize("bad", [torch.nan, torch.inf])
    def test_logsumexp_of_infinity_is_infinity(self, bad: float) -> None:
        logits = torch.tensor([[1.0, bad, 2.0]])
        got = fr.token_logprobs(logits, torch.tensor([0]), outputs=("logsumexp",)).logsumexp
        assert torch.equal(got.isnan(), logits.logsumexp(-1).isnan())
        assert torch.equal(got.isinf(), logits.logsumexp(-1).isinf())

    def test_large_logits_over_a_temperature(self) -> None:
        """1 / temperature rounded to float32 would be off by more than torch's own division."""
        logits, temperature = torch.randn(400, 257) * 1000, torch.rand(400) * 2 + 0.1
        labels = torch.randint(0, 257, (400,))
        stats = fr.token_logprobs(logits, labels, temperature=temperature, outputs=("logprobs", "logsumexp"))
        truth = truth_of(logits, labels, temperature=temperature)
        for name in ("logprobs", "logsumexp"):
            error = (getattr(stats, name).double() - truth[name]).abs()
            rounding = truth[name].abs().float().clamp(min=1e-3).double() * 2.0**-24  # of the float32 output
            assert (error <= 1.01 * rounding + 1e-6).all(), name

    def test_uneven_use_of_outputs(self) -> None:
        """Only one output with a gradient, the others not even asked for."""
        for name in DIFFERENTIABLE[:4]:
            x = torch.randn(4, 300, requires_grad=True)
            labels, g = torch.randint(0, 300, (4,)), torch.randn(4)
            (grad,) = torch.autograd.grad((getattr(fr.token_logprobs(x, labels, outputs=(name,)), name) * g).sum(), x)
            exact = x.detach().double().requires_grad_()
            (truth,) = torch.autograd.grad((truth_of(exact, labels)[name] * g).sum(), exact)
            assert torch.allclose(grad.double(), truth, atol=1e-6), name


class TestBits:
    """The same token gives the same bits, whatever batch, place, thread count or padding it comes in."""

    @staticmethod
    def bits(logits: Tensor, labels: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        x = logits.clone().requires_grad_()
        stats = fr.token_logprobs(x, labels, temperature=0.9, mask=mask, outputs=OUTPUT_VALUES)
        (stats.logprobs.sum() + 0.3 * stats.entropy.sum()).backward()
        assert x.grad is not None
        return torch.stack([s.detach() for s in stats]), x.grad

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("vocab", [1000, 40_001])
    @pytest.mark.usefixtures("threads")
    def test_batch_place_threads_and_padding(self, dtype: torch.dtype, vocab: int) -> None:
        logits, labels = (torch.randn(12, vocab) * 3).to(dtype), torch.randint(0, vocab, (12,))
        values, grads = self.bits(logits, labels)
        order = torch.randperm(12)
        permuted, permuted_grads = self.bits(logits[order], labels[order])
        assert torch.equal(permuted, values[:, order])
        assert torch.equal(permuted_grads, grads[order])
        for start, stop in [(0, 1), (1, 4), (4, 12)]:
            part, part_grads = self.bits(logits[start:stop], labels[start:stop])
            assert torch.equal(part, values[:, start:stop])
            assert torch.equal(part_grads, grads[start:stop])
        padded = torch.cat([torch.full((2, vocab), torch.nan, dtype=dtype), logits])
        mask = torch.arange(14) >= 2
        padded_values, padded_grads = self.bits(padded, torch.cat([labels[:2], labels]), mask)
        assert torch.equal(padded_values[:, 2:], values)
        assert torch.equal(padded_grads[2:], grads)
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            again, again_grads = self.bits(logits, labels)
            assert torch.equal(again, values)
            assert torch.equal(again_grads, grads)

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("vocab", [1000, 40_001])
    @pytest.mark.parametrize("name", OUTPUT_VALUES)
    def test_other_outputs(self, dtype: torch.dtype, vocab: int, name: str) -> None:
        """Else old log-probs, scored without the entropy, would differ from new ones of an unchanged policy."""
        logits, labels = (torch.randn(60, vocab) * 3).to(dtype), torch.randint(0, vocab, (60,))
        everything = fr.token_logprobs(logits, labels, outputs=(*OUTPUT_VALUES, "argmax", "rank"))
        for other in ("argmax", "rank", *OUTPUT_VALUES):
            some = fr.token_logprobs(logits, labels, outputs=(name, other))
            assert torch.equal(getattr(some, name), getattr(everything, name)), other

    def test_alignment_of_rows(self) -> None:
        buffer = torch.randn(3, 4103)
        labels = torch.tensor([1, 2, 3])
        aligned, _ = self.bits(buffer[:, 3:].clone(), labels)
        shifted = fr.token_logprobs(buffer[:, 3:], labels, temperature=0.9, outputs=OUTPUT_VALUES)
        assert torch.equal(aligned, torch.stack(list(shifted)))


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("temperature", [0.4, 3.0])
def test_one_temperature_for_all(temperature: float, backend: str) -> None:
    logits, labels = torch.randn(5, 300).mul(3).requires_grad_(), torch.randint(0, 300, (5,))
    with fr.backend(backend):
        stats = fr.token_logprobs(
            logits, labels, temperature=temperature, outputs=("logprobs", "entropy", "label_logit")
        )
        (grad,) = torch.autograd.grad((stats.logprobs + 0.3 * stats.entropy).sum(), logits)
    exact = logits.detach().double().requires_grad_()
    rows = (exact / temperature).log_softmax(-1)
    logprobs, entropy = rows.gather(-1, labels[:, None])[:, 0], -(rows.exp() * rows).sum(-1)
    close(stats.logprobs.double(), logprobs.detach())
    close(stats.entropy.double(), entropy.detach())
    close(stats.label_logit.double(), exact.detach().gather(-1, labels[:, None])[:, 0] / temperature)
    close(grad.double(), torch.autograd.grad((logprobs + 0.3 * entropy).sum(), exact)[0])


def close(found: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=3e-6)


def test_64_bit_offsets() -> None:
    """Row offsets past 2^31 elements: an expanded view costs no memory."""
    row = torch.randn(1, 70_000)
    far = torch.empty(0).set_(row.untyped_storage(), 0, (1, 70_000), (2**33, 1))
    logits = far.expand(1, 70_000)
    assert torch.equal(
        fr.token_logprobs(logits, torch.tensor([5])).logprobs, fr.token_logprobs(row, torch.tensor([5])).logprobs
    )


@pytest.mark.slow
def test_more_than_2_31_elements() -> None:
    """N * V > 2^31 in one call: 4.3 GB of bfloat16, only a few rows computed, the last one included."""
    rows, vocab = 14_200, 151_936
    try:
        logits = torch.empty(rows, vocab, dtype=torch.bfloat16)
    except RuntimeError:
        pytest.skip("not enough memory for 4.3 GB of logits")
    picked = [0, 7_000, rows - 1]
    mask = torch.zeros(rows, dtype=torch.bool)
    for i in picked:
        mask[i] = True
        logits[i] = torch.randn(vocab)
    labels = torch.full((rows,), vocab - 1)
    out = fr.token_logprobs(logits, labels, mask=mask).logprobs
    small = fr.token_logprobs(logits[picked], labels[picked]).logprobs
    assert torch.equal(out[picked], small)


class TestMessages:
    logits = torch.randn(2, 3, 10)
    labels = torch.zeros(2, 3, dtype=torch.long)

    @pytest.mark.parametrize(
        ("error", "message", "arguments"),
        [
            (
                ValueError,
                r"labels: expected integers in \[0, 10\).*got 10 at index \[1, 2\]",
                {"labels": torch.tensor([[0, 1, 2], [3, 4, 10]])},
            ),
            (
                ValueError,
                r"labels: expected integers.*got -100 at index \[0, 1\]",
                {"labels": torch.tensor([[0, -100, 2], [3, 4, 1]])},
            ),
            (ValueError, r"labels: expected shape \[2, 3\].*got \[3, 2\]", {"labels": labels.t()}),
            (TypeError, r"labels: expected an integer tensor, got float32", {"labels": labels.float()}),
            (TypeError, r"logits: expected dtype float32, bfloat16, float16, got float64", {"logits": logits.double()}),
            (ValueError, r"logits: expected unit stride along V", {"logits": torch.randn(2, 10, 3).transpose(1, 2)}),
            (
                ValueError,
                r"outputs: expected one of.*got 'entropies' \(did you mean 'entropy'\?\)",
                {"outputs": ("entropies",)},
            ),
            (
                TypeError,
                r"outputs: expected a tuple of names, got 'entropy'; write \('entropy',\)",
                {"outputs": "entropy"},
            ),
            (ValueError, r"token_ids: needed for the output 'id_logprobs'", {"outputs": ("id_logprobs",)}),
            (ValueError, r"temperature: expected a positive number, got 0", {"temperature": 0}),
            (ValueError, r"temperature: expected shape \[2, 3\]", {"temperature": torch.ones(3)}),
            (ValueError, r"mask: expected shape \[2, 3\]", {"mask": torch.ones(2)}),
            (ValueError, r"kept_tokens: expected ids below 10.*got 10", {"kept_tokens": torch.full((2, 3, 1), 10)}),
            (
                ValueError,
                r"kept_tokens: expected ids unique within a row, got 4 at index \[1, 0, 2\]",
                {"kept_tokens": torch.tensor([[[1, 2, 3]] * 3, [[4, 5, 4], [0, 1, 2], [0, 1, 2]]])},
            ),
            (
                ValueError,
                r"kept_tokens: expected a boolean mask \[\.\.\., 10\] "
                r"\(kept_tokens\.bool\(\); integers are ids of .*\), got 1",
                {"kept_tokens": torch.ones(2, 3, 10).long()},
            ),
            (
                ValueError,
                r"kept_tokens: expected a boolean mask",
                {"kept_tokens": torch.eye(10)[:6].reshape(2, 3, 10).byte()},
            ),
            (
                TypeError,
                r"kept_tokens: expected a boolean mask \[\.\.\., V\] or integer ids \[\.\.\., k\], got dtype float32",
                {"kept_tokens": torch.ones(2, 3, 10)},
            ),
            (
                ValueError,
                r"kept_tokens: expected at least one id per token",
                {"kept_tokens": torch.zeros(2, 3, 0).long()},
            ),
            (TypeError, r"kept_tokens: expected a torch tensor", {"kept_tokens": [[0]]}),
            (TypeError, r"token_ids: expected a torch tensor", {"token_ids": [0], "outputs": ("id_logprobs",)}),
            (TypeError, r"temperature: expected a positive number, got None", {"temperature": None}),
            (TypeError, r"outputs: expected a tuple of names, got None", {"outputs": None}),
            (
                ValueError,
                r"logits: expected rows that share no memory with inplace_backward=True",
                {"logits": torch.randn(1, 3, 10).expand(2, 3, 10), "inplace_backward": True},
            ),
            (
                ValueError,
                r"share no memory with inplace_backward=True, got strides \[30, 5, 1\]",  # rows of 10 every 5
                {"logits": torch.randn(60).as_strided((2, 3, 10), (30, 5, 1)), "inplace_backward": True},
            ),
        ],
    )
    def test_message(self, error: type[Exception], message: str, arguments: dict[str, object]) -> None:
        with pytest.raises(error, match=message):
            fr.token_logprobs(**{"logits": self.logits, "labels": self.labels, **arguments})

    @pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.uint16, torch.uint32, torch.int32])
    def test_narrow_integers_are_fine(self, dtype: torch.dtype) -> None:
        """256 is no uint8 and 70,000 no int16, yet such labels may lie below them."""
        logits, labels = torch.randn(2, 70_000), torch.tensor([3, 127])
        expected = fr.token_logprobs(logits, labels, token_ids=labels, outputs=("logprobs", "id_logprobs"))
        narrow = labels.to(dtype)
        got = fr.token_logprobs(logits, narrow, token_ids=narrow, outputs=("logprobs", "id_logprobs"))
        assert torch.equal(got.logprobs, expected.logprobs)
        assert torch.equal(got.id_logprobs, expected.id_logprobs)

    def test_illegal_labels_under_the_mask_are_fine(self) -> None:
        labels = torch.tensor([[0, -100, 2], [3, 4, 1]])
        out = fr.token_logprobs(self.logits, labels, mask=labels != -100).logprobs
        assert out[0, 1] == 0

    def test_output_that_was_not_asked_for(self) -> None:
        with pytest.raises(AttributeError, match=r"entropy was not asked for; pass outputs="):
            fr.token_logprobs(self.logits, self.labels).entropy  # noqa: B018

    def test_second_backward_after_in_place_is_an_error(self) -> None:
        leaf = torch.randn(2, 9, requires_grad=True)
        out = fr.token_logprobs(leaf * 1, torch.tensor([1, 2]), inplace_backward=True).logprobs.sum()
        out.backward(retain_graph=True)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            out.backward()


def test_outputs_may_be_edited_before_the_backward() -> None:
    x, drop = torch.randn(3, 7, requires_grad=True), torch.tensor([True, False, False])
    stats = fr.token_logprobs(x, torch.tensor([1, 2, 3]), outputs=("logprobs", "label_logit"))
    stats.logprobs.masked_fill_(drop, 0.0)
    stats.label_logit.zero_()
    stats.logprobs.sum().backward()
    expected = torch.eye(7)[[1, 2, 3]] - x.detach().softmax(-1)
    assert torch.allclose(x.grad, expected.masked_fill(drop.unsqueeze(-1), 0.0), atol=1e-6)


@pytest.mark.parametrize("inplace", [False, True])
def test_second_derivatives_are_refused(inplace: bool) -> None:
    x = torch.randn(3, 7, requires_grad=True)
    out = fr.token_logprobs(x * 1, torch.tensor([1, 2, 3]), inplace_backward=inplace).logprobs.sum()
    with pytest.raises(NotImplementedError, match="double backward"):
        torch.autograd.grad(torch.autograd.grad(out, x, create_graph=True)[0].sum(), x)


@pytest.mark.parametrize("inputs", ["plain", "all"])
def test_opcheck(inputs: str) -> None:
    x, labels = torch.randn(4, 33, requires_grad=True), torch.randint(0, 33, (4,))
    extra = (
        (None, 1.0, None, None, None, None)
        if inputs == "plain"
        else (
            torch.rand(4) + 0.5,
            1.0,
            torch.tensor([True, False, True, True]),
            torch.rand(4, 33) > 0.2,
            None,
            torch.randint(0, 33, (4, 2)),
        )
    )
    torch.library.opcheck(torch.ops.fastreward.token_logprobs, (x, labels, *extra, 31, False, "cpu"))
    values, _, ids = torch.ops.fastreward.token_logprobs(x.detach(), labels, *extra, 31, False, "cpu")
    backward = (labels, *extra, values, ids, torch.randn_like(values), torch.randn_like(ids), "cpu")
    torch.library.opcheck(torch.ops.fastreward.token_logprobs_backward, (x.detach(), *backward))
    torch.library.opcheck(torch.ops.fastreward.token_logprobs_backward_, (x.detach(), *backward))


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("inplace", [False, True])
def test_compiles_in_one_graph(inplace: bool, dynamic: bool) -> None:
    def step(x: Tensor, labels: Tensor) -> Tensor:
        outputs = ("logprobs", "entropy")
        stats = fr.token_logprobs(x * 1.5, labels, temperature=0.8, outputs=outputs, inplace_backward=inplace)
        return (stats.logprobs - 0.1 * stats.entropy).sum()

    # 9 MB: gradients of this size come from kept memory, which tracing may not touch.
    x, labels = torch.randn(3, 5, 150_001, requires_grad=True), torch.randint(0, 65, (3, 5))
    (eager,) = torch.autograd.grad(step(x, labels), x)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    (grad,) = torch.autograd.grad(compiled(x, labels), x)
    assert torch.allclose(grad, eager, atol=1e-7)


def test_unchecked_ids_under_compile_touch_nothing_outside() -> None:
    """Traced code checks no values: a kept id that is no column counts as padding, as on a GPU."""

    def score(x: Tensor, keep: Tensor) -> Tensor:
        return fr.token_logprobs(x, torch.tensor([1]), kept_tokens=keep, outputs=("logprobs", "mean_logit")).logprobs

    x = torch.randn(1, 10, requires_grad=True)
    got = torch.compile(score, backend="eager")(x, torch.tensor([[1, 50_000_000, 2]]))
    assert torch.equal(got, score(x, torch.tensor([[1, 2, -1]])))
    (grad,) = torch.autograd.grad(got.sum(), x)
    assert grad.count_nonzero() == 2


def test_a_default_device_changes_nothing() -> None:
    """`torch.set_default_device` is for new tensors; results stay where the inputs are."""
    logits, labels, rewards = torch.randn(2, 9), torch.tensor([1, 2]), torch.randn(4)
    expected = fr.token_logprobs(logits, labels).logprobs
    advantages = fr.group_advantages(rewards, ["a", "a", "b", "b"])
    with torch.device("meta"):
        assert torch.equal(fr.token_logprobs(logits, labels).logprobs, expected)
        assert torch.equal(fr.group_advantages(rewards, ["a", "a", "b", "b"]), advantages)
        assert fr.policy_loss(logits, logits, rewards[:2], torch.ones_like(logits)).loss.device.type == "cpu"
        assert fr.whiten(logits).device.type == "cpu"
        hidden, weight = logits.new_ones(2, 3), logits.new_ones(9, 3)
        assert fr.linear_token_logprobs(hidden, weight, labels).logprobs.device.type == "cpu"


def test_an_array_beside_a_tensor_is_a_tensor() -> None:
    logits, labels = torch.randn(4, 20, requires_grad=True), torch.randint(0, 20, (4,))
    mixed = fr.token_logprobs(logits, labels.numpy()).logprobs
    mixed.sum().backward()
    assert logits.grad.any()


def test_numpy_in_numpy_out() -> None:
    np = pytest.importorskip("numpy")
    logits, labels = torch.randn(4, 20), torch.randint(0, 20, (4,))
    stats = fr.token_logprobs(logits.numpy(), labels.numpy(), outputs=("logprobs", "argmax"))
    assert isinstance(stats.logprobs, np.ndarray)
    assert np.array_equal(stats.logprobs, fr.token_logprobs(logits, labels).logprobs.numpy())
    frozen = logits.numpy().copy()
    frozen.flags.writeable = False
    assert np.array_equal(fr.token_logprobs(frozen, labels.numpy()).logprobs, stats.logprobs)


def test_the_old_name_of_kept_tokens() -> None:
    logits, labels = torch.randn(3, 10, generator=torch.Generator().manual_seed(0)), torch.tensor([1, 2, 3])
    ids = torch.tensor([[1, 5], [2, 4], [3, 0]])
    with pytest.warns(DeprecationWarning, match="keep: is called kept_tokens now"):
        old = fr.token_logprobs(logits, labels, keep=ids).logprobs
    assert torch.equal(old, fr.token_logprobs(logits, labels, kept_tokens=ids).logprobs)
    with pytest.raises(ValueError, match="keep: is the old name of kept_tokens"):
        fr.token_logprobs(logits, labels, keep=ids, kept_tokens=ids)

"""linear_divergence: token_divergence of the full logits, in values and gradients, some rows at a time."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from divergence_formulas import FORMULAS, gradients
from torch import Tensor

import fastreward as fr
from fastreward.verify import eager

N, H, G, V = 13, 24, 40, 301
MASK = torch.arange(N) % 3 != 1
ALL = ("entropy", "teacher_entropy", "logprobs", "top1_agreement")


def heads(dtype: torch.dtype = torch.float32) -> tuple[list[Tensor], list[Tensor]]:
    """hidden, weight, bias of the student, and of a teacher of another width."""
    student = [torch.randn(N, H), torch.randn(V, H) * 0.5, torch.randn(V)]
    teacher = [torch.randn(N, G), torch.randn(V, G) * 0.4, torch.randn(V)]
    return [x.to(dtype).requires_grad_() for x in student], [x.to(dtype) for x in teacher]


def logits_of(
    side: list[Tensor], scale: float = 1.0, softcap: float | None = None, dtype: torch.dtype = torch.float32
) -> Tensor:
    """In float64; dtype: what a GEMM of low precision would have rounded them to."""
    hidden, weight, *bias = (x.double() for x in side)
    logits = hidden @ weight.t()
    if dtype != torch.float32:
        logits = logits + (logits.to(dtype) - logits).detach()
    logits = (logits + (bias[0] if bias else 0.0)) * scale
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def leaves_of(side: list[Tensor]) -> list[Tensor]:
    return [x.detach().double().requires_grad_() for x in side]


def assert_near(found: Tensor, right: Tensor, dtype: torch.dtype) -> None:
    """Within float32's rounding, or that of logits in bfloat16, of the largest."""
    share = 5e-6 if dtype == torch.float32 else 0.03
    found, right = found.detach(), right.detach()
    torch.testing.assert_close(found.double(), right.double(), rtol=share, atol=share * float(right.abs().max()))


@pytest.mark.parametrize("chunk_size", [None, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", FORMULAS)
def test_equals_that_of_full_logits(name: str, dtype: torch.dtype, chunk_size: int | None) -> None:
    student, teacher = heads(dtype)
    found = fr.linear_divergence(*student[:2], *teacher[:2], divergence=name, temperature=0.8, chunk_size=chunk_size)
    exact = leaves_of(student[:2])
    logits = (logits_of(side, dtype=dtype) for side in (exact, teacher[:2]))
    truth = eager.token_divergence(*logits, name, temperature=0.8)["divergence"]
    assert_near(found.divergence, truth, dtype)
    for ours, right in zip(gradients(found.divergence, *student[:2]), gradients(truth, *exact), strict=True):
        assert ours.dtype == dtype
        assert_near(ours, right, dtype)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("ids", [False, True])
def test_every_option_of_the_heads(ids: bool, backend: str) -> None:
    student, teacher = heads()
    labels, temperature = torch.randint(0, V, (N,)), torch.linspace(0.5, 2, N)
    options: dict[str, Any] = {"divergence": "jsd", "labels": labels, "mask": MASK, "temperature": temperature}
    options |= {"teacher_temperature": 1.3} | ({"token_ids": torch.rand(N, V).topk(9).indices} if ids else {})
    with fr.backend(backend):  # type: ignore[arg-type]
        found = fr.linear_divergence(
            *student[:2], *teacher[:2], bias=student[2], teacher_bias=teacher[2], logit_scale=0.7, softcap=6.0,
            teacher_logit_scale=1.2, teacher_softcap=8.0, outputs=ALL, chunk_size=4, **options,
        )  # fmt: skip
        total = found.divergence + 0.3 * found.entropy - 0.2 * found.logprobs  # type: ignore[operator]
        own = gradients(total, *student)
    exact = leaves_of(student)
    sides = logits_of(exact, 0.7, 6.0), logits_of(teacher, 1.2, 8.0)
    truth = eager.token_divergence(*sides, **options)
    for name in ("divergence", *ALL[:3]):
        assert_near(getattr(found, name), truth[name], torch.float32)
    agreement = (sides[0].argmax(-1) == sides[1].argmax(-1)) & MASK
    assert torch.equal(found.top1_agreement, agreement.float())
    right = gradients(truth["divergence"] + 0.3 * truth["entropy"] - 0.2 * truth["logprobs"], *exact)
    for ours, wanted in zip(own, right, strict=True):
        assert_near(ours, wanted, torch.float32)


@pytest.mark.parametrize("tail", [True, False])
def test_the_teacher_as_its_log_probs(tail: bool) -> None:
    student, teacher = heads()
    ids = torch.rand(N, V).topk(9).indices
    logprobs = logits_of(teacher[:2]).log_softmax(-1).gather(-1, ids).float()
    found = fr.linear_divergence(*student[:2], token_ids=ids, teacher_logprobs=logprobs, tail=tail).divergence
    exact = leaves_of(student[:2])
    truth = eager.token_divergence(
        logits_of(exact), logits_of(teacher[:2]), "reverse-kl", token_ids=ids, tail=tail
    )["divergence"]  # fmt: skip
    assert_near(found, truth, torch.float32)
    for ours, right in zip(gradients(found, *student[:2]), gradients(truth, *exact), strict=True):
        assert_near(ours, right, torch.float32)


def test_dtypes_of_their_own() -> None:
    student, teacher = heads()[0][:2], heads(torch.bfloat16)[1][:2]
    found = fr.linear_divergence(*student, *teacher, divergence="jsd").divergence
    truth = eager.token_divergence(logits_of(student), logits_of(teacher), "jsd")["divergence"]
    assert_near(found, truth, torch.bfloat16)


@pytest.mark.parametrize("ids", [None, torch.tensor([5, 200, 17])])
def test_masked_rows_cost_nothing_and_give_nothing(ids: Tensor | None) -> None:
    student, teacher = ([x.detach() for x in side[:2]] for side in heads())
    student[0][~MASK], teacher[0][~MASK] = torch.nan, torch.inf
    leaves = [x.requires_grad_() for x in student]
    whole = fr.linear_divergence(*leaves, *teacher, divergence="jsd", mask=MASK, token_ids=ids).divergence
    assert (whole[~MASK] == 0).all()
    alone = fr.linear_divergence(
        leaves[0][MASK], leaves[1], teacher[0][MASK], teacher[1], divergence="jsd", token_ids=ids
    ).divergence
    assert torch.equal(whole[MASK], alone)
    upstream = torch.rand(N)
    for first, second in zip(
        torch.autograd.grad((whole * upstream).sum(), leaves),
        torch.autograd.grad((alone * upstream[MASK]).sum(), leaves),
        strict=True,
    ):
        assert torch.equal(first, second)
    nothing = fr.linear_divergence(*leaves, *teacher, mask=torch.zeros(N), token_ids=ids).divergence
    assert not nothing.any()
    assert not any(g.any() for g in torch.autograd.grad(nothing.sum(), leaves))


def test_shapes_and_only_the_needed_gradients() -> None:
    student, teacher = heads()
    hidden, other = student[0][:12].reshape(3, 4, H), teacher[0][:12].reshape(3, 4, G)
    found = fr.linear_divergence(hidden, student[1].detach(), other, teacher[1], outputs=("entropy",))
    assert found.divergence.shape == (3, 4)
    flat = fr.linear_divergence(student[0][:12], student[1], teacher[0][:12], teacher[1])
    assert torch.equal(found.divergence.flatten(), flat.divergence)
    found.divergence.sum().backward()
    assert student[0].grad is not None
    assert student[1].grad is None
    assert fr.linear_divergence(hidden[:, :0], student[1], other[:, :0], teacher[1]).divergence.shape == (3, 0)


@pytest.mark.parametrize("softcap", [None, 5.0])
def test_never_more_than_some_rows_of_logits(softcap: float | None) -> None:
    rows, vocab, few = 256, 5_000, 16
    hidden, weight = torch.randn(rows, 8, requires_grad=True), torch.randn(vocab, 8)
    teacher = torch.randn(rows, 6), torch.randn(vocab, 6)
    with torch.profiler.profile(profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        fr.linear_divergence(hidden, weight, *teacher, softcap=softcap, chunk_size=few).divergence.sum().backward()
    sizes = [event.nbytes() for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    assert max(sizes) == few * vocab * 4


def test_outputs_may_be_edited_before_the_backward() -> None:
    student, teacher = heads()
    (expected,) = gradients(fr.linear_divergence(*student[:2], *teacher[:2]).divergence, student[0])
    found = fr.linear_divergence(*student[:2], *teacher[:2]).divergence
    kept = found * 1
    found.detach().zero_()
    assert torch.equal(gradients(kept, student[0])[0], expected)


def test_autocast_runs_the_gemms_in_its_dtype() -> None:
    student, teacher = heads()
    exact = fr.linear_divergence(*student[:2], *teacher[:2], divergence="jsd").divergence
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = fr.linear_divergence(*student[:2], *teacher[:2], divergence="jsd").divergence
    assert 0 < (low - exact).abs().max() < 0.1


def test_opcheck(monkeypatch: pytest.MonkeyPatch) -> None:
    """On what the public function gives the op, and the op its backward."""
    module = importlib.import_module("fastreward.linear_divergence")
    seen: dict[str, tuple[Any, ...]] = {}
    for name in ("_linear_divergence", "_linear_divergence_backward"):
        op = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *args, op=op, name=name: seen.setdefault(name, args) and op(*args))
    student, teacher = heads()
    fr.linear_divergence(*student[:2], *teacher[:2], softcap=3.0, outputs=("entropy",)).divergence.sum().backward()
    for name, given in seen.items():
        backward = name.endswith("backward")  # is not differentiated itself
        args = tuple(x.detach() if backward and isinstance(x, Tensor) else x for x in given)
        torch.library.opcheck(getattr(torch.ops.fastreward, name.removeprefix("_")), args)
    assert len(seen) == 2


HIDDEN, WEIGHT = torch.randn(4, H), torch.randn(V, H)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"teacher_hidden": None, "teacher_weight": None}, "teacher_hidden: expected, or token_ids with"),
        ({"teacher_weight": None}, "teacher_weight: goes with teacher_hidden"),
        ({"teacher_weight": WEIGHT[:9]}, r"teacher_weight: expected shape \[301, 24\] \(V of weight\)"),
        ({"teacher_weight": WEIGHT[:, :5]}, r"teacher_weight: expected shape \[V, 24\] \(teacher_hidden's last"),
        ({"teacher_hidden": HIDDEN[:3]}, r"teacher_hidden: expected shape \[4, 24\] \(hidden's"),
        ({"teacher_hidden": HIDDEN.bfloat16()}, "teacher_weight: expected teacher_hidden's dtype"),
        ({"teacher_bias": torch.zeros(3)}, r"teacher_bias: expected shape \[301\]"),
        ({"teacher_hidden": HIDDEN.clone().requires_grad_()}, "teacher_hidden: expected a constant"),
        ({"teacher_weight": WEIGHT.clone().requires_grad_()}, "teacher_weight: expected a constant"),
        ({"teacher_softcap": -1.0}, "teacher_softcap: expected a positive number"),
        ({"teacher_temperature": 0.0}, "teacher_temperature: expected a positive number"),
        ({"teacher_temperature": 0.0, "token_ids": torch.tensor([1])}, "teacher_temperature: expected a positive"),
        ({"token_ids": torch.tensor([1, 1])}, "token_ids: expected ids unique within a row"),
        ({"token_ids": torch.tensor([1]), "teacher_logprobs": torch.zeros(4, 1)}, "teacher_logprobs: stand for"),
        ({"chunk_size": 0}, "chunk_size: expected a positive number of tokens"),
        ({"divergence": "kl"}, "divergence: expected one of"),
        ({"labels": torch.full((4,), V), "outputs": ("logprobs",)}, r"labels: expected integers in \[0, 301\)"),
    ],
)
def test_messages(change: dict[str, Any], message: str) -> None:
    call: Callable[..., object] = fr.linear_divergence
    given = {"hidden": HIDDEN, "weight": WEIGHT, "teacher_hidden": HIDDEN, "teacher_weight": WEIGHT}
    with pytest.raises((TypeError, ValueError), match=message):
        call(**given | change)

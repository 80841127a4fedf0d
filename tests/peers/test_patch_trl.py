"""The TRL drop-in: the same training run, the same gradients, every binding exchanged and put back."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import math
import random
import subprocess
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from checkout import ROOT
from compat import largest

pytest.importorskip("trl")
pytest.importorskip("reasoning_gym")
# What trl, datasets, transformers and accelerate warn about on import and in a run is theirs.
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]

from rich.console import Console  # noqa: E402

from fastreward import patch  # noqa: E402
from fastreward.patch import bindings, measure  # noqa: E402
from fastreward.patch.trl import scores  # noqa: E402
from fastreward.patch.trl.versions import supported_version  # noqa: E402

VERSION, SEAMS = supported_version()
of_choice = pytest.mark.skipif(SEAMS.pair, reason="TRL 1.14's head has no choice of outputs")
UTILS = "trl.trainer.utils"
FUNCTIONS = ("selective_log_softmax", "entropy_from_logits", "selective_log_softmax_and_entropy")
REBOUND = ("_ChunkedLogProbFunction", *(("_use_triton",) if SEAMS.compact else ()), *FUNCTIONS)
COMPARED = {"reward", "reward_std", "kl", "entropy", "grad_norm", "policy_loss", "clip_ratio/region_mean"}
OUTPUTS = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1")


@pytest.fixture(scope="module")
def training() -> Any:
    """demo/training.py: the model, task and trainer that the demo uses."""
    spec = importlib.util.spec_from_file_location("demo_training", ROOT / "demo" / "training.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["demo_training"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def utils() -> Any:
    return importlib.import_module("trl.trainer.utils")


@pytest.fixture(autouse=True)
def _unpatched() -> Iterator[None]:
    yield
    patch.undo()


# ---- a training run, stock and patched -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def warm(training: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any, Any]:
    """A checkpoint that earns some reward, its tokenizer and its task."""
    tokenizer = training.build_tokenizer(1024)
    assert all(tokenizer.decode([i]) for i in range(1024))
    task = training.Task.create(200, min_length=4, max_length=8)
    model = training.build_model(tokenizer, hidden=64)
    losses = list(training.warm_up(model, tokenizer, task, steps=120))
    assert losses[-1] < 0.6 * losses[0]
    checkpoint = tmp_path_factory.mktemp("warm")
    model.save_pretrained(checkpoint)
    return checkpoint, tokenizer, task


@pytest.mark.parametrize(
    ("method", "steps", "options"),
    [
        pytest.param("grpo", 8, {"beta": 0.0}, id="grpo"),
        pytest.param("grpo", 8, {"beta": 0.1}, id="grpo-kl"),
        pytest.param(
            "grpo",
            8,
            {"entropy_coef": 0.02, "num_iterations": 2, "temperature": 0.9, "scale_rewards": "batch"},
            id="ratio",
        ),
        pytest.param("rloo", 4, {"beta": 0.05, "num_iterations": 2}, id="rloo"),
    ],
)
def test_training_gives_the_same_numbers(
    training: Any, warm: tuple[Path, Any, Any], method: str, steps: int, options: dict[str, Any]
) -> None:
    def run() -> list[Any]:
        return training.train(
            *warm, method=method, steps=steps, max_completion=10, learning_rate=1e-3, seed=3, **options
        )

    stock = run()
    report = patch.trl()
    patched = run()
    assert patch.status() == {"trl": report}
    assert "replaced  trl.trainer.utils._ChunkedLogProbFunction -> fastreward.linear_token_logprobs: " in str(report)
    assert len(stock) == len(patched) == steps
    for before, after in zip(stock, patched, strict=True):
        assert after.completions == before.completions, "the rollouts must be the same for a comparison"
        if "reward" in before.metrics:  # steps that sampled; the others reuse their rollouts
            assert before.metrics["reward_std"] > 0.01
            assert before.metrics["frac_reward_zero_std"] < 1
            assert before.metrics["reward"] > 0.05
        assert before.metrics["grad_norm"] > 1e-3
        assert before.metrics["entropy"] > 0.1
        # RLOO's loss is zero while the ratio is one (its advantages sum to zero), so there it is all rounding.
        assert after.loss == pytest.approx(before.loss, rel=1e-4, abs=1e-6 if method == "rloo" else 0)
        assert after.metrics.keys() == before.metrics.keys()
        for name in COMPARED & before.metrics.keys():
            assert after.metrics[name] == pytest.approx(before.metrics[name], rel=1e-4), name
    assert "reward" in stock[0].metrics
    assert max(abs(step.loss) for step in stock) > 1e-3
    if options.get("beta"):
        assert max(step.metrics.get("kl", 0) for step in stock) > 1e-4


# ---- the fused head --------------------------------------------------------------------------------------------------


def head_arguments(dtype: torch.dtype = torch.float32, n: int = 37, bias: bool = True) -> list[Any]:
    """hidden, weight, bias, targets."""
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(n, 24, generator=generator).to(dtype).requires_grad_()
    weight = (torch.randn(403, 24, generator=generator) / 3).to(dtype).requires_grad_()
    offsets = torch.randn(403, generator=generator).to(dtype).requires_grad_() if bias else None
    return [hidden, weight, offsets, torch.randint(403, (n,), generator=generator)]


def head_gradients(result: tuple[Any, ...], arguments: list[Any]) -> tuple[torch.Tensor, ...]:
    """Gradients under upstream gradients that differ from token to token, through log-probs and entropy."""
    upstream = torch.linspace(-1, 1, result[0].numel())
    loss = (result[0] * upstream).sum() + (0 if result[1] is None else (result[1] * upstream.cos()).sum())
    return torch.autograd.grad(loss, [x for x in arguments[:3] if x is not None])


def named(*outputs: str) -> tuple[Any, ...]:
    """The last argument of the head, where it takes one."""
    return () if SEAMS.pair else (("log_probs", *outputs),)


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("outputs", [("entropy",)] if SEAMS.pair else [(), ("entropy",), OUTPUTS])
def test_head_equals_trl(utils: Any, outputs: tuple[str, ...], softcap: float | None) -> None:
    arguments = head_arguments()
    settings = (0.7, 128, softcap, 1.3, *named(*outputs))
    expected = utils._ChunkedLogProbFunction.apply(*arguments, *settings)
    patch.trl()
    found = utils._ChunkedLogProbFunction.apply(*arguments, *settings)
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours is None) == (theirs is None)
        if theirs is not None:
            assert ours.dtype == theirs.dtype
    name, gradients = f"{UTILS}._ChunkedLogProbFunction", [head_gradients(x, arguments) for x in (found, expected)]
    largest(name, list(found), list(expected), rtol=1e-5, atol=1e-5)
    largest(name, *map(list, gradients), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("autocast", [False, True])
def test_head_in_bf16_is_as_close_as_trl(utils: Any, autocast: bool) -> None:
    """By the root of the mean square: which single element is furthest off is luck where bf16 rounds the inputs."""
    arguments = head_arguments(torch.float32 if autocast else torch.bfloat16)
    exact = [x.detach().double().requires_grad_() for x in arguments[:3]]
    logits = torch.nn.functional.linear(*exact)
    truth = logits.log_softmax(-1)[torch.arange(37), arguments[3]]
    true_gradients = torch.autograd.grad((truth * torch.linspace(-1, 1, 37)).sum(), exact)

    def errors() -> list[float]:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            result = utils._ChunkedLogProbFunction.apply(*arguments, 1.0, 128, None, 1.0, *named())
        gradients = head_gradients((result[0], None), arguments)
        assert result[0].dtype == torch.float32
        assert [g.dtype for g in gradients] == [x.dtype for x in arguments[:3]]
        pairs = [(result[0], truth), *zip(gradients, true_gradients, strict=True)]
        return [float((a.double() - b).detach().square().mean().sqrt()) for a, b in pairs]

    theirs = errors()
    patch.trl()
    for ours, limit in zip(errors(), theirs, strict=True):
        assert ours <= 1.05 * limit + 1e-6


def test_frozen_parts_get_no_gradient_and_no_tokens_still_give_one(utils: Any) -> None:
    patch.trl()
    hidden, weight, _, targets = head_arguments(bias=False)
    logprobs, *_ = utils._ChunkedLogProbFunction.apply(hidden, weight.detach(), None, targets, 1.0, 128)
    assert torch.autograd.grad(logprobs.sum(), hidden)[0].abs().sum() > 0
    logprobs, *_ = utils._ChunkedLogProbFunction.apply(hidden[:0], weight, None, targets[:0], 1.0, 128)
    for gradient in torch.autograd.grad(logprobs.sum(), (hidden, weight)):
        assert torch.count_nonzero(gradient) == 0


@of_choice
def test_only_labelled_rows_are_projected(
    utils: Any, training: Any, monkeypatch: pytest.MonkeyPatch, warm: tuple[Path, Any, Any]
) -> None:
    model = training.Qwen2ForCausalLM.from_pretrained(warm[0])
    utils.add_fused_lm_head(model, outputs=("log_probs", "entropy", "is_top1"))
    tokens = torch.arange(36).reshape(2, 18)
    labels = tokens.clone()
    labels[:, :11] = -100
    with torch.no_grad():
        expected = model(input_ids=tokens, labels=labels, fused_lm_head=True)
    patch.trl()
    rows = []
    ours = utils._ChunkedLogProbFunction.apply
    monkeypatch.setattr(
        utils._ChunkedLogProbFunction, "apply", lambda hidden, *rest: rows.append(len(hidden)) or ours(hidden, *rest)
    )
    found = model(input_ids=tokens, labels=labels, fused_lm_head=True)
    assert rows == [14]
    for name in ("log_probs", "entropy"):
        torch.testing.assert_close(found[name].detach(), expected[name], rtol=1e-5, atol=1e-5)
    assert torch.equal(found.is_top1, expected.is_top1)
    empty = model(input_ids=tokens, labels=torch.full_like(labels, -100), fused_lm_head=True)
    empty.loss.backward()
    assert all(torch.count_nonzero(p.grad) == 0 for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("kind", ["float64", "ZeRO-3"])
def test_heads_that_are_left_to_trl_are_told(utils: Any, kind: str) -> None:
    arguments = head_arguments()
    if kind == "ZeRO-3":
        arguments[1].ds_id = 7
    else:
        arguments[:3] = [x.detach().double().requires_grad_() for x in arguments[:3]]
    expected = utils._ChunkedLogProbFunction.apply(*arguments, 1.0, 128)
    report = patch.trl()
    with pytest.warns(RuntimeWarning, match=kind):
        found = utils._ChunkedLogProbFunction.apply(*arguments, 1.0, 128)
    assert torch.equal(found[0], expected[0])
    utils._ChunkedLogProbFunction.apply(*arguments, 1.0, 128)  # said once
    assert any(kind in entry.target for entry in report.kept)


# ---- whole logits ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("count", [None, 3])
def test_selective_log_softmax(utils: Any, count: int | None, masked: bool, dtype: torch.dtype) -> None:
    whole = torch.randn(3, 9, 301, dtype=torch.float64).mul(3).to(dtype)
    logits = whole[:, :-1].detach().requires_grad_()  # the strides of a trainer's shifted logits
    index = torch.randint(301, (3, 8) if count is None else (3, 8, count))
    mask = (torch.rand(index.shape) > 0.3).long() if masked else None
    expected = utils.selective_log_softmax(logits, index, 0.8, mask)
    patch.trl()
    found = utils.selective_log_softmax(logits, index, 0.8, row_mask=mask)
    assert found.dtype == expected.dtype == dtype
    assert found.shape == index.shape
    upstream = torch.linspace(-1, 1, found.numel()).reshape(found.shape)
    gradients = [torch.autograd.grad((x.float() * upstream).sum(), logits)[0] for x in (found, expected)]
    if dtype == torch.float32:
        largest(f"{UTILS}.selective_log_softmax", found, expected, rtol=1e-5, atol=1e-5)
        largest(f"{UTILS}.selective_log_softmax", *gradients, rtol=1e-4, atol=1e-5)
        return
    truth = (logits.detach().double() / 0.8).log_softmax(-1).gather(-1, index.reshape(3, 8, -1)).reshape(index.shape)
    truth = truth if mask is None else truth * mask
    assert (found.double() - truth).abs().max() <= (expected.double() - truth).abs().max()
    assert gradients[0].dtype == dtype


@pytest.mark.parametrize("requires_grad", [False, True])
def test_entropy(utils: Any, requires_grad: bool) -> None:
    logits = torch.randn(2, 7, 211).mul(2).requires_grad_()
    index = torch.randint(211, (2, 7))
    mask = torch.rand(2, 7) > 0.3
    arguments = (logits, index, requires_grad, 1.7, mask)
    expected = (*utils.selective_log_softmax_and_entropy(*arguments), utils.entropy_from_logits(logits))
    patch.trl()
    found = (*utils.selective_log_softmax_and_entropy(*arguments), utils.entropy_from_logits(logits))
    names = ("selective_log_softmax_and_entropy",) * 2 + ("entropy_from_logits",)
    for name, ours, theirs in zip(names, found, expected, strict=True):
        assert ours.requires_grad == theirs.requires_grad
        largest(f"{UTILS}.{name}", ours, theirs, rtol=1e-5, atol=1e-5)
    gradients = [torch.autograd.grad(sum(x.square().sum() for x in r), logits)[0] for r in (found, expected)]
    largest(f"{UTILS}.{names[0]}", *gradients, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_exact_is_bitwise_trl(utils: Any, dtype: torch.dtype) -> None:
    logits = torch.randn(4, 6, 977).mul(4).to(dtype).requires_grad_()
    index = torch.randint(977, (4, 6))

    def everything() -> list[torch.Tensor]:
        found = [utils.selective_log_softmax(logits, index, 0.9), utils.entropy_from_logits(logits)]
        found += utils.selective_log_softmax_and_entropy(logits, index)
        return [*found, torch.autograd.grad(sum(x.float().sum() for x in found), logits)[0]]

    expected = everything()
    patch.trl()
    rounded_once = everything()
    assert not torch.equal(rounded_once[0], expected[0])
    report = patch.trl(exact=True)
    assert any("exact" in entry.why for entry in report.kept)
    for ours, theirs in zip(everything(), expected, strict=True):
        assert torch.equal(ours, theirs)


def test_what_is_not_served_goes_to_trl(utils: Any) -> None:
    logits, index = torch.randn(2, 5, 31, dtype=torch.float64), torch.randint(31, (2, 5))
    strided = torch.randn(2, 31, 5).transpose(1, 2)
    expected = [
        f(x, index)
        for f in (utils.selective_log_softmax, utils.selective_log_softmax_and_entropy)
        for x in (logits, strided)
    ]
    patch.trl()
    found = [
        f(x, index)
        for f in (utils.selective_log_softmax, utils.selective_log_softmax_and_entropy)
        for x in (logits, strided)
    ]
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


# What a caller may give, as functions of (leading shape, vocabulary). Most are usual, some only TRL takes or refuses.
LEADING = [(3, 4), (5,), (2, 1, 3), (1, 4), (0, 4), ()]
DTYPES = [torch.float32, torch.float32, torch.float32, torch.bfloat16, torch.float64]
LAYOUTS: list[Callable[[torch.Tensor], torch.Tensor]] = [
    lambda x: x,
    lambda x: torch.cat([x, x], -2)[..., : x.shape[-2], :] if x.ndim > 1 else x,
    lambda x: x.transpose(-1, -2).contiguous().transpose(-1, -2) if x.ndim > 1 else x,
    lambda x: x[..., :1, :].expand_as(x) if x.ndim > 1 and x.shape[-2] else x,
]
INDICES: list[Callable[..., torch.Tensor]] = [
    lambda lead, vocab: torch.randint(vocab, lead),
    lambda lead, vocab: torch.randint(vocab, (*lead, 3)),
    lambda lead, vocab: torch.randint(vocab, (*lead, 1)),
    lambda lead, vocab: torch.randint(vocab, (*lead, 0)),
    lambda lead, vocab: torch.randint(vocab, (1, *lead[1:])),
    lambda lead, vocab: (
        torch.randint(vocab, (1, *lead[1:])).expand(lead) if lead else torch.zeros((), dtype=torch.long)
    ),
    lambda lead, vocab: torch.randint(vocab, lead[1:]),
]
MASKS: list[Callable[..., torch.Tensor | None]] = [
    lambda shape: None,
    lambda shape: (torch.rand(shape) > 0.4).long(),
    lambda shape: torch.rand(shape) > 0.4,
    lambda shape: (torch.rand(shape) > 0.4).double(),
    lambda shape: torch.rand((1, *shape[1:])) > 0.4,
    lambda shape: torch.rand(shape[-1:]) > 0.4,
    lambda shape: torch.tensor(1),
]
TEMPERATURES: list[Callable[[], Any]] = [
    lambda: 1.0,
    lambda: 0.7,
    lambda: 2,
    lambda: torch.tensor(0.7),
    lambda: torch.tensor(0.7, dtype=torch.float64),
    lambda: torch.tensor(0.7, requires_grad=True),
    lambda: torch.tensor([0.7]),
    lambda: math.nan,
    lambda: math.inf,
    lambda: 0.0,
    lambda: -1.0,
    lambda: torch.tensor(0.0),
]


def outcome(function: Callable[..., Any], logits: torch.Tensor, arguments: tuple[Any, ...]) -> list[Any] | Exception:
    """Results, their upstream-weighted gradients (of the logits, and of a temperature that has one), or the error."""
    try:
        found = function(logits, *arguments)
    except (ValueError, RuntimeError, IndexError, TypeError) as error:
        return error
    results = [found] if isinstance(found, torch.Tensor) else list(found)
    leaves = [x for x in (logits, *arguments) if isinstance(x, torch.Tensor) and x.requires_grad]
    differentiable = [x for x in results if x.requires_grad]
    if leaves and differentiable:
        total = sum((x.double() * torch.linspace(-1, 2, x.numel()).reshape(x.shape)).sum() for x in differentiable)
        results += torch.autograd.grad(total, leaves, allow_unused=True)
    return results


def assert_same(ours: list[Any] | Exception, theirs: list[Any] | Exception) -> None:
    """What TRL answers, fastreward answers; where TRL refuses, it need not."""
    if isinstance(theirs, Exception):
        assert not isinstance(theirs, ValueError) or (type(ours), str(ours)) == (type(theirs), str(theirs))
        return
    assert not isinstance(ours, Exception), f"{type(ours).__name__}: {ours}"
    for a, b in zip(ours, theirs, strict=True):
        if b is None or a is None:
            assert a is b
            continue
        assert (a.shape, a.dtype, a.requires_grad) == (b.shape, b.dtype, b.requires_grad)
        tolerance = 0.1 if a.dtype == torch.bfloat16 else 2e-5
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance, equal_nan=True)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_replacement_takes_all_that_the_original_takes(utils: Any, name: str, exact: bool) -> None:
    torch.set_num_threads(1)
    original = getattr(utils, name)
    patch.trl(exact=exact)
    replacement, choose = getattr(utils, name), random.Random(1)
    answered = 0
    for case in range(200):
        torch.manual_seed(case)
        lead, dtype, vocab = choose.choice(LEADING), choose.choice(DTYPES), choose.choice((1, 17, 40))
        leaf = torch.randn(*lead, vocab).to(dtype).requires_grad_(choose.random() < 0.7)
        logits = choose.choice(LAYOUTS)(leaf)
        arguments: tuple[Any, ...] = (choose.choice((1, 7, 128)),)
        if name != "entropy_from_logits":
            usual = choose.random() < 0.4  # else hardly a case has no oddity at all
            index = INDICES[0 if usual else choose.randrange(len(INDICES))](lead, vocab)
            mask = choose.choice(MASKS[: 4 if usual else None])(tuple(index.shape))
            arguments = (index, choose.choice(TEMPERATURES[: 5 if usual else None])(), mask)
        if name == "selective_log_softmax_and_entropy":
            arguments = (arguments[0], choose.random() < 0.5, *arguments[1:])
        theirs = outcome(original, logits, arguments)
        assert_same(outcome(replacement, logits, arguments), theirs)
        answered += not isinstance(theirs, Exception)
    assert answered > 80


@pytest.mark.parametrize(
    ("index", "mask", "temperature"),
    [
        ((1, 4), None, 1.0),
        ((3, 4), (1, 4), 1.0),
        ((3, 4, 2), None, 0.7),
        ((3, 4, 2), (1, 4, 1), 0.7),
        ((3, 4), (3, 4), torch.tensor(0.7)),
        ((3, 4), (3, 4), torch.tensor(0.7, requires_grad=True)),
    ],
)
def test_what_broadcasts(
    utils: Any, index: tuple[int, ...], mask: tuple[int, ...] | None, temperature: float | torch.Tensor
) -> None:
    logits = torch.randn(3, 4, 11, requires_grad=True)
    arguments = (torch.randint(11, index), temperature, None if mask is None else torch.rand(mask) > 0.4)
    theirs = outcome(utils.selective_log_softmax, logits, arguments)
    assert not isinstance(theirs, Exception)
    patch.trl()
    assert_same(outcome(utils.selective_log_softmax, logits, arguments), theirs)


@pytest.mark.parametrize("name", ["selective_log_softmax", "entropy_from_logits", "selective_log_softmax_and_entropy"])
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
def test_transforms_go_to_trl(utils: Any, name: str) -> None:
    logits, index = torch.randn(3, 4, 11), torch.randint(11, (3, 4))
    arguments = () if name == "entropy_from_logits" else (index,)

    def found() -> tuple[Any, Any]:
        function = getattr(utils, name)
        batched = torch.func.vmap(function)(logits, *arguments)
        return batched, torch.func.jvp(lambda x: function(x, *arguments), (logits,), (torch.ones_like(logits),))

    theirs = found()
    patch.trl()
    torch.testing.assert_close(found(), theirs)


def test_logits_without_data_and_of_other_kinds_go_to_trl(utils: Any) -> None:
    class Tagged(torch.Tensor):
        pass

    patch.trl()
    meta = torch.empty(2, 3, 7, device="meta")
    assert utils.selective_log_softmax(meta, torch.empty(2, 3, dtype=torch.long, device="meta")).shape == (2, 3)
    assert utils.entropy_from_logits(meta).device.type == "meta"
    tagged = torch.randn(2, 3, 7).as_subclass(Tagged)
    assert isinstance(utils.selective_log_softmax(tagged, torch.zeros(2, 3, dtype=torch.long)), Tagged)
    head = utils._ChunkedLogProbFunction
    arguments = head_arguments()
    tensor = [] if VERSION.startswith("1.15.") else [(torch.tensor(0.7), 128)]  # that one's own is a kernel of numbers
    for settings in ((-0.7, 128), *tensor, (0.7, 128, 0.0)):
        expected, found = head.stock.apply(*arguments, *settings), head.apply(*arguments, *settings)
        torch.testing.assert_close(found[0], expected[0], rtol=1e-5, atol=1e-5)


@of_choice
def test_no_gradient_flows_through_what_trl_holds_for_constants(utils: Any) -> None:
    """TRL's WPO weights read log_sum_sq_probs; a gradient through them would be another loss."""
    arguments = head_arguments()
    settings = (0.7, 128, None, 1.0, OUTPUTS)
    stock = utils._ChunkedLogProbFunction
    patch.trl()
    gradients = []
    for head in (stock, utils._ChunkedLogProbFunction):
        logprobs, entropy, log_sum_sq_probs, mean_logits, is_top1 = head.apply(*arguments, *settings)
        assert logprobs.requires_grad
        assert entropy.requires_grad
        assert not any(x.requires_grad for x in (log_sum_sq_probs, mean_logits, is_top1))
        weight = (logprobs.detach() - 0.5 * log_sum_sq_probs + mean_logits).exp().clamp(max=2.0)
        gradients.append(torch.autograd.grad((weight * logprobs).sum(), arguments[:3]))
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


# ---- bindings --------------------------------------------------------------------------------------------------------


def test_every_binding_is_exchanged_and_restored(utils: Any) -> None:
    importlib.import_module("trl.experimental.orpo.orpo_trainer")  # binds selective_log_softmax by name
    trainers = [importlib.import_module(f"trl.trainer.{name}_trainer") for name in ("grpo", "dpo", "kto")]
    theirs = {name: getattr(utils, name) for name in REBOUND}
    homes = {name: list(bindings.bindings("trl", theirs[name])) for name in FUNCTIONS}
    assert len(homes["selective_log_softmax"]) >= 2
    kernels = importlib.import_module("trl.kernels")
    nanstd = utils.nanstd

    patch.trl()
    for name in REBOUND:
        assert getattr(utils, name) is not theirs[name]
    for name in FUNCTIONS:
        assert not list(bindings.bindings("trl", theirs[name]))
        assert all(vars(module)[bound] is getattr(utils, name) for module, bound in homes[name])
    if SEAMS.pair:
        assert all(trainer._ChunkedLogProbFunction is utils._ChunkedLogProbFunction for trainer in trainers)
    else:
        assert kernels.ChunkedLogProbFunction is theirs["_ChunkedLogProbFunction"]
    if SEAMS.compact:
        assert kernels.chunked_logprob._use_triton is theirs["_use_triton"]
    assert utils.nanstd is nanstd  # group statistics stay TRL's

    late = types.ModuleType("trl.imported_later")
    late.mine = utils.entropy_from_logits  # type: ignore[attr-defined]
    sys.modules["trl.imported_later"] = late
    try:
        patch.undo()
        assert late.mine is theirs["entropy_from_logits"]  # type: ignore[attr-defined]
    finally:
        del sys.modules["trl.imported_later"]
    assert patch.status() == {}
    for name in REBOUND:
        assert getattr(utils, name) is theirs[name]
    for name in FUNCTIONS:
        assert list(bindings.bindings("trl", theirs[name])) == homes[name]
    patch.undo()  # nothing left to undo


def test_patching_twice_changes_nothing(utils: Any) -> None:
    stock = utils._ChunkedLogProbFunction
    first = patch.trl()
    bound = {name: getattr(utils, name) for name in REBOUND}
    assert patch.trl() is first
    assert all(getattr(utils, name) is ours for name, ours in bound.items())
    assert patch.trl(exact=True) is not first
    assert utils._ChunkedLogProbFunction.stock is stock
    patch.undo()
    assert utils._ChunkedLogProbFunction is stock


def test_undo_leaves_what_someone_else_rebound_since(utils: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    stock = utils._ChunkedLogProbFunction
    patch.trl()
    other = object()
    utils._ChunkedLogProbFunction = other
    patch.undo()
    assert utils._ChunkedLogProbFunction is other
    utils._ChunkedLogProbFunction = stock


def test_report_prints_as_a_table() -> None:
    report = patch.trl()
    console = Console(width=200, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(report)
    text = console.export_text()
    for word in ("_ChunkedLogProbFunction", "fastreward.linear_token_logprobs", "nanstd", "replaced", "kept"):
        assert word in text
    console.file.close()


def test_importing_the_patches_imports_no_trainer() -> None:
    code = "import sys, fastreward.patch; sys.exit('trl' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# ---- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("case", "reason"),
    [
        ("older", "found 1.13.2"),
        ("newer", "found 1.17.0"),
        ("absent", "not installed"),
        ("unsloth", "Unsloth"),
        ("missing", "has no _supports_trl_loss_kernel"),
        ("rewritten", "not TRL's own any more"),
        ("signature", "selective_log_softmax takes"),
    ],
)
def test_refusals_say_why_and_change_nothing(
    utils: Any, monkeypatch: pytest.MonkeyPatch, case: str, reason: str
) -> None:
    def version(_: str) -> str:
        if case == "absent":
            raise importlib.metadata.PackageNotFoundError("trl")
        return {"older": "1.13.2", "newer": "1.17.0"}.get(case, VERSION)

    monkeypatch.setattr(importlib.metadata, "version", version)
    if case == "unsloth":
        monkeypatch.setitem(sys.modules, "unsloth", types.ModuleType("unsloth"))
    elif case == "missing":
        monkeypatch.delattr(utils, "_supports_trl_loss_kernel")
    elif case == "rewritten":
        monkeypatch.setattr(utils, "_ChunkedLogProbFunction", object())
    elif case == "signature":
        monkeypatch.setattr(utils, "selective_log_softmax", lambda logits, index: logits)
    before = dict(vars(utils))
    with pytest.raises(patch.PatchRefused, match=reason):
        patch.trl()
    assert vars(utils) == before
    assert patch.status() == {}


# ---- the choice on CUDA ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ours_ms", "problem", "wins"), [(1.0, "", True), (3.0, "", False), (None, "BackendError: no Triton", False)]
)
def test_the_faster_kernel_is_used_on_cuda_and_named(
    utils: Any, monkeypatch: pytest.MonkeyPatch, ours_ms: float | None, problem: str, wins: bool
) -> None:
    timing = measure.Timing("fused LM head", "a sample", 2.0, ours_ms, problem)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(measure, "linear_head", lambda *_: timing)
    monkeypatch.setattr(measure, "whole_logits", lambda *_: timing)
    report = patch.trl()
    told = report.replaced if wins else report.kept
    assert [entry.why for entry in told if "on CUDA" in entry.target] == [str(timing)] * 2
    assert problem in str(timing)
    assert utils._ChunkedLogProbFunction.serves(torch.device("cuda")) is wins
    assert utils._ChunkedLogProbFunction.serves(torch.device("cpu"))


def test_the_measurement_runs_both_sides_on_the_same_sample(utils: Any) -> None:
    patch.trl()
    head, cpu = utils._ChunkedLogProbFunction, torch.device("cpu")
    sides = [scores._with_outputs(head, function) for function in (head.stock.apply, head.apply)]
    timing = measure.linear_head(*sides, cpu, tokens=16, hidden=8, vocab=64, dtype=torch.float32)
    assert timing.ours_ms is not None
    assert math.isfinite(timing.ours_ms)
    assert timing.stock_ms > 0
    ours = utils.selective_log_softmax_and_entropy
    timing = measure.whole_logits(ours, ours, cpu, tokens=4, vocab=32)
    assert "TRL" in str(timing)

    def broken(*_: Any) -> Any:
        raise RuntimeError("no such kernel")

    timing = measure.linear_head(sides[0], broken, cpu, tokens=4, hidden=8, vocab=32, dtype=torch.float32)
    assert not timing.ours_wins
    assert "no such kernel" in str(timing)

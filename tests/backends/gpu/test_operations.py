"""Every operation of both GPU backends on a real GPU: values and gradients against the float64 reference, bits, CUDA
graphs, no synchronisation. `pytest -m gpu`; of the tests named small_* compute-sanitizer gets some."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import program_checks
import public_checks
import public_loss_checks
import pytest
import raw_checks
import returns_checks
import torch
from torch import Tensor

import fastreward as fr
import fastreward.cuda
from fastreward import losses
from fastreward._arguments.options import PLACES, REWARD_KLS, Place, ReturnsInputs, ReturnsOptions, SegmentOptions
from fastreward._arguments.tokens import Tokens
from fastreward.language.node import Level
from fastreward.reference import program as reference_program

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
]

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LOGITS_KINDS = ("plain", "strided", "temperatures", "one_temperature", "masked", "infinities", "ties", "far_apart")


@pytest.fixture(params=["triton", "cuda"])
def backend(request: pytest.FixtureRequest) -> Callable[[str], ModuleType]:
    """Loads an operation's raw functions."""
    reason = fastreward.cuda.missing() if request.param == "cuda" else None
    if reason is not None:
        pytest.skip(f"cuda: {reason}")
    if request.param == "triton":
        pytest.importorskip("triton")
    package = {"triton": "fastreward.kernels", "cuda": "fastreward.cuda"}[request.param]
    return lambda operation: importlib.import_module(f"{package}.{operation}")


@contextmanager
def no_sync() -> Iterator[None]:
    """Any synchronising call of torch inside is an error."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


# ------------------------------------------------------------------------------------------------------------ logprobs
@pytest.mark.parametrize("kind", raw_checks.CASES)
def test_small_logprobs(kind: str, backend: Callable[[str], ModuleType]) -> None:
    case = raw_checks.logits_case(kind, torch.bfloat16, 5, 1003)
    raw_checks.check_logprobs_forward(backend("logprobs"), "cuda", case)
    raw_checks.check_logprobs_backward(backend("logprobs"), "cuda", case)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab", [1, 7, 1024, 8193, 50_257, 151_936])
@pytest.mark.parametrize("kind", raw_checks.CASES)
def test_logprobs(kind: str, vocab: int, dtype: torch.dtype, backend: Callable[[str], ModuleType]) -> None:
    if vocab < 8 and kind not in ("plain", "temperatures", "masked", "token_ids"):
        pytest.skip("this input needs more columns")
    case = raw_checks.logits_case(kind, dtype, 7, vocab)
    raw_checks.check_logprobs_forward(backend("logprobs"), "cuda", case)
    raw_checks.check_logprobs_backward(backend("logprobs"), "cuda", case)
    raw_checks.check_logprobs_backward(backend("logprobs"), "cuda", case, in_place=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_extreme_temperatures(dtype: torch.dtype, backend: Callable[[str], ModuleType]) -> None:
    raw_checks.check_extreme_temperatures(backend("logprobs"), "cuda", dtype, 9001)


@pytest.mark.parametrize("flags", [0, 1, 8, 9, 2, 4, 16])
def test_logprobs_flags(flags: int, backend: Callable[[str], ModuleType]) -> None:
    case = raw_checks.logits_case("ties", torch.bfloat16, 3, 40_000)
    raw_checks.check_logprobs_forward(backend("logprobs"), "cuda", case, flags)


@pytest.mark.parametrize("only", ["logprobs", "entropy", "logsumexp", "log_sum_sq_probs"])
@pytest.mark.parametrize("inv_softcap", [0.0, 1 / 30.0])
def test_logprobs_backward_of_one_output(only: str, inv_softcap: float, backend: Callable[[str], ModuleType]) -> None:
    case = raw_checks.logits_case("plain", torch.float32, 3, 20_000)
    raw_checks.check_logprobs_backward(backend("logprobs"), "cuda", case, only=only, inv_softcap=inv_softcap)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab", [9001, 151_936])
def test_logprobs_bits(dtype: torch.dtype, vocab: int, backend: Callable[[str], ModuleType]) -> None:
    """Enough rows to leave the clusters, which a row alone is given."""
    processors = torch.cuda.get_device_properties(0).multi_processor_count
    rows = 2 * processors + 3 if vocab > 32_768 else 33
    raw_checks.check_bits(backend("logprobs"), "cuda", raw_checks.logits_case("plain", dtype, rows, vocab))


@pytest.mark.parametrize("dtype", DTYPES)
def test_small_illegal_labels(dtype: torch.dtype, backend: Callable[[str], ModuleType]) -> None:
    raw_checks.check_illegal_labels(backend("logprobs"), "cuda", dtype, 1003)


@pytest.mark.parametrize("known_labels", [True, False])
@pytest.mark.parametrize("kind", ["plain", "infinities", "temperatures", "far_apart", "ties"])
def test_small_accumulate(kind: str, known_labels: bool, backend: Callable[[str], ModuleType]) -> None:
    case = raw_checks.logits_case(kind, torch.bfloat16, 4, 5003)
    raw_checks.check_accumulate(backend("logprobs"), "cuda", case, 1300, known_labels=known_labels)


def test_logprobs_beyond_32_bit_offsets(backend: Callable[[str], ModuleType]) -> None:
    """N * V > 2^31: the last rows equal the same rows alone."""
    rows, vocab = 14_200, 151_936
    if torch.cuda.mem_get_info()[0] < 6 << 30:
        pytest.skip("needs 6 GiB of free device memory")
    module = backend("logprobs")
    logits = torch.empty(rows, vocab, dtype=torch.bfloat16, device="cuda").normal_()
    labels = torch.randint(0, vocab, (rows,), device="cuda")
    arguments: tuple[Any, ...] = (1.0, None, None, None, None)
    values, _, ids = module.forward(logits, labels, *arguments, 1)
    tail = module.forward(logits[-2:].clone(), labels[-2:], *arguments, 1)
    assert torch.equal(values[:, -2:], tail[0])
    grad = torch.ones_like(values)
    alone = torch.empty(2, vocab, dtype=torch.bfloat16, device="cuda")
    module.backward(
        logits[-2:].clone(), labels[-2:], *arguments, *tail[::2], grad[:, :2].contiguous(), None, alone, 0.0
    )
    module.backward(logits, labels, *arguments, values, ids, grad, None, logits, 0.0)
    assert torch.equal(logits[-2:], alone)


# ------------------------------------------------------------------------------------------- programs
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", program_checks.PROGRAMS)
def test_small_program(name: str, packed: bool, backend: Callable[[str], ModuleType]) -> None:
    named = program_checks.PROGRAMS[name]()
    for seed, (rows, width) in enumerate([(4, 33), (3, 5000), (1, 1), (2, 9000), (70, 3), (5, 100), (0, 7)]):
        mask = list(program_checks.MASKS)[seed % len(program_checks.MASKS)]
        call = program_checks.make_call(named, rows, width, mask=mask, packed=packed, seed=seed)
        program_checks.check_run(backend("program"), "cuda", named, call)
        program_checks.check_backward(backend("program"), "cuda", call, seed)


def test_small_overflow(backend: Callable[[str], ModuleType]) -> None:
    program_checks.check_overflow(backend("program"), "cuda")


@pytest.mark.parametrize("seed", range(12))
def test_small_random_program(seed: int, backend: Callable[[str], ModuleType]) -> None:
    named = program_checks.random_program(seed)
    call = program_checks.make_call(named, 9, 700, packed=bool(seed % 2), seed=seed)
    program_checks.check_run(backend("program"), "cuda", named, call, 1e-5)


@pytest.mark.parametrize("seed", range(8))
def test_small_scans(seed: int, backend: Callable[[str], ModuleType]) -> None:
    named = program_checks.scan_program(seed)
    call = program_checks.make_call(named, (9, 2)[seed % 2], (300, 2500)[seed % 2], packed=seed % 3 == 1, seed=seed)
    program_checks.check_run(backend("program"), "cuda", named, call, 1e-5)


@pytest.mark.parametrize("share", [False, True])
def test_small_threshold(share: bool, backend: Callable[[str], ModuleType]) -> None:
    """Without a host read, and what the reference says."""
    module = backend("program")
    for count, bound in ((1, 0.5), (1000, 0.1), (3_000_000, 0.3)):
        x, mask = torch.randn(count) ** 2, torch.rand(count) < 0.9
        there = Tokens((count,), mask.cuda(), torch.tensor([0, count]).cuda())
        x_there = x.cuda()
        with no_sync():
            got = module.threshold(x_there, bound, there, share)
        assert torch.equal(got.cpu(), reference_program.threshold(x, bound, Tokens((count,), mask), share))


@pytest.mark.parametrize(("rows", "width"), [(512, 8192), (3, 70_000), (20_000, 40)])
def test_program_at_size(rows: int, width: int, backend: Callable[[str], ModuleType]) -> None:
    named = program_checks.PROGRAMS["ppo, everything"]()
    call = program_checks.make_call(named, rows, width)
    program_checks.check_run(backend("program"), "cuda", named, call)


# -------------------------------------------------------------------------------------------------- logits_policy_loss
def _gradient(entropy: bool) -> Any:
    """Of PPO, or of CISPO with an entropy bonus."""
    if entropy:
        return program_checks.logits_gradient(losses.cispo(), entropy=True, aggregation="seq-mean-token-mean")
    return program_checks.logits_gradient(losses.ppo(dual_clip=3.0), advantage=Level.TOKEN)


def _check_logits(module: ModuleType, case: raw_checks.Logits, *, entropy: bool, packed: bool) -> None:
    """A fresh gradient and one over the logits: right, and the same bits."""
    gradient = _gradient(entropy)
    fresh = program_checks.check_logits(module, "cuda", gradient, case, packed=packed)
    written = program_checks.check_logits(module, "cuda", gradient, case, packed=packed, in_place=True)
    assert all(program_checks.same_bits(a, b) for a, b in zip(fresh, written, strict=True))


@pytest.mark.parametrize("name", program_checks.GRADIENTS)
def test_small_gradient_for_either_term(name: str, backend: Callable[[str], ModuleType]) -> None:
    case = raw_checks.logits_case("masked", torch.bfloat16, 5, 1003)
    program_checks.check_logits(backend("logits_policy_loss"), "cuda", program_checks.GRADIENTS[name](), case)


@pytest.mark.parametrize("kind", LOGITS_KINDS)
def test_small_logits(kind: str, backend: Callable[[str], ModuleType]) -> None:
    """One block to a row, any kind of row, at any address."""
    k = LOGITS_KINDS.index(kind)
    case = raw_checks.logits_case(kind, DTYPES[k % 3], 5, 1003)
    _check_logits(backend("logits_policy_loss"), case, entropy=k % 2 == 1, packed=k % 4 > 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_small_cluster(dtype: torch.dtype, backend: Callable[[str], ModuleType]) -> None:
    """A row that several blocks hold, at an odd address; nothing else of its wider tensor is written."""
    vocab = 50_257 if dtype == torch.float32 else 100_003
    case = raw_checks.logits_case("strided", dtype, 3, vocab)
    _check_logits(backend("logits_policy_loss"), case, entropy=dtype == torch.bfloat16, packed=True)


@pytest.mark.parametrize("entropy", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab", [5, 12_288, 24_576, 50_257, 151_936, 600_000])
def test_logits(vocab: int, dtype: torch.dtype, entropy: bool, backend: Callable[[str], ModuleType]) -> None:
    """12,288 in f32 and 24,576 in bf16 fill 48 KiB; 600,000 in f32 fit no cluster and are read twice."""
    for packed, kind in enumerate(("masked", "temperatures")):
        case = raw_checks.logits_case(kind, dtype, 7, vocab)
        _check_logits(backend("logits_policy_loss"), case, entropy=entropy, packed=bool(packed))


def test_logits_of_many_rows(backend: Callable[[str], ModuleType]) -> None:
    """More rows than are in flight together: the same bits as the same rows alone."""
    rows, vocab = 3 * torch.cuda.get_device_properties(0).multi_processor_count + 1, 33_333
    module = backend("logits_policy_loss")
    gradient = program_checks.logits_gradient(losses.ppo(), advantage=Level.TOKEN, aggregation="token-sum")
    case = raw_checks.logits_case("plain", torch.bfloat16, rows, vocab)
    logits, labels = case.logits.cuda(), case.labels.cuda()
    scalars = gradient.program.scalar_values(dict.fromkeys(gradient.parameters, 0.2))

    def run(first: int, last: int) -> tuple[Tensor, Tensor]:
        count = last - first
        given = {
            "old_logprob": torch.full((1, count), -11.0, device="cuda"),
            "advantage": torch.linspace(-1.0, 1.0, rows, device="cuda")[first:last].reshape(1, count),
        }
        inputs = [given.get(n.name or "") for n in gradient.program.inputs]
        out = torch.full_like(logits[first:last], torch.nan)
        logprobs, _ = module.run(
            gradient.program, logits[first:last], labels[first:last], 1.0, inputs, Tokens((1, count)), scalars, None,
            torch.ones((), device="cuda"), out, gradient.gradients, False,
        )  # fmt: skip
        return logprobs, out

    whole, tail = run(0, rows), run(rows - 3, rows)
    assert all(torch.equal(a[-3:], b) for a, b in zip(whole, tail, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
def test_small_rescale(dtype: torch.dtype, backend: Callable[[str], ModuleType]) -> None:
    for rows, vocab in ((3, 1003), (2, 7), (1, 1), (2, 12_288), (5, 70_000)):
        program_checks.check_rescale(backend("logits_policy_loss"), "cuda", dtype, rows, vocab)


# -------------------------------------------------------------------------------------------- group, rewards, whiten
@pytest.mark.parametrize("contiguous", [False, True])
@pytest.mark.parametrize("name", raw_checks.GROUP_OPTIONS)
def test_small_group(name: str, contiguous: bool, backend: Callable[[str], ModuleType]) -> None:
    for rows in (1, 12, 301):
        options = raw_checks.GROUP_OPTIONS[name]
        raw_checks.check_group(backend("group"), "cuda", options, rows, contiguous=contiguous, wide=rows == 12)


def test_small_corners(backend: Callable[[str], ModuleType]) -> None:
    raw_checks.check_group_corners(backend("group"), "cuda")
    raw_checks.check_whiten_corners(backend("whiten"), "cuda")


@pytest.mark.parametrize("contiguous", [False, True])
def test_small_group_statistics(contiguous: bool, backend: Callable[[str], ModuleType]) -> None:
    raw_checks.check_group_statistics(backend("group"), "cuda", 5001, contiguous=contiguous, wide=contiguous)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("kind", raw_checks.SEGMENTS)
def test_small_segments(kind: str, packed: bool, backend: Callable[[str], ModuleType]) -> None:
    for tokens in (23, 5000):
        raw_checks.check_segments(backend("segments"), "cuda", kind, packed, tokens)


def test_small_segment_ids_and_corners(backend: Callable[[str], ModuleType]) -> None:
    raw_checks.check_segment_ids(backend("segments"), "cuda", 5000)
    raw_checks.check_segment_corners(backend("segments"), "cuda")


@pytest.mark.parametrize("shift_mean", [True, False])
@pytest.mark.parametrize("masked", [True, False])
def test_small_whiten(shift_mean: bool, masked: bool, backend: Callable[[str], ModuleType]) -> None:
    for shape, offset in (((3, 7), 0.0), ((9, 1000), 1e4), ((300, 4096), -3.0)):
        raw_checks.check_whiten(backend("whiten"), "cuda", shape, shift_mean=shift_mean, masked=masked, offset=offset)


@pytest.mark.parametrize("form", range(6))
def test_small_returns(form: int, backend: Callable[[str], ModuleType]) -> None:
    for k, chosen in enumerate(returns_checks.options()):
        shape = (3, 2500) if chosen.op == "sum" else (3, 40)
        returns_checks.check_numbers(backend("returns"), "cuda", shape, chosen, packed=k % 2 == 0, form=form)


def test_bits_of_returns(backend: Callable[[str], ModuleType]) -> None:
    for chosen in returns_checks.options():
        returns_checks.check_bits(backend("returns"), "cuda", (3, 1030), chosen)


def test_small_returns_in_tiles(backend: Callable[[str], ModuleType]) -> None:
    for chosen, packed, form in returns_checks.BLOCKS:
        returns_checks.check_blocks(backend("returns"), "cuda", 50_000, chosen, packed, form)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("place", PLACES)
def test_small_token_rewards(place: Place, packed: bool, backend: Callable[[str], ModuleType]) -> None:
    for kl in (None, *REWARD_KLS):
        raw_checks.check_token_rewards(backend("rewards"), "cuda", kl, place, packed=packed)


# ------------------------------------------------------------------------------------------------- no sync, CUDA graphs
def _calls(backend: Callable[[str], ModuleType]) -> dict[str, Callable[[], tuple[Tensor, ...]]]:
    """One call of each raw function over fixed inputs on the device."""
    g = torch.Generator(device="cuda").manual_seed(0)
    logprobs, programs, group, whiten = (backend(n) for n in ("logprobs", "program", "group", "whiten"))
    logits = torch.randn(9, 40_000, generator=g, device="cuda").bfloat16()
    labels = torch.randint(0, 40_000, (9,), generator=g, device="cuda")
    grad = torch.randn(7, 9, generator=g, device="cuda")
    lp = torch.randn(16, 3000, generator=g, device="cuda") * 0.3
    mask = torch.rand(16, 3000, generator=g, device="cuda") < 0.8
    rewards = torch.randn(64, 2, generator=g, device="cuda")
    index = torch.randint(0, 9, (64,), generator=g, device="cuda")

    def run_logprobs() -> tuple[Tensor, ...]:
        out = torch.empty_like(logits)
        values, indices, ids = logprobs.forward(logits, labels, 1.0, None, None, None, None, raw_checks.EVERYTHING)
        logprobs.backward(logits, labels, 1.0, None, None, None, None, values, ids, grad, None, out, 0.0)
        return values, indices, out

    def run_program(name: str, packed: bool) -> tuple[Tensor, ...]:
        one, arguments = calls[name, packed]
        outputs, batch = programs.run(one.program, *arguments)
        return *outputs, batch

    named = {name: program_checks.PROGRAMS[name]() for name in ("ppo, everything", "gspo", "real")}
    calls = {
        (name, packed): (one, program_checks.make_call(one, 16, 3000, packed=packed).on("cuda"))
        for name, one in named.items()
        for packed in (False, True)
    }

    def run_whiten() -> tuple[Tensor, ...]:
        out = torch.empty_like(lp)
        whiten.forward(lp, mask, True, 1, 1e-8, out)
        return (out,)

    def run_rewards() -> tuple[Tensor, ...]:
        out, tokens, numbers = torch.empty_like(lp), Tokens((16, 3000), mask), (0.1, 20.0, 10.0, -1.0, 1.0)
        backend("rewards").token_rewards(lp[:, 0].contiguous(), lp, -lp, tokens, "k3", "end", numbers, out)
        return (out,)

    def run_segments() -> tuple[Tensor, ...]:
        segments, out, chosen = backend("segments"), torch.empty_like(lp), SegmentOptions("softmin", 0.3)
        ids = segments.ids(mask, None, None, True, None)
        values = segments.reduce(lp, ids, mask, None, 600, chosen, False)
        segments.adjoint(values, lp, ids, mask, None, chosen, out)
        return ids, values, out

    gae, long = ReturnsOptions("gae", move=True), torch.randn(2, 50_000, generator=g, device="cuda")

    def run_returns(x: Tensor, counted: Tensor) -> tuple[Tensor, ...]:
        out, inputs = torch.empty(2, *x.shape, device="cuda"), ReturnsInputs(x, x, *[None] * 7)
        backend("returns").scan(inputs, Tokens(tuple(x.shape), counted), returns_checks.NUMBERS, gae, out[0], out[1])
        return (out,)

    def run_group(name: str) -> tuple[Tensor, ...]:
        return (group.forward(rewards, index, 0, None, None, None, None, raw_checks.GROUP_OPTIONS[name]),)

    from_logits = backend("logits_policy_loss")

    def run_logits(x: Tensor, entropy: bool, packed: bool) -> tuple[Tensor, ...]:
        gradient, out = gradients[entropy], torch.empty_like(x)
        shape = {Level.TOKEN: (9,) if packed else (3, 3), Level.SEQUENCE: (3,), Level.BATCH: ()}
        inputs = [
            None if n.name in ("logprob", "entropy") else ones[: math.prod(shape[n.level])].reshape(shape[n.level])
            for n in gradient.program.inputs
        ]
        tokens = Tokens(shape[Level.TOKEN], None, bounds if packed else None)
        scalars = gradient.program.scalar_values(dict.fromkeys(gradient.parameters, 0.2))
        logprobs, entropies = from_logits.run(
            gradient.program, x, labels, 1.0, inputs, tokens, scalars, None, one, out, entropy
        )
        from_logits.rescale(out, three, one)
        return logprobs, entropies, out

    gradients = {entropy: _gradient(entropy) for entropy in (False, True)}
    ones, bounds = torch.ones(9, device="cuda"), torch.tensor([0, 2, 3, 9], device="cuda")
    one, three = torch.ones((), device="cuda"), torch.full((), 3.0, device="cuda")
    wide, positive = logits.float(), long > 0

    return {
        "logits": lambda: run_logits(logits, False, False),
        "logits packed": lambda: run_logits(wide, True, True),
        "logprobs": run_logprobs,
        "ppo": lambda: run_program("ppo, everything", False),
        "ppo packed": lambda: run_program("ppo, everything", True),
        "gspo": lambda: run_program("gspo", False),
        "group loss": lambda: run_program("real", False),
        "group": lambda: run_group("grpo"),
        "group batch-std": lambda: run_group("gdpo_batch"),
        "returns": lambda: run_returns(lp, mask),
        "returns in tiles": lambda: run_returns(long, positive),
        "rewards": run_rewards,
        "segments": run_segments,
        "whiten": run_whiten,
    }


_CALLS = (
    "logits", "logits packed", "logprobs", "ppo", "ppo packed", "gspo", "group loss", "group", "group batch-std",
    "returns", "returns in tiles", "rewards", "segments", "whiten",
)  # fmt: skip


@pytest.mark.parametrize("name", _CALLS)
def test_no_call_synchronises(name: str, backend: Callable[[str], ModuleType]) -> None:
    call = _calls(backend)[name]
    call()
    with no_sync():
        call()


@pytest.mark.parametrize("name", _CALLS)
def test_calls_are_captured_in_cuda_graphs(name: str, backend: Callable[[str], ModuleType]) -> None:
    call = _calls(backend)[name]
    want = tuple(x.clone() for x in call())
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call()
    for _ in range(3):
        for x in out:
            x.fill_(-1)
        graph.replay()
        torch.cuda.synchronize()
        assert all(torch.equal(a, b) for a, b in zip(out, want, strict=True))


# ------------------------------------------------------------------------------------------------ public functions
@pytest.fixture
def chosen(request: pytest.FixtureRequest, backend: Callable[[str], ModuleType]) -> Iterator[None]:
    """The backend of the raw tests, as a user chooses it."""
    with fr.backend(request.node.callspec.params["backend"]):
        yield


@pytest.mark.usefixtures("chosen")
class TestPublic:
    @pytest.mark.parametrize("inplace", [False, True])
    @pytest.mark.parametrize("vocab", [301, 40_000])
    def test_token_logprobs(self, vocab: int, inplace: bool) -> None:
        public_checks.check_token_logprobs("cuda", vocab, inplace)

    @pytest.mark.parametrize("options", [{}, {"softcap": 5.0, "logit_scale": 0.7, "bias": True}], ids=["plain", "all"])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_linear(self, dtype: torch.dtype, options: dict[str, Any]) -> None:
        public_checks.check_linear("cuda", dtype, **options)

    @pytest.mark.parametrize("packed", [False, True])
    def test_policy_loss(self, packed: bool) -> None:
        public_checks.check_policy_loss("cuda", packed)

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("name", public_loss_checks.LOSSES)
    def test_logits_policy_loss(self, name: str, dtype: torch.dtype) -> None:
        for in_place in (False, True):
            for in_one_row in (False, True):
                public_loss_checks.check_logits_policy_loss(
                    "cuda", name, dtype, 1003, in_place=in_place, in_one_row=in_one_row
                )

    @pytest.mark.parametrize("name", ["ppo", "gspo"])
    def test_linear_policy_loss(self, name: str) -> None:
        public_loss_checks.check_linear_policy_loss("cuda", name)

    @pytest.mark.parametrize("loss", [losses.ppo(), losses.gspo_token(), losses.real()], ids=lambda loss: loss.name)
    def test_under_the_mask(self, loss: losses.Loss) -> None:
        public_loss_checks.check_under_the_mask("cuda", loss)

    @pytest.mark.parametrize("loss", ["squared", "huber"])
    def test_value_loss(self, loss: str) -> None:
        public_loss_checks.check_value_loss("cuda", loss)

    def test_differentiable_extras(self) -> None:
        for in_one_row in (False, True):
            public_loss_checks.check_differentiable_extras("cuda", in_one_row=in_one_row)

    @pytest.mark.parametrize("loss", [losses.dpo(label_smoothing=0.1), losses.dpo(variant="aot")], ids=["dpo", "aot"])
    def test_preference_loss(self, loss: losses.Loss) -> None:
        for in_one_row in (False, True):
            public_loss_checks.check_preference_loss("cuda", loss, in_one_row=in_one_row)

    @pytest.mark.parametrize(("mode", "level"), [("truncate", "token"), ("mask", "sequence"), ("icepop", "geometric")])
    def test_correction_weights(self, mode: str, level: str) -> None:
        for in_one_row in (False, True):
            public_loss_checks.check_correction("cuda", mode, level, in_one_row=in_one_row)

    @pytest.mark.filterwarnings("ignore")  # Inductor's own
    @pytest.mark.parametrize("name", ["ppo", "gspo"])
    def test_policy_loss_in_the_compilers_cuda_graphs(self, name: str) -> None:
        """Three calls: the first warms up in the graphs' memory, the second is captured, the third replayed.

        What a call keeps in that memory would be found there by torch, or overwritten.
        """
        loss, g = public_loss_checks.LOSSES[name], torch.Generator(device="cuda").manual_seed(0)
        mask = torch.arange(300, device="cuda") < torch.tensor([[300], [7], [0], [120]], device="cuda")
        advantages = torch.tensor([1.0, -0.5, 1.0, -2.0], device="cuda")

        def step(logprobs: Tensor, old: Tensor) -> tuple[Tensor, Tensor]:
            result = fr.policy_loss(logprobs, old, advantages, mask, loss=loss)
            return result.loss, result.metrics.values_tensor

        torch._dynamo.reset()
        compiled = torch.compile(step, mode="reduce-overhead", fullgraph=True)
        for _ in range(5):
            old = -torch.rand(4, 300, generator=g, device="cuda")
            leaf = (old + 0.3 * torch.randn(4, 300, generator=g, device="cuda")).requires_grad_()
            same = leaf.detach().clone().requires_grad_()
            torch.compiler.cudagraph_mark_step_begin()
            value, metrics = compiled(leaf, old)
            value.backward()
            want, wanted = step(same, old)
            want.backward()
            for a, b in ((value, want), (metrics, wanted), (leaf.grad, same.grad)):
                assert torch.equal(a, b)
        assert not torch._dynamo.utils.counters["inductor"]["cudagraph_skips"], "something was not captured"

    def test_group_and_whiten(self) -> None:
        public_checks.check_group("cuda")
        public_checks.check_whiten("cuda")
        public_checks.check_segments("cuda")

    def test_messages_in_debug_mode(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("FASTREWARD_DEBUG", "1")
        public_checks.check_messages("cuda")

    def test_illegal_values_without_debug_mode(self) -> None:
        """Nothing is read outside and nothing synchronises: an illegal label is NaN, a wild bound stays inside."""
        logits, labels = torch.randn(2, 10, device="cuda"), torch.tensor([1, 10**9], device="cuda")
        tokens, bounds = torch.zeros(10, device="cuda", requires_grad=True), torch.tensor([0, 10**9], device="cuda")
        kept, sequence = torch.tensor([[1, 10**9], [2, -3]], device="cuda"), torch.ones(1, device="cuda")
        fr.token_logprobs(logits, labels)  # compiles
        fr.policy_loss(tokens, tokens.detach(), sequence, cu_seqlens=bounds).loss.backward()
        fr.token_logprobs(logits, labels, kept_tokens=kept)
        tokens.grad = None
        with no_sync():
            logprobs = fr.token_logprobs(logits, labels).logprobs
            fr.token_logprobs(logits, labels, kept_tokens=kept)
            fr.policy_loss(tokens, tokens.detach(), sequence, cu_seqlens=bounds).loss.backward()
        assert torch.isnan(logprobs).tolist() == [False, True]
        assert torch.allclose(tokens.grad, torch.full_like(tokens, -0.1))

    def test_nothing_synchronises(self) -> None:
        logits, labels = torch.randn(4, 3, 1000, device="cuda", requires_grad=True), torch.zeros(4, 3).long().cuda()
        mask, rewards, ids = (
            torch.ones(4, 3, device="cuda"),
            torch.randn(4, device="cuda"),
            torch.zeros(4).long().cuda(),
        )
        head, hidden = torch.randn(1000, 16, device="cuda"), torch.randn(4, 3, 16, device="cuda", requires_grad=True)

        def step() -> None:
            stats = fr.token_logprobs(logits, labels, mask=mask, outputs=("logprobs", "entropy"))
            advantages = fr.group_advantages(rewards, ids)
            result = fr.policy_loss(
                stats.logprobs, stats.logprobs.detach(), advantages, mask, entropy=stats.entropy, entropy_coef=0.1
            )
            linear = fr.linear_token_logprobs(hidden, head, labels).logprobs
            (result.loss + linear.sum()).backward()
            fr.whiten(stats.logprobs.detach(), mask)

        step()
        with no_sync():
            step()

    def test_no_loss_synchronises(self) -> None:
        logits, labels = torch.randn(4, 3, 1000, device="cuda", requires_grad=True), torch.zeros(4, 3).long().cuda()
        old, mask, advantages = (torch.full((4, 3), x, device="cuda") for x in (-7.0, 1.0, 0.5))
        hidden, head = (torch.randn(*s, 16, device="cuda", requires_grad=True) for s in ((4, 3), (1000,)))

        def step() -> None:
            weights, keep, _ = fr.correction_weights(old, old - 0.1, mask, mode="mask", level="sequence")
            given = {"weights": weights, "keep": keep}
            for in_place in (False, True):
                result = fr.logits_policy_loss(logits * 1, labels, old, advantages, mask, inplace=in_place, **given)
                (result.loss * 2).backward()  # not what was expected: the stored gradient is rescaled
            fr.linear_policy_loss(hidden, head, labels, old, advantages).loss.backward()
            pair = [(old + x).requires_grad_() for x in (0.1, 0.2)]
            references = {"ref_chosen_logprobs": old, "ref_rejected_logprobs": old}
            fr.preference_loss(*pair, **references, chosen_mask=mask).loss.backward()

        step()
        with no_sync():
            step()

    def test_cupy_in_cupy_out(self) -> None:
        cupy = pytest.importorskip("cupy")
        logits, labels = torch.randn(3, 50, device="cuda"), torch.tensor([1, 2, 3], device="cuda")
        found = fr.token_logprobs(cupy.from_dlpack(logits), cupy.from_dlpack(labels)).logprobs
        assert isinstance(found, cupy.ndarray)
        assert torch.equal(torch.from_dlpack(found), fr.token_logprobs(logits, labels).logprobs)
        advantages = fr.group_advantages(cupy.asarray([1.0, 2.0, 3.0, 5.0]), ["a", "b", "a", "b"])
        assert isinstance(advantages, cupy.ndarray)
        tokens, mask = cupy.from_dlpack(torch.randn(2, 5, device="cuda")), cupy.ones((2, 5))
        assert isinstance(fr.policy_loss(tokens, tokens, tokens, mask).loss, cupy.ndarray)
        assert isinstance(fr.whiten(tokens, mask), cupy.ndarray)

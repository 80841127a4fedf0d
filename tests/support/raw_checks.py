"""Checks of a backend's raw functions against the float64 reference, on adversarial inputs: values, gradients, bits.

Run on a GPU (Triton and CUDA C++) by tests/backends/gpu and on the CPU by tests/backends/cuda/test_emulated.py. Tensors
are made on the CPU, where the reference runs, and copied to `device`.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from fastreward._arguments.options import (
    CENTERS,
    NORMALIZES,
    SEGMENT_OPS,
    SINGLETONS,
    GroupOptions,
    Place,
    RewardKL,
    SegmentOptions,
)
from fastreward._arguments.tokens import Tokens
from fastreward._runtime.layout import FLAG, INDICES, VALUES
from fastreward.reference import group as reference_group
from fastreward.reference import logprobs as reference_logprobs
from fastreward.reference import rewards as reference_rewards
from fastreward.reference import segments as reference_segments
from fastreward.reference import whiten as reference_whiten

EVERYTHING = 31
#: Half a step of each type beside 1, by which a stored gradient may differ from the exact one.
STEP = {torch.float32: 6e-8, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


def close(got: Tensor, want: Tensor, absolute: float, relative: float = 0.0, what: str = "") -> None:
    """Equal up to the tolerances, with NaN and infinities in the same places."""
    got, want = got.detach().cpu().double(), want.detach().cpu().double()
    torch.testing.assert_close(got, want, atol=absolute, rtol=relative, equal_nan=True, msg=lambda m: f"{what}: {m}")


@dataclass
class Logits:
    """One call of logprobs.forward, on the CPU."""

    logits: Tensor
    labels: Tensor
    inv_temperature: float | Tensor = 1.0
    mask: Tensor | None = None
    keep_mask: Tensor | None = None
    keep_ids: Tensor | None = None
    token_ids: Tensor | None = None

    def arguments(self, device: str) -> tuple[Any, ...]:
        sets = (self.keep_mask, self.keep_ids, self.token_ids)
        given = (self.logits, self.labels, self.inv_temperature, self.mask, *sets)
        return tuple(_strided_copy(x, device) if isinstance(x, Tensor) else x for x in given)


def _strided_copy(x: Tensor, device: str) -> Tensor:
    """x on `device` with the same strides and the same offset from an aligned address."""
    if x.ndim == 0 or 0 in x.shape:
        return x.to(device)
    storage = torch.empty(x.untyped_storage().nbytes() // x.element_size(), dtype=x.dtype, device=device)
    copy = storage.as_strided(x.shape, x.stride(), x.storage_offset())
    if 0 in x.stride():
        copy[tuple(slice(None) if s else slice(0, 1) for s in x.stride())] = x[
            tuple(slice(None) if s else slice(0, 1) for s in x.stride())
        ].to(device)
        return copy
    return copy.copy_(x.to(device))


def logits_case(kind: str, dtype: torch.dtype, rows: int, vocab: int, seed: int = 0) -> Logits:
    """Inputs of one kind; the kinds are the keys of CASES."""
    g = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, vocab, (rows,), generator=g)
    case = Logits((torch.randn(rows, vocab, generator=g) * 3).to(dtype), labels)
    CASES[kind](case, g)
    return case


def _plain(case: Logits, g: torch.Generator) -> None:
    """Nothing special."""


def _strided(case: Logits, g: torch.Generator) -> None:
    """Rows at odd addresses: a slice of a wider tensor."""
    rows, vocab = case.logits.shape
    wide = torch.full((rows, vocab + 5), torch.nan, dtype=case.logits.dtype)
    wide[:, 3 : 3 + vocab] = case.logits
    case.logits = wide[:, 3 : 3 + vocab]


def _temperatures(case: Logits, g: torch.Generator) -> None:
    case.inv_temperature = torch.rand(case.logits.shape[0], generator=g).double() + 0.5


def _one_temperature(case: Logits, g: torch.Generator) -> None:
    case.inv_temperature = torch.full((1,), 1.25, dtype=torch.float64).expand(case.logits.shape[0])


def _masked(case: Logits, g: torch.Generator) -> None:
    case.mask = torch.arange(case.logits.shape[0]) % 3 != 1
    case.logits[~case.mask] = torch.nan


def _infinities(case: Logits, g: torch.Generator) -> None:
    """-inf columns, a label among them, a row of -inf only, and one with a single finite logit."""
    case.logits[torch.rand(case.logits.shape, generator=g) < 0.4] = -torch.inf
    case.logits[:, -1] = 1.0
    case.logits[0, case.labels[0]] = -torch.inf
    case.logits[1] = -torch.inf
    case.logits[2] = -torch.inf
    case.logits[2, case.labels[2]] = 2.0


def _keep_mask(case: Logits, g: torch.Generator) -> None:
    case.keep_mask = torch.rand(case.logits.shape, generator=g) < 0.3
    case.keep_mask[:, 0] = True
    case.keep_mask[1:, :].scatter_(1, case.labels[1:, None], True)
    case.keep_mask[0, case.labels[0]] = case.labels[0] == 0
    case.token_ids = torch.randint(0, case.logits.shape[1], (case.logits.shape[0], 3), generator=g)


def _keep_ids(case: Logits, g: torch.Generator) -> None:
    rows, vocab = case.logits.shape
    count = min(vocab, 40)
    case.keep_ids = torch.stack([torch.randperm(vocab, generator=g)[:count] for _ in range(rows)])
    case.keep_ids[:, -1] = -1
    case.labels[1:] = case.keep_ids[1:, 0]
    case.token_ids = torch.randint(0, vocab, (rows, 3), generator=g)


def _token_ids(case: Logits, g: torch.Generator) -> None:
    """Duplicates, and the label itself."""
    rows, vocab = case.logits.shape
    case.token_ids = torch.randint(0, vocab, (rows, 5), generator=g)
    case.token_ids[:, 1] = case.token_ids[:, 0]
    case.token_ids[:, 2] = case.labels


def _shared_token_ids(case: Logits, g: torch.Generator) -> None:
    case.token_ids = torch.randint(0, case.logits.shape[1], (1, 4), generator=g).expand(case.logits.shape[0], 4)


def _ties(case: Logits, g: torch.Generator) -> None:
    """Few distinct values: the first maximum must win, and the rank counts what is strictly above."""
    case.logits.copy_(torch.randint(0, 3, case.logits.shape, generator=g))


def _kept_ties(case: Logits, g: torch.Generator) -> None:
    """Of equal maxima the smallest id wins, wherever it stands among the kept ones."""
    _keep_ids(case, g)
    _ties(case, g)


def _far_apart(case: Logits, g: torch.Generator) -> None:
    """One logit far above the rest, and growing maxima along the row."""
    case.logits[0, -1] = 60.0
    case.logits[1].copy_(torch.linspace(-50, 50, case.logits.shape[1]))
    case.logits[2].copy_(torch.linspace(50, -50, case.logits.shape[1]))


def _empty_block(case: Logits, g: torch.Generator) -> None:
    """Whole blocks (of 4096 columns) of -inf: behind a finite one, between two, and all but the last."""
    vocab = case.logits.shape[1]
    block = min(4096, vocab // 3)
    case.logits[0, block:] = -torch.inf
    case.logits[1, block : 2 * block] = -torch.inf
    case.logits[2, : 2 * block] = -torch.inf
    case.labels[:3] = torch.tensor([0, block - 1, vocab - 1])


CASES: dict[str, Callable[[Logits, torch.Generator], None]] = {
    "plain": _plain,
    "strided": _strided,
    "temperatures": _temperatures,
    "one_temperature": _one_temperature,
    "masked": _masked,
    "infinities": _infinities,
    "keep_mask": _keep_mask,
    "keep_ids": _keep_ids,
    "token_ids": _token_ids,
    "shared_token_ids": _shared_token_ids,
    "ties": _ties,
    "kept_ties": _kept_ties,
    "far_apart": _far_apart,
    "empty_block": _empty_block,
}


def check_logprobs_forward(module: ModuleType, device: str, case: Logits, flags: int = EVERYTHING) -> None:
    values, indices, ids = module.forward(*case.arguments(device), flags)
    want_values, want_indices, want_ids = reference_logprobs.forward(*case.arguments("cpu"), EVERYTHING)
    bits = {"entropy": 1, "log_sum_sq_probs": 2, "mean_logit": 4, "argmax": 8, "rank": 16}
    for row, name in enumerate(VALUES):
        asked = name not in bits or flags & bits[name]
        close(values[row], want_values[row] if asked else torch.zeros_like(want_values[row]), 3e-6, 1e-6, name)
    for row, name in enumerate(INDICES):
        want = want_indices[row] if flags & bits[name] else torch.zeros_like(want_indices[row])
        assert torch.equal(indices[row].cpu(), want), name
    close(ids, want_ids, 3e-6, 1e-6, "id_logprobs")


def check_logprobs_backward(
    module: ModuleType,
    device: str,
    case: Logits,
    *,
    in_place: bool = False,
    only: str | None = None,
    inv_softcap: float = 0.0,
) -> None:
    """Non-uniform upstream gradients for every differentiable output, or for one."""
    g = torch.Generator().manual_seed(1)
    rows, vocab = case.logits.shape
    values, _, ids = reference_logprobs.forward(*case.arguments("cpu"), EVERYTHING)
    grad_values = torch.randn(len(VALUES), rows, generator=g)
    grad_ids = None if case.token_ids is None else torch.randn(ids.shape, generator=g)
    if only is not None:
        grad_values *= (torch.arange(len(VALUES)) == VALUES.index(only)).unsqueeze(-1)
    want = torch.empty(rows, vocab, dtype=torch.float64)
    arguments = case.arguments("cpu")
    reference_logprobs.backward(*arguments, values, ids, grad_values, grad_ids, want, inv_softcap)
    arguments = case.arguments(device)
    out = arguments[0] if in_place else torch.full_like(arguments[0], torch.nan)
    gids = None if grad_ids is None else grad_ids.to(device)
    module.backward(*arguments, values.to(device), ids.to(device), grad_values.to(device), gids, out, inv_softcap)
    scale = max(1.0, float(want.nan_to_num(0.0, 0.0, 0.0).abs().max()))
    close(out, want, 4e-6 * scale, 1e-6 + 1.01 * STEP[case.logits.dtype], "grad_logits")


def check_accumulate(module: ModuleType, device: str, case: Logits, tile: int, *, known_labels: bool) -> None:
    """Tiles of the vocabulary, accumulated in order, against the whole row."""
    rows, vocab = case.logits.shape
    state = torch.zeros(rows, 8, dtype=torch.float64, device=device)
    state[:, 0], state[:, 5] = -torch.inf, torch.nan
    logits, labels, inv, *_ = case.arguments(device)
    thresholds = logits.float().gather(1, labels[:, None]).squeeze(1) if known_labels else None
    flags = EVERYTHING if known_labels else EVERYTHING & ~16
    for start in range(0, vocab, tile):
        module.accumulate(logits[:, start : start + tile], labels, start, inv, state, flags, thresholds)
    values, indices = module.finish(state, inv, vocab, flags)
    want_values, want_indices, _ = reference_logprobs.forward(*case.arguments("cpu"), EVERYTHING)
    for row, name in enumerate(VALUES):
        close(values[row], want_values[row], 3e-6, 1e-6, name)
    assert torch.equal(indices[0].cpu(), want_indices[0])
    if known_labels:
        assert torch.equal(indices[1].cpu(), want_indices[1])


def check_bits(module: ModuleType, device: str, case: Logits) -> None:
    """The same bits again, alone, in another order, at another address, and whatever else is asked for."""
    logits, labels, *rest = case.arguments(device)
    rows, vocab = logits.shape
    first = module.forward(logits, labels, *rest, EVERYTHING)
    assert all(torch.equal(a, b) for a, b in zip(first, module.forward(logits, labels, *rest, EVERYTHING), strict=True))
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(2)).to(device)
    shuffled = module.forward(logits[order].contiguous(), labels[order], *rest, EVERYTHING)
    assert torch.equal(shuffled[0], first[0][:, order])
    for n in range(min(rows, 3)):
        alone = module.forward(logits[n : n + 1], labels[n : n + 1], *rest, EVERYTHING)
        assert torch.equal(alone[0][:, 0], first[0][:, n])
    wide = torch.zeros(rows, vocab + 7, dtype=logits.dtype, device=device)
    wide[:, 1 : vocab + 1] = logits
    moved = module.forward(wide[:, 1 : vocab + 1], labels, *rest, EVERYTHING)
    assert torch.equal(moved[0], first[0])
    for flags in (0, *FLAG.values()):
        values = module.forward(logits, labels, *rest, flags)[0]
        for row, name in enumerate(VALUES):
            if name not in FLAG or flags == FLAG[name]:
                assert torch.equal(values[row], first[0][row]), (name, flags)


def check_illegal_labels(module: ModuleType, device: str, dtype: torch.dtype, vocab: int) -> None:
    """NaN for that token and nothing else, whatever the label says."""
    case = logits_case("plain", dtype, 6, vocab)
    legal = module.forward(*case.arguments(device), EVERYTHING)
    case.labels[[0, 2, 4]] = torch.tensor([-100, vocab, 2**62])
    values, indices, _ = module.forward(*case.arguments(device), EVERYTHING)
    bad = torch.tensor([True, False, True, False, True, False])
    for row, name in enumerate(VALUES):
        if name in ("logprobs", "label_logit"):
            assert values[row].isnan().cpu().equal(bad), name
        else:
            assert torch.equal(values[row], legal[0][row]), name
    assert (indices[1].cpu()[bad] == 0).all()
    out = torch.full_like(case.logits, torch.nan).to(device)
    grad = torch.ones_like(legal[0])
    arguments = case.arguments(device)
    module.backward(*arguments, legal[0], legal[2], grad, None, out, 0.0)
    assert out.isfinite().all()


GROUP_OPTIONS = {
    "grpo": GroupOptions(),
    "dr_grpo": GroupOptions(scale="none"),
    "rloo": GroupOptions(center="leave-one-out", scale="none", singleton="raw"),
    "opo": GroupOptions(center="length-weighted", scale="none"),
    "pass_at_k": GroupOptions(center="second-max", scale="max", singleton="nan"),
    "reinforce_pp": GroupOptions(center="mean", scale="batch-std", ddof=0),
    "inside": GroupOptions(eps=1e-3, eps_inside=True, ddof=0),
    "gdpo": GroupOptions(normalize="normalize-then-sum"),
    "gdpo_raw": GroupOptions(normalize="normalize-then-sum", singleton="raw"),
    "gdpo_batch": GroupOptions(normalize="normalize-then-sum", scale="batch-std"),
    "given": GroupOptions(center="tensor", scale="tensor"),
    "given_center": GroupOptions(center="tensor", scale="batch-std"),
    "as_it_is": GroupOptions(center="none", scale="none", normalize="normalize-then-sum"),
    "uncentred": GroupOptions(center="none", singleton="raw"),
    "no_eps": GroupOptions(eps=0.0, ddof=3),
}


def check_group(
    module: ModuleType, device: str, options: GroupOptions, rows: int, *, contiguous: bool, wide: bool
) -> None:
    g = torch.Generator().manual_seed(rows)
    rewards = torch.randn(rows, 3, generator=g, dtype=torch.float64 if wide else torch.float32)
    rewards[rows // 2 :] = rewards[rows // 2 :].round()  # ties
    rewards[torch.rand(rows, 3, generator=g) < 0.1] = torch.nan
    rewards[rows // 3] = torch.nan
    index, size = torch.randint(-3, max(2, rows // 6), (rows,), generator=g) * 10**12, 0
    index[-1] = 2**60  # a singleton
    if contiguous:
        index, size = None, 5
    lengths = torch.randint(1, 50, (rows,), generator=g).float()
    weights = torch.tensor([1.0, 0.5, -2.0])
    given = options.center == "tensor"
    center = torch.randn(rows, generator=g) if given else None
    scale = torch.rand(rows, generator=g) + 0.5 if options.scale == "tensor" else None
    want = reference_group.forward(rewards, index, size, lengths, weights, center, scale, options)
    moved = [
        x if x is None or isinstance(x, int) else x.to(device)
        for x in (rewards, index, size, lengths, weights, center, scale)
    ]
    got = module.forward(*moved, options)
    close(got, want, 1e-6, 1e-6, "advantages")
    assert torch.equal(got.nan_to_num(7.0), module.forward(*moved, options).nan_to_num(7.0))
    on_device = replace(options, eps=torch.tensor(options.eps, dtype=torch.float64, device=device))
    close(module.forward(*moved, on_device), want, 1e-6, 1e-6, "advantages with eps on the device")


def check_group_statistics(module: ModuleType, device: str, rows: int, *, contiguous: bool, wide: bool) -> None:
    g = torch.Generator().manual_seed(rows)
    x = torch.randn(rows, generator=g, dtype=torch.float64 if wide else torch.float32)
    x[rows // 2 :] = x[rows // 2 :].round()  # ties
    x[torch.rand(rows, generator=g) < 0.2] = torch.nan
    index, size = torch.randint(-3, max(2, rows // 40), (rows,), generator=g) * 10**12, 0
    index[-1] = 2**60  # a singleton
    if contiguous:
        index, size = None, 5
    for weights in (None, torch.rand(rows, generator=g).round()):
        given = (x, index, size, weights, True)
        moved = [y.to(device) if isinstance(y, Tensor) else y for y in given]
        got = module.statistics(*moved)
        close(got, reference_group.statistics(*given), 1e-9, 1e-12, "statistics")
        assert torch.equal(got.nan_to_num(7.0), module.statistics(*moved).nan_to_num(7.0))
        bare = module.statistics(*moved[:-1], False)
        assert torch.equal(got[:-1].nan_to_num(7.0), bare[:-1].nan_to_num(7.0))
    near = torch.tensor([1e6, 1e6 + 1e-3, 1e6 - 1e-3, 700.0, 700.0, -700.0], dtype=torch.float64, device=device)
    got = module.statistics(near, None, 3, None, True).cpu()
    close(got[2, :1], torch.tensor([2e-6]), 0.0, 1e-6, "squares far from zero")
    close(got[7, 3:], torch.full((3,), 700.0), 1e-12, 0.0, "exponentials far from zero")


def check_group_corners(module: ModuleType, device: str) -> None:
    """Right answers that are known without a reference: 0 / 0, no degrees of freedom, no tokens, groups of one."""

    def advantages(rewards: Tensor, center_values: Tensor | None = None, **options: Any) -> Tensor:
        index = torch.tensor([4, 7, 7, 9, 9, 9, 9], device=device)
        lengths = torch.tensor([0.0, 0, 0, 2, 0, 2, 0], device=device)
        given = None if center_values is None else center_values.to(device)
        return module.forward(rewards.to(device), index, 0, lengths, None, given, None, GroupOptions(**options)).cpu()

    equal = torch.full((7, 3), 0.1, dtype=torch.float64) * torch.tensor([1.0, 7.0, 0.3])
    for center, scale in itertools.product(CENTERS[1:-1], ("std", "max")):
        for normalize in NORMALIZES:
            got = advantages(equal, center=center, scale=scale, eps=0.0, normalize=normalize)
            assert torch.equal(got, torch.zeros(7)), (center, scale, normalize)
    rewards = torch.tensor([[2.0], [3.0], [5.0], [1.0], [2.0], [3.0], [9.0]])
    assert torch.equal(advantages(rewards, ddof=4), torch.zeros(7))
    got = advantages(rewards, center="length-weighted", scale="none")
    assert torch.equal(got, torch.tensor([0.0, 0, 0, -1, 0, 1, 7]))
    for singleton in SINGLETONS:
        assert torch.equal(advantages(rewards, center="none", scale="none", singleton=singleton), rewards[:, 0])
        got = advantages(rewards, torch.ones(7), center="tensor", scale="none", singleton=singleton)
        assert torch.equal(got, rewards[:, 0] - 1)
        scaled = advantages(rewards, torch.ones(7), center="tensor", scale="batch-std", singleton=singleton)
        close(scaled, (rewards[:, 0] - 1) / (rewards.std() + 1e-6), 1e-6, 1e-6)
        for scale in ("std", "max"):  # statistics of the group
            first = advantages(rewards, torch.ones(7), center="tensor", scale=scale, singleton=singleton)[:1]
            alone = {"zero": 0.0, "raw": 2.0, "nan": torch.nan}[singleton]
            torch.testing.assert_close(first, torch.tensor([alone]), rtol=0, atol=0, equal_nan=True)


def check_whiten(
    module: ModuleType, device: str, shape: tuple[int, ...], *, shift_mean: bool, masked: bool, offset: float
) -> None:
    g = torch.Generator().manual_seed(3)
    x = torch.randn(shape, generator=g) + offset
    mask = (torch.rand(shape, generator=g) < 0.7).int() if masked else None
    if mask is not None:
        x[mask == 0] = torch.nan
    want = reference_whiten.whiten(x, mask, shift_mean=shift_mean)
    moved, on_device = x.to(device), None if mask is None else mask.to(device)
    out = torch.full_like(moved, torch.nan)
    module.forward(moved, on_device, shift_mean, 1, 1e-8, out)
    close(out, want, 2e-6, 1e-6, "whitened")
    statistics = module.statistics(moved, on_device)
    close(statistics, reference_whiten.statistics(x, mask), 1e-9, 1e-11, "statistics")
    again = torch.empty_like(out)
    module.forward(moved, on_device, shift_mean, 1, 1e-8, again)
    assert torch.equal(out, again)
    module.forward(moved, on_device, shift_mean, 1, 1e-8, moved)
    assert torch.equal(out, moved)


def check_token_rewards(
    module: ModuleType, device: str, kl: RewardKL | None, place: Place, *, packed: bool, width: int = 3001
) -> None:
    """Masked with holes, an empty sequence, one that is not scored, NaN under the mask; all valid; numbers on it."""
    g = torch.Generator().manual_seed(5)
    shape = (4, width)
    mask = (torch.rand(shape, generator=g) < 0.7).long()
    mask[0], mask[1, width // 3 :], mask[2, : width - 20] = 0, 0, 0
    scores = torch.tensor([1.0, torch.nan, -0.3, 3.0])
    logprobs, ref = -torch.rand(shape, generator=g), -torch.rand(shape, generator=g)
    bounds = torch.tensor([0, width, 2 * width, 2 * width, 4 * width]) if packed else None
    tokens = shape if not packed else (4 * width,)
    numbers = [0.1, 0.5, 0.3, -0.2, 2.0]
    for counted in (mask, None):
        terms = [x if counted is None else x.masked_fill(mask == 0, torch.nan) for x in (logprobs, ref)]
        pair = [None if kl is None else x.view(tokens) for x in terms]
        given = Tokens(tokens, None if counted is None else counted.view(tokens), bounds)
        want = torch.full(tokens, torch.nan)
        reference_rewards.token_rewards(scores, pair[0], pair[1], given, kl or "k1", place, numbers, want)
        moved = Tokens(tokens, *(None if x is None else x.to(device) for x in (given.mask, bounds)))
        there = [None if x is None else x.to(device) for x in (scores, *pair)]
        for values in (numbers, torch.tensor(numbers, dtype=torch.float64, device=device)):
            out = torch.full(tokens, torch.nan, device=device)
            module.token_rewards(there[0], there[1], there[2], moved, kl or "k1", place, values, out)
            close(out, want, 1e-6, 1e-6, "rewards")


def check_whiten_corners(module: ModuleType, device: str) -> None:
    """Right answers that are known without a reference: equal values, and too few of them."""
    mask = torch.rand(3, 5001, generator=torch.Generator().manual_seed(1)) < 0.7
    for value in (0.1, 1 / 3, 12345.678, -1e30):
        for shift_mean, ddof in ((True, 1), (False, 0)):
            x = torch.full(mask.shape, value).masked_fill(~mask, torch.nan).to(device)
            module.forward(x, mask.to(device), shift_mean, ddof, 0.0, x)  # in place, eps 0
            want = torch.zeros(mask.shape) if shift_mean else torch.full(mask.shape, value) * mask
            close(x, want, 0.0, 1e-7, f"equal values {value}")
    few = torch.tensor([7.0, 3.0, 9.0], device=device)
    for shift_mean, want in ((True, 0.0), (False, 3.0)):
        out = torch.full_like(few, torch.nan)
        module.forward(few, torch.tensor([0, 1, 0], device=device), shift_mean, 1, 1e-8, out)
        assert out.tolist() == [0.0, want, 0.0]
    module.forward(few, torch.zeros(3, device=device), True, 1, 0.0, few)
    assert few.tolist() == [0.0, 0.0, 0.0]


#: How a row's tokens are cut: by runs with holes, in any order, whole.
SEGMENTS = ("runs", "anywhere", "whole")


def check_segments(module: ModuleType, device: str, kind: str, packed: bool, tokens: int = 300) -> None:
    """Every reduction and its adjoint: weights or none, an empty segment, a row without tokens, NaN in between."""
    g = torch.Generator().manual_seed(2)
    rows, segments = 3, 4
    x = torch.randn(rows, tokens, generator=g)
    anywhere = torch.randint(-1, segments - 1, (rows, tokens), generator=g)
    ids = (anywhere if kind == "anywhere" else anywhere.sort(-1).values).roll(7, -1)
    weights = torch.rand(rows, tokens, generator=g) * (torch.rand(rows, tokens, generator=g) < 0.7)
    weights[1] = 0.0
    x[(weights == 0) | ((ids < 0) & (kind != "whole"))] = torch.nan
    bounds = torch.tensor([0, tokens, tokens, 3 * tokens]) if packed else None
    upstream = torch.randn(rows, segments if kind != "whole" else 1, generator=g)
    shaped = [t.reshape(-1) if packed else t for t in (x, ids, weights)]
    for i, op in enumerate(SEGMENT_OPS):  # weights, a mask, nothing in turn, and numbers on the host and on the device
        form = (shaped[2], shaped[2] > 0, None)[(i + SEGMENTS.index(kind)) % 3]
        given_x = shaped[0].nan_to_num(0.3) if form is None else shaped[0]
        chosen = None if kind == "whole" else shaped[1] if op != "max" else shaped[1].int()
        known = SegmentOptions(op, 0.3, -7.0)
        on_device = SegmentOptions(op, *torch.tensor([0.3, -7.0], dtype=torch.float64, device=device))
        options = on_device if (i + packed) % 2 else known
        tensors = [None if t is None else t.to(device) for t in (given_x, chosen, form, bounds)]
        want = reference_segments.reduce(given_x, chosen, form, bounds, upstream.shape[1], known, False)
        close(module.reduce(*tensors, upstream.shape[1], options, False), want, 1e-6, 1e-6, op)
        want, out = torch.empty_like(given_x), torch.full_like(given_x, torch.nan).to(device)
        reference_segments.adjoint(upstream, given_x, chosen, form, bounds, known, want)
        module.adjoint(upstream.to(device), *tensors, options, out)
        close(out, want, 1e-6, 1e-6, f"adjoint of {op}")


def check_segment_ids(module: ModuleType, device: str, tokens: int = 300) -> None:
    """Runs, labels and ends, the tail in and out, padded and packed."""
    g = torch.Generator().manual_seed(4)
    mask = torch.rand(3, tokens, generator=g) < 0.9
    labels = torch.randint(-1, 2, (3, tokens), generator=g)
    ends = torch.rand(3, tokens, generator=g) < 0.05
    mask[1], ends[2] = False, False
    counts = ends.int() * 2
    for packed in (False, True):
        bounds = torch.tensor([0, 3, 3, 3 * tokens]) if packed else None
        for given in ((mask, None, None), (None, labels, None), (mask, labels.int(), None), (mask, None, ends),
                      (None, None, counts)):  # fmt: skip
            flat = [t if t is None or not packed else t.reshape(-1) for t in given]
            for tail in (True, False):
                want = reference_segments.ids(*flat, tail, bounds)
                moved = [None if t is None else t.to(device) for t in (*flat, bounds)]
                assert torch.equal(module.ids(*moved[:3], tail, moved[3]).cpu(), want)


def check_segment_corners(module: ModuleType, device: str) -> None:
    """NaN, infinite values, no tokens, no rows, no segments, ids out of range."""
    inf = torch.inf
    if device != "cpu" or module.__name__ != "fastreward.cpu.segments":  # which refuses it
        x, ids = torch.tensor([[torch.nan, 1.0, torch.nan]], device=device), torch.tensor([[0, 1, 1]], device=device)
        for op in ("sum", "mean", "min", "max", "first", "last", "logsumexp", "mean-exp", "softmin"):
            got = module.reduce(x, ids, None, None, 2, SegmentOptions(op, 1.0, 5.0), False)
            assert got.isnan().tolist() == [[True, op != "first"]], op
    x = torch.tensor([[-inf, -inf, 1.0, -inf, inf, 2.0]], device=device)
    ids = torch.tensor([[0, 0, 1, 1, 2, 2]], device=device)
    for op, want in (("logsumexp", [-inf, 1.0, inf]), ("max", [-inf, 1.0, inf]), ("min", [-inf, -inf, 2.0])):
        assert module.reduce(x, ids, None, None, 3, SegmentOptions(op), False).tolist() == [want]
    assert module.reduce(x, ids, None, None, 3, SegmentOptions("softmin", 1e-3), False).tolist()[0][2] == 2.0
    out = torch.full_like(x, 9.0)
    module.adjoint(torch.ones(1, 2, device=device), None, ids - 1, None, None, SegmentOptions("last"), out)
    assert out.tolist() == [[0, 0, 0, 1, 0, 1]]
    for shape, segments in (((0, 4), 3), ((3, 0), 3), ((3, 4), 0)):
        tokens, none = torch.zeros(shape, device=device), torch.zeros(shape, dtype=torch.int64, device=device)
        got = module.reduce(tokens, none - 1, None, None, segments, SegmentOptions("mean", 1.0, 5.0), False)
        assert torch.equal(got.cpu(), torch.full((shape[0], segments), 5.0))
        out = torch.full(shape, 9.0, device=device)
        module.adjoint(got, None, none - 1, None, None, SegmentOptions("mean"), out)
        assert not out.any()
        assert module.ids(none == 0, None, None, True, None).shape == shape


def check_extreme_temperatures(module: ModuleType, device: str, dtype: torch.dtype, vocab: int) -> None:
    """Hot: uniform over what is possible; cold: over the largest logits, and nothing (or next to it) elsewhere."""
    case = logits_case("plain", dtype, 4, vocab)
    case.logits[0] = 0.0
    case.logits[1, 1::3] = -torch.inf
    case.logits[2, vocab // 2] = case.logits[2, -1] = 20.0
    possible, largest = case.logits > -torch.inf, case.logits == case.logits.amax(-1, keepdim=True)
    for inverse in (1e-300, 1e-39, 1e-36, 1e8, 1e12, 1e39, 1e300):
        support = possible if inverse < 1 else largest
        count = support.sum(-1).double()
        inside = support.gather(1, case.labels.unsqueeze(1)).squeeze(1)
        for form in (inverse, torch.full((4,), inverse, dtype=torch.float64)):
            case.inv_temperature = form
            arguments = case.arguments(device)
            values, indices, ids = module.forward(*arguments, EVERYTHING)
            rows = dict(zip(VALUES, values.cpu().double(), strict=True))
            logprobs = torch.where(rows["logprobs"] < -1e4, -torch.inf, rows["logprobs"])
            want = torch.where(inside, -count.log(), -torch.inf)
            close(logprobs, want, 3e-6, 1e-6, f"logprobs at {inverse}")
            close(rows["entropy"], count.log(), 3e-6, 1e-6, f"entropy at {inverse}")
            close(rows["log_sum_sq_probs"], -count.log(), 3e-6, 1e-6, f"squares at {inverse}")
            close(rows["max_logprob"], -count.log(), 3e-6, 1e-6, f"max_logprob at {inverse}")
            assert torch.equal(indices[0].cpu(), case.logits.argmax(-1))
            grad, out = torch.ones_like(values), torch.full_like(arguments[0], torch.nan)
            module.backward(*arguments, values, ids, grad, None, out)
            assert not out.isnan().any()
            if dtype != torch.float16:
                assert out.isfinite().all()

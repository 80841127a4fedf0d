"""token_divergence over a vocabulary that is split over ranks: what one process gives, gradients included."""

from __future__ import annotations

from typing import Any

import pytest
import rank_calls
import torch
from criterion import close_to_one_process
from rank_pool import RankPool
from torch import Tensor

V = 100
OUTPUTS = ("entropy", "teacher_entropy", "logprobs", "top1_agreement")


def problem(dtype: torch.dtype = torch.float32) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Both sides [2, 5, V], with slices and a row of -inf, forbidden tokens, and NaN under the mask."""
    generator = torch.Generator().manual_seed(3)
    logits, teacher = ((3 * torch.randn(2, 5, V, generator=generator)).to(dtype) for _ in range(2))
    logits[0, 0, :40] = teacher[0, 0, 30:60] = -torch.inf
    logits[0, 1, 40:] = -torch.inf  # the last slice is all padding
    teacher[1, 0, 37:] = -torch.inf
    logits[1, 3] = -torch.inf  # NaN, as on one process
    logits[0, 2], teacher[0, 2] = torch.nan, torch.inf
    labels = torch.randint(0, V, (2, 5), generator=generator)
    labels[0, 0], labels[0, 1], labels[0, 2] = 70, 3, -100
    options = {"labels": labels, "mask": torch.tensor([[1, 1, 0, 1, 1], [1, 1, 1, 1, 1]]), "outputs": OUTPUTS}
    return {"logits": logits, "teacher_logits": teacher}, options


def compare(ranks: RankPool, cuts: list[int], leaves: dict[str, Tensor], options: dict[str, Any]) -> None:
    generator = torch.Generator().manual_seed(5)
    named = ("divergence", *(name for name in ("entropy", "logprobs") if name in options.get("outputs", ())))
    upstream = {name: torch.randn(2, 5, generator=generator) for name in named}
    request = {"operation": "token_divergence", "options": options, "upstream": upstream}
    one = rank_calls.call(None, **request, leaves=leaves)
    parts = [
        dict(zip(leaves, sides, strict=True))
        for sides in zip(*(x.split(cuts, -1) for x in leaves.values()), strict=True)
    ]
    found = ranks.run(rank_calls.call, [{**request, "leaves": part} for part in parts])
    for name, expected in one["out"].items():
        for rank in found:
            got = rank["out"][name]
            assert torch.equal(got.nan_to_num(7.0), found[0]["out"][name].nan_to_num(7.0)), name
            scale = expected.nan_to_num(0.0).abs().clamp(min=1.0)
            close_to_one_process(got / scale, expected / scale, name)
    for name, expected in one["grads"].items():
        grad = torch.cat([rank["grads"][name] for rank in found], -1)
        # Within the rounding of log-probs, which are up to 30: more than their products with p.
        scale = expected.float().nan_to_num(0.0).abs().amax(-1, keepdim=True).clamp(min=4.0).to(expected.dtype)
        close_to_one_process(grad / scale, expected / scale, f"gradient of {name}")


@pytest.mark.parametrize("cuts", [[50, 50], [100], [33, 33, 34], [37, 0, 63]], ids=str)
@pytest.mark.parametrize("name", ["reverse-kl", "forward-kl", "jsd"])
def test_every_output_and_both_gradients(name: str, cuts: list[int], ranks: RankPool) -> None:
    leaves, options = problem()
    compare(ranks, cuts, leaves, {**options, "divergence": name, "temperature": 0.8, "teacher_temperature": 1.7})


def test_half_precision_and_temperature_per_token(ranks: RankPool) -> None:
    leaves, options = problem(torch.bfloat16)
    temperature = torch.rand(2, 5) + 0.5
    temperature[0, 2] = -1.0  # under the mask
    compare(ranks, [40, 60], leaves, {"mask": options["mask"], "divergence": "hellinger", "temperature": temperature})


@pytest.mark.parametrize("tail", [True, False])
def test_over_ids(tail: bool, ranks: RankPool) -> None:
    """Of the student and the teacher, and with the teacher's log-probs of them instead of its logits."""
    leaves, options = problem()
    ids = torch.rand(2, 5, V, generator=torch.Generator().manual_seed(8)).argsort(-1)[..., :7]
    ids[0, 3, 2:] = -1
    mask = torch.ones(2, 5, dtype=torch.bool)
    mask[0, 2] = False
    options = {**options, "mask": mask, "token_ids": ids, "tail": tail, "divergence": "jsd"}
    for cuts in ([40, 60], [37, 0, 63]):
        compare(ranks, cuts, leaves, options)
    given = leaves["teacher_logits"].log_softmax(-1).gather(-1, ids.clamp(min=0)).nan_to_num(-1.0).clamp(min=-50)
    more = {**options, "teacher_logprobs": given, "outputs": ("entropy",), "labels": None}
    compare(ranks, [40, 60], {"logits": leaves["logits"]}, more)


def test_the_reference_gives_the_same(ranks: RankPool) -> None:
    leaves, options = problem()
    calls = [
        {
            "operation": "token_divergence", "options": options, "upstream": {"divergence": torch.ones(2, 5)},
            "leaves": dict(zip(leaves, sides, strict=True)),
        }
        for sides in zip(*(x.split([40, 60], -1) for x in leaves.values()), strict=True)
    ]  # fmt: skip
    plain = ranks.run(rank_calls.call, calls)
    reference = ranks.run(rank_calls.call, [{**x, "backend": "reference"} for x in calls])
    for ours, truth in zip(plain, reference, strict=True):
        for kind in ("out", "grads"):
            for name, expected in truth[kind].items():
                torch.testing.assert_close(ours[kind][name], expected, rtol=2e-6, atol=1e-5, equal_nan=True)


def test_refusals(ranks: RankPool) -> None:
    """A label and an id out of the whole vocabulary."""
    leaves, _ = problem()
    for options, message in (
        ({"labels": torch.full((2, 5), V), "outputs": ("logprobs",)}, "labels"),
        ({"token_ids": torch.tensor([1, V])}, "token_ids"),
    ):
        calls = [
            {"operation": "token_divergence", "options": options, "leaves": dict(zip(leaves, sides, strict=True))}
            for sides in zip(*(x.split([40, 60], -1) for x in leaves.values()), strict=True)
        ]
        for answer in ranks.ask(rank_calls.call, calls):
            assert answer.error is not None
            assert answer.error.startswith(f"ValueError: {message}")

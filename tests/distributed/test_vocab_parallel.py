"""A vocabulary that is split over ranks: what each gets is what one process gets from all of it, gradients included."""

from __future__ import annotations

from typing import Any

import pytest
import rank_calls
import torch
from criterion import close_to_one_process
from rank_pool import RankPool
from torch import Tensor

import fastreward as fr

OUTPUTS = (
    "logprobs",
    "entropy",
    "logsumexp",
    "label_logit",
    "mean_logit",
    "log_sum_sq_probs",
    "max_logprob",
    "argmax",
    "rank",
)
DIFFERENTIABLE = ("logprobs", "entropy", "logsumexp", "log_sum_sq_probs", "id_logprobs")
#: Widths of the slices: even, not divisible, one rank without a column.
CUTS = ([50, 50], [40, 60], [100], [33, 33, 34], [37, 0, 63])
V = 100


def problem(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """Logits [2, 5, V] with slices and a row of -inf, labels, and a mask under which there is NaN."""
    generator = torch.Generator().manual_seed(3)
    logits = (3 * torch.randn(2, 5, V, generator=generator)).to(dtype)
    labels = torch.randint(0, V, (2, 5), generator=generator)
    logits[0, 0, :40] = -torch.inf
    labels[0, 0] = 70
    logits[0, 1, 40:] = -torch.inf  # the last slice is all padding
    labels[0, 1] = 3
    logits[1, 0, 37:] = -torch.inf  # and the label in it
    logits[1, 3] = -torch.inf  # NaN, as on one process
    logits[0, 2] = torch.nan
    labels[0, 2] = -100
    return logits, labels, torch.tensor([[1, 1, 0, 1, 1], [1, 1, 1, 1, 1]])


def upstream(stats: dict[str, Tensor]) -> dict[str, Tensor]:
    """A gradient of its own for each token and output."""
    generator = torch.Generator().manual_seed(5)
    named = {name: x for name, x in stats.items() if name in DIFFERENTIABLE}
    return {name: torch.randn(x.shape, generator=generator) for name, x in named.items()}


def compare(
    ranks: RankPool, cuts: list[int], logits: Tensor, labels: Tensor, options: dict[str, Any], sliced: dict[str, Tensor]
) -> None:
    """token_logprobs over ranks of these cuts, against one process. sliced: options that are cut as the logits are."""
    plain = {**options, **sliced}
    one = rank_calls.call(None, operation="token_logprobs", args=(labels,), options=plain, leaves={"logits": logits})
    grads = upstream(one["out"])
    one = rank_calls.call(
        None, operation="token_logprobs", args=(labels,), options=plain, leaves={"logits": logits}, upstream=grads
    )
    parts = [x.split(cuts, -1) for x in sliced.values()]
    own = [dict(zip(sliced, part, strict=True)) for part in zip(*parts, strict=True)] or [{} for _ in cuts]
    found = ranks.run(
        rank_calls.call,
        [
            {
                "operation": "token_logprobs", "args": (labels,), "options": {**options, **mine},
                "leaves": {"logits": part}, "upstream": grads,
            }
            for part, mine in zip(logits.split(cuts, -1), own, strict=True)
        ],
    )  # fmt: skip
    for name, expected in one["out"].items():
        for rank in found:
            bits = rank["out"][name]
            assert torch.equal(bits.nan_to_num(7.0), found[0]["out"][name].nan_to_num(7.0)), name
            close_to_one_process(bits, expected, name)
    grad = torch.cat([rank["grads"]["logits"] for rank in found], -1)
    close_to_one_process(grad, one["grads"]["logits"], "gradient")


@pytest.mark.parametrize("cuts", CUTS, ids=str)
def test_every_output_and_its_gradient(cuts: list[int], ranks: RankPool) -> None:
    logits, labels, mask = problem()
    compare(ranks, cuts, logits, labels, {"mask": mask, "temperature": 0.8, "outputs": OUTPUTS}, {})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_and_temperature_per_token(dtype: torch.dtype, ranks: RankPool) -> None:
    logits, labels, mask = problem(dtype)
    temperature = torch.rand(2, 5) + 0.5
    temperature[0, 2] = -1.0  # under the mask
    compare(ranks, [40, 60], logits, labels, {"mask": mask, "temperature": temperature, "outputs": OUTPUTS}, {})


@pytest.mark.parametrize("temperature", [1e-300, 1e-39, 1e39, 1e300])
def test_extreme_temperatures(temperature: float, ranks: RankPool) -> None:
    logits = torch.tensor([[0.0] * 8 + [1e9, -1e30], [0.0] * 10, [3.0, -torch.inf] * 5])
    outputs = ("logprobs", "entropy", "log_sum_sq_probs")
    compare(ranks, [3, 7], logits, torch.tensor([8, 0, 2]), {"temperature": temperature, "outputs": outputs}, {})


@pytest.mark.parametrize("cuts", [[40, 60], [33, 33, 34], [37, 0, 63]], ids=str)
@pytest.mark.parametrize("kind", ["mask", "ids", "none"])
def test_kept_tokens_and_other_ids(kind: str, cuts: list[int], ranks: RankPool) -> None:
    logits, labels, mask = problem()
    generator = torch.Generator().manual_seed(8)
    ids = torch.rand(2, 5, V, generator=generator).argsort(-1)[..., :30]
    ids[0, 3, 10:] = -1
    ids[1, 1] = torch.where(ids[1, 1] < 40, -1, ids[1, 1])  # nothing kept on the first rank
    ids[0, 4, 0] = labels[0, 4]
    ids[0, 4, 1:] = torch.where(ids[0, 4, 1:] == labels[0, 4], -1, ids[0, 4, 1:])
    outputs = (*OUTPUTS, "id_logprobs")
    options: dict[str, Any] = {"mask": mask, "outputs": outputs, "temperature": 1.3}
    options["token_ids"] = torch.tensor([0, 39, 40, 99, 0]) if kind == "mask" else ids[..., 5:8].clamp(min=0)
    if kind == "ids":
        options["kept_tokens"] = ids
    kept = torch.zeros(2, 5, V + 1).scatter_(-1, ids.where(ids >= 0, V), 1.0)[..., :V] > 0
    compare(ranks, cuts, logits, labels, options, {"kept_tokens": kept} if kind == "mask" else {})


def test_strided_rows_are_read_where_they_are(ranks: RankPool) -> None:
    """logits[:, :-1] and its like: their gaps are others' rows."""
    logits, labels, mask = problem()
    options = {"mask": mask[:, 1:], "outputs": OUTPUTS}
    one = fr.token_logprobs(logits[:, :-1], labels[:, 1:].clamp(min=0), **options)
    arguments = [
        {"operation": "token_logprobs", "args": (part[:, :-1], labels[:, 1:].clamp(min=0)), "options": options}
        for part in logits.split([40, 60], -1)
    ]
    for rank in ranks.run(rank_calls.call, arguments):
        for name, x in one.__dict__.items():
            close_to_one_process(rank["out"][name], x, name)


def test_the_gradient_in_place(ranks: RankPool) -> None:
    logits, labels, mask = problem()
    leaf = logits.clone().requires_grad_()
    fr.token_logprobs(leaf, labels, mask=mask).logprobs.square().sum().backward()
    arguments = [{"logits": x, "labels": labels, "mask": mask} for x in logits.split([40, 60], -1)]
    found = ranks.run(rank_calls.inplace, arguments)
    finite = torch.cat([rank["grad"] for rank in found], -1)
    assert leaf.grad is not None
    close_to_one_process(finite, leaf.grad, "gradient")
    rows = [0, 1, 3, 4]
    again = fr.token_logprobs(logits[:1, rows], labels[:1, rows]).logprobs
    assert again.isfinite().all()
    found = ranks.run(
        rank_calls.inplace,
        [{"logits": x[:1, rows], "labels": labels[:1, rows]} for x in logits.split([40, 60], -1)],
    )
    assert all(rank["same"] for rank in found)


def test_the_gradient_of_zero_logits(ranks: RankPool) -> None:
    """V = 4 as 2 + 2, label 0."""
    one = {"operation": "token_logprobs", "args": (torch.tensor([0]),), "leaves": {"logits": torch.zeros(1, 2)}}
    found = ranks.run(rank_calls.call, [{**one, "upstream": {"logprobs": torch.ones(1)}}] * 2)
    torch.testing.assert_close(found[0]["grads"]["logits"], torch.tensor([[0.75, -0.25]]))
    torch.testing.assert_close(found[1]["grads"]["logits"], torch.tensor([[-0.25, -0.25]]))


@pytest.mark.parametrize("tokens", [0, 1])
def test_few_tokens(tokens: int, ranks: RankPool) -> None:
    logits = torch.randn(tokens, 6)
    labels = torch.zeros(tokens, dtype=torch.int64)
    compare(ranks, [2, 4], logits, labels, {"outputs": OUTPUTS}, {})


def test_second_derivatives_are_refused(ranks: RankPool) -> None:
    logits, labels = torch.randn(3, 8), torch.tensor([0, 3, 7])
    answers = ranks.ask(rank_calls.twice, [{"logits": x, "labels": labels} for x in logits.split(4, -1)])
    for answer in answers:
        assert answer.error is not None
        assert "double backward" in answer.error


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (
            [[0, 8], [0, 8]],
            "ValueError: labels: expected integers in [0, 8), the vocabulary of logits, got 8 at index [1]",
        ),
        ([[0, 3], [0, 4]], "ValueError: labels: expected the same on every rank of process_group"),
        ([[0, 3], [0]], None),
    ],
)
def test_bad_labels_are_refused_on_every_rank(labels: list[list[int]], message: str | None, ranks: RankPool) -> None:
    """Those of one rank too, which would leave the others waiting."""
    answers = ranks.ask(
        rank_calls.call,
        [{"operation": "token_logprobs", "args": (torch.zeros(2, 4), torch.tensor(own))} for own in labels],
    )
    if message is None:
        assert answers[1].error is not None
        assert answers[1].error.startswith("ValueError: labels: expected shape [2]")
        assert answers[0].error == (
            "ValueError: process_group: rank 1 of it has refused its arguments; its own error says why"
        )
        return
    for answer in answers:
        assert answer.error is not None
        assert answer.error.startswith(message)


def test_what_is_no_process_group() -> None:
    with pytest.raises(TypeError, match=r"process_group: expected a torch.distributed.ProcessGroup .* got str"):
        fr.token_logprobs(torch.zeros(1, 4), torch.tensor([0]), process_group="world")  # type: ignore[arg-type]

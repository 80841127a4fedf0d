"""verl.workers.utils.padding: responses in and out of nested tensors, all sequences at once.

verl slices out one sequence at a time; the gradient of each slice is a tensor as large as the whole batch, so that its
backward takes the square of the batch's size. Here a batch is split once and joined once, which are one autograd node
each. The lengths are read once instead of once per sequence, which matters where they are on a GPU.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, Final

import torch
from torch import Tensor

from fastreward._arguments.transforms import transformed
from fastreward.patch.usage import handed_on
from fastreward.patch.verl.replacement import Replacement

_MODULE: Final = "verl.workers.utils.padding"


def no_padding_2_padding(stock: Any, tensor: Tensor, data: Any) -> Tensor:
    """Responses [B, R, ...] of a model's outputs [N, ...], each moved by one to the token that it predicts."""
    values = tensor.values() if tensor.is_nested else tensor
    lengths = _lengths(stock, data)
    if lengths is None or transformed() or not _fits(values, *lengths):
        handed_on()
        return stock(tensor, data)  # type: ignore[no-any-return]
    prompts, responses, width = lengths
    nothing = values.new_zeros((width, *values.shape[1:]))
    pieces = _responses(values, prompts, responses)
    padded = [x for piece, n in zip(pieces, responses, strict=True) for x in (piece, nothing[: width - n])]
    return torch.cat(padded).view(len(responses), width, *values.shape[1:])


def response_from_nested(stock: Any, tensor: Any, response_mask: Any) -> Tensor:
    """Nested responses [B, j] of nested [B, prompt + j], each moved by one to the token that it predicts."""
    values, responses = tensor.values(), response_mask.offsets().diff().tolist()
    sequences = tensor.offsets().diff().tolist()
    prompts = [n - r for n, r in zip(sequences, responses, strict=True)] if len(sequences) == len(responses) else []
    if not prompts or transformed() or not _fits(values, prompts, responses, max(responses)):
        handed_on()
        return stock(tensor, response_mask)  # type: ignore[no-any-return]
    return nested(_responses(values, prompts, responses))


def response_to_nested(stock: Any, tensor: Tensor, response_mask: Any) -> Tensor:
    """Nested responses [B, j] of padded ones [B, R]."""
    lengths = response_mask.offsets().diff().tolist() if response_mask.is_nested else []
    rows, width = tensor.shape[:2] if tensor.ndim > 1 and not tensor.is_nested else (0, 0)
    if not lengths or rows != len(lengths) or max(lengths) > width or transformed():
        handed_on()
        return stock(tensor, response_mask)  # type: ignore[no-any-return]
    sizes = [size for n in lengths for size in (n, width - n)]
    return nested(tensor.flatten(0, 1).split_with_sizes(sizes)[::2])


def left_right_2_no_padding(stock: Any, data: Any) -> Any:
    """`data`, whose token ids, positions and what else has an entry per token are nested tensors afterwards."""
    ids, mask, positions = (data.get(name, None) for name in ("input_ids", "attention_mask", "position_ids"))
    response_mask = data.get("response_mask", None)
    given = (ids, mask, positions, response_mask)
    if not all(isinstance(x, Tensor) and not x.is_nested and x.ndim == 2 for x in given) or not _alike(*given[:3]):
        handed_on()
        return stock(data)
    assign = stock.__globals__["tu"].assign_non_tensor_data
    assign(data, "max_seq_len", ids.shape[1])
    assign(data, "max_response_len", response_mask.shape[1])
    tokens = _Tokens(mask)
    assign(data, "indices", tokens.indices)
    data["input_ids"] = torch.nested.nested_tensor_from_jagged(tokens.of(data.pop("input_ids")), offsets=tokens.offsets)
    data["position_ids"] = _jagged(tokens.of(positions), tokens.lengths)
    data["loss_mask"] = data["response_mask"]
    experts = data.get("routed_experts", None)
    others = ["routed_experts"] if experts is not None and not experts.is_nested else []
    if data.get("teacher_logprobs", None) is not None and data.get("teacher_ids", None) is not None:
        others += ["teacher_logprobs", "teacher_ids"]
    for name in others:
        data[name] = torch.nested.nested_tensor_from_jagged(tokens.of(data[name]), offsets=tokens.offsets)
    return data


def _alike(ids: Tensor, mask: Tensor, positions: Tensor) -> bool:
    return ids.shape == mask.shape == positions.shape and bool(mask.any())


class _Tokens:
    """The tokens of a padded batch that its mask [B, T] has."""

    def __init__(self, mask: Tensor) -> None:
        rows, self.width = mask.shape
        self.indices = mask.flatten().nonzero().flatten()
        bounds = torch.arange(rows + 1, device=mask.device) * self.width
        offsets = torch.searchsorted(self.indices, bounds)
        self.offsets = offsets.to(torch.int32)
        self.lengths: list[int] = offsets.diff().tolist()
        self.runs = self._runs(offsets)

    def _runs(self, offsets: Tensor) -> list[int] | None:
        """Sizes of the runs beside and of the tokens, by turns, if each row's tokens are one run."""
        filled = offsets.diff() > 0
        first, last = self.indices[offsets[:-1][filled]], self.indices[offsets[1:][filled] - 1]
        if not bool((last - first + 1 == offsets.diff()[filled]).all()):
            return None
        edges = torch.stack([first, last + 1], dim=1).flatten().tolist()
        return [end - begin for begin, end in itertools.pairwise([0, *edges, len(self.lengths) * self.width])]

    def of(self, x: Tensor) -> Tensor:
        """[N, ...] of x [B, T, ...]."""
        flat = x.flatten(0, 1)
        return flat[self.indices] if self.runs is None else torch.cat(flat.split_with_sizes(self.runs)[1::2])


def _lengths(stock: Any, data: Any) -> tuple[list[int], list[int], int] | None:
    """Of prompts and responses, and to what the responses are padded; None where verl raises."""
    prompts, responses = data["prompts"], data["responses"]
    width = stock.__globals__["tu"].get_non_tensor_data(data=data, key="max_response_len", default=-1)
    if prompts.is_nested:
        both = torch.stack([prompts.offsets().diff(), responses.offsets().diff()])
    elif (mask := data["attention_mask"]).is_nested:
        return None
    else:
        halves = mask[:, : prompts.shape[1]], mask[:, prompts.shape[1] :]
        both, width = torch.stack([half.sum(dim=1) for half in halves]), responses.shape[1]
    in_prompt, in_response = both.tolist()
    return in_prompt, in_response, max(in_response, default=0) if width < 0 else width


def _fits(values: Tensor, prompts: Sequence[int], responses: Sequence[int], width: int) -> bool:
    """Whether each response has a token before it, room in its row, and all of the values are accounted for."""
    whole = all(isinstance(n, int) for n in (*prompts, *responses))  # sums of a float mask are not
    return (
        whole
        and sum(prompts) + sum(responses) == values.shape[0]
        and min(prompts, default=0) > 0
        and 0 <= min(responses) <= max(responses) <= width
    )


def _responses(values: Tensor, prompts: Sequence[int], responses: Sequence[int]) -> tuple[Tensor, ...]:
    """The entries of each response, from the one before its first token on."""
    sizes = [size for both in zip(prompts, responses, strict=True) for size in both]
    sizes[0] -= 1
    return values.split_with_sizes([*sizes, 1])[1::2]


def nested(pieces: Sequence[Tensor]) -> Tensor:
    """Pieces as one nested tensor, with offsets of its own."""
    return _jagged(torch.cat(tuple(pieces)), [len(piece) for piece in pieces])


def _jagged(values: Tensor, lengths: list[int]) -> Tensor:
    offsets = torch.tensor([0, *itertools.accumulate(lengths)], device=values.device)
    return torch.nested.nested_tensor_from_jagged(values, offsets, min_seqlen=min(lengths), max_seqlen=max(lengths))


REPLACEMENTS: Final = (
    Replacement(
        f"{_MODULE}.no_padding_2_padding",
        ("tensor", "data"),
        no_padding_2_padding,
        "one split and one join",
        "a backward in linear time",
        lambda tensor, data: tensor.values().shape[0] if tensor.is_nested else tensor.shape[0],
    ),
    Replacement(
        f"{_MODULE}.response_from_nested",
        ("tensor", "response_mask"),
        response_from_nested,
        "one split and one join",
        "a backward in linear time",
        lambda tensor, response_mask: tensor.values().shape[0],
    ),
    Replacement(
        f"{_MODULE}.response_to_nested",
        ("tensor", "response_mask"),
        response_to_nested,
        "one split and one join",
        "a backward in linear time",
    ),
    Replacement(
        f"{_MODULE}.left_right_2_no_padding",
        ("data",),
        left_right_2_no_padding,
        "runs of tokens, copied as they lie",
        "the mask is read once",
        lambda data: data["response_mask"].numel(),
    ),
)

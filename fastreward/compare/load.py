"""One side of a comparison: what it says of its tokens, wherever that comes from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

import torch
from torch import Tensor

from fastreward._arguments import check
from fastreward._arguments.arrays import array_kind, as_tensor
from fastreward._arguments.tokens import token_bounds
from fastreward.compare import files

Kind = Literal["logprobs", "top-k", "logits"]
FLOATS: Final = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
#: Names of the log-probs in what trainers write: the engine's on side A, the trainer's own on side B.
_OWN: Final = {
    "A": ("rollout_logprobs", "rollout_log_probs", "sampling_per_token_logps"),
    "B": ("old_logprobs", "old_log_probs", "old_per_token_logps"),
}
_NAMES: Final = {
    "logprobs": ("logprobs", "log_probs"),
    "top_logprobs": ("top_logprobs",),
    "top_ids": ("top_ids",),
    "logits": ("logits",),
    "tokens": ("tokens", "responses", "completion_ids"),
    "mask": ("mask", "response_mask", "completion_mask"),
    "lengths": ("lengths",),
    "cu_seqlens": ("cu_seqlens",),
}


@dataclass(frozen=True)
class Side:
    """What one side says of the places of [B, T], or of N packed tokens: `lead` is that shape."""

    name: str  # "A" or "B"
    lead: tuple[int, ...]
    bounds: Tensor  # i64 [B + 1]: where the places of a sequence begin, flat
    valid: Tensor | None  # bool [places]; None: nothing says which count
    tokens: Tensor | None  # i64 [places]
    logprobs: Tensor | None  # lead, of the tokens
    top_logprobs: Tensor | None  # [*lead, k]
    top_ids: Tensor | None  # [*lead, k]; negative: nothing there
    logits: Tensor | None  # [*lead, V]

    @property
    def kind(self) -> Kind:
        """The most that it says."""
        return "logits" if self.logits is not None else "top-k" if self.top_ids is not None else "logprobs"

    @property
    def places(self) -> int:
        """B * T, or N."""
        return int(self.bounds[-1])

    def rows(self, x: Tensor, places: Tensor) -> Tensor:
        """x [*lead, ...] at some of its places, on the CPU: the only copy that is made of it."""
        index = (places,) if len(self.lead) == 1 else (places // self.lead[1], places % self.lead[1])
        return x[tuple(i.to(x.device) for i in index)].detach().cpu()


def load(
    name: str,
    given: Any,
    key: str | None = None,
    mask: Any = None,
    tokens: Any = None,
    cu_seqlens: Any = None,
) -> Side:
    """A side from a file, a tensor or array, or a mapping; mask, tokens and cu_seqlens where it has none of its own.

    Raises:
        TypeError, ValueError: names the side and what is wrong with it.
    """
    if isinstance(given, str | Path):
        given = files.read(Path(given))
    if not isinstance(given, Mapping):
        given, key = {"": as_tensor(given)}, ""
    found = {"tokens": tokens, "cu_seqlens": cu_seqlens}
    found = {k: x for k, x in found.items() if x is not None} | _named(name, given, key, cu_seqlens is not None)
    found = {k: _tensor(f"{name}: {k}", x) for k, x in found.items()}
    _check_values(name, found)
    lead = _lead(name, found)
    bounds = _bounds(name, found, lead)
    own = _valid(name, found, lead)
    if own is None and mask is not None:
        own = _mask(f"{name}: mask", as_tensor(mask), lead)
    return Side(
        name,
        lead,
        bounds,
        own,
        None if "tokens" not in found else _tokens(name, found["tokens"], lead),
        found.get("logprobs"),
        found.get("top_logprobs"),
        found.get("top_ids"),
        found.get("logits"),
    )


def _named(name: str, given: Mapping[Any, Any], key: str | None, packed: bool) -> dict[str, Any]:
    """What is there, by our names; key: the name of the log-probs, or of the logits by its dimensions."""
    known = dict(_NAMES, logprobs=(*_NAMES["logprobs"], *_OWN[name]))
    found = {}
    for ours, theirs in known.items():
        there = [x for x in theirs if given.get(x) is not None]
        if there:
            found[ours] = given[there[0]]
    if key is not None:
        if key not in given:
            raise ValueError(f"{name}: there is no {key!r}; there are {', '.join(map(str, given)) or 'no names'}")
        values = _tensor(f"{name}: {key}" if key else name, given[key])
        flat = 1 if packed or "cu_seqlens" in found or values.ndim == 1 else 2
        for other in ("logprobs", "top_logprobs", "top_ids", "logits"):
            found.pop(other, None)
        found["logprobs" if values.ndim == flat else "logits"] = values
    if not {"logprobs", "top_logprobs", "logits"} & set(found):
        wanted = ", ".join((*known["logprobs"], "top_logprobs", "logits"))
        names = ", ".join(map(str, given)) or "none"
        raise ValueError(f"{name}: expected one of the names {wanted} (or yours: key_a=, --key-a, ...), got {names}")
    if ("top_logprobs" in found) != ("top_ids" in found):
        raise ValueError(f"{name}: expected top_logprobs and top_ids together, got one of them")
    return found


def _tensor(name: str, x: Any) -> Tensor:
    x = as_tensor(x)
    if array_kind(x) == "distributed":
        check.plain(name, x)
    return check.tensor(name, x)


def _check_values(name: str, found: Mapping[str, Tensor]) -> None:
    for key in ("logprobs", "top_logprobs", "logits"):
        if key in found:
            check.dtype(f"{name}: {key}", found[key], FLOATS)
    if "top_ids" in found:
        check.integers(f"{name}: top_ids", found["top_ids"])
        check.shape(f"{name}: top_ids", found["top_ids"], found["top_logprobs"].shape, "as top_logprobs")
    for key, what in (("logits", "a vocabulary"), ("top_logprobs", "at least one id per token")):
        if key in found and found[key].numel() == 0 and found[key].shape[-1:] == (0,) and found[key].ndim > 1:
            raise ValueError(f"{name}: {key}: expected {what}, got shape {list(found[key].shape)}")
    if "logits" in found and found["logits"].shape[-1:] == (1,):
        shape = list(found["logits"].shape)
        raise ValueError(f"{name}: logits: expected a vocabulary, got shape {shape}; log-probs of tokens are [B, T]")


def _lead(name: str, found: Mapping[str, Tensor]) -> tuple[int, ...]:
    """[B, T], or [N] where there are cu_seqlens; the same of all that is there."""
    shapes = {k: tuple(found[k].shape) for k in ("logprobs", "top_logprobs", "logits") if k in found}
    leads = {k: shape if k == "logprobs" else shape[:-1] for k, shape in shapes.items()}
    first, lead = next(iter(leads.items()))
    for key, other in leads.items():
        if other != lead:
            raise ValueError(f"{name}: {key}: expected the tokens of {first}, {list(lead)}, got {list(other)}")
    packed = "cu_seqlens" in found
    if len(lead) != (1 if packed else 2):
        shape = list(shapes[first])
        tail = {"logprobs": "", "top_logprobs": ", k", "logits": ", V"}[first]
        raise ValueError(
            f"{name}: {first}: expected [B, T{tail}], or [N{tail}] with cu_seqlens, got shape {shape}"
            + (" with cu_seqlens" if packed else "")
        )
    return lead


def _bounds(name: str, found: Mapping[str, Tensor], lead: tuple[int, ...]) -> Tensor:
    if len(lead) == 2:
        return torch.arange(lead[0] + 1) * lead[1]
    bounds = token_bounds(found["cu_seqlens"].cpu(), torch.empty(lead), f"{name}: tokens", f"{name}: cu_seqlens")
    assert bounds is not None
    return bounds


def _valid(name: str, found: Mapping[str, Tensor], lead: tuple[int, ...]) -> Tensor | None:
    """The side's own mask, flat; that of its lengths."""
    own = _mask(f"{name}: mask", found["mask"], lead) if "mask" in found else None
    if "lengths" not in found or len(lead) == 1:
        return own
    check.integers(f"{name}: lengths", found["lengths"])
    check.shape(f"{name}: lengths", found["lengths"], lead[:1], "one per sequence")
    lengths = found["lengths"].cpu()
    if bool(((lengths < 0) | (lengths > lead[1])).any()):
        raise ValueError(f"{name}: lengths: expected 0 to {lead[1]}, the width, got {lengths.tolist()}")
    inside = (torch.arange(lead[1]) < lengths.unsqueeze(-1)).reshape(-1)
    return inside if own is None else inside & own


def _mask(name: str, mask: Any, lead: tuple[int, ...]) -> Tensor:
    given = check.tensor(name, mask)
    check.shape(name, given, lead, "one per token")
    return (given != 0).reshape(-1).cpu()


def _tokens(name: str, tokens: Tensor, lead: tuple[int, ...]) -> Tensor:
    check.integers(f"{name}: tokens", tokens)
    check.shape(f"{name}: tokens", tokens, lead, "one per token")
    return tokens.reshape(-1).long().cpu()

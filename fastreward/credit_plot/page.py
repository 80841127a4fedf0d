"""A page on the credit of a batch: one HTML file that needs nothing else, neither a server nor the network."""

from __future__ import annotations

import html
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np
from torch import Tensor

from fastreward._arguments import check
from fastreward._arguments.groups import GroupIds
from fastreward._runtime.layout import Clip
from fastreward.credit_plot.batch import Batch, Texts, batch_of
from fastreward.credit_plot.packing import packed_floats, packed_integers
from fastreward.prefix_tree.operations import TreeOperations
from fastreward.prefix_tree.views import HostForest

#: What a page's name ends in.
ENDINGS: Final = (".html", ".htm")
_HERE: Final = Path(__file__).parent
#: How values are coloured: by their kinds, those of `extra` by their names, others by their signs.
_SCALES: Final = {
    "advantages": "diverging",
    "ratio": "ratio",
    "logprobs": "low",
    "logprob": "low",
    "entropy": "high",
    "clip": "codes",
}


def credit_page(
    path: str | Path,
    tokens: Tensor,
    advantages: Tensor | Mapping[str, Tensor],
    mask: Tensor | None = None,
    *,
    logprobs: Tensor | None = None,
    ratio: Tensor | None = None,
    entropy: Tensor | None = None,
    extra: Mapping[str, Tensor] | None = None,
    rewards: Tensor | None = None,
    group_ids: GroupIds | None = None,
    lengths: Tensor | None = None,
    attention_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    text: Texts | None = None,
    tree: TreeOperations | None = None,
    title: str = "Credit",
) -> None:
    """Writes a page that shows a batch token by token, coloured by advantage, log-prob, ratio, entropy or other values.

    One HTML file without any address in it: it opens offline in any current browser, and can be sent. A million tokens
    with five values each take some 20 MB. Values are kept to five digits.

    Args:
        path: where it goes, .html; what is there is overwritten.
        tokens: integers, padded [B, T], or packed [N] with cu_seqlens.
        advantages: in the shape of tokens or [B]; or several by the names of their schemes.
        mask: in the shape of tokens; nonzero = a token that counts. Others are shown without colour, whatever their
            values are.
        logprobs, ratio, entropy: in the shape of tokens.
        extra: other values by name, in the shape of tokens or [B], such as the `tokens` of a `policy_loss` with
            return_tokens; "ratio", "logprob", "entropy" and "clip" are coloured as what they are.
        rewards: [B]. group_ids: names of groups, of any kind.
        lengths, attention_mask: where sequences end (and begin), as in PrefixTree; else at the last valid token.
        text: text of a token by its id, or a function such as a tokenizer's `decode`, which is called for each id that
            occurs; ids are shown without.
        tree: `PrefixTree` of the sequences, to be drawn beside them.
        title: of the page.

    Raises:
        TypeError, ValueError: wrong dtypes or shapes, a name given twice, a text that is missing, a tree of other
            sequences, a path that can't be written; before anything is written.
    """
    path = Path(path)
    if path.suffix not in ENDINGS:
        raise ValueError(f"path: expected a file that ends in .html, got {path}")
    check.output_file("path", path)
    several = advantages if isinstance(advantages, Mapping) else {"advantages": advantages}
    named: dict[str, Mapping[str, Any]] = {"advantages": several}
    for name, x in (("logprobs", logprobs), ("ratio", ratio), ("entropy", entropy)):
        if x is not None:
            named[name] = {name: x}
    batch = batch_of(
        tokens, mask, {**named, "extra": extra or {}}, rewards=rewards, group_ids=group_ids, lengths=lengths,
        attention_mask=attention_mask, cu_seqlens=cu_seqlens,
    )  # fmt: skip
    path.write_text(page(batch, text, tree, title), encoding="ascii")


def page(batch: Batch, text: Texts | None, tree: TreeOperations | None, title: str) -> str:
    """The page as text, in ASCII."""
    parts = {
        "TITLE": html.escape(title).encode("ascii", "xmlcharrefreplace").decode("ascii"),
        "STYLE": (_HERE / "page.css").read_text(encoding="ascii"),
        "DATA": _inside_script(json.dumps(_content(batch, text, tree), separators=(",", ":"))),
        "SCRIPT": (_HERE / "page.js").read_text(encoding="ascii"),
    }
    before, *rest = (_HERE / "page.html").read_text(encoding="ascii").split("{{")
    # Piece by piece: what a part holds is never looked at again.
    return before + "".join(parts[name] + after for name, _, after in (piece.partition("}}") for piece in rest))


def _inside_script(data: str) -> str:
    """JSON that no HTML parser takes for a tag or a comment, whatever the strings in it are."""
    return data.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _content(batch: Batch, text: Texts | None, tree: TreeOperations | None) -> dict[str, Any]:
    vocabulary, numbers = np.unique(batch.ids, return_inverse=True)
    groups = {name: k for k, name in enumerate(dict.fromkeys(batch.groups))}
    return {
        "vocabulary": {"ids": vocabulary.tolist(), "texts": _texts(vocabulary.tolist(), text)},
        "tokens": packed_integers(numbers.reshape(-1)),
        "counted": packed_integers(batch.counted),
        "lengths": packed_integers(batch.lengths),
        "rewards": batch.rewards,
        "groups": {"names": list(groups), "of": packed_integers(np.array([groups[name] for name in batch.groups]))},
        "values": [
            {"name": name, "scale": _scale(batch, name), "numbers": packed_floats(x)}
            for name, x in batch.values.items()
        ],
        "clips": {int(which): which.name.lower() for which in Clip},
        "tree": None if tree is None else _tree(batch, tree),
    }


def _texts(ids: list[int], text: Texts | None) -> list[str] | None:
    if text is None:
        return None
    if not isinstance(text, Mapping):
        return [str(text([token])) for token in ids]
    missing = next((token for token in ids if token not in text), None)
    if missing is not None:
        raise ValueError(f"text: expected one for each token, got none for {missing}")
    return [str(text[token]) for token in ids]


def _scale(batch: Batch, name: str) -> str:
    """How the values are coloured."""
    known = _SCALES.get(name if batch.kinds[name] == "extra" else batch.kinds[name])
    if known is not None:
        return known
    finite = batch.values[name][np.isfinite(batch.values[name])]
    if not finite.size or finite.min() >= 0:
        return "high"
    return "diverging" if finite.max() > 0 else "low"


def _tree(batch: Batch, tree: TreeOperations) -> dict[str, Any]:
    """Fields of the nodes, and the sequences in the order in which nodes name them."""
    check.shape("tree", tree.leaf, (len(batch.lengths),), "a tree of these sequences")
    forest = HostForest(tree)
    longer = (forest.length.numpy() > batch.lengths).nonzero()[0]
    if longer.size:
        b = int(longer[0])
        raise ValueError(
            f"tree: expected a tree of these sequences, got one whose sequence {b} has {int(forest.length[b])} tokens "
            f"where {batch.lengths[b]} are shown"
        )
    fields = ("parent", "edge_start", "edge_length", "count", "row_begin")
    nodes = {name: packed_integers(forest.nodes[name].numpy()) for name in fields}
    return {**nodes, "order": packed_integers(forest.order.numpy()), "leaf": packed_integers(forest.leaf.numpy())}

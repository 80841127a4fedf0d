"""Rollouts in files: token ids, rewards and groups as JSON, NumPy or torch wrote them, and pictures of their trees."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from numbers import Integral, Real
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastreward._arguments import check
from fastreward._arguments.options import TreeMode, TreeOp
from fastreward.prefix_tree import plot
from fastreward.prefix_tree.tree import PrefixTree
from fastreward.prefix_tree.views import shortened

SUFFIXES = (".json", ".jsonl", ".npz", ".pt")
#: Keys of a table (one entry for each sequence under each key) and of a record (one sequence).
_NUMBERS = ("logprobs", "old_logprobs", "ref_logprobs", "entropy")  # one for each token
_TABLE = ("tokens", "rewards", "group_ids", "mask", "lengths", "texts", *_NUMBERS)
_RECORD = ("tokens", "reward", "group", "mask", "texts", *_NUMBERS)
_NAME_IN_TABLE = {"reward": "rewards", "group": "group_ids"}


@dataclass(frozen=True)
class Rollouts:
    """Sequences with a reward each."""

    tokens: Tensor  # [B, T] i64, 0 behind a sequence's end
    lengths: Tensor | None  # [B] i64; None: the mask says it
    rewards: Tensor  # [B] f64
    groups: list[Hashable] | None = None  # B names; None: one group
    mask: Tensor | None = None  # [B, T] bool
    texts: dict[int, str] | None = None  # token id -> its text
    numbers: dict[str, Tensor] = field(default_factory=dict)  # [B, T] f32 each, of _NUMBERS those that there are

    @property
    def group_names(self) -> list[str]:
        """The groups in the order of the tree's."""
        names: dict[Hashable, None] = dict.fromkeys([0] * len(self.tokens) if self.groups is None else self.groups)
        return [str(name) for name in names]

    @property
    def decode(self) -> Callable[[list[int]], str] | None:
        """Token ids to text, where the file has texts."""
        texts = self.texts
        return None if texts is None else lambda tokens: "".join(texts[token] for token in tokens)

    def tree(self) -> PrefixTree:
        """The sequences' prefix tree."""
        return PrefixTree(self.tokens, self.mask, self.groups, lengths=self.lengths)


def read(path: Path) -> Rollouts:
    """Reads .json, .jsonl, .npz or .pt.

    A list of records {"tokens": [ids], "reward": number, "group": name, "mask": [0 or 1], "texts": [strings]}, a line
    each in .jsonl; or one table of the same, {"tokens": [[ids]], "rewards": [...], "group_ids": [...], "mask": [[...]],
    "lengths": [...], "texts": [[...]]}. Only tokens and rewards have to be there. logprobs, old_logprobs, ref_logprobs
    and entropy, numbers for each token, may be there besides. A sequence is as long as `lengths` say, else it ends with
    its last masked-in token, else with its list.

    Raises:
        ValueError: a file that can't be read, unknown or missing keys, wrong shapes; says where.
    """
    readers = {".json": _read_json, ".jsonl": _read_jsonl, ".npz": _read_npz, ".pt": _read_pt}
    if path.suffix not in readers:
        raise ValueError(
            f"{path}: expected a file that ends in {', '.join(SUFFIXES)}, got {path.suffix or 'no ending'!r}"
        )
    try:
        content = readers[path.suffix](path)
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror or error}") from error
    except Exception as error:  # a broken file raises whatever its reader raises
        raise ValueError(f"{path}: not a {path.suffix} file that can be read: {_first_line(error)}") from error
    try:
        return rollouts(content)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def rollouts(content: Any) -> Rollouts:
    """Rollouts from a list of records, or from a table (see `read`)."""
    if isinstance(content, dict):
        _check_keys(content, _TABLE, "")
        return _from_table({name: _as_list(value) for name, value in content.items()})
    if isinstance(content, list):
        return _from_table(_table(content))
    raise ValueError(f"expected a list of records or a table (a dictionary), got {type(content).__name__}")


def decoder(folder: Path) -> Callable[[list[int]], str]:
    """Token ids to text, by the tokenizer in a local folder; raises ValueError where there is none that loads."""
    if not folder.is_dir():
        raise ValueError(f"{folder}: expected a folder with a tokenizer")
    try:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # a broken folder raises whatever its reader raises
        raise ValueError(f"{folder}: no tokenizer that loads: {_first_line(error)}") from error

    def decode(tokens: list[int]) -> str:
        try:
            return str(tokenizer.decode(tokens))
        except Exception as error:
            raise ValueError(f"{folder}: the tokenizer can't decode {tokens}: {error}") from error

    return decode


def save(
    path: Path,
    rollouts: Rollouts,
    *,
    group: str | None = None,
    op: TreeOp = "mean",
    mode: TreeMode = "td",
    decode: Callable[[list[int]], str] | None = None,
    max_nodes: int = 400,
) -> tuple[PrefixTree, int]:
    """Draws a group of rollouts, the first by default, into a file; the tree, and the group's number.

    Raises:
        ValueError: what PrefixTree and its methods raise; a group that is not there; a file that can't be written, or
            of another kind than .png, .svg and .pdf.
    """
    check.output_file("path", path, picture=True)
    names = rollouts.group_names
    if not names:
        raise ValueError("no sequences to draw")
    if group is not None and group not in names:
        raise ValueError(f"group: expected one of {shortened(names, separator=', ')}, got {group!r}")
    number_of_group = 0 if group is None else names.index(group)
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    tree = rollouts.tree()
    values = tree.aggregate(rollouts.rewards, op)
    advantages = tree.advantages(values, mode)
    with matplotlib.rc_context({"text.hinting": "none"}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=plot.NO_GLYPH)
        ax = plot.plot(
            tree,
            values,
            advantages,
            rewards=rollouts.rewards,
            group=number_of_group,
            decode=decode,
            max_nodes=max_nodes,
        )
        name = None if len(names) == 1 else names[number_of_group]
        plot.write_title(ax, tree, number_of_group, name, f"\nvalue: {op} of the rewards, advantage: {mode}")
        figure = ax.figure.get_figure(root=True)
        try:
            figure.savefig(path, dpi=130)
        except OSError as error:
            raise ValueError(f"{path}: {error.strerror or error}") from error
        finally:
            pyplot.close(figure)
    return tree, number_of_group


# ------------------------------------------------------------------------------------------------------------- files
def _read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def _read_jsonl(path: Path) -> list[Any]:
    records = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if line.strip():
            try:
                records.append(json.loads(line))
            except ValueError as error:
                raise ValueError(f"line {number}: {error}") from error
    return records


def _read_npz(path: Path) -> dict[str, Any]:
    arrays = np.load(path, allow_pickle=False)
    if not isinstance(arrays, np.lib.npyio.NpzFile):
        raise ValueError("one array, not an archive of named ones")
    with arrays:
        return dict(arrays)


def _read_pt(path: Path) -> Any:
    return torch.load(path, map_location="cpu", weights_only=True)


# ------------------------------------------------------------------------------------------------------------- table
def _table(records: list[Any]) -> dict[str, list[Any]]:
    """The columns of a list of records. What one record has, all must have."""
    for b, record in enumerate(records):
        if not isinstance(record, dict):
            raise ValueError(f"record {b}: expected a dictionary, got {type(record).__name__}")
        _check_keys(record, _RECORD, f"record {b}: ")
    if not records:
        return {"tokens": [], "rewards": []}
    for name in _RECORD:
        missing = [b for b, record in enumerate(records) if name not in record]
        if missing and (len(missing) < len(records)):
            raise ValueError(f"record {missing[0]}: expected the key {name!r}, as other records have it")
    names = [name for name in _RECORD if name in records[0]]
    return {_NAME_IN_TABLE.get(name, name): [_as_list(record[name]) for record in records] for name in names}


def _check_keys(content: dict[Any, Any], known: tuple[str, ...], where: str) -> None:
    for key in content:
        if key not in known:
            raise ValueError(f"{where}expected the keys {', '.join(known)}, got {key!r}")
    for key in (known[0], known[1]):
        if key not in content:
            raise ValueError(f"{where}expected the key {key!r}, which is not there")


def _from_table(table: dict[str, Any]) -> Rollouts:
    tokens = [
        _row("tokens", b, row, _is_integer, "token ids") for b, row in enumerate(_rows("tokens", table["tokens"]))
    ]
    count, columns = len(tokens), max(map(len, tokens), default=0)
    for name, column in table.items():
        if len(_rows(name, column)) != count:
            raise ValueError(f"{name}: expected one entry for each of the {count} sequences, got {len(column)}")
    mask = _like_tokens("mask", table.get("mask"), tokens, _is_number, "0s and 1s")
    texts = _like_tokens("texts", table.get("texts"), tokens, lambda x: isinstance(x, str), "strings")
    return Rollouts(
        tokens=torch.tensor([row + [0] * (columns - len(row)) for row in tokens], dtype=torch.int64).view(
            count, columns
        ),
        lengths=_lengths(table.get("lengths"), tokens, mask is not None),
        rewards=torch.tensor(
            _row("rewards", None, table["rewards"], _is_finite, "finite numbers"), dtype=torch.float64
        ),
        groups=_groups(table.get("group_ids")),
        mask=None
        if mask is None
        else torch.tensor([[bool(x) for x in row] + [False] * (columns - len(row)) for row in mask]).view(
            count, columns
        ),
        texts=None if texts is None else _text_of(tokens, texts),
        numbers={
            name: torch.tensor([row + [0.0] * (columns - len(row)) for row in column]).view(count, columns)
            for name in _NUMBERS
            if (column := _like_tokens(name, table.get(name), tokens, _is_number, "numbers")) is not None
        },
    )


def _lengths(given: list[Any] | None, tokens: list[list[int]], masked: bool) -> Tensor | None:
    if given is None:
        return None if masked else torch.tensor([len(row) for row in tokens], dtype=torch.int64)
    lengths = _row("lengths", None, given, _is_integer, "integers")
    for b, (length, row) in enumerate(zip(lengths, tokens, strict=True)):
        if not 0 <= length <= len(row):
            raise ValueError(f"lengths: expected at most the {len(row)} tokens of sequence {b}, got {length}")
    return torch.tensor(lengths, dtype=torch.int64)


def _groups(given: list[Any] | None) -> list[Hashable] | None:
    for b, name in enumerate(given or ()):
        if not isinstance(name, Hashable):
            raise ValueError(f"group_ids: expected strings or numbers, got a {type(name).__name__} for sequence {b}")
    return given


def _text_of(tokens: list[list[int]], texts: list[list[str]]) -> dict[int, str]:
    text_of: dict[int, str] = {}
    for b, (row, words) in enumerate(zip(tokens, texts, strict=True)):
        for token, word in zip(row, words, strict=True):
            if text_of.setdefault(token, word) != word:
                raise ValueError(
                    f"texts: expected one text for token {token}, got {text_of[token]!r} and, in sequence {b}, {word!r}"
                )
    return text_of


# ------------------------------------------------------------------------------------------------------------ pieces
def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


def _as_list(x: Any) -> Any:
    """Arrays and tensors as lists, also inside of a list."""
    if isinstance(x, np.ndarray | np.generic | Tensor):
        return x.tolist()
    return [_as_list(item) for item in x] if isinstance(x, list | tuple) else x


def _rows(name: str, column: Any) -> list[Any]:
    if not isinstance(column, list):
        raise ValueError(f"{name}: expected a list, got {type(column).__name__}")
    return column


def _row(name: str, b: int | None, row: Any, good: Callable[[Any], bool], expected: str) -> list[Any]:
    """`row` itself, if it is a list of what is expected."""
    where = "" if b is None else f" for sequence {b}"
    if not isinstance(row, list):
        raise ValueError(f"{name}: expected a list of {expected}{where}, got {row!r}")
    for item in row:
        if not good(item):
            raise ValueError(f"{name}: expected {expected}{where}, got {item!r}")
    return row


def _like_tokens(
    name: str, column: list[Any] | None, tokens: list[list[int]], good: Callable[[Any], bool], expected: str
) -> list[list[Any]] | None:
    """A column with an entry for each token."""
    if column is None:
        return None
    for b, row in enumerate(column):
        if len(_row(name, b, row, good, expected)) != len(tokens[b]):
            raise ValueError(f"{name}: expected {len(tokens[b])} entries for sequence {b}, its tokens, got {len(row)}")
    return column


def _is_integer(x: Any) -> bool:
    return isinstance(x, Integral) and not isinstance(x, bool) and -(2**63) <= int(x) < 2**63


def _is_number(x: Any) -> bool:
    return isinstance(x, Real)


def _is_finite(x: Any) -> bool:
    return isinstance(x, Real) and math.isfinite(x)


# ----------------------------------------------------------------------------------------------------------- example
_QUESTION = "What is 17 × 6 ?"
_ANSWERS = (
    ("17 × 6 = 10 × 6 + 7 × 6 = 60 + 42 = 102", 1.0),
    ("17 × 6 = 10 × 6 + 7 × 6 = 60 + 48 = 108", 0.0),
    ("17 × 6 = 10 × 6 + 7 × 6 = 60 + 42 = 112", 0.0),
    ("17 × 6 = 20 × 6 - 3 × 6 = 120 - 18 = 102", 1.0),
    ("17 × 6 = 20 × 6 - 3 × 6 = 120 - 18 = 102", 1.0),
    ("17 × 6 = 20 × 6 - 3 × 6 = 120 - 12 = 108", 0.0),
    ("I guess 96", 0.0),
    ("I guess 102", 1.0),
)


def example() -> Rollouts:
    """A group of eight answers to a question, a token for each word; right ones are rewarded with 1."""
    texts = [[f"{word} " for word in f"{_QUESTION} {answer}".split()] for answer, _ in _ANSWERS]
    number = {word: i for i, word in enumerate(dict.fromkeys(word for row in texts for word in row))}
    return rollouts(
        {
            "tokens": [[number[word] for word in row] for row in texts],
            "rewards": [reward for _, reward in _ANSWERS],
            "texts": texts,
        }
    )

"""What `fastreward plot credit` does: schemes run on rollouts, into a picture and a page."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastreward._arguments import check
from fastreward.credit_plot import schemes
from fastreward.credit_plot.page import ENDINGS, credit_page
from fastreward.credit_plot.picture import draw
from fastreward.prefix_tree.rollouts import Rollouts
from fastreward.prefix_tree.views import shortened


@dataclass(frozen=True)
class Drawn:
    """What was drawn: the schemes by name, and why others were not; the rows in a picture; the files."""

    names: list[str]
    missing: dict[str, str]
    rows: list[int]
    paths: Sequence[Path]

    def lines(self) -> list[str]:
        """The same in words."""
        lines = [f"{len(self.names)} {'scheme' if len(self.names) == 1 else 'schemes'}: {', '.join(self.names)}"]
        if self.missing:
            lines.append(f"{len(self.missing)} others are not there:")
            lines += [f"  {name}: {reason}" for name, reason in self.missing.items()]
        for path in self.paths:
            what = "The page is" if path.suffix in ENDINGS else f"The picture of sequences {_named(self.rows)} is"
            lines.append(f"{what} in {path}")
        return lines


def _named(rows: Sequence[int]) -> str:
    return shortened([str(row) for row in rows], separator=", ")


def check_outputs(name: str, paths: Sequence[Path]) -> None:
    """That each can be written, before any work; raises ValueError, or ModuleNotFoundError without matplotlib."""
    for path in paths:
        check.output_file(name, path, picture=path.suffix not in ENDINGS)


def save(
    paths: Sequence[Path],
    rollouts: Rollouts | None,
    *,
    names: Collection[str] = (),
    group: str | None = None,
    most: int = 8,
    decode: Callable[[list[int]], str] | None = None,
) -> Drawn:
    """Draws schemes into pictures and pages. rollouts: None for the two built-in ones.

    names: of the schemes; all that can run by default. group: whose rollouts, at most `most`, a picture has.

    Raises:
        ValueError: no sequences, an unknown scheme or group, a scheme that can't run, a file that can't be written.
        ModuleNotFoundError: a picture without matplotlib.
    """
    check_outputs("path", paths)
    missing: dict[str, str] = {}
    if rollouts is None:
        rollouts, (found, missing) = schemes.example(), schemes.on_example(names)
    else:
        rows = _rows(rollouts, group, most)  # a wrong group is told before the work
        found, missing = schemes.on_rollouts(rollouts, names)
    rows, tree = _rows(rollouts, group, most), rollouts.tree()
    written = rollouts.decode if decode is None else decode
    for path in paths:
        if path.suffix not in ENDINGS:
            draw(path, rollouts, found, rows, decode=written)
            continue
        credit_page(
            path, rollouts.tokens, {scheme.name: scheme.advantages for scheme in found}, rollouts.mask,
            **_numbers(rollouts),
            rewards=rollouts.rewards, group_ids=rollouts.groups, lengths=tree.lengths,
            text=rollouts.texts if decode is None else decode, tree=tree,
        )  # fmt: skip
    return Drawn([scheme.name for scheme in found], missing, rows, paths)


def _numbers(rollouts: Rollouts) -> dict[str, Any]:
    """What else the file has of each token, as credit_page takes it."""
    given = dict(rollouts.numbers)
    known: dict[str, Any] = {name: given.pop(name) for name in ("logprobs", "entropy") if name in given}
    if {"logprobs", "old_logprobs"} <= set(rollouts.numbers):
        known["ratio"] = (rollouts.numbers["logprobs"] - rollouts.numbers["old_logprobs"]).exp()
    return known | {"extra": given}


def _rows(rollouts: Rollouts, group: str | None, most: int) -> list[int]:
    """The first rows of the group."""
    names = rollouts.group_names
    if not names:
        raise ValueError("no sequences to draw")
    if group is not None and group not in names:
        raise ValueError(f"group: expected one of {shortened(names, separator=', ')}, got {group!r}")
    wanted = names[0] if group is None else group
    given = ["0"] * len(rollouts.tokens) if rollouts.groups is None else [str(name) for name in rollouts.groups]
    return [row for row, name in enumerate(given) if name == wanted][:most]

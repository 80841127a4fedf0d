"""The gallery of schemes, docs/credit.md: all on the same two rollouts, as a picture and as numbers."""

from __future__ import annotations

import hashlib
from itertools import groupby
from pathlib import Path
from typing import Final

from fastreward._arguments import check
from fastreward.credit_plot import schemes
from fastreward.credit_plot.picture import draw, short
from fastreward.credit_plot.schemes import Scheme
from fastreward.prefix_tree.rollouts import Rollouts

#: The command that writes it.
COMMAND: Final = "fastreward plot credit --gallery docs/credit.md"
_HEAD: Final = """# Credit, scheme by scheme

What each scheme that gives advantages makes of the same two rollouts of one prompt. They begin alike; the first is
right and has reward {right}, the second wrong and has {wrong}. Whatever a scheme needs besides (step rewards,
log-probs of a judge, entropies) is what its example makes: `fastreward recipes NAME` shows the program, and
[methods.md](methods.md) the formula and its source. Statistics of a group are over these two, of a batch over the four
responses of the example. Rewards per token are whitened, values of a tree's nodes are followed by their differences.

`{command}` writes this page and its picture.
`fastreward plot credit rollouts.jsonl` draws your own rollouts under every scheme that needs no more than the file has,
and writes a page in which each token can be looked at; `fastreward.credit_page` writes that page of a batch in a
trainer.

![advantages of two rollouts under each scheme]({picture})
"""
_REWARDS: Final = "What recipes for rewards per response give for the two; `group_advantages` makes advantages of it."


def page(picture: str = "credit.png") -> str:
    """The gallery in Markdown. picture: the file's name, for the link."""
    rollouts, (found, missing) = schemes.example(), schemes.on_example()
    right, wrong = (f"{float(x):.4g}" for x in rollouts.rewards)
    parts = [_HEAD.format(right=right, wrong=wrong, command=COMMAND, picture=picture)]
    for family, of in groupby(found, lambda scheme: scheme.family):
        parts.append("\n".join([f"## {family}", "", *_table(rollouts, list(of))]) + "\n")
    rewards = schemes.rewards_on_example()
    if rewards:
        parts.append("\n".join(["## Rewards", "", _REWARDS, "", *_reward_table(rewards)]) + "\n")
    if missing:
        names = ", ".join(f"`{name}`" for name in missing)
        parts.append(f"Not here, as the responses of their examples are others: {names}.\n")
    return "\n".join(parts)


def write(path: Path) -> None:
    """Writes the gallery and, beside it, its picture.

    Raises:
        ValueError: no .md file, or one that can't be written.
        ModuleNotFoundError: matplotlib is not installed.
    """
    if path.suffix != ".md":
        raise ValueError(f"path: expected a file that ends in .md, got {path}")
    check.output_file("path", path)
    picture = path.with_suffix(".png")
    text = page(picture.name)
    rollouts, (found, _) = schemes.example(), schemes.on_example()
    draw(picture, rollouts, found, range(2), decode=rollouts.decode, metadata={"Description": digest(text)})
    path.write_text(text, encoding="utf-8")


def digest(text: str) -> str:
    """What the picture of a gallery says which text it belongs to."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _reward_table(rewards: dict[str, list[float]]) -> list[str]:
    lines = [[f"`{name}`", *(f"{x:.3g}" for x in of)] for name, of in rewards.items()]
    return [f"| {' | '.join(line)} |" for line in (["scheme", "first", "second"], ["---", "--:", "--:"], *lines)]


def _table(rollouts: Rollouts, found: list[Scheme]) -> list[str]:
    """A line for each scheme, a column for each token."""
    assert rollouts.texts is not None
    assert rollouts.mask is not None
    places = [(row, t) for row, line in enumerate(rollouts.mask.tolist()) for t, there in enumerate(line) if there]
    words = [rollouts.texts[int(rollouts.tokens[place])].strip() for place in places]
    second = next(k for k, (row, _) in enumerate(places) if row)
    head, rule = ["scheme", *words], ["---", *["--:"] * len(words)]
    lines = [[f"`{scheme.name}`", *(short(float(scheme.advantages[place])) for place in places)] for scheme in found]
    rows = [[*line[: second + 1], "", *line[second + 1 :]] for line in (head, rule, *lines)]
    rows[1][second + 1] = "---"  # a gap between the rollouts
    return [f"| {' | '.join(line)} |".replace("|  |", "| |") for line in rows]

"""Recipes on paper: the list, the explanation of one, and the table in docs/methods.md."""

from __future__ import annotations

import textwrap

from rich.console import Console
from rich.table import Table

from fastreward.recipes._catalogue.registry import (
    FAMILIES,
    NOTATION,
    RECIPES,
    VERIFIED,
    Family,
    Recipe,
    by_returns,
    hint,
)

_COLOURS = {"code": "green", "paper": "green", "note": "yellow", "reconstructed": "red"}


def find(name: str) -> Recipe:
    """The recipe of this name, however it is written; raises ValueError that names the nearest."""
    wanted = name.lower().replace("-", "_").replace(" ", "_").replace(".", "_")
    if wanted in RECIPES:
        return RECIPES[wanted]
    raise ValueError(f"no recipe {name!r}; {hint(wanted)}")


def show_all(console: Console) -> None:
    """One table for each family, by what the recipes return."""
    for heading, families in by_returns().items():
        for family, recipes in families.items():
            console.print(_table(f"{heading}: {FAMILIES[family]}", family, recipes))
    console.print("`fastreward recipes NAME` explains one, with its gradient and an example.", highlight=False)


def _table(title: str, family: Family, recipes: list[Recipe]) -> Table:
    table = Table(title=title, title_justify="left", caption=_plain(NOTATION[family]), caption_justify="left")
    table.add_column("recipe", no_wrap=True)
    table.add_column("formula", ratio=1)
    table.add_column("paper")
    table.add_column("verified", no_wrap=True)
    for r in recipes:
        sure = f"[{_COLOURS[r.verified]}]{VERIFIED[r.verified][0]}[/]"
        table.add_row(r.name, _plain(r.summary), _plain(r.source), sure)
    return table


def explain(console: Console, recipe: Recipe) -> None:
    """Everything that is known of one recipe, as text that can be copied."""

    def write(text: str, style: str | None = None) -> None:
        console.print(text, style=style, markup=False, highlight=False, soft_wrap=True)

    def section(title: str, text: str) -> None:
        write(f"\n{title}", "bold")
        write(textwrap.indent(text.rstrip(), "  "))

    write(f"{recipe.title}", "bold")
    write(recipe.source if recipe.url is None else f"{recipe.source}  {recipe.url}")
    write(f"formula verified: {VERIFIED[recipe.verified][1]}", _COLOURS[recipe.verified])
    write(f"read in: {recipe.where}")
    section("Call", recipe.signature + (f"\n**options: the others of {recipe.operation}" if recipe.operation else ""))
    section("Formula", f"{recipe.documentation}\n\n{NOTATION[recipe.family]}")
    if head := recipe.head:
        section("Arguments of the family", head)
    loss = recipe.loss()
    if loss is not None:
        section("The loss in fastreward.losses, and the derivative made of it", str(loss))
    write("\nExample", "bold")
    write(recipe.example())


def markdown() -> str:
    """The table of methods in docs/methods.md, in the order of the list."""
    lines = ["| recipe | formula | paper | verified |", "|---|---|---|---|"]
    for heading, families in by_returns().items():
        for family, recipes in families.items():
            lines += [f"| **{heading}: {FAMILIES[family]}** | {NOTATION[family]} | | |", *map(_row, recipes)]
    return "\n".join(lines) + "\n"


def _row(recipe: Recipe) -> str:
    source = recipe.source.removeprefix("arXiv ")
    source = recipe.source if recipe.url is None else f"[{source}]({recipe.url})"
    return f"| `{recipe.name}` | {_cell(recipe.summary)} | {source} | {VERIFIED[recipe.verified][0]} |"


def _plain(text: str) -> str:
    """Brackets in formulas are not markup."""
    return text.replace("[", r"\[")


def _cell(formula: str) -> str:
    return "`" + formula.replace("|", r"\|") + "`"

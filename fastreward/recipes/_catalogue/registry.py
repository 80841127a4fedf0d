"""What is known of each recipe: its family, its source, where its formula was read and how sure that makes it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Literal, ParamSpec, TypeVar

from fastreward._arguments.arrays import accepts_arrays
from fastreward.losses import Definition, Loss

P = ParamSpec("P")
R = TypeVar("R")
Family = Literal["token", "sequence", "preference", "correction", "tree"]
Returns = Literal["advantages", "values", "node values", "decision"]
Verified = Literal["code", "paper", "note", "reconstructed"]

FAMILIES: Final[dict[Family, str]] = {
    "token": "Token level",
    "sequence": "Sequence and group level",
    "preference": "Preference",
    "correction": "Correction of the rollout policy",
    "tree": "Prefix trees",
}
#: What the formulas' letters stand for.
NOTATION: Final[dict[Family, str]] = {
    "token": "lp = logprobs, r = exp(lp - old_lp), A = advantages, R = rewards, sg = stop_gradient",
    "sequence": "lp = logprobs, d = lp - old_lp, A = advantages, R = rewards, sg = stop_gradient",
    "preference": "S = sum of lp - ref_lp over a response, L its tokens; _w chosen, _l rejected; z = beta (S_w - S_l)",
    "correction": "w = exp(old_lp - rollout_lp), sg = stop_gradient",
    "tree": "n = a token's node, p = its parent, V = value of a node, R = rewards of the sequences",
}
#: How sure a formula is: in a table, and in words.
VERIFIED: Final[dict[Verified, tuple[str, str]]] = {
    "code": ("code", "in released code"),
    "paper": ("paper", "in the paper"),
    "note": ("notes only", "in notes that quote the paper; neither the paper nor code was read"),
    "reconstructed": ("no: reconstructed", "no: it is reconstructed from the abstract or from what is commonly known"),
}
_OPERATIONS: Final = {
    "Unpack[PolicyOptions]": "fastreward.policy_loss",
    "Unpack[PairOptions]": "fastreward.preference_loss",
    "Unpack[CorrectionOptions]": "fastreward.correction_weights",
}
#: Every recipe by name.
RECIPES: Final[dict[str, Recipe]] = {}


@dataclass(frozen=True, slots=True, eq=False)
class Recipe:
    """A recipe and what is known of it.

    source: "arXiv <id>", or author, title and address. where: the code or text in which the formula was read.
    definition: the loss it is made of (None: it only makes weights); fixed: that loss's parameters that the recipe sets
    beside those of its own that have the same name. advantages: options of group_advantages that the method needs, as
    they are written in the example. passes, settings: what the example passes beyond the required arguments and the
    mask, by the names of `_example`, and with these values. returns: what a recipe over prefix trees makes.
    """

    function: Callable[..., Any]
    family: Family
    title: str
    source: str
    verified: Verified
    where: str
    definition: Definition[Any] | None = None
    fixed: Mapping[str, Any] = field(default_factory=dict)
    advantages: str = ""
    passes: tuple[str, ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)
    returns: Returns | None = None

    @property
    def name(self) -> str:
        """As in fastreward.recipes."""
        return self.function.__name__

    @property
    def documentation(self) -> str:
        """The docstring."""
        return inspect.getdoc(self.function) or ""

    @property
    def summary(self) -> str:
        """The formula in one line."""
        return self.documentation.partition("\n")[0].rstrip(".")

    @property
    def url(self) -> str | None:
        """Where the source is."""
        if self.source.startswith("arXiv "):
            return f"https://arxiv.org/abs/{self.source.removeprefix('arXiv ')}"
        return next((f"https://{word.rstrip('.,)')}" for word in self.source.split() if "/" in word), None)

    @property
    def signature(self) -> str:
        """The call, with its defaults."""
        shown, named = [], False
        for p in inspect.signature(self.function).parameters.values():
            if p.kind is p.KEYWORD_ONLY and not named:
                shown.append("*")
                named = True
            default = "" if p.default is p.empty else f"={p.default!r}"
            shown.append(f"**{p.name}" if p.kind is p.VAR_KEYWORD else p.name + default)
        return f"recipes.{self.name}({', '.join(shown)})"

    @property
    def operation(self) -> str | None:
        """The operation that **options go to."""
        return _OPERATIONS.get(str(self.function.__annotations__.get("options")))

    def loss(self) -> Loss | None:
        """The loss with the recipe's own parameters, for `print`."""
        if self.definition is None:
            return None
        parameters = inspect.signature(self.function).parameters
        own = {name: p.default for name, p in parameters.items() if p.default is not p.empty} | dict(self.settings)
        known = inspect.signature(self.definition).parameters
        return self.definition(**{k: v for k, v in (own | dict(self.fixed)).items() if k in known})

    def example(self) -> str:
        """A program that runs as it is."""
        from fastreward.recipes._catalogue.example import example

        return example(self)


def recipe(
    family: Family, title: str, source: str, verified: Verified, where: str, **rest: Any
) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Registers a function as a recipe (fields of Recipe); it then takes NumPy and CuPy arrays too."""

    def register(function: Callable[P, R]) -> Callable[P, R]:
        wrapped = accepts_arrays(function)
        RECIPES[function.__name__] = Recipe(wrapped, family, title, source, verified, where, **rest)
        return wrapped

    return register


def by_family() -> dict[Family, list[Recipe]]:
    """The recipes of each family, in the order of their file."""
    return {family: [r for r in RECIPES.values() if r.family == family] for family in FAMILIES}

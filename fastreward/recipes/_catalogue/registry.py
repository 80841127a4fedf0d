"""Facts about each recipe: its family, its source, where its formula was read and how sure that makes it."""

from __future__ import annotations

import difflib
import inspect
import re
import sys
import textwrap
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, Final, Literal, ParamSpec, TypeVar

from fastreward._arguments.arrays import accepts_arrays
from fastreward.losses import Definition, Loss
from fastreward.recipes._catalogue.example import example

P = ParamSpec("P")
R = TypeVar("R")
Family = Literal[
    "token", "sequence", "preference", "correction", "tree", "token_credit", "turn_credit", "group_advantage",
    "reward_shaping", "likelihood", "distillation", "divergence",
]  # fmt: skip
Returns = Literal[
    "loss", "distillation loss", "advantages", "response advantages", "rewards", "token rewards", "values",
    "node values", "weights",
    "token weights", "response weights", "mask", "decision", "rollouts", "logits", "ends", "statistics",
]  # fmt: skip
Verified = Literal["code", "paper", "note", "reconstructed"]

FAMILIES: Final[dict[Family, str]] = {
    "token": "Token level",
    "sequence": "Sequence and group level",
    "preference": "Preference",
    "correction": "Correction of the rollout policy",
    "tree": "Prefix trees",
    "token_credit": "Credit of tokens and steps",
    "turn_credit": "Credit of turns",
    "group_advantage": "Advantages in a group",
    "reward_shaping": "Combined and shaped rewards",
    "likelihood": "Rewards from likelihoods",
    "distillation": "Distillation on the student's samples",
    "divergence": "Distillation over the vocabulary",
}
#: The family of the recipes in a file, and what they return unless they say so.
_OF_FILE: Final[dict[str, tuple[Family, Returns]]] = {
    "ratio": ("token", "loss"),
    "mixed": ("token", "loss"),
    "score": ("token", "loss"),
    "sequence": ("sequence", "loss"),
    "preference": ("preference", "loss"),
    "reference_free": ("preference", "loss"),
    "correction": ("correction", "weights"),
    "tree": ("tree", "advantages"),
    "tree_search": ("tree", "advantages"),
    "token_credit": ("token_credit", "advantages"),
    "step_credit": ("token_credit", "advantages"),
    "step_rewards": ("token_credit", "token rewards"),
    "step_values": ("token_credit", "advantages"),
    "turn_credit": ("turn_credit", "advantages"),
    "agent_credit": ("turn_credit", "advantages"),
    "agent_rewards": ("turn_credit", "rewards"),
    "group_advantage": ("group_advantage", "response advantages"),
    "group_baseline": ("group_advantage", "response advantages"),
    "group_pairwise": ("group_advantage", "response advantages"),
    "group_rewards": ("group_advantage", "response advantages"),
    "group_selection": ("group_advantage", "mask"),
    "reward_shaping": ("reward_shaping", "rewards"),
    "reward_gates": ("reward_shaping", "rewards"),
    "likelihood": ("likelihood", "rewards"),
    "confidence": ("likelihood", "rewards"),
    "distillation": ("distillation", "advantages"),
    "divergence": ("divergence", "distillation loss"),
}
#: What recipes return, under the headings of the list and in their order.
RETURNS: Final[dict[Returns, str]] = {
    "loss": "Losses",
    "distillation loss": "Losses",
    "advantages": "Advantages per token",
    "response advantages": "Advantages per response",
    "rewards": "Rewards per response",
    "token rewards": "Rewards per token",
    "values": "Values",
    "node values": "Values",
    "weights": "Weights and masks",
    "token weights": "Weights and masks",
    "response weights": "Weights and masks",
    "mask": "Weights and masks",
    "decision": "Decisions of a sampler",
    "rollouts": "Decisions of a sampler",
    "logits": "Decisions of a sampler",
    "ends": "Segments",
    "statistics": "Statistics",
}
#: What the formulas' letters stand for.
NOTATION: Final[dict[Family, str]] = {
    "token": "lp = logprobs, r = exp(lp - old_lp), A = advantages, R = rewards, sg = stop_gradient",
    "sequence": "lp = logprobs, d = lp - old_lp, A = advantages, R = rewards, sg = stop_gradient",
    "preference": "S = sum of lp - ref_lp over a response, L its tokens; _w chosen, _l rejected; z = beta (S_w - S_l)",
    "correction": "w = exp(old_lp - rollout_lp), sg = stop_gradient",
    "tree": "n = a token's node, p = its parent, V = value of a node, R = rewards of the sequences",
    "token_credit": "A = advantages, R = rewards, r_t = rewards per token, V = values, s_k = score of step k",
    "turn_credit": "A = advantages, R = rewards of the outcomes, r_k = reward of turn k",
    "group_advantage": "A = advantages, R = rewards; mean, std, ... over the responses to one prompt",
    "reward_shaping": "R = rewards, R_k = their components",
    "likelihood": "lp = logprobs of the tokens of an answer or a response, L their number, H = entropy, z = logits",
    "distillation": "lp = logprobs, A = advantages, R = rewards, sg = stop_gradient",
    "divergence": "p = softmax of the student's logits, q of the teacher's, m a mixture; p', q' over ids and the rest",
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
#: How many recipes a message names at most.
_MANY: Final = 12
#: Every recipe by name.
RECIPES: Final[dict[str, Recipe]] = {}


@dataclass(frozen=True, slots=True, eq=False)
class Recipe:
    """A recipe and what is known of it.

    source: "arXiv <id>", or author, title and address. where: the code or text in which the formula was read. returns:
    what a call gives, one of RETURNS. build: what makes its loss, of those of its options that have the same name
    (None: it has no loss). advantages: options of group_advantages that the method needs, as they are written in the
    example. passes, settings: what the example passes beyond the required arguments and the mask, by the example's
    names, and with these values.
    """

    function: Callable[..., Any]
    family: Family
    title: str
    source: str
    verified: Verified
    where: str
    returns: Returns
    build: Callable[..., Loss] | None = None
    advantages: str = ""
    passes: tuple[str, ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)

    def __reduce__(self) -> tuple[Callable[[str], Recipe], tuple[str]]:
        # By its name: `build` has the name of `function`, under which pickle would look for it.
        return _registered, (self.name,)

    @property
    def name(self) -> str:
        """As in fastreward.recipes."""
        return self.function.__name__

    @property
    def documentation(self) -> str:
        """The docstring."""
        return inspect.getdoc(self.function) or ""

    @property
    def head(self) -> str:
        """What the docstring refers to as being "at the head of" a module, without the module's first line."""
        module = re.search(r"at the head of\s+`([\w.]+)`", self.documentation)
        return (sys.modules[module[1]].__doc__ or "").partition("\n\n")[2].strip() if module else ""

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

    @property
    def definition(self) -> Definition[Any] | None:
        """The loss it is made of, with any parameters."""
        loss = self.loss()
        return None if loss is None else loss.definition

    @property
    def fixed(self) -> Mapping[str, Any]:
        """The parameters of its loss that the recipe sets and its caller does not. Deprecated: read them off loss()."""
        warnings.warn("Recipe.fixed: read Recipe.loss().parameters", DeprecationWarning, stacklevel=2)
        loss = self.loss()
        if loss is None:
            return {}
        own, default = inspect.signature(self.function).parameters, inspect.signature(loss.definition).parameters
        return {k: v for k, v in loss.parameters.items() if k not in own and v != default[k].default}

    def loss(self) -> Loss | None:
        """The loss with the recipe's own parameters, for `print`."""
        if self.build is None:
            return None
        parameters = inspect.signature(self.function).parameters
        own = {name: p.default for name, p in parameters.items() if p.default is not p.empty} | dict(self.settings)
        known = {n: p for n, p in inspect.signature(self.build).parameters.items() if p.kind is not p.VAR_KEYWORD}
        return self.build(**{n: own.get(n) for n, p in known.items() if n in own or p.default is p.empty})

    def example(self) -> str:
        """A program that runs as it is."""
        return example(self.function, self.returns, self.advantages, self.passes, self.settings)


def _registered(name: str) -> Recipe:
    return RECIPES[name]


def recipe(title: str, source: str, **facts: Any) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Registers a function as a recipe of its file's family; it then takes NumPy and CuPy arrays too.

    facts: where the formula was read, as code=, paper=, note= or reconstructed=; and other fields of Recipe.
    """
    ((verified, where),) = [(kind, facts.pop(kind)) for kind in VERIFIED if kind in facts]

    def register(function: Callable[P, R]) -> Callable[P, R]:
        family, returns = _OF_FILE[function.__module__.rpartition(".")[2]]
        known = Recipe(accepts_arrays(function), family, title, source, verified, where, **{"returns": returns} | facts)
        if RECIPES.setdefault(function.__name__, known) is not known:
            raise ValueError(
                f"{function.__name__}: there is a recipe of this name already, {RECIPES[known.name].title}"
            )
        return known.function

    return register


def by_family() -> dict[Family, list[Recipe]]:
    """The recipes of each family, in the order of their file."""
    return {family: [r for r in RECIPES.values() if r.family == family] for family in FAMILIES}


def by_returns() -> dict[str, dict[Family, list[Recipe]]]:
    """The recipes under each heading of RETURNS that has any, by family."""
    found: dict[str, dict[Family, list[Recipe]]] = {heading: {} for heading in RETURNS.values()}
    for family, recipes in by_family().items():
        for r in recipes:
            found[RETURNS[r.returns]].setdefault(family, []).append(r)
    return {heading: of for heading, of in found.items() if of}


def names_by_returns() -> str:
    """Their names under each heading, for a docstring."""
    listed = ((heading, ", ".join(r.name for r in chain(*of.values()))) for heading, of in by_returns().items())
    return "\n".join(textwrap.fill(f"{heading}: {names}.", 100, subsequent_indent="    ") for heading, names in listed)


def hint(name: str) -> str:
    """The recipes whose names are nearest, and those that are about it, for a message."""
    short = {full.removesuffix("_loss"): full for full in RECIPES}
    near = [full for full in RECIPES if name in full.split("_")] + [
        short[close] for close in difflib.get_close_matches(name, short, 3)
    ]
    about = [full for full, r in RECIPES.items() if full not in near and _is_about(r, name)]
    found = [f"did you mean {', '.join(dict.fromkeys(near))}?"] if near else []
    about[_MANY:] = ["..."] if len(about) > _MANY else []
    found += [f"about that: {', '.join(about)}"] if about else []
    return " ".join(found) or "`fastreward recipes` lists all"


def _is_about(r: Recipe, name: str) -> bool:
    """Whether its title, its family or its paper's number has this in it; of three letters everything would."""
    text = f"{r.title} {FAMILIES[r.family]}".lower()
    return len(name) > 3 and (name.replace("_", " ") in text or name.replace("_", ".") in r.source)

"""Functions that a trainer finds by a dotted path, and the recipe that a text such as "dispo(pos_high=5.0)" chooses."""

from __future__ import annotations

import ast
import contextlib
import functools
import importlib.metadata
import inspect
import os
import re
from collections.abc import Callable, Mapping
from typing import Any, Final, ParamSpec, TypeVar

import torch

from fastreward._arguments import check
from fastreward.correction import correction_weights
from fastreward.patch.bindings import Entry, Patch, Report, active, install
from fastreward.policy_loss import policy_loss
from fastreward.recipes import RECIPES, Recipe

P = ParamSpec("P")
R = TypeVar("R")

#: Arguments by which a recipe learns whose responses are to the same prompt.
_GROUPS: Final = ("group_ids", "group_size")
#: What takes the options that a recipe hands on, by what the recipe returns.
_OPERATIONS: Final[dict[str, Callable[..., Any]]] = {"loss": policy_loss, "weights": correction_weights}
#: Recipes that look at whole sequences before their loss does, and take one advantage of each.
BY_SEQUENCE: Final = ("deepseek_v3_2",)


# --------------------------------------------------------------------------------------------------------- the account
def hook(trainer: str, tokens: Callable[..., int]) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """A function that `trainer` calls by its path. From its first call on it is in `patch.status()`, with its usage.

    A NaN that counts is in its results, as in the trainer's own: what becomes of such a step is for the trainer to say.
    """

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        target = f"{trainer}.{function.__name__}"

        @functools.wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            report = _report(trainer)
            if target not in report.usage:
                why = (inspect.getdoc(function) or "").partition("\n")[0]
                report.replaced.append(Entry(target, f"{function.__module__}.{function.__name__}", why))
            counted: Callable[P, R] = report.counted(target, function, tokens)
            with contextlib.nullcontext() if torch.compiler.is_compiling() else check.nan_passes():
                return counted(*args, **kwargs)

        return call

    return decorate


def _report(trainer: str) -> Report:
    patch = active(trainer)
    if patch is not None:
        return patch.report
    try:
        version = importlib.metadata.version(trainer)
    except importlib.metadata.PackageNotFoundError:
        version = "of an unknown version"
    return install(trainer, Patch(Report(trainer, version), {}, trainer.replace("-", "_")))


# ---------------------------------------------------------------------------------------------------------- the choice
def chosen(name: str, args: Any, variable: str) -> tuple[str | None, dict[str, Any]]:
    """The recipe and its options that `args.fastreward_<name>`, or else the environment's `variable`, asks for.

    Either is a text: a recipe's name, or a call of it with numbers, truths, texts or None by name. (None, {}): neither.
    """
    attribute = f"fastreward_{name}"
    given = getattr(args, attribute, None)
    where, text = (variable, os.environ.get(variable)) if given is None else (attribute, given)
    return (None, {}) if text is None or text == "" else parsed(where, text)


def parsed(where: str, text: Any) -> tuple[str, dict[str, Any]]:
    """ "dispo(pos_high=5.0)" -> ("dispo", {"pos_high": 5.0}); `where` names its place in an error."""
    wanted = f'{where}: expected a name, or a call with keywords such as "dispo(pos_high=5.0)", got {text!r}'
    if not isinstance(text, str):
        raise TypeError(wanted)
    match = re.fullmatch(r"\s*([\w-]+)\s*(?:\((.*)\))?\s*", text, re.DOTALL)
    if match is None:
        raise ValueError(wanted)
    try:
        call = ast.parse(f"f({match[2] or ''})", mode="eval").body
        if not isinstance(call, ast.Call) or call.args or any(k.arg is None for k in call.keywords):
            raise ValueError(wanted)
        return match[1], {str(k.arg): ast.literal_eval(k.value) for k in call.keywords}
    except (SyntaxError, ValueError):
        raise ValueError(wanted) from None


def recipe(where: str, name: str, returns: tuple[str, ...]) -> Recipe:
    """The recipe of this name, which has to return one of `returns`."""
    found = RECIPES.get(name)
    if found is None or found.returns not in returns:
        what = "there is no such recipe" if found is None else f"that returns {found.returns}"
        raise ValueError(
            f"{where}: expected a recipe that returns {' or '.join(returns)} (`fastreward recipes` lists them), "
            f"got {name!r}; {what}"
        )
    return found


def arguments(where: str, found: Recipe, given: Mapping[str, Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """What to call the recipe with: of `given`, what its parameters name, and the options of the choice.

    Raises:
        ValueError: a required argument is neither in `given` nor in `options`; the message says which, and what is
            there. Or the recipe compares responses to one prompt, and nothing says which those are.
        TypeError: an option that the recipe does not have.
    """
    parameters = inspect.signature(found.function).parameters
    known = set(parameters)
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):  # which go on to the operation
        known |= set(inspect.signature(_OPERATIONS.get(found.returns, found.function)).parameters)
    unknown = [name for name in options if name not in known]
    if unknown:
        raise TypeError(f"{where}: {found.signature} has no option {', '.join(map(repr, unknown))}")
    grouped = _GROUPS[0] in parameters or _GROUPS[0] in found.passes  # the latter among the options that go on
    taken = [*parameters, *_GROUPS[:1]] if grouped else list(parameters)
    call = {name: given[name] for name in taken if given.get(name) is not None} | dict(options)
    missing = [n for n, p in parameters.items() if p.default is p.empty and _named(p) and n not in call]
    if missing:
        there = ", ".join(sorted(name for name, x in given.items() if x is not None))
        raise ValueError(f"{where}: {found.name} needs {', '.join(missing)}; here there are {there}")
    if grouped and not any(name in call for name in _GROUPS):
        raise ValueError(f"{where}: {found.name} compares responses to the same prompt, and nothing here groups them")
    return call


def fits(found: Recipe, given: Mapping[str, Any]) -> bool:
    """Whether `given` has all that the recipe needs."""
    try:
        arguments("", found, given, {})
    except (TypeError, ValueError):
        return False
    return True


def _named(parameter: inspect.Parameter) -> bool:
    return parameter.kind not in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL)

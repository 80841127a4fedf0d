"""A program for each recipe that runs as it is: small tensors, the call, the gradient."""

from __future__ import annotations

import ast
import inspect
import re
import textwrap
from collections.abc import Callable, Mapping
from typing import Any, Final

import torch

from fastreward.recipes._catalogue.inputs import MADE, MADE_FOR

#: What a recipe returns -> (names for it, the lines that make a loss of it).
_LOSS: Final = "loss = fr.policy_loss(logprobs, old_logprobs, advantages, mask).loss"
_WITH: Final = "result = fr.policy_loss(logprobs, old_logprobs, advantages, mask, {})"
RETURNED: Final = {
    "loss": ("result", ()),
    "distillation loss": ("loss", ()),
    "weights": ("weights, keep, metrics", (_WITH.format("weights=weights, keep=keep"),)),
    "token weights": ("weights", (_WITH.format("weights=weights"),)),
    "response weights": ("weights", (_WITH.format("weights=weights"),)),
    "mask": ("keep", (_WITH.format("keep=keep"),)),
    "advantages": ("advantages", (_LOSS,)),
    "response advantages": ("advantages", (_LOSS,)),
    "rewards": ("rewards", ("advantages = fr.group_advantages(rewards, group_ids)", _LOSS)),
    "token rewards": ("token_rewards", ("advantages = fr.discounted_returns(token_rewards, mask)", _LOSS)),
    "values": ("values", ("loss = (predicted - values).square()[mask].mean()",)),
    "node values": ("node_values", ("advantages = tree.to_tokens(tree.advantages(node_values))", _LOSS)),
    "decision": ("branch", ('print("branch:", branch.tolist())', _LOSS)),
    "rollouts": ("rollouts", ('print("more:", rollouts.tolist())', _LOSS)),
    "ends": ("ends", ("print(fr.segment_ids(mask, ends=ends).tolist())", _LOSS)),
    "statistics": ("statistics", ("print(statistics.tolist())", _LOSS)),
    "logits": ("steered", ('print("next:", steered.argmax(-1).tolist())', _LOSS)),
}
_HEAD: Final = """import torch
import fastreward as fr
from fastreward import recipes

torch.manual_seed(0)"""


def example(
    function: Callable[..., Any], returns: str, advantages: str, passes: tuple[str, ...], settings: Mapping[str, Any]
) -> str:
    """The program for a recipe: its function, and the fields of its registration."""
    arguments, name = _arguments(function, passes, settings), function.__name__
    names, following = RETURNED[returns]
    call = _wrapped(f"recipes.{name}(", arguments, len(names) + 3)
    lines = [f"{names} = {call}", *following]
    loss = "loss" if any(line.startswith("loss = ") for line in lines) else "result.loss"
    trained = (
        "predicted" if returns == "values" else arguments[0] if returns in ("loss", "distillation loss") else "logprobs"
    )
    lines += [f"{loss}.backward()", f"print({loss}.item(), {trained}.grad.abs().sum().item())"]
    # What the call returns may have the name of an argument: rewards, shaped.
    rest = re.sub(rf"\b({names.replace(', ', '|')})\b", "_", "\n".join(lines[1:]))
    return "\n".join([_HEAD, *_set_up(f"{call}\n{rest}", name, advantages), "", *lines]) + "\n"


def responses() -> dict[str, Any]:
    """What the responses of the examples are, by name: tokens and mask [4, 6], rewards [4], group_ids."""
    scope: dict[str, Any] = {"torch": torch}
    return {name: eval(MADE[name][0], scope) for name in ("tokens", "mask", "rewards", "group_ids")}


def outcome(program: str, name: str) -> Any:
    """What an example calls `name`: it is run as far as the last line that gives it, torch's generator left alone."""
    lines, scope = ast.parse(program).body, dict[str, Any]()
    giving = [
        k for k, line in enumerate(lines) if isinstance(line, ast.Assign) and ast.unparse(line.targets[0]) == name
    ]
    with torch.random.fork_rng(devices=[]):
        exec(compile(ast.Module(lines[: giving[-1] + 1], []), "example", "exec"), scope)
    return scope[name]


def _arguments(function: Callable[..., Any], passes: tuple[str, ...], settings: Mapping[str, Any]) -> list[str]:
    """Every required argument and the mask, then what the recipe's registration adds."""
    found = []
    for p in inspect.signature(function).parameters.values():
        if p.kind is p.POSITIONAL_OR_KEYWORD and (p.default is p.empty or p.name == "mask"):
            found.append(p.name)
    found += [item if "=" in item else f"{item}={item}" for item in passes]
    return found + [f"{name}={value!r}" for name, value in settings.items()]


def _wrapped(start: str, arguments: list[str], before: int) -> str:
    """The call, which stands behind `before` characters, on one line or on several."""
    text = ", ".join(arguments)
    if before + len(start) + len(text) < 110:
        return f"{start}{text})"
    indent = "    "
    return f"{start}\n{textwrap.fill(text, 108, initial_indent=indent, subsequent_indent=indent)}\n)"


def _set_up(program: str, name: str, advantages: str) -> list[str]:
    """The lines that make what the program names, and what these name in turn."""
    other = MADE_FOR.get(name, {})
    made = {**{used: line for used, line in other.items() if used not in MADE}, **MADE, **other}
    lines: list[str] = []
    for used, (code, comment) in reversed(made.items()):
        if re.search(rf"\b{used}\b", program) and not re.search(rf"^{used} = ", program, re.MULTILINE):
            code = code.replace("{advantages}", f", {advantages}" if advantages else "")
            program += "\n" + code
            lines.append(f"{used} = {code}" + (f"  # {comment}" if comment else ""))
    return lines[::-1]

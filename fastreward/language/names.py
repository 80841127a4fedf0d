"""Names of a program's values in generated source: those of the loss's terms, or v1, v2, ... in order."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from fastreward.language.formula import expression
from fastreward.language.node import Level, Node
from fastreward.language.ops import REDUCTIONS, SCANS
from fastreward.language.program import Program

_SIDES = ("chosen_", "rejected_")
_LONGEST = 36  # what would be longer is numbered


def names(program: Program, taken: Iterable[str], endings: Sequence[str] = ()) -> dict[int, str]:
    """A name for every node of the program, by its id: identifiers that differ from each other and from `taken`.

    endings: what generated source puts behind a name to make others, which differ from everything too.
    """
    used = set(taken)
    found: dict[int, str] = {}
    numbered = 0
    for node in program.nodes:
        name = _identifier(_name(node, found, program.sides))
        if not name or len(name) > _LONGEST:
            numbered += 1
            name = f"v{numbered}"
        while not used.isdisjoint((name, *(name + ending for ending in endings))):
            name += "_"
        used |= {name, *(name + ending for ending in endings)}
        found[node.id] = name
    return found


def _identifier(text: str) -> str:
    """Turn a name into one for Python and C++, which keeps names that begin with two underscores for itself."""
    text = re.sub(r"^_+", "_", re.sub(r"\W+", "_", text, flags=re.ASCII))
    return f"_{text}" if text[:1].isdigit() else text


def _name(node: Node, names: dict[int, str], sides: int) -> str:
    """The field's name for the node, "" where there is none."""
    side = _SIDES[node.side] if sides == 2 and (node.level == Level.TOKEN or node.op == "seq_count") else ""
    if node.op == "input":
        return side + (node.name or "").removeprefix("parameter.")
    if node.op == "seq_count":
        return f"{side}length"
    if node.op in ("parameter", "constant") or node.level == Level.SCALAR:
        return _scalar(node)
    args = [names[a.id] for a in node.args]
    if node.op in REDUCTIONS:
        over, how = node.op.split("_", 1)
        what = args[0].removesuffix("_if_any").removeprefix(f"{how}_" if over != "seq" else "")
        return f"{how}_{what}" if over == "seq" else f"{over}_{how}_{what}"
    if node.op in SCANS:
        return f"{node.op}_{args[0]}"
    if node.op == "sub" and node.args[0].name == "logprob" and node.args[1].name in ("old_logprob", "ref_logprob"):
        return f"{side}log_ratio" if node.args[1].name == "old_logprob" or sides == 2 else "log_ratio_to_ref"
    if node.op == "exp" and node.level == Level.TOKEN and "log_ratio" in args[0]:
        return f"{side}ratio"
    if node.op == "clip" and args[0].endswith("log_ratio") and all(a.op == "constant" for a in node.args[1:]):
        return f"{args[0]}_clamped"
    if node.op == "gt" and node.args[0].op == "seq_count" and node.args[1].value == 0.0:
        return "has_tokens"
    if node.op == "not" and args[0] == "has_tokens":
        return "is_empty"
    if node.op == "where" and args[0] == "is_empty" and node.args[1].value == 0.0:
        return f"{args[2]}_if_any"
    if node.op == "where" and args[0] == "has_tokens" and node.args[1].level > Level.SCALAR:
        return f"{args[1]}_if_any"
    return ""


def _scalar(node: Node) -> str:
    text = expression(node).replace("1 - ", "one minus ").replace("1 + ", "one plus ")
    for symbol, word in ((" - ", " minus "), (" + ", " plus "), (" * ", " times "), (" / ", " over "), ("-", "minus ")):
        text = text.replace(symbol, word)
    return text.strip("() ")

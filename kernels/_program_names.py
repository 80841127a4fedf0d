"""Names of a loss program's values in generated source: those of the loss's terms, or v1, v2, ... in order."""

from __future__ import annotations

import keyword
import re

from fastreward.losses._graph import Level, Node, walk
from fastreward.losses._ops import REDUCTIONS
from fastreward.losses._program import Program
from fastreward.losses._show import expression

_SIDES = ("chosen_", "rejected_")
_LONGEST = 36  # what would be longer is numbered
#: What the generated functions use themselves.
_TAKEN = """
    tl triton range float True exp expm1 expm1_minus log log1p tanh sigmoid logsigmoid sign minimum maximum clip truth
    divide row_bounds before tile_columns wide add count most sum_of most_of store_partial is_last NOTHING column
    store_column largest smallest merge_chunks group_reduce group_select batch_permute SUM MAX MIN OTHERS BEFORE AFTER
    mask cu_seqlens batch columns values order starts groups counter N B T row_units chunks chunk program programs
    PACKED HAS_MASK ROWS STEPS LANES VEC BLOCK_ROWS TILE row row_ok start tokens extent offsets t0 t at inside counted b
    logits logits_units labels inv_t inv_t_stride row_of_token grad_scale logprobs entropies grad_logits grad_units
    vocab_units V HAS_INV_T LOGITS_UNIT GRAD_UNIT index token statistics store_gradient zero_row inverse_temperature
    own_logprob own_entropy g_logprob g_entropy scale label logits_row grad_row inverse64 top top_logprob
"""


def names(program: Program) -> dict[int, str]:
    """A name for every node of the program, each a Python identifier of its own, as are name_ptr and name_lanes."""
    taken = {*_TAKEN.split(), *keyword.kwlist}
    found: dict[int, str] = {}
    numbered = 0
    for node in walk([*program.outputs, *program.batch, *program.scalars]):
        name = _identifier(_name(node, found, program.sides))
        if not name or len(name) > _LONGEST:
            numbered += 1
            name = f"v{numbered}"
        while not taken.isdisjoint((name, f"{name}_ptr", f"{name}_lanes")):
            name += "_"
        taken |= {name, f"{name}_ptr", f"{name}_lanes"}
        found[node.id] = name
    return found


def _identifier(text: str) -> str:
    text = re.sub(r"\W+", "_", text, flags=re.ASCII)
    return f"_{text}" if text[:1].isdigit() else text


def _name(node: Node, names: dict[int, str], sides: int) -> str:
    """What the node is in the words of the field, "" where there is no word."""
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

"""A loss is one function of at most ten lines, and the same written out as its reference."""

from __future__ import annotations

import ast
import inspect
import io
import textwrap
import tokenize

import pytest
from reference_losses import along, later, policy, preference

from fastreward import losses

MOST = 10
DEFINITIONS = {name: x for name, x in vars(losses).items() if isinstance(x, losses.Definition)}
#: Longer ones: the most lines that they may have, and why.
LONGER = {
    "dpo": (13, "all of TRL's loss types, with length normalization and WPO weights, in one signature"),
    "mm_dpo": (11, "its margin is given, or comes from a selection of the batch"),
    "treg": (11, "two base losses, and a regularizer of either side"),
    "cispo": (11, "three codes clip by three conventions"),
    "vespo": (11, "importance weights per token or per sequence, clamped before and after they are summed"),
    "stable_reinforce": (12, "the paper's filter of advantages, its code's, and none"),
    "jepo": (13, "a leave-one-out log-sum-exp that must not cancel"),
}
_NO_CODE = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)


def lines_of_code(source: str) -> int:
    """Lines of a function's body that have code on them, without its docstring."""
    source = textwrap.dedent(source)
    (function,) = ast.parse(source).body
    assert isinstance(function, ast.FunctionDef)
    body = function.body[ast.get_docstring(function) is not None :]
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    lines = {line for t in tokens if t.type not in _NO_CODE for line in range(t.start[0], t.end[0] + 1)}
    return len(lines & set(range(body[0].lineno, function.end_lineno + 1)))  # type: ignore[operator]


def test_lines_are_those_with_code() -> None:
    assert (
        lines_of_code(
            'def f(x):\n    """One.\n\n    Two.\n    """\n    # three\n\n    y = (\n        x\n    )\n    return y\n'
        )
        == 4
    )


@pytest.mark.parametrize("name", DEFINITIONS)
def test_a_loss_is_short(name: str) -> None:
    lines = lines_of_code(inspect.getsource(DEFINITIONS[name].function))
    assert lines <= MOST if name not in LONGER else MOST < lines <= LONGER[name][0], f"{name} has {lines} lines"


def test_longer_losses_are_there() -> None:
    assert set(LONGER) <= set(DEFINITIONS)


@pytest.mark.parametrize("name", DEFINITIONS)
def test_a_loss_has_a_reference(name: str) -> None:
    modules = (preference,) if DEFINITIONS[name].pairs else (policy, along, later)
    found = [module for module in modules if inspect.isfunction(getattr(module, name, None))]
    assert found, f"tests/support/reference_losses has no {name}"

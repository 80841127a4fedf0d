"""What no compiler here asks of kernels/: functions on the host typed in full, defaults that every Triton takes."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
from checkout import ROOT

FILES = sorted((ROOT / "kernels").rglob("*.py"))


def functions(path: Path, *, jit: bool) -> Iterator[ast.FunctionDef]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef) and jit == ("jit" in "".join(map(ast.unparse, node.decorator_list))):
            yield node


def untyped(function: ast.FunctionDef) -> list[str]:
    given = function.args
    arguments = [*given.posonlyargs, *given.args, *given.kwonlyargs, *filter(None, (given.vararg, given.kwarg))]
    names = [a.arg for a in arguments if a.annotation is None and a.arg != "self"]
    return names if function.returns is not None else [*names, "return"]


@pytest.mark.parametrize("path", FILES, ids=[str(p.relative_to(ROOT)) for p in FILES])
def test_host_functions_are_typed(path: Path) -> None:
    missing = {f.name: untyped(f) for f in functions(path, jit=False) if untyped(f)}
    assert not missing


def test_kernels_have_no_texts_as_defaults() -> None:
    """Triton 3.6 does not make a constexpr of them: calling the function ends the compilation."""
    with_text = [
        f.name
        for path in FILES
        for f in functions(path, jit=True)
        if any(isinstance(x, ast.Constant) and isinstance(x.value, str) for x in f.args.defaults)
    ]
    assert not with_text

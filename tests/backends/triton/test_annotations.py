"""Functions in kernels/ that run on the host are typed in full; mypy cannot ask that of them alone."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
from checkout import ROOT

FILES = sorted((ROOT / "kernels").rglob("*.py"))


def host_functions(tree: ast.AST) -> Iterator[ast.FunctionDef]:
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and "jit" not in "".join(map(ast.unparse, node.decorator_list)):
            yield node


def untyped(function: ast.FunctionDef) -> list[str]:
    given = function.args
    arguments = [*given.posonlyargs, *given.args, *given.kwonlyargs, *filter(None, (given.vararg, given.kwarg))]
    names = [a.arg for a in arguments if a.annotation is None and a.arg != "self"]
    return names if function.returns is not None else [*names, "return"]


@pytest.mark.parametrize("path", FILES, ids=[str(p.relative_to(ROOT)) for p in FILES])
def test_host_functions_are_typed(path: Path) -> None:
    missing = {f.name: untyped(f) for f in host_functions(ast.parse(path.read_text(encoding="utf-8"))) if untyped(f)}
    assert not missing

"""Whether a trainer's function is the one that a replacement was written for: by its source, without an import.

Importing a trainer is for the trainer to do: it takes seconds, and a process with vLLM must not import DeepSpeed.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import textwrap
from collections.abc import Sequence
from pathlib import Path


class Unrecognised(Exception):
    """The place isn't as expected, and is left alone."""


def digest(root: Path, places: Sequence[tuple[str, str]]) -> str:
    """Of what stands at (module, qualified name) in files below `root`, without docstrings and comments."""
    found = "\n".join(_source(_file(root, module), name) for module, name in places)
    return hashlib.sha256(found.encode()).hexdigest()[:16]


def _file(root: Path, module: str) -> Path:
    path = root.joinpath(*module.split(".")[1:])
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def _source(path: Path, name: str) -> str:
    definitions = _definitions(path)
    if name not in definitions:
        raise Unrecognised(f"{path.name} has no {name}")
    return definitions[name]


@functools.cache
def _definitions(path: Path) -> dict[str, str]:
    """The source of every function and method, by its qualified name; {} where the file can't be read."""
    try:
        text = path.read_text(encoding="utf-8")
        body = ast.parse(text).body
    except (OSError, SyntaxError, UnicodeDecodeError):
        return {}
    lines = text.splitlines()
    methods = [(f"{c.name}.", f) for c in body if isinstance(c, ast.ClassDef) for f in c.body]
    return {
        f"{prefix}{node.name}": _bare(node, lines)
        for prefix, node in [*(("", node) for node in body), *methods]
        if isinstance(node, ast.FunctionDef)
    }


def _bare(node: ast.FunctionDef, lines: list[str]) -> str:
    """Its lines with their decorators, without docstring, empty lines and lines of comment."""
    first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
    kept = dict(enumerate(lines[first - 1 : node.end_lineno], first))
    if ast.get_docstring(node) is not None:
        for number in range(node.body[0].lineno, (node.body[0].end_lineno or 0) + 1):
            del kept[number]
    code = [line.rstrip() for line in kept.values() if line.strip() and not line.lstrip().startswith("#")]
    return textwrap.dedent("\n".join(code))

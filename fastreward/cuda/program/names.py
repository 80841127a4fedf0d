"""Names of a loss program's values in generated CUDA C++: those of generated Triton, but for words of C++."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from fastreward.language import names as shared
from fastreward.language.node import Node
from fastreward.language.ops import words
from fastreward.language.program import Program

_KEYWORDS: Final = """
    alignas alignof and and_eq asm auto bitand bitor bool break case catch char char8_t char16_t char32_t class compl
    concept const consteval constexpr constinit const_cast continue co_await co_return co_yield decltype default delete
    do double dynamic_cast else enum explicit export extern false float for friend goto if inline int long mutable
    namespace new noexcept not not_eq nullptr operator or or_eq private protected public register reinterpret_cast
    requires return short signed sizeof static static_assert static_cast struct switch template this thread_local throw
    true try typedef typeid typename union unsigned using virtual void volatile wchar_t while xor xor_eq
    NULL NAN INFINITY EOF assert errno linux unix
"""
#: What the generated functions and structs use themselves.
_TAKEN: Final = """
    a i u x y row rows room sums sums0 sums1 side0 side1 tokens tokens0 tokens1 batch results columns totals groups
    counter logits load store token gradient fastreward i64 THREADS WARPS WARP CHUNK Side Unit Groups Reductions Reduced
    Row Input Output Arguments LogitsArguments TokenGradient Loss ENTROPY ROOM COUNT OTHERS BEFORE AFTER
    blockIdx gridDim threadIdx blockDim warpSize run_unit last_block find_groups over_groups over_block over_units start
    add_members permute_rows infinity negative_infinity not_a_number scan shift counts carries scans Map ScanRoom
    Carries REVERSE run_row call moments Divergence DivergenceArguments Probability PAIR_THREADS MOMENTS
    quick_exp quick_log
"""
#: What is put behind a value's name: what its scan carries, itself in f64.
CARRY: Final = "_carry"
WIDE: Final = "_wide"


class Names:
    """C++ names of a program's nodes."""

    def __init__(self, program: Program) -> None:
        own = [f"out{i}" for i in range(len(program.outputs) + len(program.kept))]
        own += [f"Pass{k}{side}" for k in range(1, len(program.stages) + 1) for side in ("", "Chosen", "Rejected")]
        taken = (*words("cuda"), *_KEYWORDS.split(), *_TAKEN.split(), *own)
        self._names = shared.names(program, taken, (CARRY, WIDE) if program.scans else ())

    def __call__(self, node: Node) -> str:
        """The node's name."""
        return self._names[node.id]

    def label(self, node: Node) -> str:
        """A node's name in a comment: a number is itself."""
        return f"{node.value:g}" if node.op == "constant" else self(node)

    def listed(self, head: str, labels: Iterable[str]) -> list[str]:
        """Comment lines that say what each place of an array holds; none for an empty one."""
        line, lines = f"// {head}:", []
        for i, label in enumerate(labels):
            item = f" {i} {label},"
            if len(line) + len(item) > 116:
                lines.append(line)
                line = "//  "
            line += item
        return [*lines, line.removesuffix(",")] if line.endswith(",") else []

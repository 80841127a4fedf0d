"""Expression graphs: what a loss becomes when it is called with terms instead of numbers.

Every node lives in one graph, which keeps equal nodes once (common subexpressions), folds constants and drops what has
no effect while it is built. A node's level says how often it has a value: once (SCALAR: known before anything runs;
BATCH: known on the device), once a sequence (SEQUENCE) or once a token (TOKEN).
"""

from __future__ import annotations

from typing import Final

from fastreward.language.formula import expression
from fastreward.language.messages import origin
from fastreward.language.node import Level, Node, Nodes, is_constant
from fastreward.language.ops import OPS
from fastreward.language.simplify import RULES

_TOKEN, _SEQUENCE = Level.TOKEN, Level.SEQUENCE
#: Which operands of an operator are conditions; of the others none.
CONDITIONS: Final = {"where": [True, False, False], "and": [True, True], "or": [True, True], "not": [True]}
_NUMBERS: Final = [[False] * arity for arity in range(4)]


class Graph(Nodes):
    """Makes nodes of nodes, folded and simplified."""

    def call(self, op: str, *operands: object) -> Node:
        """An elementwise operator on terms and numbers, folded and simplified where that changes nothing."""
        # A loss makes some hundred of these at its first call: no generators, no tables made anew.
        args = tuple([self.node(x) for x in operands])
        spec = OPS[op]
        wanted = CONDITIONS.get(op) or _NUMBERS[spec.arity]
        if [a.boolean for a in args] != wanted:
            args = tuple(self._as(a, boolean) for a, boolean in zip(args, wanted, strict=True))
        if [a.op for a in args] == ["constant"] * len(args):
            value = float(spec.value(*(_python(a) for a in args)))
            return self.truth(value) if spec.boolean else self.constant(value)
        simple = RULES[op](self, *args) if op in RULES else None
        if simple is not None:
            return simple
        return self.plain(op, *args)

    def plain(self, op: str, *args: Node) -> Node:
        """The operator on these nodes, not simplified."""
        level = max([a.level for a in args])
        return self._make(op, args, level, side=self._side(op, args), boolean=OPS[op].boolean)

    def reduce(self, op: str, *args: Node, side: int = 0) -> Node:
        """A reduction (see ops.py). What is the same for all tokens may be summed over them: length times it.

        Of an empty sequence that is 0, whatever it has per sequence.
        """
        if op.startswith("seq") and args and args[0].level < Level.TOKEN:
            length = self.length(args[0].side)
            return self.call("where", length > 0.0, args[0] * length, 0.0) if op == "seq_sum" else args[0]
        if args and is_constant(args[0], 0.0):
            return args[0]
        assert op == "seq_count" or args[0].level >= Level.SEQUENCE, f"{op} of a {args[0].level.name} node"
        level = Level.BATCH if op.startswith("batch") and op != "batch_permute" else Level.SEQUENCE
        key = (side,) if op == "seq_count" else ()
        return self._make(op, args, level, side=args[0].side if args else side, key=key)

    def along(self, op: str, x: object, by: object = None, *, side: int = 0) -> Node:
        """A scan, a shift or a segment's sum (see ops.py), of tokens of that side where no argument has one."""
        args = tuple(self._as(self.node(a), False) for a in (x, by) if a is not None)
        sides = [a.side for a in args if a.level == _TOKEN]
        if is_constant(args[0], 0.0) or (op in ("scan", "scan_reverse") and is_constant(args[1], 0.0)):
            return args[0]
        side = self._side(op, args) if sides else side
        return self._make(op, args, _TOKEN, side=side, key=() if sides else (side,))

    def threshold(self, op: str, x: Node, bound: Node) -> Node:
        """One of THRESHOLDS (see ops.py)."""
        return self._make(op, (x, bound), Level.BATCH, side=x.side)

    def text(self, node: Node) -> str:
        """The node as a formula."""
        return expression(node)

    def _as(self, x: Node, boolean: bool) -> Node:
        if boolean == x.boolean:
            return x
        if boolean:
            return self.truth(x.value) if x.op == "constant" else self.call("ne", x, 0.0)
        return self.call("where", x, 1.0, 0.0)

    def _side(self, op: str, args: tuple[Node, ...]) -> int:
        sides = [a.side for a in args if a.level == _TOKEN]
        if sides and min(sides) != max(sides):
            raise TypeError(
                f"{origin()}: {op} mixes chosen and rejected tokens; reduce each side first, as in seq_sum(...)"
            )
        return sides[0] if sides else max([a.side for a in args if a.level == _SEQUENCE], default=0)


def _python(x: Node) -> float:
    assert x.value is not None
    return bool(x.value) if x.boolean else x.value

"""A divergence as programs over the tokens of the vocabulary, a row of logits in the place of a sequence.

D = sum_j f(log p_j, log q_j) for the student's p = softmax(logits / T) and the teacher's q. With f1 = df / dlog p the
gradient for a logit is (f1_k - p_k sum_j f1_j) / T: one sum of the forward and one pass over the row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Final

from fastreward.language.derivative import gradients
from fastreward.language.functions import exp, seq_sum
from fastreward.language.graph import Graph
from fastreward.language.node import Level, Node, walk
from fastreward.language.objective import Key, inputs_asked, nonzero, reading
from fastreward.language.ops import OF_OTHERS
from fastreward.language.program import Program, copied, program
from fastreward.language.terms import Terms
from fastreward.language.traced import TracedLoss

#: The inputs per token of the vocabulary; their exponentials p and q are inputs too, which backends have at hand.
SIDES: Final = ("log_p", "log_q")
PER_TOKEN: Final = (*SIDES, "p", "q")
#: What an adaptive divergence reads of a row: what lies in the teacher's head of the difference between both. It is
#: linear in it, D = share D_1 + (1 - share) D_0, so the forward sums D_1 and D_0 before the share is known.
HEAD_SHARE: Final = "head_share"
#: The inputs per row of a gradient: what flows into the divergence over the temperature, and the forward's sum of f1 or
#: f2; of the student's also a and b: p (a + b log p) is what flows in through its entropy and the label's log-prob.
UPSTREAM, TOTAL, CONSTANT, SLOPE = "upstream", "total", "a", "b"


@dataclass(frozen=True, eq=False)
class DivergencePrograms:
    """Programs of one divergence.

    values: per row the divergence; that and the sum of f1; and that of f2 too: by how many sides get a gradient.
    student, statistics: the gradient for the student's logits per token, without and with what comes through the other
    outputs. teacher: that for the teacher's logits. parameters: names of the divergence's numbers, in order.
    adaptive: it reads HEAD_SHARE, so each of the values is there twice, for the shares 1 and 0.
    """

    values: tuple[Program, Program, Program]
    student: Program
    statistics: Program
    teacher: Program
    parameters: tuple[str, ...]
    adaptive: bool

    @cached_property
    def key(self) -> str:
        """Equal for divergences of the same formula."""
        return f"{self.values[2].key} {self.student.key} {self.teacher.key} {self.parameters}"


_PROGRAMS: Final[dict[str, DivergencePrograms]] = {}


def registered_programs(key: str) -> DivergencePrograms:
    """What `register_programs` has made known: an op's arguments are tensors, numbers and strings."""
    return _PROGRAMS[key]


def register_programs(divergence: TracedLoss) -> str:
    """The name under which an op finds the programs of a divergence."""
    programs = _cached(Key(divergence))
    _PROGRAMS[programs.key] = programs
    return programs.key


@lru_cache(maxsize=256)
def _cached(key: Key) -> DivergencePrograms:
    divergence = key.loss
    adaptive = (HEAD_SHARE, Level.SEQUENCE, 0) in inputs_asked(divergence)
    sums = [seq_sum(x) for x in _derivatives(divergence)]
    shares = (1.0, 0.0) if adaptive else (None,)
    return DivergencePrograms(
        tuple(_program(sums[:count], shares) for count in (1, 2, 3)),  # type: ignore[arg-type]  # of three
        _gradient(divergence, "log_p", statistics=False),
        _gradient(divergence, "log_p", statistics=True),
        _gradient(divergence, "log_q", statistics=False),
        tuple(sorted(divergence.scalars)),
        adaptive,
    )


def _derivatives(divergence: TracedLoss) -> tuple[Node, Node, Node]:
    """(f, df / dlog p, df / dlog q) on a fresh graph, per token of the vocabulary."""
    known = {(HEAD_SHARE, Level.SEQUENCE, 0), *((name, Level.TOKEN, 0) for name in SIDES)}
    if not inputs_asked(divergence) <= known:
        read = reading(divergence)
        raise ValueError(f"divergence: expected one over log_p and log_q, got {divergence.name}, which reads {read}")
    t = Terms(Graph(), {**dict.fromkeys(SIDES, Level.TOKEN), HEAD_SHARE: Level.SEQUENCE})
    value = divergence.trace(t)
    if value.level < Level.TOKEN or any(n.op in OF_OTHERS for n in walk([value])):
        raise ValueError(
            f"{divergence.place}: expected a divergence to be a function of one token's log_p and log_q, which is "
            "summed over the vocabulary; reductions and scans are not part of it"
        )
    found = [nonzero(g) for g in gradients(value, [t.log_p, t.log_q])]
    if found[0] is None:
        raise ValueError(f"{divergence.place}: it does not depend on log_p, so nothing could be trained with it")
    first, second = (t.graph.constant(0.0) * t.log_p if g is None else g for g in found)
    return value, first, second


def _gradient(divergence: TracedLoss, side: str, *, statistics: bool) -> Program:
    _, *derivatives = _derivatives(divergence)
    derivative = derivatives[SIDES.index(side)]
    graph = derivative.graph
    log = graph.input(side, Level.TOKEN)
    given = {name: graph.input(name, Level.SEQUENCE) for name in (UPSTREAM, TOTAL, CONSTANT, SLOPE)}
    whole = given[UPSTREAM] * (derivative - exp(log) * given[TOTAL])
    if statistics:
        whole = whole + exp(log) * (given[CONSTANT] + given[SLOPE] * log)
    return _program([whole])


def _program(outputs: Sequence[Node], shares: Sequence[float | None] = (None,)) -> Program:
    """The program of `outputs`, with p and q where they are; each for these head shares, None: for any."""
    graph = Graph()
    copies = [_copies(graph, outputs, share) for share in shares]
    return program([copy[n.id] for n in outputs for copy in copies], [])


def _copies(graph: Graph, outputs: Sequence[Node], share: float | None) -> dict[int, Node]:
    copy: dict[int, Node] = {}
    for node in walk(outputs):
        args = [copy[a.id] for a in node.args]
        if node.op == "exp" and node.args[0].name in SIDES:
            copy[node.id] = graph.input(node.args[0].name.removeprefix("log_"), Level.TOKEN)
        elif share is not None and node.name == HEAD_SHARE:
            copy[node.id] = graph.constant(share)
        else:
            copy[node.id] = copied(graph, node, args)
    return copy

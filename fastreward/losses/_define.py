"""`define`: from a function over terms to a loss that every backend runs."""

from __future__ import annotations

import functools
import inspect
import itertools
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, Concatenate, Generic, Literal, ParamSpec, TypeVar, overload

from torch import Tensor

from fastreward._arrays import as_tensor
from fastreward.losses._graph import Graph, Level, Node
from fastreward.losses._terms import PairTerms, Terms

P = ParamSpec("P")
T = TypeVar("T", Terms, PairTerms)
Scalar = float | int
#: Key of a registered objective, (name, side) of the inputs it reads, names of its metrics, whether it reads groups.
Plan = tuple[str, tuple[tuple[str, int], ...], tuple[str, ...], bool]
#: Key of a registered gradient, (name, side) of the inputs it reads.
GradientPlan = tuple[str, tuple[tuple[str, int], ...]]


_NUMBERS = itertools.count()


class Definition(Generic[P]):
    """A loss function over terms; calling it with parameters gives a `Loss`. Made by `define`."""

    def __init__(
        self,
        function: Callable[..., Node],
        pairs: bool,
        static: Collection[str],
        aggregation: str,
        check: Callable[..., None] | None,
    ) -> None:
        functools.update_wrapper(self, function)
        self.function, self.pairs, self.static = function, pairs, frozenset(static)
        self.aggregation, self.check, self.name = aggregation, check, function.__name__
        self.number = next(_NUMBERS)  # tells definitions of one name apart
        whole = inspect.signature(function)
        #: Of the parameters, without the terms.
        self.__signature__ = whole.replace(parameters=list(whole.parameters.values())[1:])
        unknown = self.static - set(self.__signature__.parameters)
        if unknown:
            raise ValueError(f"static: {self.name} has no parameter {', '.join(sorted(unknown))}")

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> Loss:
        """The loss with these parameters: numbers, [B] tensors (one per sequence), or terms of an enclosing loss."""
        bound = self.__signature__.bind(*args, **kwargs)
        bound.apply_defaults()
        values = {name: _parameter(self.name, name, value) for name, value in bound.arguments.items()}
        if self.check is not None and not any(isinstance(v, Node | Tensor) for v in values.values()):
            self.check(**values)
        return Loss(self, values)


    def __reduce__(self) -> str:
        """Pickled by name, as functions are."""
        return self.__qualname__


def _parameter(loss: str, name: str, value: Any) -> Any:
    value = as_tensor(value)
    if isinstance(value, Tensor):
        if value.ndim > 1:
            raise ValueError(f"{loss}: {name}: expected a number or a [B] tensor, got shape {list(value.shape)}")
        return value.detach()
    if value is None or isinstance(value, str | bool | int | float | Node):
        return value
    raise TypeError(f"{loss}: {name}: expected a number, a [B] tensor, a string, True, False or None, got {value!r}")


def _kind(value: Any) -> Any:
    return ("tensor", value.ndim) if isinstance(value, Tensor) else (type(value), value)


@dataclass(frozen=True, eq=False)
class Loss:
    """A loss with its parameters, to pass to `policy_loss` and its kin; `print` shows formula and derivative.

    Called with the terms of another loss it gives its value there: losses are composed that way.
    """

    definition: Definition[Any]
    parameters: Mapping[str, Any]
    #: The structure as text. Traced code reads it, so that Dynamo compiles anew for a loss of another formula.
    formula: str = field(init=False, repr=False)
    _plans: dict[tuple[Any, ...], Plan] = field(init=False, default_factory=dict, repr=False)
    _gradient_plans: dict[tuple[Any, ...], GradientPlan | None] = field(init=False, default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "formula", f"{self.definition.number} {self.structure[1]}")

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.definition, dict(self.parameters))

    @property
    def name(self) -> str:
        """The name of the function that defines it."""
        return self.definition.name

    @property
    def aggregation(self) -> str:
        """How the published method turns token losses into one number; what `aggregation=None` means."""
        return self.definition.aggregation

    @property
    def scalars(self) -> dict[str, float]:
        """Parameters that are numbers at run time: changing them compiles nothing."""
        return {k: float(v) for k, v in self.parameters.items() if self._is_scalar(k)}

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Parameters given once per sequence."""
        return {k: v for k, v in self.parameters.items() if isinstance(v, Tensor)}

    @property
    def structure(self) -> tuple[Any, ...]:
        """What decides the formula: the definition and its static parameters. Equal ones share compiled kernels."""
        fixed = tuple((k, "number" if self._is_scalar(k) else _kind(v)) for k, v in self.parameters.items())
        return (self.definition.function, fixed)

    def _is_scalar(self, name: str) -> bool:
        value = self.parameters[name]
        return isinstance(value, Scalar) and not isinstance(value, bool) and name not in self.definition.static

    def __call__(self, t: Any) -> Node:
        """The loss as an expression of the terms `t`; its numbers are constants of that expression."""
        return self._value(t, dict(self.parameters))

    def trace(self, t: Terms | PairTerms) -> Node:
        """The loss as an expression of `t` and of its own run-time parameters."""
        graph = t.graph
        values: dict[str, Any] = {}
        for name, value in self.parameters.items():
            if self._is_scalar(name):
                values[name] = graph.parameter(name)
            elif isinstance(value, Tensor):
                values[name] = graph.input(f"parameter.{name}", Level.ROW if value.ndim else Level.BATCH)
            else:
                values[name] = value
        return self._value(t, values)

    def _value(self, t: Any, values: dict[str, Any]) -> Node:
        result = self.definition.function(t, **values)
        if not isinstance(result, Node | int | float):
            raise TypeError(f"{self.name}: expected the loss to return a term, got {type(result).__name__}")
        node: Node = t.graph.node(result)
        if node.boolean:
            raise TypeError(f"{self.name}: expected the loss to return a number per token or sequence, got a condition")
        return node

    def reads(self, term: str) -> bool:
        """Whether the loss depends on the term of this name (of a preference loss: on either side)."""
        return self._reads(self.formula, term)

    def policy_plan(self, *call: Any) -> Plan:
        """Registers the objective of a `policy_loss` call (fields of PolicyCall)."""
        return self._policy_plan(self.formula, *call)

    def gradient_plan(self, *call: Any) -> GradientPlan | None:
        """Registers the gradient token by token: its key and inputs; None where other tokens' log-probs go into it."""
        return self._gradient_plan(self.formula, *call)

    def pair_plan(self, *call: Any) -> Plan:
        """The same as `policy_plan` for `preference_loss` (fields of PairCall)."""
        return self._pair_plan(self.formula, *call)

    # What these four return is a constant to Dynamo; it compiles anew where an argument is another, so `formula` is one.
    def _reads(self, _: str, term: str) -> bool:
        from fastreward.losses._objective import terms_read

        return term in terms_read(self)

    def _policy_plan(self, _: str, *call: Any) -> Plan:
        if call not in self._plans:
            from fastreward._program_op import register
            from fastreward.losses._objective import PolicyCall, policy_objective

            o = policy_objective(self, PolicyCall(*call))
            self._plans[call] = (register(o), o.inputs, o.metrics, o.program.groups)
        return self._plans[call]

    def _gradient_plan(self, _: str, *call: Any) -> GradientPlan | None:
        if call not in self._gradient_plans:
            from fastreward._program_op import register_gradient
            from fastreward.losses._objective import PolicyCall, token_gradient

            gradient = token_gradient(self, PolicyCall(*call))
            plan = None if gradient is None else (register_gradient(gradient), gradient.inputs)
            self._gradient_plans[call] = plan
        return self._gradient_plans[call]

    def _pair_plan(self, _: str, *call: Any) -> Plan:
        from fastreward._program_op import register
        from fastreward.losses._objective import PairCall, pair_objective

        objective = pair_objective(self, PairCall(*call))
        return register(objective), objective.inputs, objective.metrics, objective.program.groups

    def terms(self) -> Terms | PairTerms:
        """Terms on a fresh graph, where everything a caller may pass is there."""
        return PairTerms(Graph(sides=2)) if self.definition.pairs else Terms(Graph())

    def evaluate(self, mask: Any = None, group_ids: Any = None, **arrays: Any) -> Tensor:
        """The loss on numbers, slow and in float64: [B, T] per token (0 where masked) or [B] per sequence.

        arrays: the terms by name, [B, T], [B] or numbers: logprob=..., advantage=..., extras by their own names. For a
        preference loss chosen_logprob=..., rejected_logprob=..., and mask=(chosen, rejected). Tensors that require a
        gradient get one. Raises ValueError for a term that the loss reads and that is not there.
        """
        from fastreward.losses._evaluate import evaluate

        return evaluate(self, mask, group_ids, arrays)

    def source(self, backend: Literal["triton", "cuda"], **options: Any) -> str:
        """The kernel that `backend` runs for this loss, as text."""
        from fastreward.losses._source import source

        return source(self, backend, **options)

    def __str__(self) -> str:
        from fastreward.losses._show import show

        return show(self)


# Dynamo runs these while it traces.
for _method in ("_reads", "_policy_plan", "_gradient_plan", "_pair_plan"):
    getattr(Loss, _method)._dynamo_marked_constant = True


@overload
def define(function: Callable[Concatenate[T, P], Node], /) -> Definition[P]: ...
@overload
def define(
    *,
    pairs: bool = False,
    static: Collection[str] = (),
    aggregation: str = "token-mean",
    check: Callable[..., None] | None = None,
) -> Callable[[Callable[Concatenate[T, P], Node]], Definition[P]]: ...
def define(
    function: Any = None,
    /,
    *,
    pairs: bool = False,
    static: Collection[str] = (),
    aggregation: str = "token-mean",
    check: Callable[..., None] | None = None,
) -> Any:
    """Makes a loss of a function over symbolic terms, forward only; gradient and kernels are derived from it.

    The function's first argument are the terms (`Terms`; with pairs=True `PairTerms`), the others its parameters:
    numbers are run-time scalars (changing one compiles nothing), tensors [B] one value per sequence; None, True, False,
    strings and the parameters named in `static` are fixed while the function is traced, so that `if` may ask for them.
    It returns the loss per token or per sequence, to be minimised; t.report(name=...) adds metrics.

    pairs: the loss is over chosen and rejected sequences, for `preference_loss`.
    aggregation: what `policy_loss(aggregation=None)` does with it.
    check: called with the parameters' values whenever they are all numbers; raises ValueError for bad ones.
    """
    if function is None:
        return functools.partial(define, pairs=pairs, static=static, aggregation=aggregation, check=check)
    return Definition(function, pairs, static, aggregation, check)

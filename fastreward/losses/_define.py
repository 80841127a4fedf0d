"""`define`: from a function over terms to a loss that every backend runs."""

from __future__ import annotations

import functools
import inspect
import itertools
import math
import os
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from numbers import Real
from typing import Any, Concatenate, Final, Generic, Literal, ParamSpec, TypeVar, overload

import torch
from torch import Tensor

from fastreward import _check
from fastreward._arrays import as_tensor
from fastreward.losses._graph import Graph, Level, Node, described, origin, python_number
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
        kinds = {name: _kinds(p.annotation, p.default) for name, p in self.__signature__.parameters.items()}
        self._kinds = {name: k - {"term"} if name in self.static else k for name, k in kinds.items()}

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> Loss:
        """The loss with these parameters: numbers, [B] tensors (one per sequence), or terms of an enclosing loss."""
        if torch.compiler.is_dynamo_compiling():  # while it traces this line, not while it runs a loss
            raise RuntimeError(
                f"{self.name}: a loss can't be made inside torch.compile; make it outside the compiled function and "
                "pass it in, or keep it in a global"
            )
        try:
            bound = self.__signature__.bind(*args, **kwargs)
        except TypeError as error:
            raise TypeError(f"{self.name}: {error}") from None
        bound.apply_defaults()
        values = {name: self._parameter(name, value) for name, value in bound.arguments.items()}
        self._validate(values)
        for name, value in values.items():
            if isinstance(value, float) and math.isnan(value):
                raise ValueError(f"{self.name}: {name}: expected a number, got nan")
        return Loss(self, values)

    @property
    def place(self) -> str:
        """Where its function is, for messages."""
        code = getattr(self.function, "__code__", None)
        where = "" if code is None else f" ({os.path.basename(code.co_filename)}:{code.co_firstlineno})"
        return f"{self.name}{where}"

    def _parameter(self, name: str, value: Any) -> Any:
        """`value` as a tensor, a term or Python's own, if it is of the kind that the signature speaks of."""
        value, kinds = as_tensor(python_number(value)), self._kinds[name]
        given = next((kind for kind, types in _KINDS.items() if isinstance(value, types)), "")
        if given not in kinds:
            words = [_WORDS[kind] for kind in _KINDS if kind in kinds]
            expected = " or ".join(", ".join(words).rsplit(", ", 1))
            fixed = " (it decides the formula)" if given == "term" else ""
            came = "a term" if isinstance(value, Node) else "a tensor" if given == "term" else described(value)
            came = f"the terms; write {self.name}()(t)" if isinstance(value, Terms | PairTerms) else came
            raise TypeError(f"{self.name}: {name}: expected {expected}{fixed}, got {came}")
        if isinstance(value, Tensor):
            if value.ndim > 1:
                raise ValueError(
                    f"{self.name}: {name}: expected a number or a [B] tensor, got shape {list(value.shape)}"
                )
            return value.detach()
        return value

    def _validate(self, values: Mapping[str, Any]) -> None:
        """Calls `check`. Of a tensor that may be looked at it gets the extremes, of what is not known yet the default.

        What it has against a default is ignored: other parameters may ask for another value.
        """
        if self.check is None:
            return
        seen = {k: v for k, v in values.items() if isinstance(v, Tensor) and v.numel() and _check.values_checked(v)}
        unknown = {k for k, v in values.items() if isinstance(v, Node | Tensor) and k not in seen}
        defaults = {k: self.__signature__.parameters[k].default for k in unknown}
        if inspect.Parameter.empty in defaults.values():
            return
        for extreme in (Tensor.min, Tensor.max)[: 2 if seen else 1]:
            try:
                self.check(**{**values, **defaults, **{k: float(extreme(v)) for k, v in seen.items()}})
            except ValueError as error:
                if not str(error).startswith(tuple(f"{k}:" for k in unknown)):
                    raise

    def __reduce__(self) -> str:
        """Pickled by name, as functions are."""
        return self.function.__qualname__


#: What a parameter can be: types, most special first, and words.
_KINDS: Final[dict[str, tuple[type, ...]]] = {
    "bool": (bool,),
    "number": (int, float),
    "term": (Tensor, Node),
    "string": (str,),
    "None": (type(None),),
}
_WORDS: Final = {
    "number": "a number",
    "term": "a [B] tensor",
    "string": "a string",
    "bool": "True or False",
    "None": "None",
}
_ANY: Final = frozenset(_KINDS)


def _kinds(annotation: Any, default: Any) -> frozenset[str]:
    """What a parameter may be, by its default and by its annotation, which is text or missing as a rule."""
    text = annotation if isinstance(annotation, str) else getattr(annotation, "__name__", str(annotation))
    bare = annotation is inspect.Parameter.empty
    none = {"None"} if default is None or bare or "None" in text or "Optional" in text else set()
    if isinstance(default, bool):
        return frozenset({"bool", *none})
    if isinstance(default, str):
        return frozenset({"string", *none})
    numeric = isinstance(default, Real) or text.split(" ")[0] in ("float", "int")
    return frozenset({"number", "term", *none}) if numeric else _ANY


def _kind(value: Any) -> Any:
    if isinstance(value, Tensor):
        return "tensor", value.ndim
    return ("term", value.id) if isinstance(value, Node) else (type(value), value)


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
        if not isinstance(t, Terms | PairTerms):
            raise TypeError(f"{origin()}: {self.name}: expected a loss's terms, as in loss(t), got {described(t)}")
        for name in self.tensors:
            raise TypeError(
                f"{origin()}: {self.name}: {name}: a tensor can't be a parameter of a loss inside another one; "
                f"make it a parameter of the outer loss and pass that on, as in {self.name}({name}={name})(t)"
            )
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
        place = self.definition.place
        if not isinstance(result, Node | Real):
            raise TypeError(f"{place}: expected the loss to return a term, got {described(result)}")
        node: Node = t.graph.node(result)
        if node.boolean:
            raise TypeError(
                f"{place}: expected the loss to return a number per token or sequence, got a condition; "
                "write where(condition, 1.0, 0.0)"
            )
        return node

    def reads(self, term: str) -> bool:
        """Whether the loss, or what it reports, reads this term where it is passed (of a pair: on either side)."""
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

    # Dynamo takes what these four return for constants, anew where an argument is another one: so `formula` is one.
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
        if call not in self._plans:
            from fastreward._program_op import register
            from fastreward.losses._objective import PairCall, pair_objective

            o = pair_objective(self, PairCall(*call))
            self._plans[call] = (register(o), o.inputs, o.metrics, o.program.groups)
        return self._plans[call]

    def terms(self) -> Terms | PairTerms:
        """Terms on a fresh graph, where everything a caller may pass is there."""
        return PairTerms(Graph(sides=2)) if self.definition.pairs else Terms(Graph())

    def evaluate(self, mask: Any = None, group_ids: Any = None, **arrays: Any) -> Tensor:
        """The loss on numbers, slow and in float64: [B, T] per token or [B] per sequence, 0 where nothing counts.

        arrays: the terms by name, [B, T], [B] or numbers: logprob=..., advantage=..., extras by their own names. For a
        preference loss chosen_logprob=..., rejected_logprob=..., and mask=(chosen, rejected). Tensors that require a
        gradient get one. Raises ValueError for a term that the loss reads and that is not there, and for an array that
        is no term and that it does not read.
        """
        from fastreward.losses._evaluate import evaluate

        return evaluate(self, mask, group_ids, arrays)

    def source(self, backend: Literal["triton", "cuda"], **options: Any) -> str:
        """The kernel that `backend` runs for this loss where every term that it can read is passed, as text."""
        from fastreward.losses._source import source

        return source(self, backend, **options)

    def __str__(self) -> str:
        from fastreward.losses._show import show

        return show(self)


# Dynamo runs these while it traces.
_RUN: tuple[Any, ...] = (Loss._reads, Loss._policy_plan, Loss._gradient_plan, Loss._pair_plan)
for _method in _RUN:
    _method._dynamo_marked_constant = True


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
    Default and annotation say which of these a parameter takes; others, and NaN, are refused.
    It returns the loss per token or per sequence, to be minimised; t.report(name=...) adds metrics.

    pairs: the loss is over chosen and rejected sequences, for `preference_loss`.
    aggregation: what `policy_loss(aggregation=None)` does with it.
    check: called with the parameters' values; raises ValueError for bad ones, "name: expected ...". Instead of a tensor
        it gets its smallest and its largest value, instead of what can't be looked at (a term, a tensor on a GPU) the
        parameter's default; a parameter without one then means that it is not called.
    """
    if function is None:
        return functools.partial(define, pairs=pairs, static=static, aggregation=aggregation, check=check)
    return Definition(function, pairs, static, aggregation, check)

"""`define`: from a function over terms to a loss that every backend runs."""

from __future__ import annotations

import copy
import functools
import inspect
import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from numbers import Real
from types import FunctionType
from typing import Any, Concatenate, Generic, Literal, ParamSpec, TypeVar, overload
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from fastreward._arguments import check
from fastreward.language.divergence_programs import register_programs
from fastreward.language.graph import Graph
from fastreward.language.messages import described, origin
from fastreward.language.node import Level, Node
from fastreward.language.objective import (
    Objective,
    PolicyCall,
    differentiable_extras,
    inputs_asked,
    policy_objective,
    reading,
    register,
    register_gradient,
    terms_read,
    token_gradient,
)
from fastreward.language.pair_objective import PairCall, pair_objective
from fastreward.language.parameters import kind, kinds, parameter, same
from fastreward.language.show import head, show
from fastreward.language.source import source
from fastreward.language.surroundings import first_digest, formula_digest, fresh_terms, in_a_trace, tracing
from fastreward.language.terms import PairTerms, Terms
from fastreward.language.travel import Options, by_name, carrier, named, names_outside, options_of, place

P = ParamSpec("P")
T = TypeVar("T", Terms, PairTerms)
Scalar = float | int
#: Key of a registered objective, (name, side) of the inputs it reads, names of its metrics, whether it reads groups,
#: names of the extras that get a gradient.
Plan = tuple[str, tuple[tuple[str, int], ...], tuple[str, ...], bool, tuple[str, ...]]
#: Key of a registered gradient, (name, side) of the inputs it reads.
GradientPlan = tuple[str, tuple[tuple[str, int], ...]]


class Definition(Generic[P]):
    """A loss function over terms; calling it with parameters gives a `Loss`. Made by `define`."""

    def __init__(self, function: FunctionType) -> None:
        """function: one with its options on it, as `define` makes them."""
        functools.update_wrapper(self, function)
        self.options = options_of(function)
        self.function, self.name, self.__qualname__ = function, function.__name__, self.options.qualname
        self.pairs, self.static = self.options.pairs, self.options.static
        self.aggregation, self.check = self.options.aggregation, self.options.check
        self.own = (function.__module__ or "").startswith("fastreward.")
        _HERE[function] = self
        whole = inspect.signature(function)
        #: Of the parameters, without the terms.
        self.__signature__ = whole.replace(parameters=list(whole.parameters.values())[1:])
        unknown = self.static - set(self.__signature__.parameters)
        if unknown:
            raise ValueError(f"static: {self.name} has no parameter {', '.join(sorted(unknown))}")
        self._kinds = {
            name: kinds(p.annotation, p.default, name in self.static)
            for name, p in self.__signature__.parameters.items()
        }

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> Loss:
        """The loss with these parameters: numbers, tensors [] or [B] (per sequence), or terms of an enclosing loss."""
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
        values = {name: parameter(self.name, name, value, self._kinds[name]) for name, value in bound.arguments.items()}
        self._validate(values)
        for name, value in values.items():
            if isinstance(value, float) and math.isnan(value):
                raise ValueError(f"{self.name}: {name}: expected a number, got nan")
        return Loss(self, values)

    def __repr__(self) -> str:
        known = self.__signature__.parameters.values()
        given = ", ".join(str(p.replace(annotation=p.empty, kind=p.POSITIONAL_OR_KEYWORD)) for p in known)
        return f"{'losses.' if self.published else ''}{self.name}({given}): call it to get a loss"

    @property
    def published(self) -> bool:
        """Whether it is one of `fastreward.losses`."""
        module = self.function.__module__ or ""
        return (
            module.startswith("fastreward.losses.") and module != "fastreward.losses.value"
        )  # those have a name alone

    @property
    def place(self) -> str:
        """Where its function is, for messages."""
        return f"{self.name}{place(self.function)}"

    def reading_outside(self) -> str:
        """A sentence on what its function reads beside its arguments, for messages."""
        return f"{self.place} reads {', '.join(names_outside(self.function)) or 'something'} from its surroundings"

    def _validate(self, values: Mapping[str, Any]) -> None:
        """Calls `check`. Of a tensor that may be looked at it gets the extremes, of what is not known yet the default.

        What it has against a default is ignored: other parameters may ask for another value.
        """
        if self.check is None:
            return
        seen = {k: v for k, v in values.items() if isinstance(v, Tensor) and v.numel() and check.values_checked(v)}
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

    def __copy__(self) -> Definition[P]:
        return self

    def __deepcopy__(self, _: Any) -> Definition[P]:
        return self

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickled as its function: by name, or by value where a pickler does so (cloudpickle, of __main__'s)."""
        return by_name(self, int(protocol)) or (_arrived, (self.function,))


#: The definitions of this process by their function.
_HERE: WeakValueDictionary[FunctionType, Definition[Any]] = WeakValueDictionary()


def published(pairs: bool) -> list[str]:
    """The names of the losses in `fastreward.losses`, over pairs or not."""
    return sorted(d.name for d in list(_HERE.values()) if d.published and d.pairs == pairs)


def _arrived(function: FunctionType) -> Definition[Any]:
    """The definition of a function that comes out of a pickle; its losses equal those of the one that was sent."""
    return _HERE.get(function) or Definition(function)


@dataclass(frozen=True, eq=False)
class Loss:
    """A loss with its parameters, to pass to `policy_loss` and its variants; `print` shows formula and derivative.

    Called with the terms of another loss it gives its value there: losses are composed that way.
    """

    definition: Definition[Any]
    parameters: Mapping[str, Any]
    #: The structure as text. Traced code reads it, so that Dynamo compiles anew for a loss of another formula.
    formula: str = field(init=False, repr=False)
    #: What decides the formula: definition, digest, static parameters. Equal ones share kernels.
    structure: tuple[Any, ...] = field(init=False, repr=False)
    #: What the formula was when this was made, with the values that its function reads from outside. "" of the
    #: package's own, which read nothing, and of one made inside another loss, as part of whose formula it counts.
    _digest: str = field(init=False, repr=False)
    #: Names of the parameters that are numbers at run time.
    _numeric: tuple[str, ...] = field(init=False, repr=False)
    #: SEQUENCE: the loss reads advantages, weights or extras where only what is per sequence may be (group_sum).
    _highest: Level = field(init=False, repr=False)
    _plans: dict[tuple[Any, ...], Plan] = field(init=False, default_factory=dict, repr=False)
    _gradient_plans: dict[tuple[Any, ...], GradientPlan | None] = field(init=False, default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_numeric", tuple(k for k in self.parameters if self._is_scalar(k)))
        alone = not (self.definition.own or in_a_trace())
        digest, highest = first_digest(self._formula, self.pairs) if alone else ("", Level.TOKEN)
        token, fixed = self.definition.options.token, self._fixed
        object.__setattr__(self, "_digest", digest)
        object.__setattr__(self, "_highest", highest)
        object.__setattr__(self, "structure", (token, digest, fixed))
        object.__setattr__(self, "formula", f"{token} {digest} {fixed}")

    def __reduce__(self) -> tuple[Any, ...]:
        self._check_surroundings()
        return _unpickled, (self.definition, dict(self.parameters), self._digest)

    def __copy__(self) -> Loss:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Loss:
        copied = object.__new__(type(self))
        copied.__dict__.update(self.__dict__, parameters=copy.deepcopy(dict(self.parameters), memo))
        return copied

    def __eq__(self, other: object) -> bool:
        """Whether formula and parameters are the same, those that are tensors value by value."""
        if not isinstance(other, Loss):
            return NotImplemented
        pairs = [(x, other.parameters.get(name)) for name, x in self.parameters.items()]
        return self.structure == other.structure and all(same(a, b) for a, b in pairs)

    def __hash__(self) -> int:
        return hash(self.structure)

    @property
    def name(self) -> str:
        """The name of the function that defines it."""
        return self.definition.name

    @property
    def pairs(self) -> bool:
        """Whether it is over chosen and rejected sequences, for `preference_loss`."""
        return self.definition.pairs

    @property
    def place(self) -> str:
        """Where its function is, for messages."""
        return self.definition.place

    @property
    def aggregation(self) -> str:
        """How the published method turns token losses into one number; what `aggregation=None` means."""
        return self.definition.aggregation

    @property
    def scalars(self) -> dict[str, float]:
        """Parameters that are numbers at run time: changing them compiles nothing."""
        return {k: float(self.parameters[k]) for k in self._numeric}

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Parameters given once per sequence."""
        return {k: v for k, v in self.parameters.items() if isinstance(v, Tensor)}

    @property
    def _fixed(self) -> tuple[tuple[str, Any], ...]:
        """The parameters, those without what may change from call to call."""
        return tuple((k, "number" if self._is_scalar(k) else kind(v)) for k, v in self.parameters.items())

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
        t.graph.reader = self.name
        return self._value(t, self._symbolic(t.graph))

    def _symbolic(self, graph: Graph) -> dict[str, Any]:
        """The parameters as nodes, where they are known at run time only."""
        values: dict[str, Any] = {}
        for name, value in self.parameters.items():
            if self._is_scalar(name):
                values[name] = graph.parameter(name)
            elif isinstance(value, Tensor):
                values[name] = graph.input(f"parameter.{name}", Level.SEQUENCE if value.ndim else Level.BATCH)
            else:
                values[name] = value
        return values

    def _value(self, t: Any, values: dict[str, Any]) -> Node:
        self._check_surroundings()
        return self._result(t, values)

    def _formula(self, t: Terms | PairTerms) -> Node:
        """The loss as an expression of `t` and of its own run-time parameters, whatever it was when it was made."""
        return self._result(t, self._symbolic(t.graph))

    def _stale(self) -> str | None:
        """Why the loss can't be traced any more: its function reads other values than when it was made; else None."""
        if not self._digest or self._digest == formula_digest(self._formula, self.pairs, self._highest):
            return None
        return (
            f"{self.definition.reading_outside()}, and that has changed since the loss was made; "
            "make the loss anew, or better make that a parameter of it"
        )

    def _check_surroundings(self) -> None:
        """Refuses to trace a stale loss."""
        if (stale := self._stale()) is not None:
            raise ValueError(stale)

    def _result(self, t: Any, values: dict[str, Any]) -> Node:
        with tracing():
            result = self.definition.function(t, **values)
        place = self.place
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
        """Whether the loss depends on this term where it is passed (of a preference loss: on either side)."""
        return self._reads(self.formula, term)

    def asks(self, term: str, side: int | None = None) -> bool:
        """Whether its function asks for this term, be it for a report alone; of a pair on a side, or on either."""
        return self._asks(self.formula, term, (0, 1) if side is None else (side,))

    def asks_once(self, term: str, side: int = 0) -> bool:
        """Whether its function wants this term once per sequence: t.extra(..., per="sequence"), or a loss over them."""
        return self._asks_once(self.formula, term, side)

    @property
    def differentiable(self) -> tuple[str, ...]:
        """Names of the extras that get a gradient."""
        return self._differentiable(self.formula)

    def reading(self) -> str:
        """Names of what the loss asks for, in one text for messages."""
        return self._reading(self.formula)

    def policy_plan(self, *call: Any) -> Plan:
        """Registers the objective of a `policy_loss` call (fields of PolicyCall)."""
        return self._policy_plan(self.formula, *call)

    def gradient_plan(self, *call: Any) -> GradientPlan | None:
        """Registers the gradient token by token: its key and inputs; None where other tokens' log-probs go into it."""
        return self._gradient_plan(self.formula, *call)

    def pair_plan(self, *call: Any) -> Plan:
        """Registers the objective of a `preference_loss` call (fields of PairCall)."""
        return self._pair_plan(self.formula, *call)

    def divergence_plan(self) -> str:
        """Registers the programs of a `token_divergence` call: their key."""
        return self._divergence_plan(self.formula)

    # Dynamo takes what these return for constants, anew where an argument is another one: so `formula` is one.
    def _reads(self, _: str, term: str) -> bool:
        return term in terms_read(self)

    def _asks(self, _: str, term: str, sides: tuple[int, ...]) -> bool:
        return any(name == term and side in sides for name, _, side in inputs_asked(self))

    def _asks_once(self, _: str, *wanted: Any) -> bool:
        return any((name, side) == wanted and level == Level.SEQUENCE for name, level, side in inputs_asked(self))

    def _differentiable(self, _: str) -> tuple[str, ...]:
        return tuple(sorted(differentiable_extras(self)))

    def _reading(self, _: str) -> str:
        return reading(self)

    def _policy_plan(self, _: str, *call: Any) -> Plan:
        if call not in self._plans:
            self._plans[call] = _registered(policy_objective(self, PolicyCall(*call)))
        return self._plans[call]

    def _gradient_plan(self, _: str, *call: Any) -> GradientPlan | None:
        if call not in self._gradient_plans:
            gradient = token_gradient(self, PolicyCall(*call))
            plan = None if gradient is None else (register_gradient(gradient), gradient.inputs)
            self._gradient_plans[call] = plan
        return self._gradient_plans[call]

    def _pair_plan(self, _: str, *call: Any) -> Plan:
        if call not in self._plans:
            self._plans[call] = _registered(pair_objective(self, PairCall(*call)))
        return self._plans[call]

    def _divergence_plan(self, _: str) -> str:
        return register_programs(self)

    def terms(self, optional: bool | Collection[str] = True) -> Terms | PairTerms:
        """Terms on a fresh graph, where everything that the loss reads is there; optional: of what t.has(...) is so."""
        return fresh_terms(self.pairs, optional, self._highest)

    def evaluate(self, mask: Any = None, group_ids: Any = None, **arrays: Any) -> Tensor:
        """The loss on numbers, slow and in float64: [B, T] per token or [B] per sequence, 0 where nothing counts.

        arrays: the terms by name, [B, T], [B] or numbers: logprob=..., advantage=..., extras by their own names. For a
        preference loss chosen_logprob=..., rejected_logprob=..., and mask=(chosen, rejected). Without a mask and any
        [B, T] each sequence has one token: of arrays [B] the result is [B], of numbers alone []. Tensors that require
        a gradient get one. Raises ValueError for a term that the loss reads and that is not there, for an array that
        is no term and that it does not read, and for wrong shapes.
        """
        from fastreward.language.evaluate import evaluate  # with the reference, which nothing else needs

        return evaluate(self, mask, group_ids, arrays)

    def source(self, backend: Literal["triton", "cuda"], **options: Any) -> str:
        """The kernel that `backend` runs for this loss where every term that it can read is passed, as text."""
        return source(self, backend, **options)

    def __repr__(self) -> str:
        return head(self)

    def __str__(self) -> str:
        stale = self._stale()
        return show(self) if stale is None else f"{head(self)}: not shown, since {stale}"


def _registered(o: Objective) -> Plan:
    return register(o), o.inputs, o.metrics, o.groups, tuple(name for name, _ in o.extras)


def _unpickled(definition: Definition[Any], parameters: dict[str, Any], digest: str) -> Loss:
    """A loss that has come out of a pickle; the same formula as where it was made, or an error."""
    loss = Loss(definition, parameters)
    if digest and loss._digest and digest != loss._digest:
        raise ValueError(
            f"{definition.reading_outside()}, and that differs between two processes; make that a parameter of it"
        )
    return loss


# Dynamo runs these while it traces.
_RUN: tuple[Any, ...] = (
    Loss._reads,
    Loss._asks,
    Loss._asks_once,
    Loss._differentiable,
    Loss._reading,
    Loss._policy_plan,
    Loss._gradient_plan,
    Loss._pair_plan,
    Loss._divergence_plan,
)
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
    numbers are run-time scalars (changing one compiles nothing), tensors [B] one value per sequence, 0-d ones a number;
    None, True, False, strings and the parameters named in `static` are fixed while the function is traced, so that `if`
    may ask for them.
    Default and annotation say which of these a parameter takes; others, and NaN, are refused.
    It returns the loss per token or per sequence, to be minimised; t.report(name=...) adds metrics.
    What else it reads (globals, closures, what its helpers read) is part of the formula, as it is when a loss is made,
    since it is traced then. After a change make the loss anew: ValueError where one made before would have to be traced
    with other values.

    Losses are copied and pickled as functions are: by name, and by value where cloudpickle does that (Ray: __main__,
    notebooks, local functions).

    pairs: the loss is over chosen and rejected sequences, for `preference_loss`.
    aggregation: what `policy_loss(aggregation=None)` does with it.
    check: called with the parameters' values; raises ValueError for bad ones, "name: expected ...". Instead of a tensor
        it gets its smallest and its largest value, instead of what can't be looked at (a term, a tensor on a GPU) the
        parameter's default; a parameter without one then means that it is not called.
    """
    if function is None:
        return functools.partial(define, pairs=pairs, static=static, aggregation=aggregation, check=check)
    options = Options(named(function), pairs, frozenset(static), aggregation, check)
    return Definition(carrier(function, options))

"""Checks of the losses' parameters: one rule per name, the same in every loss of its kind that has it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

Rule = tuple[Callable[[Any], bool], str]

_UNIT: Final[Rule] = (lambda x: 0 <= x <= 1, "a number in [0, 1]")
_NOT_NEGATIVE: Final[Rule] = (lambda x: x >= 0, "a number >= 0")
_POSITIVE: Final[Rule] = (lambda x: x > 0, "a positive number")
_OPTIONAL: Final[Rule] = (lambda x: x > 0, "None or a positive number")


def _one_of(*names: Any) -> Rule:
    return (lambda x: x in names), " or ".join(", ".join(map(repr, names)).rsplit(", ", 1))


#: Of policy losses. None is let through: whether a parameter may be None is up to the loss's own signature.
RULES: Final[dict[str, Rule]] = {
    "clip_low": _NOT_NEGATIVE,  # from 1 on there is no lower bound; verl's CISPO runs have 10
    "clip_high": _NOT_NEGATIVE,
    "dual_clip": (lambda x: x > 1, "None or a number > 1"),
    "delta": _OPTIONAL,
    "log_ratio_clamp": _OPTIONAL,
    "log_ratio_max": (lambda x: x >= 0, "None or a number >= 0"),
    "positive_weight": _NOT_NEGATIVE,
    "pre_clip": (lambda x: x > 1, "a number > 1"),
    "advantage_filter": _one_of("paper", "code", None),
    "alpha": _POSITIVE,
    "kl_coef": _NOT_NEGATIVE,
    "tau_pos": _POSITIVE,
    "tau_neg": _POSITIVE,
    "pos_low": _NOT_NEGATIVE,
    "pos_high": _NOT_NEGATIVE,
    "neg_low": _NOT_NEGATIVE,
    "neg_high": _NOT_NEGATIVE,
    "low": _NOT_NEGATIVE,
    "high": _NOT_NEGATIVE,
    "cap": _POSITIVE,
    "beta": _POSITIVE,
    "k_pos": _NOT_NEGATIVE,
    "k_neg": _NOT_NEGATIVE,
    "lambda_pos": _POSITIVE,
    "lambda_neg": _POSITIVE,
    "is_clip": _OPTIONAL,
    "temperature": _POSITIVE,
    "tau": _POSITIVE,
    "variant": _one_of("anchor", "bce"),
    "method": _one_of("sum", "mean"),
    "center": _one_of("leave-one-out", "std", "none"),
    "sft_coef": _NOT_NEGATIVE,
    "nll_coef": _NOT_NEGATIVE,
    "reference_point": _NOT_NEGATIVE,
    "desirable_weight": _NOT_NEGATIVE,
    "undesirable_weight": _NOT_NEGATIVE,
    "gamma": _POSITIVE,
    "weight_low": _NOT_NEGATIVE,
    "weight_high": _NOT_NEGATIVE,
    "safety": _OPTIONAL,
    "share": (lambda x: 0 < x <= 1, "a number in (0, 1]"),
    "epsilon": _POSITIVE,
    "threshold": _NOT_NEGATIVE,
    "target": _NOT_NEGATIVE,
    "low_start": _NOT_NEGATIVE,
    "low_end": _NOT_NEGATIVE,
    "high_start": _POSITIVE,
    "high_end": _POSITIVE,
    "high_step": _POSITIVE,
}
#: Of preference losses.
PAIR_RULES: Final[dict[str, Rule]] = {
    "beta": _POSITIVE,
    "alpha": (lambda x: x != 0, "a number other than 0"),
    "label_smoothing": (lambda x: 0 <= x < 1, "a number in [0, 1)"),
    "discopop_tau": _POSITIVE,
    "sft_weight": _NOT_NEGATIVE,
    "eta": _NOT_NEGATIVE,
    "weight": _NOT_NEGATIVE,
    "ld_alpha": _UNIT,
}
#: Of losses of a critic.
VALUE_RULES: Final[dict[str, Rule]] = {"clip": _OPTIONAL, "delta": _POSITIVE}


def check(**parameters: Any) -> None:
    """Raises ValueError for the first parameter that breaks its rule."""
    apply(RULES, parameters)


def check_pair(**parameters: Any) -> None:
    """`check` for preference losses."""
    apply(PAIR_RULES, parameters)


def check_value(**parameters: Any) -> None:
    """`check` for losses of a critic."""
    apply(VALUE_RULES, parameters)


def apply(rules: dict[str, Rule], parameters: dict[str, Any]) -> None:
    """Raises ValueError for parameters that break these rules."""
    for name, value in parameters.items():
        holds, expected = rules.get(name, _ANYTHING)
        if value is not None and not holds(value):
            raise ValueError(f"{name}: expected {expected}, got {value!r}")


_ANYTHING: Final[Rule] = (lambda _: True, "anything")

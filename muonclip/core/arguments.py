"""Checks of arguments by kind, for both adapters: each error names the argument, what was seen, and what is wanted.

A wrong kind, such as None, a string or a list where a number belongs, raises TypeError, a wrong value ValueError.
Arrays of one element count as their number, True and False as none.
"""

from __future__ import annotations

import math
import numbers
import operator
from collections.abc import Callable, Sequence
from typing import Any, cast

Rule = tuple[str, Callable[[float], bool]]
"""What a number has to be, in words and as a test."""

NOT_NEGATIVE: Rule = ("a finite number, zero or more", lambda x: 0 <= x < math.inf)
FINITE: Rule = ("a finite number", math.isfinite)
POSITIVE: Rule = ("positive", lambda x: x > 0)
BELOW_ONE: Rule = ("in [0, 1)", lambda x: 0 <= x < 1)
_LARGEST = 2**63 - 1  # which frameworks can count to

SHARE: Rule = ("in [0, 1]", lambda x: 0 <= x <= 1)


def check_number(name: str, value: Any, rule: Rule, hint: str = "") -> None:
    """Raise TypeError for what is not one real number, ValueError for one that breaks the rule."""
    number = plain_number(name, value)
    wanted, holds = rule
    if number is None:
        number_wanted = wanted if "number" in wanted else f"a number, {wanted}"
        raise TypeError(f"{name}={shown(value)} is a {kind(value)}; it must be {number_wanted}{_ending(hint)}")
    if isinstance(number, int) and abs(number) > _LARGEST:
        raise ValueError(f"{name}={shown(number)} is an integer beyond 64 bits; write it as a float{_ending(hint)}")
    if not holds(number):
        raise ValueError(f"{name}={shown(number)} must be {wanted}{_ending(hint)}")


def check_whole(name: str, value: Any, at_least: int = 1, at_most: int | None = None, hint: str = "") -> int:
    """Return a whole number as an int. Raises TypeError for another kind, ValueError out of range."""
    bounds = f"of at least {at_least}" if at_most is None else f"from {at_least} to {at_most}"
    try:
        whole = None if isinstance(value, bool) or "bool" in str(getattr(value, "dtype", "")) else operator.index(value)
    except TypeError:
        whole = None
    if whole is None:
        error = ValueError if isinstance(value, float) else TypeError
        raise error(f"{name}={shown(value)} must be a whole number {bounds}, not a {kind(value)}{_ending(hint)}")
    if whole < at_least or whole > (_LARGEST if at_most is None else at_most):
        raise ValueError(f"{name}={shown(value)} must be a whole number {bounds}{_ending(hint)}")
    return whole


def check_array(name: str, value: Any) -> None:
    """Raise TypeError unless it is an array of some framework."""
    if not is_array(value):
        raise TypeError(f"{name}={shown(value)} is a {kind(value)}; give an array.")


def check_floating(name: str, value: Any) -> None:
    """Raise TypeError unless it is an array of real floating numbers, of some framework."""
    check_array(name, value)
    if "float" not in str(value.dtype):
        raise TypeError(f"{name} is an array of {value.dtype}; give one of floating numbers.")


def is_array(value: Any) -> bool:
    """Tell whether a value has a shape and a dtype, as arrays have, traced ones too."""
    return hasattr(value, "shape") and hasattr(value, "dtype") and not isinstance(value, numbers.Number)


def check_flag(name: str, value: Any) -> None:
    """Raise TypeError unless it is True or False, of Python or NumPy, or the number 1 or 0."""
    if type(value).__name__ not in ("bool", "bool_") and not (type(value) is int and value in (0, 1)):
        raise TypeError(f"{name}={shown(value)} is a {kind(value)}; it must be True or False.")


def check_choice(name: str, value: Any, *choices: Any, hint: str = "") -> None:
    """Raise ValueError unless it is one of these names, flags or None."""
    if not (value is None or isinstance(value, str | bool)) or value not in choices:
        *others, last = map(repr, choices)
        before = ", or" if len(others) > 1 else " or"
        raise ValueError(f"{name}={shown(value)}; use {', '.join(others)}{before} {last}{_ending(hint)}")


def check_kind(name: str, value: Any, kinds: type | tuple[type, ...], wanted: str) -> None:
    """Raise TypeError unless it is an instance of one of the kinds, `wanted` in words."""
    # (str, bytes): torch 2.9 cannot compile a test against `str | bytes`.
    if not isinstance(value, kinds) or (isinstance(value, (str, bytes)) and kinds is Sequence):
        raise TypeError(f"{name}={shown(value)} is a {kind(value)}; give {wanted}.")


def plain_number(name: str, value: Any) -> float | None:
    """Return a real number, or that of an array of one element; None for anything else.

    Raises ValueError for arrays of another size.
    """
    shape = getattr(value, "shape", None)
    if shape is not None and hasattr(value, "item"):
        if math.prod(shape) != 1:
            raise ValueError(f"{kind(value)} {name} must be 1-element; it has the shape {tuple(shape)}.")
        value = value.item()
    real = not isinstance(value, bool) and isinstance(value, numbers.Real)
    return cast("float", value) if real else None


def kind(value: Any) -> str:
    return type(value).__name__


def shown(value: Any) -> str:
    """Write a value on one line, cut where it is long."""
    text = " ".join((str(value) if isinstance(value, numbers.Number) else repr(value)).split())
    return text if len(text) <= 80 else text[:77] + "…"


def _ending(hint: str) -> str:
    return f"; {hint}" if hint else "."

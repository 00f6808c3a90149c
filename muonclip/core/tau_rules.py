"""τ as it may be written: one number, a function of the step, or either for each attention, by patterns of its name.

    tau = 100.0
    tau = lambda step: 200.0 if step < 1000 else 100.0
    tau = {"vision.*": 50.0, "*": 100.0}        the first pattern that fits counts

`step` counts the steps that the clip has taken: it is 0 at the first.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Collection, Mapping
from typing import Any, TypeAlias, TypeGuard, cast

from muonclip.core.arguments import shown
from muonclip.core.qk_clip import check_tau

TauRule: TypeAlias = float | Callable[[Any], Any]
"""A number, or a function of the step."""

Tau: TypeAlias = TauRule | Mapping[str, TauRule]
"""One for all attentions, or one for each pattern of their names."""


def is_by_name(tau: object) -> TypeGuard[Mapping[str, TauRule]]:
    """Tell whether attentions have their own τ."""
    return isinstance(tau, Mapping)


def check_tau_rules(tau: Any, check: Callable[[Any], object] = check_tau) -> None:
    """Raise ValueError or TypeError for anything but a τ. `check`: of a number; functions are when called."""
    rules: dict[str, object] = {"tau": tau}
    if is_by_name(tau):
        rules = {f"tau[{pattern!r}]": rule for pattern, rule in tau.items()}
        wrong = [pattern for pattern in cast("Mapping[object, object]", tau) if not isinstance(pattern, str)]
        if wrong or not tau:
            what = f"has {shown(wrong[0])} for a pattern" if wrong else "is empty"
            raise ValueError(f"tau {what}; it is a dict with a number for each pattern of names, as {{'*': 100.0}}.")
    for name, rule in rules.items():
        if not callable(rule):
            try:
                check(rule)
            except (TypeError, ValueError) as error:
                raise type(error)(name + str(error).removeprefix("tau")) from None


def tau_rule(tau: Tau, name: str) -> TauRule:
    """Return the number or the function of an attention, by its name. Raises ValueError where no pattern fits it."""
    if not is_by_name(tau):
        return cast("TauRule", tau)
    for pattern, rule in tau.items():
        if fnmatch.fnmatchcase(name, pattern):
            return rule
    raise ValueError(
        f"tau says nothing of the attention {name!r}: its patterns are {', '.join(map(repr, tau))}. Add one for it, or "
        "'*' for all others, at the end."
    )


def check_patterns(tau: Tau, names: Collection[str]) -> None:
    """Raise ValueError for a pattern that fits none of the names."""
    if is_by_name(tau):
        for pattern in tau:
            if not any(fnmatch.fnmatchcase(name, pattern) for name in names):
                known = ", ".join(map(repr, list(names)[:5])) + (", …" if len(names) > 5 else "")
                raise ValueError(f"tau names {pattern!r}, which fits no attention or module here: {known}.")


def varies(tau: Tau) -> bool:
    """Tell whether τ depends on the step."""
    return any(map(callable, tau.values())) if is_by_name(tau) else callable(tau)


def tau_in_words(tau: Tau) -> object:
    """Return τ as a plan shows it."""
    if is_by_name(tau):
        return {pattern: tau_in_words(rule) for pattern, rule in tau.items()}
    return "a function of the step" if callable(tau) else tau

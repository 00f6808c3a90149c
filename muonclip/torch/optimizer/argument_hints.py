"""Hints at what to write instead of arguments that other optimizers have, where Python would only raise TypeError."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, TypeVar

from muonclip.core.arguments import shown

Init = TypeVar("Init", bound=Callable[..., None])

_OF_ADAMW = ("betas", "fused")
_NONE = {
    "foreach": "Leave it out: matrices of one shape are iterated together in any case",
    "amsgrad": "Leave it out: the AdamW half has none",
    "maximize": "It descends: negate the loss",
    "differentiable": "Leave it out",
}


def with_hints(init: Init) -> Init:
    """Let a constructor say, in a TypeError, what to write for an argument that it does not have."""
    known = inspect.signature(init).parameters

    @functools.wraps(init)
    def hinted(self: Any, /, *args: Any, **kwargs: Any) -> None:
        for name in kwargs.keys() - known.keys():
            instead = _instead(name, kwargs[name])
            if instead:
                raise TypeError(f"{name}= is not an argument of {type(self).__name__}. {instead}.")
        init(self, *args, **kwargs)

    return hinted  # pyright: ignore[reportReturnType]


def _instead(name: str, value: Any) -> str:
    """Return what to write for an argument, without a period; "" where nobody knows."""
    option = name.removeprefix("adamw_")
    option = {"wd": "weight_decay"}.get(option, option)
    if name in _OF_ADAMW or name != option:
        return f"Options of the AdamW half go into its dict: adamw=dict({option}={shown(value)})"
    return _NONE.get(name, "")

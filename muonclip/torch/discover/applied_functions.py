"""The calls of autograd functions in a trace, whoever kept their `apply` and under which name."""

from __future__ import annotations

import functools
import threading
import types
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from torch.autograd.function import Function

Seen = Callable[[Any, Any, Any, Callable[[], Any]], Any]
"""Makes a call of an autograd function, `seen(function, args, kwargs, run)`, and returns what it returned."""


class _Applied:
    """In the place of the code of torch's `apply` of autograd functions, while some thread traces.

    Many keep the `apply` of their class under a name of their own, so it is its code that is replaced.
    """

    def __init__(self) -> None:
        self._lock, self._users, self._of_thread = threading.Lock(), 0, threading.local()
        self._apply = vars(Function)["apply"].__func__
        self._code = self._apply.__code__
        self._host = types.FunctionType(self._code, self._apply.__globals__, "apply", None, self._apply.__closure__)

    @contextmanager
    def seen_by(self, seen: Seen) -> Iterator[None]:
        with self._lock:
            self._users += 1
            self._apply.__globals__["_qk_applied"] = self._applied
            self._apply.__code__ = _replacement().__code__
        self._of_thread.seen = seen
        try:
            yield
        finally:
            self._of_thread.seen = None
            with self._lock:
                self._users -= 1
                if not self._users:
                    self._apply.__code__ = self._code

    def _applied(self, function: Any, args: Any, kwargs: Any) -> Any:
        seen = getattr(self._of_thread, "seen", None)
        run = functools.partial(self._host, function, *args, **kwargs)
        return run() if seen is None else seen(function, args, kwargs, run)

    def host(self, function: Any) -> Callable[..., Any]:
        return functools.partial(self._host, function)


_applied = _Applied()


def seen_autograd_functions(seen: Seen) -> AbstractContextManager[None]:
    """Hand the calls of all autograd functions in this thread to `seen` meanwhile."""
    return _applied.seen_by(seen)


def host_apply(function: Any) -> Callable[..., Any]:
    """Return the `apply` of an autograd function that nobody sees."""
    return _applied.host(function)


def _replacement() -> Any:
    __class__ = None  # a free variable of torch's own function

    def apply(cls: Any, *args: Any, **kwargs: Any) -> Any:
        __class__  # noqa: B018  # pyright: ignore
        return _qk_applied(cls, args, kwargs)  # noqa: F821  # pyright: ignore[reportUndefinedVariable]

    return apply

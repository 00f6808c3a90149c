"""The calls of autograd functions in a trace, whoever kept their `apply` and under which name."""

from __future__ import annotations

import functools
import threading
import types
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from torch import Tensor
from torch.autograd.function import Function, FunctionCtx, FunctionMeta

Seen = Callable[[Any, Any, Any, Callable[[], Any]], Any]
"""Makes a call of an autograd function, `seen(function, args, kwargs, run)`, and returns what it returned."""


class _Applied:
    """In the place of what torch calls, while some thread traces. Many keep the `apply` of a class under a name of
    their own, so it is not enough to replace that."""

    def __init__(self) -> None:
        self._lock, self._users, self._of_thread = threading.Lock(), 0, threading.local()

    @contextmanager
    def seen_by(self, seen: Seen | None) -> Iterator[None]:
        with self._lock:
            self._users += 1
            self._replace()
        before = getattr(self._of_thread, "seen", None)
        self._of_thread.seen = seen
        try:
            yield
        finally:
            self._of_thread.seen = before
            with self._lock:
                self._users -= 1
                if not self._users:
                    self._put_back()

    def host(self, function: Any) -> Callable[..., Any]:
        """Return the `apply` of an autograd function that nobody sees."""

        def apply(*args: Any, **kwargs: Any) -> Any:
            with self.seen_by(None):
                return function.apply(*args, **kwargs)

        return apply

    def _call(self, function: Any, args: Any, kwargs: Any, run: Callable[[], Any]) -> Any:
        seen = getattr(self._of_thread, "seen", None)
        return run() if seen is None else seen(function, args, kwargs, run)

    def _replace(self) -> None:
        raise NotImplementedError

    def _put_back(self) -> None:
        raise NotImplementedError


class _ByCode(_Applied):
    """Gives `apply` other code: until torch 2.13 it is a function in Python."""

    def __init__(self) -> None:
        super().__init__()
        self._apply = vars(Function)["apply"].__func__
        self._code = self._apply.__code__
        self._host = types.FunctionType(self._code, self._apply.__globals__, "apply", None, self._apply.__closure__)

    def _replace(self) -> None:
        self._apply.__globals__["_qk_applied"] = self._applied
        self._apply.__code__ = _replacement().__code__

    def _put_back(self) -> None:
        self._apply.__code__ = self._code

    def _applied(self, function: Any, args: Any, kwargs: Any) -> Any:
        return self._call(function, args, kwargs, functools.partial(self._host, function, *args, **kwargs))


class _ByForward(_Applied):
    """Gives `apply`, which is compiled from torch 2.14 on, another `forward` where it looks one up in a class."""

    def _replace(self) -> None:
        FunctionMeta.__getattribute__ = self._look_up  # pyright: ignore[reportAttributeAccessIssue]

    def _put_back(self) -> None:
        del FunctionMeta.__getattribute__

    @property
    def _look_up(self) -> Callable[[Any, str], Any]:
        def look_up(function: Any, name: str) -> Any:
            found = type.__getattribute__(function, name)
            if name != "forward" or getattr(self._of_thread, "seen", None) is None:
                return found
            contexts = int(function.setup_context is Function.setup_context)  # arguments before those of `apply`

            @functools.wraps(found)
            def forward(*args: Any, **kwargs: Any) -> Any:
                return self._call(function, args[contexts:], kwargs, functools.partial(found, *args, **kwargs))

            return forward

        return look_up


_applied = _ByCode() if isinstance(vars(Function)["apply"], classmethod) else _ByForward()


def seen_autograd_functions(seen: Seen) -> AbstractContextManager[None]:
    """Hand the calls of all autograd functions in this thread to `seen` meanwhile."""
    return _applied.seen_by(seen)


def host_apply(function: Any) -> Callable[..., Any]:
    """Return the `apply` of an autograd function that nobody sees."""
    return _applied.host(function)


def run_inside(function: Any, args: Any, kwargs: Any, run: Callable[[], Any]) -> Any:
    """Run the forward of an autograd function as plain code, so that autograd follows what is in it and not its own
    backward. One that cannot be run so is applied, by `run`."""
    forward = type.__getattribute__(function, "forward")  # what `_ByForward` looks up is seen
    context: list[Any] = []
    if function.setup_context is Function.setup_context:
        context.append(FunctionCtx())
        context[0].needs_input_grad = tuple(isinstance(each, Tensor) and each.requires_grad for each in args)
    try:
        return forward(*context, *args, **kwargs)
    except Exception:  # whatever such a forward asks of its context
        return run()


def _replacement() -> Any:
    __class__ = None  # a free variable of torch's own function

    def apply(cls: Any, *args: Any, **kwargs: Any) -> Any:
        __class__  # noqa: B018  # pyright: ignore
        return _qk_applied(cls, args, kwargs)  # noqa: F821  # pyright: ignore[reportUndefinedVariable]

    return apply

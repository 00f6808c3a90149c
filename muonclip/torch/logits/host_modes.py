"""The modes that whoever trains a model has on: what is measured and tried is outside of them, or not done at all.

A mode sees every operation of its thread: it counts FLOPs, caches for a recomputation, logs. It sees the model's own
operations and none of ours: what measures runs while the modes are taken off the thread's stacks. Where a mode or a
transform makes tensors that have no values of their own (export, fake tensors, torch.func), nothing can be measured:
the forward runs as without a clip, and why is remembered.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch._C import _TorchDispatchModeKey  # pyright: ignore[reportPrivateUsage]
from torch._C._autograd import _top_saved_tensors_default_hooks  # pyright: ignore[reportPrivateUsage]
from torch._C._functorch import peek_interpreter_stack
from torch.fx._symbolic_trace import is_fx_symbolic_tracing
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import _disable_current_modes  # pyright: ignore[reportPrivateUsage]

from muonclip.torch.mesh import is_device_context

P = ParamSpec("P")
R = TypeVar("R")


class Unobservable(NamedTuple):
    """The reason why a forward is not observed.

    `where`: in words that follow "ran"; "" if nothing is to be said of it. `trains`: parameters of the model itself may
    get gradients from this forward, by autograd.
    """

    where: str
    trains: bool = False


SHAPES_ALONE = Unobservable("")
FAKE = Unobservable("on fake tensors, which have no values")
_EXPORT = Unobservable("while it was exported or traced into a graph")
_TRANSFORM = Unobservable("inside a transform of torch.func, as grad or vmap", trains=True)
_TRANSFORM_OF_OTHERS = Unobservable(_TRANSFORM.where)
_INFRASTRUCTURE = {
    _TorchDispatchModeKey.FAKE: FAKE,
    _TorchDispatchModeKey.FUNCTIONAL: _EXPORT,
    _TorchDispatchModeKey.PROXY: _EXPORT,
}


class _OfThread(threading.local):
    unobservable: Unobservable | None = None


_of_thread = _OfThread()


def is_exporting() -> bool:
    """Tell whether torch.export follows this code; torch 2.11's compiler answers its own function with True always."""
    return torch.compiler._is_exporting_flag  # pyright: ignore[reportPrivateUsage]


def unobservable() -> Unobservable | None:
    """Return why what this thread runs now is not observed; None where it is."""
    if torch.compiler.is_compiling():
        return _EXPORT if is_exporting() else _of_thread.unobservable
    if peek_interpreter_stack() is not None:
        return _TRANSFORM if _of_thread.unobservable is None else _TRANSFORM_OF_OTHERS
    if torch._C._is_tracing() or is_fx_symbolic_tracing():
        return _EXPORT
    if torch._C._len_torch_dispatch_stack():
        for key, reason in _INFRASTRUCTURE.items():
            if torch._C._get_dispatch_mode(key) is not None:
                return reason
    return _of_thread.unobservable


@contextmanager
def unobserved(reason: Unobservable = SHAPES_ALONE) -> Iterator[None]:
    """Keep every statistic from observing what this thread runs within."""
    before, _of_thread.unobservable = _of_thread.unobservable, reason
    try:
        yield
    finally:
        _of_thread.unobservable = before


def unseen(function: Callable[P, R]) -> Callable[P, R]:
    """Return a function that measures, run outside of the modes of the host."""

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        if torch.compiler.is_compiling() or not is_seen():
            return function(*args, **kwargs)
        with outside_modes(keeps_default_device=False):
            return function(*args, **kwargs)

    return run


@contextmanager
def outside_modes(*, keeps_default_device: bool = True) -> Iterator[None]:
    """Take the modes of the host off this thread meanwhile. A model needs the default device, which is one of them."""
    functions = [torch._C._pop_torch_function_stack() for _ in range(torch._C._len_torch_function_stack())]
    kept = [mode for mode in functions if keeps_default_device and is_device_context(mode)]
    with ExitStack() as stack:
        stack.callback(_replace_function_modes, functions[::-1])
        if torch._C._len_torch_dispatch_stack():
            stack.enter_context(_disable_current_modes())
        if _hooks_of_saved_tensors() is not None:
            stack.enter_context(torch.autograd.graph.saved_tensors_hooks(_as_it_is, _as_it_is))
        _replace_function_modes(kept)
        yield


def is_seen(*, by_functions: bool = False) -> bool:
    """Tell whether something sees what this thread calls: a mode, or hooks on the tensors that autograd saves.

    `by_functions`: a mode of the host that sees functions of torch, and not only the operators below them.
    """
    if by_functions:
        return any(not (isinstance(mode, InnermostMode) or is_device_context(mode)) for mode in _function_modes())
    return bool(
        torch._C._len_torch_dispatch_stack()
        or torch._C._len_torch_function_stack()
        or _hooks_of_saved_tensors() is not None
    )


class InnermostMode(TorchFunctionMode):
    """A mode that sees functions behind all modes of the host, which see what they would see without it."""

    def __enter__(self) -> InnermostMode:
        if not torch._C._len_torch_function_stack():
            torch._C._push_on_torch_function_stack(self)
            return self
        modes = _function_modes()
        outer = sum(map(is_device_context, modes[:1]))  # which wants to be the first of all
        _replace_function_modes([*modes[:outer], self, *modes[outer:]])
        return self

    def __exit__(self, *_: object) -> None:
        modes = _function_modes()
        own = [index for index, mode in enumerate(modes) if mode is self]
        if own:
            del modes[own[-1]]
            _replace_function_modes(modes)

    @contextmanager
    def left(self) -> Iterator[None]:
        """Leave the mode meanwhile."""
        self.__exit__()
        try:
            yield
        finally:
            self.__enter__()


def saved_tensors_as_they_are() -> Any:
    """Make a context in which no hook of the host or of a checkpoint packs a tensor that is saved."""
    is_hooked = _hooks_of_saved_tensors() is not None  # else hooks may be forbidden
    return torch.autograd.graph.saved_tensors_hooks(_as_it_is, _as_it_is) if is_hooked else ExitStack()


def _hooks_of_saved_tensors() -> object:
    return _top_saved_tensors_default_hooks(False)


def _function_modes() -> list[Any]:
    return [torch._C._get_function_stack_at(index) for index in range(torch._C._len_torch_function_stack())]


def _replace_function_modes(modes: list[Any]) -> None:
    """Put modes, the innermost first, in the place of those that are on the stack."""
    for _ in range(torch._C._len_torch_function_stack()):
        torch._C._pop_torch_function_stack()
    for mode in modes:
        torch._C._push_on_torch_function_stack(mode)


def _as_it_is(tensor: Tensor) -> Tensor:
    return tensor

"""The handlers of attention calls, a stack for each thread.

Attention of another thread is another model's, or nobody's. The threads in which autograd recomputes a module run its
hooks, which put its handler on the stack of that thread.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch

from muonclip.torch.logits import Unobservable, unobservable, unseen
from muonclip.torch.observe.attention_call import AttentionCall


class AttentionCallHandler(Protocol):
    """Handles calls of attention. `observes`: where False, nobody does in its place. `owner`: on whose behalf.
    `graph_task`: the backward in which it began, see `graph_task`."""

    observes: bool
    owner: object
    graph_task: int

    def attention(self, call: AttentionCall) -> Any:
        """Make the call and return what it returned."""
        ...

    def leave_out(self, reason: Unobservable) -> None:
        """Remember that a call was made without it, and why."""
        ...


_OF_OPERATORS = ("default", "op", "op_overloads", "overloads", "_qualified_op_name", "_schemas")
# By these, compilers and policies of checkpointing know an operator of torch.


class _OfThread(threading.local):
    def __init__(self) -> None:
        self.handlers: list[AttentionCallHandler | None] = []


of_thread = _OfThread()


def graph_task() -> int:
    """Return the number of the backward that this thread runs; −1 outside of any."""
    return -1 if torch.compiler.is_compiling() else torch._C._current_graph_task_id()


def current_handler() -> AttentionCallHandler | None:
    """Return who handles the calls of this thread now.

    A backward within a forward may run attention again, which is not the module's own call; a recomputation enters its
    modules anew.
    """
    handler = of_thread.handlers[-1] if of_thread.handlers else None
    return handler if handler is not None and handler.observes and handler.graph_task == graph_task() else None


@contextmanager
def handling(handler: AttentionCallHandler | None) -> Iterator[None]:
    """Hand the calls made within to `handler`; to nobody with None."""
    of_thread.handlers.append(handler)
    try:
        yield
    finally:
        of_thread.handlers.pop()


def drop_handlers(owner: object) -> list[AttentionCallHandler]:
    """Take the handlers of an owner off the stack of this thread, on which an interrupted forward may have left them.

    Returns them, the last one first.
    """
    if not of_thread.handlers:
        return []
    dropped = [each for each in of_thread.handlers if each is not None and each.owner is owner]
    of_thread.handlers[:] = [each for each in of_thread.handlers if each is None or each.owner is not owner]
    return dropped[::-1]


def handled(read: Callable[..., AttentionCall]) -> Callable[[Any], Any]:
    """Return a patch for the function of a kernel: its calls, read by `read(host, *args, **kwargs)`, go to whoever
    handles the calls of the thread; to the host where nobody does."""
    read = unseen(read)

    def patch(host: Any) -> Any:
        def patched(*args: Any, **kwargs: Any) -> Any:
            handler = current_handler()
            if handler is None:
                return host(*args, **kwargs)
            reason = unobservable()
            if reason is not None:
                handler.leave_out(reason)
                return host(*args, **kwargs)
            return handler.attention(read(host, *args, **kwargs))

        patched.__name__ = host.__name__  # by which torch's context parallelism finds what it puts its own in place of
        vars(patched).update({name: getattr(host, name) for name in _OF_OPERATORS if hasattr(host, name)})
        return patched

    return patch

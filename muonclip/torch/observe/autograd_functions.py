"""Autograd functions at which kernels end, as the places to read their calls.

Users import a kernel's function by name, in modules of their own and before a model is observed. It looks its autograd
function up when it is called, and calls `apply` with all of its arguments by position.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from muonclip.torch.observe.attention_call import AttentionCall, AttentionKernel
from muonclip.torch.observe.handlers import handled

Read = Callable[..., AttentionCall]
"""Reads a call: `read(kernel, names, host, *args)`, with the names of the parameters of `forward`, less its context."""


def at_functions(kernel: AttentionKernel, read: Read, module: str, *functions: str) -> list[AttentionKernel]:
    """Return the kernel at `apply` of each function, for whoever holds the function, and at the function itself."""
    patches = (".apply", _patch_apply), ("", _patch_function)
    return [
        replace(kernel, home=f"{module}:{function}{path}", patch=functools.partial(patch, kernel, read))
        for path, patch in patches
        for function in functions
    ]


def _patched(kernel: AttentionKernel, read: Read, function: Any) -> Any:
    """Return what takes the place of `apply` of an autograd function."""
    names = tuple(inspect.signature(function.forward).parameters)[1:]
    # The host has an `apply` of its own, since that of the function is replaced.
    host = type(function)(function.__name__, (function,), {"apply": vars(torch.autograd.Function)["apply"]})
    return handled(functools.partial(read, kernel, names))(host.apply)


def _patch_apply(kernel: AttentionKernel, read: Read, apply: Any) -> Any:
    return _patched(kernel, read, apply.__self__)


def _patch_function(kernel: AttentionKernel, read: Read, function: Any) -> Any:
    """Return a class in the place of an autograd function, of which torch.compile calls `apply` whoever replaces it."""
    return type(function.__name__, (), {"apply": staticmethod(_patched(kernel, read, function))})

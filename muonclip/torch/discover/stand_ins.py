"""Stand-ins for the sharded matrices of a model: in its copy each is whole only while the part that holds it runs.

Which rows feed which heads does not depend on values. So nothing is gathered: random numbers, the same on every rank,
replace a sharded tensor. Those of a matrix are one short list b, as long as a row and a column together,

    W[i, j] = b[i + j]        (j counts all but the first axis)

which as a view takes no memory. While its part of the copy runs, the same numbers are written out: code that needs them
next to each other finds them so, and no more than one part of a model is whole at a time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from muonclip.torch.discover.dense_copy import DenseCopies
from muonclip.torch.mesh import is_fsdp_module

_LISTS = (nn.ModuleList, nn.ModuleDict, nn.Sequential, nn.ParameterList, nn.ParameterDict)


class StandIn:
    """The matrix of a copy in place of a sharded one: a view of few numbers, and written out while it is `held`."""

    def __init__(self, thin: Tensor) -> None:
        self.parameter = nn.Parameter(thin)
        self.is_whole_in_its_part = True
        self._thin, self._held = thin, 0
        self._changes: list[Callable[[], object]] = []

    def hold(self) -> None:
        """Write it out, until `release` is called as often as this."""
        self._held += 1
        if self._held == 1:
            self.parameter.data = self._thin.contiguous()
            for change in self._changes:
                change()

    def release(self) -> None:
        """Leave the view in its place."""
        self._held -= 1
        if not self._held:
            self.parameter.data = self._thin

    def change(self, change: Callable[[], object]) -> None:
        """Change its values, wherever they are used: in its part, or else in the whole run."""
        if not self._changes and not self.is_whole_in_its_part:
            self.hold()
        self._changes.append(change)
        if self._held:
            change()

    def end(self) -> None:
        """Forget the changes, which know the copy, and leave the view in its place for good."""
        self._changes.clear()
        self.parameter.data = self._thin


def stand_in_of(copies: DenseCopies, parameter: Tensor, shape: tuple[int, ...]) -> StandIn:
    """Make the stand-in of a matrix, of this shape."""
    first, *others = shape
    numbers = copies.random((first + math.prod(others) - 1,), parameter) / math.sqrt(max(1, math.prod(others)))
    strides = [math.prod(others[axis + 1 :]) for axis in range(len(others))]
    return StandIn(numbers.as_strided(shape, (1, *strides)))


def hold_in_their_parts(model: nn.Module, copied: nn.Module, stand_ins: dict[int, StandIn]) -> None:
    """Let the parts of a model's copy hold their stand-ins, by the ids of the model's parameters, while they run.

    Where the model is sharded by `fully_shard`, its parts are those that were: nothing uses their weights outside of
    them. Else a part is the module around that which has the weight.
    """
    modules = dict(model.named_modules())
    parts: dict[str, dict[int, StandIn]] = {}
    for name, module in modules.items():
        for parameter in module.parameters(recurse=False):
            stand_in = stand_ins.get(id(parameter))
            if stand_in is not None:
                part, is_enough = _part_of(name, modules)
                stand_in.is_whole_in_its_part &= is_enough
                parts.setdefault(part, {})[id(stand_in)] = stand_in
    for name, held in parts.items():
        part = _Part(list(held.values()))
        for each in _within(name, modules):
            inner = copied.get_submodule(each)
            if not isinstance(inner, torch.jit.ScriptModule):  # which takes no hooks
                inner.register_forward_pre_hook(part.enter, prepend=True)
                inner.register_forward_hook(part.leave)


def _part_of(name: str, modules: dict[str, nn.Module]) -> tuple[str, bool]:
    """Return the name of the part that a module belongs to, and whether the part is one of `fully_shard`."""
    path = name.split(".")
    around = [".".join(path[:length]) for length in range(len(path), 0, -1)]
    sharded = next((each for each in around if is_fsdp_module(modules[each])), None)
    if sharded is not None:
        return sharded, True
    return next((each for each in around[1:] if not isinstance(modules[each], _LISTS)), name), False


def _within(name: str, modules: dict[str, nn.Module]) -> Iterator[str]:
    """Yield the names of the modules of a part: any of them may be called from outside, by another method of it."""
    others = [each for each, module in modules.items() if is_fsdp_module(module) and each.startswith(f"{name}.")]
    for each in modules:
        if each == name or (each.startswith(f"{name}.") and not any(f"{each}.".startswith(f"{o}.") for o in others)):
            yield each


class _Part:
    """Holds stand-ins while any of some modules runs."""

    def __init__(self, stand_ins: list[StandIn]) -> None:
        self._stand_ins, self._running = stand_ins, 0

    def enter(self, module: nn.Module, args: Any) -> None:
        self._running += 1
        if self._running == 1:
            with torch._C.DisableTorchFunction(), torch.no_grad():
                for each in self._stand_ins:
                    each.hold()

    def leave(self, module: nn.Module, args: Any, output: Any) -> None:
        self._running -= 1
        if not self._running:
            for each in self._stand_ins:
                each.release()

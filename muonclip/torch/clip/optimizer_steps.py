"""The optimizers whose steps were seen, or to which a clip was attached: torch tells of every step in the process.

Of those that clip it is noted which parameter had which place in their groups. Where an engine for half precision puts
a float32 master there, as DeepSpeed does, that is the weight which is updated and written over the parameter.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook


class StepListener(Protocol):
    """Acts before and after each step of any optimizer. What wraps an optimizer need not tell of its own."""

    def before_step(self) -> None: ...

    def after_step(self) -> None: ...


class _Place(NamedTuple):
    """A place in the groups of an optimizer; `length`: of its group."""

    group: int
    position: int
    length: int

    def of(self, optimizer: Any) -> Any:
        """Return what is there now; None where the group is another."""
        groups = optimizer.param_groups
        parameters = groups[self.group]["params"] if self.group < len(groups) else ()
        return parameters[self.position] if len(parameters) == self.length else None


class OptimizerSteps:
    """Keeps the optimizers as long as they exist. Torch tells of steps from the first clip on."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._optimizers: weakref.WeakSet[Any] = weakref.WeakSet()
        self._listeners: weakref.WeakSet[StepListener] = weakref.WeakSet()
        self._places: weakref.WeakKeyDictionary[Any, dict[int, _Place]] = weakref.WeakKeyDictionary()
        self._is_told = False

    def listen(self, listener: StepListener) -> None:
        """Tell a listener of steps as long as it exists."""
        with self._lock:
            self._listeners.add(listener)
            if not self._is_told:
                register_optimizer_step_pre_hook(self._before)
                register_optimizer_step_post_hook(self._after)
                self._is_told = True

    def add(self, optimizer: Any) -> None:
        """Note an optimizer that need not tell of its steps, and which parameters have which places in its groups."""
        with self._lock:
            self._optimizers.add(optimizer)
            for each in with_inner(optimizer):
                # By ids: torch does not swap the contents of tensors that something refers to weakly.
                self._places[each] = self._places.get(each, {}) | {
                    id(parameter): _Place(index, position, len(group["params"]))
                    for index, group in enumerate(getattr(each, "param_groups", ()))
                    for position, parameter in enumerate(group["params"])
                }

    def in_place_of(self, parameter: Tensor) -> list[Tensor]:
        """Return the masters that are now where a parameter was in the groups of optimizers: tensors of its shape that
        are no parameters of any model."""
        with self._lock:
            places = [(each, places[id(parameter)]) for each, places in self._places.items() if id(parameter) in places]
        there = {id(held): held for optimizer, place in places if isinstance(held := place.of(optimizer), Tensor)}
        return [each for each in there.values() if not isinstance(each, nn.Parameter) and each.shape == parameter.shape]

    def optimizers(self) -> list[Any]:
        """Return the known optimizers and those that they wrap, each once."""
        with self._lock:
            known = list(self._optimizers)
        return list({id(each): each for outer in known for each in with_inner(outer)}.values())

    def _before(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if torch.compiler.is_compiling():
            return
        with self._lock:
            listeners = list(self._listeners)
            if listeners:
                self._optimizers.add(optimizer)
        for listener in listeners:
            listener.before_step()

    def _after(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if torch.compiler.is_compiling():
            return
        with self._lock:
            listeners = list(self._listeners)
        for listener in listeners:
            listener.after_step()


OPTIMIZER_STEPS = OptimizerSteps()


def with_inner(optimizer: Any) -> Iterator[Any]:
    """Yield an optimizer and those that it wraps."""
    waiting, seen = [optimizer], set[int]()
    while waiting:
        each = waiting.pop(0)
        if id(each) not in seen:
            seen.add(id(each))
            yield each
            waiting += [inner for inner in getattr(each, "__dict__", {}).values() if isinstance(inner, Optimizer)]

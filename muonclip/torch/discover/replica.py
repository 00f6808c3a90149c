"""Copies of a model in which experiments run, and what they change of the process meanwhile.

A copy shares the memory of its matrices with the model and has everything else of its own, so that nothing is left
behind: no buffer, counter or random number of the model moves. Of a sharded model the copy is whole, with other values
(`dense_copy.py`); no rank waits for another.
"""

from __future__ import annotations

import copy
import random
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo.eval_frame import OptimizedModule
from torch._library.custom_ops import CustomOpDef
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_leaves

from muonclip.torch.discover.dense_copy import DenseCopies, check_size, without_engine
from muonclip.torch.logits import MaxLogits
from muonclip.torch.mesh import plain_class
from muonclip.torch.observe import PATCHES


@dataclass(slots=True, eq=False)
class Replica:
    """A copy of a model with arguments to call it with.

    `paths`: the names of module and attribute in the model of each parameter of the copy, by its id. `statistics`: the
    copies of the model's, by the ids of the originals.
    """

    module: nn.Module
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    paths: dict[int, tuple[str, str]]
    statistics: dict[int, MaxLogits]

    def run(self) -> Any:
        """Call it."""
        return self.module(*self.args, **self.kwargs)


@contextmanager
def replica_of(
    model: nn.Module,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    values: Callable[[Tensor], Tensor],
    *,
    prefix: str = "",
    training: bool = False,
) -> Iterator[Replica]:
    """Make a copy, which the process is prepared to run meanwhile. `values`: those of the copy of a parameter, by the
    parameter's. `prefix`: of the names. `training`: the mode of the copy."""
    with PATCHES.used(model), _process_state.kept(), _marked_as_experiment(), torch.inference_mode(False):
        check_size(model.parameters())
        copies = DenseCopies()
        parameters = {id(each): _parameter_of_replica(each, copies, values) for each in model.parameters()}
        memo: dict[int, Any] = dict(parameters)
        for tensor in tree_leaves((list(model.buffers()), tuple(args), dict(kwargs))):
            if isinstance(tensor, DTensor):
                memo[id(tensor)] = copies.dense(tensor)
        replica = _replica(model, memo)
        own_args, own_kwargs = _copied(tuple(args), memo), _copied(dict(kwargs), memo)
        replica.train(training)
        paths: dict[int, tuple[str, str]] = {}
        for name, module in model.named_modules():
            for attribute, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
                paths.setdefault(id(parameters[id(parameter)]), (f"{prefix}{name}".removesuffix("."), attribute))
        statistics = {key: copied for key, copied in memo.items() if isinstance(copied, MaxLogits)}
        yield Replica(replica, own_args, own_kwargs, paths, statistics)


class _OfThread(threading.local):
    experimenting = False


_of_thread = _OfThread()


def is_experiment() -> bool:
    """Tell whether this thread runs a copy of a model, and not a forward of the training."""
    return _of_thread.experimenting


@contextmanager
def _marked_as_experiment() -> Iterator[None]:
    before, _of_thread.experimenting = _of_thread.experimenting, True
    try:
        yield
    finally:
        _of_thread.experimenting = before


def has_a_foreign_forward(module: nn.Module) -> bool:
    """Tell whether `forward` is not the module's own method: a copy would run the original."""
    forward = vars(module).get("forward")
    return forward is not None and getattr(forward, "__self__", None) is not module


def _parameter_of_replica(parameter: nn.Parameter, copies: DenseCopies, values: Callable[[Tensor], Tensor]) -> Any:
    """Make a parameter for the copy, of the memory that `values` leaves it. It knows if the model's is trained."""
    if not parameter.is_floating_point():
        return copies.dense(parameter) if isinstance(parameter, DTensor) else parameter
    data = copies.dense(parameter) if isinstance(parameter, DTensor) else parameter.detach()
    copied = nn.Parameter(data if data.is_meta else values(data), requires_grad=True)
    copied.is_trained = parameter.requires_grad  # pyright: ignore[reportAttributeAccessIssue]
    return copied


def _replica(module: nn.Module, memo: dict[int, Any]) -> nn.Module:
    """Copy a module deeply; what cannot be copied (a lock, a process group) is shared."""
    if id(module) in memo:
        return memo[id(module)]
    if isinstance(module, OptimizedModule):
        replica = memo[id(module)] = _Uncompiled(_replica(module._orig_mod, memo))
        return replica
    kind = plain_class(module)
    replica = memo[id(module)] = kind.__new__(kind)
    try:
        state = module.__getstate__()  # without what a module does not want copied, such as its compiled form
    except RuntimeError:  # parametrized modules refuse
        state = None
    state = without_engine(state if isinstance(state, dict) else vars(module))
    if has_a_foreign_forward(module):
        state.pop("forward", None)
    inner = {name: None if each is None else _replica(each, memo) for name, each in module._modules.items()}
    replica.__setstate__({name: inner if name == "_modules" else _copied(value, memo) for name, value in state.items()})
    return replica


class _Uncompiled(nn.Module):
    """In the place of what torch.compile wraps around a module."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self._orig_mod = module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._orig_mod(*args, **kwargs)


def _copied(value: Any, memo: dict[int, Any]) -> Any:
    memo.update((id(each), each) for each in tree_leaves(value) if isinstance(each, CustomOpDef))  # its copy is broken
    try:
        return copy.deepcopy(value, memo)
    except Exception:  # whatever an object's own copying raises
        if isinstance(value, Tensor):  # with a graph behind it
            return value.detach().clone()
        if type(value) in (list, tuple):
            return type(value)(_copied(item, memo) for item in value)
        return {key: _copied(item, memo) for key, item in value.items()} if type(value) is dict else value


class _ProcessState:
    """The changes that traced forwards make to the process, from the first one that runs to the last.

    Random numbers are put back, and nothing is compiled. Each of several threads would put back what another has
    changed.
    """

    def __init__(self) -> None:
        self._lock, self._users, self._changes = threading.Lock(), 0, ExitStack()

    @contextmanager
    def kept(self) -> Iterator[None]:
        with self._lock:
            self._users += 1
            if self._users == 1:
                self._changes.enter_context(_random_state_kept())
                self._changes.enter_context(torch.compiler.set_stance("force_eager"))
        try:
            yield
        finally:
            with self._lock:
                self._users -= 1
                if not self._users:
                    self._changes.close()


_process_state = _ProcessState()


@contextmanager
def _random_state_kept() -> Iterator[None]:
    devices = range(torch.cuda.device_count()) if torch.cuda.is_available() and torch.cuda.is_initialized() else []
    state, numpy = random.getstate(), sys.modules.get("numpy")
    numpy_state = None if numpy is None else numpy.random.get_state()
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        random.setstate(state)
        if numpy is not None:
            numpy.random.set_state(numpy_state)

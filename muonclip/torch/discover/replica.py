"""Copies of a model in which experiments run, and what they change of the process meanwhile.

A copy shares the memory of its matrices with the model and has everything else of its own, so that nothing is left
behind: no buffer, counter or random number of the model moves. Of a sharded model the copy is whole, with other values
(`dense_copy.py`), part by part (`stand_ins.py`); no rank waits for another.
"""

from __future__ import annotations

import copy
import functools
import gc
import sys
import threading
import types
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch._library.custom_ops import CustomOpDef
from torch.utils import checkpoint
from torch.utils._pytree import tree_leaves

from muonclip.torch.discover.compute_dtypes import cast_as_sharded, compute_dtypes
from muonclip.torch.discover.dense_copy import DenseCopies, is_whole, without_engine
from muonclip.torch.discover.own_experts import own_shapes
from muonclip.torch.discover.quantized_linears import unrounded_class
from muonclip.torch.discover.random_state import GeneratorsKept, random_state_kept
from muonclip.torch.discover.stand_ins import StandIn, hold_in_their_parts, stand_in_of
from muonclip.torch.logits import MaxLogits, outside_modes
from muonclip.torch.mesh import is_compiled_module, is_dtensor, plain_class, unwrapped
from muonclip.torch.observe import PATCHES


@dataclass(slots=True, eq=False)
class Replica:
    """A copy of a model with arguments to call it with.

    `paths`: the names of module and attribute in the model of each parameter of the copy, by its id. `statistics`: the
    copies of the model's, by the ids of the originals. `stand_ins`: those of sharded matrices, and `own`, the other
    parameters whose values were changed, by their ids in the copy.
    """

    module: nn.Module
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    paths: dict[int, tuple[str, str]]
    statistics: dict[int, MaxLogits]
    stand_ins: dict[int, StandIn]
    own: set[int] = field(default_factory=set)

    def change(self, parameter: Tensor, change: Callable[[], object]) -> None:
        """Change the values of a parameter of the copy, in place; the model's stay as they are."""
        if id(parameter) in self.stand_ins:
            self.stand_ins[id(parameter)].change(change)
            return
        if id(parameter) not in self.own:
            self.own.add(id(parameter))
            parameter.data = parameter.detach().clone()
        change()

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
    with ExitStack() as stack:
        for context in (outside_modes(), PATCHES.used(model), _process_state.kept(), _marked_as_experiment()):
            stack.enter_context(context)
        stack.enter_context(torch.inference_mode(False))
        stack.callback(torch.set_autocast_cache_enabled, torch.is_autocast_cache_enabled())
        torch.set_autocast_cache_enabled(False)  # it would hold casts of the copy's weights
        copies = DenseCopies(compute_dtypes(model))
        own = own_shapes(model)
        stand_ins = {
            id(each): stand_in_of(copies, each, own.get(id(each), tuple(each.shape)))
            for each in model.parameters()
            if _needs_stand_in(each)
        }
        parameters = {id(each): _parameter_of_replica(each, copies, stand_ins, values) for each in model.parameters()}
        memo: dict[int, Any] = dict(parameters)
        for tensor in tree_leaves((list(model.buffers()), tuple(args), dict(kwargs))):
            if is_dtensor(tensor):  # in the copy's own memory, into which a forward may write
                memo[id(tensor)] = copies.dense(tensor).clone()
        replica = _replica(model, memo)
        own_args, own_kwargs = _copied(tuple(args), memo), _copied(dict(kwargs), memo)
        replica.train(training)
        hold_in_their_parts(model, replica, stand_ins)
        cast_as_sharded(model, replica)
        paths: dict[int, tuple[str, str]] = {}
        for name, module in model.named_modules():
            for attribute, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
                paths.setdefault(id(parameters[id(parameter)]), (f"{prefix}{name}".removesuffix("."), attribute))
        statistics = {key: copied for key, copied in memo.items() if isinstance(copied, MaxLogits)}
        stack.enter_context(GeneratorsKept())  # which sees every function: the copy itself is made without it
        try:
            by_copy = {id(each.parameter): each for each in stand_ins.values()}
            yield Replica(replica, own_args, own_kwargs, paths, statistics, by_copy)
        finally:
            for each in stand_ins.values():
                each.end()
            for module in replica.modules():  # which knows itself by it, and would wait for the garbage collector
                vars(module).pop("_compiled_call_impl", None)


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
    """Tell whether something else is in the place of the module's own `forward`, and not around it."""
    if "forward" not in vars(module) or isinstance(module, torch.jit.ScriptModule):
        return False
    around = [vars(module)["forward"]]
    seen: set[int] = set()
    for forward in around:
        if _is_bound_to(forward, module):
            return False
        around += [each for each in _inside_of(forward) if id(each) not in seen]
        seen.update(map(id, around))
    return True


def _inside_of(forward: Any) -> Iterator[Any]:
    """Yield the functions that a function may be around. One that has its module's forward only to put it back, as an
    engine that runs something else in a call of the module (Lightning), is around none."""
    if hasattr(forward, "__wrapped__"):
        yield forward.__wrapped__
    elif isinstance(forward, types.FunctionType) and "forward" not in forward.__code__.co_names:
        for cell in forward.__closure__ or ():
            with suppress(ValueError):  # which is empty
                if isinstance(cell.cell_contents, types.FunctionType | types.MethodType | functools.partial):
                    yield cell.cell_contents


def _is_bound_to(forward: Any, module: nn.Module) -> bool:
    """Tell whether a forward is bound to a module in a way that deep copies follow, as that of accelerate's hooks."""
    if not isinstance(forward, functools.partial):
        return getattr(forward, "__self__", None) is module
    inner = getattr(forward, "__wrapped__", None)
    return any(each is module for each in forward.args) and (inner is None or _is_bound_to(inner, module))


def _holds_modules(forward: Any) -> bool:
    """Tell whether a function has modules, or methods of theirs, from where it was defined, as TRL's chunked losses."""
    function = getattr(forward, "__func__", forward)
    for cell in getattr(function, "__closure__", None) or ():
        with suppress(ValueError):  # which is empty
            value = cell.cell_contents
            if isinstance(getattr(value, "__self__", value), nn.Module):
                return True
            if isinstance(value, types.FunctionType) and _holds_modules(value):
                return True
    return False


def _needs_stand_in(parameter: Tensor) -> bool:
    is_matrix = parameter.ndim > 1 and parameter.numel() > 0 and parameter.is_floating_point()
    return is_matrix and not is_whole(parameter) and not parameter.is_meta


def _parameter_of_replica(
    parameter: nn.Parameter,
    copies: DenseCopies,
    stand_ins: Mapping[int, StandIn],
    values: Callable[[Tensor], Tensor],
) -> Any:
    """Make a parameter for the copy, of the memory that `values` leaves it. It knows if the model's is trained."""
    if not parameter.is_floating_point():
        return copies.dense(parameter) if is_dtensor(parameter) else parameter
    if id(parameter) in stand_ins:
        copied = stand_ins[id(parameter)].parameter
    else:
        # Not by `detach`: a forward may be under way, and what is written to the copy must not count as a change of
        # the tensors that its backward needs.
        data = copies.dense(parameter) if is_dtensor(parameter) else unwrapped(parameter).data
        copied = nn.Parameter(data if data.is_meta else values(data), requires_grad=True)
    copied.is_trained = parameter.requires_grad  # pyright: ignore[reportAttributeAccessIssue]
    return copied


def _replica(module: nn.Module, memo: dict[int, Any]) -> nn.Module:
    """Copy a module deeply; what cannot be copied (a lock, a process group) is shared."""
    if id(module) in memo:
        return memo[id(module)]
    if is_compiled_module(module):
        replica = memo[id(module)] = _Uncompiled(_replica(module._orig_mod, memo))
        return replica
    if isinstance(module, torch.jit.ScriptModule):
        replica = memo[id(module)] = copy.deepcopy(module)
        for name, parameter in module.named_parameters():
            *inner, attribute = name.split(".")
            setattr(functools.reduce(getattr, inner, replica), attribute, memo[id(parameter)])
        return replica
    kind = unrounded_class(plain_class(module))
    replica = memo[id(module)] = kind.__new__(kind)
    try:
        state = module.__getstate__()  # without what a module does not want copied, such as its compiled form
    except RuntimeError:  # parametrized modules refuse
        state = None
    state = without_engine(state if isinstance(state, dict) else vars(module))
    if "forward" in state and (not _is_bound_to(state["forward"], module) or _holds_modules(state["forward"])):
        del state["forward"]  # it would run the original
    inner = {name: None if each is None else _replica(each, memo) for name, each in module._modules.items()}
    replica.__setstate__({name: inner if name == "_modules" else _copied(value, memo) for name, value in state.items()})
    vars(replica)["_compiled_call_impl"] = functools.partial(_call_without_global_hooks, replica)
    return replica


_call_without_global_hooks = types.FunctionType(
    nn.Module._call_impl.__code__,
    vars(sys.modules[nn.Module.__module__])
    | {name: {} for name in vars(sys.modules[nn.Module.__module__]) if name.startswith("_global_")},
    "_call_without_global_hooks",
)
"""`nn.Module.__call__` without the hooks on all modules of the process: they see those of the model alone."""


class _Uncompiled(nn.Module):
    """In the place of what torch.compile wraps around a module."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self._orig_mod = module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._orig_mod(*args, **kwargs)


def _copied(value: Any, memo: dict[int, Any]) -> Any:
    kind = type(value)
    if kind in _ATOMIC:
        return value
    if kind in _CONTAINERS and not value:  # as most attributes of a module are: copying them takes no search
        if id(value) not in memo:
            memo[id(value)] = kind()
            memo.setdefault(id(memo), []).append(value)  # which keeps its number, as `deepcopy` does
        return memo[id(value)]
    if kind is dict and all(each is None or id(each) in memo for each in value.values()):  # as a module's parameters
        if id(value) not in memo:
            memo[id(value)] = {name: None if each is None else memo[id(each)] for name, each in value.items()}
            memo.setdefault(id(memo), []).append(value)
        return memo[id(value)]
    memo.update((id(each), each) for each in tree_leaves(value) if isinstance(each, CustomOpDef))  # its copy is broken
    known = len(memo)
    try:
        return copy.deepcopy(value, memo)
    except Exception:  # whatever an object's own copying raises
        while len(memo) > known:  # half-made copies, which another module with the same object would be given
            memo.popitem()
        if isinstance(value, Tensor):  # with a graph behind it
            return value.detach().clone()
        if type(value) in (list, tuple):
            return type(value)(_copied(item, memo) for item in value)
        return {key: _copied(item, memo) for key, item in value.items()} if type(value) is dict else value


_ATOMIC = frozenset((type(None), bool, int, float, str))
_CONTAINERS = frozenset((dict, OrderedDict, list, set))


class _ProcessState:
    """The changes that traced forwards make to the process, from the first one that runs to the last.

    Random numbers are put back, nothing is compiled, no anomaly is looked for, and checkpointing of activations keeps
    them: it would forbid gradients by some tensors, and run parts again. The garbage collector waits, which would go
    through all objects there are because so many are made. Each of several threads would put back what another has
    changed.
    """

    def __init__(self) -> None:
        self._lock, self._users, self._changes = threading.Lock(), 0, ExitStack()

    @contextmanager
    def kept(self) -> Iterator[None]:
        with self._lock:
            if not self._users:
                with ExitStack() as changes:
                    changes.enter_context(random_state_kept())
                    changes.enter_context(torch.compiler.set_stance("force_eager"))
                    changes.enter_context(_without_anomalies())
                    changes.enter_context(_without_checkpoints())
                    changes.enter_context(_without_collections())
                    self._changes = changes.pop_all()  # if none of them has raised
            self._users += 1
        try:
            yield
        finally:
            with self._lock:
                self._users -= 1
                if not self._users:
                    self._changes.close()


_process_state = _ProcessState()


@contextmanager
def _without_anomalies() -> Iterator[None]:
    looks, at_values = torch.is_anomaly_enabled(), torch.is_anomaly_check_nan_enabled()
    if looks:
        torch.set_anomaly_enabled(False)
    try:
        yield
    finally:
        if looks:
            torch.set_anomaly_enabled(True, at_values)


@contextmanager
def _without_collections() -> Iterator[None]:
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()


@contextmanager
def _without_checkpoints() -> Iterator[None]:
    """Let checkpoints of torch, which look these up when they are called, run what they are given in experiments."""
    function, around = checkpoint.CheckpointFunction, checkpoint._checkpoint_without_reentrant_generator
    apply = function.apply

    def applied(run: Callable[..., Any], preserve: bool, *args: Any) -> Any:
        return run(*args) if is_experiment() else apply(run, preserve, *args)

    def nothing_around(*args: Any, **kwargs: Any) -> Iterator[None]:
        return (None for _ in range(1)) if is_experiment() else around(*args, **kwargs)

    function.apply = applied  # pyright: ignore[reportAttributeAccessIssue]
    checkpoint._checkpoint_without_reentrant_generator = nothing_around
    try:
        yield
    finally:
        del function.apply
        checkpoint._checkpoint_without_reentrant_generator = around

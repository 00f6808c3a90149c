"""One forward of a copy of the model, in which every attention is seen, and its queries and keys traced to their rows.

The copy shares the memory of its matrices with the model and has everything else of its own, so a rehearsal leaves no
trace: no buffer, counter or random number of the model moves. In evaluation mode no layer is dropped. Of a sharded
model the copy is whole, with other values (`unsharded.py`); no rank waits for another.
Every product with a weight is cut off from what comes before it (`provenance.py`).
"""

from __future__ import annotations

import copy
import functools
import itertools
import math
import random
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.eval_frame import OptimizedModule
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_leaves

from muonclip.torch.doors import Doors
from muonclip.torch.interception import listening, with_heads
from muonclip.torch.max_logits import MaxLogits
from muonclip.torch.provenance import Product, Rows, Source, feeds, leaves_of, rows_behind, trace
from muonclip.torch.scores import ScoreTracker, WrittenOut
from muonclip.torch.sdpa import host_sdpa
from muonclip.torch.unsharded import StandIns, check_size, plain_class, without_engine


@dataclass(slots=True, eq=False)
class Call:
    """One call of attention in a rehearsal. `module`: the name of the innermost module that made it, in its `run`-th
    run of all modules. `facing_private`, `facing_shared`: the query's rows by the kind of key they meet, where a head's
    key is of both kinds."""

    module: str
    run: int
    via: str
    num_heads: int
    query: Source
    key: Source
    value: Source | None
    problem: str = ""
    facing_private: list[Rows] = field(default_factory=list)
    facing_shared: list[Rows] = field(default_factory=list)


@dataclass(slots=True, eq=False)
class Rehearsal:
    """The calls in their order. `places`: where each parameter among their rows stands in the model, by its id: names
    of module and attribute. `statistics`: the copies of the model's, by the ids of the originals."""

    calls: list[Call]
    places: dict[int, tuple[str, str]]
    statistics: dict[int, MaxLogits]


_rehearsing = False


def is_rehearsing() -> bool:
    """Whether a rehearsal is running, whose modules are copies."""
    return _rehearsing


def has_a_foreign_forward(module: nn.Module) -> bool:
    """Whether `forward` was replaced by what is no method of the module: a copy would run the original."""
    forward = vars(module).get("forward")
    return forward is not None and getattr(forward, "__self__", None) is not module


def rehearse(
    model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], *, prefix: str = "", training: bool = False
) -> Rehearsal:
    """Run `model(*args, **kwargs)` on a copy. Raises whatever the model raises; model and arguments are as before.
    `prefix`: of the names. `training`: the mode of the copy."""
    global _rehearsing
    with ExitStack() as stack:
        Doors.open(model)
        stack.callback(Doors.close)
        stack.enter_context(_random_state_kept())
        check_size(model.parameters())
        stand_ins = StandIns()
        shadows: dict[int, Any] = {}
        for parameter in model.parameters():
            shadows[id(parameter)] = _shadow(parameter, stand_ins)
        memo = dict(shadows)
        for tensor in tree_leaves((list(model.buffers()), tuple(args), dict(kwargs))):
            if isinstance(tensor, DTensor):
                memo[id(tensor)] = stand_ins.of(tensor)
        twin = _twin(model, memo)
        args, kwargs = _copied(tuple(args), memo), _copied(dict(kwargs), memo)
        twin.train(training)
        places: dict[int, tuple[str, str]] = {}
        for name, module in model.named_modules():
            for attribute, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
                places.setdefault(id(shadows[id(parameter)]), (f"{prefix}{name}".removesuffix("."), attribute))
        recorder = _Recorder(twin, prefix)
        _rehearsing = True
        stack.callback(_stop_rehearsing)
        stack.enter_context(torch.enable_grad())
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.enter_context(listening(recorder))
        with recorder:
            twin(*args, **kwargs)
        sources = [source for call in recorder.calls for source in (call.query, call.key, call.value) if source]
        kept = {id(rows.parameter) for source in sources for rows in (*source.rows, *source.gains)}
        return Rehearsal(
            recorder.calls,
            {key: place for key, place in places.items() if key in kept},
            {key: copied for key, copied in memo.items() if isinstance(copied, MaxLogits)},
        )


def _stop_rehearsing() -> None:
    global _rehearsing
    _rehearsing = False


def _shadow(parameter: nn.Parameter, stand_ins: StandIns) -> Any:
    """A parameter for the copy: the same memory, but for vectors, which are moved a little: a bias that is still zero
    could not be told from a gain."""
    if not parameter.is_floating_point():
        return stand_ins.of(parameter) if isinstance(parameter, DTensor) else parameter
    data = stand_ins.of(parameter) if isinstance(parameter, DTensor) else parameter.detach()
    if data.ndim <= 1 and not data.is_meta:
        data = data + 0.05 * torch.rand_like(data) + 0.02
    return nn.Parameter(data, requires_grad=True)


def _twin(module: nn.Module, memo: dict[int, Any]) -> nn.Module:
    """A deep copy of a module, in which what cannot be copied (a lock, a process group) is shared."""
    if id(module) in memo:
        return memo[id(module)]
    if isinstance(module, OptimizedModule):
        twin = memo[id(module)] = _Uncompiled(_twin(module._orig_mod, memo))
        return twin
    kind = plain_class(module)
    twin = memo[id(module)] = kind.__new__(kind)
    try:
        state = module.__getstate__()  # without what a module does not want copied, such as its compiled form
    except RuntimeError:  # parametrized modules refuse
        state = None
    state = without_engine(state if isinstance(state, dict) else vars(module))
    if has_a_foreign_forward(module):
        state.pop("forward", None)
    inner = {name: None if each is None else _twin(each, memo) for name, each in module._modules.items()}
    twin.__setstate__({name: inner if name == "_modules" else _copied(value, memo) for name, value in state.items()})
    return twin


class _Uncompiled(nn.Module):
    """In the place of what torch.compile wraps around a module."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self._orig_mod = module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._orig_mod(*args, **kwargs)


def _copied(value: Any, memo: dict[int, Any]) -> Any:
    try:
        return copy.deepcopy(value, memo)
    except Exception:  # whatever an object's own copying raises
        if isinstance(value, Tensor):  # with a graph behind it
            return value.detach().clone()
        if type(value) in (list, tuple):
            return type(value)(_copied(item, memo) for item in value)
        return {key: _copied(item, memo) for key, item in value.items()} if type(value) is dict else value


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


_PRODUCTS = {
    getattr(home, name)
    for home in (torch, Tensor)
    for name in ("matmul", "mm", "bmm", "__matmul__", "__rmatmul__", "addmm", "baddbmm", "einsum", "tensordot")
    if hasattr(home, name)
} | {F.linear, F.conv1d, F.conv2d, F.conv3d, F.bilinear}


class _Recorder(ScoreTracker):
    """Sees every function of torch that the copy calls: cuts products with weights, records attention."""

    only_with_gradients = False

    def __init__(self, twin: nn.Module, prefix: str) -> None:
        super().__init__(self.written)
        self.calls: list[Call] = []
        self._running: list[tuple[str, int]] = []
        self._runs = itertools.count()
        self._own = set(map(id, twin.parameters()))
        for name, module in twin.named_modules():
            path = f"{prefix}{name}".removesuffix(".")
            module.register_forward_pre_hook(functools.partial(self._enter, path), prepend=True, with_kwargs=True)
            module.register_forward_hook(self._leave)

    # Modules

    def _enter(self, name: str, module: nn.Module, args: Any, kwargs: Any) -> Any:
        self._running.append((name, next(self._runs)))
        if sum(parameter.ndim >= 2 for parameter in module.parameters()) >= 2:
            # A layer or a block: what comes in is no query on its way. Without this the graph would grow with depth.
            return tuple(map(_cut_off, args)), {key: _cut_off(value) for key, value in kwargs.items()}
        return None

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        self._running.pop()

    # Functions

    def run(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        # Innermost hooks and gradients on, whatever checkpointing has set.
        with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(_as_it_is, _as_it_is):
            if func is host_sdpa:
                self.record("sdpa", args[0], args[1], args[2], problem=_BY_ANOTHER_WAY)
                return func(*args, **kwargs)
            if func in _PRODUCTS:
                cut = self._cut(func, args, kwargs)
                if cut is not None:
                    return cut
            result = func(*args, **kwargs)
        self._mark(args, kwargs, result)
        return result

    def _cut(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
        """The product with a weight as a leaf of its own; None if neither factor is a weight."""
        flat = [args[0], *args[1]] if func is torch.einsum and len(args) == 2 else list(args)
        flat += list(kwargs.values())
        tensors = [value for value in flat if isinstance(value, Tensor)]
        if func is F.linear:
            weights = tensors[1:]
        else:
            weights = [tensor for tensor in tensors if self._is_weight(tensor)]
            if not weights or len(weights) == len(tensors):
                return None
        held = {id(weight) for weight in weights}
        replaced = {id(t): t.detach() for t in tensors if id(t) not in held}
        args, kwargs = _replace(args, replaced), _replace(kwargs, replaced)
        with torch.no_grad():
            output = func(*args, **kwargs)
            if not output.is_floating_point():
                return None
            output = _of_order_one(output)
        leaf = output.detach().requires_grad_()
        leaf.product = self._product(func, args, kwargs)  # pyright: ignore[reportAttributeAccessIssue]
        return leaf.clone()

    def _product(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Product:
        name = getattr(func, "__name__", str(func)).strip("_")
        if func is F.linear or func in (torch.addmm, torch.matmul, Tensor.matmul, Tensor.__matmul__):
            if func is F.linear:
                x, weight = args[0], args[1] if len(args) > 1 else kwargs["weight"]
                bias, axis = args[2] if len(args) > 2 else kwargs.get("bias"), 0
            elif func is torch.addmm and len(args) == 3:
                (bias, x, weight), axis = args, 1
            else:
                (x, weight), bias, axis = args[:2], None, 1
            found, start = self._part_of(weight, axis)
            bias_found, bias_start = (None, start) if bias is None else self._part_of(bias, 0)
            if found is not None and (bias is None or bias_found is not None) and start == bias_start:
                return Product(name, found, axis, bias_found, start)
            if axis == 0:
                few = x.detach().flatten(0, -2)[:64]
                return Product(name, recompute=lambda: F.linear(few, weight, bias), by_columns=True)
        return Product(name, recompute=lambda: func(*args, **kwargs))

    def _part_of(self, tensor: Tensor, axis: int) -> tuple[nn.Parameter | None, int]:
        """The parameter that a tensor is, or is some rows of, and the first of them."""
        if id(tensor) in self._own:
            return tensor, 0  # pyright: ignore[reportReturnType]
        base = tensor._base
        if base is not None and id(base) in self._own and tensor.ndim == base.ndim and tensor.stride() == base.stride():
            others = [n for i, n in enumerate(tensor.shape) if i != axis]
            offset = tensor.storage_offset() - base.storage_offset()
            if others == [n for i, n in enumerate(base.shape) if i != axis] and offset % base.stride(axis) == 0:
                return base, offset // base.stride(axis)  # pyright: ignore[reportReturnType]
        return None, -1

    def _is_weight(self, tensor: Tensor) -> bool:
        return id(tensor) in self._own or getattr(tensor, "of_parameters_only", False)

    def _mark(self, args: Any, kwargs: Any, result: Any) -> None:
        """What is made of parameters alone is a weight as well: a part, a cast, a parametrization."""
        tensors = [value for value in _flatten([*args, *kwargs.values()]) if isinstance(value, Tensor)]
        if tensors and all(map(self._is_weight, tensors)):
            for value in _flatten([result]):
                if isinstance(value, Tensor) and id(value) not in self._own:
                    value.of_parameters_only = True  # pyright: ignore[reportAttributeAccessIssue]

    # Attention

    def place(self) -> object:
        return list(self._running)

    def sdpa(self, call: Callable[..., Tensor], arguments: dict[str, Any]) -> Tensor:
        self.record("sdpa", arguments["query"], arguments["key"], arguments["value"])
        with torch._C.DisableTorchFunction(), torch.enable_grad():
            return call(**arguments)

    def flex(self, call: Callable[..., Any], arguments: dict[str, Any]) -> Any:
        self.record("flex", arguments["query"], arguments["key"], arguments["value"])
        q, v = arguments["query"].detach(), arguments["value"].detach()
        with torch._C.DisableTorchFunction(), torch.no_grad():
            if not arguments["return_lse"] and arguments["return_aux"] is None:
                return q.new_zeros(*q.shape[:-1], v.shape[-1])  # what it says does not matter; uncompiled it is slow
            return call(**{k: t.detach() if isinstance(t, Tensor) else t for k, t in arguments.items()})

    def interface(self, call: Callable[[], Any], q: Tensor, k: Tensor, scale: float, mask: dict[str, Any]) -> Any:
        self.record("interface", q, k, None)
        with torch._C.DisableTorchFunction(), torch.no_grad(), listening(None):
            return call()

    def written(self, found: WrittenOut) -> None:
        problem = f"its logits {found.problem} before the softmax" if found.problem else ""
        # Product and softmax may stand in modules of their own: what runs both is what can be observed.
        made, running = cast("list[tuple[str, int]]", found.place), self._running
        both = [one for one, other in zip(made, running, strict=False) if one == other]
        self.record("written out", found.q, found.k, None, problem=problem, where=both[-1])

    def record(
        self,
        via: str,
        q: Tensor,
        k: Tensor,
        v: Tensor | None,
        problem: str = "",
        where: tuple[str, int] | None = None,
    ) -> None:
        module, run = where or self._running[-1]
        with torch._C.DisableTorchFunction(), torch.enable_grad():
            heads = q.shape[-3] if q.ndim == 4 else _heads_of(q)
            if problem or not _heads_repeat(q, heads):
                problem = problem or "its heads do not stand together behind the sequences of the batch"
                self.calls.append(Call(module, run, via, heads, Source(heads), Source(heads), None, problem))
                return
            q, k, _ = with_heads(q, k, None, heads)
            query, key = trace(q), trace(k)
            value = None
            if v is not None and v.ndim == 4:
                value = trace(v, with_values=False)
            call = Call(module, run, via, heads, query, key, value, problem)
            if not query.problem and not query.normalised and not key.problem and not key.normalised:
                call.facing_private, call.facing_shared = _split_by_key(q, k, key)
            self.calls.append(call)


_BY_ANOTHER_WAY = (
    "it calls scaled_dot_product_attention through a reference that QK-Clip cannot reach; call "
    "torch.nn.functional.scaled_dot_product_attention or muonclip.torch.attention"
)


def _split_by_key(q: Tensor, k: Tensor, key: Source) -> tuple[list[Rows], list[Rows]]:
    """The query's rows that face coordinates of the key of its own, and those that face coordinates that heads share.
    Empty where all keys are of one kind, or where a coordinate or a row belongs to both."""
    heads, width = q.shape[1], q.shape[-1]
    shared = [feeds(rows.masks, heads).sum(0) > 1 for rows in key.rows]
    private = [feeds(rows.masks, heads).sum(0) == 1 for rows in key.rows]
    if not (any(bool(s.any()) for s in shared) and any(bool(p.any()) for p in private)):
        return [], []
    by_parameter = {(id(r.parameter), r.axis): (s, p) for r, s, p in zip(key.rows, shared, private, strict=True)}
    meets_shared = torch.zeros(width, dtype=torch.bool, device=q.device)
    meets_private = torch.zeros_like(meets_shared)
    for coordinate in range(width):
        only = torch.zeros_like(meets_shared)
        only[coordinate] = True
        for rows in rows_behind(k, only):
            s, p = by_parameter.get((id(rows.parameter), rows.axis), (None, None))
            if s is not None and p is not None:
                meets_shared[coordinate] |= bool((rows.masks & s).any())
                meets_private[coordinate] |= bool((rows.masks & p).any())
    if bool((meets_shared & meets_private).any()):
        return [], []
    facing_private, facing_shared = rows_behind(q, meets_private), rows_behind(q, meets_shared)
    for a in facing_private:
        for b in facing_shared:
            if a.parameter is b.parameter and (a.axis != b.axis or bool((a.masks & b.masks).any())):
                return [], []
    return facing_private, facing_shared


def _heads_of(tensor: Tensor) -> int:
    """How many heads there are in front of the last two axes, [B · heads]: after how many the same columns of the
    projections come again."""
    slices = tensor.reshape(-1, *tensor.shape[-2:])
    first = _columns_behind(slices, 0)
    for index in range(1, len(slices)):
        if all(map(torch.equal, _columns_behind(slices, index), first)):
            return index
    return len(slices)


def _heads_repeat(tensor: Tensor, heads: int) -> bool:
    """Whether the slices in front of the last two axes, [B · heads], are the same heads for every sequence."""
    slices = tensor.reshape(-1, *tensor.shape[-2:])
    if len(slices) % heads:
        return False
    # Of four axes the third is the heads' by contract; a look at the second sequence tells whether it is.
    looked_at = range(heads, len(slices)) if tensor.ndim != 4 else range(heads, min(heads + 1, len(slices)))
    of_heads = {index % heads: _columns_behind(slices, index % heads) for index in looked_at}
    return all(all(map(torch.equal, _columns_behind(slices, index), of_heads[index % heads])) for index in looked_at)


def _columns_behind(slices: Tensor, index: int) -> list[Tensor]:
    """Which columns of each product feed one of the slices [N, T, d]."""
    leaves, _ = leaves_of(slices)
    probe = torch.zeros_like(slices)
    probe[index] = torch.randn_like(probe[index])
    gradients = torch.autograd.grad(slices, leaves, probe, retain_graph=True, allow_unused=True) if leaves else ()
    return [g.flatten(0, -2).ne(0).any(0) if g is not None and g.ndim > 1 else torch.zeros(0) for g in gradients]


def _of_order_one(output: Tensor) -> Tensor:
    """The values do not matter, but where a weight is zero or small yet, the epsilon of a norm behind it would count;
    and an overflow of the first forward would hide everything."""
    if output.is_meta or not output.numel():
        return output
    size = output.float().square().mean().sqrt()
    if not (0 < size < math.inf):
        return torch.randn_like(output)
    return output / size.to(output.dtype) if size < 1 else output


def _as_it_is(tensor: Tensor) -> Tensor:
    return tensor


def _cut_off(value: Any) -> Any:
    if isinstance(value, Tensor) and not isinstance(value, nn.Parameter):
        return value.detach()
    return type(value)(map(_cut_off, value)) if type(value) in (list, tuple) else value  # pyright: ignore


def _flatten(values: Sequence[Any]) -> Iterator[Any]:
    for value in values:
        if isinstance(value, list | tuple):
            yield from _flatten(value)
        else:
            yield value


def _replace(value: Any, replaced: Mapping[int, Tensor]) -> Any:
    if isinstance(value, Tensor):
        return replaced.get(id(value), value)
    if type(value) in (list, tuple):
        return type(value)(_replace(item, replaced) for item in value)
    if isinstance(value, dict):
        return {key: _replace(item, replaced) for key, item in value.items()}
    return value

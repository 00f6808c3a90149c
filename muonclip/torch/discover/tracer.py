"""The calls of attention in a traced forward, and the rows behind their queries and keys.

Every product with a weight is cut off from what comes before it (`attribution.py`).
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from muonclip.torch.discover.attribution import (
    NotDifferentiable,
    Product,
    Rows,
    Source,
    attribute,
    feeds,
    gradients,
    leaves_of,
    rows_behind,
)
from muonclip.torch.logits import host_sdpa
from muonclip.torch.observe import (
    SDPA,
    AttentionCall,
    AttentionKernel,
    ScoreTracker,
    bind,
    broadcast_heads,
    functions,
    handling,
)


@dataclass(slots=True, eq=False)
class TracedCall:
    """One call of attention in a trace. `module`: the name of the innermost module that made it, in its `run`-th
    run of all modules. `facing_private`, `facing_shared`: the query's rows by the kind of key they meet, where a head's
    key is of both kinds."""

    module: str
    run: int
    kernel: AttentionKernel
    num_heads: int
    query: Source
    key: Source
    value: Source | None
    problem: str = ""
    facing_private: list[Rows] = field(default_factory=list)
    facing_shared: list[Rows] = field(default_factory=list)


_PRODUCTS = functions(
    "matmul", "mm", "bmm", "__matmul__", "__rmatmul__", "addmm", "baddbmm", "einsum", "tensordot", "linear", "conv1d",
    "conv2d", "conv3d", "bilinear",
)  # fmt: skip


class AttentionTracer(ScoreTracker):
    """Sees every function of torch that `replica` calls: cuts products with weights, records attention in `calls`."""

    observes = True
    owner: object = None

    def __init__(self, replica: nn.Module, prefix: str) -> None:
        super().__init__(self._written_out)
        self.calls: list[TracedCall] = []
        self._running: list[tuple[str, int]] = []
        self._runs = itertools.count()
        self._own = set(map(id, replica.parameters()))
        for name, module in replica.named_modules():
            path = f"{prefix}{name}".removesuffix(".")
            module.register_forward_pre_hook(functools.partial(self._enter, path), prepend=True, with_kwargs=True)
            module.register_forward_hook(self._leave)

    # Modules

    def _enter(self, name: str, module: nn.Module, args: Any, kwargs: Any) -> Any:
        self._running.append((name, next(self._runs)))
        if sum(parameter.ndim >= 2 for parameter in module.parameters()) >= 2:
            # A layer or a block: what comes in is not a query yet. Without this the graph would grow with depth.
            return tuple(map(_cut_off, args)), {key: _cut_off(value) for key, value in kwargs.items()}
        return None

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        self._running.pop()

    # Functions

    def run(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        # Innermost hooks and gradients on, whatever checkpointing has set.
        with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(_as_it_is, _as_it_is):
            if func is host_sdpa:
                arguments = bind(func, args, kwargs)
                q, k, v = arguments["query"], arguments["key"], arguments["value"]
                self._record(AttentionCall(SDPA, _nothing, q, k, v, problem=_BY_ANOTHER_WAY))
                return func(*args, **kwargs)
            if func in _PRODUCTS:
                cut = self._cut(func, args, kwargs)
                if cut is not None:
                    return cut
            result = func(*args, **kwargs)
        self._mark(args, kwargs, result)
        return result

    def _cut(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
        """Return the product with a weight as a leaf of its own; None if neither factor is a weight."""
        arguments = bind(func, args, kwargs)
        tensors = [value for value in _flatten(list(arguments.values())) if isinstance(value, Tensor)]
        if func is F.linear:
            weights = [each for each in (arguments["weight"], arguments.get("bias")) if each is not None]
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
        arguments = bind(func, args, kwargs)
        scaled = "alpha" in arguments or "beta" in arguments
        if func in (F.linear, torch.addmm, torch.matmul, Tensor.matmul, Tensor.__matmul__) and not scaled:
            if func is F.linear:
                x, weight, bias, axis = arguments["input"], arguments["weight"], arguments.get("bias"), 0
            elif func is torch.addmm:
                x, weight, bias, axis = arguments["mat1"], arguments["mat2"], arguments["input"], 1
            else:
                x, weight, bias, axis = arguments["input"], arguments["other"], None, 1
            found, start = self._part_of(weight, axis)
            bias_found, bias_start = (None, start) if bias is None else self._part_of(bias, 0)
            is_matrix = weight.ndim == 2
            if is_matrix and found is not None and (bias is None or bias_found is not None) and start == bias_start:
                return Product(name, found, axis, bias_found, start)
            if is_matrix and axis == 0:
                few = x.detach().reshape(-1, x.shape[-1])[:64]
                return Product(name, recompute=lambda: F.linear(few, weight, bias), by_columns=True)
        return Product(name, recompute=lambda: func(*args, **kwargs))

    def _part_of(self, tensor: Tensor, axis: int) -> tuple[nn.Parameter | None, int]:
        """Return the parameter that a tensor is, or is some rows of, and the first of them."""
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
        """Mark what is made of parameters alone as a weight: a part, a cast, a parametrization."""
        tensors = [value for value in _flatten([*args, *kwargs.values()]) if isinstance(value, Tensor)]
        if tensors and all(map(self._is_weight, tensors)):
            for value in _flatten([result]):
                if isinstance(value, Tensor) and id(value) not in self._own:
                    value.of_parameters_only = True  # pyright: ignore[reportAttributeAccessIssue]

    # Attention

    def running_modules(self) -> object:
        return list(self._running)

    def follow(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        with torch.enable_grad():
            super().follow(func, args, kwargs, result)

    def attention(self, call: AttentionCall) -> Any:
        """Record a call, make it, and return what it returned, or what looks like it."""
        self._record(call)
        with torch._C.DisableTorchFunction(), torch.enable_grad():
            return (call.run_in_trace or call.run)()

    def _written_out(self, call: AttentionCall) -> None:
        if call.problem:
            call = replace(call, problem=f"its logits {call.problem} before the softmax")
        # Product and softmax may be in modules of their own: what runs both is what can be observed.
        made, running = cast("list[tuple[str, int]]", call.made_in), self._running
        self._record(call, [one for one, other in zip(made, running, strict=False) if one == other][-1])

    def _record(self, call: AttentionCall, where: tuple[str, int] | None = None) -> None:
        module, run = where or self._running[-1]
        # Somebody's own backward may run attention again, and an operator's own code runs below autograd.
        with torch._C.DisableTorchFunction(), _with_autograd(), torch.enable_grad(), handling(None):
            try:
                traced = _attributed(call, module, run)
            except NotDifferentiable as error:
                problem = f"its queries or keys come through code that cannot be differentiated here ({error})"
                q = call.heads_first(call.q)
                traced = _refused(call, module, run, q.shape[-3] if q.ndim > 2 else 1, problem)
        self.calls.append(traced)


def _attributed(call: AttentionCall, module: str, run: int) -> TracedCall:
    q, k = call.heads_first(call.q), call.heads_first(call.k)
    heads = q.shape[-3] if q.ndim == 4 else _heads_of(q)
    if call.problem or not _heads_repeat(q, heads):
        problem = call.problem or "its heads do not follow each other behind the sequences of the batch"
        return _refused(call, module, run, heads, problem)
    q, k, _ = broadcast_heads(q, k, None, heads)
    query, key = attribute(q), attribute(k)
    value = None
    if call.v is not None and call.v.ndim == 4:
        value = attribute(call.heads_first(call.v), with_values=False)
    traced = TracedCall(module, run, call.kernel, heads, query, key, value)
    if not query.problem and not query.normalised and not key.problem and not key.normalised:
        traced.facing_private, traced.facing_shared = _split_by_key(q, k, key)
    return traced


def _refused(call: AttentionCall, module: str, run: int, heads: int, problem: str) -> TracedCall:
    return TracedCall(module, run, call.kernel, heads, Source(heads), Source(heads), None, problem)


def _nothing() -> None:
    """Run what is left of a call that is made elsewhere."""


_BY_ANOTHER_WAY = (
    "it calls scaled_dot_product_attention through a reference that QK-Clip cannot reach; call "
    "torch.nn.functional.scaled_dot_product_attention or muonclip.torch.attention"
)


def _split_by_key(q: Tensor, k: Tensor, key: Source) -> tuple[list[Rows], list[Rows]]:
    """Split the query's rows into those that face key coordinates of one head and those that face shared ones.

    Both are empty where all keys are of one kind, or where a coordinate or a row belongs to both.
    """
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
    """Return the number of heads in the axis before the last two, [B · heads].

    It is the number after which the same columns of the projections come again.
    """
    slices = tensor.reshape(-1, *tensor.shape[-2:])
    first = _columns_behind(slices, 0)
    for index in range(1, len(slices)):
        if all(map(torch.equal, _columns_behind(slices, index), first)):
            return index
    return len(slices)


def _heads_repeat(tensor: Tensor, heads: int) -> bool:
    """Tell whether the slices of the axes before the last two, [B · heads], are the same heads for every sequence."""
    slices = tensor.reshape(-1, *tensor.shape[-2:])
    if len(slices) % heads:
        return False
    # Of four axes the third is the heads' by contract; a look at the second sequence tells whether it is.
    looked_at = range(heads, len(slices)) if tensor.ndim != 4 else range(heads, min(heads + 1, len(slices)))
    of_heads = {index % heads: _columns_behind(slices, index % heads) for index in looked_at}
    return all(all(map(torch.equal, _columns_behind(slices, index), of_heads[index % heads])) for index in looked_at)


def _columns_behind(slices: Tensor, index: int) -> list[Tensor]:
    """Return which columns of each product feed one of the slices [N, T, d]."""
    leaves, _ = leaves_of(slices)
    probe = torch.zeros_like(slices)
    probe[index] = torch.randn_like(probe[index])
    by_leaf = gradients(slices, leaves, probe) if leaves else ()
    return [g.flatten(0, -2).ne(0).any(0) if g is not None and g.ndim > 1 else slices.new_zeros(0) for g in by_leaf]


def _of_order_one(output: Tensor) -> Tensor:
    """Scale the output to values of order one.

    The values do not matter, but where a weight is still zero or small, the epsilon of a norm after it would count; and
    an overflow of the first forward would hide everything.
    """
    if output.is_meta or not output.numel():
        return output
    size = output.float().square().mean().sqrt()
    if not (0 < size < math.inf):
        return torch.randn_like(output)
    return output / size.to(output.dtype) if size < 1 else output


def _with_autograd() -> Any:
    """Make a context in which operations are recorded, also in a custom operator's code, which runs below autograd."""
    exclude = torch._C._dispatch_tls_local_exclude_set()
    for key in (torch._C.DispatchKey.AutogradFunctionality, torch._C.DispatchKey.ADInplaceOrView):
        exclude = exclude.remove(key)
    return torch._C._ForceDispatchKeyGuard(torch._C._dispatch_tls_local_include_set(), exclude)


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

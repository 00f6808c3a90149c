"""The calls of attention in a traced forward, and the rows behind their queries and keys.

Every product with a weight is cut off from what comes before it (`attribution.py`).
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._higher_order_ops.flex_attention import flex_attention

from muonclip.torch.discover.attribution import (
    CONSTANT,
    Source,
    attribute,
    feeds,
    positions_behind_leaves,
    product_of,
    rows_behind,
    rows_behind_any,
)
from muonclip.torch.discover.graph import NotDifferentiable, ancestry, differentiate
from muonclip.torch.discover.head_colours import Rows
from muonclip.torch.discover.parameter_uses import size_of
from muonclip.torch.discover.products import PartOfWeight, Product
from muonclip.torch.discover.weighed_sums import WeighedSums
from muonclip.torch.logits import Unobservable, host_sdpa, saved_tensors_as_they_are, unobservable
from muonclip.torch.observe import (
    FLEX,
    SDPA,
    AttentionCall,
    AttentionKernel,
    Score,
    ScoreTracker,
    bind,
    broadcast_heads,
    derivatives_in_place,
    functions,
    graph_task,
    handling,
    is_jagged,
    like,
    values_of,
)


@dataclass(slots=True, eq=False)
class TracedCall:
    """One call of attention in a trace. `module`: the name of the innermost module that made it, in its `run`-th
    run of all modules. `facing_private`, `facing_shared`: the query's rows by the kind of key they meet, where a head's
    key is of both kinds. `terms`: both sides of other products that are added to the logits. `head_axis`: of
    queries with more than four axes, from the end. `is_of_one_sequence`: it did not show whether heads or sequences
    come first in their axis."""

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
    terms: list[tuple[Source, Source]] = field(default_factory=list)
    head_axis: int | None = None
    is_of_one_sequence: bool = False

    def sources(self) -> Iterator[Source]:
        """Yield all that heads are made of."""
        yield from (self.query, self.key, *itertools.chain(*self.terms))
        if self.value is not None:
            yield self.value


MIXED = "its heads do not follow each other behind the sequences of the batch"
"""The problem of calls whose heads are not known."""
_PRODUCTS = functions(
    "matmul", "mm", "bmm", "__matmul__", "__rmatmul__", "addmm", "baddbmm", "einsum", "tensordot", "linear", "conv1d",
    "conv2d", "conv3d", "bilinear",
)  # fmt: skip


class _Usual(NamedTuple):
    """The names of a product's weight and bias, the axis of the weight that is an axis of the output, and that one."""

    weight: str
    bias: str
    axis: int
    ndim: int
    out_axis: int = -1


_USUAL: dict[Any, _Usual] = {
    F.linear: _Usual("weight", "bias", 0, 2),
    torch.addmm: _Usual("mat2", "input", 1, 2),
    **dict.fromkeys(functions("matmul", "__matmul__"), _Usual("other", "", 1, 2)),
    **dict.fromkeys(functions("mm"), _Usual("mat2", "", 1, 2)),
    **{each: _Usual("weight", "bias", 0, 2 + n, -1 - n) for n in (1, 2, 3) for each in functions(f"conv{n}d")},
}


@dataclass(slots=True)
class _Block:
    """A run of a module with several matrices, and the runs whose products may be queries and keys in it."""

    run: int
    products_of: set[int]


class AttentionTracer(ScoreTracker):
    """Sees every function of torch that `replica` calls: cuts products with weights, records attention in `calls`."""

    observes = True
    owner: object = None

    def __init__(self, replica: nn.Module, prefix: str, inputs: Sequence[Any] = ()) -> None:
        super().__init__(self._written_out)
        self.sums = WeighedSums(replica, inputs, lambda: self._running)
        self.graph_task = graph_task()
        self.calls: list[TracedCall] = []
        self.reached: set[str] = set()
        self.used: set[int] = set()  # the ids of parameters that some function was called with
        self.matrices: dict[int, tuple[int, int]] = {}  # the rows and columns of those that were multiplied by, by id
        self._running: list[tuple[str, int]] = []
        self._runs = itertools.count()
        self._made = itertools.count()  # products
        self._is_block: dict[int, bool] = {}
        self._blocks = [_Block(-1, {-1})]  # the innermost one of each running module
        self._own = frozenset(map(id, replica.parameters()))
        for name, module in replica.named_modules():
            if isinstance(module, torch.jit.ScriptModule):  # which takes no hooks
                continue
            path = f"{prefix}{name}".removesuffix(".")
            module.register_forward_pre_hook(functools.partial(self._enter, path), prepend=True, with_kwargs=True)
            module.register_forward_hook(self._leave)

    # Modules

    def _enter(self, name: str, module: nn.Module, args: Any, kwargs: Any) -> Any:
        run = next(self._runs)
        self.reached.add(name)
        self._running.append((name, run))
        if id(module) not in self._is_block:
            matrices = (parameter for parameter in module.parameters() if parameter.ndim >= 2)
            self._is_block[id(module)] = len(list(itertools.islice(matrices, 2))) == 2
        if not self._is_block[id(module)]:
            self._blocks.append(self._blocks[-1])
            return None
        # What comes in is a stream, whose graph would grow with depth, unless products of the block around it made it:
        # queries and keys that are handed to a core with matrices of its own.
        around, inside = self._blocks[-1], _Block(run, {run})

        def cut_off(value: Any) -> Any:
            if isinstance(value, Tensor) and not isinstance(value, nn.Parameter):
                made_in = {product.block for product in _products_behind([value])}
                if not made_in or not made_in <= around.products_of:
                    return value.detach()
                inside.products_of.update(made_in)
                return value
            return type(value)(map(cut_off, value)) if type(value) in (list, tuple) else value  # pyright: ignore

        self._blocks.append(inside)
        return tuple(map(cut_off, args)), {key: cut_off(value) for key, value in kwargs.items()}

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        self._running.pop()
        self._blocks.pop()

    # Functions

    def run(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if unobservable() is not None:  # in a transform there are no leaves of autograd
            return func(*args, **kwargs)
        if func is torch.autograd.grad:  # by what was cut off, perhaps; its values do not matter
            return derivatives_in_place(args, kwargs)
        if isinstance(kwargs.get("out"), Tensor):  # which torch does not differentiate, so nobody does
            with torch.no_grad():
                return func(*args, **kwargs)
        # Innermost hooks and gradients on, whatever checkpointing has set.
        with torch.enable_grad(), saved_tensors_as_they_are():
            if func in _BEHIND_PATCHES:
                kernel = _BEHIND_PATCHES[func]
                q, k, v = list(bind(func, args, kwargs).values())[:3]
                problem = _BY_ANOTHER_WAY.format(kernel.home.partition(":")[2], kernel.home.replace(":", "."))
                self._record(AttentionCall(kernel, _nothing, q, k, v, problem=problem))
                with self.sums.paused():
                    result = func(*args, **kwargs)
                self.sums.project(result)
                return result
            if func in _PRODUCTS and not (func is F.linear and self.sums.is_projected(_weight_of(args, kwargs))):
                with self.sums.paused():
                    cut = self._cut(func, args, kwargs)
                if cut is not None:
                    self.sums.project(cut, [*args, *kwargs.values()])
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
        self.used |= held
        replaced = {id(t): t.detach() for t in tensors if id(t) not in held}
        block = self._blocks[-1]
        if block.products_of != {block.run}:
            for product in _products_behind(each for each in tensors if id(each) not in held):
                product.projected_in.add(block.run)
        args, kwargs = _replace(args, replaced), _replace(kwargs, replaced)
        with torch.no_grad():
            output = func(*args, **kwargs)
            if not output.is_floating_point():
                return None
            values = _of_order_one(values_of(output))
        leaf = values.detach().requires_grad_()
        leaf.product = self._product(func, args, kwargs, list(replaced.values()))  # pyright: ignore[reportAttributeAccessIssue]
        return like(output, leaf.clone()) if is_jagged(output) else leaf.clone()

    def _product(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], others: Sequence[Tensor]) -> Product:
        name = getattr(func, "__name__", str(func)).strip("_")
        about = name, next(self._made), self._blocks[-1].run
        arguments = bind(func, args, kwargs)
        scaled = "alpha" in arguments or "beta" in arguments
        usual = _USUAL.get(func)
        weight = None if usual is None else arguments[usual.weight]
        if usual is not None and weight is not None and weight.ndim == usual.ndim and not scaled:
            bias = arguments.get(usual.bias)
            parts = [PartOfWeight.from_view(weight, usual.axis, self._own)]
            if bias is not None:
                parts.append(PartOfWeight.from_view(bias, 0, self._own) if bias.ndim == 1 else None)
            known = tuple(part for part in parts if part is not None)
            if len(known) == len(parts):
                self.matrices[id(known[0].parameter)] = size_of(known[0])
                return Product(*about, parts=known, axis=usual.out_axis)
            if func is F.linear:
                x = values_of(arguments["input"])
                few = torch.randn(min(64, x.numel() // x.shape[-1]), x.shape[-1], dtype=x.dtype, device=x.device)
                return Product(*about, recompute=lambda: F.linear(few, weight, bias), by_columns=True)

        def recompute() -> Tensor:
            # Of other numbers: those of this forward may have zeros, behind which a row would not be seen. What is zero
            # as a whole, the summand of an `addmm`, stays so.
            drawn = {id(each): torch.randn_like(each) for each in others if each.is_floating_point() and each.any()}
            return values_of(func(*_replace(args, drawn), **_replace(kwargs, drawn)))

        return Product(*about, recompute=recompute)

    def _is_weight(self, tensor: Tensor) -> bool:
        return id(tensor) in self._own or getattr(tensor, "of_parameters_only", False)

    def takes_matrix(self, function: Any, args: Sequence[Any]) -> bool:
        """Tell whether there is a matrix of weights among the arguments of somebody's autograd function, and something
        else."""
        if function.__module__.partition(".")[0] == "torch":  # as those around operators, which are put to the test
            return False
        tensors = [each for each in args if isinstance(each, Tensor) and each.ndim > 1]
        weights = [each for each in tensors if self._is_weight(each)]
        return 0 < len(weights) < len(tensors)

    def _mark(self, args: Any, kwargs: Any, result: Any) -> None:
        """Mark what is made of parameters alone as a weight: a part, a cast, a parametrization."""
        tensors = [value for value in _flatten([*args, *kwargs.values()]) if isinstance(value, Tensor)]
        results = [value for value in _flatten([result]) if isinstance(value, Tensor)]
        if results:  # else it has read a shape
            self.used.update(map(id, tensors))
        if tensors and all(map(self._is_weight, tensors)):
            for value in results:
                if id(value) not in self._own:
                    value.of_parameters_only = True  # pyright: ignore[reportAttributeAccessIssue]

    # Attention

    def running_modules(self) -> object:
        return list(self._running)

    def follow(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        with torch.enable_grad():
            self.record(func, args, kwargs, result)

    def attention(self, call: AttentionCall) -> Any:
        """Record a call, make it, and return what it returned, or what looks like it."""
        added = self._score_of(call.attn_mask) if isinstance(call.attn_mask, Tensor) else None
        self._record(call if added is None else replace(call, terms=added.terms_of_a_bias()))
        with self.left(), self.sums.paused(), torch.enable_grad():
            result = (call.run_in_trace or call.run)()
        self.sums.project(result)
        return result

    def claim(self, scores: Tensor) -> None:
        with torch._C.DisableTorchFunction(), self.sums.paused():
            self.sums.claim(scores)

    def weights_of_mixed(self, score: Score, weights: Tensor, function: str) -> None:
        with torch._C.DisableTorchFunction(), self.sums.paused():
            self.sums.weights(weights, cast("list[tuple[str, int]]", score.made_in), function)

    def leave_out(self, reason: Unobservable) -> None:
        """Leave a call to the steps, of which it is told then that it was not observed."""
        self.sums.left_to_steps.add(self.sums.innermost())

    def _written_out(self, call: AttentionCall) -> None:
        if call.problem:
            call = replace(call, problem=f"its logits {call.problem} before the {call.kernel.weights_by}")
        # Product and softmax may be in modules of their own: what runs both is what can be observed.
        made, running = cast("list[tuple[str, int]]", call.made_in), self._running
        self._record(call, [one for one, other in zip(made, running, strict=False) if one == other][-1])

    def _record(self, call: AttentionCall, where: tuple[str, int] | None = None) -> None:
        module, run = where or self._running[-1]
        # Somebody's own backward may run attention again, and an operator's own code runs below autograd.
        with torch._C.DisableTorchFunction(), self.sums.paused(), _with_autograd(), torch.enable_grad(), handling(None):
            try:
                traced = _attributed(call, module, run, frozenset(block.run for block in self._blocks))
            except NotDifferentiable as error:
                problem = f"its queries or keys come through code that cannot be differentiated here ({error})"
                q = call.heads_first(call.q)
                traced = _refused(call, module, run, q.shape[-3] if q.ndim > 2 else 1, problem)
        self.calls.append(traced)


def _weight_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return args[1] if len(args) > 1 else kwargs["weight"]


def _attributed(call: AttentionCall, module: str, run: int, blocks: frozenset[int]) -> TracedCall:
    axis = _head_axis(call.q) if call.q.ndim > 4 and not call.problem else None
    call = call if axis is None else call.with_heads_from(axis)
    given, k = call.heads_first(call.q), call.heads_first(call.k)
    heads = given.shape[-3] if given.ndim == 4 else _heads_of(given)
    if call.problem or math.prod(given.shape[:-2]) % heads:
        return _refused(call, module, run, heads, call.problem or MIXED)
    q, k, _ = broadcast_heads(given, k, None, heads)
    query = attribute(q, blocks=blocks)
    # One head may be several in front of the batch: then its rows are its own, too.
    if not (query.are_private and heads > 1) and not _heads_repeat(given, heads):
        return _refused(call, module, run, heads, MIXED)
    key = attribute(k, blocks=blocks)
    if (key.problem and key.problem != CONSTANT) or key.normalised:
        own = positions_behind_leaves(k)
        if not own.all():  # the others are from a cache
            k = k[:, :, own]
            key = attribute(k, blocks=blocks)
    value = None
    if call.v is not None and call.v.ndim == 4:
        value = attribute(call.heads_first(call.v), with_values=False)
    traced = TracedCall(module, run, call.kernel, heads, query, key, value, head_axis=axis)
    traced.is_of_one_sequence = given.ndim != 4 and math.prod(given.shape[:-2]) == heads > 1
    if not query.problem and not query.normalised and not key.problem and not key.normalised:
        traced.facing_private, traced.facing_shared = _split_by_key(q, k, query, key)
        if all(math.prod(side.shape[:-2]) % heads == 0 for term in call.terms for side in term):
            traced.terms = [
                (_source_of(one, heads, blocks), _source_of(other, heads, blocks)) for one, other in call.terms
            ]
    return traced


def _source_of(side: Tensor, heads: int, blocks: frozenset[int]) -> Source:
    return attribute(side.reshape(-1, heads, *side.shape[-2:]), blocks=blocks)


def _refused(call: AttentionCall, module: str, run: int, heads: int, problem: str) -> TracedCall:
    return TracedCall(module, run, call.kernel, heads, Source(heads), Source(heads), None, problem)


def _nothing() -> None:
    """Run what is left of a call that is made elsewhere."""


_BEHIND_PATCHES: dict[Any, AttentionKernel] = {host_sdpa: SDPA, flex_attention: FLEX}
"""Functions that are reached in a trace only by calls that no patch has taken."""
_BY_ANOTHER_WAY = (
    "it calls {} through a reference that QK-Clip cannot reach; call {} by its name there, or muonclip.torch.attention"
)


def _split_by_key(q: Tensor, k: Tensor, query: Source, key: Source) -> tuple[list[Rows], list[Rows]]:
    """Split the query's rows into those that face key coordinates of one head and those that face shared ones.

    Both are empty where all keys are of one kind, or where a coordinate or a row belongs to both.
    """
    heads, width = q.shape[1], q.shape[-1]
    shared = [feeds(rows.masks, heads).sum(0) > 1 for rows in key.rows]
    private = [feeds(rows.masks, heads).sum(0) == 1 for rows in key.rows]
    if not (any(bool(s.any()) for s in shared) and any(bool(p.any()) for p in private)):
        return [], []
    kinds = {(id(r.parameter), r.axes): (s, p) for r, s, p in zip(key.rows, shared, private, strict=True)}
    meets_shared = torch.zeros(width, dtype=torch.bool, device=q.device)
    meets_private = torch.zeros_like(meets_shared)

    def find(start: int, stop: int) -> None:
        """Halve a range of coordinates until each part meets keys of one kind."""
        within = torch.zeros_like(meets_shared)
        within[start:stop] = True
        met = [
            (rows, *kinds[key])
            for rows in rows_behind_any(k, within)
            if (key := (id(rows.parameter), rows.axes)) in kinds
        ]
        is_shared = any(bool((rows.masks & s).any()) for rows, s, _ in met)
        is_private = any(bool((rows.masks & p).any()) for rows, _, p in met)
        if is_shared and is_private and stop - start > 1:
            find(start, (start + stop) // 2)
            find((start + stop) // 2, stop)
        else:
            meets_shared[start:stop] = is_shared
            meets_private[start:stop] = is_private

    find(0, width)
    if bool((meets_shared & meets_private).any()):
        return [], []
    facing_private, facing_shared = (rows_behind(q, each, query.rows) for each in (meets_private, meets_shared))
    for a in facing_private:
        for b in facing_shared:
            if a.parameter is b.parameter and bool((a.entries() & b.entries()).any()):
                return [], []
    return facing_private, facing_shared


def _head_axis(tensor: Tensor) -> int:
    """Return the axis of [..., T, d], from the end, whose entries come from other columns of the projections; −3 where
    that is not one axis."""
    leading = torch.arange(math.prod(tensor.shape[:-2])).view(tensor.shape[:-2])
    slices = tensor.reshape(-1, *tensor.shape[-2:])
    first = _columns_behind(slices, 0)
    second = ((axis, leading.movedim(axis, 0)[1].flatten()[0]) for axis, size in enumerate(leading.shape) if size > 1)
    own = [axis for axis, index in second if not all(map(torch.equal, _columns_behind(slices, int(index)), first))]
    return own[0] - tensor.ndim if len(own) == 1 else -3


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
    # Of four axes the third is the heads' by contract; a look at the second sequence tells whether it is. And what is
    # in front of the batch shows itself in the last sequence.
    looked_at = range(heads, len(slices)) if tensor.ndim != 4 else range(heads, min(heads + 1, len(slices)))
    looked_at = looked_at[-1:] if heads == 1 else looked_at
    of_heads = {index % heads: _columns_behind(slices, index % heads) for index in looked_at}
    return all(all(map(torch.equal, _columns_behind(slices, index), of_heads[index % heads])) for index in looked_at)


def _columns_behind(slices: Tensor, index: int) -> list[Tensor]:
    """Return which columns of each product feed one of the slices [N, T, d]."""
    leaves = ancestry(slices).leaves
    probe = torch.zeros_like(slices)
    probe[index] = torch.randn_like(probe[index])
    by_leaf = differentiate(slices, leaves, probe) if leaves else ()
    return [g.flatten(0, -2).ne(0).any(0) if g is not None and g.ndim > 1 else slices.new_zeros(0) for g in by_leaf]


def _of_order_one(output: Tensor) -> Tensor:
    """Scale the output to values of order one.

    The values do not matter, but where a weight is still zero or small, the epsilon of a norm after it would count; and
    an overflow of the first forward would hide everything.
    """
    if output.is_meta or not output.numel():
        return output
    size = float(torch.linalg.vector_norm(output, dtype=torch.promote_types(output.dtype, torch.float32)))
    size /= math.sqrt(output.numel())
    if not (0 < size < math.inf):
        return torch.randn_like(output)
    return output / size if size < 1 else output


def _with_autograd() -> Any:
    """Make a context in which operations are recorded, also in a custom operator's code, which runs below autograd."""
    exclude = torch._C._dispatch_tls_local_exclude_set()
    for key in (torch._C.DispatchKey.AutogradFunctionality, torch._C.DispatchKey.ADInplaceOrView):
        exclude = exclude.remove(key)
    return torch._C._ForceDispatchKeyGuard(torch._C._dispatch_tls_local_include_set(), exclude)


def _products_behind(tensors: Iterable[Tensor]) -> Iterator[Product]:
    """Yield the products behind some tensors."""
    leaves = (leaf for tensor in tensors for leaf in ancestry(tensor).leaves)
    return (product for leaf in leaves if (product := product_of(leaf)) is not None)


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

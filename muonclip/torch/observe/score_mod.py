"""Reads FlexAttention's `score_mod`: what it multiplies a score with, and which pairs it masks.

    softmax over j of score_mod(s, b, h, i, j)      S = slope · s, where the score_mod does not mask the pair

`score_mod` is run on single indices, vectorised, with a score that is followed through it. A factor that does not
depend on the score belongs to S, be it of a head or of each pair. What is added does not, and masks where
`muonclip.core.attention_mask` says so of it as a whole. A pair whose score is replaced by something else does not
count. A soft cap c·tanh(s/c) is undone. Of anything else it is not known how it changes with q · k. Where a product of
other queries and keys is added, as for the rotary part of MLA, S would lack it.

The kind of the function is read at each call, at a few pairs; its values only where they are needed.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._C._functorch import get_unwrapped, is_batchedtensor, maybe_get_level
from torch._compile import _disable_dynamo  # pyright: ignore[reportPrivateUsage]; imports the compiler when called
from torch._functorch.autograd_function import custom_function_call
from torch._ops import OpOverload, OpOverloadPacket
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from muonclip.torch.logits import (
    PairCondition,
    at_pairs,
    highest_masked_of_parts,
    indices,
    once,
    row_blocks,
    statistic_dtype,
)
from muonclip.torch.observe.torch_functions import LIKE, bind, functions, name_of, writes

_TANH = re.compile(r"(?<!a)(?<!arc)tanh", re.IGNORECASE)
_WHAT_TO_DO = (
    "let it add, mask, cap by tanh or multiply by what does not depend on the score, or declare the attention and fill "
    "its MaxLogits yourself"
)
_OTHER_PRODUCT = "has a product of other queries and keys, which belongs to S"
_JOIN = (
    "hand them to the kernel joined with its own along their width, or declare the attention and fill its MaxLogits "
    "yourself"
)


class ModifiedScores(NamedTuple):
    """The scores of a call as its score_mod leaves them, without what it adds: scale · q kᵀ, times `slopes` of a tile
    of pairs where each has its own, of the pairs that `condition` allows."""

    q: Tensor
    k: Tensor
    scale: float
    slopes: Callable[[slice, slice], Tensor] | None
    condition: PairCondition | None


class ScoreMod:
    """A score_mod of a call with queries [B, H, Tq, d] and keys [B, G, Tk, d].

    `problem`: why S is not known under it, in words that follow the attention's name, or "".
    """

    @_disable_dynamo
    def __init__(self, function: Callable[..., Any], query: Tensor, key: Tensor) -> None:
        self.problem = ""
        self._function = function
        self._one = torch.ones((), dtype=statistic_dtype(query, key), device=query.device)
        self._kind = _Reading()
        self._highest: list[Tensor] | None = None
        try:
            sizes = [min(2, size) for size in (*query.shape[:3], key.shape[2])]
            with torch.enable_grad():  # to tell what is of trained parameters
                few = at_pairs(self._read, *indices(*(torch.arange(size, device=query.device) for size in sizes)))
        except Exception as error:  # whatever the function raises
            if not query.is_meta:  # with which tensors elsewhere do not mix, and without numbers nothing is observed
                line = str(error).strip().partition("\n")[0].removesuffix(".")
                self.problem = (
                    f"its score_mod could not be run on single pairs ({type(error).__name__}: {line}); {_WHAT_TO_DO}"
                )
            return
        if problem := self._kind.problem:
            self.problem = f"its score_mod {problem}; {_JOIN if problem == _OTHER_PRODUCT else _WHAT_TO_DO}"
        self._slope, _, *self._added = map(once, few)

    @torch.no_grad()
    def modify(self, q: Tensor, k: Tensor, scale: float) -> ModifiedScores:
        """Return what becomes of the scores scale · q kᵀ of this rank's sequences and heads."""
        kind, dtype = self._kind, statistic_dtype(q, k)
        lengths = (len(q), q.shape[1], q.shape[2], k.shape[2])
        b, h, i, j = (torch.arange(length, device=q.device) for length in lengths)
        condition = None
        if kind.filled is not None or kind.added:
            condition = PairCondition(functools.partial(self._allows, lengths), b, h)
        slopes: Callable[[slice, slice], Tensor] | None = None
        if not isinstance(kind.slope, Tensor):
            scale = scale * kind.slope
        elif self._slope.shape[3] == 1:
            q = q.to(dtype) * self._slopes(b, h, i, j[:1]).to(dtype)
        elif self._slope.shape[2] == 1:
            of_keys = self._slopes(b, h, i[:1], j).mT.to(dtype)
            if of_keys.shape[1] > 1:
                k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
            k = k.to(dtype) * of_keys
        else:
            slopes = functools.partial(self._slopes_of_tile, b, h, i, j, dtype)
        return ModifiedScores(q, k, scale, slopes, condition)

    @torch.no_grad()
    def effects(self, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        """Return what it does to the scores of some sequences, heads, queries and keys, int64 [n] each: their slopes,
        which of them are filled and all that is added, [B, H, Tq, parts · Tk]."""
        parts = at_pairs(self._read, *indices(b, h, i, j))
        return torch.cat([each.to(self._one.dtype) for each in parts], -1)

    def _slopes_of_tile(
        self, b: Tensor, h: Tensor, i: Tensor, j: Tensor, dtype: torch.dtype, rows: slice, columns: slice
    ) -> Tensor:
        return self._slopes(b, h, i[rows], j[columns]).to(dtype)

    def _slopes(self, *of_axes: Tensor) -> Tensor:
        return once(at_pairs(self._read, *indices(*of_axes))[0])

    def _allows(self, lengths: tuple[int, ...], *of_pairs: Tensor) -> Tensor:
        """Return which pairs it allows, for calls of these numbers of sequences, heads, queries and keys."""
        with torch.no_grad():
            _, filled, *added = map(once, at_pairs(self._read, *of_pairs))
            if self._highest is None:
                self._highest = [self._highest_masked(lengths, which) for which in range(len(added))]
            for each, highest in zip(added, self._highest, strict=True):
                filled = filled | (each <= highest)
        return (~filled).expand(torch.broadcast_shapes(*(each.shape for each in of_pairs)))

    def _highest_masked(self, lengths: tuple[int, ...], which: int) -> Tensor:
        """Return the number [] at and below which one of the terms that it adds forbids pairs."""
        sizes = [length if few > 1 else 1 for length, few in zip(lengths, self._added[which].shape, strict=True)]
        b, h, i, j = (torch.arange(size, device=self._one.device) for size in sizes)

        def parts() -> Iterator[Tensor]:
            for rows in row_blocks(sizes):
                yield _floating(once(at_pairs(self._read, *indices(b, h, i[rows], j))[2 + which]))

        return highest_masked_of_parts(parts)

    def _read(self, *of_pair: Tensor) -> tuple[Tensor, ...]:
        """Return slope, whether it is filled, and what is added, each [], of a pair b, h, i, j."""
        score = self._one.clone()
        with _Reader(score, *map(_axes, of_pair[2:])) as reader:
            result = self._function(score, *of_pair)
        kind = self._kind = reader.reading(result).with_problem(reader.problem)
        slope = kind.slope if isinstance(kind.slope, Tensor) else self._one * kind.slope
        filled = torch.zeros_like(self._one, dtype=torch.bool) if kind.filled is None else kind.filled
        return slope, filled, *kind.added


@dataclass(frozen=True, slots=True, eq=False)
class _Reading:
    """Holds what was made of a score s: slope · s + `added`, or, where it is `filled`, something without s."""

    slope: float | Tensor = 1.0
    filled: Tensor | None = None
    added: tuple[Tensor, ...] = ()
    problem: str = ""

    def with_problem(self, problem: str) -> _Reading:
        return replace(self, problem=self.problem or problem)


class _Reader(TorchFunctionMode):
    """Follows a score through functions of torch. What is made of it is not computed: its reading is.

    `of_query`, `of_key`: the axes along which the indices of query and key vary. `problem`: of what is made without it.
    """

    def __init__(self, score: Tensor, of_query: set[int], of_key: set[int]) -> None:
        super().__init__()
        self.problem = ""
        self._of_query, self._of_key = of_query, of_key
        self._readings: dict[int, tuple[Tensor, _Reading]] = {id(score): (score, _Reading())}

    def reading(self, tensor: Any) -> _Reading:
        """Return the reading of a tensor."""
        _, reading = self._readings.get(id(tensor), (tensor, _Reading(problem="does not use the score")))
        return reading

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        scores = [each for each in tree_leaves((args, kwargs)) if id(each) in self._readings]
        if not scores or func in LIKE:
            if func in _PRODUCTS and self._are_query_and_key(tree_leaves((args, kwargs))):
                self.problem = self.problem or _OTHER_PRODUCT
            return func(*args, **kwargs)
        own = _name_of_own(func, args)
        rule = _kept if _TANH.search(own) else _RULES.get(func)
        if rule is None:
            result = func(*args, **kwargs)
            reading = self.reading(scores[0]).with_problem(f"passes the score through {own or name_of(func)}")
            for each in tree_leaves(result):
                if isinstance(each, Tensor):
                    self._readings[id(each)] = each, reading
            return result
        use = _Use(func, bind(func, args, kwargs), scores, [self.reading(each) for each in scores])
        if writes(func):
            result = args[0]
        elif rule is _kept and func in _RULES:
            result = func(*args, **kwargs)
        else:
            result = scores[0].clone()
        reading = rule(use)
        for other in use.readings:
            reading = reading.with_problem(other.problem)
        self._readings[id(result)] = result, reading
        return result

    def _are_query_and_key(self, arguments: Sequence[Any]) -> bool:
        """Tell whether there is a trained vector of each query and one of each key among some arguments."""
        vectors = [each for each in arguments if isinstance(each, Tensor) and each.ndim and _is_trained(each)]
        axes = [_axes(each) for each in vectors]
        return any(self._of_query <= each and not self._of_key <= each for each in axes) and any(
            self._of_key <= each and not self._of_query <= each for each in axes
        )


class _Use(NamedTuple):
    """A call of a function with scores among its arguments."""

    function: Any
    arguments: Mapping[str, Any]
    scores: Sequence[Tensor]
    readings: Sequence[_Reading]

    def reading_of(self, value: Any) -> _Reading | None:
        return next((reading for each, reading in zip(self.scores, self.readings, strict=True) if each is value), None)


def _multiplied(use: _Use) -> _Reading:
    reading, factor = use.readings[0], use.arguments["other"]
    if len(use.scores) > 1:
        return reading.with_problem("multiplies the score by itself")
    if factor is use.scores[0]:
        factor = use.arguments["input"]
    return replace(reading, slope=reading.slope * _wide(factor))


def _divided(use: _Use) -> _Reading:
    reading, divisor = use.readings[0], use.arguments["other"]
    if len(use.scores) > 1 or use.reading_of(divisor) is not None:
        return reading.with_problem("divides by the score")
    if "rounding_mode" in use.arguments:
        return reading.with_problem("rounds the score")
    return replace(reading, slope=reading.slope / _wide(divisor))


def _negated(use: _Use) -> _Reading:
    return replace(use.readings[0], slope=-use.readings[0].slope)


def _shifted(use: _Use) -> _Reading:
    """Return the reading of a + alpha · b, or with a minus, of which one or both are scores."""
    arguments, alpha = use.arguments, use.arguments.get("alpha", 1)
    first, second = arguments["input"], arguments["other"]
    if use.function in _REVERSED:
        terms = [(second, 1), (first, -alpha)]
    else:
        terms = [(first, 1), (second, -alpha if use.function in _MINUS else alpha)]
    slope, filled, added = 0.0, None, []
    for term, times in terms:
        reading = use.reading_of(term)
        if reading is not None:
            slope, filled = slope + reading.slope * times, reading.filled
            added += reading.added
        elif isinstance(term, Tensor):  # a number masks nothing
            added.append(term.detach() if times == 1 else term.detach() * times)
    if len(use.scores) > 1 and any(each.filled is not None for each in use.readings):
        return _Reading(problem="adds scores of which some are masked")
    return _Reading(slope, filled, tuple(added))


def _filled(use: _Use) -> _Reading:
    if len(use.scores) > 1 or use.arguments["input"] is not use.scores[0]:
        return use.readings[0].with_problem("masks by the score")
    return _chosen_from(use.arguments["mask"].bool(), None, use.readings[0])


def _chosen(use: _Use) -> _Reading:
    condition = use.arguments["condition"]
    if use.reading_of(condition) is not None or "other" not in use.arguments:
        return use.readings[0].with_problem("chooses by the score")
    return _chosen_from(condition, *map(use.reading_of, (use.arguments["input"], use.arguments["other"])))


def _chosen_from(condition: Tensor, one: _Reading | None, other: _Reading | None) -> _Reading:
    """Return the reading of a choice of two things, of which those without a score are None."""
    if one is None:
        one, other, condition = other, None, ~condition
    assert one is not None
    if other is None:
        return replace(one, filled=~condition if one.filled is None else ~condition | one.filled)
    filled = None
    if one.filled is not None or other.filled is not None:
        of_one, of_other = (False if each.filled is None else each.filled for each in (one, other))
        filled = torch.where(condition, of_one, of_other)
    slope = one.slope
    if isinstance(slope, Tensor) or isinstance(other.slope, Tensor) or slope != other.slope:
        slope = torch.where(condition, slope, other.slope)
    added = [torch.where(condition, each, torch.zeros_like(each)) for each in one.added]
    added += [torch.where(condition, torch.zeros_like(each), each) for each in other.added]
    return _Reading(slope, filled, tuple(added))


def _kept(use: _Use) -> _Reading:
    return use.readings[0]


def _capped(use: _Use) -> _Reading:
    reading, other = use.readings[0], use.arguments.get("other")
    if len(use.scores) > 1:
        return reading.with_problem("compares scores")
    if isinstance(other, Tensor) and use.function in _MINIMUM:
        other = use.arguments["input"] if other is use.scores[0] else other
        return replace(reading, added=(*reading.added, other.detach()))
    return reading


def _floating(tensor: Tensor) -> Tensor:
    return tensor if tensor.is_floating_point() else tensor.float()


def _wide(factor: Any) -> Any:
    """Return a factor in which products of several are not rounded to a narrow dtype."""
    return (
        factor.detach().to(torch.promote_types(factor.dtype, torch.float32)) if isinstance(factor, Tensor) else factor
    )


def _axes(tensor: Tensor) -> set[int]:
    """Return the vectorised axes on which the tensor of a pair depends, by the levels of torch.vmap."""
    axes = set()
    while is_batchedtensor(tensor):
        axes.add(maybe_get_level(tensor))
        tensor = get_unwrapped(tensor)
    return axes


def _is_trained(tensor: Tensor) -> bool:
    while is_batchedtensor(tensor):
        tensor = get_unwrapped(tensor)
    return tensor.requires_grad


def _name_of_own(func: Any, args: tuple[Any, ...]) -> str:
    """Return the name of an autograd.Function or operator that is not torch's; "" for functions of torch."""
    if func is custom_function_call:
        return args[0].__name__
    if isinstance(func, OpOverload | OpOverloadPacket):
        name = str(func)
        return "" if name.startswith("aten.") else name
    return ""


_PRODUCTS = functions("dot", "vdot", "inner", "matmul", "__matmul__", "mul", "__mul__", "multiply", "einsum")
_PLUS = functions("add", "add_", "__add__", "__radd__", "__iadd__")
_MINUS = functions("sub", "sub_", "subtract", "subtract_", "__sub__", "__isub__")
_REVERSED = functions("rsub", "__rsub__")
_MINIMUM = functions("minimum", "min")
_RULES: dict[Any, Callable[[_Use], _Reading]] = {
    function: rule
    for group, rule in (
        (functions("mul", "mul_", "multiply", "multiply_", "__mul__", "__rmul__", "__imul__"), _multiplied),
        (functions("div", "div_", "divide", "divide_", "true_divide", "__truediv__", "__itruediv__"), _divided),
        (functions("neg", "neg_", "negative", "__neg__"), _negated),
        (_PLUS | _MINUS | _REVERSED, _shifted),
        (functions("masked_fill", "masked_fill_"), _filled),
        (functions("where"), _chosen),
        (functions("maximum", "max", "clamp", "clamp_", "clamp_min", "clamp_max", "clip") | _MINIMUM, _capped),
        (
            functions(
                "to", "float", "half", "bfloat16", "double", "type", "type_as", "contiguous", "clone", "view",
                "reshape", "squeeze", "unsqueeze", "flatten", "tanh", "tanh_", "nan_to_num",
            ),
            _kept,
        ),
    )
    for function in group
}  # fmt: skip

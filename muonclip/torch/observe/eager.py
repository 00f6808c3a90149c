"""Attention written out: a product of queries and keys that reaches a softmax.

    softmax(scale · q kᵀ + bias, masked)            logits S = scale · q_i · k_j, over the pairs that are not masked

`ScoreTracker` follows the product through what happens to it before the softmax. A number that multiplies it belongs to
the scale; those around a soft cap c·tanh(S/c) undo each other. What is added is a bias or a mask and does not; a pair
is masked where the mask or the result is hugely negative.
"""

from __future__ import annotations

import numbers
import types
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from muonclip.core.attention_mask import is_masked

_FILLED = -1e8  # no logit is so low; what masked_fill puts there is −inf, the lowest number of the dtype, or −1e9


@dataclass(frozen=True, slots=True)
class Score:
    """A tensor on its way to a softmax. q [..., Tq, d], k [..., Tk, d]; `problem`: what was not understood on it;
    `place`: where the product was made, whatever the tracker's `place` says."""

    tensor: Tensor
    q: Tensor
    k: Tensor
    scale: float
    place: object = None
    problem: str = ""
    added: tuple[Tensor, ...] = ()  # masks and biases


@dataclass(frozen=True, slots=True)
class WrittenOut:
    """An attention as it was found at its softmax. `allowed`: bool, of the shape of its probabilities."""

    q: Tensor
    k: Tensor
    scale: float
    allowed: Tensor
    problem: str
    place: object


def _functions(*names: str) -> set[object]:
    """The functions and methods of torch by these names."""
    return {getattr(home, name) for home in (torch, Tensor, F) for name in names if hasattr(home, name)}


_PRODUCTS = _functions("matmul", "bmm", "__matmul__", "baddbmm")
_TIMES = _functions("mul", "mul_", "multiply", "__mul__", "__rmul__", "__imul__")
_OVER = _functions("div", "div_", "divide", "true_divide", "__truediv__", "__itruediv__")
_REVERSED = _functions("__rsub__", "rsub")
_MINUS = _REVERSED | _functions("sub", "sub_", "__sub__", "__isub__")
_PLUS = _MINUS | _functions("add", "add_", "__add__", "__radd__", "__iadd__")
_SAME = _PLUS | _functions(
    "to", "float", "half", "bfloat16", "double", "type", "type_as", "contiguous", "clone", "masked_fill",
    "masked_fill_", "where", "max", "maximum", "clamp", "clamp_min", "nan_to_num", "view", "reshape", "unflatten",
    "squeeze", "unsqueeze", "tanh", "tanh_",
)  # fmt: skip
_SOFTMAX = _functions("softmax", "log_softmax") | {torch.special.softmax, torch.special.log_softmax}
_LINEAR = {F.linear, F.conv1d, F.conv2d, F.conv3d}
_CONCATENATE = _functions("cat", "concat")


class ScoreTracker(TorchFunctionMode):
    """Calls `on_attention` for every attention that is written out while it is entered."""

    def __init__(self, on_attention: Callable[[WrittenOut], None]) -> None:
        super().__init__()
        self.on_attention = on_attention
        self._scores: dict[int, Score] = {}  # by the id of their tensor, which they keep alive

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if torch.compiler.is_compiling():
            return func(*args, **kwargs)
        if func is F.multi_head_attention_forward:
            return self.inside(func, *args, **kwargs)
        result = self.run(func, args, kwargs)
        if isinstance(result, Tensor):
            self.follow(func, args, kwargs, result)
        return result

    def run(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return func(*args, **kwargs)

    def place(self) -> object:
        return None

    def inside(self, func: Any, *args: Any, **kwargs: Any) -> Any:
        """Run a function of torch that is made of others, and see those."""
        # With names of its own, among them one that keeps it from coming here for ever; other threads keep theirs.
        names = {**func.__globals__, "has_torch_function": lambda *_: False}
        own = types.FunctionType(func.__code__, names, func.__name__, func.__defaults__, func.__closure__)
        own.__kwdefaults__ = func.__kwdefaults__
        with self:
            return own(*args, **kwargs)

    def follow(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Tensor) -> None:
        if func in _PRODUCTS or func is torch.einsum:
            score = _product(func, args, kwargs, result)
            if score is not None:
                self._scores[id(result)] = replace(score, place=self.place())
            return
        values = [*args, *kwargs.values()]
        if func in _CONCATENATE and isinstance(values[0], list | tuple):
            values = [*values[0]]
        scores = [self._scores[id(v)] for v in values if isinstance(v, Tensor) and id(v) in self._scores]
        if not scores:
            return
        score = min(scores, key=lambda each: bool(each.problem))  # a relative bias is a product that was rearranged
        if func in _PLUS and len(scores) == 2 and not any(each.problem for each in scores):
            score = replace(score, problem="are a sum of two products")
        if func in _SOFTMAX:
            self.on_attention(_finish(score, args, kwargs))
            self._scores.clear()
        elif func not in _LINEAR:  # behind which it is no score any more
            self._scores[id(result)] = replace(_after(func, values, score, result), tensor=result)


def _product(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Tensor) -> Score | None:
    if func is torch.einsum:
        return _einsum(args, result)
    batched = func in _functions("baddbmm")
    a, b = (kwargs.get("batch1", args[1:2]), kwargs.get("batch2", args[2:3])) if batched else (args[:1], args[1:2])
    a, b = (x[0] if isinstance(x, tuple) and x else x for x in (a, b))
    if not (isinstance(a, Tensor) and isinstance(b, Tensor) and min(a.ndim, b.ndim) >= 3):
        return None
    return Score(result, a, b.mT, float(kwargs.get("alpha", 1.0)) if batched else 1.0)


def _einsum(args: tuple[Any, ...], result: Tensor) -> Score | None:
    operands = args[1] if len(args) == 2 and isinstance(args[1], list | tuple) else args[1:]
    if len(operands) != 2 or min(operand.ndim for operand in operands) < 3:
        return None
    unknown = Score(
        result, operands[0], operands[1], 1.0, problem=f"come from an einsum that is not understood, {args[0]}"
    )
    if not isinstance(args[0], str) or "->" not in args[0]:
        return unknown
    args = (_without_ellipsis(args[0], operands),)
    inputs, output = args[0].replace(" ", "").split("->")
    first, second = inputs.split(",")
    rows, columns = output[-2:-1], output[-1:]
    if rows in second:
        first, second, operands = second, first, operands[::-1]
    summed = set(first) & set(second) - set(output)
    if len(summed) != 1 or rows not in first or columns not in second or rows in second or columns in first:
        return unknown
    width = summed.pop()
    shared = output[:-2]
    if set(first) != {*shared, rows, width} or not set(second) <= {*shared, columns, width}:
        return unknown
    q = torch.einsum(f"{first}->{shared}{rows}{width}", operands[0])
    missing = "".join(letter for letter in shared if letter not in second)
    k = torch.einsum(f"{second}->{''.join(x for x in shared if x not in missing)}{columns}{width}", operands[1])
    for position, letter in enumerate(shared):
        if letter in missing:
            k = k.unsqueeze(position)
    return Score(result, q, k, 1.0)


def _without_ellipsis(equation: str, operands: Any) -> str:
    """ "...id,...jd->...ij" with letters in the place of the dots."""
    letters = [letter for letter in "ABCDEFGHIJKLMNOP" if letter not in equation]
    inputs, output = equation.replace(" ", "").split("->")
    axes = max(x.ndim - len(part.replace("...", "")) for part, x in zip(inputs.split(","), operands, strict=True))
    return f"{inputs}->{output}".replace("...", "".join(letters[:axes]))


def _after(func: Any, values: list[Any], score: Score, result: Tensor) -> Score:
    others = [value for value in values if value is not score.tensor]
    if func in _TIMES or func in _OVER:
        factor = others[0]
        if isinstance(factor, Tensor) and factor.numel() == 1:
            factor = factor.item()
        if not isinstance(factor, numbers.Real):
            if isinstance(factor, Tensor) and factor.shape[-2:].numel() == 1 and func in _TIMES:
                return replace(score, q=score.q * factor)
            return replace(score, problem=f"are multiplied by a tensor of shape {_shape(factor)}")
        return replace(score, scale=score.scale * float(factor) if func in _TIMES else score.scale / float(factor))
    if func in _PLUS:
        if func in _REVERSED or (func in _MINUS and values[0] is not score.tensor):
            return replace(score, problem="are subtracted from something")
        added = tuple(value for value in others if isinstance(value, Tensor) and not value.requires_grad and value.ndim)
        return replace(score, added=(*score.added, *added))
    if func in _CONCATENATE or (func in _SAME and result.shape[-2:] == score.tensor.shape[-2:]):
        return score
    return replace(score, problem=score.problem or f"pass through {getattr(func, '__name__', func)}")


def _shape(value: object) -> object:
    return tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__


def _finish(score: Score, args: tuple[Any, ...], kwargs: dict[str, Any]) -> WrittenOut:
    logits = score.tensor.detach()
    keys = score.k.shape[-2]
    dimension = kwargs.get("dim", args[1] if len(args) > 1 else None)
    problem = score.problem
    if dimension not in (-1, logits.ndim - 1) or logits.shape[-2] != score.q.shape[-2] or logits.shape[-1] < keys:
        problem = problem or f"of shape {tuple(logits.shape)} meet a softmax over dimension {dimension}"
    logits = logits[..., :keys]  # what stands behind is a sink
    allowed = logits > max(torch.finfo(logits.dtype).min / 2, _FILLED)
    for added in score.added:
        allowed = allowed & ~is_masked(added[..., :keys] if added.shape[-1] > 1 else added)
    return WrittenOut(score.q, score.k, score.scale, allowed | logits.isnan(), problem, score.place)

"""Attention written out: a product of queries and keys that reaches a softmax.

    softmax(scale · q kᵀ + bias, masked)            logits S = scale · q_i · k_j, over the pairs that are not masked

`ScoreTracker` follows the product through what happens to it before the softmax. A number that multiplies it belongs to
the scale; those around a soft cap c·tanh(S/c) undo each other. What is added is a bias or a mask and does not. Which
pairs are masked is read from what is filled in or added, where that happens, and from −inf in the result.
"""

from __future__ import annotations

import numbers
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from muonclip.core.attention_mask import is_masked
from muonclip.torch.observe.attention_call import AttentionCall, AttentionKernel
from muonclip.torch.observe.einsum import queries_and_keys
from muonclip.torch.observe.torch_functions import bind, functions


@dataclass(frozen=True, slots=True)
class Score:
    """A tensor on its way to a softmax.

    q [..., Tq, d], k [..., Tk, d]. `scale`: a number, or a tensor [] that the host need not read. `forbidden`: bool,
    broadcastable to the tensor, the pairs that were masked so far. `problem`: what was not understood on the way.
    `place`: where the product was made, by the tracker's `place`.
    """

    tensor: Tensor
    q: Tensor
    k: Tensor
    scale: float | Tensor = 1.0
    forbidden: Tensor | None = None
    problem: str = ""
    place: object = None


KERNEL = AttentionKernel(
    "product and softmax",
    if_unobserved=(
        " This attention is written out as a product and a softmax, which cannot be followed in code that "
        "torch.compile made: let it call scaled_dot_product_attention or muonclip.torch.attention."
    ),
)

_BATCHED = functions("baddbmm")
_PRODUCTS = functions("matmul", "bmm", "__matmul__") | _BATCHED
_TIMES = functions("mul", "mul_", "multiply", "__mul__", "__rmul__", "__imul__")
_OVER = functions("div", "div_", "divide", "true_divide", "__truediv__", "__itruediv__")
_REVERSED = functions("__rsub__", "rsub")
_MINUS = _REVERSED | functions("sub", "sub_", "__sub__", "__isub__")
_PLUS = _MINUS | functions("add", "add_", "__add__", "__radd__", "__iadd__")
_FILL = functions("masked_fill", "masked_fill_")
_WHERE = functions("where")
_SAME = functions(
    "to", "float", "half", "bfloat16", "double", "type", "type_as", "contiguous", "clone", "max", "maximum", "clamp",
    "clamp_min", "nan_to_num", "view", "reshape", "unflatten", "squeeze", "unsqueeze", "flatten", "tanh", "tanh_",
)  # fmt: skip
_SOFTMAX = functions("softmax", "log_softmax") | {torch.special.softmax, torch.special.log_softmax}
_LINEAR = {F.linear, F.conv1d, F.conv2d, F.conv3d}
_EXTREMES = functions("max", "min")
_CONCATENATE = functions("cat", "concat")


class ScoreTracker(TorchFunctionMode):
    """Calls `on_attention` for every attention that is written out while it is entered."""

    def __init__(self, on_attention: Callable[[AttentionCall], object]) -> None:
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

    def follow(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        """Record what became of a score, or a new one."""
        if func in _PRODUCTS or func is torch.einsum:
            score = _einsum(args, result) if func is torch.einsum else _product(func, bind(func, args, kwargs), result)
            if score is not None:
                self._scores[id(result)] = replace(score, place=self.place())
            return
        values = [*args, *kwargs.values()]
        if func in _CONCATENATE:
            values += bind(func, args, kwargs)["tensors"]
        scores = [self._scores[id(v)] for v in values if isinstance(v, Tensor) and id(v) in self._scores]
        if not scores:
            return
        arguments = bind(func, args, kwargs)
        score = min(scores, key=lambda each: bool(each.problem))  # a relative bias is a product that was rearranged
        if func in _PLUS and len(scores) == 2 and not any(each.problem for each in scores):
            score = replace(score, problem="are a sum of two products")
        if func is Tensor.__setitem__:
            self._scores[id(score.tensor)] = _overwritten(score, arguments)
        elif func in _SOFTMAX:
            self.on_attention(_finish(score, arguments.get("dim")))
            self._scores.clear()
        elif func not in _LINEAR:  # behind which it is not a score any more
            result = result[0] if func in _EXTREMES and isinstance(result, tuple) else result  # without its indices
            if isinstance(result, Tensor):
                self._scores[id(result)] = replace(_after(func, arguments, score, scores, result), tensor=result)


def _product(func: Any, arguments: Mapping[str, Any], result: Tensor) -> Score | None:
    first, second = ("batch1", "batch2") if func in _BATCHED else ("input", "mat2" if "mat2" in arguments else "other")
    a, b = arguments[first], arguments[second]
    if not (isinstance(a, Tensor) and isinstance(b, Tensor) and min(a.ndim, b.ndim) >= 3):
        return None
    score = Score(result, a, b.mT)
    if func in _BATCHED:
        score = replace(score, scale=float(arguments.get("alpha", 1.0)))
        if arguments.get("beta", 1) != 0:
            score = _forbid(score, is_masked(arguments["input"].detach() * arguments.get("beta", 1)))
    return score


def _einsum(args: tuple[Any, ...], result: Tensor) -> Score | None:
    found = queries_and_keys(args)
    return None if found is None else Score(result, found[0], found[1], problem=found[2])


def _after(func: Any, arguments: Mapping[str, Any], score: Score, scores: list[Score], result: Tensor) -> Score:
    """Return the score that `result` is."""
    if func in _TIMES or func in _OVER:
        return _scaled(func, arguments, score)
    if func in _PLUS:
        return _shifted(func, arguments, score, scores)
    if func in _FILL and arguments["input"] is score.tensor:
        return _forbid(score, _where_masked(arguments["mask"].bool(), arguments["value"]))
    if func in _WHERE and len(arguments) == 3 and arguments["condition"] is not score.tensor:
        kept, other = arguments["condition"], arguments["other"]
        if other is score.tensor:
            kept, other = ~kept, arguments["input"]
        return _forbid(score, _where_masked(~kept, other))
    if func in _CONCATENATE:
        return score
    if func in _SAME and result.shape[-2:] == score.tensor.shape[-2:]:
        return _reshaped(score, result)
    return replace(score, problem=score.problem or f"pass through {getattr(func, '__name__', func)}")


def _scaled(func: Any, arguments: Mapping[str, Any], score: Score) -> Score:
    factor = arguments["other"]
    if factor is score.tensor:
        factor = arguments["input"]
        if func in _OVER or factor is score.tensor:
            what = "are multiplied by themselves" if func in _TIMES else "divide something"
            return replace(score, problem=score.problem or what)
    if isinstance(factor, Tensor) and factor.numel() == 1:
        factor = factor.detach().reshape(())
    elif isinstance(factor, Tensor) and factor.shape[-2:].numel() == 1 and func in _TIMES:
        return replace(score, q=score.q * factor)
    elif not isinstance(factor, numbers.Real):
        shape = tuple(factor.shape) if isinstance(factor, Tensor) else type(factor).__name__
        return replace(score, problem=score.problem or f"are multiplied by a tensor of shape {shape}")
    return replace(score, scale=score.scale * factor if func in _TIMES else score.scale / factor)


def _shifted(func: Any, arguments: Mapping[str, Any], score: Score, scores: list[Score]) -> Score:
    is_first = arguments["input"] is score.tensor
    if func in _REVERSED or (func in _MINUS and not is_first):
        return replace(score, problem=score.problem or "are subtracted from something")
    added, alpha = arguments["other" if is_first else "input"], arguments.get("alpha", 1)
    if not is_first:
        score, alpha = replace(score, scale=score.scale * alpha), 1
    if not isinstance(added, Tensor) or not added.ndim or any(added is each.tensor for each in scores):
        return score  # a maximum or a relative bias is made of scores itself, and masks nothing
    alpha = -alpha if func in _MINUS else alpha
    return _forbid(score, is_masked(added.detach() if alpha == 1 else added.detach() * alpha))


def _overwritten(score: Score, arguments: Mapping[str, Any]) -> Score:
    value = arguments["value"]
    if arguments["input"] is not score.tensor or not (isinstance(value, Tensor) or is_masked(value)):
        return score
    forbidden = torch.zeros(score.tensor.shape, dtype=torch.bool, device=score.tensor.device)
    forbidden[arguments["index"]] = is_masked(value)
    return _forbid(score, forbidden)


def _where_masked(chosen: Tensor, value: Any) -> Tensor | bool:
    """Return where `value` replaces a logit and forbids the pair."""
    masked = is_masked(value.detach() if isinstance(value, Tensor) else value)
    return chosen & masked if isinstance(masked, Tensor) else masked and chosen


def _forbid(score: Score, pairs: Any) -> Score:
    if not isinstance(pairs, Tensor):
        return score
    return replace(score, forbidden=pairs if score.forbidden is None else score.forbidden | pairs)


def _reshaped(score: Score, result: Tensor) -> Score:
    if score.forbidden is None or result.shape == score.tensor.shape:
        return score
    return replace(score, forbidden=score.forbidden.expand(score.tensor.shape).reshape(result.shape))


def _finish(score: Score, dimension: int | None) -> AttentionCall:
    logits = score.tensor.detach()
    keys = score.k.shape[-2]
    problem = score.problem
    if dimension not in (-1, logits.ndim - 1) or logits.shape[-2] != score.q.shape[-2] or logits.shape[-1] < keys:
        problem = problem or f"of shape {tuple(logits.shape)} meet a softmax over dimension {dimension}"
    allowed = logits[..., :keys] != -torch.inf  # columns after the keys are a sink
    if score.forbidden is not None and not problem:
        allowed = allowed & ~score.forbidden[..., :keys]
    return AttentionCall(
        KERNEL, _nothing, score.q, score.k, None, score.scale, attn_mask=allowed, problem=problem, place=score.place
    )


def _nothing() -> None:
    """Run what is left of an attention that was found at its softmax."""

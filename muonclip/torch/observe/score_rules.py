"""Rules of what functions of torch do to a score: which of them make one, and what each leaves of it.

A number that multiplies a score belongs to its scale; those around a soft cap c·tanh(S/c) undo each other. What is
added is a bias or a mask and does not. Which pairs are masked is read from what is filled in or added, where that
happens, and from −inf in the result. A function without a rule here is a problem of the score.
"""

from __future__ import annotations

import functools
import numbers
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from muonclip.core.attention_mask import replaces
from muonclip.torch.logits import is_masked
from muonclip.torch.observe.einsum import queries_and_keys
from muonclip.torch.observe.score import Block, Pairs, Score, joined, summed
from muonclip.torch.observe.torch_functions import LIKE, bind, functions, name_of


class Use(NamedTuple):
    """A call of a function with a score. `tracked`: its arguments that are scores; `tensor` and `score` are one."""

    function: Any
    arguments: Mapping[str, Any]
    tensor: Tensor
    score: Score
    tracked: Sequence[tuple[Tensor, Score]]
    result: Tensor


_BATCHED = functions("baddbmm", "baddbmm_")
_PRODUCTS = functions("matmul", "bmm", "__matmul__") | _BATCHED
TIMES = functions("mul", "mul_", "multiply", "multiply_", "__mul__", "__rmul__", "__imul__")
"""Functions that multiply."""
OVER = functions("div", "div_", "divide", "divide_", "true_divide", "true_divide_", "__truediv__", "__itruediv__")
"""Functions that divide."""
_REVERSED = functions("__rsub__", "rsub")
_MINUS = _REVERSED | functions("sub", "sub_", "subtract", "subtract_", "__sub__", "__isub__")
_PLUS = _MINUS | functions("add", "add_", "__add__", "__radd__", "__iadd__")
_FILL = functions("masked_fill", "masked_fill_")
_WHERE = functions("where")
_SAME = functions(
    "to", "float", "half", "bfloat16", "double", "type", "type_as", "contiguous", "clone", "max", "maximum", "clamp",
    "clamp_", "clamp_min", "clamp_min_", "nan_to_num", "nan_to_num_", "tanh", "tanh_", "requires_grad_",
)  # fmt: skip
_VIEWS = functions("view", "reshape", "unflatten", "squeeze", "unsqueeze", "flatten", "view_as", "reshape_as")
_SOFTMAX = functions("softmax", "log_softmax") | {torch.special.softmax, torch.special.log_softmax}
_LINEAR = {F.linear, F.conv1d, F.conv2d, F.conv3d}
_CONCATENATE = functions("cat", "concat", "concatenate")
_INDEX = functions("__getitem__", "select", "narrow")
_DIVIDE = functions("chunk", "split", "tensor_split", "split_with_sizes", "unbind")

PRODUCTS = _PRODUCTS | {torch.einsum}
"""Functions that make a score."""
SOFTMAX = _SOFTMAX
"""Functions that end it."""
MIXTURES = PRODUCTS | _LINEAR
"""Functions that multiply a score by a matrix, where they do not make a new one."""
OTHERS = LIKE
"""Functions whose result has only the shape of a score."""
OF_THE_FIRST = functions("to", "type_as", "view_as", "reshape_as", "expand_as")
"""Functions whose result is their first argument, a mask perhaps, in the dtype or the shape of another one."""


def product(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Tensor, made_in: object) -> Score | None:
    """Return the score that a product is; None where it cannot be one of queries and keys. `made_in`: of the score."""
    if func is torch.einsum:
        found = queries_and_keys(args)
        if found is None:
            return None
        queries, keys, problem = found
        return Score((Block(queries, keys, Pairs(result.shape)),), made_in, problem=problem)
    arguments = bind(func, args, kwargs)
    first, second = ("batch1", "batch2") if func in _BATCHED else ("input", "mat2" if "mat2" in arguments else "other")
    a, b = arguments[first], arguments[second]
    if not (isinstance(a, Tensor) and isinstance(b, Tensor) and min(a.ndim, b.ndim) >= 3):
        return None
    if func not in _BATCHED:
        return Score((Block(a, b.mT, Pairs(result.shape)),), made_in)
    alpha, beta = float(arguments.get("alpha", 1.0)), arguments.get("beta", 1)
    score = Score((Block(a, b.mT, Pairs(result.shape), alpha),), made_in)
    if beta == 0:
        return score
    if arguments["input"] is result:
        return score.with_problem("are added to another tensor in place")
    return score.forbid(is_masked(arguments["input"].detach() * beta))


def after(use: Use) -> Score:
    """Return the score that the result of a function is."""
    stays = use.function in _BY_ELEMENT and use.result.shape == use.tensor.shape
    if use.score.away and not stays and use.function not in _VIEWS:
        return use.score.rearranged(f"pass through {use.score.away[1]}")
    score = _RULES.get(use.function, _unknown)(use)
    if score.part is use.score.part is not None and use.result.shape != use.tensor.shape:
        return replace(score, part=None)
    return score


def mixed(func: Any, score: Score) -> Score:
    """Return the score of heads that a function has mixed by a matrix."""
    return replace(score.rearranged(f"pass through {name_of(func)}"), mixed=True)


def divided(use: Use, results: Sequence[Any]) -> list[Score]:
    """Return the scores that the tensors are which a function has made of one."""
    name = name_of(use.function)
    if use.function not in _DIVIDE or not use.tensor.ndim:
        return [use.score.rearranged(f"pass through {name}") for _ in results]
    axis, start, scores = use.arguments.get("dim", 0) % use.tensor.ndim, 0, []
    for number, result in enumerate(results):
        index = number
        if result.ndim == use.tensor.ndim:
            index = slice(start, start + result.shape[axis])
            start = index.stop
        scores.append(use.score.at(use.tensor, (*[slice(None)] * axis, index), name))
    return scores


def overwritten(use: Use, target: Score) -> Score:
    """Return the score that `target[index] = value` leaves of a score."""
    tensor, index, value = use.arguments["input"], use.arguments["index"], use.arguments["value"]
    tracked = next((score for each, score in use.tracked if each is value), None)
    if tracked is not None:
        if not tracked.is_of(tensor, index):
            return target.with_problem("are changed in part")
        return tracked.put_back(tensor, index, target)
    forbids = replaces(value.detach() if isinstance(value, Tensor) else value)
    if forbids is False:
        return target
    forbidden = torch.zeros(tensor.shape, dtype=torch.bool, device=tensor.device)
    forbidden[index] = forbids
    return target.forbid(forbidden)


def _multiplied(use: Use) -> Score:
    score, factor, times = use.score, use.arguments["other"], use.function in TIMES
    if factor is use.tensor:
        factor = use.arguments["input"]
        if not times or factor is use.tensor:
            return score.with_problem("are multiplied by themselves" if times else "divide something")
    if isinstance(factor, Tensor) and factor.numel() == 1:
        factor = factor.detach().reshape(())
    elif isinstance(factor, Tensor):
        if any(tensor is factor for tensor, _ in use.tracked) or use.result.shape != use.tensor.shape:
            return score.with_problem(f"are multiplied by a tensor of shape {tuple(factor.shape)}")
        if factor.shape[-1] == 1 and not score.away:  # of each head or query
            return score.with_queries_rescaled(lambda q: q * factor if times else q / factor, use.tensor.shape)
        return replace(score, by_pair=True)
    elif not isinstance(factor, numbers.Real):
        return score.with_problem(f"are multiplied by a {type(factor).__name__}")
    return score.rescaled(lambda scale: scale * factor if times else scale / factor)


def _shifted(use: Use) -> Score:
    func, arguments, score = use.function, use.arguments, use.score
    is_first = arguments["input"] is use.tensor
    if func in _REVERSED or (func in _MINUS and not is_first):
        return score.with_problem("are subtracted from something")
    added, alpha = arguments["other" if is_first else "input"], arguments.get("alpha", 1)
    if not is_first:
        score = score.rescaled(functools.partial(operator.mul, alpha)) if alpha != 1 else score
        alpha = 1
    alpha = -alpha if func in _MINUS else alpha
    other = next((each for tensor, each in use.tracked if tensor is added), None)
    if other is not None:
        return _added(
            use, score, added, other if alpha == 1 else other.rescaled(functools.partial(operator.mul, alpha))
        )
    if added is use.result:
        return score.with_problem("are added to another tensor in place")
    if not isinstance(added, Tensor) or not added.ndim:
        return score
    return score.forbid(is_masked(added.detach() if alpha == 1 else added.detach() * alpha))


def _added(use: Use, score: Score, added: Tensor, other: Score) -> Score:
    """Return the sum of a score and another one, which masks nothing."""
    if use.tensor.shape != use.result.shape == added.shape and not other.problem:
        score, other, added = other, score, use.tensor
    if not score.problem and not other.problem and added.shape == use.result.shape:
        return summed(score, other) or score.with_problem("are a sum of two products")
    same_pairs = score.blocks[0].pairs is other.blocks[0].pairs
    if same_pairs and added.shape == use.tensor.shape and added.shape[-1:] > (1,):
        return score.with_problem("are added to themselves, rearranged")
    if added.shape[-1:] in ((), (1,)):
        return score  # a maximum
    # A relative bias, which is a product that was rearranged
    return replace(score, terms=(*score.terms, *other.blocks, *other.terms))


def _filled(use: Use) -> Score:
    if use.arguments["input"] is not use.tensor:
        return _unknown(use)
    return use.score.forbid(_where_masked(use.arguments["mask"].bool(), use.arguments["value"]))


def _chosen(use: Use) -> Score:
    arguments = use.arguments
    if len(arguments) != 3 or arguments["condition"] is use.tensor:
        return _unknown(use)
    kept, other = arguments["condition"], arguments["other"]
    if other is use.tensor:
        kept, other = ~kept, arguments["input"]
    if any(tensor is other for tensor, _ in use.tracked):
        return use.score.with_problem("are chosen from two products")
    return use.score.forbid(_where_masked(~kept, other))


def _where_masked(chosen: Tensor, value: Any) -> Tensor | bool:
    """Return where `value` replaces a logit and forbids the pair."""
    forbids = replaces(value.detach() if isinstance(value, Tensor) else value)
    return chosen & forbids if isinstance(forbids, Tensor) else forbids and chosen


def _joined(use: Use) -> Score:
    known = {id(tensor): score for tensor, score in use.tracked}
    parts = [(tensor, known.get(id(tensor))) for tensor in use.arguments["tensors"]]
    return joined(parts, use.arguments.get("dim", 0), use.result)


def _taken(use: Use) -> Score:
    arguments, name = use.arguments, name_of(use.function)
    if "index" in arguments and "dim" not in arguments:
        index = arguments["index"]
        entries = index if isinstance(index, tuple) else (index,)
        if all(each is None or each is Ellipsis or (type(each) is slice and each == slice(None)) for each in entries):
            return _same(use)  # axes are added
        return use.score.at(use.tensor, index, name)
    axis = arguments["dim"] % use.tensor.ndim
    index = arguments["index"] if "index" in arguments else _range(arguments["start"], arguments["length"])
    return use.score.at(use.tensor, (*[slice(None)] * axis, index), name)


def _range(start: Any, length: int) -> Any:
    return slice(start, start + length) if isinstance(start, int) else start


def _same(use: Use) -> Score:
    before, now = use.tensor.shape, use.result.shape
    return use.score.reshaped(before, now) if now[-2:] == before[-2:] else _unknown(use)


def _viewed(use: Use) -> Score:
    before, now = use.tensor.shape, use.result.shape
    if use.score.problem or before.numel() != now.numel():  # as of view(dtype)
        return _unknown(use)
    return use.score.viewed(before, now, name_of(use.function))


def _unknown(use: Use) -> Score:
    return use.score.rearranged(f"pass through {name_of(use.function)}")


_RULES: dict[Any, Callable[[Use], Score]] = {
    function: rule
    for group, rule in (
        (TIMES | OVER, _multiplied),
        (_PLUS, _shifted),
        (_FILL, _filled),
        (_WHERE, _chosen),
        (_CONCATENATE, _joined),
        (_INDEX, _taken),
        (_SAME, _same),
        (_VIEWS, _viewed),
    )
    for function in group
}
_BY_ELEMENT = (TIMES | OVER | _PLUS | _FILL | _WHERE) | functions(
    "to", "float", "half", "bfloat16", "double", "type", "type_as", "contiguous", "clone", "requires_grad_"
)
"""Functions that a score is followed through while its tensor has other axes than queries and keys."""

"""The functions of torch by name, and their arguments by name, however a call gives them.

torch's C functions have no signature that Python could read: the table below has the names of their parameters.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_map

_PARAMETERS: dict[str, str] = {
    **dict.fromkeys(("matmul", "__matmul__", "mul", "mul_", "multiply", "__mul__", "__rmul__", "__imul__"), "other"),
    **dict.fromkeys(("div", "div_", "divide", "true_divide", "__truediv__", "__itruediv__", "rsub"), "other"),
    **dict.fromkeys(("sub", "sub_", "__sub__", "__isub__", "add", "add_", "__add__", "__radd__", "__iadd__"), "other"),
    **dict.fromkeys(("multiply_", "divide_", "true_divide_", "subtract", "subtract_"), "other"),
    **dict.fromkeys(("bmm", "mm"), "mat2"),
    "addmm": "mat1 mat2",
    **dict.fromkeys(("baddbmm", "baddbmm_"), "batch1 batch2"),
    **dict.fromkeys(("masked_fill", "masked_fill_"), "mask value"),
    **dict.fromkeys(("max", "maximum", "min", "minimum"), "other"),
    "where": "condition other",  # as a method; the function has the condition in front
    **dict.fromkeys(("clamp", "clamp_"), "min max"),
    **dict.fromkeys(("clamp_min", "clamp_min_"), "min"),
    **dict.fromkeys(("softmax", "log_softmax", "special_softmax"), "dim dtype"),
    "special_log_softmax": "dim",
    "linear": "weight bias",
    **dict.fromkeys(("conv1d", "conv2d", "conv3d"), "weight bias"),
    "__setitem__": "index value",
    "__getitem__": "index",
    "chunk": "chunks dim",
    "tensor_split": "sections dim",
    "split_with_sizes": "split_sizes dim",
    "unbind": "dim",
    "select": "dim index",
    "narrow": "dim start length",
}  # behind `input`
_OTHERWISE: dict[Callable[..., Any], tuple[str, ...]] = {
    torch.where: ("condition", "input", "other"),
    torch.cat: ("tensors", "dim"),
    torch.concat: ("tensors", "dim"),
    torch.concatenate: ("tensors", "dim"),
    F.bilinear: ("input1", "input2", "weight", "bias"),
    F.scaled_dot_product_attention: ("query", "key", "value", "attn_mask", "dropout_p", "is_causal"),
}
_ALIASES = {
    "self": "input",
    "x": "input",
    "x1": "input",
    "a": "input",
    "tensor": "input",
    "x2": "other",
    "axis": "dim",
}  # NumPy's names


def functions(*names: str) -> set[Callable[..., Any]]:
    """Return the functions and methods of torch by these names."""
    return {getattr(home, name) for home in (torch, Tensor, F) for name in names if callable(getattr(home, name, None))}


def name_of(func: Any) -> str:
    """Return the name of a function, or of the attribute that it reads."""
    name = getattr(func, "__name__", str(func))
    return getattr(func.__self__, "__name__", name) if name == "__get__" else name


def writes(func: Any) -> bool:
    """Tell whether a function changes the tensor that is its first argument."""
    name = getattr(func, "__name__", "")
    return name in _OPERATORS_IN_PLACE or (name.endswith("_") and not name.endswith("__"))


def bind(function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of a call by the names of the parameters; those without a known name by their position."""
    names = _positional_names(function)
    arguments = {names[i] if i < len(names) else str(i): value for i, value in enumerate(args)}
    for name, value in kwargs.items():
        arguments[name if name in names else _ALIASES.get(name, name)] = value
    return arguments


def derivatives_in_place(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Return ones in the place of what a call of `torch.autograd.grad` returns."""
    by = bind(torch.autograd.grad, args, kwargs)["inputs"]
    if isinstance(by, Tensor):
        by = (by,)
    return tree_map(torch.ones_like, by if isinstance(by, dict) else tuple(by))


@functools.cache
def _positional_names(function: Callable[..., Any]) -> tuple[str, ...]:
    if function in _OTHERWISE:
        return _OTHERWISE[function]
    name = getattr(function, "__name__", "")
    if name in _PARAMETERS and not inspect.isfunction(function):
        return ("input", *_PARAMETERS[name].split())
    try:
        parameters = inspect.signature(function).parameters.values()
    except ValueError:
        return ("input",)
    names = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    return tuple(_ALIASES.get(name, name) if position == 0 else name for position, name in enumerate(names))


LIKE = functions("full_like", "zeros_like", "ones_like", "empty_like", "rand_like", "randn_like") | functions(
    "new_full", "new_zeros", "new_ones", "new_empty", "new_tensor"
)
"""Functions whose result has only the shape of their argument."""

_OPERATORS_IN_PLACE = frozenset(
    ("__setitem__", "__iadd__", "__isub__", "__imul__", "__itruediv__", "__ifloordiv__", "__imod__", "__ipow__")
)

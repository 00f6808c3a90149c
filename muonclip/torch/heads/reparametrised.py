"""Weights that became computed from others after their rows were found: the rows of those that they are computed from.

Pruning keeps the parameter as `weight_orig`, torch's parametrizations as `original`; weight norm has the length of each
row in g. Where the computed rows are not proportional to rows of one parameter, scaling that would not clip them.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.nn.utils.parametrizations import _WeightNorm  # pyright: ignore[reportPrivateUsage]
from torch.nn.utils.parametrize import ParametrizationList

from muonclip.core.head_parts import SIDE_OF
from muonclip.torch.heads.head_rows import Axes, HeadRows, axes_of
from muonclip.torch.heads.qk_projection import QKProjection
from muonclip.torch.mesh import is_dtensor


class NotProportional(ValueError):
    """The rows of a weight are not proportional to those of a parameter. `module`, `attribute`: the weight's."""

    def __init__(self, module: nn.Module, attribute: str, why: str) -> None:
        super().__init__(why)
        self.module, self.attribute = module, attribute


def followed(projection: QKProjection) -> QKProjection:
    """Return the projection with the rows of the parameters that its weights are computed from now; itself where none
    is. Raises NotProportional where scaling those would not scale the weights."""
    parts = {part: tuple(new for rows in getattr(projection, part) for new in _followed(rows)) for part in SIDE_OF}
    changed = {part: rows for part, rows in parts.items() if rows != getattr(projection, part)}
    return replace(projection, **changed) if changed else projection


def registered(module: nn.Module, attribute: str) -> nn.Parameter | None:
    """Return the parameter that a module has under a name; None where there is none, or it is computed."""
    parameter = entry(module._parameters, attribute)
    if parameter is not None or attribute in module._parameters:
        return parameter
    forwarded = None if _is_parametrized(module, attribute) else getattr(module, attribute, None)
    return forwarded if isinstance(forwarded, nn.Parameter) else None


def entry(entries: Any, name: str) -> Any:
    """Return an entry of a module's parameters, buffers or modules, which TorchScript has in something like a dict."""
    get = getattr(entries, "get", None)
    return dict(entries.items()).get(name) if get is None else get(name)


def places(module: nn.Module, attribute: str) -> Iterator[tuple[Any, str]]:
    """Yield the dictionaries and keys at which another object is found as soon as a weight comes from somewhere else.

    In a module that forwards the attributes of another one there is no dictionary: something with a `get` is.
    """
    yield module._parameters, attribute
    if attribute in module._parameters:
        return
    yield _Forwarded(module), attribute
    yield from ((module._parameters, f"{attribute}{end}") for end in ("_orig", "_g"))
    yield from ((module._buffers, f"{attribute}{end}") for end in ("_mask", "_u"))
    yield module._modules, "parametrizations"
    if _is_parametrized(module, attribute):
        parametrization = _parametrization(module, attribute)
        yield module.parametrizations._modules, attribute  # pyright: ignore
        yield from ((parametrization._modules, str(index)) for index in range(len(parametrization) + 1))
        yield from ((parametrization._parameters, name) for name in parametrization._parameters)


class _Forwarded:
    """Looks a parameter up among the attributes of a module."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def get(self, attribute: str) -> nn.Parameter | None:
        return registered(self.module, attribute)


def _followed(rows: HeadRows) -> tuple[HeadRows, ...]:
    weight = _home(rows.module, rows.weight, rows.axis)
    bias = None
    if rows.bias and rows.bias not in rows.module._parameters and hasattr(rows.module, rows.bias):
        bias = _home(rows.module, rows.bias, 0)
    elif rows.bias:
        bias = rows.module, rows.bias
    if (weight, bias) in (((rows.module, rows.weight), (rows.module, rows.bias)), ((rows.module, rows.weight), None)):
        return (rows,)
    together = bias is not None and bias[0] is weight[0]
    of_weight = replace(rows, module=weight[0], weight=weight[1], bias=bias[1] if together and bias else "")
    if bias is None or together or getattr(*bias, None) is None:
        return (of_weight,)
    return of_weight, replace(rows, module=bias[0], weight=bias[1], bias="", axis=0)


def _home(module: nn.Module, attribute: str, axis: Axes) -> tuple[nn.Module, str]:
    """Return the module and the name of the parameter whose rows along `axis` scale those of the weight."""
    own = module._parameters
    if registered(module, attribute) is not None:
        return module, attribute
    if _is_parametrized(module, attribute):
        parametrization = _parametrization(module, attribute)
        if len(parametrization) == 1 and isinstance(parametrization[0], _WeightNorm):
            return _rows_of_gain(parametrization, "original0", "original1", axis, module, attribute)
        if not hasattr(parametrization, "original"):
            raise NotProportional(module, attribute, "is computed from several tensors by a parametrization")
        if not _scales_with(parametrization, axis):
            names = ", ".join(type(each).__name__ for each in parametrization)
            raise NotProportional(module, attribute, f"is computed by a parametrization ({names})")
        return parametrization, "original"
    if entry(own, f"{attribute}_g") is not None:
        return _rows_of_gain(module, f"{attribute}_g", f"{attribute}_v", axis, module, attribute)
    is_pruned = entry(own, f"{attribute}_orig") is not None and entry(module._buffers, f"{attribute}_mask") is not None
    if is_pruned:
        return module, f"{attribute}_orig"
    raise NotProportional(module, attribute, "is computed from others, or was removed,")


def _rows_of_gain(
    holder: nn.Module, gain: str, direction: str, axis: Axes, module: nn.Module, attribute: str
) -> tuple[nn.Module, str]:
    g, v = (holder._parameters[name] for name in (gain, direction))
    if g is None or v is None or list(g.shape) != _shape_of_rows(v.shape, axis):
        raise NotProportional(module, attribute, "is computed by a weight norm whose g is not one number for each row")
    return holder, gain


@torch.no_grad()
def _scales_with(parametrization: ParametrizationList, axis: Axes) -> bool:
    """Tell, by doing it, whether the weight's rows are multiplied by what those of the original are multiplied by.

    The factors are powers of two, which commute with rounding, so that bits can be compared.
    """
    if is_dtensor(parametrization.original) or parametrization.original.is_meta:
        return False  # which cannot be tried on one rank
    trial = copy.deepcopy(parametrization).eval()
    with torch.random.fork_rng(devices=[]):
        before = trial()
        if before.shape != trial.original.shape:
            return False
        shape = _shape_of_rows(before.shape, axis)
        row = torch.arange(math.prod(shape), device=before.device)
        factors = 2.0 ** (row % 3 - 1).to(before.dtype).view(shape)
        trial.original.mul_(factors)
        return torch.equal(trial(), before * factors)


def _shape_of_rows(shape: Sequence[int], axis: Axes) -> list[int]:
    """Return the shape of a tensor with one number for each row."""
    return [size if each in axes_of(axis) else 1 for each, size in enumerate(shape)]


def _is_parametrized(module: nn.Module, attribute: str) -> bool:
    parametrizations = entry(module._modules, "parametrizations")
    return isinstance(parametrizations, nn.ModuleDict) and attribute in parametrizations


def _parametrization(module: nn.Module, attribute: str) -> ParametrizationList:
    parametrization = module.parametrizations[attribute]  # pyright: ignore
    assert isinstance(parametrization, ParametrizationList)
    return parametrization

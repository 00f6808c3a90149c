"""The values of an added tensor that forbid their pairs, found without waiting for the device.

`muonclip.core.attention_mask` has the rule. The whole tensor is read for it, by rows, so that no copy of it is made.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from functools import reduce
from importlib.util import find_spec

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from muonclip.core import attention_mask as core
from muonclip.core.attention_mask import MASKED, TWO_VALUED
from muonclip.torch.mesh import is_dtensor

_PART = {"cpu": 2**20}
_PART_ON_DEVICE = 2**26  # values that are read at once


@torch.no_grad()
def highest_masked(added: Tensor) -> Tensor:
    """Return the number at and below which its values forbid their pairs, [] in float32 (float64 for float64), on the
    tensor's device."""
    if is_dtensor(added):
        added = added.to_local()
    added = added.detach() if added.is_floating_point() else added.float()
    dtype = torch.promote_types(added.dtype, torch.float32)
    for axis, stride in enumerate(added.stride()):
        if stride == 0:  # broadcast
            added = added.narrow(axis, 0, min(1, added.shape[axis]))
    has_values = not is_in_torch_dispatch_mode()  # some modes run without
    number = None
    if not added.numel():
        number = MASKED
    elif added.device.type == "cpu" and has_values:
        number = _highest_masked_on_host(added)
    if number is not None:
        return torch.full((), number, dtype=dtype, device=added.device)
    if added.is_cuda and has_values and dtype == torch.float32 and find_spec("triton"):
        from muonclip.torch.logits.kernels.mask_levels import mask_levels

        levels = mask_levels(added)
    else:
        levels = _levels(_parts(added))
    return core.highest_masked(levels, added.dtype, xp=torch).to(dtype)


@torch.no_grad()
def highest_masked_of_parts(parts: Callable[[], Iterable[Tensor]]) -> Tensor:
    """Return the same number for a tensor of floats that nobody has as a whole: `parts()` are it by rows, each with all
    sequences."""
    first = next(iter(parts()))
    dtype = torch.promote_types(first.dtype, torch.float32)
    number = _by_range(parts) if first.device.type == "cpu" and not is_in_torch_dispatch_mode() else None
    if number is not None:
        return torch.full((), number, dtype=dtype)
    return core.highest_masked(_levels(parts()), first.dtype, xp=torch).to(dtype)


def is_masked(added: Tensor) -> Tensor:
    """Tell which values forbid their pair: bool, one by one."""
    return added.detach() <= highest_masked(added)


def _highest_masked_on_host(added: Tensor) -> float | None:
    return _by_range(lambda: _parts(added))


def _by_range(parts: Callable[[], Iterable[Tensor]]) -> float | None:
    """Return the number by a look at the range and, of a mask of two values, one at each; None for other tensors."""
    lowest, highest, shape = math.inf, -math.inf, ()
    for part in parts():
        low, high = (each.item() for each in part.aminmax())
        lowest, highest, shape = _extreme(min, low, lowest), _extreme(max, high, highest), part.shape
    if core.forbids_nothing(lowest, highest):
        return MASKED
    if highest == 0 and lowest <= TWO_VALUED and all(((part == lowest) | (part == 0)).all() for part in parts()):
        return lowest
    return MASKED if core.forbids_as_mask_alone(lowest, shape) else None


def _extreme(choose: Callable[[float, float], float], one: float, other: float) -> float:
    return math.nan if math.isnan(one) or math.isnan(other) else choose(one, other)


def _levels(parts: Iterable[Tensor]) -> list[Tensor]:
    of_parts = zip(*(core.mask_levels(part, xp=torch) for part in parts), strict=True)
    return [reduce(torch.maximum, each) for each in of_parts]


def _parts(added: Tensor) -> tuple[Tensor, ...]:
    """Return the tensor by rows, all axes in front of them whole."""
    if added.ndim < 2:
        return (added,)
    rows = max(1, _PART.get(added.device.type, _PART_ON_DEVICE) * added.shape[-2] // added.numel())
    return added.split(rows, -2) if rows < added.shape[-2] else (added,)

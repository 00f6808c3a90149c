"""Tensors of torchao around a weight, which FSDP2 gathers in float8: the weight inside, and the scale kept for it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from muonclip.torch.mesh.late_types import is_dtensor

_PLAIN = (Tensor, nn.Parameter)
_AROUND = "torchao.float8.fsdp_utils.WeightWithDynamicFloat8CastTensor"
_GATHERED = "torchao.float8.float8_training_tensor.Float8TrainingTensor"


def unwrapped(tensor: Tensor) -> Tensor:
    """Return the plain tensor inside one of torchao's, or the tensor; writing there writes to the weight.

    What was gathered in float8 has none: its values in high precision are returned, which are a copy.
    """
    if type(tensor) in _PLAIN:
        return tensor
    name = _full_name(tensor)
    if name == _AROUND:
        return tensor._tensor  # pyright: ignore[reportAttributeAccessIssue]
    if name == _GATHERED:
        with torch.no_grad():
            return tensor.to_original_precision()  # pyright: ignore[reportAttributeAccessIssue]
    return tensor


def drop_kept_scale(parameter: Tensor) -> None:
    """Forget the scale that `precompute_float8_dynamic_scale_for_fsdp` has kept for a weight that changes now.

    Where none is kept, the next gathering finds it anew, by a collective: call this on all ranks that have a part.
    """
    local = parameter._local_tensor if is_dtensor(parameter) else parameter
    if type(local) not in _PLAIN and _full_name(local) == _AROUND:
        local._precomputed_scale = None  # pyright: ignore[reportAttributeAccessIssue]


def _full_name(value: Any) -> str:
    return f"{type(value).__module__}.{type(value).__qualname__}"

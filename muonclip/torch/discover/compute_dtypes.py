"""The dtypes in which FSDP2 lets a model compute (`MixedPrecisionPolicy`), for the copy that is traced.

Amid a forward the weights of the part that runs are whole and of that dtype, those of the others are shards of their
own. A copy that took both as they are would multiply one by the other; so all of it computes as the model does.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.utils import _apply_to_tensors  # pyright: ignore[reportPrivateUsage]; as FSDP2 casts

from muonclip.torch.mesh import is_dtensor, mixed_precision_of


def compute_dtypes(model: nn.Module) -> dict[int, torch.dtype]:
    """Return the dtypes that sharded parameters have while they are used, by their ids, where FSDP2 casts them."""
    dtypes: dict[int, torch.dtype] = {}

    def read(module: nn.Module, around: torch.dtype | None) -> None:
        policy = mixed_precision_of(module)
        dtype = around if policy is None else policy.param_dtype
        for parameter in module.parameters(recurse=False):
            if dtype is not None and is_dtensor(parameter) and parameter.is_floating_point():
                dtypes.setdefault(id(parameter), dtype)
        for inner in module.children():
            read(inner, dtype)

    read(model, None)
    return dtypes


def cast_as_sharded(model: nn.Module, copied: nn.Module) -> None:
    """Let the parts of a copy cast what they are called with, and what they return, as those of the model do."""
    for name, module in model.named_modules():
        policy = mixed_precision_of(module)
        if policy is None:
            continue
        inner = copied.get_submodule(name)
        if policy.cast_forward_inputs and policy.param_dtype is not None:
            cast = _Cast(policy.param_dtype)
            inner.register_forward_pre_hook(cast.inputs, prepend=True, with_kwargs=True)
        if policy.output_dtype is not None:
            inner.register_forward_hook(_Cast(policy.output_dtype).output)


class _Cast:
    """Hooks that cast floating tensors."""

    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype = dtype

    def inputs(self, module: nn.Module, args: Any, kwargs: Mapping[str, Any]) -> tuple[Any, Any]:
        return self._all(args), self._all(kwargs)

    def output(self, module: nn.Module, args: Any, output: Any) -> Any:
        return self._all(output)

    def _all(self, value: Any) -> Any:
        def cast(each: Tensor) -> Tensor:
            return each.to(self._dtype) if each.is_floating_point() else each

        return _apply_to_tensors(cast, value)

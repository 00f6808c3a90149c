"""Dense tensors and plain modules in place of a sharded model, for the copy that is traced.

Which rows feed which heads does not depend on values. So where a tensor is sharded, random numbers of its global shape,
the same on every rank, replace it, and nothing is gathered.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.distributed._composable.contract import REGISTRY_KEY, STATE_KEY
from torch.distributed.tensor import DTensor, Replicate

_MOST_BYTES = 8 * 2**30


class TooLarge(ValueError):
    """The model cannot be traced because its copy would take too much memory."""


class DenseCopies:
    """Makes dense tensors in place of DTensors, for one traced forward."""

    def __init__(self) -> None:
        self._generators: dict[torch.device, torch.Generator] = {}

    def dense(self, tensor: DTensor) -> Tensor:
        """Return this rank's part, if that is the whole; else random numbers N(0, 1/fan_in), or about 1 for vectors."""
        with torch.no_grad():
            if all(isinstance(placement, Replicate) for placement in tensor.placements):
                return tensor.to_local()
            shape = tuple(tensor.shape)
            options: dict[str, Any] = dict(dtype=tensor.dtype, device=tensor.device)
            if tensor.is_meta or not tensor.is_floating_point():
                return torch.zeros(shape, **options)
            if tensor.device not in self._generators:
                self._generators[tensor.device] = torch.Generator(tensor.device).manual_seed(0)
            generator = self._generators[tensor.device]
            if len(shape) < 2:
                return torch.rand(shape, generator=generator, **options) + 0.5
            return torch.randn(shape, generator=generator, **options) / math.sqrt(max(1, math.prod(shape[1:])))


def check_size(parameters: Iterable[Tensor]) -> None:
    """Raise TooLarge where the dense copies of these parameters would take more than 8 GiB."""
    size = sum(p.numel() * p.itemsize for p in parameters if isinstance(p, DTensor) and not p.is_meta)
    if size > _MOST_BYTES:
        raise TooLarge(
            "QK-Clip finds the attention of a model by running a whole copy of it, but this one is sharded and its "
            f"parameters take {size / 2**30:.1f} GiB. Build the clip before it is sharded, clip = QKClip(model), and "
            "pass it as MuonClip(model, qk_clip=clip); or declare the attentions, "
            "QKClip(model, declare={name: QKProjection…})."
        )


def without_engine(state: Mapping[str, Any]) -> dict[str, Any]:
    """Return the attributes of a module without what torch.distributed has put there, and without foreign hooks."""
    kept = {name: value for name, value in state.items() if name not in (STATE_KEY, REGISTRY_KEY)}
    for name in ("_forward_pre_hooks", "_forward_hooks"):
        hooks = kept.get(name)
        if hooks:
            kept[name] = type(hooks)((key, hook) for key, hook in hooks.items() if is_torchs_own(hook))
    return kept


def is_torchs_own(hook: Any) -> bool:
    """Tell whether a hook is part of a module, as that of weight norm is."""
    home = str(getattr(hook, "__module__", type(hook).__module__))
    return home.startswith("torch.") and not home.startswith("torch.distributed.")

"""Dense tensors and plain modules in place of a sharded model, for the copy that is traced.

Where a tensor is sharded, random numbers of its global shape, the same on every rank, replace it, and nothing is
gathered. For matrices `stand_ins.py` finds room.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from muonclip.torch.mesh import imported, is_dtensor, is_replicate, local_part

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


class DenseCopies:
    """Makes dense tensors in place of DTensors, for one traced forward. `dtypes`: of some of them, by id, instead of
    their own."""

    def __init__(self, dtypes: Mapping[int, torch.dtype] | None = None) -> None:
        self._dtypes = dtypes or {}
        self._generators: dict[torch.device, torch.Generator] = {}

    def dense(self, tensor: DTensor) -> Tensor:
        """Return this rank's part, if that is the whole; else random numbers N(0, 1/fan_in), or about 1 for vectors."""
        with torch.no_grad():
            if is_whole(tensor):
                return local_part(tensor).to(self._dtype_of(tensor))
            shape = tuple(tensor.shape)
            if tensor.is_meta or not tensor.is_floating_point():
                return torch.zeros(shape, dtype=self._dtype_of(tensor), device=tensor.device)
            if len(shape) < 2:
                return self.random(shape, tensor, torch.rand) + 0.5
            return self.random(shape, tensor) / math.sqrt(max(1, math.prod(shape[1:])))

    def random(self, shape: tuple[int, ...], like: Tensor, draw: Any = torch.randn) -> Tensor:
        """Draw numbers of the dtype that a tensor's copy has, on its device."""
        if like.device not in self._generators:
            self._generators[like.device] = torch.Generator(like.device).manual_seed(0)
        return draw(shape, generator=self._generators[like.device], dtype=self._dtype_of(like), device=like.device)

    def _dtype_of(self, tensor: Tensor) -> torch.dtype:
        return self._dtypes.get(id(tensor), tensor.dtype)


def is_whole(tensor: Tensor) -> bool:
    """Tell whether this rank has all of a tensor."""
    return not is_dtensor(tensor) or all(is_replicate(each) for each in tensor.placements)


def without_engine(state: Mapping[str, Any]) -> dict[str, Any]:
    """Return the attributes of a module without what torch.distributed has put there, and without foreign hooks."""
    contract = "torch.distributed._composable.contract"
    engines = {imported(contract, name) for name in ("STATE_KEY", "REGISTRY_KEY")}
    kept = {name: value for name, value in state.items() if name not in engines}
    for name in ("_forward_pre_hooks", "_forward_hooks"):
        hooks = kept.get(name)
        if hooks:
            kept[name] = type(hooks)((key, hook) for key, hook in hooks.items() if is_torchs_own(hook))
    return kept


def is_torchs_own(hook: Any) -> bool:
    """Tell whether a hook is part of a module, as that of weight norm is."""
    home = str(getattr(hook, "__module__", type(hook).__module__))
    return home.startswith("torch.") and not home.startswith("torch.distributed.")

"""Wrappers that torch puts around a model or a class: DistributedDataParallel, torch.compile, FSDP2."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from muonclip.torch.mesh.late_types import imported, is_compiled_module, is_fsdp_module

if TYPE_CHECKING:
    from torch.distributed.fsdp import MixedPrecisionPolicy

_WRAPPERS = frozenset(("module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"))


def unwrap(model: nn.Module) -> tuple[nn.Module, DistributedDataParallel | None]:
    """Return the module inside what torch wraps around a whole model, and the DistributedDataParallel, if any."""
    replicated: DistributedDataParallel | None = None
    while isinstance(model, DistributedDataParallel) or is_compiled_module(model):
        if isinstance(model, DistributedDataParallel):
            replicated, model = model, model.module
        else:
            model = model._orig_mod
    return model, replicated


def plain_name(name: str) -> str:
    """Return a parameter's name without what wrappers put into it (DistributedDataParallel, torch.compile)."""
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def running_ddp() -> DistributedDataParallel | None:
    """Return the DistributedDataParallel whose forward is running."""
    active = DistributedDataParallel._active_ddp_module
    return active if isinstance(active, DistributedDataParallel) else None


def replicas_of(ddp: DistributedDataParallel | None) -> dist.ProcessGroup | None:
    """Return the process group of the replicas of a model."""
    group = None if ddp is None else ddp.process_group
    return group if isinstance(group, dist.ProcessGroup) else None


def plain_class(module: nn.Module) -> type[nn.Module]:
    """Return the class of a module; FSDP2 puts its own in front of it."""
    sharded = imported("torch.distributed.fsdp", "FSDPModule")
    return next(each for each in type(module).__mro__ if sharded is None or not issubclass(each, sharded))


def mixed_precision_of(module: nn.Module) -> MixedPrecisionPolicy | None:
    """Return the policy by which a module was sharded by `fully_shard`; None for any other module."""
    return module._get_fsdp_state()._mp_policy if is_fsdp_module(module) else None

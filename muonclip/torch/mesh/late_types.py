"""Classes of torch that take longer to import than torch itself, recognised without importing them.

Where nobody has imported the module of a class, no object of this class exists.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

if TYPE_CHECKING:
    from torch._dynamo.eval_frame import OptimizedModule
    from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor.placement_types import Partial, Replicate, Shard, _StridedShard
    from torch.nn.attention.flex_attention import BlockMask
    from typing_extensions import TypeIs

_PLAIN = (Tensor, nn.Parameter)


def is_dtensor(value: object) -> TypeIs[DTensor]:
    """Tell whether a value is a DTensor."""
    if type(value) in _PLAIN or "torch.distributed.tensor" not in sys.modules:
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(value, DTensor)


def is_shard(placement: object) -> TypeIs[Shard | _StridedShard]:
    """Tell whether a placement of a DTensor divides an axis."""
    return _is_a(placement, "torch.distributed.tensor.placement_types", "Shard", "_StridedShard")


def is_strided_shard(placement: object) -> TypeIs[_StridedShard]:
    """Tell whether a placement of a DTensor divides an axis that another mesh dimension divides further."""
    return _is_a(placement, "torch.distributed.tensor.placement_types", "_StridedShard")


def is_replicate(placement: object) -> TypeIs[Replicate]:
    """Tell whether a placement of a DTensor leaves all of it on each rank."""
    return _is_a(placement, "torch.distributed.tensor.placement_types", "Replicate")


def is_partial(placement: object) -> TypeIs[Partial]:
    """Tell whether a placement of a DTensor leaves a sum to be taken."""
    return _is_a(placement, "torch.distributed.tensor.placement_types", "Partial")


def is_fsdp_module(module: object) -> TypeIs[FSDPModule]:
    """Tell whether a module is sharded by `fully_shard` (FSDP2)."""
    return _is_a(module, "torch.distributed.fsdp", "FSDPModule")


def is_fsdp1_module(module: object) -> TypeIs[FullyShardedDataParallel]:
    """Tell whether a module is wrapped in FullyShardedDataParallel (FSDP1)."""
    return _is_a(module, "torch.distributed.fsdp", "FullyShardedDataParallel")


def is_compiled_module(module: object) -> TypeIs[OptimizedModule]:
    """Tell whether a module is what `torch.compile` has returned for another one."""
    return _is_a(module, "torch._dynamo.eval_frame", "OptimizedModule")


def is_block_mask(mask: object) -> TypeIs[BlockMask]:
    """Tell whether a mask is a BlockMask of FlexAttention."""
    return not isinstance(mask, Tensor) and _is_a(mask, "torch.nn.attention.flex_attention", "BlockMask")


def is_device_context(mode: object) -> bool:
    """Tell whether a mode is the one that `torch.set_default_device` or `with torch.device(…)` has put there."""
    return _is_a(mode, "torch.utils._device", "DeviceContext")


def imported(module: str, name: str) -> Any:
    """Return what a module has by a name; None where nobody has imported it, or not to this line yet."""
    return getattr(sys.modules.get(module), name, None)


def _is_a(value: object, module: str, *names: str) -> bool:
    classes = [each for each in (imported(module, name) for name in names) if each is not None]
    return isinstance(value, tuple(classes))

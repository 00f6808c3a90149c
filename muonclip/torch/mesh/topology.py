"""On which ranks the parameters of an optimizer lie: read from their DTensors and from DistributedDataParallel."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._dynamo.eval_frame import OptimizedModule
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.placement_types import Partial, Placement, Replicate
from torch.nn.parallel import DistributedDataParallel
from torch.utils.hooks import RemovableHandle
from torch.utils.weak import WeakTensorKeyDictionary

from muonclip.torch.mesh.process_groups import group_over
from muonclip.torch.update.plan import Bucket, Mesh


class Place:
    """This rank's place in a mesh, and the process groups through it. `group`: of a mesh of one dimension, such as the
    replicas of DistributedDataParallel. Neither: this rank alone."""

    def __init__(self, mesh: DeviceMesh | None = None, group: dist.ProcessGroup | None = None) -> None:
        self._device_mesh, self._group = mesh, group
        if mesh is not None:
            coordinate = mesh.get_coordinate()
            if coordinate is None:
                raise ValueError(f"this rank is not in {mesh}, on which a parameter lies.")
            self.mesh = Mesh(tuple(mesh.shape), tuple(mesh.mesh.flatten().tolist()), tuple(mesh.mesh_dim_names or ()))
            self.coordinate = tuple(coordinate)
        elif group is not None:
            ranks = tuple(dist.get_process_group_ranks(group))
            self.mesh, self.coordinate = Mesh((len(ranks),), ranks, ("replicas",)), (dist.get_rank(group),)
        else:
            rank = dist.get_rank() if dist.is_available() and dist.is_initialized() else 0
            self.mesh, self.coordinate = Mesh(ranks=(rank,)), (0,)

    def group(self, dims: Sequence[int]) -> dist.ProcessGroup | None:
        """The ranks along these dimensions; None where there is only this one."""
        if self._device_mesh is not None:
            return group_over(self._device_mesh, dims)
        return self._group if dims else None

    def index(self, dims: Sequence[int]) -> int:
        """The number of this rank among those."""
        index = 0
        for dim in dims:
            index = index * self.mesh.shape[dim] + self.coordinate[dim]
        return index

    def has(self, bucket: Bucket) -> bool:
        """Whether this rank has a part of its matrices."""
        return bucket.mesh == self.mesh and all(self.coordinate[dim] == at for dim, at in bucket.fixed)


class Topology:
    """The places of parameters. What is neither a DTensor nor known to be replicated is this rank's alone: an expert of
    its own, a stage of a pipeline."""

    def __init__(self) -> None:
        self._alone: Place | None = None
        self._places: dict[DeviceMesh | dist.ProcessGroup, Place] = {}
        self._replicated = WeakTensorKeyDictionary()  # parameter → process group

    def replicated_by(self, module: DistributedDataParallel) -> None:
        """Its parameters have the same gradients on all ranks of its process group."""
        group = module.process_group
        if not isinstance(group, dist.ProcessGroup) or group.size() == 1:
            return
        for name, parameter in module.module.named_parameters():
            if name not in module.parameters_to_ignore and not isinstance(parameter, DTensor):
                self._replicated[parameter] = group

    def watch(self, model: nn.Module) -> None:
        """Find out, at its forwards, whether the model runs inside DistributedDataParallel."""
        while isinstance(model, OptimizedModule):
            model = model._orig_mod
        if isinstance(model, DistributedDataParallel):
            self.replicated_by(model)
        elif dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            look = _LookAround(self)
            look.handle = model.register_forward_pre_hook(look)

    def of(self, parameter: Tensor) -> Place:
        key = parameter.device_mesh if isinstance(parameter, DTensor) else self._replicated.get(parameter)
        if key is None:
            self._alone = self._alone or Place()
            return self._alone
        if key not in self._places:
            self._places[key] = Place(key) if isinstance(key, DeviceMesh) else Place(group=key)
        return self._places[key]

    def placements(self, parameter: Tensor) -> tuple[Placement, ...]:
        if isinstance(parameter, DTensor):
            return tuple(parameter.placements)
        return (Replicate(),)

    def by_mesh(self) -> dict[Mesh, Place]:
        places = [*self._places.values(), *([] if self._alone is None else [self._alone])]
        return {place.mesh: place for place in places}


class _LookAround:
    """A hook that stays until a forward inside DistributedDataParallel; on copies of the model it does nothing."""

    handle: RemovableHandle | None = None

    def __init__(self, topology: Topology | None = None) -> None:
        self._topology = None if topology is None else weakref.ref(topology)

    def __call__(self, module: nn.Module, args: Any) -> None:
        topology = None if self._topology is None or torch.compiler.is_compiling() else self._topology()
        replica = running_replica()
        if topology is not None and self.handle is not None and replica is not None:
            topology.replicated_by(replica)
            self.handle.remove()

    def __deepcopy__(self, memo: object) -> _LookAround:
        return _LookAround()

    def __reduce__(self) -> tuple[Any, ...]:
        return (_LookAround, ())


def running_replica() -> DistributedDataParallel | None:
    """The DistributedDataParallel whose forward is running."""
    around = DistributedDataParallel._active_ddp_module
    return around if isinstance(around, DistributedDataParallel) else None


def local_part(tensor: Tensor) -> Tensor:
    """What this rank holds of it; writing there writes to the tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def local_gradient(parameter: Tensor) -> Tensor | None:
    """What this rank holds of the gradient, placed as the parameter is. Sums that are still to be taken over ranks are
    taken, and of what is whole where the parameter is sharded, the shard. `check_parameter` has found nothing wrong
    with it."""
    gradient = parameter.grad
    if not isinstance(gradient, DTensor) or not isinstance(parameter, DTensor):
        return gradient
    if gradient.placements != parameter.placements:
        gradient = gradient.redistribute(placements=parameter.placements)
    return gradient.to_local()


def check_state(name: str, part: str, value: Any, parameter: Tensor) -> None:
    """Raises ValueError for a tensor of a saved state that does not lie as its parameter does."""
    if not isinstance(value, Tensor) or not value.ndim:
        return

    def lies(tensor: Tensor) -> tuple[Any, ...]:
        where = (tensor.device_mesh, tensor.placements) if isinstance(tensor, DTensor) else ("a plain tensor",)
        return (tuple(tensor.shape), *where)

    if lies(value) != lies(parameter):
        raise ValueError(
            f"{part} of {name} in the checkpoint is {lies(value)}, the parameter {lies(parameter)}. Nothing was "
            "loaded. Load states of other meshes by torch.distributed.checkpoint (set_optimizer_state_dict), "
            "which shards them as the parameters are."
        )


def check_engine(model: Any) -> None:
    """Raises ValueError for engines whose parameters do not show their matrices."""
    modules: Iterable[nn.Module] = model.modules() if isinstance(model, nn.Module) else ()
    if any(isinstance(module, FullyShardedDataParallel) for module in modules):
        raise ValueError(
            "the model is sharded by FullyShardedDataParallel (FSDP1), which flattens matrices. Shard it by "
            "torch.distributed.fsdp.fully_shard (FSDP2)."
        )


def check_parameter(name: str, parameter: Tensor) -> None:
    """Raises ValueError for pieces that an engine has flattened, and for placements that would have to be gathered."""
    if hasattr(parameter, "ds_id"):
        raise ValueError(f"{name} is sharded by DeepSpeed ZeRO-3, which flattens matrices. Shard it by fully_shard.")
    if getattr(parameter, "_is_flat_param", False) or getattr(parameter, "_fsdp_flattened", False):
        raise ValueError(f"{name} is flattened by FSDP1. Shard it by torch.distributed.fsdp.fully_shard (FSDP2).")
    gradient = parameter.grad
    if not isinstance(parameter, DTensor):
        if isinstance(gradient, DTensor):
            raise ValueError(f"{name} is a plain tensor, but its gradient is a DTensor.")
        return
    if any(isinstance(placement, Partial) for placement in parameter.placements):
        raise ValueError(f"{name} is placed as {parameter.placements}: a sum still to be taken is no weight.")
    if gradient is None:
        return
    if not isinstance(gradient, DTensor) or gradient.device_mesh != parameter.device_mesh:
        raise ValueError(f"{name} is a DTensor on {parameter.device_mesh}, but its gradient is not on that mesh.")
    pairs = zip(gradient.placements, parameter.placements, strict=True)
    if any(have != want and not isinstance(have, Partial | Replicate) for have, want in pairs):
        raise ValueError(
            f"{name} is placed as {parameter.placements}, its gradient as {gradient.placements}. Redistribute the "
            "gradient before the step; the optimizer would have to gather it whole."
        )

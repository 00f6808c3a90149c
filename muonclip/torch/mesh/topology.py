"""The ranks that share each parameter of an optimizer, read from DTensors and from DistributedDataParallel."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.nn.parallel import DistributedDataParallel
from torch.utils.hooks import RemovableHandle
from torch.utils.weak import WeakTensorKeyDictionary

from muonclip.torch.mesh.late_types import is_dtensor
from muonclip.torch.mesh.mesh import Mesh
from muonclip.torch.mesh.process_groups import group_over
from muonclip.torch.mesh.wrappers import replicas_of, running_ddp, unwrap

if TYPE_CHECKING:
    from torch.distributed.tensor.placement_types import Placement


class RankPosition:
    """A rank's coordinate in a mesh, and the process groups through it.

    `group` is for a mesh of one dimension, such as the replicas of DistributedDataParallel. With neither a mesh nor a
    group it is that rank alone.
    """

    def __init__(self, mesh: DeviceMesh | None = None, group: dist.ProcessGroup | None = None) -> None:
        self._device_mesh, self._group = mesh, group
        if mesh is not None:
            coordinate = mesh.get_coordinate()
            if coordinate is None:
                raise ValueError(f"this rank is not in {mesh}, on which a parameter is placed.")
            self.mesh = Mesh(tuple(mesh.shape), tuple(mesh.mesh.flatten().tolist()), tuple(mesh.mesh_dim_names or ()))
            self.coordinate = tuple(coordinate)
        elif group is not None:
            ranks = tuple(dist.get_process_group_ranks(group))
            self.mesh, self.coordinate = Mesh((len(ranks),), ranks, ("replicas",)), (dist.get_rank(group),)
        else:
            rank = dist.get_rank() if dist.is_available() and dist.is_initialized() else 0
            self.mesh, self.coordinate = Mesh(ranks=(rank,)), (0,)

    def group(self, dims: Sequence[int]) -> dist.ProcessGroup | None:
        """Return the group of the ranks along these dimensions; None where there is only this one."""
        if self._device_mesh is not None:
            return group_over(self._device_mesh, dims)
        return self._group if dims else None

    def index(self, dims: Sequence[int]) -> int:
        """Return the number of this rank among those along these dimensions."""
        index = 0
        for dim in dims:
            index = index * self.mesh.shape[dim] + self.coordinate[dim]
        return index


class Topology:
    """The position of this rank in the mesh of each parameter.

    A parameter that is neither a DTensor nor known to be replicated is this rank's alone: an expert of its own, a stage
    of a pipeline. `version` grows when replicas are found.
    """

    def __init__(self) -> None:
        self.version = 0
        self._alone: RankPosition | None = None
        self._positions: dict[DeviceMesh | dist.ProcessGroup, RankPosition] = {}
        self._replicated = WeakTensorKeyDictionary()  # parameter → process group

    def find_replicas_of(self, model: nn.Module) -> None:
        """Find out, now or at a forward to come, whether the model runs inside DistributedDataParallel."""
        model, ddp = unwrap(model)
        if ddp is not None:
            self.add_replicas(ddp)
        elif dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            finder = _ReplicaFinder(self)
            finder.handle = model.register_forward_pre_hook(finder)

    def add_replicas(self, ddp: DistributedDataParallel) -> None:
        """Know the parameters of this module to have the same gradients on all ranks of its process group."""
        group = replicas_of(ddp)
        if group is None or group.size() == 1:
            return
        for name, parameter in ddp.module.named_parameters():
            if name not in ddp.parameters_to_ignore and not is_dtensor(parameter):
                self._replicated[parameter] = group
        self.version += 1

    def position(self, parameter: Tensor) -> RankPosition:
        """Return where this rank is in the mesh of a parameter."""
        key = parameter.device_mesh if is_dtensor(parameter) else self._replicated.get(parameter)
        if key is None:
            self._alone = self._alone or RankPosition()
            return self._alone
        if key not in self._positions:
            self._positions[key] = RankPosition(key) if isinstance(key, DeviceMesh) else RankPosition(group=key)
        return self._positions[key]

    def placements(self, parameter: Tensor) -> tuple[Placement, ...]:
        """Return how a parameter is placed on its mesh, by dimension."""
        if is_dtensor(parameter):
            return tuple(parameter.placements)
        from torch.distributed.tensor import Replicate

        return (Replicate(),)

    def positions(self) -> dict[Mesh, RankPosition]:
        """Return where this rank is in each mesh that `position` was asked about."""
        known = [*self._positions.values(), *([] if self._alone is None else [self._alone])]
        return {position.mesh: position for position in known}


class _ReplicaFinder:
    """A hook that stays until a forward inside DistributedDataParallel; on copies of the model it does nothing."""

    handle: RemovableHandle | None = None

    def __init__(self, topology: Topology | None = None) -> None:
        self._topology = None if topology is None else weakref.ref(topology)

    def __call__(self, module: nn.Module, args: Any) -> None:
        topology = None if self._topology is None or torch.compiler.is_compiling() else self._topology()
        ddp = running_ddp()
        if topology is not None and self.handle is not None and ddp is not None:
            topology.add_replicas(ddp)
            self.handle.remove()

    def __deepcopy__(self, memo: object) -> _ReplicaFinder:
        return _ReplicaFinder()

    def __reduce__(self) -> tuple[Any, ...]:
        return (_ReplicaFinder, ())

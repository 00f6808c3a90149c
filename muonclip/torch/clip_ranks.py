"""Which ranks clip together: those that share a part of the model, or train copies of it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from muonclip.torch.process_groups import group_of


class ClipRanks:
    """The process group over all data-, context- and tensor-parallel ranks of a model.

    `given`: the group to use. Else that of the largest device mesh on which parameters lie, so that pipeline stages,
    which have meshes of their own, do not wait for each other. Else `replicas`: that of DistributedDataParallel. Else
    all ranks.
    """

    def __init__(self, given: dist.ProcessGroup | None = None, replicas: dist.ProcessGroup | None = None) -> None:
        if given is not None and not isinstance(given, dist.ProcessGroup):
            raise ValueError(
                f"process_group={given!r} is no torch.distributed.ProcessGroup with this rank in it; give the group of "
                "all ranks that share this model, or None to have it read from the parameters."
            )
        self._given, self._replicas = given, replicas
        self._known: tuple[frozenset[DeviceMesh], dist.ProcessGroup | None] | None = None

    def group(self, parameters: Iterable[Tensor]) -> dist.ProcessGroup | None:
        """None where this rank is alone. All of the ranks must call it alike: a group may have to be made.

        Raises ValueError where the meshes of the parameters do not say which ranks these are.
        """
        if not (dist.is_available() and dist.is_initialized()):
            return None
        group = self._given
        if group is None:
            meshes = frozenset(each.device_mesh for each in parameters if isinstance(each, DTensor))
            if self._known is None or self._known[0] != meshes or _is_over(self._known[1]):
                self._known = meshes, self._find(meshes)
            group = self._known[1]
        return None if group is None or group.size() == 1 else group

    def _find(self, meshes: Iterable[DeviceMesh]) -> dist.ProcessGroup | None:
        sets = {frozenset(mesh.mesh.flatten().tolist()) for mesh in meshes}
        if not sets:
            return self._replicas or dist.group.WORLD
        if self._replicas is not None:
            sets.add(frozenset(dist.get_process_group_ranks(self._replicas)))
        largest = max(sets, key=len)
        if any(not ranks <= largest for ranks in sets):
            raise ValueError(
                f"the parameters lie on the ranks {sorted(map(sorted, sets))}, of which none holds all others: QK-Clip "
                "cannot tell which ranks train one model together. Give their group, QKClip(…, process_group=…)."
            )
        return group_of(sorted(largest)) if len(largest) > 1 else None

    def __deepcopy__(self, memo: object) -> ClipRanks:
        return ClipRanks(self._given, self._replicas)

    def __reduce__(self) -> tuple[Any, ...]:
        return (ClipRanks, ())  # groups end with their processes


def _is_over(group: dist.ProcessGroup | None) -> bool:
    """Whether the group belongs to a world that has ended."""
    return group is not None and group not in dist.distributed_c10d._world.pg_map

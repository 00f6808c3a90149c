"""The process group of any ranks of this process's mesh, made once and used by all who need the same ranks."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

_MADE: dict[tuple[int, ...], dist.ProcessGroup] = {}


def group_over(mesh: DeviceMesh, dims: Sequence[int]) -> dist.ProcessGroup | None:
    """Return the group of the ranks that differ from this one along these dimensions only; None for this rank alone.

    All of those ranks must call it, in the same order as others that they have in common: a group that does not exist
    yet is made. Ranks are in the order of their coordinates, the first dimension outermost.
    """
    wide = [dim for dim in dims if mesh.size(dim) > 1]
    if not wide:
        return None
    ranks = ranks_along(mesh, wide)
    if len(wide) == 1:
        group = mesh.get_group(wide[0])
        if dist.get_process_group_ranks(group) == ranks:
            return group
    return group_of(ranks)


def ranks_along(mesh: DeviceMesh, dims: Sequence[int]) -> list[int]:
    """List the global ranks that differ from this one along these dimensions of its mesh only, in coordinate order."""
    coordinate = mesh.get_coordinate()
    assert coordinate is not None, "a rank outside of the mesh of a parameter"
    index = tuple(slice(None) if dim in dims else at for dim, at in enumerate(coordinate))
    ranks = mesh.mesh[index].flatten().tolist()
    assert len(ranks) == math.prod(mesh.size(dim) for dim in dims)
    return ranks


def group_of(ranks: Sequence[int]) -> dist.ProcessGroup:
    """Return the group of these global ranks: the default group where they are all ranks, in order."""
    key = tuple(ranks)
    world = dist.group.WORLD
    assert world is not None
    if key == tuple(range(dist.get_world_size())):
        return world
    if key not in _MADE or _MADE[key] not in dist.distributed_c10d._world.pg_map:  # of a world that has ended
        made = dist.new_group(list(key), use_local_synchronization=True, sort_ranks=False)
        assert isinstance(made, dist.ProcessGroup)
        _MADE[key] = made
    return _MADE[key]

"""The ranks that clip together: those that share a part of the model, or train copies of it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from muonclip.torch.heads import QKProjection
from muonclip.torch.mesh import group_of, is_dtensor, replicas_of, running_ddp


class ClipRanks:
    """The process group over all data-, context- and tensor-parallel ranks of a model.

    `given`: the group to use. Else that of the largest device mesh with parameters on it, so that pipeline stages,
    which have meshes of their own, do not wait for each other. Else `replicas`: that of DistributedDataParallel, given
    or seen around a forward. Else all ranks that have the same attentions with the same weights: replicas of any other
    engine, and not the other stages of a pipeline.
    """

    def __init__(self, given: dist.ProcessGroup | None = None, replicas: dist.ProcessGroup | None = None) -> None:
        if given is not None and not isinstance(given, dist.ProcessGroup):
            raise ValueError(
                f"process_group={given!r} is not a torch.distributed.ProcessGroup with this rank in it; give the "
                "group of all ranks that share this model, or None to have it read from the parameters."
            )
        self._given, self._replicas = given, replicas
        self._known: tuple[object, dist.ProcessGroup | None] | None = None
        self.have_agreed = False  # on the same attentions and options, see agreement.py
        self._meshes: tuple[int | None, frozenset[DeviceMesh]] | None = None  # and the version they were read at

    def find_replicas(self) -> None:
        """Take the replicas of the DistributedDataParallel whose forward is running, if one is."""
        self._replicas = replicas_of(running_ddp()) or self._replicas

    def group(
        self,
        parameters: Iterable[Tensor],
        projections: Mapping[str, QKProjection],
        version: int | None = None,
        *,
        searched_on: torch.device | None = None,
    ) -> dist.ProcessGroup | None:
        """Return the group of the ranks that share these parameters; None where this rank is alone.

        All of the ranks must call it at the same time: a group may have to be made, and where nothing else says which
        ranks these are, all of the job compare their attentions once. `version`: of the parameters, which are not read
        again where it is the last one's. `searched_on`: the device of a model, or a stage of a pipeline, that was
        searched and has no attention, which it compares with what the others have. Raises ValueError where the meshes
        of the parameters do not say which ranks these are, and where sequences are divided between others, too.
        """
        if not (dist.is_available() and dist.is_initialized()):
            return None
        group = self._given
        if group is None:
            if self._meshes is None or version is None or self._meshes[0] != version:
                self._meshes = version, frozenset(each.device_mesh for each in parameters if is_dtensor(each))
            meshes = self._meshes[1]
            key = dist.group.WORLD, meshes, self._replicas, bool(projections), searched_on
            if self._known is None or self._known[0] != key:
                self._known, self.have_agreed = (key, self._find(meshes, projections, searched_on)), False
            group = self._known[1]
        group = None if group is None or group.size() == 1 else group
        _check_sequences(group, projections)
        return group

    def _find(
        self, meshes: Iterable[DeviceMesh], projections: Mapping[str, QKProjection], searched_on: torch.device | None
    ) -> dist.ProcessGroup | None:
        sets = {frozenset(mesh.mesh.flatten().tolist()) for mesh in meshes}
        if not sets:
            return self._replicas or _ranks_with_the_same(projections, searched_on)
        if self._replicas is not None:
            sets.add(frozenset(dist.get_process_group_ranks(self._replicas)))
        largest = max(sets, key=len)
        if any(not ranks <= largest for ranks in sets):
            raise ValueError(
                f"the parameters are on the ranks {sorted(map(sorted, sets))}, of which none holds all others: QK-Clip "
                "cannot tell which ranks train one model together. Give their group, QKClip(…, process_group=…)."
            )
        return group_of(sorted(largest)) if len(largest) > 1 else None

    def __deepcopy__(self, memo: object) -> ClipRanks:
        return ClipRanks(self._given, self._replicas)

    def __reduce__(self) -> tuple[Any, ...]:
        return (ClipRanks, ())  # groups end with their processes


def _check_sequences(group: dist.ProcessGroup | None, projections: Mapping[str, QKProjection]) -> None:
    """Raise ValueError where context parallelism divides sequences between ranks that are not all in the group: each
    would clip by the logits of its part alone."""
    divided = {name: ranks for name, each in projections.items() if (ranks := each.max_logits.sequence_ranks)}
    if not divided:
        return
    together = set(dist.get_process_group_ranks(group)) if group is not None else {dist.get_rank()}
    for name, ranks in divided.items():
        if not ranks <= together:
            raise ValueError(
                f"QK-Clip: the sequences of {name} are divided between the ranks {sorted(ranks)}, and of these only "
                f"{sorted(ranks & together)} clip together. Shard the parameters over all of them, fully_shard on a "
                "mesh that includes context parallelism, or give their group, QKClip(…, process_group=…)."
            )


def _ranks_with_the_same(
    projections: Mapping[str, QKProjection], searched_on: torch.device | None
) -> dist.ProcessGroup | None:
    """Make the group of the ranks with the same attentions and weights; all ranks of the job must call it."""
    if not projections and searched_on is None:
        return dist.group.WORLD
    weights = (weight for projection in projections.values() for weight in projection.qk_parameters())
    device = next((weight.device for weight in weights), searched_on or torch.device("cpu"))
    own = torch.tensor([_fingerprint(projections)], dtype=torch.int64, device="cpu").to(device)
    each = [torch.empty_like(own) for _ in range(dist.get_world_size())]
    dist.all_gather(each, own)
    same = [rank for rank, fingerprint in enumerate(torch.cat(each).tolist()) if fingerprint == int(own)]
    return group_of(same) if len(same) > 1 else None


def _fingerprint(projections: Mapping[str, QKProjection]) -> int:
    """Hash the attentions' names and the first numbers of their weights to 63 bits."""
    digest = hashlib.sha256()
    for name, projection in projections.items():
        digest.update(f"{name} {projection.kind} {projection.num_heads}".encode())
        for parameter in projection.qk_parameters():
            few = parameter.detach().flatten()[:64].contiguous()
            digest.update(
                f"{parameter.dtype} {tuple(parameter.shape)}".encode() + bytes(few.view(torch.uint8).tolist())
            )
    return int.from_bytes(digest.digest()[:8]) >> 1

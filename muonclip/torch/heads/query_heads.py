"""Which rows and heads of a sharded weight are on this rank: arithmetic on placements, without communication."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.placement_types import Placement, Replicate, Shard, _StridedShard

from muonclip.torch.mesh.index_ranges import Runs
from muonclip.torch.mesh.shard_indices import local_indices

if TYPE_CHECKING:
    from muonclip.torch.heads.qk_projection import HeadRows


def local_rows(name: str, parameter: Tensor, axis: int) -> tuple[Tensor, Runs]:
    """What this rank has of a parameter, to read and write in place, and which of the rows along `axis` these are, in
    order. `name`: for the error. Raises ValueError for placements that do not say where a row is."""
    if not isinstance(parameter, DTensor):
        return parameter, ((0, parameter.shape[axis]),)
    check_placements(name, parameter)
    mesh, coordinate = parameter.device_mesh, parameter.device_mesh.get_coordinate()
    if coordinate is None:
        raise ValueError(f"{name} lies on {mesh}, which this rank is not in.")
    runs = local_indices(parameter.shape[axis], axis, parameter.placements, mesh.shape, coordinate)
    with torch.no_grad():
        return parameter.to_local(), runs


def check_placements(name: str, parameter: Tensor) -> None:
    """Raises ValueError where the placements of a parameter do not say where a row is."""
    placements: Sequence[Placement] = parameter.placements if isinstance(parameter, DTensor) else ()
    unknown = [each for each in placements if not isinstance(each, Replicate | Shard | _StridedShard)]
    if unknown:
        raise ValueError(
            f"{name} is placed as {tuple(placements)}; QK-Clip scales rows that are replicated or sharded. "
            f"Redistribute it: {unknown[0]} does not say which rank has a row."
        )


def head_of_rows(rows: HeadRows, size: int, runs: Runs, device: torch.device) -> Tensor:
    """int64 [rows of the runs]: the head of each, `num_heads` for a row of none; of a weight with `size` rows."""
    held = torch.cat([torch.arange(*run, device=device) for run in runs])
    if rows.index is not None:
        heads = torch.full((size,), rows.num_heads, device=device)
        index = rows.rows(device)
        heads[index.flatten()] = torch.arange(rows.num_heads, device=device).repeat_interleave(rows.size)
        return heads[held]
    offset = held - rows.start
    head = offset.div(rows.step, rounding_mode="floor")
    inside = (offset >= 0) & (head < rows.num_heads) & (offset % rows.step < rows.size)
    return head.where(inside, rows.num_heads)


@dataclass(slots=True, eq=False)
class QueryHeads:
    """Which heads the queries of a forward are: under tensor parallelism those whose rows this rank has.

    It holds its module weakly, and copies of a model share what it says until a projection of the copy is made.
    """

    module: weakref.ref[nn.Module]
    rows: HeadRows
    _first: dict[Any, int] = field(default_factory=dict)

    @classmethod
    def of(cls, rows: HeadRows) -> QueryHeads:
        return cls(weakref.ref(rows.module), replace(rows, module=_NO_MODULE))

    @property
    def sharded(self) -> bool:
        """Whether the weight of the queries is a DTensor now, inside the forward."""
        return isinstance(self._weight(), DTensor)

    def count(self) -> int:
        """How many heads this rank has."""
        weight = self._weight()
        return len(self._heads(weight, 0)) if isinstance(weight, DTensor) else self.rows.num_heads

    def first(self, count: int) -> int:
        """The head with which this rank's `count` heads begin. Raises ValueError where these are not its heads."""
        weight = self._weight()
        if not isinstance(weight, DTensor):
            raise ValueError(
                f"attention was called with {count} query heads, its MaxLogits counts {self.rows.num_heads}, and "
                f"{self.rows.weight}, which makes the queries, is no DTensor that would say which heads these are. "
                "Parallelise the projections with torch.distributed.tensor.parallel, or observe all heads."
            )
        key = weight.device_mesh, weight.placements, count
        if key not in self._first:
            self._first[key] = self._find(weight, count)
        return self._first[key]

    def _find(self, weight: DTensor, count: int) -> int:
        # Data-parallel dimensions come first in a mesh. A layer whose shards were already given back shows them here.
        held: list[int] = []
        for dim in range(weight.device_mesh.ndim):
            held = self._heads(weight, dim)
            if held and held == list(range(held[0], held[0] + count)):
                return held[0]
        raise ValueError(
            f"attention was called with {count} query heads and its MaxLogits counts {self.rows.num_heads}, but of "
            f"{self.rows.weight}, placed as {weight.placements}, this rank has all rows of the heads {held}: not "
            f"{count} that follow each other. Let the ranks divide the heads evenly, or observe all heads."
        )

    def _heads(self, weight: DTensor, first_dim: int) -> list[int]:
        """The heads that this rank has whole, by the mesh dimensions from the given one on."""
        check_placements(self.rows.weight, weight)
        mesh, coordinate = weight.device_mesh, weight.device_mesh.get_coordinate()
        assert coordinate is not None, "a forward on a rank outside of the mesh"
        size = weight.shape[self.rows.axis]
        cut = slice(first_dim, None)
        runs = local_indices(size, self.rows.axis, weight.placements[cut], mesh.shape[cut], coordinate[cut])
        held = torch.zeros(size, dtype=torch.bool, device="cpu")
        for start, stop in runs:
            held[start:stop] = True
        return held[self.rows.rows("cpu")].all(1).nonzero().flatten().tolist()

    def _weight(self) -> Tensor | None:
        module = self.module()
        return None if module is None else getattr(module, self.rows.weight)

    def __deepcopy__(self, memo: dict[int, Any]) -> QueryHeads:
        module = self.module()
        copied = memo.get(id(module))
        return QueryHeads(weakref.ref(copied) if isinstance(copied, nn.Module) else self.module, self.rows)


_NO_MODULE = nn.Module()

"""The ranks that hold the rows and columns of each logical matrix of a sharded parameter.

Pure arithmetic on shapes, placements and mesh sizes; no process is asked. A mesh has dimensions; a *position* is a
rank's coordinate along those of them that matter.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

from muonclip.core import MatrixLayout
from muonclip.core.index_ranges import IndexRanges, flattened, intersection, length
from muonclip.torch.mesh import is_replicate, is_shard, local_indices

if TYPE_CHECKING:
    from torch.distributed.tensor.placement_types import Placement

Coordinate: TypeAlias = tuple[int, ...]
"""Along some dimensions of a mesh, in their order."""


@dataclass(frozen=True, slots=True)
class MatrixShards:
    """Describe matrices of one block of a parameter that the same ranks hold, cut in the same way.

    `fixed`: (mesh dimension, coordinate) of their ranks; ranks elsewhere hold nothing of them. `active`: the mesh
    dimensions along which each matrix is cut. `replicas`: those along which it is repeated. Positions are the
    coordinates along `active`, the first outermost.
    """

    block: int
    fan_out: int
    fan_in: int
    batches: IndexRanges
    heads: tuple[int, ...]
    """Which of the parameter's batches, and which heads of the block: batches × heads matrices, in this order."""
    fixed: tuple[tuple[int, int], ...]
    active: tuple[int, ...]
    replicas: tuple[int, ...]
    rows: tuple[IndexRanges, ...]
    """By position: the rows of each matrix that the rank there holds, in the order of its local tensor."""
    columns: tuple[IndexRanges, ...]
    local_rows: tuple[tuple[IndexRanges, ...], ...]
    """By position and head: where those rows are along the out axis of the local tensor."""
    as_stored: bool
    """Whether the local tensor is one matrix, or a stack of matrices along its first axis."""

    @property
    def count(self) -> int:
        return length(self.batches) * len(self.heads)

    @property
    def tall(self) -> bool:
        """Tell whether the whole matrix has more rows than columns; a shard of a wide one may, too."""
        return self.fan_out > self.fan_in


@lru_cache(maxsize=4096)
def matrix_shards(
    shape: tuple[int, ...], layout: MatrixLayout, placements: tuple[Placement, ...], mesh_shape: tuple[int, ...]
) -> tuple[MatrixShards, ...]:
    """Divide all matrices of a parameter of this global shape by the ranks that hold them, at any position of the mesh.

    Raises ValueError for placements that are neither `Replicate` nor a shard of an axis.
    """
    for placement in placements:
        if not (is_replicate(placement) or is_shard(placement)):
            raise ValueError(f"is placed as {placement}; Muon's matrices are sharded or replicated.")
    axes = layout.axes(len(shape))
    batch, rows, columns = (_Side.from_placements(shape, each, placements, mesh_shape) for each in axes)
    replicas = tuple(dim for dim, size in enumerate(mesh_shape) if size > 1 and is_replicate(placements[dim]))
    fan_out, fan_in = (math.prod(shape[axis] for axis in each) for each in (axes.fan_out, axes.fan_in))
    found: list[MatrixShards] = []
    for at, batches in batch.held.items():
        if not length(batches):
            continue
        for block, heads in enumerate(layout.rows_of_heads(fan_out)):
            by_cut: dict[_RowCut, dict[int, tuple[IndexRanges, ...]]] = {}
            for head, indices in enumerate(heads):
                cut, local = _cut(indices, rows)
                by_cut.setdefault(cut, {})[head] = local
            for cut, local_rows in by_cut.items():
                active = tuple(sorted((*cut.active, *columns.dims)))
                positions = [dict(zip(active, each, strict=True)) for each in coordinates(mesh_shape, active)]
                at_rows = [_number(mesh_shape, cut.active, position) for position in positions]
                held_columns = list(columns.held.values())
                found.append(
                    MatrixShards(
                        block=block,
                        fan_out=length(heads[0]),
                        fan_in=fan_in,
                        batches=batches,
                        heads=tuple(local_rows),
                        fixed=tuple(sorted((*zip(batch.dims, at, strict=True), *cut.fixed))),
                        active=active,
                        replicas=replicas,
                        rows=tuple(cut.rows[number] for number in at_rows),
                        columns=tuple(held_columns[_number(mesh_shape, columns.dims, each)] for each in positions),
                        local_rows=tuple(tuple(head[number] for head in local_rows.values()) for number in at_rows),
                        as_stored=layout == MatrixLayout(batch_ndim=len(shape) - 2) and len(shape) <= 3,
                    )
                )
    return tuple(found)


def coordinates(mesh_shape: Sequence[int], dims: Iterable[int]) -> list[Coordinate]:
    """List all coordinates along these dimensions of a mesh, the first outermost."""
    return list(itertools.product(*(range(mesh_shape[dim]) for dim in dims)))


@dataclass(frozen=True, slots=True)
class _Side:
    """The batches, the rows or the columns of a parameter's matrices: which of them are where.

    `dims`: the mesh dimensions that cut them. `held`: by coordinate along those, which indices a rank there holds.
    """

    dims: tuple[int, ...]
    held: Mapping[Coordinate, IndexRanges]

    @classmethod
    def from_placements(
        cls, shape: Sequence[int], axes: Sequence[int], placements: Sequence[Placement], mesh_shape: Sequence[int]
    ) -> _Side:
        dims = tuple(
            dim
            for dim, (placement, size) in enumerate(zip(placements, mesh_shape, strict=True))
            if size > 1 and is_shard(placement) and placement.dim % len(shape) in axes
        )
        held: dict[Coordinate, IndexRanges] = {}
        for at in coordinates(mesh_shape, dims):
            coordinate = [0] * len(mesh_shape)
            for dim, index in zip(dims, at, strict=True):
                coordinate[dim] = index
            by_axis = [local_indices(shape[axis], axis, placements, mesh_shape, coordinate) for axis in axes]
            held[at] = flattened([shape[axis] for axis in axes], by_axis)
        return cls(dims, held)


class _RowCut(NamedTuple):
    """The ranks that hold rows of a matrix, and which of its rows each of them holds."""

    fixed: tuple[tuple[int, int], ...]
    active: tuple[int, ...]
    rows: tuple[IndexRanges, ...]
    """By coordinate along the active dimensions, like the local ranges that `_cut` returns with it."""


def _cut(matrix: IndexRanges, rows: _Side) -> tuple[_RowCut, tuple[IndexRanges, ...]]:
    """Cut a matrix, given by its indices along the out axis, as the rows are cut; and say where its parts are."""
    parts = {at: intersection(matrix, held) for at, held in rows.held.items()}
    holders = [at for at, (held, _) in parts.items() if held]
    fixed = {i: holders[0][i] for i in range(len(rows.dims)) if len({at[i] for at in holders}) == 1}
    here = [part for at, part in parts.items() if all(at[i] == index for i, index in fixed.items())]
    cut = _RowCut(
        fixed=tuple((rows.dims[i], index) for i, index in fixed.items()),
        active=tuple(dim for i, dim in enumerate(rows.dims) if i not in fixed),
        rows=tuple(held for held, _ in here),
    )
    return cut, tuple(local for _, local in here)


def _number(mesh_shape: Sequence[int], dims: Sequence[int], coordinate: Mapping[int, int]) -> int:
    """Return the index of a coordinate in the list that `coordinates` makes."""
    number = 0
    for dim in dims:
        number = number * mesh_shape[dim] + coordinate[dim]
    return number

"""Where the logical matrices of a sharded parameter lie: which ranks hold which rows and columns of each.

Pure arithmetic on shapes, placements and mesh sizes; no process is asked. A mesh has dimensions; a *position* is a
rank's coordinate along those of them that matter. A run (start, stop) is a range of indices.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

from torch.distributed.tensor.placement_types import Placement, Replicate, Shard, _StridedShard

from muonclip.core import MatrixLayout
from muonclip.torch.mesh.index_ranges import IndexRanges, length, merged, sliced
from muonclip.torch.mesh.shard_indices import local_indices


@dataclass(frozen=True, slots=True)
class MatrixShards:
    """Matrices of one block of a parameter that the same ranks hold, cut in the same way.

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
    """By position: the rows of each matrix there, in the order in which they lie there."""
    columns: tuple[IndexRanges, ...]
    local_rows: tuple[tuple[IndexRanges, ...], ...]
    """By position and head: where those rows lie along the out axis of the local tensor."""

    @property
    def count(self) -> int:
        return length(self.batches) * len(self.heads)

    @property
    def tall(self) -> bool:
        """By the whole matrix: a shard of a wide one may look tall."""
        return self.fan_out > self.fan_in


@lru_cache(maxsize=4096)
def matrix_shards(
    shape: tuple[int, ...], layout: MatrixLayout, placements: tuple[Placement, ...], mesh_shape: tuple[int, ...]
) -> tuple[MatrixShards, ...]:
    """All matrices of a parameter of this global shape, in slabs; those of every position of the mesh.

    Raises ValueError for placements that are neither `Replicate` nor a shard of an axis.
    """
    for placement in placements:
        if not isinstance(placement, Replicate | Shard | _StridedShard):
            raise ValueError(f"is placed as {placement}; Muon's matrices are sharded or replicated.")
    wide = [dim for dim, size in enumerate(mesh_shape) if size > 1]
    replicas = tuple(dim for dim in wide if isinstance(placements[dim], Replicate))
    sharding = tuple(dim for dim in wide if dim not in replicas)
    axes = _Axes.of(shape, layout)

    def dims_of(tensor_dims: Sequence[int]) -> tuple[int, ...]:
        return tuple(dim for dim in sharding if placements[dim].dim % len(shape) in tensor_dims)  # pyright: ignore[reportAttributeAccessIssue]

    def runs_at(tensor_dims: Sequence[int], mesh_dims: Sequence[int], at: Sequence[int]) -> IndexRanges:
        coordinate = [0] * len(mesh_shape)
        for dim, index in zip(mesh_dims, at, strict=True):
            coordinate[dim] = index
        each = [local_indices(shape[dim], dim, placements, mesh_shape, coordinate) for dim in tensor_dims]
        return _flattened([shape[dim] for dim in tensor_dims], each)

    batch_dims, out_dims, in_dims = dims_of(axes.batch), dims_of(axes.out), dims_of(axes.into)
    columns = [runs_at(axes.into, in_dims, at) for at in _coordinates(mesh_shape, in_dims)]
    outs = {at: runs_at(axes.out, out_dims, at) for at in _coordinates(mesh_shape, out_dims)}
    slabs: list[MatrixShards] = []
    for at in _coordinates(mesh_shape, batch_dims):
        batches = runs_at(axes.batch, batch_dims, at)
        if not length(batches):
            continue
        island = tuple(zip(batch_dims, at, strict=True))
        for block, heads in enumerate(_rows_of_heads(layout, math.prod(shape[dim] for dim in axes.out))):
            alike: dict[_Cut, dict[int, dict[tuple[int, ...], tuple[IndexRanges, IndexRanges]]]] = {}
            for number, head in enumerate(heads):
                parts = {where: _intersect(head, runs) for where, runs in outs.items()}
                holders = [where for where, (rows, _) in parts.items() if rows]
                varying = [i for i in range(len(out_dims)) if len({where[i] for where in holders}) > 1]
                fixed = tuple((out_dims[i], holders[0][i]) for i in range(len(out_dims)) if i not in varying)
                here = {
                    where: part
                    for where, part in parts.items()
                    if all(where[out_dims.index(dim)] == at for dim, at in fixed)
                }
                cut = _Cut(fixed, tuple(out_dims[i] for i in varying), tuple(rows for rows, _ in here.values()))
                alike.setdefault(cut, {})[number] = here
            for cut, members in alike.items():
                active = tuple(sorted((*cut.active, *in_dims)))
                first = next(iter(members.values()))
                rows, cols, local = [], [], []
                for position in _coordinates(mesh_shape, active):
                    coordinate = dict(zip(active, position, strict=True)) | dict(cut.fixed)
                    where = tuple(coordinate[dim] for dim in out_dims)
                    rows.append(first[where][0])
                    cols.append(columns[_index(mesh_shape, in_dims, [coordinate[dim] for dim in in_dims])])
                    local.append(tuple(member[where][1] for member in members.values()))
                slabs.append(
                    MatrixShards(
                        block=block,
                        fan_out=length(heads[0]),
                        fan_in=math.prod(shape[dim] for dim in axes.into),
                        batches=batches,
                        heads=tuple(members),
                        fixed=tuple(sorted((*island, *cut.fixed))),
                        active=active,
                        replicas=replicas,
                        rows=tuple(rows),
                        columns=tuple(cols),
                        local_rows=tuple(local),
                    )
                )
    return tuple(slabs)


class _Cut(NamedTuple):
    """Which ranks hold the rows of a matrix, and which of its rows each of them holds."""

    fixed: tuple[tuple[int, int], ...]
    active: tuple[int, ...]
    rows: tuple[IndexRanges, ...]


@dataclass(frozen=True, slots=True)
class _Axes:
    """Which axes of the parameter number its matrices, their rows and their columns."""

    batch: tuple[int, ...]
    out: tuple[int, ...]
    into: tuple[int, ...]

    @classmethod
    def of(cls, shape: Sequence[int], layout: MatrixLayout) -> _Axes:
        b, n = layout.batch_ndim, len(shape)
        first, rest = (b,), tuple(range(b + 1, n))
        return cls(tuple(range(b)), rest if layout.transposed else first, first if layout.transposed else rest)


def _rows_of_heads(layout: MatrixLayout, fan_out: int) -> list[list[IndexRanges]]:
    """By block and head: the out indices of the rows of a matrix, in its order."""
    period = fan_out // layout.repeats
    blocks = layout.blocks or (period,)
    heads = layout.heads or (1,) * len(blocks)
    result: list[list[IndexRanges]] = []
    begin = 0
    for size, count in zip(blocks, heads, strict=True):
        repeated = tuple((n * period + begin, n * period + begin + size) for n in range(layout.repeats))
        rows = size * layout.repeats // count
        result.append([sliced(repeated, head * rows, (head + 1) * rows) for head in range(count)])
        begin += size
    return result


def _intersect(wanted: IndexRanges, there: IndexRanges) -> tuple[IndexRanges, IndexRanges]:
    """What of `wanted` is in `there`, in the order of `there`: as positions in `wanted`, and in `there`."""
    ours, theirs = [], []
    passed = 0
    for start, stop in there:
        seen = 0
        found = []
        for first, last in wanted:
            low, high = max(start, first), min(stop, last)
            if low < high:
                found.append((low, (seen + low - first, seen + high - first), high - low))
            seen += last - first
        for low, run, size in sorted(found):
            ours.append(run)
            theirs.append((passed + low - start, passed + low - start + size))
        passed += stop - start
    return merged(ours), merged(theirs)


def _flattened(sizes: Sequence[int], each: Sequence[IndexRanges]) -> IndexRanges:
    """Ranges along several axes as ranges along their product."""
    if not sizes:
        return ((0, 1),)
    runs, *rest = each
    inner = math.prod(sizes[1:])
    within = _flattened(sizes[1:], rest)
    if within == ((0, inner),):
        return merged((start * inner, stop * inner) for start, stop in runs)
    indices = (index for start, stop in runs for index in range(start, stop))
    return merged((index * inner + start, index * inner + stop) for index in indices for start, stop in within)


def _coordinates(mesh_shape: Sequence[int], dims: Sequence[int]) -> list[tuple[int, ...]]:
    return list(itertools.product(*(range(mesh_shape[dim]) for dim in dims)))


def _index(mesh_shape: Sequence[int], dims: Sequence[int], at: Sequence[int]) -> int:
    index = 0
    for dim, coordinate in zip(dims, at, strict=True):
        index = index * mesh_shape[dim] + coordinate
    return index

"""The indices of an axis that a rank of a mesh holds: what DTensor does when it shards, in arithmetic."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING

from muonclip.core.index_ranges import IndexRanges, length, merged, sliced
from muonclip.torch.mesh.late_types import is_shard, is_strided_shard

if TYPE_CHECKING:
    from torch.distributed.tensor.placement_types import Placement


def local_indices(
    size: int, tensor_dim: int, placements: Sequence[Placement], mesh_shape: Sequence[int], coordinate: Sequence[int]
) -> IndexRanges:
    """Return which of the global indices 0 … size−1 along `tensor_dim` a rank holds, in the order of its local tensor.

    `placements`, `mesh_shape`, `coordinate`: by mesh dimension; placements name non-negative axes. What is not sharded
    along the axis is whole; () where there is nothing.
    """
    cuts = tuple(
        (ways, at, placement.split_factor if is_strided_shard(placement) else 1)
        for placement, ways, at in zip(placements, mesh_shape, coordinate, strict=True)
        if is_shard(placement) and placement.dim == tensor_dim
    )
    return _cut(size, cuts)


@lru_cache(maxsize=65536)
def _cut(size: int, cuts: tuple[tuple[int, int, int], ...]) -> IndexRanges:
    ranges: IndexRanges = ((0, size),) if size else ()
    for ways, at, factor in cuts:
        parts: list[tuple[int, int]] = []
        for part in range(factor):
            parts += sliced(ranges, *_equal_part(*_equal_part(0, length(ranges), factor, part), ways, at))
        ranges = merged(parts)
    return ranges


def _equal_part(start: int, stop: int, count: int, at: int) -> tuple[int, int]:
    """Return one part of a range, as `torch.chunk` divides it: equal parts, rounded up; the last may be empty."""
    size = -(-(stop - start) // count)
    return min(start + at * size, stop), min(start + (at + 1) * size, stop)

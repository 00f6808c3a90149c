"""The indices of an axis that a rank of a mesh holds: what DTensor does when it shards, in arithmetic."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

from torch.distributed.tensor.placement_types import Placement, Shard, _StridedShard

from muonclip.core.index_ranges import IndexRanges, length, merged, sliced


def local_indices(
    size: int, tensor_dim: int, placements: Sequence[Placement], mesh_shape: Sequence[int], coordinate: Sequence[int]
) -> IndexRanges:
    """Return which of the global indices 0 … size−1 along `tensor_dim` a rank holds, in the order of its local tensor.

    `placements`, `mesh_shape`, `coordinate`: by mesh dimension; placements name non-negative axes. What is not sharded
    along the axis is whole; () where there is nothing.
    """
    cuts = tuple(
        (ways, at, placement.split_factor if isinstance(placement, _StridedShard) else 1)
        for placement, ways, at in zip(placements, mesh_shape, coordinate, strict=True)
        if isinstance(placement, Shard | _StridedShard) and placement.dim == tensor_dim
    )
    return _cut(size, cuts)


@lru_cache(maxsize=65536)
def _cut(size: int, cuts: tuple[tuple[int, int, int], ...]) -> IndexRanges:
    ranges: IndexRanges = ((0, size),) if size else ()
    for ways, at, factor in cuts:
        parts: list[tuple[int, int]] = []
        for start, stop in _equal_parts(0, length(ranges), factor):
            divided = _equal_parts(start, stop, ways)
            if at < len(divided):
                parts += sliced(ranges, *divided[at])
        ranges = merged(parts)
    return ranges


def _equal_parts(start: int, stop: int, count: int) -> list[tuple[int, int]]:
    """Divide a range as `torch.chunk` does: into equal parts, rounded up; the last ones may be shorter or missing."""
    size = max(1, -(-(stop - start) // count))
    return [(low, min(low + size, stop)) for low in range(start, stop, size)]

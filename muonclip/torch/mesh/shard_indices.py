"""Which indices of an axis a rank of a mesh holds: what DTensor does when it shards, in arithmetic."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

from torch.distributed.tensor.placement_types import Placement, Shard, _StridedShard

from muonclip.torch.mesh.index_ranges import IndexRanges, merged, sliced


def local_indices(
    size: int, tensor_dim: int, placements: Sequence[Placement], mesh_shape: Sequence[int], coordinate: Sequence[int]
) -> IndexRanges:
    """IndexRanges (start, stop) of the global indices 0 … size−1 along `tensor_dim`, in the order of the local tensor.

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
    runs: IndexRanges = ((0, size),) if size else ()
    for ways, at, factor in cuts:
        total = sum(stop - start for start, stop in runs)
        pieces: list[tuple[int, int]] = []
        for start, stop in _chunks(0, total, factor):
            chunks = _chunks(start, stop, ways)
            if at < len(chunks):
                pieces += sliced(runs, *chunks[at])
        runs = merged(pieces)
    return runs


def _chunks(start: int, stop: int, count: int) -> list[tuple[int, int]]:
    """As `torch.chunk`: of equal size, rounded up; the last ones may be shorter or missing."""
    size = max(1, -(-(stop - start) // count))
    return [(low, min(low + size, stop)) for low in range(start, stop, size)]

"""A device mesh as plain numbers, so that plans can be made and tested without processes."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Mesh:
    """The ranks that share a parameter, row by row; one rank alone by default.

    Args:
        shape: Ranks along each dimension.
        ranks: The global ranks, the last dimension the fastest.
        names: The names of the dimensions; empty: numbers.
    """

    shape: tuple[int, ...] = (1,)
    ranks: tuple[int, ...] = (0,)
    names: tuple[str, ...] = ()

    def ranks_along(self, dims: Sequence[int], fixed: Mapping[int, int]) -> list[int]:
        """List the ranks along `dims`, the first outermost, at the coordinates `fixed` in the other dimensions."""
        ranges = (range(self.shape[dim]) for dim in dims)
        return [self.rank({**fixed, **dict(zip(dims, at, strict=True))}) for at in itertools.product(*ranges)]

    def rank(self, coordinate: Mapping[int, int]) -> int:
        """Return the rank at a coordinate, given by dimension; it is 0 where none is given."""
        index = 0
        for dim, size in enumerate(self.shape):
            index = index * size + coordinate.get(dim, 0)
        return self.ranks[index]

    def __str__(self) -> str:
        names = self.names or tuple(f"dim {dim}" for dim in range(len(self.shape)))
        return " × ".join(f"{name} {size}" for name, size in zip(names, self.shape, strict=True))


ONE_RANK = Mesh()

"""Declared states of logical matrices: an adapter makes, shards, checks, saves and loads what is declared."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal


def of_its_shape(rows: int, columns: int) -> tuple[int, int]:
    """Give a state an entry for every entry of its matrix, as momentum has."""
    return rows, columns


BLOCK = 2048
"""Entries of a row that share a number, see `per_block`."""


def per_block(rows: int, columns: int) -> tuple[int, int]:
    """Give a state one number for every 2048 consecutive entries of a row of its matrix, and for those at its end."""
    return rows, -(-columns // BLOCK)


def per_row(rows: int, columns: int) -> tuple[int, int]:
    """Give a state one number for every row of its matrix."""
    del columns
    return rows, 1


@dataclass(frozen=True, slots=True)
class MatrixState:
    """A state by its name, its shape as a function of its matrix's shape, and its dtype.

    The rows of a state are those of its matrix: so that it is cut, moved and joined as the matrix is. Its columns are
    the matrix's too, or one (a number for a whole matrix is kept once for each row), or one for each block of them.
    `dtype`: None is the momentum's, which the user chooses; "wide" is float32, or float64 for float64 parameters;
    others are by name. Raises ValueError for other shapes.
    """

    name: str
    shape: Callable[[int, int], tuple[int, int]] = of_its_shape
    dtype: Literal["wide", "float32", "int8"] | None = None

    def __post_init__(self) -> None:
        if self.shape(5, 7) not in ((5, 7), (5, 1)):
            raise ValueError(
                f"the state {self.name!r} of a 5×7 matrix has shape {self.shape(5, 7)}; it must have the rows of its "
                "matrix, and its columns or one: (5, 7) or (5, 1)."
            )

    @property
    def is_per_row(self) -> bool:
        """Tell whether its columns are not its matrix's: it has one, or one for each block."""
        return self.shape(5, 7) == (5, 1)

    def stored_shape(self, shape: Sequence[int], fan_in: Sequence[int]) -> tuple[int, ...]:
        """Return the shape in which the states of all matrices of a parameter are stored together.

        It is the parameter's. Where the columns are not the matrix's they are along the first of the axes `fan_in`, and
        the others have length 1.
        """
        if not self.is_per_row:
            return tuple(shape)
        columns = self.shape(1, math.prod(shape[axis] for axis in fan_in))[1]
        sizes = dict.fromkeys(fan_in, 1) | {fan_in[0]: columns}
        return tuple(sizes.get(axis, size) for axis, size in enumerate(shape))

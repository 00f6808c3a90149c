"""Stores a state of matrices: in a dtype, or as int8 codes, rounded to the nearest number or stochastically.

    a = max |x| over a block        float32; a block is up to 2048 consecutive entries of a row of a logical matrix
    q = round(x / s),  s = a / 127  to the nearest, ties to even; or stochastically, ⌊x / s + u⌋
    x ≈ q · s

(arXiv 2509.23106.) A row of a matrix belongs to one matrix, so that no block crosses experts, heads or fused blocks,
and ranks that have whole rows make the blocks that one rank alone would make. u is a function of the parameter, the
step, the row and the column, see `noise_bits`: a run that goes on, replicas and shards of a matrix draw the same.

bfloat16 is rounded stochastically by 16 random bits that are added to those of float32 before they are cut off (arXiv
2010.06192). Both are unbiased: the expectation of what is stored is x.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from muonclip.core.arguments import shown
from muonclip.core.index_ranges import IndexRanges
from muonclip.core.matrix_state import BLOCK, MatrixState, per_block
from muonclip.core.newton_schulz import Array

LARGEST_CODE = 127
_PART = 1 / LARGEST_CODE
_LEAST_STEP = 2.0**-126
"""The least normal float32; in a block of smaller steps all codes are 0."""
_STOCHASTIC = "_stochastic"
_BY_NAME = ("int8", "int8_stochastic", "bfloat16_stochastic")


@dataclass(frozen=True, slots=True)
class Storage:
    """A way to store states: the dtype by its name (None: the parameter's), and how numbers are rounded to it."""

    dtype: str | None = None
    is_stochastic: bool = False

    @classmethod
    def named(cls, argument: str, value: object) -> Storage | None:
        """Read "int8", or a dtype with "_stochastic" behind it; None for what is a dtype, if anything.

        Raises ValueError for a dtype for which there is no stochastic rounding.
        """
        name = value if isinstance(value, str) else ""
        if name in _BY_NAME:
            return cls(name.removesuffix(_STOCHASTIC), name.endswith(_STOCHASTIC))
        if name.endswith(_STOCHASTIC):
            raise ValueError(f"{argument}={shown(value)}; numbers are rounded stochastically to int8 or bfloat16.")
        return None

    @property
    def has_codes(self) -> bool:
        """Tell whether states are stored as codes, with the size of each block."""
        return self.dtype == "int8"

    def parts(self, declared: MatrixState) -> tuple[MatrixState, ...]:
        """Return what is stored of a declared state: itself, or its codes and the sizes of their blocks."""
        if declared.dtype is not None or not self.has_codes:
            return (declared,)
        return replace(declared, dtype="int8"), MatrixState(absmax_of(declared.name), per_block, "float32")


def absmax_of(name: str) -> str:
    """Name the state that holds the size of each block of the codes of another."""
    return f"{name}_absmax"


def blocks_of(columns: IndexRanges) -> Iterator[tuple[int, int, int]]:
    """Divide the columns of matrices that are here into blocks: the number of each, and where it is here.

    Columns are whole numbers of the whole matrix, so that a part of a block has the number of the block.
    """
    passed = 0
    for first, last in columns:
        start = first
        while start < last:
            stop = min(last, start - start % BLOCK + BLOCK)
            yield start // BLOCK, passed + start - first, passed + stop - first
            start = stop
        passed += last - first


def as_absmax(largest: Array, *, xp: Any) -> Array:
    """Return the size of blocks to store, from their largest |x| in float32: NaN where that is not finite.

    So every entry of such a block is NaN when it is read, as one that diverged should be.
    """
    return xp.where(largest < xp.inf, largest, xp.nan)


def steps(absmax: Array) -> Array:
    """Return what the codes of a block are multiples of."""
    return absmax * _PART


def encode(x: Array, steps: Array, noise: Array | None, *, xp: Any) -> Array:
    """Return the codes of x as whole numbers, in its dtype.

    `steps`: of its blocks, in the dtype of x and broadcast with it. `noise`: what `noise_bits` returns, in the dtype of
    x; None: to the nearest.
    """
    ratio = x / xp.where(steps >= _LEAST_STEP, steps, 1.0)
    if noise is None:
        return xp.round(ratio)
    return xp.clip(xp.floor(ratio + (noise * 2.0**-16 + 2.0**-17)), -LARGEST_CODE, LARGEST_CODE)


def cut_bits(bits: Array, noise: Array, *, xp: Any) -> Array:
    """Round float32 numbers to bfloat16 stochastically, both as int32 bits; what is not finite stays."""
    return xp.where((bits & _EXPONENT) != _EXPONENT, (bits + noise) & _UPPER, bits)


def stream_of(name: str) -> int:
    """Return the number, of 31 bits, by which a parameter of this name has noise of its own."""
    return zlib.crc32(name.encode()) & 0x7FFFFFFF


def noise_bits(stream: int, step: Array, rows: Array, columns: Array) -> Array:
    """Draw 16 bits for every entry, int32 from 0 to 65535: the upper half of α · h(column) + β, modulo 2³².

    α (odd) and β are those of a row in a step, h those of a column: hashes, so that any two entries of a row are
    independent (multiply-shift; Dietzfelbinger 1996). All arrays are int32.

    Args:
        stream: The parameter, see `stream_of`.
        step: The number of the step, a scalar.
        rows: The number of each row among all rows of the parameter, […, rows, 1].
        columns: The number of each column, [columns] or what broadcasts with the rows.
    """
    key = _mixed(_mixed(step) + stream)
    slope, shift = _mixed(rows + _mixed(key + 1)) | 1, _mixed(rows + _mixed(key + 2))
    return ((slope * _mixed(columns + _mixed(key + 3)) + shift) >> 16) & 0xFFFF


_EXPONENT, _UPPER = 0x7F800000, -0x10000


def _mixed(x: Array) -> Array:
    """Hash int32, of which products wrap around (lowbias32 of C. Wellons, 2018; shifts fill up with zeros)."""
    x = x ^ ((x >> 16) & 0xFFFF)
    x = x * 0x7FEB352D
    x = x ^ ((x >> 15) & 0x1FFFF)
    x = x * (0x846CA68B - 2**32)
    return x ^ ((x >> 16) & 0xFFFF)


def stored_states(states: Sequence[MatrixState], storage: Storage) -> tuple[MatrixState, ...]:
    """Return what is stored of all declared states."""
    return tuple(part for declared in states for part in storage.parts(declared))

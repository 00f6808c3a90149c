"""The reading of one parameter as batches of logical matrices.

A parameter is not always one matrix. Stacked experts are a batch of matrices; a fused q|k|v or gate|up weight holds
several of different meaning; heads of a projection can be matrices of their own; a convolution is a matrix once its
window is flattened. Orthogonalising such a parameter as one matrix would mix singular directions that have nothing to
do with each other, and would take the update scale from the wrong shape.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, NamedTuple

from muonclip.core.arguments import check_flag, check_kind, check_whole
from muonclip.core.index_ranges import IndexRanges, sliced
from muonclip.core.newton_schulz import Array


class MatrixAxes(NamedTuple):
    """The axes of a parameter that number its matrices, those along their rows, and those along their columns."""

    batch: tuple[int, ...]
    fan_out: tuple[int, ...]
    fan_in: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class MatrixLayout:
    """Reads a parameter (*batch, *out, *in) as batches of matrices fan_out × fan_in; exactly invertible.

    Lists are taken for tuples, as configurations write them.

    Args:
        batch_ndim: Number of leading axes that count matrices (experts, stacked layers).
        transposed: The parameter is (*batch, in, *out) instead, as in GPT-2's `Conv1D`.
        blocks: Rows of each fused block along the out axis, e.g. `(q, k, v)`; empty: one block.
        heads: For each block, into how many matrices its rows divide; empty or 1: the block is one matrix.
        repeats: How often the sequence of blocks repeats along the out axis (head-interleaved q|k|v: the number of
            heads); rows of a block are gathered over the repeats before they are divided into heads.
        out_ndim: Number of axes that the out axis is written as, e.g. 2 for (*batch, heads, width, *in).

    Raises:
        TypeError: For values of other kinds.
        ValueError: For numbers that do not fit.
    """

    batch_ndim: int = 0
    transposed: bool = False
    blocks: tuple[int, ...] = ()
    heads: tuple[int, ...] = ()
    repeats: int = 1
    out_ndim: int = 1

    def __post_init__(self) -> None:
        check_flag("transposed", self.transposed)
        for name, least in (("batch_ndim", 0), ("repeats", 1), ("out_ndim", 1)):
            object.__setattr__(self, name, check_whole(name, getattr(self, name), least))
        for name in ("blocks", "heads"):
            given = getattr(self, name)
            check_kind(name, given, Sequence, f"a tuple with a number for each block, {name}=(…,)")
            checked = tuple(check_whole(f"{name}[{index}]", each) for index, each in enumerate(given))
            object.__setattr__(self, name, checked)
        if self.heads and len(self.heads) != max(1, len(self.blocks)):
            raise ValueError(
                f"heads={self.heads} must name one number for each of the {max(1, len(self.blocks))} blocks."
            )
        if self.transposed and self.out_ndim > 1:
            raise ValueError(f"out_ndim={self.out_ndim}; it must be 1 or more, and 1 where transposed.")

    def matrix_shapes(self, shape: Sequence[int]) -> tuple[tuple[int, int, int], ...]:
        """Return (count, fan_out, fan_in) of each block.

        Args:
            shape: The shape of the parameter.

        Raises:
            ValueError: For a shape that the layout cannot read; it names what does not fit.
        """
        check_kind("shape", shape, Sequence, "the sizes of a parameter's axes")
        batch, fan_out, fan_in = self._read(shape)
        blocks = self.blocks or (fan_out // self.repeats,)
        heads = self.heads or (1,) * len(blocks)
        if min(blocks) < 1 or sum(blocks) * self.repeats != fan_out:
            raise ValueError(
                f"blocks={self.blocks} repeated {self.repeats} times do not fill the {fan_out} rows of shape "
                f"{tuple(shape)}."
            )
        for rows, count in zip(blocks, heads, strict=True):
            if rows * self.repeats % count:
                raise ValueError(
                    f"{count} heads do not divide the {rows * self.repeats} rows of a block of shape {tuple(shape)}."
                )
        return tuple((batch * h, rows * self.repeats // h, fan_in) for rows, h in zip(blocks, heads, strict=True))

    def axes(self, ndim: int) -> MatrixAxes:
        """Name the axes of a parameter: those that number its matrices, those along their rows and along their columns.

        Args:
            ndim: How many axes the parameter has.
        """
        end = self.batch_ndim + self.out_ndim
        first, rest = tuple(range(self.batch_ndim, end)), tuple(range(end, ndim))
        fan_out, fan_in = (rest, first) if self.transposed else (first, rest)
        return MatrixAxes(tuple(range(self.batch_ndim)), fan_out, fan_in)

    def rows_of_heads(self, fan_out: int) -> list[list[IndexRanges]]:
        """Return, by block and head, which indices along the out axis are the rows of a matrix, as ranges (start,
        stop).

        Args:
            fan_out: How many indices the out axis has.
        """
        period = fan_out // self.repeats
        blocks = self.blocks or (period,)
        rows_of_heads: list[list[IndexRanges]] = []
        begin = 0
        for size, count in zip(blocks, self.heads or (1,) * len(blocks), strict=True):
            block = tuple((n * period + begin, n * period + begin + size) for n in range(self.repeats))
            rows = size * self.repeats // count
            rows_of_heads.append([sliced(block, head * rows, (head + 1) * rows) for head in range(count)])
            begin += size
        return rows_of_heads

    def split(self, x: Array, *, xp: Any) -> list[Array]:
        """Return one array (count, fan_out, fan_in) per block; views where layout and `xp` allow.

        Args:
            x: The parameter, or what has its shape.
            xp: The array namespace: `numpy`, `torch` or `jax.numpy`.
        """
        batch, fan_out, fan_in = self._read(x.shape)
        shapes = self.matrix_shapes(x.shape)
        rows = xp.reshape(x, (batch, fan_in, fan_out)).mT if self.transposed else x
        repeated = xp.reshape(rows, (batch, self.repeats, fan_out // self.repeats, fan_in))
        edges = tuple(accumulate(self.blocks or (fan_out // self.repeats,), initial=0))
        return [
            xp.reshape(repeated[:, :, start:stop, :], shape)
            for start, stop, shape in zip(edges, edges[1:], shapes, strict=False)
        ]

    def join(self, matrices: Sequence[Array], shape: Sequence[int], *, xp: Any) -> Array:
        """Invert `split`: put the arrays of the blocks together as one array.

        Args:
            matrices: What `split` returns, one array per block.
            shape: The shape of the parameter.
            xp: The array namespace: `numpy`, `torch` or `jax.numpy`.
        """
        batch, fan_out, fan_in = self._read(shape)
        blocks = [xp.reshape(matrix, (batch, self.repeats, -1, fan_in)) for matrix in matrices]
        rows = xp.reshape(blocks[0] if len(blocks) == 1 else xp.concat(blocks, axis=2), (batch, fan_out, fan_in))
        return xp.reshape(rows.mT if self.transposed else rows, tuple(shape))

    def describe(self, shape: Sequence[int]) -> str:
        """Write the matrices for people: `8 × (128×64)` for eight experts, `(96×32) + (32×32)` for two fused blocks.

        Args:
            shape: The shape of the parameter.
        """
        parts = [(f"{count} × " if count > 1 else "") + f"({m}×{n})" for count, m, n in self.matrix_shapes(shape)]
        return " + ".join(parts)

    def _read(self, shape: Sequence[int]) -> tuple[int, int, int]:
        end = self.batch_ndim + self.out_ndim
        if len(shape) <= end:
            raise ValueError(f"shape {tuple(shape)} has no matrix behind {self.batch_ndim} batch axes.")
        batch, first, last = (
            math.prod(each) for each in (shape[: self.batch_ndim], shape[self.batch_ndim : end], shape[end:])
        )
        return (batch, last, first) if self.transposed else (batch, first, last)

"""States of matrices that are stored otherwise than they move: as codes of blocks, or rounded stochastically.

They are read to float32 (float64 for float64), moved and written back, a piece of their rows at a time. The
mathematics is `core.state_storage`'s.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from functools import lru_cache
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from muonclip.core import MatrixLayout
from muonclip.core.index_ranges import IndexRanges, length
from muonclip.core.state_storage import absmax_of, as_absmax, blocks_of, cut_bits, encode, noise_bits, steps
from muonclip.torch.update.matrix_shards import MatrixShards, matrix_shards
from muonclip.torch.update.matrix_views import editing, local_matrices, row_index


class Rounding(NamedTuple):
    """The noise of a parameter in one step, see `core.state_storage.noise_bits`."""

    stream: int
    step: int


class StoredStates:
    """The states of some matrices, by the name of what is declared; `rows` everywhere are those of a piece.

    `cut`: the ranks over which the columns of the matrices are divided, which then share the sizes of blocks; they must
    all write, and whole matrices.
    """

    def __init__(
        self,
        layout: MatrixLayout,
        shards: MatrixShards,
        position: int,
        matrices: slice,
        rounding: Rounding | None,
        cut: dist.ProcessGroup | None,
    ) -> None:
        self._layout, self._shards, self._position, self._matrices = layout, shards, position, matrices
        self._rounding, self._cut = rounding, cut if has_cut_columns(shards) else None
        self.columns = shards.columns[position]

    @property
    def are_shared(self) -> bool:
        """Tell whether ranks share the sizes of blocks."""
        return self._cut is not None

    def read(self, state: Mapping[str, Tensor], name: str, dtype: torch.dtype) -> Tensor:
        """Return a state as numbers of this dtype, a tensor of its own."""
        return read_codes(state, name, self.columns, dtype) if is_coded(state[name]) else state[name].to(dtype)

    def write(self, value: Tensor, state: Mapping[str, Tensor], name: str, rows: slice, used: Tensor | None) -> None:
        """Store a state; where `used` is given, that of the matrices for which it is true."""
        held, noise = state[name], None
        if self._rounding is not None:
            noise = self._noise(self._rounding, rows, value.device)
        if not is_coded(held):
            assert noise is not None, "what is rounded to the nearest is stored as it moves"
            bits = cut_bits(value.float().view(torch.int32), noise, xp=torch)
            _store(held, bits.view(torch.float32), used)
            return
        absmax = as_absmax(self._largest(value), xp=torch)
        for number, start, stop in blocks_of(self.columns):
            of_block = steps(absmax[..., number : number + 1]).to(value.dtype)
            own = None if noise is None else noise[..., start:stop].to(value.dtype)
            _store(held[..., start:stop], encode(value[..., start:stop], of_block, own, xp=torch), used)
        _store(state[absmax_of(name)], absmax, used)

    def _largest(self, value: Tensor) -> Tensor:
        """Return the largest |x| of each block, float32 (matrices, rows, blocks)."""
        blocks = [_largest_of(value[..., start:stop]) for _, start, stop in blocks_of(self.columns)]
        if self._cut is None:
            return blocks[0] if len(blocks) == 1 else torch.cat(blocks, -1)
        count = max(number for columns in self._shards.columns for number, *_ in blocks_of(columns)) + 1
        index = row_index((self._shards.rows[self._position],), value.device)
        largest = torch.zeros(len(value), self._shards.fan_out, count, device=value.device)
        for (number, *_), block in zip(blocks_of(self.columns), blocks, strict=True):
            own = torch.where(block.isnan(), torch.inf, block)  # of which a maximum over ranks would lose sight
            largest[..., number].index_copy_(1, index, torch.maximum(largest[:, index, number], own.squeeze(-1)))
        dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=self._cut)
        return largest.index_select(1, index)

    def _noise(self, rounding: Rounding, rows: slice, device: torch.device) -> Tensor:
        numbers = _row_numbers(self._layout, self._shards, self._position, device)[self._matrices, rows, None]
        columns = row_index((self.columns,), device).to(torch.int32)
        step = torch.tensor(rounding.step, dtype=torch.int32, device=device)
        return noise_bits(rounding.stream, step, numbers, columns)


def convert_states(new: Mapping[str, Tensor], old: Mapping[str, Tensor], name: str, layout: MatrixLayout) -> None:
    """Write a state of whole rows, as it is stored in `old`, as it is to be stored in `new`: tensors of one process."""
    if not new[name].numel():
        return
    by_rows = MatrixLayout(layout.batch_ndim, layout.transposed, out_ndim=layout.out_ndim)  # blocks are of rows
    for shards in matrix_shards(tuple(new[name].shape), by_rows, (), ()):
        held = {each: local_matrices(value, by_rows, shards, 0) for each, value in old.items()}
        stored = StoredStates(by_rows, shards, 0, slice(None), None, None)
        value = stored.read(held, name, torch.promote_types(torch.float32, _dtype_among(old, new, name)))
        with ExitStack() as stack:
            into = {each: stack.enter_context(editing(value, by_rows, shards, 0)) for each, value in new.items()}
            if is_coded(new[name]):
                stored.write(value, into, name, slice(None), None)
            else:
                into[name].copy_(value)


def is_coded(state: Tensor) -> bool:
    """Tell whether a stored state is the codes of blocks."""
    return state.dtype == torch.int8


def read_codes(state: Mapping[str, Tensor], name: str, columns: IndexRanges, dtype: torch.dtype) -> Tensor:
    """Return the numbers that codes (…, rows, columns) stand for; `columns`: of the whole matrix, which are here."""
    codes, absmax = state[name], state[absmax_of(name)]
    values = torch.empty(codes.shape, dtype=dtype, device=codes.device)
    for number, start, stop in blocks_of(columns):
        of_block = steps(absmax[..., number : number + 1]).to(dtype)
        torch.mul(codes[..., start:stop], of_block, out=values[..., start:stop])
    return values


def has_cut_columns(shards: MatrixShards) -> bool:
    """Tell whether some rank has a part of the columns of these matrices."""
    return any(length(columns) != shards.fan_in for columns in shards.columns)


def _dtype_among(old: Mapping[str, Tensor], new: Mapping[str, Tensor], name: str) -> torch.dtype:
    return new[name].dtype if is_coded(old[name]) else old[name].dtype


def _largest_of(block: Tensor) -> Tensor:
    return torch.maximum(block.amax(-1, keepdim=True), -block.amin(-1, keepdim=True)).float()


def _store(held: Tensor, value: Tensor, used: Tensor | None) -> None:
    held.copy_(value if used is None else torch.where(used, value, held))


@lru_cache(maxsize=1024)
def _row_numbers(layout: MatrixLayout, shards: MatrixShards, position: int, device: torch.device) -> Tensor:
    """Number the rows of all matrices here among those of the parameter: int32 (matrices, rows)."""
    out = sum(layout.blocks) * layout.repeats if layout.blocks else shards.fan_out * (layout.heads or (1,))[0]
    heads = layout.rows_of_heads(out)[shards.block]
    own = row_index((shards.rows[position],), device)
    along_out = torch.stack([row_index((heads[head],), device)[own] for head in shards.heads])
    batches = row_index((shards.batches,), device)
    return (batches[:, None, None] * out + along_out).flatten(0, 1).to(torch.int32)

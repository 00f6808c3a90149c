"""The part of a parameter's matrices that is in one rank's own tensor, to read and to change in place."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache

import torch
from torch import Tensor

from muonclip.core import MatrixLayout
from muonclip.core.index_ranges import IndexRanges, length
from muonclip.torch.update.matrix_shards import MatrixShards


def local_matrices(tensor: Tensor, layout: MatrixLayout, shards: MatrixShards, position: int) -> Tensor:
    """Read (count, rows, columns), what of each of these matrices is in this tensor; a view where strides allow it."""
    if shards.as_stored:
        return tensor if tensor.ndim == 3 else tensor.unsqueeze(0)
    return _stack(_by_axes(tensor, layout)[0], shards.local_rows[position])[0]


@contextmanager
def editing(tensor: Tensor, layout: MatrixLayout, shards: MatrixShards, position: int) -> Iterator[Tensor]:
    """Give `local_matrices` to write into; what is not a view is copied back at the end."""
    stack, write_back = writable(tensor, layout, shards, position)
    yield stack
    if write_back is not None:
        write_back()


def writable(
    tensor: Tensor, layout: MatrixLayout, shards: MatrixShards, position: int
) -> tuple[Tensor, Callable[[], None] | None]:
    """Return `local_matrices` to write into, and, where they are not a view, what copies them back."""
    if shards.as_stored:
        return local_matrices(tensor, layout, shards, position), None
    by_axes, in_place = _by_axes(tensor, layout)
    heads = shards.local_rows[position]
    stack, is_view = _stack(by_axes, heads)

    def write_back() -> None:
        if not is_view:
            rows = stack.reshape(len(by_axes), len(heads) * length(heads[0]), by_axes.shape[-1])
            by_axes.index_copy_(1, row_index(heads, tensor.device), rows)
        if not in_place:
            tensor.copy_((by_axes.mT if layout.transposed else by_axes).reshape(tensor.shape))

    return stack, None if is_view and in_place else write_back


@lru_cache(maxsize=1024)
def row_index(heads: tuple[IndexRanges, ...], device: torch.device) -> Tensor:
    """Return the indices of these rows along the out axis, head after head."""
    rows = [torch.arange(start, stop, device=device) for head in heads for start, stop in head]
    return torch.cat(rows) if rows else torch.zeros(0, dtype=torch.int64, device=device)


def _by_axes(tensor: Tensor, layout: MatrixLayout) -> tuple[Tensor, bool]:
    """Reshape a tensor to (batch, out, in), and say whether that is a view."""
    ends = layout.batch_ndim, layout.batch_ndim + layout.out_ndim
    batch, first, rest = (
        math.prod(each) for each in (tensor.shape[: ends[0]], tensor.shape[slice(*ends)], tensor.shape[ends[1] :])
    )
    stacked, is_view = _viewed(tensor, (batch, first, rest))
    return stacked.mT if layout.transposed else stacked, is_view


def _stack(by_axes: Tensor, heads: tuple[IndexRanges, ...]) -> tuple[Tensor, bool]:
    """Turn (batch, out, in) into (batch · heads, rows, in), and say whether that is a view."""
    if heads == (((0, by_axes.shape[1]),),):  # one matrix of all rows, as most are
        return by_axes, True
    size = length(heads[0])
    start = heads[0][0][0] if size else 0
    flat = len(by_axes) * len(heads), size, by_axes.shape[-1]
    if heads == tuple(((start + n * size, start + (n + 1) * size),) for n in range(len(heads))):
        return _viewed(by_axes.narrow(1, start, len(heads) * size).unflatten(1, (len(heads), size)), flat)
    return by_axes.index_select(1, row_index(heads, by_axes.device)).reshape(flat), False


def _viewed(tensor: Tensor, shape: tuple[int, ...]) -> tuple[Tensor, bool]:
    try:
        return tensor.view(shape), True
    except RuntimeError:
        return tensor.reshape(shape), False

"""Conditions on pairs of query and key that a function of their indices sets, evaluated where a pair is asked for.

    condition(b, h, i, j): is key j of head h in sequence b allowed to query i

The function gets single indices, as FlexAttention gives them, and is vectorised; along an axis of which its value does
not depend it is evaluated once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

_AT_ONCE = 2**22  # pairs


@dataclass(frozen=True, eq=False)
class PairCondition:
    """The pairs that `allows(b, h, i, j)` allows, of `sequences`, int64 [B], and `heads`, int64 [H], of one call.

    `allows`: from int64 indices broadcastable to each other, of four axes, to bool of the same four axes.
    """

    allows: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
    sequences: Tensor
    heads: Tensor

    def tile(self, rows: slice, columns: slice) -> Tensor:
        """Return the allowed pairs of queries and keys, bool [B, H, rows, columns]."""
        i, j = (torch.arange(part.start, part.stop, device=self.heads.device) for part in (rows, columns))
        return self.allows(*indices(self.sequences, self.heads, i, j))

    def of_queries(self, batch: int, head: int, queries: Tensor, key_length: int) -> Tensor:
        """Return the keys allowed to queries, int64 [rows], of one sequence and head: bool [rows, Tk]."""
        j = torch.arange(key_length, device=queries.device)
        one = slice(batch, batch + 1), slice(head, head + 1)
        return self.allows(*indices(self.sequences[one[0]], self.heads[one[1]], queries, j))[0, 0]

    def of_rows(self, rows: Tensor, key_length: int) -> Tensor:
        """Return the keys allowed to one query of each sequence and head, int64 [B, H]: bool [B, H, Tk]."""
        b, h, _, j = indices(self.sequences, self.heads, rows[0, :1], torch.arange(key_length, device=rows.device))
        return self.allows(b, h, rows[..., None, None], j).squeeze(2)

    def of_heads(self, heads: list[int]) -> PairCondition:
        """Return the condition of some of the heads."""
        return replace(self, heads=self.heads[heads])

    def dense(self, query_length: int, key_length: int, most: int) -> Tensor | None:
        """Return the allowed pairs, bool [B or 1, H or 1, Tq or 1, Tk or 1]; None where these are more than `most`."""
        b, h, columns = self.sequences, self.heads, slice(0, key_length)
        i, j = (torch.arange(min(2, length), device=h.device) for length in (query_length, key_length))
        few = self.allows(*indices(b[:2], h[:2], i, j))
        sizes = [
            length if stride else 1
            for length, stride in zip((len(b), len(h), query_length, key_length), few.stride(), strict=True)
        ]
        if torch.Size(sizes).numel() > most:
            return None
        parts = [once(self.tile(rows, columns)) for rows in row_blocks(sizes)]
        return torch.cat(parts, 2)


def indices(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Give indices of sequences, heads, queries and keys, each int64 [n], an axis of their own."""
    return b[:, None, None, None], h[:, None, None], i[:, None], j


def at_pairs(function: Callable[..., Any], *of_pairs: Tensor) -> Any:
    """Call `function(b, h, i, j)`, which takes and returns tensors [], at all pairs of indices: int64, broadcastable to
    four axes. Each tensor that it returns is of these four axes; the stride is 0 along those on which it does not
    depend, if they are longer than 1."""
    axes = torch.broadcast_shapes(*(each.shape for each in of_pairs))
    for size in reversed(axes):
        function = _along_an_axis(function, size)
    from torch._dynamo._trace_wrapped_higher_order_op import TransformGetItemToIndex

    with TransformGetItemToIndex():
        return function(*(each.reshape(*[1] * (len(axes) - each.ndim), *each.shape) for each in of_pairs))


def once(tensor: Tensor) -> Tensor:
    """Return the tensor with a length of 1 along the axes on which it does not depend."""
    return tensor[tuple(slice(None) if stride else slice(0, 1) for stride in tensor.stride())]


def row_blocks(sizes: Sequence[int]) -> list[slice]:
    """Divide the queries of pairs [B, H, Tq, Tk] into blocks of a moderate number of pairs."""
    rows = max(1, _AT_ONCE * sizes[2] // max(1, torch.Size(sizes).numel()))
    return [slice(start, min(start + rows, sizes[2])) for start in range(0, sizes[2], rows)]


def _along_an_axis(function: Callable[..., Any], size: int) -> Callable[..., Any]:
    """Vectorise a function along the first axis of its tensors, which is `size` long, or 1 where they do not vary."""

    def vectorised(*tensors: Tensor) -> Any:
        along = tuple(0 if len(each) == size else None for each in tensors)
        given = [each if axis == 0 else each.squeeze(0) for each, axis in zip(tensors, along, strict=True)]
        return torch.vmap(function, along)(*given)

    return vectorised

"""The pairs of query and key that an attention allows, in the terms of `jax.nn.dot_product_attention`, tile by tile.

Shapes: B batch, T queries, S keys, H query heads, G key heads, d head width.
"""

from __future__ import annotations

import functools
import math
import operator
from dataclasses import dataclass
from typing import TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.core import Tracer

from muonclip.core.arguments import check_array, check_flag, check_whole
from muonclip.optax.arguments import check_integers, check_real

Window: TypeAlias = int | tuple[int, int] | None
"""Keys before and after a query that it may see: (left, right), or one number for both; None: all of them."""

SegmentIds: TypeAlias = Array | tuple[Array, Array] | None
"""Numbers of documents, int [B, T], or a tuple of [B, T] and [B, S]; None: one document."""


@dataclass(frozen=True, slots=True)
class AttentionMask:
    """The pairs of query and key that every given condition allows; checked, every array with a batch axis."""

    lengths: tuple[int, int]
    """T, S."""
    mask: Array | None
    """bool [B, H, T, S], each axis the whole or 1; True attends."""
    is_causal: bool
    """Key j ≤ query i, both counted from their start."""
    window: tuple[int, int] | None
    """(left, right): i − left ≤ j ≤ i + right."""
    query_lengths: Array | None
    key_lengths: Array | None
    """Numbers of keys, int [B]; the positions from there on are padding."""
    segments: tuple[Array, Array] | None
    """int [B or 1, T], [B or 1, S]: equal numbers attend to each other."""

    @classmethod
    def read(
        cls,
        shape: tuple[int, int, int, int],
        mask: Array | None,
        is_causal: bool,
        query_lengths: Array | None,
        key_lengths: Array | None,
        window: Window,
        segment_ids: SegmentIds,
    ) -> AttentionMask:
        """Read the masks given to an attention with logits of shape [B, H, T, S].

        Raises ValueError if they do not fit.
        """
        check_flag("is_causal", is_causal)
        batch, _, *lengths = shape
        for name, each in (("query_seq_lengths", query_lengths), ("key_value_seq_lengths", key_lengths)):
            if each is None:
                continue
            check_integers(name, each)
            if jnp.shape(each) != (batch,):
                raise ValueError(f"{name} has shape {jnp.shape(each)}; give one length per sequence, ({batch},).")
        return cls(
            lengths=(lengths[0], lengths[1]),
            mask=None if mask is None else _checked_mask(mask, shape),
            is_causal=is_causal,
            window=checked_window(window),
            query_lengths=query_lengths,
            key_lengths=key_lengths,
            segments=None if segment_ids is None else _checked_segments(segment_ids, shape),
        )

    def tiles(self, height: int, width: int) -> np.ndarray:
        """Return int32 [tiles, 2]: first query and first key of the tiles in which causality and window allow a pair.

        The last ones are moved back into the sequence, over their neighbours: a pair seen twice does not change a
        maximum.
        """
        rows, columns = (
            np.minimum(np.arange(0, length, size), length - size)
            for length, size in zip(self.lengths, (height, width), strict=True)
        )
        row, column = np.meshgrid(rows, columns, indexing="ij")
        left, right = self.window or (math.inf, math.inf)
        right = min(right, 0) if self.is_causal else right
        near = (column <= row + height - 1 + right) & (column + width - 1 >= row - left)
        return np.stack((row[near], column[near]), -1).astype(np.int32)

    def allowed(self, row: Array, column: Array, height: int, width: int, groups: int) -> Array | None:
        """Return the allowed pairs of one tile, bool, broadcastable to [B, G, H / G, height, width]; None: all."""
        i = row + jnp.arange(height, dtype=row.dtype).reshape(1, 1, 1, height, 1)
        j = column + jnp.arange(width, dtype=column.dtype).reshape(1, 1, 1, 1, width)
        conditions: list[Array] = []
        if self.is_causal:
            conditions.append(j <= i)
        if self.window is not None:
            conditions.append((i - self.window[0] <= j) & (j <= i + self.window[1]))
        if self.query_lengths is not None:
            conditions.append(i < jnp.reshape(self.query_lengths, (-1, 1, 1, 1, 1)).astype(i.dtype))
        if self.key_lengths is not None:
            conditions.append(j < jnp.reshape(self.key_lengths, (-1, 1, 1, 1, 1)).astype(j.dtype))
        if self.segments is not None:
            of_queries, of_keys = cut(self.segments[0], 1, row, height), cut(self.segments[1], 1, column, width)
            conditions.append((of_queries[:, :, None] == of_keys[:, None])[:, None, None])
        if self.mask is not None:
            mask = cut(cut(self.mask, 2, row, height), 3, column, width)
            heads = (groups, mask.shape[1] // groups) if mask.shape[1] > 1 else (1, 1)
            conditions.append(mask.reshape(mask.shape[0], *heads, *mask.shape[2:]))
        return functools.reduce(operator.and_, conditions) if conditions else None


def cut(x: Array, axis: int, start: Array, size: int) -> Array:
    """Return x[start : start + size] along `axis`, or x itself where it has one entry for all."""
    return x if x.shape[axis] == 1 else jax.lax.dynamic_slice_in_dim(x, start, size, axis)


def as_bool(mask: Array) -> Array:
    """Return a mask of bools. Raises ValueError for negative numbers, where they can be seen."""
    check_array("mask", mask)
    if mask.dtype == bool:
        return mask
    check_real("mask", mask)
    if not isinstance(mask + 0, Tracer) and bool((mask < 0).any()):
        raise ValueError(
            "mask has negative numbers, as one that is added to the logits; give True (or 1) where a query may attend."
        )
    return mask.astype(bool)  # Flax makes masks of 0 and 1 in float32


def check_broadcasts(name: str, x: Array, shape: tuple[int, int, int, int]) -> None:
    """Raise ValueError unless an array is broadcastable to logits of shape [B, H, T, S]."""
    if x.ndim > 4 or any(size not in (1, whole) for size, whole in zip(x.shape[::-1], shape[::-1], strict=False)):
        raise ValueError(f"{name} has shape {x.shape}; it must be broadcastable to [B, H, T, S], here {shape}.")


def _checked_mask(mask: Array, shape: tuple[int, int, int, int]) -> Array:
    mask = as_bool(mask)
    check_broadcasts("mask", mask, shape)
    return mask.reshape((1,) * (4 - mask.ndim) + mask.shape)


def checked_window(window: Window) -> tuple[int, int] | None:
    """Return (left, right) as ints. Raises TypeError and ValueError for what is not a window."""
    if window is None:
        return None
    pair = window if isinstance(window, tuple) else (window, window)
    if len(pair) != 2:
        raise ValueError(f"local_window_size={window!r} has {len(pair)} numbers; give (left, right), or one for both.")
    left, right = (check_whole("local_window_size", each, at_least=-(2**31)) for each in pair)
    return left, right


def _checked_segments(ids: Array | tuple[Array, Array], shape: tuple[int, int, int, int]) -> tuple[Array, Array]:
    batch, _, rows, columns = shape
    if isinstance(ids, tuple) and len(ids) != 2:
        raise ValueError(f"segment_ids has {len(ids)} arrays; give one, or a tuple of those of queries and keys.")
    of_queries, of_keys = ids if isinstance(ids, tuple) else (ids, ids)
    for each, length in ((of_queries, rows), (of_keys, columns)):
        check_integers("segment_ids", each)
        if each.shape not in ((batch, length), (1, length), (length,)):
            raise ValueError(
                f"segment_ids has shape {each.shape}; give int [B, {length}], or where keys are not the queries' own "
                f"a tuple of [B, {rows}] and [B, {columns}]."
            )
    return of_queries.reshape(-1, rows), of_keys.reshape(-1, columns)

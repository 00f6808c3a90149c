"""States of arrays of matrices that are stored otherwise than they move: see `core.state_storage`.

The number of a column tells its block, without a reshape, so that arrays may be sharded along any axis.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from muonclip.core.matrix_state import BLOCK, MatrixState
from muonclip.core.state_storage import Storage, absmax_of, as_absmax, cut_bits, encode, noise_bits, steps, stream_of
from muonclip.optax.array_layout import ArrayLayout
from muonclip.optax.dtypes import wide


def storage_of(mu_dtype: Any) -> Storage:
    """Read `mu_dtype`. Raises ValueError for a dtype for which there is no stochastic rounding."""
    named = Storage.named("mu_dtype", mu_dtype)
    if named is not None:
        return named
    if mu_dtype is None:
        return Storage()
    name = jnp.dtype(mu_dtype).name
    return Storage.named("mu_dtype", name) or Storage(name)


def zeros(declared: MatrixState, leaf: jax.Array, layout: ArrayLayout, storage: Storage) -> jax.Array:
    """Make a state of all matrices of an array, sharded as the array is."""
    whole = jnp.zeros_like(leaf, dtype_of(declared, leaf.dtype, storage))
    if not declared.is_per_row:
        return whole
    rows = jnp.sum(whole, axis=layout.fan_in, keepdims=True, dtype=whole.dtype)
    columns = declared.stored_shape(leaf.shape, layout.fan_in)[layout.fan_in[0]]
    return rows if columns == 1 else jnp.concatenate([rows] * columns, layout.fan_in[0])


def dtype_of(declared: MatrixState, dtype: Any, storage: Storage) -> Any:
    """Return the dtype in which a state of an array of `dtype` is stored."""
    if declared.dtype == "wide":
        return wide(dtype)
    return jnp.dtype(declared.dtype or storage.dtype or dtype)


class StoredStates:
    """The states of one array: its layout, how they are stored, the dtype in which they move, and the noise of a step
    (`name`, `count`)."""

    def __init__(self, layout: ArrayLayout, storage: Storage, dtype: Any, name: str, count: jax.Array) -> None:
        self._layout, self._storage, self._dtype, self._name, self._count = layout, storage, dtype, name, count

    def read(self, declared: Sequence[MatrixState], stored: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
        """Return the declared states as numbers."""
        return {each.name: self._read(each, stored) for each in declared}

    def write(self, declared: Sequence[MatrixState], new: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
        """Return what is stored of the declared states."""
        stored: dict[str, jax.Array] = {}
        for each in declared:
            stored |= self._write(each, new[each.name])
        return stored

    def _read(self, declared: MatrixState, stored: Mapping[str, jax.Array]) -> jax.Array:
        value = stored[declared.name]
        if declared.dtype is not None:
            return value
        if not self._storage.has_codes:
            return value.astype(self._dtype) if self._storage.is_stochastic else value
        of_block = steps(stored[absmax_of(declared.name)]).astype(self._dtype)
        return value.astype(self._dtype) * self._spread(of_block, value.shape)

    def _write(self, declared: MatrixState, value: jax.Array) -> dict[str, jax.Array]:
        if declared.dtype is not None or not (self._storage.has_codes or self._storage.is_stochastic):
            return {declared.name: value}
        noise = self._noise(value.shape) if self._storage.is_stochastic else None
        if not self._storage.has_codes:
            assert noise is not None
            bits = jax.lax.bitcast_convert_type(value.astype(jnp.float32), jnp.int32)
            cut = jax.lax.bitcast_convert_type(cut_bits(bits, noise, xp=jnp), jnp.float32)
            return {declared.name: cut.astype(jnp.bfloat16)}
        absmax = as_absmax(self._largest(value), xp=jnp)
        of_entry = self._spread(steps(absmax), value.shape).astype(value.dtype)
        codes = encode(value, of_entry, None if noise is None else noise.astype(value.dtype), xp=jnp)
        return {declared.name: codes.astype(jnp.int8), absmax_of(declared.name): absmax}

    def _largest(self, value: jax.Array) -> jax.Array:
        """Return the largest |x| of each block, float32, its blocks along the first of the axes of columns."""
        absolute, fan_in = jnp.abs(value).astype(jnp.float32), self._layout.fan_in
        members = self._members(value.shape)
        parts = [jnp.where(own, absolute, 0.0) for own in members] or [absolute]
        blocks = [jnp.max(part, axis=fan_in, keepdims=True) for part in parts]
        return blocks[0] if len(blocks) == 1 else jnp.concatenate(blocks, fan_in[0])

    def _spread(self, of_block: jax.Array, shape: Sequence[int]) -> jax.Array:
        """Give every entry the number of its block, in a shape that broadcasts."""
        members, axis = self._members(shape), self._layout.fan_in[0]
        if not members:
            return of_block
        result = jax.lax.slice_in_dim(of_block, 0, 1, axis=axis)
        for number, own in enumerate(members[1:], 1):
            result = jnp.where(own, jax.lax.slice_in_dim(of_block, number, number + 1, axis=axis), result)
        return result

    def _members(self, shape: Sequence[int]) -> list[jax.Array]:
        """Tell for each block which columns are in it, in a shape that broadcasts; nothing where one block has all."""
        columns = math.prod(shape[axis] for axis in self._layout.fan_in)
        if columns <= BLOCK:
            return []
        numbers = _numbers(shape, self._layout.fan_in) // BLOCK
        return [numbers == number for number in range(-(-columns // BLOCK))]

    def _noise(self, shape: Sequence[int]) -> jax.Array:
        rows = _numbers(shape, (*self._layout.batch, *self._layout.fan_out))
        return noise_bits(stream_of(self._name), self._count, rows, _numbers(shape, self._layout.fan_in))


def _numbers(shape: Sequence[int], axes: Sequence[int]) -> jax.Array:
    """Number the entries along some axes, the first outermost; int32, in a shape that broadcasts."""
    numbers = jnp.zeros([1] * len(shape), jnp.int32)
    for axis in axes:
        own = [shape[axis] if each == axis else 1 for each in range(len(shape))]
        numbers = numbers * shape[axis] + jax.lax.broadcasted_iota(jnp.int32, own, axis)
    return numbers

"""The entries of arrays that make the query and key of each head, and their scaling.

An array of a projection is a kernel [in, *out] (Flax, Haiku: `in_axis=0`) or [*out, in] (Equinox, PyTorch:
`in_axis=-1`), or a bias [*out]; `out` is [heads · head_dim], [heads, head_dim] or any other axes that are these rows in
order. Scanned layers add an axis, whose position is `layer_axis`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from muonclip.optax.paths import below


@dataclass(frozen=True, slots=True)
class HeadRows:
    """The rows of one part of every head: of the `stride` rows of a head, `size` from `start` on.

    - `path`: the name of an array, or of the module that holds a kernel and perhaps a bias: both are scaled.
    - `num_heads`: number of heads.
    - `size`: rows of the part; None: all rows of the head.
    - `stride`: rows from one head to the next; None: `size` where given, else the rows divided by `num_heads`.
    - `in_axis`: 0 for kernels [in, *out], −1 for [*out, in].
    - `layer_axis`: the axis of scanned layers; None where layers are arrays of their own.

    Raises ValueError for numbers that are out of range.
    """

    path: str
    num_heads: int
    size: int | None = None
    start: int = 0
    stride: int | None = None
    in_axis: int = 0
    layer_axis: int | None = None

    def __post_init__(self) -> None:
        if self.num_heads < 1 or (self.size is not None and self.size < 1) or self.start < 0:
            raise ValueError(f"{self}: num_heads and size must be at least 1, start at least 0.")
        if self.in_axis not in (0, -1):
            raise ValueError(
                f"in_axis={self.in_axis} for {self.path!r}; use 0 for kernels [in, *out], -1 for [*out, in]."
            )

    def arrays(self, shapes: Mapping[str, tuple[int, ...]]) -> list[RowsOfArray]:
        """Return the arrays at `path`, the kernel first, from the shapes of all by name.

        Raises ValueError for what does not fit.
        """
        found = {name: self._without_layer(name, shape) for name, shape in shapes.items() if below(self.path, name)}
        if not found:
            raise ValueError(f"no parameter at {self.path!r}; there are\n  " + "\n  ".join(sorted(shapes)))
        kernel = max(found, key=lambda name: math.prod(found[name]))
        out = found[kernel]
        if len(out) > 1:
            out = out[1:] if self.in_axis == 0 else out[:-1]
        rows = math.prod(out)
        index = self.index(rows)
        others = sorted(name for name in found if name != kernel)
        for name in others:
            if math.prod(found[name]) != rows:
                raise ValueError(
                    f"{self.path!r} holds {name!r} of shape {shapes[name]}, which is neither the kernel {kernel!r} nor "
                    f"a bias of its {rows} rows. Name the array itself, or declare each part."
                )
        return [
            RowsOfArray(
                name, index, self.layer_axis, found[name], self.in_axis if len(found[name]) > len(out) else None
            )
            for name in (kernel, *others)
        ]

    def num_layers(self, shapes: Mapping[str, tuple[int, ...]]) -> int | None:
        """Return how many layers the arrays stack; None where they stack none, or where there is no such array."""
        if self.layer_axis is None:
            return None
        return next((shape[self.layer_axis] for name, shape in shapes.items() if below(self.path, name)), None)

    def _without_layer(self, name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        if self.layer_axis is None:
            return shape
        if not -len(shape) <= self.layer_axis < len(shape):
            raise ValueError(f"layer_axis={self.layer_axis} does not exist in {name!r} of shape {shape}.")
        axis = self.layer_axis % len(shape)
        return shape[:axis] + shape[axis + 1 :]

    def index(self, rows: int) -> np.ndarray:
        """Return the rows of each head, [heads, size], of an array with so many `rows`.

        Raises ValueError where they do not fit.
        """
        stride = self.stride or self.size or rows // self.num_heads
        size = stride - self.start if self.size is None else self.size
        # The whole block must divide evenly; a part of fused rows need only fit.
        whole = self.size is None and self.stride is None
        last = (self.num_heads - 1) * stride + self.start + size
        if (whole and rows % self.num_heads) or size < 1 or last > rows:
            raise ValueError(
                f"{self.path!r} has {rows} rows: {self.num_heads} heads with {size} of {stride} rows each, from row "
                f"{self.start} on, do not fit."
            )
        return self.start + stride * np.arange(self.num_heads)[:, None] + np.arange(size)


@dataclass(frozen=True, slots=True)
class RowsOfArray:
    """The rows of a part in one array: `index` [heads, size] counts along the flattened output."""

    name: str
    index: np.ndarray
    layer_axis: int | None
    shape: tuple[int, ...]
    """The shape of one layer."""
    in_axis: int | None
    """None for a bias."""

    @property
    def out_shape(self) -> tuple[int, ...]:
        if self.in_axis is None:
            return self.shape
        return self.shape[1:] if self.in_axis == 0 else self.shape[:-1]

    def spread(self, factors: jax.Array) -> jax.Array:
        """Spread factors of heads ([heads], or [layers, heads]) so that they broadcast over the array; 1 elsewhere."""
        lead = factors.shape[:-1]
        rows = jnp.ones((*lead, math.prod(self.out_shape)), factors.dtype)
        rows = rows.at[..., self.index.ravel()].set(jnp.repeat(factors, self.index.shape[1], axis=-1))
        spread = jnp.reshape(rows, (*lead, *self.out_shape))
        if self.in_axis is not None:
            spread = jnp.expand_dims(spread, len(lead) if self.in_axis == 0 else -1)
        if self.layer_axis is None:
            return spread
        return jnp.moveaxis(spread, 0, self.layer_axis)


def overlapping(parts: Sequence[RowsOfArray]) -> bool:
    """Tell whether two parts of one array share a row."""
    rows = np.concatenate([part.index.ravel() for part in parts])
    return len(np.unique(rows)) < len(rows)


def shapes_of(leaves: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(leaf.shape) for name, leaf in leaves.items() if hasattr(leaf, "shape")}

"""One array of a parameter tree, read as matrices by Optax's dimension numbers or by the core's layouts.

An array holds units [count, fan_out, fan_in], each stored whole in it; a unit may hold several logical matrices (fused
blocks, heads), which `fused` splits.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import jax.numpy as jnp
from optax.contrib import MuonDimensionNumbers

from muonclip.core import MatrixLayout
from muonclip.core.arguments import check_kind, check_whole

WeightLayout: TypeAlias = MuonDimensionNumbers | MatrixLayout
"""Axes of any array (`reduction_axis`, `output_axis`, the rest a batch), or the core's layout of (*batch, out, *in)."""

KERNEL = MatrixLayout(transposed=True)
"""The layout [in, out] of JAX's usual kernel."""


@dataclass(frozen=True, slots=True)
class ArrayLayout:
    """The axes of an array that number matrices, those that are rows, those that are columns: all axes, each once."""

    batch: tuple[int, ...]
    fan_out: tuple[int, ...]
    fan_in: tuple[int, ...]
    fused: MatrixLayout
    """The layout of the units [count, fan_out, fan_in]."""

    @classmethod
    def from_layout(cls, layout: WeightLayout, shape: Sequence[int]) -> ArrayLayout:
        """Read a shape by a layout. Raises ValueError for a shape that the layout cannot read."""
        ndim = len(shape)
        if isinstance(layout, MatrixLayout):
            layout.matrix_shapes(shape)
            return cls(*layout.axes(ndim), fused=replace(layout, batch_ndim=1, transposed=False, out_ndim=1))
        fan_in, fan_out = (_axes(axes, shape) for axes in (layout.reduction_axis, layout.output_axis))
        used = (*fan_in, *fan_out)
        if not fan_in or not fan_out or len(set(used)) < len(used):
            raise ValueError(f"{layout} does not name different axes of shape {tuple(shape)} for rows and columns.")
        return cls(tuple(axis for axis in range(ndim) if axis not in used), fan_out, fan_in, MatrixLayout(batch_ndim=1))

    @property
    def order(self) -> tuple[int, ...]:
        """The axes of the array in the order of its units: batch, rows, columns."""
        return (*self.batch, *self.fan_out, *self.fan_in)

    def unit_shape(self, shape: Sequence[int]) -> tuple[int, int, int]:
        batch, out, into = (math.prod(shape[axis] for axis in axes) for axes in (self.batch, self.fan_out, self.fan_in))
        return batch, out, into

    def units(self, x: Any) -> Any:
        """Read an array as its units [count, fan_out, fan_in]."""
        return jnp.reshape(jnp.transpose(x, self.order), self.unit_shape(x.shape))

    def array(self, units: Any, shape: Sequence[int]) -> Any:
        """Store units, of any shape that holds them in order, in an array of this shape; the inverse of `units`."""
        moved = jnp.reshape(units, tuple(shape[axis] for axis in self.order))
        return jnp.transpose(moved, sorted(range(len(shape)), key=self.order.__getitem__))

    def describe(self, shape: Sequence[int]) -> str:
        """Write the matrices for people: `8 × (128×64)`, fan_out × fan_in."""
        return self.fused.describe(self.unit_shape(shape))


def _axes(axes: int | Sequence[int], shape: Sequence[int]) -> tuple[int, ...]:
    check_kind("axes of the dimension numbers", axes, (int, Sequence), "the number of an axis, or a tuple of them")
    given = tuple(axes) if isinstance(axes, Sequence) else (axes,)
    for axis in given:
        check_whole("an axis of the dimension numbers", axis, at_least=-99)
        if not -len(shape) <= axis < len(shape):
            raise ValueError(f"axis {axis} of the dimension numbers does not exist in shape {tuple(shape)}.")
    return tuple(axis % len(shape) for axis in given)

"""The entries of arrays that make the query and key of each head, and their scaling.

An array of a projection is a kernel, [in, *out] (Flax, Haiku: `in_axis=0`), [*out, in] (Equinox, PyTorch: `in_axis=-1`)
or [heads, in, head_dim] (Gemma: `in_axis=1`), or a bias [*out]; `out` is [heads · head_dim], [heads, head_dim] or any
other axes that are these rows in order. Scanned layers add an axis, whose position is `layer_axis`. A low-rank adapter
(LoRA) next to the kernel adds x A B to what the kernel makes: the rows of B are scaled with the kernel's.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from muonclip.core.arguments import check_flag, check_kind, check_whole
from muonclip.optax.paths import below


@dataclass(frozen=True, slots=True)
class HeadRows:
    """The rows of one part of every head: of the `stride` rows of a head, `size` from `start` on.

    Args:
        path: The name of an array, or of the module that holds a kernel and perhaps a bias: both are scaled.
        num_heads: Number of heads.
        size: Rows of the part; None: all rows of the head.
        start: The first of these rows within the rows of a head.
        stride: Rows from one head to the next; None: `size` where given, else the rows divided by `num_heads`.
        in_axis: The axis of a kernel of one layer that its input runs along: 0 for [in, *out], −1 for [*out, in], 1 for
            [heads, in, d]. None: the only one with which the shape has these heads; else by the array's name (`kernel`,
            `w` are [in, *out], `weight` is [*out, in]); else 0 where there are three axes.
        layer_axis: The axis of scanned layers; None where layers are arrays of their own.
        rows: Rows of the array, which are checked; None: any that hold the heads.
        heads_last: The heads are the last axis of the output, [in, d, heads], or run fastest along it.

    Raises:
        ValueError: For numbers that are out of range.
    """

    path: str
    num_heads: int
    size: int | None = None
    start: int = 0
    stride: int | None = None
    in_axis: int | None = None
    layer_axis: int | None = None
    rows: int | None = None
    heads_last: bool = False

    def __post_init__(self) -> None:
        check_kind("path", self.path, str, "the name of an array or of a module")
        least = dict.fromkeys(("num_heads", "size", "stride", "rows"), 1) | {
            "start": 0,
            "in_axis": -8,
            "layer_axis": -8,
        }
        for name, at_least in least.items():
            value = getattr(self, name)
            if value is None and name not in ("num_heads", "start"):
                continue
            try:
                object.__setattr__(self, name, check_whole(name, value, at_least))
            except (TypeError, ValueError) as error:
                raise ValueError(f"{self.path!r}: {error}") from None
        check_flag("heads_last", self.heads_last)
        if self.heads_last and self.stride is not None:
            raise ValueError(f"{self.path!r}: stride={self.stride} has no meaning with heads_last; leave it away.")

    def arrays(self, shapes: Mapping[str, tuple[int, ...]]) -> list[RowsOfArray]:
        """Return the arrays at `path`, the kernel first, from the shapes of all by name.

        Raises ValueError for what does not fit.
        """
        found = {name: self._without_layer(name, shape) for name, shape in shapes.items() if below(self.path, name)}
        if not found:
            raise ValueError(f"no parameter at {self.path!r}; there are\n  " + "\n  ".join(sorted(shapes)))
        self._check_adapters(found, shapes)
        kernels = {name: shape for name, shape in found.items() if not is_adapter(name)}
        if not kernels:
            raise ValueError(
                f"{self.path!r} holds a low-rank adapter and not the kernel it adapts; pass all parameters, and "
                "optax.masked or optax.partition for those that are frozen."
            )
        kernel = max(kernels, key=lambda name: math.prod(kernels[name]))
        axis = self._kernel_axis(kernel, kernels[kernel])
        made = [RowsOfArray(kernel, np.empty((0, 0), int), self.layer_axis, kernels[kernel], axis)]
        out = made[0].out_shape
        rows = math.prod(out)
        index = self.index(rows)
        for name in sorted(found.keys() - {kernel}):
            shape = found[name]
            if name not in kernels:
                if _adapter_part(name) == "b":
                    into = 0 if math.prod(shape[1:]) == rows else len(shape) - 1
                    made.append(RowsOfArray(name, index, self.layer_axis, shape, into))
                    if math.prod(made[-1].out_shape) != rows:
                        raise ValueError(f"{name!r} has shape {shapes[name]}, which is not an adapter of {rows} rows.")
                continue
            if math.prod(shape) != rows:
                raise ValueError(
                    f"{self.path!r} holds {name!r} of shape {shapes[name]}, which is neither the kernel {kernel!r} nor "
                    f"a bias of its {rows} rows. Declare each part that makes these rows."
                )
            made.append(RowsOfArray(name, index, self.layer_axis, shape, None))
        return [replace(made[0], index=index), *made[1:]]

    def is_adapter_alone(self, names: Iterable[str]) -> bool:
        """Tell whether of a projection the adapter is there and the kernel is not."""
        found = [name for name in names if below(self.path, name)]
        return bool(found) and all(map(is_adapter, found))

    def head_size(self, shapes: Mapping[str, tuple[int, ...]]) -> int:
        """Return how many rows of each head the part has."""
        return self.arrays(shapes)[0].index.shape[1]

    def in_axis_of(self, name: str, shape: tuple[int, ...]) -> int:
        """Return the axis of a kernel of this part, without its layers, that its input runs along."""
        axis = self._kernel_axis(name, self._without_layer(name, shape))
        return 0 if axis is None else axis

    def _check_adapters(self, found: Mapping[str, Any], shapes: Mapping[str, Any]) -> None:
        """Raise ValueError where half of an adapter is there, or an adapter is next to the array and not below it."""
        parts = {_adapter_part(name) for name in found} - {None}
        if parts == {"a"}:
            alone = next(name for name in found if is_adapter(name))
            raise ValueError(
                f"{self.path!r} holds {alone!r} of shape {shapes[alone]}, which is neither a kernel nor a bias: "
                "the second half of the adapter is missing."
            )
        module = self.path.rpartition("/")[0]
        beside = [name for name in shapes if name not in found and _adapted_module(name) == module]
        if beside and self.path in found:
            raise ValueError(
                f"{self.path!r} is adapted by {beside[0]!r}, and both make the same rows: declare {module!r}, which "
                "scales them together."
            )

    def _kernel_axis(self, name: str, shape: tuple[int, ...]) -> int | None:
        """Return the axis of the input, counted from the front; None for a bias.

        Raises ValueError where none, or more than one, could be meant.
        """
        ndim = len(shape)
        if ndim < 2:
            return None
        last = re.split(r"[./]", name)[-1]
        if self.in_axis is not None:
            if not -ndim <= self.in_axis < ndim:
                raise ValueError(f"in_axis={self.in_axis} does not exist in {name!r} of shape {shape}.")
            axis = self.in_axis % ndim
            if last == "weight" and axis == 0 and ndim == 2:
                raise ValueError(
                    f"{name!r} is declared with in_axis=0, [in, out]; a `weight` is [out, in]. Leave in_axis away, or "
                    "give in_axis=-1."
                )
            self._check_axes(name, shape, axis)
            return axis
        fitting = [axis for axis in dict.fromkeys((0, 1, ndim - 1)) if self._axes_fit(shape, axis)]
        named = {"kernel": 0, "w": 0, "weight": ndim - 1}.get(last)
        if not fitting:
            self._check_axes(name, shape, named or 0)
        if named in fitting:
            return named
        if len(fitting) == 1 or (ndim > 2 and fitting[0] == 0):
            return fitting[0]
        raise ValueError(
            f"{name!r} of shape {shape} has rows for {self.num_heads} heads whichever of the axes {fitting} is the "
            "input's. Say which: in_axis=0 for [in, heads · d], in_axis=-1 for [heads · d, in], in_axis=1 for "
            "[heads, in, d]."
        )

    def _axes_fit(self, shape: tuple[int, ...], axis: int) -> bool:
        try:
            self._check_axes("", shape, axis)
        except ValueError:
            return False
        return True

    def _check_axes(self, name: str, shape: tuple[int, ...], axis: int) -> None:
        """Raise ValueError unless the rows of the heads follow one another in the axes of the output."""
        out = shape[:axis] + shape[axis + 1 :]
        self.index(math.prod(out))
        blocks = [math.prod(out[i:]) for i in range(1, len(out))]  # rows in one entry of the leading axes
        if not blocks:
            return
        if self.heads_last:
            fits = self.num_heads in blocks
        elif self.stride is None and self.size is None:
            fits = math.prod(out) // self.num_heads in blocks
        else:
            stride = self.stride or self.size
            assert stride is not None
            fits = stride in blocks or out[-1] % stride == 0 or stride == math.prod(out)
        if not fits:
            where = "last" if self.heads_last else "leading"
            raise ValueError(
                f"{name!r} of shape {shape} has {self.num_heads} heads in no {where} axes of its output {out} "
                f"(in_axis={axis}). Are axes of the input (in_axis) or of layers (layer_axis) declared otherwise than "
                "they are?"
            )

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
        stride = (not self.heads_last and (self.stride or self.size)) or rows // self.num_heads
        size = stride - self.start if self.size is None else self.size
        # The whole block must divide evenly; a part of fused rows need only fit.
        whole = self.heads_last or (self.size is None and self.stride is None)
        last = (self.num_heads - 1) * stride + self.start + size
        if (whole and rows % self.num_heads) or size < 1 or last > rows or self.rows not in (None, rows):
            raise ValueError(
                f"{self.path!r} has {rows} rows: {self.num_heads} heads with {size} of {stride} rows each, from row "
                f"{self.start} on, do not fit."
                + ("" if self.rows is None else f" The heads that are declared have {self.rows} rows in all.")
            )
        heads, of_head = np.arange(self.num_heads)[:, None], self.start + np.arange(size)
        return self.num_heads * of_head + heads if self.heads_last else stride * heads + of_head


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
        return self.shape[: self.in_axis] + self.shape[self.in_axis + 1 :]

    def spread(self, factors: jax.Array) -> jax.Array:
        """Spread factors of heads ([heads], or [layers, heads]) so that they broadcast over the array; 1 elsewhere."""
        lead = factors.shape[:-1]
        rows = jnp.ones((*lead, math.prod(self.out_shape)), factors.dtype)
        rows = rows.at[..., self.index.ravel()].set(jnp.repeat(factors, self.index.shape[1], axis=-1))
        spread = jnp.reshape(rows, (*lead, *self.out_shape))
        if self.in_axis is not None:
            spread = jnp.expand_dims(spread, len(lead) + self.in_axis)
        if self.layer_axis is None:
            return spread
        return jnp.moveaxis(spread, 0, self.layer_axis)


def _adapter_part(name: str) -> str | None:
    """Return "a" or "b" for the factors of a low-rank adapter, x A B; None for other arrays."""
    found = re.search(r"lora_?([ab])$", re.split(r"[./]", name)[-1], re.IGNORECASE)
    return found and found[1].lower()


def is_adapter(name: str) -> bool:
    """Tell whether an array is a factor of a low-rank adapter, by its name."""
    return _adapter_part(name) is not None


def _adapted_module(name: str) -> str | None:
    """Return the module whose kernel an array adapts, `q` of `q/lora_a` and of `q/lora/lora_a`; None for others."""
    if not is_adapter(name):
        return None
    module = name.rpartition("/")[0]
    return module.rpartition("/")[0] if module.endswith("/lora") else module


def overlapping(parts: Sequence[RowsOfArray]) -> int:
    """Return how many rows of one array several parts have, counted once more for each."""
    rows = np.concatenate([part.index.ravel() for part in parts])
    return len(rows) - len(np.unique(rows))


def shapes_of(leaves: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(leaf.shape) for name, leaf in leaves.items() if hasattr(leaf, "shape")}

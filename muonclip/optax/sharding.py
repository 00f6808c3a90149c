"""Orthogonalisation of sharded matrices: each whole matrix on one device, and back.

Newton–Schulz needs whole matrices. Left alone, the partitioner gathers each of them on every device. Here each matrix
whose rows or columns are sharded is assigned to one device: with k matrices of one shape on W devices, one all-to-all
brings k/W of them, whole, to each device, and one brings the results back. What is whole already (experts, scanned
layers, heads that are matrices of their own, sharded as such) is not moved.

Under a mesh of explicit axes (`jax.make_mesh`'s default) arrays carry their sharding into `jax.jit`. Under automatic
axes they do not, and the transformation has to be told: `shardings=jax.tree.map(lambda p: p.sharding, params)`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from muonclip.core import MatrixLayout
from muonclip.optax.array_layout import ArrayLayout
from muonclip.optax.dtypes import wide
from muonclip.optax.newton_schulz import NewtonSchulz

MeshAxes: TypeAlias = tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Matrices:
    """The matrices of one array as its device sees them, [count, *fan_out, *fan_in], and what has to move.

    `moves`: the axes that are spread over mesh axes, and have to be brought together.
    """

    layout: ArrayLayout
    fused: MatrixLayout
    """The layout of its units, once they are brought together."""
    scales: tuple[float, ...]
    """The scale of each block."""
    moves: tuple[tuple[int, MeshAxes], ...] = ()

    def spread(self, x: jax.Array) -> jax.Array:
        moved, axes = jnp.transpose(x, self.layout.order), len(self.layout.batch)
        return jnp.reshape(moved, (math.prod(moved.shape[:axes]), *moved.shape[axes:]))


def orthogonalize_arrays(
    arrays: Sequence[jax.Array],
    layouts: Sequence[ArrayLayout],
    scales: Sequence[tuple[float, ...]],
    newton_schulz: NewtonSchulz,
    shardings: Sequence[jax.sharding.Sharding | None],
) -> list[jax.Array]:
    """Replace each logical matrix of the arrays by its polar factor times the scale of its block."""
    groups: dict[Mesh | AbstractMesh | None, list[int]] = {}
    placements = [_placement(array, given) for array, given in zip(arrays, shardings, strict=True)]
    done = {index: array for index, array in enumerate(arrays) if not array.size}
    for index, placement in enumerate(placements):
        if index not in done:
            groups.setdefault(placement.mesh if placement else None, []).append(index)
    for mesh, members in groups.items():
        plans = [_matrices(arrays[index].shape, layouts[index], scales[index], placements[index]) for index in members]

        def run(*own: jax.Array, plans: list[Matrices] = plans, mesh: Any = mesh) -> tuple[jax.Array, ...]:
            return _orthogonalize(own, plans, newton_schulz, {} if mesh is None else dict(mesh.shape))

        own = [arrays[index] for index in members]
        if mesh is not None:
            specs = tuple(placement.spec for index in members if (placement := placements[index]))
            results = jax.shard_map(run, mesh=mesh, in_specs=specs, out_specs=specs, check_vma=False)(*own)
        else:
            results = run(*own)
        done.update(zip(members, results, strict=True))
    return [done[index] for index in range(len(arrays))]


def check_visible(params: Any, shardings: Any) -> None:
    """Raise ValueError where arrays are sharded so that a jitted update cannot see it, and nothing was declared."""
    if shardings is not None:
        return
    for path, leaf in jax.tree_util.tree_flatten_with_path(params)[0]:
        if isinstance(leaf, Tracer) or not isinstance(leaf, jax.Array):
            continue
        sharding = leaf.sharding
        if isinstance(sharding, NamedSharding) and any(sharding.spec):
            explicit = zip(sharding.mesh.axis_names, sharding.mesh.axis_types, strict=True)
            hidden = {name for name, kind in explicit if kind is not AxisType.Explicit}
            if hidden & {name for axes in sharding.spec for name in _names(axes)}:
                raise ValueError(
                    f"{jax.tree_util.keystr(path)} is sharded over the mesh axes {sorted(hidden)}, which are not "
                    "explicit: a jitted update cannot see that, and every matrix would be gathered on every device. "
                    "Pass shardings=jax.tree.map(lambda p: p.sharding, params), or make the mesh with explicit axes."
                )


def _placement(array: jax.Array, given: jax.sharding.Sharding | None) -> NamedSharding | None:
    """Return how the array is sharded, if at all: as declared, as its type says, or as it is placed."""
    sharding = given if given is not None else jax.typeof(array).sharding
    if given is None and not isinstance(array, Tracer) and isinstance(array, jax.Array):
        sharding = array.sharding
    return sharding if isinstance(sharding, NamedSharding) and any(map(_names, sharding.spec)) else None


def _matrices(
    shape: Sequence[int], layout: ArrayLayout, scales: tuple[float, ...], placement: NamedSharding | None
) -> Matrices:
    if placement is None:
        return Matrices(layout, layout.fused, scales)
    sizes = placement.mesh.shape
    spec = (*placement.spec, *(None,) * (len(shape) - len(placement.spec)))
    ways = {axis: math.prod(sizes[name] for name in _names(spec[axis])) for axis in range(len(shape))}
    inner = (*layout.fan_out, *layout.fan_in)
    split = [axis for axis in inner if ways[axis] > 1]
    fused = layout.fused
    if split == [layout.fan_out[0]] and _aligned(fused, ways[split[0]]):
        own = replace(
            fused,
            heads=tuple(heads // ways[split[0]] for heads in fused.heads),
            repeats=max(fused.repeats // ways[split[0]], 1),
            blocks=fused.blocks if fused.repeats > 1 else (),
        )
        return Matrices(layout, own, scales)
    return Matrices(layout, fused, scales, tuple((1 + inner.index(axis), _names(spec[axis])) for axis in split))


def _aligned(fused: MatrixLayout, ways: int) -> bool:
    """Tell whether each of `ways` equal parts of the rows holds whole logical matrices."""
    divides = bool(fused.heads) and all(heads % ways == 0 for heads in fused.heads)
    return divides and (fused.repeats % ways == 0 if fused.repeats > 1 else len(fused.heads) == 1)


def _orthogonalize(
    arrays: Sequence[jax.Array], plans: Sequence[Matrices], newton_schulz: NewtonSchulz, sizes: dict[str, int]
) -> tuple[jax.Array, ...]:
    """Bring the parts of the arrays on one device together, orthogonalise them, and send them back."""
    spread = [matrices.spread(array) for array, matrices in zip(arrays, plans, strict=True)]
    together: dict[tuple[Any, ...], list[int]] = {}
    for index, (x, matrices) in enumerate(zip(spread, plans, strict=True)):
        rows = len(matrices.layout.fan_out)
        # What is whole already needs no stack for the way; equal shapes meet in newton_schulz.
        travels_as = (matrices.moves, x.shape[1:], rows, x.dtype, matrices.fused, matrices.scales)
        key = travels_as if matrices.moves else (index,)
        together.setdefault(key, []).append(index)
    blocks: list[list[jax.Array]] = []
    shapes: list[tuple[int, ...]] = []
    for members in together.values():
        matrices = plans[members[0]]
        stack = jnp.concatenate([spread[index] for index in members]) if len(members) > 1 else spread[members[0]]
        whole = _deal_out(stack, matrices.moves, sizes)
        shapes.append(whole.shape)
        blocks.append(matrices.fused.split(jnp.reshape(whole, _unit_shape(matrices, whole.shape)), xp=jnp))
    flat = iter(newton_schulz([block for each in blocks for block in each]))
    done: dict[int, jax.Array] = {}
    for members, own, shape in zip(together.values(), blocks, shapes, strict=True):
        matrices = plans[members[0]]
        polar, scales = [next(flat) for _ in own], matrices.scales
        if len(set(scales)) > 1:
            polar = [block.astype(wide(block.dtype)) * scale for block, scale in zip(polar, scales, strict=True)]
            scales = (1.0,)
        units = matrices.fused.join(polar, _unit_shape(matrices, shape), xp=jnp)
        back = _bring_back(jnp.reshape(units, shape), matrices.moves)
        counts = [len(spread[index]) for index in members]
        edges = [sum(counts[:i]) for i in range(1, len(counts))]
        for index, part in zip(members, jnp.split(back[: sum(counts)], edges), strict=True):
            done[index] = matrices.layout.array(part.astype(wide(part.dtype)) * scales[0], arrays[index].shape)
    return tuple(done[index] for index in range(len(arrays)))


def _unit_shape(matrices: Matrices, shape: Sequence[int]) -> tuple[int, int, int]:
    """Flatten the shape [count, *fan_out, *fan_in] to [count, fan_out, fan_in]."""
    columns = 1 + len(matrices.layout.fan_out)
    return shape[0], math.prod(shape[1:columns]), math.prod(shape[columns:])


def _deal_out(stack: jax.Array, moves: Sequence[tuple[int, MeshAxes]], sizes: dict[str, int]) -> jax.Array:
    """Send whole matrices to their owners: [count, …], axes spread over the mesh → [⌈count/W⌉, …], whole axes.

    Zero matrices fill up the last share.
    """
    ways = math.prod(sizes[name] for _, names in moves for name in names)
    missing = -len(stack) % ways
    if missing:
        stack = jnp.pad(stack, [(0, missing)] + [(0, 0)] * (stack.ndim - 1))
    for axis, names in moves:
        stack = jax.lax.all_to_all(stack, names, split_axis=0, concat_axis=axis, tiled=True)
    return stack


def _bring_back(stack: jax.Array, moves: Sequence[tuple[int, MeshAxes]]) -> jax.Array:
    for axis, names in reversed(moves):
        stack = jax.lax.all_to_all(stack, names, split_axis=axis, concat_axis=0, tiled=True)
    return stack


def _names(axes: Any) -> MeshAxes:
    """Return the mesh axes of one entry of a PartitionSpec."""
    if axes is None or axes is PartitionSpec.UNCONSTRAINED:
        return ()
    return (axes,) if isinstance(axes, str) else tuple(axes)

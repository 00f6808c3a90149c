"""Parameters are read as matrices: by what a group says, by the attention they belong to, or by their shape."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from torch import Tensor
from torch.nn.modules.conv import _ConvNd

from muonclip.core import MatrixLayout
from muonclip.core.arguments import kind, shown
from muonclip.core.head_parts import PerHead, heads_per_matrix
from muonclip.torch.heads import HeadRows, QKProjection, axes_of

T = TypeVar("T")

_MOST_BLOCKS = 8  # in a fused weight; more are no pattern


def default_layout(shape: Sequence[int]) -> MatrixLayout:
    """Read a parameter of which only the shape is known: [out, in] as a matrix, [E, out, in] as a stack of them, four
    axes and more as a convolution [out, in, *window]. Raises ValueError for vectors."""
    if len(shape) < 2:
        raise ValueError(f"has shape {tuple(shape)}; Muon needs a matrix. Leave it to AdamW.")
    return MatrixLayout(batch_ndim=1) if len(shape) == 3 else MatrixLayout()


def layouts_of(
    group: Mapping[str, Any], layout: MatrixLayout | Sequence[MatrixLayout] | None
) -> list[MatrixLayout | None]:
    """Return the layout of each parameter of a Muon group. Raises ValueError for those that its shape does not fit."""
    if not (layout is None or isinstance(layout, MatrixLayout | list | tuple)):
        raise TypeError(
            f"layout={shown(layout)} is a {kind(layout)}; give a MatrixLayout of muonclip.core, or a list with one, or "
            "None, for each parameter of the group."
        )
    given = [layout] * len(group["params"]) if layout is None or isinstance(layout, MatrixLayout) else list(layout)
    if len(given) != len(group["params"]):
        raise ValueError(f"layout lists {len(given)} layouts for the {len(group['params'])} parameters of its group.")
    layouts: list[MatrixLayout | None] = []
    for position, (item, own) in enumerate(zip(group["params"], given, strict=True)):
        name, parameter = item if isinstance(item, tuple) else (f"parameter {position} of the group", item)
        if not isinstance(parameter, Tensor):
            raise TypeError(f"{name!r} is a {type(parameter).__name__}; the optimizer takes tensors.")
        if not (own is None or isinstance(own, MatrixLayout)):
            raise TypeError(f"layout of {name!r} is {shown(own)}; give a MatrixLayout of muonclip.core, or None.")
        try:
            chosen = own or default_layout(parameter.shape)
            if parameter.numel():
                chosen.matrix_shapes(parameter.shape)
        except ValueError as error:
            raise ValueError(f"{name!r}: {error}" if own else f"{name!r} {error}") from None
        layouts.append(chosen)
        if parameter.is_complex():
            raise ValueError(f"{name!r} is complex; Muon's polynomials are real. Leave it to AdamW.")
    return layouts


def projection_layouts(projections: Mapping[str, QKProjection], per_head: PerHead) -> dict[int, MatrixLayout]:
    """Find the layouts of the weights of attentions, by id: fused q|k|v split, with `per_head` each head, or so many.

    Raises ValueError, naming the attention, for heads that do not divide.
    """
    together = heads_per_matrix(per_head)
    parts: dict[int, list[tuple[str, HeadRows]]] = {}
    names: dict[int, str] = {}
    for name, projection in projections.items():
        for side, rows in projection.parts():
            weight = id(getattr(rows.module, rows.weight))
            parts.setdefault(weight, []).append((side, rows))
            names.setdefault(weight, f"the {side} of {name or 'the model'}")
    layouts = {key: _split_by_heads(names[key], sides, together) for key, sides in parts.items()}
    return {key: layout for key, layout in layouts.items() if layout is not None}


def _split_by_heads(name: str, parts: list[tuple[str, HeadRows]], together: int) -> MatrixLayout | None:
    """Return the matrices that the rows of the heads cut a weight into; None where its shape says the same, or where
    the rows follow no pattern. `together`: how many heads are one matrix; 0: all.

    The sequence of blocks may repeat along the rows, once for every head or for every group of heads. K2's W_ukv
    ([k_nope | v] per head) is such a weight; unless heads are divided it stays the one matrix it is in K2. Of rows that
    are counted along several axes, the first ones are a batch where they number queries, keys and values, [3, …, in].
    """
    first, per_head = parts[0][1], together > 0
    weight: Tensor = getattr(first.module, first.weight)
    axes = axes_of(first.axis)
    if any(axes_of(rows.axis) != axes for _, rows in parts) or len(axes) == weight.ndim:
        return None
    sizes = [weight.shape[axis] for axis in axes]
    count = math.prod(sizes)
    if weight.ndim == 3 and axes == (1,):  # [in, heads, width]: each row is a head's slice
        return MatrixLayout(transposed=True, heads=(_divided(name, count, together),) if per_head else ())
    is_convolution = isinstance(first.module, _ConvNd) and first.module.groups == 1
    if weight.ndim > 2 and axes == (0,) and not is_convolution:
        return None
    sides, heads = _owners_of_rows(parts, count)
    in_front = next((place for place, axis in enumerate(axes) if axis != place), len(axes))  # of the axis of columns
    transposed = in_front < len(axes)
    if transposed and axes[in_front:] != tuple(range(in_front + 1, weight.ndim)):
        return None
    batch = in_front if transposed else _batch_axes(sides, sizes)
    out_ndim = 1 if transposed else len(axes) - batch
    if batch:
        size = count // math.prod(sizes[:batch])
        slices = [(sides[start : start + size], heads[start : start + size]) for start in range(0, count, size)]
        if any(len(set(of_slice)) > 1 for of_slice, _ in slices):
            return None
        divisions = {_divided(name, _equal_heads(of_slice), together) for _, of_slice in slices if of_slice[0] >= 0}
        equal = tuple(divisions) if per_head and len(divisions) == 1 else ()
        return MatrixLayout(batch, transposed, heads=equal, out_ndim=out_ndim)
    counts = sorted({1, *(rows.num_heads for _, rows in parts)})
    repeats = min((n for n in counts if _repeats(sides, n)), key=lambda n: len(_blocks(sides[: count // n])))
    blocks = _blocks(sides[: count // repeats])
    sides_there = {side for side, _ in blocks}
    fused = len(sides_there) > 1 and (repeats == 1 or {"query", "key"} <= sides_there)
    if len(blocks) > _MOST_BLOCKS or (len(axes) == 1 and not fused and not per_head):
        return None
    if not fused and not per_head:
        return MatrixLayout(transposed=transposed, out_ndim=out_ndim)
    divided: list[int] = []
    position = 0
    for _, size in blocks:
        rows = [head for start in range(0, count, count // repeats) for head in heads[start + position :][:size]]
        divided.append(_divided(name, _equal_heads(rows), together))
        position += size
    return MatrixLayout(
        transposed=transposed,
        blocks=tuple(size for _, size in blocks),
        heads=tuple(divided) if per_head else (),
        repeats=repeats,
        out_ndim=out_ndim,
    )


def _divided(name: str, heads: int, together: int) -> int:
    """Count the matrices of a projection with these heads, of which so many `together` are one, and fewer too."""
    if heads <= together or not together:
        return 1
    if heads % together:
        raise ValueError(
            f"per_head={together} does not divide the {heads} heads of {name}. Give a number that divides the heads of "
            "every projection, True for each head, or False."
        )
    return heads // together


def _batch_axes(sides: Sequence[str], sizes: Sequence[int]) -> int:
    """Count the first axes of rows that number whole sides: each of their slices is of one, and no side is of two."""
    batch = 0
    for axis in range(len(sizes) - 1):
        length = math.prod(sizes[axis + 1 :])
        slices = [set(sides[start : start + length]) for start in range(0, len(sides), length)]
        known = [side for each in slices for side in each if side != "other"]
        if any(len(each) > 1 for each in slices) or len(set(known)) < len(known):
            break
        batch = axis + 1
    return batch


def _owners_of_rows(parts: list[tuple[str, HeadRows]], count: int) -> tuple[list[str], list[int]]:
    """Tell for each of the rows of a weight which side it belongs to, "query", "key", …, and which head of it."""
    sides, heads = ["other"] * count, [-1] * count
    for side, rows in parts:
        for head, index in enumerate(rows.rows("cpu").tolist()):
            for row in index:
                sides[row], heads[row] = side, head
    return sides, heads


def _equal_heads(rows: Sequence[int]) -> int:
    """Count the heads of these rows, if each has its rows together and as many as the others; else 1."""
    blocks = _blocks(rows)
    each_together = len(set(blocks)) == len(blocks)
    return len(blocks) if each_together and len({length for _, length in blocks}) == 1 else 1


def _repeats(sequence: Sequence[object], times: int) -> bool:
    """Tell whether a sequence repeats this many times."""
    period = len(sequence) // times
    return len(sequence) % times == 0 and sequence[period:] == sequence[:-period]


def _blocks(sequence: Sequence[T]) -> list[tuple[T, int]]:
    """Count equal neighbours: [a, a, b] → [(a, 2), (b, 1)]."""
    return [(value, len(list(group))) for value, group in itertools.groupby(sequence)]

"""The rows of a weight that belong to each head: which of them this rank has, and scaling them.

Shapes: a `nn.Linear` weight is [out, in]; the rows of a head are along its out axis. The rows of a weight with several
such axes, as queries, keys and values stacked in [3, heads, width, in], are counted along them together. Arithmetic on
placements, without communication.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor, nn

from muonclip.core.arguments import check_kind, check_whole
from muonclip.core.index_ranges import IndexRanges
from muonclip.torch.mesh import is_dtensor, is_replicate, is_shard, local_indices, local_part

if TYPE_CHECKING:
    from torch.distributed.tensor.placement_types import Placement

Axes: TypeAlias = int | tuple[int, ...]
"""The axis of the rows, or several in ascending order, whose rows are counted together, the last the fastest."""


@dataclass(frozen=True, slots=True, eq=False)
class HeadRows:
    """The rows of one weight, and of its bias, that belong to each head.

    Head h owns `size` rows from `start + h · stride`, or the rows `index[h]` where they follow no such rule. `weight`
    and `bias` are read anew at every use, because sharding engines replace parameters.

    Args:
        module: The module that holds the weight.
        num_heads: Number of heads.
        size: Rows of each head.
        start: The first row of the first head.
        stride: Rows from one head to the next; None: `size`, so that heads are adjacent.
        weight: The name of the weight in the module.
        bias: The name of its bias, where there is one; "": none.
        axis: The out axis of the weight (1 for GPT-2's transposed `Conv1D`), or several: with (0, 1) of a weight [3,
            out, in], row 2 · out + 5 is its [2, 5].
        index: The rows of each head, int64 [heads, size], where no start and stride give them.
    """

    module: nn.Module
    num_heads: int
    size: int
    start: int = 0
    stride: int | None = None
    weight: str = "weight"
    bias: str = "bias"
    axis: Axes = 0
    index: Tensor | None = None

    @classmethod
    def from_index(
        cls, index: Tensor, module: nn.Module, weight: str = "weight", bias: str = "bias", axis: Axes = 0
    ) -> Self:
        """Make the rows `index` [heads, size], by start and stride where they follow one."""
        check_kind("module", module, nn.Module, "a module")
        _check_index("index", index)
        heads, size = index.shape
        index = index.sort(1).values.cpu()
        start = int(index[0, 0])
        stride = int(index[1, 0]) - start if heads > 1 else size
        rows = cls(module, heads, size, start, None if stride == size else stride, weight, bias, axis)
        regular = stride >= size and torch.equal(rows.rows(index.device), index)
        return rows if regular else cls(module, heads, size, start, None, weight, bias, axis, index)

    @property
    def step(self) -> int:
        """Number of rows from one head to the next."""
        return self.size if self.stride is None else self.stride

    def rows(self, device: torch.device | str) -> Tensor:
        """Return the rows of each head, int64 [heads, size]."""
        if self.index is not None:
            return self.index.to(device)
        first = self.start + self.step * torch.arange(self.num_heads, device=device)
        return first[:, None] + torch.arange(self.size, device=device)

    def parameters(self) -> Iterator[tuple[Tensor, Axes]]:
        """Yield the weight and, where there is one, the bias, each with its axis of rows."""
        yield getattr(self.module, self.weight), self.axis
        bias = getattr(self.module, self.bias, None) if self.bias else None
        if isinstance(bias, Tensor):
            yield bias, 0

    def of(self, parameter: Tensor, axis: Axes) -> Tensor:
        """Return the parameter with `axis` counting heads and a last axis counting the rows of each.

        Several axes become one in the place of the first. The result is a view, except for rows given by `index` and
        for several axes that are not next to each other. Of a DTensor it is what this rank has; raises ValueError where
        `axis` is sharded.
        """
        axes = axes_of(axis)
        if is_dtensor(parameter):
            sizes = [parameter.shape[each] for each in axes]
            parameter, held = local_rows(self.name_of(parameter), parameter, axes)
            if any(runs != ((0, size),) for runs, size in zip(held, sizes, strict=True)):
                raise ValueError(
                    f"{self.weight} has its {math.prod(sizes)} rows on several ranks, this one has {held}: its heads "
                    "cannot be read here. Read the whole weight, parameter.full_tensor()."
                )
        first, last = axes[0], axes[0] + len(axes) - 1
        if last > first:
            parameter = parameter.movedim(axes, tuple(range(first, last + 1))).flatten(first, last)
        if self.index is not None:
            chosen = parameter.index_select(first, self.rows(parameter.device).flatten())
            return chosen.unflatten(first, (self.num_heads, self.size)).movedim(first + 1, -1)
        length = (self.num_heads - 1) * self.step + self.size
        return parameter.narrow(first, self.start, length).unfold(first, self.size, self.step)

    def name_of(self, parameter: Tensor) -> str:
        """Name the attribute and its module, for errors."""
        attribute = self.weight if getattr(self.module, self.weight) is parameter else self.bias
        return f"{attribute} of {type(self.module).__name__}"

    def check(self, name: str) -> None:
        """Raise ValueError where the weight does not have these rows, or its placements do not say where a row is."""
        check_kind(f"{name}: module", self.module, nn.Module, "a module")
        check_kind(f"{name}: weight", self.weight, str, "the name of an attribute")
        check_kind(f"{name}: bias", self.bias, str, 'the name of an attribute, or "" for none')
        weight = getattr(self.module, self.weight, None)
        if weight is None:
            raise ValueError(f"{name}: {type(self.module).__name__} has no weight={self.weight!r}.")
        if not isinstance(weight, nn.Parameter):
            raise ValueError(
                f"{name}: the {self.weight} of {type(self.module).__name__} is not a parameter but computed from "
                "others, so scaling it would change nothing. Declare what it is computed from, or give a `reason`."
            )
        check_placements(f"{name}: {self.name_of(weight)}", weight)
        for option, least in (("num_heads", 1), ("size", 1), ("start", 0), ("stride", 1)):
            if option != "stride" or self.stride is not None:
                check_whole(f"{name}: {option}", getattr(self, option), least)
        axes = tuple(check_whole(f"{name}: axis", each, 0) for each in axes_of(self.axis))
        if not axes or list(axes) != sorted(set(axes)) or not 0 <= axes[0] <= axes[-1] < weight.ndim:
            raise ValueError(
                f"{name}: axis={self.axis} does not name axes, in ascending order, of a weight of shape "
                f"{tuple(weight.shape)}."
            )
        rows = math.prod(weight.shape[each] for each in axes)
        if self.index is not None:
            index = self.index
            _check_index(f"{name}: index", index)
            if index.shape != (self.num_heads, self.size) or index.min() < 0 or index.max() >= rows:
                raise ValueError(
                    f"{name}: index has shape {tuple(index.shape)} and rows {int(index.min())} to {int(index.max())}; "
                    f"it must be [{self.num_heads}, {self.size}] of rows of a weight of shape {tuple(weight.shape)}."
                )
            return
        end = self.start + (self.num_heads - 1) * self.step + self.size
        if min(self.num_heads, self.size) < 1 or self.start < 0 or self.step < self.size or end > rows:
            raise ValueError(
                f"{name}: {self.num_heads} heads of {self.size} rows (start {self.start}, stride {self.step}) do not "
                f"fit a weight of shape {tuple(weight.shape)}, which has {rows} rows along axis {self.axis}."
            )


@torch.no_grad()
def scale_heads(rows: HeadRows, parameter: Tensor, axis: Axes, factors: Tensor) -> None:
    """Multiply the rows of each head by its factor [heads], in place; a factor of 1 leaves the bits alone.

    Of a DTensor each rank scales the rows that it has, without communication.
    """
    axes = axes_of(axis)
    sizes = [parameter.shape[each] for each in axes]
    parameter, held = local_rows(rows.name_of(parameter), parameter, axes)
    if not all(held):
        return
    if rows.index is None and len(axes) == 1 and held == (((0, sizes[0]),),):
        heads = rows.of(parameter, axis)
        shape = [1] * heads.ndim
        shape[axes[0]] = rows.num_heads
        factors = factors.view(shape)
        heads.copy_(torch.where(_changes(factors), heads * factors, heads))
        return
    shape = [size if each in axes else 1 for each, size in enumerate(parameter.shape)]
    one = torch.ones_like(factors[:1])  # for rows of no head
    factors = torch.cat([factors, one])[head_of_rows(rows, sizes, held, factors.device)].view(shape)
    parameter.copy_(torch.where(_changes(factors), (parameter * factors).to(parameter.dtype), parameter))


def _check_index(name: str, index: Any) -> None:
    check_kind(name, index, Tensor, "an int64 tensor [heads, size]")
    if index.dtype not in (torch.int64, torch.int32) or index.ndim != 2 or not index.numel():
        raise ValueError(f"{name} is {index.dtype} {tuple(index.shape)}; give an int64 tensor [heads, size].")


def _changes(factors: Tensor) -> Tensor:
    return (factors < 1) | (factors > 1)


def sample_rows(parameter: Tensor, axis: Axes, columns: int) -> Tensor:
    """Return a few numbers of every row that this rank has of a weight, [rows, at most `columns`], to read."""
    local = local_part(parameter.detach())
    axes = axes_of(axis)
    count = len(axes)
    sample = local.movedim(axes, tuple(range(count)))
    while sample.ndim > count + 1:
        sample = sample.select(count, 0) if sample.shape[count] else sample.flatten(count)
    sample = sample[..., None] if sample.ndim == count else sample
    return sample[..., :: max(1, sample.shape[-1] // columns)][..., :columns].flatten(0, count - 1)


def heads_of_rows(rows: HeadRows, parameter: Tensor, axis: Axes) -> Tensor:
    """Return the head of every row that this rank has of a weight, int64; `num_heads` for a row of none."""
    axes = axes_of(axis)
    local, held = local_rows(rows.name_of(parameter), parameter, axes)
    if not all(held):
        return torch.zeros(0, dtype=torch.int64, device=local.device)
    return head_of_rows(rows, [parameter.shape[each] for each in axes], held, local.device).flatten()


def axes_of(axis: Axes) -> tuple[int, ...]:
    """Return one axis or several as a tuple."""
    return axis if isinstance(axis, tuple) else (axis,)


def local_rows(name: str, parameter: Tensor, axes: tuple[int, ...]) -> tuple[Tensor, tuple[IndexRanges, ...]]:
    """Return what this rank has of a parameter, to read and write in place, and which indices along each of the axes.

    `name`: for the error. Raises ValueError for placements that do not say where a row is.
    """
    if not is_dtensor(parameter):
        return local_part(parameter), tuple(((0, parameter.shape[axis]),) for axis in axes)
    check_placements(name, parameter)
    mesh, coordinate = parameter.device_mesh, parameter.device_mesh.get_coordinate()
    if coordinate is None:
        raise ValueError(
            f"{name} is on {mesh}, which rank {dist.get_rank()} is not in. "
            "Build the clip on the ranks of that mesh alone."
        )
    held = tuple(
        local_indices(parameter.shape[axis], axis, parameter.placements, mesh.shape, coordinate) for axis in axes
    )
    with torch.no_grad():
        return local_part(parameter), held


def check_placements(name: str, parameter: Tensor) -> None:
    """Raise ValueError where the placements of a parameter do not say where a row is."""
    placements: Sequence[Placement] = parameter.placements if is_dtensor(parameter) else ()
    unknown = [each for each in placements if not (is_replicate(each) or is_shard(each))]
    if unknown:
        raise ValueError(
            f"{name} is placed as {tuple(placements)}; QK-Clip scales rows that are replicated or sharded. "
            f"Redistribute it: {unknown[0]} does not say which rank has a row."
        )


def head_of_rows(rows: HeadRows, sizes: Sequence[int], held: Sequence[IndexRanges], device: torch.device) -> Tensor:
    """Return the head of each row in the ranges of each axis, int64; `num_heads` for a row of none.

    `sizes`: of the whole weight along these axes.
    """
    row = torch.zeros((), dtype=torch.int64, device=device)
    for size, runs in zip(sizes, held, strict=True):
        row = row[..., None] * size + torch.cat([torch.arange(*run, device=device) for run in runs])
    if rows.index is not None:
        heads = torch.full((math.prod(sizes),), rows.num_heads, device=device)
        index = rows.rows(device)
        heads[index.flatten()] = torch.arange(rows.num_heads, device=device).repeat_interleave(rows.size)
        return heads[row]
    offset = row - rows.start
    head = offset.div(rows.step, rounding_mode="floor")
    inside = (offset >= 0) & (head < rows.num_heads) & (offset % rows.step < rows.size)
    return head.where(inside, rows.num_heads)

"""The rows of a weight that belong to each head: which of them this rank has, and scaling them.

Shapes: a `nn.Linear` weight is [out, in]; the rows of a head are along its out axis. Arithmetic on placements, without
communication.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Self

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.placement_types import Placement, Replicate, Shard, _StridedShard

from muonclip.core.index_ranges import IndexRanges
from muonclip.torch.mesh import local_indices


@dataclass(frozen=True, slots=True, eq=False)
class HeadRows:
    """The rows of one weight, and of its bias, that belong to each head.

    Head h owns `size` rows from `start + h · stride` (`stride` None: `size`, so that heads are adjacent), or the rows
    `index[h]` where they follow no such rule; `index`: int64 [heads, size].

    `weight` and `bias` name attributes of `module`, read anew at every use, because sharding engines replace
    parameters. `axis` is the out axis of the weight (1 for GPT-2's transposed `Conv1D`).
    """

    module: nn.Module
    num_heads: int
    size: int
    start: int = 0
    stride: int | None = None
    weight: str = "weight"
    bias: str = "bias"
    axis: int = 0
    index: Tensor | None = None

    @classmethod
    def from_index(
        cls, index: Tensor, module: nn.Module, weight: str = "weight", bias: str = "bias", axis: int = 0
    ) -> Self:
        """Make the rows `index` [heads, size], by start and stride where they follow one."""
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

    def parameters(self) -> Iterator[tuple[Tensor, int]]:
        """Yield the weight and, where there is one, the bias, each with its axis of heads."""
        yield getattr(self.module, self.weight), self.axis
        bias = getattr(self.module, self.bias, None) if self.bias else None
        if isinstance(bias, Tensor):
            yield bias, 0

    def of(self, parameter: Tensor, axis: int) -> Tensor:
        """Return the parameter with `axis` counting heads and a last axis counting the rows of each.

        The result is a view, except for rows given by `index`. Of a DTensor it is what this rank has; raises ValueError
        where `axis` is sharded.
        """
        if isinstance(parameter, DTensor):
            whole = parameter.shape[axis]
            parameter, runs = local_rows(self.name_of(parameter), parameter, axis)
            if runs != ((0, whole),):
                raise ValueError(
                    f"{self.weight} has its {whole} rows on several ranks, this one has {runs}: its heads cannot be "
                    "read here. Read the whole weight, parameter.full_tensor()."
                )
        if self.index is not None:
            chosen = parameter.index_select(axis, self.rows(parameter.device).flatten())
            return chosen.unflatten(axis, (self.num_heads, self.size)).movedim(axis + 1, -1)
        length = (self.num_heads - 1) * self.step + self.size
        return parameter.narrow(axis, self.start, length).unfold(axis, self.size, self.step)

    def name_of(self, parameter: Tensor) -> str:
        """Name the attribute and its module, for errors."""
        attribute = self.weight if getattr(self.module, self.weight) is parameter else self.bias
        return f"{attribute} of {type(self.module).__name__}"

    def check(self, name: str) -> None:
        """Raise ValueError where the weight does not have these rows, or its placements do not say where a row is."""
        weight = getattr(self.module, self.weight)
        if not isinstance(weight, nn.Parameter):
            raise ValueError(
                f"{name}: the {self.weight} of {type(self.module).__name__} is not a parameter but computed from "
                "others, so scaling it would change nothing. Declare what it is computed from, or give a `reason`."
            )
        check_placements(f"{name}: {self.name_of(weight)}", weight)
        rows = weight.shape[self.axis]
        if self.index is not None:
            index = self.index
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
def scale_heads(rows: HeadRows, parameter: Tensor, axis: int, factors: Tensor) -> None:
    """Multiply the rows of each head by its factor [heads], in place; a factor of 1 leaves the bits alone.

    Of a DTensor each rank scales the rows that it has, without communication.
    """
    size = parameter.shape[axis]
    parameter, runs = local_rows(rows.name_of(parameter), parameter, axis)
    if not runs:
        return
    if rows.index is None and runs == ((0, size),):
        heads = rows.of(parameter, axis)
        shape = [1] * heads.ndim
        shape[axis] = rows.num_heads
        factors = factors.view(shape)
        heads.copy_(torch.where(factors < 1, heads * factors, heads))
        return
    shape = [1] * parameter.ndim
    shape[axis] = -1
    one = torch.ones_like(factors[:1])  # for rows of no head
    factors = torch.cat([factors, one])[head_of_rows(rows, size, runs, factors.device)].view(shape)
    parameter.copy_(torch.where(factors < 1, (parameter * factors).to(parameter.dtype), parameter))


def sample_rows(parameter: Tensor, axis: int, columns: int) -> Tensor:
    """Return a few numbers of every row that this rank has of a weight, as a view [rows, at most `columns`]."""
    local = parameter.to_local() if isinstance(parameter, DTensor) else parameter.detach()
    sample = local.movedim(axis, 0)
    while sample.ndim > 2:
        sample = sample.select(1, 0) if sample.shape[1] else sample.flatten(1)
    sample = sample[:, None] if sample.ndim == 1 else sample
    return sample[:, :: max(1, sample.shape[1] // columns)][:, :columns]


def heads_of_rows(rows: HeadRows, parameter: Tensor, axis: int) -> Tensor:
    """Return the head of every row that this rank has of a weight, int64; `num_heads` for a row of none."""
    local, runs = local_rows(rows.name_of(parameter), parameter, axis)
    if not runs:
        return torch.zeros(0, dtype=torch.int64, device=local.device)
    return head_of_rows(rows, parameter.shape[axis], runs, local.device)


def local_rows(name: str, parameter: Tensor, axis: int) -> tuple[Tensor, IndexRanges]:
    """Return what this rank has of a parameter, to read and write in place, and which rows along `axis` these are.

    `name`: for the error. Raises ValueError for placements that do not say where a row is.
    """
    if not isinstance(parameter, DTensor):
        return parameter, ((0, parameter.shape[axis]),)
    check_placements(name, parameter)
    mesh, coordinate = parameter.device_mesh, parameter.device_mesh.get_coordinate()
    if coordinate is None:
        raise ValueError(
            f"{name} is on {mesh}, which rank {dist.get_rank()} is not in. "
            "Build the clip on the ranks of that mesh alone."
        )
    runs = local_indices(parameter.shape[axis], axis, parameter.placements, mesh.shape, coordinate)
    with torch.no_grad():
        return parameter.to_local(), runs


def check_placements(name: str, parameter: Tensor) -> None:
    """Raise ValueError where the placements of a parameter do not say where a row is."""
    placements: Sequence[Placement] = parameter.placements if isinstance(parameter, DTensor) else ()
    unknown = [each for each in placements if not isinstance(each, Replicate | Shard | _StridedShard)]
    if unknown:
        raise ValueError(
            f"{name} is placed as {tuple(placements)}; QK-Clip scales rows that are replicated or sharded. "
            f"Redistribute it: {unknown[0]} does not say which rank has a row."
        )


def head_of_rows(rows: HeadRows, size: int, runs: IndexRanges, device: torch.device) -> Tensor:
    """Return the head of each row of the ranges, int64; `num_heads` for a row of none. The weight has `size` rows."""
    held = torch.cat([torch.arange(*run, device=device) for run in runs])
    if rows.index is not None:
        heads = torch.full((size,), rows.num_heads, device=device)
        index = rows.rows(device)
        heads[index.flatten()] = torch.arange(rows.num_heads, device=device).repeat_interleave(rows.size)
        return heads[held]
    offset = held - rows.start
    head = offset.div(rows.step, rounding_mode="floor")
    inside = (offset >= 0) & (head < rows.num_heads) & (offset % rows.step < rows.size)
    return head.where(inside, rows.num_heads)

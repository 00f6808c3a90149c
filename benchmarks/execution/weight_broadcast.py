"""New weights from trainers to the ranks that infer, in chunks: a checkpoint engine in small, of torch's own parts.

The planner of `torch.distributed.checkpoint` says which rank has which box of which weight, each once, replicas or not;
`torch.distributed.broadcast` moves the boxes, cut and packed into chunks, from the trainer that has them to every rank
that infers. No rank gathers a weight, and none has more than one chunk next to its own weights.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.planner import SavePlan, WriteItem

ALIGNED = 16
"""Bytes to whose multiples the pieces of a chunk begin, so that each dtype can be read where it is."""

_Weights = Mapping[str, Tensor]


@dataclass(frozen=True, slots=True)
class Piece:
    """A box of one weight, and where it is: in the weight, in what its trainer has of it, and in the chunk."""

    item: WriteItem
    dtype: torch.dtype
    inside: tuple[int, ...]
    size: tuple[int, ...]
    at: int

    @property
    def nbytes(self) -> int:
        return math.prod(self.size) * self.dtype.itemsize

    def of_whole(self, weight: Tensor) -> Tensor:
        """Return the box of a whole weight."""
        assert self.item.tensor_data is not None
        begins = self.item.tensor_data.chunk.offsets
        return _box(weight, [a + b for a, b in zip(begins, self.inside, strict=True)], self.size)

    def of_part(self, part: Tensor) -> Tensor:
        """Return the box of what its trainer has of the weight."""
        return _box(part, self.inside, self.size)

    def of_chunk(self, chunk: Tensor) -> Tensor:
        """Return the box of a chunk of bytes."""
        return chunk[self.at : self.at + self.nbytes].view(self.dtype).view(self.size)


class WeightBroadcast:
    """Sends the weights of the trainers to all other ranks of the default process group, as often as it is called.

    Every rank makes it, and calls it, together.

    Args:
        weights: The state dict of this rank's model: on a trainer DTensors or plain tensors, on others whole tensors.
            Their dtypes are those in which weights travel.
        trainers: The ranks that train.
        chunk_bytes: The most bytes that are sent, or wait to be, at once.

    Raises:
        ValueError: On all ranks, where a rank has weights of other names or shapes than the trainers, or ranks that
            infer differ in dtypes; and where a chunk has no room for one number.
    """

    def __init__(self, weights: _Weights, trainers: Sequence[int], chunk_bytes: int) -> None:
        if chunk_bytes < ALIGNED:
            raise ValueError(f"chunk_bytes={chunk_bytes} must be at least {ALIGNED}.")
        rank, size = dist.get_rank(), dist.get_world_size()
        self.trains, self.chunk_bytes = rank in trainers, chunk_bytes
        plan = self._planner(weights).create_local_plan() if self.trains else None
        kinds = {name: (tuple(weight.shape), weight.dtype) for name, weight in weights.items()}
        said: list[Any] = [None] * size
        dist.all_gather_object(said, (plan, kinds))
        others = [each for each in range(size) if each not in trainers]
        shapes = {name: shape for name, (shape, _) in said[trainers[0]][1].items()}
        for each in others:
            if {name: shape for name, (shape, _) in said[each][1].items()} != shapes:
                raise ValueError(f"weights: {_difference(said[each][1], said[trainers[0]][1])} on rank {each}.")
            if said[each][1] != said[others[0]][1]:
                raise ValueError(f"weights: the dtypes on rank {each} are not those on rank {others[0]}.")
        plans, _ = DefaultSavePlanner(flatten_state_dict=False).create_global_plan([said[each][0] for each in trainers])
        dtypes = {name: dtype for name, (_, dtype) in said[others[0]][1].items()}
        self.chunks: list[tuple[int, list[Piece]]] = [
            (trainer, chunk)
            for trainer, plan in zip(trainers, plans, strict=True)
            for chunk in packed(plan, dtypes, chunk_bytes)
        ]
        self._groups: dict[int, Any] = {each: dist.new_group(sorted([each, *others])) for each in trainers}

    def __call__(self, weights: _Weights) -> None:
        """Send the trainers' weights into those of the ranks that infer."""
        mine = self._planner(weights) if self.trains else None
        device = next(iter(weights.values())).device
        buffer = torch.empty(self.chunk_bytes, dtype=torch.uint8, device=device)
        for trainer, pieces in self.chunks:
            if self.trains and trainer != dist.get_rank():
                continue
            if mine is not None:
                for piece in pieces:
                    part = mine.resolve_data(piece.item)
                    assert isinstance(part, Tensor)
                    piece.of_chunk(buffer).copy_(piece.of_part(part))
            used = pieces[-1].at + pieces[-1].nbytes
            dist.broadcast(buffer[:used], src=trainer, group=self._groups[trainer])
            if mine is None:
                for piece in pieces:
                    piece.of_whole(weights[piece.item.index.fqn]).copy_(piece.of_chunk(buffer))

    def _planner(self, weights: _Weights) -> DefaultSavePlanner:
        planner = DefaultSavePlanner(flatten_state_dict=False)
        planner.set_up_planner(dict(weights))
        return planner


def packed(plan: SavePlan, dtypes: Mapping[str, torch.dtype], chunk_bytes: int) -> Iterator[list[Piece]]:
    """Cut the weights of a plan into boxes that fit a chunk, and yield those that travel together, in order."""
    chunk: list[Piece] = []
    end = 0
    for item in plan.items:
        assert item.tensor_data is not None, f"{item.index.fqn} is not a tensor"
        dtype, sizes = dtypes[item.index.fqn], tuple(item.tensor_data.chunk.sizes)
        for inside, size in boxes((0,) * len(sizes), sizes, chunk_bytes // dtype.itemsize):
            at = -(-end // ALIGNED) * ALIGNED
            if at + math.prod(size) * dtype.itemsize > chunk_bytes:
                yield chunk
                chunk, at = [], 0
            chunk.append(Piece(item, dtype, inside, size, at))
            end = at + chunk[-1].nbytes
    if chunk:
        yield chunk


def boxes(
    inside: tuple[int, ...], size: tuple[int, ...], most: int
) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Cut a box into the fewest of at most so many elements, along its first axes: (where each begins, its size)."""
    if not all(size):
        return
    if math.prod(size) <= most:
        yield inside, size
        return
    axis = next(axis for axis, length in enumerate(size) if length > 1)
    rows = max(1, most * size[axis] // math.prod(size))
    for start in range(0, size[axis], rows):
        begins = *inside[:axis], inside[axis] + start, *inside[axis + 1 :]
        yield from boxes(begins, (*size[:axis], min(rows, size[axis] - start), *size[axis + 1 :]), most)


def _box(tensor: Tensor, begins: Sequence[int], size: Sequence[int]) -> Tensor:
    return tensor[tuple(slice(begin, begin + length) for begin, length in zip(begins, size, strict=True))]


def _difference(here: Mapping[str, Any], there: Mapping[str, Any]) -> str:
    """Name the first weight that differs."""
    name = next(name for name in sorted({*here, *there}) if here.get(name, (None,))[0] != there.get(name, (None,))[0])
    shapes = ["no weight" if name not in each else f"shape {each[name][0]}" for each in (here, there)]
    return f"{name} has {shapes[0]}, and {shapes[1]} on the trainers,"

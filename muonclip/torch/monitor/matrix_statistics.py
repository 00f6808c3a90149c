"""Measures what one step does to the matrices of parameters, on their device; nothing waits for it.

Of a matrix that ranks share, none is gathered: squares, and the vectors of the power iterations, are sums over shards.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from muonclip.core import MatrixLayout
from muonclip.core.state_storage import absmax_of
from muonclip.torch.mesh import Topology, is_shard, local_part
from muonclip.torch.update import MatrixShards, local_matrices, matrix_shards, read_codes, row_index

_ITERATIONS = 8


@dataclass(frozen=True, slots=True, eq=False)
class MatrixStatistics:
    """Numbers of each logical matrix of one parameter, fp32 [matrices]: an expert, head or fused block is one.

    Attributes:
        relative_update: ‖ΔW‖ / ‖W‖ in the Frobenius norm, W before the step; 0 where both are 0.
        update_rms: The root mean square of the entries of ΔW, not divided by the rate.
        weight_spectral_norm: The largest singular value of W after the step; a lower bound, by eight power iterations
            from a random vector.
        update_spectral_norm: That of ΔW.
        stable_rank: ‖W‖² / σ², from 1 to the smaller side; an upper bound, as σ is a lower one.
        momentum_norm: The Frobenius norm of the momentum (`momentum_buffer`, `exp_avg`); NaN without one.
    """

    relative_update: Tensor
    update_rms: Tensor
    weight_spectral_norm: Tensor
    update_spectral_norm: Tensor
    stable_rank: Tensor
    momentum_norm: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class WeightStep:
    """One parameter, how it is read as matrices, and what this rank had of it before the step."""

    parameter: Tensor
    layout: MatrixLayout
    before: Tensor
    momentum: Tensor | None
    momentum_absmax: Tensor | None = None
    """The sizes of its blocks, where it is stored as codes."""


def statistics_of(steps: Sequence[WeightStep], topology: Topology) -> list[MatrixStatistics]:
    """Compare parameters before a step with themselves after it.

    All ranks that share a parameter must call it with the same parameters in the same order: 18 all-reduces for each
    way of sharding, of at most twice the longer sides of all these matrices.
    """
    by_step: list[list[_Block]] = []
    by_group: dict[dist.ProcessGroup, list[_Block]] = {}
    for step in steps:
        blocks = _blocks(step, topology)
        by_step.append(blocks)
        placements = topology.placements(step.parameter)
        sharded = [dim for dim, placement in enumerate(placements) if is_shard(placement)]
        group = topology.position(step.parameter).group(sharded)
        if group is None:
            _measure(blocks, None)
        else:
            by_group.setdefault(group, []).extend(blocks)
    for group, blocks in by_group.items():
        _measure(blocks, group)
    columns = (zip(*(block.numbers for block in blocks), strict=True) for blocks in by_step)
    return [MatrixStatistics(*map(torch.cat, each)) for each in columns]


class _Part:
    """The part of some matrices [count, rows, columns] that this rank has, and where in their block it is."""

    def __init__(self, step: WeightStep, shards: MatrixShards, position: int, heads: int) -> None:
        def read(tensor: Tensor) -> Tensor:
            matrices = local_matrices(tensor, step.layout, shards, position)
            return matrices.to(torch.promote_types(tensor.dtype, torch.float32))

        device = step.before.device
        batches = row_index((shards.batches,), device)
        self.number = (heads * batches[:, None] + torch.tensor(shards.heads, device=device)).flatten()
        self.rows, self.columns = (row_index((each[position],), device) for each in (shards.rows, shards.columns))
        self.weight = read(local_part(step.parameter.detach()))
        before = read(step.before)
        self.update = self.weight - before
        tensors = [before, self.update, self.weight]
        if step.momentum is not None and step.momentum_absmax is None:
            tensors.append(read(local_part(step.momentum)))
        elif step.momentum is not None and step.momentum_absmax is not None:
            stored = {"m": step.momentum, absmax_of("m"): step.momentum_absmax}
            held = {
                name: local_matrices(local_part(each), step.layout, shards, position) for name, each in stored.items()
            }
            tensors.append(read_codes(held, "m", shards.columns[position], self.weight.dtype))
        self.squares = torch.stack([each.square().sum((1, 2)).to(self.weight.dtype) for each in tensors])


class _Block:
    """Matrices of one shape (count, fan_out, fan_in) of one parameter, and this rank's parts of them."""

    numbers: tuple[Tensor, ...]
    """The fields of `MatrixStatistics`."""

    def __init__(self, shape: tuple[int, int, int], parts: list[_Part], like: Tensor, kinds: int) -> None:
        self.shape, self.parts = shape, parts
        self.like = like.new_empty((), dtype=torch.promote_types(like.dtype, torch.float32))
        self.squares = self.like.new_zeros(kinds, shape[0])
        for part in parts:
            self.squares[:, part.number] = part.squares
        generator = torch.Generator().manual_seed(0)  # the same vector on every rank and in every step
        start = torch.randn(shape[2], 1, generator=generator, dtype=torch.float32).to(self.like)
        self.vectors = start.expand(2, shape[0], -1, -1)  # of the weight and the update

    def multiply(self, *, transposed: bool) -> None:
        """Multiply the vectors by this rank's parts of the matrices; the sum over the ranks is the product."""
        products = self.like.new_zeros(2, self.shape[0], self.shape[2 if transposed else 1], 1)
        for part in self.parts:
            into, of = (part.columns, part.rows) if transposed else (part.rows, part.columns)
            for product, vector, matrix in zip(products, self.vectors, (part.weight, part.update), strict=True):
                inside = vector[part.number][:, of]
                product[part.number[:, None], into] = (matrix.mT if transposed else matrix) @ inside
        self.vectors = products

    def normalize(self) -> None:
        """Bring the vectors to length 1."""
        length = self.vectors.square().sum((2, 3), keepdim=True).sqrt()
        self.vectors = self.vectors / length.clamp(min=torch.finfo(length.dtype).tiny)

    def finish(self) -> None:
        """Make the numbers from the sums and the last vectors."""
        before, moved, now, *momentum = self.squares.sqrt()
        weight_sigma, update_sigma = self.vectors.square().sum((2, 3)).sqrt()
        relative = moved / before.masked_fill((before == 0) & (moved == 0), 1)
        rms = moved / (self.shape[1] * self.shape[2]) ** 0.5
        rank = (now / weight_sigma.masked_fill(now == 0, 1)).square()
        momentum_norm = momentum[0] if momentum else torch.full_like(now, torch.nan)
        numbers = (relative, rms, weight_sigma, update_sigma, rank, momentum_norm)
        self.numbers = tuple(each.float() for each in numbers)
        self.parts = []  # which would keep copies of weights


def _blocks(step: WeightStep, topology: Topology) -> list[_Block]:
    """Read this rank's parts of the matrices of one parameter, by block."""
    shape, here = tuple(step.parameter.shape), topology.position(step.parameter)
    shapes = step.layout.matrix_shapes(shape)
    parts: list[list[_Part]] = [[] for _ in shapes]
    heads = step.layout.heads or (1,) * len(shapes)
    for shards in matrix_shards(shape, step.layout, topology.placements(step.parameter), here.mesh.shape):
        if all(here.coordinate[dim] == at for dim, at in shards.fixed):
            part = _Part(step, shards, here.index(shards.active), heads[shards.block])
            parts[shards.block].append(part)
    kinds = 3 if step.momentum is None else 4
    return [_Block(each, own, step.before, kinds) for each, own in zip(shapes, parts, strict=True)]


def _measure(blocks: Sequence[_Block], group: dist.ProcessGroup | None) -> None:
    """Make the numbers of matrices that are cut over the ranks of a group."""
    squares = _summed([block.squares for block in blocks], group)
    for block, each in zip(blocks, squares, strict=True):
        block.squares = each
    for step in range(2 * _ITERATIONS + 1):  # v ← XᵀX v, and at the end X v
        for block in blocks:
            block.multiply(transposed=step % 2 == 1)
        vectors = _summed([block.vectors for block in blocks], group)
        for block, each in zip(blocks, vectors, strict=True):
            block.vectors = each
            if step < 2 * _ITERATIONS:
                block.normalize()
    for block in blocks:
        block.finish()


def _summed(tensors: Sequence[Tensor], group: dist.ProcessGroup | None) -> list[Tensor]:
    """Sum over the ranks of a group, all in one collective."""
    if group is None:
        return list(tensors)
    together = torch.cat([each.flatten() for each in tensors])
    dist.all_reduce(together, group=group)
    sums = together.split([each.numel() for each in tensors])
    return [own.view_as(each).to(each.dtype) for own, each in zip(sums, tensors, strict=True)]

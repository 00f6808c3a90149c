"""Parameters of which a rank has a part: the part it computes with, and how its first values are drawn."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.placement_types import Partial, Replicate, Shard


def local(parameter: Tensor) -> Tensor:
    """Return this rank's part of a DTensor, to compute with, and any other tensor unchanged.

    Where several ranks have the same part, each uses it for a share of the work: the gradient is the sum over them.
    """
    if not isinstance(parameter, DTensor):
        return parameter
    placements = [Partial() if isinstance(p, Replicate) else p for p in parameter.placements]
    return parameter.to_local(grad_placements=placements)


def local_gate_up(parameter: Tensor) -> Tensor:
    """Return this rank's part of [gate | up], […, 2F, in], to compute with: its share of gate's rows, then of up's.

    A shard along the rows holds other rows, which are exchanged for these. A shard that held these rows themselves
    would need a placement that no checkpoint library writes.
    """
    part = local(parameter)
    if isinstance(parameter, DTensor):
        for dim, placement in enumerate(parameter.placements):
            if isinstance(placement, Shard) and placement.dim == parameter.ndim - 2:
                return _ExchangeHalves.apply(part, parameter.device_mesh.get_group(dim))  # pyright: ignore[reportReturnType]
    return part


class _ExchangeHalves(torch.autograd.Function):
    """Exchanges rows of [gate | up] over R ranks.

    Of 2R pieces of rows, rank r has 2r and 2r + 1, and needs r (of gate) and R + r (of up).
    """

    @staticmethod
    def forward(ctx: Any, part: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        ranks, rank = group.size(), group.rank()
        return _exchanged(part, [piece % ranks for piece in (2 * rank, 2 * rank + 1)], _holders(rank, ranks), group)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        ranks, rank = ctx.group.size(), ctx.group.rank()
        return _exchanged(
            gradients[0], _holders(rank, ranks), [(2 * rank + i) % ranks for i in (0, 1)], ctx.group
        ), None


def _holders(rank: int, ranks: int) -> list[int]:
    return [rank // 2, (ranks + rank) // 2]


def _exchanged(part: Tensor, to: list[int], source: list[int], group: dist.ProcessGroup) -> Tensor:
    """Send the first half of the rows to one rank and the second to another; receive halves from two."""
    halves = part.unflatten(-2, (2, -1)).movedim(-3, 0)
    if to[0] > to[1]:  # messages go out, and come in, in the order of ranks
        halves = halves.flip(0)
    halves = halves.contiguous()
    arrived = torch.empty_like(halves)
    sizes = ([ranks.count(other) for other in range(group.size())] for ranks in (source, to))
    dist.all_to_all_single(arrived, halves, *sizes, group=group)
    if source[0] > source[1]:
        arrived = arrived.flip(0)
    return arrived.movedim(0, -3).flatten(-3, -2)


@torch.no_grad()
def fill_normal(parameter: Tensor, std: float) -> None:
    """Fill a parameter with numbers from normal(0, std), in place.

    The parts of a DTensor are drawn separately, a part the same on all ranks that have it: all ranks must have seeded
    torch equally. Its values depend on how it is cut; their distribution does not.
    """
    if not isinstance(parameter, DTensor):
        parameter.normal_(0, std)
        return
    part = parameter.to_local()
    if part.is_meta:
        return
    mesh = parameter.device_mesh
    coordinate = mesh.get_coordinate()
    assert coordinate is not None, "a rank outside of the mesh of a parameter"
    seed = int(torch.randint(2**62, (), device="cpu"))  # one draw per parameter on every rank: they stay in step
    number = 0
    for size, at, placement in zip(mesh.shape, coordinate, parameter.placements, strict=True):
        if not isinstance(placement, Replicate):
            number = number * size + at
    part.normal_(0, std, generator=torch.Generator(part.device).manual_seed(seed + number))

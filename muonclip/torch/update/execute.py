"""Muon's update over ranks: `plan` says who iterates which matrix and which bytes move, `execute` does it.

Momentum is every rank's own, shard by shard. Then matrices travel in rounds (`Round`): the packed parts of one shape
go to the owners, are iterated, and come back; replicas are given what another one has iterated. The communication of
one round runs beside the iteration of the one before. One process alone does the same with nothing to send.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from muonclip.core import MatrixLayout, Products, iterate, normalize, update_scale
from muonclip.torch.mesh.index_ranges import length
from muonclip.torch.mesh.mesh import Mesh
from muonclip.torch.mesh.topology import RankPosition
from muonclip.torch.update.matrix_shards import MatrixShards
from muonclip.torch.update.matrix_views import editing, local_matrices
from muonclip.torch.update.plan import Bucket, NewtonSchulzConfig, Round, Segment, UpdatePlan
from muonclip.torch.update.products import choose_products


@dataclass(slots=True, eq=False)
class ParameterStep:
    """One parameter in one step: what this rank has of it, and the options of its group.

    Without a gradient this rank's shard stays as it is. If the matrices of the parameter are cut, its part of them
    counts as zero, and the ranks need not agree on who has a gradient; replicas must.
    """

    parameter: Tensor
    gradient: Tensor | None
    momentum_buffer: Tensor
    layout: MatrixLayout
    options: Mapping[str, Any]


def execute(distribution: UpdatePlan, works: Sequence[ParameterStep], places: Mapping[Mesh, RankPosition]) -> None:
    """One update of all parameters, `works` in the order of the plan's. `places`: this rank's, by mesh.

    Every rank of a mesh must call it with the same plan.
    """
    mine = {chunk.slot: chunk for chunk in distribution.chunks if chunk.bucket.has_part_on(places[chunk.bucket.mesh])}
    rounds: list[Generator[None]] = []
    # Every rank passes every slot, so that all of them come to the collectives that they share in one order. The parts
    # of the newest round are on their way while those before are iterated.
    for slot in range(max(mine, default=-1) + 1):
        newest = [_round(mine[slot], works, places[mine[slot].bucket.mesh])] if slot in mine else []
        newest = _advanced(newest)
        rounds = _advanced(rounds) + newest
    while rounds:
        rounds = _advanced(rounds)


def _advanced(rounds: Sequence[Generator[None]]) -> list[Generator[None]]:
    """Each to its next wait, the oldest first; those that are not at their end."""
    return [each for each in rounds if next(each, rounds) is None]


def _round(chunk: Round, works: Sequence[ParameterStep], place: RankPosition) -> Generator[None]:
    """One chunk from the momentum to the weights; yields, on every rank equally often, where it waits for others."""
    bucket = chunk.bucket
    position, replica = place.index(bucket.active), place.index(bucket.replicas)
    cut, replicas = place.group(bucket.active), place.group(bucket.replicas)
    shares = [sum(owned) for owned in chunk.counts]
    pieces = chunk.pieces
    if cut is None and replicas is None:
        pieces = [piece for piece in pieces if works[piece.parameter].gradient is not None]
        shares = [sum(piece.stop - piece.start for piece in pieces)]
    steps = [_SegmentStep(works[piece.parameter], piece, position) for piece in pieces]
    passed, start, stop = 0, sum(shares[:replica]), sum(shares[: replica + 1])
    updates: list[Tensor] = []
    for step in steps:
        update = step.advance(max(start - passed, 0), max(stop - passed, 0), cut)
        updates.append((update.mT if step.tall else update).to(bucket.iteration.sent))
        del update
        passed += step.count
    if not updates:
        return
    updates = [torch.cat(updates) if len(updates) > 1 else updates[0]]  # held by nobody else: several rounds may wait
    if cut is not None and chunk.method == "owner":
        result = yield from _by_owners(updates.pop(), bucket, chunk.counts[replica], position, cut)
    else:
        result = _iterated(updates.pop(), bucket.iteration, cut)
    if replicas is not None:
        result = yield from _to_replicas(result, shares, replica, replicas)
    done = 0
    for step in steps:
        update = result[done : done + step.count]
        step.apply(update.mT if step.tall else update)
        done += step.count


class _SegmentStep:
    """The step of the matrices of one piece, on this rank's part of them."""

    def __init__(self, work: ParameterStep, piece: Segment, position: int) -> None:
        self.work, self.piece, self.position = work, piece, position
        self.count, self.tall = piece.stop - piece.start, piece.slab.tall
        self._used: Tensor | None = None

    def advance(self, start: int, stop: int, cut: dist.ProcessGroup | None) -> Tensor:
        """M ← μ M + (1−μ) G; the update (matrices, rows, columns) of those from `start` to `stop` of the piece."""
        work, options = self.work, self.work.options
        momentum = options["momentum"]
        with editing(work.momentum_buffer, *self._where) as stack:
            buffer = stack[self.piece.start : self.piece.stop]
            if work.gradient is None:
                gradient = torch.zeros_like(buffer)
            else:
                gradient = local_matrices(work.gradient, *self._where)[self.piece.start : self.piece.stop]
                gradient = gradient.to(buffer.dtype)
            if options["freeze_unused"]:
                self._used = (gradient != 0).any(-1, keepdim=True).any(-2, keepdim=True)
                if cut is not None:
                    used = self._used.to(torch.uint8)
                    dist.all_reduce(used, op=dist.ReduceOp.MAX, group=cut)
                    self._used = used.bool()
            if work.gradient is None:
                return gradient[start:stop]
            weight = 1 - momentum if self._used is None else (1 - momentum) * self._used.to(buffer.dtype)
            buffer.lerp_(gradient, weight)
            if options["nesterov"]:
                return gradient[start:stop].lerp(buffer[start:stop], momentum)
            return buffer[start:stop]

    def apply(self, update: Tensor) -> None:
        """W ← W − η (O · scale + λ W), the scale by the shape of the whole matrix."""
        work, options = self.work, self.work.options
        if work.gradient is None:
            return
        lr, decay = options["lr"], options["weight_decay"]
        scale = update_scale(self.piece.slab.fan_out, self.piece.slab.fan_in, options["adjust_lr_fn"])
        with editing(work.parameter, *self._where) as stack:
            rows = stack[self.piece.start : self.piece.stop]
            kept = None if self._used is None else rows.clone()
            rows.mul_(1 - lr * decay)
            if isinstance(lr, Tensor):
                rows.sub_(update.to(rows.dtype) * (lr * scale))
            else:
                rows.add_(update, alpha=-lr * scale)
            if self._used is not None and kept is not None:
                rows.copy_(torch.where(self._used, rows, kept))

    @property
    def _where(self) -> tuple[MatrixLayout, MatrixShards, int]:
        return self.work.layout, self.piece.slab, self.position


def _iterated(stack: Tensor, iteration: NewtonSchulzConfig, cut: dist.ProcessGroup | None = None) -> Tensor:
    """Newton–Schulz of (matrices, m, n). With `cut` every rank has some of the n columns."""
    products = choose_products(iteration.products)
    total = None
    if cut is not None:
        products = _summed(products, cut)
        wide = stack if stack.dtype == torch.float64 else stack.float()
        total = _sum(wide.abs().sum((-2, -1), keepdim=True), cut)
    normal = normalize(stack, products, xp=torch, eps=iteration.floor, total=total).to(iteration.dtype)
    steps = iteration.ns_coefficients, iteration.ns_steps
    return iterate(normal, *steps, form=iteration.form, xp=torch, products=products)


def _summed(products: Products, cut: dist.ProcessGroup) -> Products:
    """The same products of columns that are divided over ranks."""
    return replace(
        products,
        sum_squares=lambda x: _sum(products.sum_squares(x), cut),
        gram=lambda x: _sum(products.gram(x), cut),
    )


def _sum(tensor: Tensor, group: dist.ProcessGroup) -> Tensor:
    dist.all_reduce(tensor, group=group)
    return tensor


def _by_owners(
    parts: Tensor, bucket: Bucket, owned: Sequence[int], position: int, cut: dist.ProcessGroup
) -> Generator[None, None, Tensor]:
    """Parts (matrices, small, long) of one replica's matrices → their iterated parts. `owned`: matrices by position."""
    sizes, here, count = bucket.sizes(), owned[position], len(parts)
    mine, theirs = [number * sizes[position] for number in owned], [here * size for size in sizes]
    received = parts.new_empty(sum(theirs))
    arriving = _exchange(received, parts.reshape(-1), theirs, mine, cut) if count else None
    yield
    if arriving is not None:
        arriving.wait()
    shape = parts.shape
    whole = parts.new_empty(here, bucket.m, bucket.n)
    for inside, part in _corners(whole, received, bucket, theirs):
        inside.copy_(part)
    del parts, received
    update = _iterated(whole, bucket.iteration) if here else whole.to(bucket.iteration.dtype)
    outgoing, back = update.new_empty(sum(theirs)), update.new_empty(sum(mine))
    for inside, part in _corners(update, outgoing, bucket, theirs):
        part.copy_(inside)
    del whole, update
    returning = _exchange(back, outgoing, mine, theirs, cut) if count else None
    yield
    if returning is not None:
        returning.wait()
    return back.view(shape)


def _corners(whole: Tensor, packed: Tensor, bucket: Bucket, lengths: Sequence[int]) -> Iterator[tuple[Tensor, Tensor]]:
    """The rectangles of matrices (count, m, n) that each position holds, and where each stands in the packed parts."""
    for small, long, segment in zip(bucket.small, bucket.long, packed.split(list(lengths)), strict=True):
        part = segment.view(len(whole), length(small), length(long))
        row = 0
        for top, bottom in small:
            column = 0
            for left, right in long:
                inside = whole[:, top:bottom, left:right]
                yield inside, part[:, row : row + bottom - top, column : column + right - left]
                column += right - left
            row += bottom - top


def _to_replicas(
    result: Tensor, shares: Sequence[int], replica: int, replicas: dist.ProcessGroup
) -> Generator[None, None, Tensor]:
    """The updates (matrices, …) that this replica has made → those of all replicas. `shares`: matrices by replica."""
    everyone = result.new_empty(sum(shares), *result.shape[1:])
    pending: list[dist.Work | None] = []
    if everyone.numel() and len(set(shares)) == 1:
        pending = [dist.all_gather_into_tensor(everyone, result.contiguous(), group=replicas, async_op=True)]
    elif everyone.numel():
        segments = everyone.split(list(shares))
        segments[replica].copy_(result)
        pending = [
            dist.broadcast(segment, group_src=source, group=replicas, async_op=True)
            for source, segment in enumerate(segments)
            if len(segment)
        ]
    yield
    for work in pending:
        if work is not None:
            work.wait()
    return everyone


def _exchange(
    received: Tensor, sent: Tensor, receive: list[int], send: list[int], group: dist.ProcessGroup
) -> dist.Work | None:
    return dist.all_to_all_single(received, sent, receive, send, group=group, async_op=True)

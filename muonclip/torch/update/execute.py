"""The update over ranks: `plan` says who iterates which matrix and which bytes move, `execute` does it.

Momentum is every rank's own, shard by shard. Then matrices travel in rounds (`Round`): the packed parts of one shape
go to the owners, are iterated, and come back; replicas are given what another one has iterated. The communication of
one round overlaps with the iteration of the one before. One process alone does the same with nothing to send.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from muonclip.core import Products, iterate, normalize
from muonclip.core.arguments import check_kind
from muonclip.core.index_ranges import length
from muonclip.torch.mesh import Mesh, RankPosition
from muonclip.torch.update.host_copies import copies_to
from muonclip.torch.update.normalization import normalized
from muonclip.torch.update.plain_segments import together
from muonclip.torch.update.plan import UpdatePlan
from muonclip.torch.update.products import choose_products, for_one_matrix
from muonclip.torch.update.rounds import Bucket, NewtonSchulzConfig, Round
from muonclip.torch.update.stages import ParameterStep, SegmentStep


def execute(update_plan: UpdatePlan, steps: Sequence[ParameterStep], positions: Mapping[Mesh, RankPosition]) -> None:
    """Update all parameters once. Every rank of a mesh must call it with the same plan.

    Args:
        update_plan: What `plan` returned.
        steps: What is to be done with each parameter, in the order of the plan's.
        positions: The position of this rank in each mesh.

    Raises:
        TypeError: For arguments of other kinds, before anything moves.
        ValueError: For steps that are not one for each parameter, and for a mesh without a position, before anything
            moves.
    """
    check_kind("update_plan", update_plan, UpdatePlan, "what `plan` returns")
    check_kind("steps", steps, Sequence, "a list of ParameterSteps")
    check_kind("positions", positions, Mapping, "a dict with this rank's position in each mesh")
    if len(steps) != len(update_plan.parameters):
        raise ValueError(
            f"{len(steps)} steps for a plan of {len(update_plan.parameters)} parameters; give one for each."
        )
    for mesh in {each.bucket.mesh for each in update_plan.rounds}:
        if mesh not in positions:
            raise ValueError(f"positions lacks {mesh}, a mesh of the plan.")
    mine = {each.slot: each for each in update_plan.rounds if each.bucket.has_part_on(positions[each.bucket.mesh])}
    running: list[Generator[None]] = []
    prepared = _prepared([mine[slot] for slot in sorted(mine)], steps, positions)
    # Every rank passes every slot, so that all of them come to the collectives that they share in one order. The parts
    # of the newest round are on their way while those before are iterated.
    for slot in range(max(mine, default=-1) + 1):
        newest = [_run(mine[slot], next(prepared), positions[mine[slot].bucket.mesh])] if slot in mine else []
        newest = _advanced(newest)
        running = _advanced(running) + newest
    while running:
        running = _advanced(running)
    for device in {step.parameter.device for step in steps if step.offloaded}:
        copies_to(device).finish()


def _prepared(
    rounds: Sequence[Round], steps: Sequence[ParameterStep], positions: Mapping[Mesh, RankPosition]
) -> Iterator[list[SegmentStep]]:
    """Yield the segments of each round, whose states are fetched one round ahead."""
    ahead: list[SegmentStep] | None = None
    for each in rounds:
        following = _segments(each, steps, positions[each.bucket.mesh])
        for segment in following:
            if segment.step.offloaded:
                segment.fetch(copies_to(segment.device))
        if ahead is not None:
            yield ahead
        ahead = following
    if ahead is not None:
        yield ahead


def _segments(round_: Round, steps: Sequence[ParameterStep], here: RankPosition) -> list[SegmentStep]:
    """Return the segments of a round that step on this rank."""
    bucket = round_.bucket
    position, cut = here.index(bucket.active), here.group(bucket.active)
    segments = [SegmentStep(steps[segment.parameter], segment, position, cut) for segment in round_.segments]
    if cut is None and here.group(bucket.replicas) is None:  # nobody else counts on an order
        segments = [segment for segment in segments if segment.step.gradient is not None]
        segments.sort(key=lambda segment: (segment.tall, id(segment.step.options)))  # so that equal ones are neighbours
    return segments


def _advanced(rounds: Sequence[Generator[None]]) -> list[Generator[None]]:
    """Run each round to its next wait, the oldest first; return those that are not at their end."""
    return [each for each in rounds if next(each, rounds) is None]


def _run(round_: Round, segments: list[SegmentStep], here: RankPosition) -> Generator[None]:
    """Take one round from the momentum to the weights; yields, on every rank equally often, where it waits."""
    bucket = round_.bucket
    position, replica = here.index(bucket.active), here.index(bucket.replicas)
    cut, replicas = here.group(bucket.active), here.group(bucket.replicas)
    alone = cut is None and replicas is None
    shares = [sum(owned) for owned in round_.counts]
    if alone:
        shares = [sum(segment.count for segment in segments)]
    if not segments:
        return
    for copies in {copies_to(segment.device) for segment in segments if segment.step.offloaded}:
        copies.arrive()
    inside = list(together(segments)) if alone else segments
    passed, start, stop = 0, sum(shares[:replica]), sum(shares[: replica + 1])
    size = stop - start, length(bucket.small[position]), length(bucket.long[position])
    stack = torch.empty(size, dtype=bucket.iteration.sent, device=segments[0].device)
    for each in inside:
        first, last = (min(max(edge - passed, 0), each.count) for edge in (start, stop))
        each.advance(first, last, stack[passed + first - start : passed + last - start])
        passed += each.count
    directions = [stack]  # held by nobody else, for several rounds may wait
    del stack
    if cut is not None and round_.method == "owner":
        result = yield from _by_owners(directions.pop(), bucket, round_.counts[replica], position, cut)
    else:
        result = _iterated(directions.pop(), bucket.iteration, cut)
    if replicas is not None:
        result = yield from _to_replicas(result, shares, replica, replicas)
    done = 0
    for each in inside:
        each.apply(result[done : done + each.count])
        done += each.count
    for segment in segments:
        if segment.step.offloaded:
            segment.give_back(copies_to(segment.device))


def _iterated(stack: Tensor, iteration: NewtonSchulzConfig, cut: dist.ProcessGroup | None = None) -> Tensor:
    """Apply Newton–Schulz to (matrices, m, n). With `cut` every rank has some of the n columns."""
    products = choose_products(iteration.products, stack.device.type)
    if cut is not None:
        products = _summed(products, cut)
        wide = stack if stack.dtype == torch.float64 else stack.float()
        total = _sum(wide.abs().sum((-2, -1), keepdim=True), cut)
        normal = normalize(stack, products, xp=torch, eps=iteration.floor, total=total).to(iteration.dtype)
    else:
        normal = normalized(stack, products, iteration.dtype, iteration.floor)
    del stack
    steps = iteration.ns_coefficients, iteration.ns_steps
    assert iteration.form is not None, "the plan chooses it by the shape"
    one = for_one_matrix(products, normal) if cut is None else None
    if one is not None:
        return iterate(normal[0], *steps, form=iteration.form, xp=torch, products=one)[None]
    return iterate(normal, *steps, form=iteration.form, xp=torch, products=products)


def _summed(products: Products, cut: dist.ProcessGroup) -> Products:
    """Make the same products for columns that are divided over ranks."""
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
    """Send parts (matrices, small, long) of one replica's matrices to their owners, who iterate and return them.

    `owned`: how many matrices each position owns.
    """
    sizes, here, count = bucket.sizes(), owned[position], len(parts)
    mine, theirs = [number * sizes[position] for number in owned], [here * size for size in sizes]
    received = parts.new_empty(sum(theirs))
    arriving = _exchange(received, parts.reshape(-1), theirs, mine, cut) if count else None
    yield
    if arriving is not None:
        arriving.wait()
    shape = parts.shape
    whole = parts.new_empty(here, bucket.m, bucket.n)
    for inside, part in _rectangles(whole, received, bucket, theirs):
        inside.copy_(part)
    del parts, received
    update = _iterated(whole, bucket.iteration) if here else whole.to(bucket.iteration.dtype)
    outgoing, back = update.new_empty(sum(theirs)), update.new_empty(sum(mine))
    for inside, part in _rectangles(update, outgoing, bucket, theirs):
        part.copy_(inside)
    del whole, update
    returning = _exchange(back, outgoing, mine, theirs, cut) if count else None
    yield
    if returning is not None:
        returning.wait()
    return back.view(shape)


def _rectangles(
    whole: Tensor, packed: Tensor, bucket: Bucket, lengths: Sequence[int]
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield each rectangle of matrices (count, m, n) that a position holds, with its copy in the packed parts."""
    for small, long, parts in zip(bucket.small, bucket.long, packed.split(list(lengths)), strict=True):
        part = parts.view(len(whole), length(small), length(long))
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
    """Exchange the updates (matrices, …) that each replica has made. `shares`: how many, by replica."""
    everyone = result.new_empty(sum(shares), *result.shape[1:])
    pending: list[dist.Work | None] = []
    if everyone.numel() and len(set(shares)) == 1:
        pending = [_all_gather(everyone, result.contiguous(), replicas)]
    elif everyone.numel():
        by_replica = everyone.split(list(shares))
        by_replica[replica].copy_(result)
        pending = [
            dist.broadcast(updates, group_src=source, group=replicas, async_op=True)
            for source, updates in enumerate(by_replica)
            if len(updates)
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


def _all_gather(received: Tensor, sent: Tensor, group: dist.ProcessGroup) -> dist.Work | None:
    """Gather by the name that torch has for it: another one from 2.13 on, of which the older warns."""
    gather: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    return gather(received, sent, group=group, async_op=True)

"""The plan of who iterates which matrix, and which bytes move: pure, known before any process moves one.

Each matrix has one owner among the ranks that hold its parts and their replicas; see `rounds` for what travels how.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from muonclip.core.arguments import check_kind, check_whole
from muonclip.core.text_table import in_bytes, table
from muonclip.torch.mesh import Mesh
from muonclip.torch.update.cost_model import matrices_at_once
from muonclip.torch.update.matrix_shards import MatrixShards, matrix_shards
from muonclip.torch.update.rounds import Bucket, Method, PlacedParameter, Round, Segment

_WORKSPACE_BYTES = 256 * 2**20
_RESULT_BUFFERS = 4  # of a workspace each: what may be on its way back at once


@dataclass(frozen=True, slots=True)
class UpdatePlan:
    """The decisions of `plan`; `print` them.

    Attributes:
        parameters: The parameters that are updated.
        rounds: What travels and is iterated together, in the order in which every rank comes to its own.
    """

    parameters: tuple[PlacedParameter, ...]
    rounds: tuple[Round, ...]

    @property
    def ranks(self) -> list[int]:
        return sorted({rank for parameter in self.parameters for rank in parameter.mesh.ranks})

    def owners(self) -> dict[str, list[tuple[int, ...]]]:
        """List the ranks that iterate each matrix of each parameter, in the order of `MatrixLayout.split`, block after
        block. It is one rank, or all that sum the Gram matrices of a matrix."""
        owners: dict[str, dict[tuple[int, int, int], tuple[int, ...]]] = {each.name: {} for each in self.parameters}
        for each in self.rounds:
            matrices = (
                (self.parameters[segment.parameter].name, segment.numbers(index))
                for segment in each.segments
                for index in range(segment.start, segment.stop)
            )
            for ranks, owned in zip(each.bucket.members(), each.counts, strict=True):
                units = [tuple(ranks)] if each.method == "gram" else [(rank,) for rank in ranks]
                for unit, number in zip(units, owned, strict=True):
                    for name, matrix in itertools.islice(matrices, number):
                        owners[name][matrix] = unit
        return {name: [by_matrix[key] for key in sorted(by_matrix)] for name, by_matrix in owners.items()}

    def sent(self) -> dict[str, dict[int, int]]:
        """Count the bytes that leave each rank in one step, by collective and rank."""
        total: dict[str, Counter[int]] = {}
        for each in self.rounds:
            for collective, by_rank in each.sent().items():
                total.setdefault(collective, Counter()).update(by_rank)
        return {collective: dict(by_rank) for collective, by_rank in total.items()}

    def flops(self) -> dict[int, int]:
        """Count the floating-point operations of the iterations of one step, by rank."""
        total = dict.fromkeys(self.ranks, 0)
        for each in self.rounds:
            for rank, amount in each.flops().items():
                total[rank] += amount
        return total

    def __str__(self) -> str:
        groups: dict[tuple[Mesh, int, int, tuple[str, str | None, str | None], Method, bool], list[Round]] = {}
        for each in self.rounds:
            bucket = each.bucket
            iteration = bucket.iteration
            iterated = str(iteration.dtype).removeprefix("torch."), iteration.form, iteration.products
            key = bucket.mesh, bucket.m, bucket.n, iterated, each.method, bucket.num_replicas > 1
            groups.setdefault(key, []).append(each)
        rows = [("matrices", "products", "ranks", "how", "sent per rank and step")]
        for (mesh, m, n, (dtype, form, by), _, divided), rounds in groups.items():
            sent: Counter[int] = Counter()
            for by_rank in (by_rank for each in rounds for by_rank in each.sent().values()):
                sent.update(by_rank)
            number = sum(each.count for each in rounds)
            products = f"{dtype}, {'Gram' if form == 'gram' else form} form" + (f", {by}" if by else "")
            how = _how(rounds[0], divided=divided)
            rows.append((f"{number} × ({m}×{n})", products, str(mesh), how, _range(sent)))
        lines = [table(rows)]
        for collective, by_rank in self.sent().items():
            lines.append(f"{collective}: {_range(by_rank)} per rank, {in_bytes(sum(by_rank.values()))} in all")
        flops = list(self.flops().values())
        if sum(flops):
            lines.append(
                f"Newton–Schulz: {sum(flops) / 1e9:.3g} GFLOP in all; the busiest of {len(flops)} ranks does "
                f"{max(flops) * len(flops) / sum(flops):.2f}× the mean"
            )
        return "\n".join(lines)


def plan(parameters: Sequence[PlacedParameter], workspace_bytes: int | None = None) -> UpdatePlan:
    """Divide the matrices of these parameters, in this order, over the ranks of their meshes; the same on every rank.

    In each bucket every owner gets the same number; the rest goes to those that have the least to do.

    Args:
        parameters: The parameters, as they are placed.
        workspace_bytes: The most bytes that an owner iterates at once, counted in float32; None: 256 MiB.

    Raises:
        ValueError: For placements that are neither `Replicate` nor a shard, or not one for each axis of the mesh; it
            names the parameter.
    """
    check_kind("parameters", parameters, Sequence, "a list of PlacedParameters")
    if workspace_bytes is not None:
        check_whole("workspace_bytes", workspace_bytes)
    buckets: dict[Bucket, list[Segment]] = {}
    for index, parameter in enumerate(parameters):
        check_kind(f"parameters[{index}]", parameter, PlacedParameter, "a PlacedParameter")
        if len(parameter.placements) != len(parameter.mesh.shape):
            raise ValueError(
                f"{parameter.name}: placements={parameter.placements} must be one for each of the "
                f"{len(parameter.mesh.shape)} axes of its mesh."
            )
        try:
            found = matrix_shards(parameter.shape, parameter.layout, parameter.placements, parameter.mesh.shape)
        except ValueError as error:
            raise ValueError(f"{parameter.name} {error}") from None
        for shards in found:
            buckets.setdefault(_bucket(parameter, shards), []).append(Segment(index, shards, 0, shards.count))
    loads: dict[Mesh, dict[int, int]] = {}
    # Buckets of one family differ only in which ranks hold them, so that their rounds can share their slots.
    families: dict[object, dict[object, list[Round]]] = {}
    for bucket, segments in sorted(buckets.items(), key=_order):
        family = (bucket.mesh, bucket.active, bucket.replicas, bucket.m, bucket.n, bucket.iteration)
        load = loads.setdefault(bucket.mesh, dict.fromkeys(bucket.mesh.ranks, 0))
        rounds = _rounds(bucket, segments, load, workspace_bytes or _WORKSPACE_BYTES)
        families.setdefault(family, {}).setdefault(bucket.fixed, []).extend(rounds)
    slots = 0
    in_order: list[Round] = []
    for islands in families.values():
        for rounds in islands.values():
            in_order += [replace(each, slot=slots + index) for index, each in enumerate(rounds)]
        slots += max(map(len, islands.values()))
    return UpdatePlan(tuple(parameters), tuple(sorted(in_order, key=lambda each: each.slot)))


def _order(item: tuple[Bucket, object]) -> tuple[bool, float]:
    """Put first what ranks share, for they may differ in the rest; then the most expensive."""
    bucket = item[0]
    return not (bucket.active or bucket.replicas), -bucket.iteration.flops(bucket.m, bucket.n)


def _bucket(parameter: PlacedParameter, shards: MatrixShards) -> Bucket:
    m, n, small, long = shards.fan_out, shards.fan_in, shards.rows, shards.columns
    if shards.tall:
        m, n, small, long = n, m, long, small
    asked = parameter.iteration
    iteration = replace(asked, dtype=asked.dtype_of(m, n), form=asked.form_of(m, n), is_asked=True)
    return Bucket(parameter.mesh, shards.fixed, shards.active, shards.replicas, m, n, small, long, iteration)


def _rounds(bucket: Bucket, segments: Sequence[Segment], load: dict[int, int], workspace_bytes: int) -> list[Round]:
    """Divide the matrices of a bucket into rounds, and each round over its owners; their work is added to `load`."""
    method = bucket.method()
    members = bucket.members()
    owners = [[rank] for ranks in members for rank in ranks] if method == "owner" else members
    edges = _edges(bucket, sum(each.stop - each.start for each in segments), method, len(owners), workspace_bytes)
    rounds: list[Round] = []
    for (start, stop), inside in zip(itertools.pairwise(edges), _divided(segments, edges), strict=True):
        each, rest = divmod(stop - start, len(owners))
        idlest = sorted(range(len(owners)), key=lambda owner: load[owners[owner][0]])[:rest]
        counts = [each + (owner in idlest) for owner in range(len(owners))]
        width = len(owners) // len(members)
        by_replica = tuple(tuple(counts[at : at + width]) for at in range(0, len(counts), width))
        new = Round(bucket, method, inside, by_replica, slot=0)
        for rank, flops in new.flops().items():
            load[rank] += flops
        rounds.append(new)
    return rounds


def _edges(bucket: Bucket, total: int, method: Method, owners: int, workspace_bytes: int) -> list[int]:
    """Say where, in the `total` matrices of a bucket, one round ends and the next begins."""
    replicated = bucket.num_replicas > 1
    if method == "in place" and not replicated:
        size = matrices_at_once(bucket.m, bucket.n, bucket.iteration.device_type, workspace_bytes)
    else:
        iterated = bucket.m * bucket.n * 4 // (len(bucket.small) if method == "gram" else 1)
        size = max(1, workspace_bytes // iterated) * owners
    if replicated:
        returned = max(bucket.sizes()) * bucket.iteration.dtype.itemsize
        size = max(owners, min(size, _RESULT_BUFFERS * workspace_bytes // returned))
        size -= size % owners
    edges = [*range(0, total, size), total]
    even = total - total % owners
    if replicated and even not in edges:  # replicas exchange equal shares in one collective
        edges.insert(-1, even)
    return edges


def _divided(segments: Iterable[Segment], edges: Sequence[int]) -> Iterator[tuple[Segment, ...]]:
    """Take the matrices of all these segments, counted through, from each edge to the next."""
    waiting = iter(segments)
    segment = next(waiting)
    for start, stop in itertools.pairwise(edges):
        inside: list[Segment] = []
        wanted = stop - start
        while wanted:
            taken = min(wanted, segment.stop - segment.start)
            inside.append(replace(segment, stop=segment.start + taken))
            segment = replace(segment, start=segment.start + taken)
            wanted -= taken
            if segment.start == segment.stop:
                segment = next(waiting, segment)
        yield tuple(inside)


def _how(each: Round, *, divided: bool) -> str:
    words = {
        "in place": "in place",
        "owner": "to owners and back",
        "gram": "Gram matrices summed",
    }[each.method]
    if not divided:
        return words
    return "divided, updates gathered" if each.method == "in place" else f"divided over replicas, {words}"


def _range(by_rank: Mapping[int, int]) -> str:
    if not by_rank:
        return "0"
    low, high = min(by_rank.values()), max(by_rank.values())
    return in_bytes(low) if low == high else f"{in_bytes(low)} to {in_bytes(high)}"

"""Who iterates which matrix, and which bytes move: pure, known before any process moves one.

Each matrix has one owner among the ranks that hold its parts and their replicas. Matrices that lie alike (same shape,
same ranks, same cut) travel together. What a rank holds whole it iterates where it is; what is cut goes to its owner
and comes back, or stays and has its Gram matrices summed, whichever moves fewer bytes; what is replicated is iterated
by one replica, and the others are given the update.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch.distributed.tensor.placement_types import Placement

from muonclip.core import MatrixLayout
from muonclip.core.coefficients import Coefficients, gram_restarts, resolve_coefficients
from muonclip.core.text_table import table
from muonclip.torch.mesh.index_ranges import IndexRanges, length
from muonclip.torch.mesh.mesh import ONE_RANK, Mesh
from muonclip.torch.mesh.topology import RankPosition
from muonclip.torch.update.matrix_shards import MatrixShards, matrix_shards

Method = Literal["in place", "owner", "gram"]
_WORKSPACE_BYTES = 256 * 2**20
_RESULT_BUFFERS = 4  # of a workspace each: what may be on its way back at once


@dataclass(frozen=True, slots=True)
class NewtonSchulzConfig:
    """How matrices are iterated; those that are iterated together agree in it. `dtype`: of the products."""

    dtype: torch.dtype
    ns_coefficients: Coefficients
    ns_steps: int | None
    form: Literal["standard", "gram"] = "standard"
    floor: float = 0.0
    products: str | None = None
    device: str = "cpu"

    @property
    def sent(self) -> torch.dtype:
        """Of what goes to an owner: the products', but for float16, in which small gradients vanish."""
        return torch.float32 if self.dtype == torch.float16 else self.dtype

    def flops(self, m: int, n: int) -> int:
        """Of one matrix m × n, m ≤ n, in the standard form."""
        return len(resolve_coefficients(self.ns_coefficients, self.ns_steps)) * (4 * m * m * n + 2 * m**3)

    def gram_products(self, m: int, n: int) -> int:
        """How often XXᵀ is made from X."""
        if self.form == "gram" and m < n:
            return 1 + len(gram_restarts(self.ns_coefficients))
        return len(resolve_coefficients(self.ns_coefficients, self.ns_steps))


@dataclass(frozen=True, slots=True)
class PlacedParameter:
    """A parameter as the plan sees it: global shape, layout, and how it lies on its mesh."""

    name: str
    shape: tuple[int, ...]
    layout: MatrixLayout
    iteration: NewtonSchulzConfig
    mesh: Mesh = ONE_RANK
    placements: tuple[Placement, ...] = ()


@dataclass(frozen=True, slots=True)
class Segment:
    """The matrices `start` to `stop` of a slab of a parameter, which is given by its place in the plan's list."""

    parameter: int
    slab: MatrixShards
    start: int
    stop: int

    def numbers(self, index: int) -> tuple[int, int, int]:
        """(block, batch, head) of a matrix of the slab."""
        batch, head = divmod(index, len(self.slab.heads))
        batches = itertools.chain.from_iterable(itertools.starmap(range, self.slab.batches))
        return self.slab.block, next(itertools.islice(batches, batch, None)), self.slab.heads[head]


@dataclass(frozen=True, slots=True)
class Bucket:
    """What matrices agree in that travel and are iterated together; m ≤ n, whichever way the parameter has them.

    `small`, `long`: by position, what of the m rows and the n columns lies there.
    """

    mesh: Mesh
    fixed: tuple[tuple[int, int], ...]
    active: tuple[int, ...]
    replicas: tuple[int, ...]
    m: int
    n: int
    small: tuple[IndexRanges, ...]
    long: tuple[IndexRanges, ...]
    iteration: NewtonSchulzConfig

    def has_part_on(self, position: RankPosition) -> bool:
        """Whether a rank has a part of its matrices."""
        return self.mesh == position.mesh and all(position.coordinate[dim] == at for dim, at in self.fixed)

    @property
    def num_replicas(self) -> int:
        return math.prod(self.mesh.shape[dim] for dim in self.replicas)

    def sizes(self) -> tuple[int, ...]:
        """Elements of one matrix, by position."""
        return tuple(length(small) * length(long) for small, long in zip(self.small, self.long, strict=True))

    def members(self) -> list[list[int]]:
        """Global ranks by replica and position."""
        fixed = dict(self.fixed)
        return [
            self.mesh.ranks_along(self.active, {**fixed, **dict(zip(self.replicas, at, strict=True))})
            for at in itertools.product(*(range(self.mesh.shape[dim]) for dim in self.replicas))
        ]

    def method(self) -> Method:
        """Where the long side alone is cut, the Gram matrices may be summed instead of moving the matrices."""
        if not self.active:
            return "in place"
        if any(small != ((0, self.m),) for small in self.small):
            return "owner"
        ways = len(self.small)
        width, wide = self.iteration.dtype.itemsize, self.iteration.sent.itemsize
        moved = self.m * self.n * (ways - 1) / ways * (width + wide)
        summed = 2 * (ways - 1) * self.iteration.gram_products(self.m, self.n) * self.m**2 * width
        return "gram" if summed < moved else "owner"


@dataclass(frozen=True, slots=True)
class Round:
    """Matrices that one round of communication carries. They stand in the order of their owners: `counts` by replica
    and position (for "in place" and "gram", by replica and 0). Rounds with the same `slot` have no rank in common."""

    bucket: Bucket
    method: Method
    pieces: tuple[Segment, ...]
    counts: tuple[tuple[int, ...], ...]
    slot: int

    @property
    def count(self) -> int:
        return sum(map(sum, self.counts))

    def sent(self) -> dict[str, dict[int, int]]:
        """By collective and rank: bytes that leave the rank. (A sum is counted as two halves of an all-to-all.)"""
        bucket, sizes = self.bucket, self.bucket.sizes()
        out, back = bucket.iteration.sent.itemsize, bucket.iteration.dtype.itemsize
        sent: dict[str, dict[int, int]] = {}

        def add(collective: str, rank: int, amount: float) -> None:
            if amount:
                by_rank = sent.setdefault(collective, {})
                by_rank[rank] = by_rank.get(rank, 0) + round(amount)

        for ranks, owned in zip(bucket.members(), self.counts, strict=True):
            mine = sum(owned)
            for at, rank in enumerate(ranks):
                if self.method == "owner":
                    add("all-to-all to owners", rank, (mine - owned[at]) * sizes[at] * out)
                    add("all-to-all back", rank, owned[at] * (sum(sizes) - sizes[at]) * back)
                if self.method == "gram":
                    grams = bucket.iteration.gram_products(bucket.m, bucket.n) * bucket.m**2 * back
                    norms = 2 * max(4, back)  # Σ|x| and Σx², in float32 at least
                    add("sum of Gram matrices", rank, mine * 2 * (1 - 1 / len(ranks)) * (grams + norms))
                add("updates to replicas", rank, mine * sizes[at] * (bucket.num_replicas - 1) * back)
        return sent

    def flops(self) -> dict[int, int]:
        """Of the iteration, by rank."""
        bucket = self.bucket
        divided = len(bucket.small) if self.method == "gram" else 1
        each = bucket.iteration.flops(bucket.m, bucket.n // divided)
        flops: dict[int, int] = {}
        for ranks, owned in zip(bucket.members(), self.counts, strict=True):
            if self.method == "gram":
                owned = owned * len(ranks)
            flops |= {rank: number * each for rank, number in zip(ranks, owned, strict=True)}
        return flops


@dataclass(frozen=True, slots=True)
class UpdatePlan:
    """What `plan` decided; `print` it. `chunks` stand in the order in which every rank comes to its own."""

    parameters: tuple[PlacedParameter, ...]
    chunks: tuple[Round, ...]

    @property
    def ranks(self) -> list[int]:
        return sorted({rank for parameter in self.parameters for rank in parameter.mesh.ranks})

    def owners(self) -> dict[str, list[tuple[int, ...]]]:
        """By parameter: the ranks that iterate each of its matrices, in the order of `MatrixLayout.split`, block after
        block. One rank, or all that sum the Gram matrices of a matrix."""
        owners: dict[str, dict[tuple[int, int, int], tuple[int, ...]]] = {each.name: {} for each in self.parameters}
        for chunk in self.chunks:
            numbers = (
                (self.parameters[piece.parameter].name, *piece.numbers(index))
                for piece in chunk.pieces
                for index in range(piece.start, piece.stop)
            )
            for ranks, owned in zip(chunk.bucket.members(), chunk.counts, strict=True):
                units = [tuple(ranks)] if chunk.method == "gram" else [(rank,) for rank in ranks]
                for unit, number in zip(units, owned, strict=True):
                    for name, *matrix in itertools.islice(numbers, number):
                        owners[name][tuple(matrix)] = unit  # pyright: ignore[reportArgumentType]
        return {name: [by_matrix[key] for key in sorted(by_matrix)] for name, by_matrix in owners.items()}

    def sent(self) -> dict[str, dict[int, int]]:
        """Bytes that leave each rank in one step, by collective and rank."""
        total: dict[str, dict[int, int]] = {}
        for chunk in self.chunks:
            for collective, by_rank in chunk.sent().items():
                sums = total.setdefault(collective, {})
                for rank, amount in by_rank.items():
                    sums[rank] = sums.get(rank, 0) + amount
        return total

    def flops(self) -> dict[int, int]:
        """Of the iterations of one step, by rank."""
        total = dict.fromkeys(self.ranks, 0)
        for chunk in self.chunks:
            for rank, amount in chunk.flops().items():
                total[rank] += amount
        return total

    def __str__(self) -> str:
        groups: dict[tuple[object, ...], list[Round]] = {}
        for chunk in self.chunks:
            bucket = chunk.bucket
            groups.setdefault((bucket.mesh, bucket.m, bucket.n, chunk.method, bucket.num_replicas > 1), []).append(
                chunk
            )
        rows = [("matrices", "ranks", "how", "sent per rank and step")]
        for (mesh, m, n, _, divided), chunks in groups.items():
            sent: dict[int, int] = {}
            for chunk in chunks:
                for by_rank in chunk.sent().values():
                    for rank, amount in by_rank.items():
                        sent[rank] = sent.get(rank, 0) + amount
            number = sum(chunk.count for chunk in chunks)
            rows.append((f"{number} × ({m}×{n})", str(mesh), _how(chunks[0], divided=bool(divided)), _range(sent)))
        lines = [table(rows)]
        for collective, by_rank in self.sent().items():
            lines.append(f"{collective}: {_range(by_rank)} per rank, {_bytes(sum(by_rank.values()))} in all")
        flops = list(self.flops().values())
        if sum(flops):
            lines.append(
                f"Newton–Schulz: {sum(flops) / 1e9:.3g} GFLOP in all; the busiest of {len(flops)} ranks does "
                f"{max(flops) * len(flops) / sum(flops):.2f}× the mean"
            )
        return "\n".join(lines)


def plan(parameters: Sequence[PlacedParameter], workspace_bytes: int | None = None) -> UpdatePlan:
    """Divide the matrices of these parameters, in this order, over the ranks of their meshes; the same on every rank.

    In each bucket every owner gets the same number; the rest goes to those that have the least to do. Owners iterate
    at most `workspace_bytes` (None: 256 MiB), counted in float32, at once. Raises ValueError, naming the parameter, for
    placements that are neither `Replicate` nor a shard.
    """
    buckets: dict[Bucket, list[Segment]] = {}
    for index, parameter in enumerate(parameters):
        try:
            slabs = matrix_shards(parameter.shape, parameter.layout, parameter.placements, parameter.mesh.shape)
        except ValueError as error:
            raise ValueError(f"{parameter.name} {error}") from None
        for slab in slabs:
            buckets.setdefault(_bucket(parameter, slab), []).append(Segment(index, slab, 0, slab.count))
    loads: dict[Mesh, dict[int, int]] = {}
    families: dict[object, dict[object, list[Round]]] = {}
    for bucket, pieces in sorted(buckets.items(), key=_order):
        family = (bucket.mesh, bucket.active, bucket.replicas, bucket.m, bucket.n, bucket.iteration)
        chunks = families.setdefault(family, {}).setdefault(bucket.fixed, [])
        load = loads.setdefault(bucket.mesh, dict.fromkeys(bucket.mesh.ranks, 0))
        chunks += _chunks(bucket, pieces, load, workspace_bytes or _WORKSPACE_BYTES)
    slots = 0
    in_order: list[Round] = []
    for islands in families.values():
        for chunks in islands.values():
            in_order += [replace(chunk, slot=slots + index) for index, chunk in enumerate(chunks)]
        slots += max(map(len, islands.values()))
    return UpdatePlan(tuple(parameters), tuple(sorted(in_order, key=lambda chunk: chunk.slot)))


def _order(item: tuple[Bucket, object]) -> tuple[bool, float]:
    """What ranks share first, for they may differ in the rest; then the most expensive."""
    bucket = item[0]
    return not (bucket.active or bucket.replicas), -bucket.iteration.flops(bucket.m, bucket.n)


def _bucket(parameter: PlacedParameter, slab: MatrixShards) -> Bucket:
    m, n, small, long = slab.fan_out, slab.fan_in, slab.rows, slab.columns
    if slab.tall:
        m, n, small, long = n, m, long, small
    return Bucket(
        parameter.mesh, slab.fixed, slab.active, slab.replicas, m, n, small, long, parameter.iteration
    )  # fmt: skip


def _chunks(bucket: Bucket, pieces: Sequence[Segment], load: dict[int, int], workspace_bytes: int) -> list[Round]:
    method = bucket.method()
    members = bucket.members()
    units = [[rank] for ranks in members for rank in ranks] if method == "owner" else members
    iterated = bucket.m * bucket.n * 4 // (len(bucket.small) if method == "gram" else 1)
    size = max(1, workspace_bytes // iterated) * len(units)
    if len(members) > 1:
        returned = max(bucket.sizes()) * bucket.iteration.dtype.itemsize
        size = max(len(units), min(size, _RESULT_BUFFERS * workspace_bytes // returned))
        size -= size % len(units)
    total = sum(piece.stop - piece.start for piece in pieces)
    edges = [*range(0, total, size), total]
    even = total - total % len(units)
    if len(members) > 1 and even not in edges:  # replicas exchange equal shares in one collective
        edges.insert(-1, even)
    chunks: list[Round] = []
    for (start, stop), inside in zip(itertools.pairwise(edges), _divided(pieces, edges), strict=True):
        each, rest = divmod(stop - start, len(units))
        idlest = sorted(range(len(units)), key=lambda unit: load[units[unit][0]])[:rest]
        counts = [each + (unit in idlest) for unit in range(len(units))]
        per_replica = len(units) // len(members)
        chunk = Round(
            bucket,
            method,
            inside,
            tuple(tuple(counts[at : at + per_replica]) for at in range(0, len(counts), per_replica)),
            slot=0,
        )
        for rank, flops in chunk.flops().items():
            load[rank] += flops
        chunks.append(chunk)
    return chunks


def _divided(pieces: Iterable[Segment], edges: Sequence[int]) -> Iterator[tuple[Segment, ...]]:
    """The matrices of all of these pieces, counted through, between one edge and the next."""
    waiting = iter(pieces)
    piece = next(waiting)
    for start, stop in itertools.pairwise(edges):
        inside: list[Segment] = []
        wanted = stop - start
        while wanted:
            taken = min(wanted, piece.stop - piece.start)
            inside.append(replace(piece, stop=piece.start + taken))
            piece = replace(piece, start=piece.start + taken)
            wanted -= taken
            if piece.start == piece.stop:
                piece = next(waiting, piece)
        yield tuple(inside)


def _how(chunk: Round, *, divided: bool) -> str:
    words = {
        "in place": "in place",
        "owner": "to owners and back",
        "gram": "Gram matrices summed",
    }[chunk.method]
    if not divided:
        return words
    return "divided, updates gathered" if chunk.method == "in place" else f"divided over replicas, {words}"


def _range(by_rank: Mapping[int, int]) -> str:
    if not by_rank:
        return "0"
    low, high = min(by_rank.values()), max(by_rank.values())
    return _bytes(low) if low == high else f"{_bytes(low)} to {_bytes(high)}"


def _bytes(count: int) -> str:
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.4g} {unit}"
        count /= 1024  # pyright: ignore[reportAssignmentType]
    return f"{count:.4g} GiB"

"""Rounds of matrices that travel together: of one shape, held by the same ranks, cut in the same way.

What a rank holds whole it iterates where it is; what is cut goes to its owner and comes back, or stays and has its Gram
matrices summed, whichever moves fewer bytes; what is replicated is iterated by one replica, and the others are given
the update.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch

from muonclip.core import MatrixLayout, resolve_coefficients
from muonclip.core.coefficients import Coefficients, checked_gram_restarts
from muonclip.core.cost_model import Form, choose_form, flops
from muonclip.core.index_ranges import IndexRanges, length
from muonclip.torch.mesh import ONE_RANK, Mesh, RankPosition
from muonclip.torch.update.cost_model import multiplies_small_in_float32
from muonclip.torch.update.matrix_shards import MatrixShards, coordinates

if TYPE_CHECKING:
    from torch.distributed.tensor.placement_types import Placement

Method = Literal["in place", "owner", "gram"]


@dataclass(frozen=True, slots=True)
class NewtonSchulzConfig:
    """The iteration of matrices; those that are iterated together agree in it.

    Args:
        dtype: The dtype of the products.
        ns_coefficients: The polynomials, see `muonclip.core.resolve_coefficients`.
        ns_steps: The number of steps, see `muonclip.core.resolve_coefficients`.
        form: "standard" or "gram"; None: the cheaper one for each shape.
        floor: Floor of the Frobenius norm.
        products: How products are multiplied, see `Muon`.
        device: Where the matrices are, by which form and products are chosen.
        is_asked: Whether `dtype` was asked for; else float32 replaces bf16 in small matrices.
    """

    dtype: torch.dtype
    ns_coefficients: Coefficients
    ns_steps: int | None
    form: Form | None = "standard"
    floor: float = 0.0
    products: str | None = None
    device: str = "cpu"
    is_asked: bool = True

    @property
    def device_type(self) -> str:
        return self.device.partition(":")[0]

    @property
    def sent(self) -> torch.dtype:
        """The dtype of what goes to an owner: the products', but for float16, in which small gradients vanish."""
        return torch.float32 if self.dtype == torch.float16 else self.dtype

    def flops(self, m: int, n: int) -> int:
        """Count the floating-point operations for one matrix m × n, m ≤ n."""
        wide = self.dtype_of(m, n).itemsize >= 4
        return flops(m, n, self.form_of(m, n), self.ns_coefficients, self.ns_steps, wide=wide)

    def form_of(self, m: int, n: int) -> Form:
        """Return the form in which matrices m × n, m ≤ n, are iterated; square ones always in the standard form."""
        if m == n:
            return "standard"
        dtype = str(self.dtype_of(m, n)).removeprefix("torch.")
        return self.form or choose_form(m, n, dtype, self.device_type, self.ns_coefficients, self.ns_steps)

    def dtype_of(self, m: int, n: int) -> torch.dtype:
        """Return the dtype of the products of matrices m × n."""
        small = self.dtype == torch.bfloat16 and multiplies_small_in_float32(m, n, self.device_type)
        return torch.float32 if small and not self.is_asked else self.dtype

    def gram_products(self, m: int, n: int) -> int:
        """Count how often XXᵀ is made from X."""
        if self.form_of(m, n) == "gram":
            wide = self.dtype_of(m, n).itemsize >= 4
            return 1 + len(checked_gram_restarts(self.ns_coefficients, self.ns_steps, wide=wide))
        return len(resolve_coefficients(self.ns_coefficients, self.ns_steps))


@dataclass(frozen=True, slots=True)
class PlacedParameter:
    """A parameter as the plan sees it: its global shape and layout, and how it is placed on its mesh.

    Args:
        name: Its name, for the plan and for errors.
        shape: Its global shape.
        layout: How it is read as matrices.
        iteration: How these are iterated.
        mesh: The ranks that share it.
        placements: `Replicate` or a shard for each dimension of the mesh.
    """

    name: str
    shape: tuple[int, ...]
    layout: MatrixLayout
    iteration: NewtonSchulzConfig
    mesh: Mesh = ONE_RANK
    placements: tuple[Placement, ...] = ()


@dataclass(frozen=True, slots=True)
class Segment:
    """The matrices `start` to `stop` of one `MatrixShards` of a parameter, given by its index in the plan's list."""

    parameter: int
    shards: MatrixShards
    start: int
    stop: int

    def numbers(self, index: int) -> tuple[int, int, int]:
        """Return (block, batch, head) of a matrix of these shards."""
        batch, head = divmod(index, len(self.shards.heads))
        batches = itertools.chain.from_iterable(itertools.starmap(range, self.shards.batches))
        return self.shards.block, next(itertools.islice(batches, batch, None)), self.shards.heads[head]


@dataclass(frozen=True, slots=True)
class Bucket:
    """The common facts of matrices that travel and are iterated together; m ≤ n, whichever way the parameter has them.

    `small`, `long`: by position, which of the m rows and the n columns are there.
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
        """Tell whether the rank at a position has a part of these matrices."""
        return self.mesh == position.mesh and all(position.coordinate[dim] == at for dim, at in self.fixed)

    @property
    def num_replicas(self) -> int:
        return math.prod(self.mesh.shape[dim] for dim in self.replicas)

    def sizes(self) -> tuple[int, ...]:
        """Count the elements of one matrix, by position."""
        return tuple(length(small) * length(long) for small, long in zip(self.small, self.long, strict=True))

    def members(self) -> list[list[int]]:
        """List the global ranks by replica and position."""
        fixed = dict(self.fixed)
        return [
            self.mesh.ranks_along(self.active, {**fixed, **dict(zip(self.replicas, at, strict=True))})
            for at in coordinates(self.mesh.shape, self.replicas)
        ]

    def method(self) -> Method:
        """Choose what moves fewer bytes. Where the long side alone is cut, Gram matrices may be summed instead."""
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
    """Matrices that travel together, in the order of their owners.

    `counts`: how many each owner has, by replica and position (for "in place" and "gram", by replica and 0). Rounds
    with the same `slot` have no rank in common.
    """

    bucket: Bucket
    method: Method
    segments: tuple[Segment, ...]
    counts: tuple[tuple[int, ...], ...]
    slot: int

    @property
    def count(self) -> int:
        return sum(map(sum, self.counts))

    def sent(self) -> dict[str, dict[int, int]]:
        """Count the bytes that leave each rank, by collective. A sum is counted as two halves of an all-to-all."""
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
        """Count the floating-point operations of the iteration, by rank."""
        bucket = self.bucket
        divided = len(bucket.small) if self.method == "gram" else 1
        each = bucket.iteration.flops(bucket.m, bucket.n // divided)
        by_rank: dict[int, int] = {}
        for ranks, owned in zip(bucket.members(), self.counts, strict=True):
            if self.method == "gram":
                owned = owned * len(ranks)
            by_rank |= {rank: number * each for rank, number in zip(ranks, owned, strict=True)}
        return by_rank

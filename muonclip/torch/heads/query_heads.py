"""The heads that the queries of a forward on this rank are: arithmetic on placements, without communication."""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from muonclip.torch.heads.head_rows import HeadRows, axes_of, check_placements
from muonclip.torch.mesh import is_dtensor, local_indices

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


@dataclass(slots=True, eq=False)
class QueryHeads:
    """The heads that the queries of a forward are: under tensor parallelism those whose rows this rank has.

    It holds its module weakly, and copies of a model share it until a projection of the copy is made.
    """

    module: weakref.ref[nn.Module]
    rows: HeadRows
    _first: dict[Any, int] = field(default_factory=dict)

    @classmethod
    def from_rows(cls, rows: HeadRows) -> QueryHeads:
        return cls(weakref.ref(rows.module), replace(rows, module=_NO_MODULE))

    def count(self) -> int | None:
        """Return how many heads this rank has; None where the weight of the queries is not a DTensor in the forward."""
        weight = self._weight()
        return len(self._heads(weight, 0)) if is_dtensor(weight) else None

    def first(self, count: int) -> int:
        """Return the head with which this rank's `count` heads begin.

        Raises ValueError where these are not its heads.
        """
        weight = self._weight()
        if not is_dtensor(weight):
            raise ValueError(
                f"attention was called with {count} query heads, its MaxLogits counts {self.rows.num_heads}, and "
                f"{self.rows.weight}, which makes the queries, is not a DTensor, which would say which heads these "
                "are. Parallelise the projections with torch.distributed.tensor.parallel, or observe all heads."
            )
        key = weight.device_mesh, weight.placements, count
        if key not in self._first:
            self._first[key] = self._find(weight, count)
        return self._first[key]

    def _find(self, weight: DTensor, count: int) -> int:
        # Data-parallel dimensions come first in a mesh. A layer whose shards were already given back shows them here.
        held: list[int] = []
        for dim in range(weight.device_mesh.ndim):
            held = self._heads(weight, dim)
            if held and held == list(range(held[0], held[0] + count)):
                return held[0]
        raise ValueError(
            f"attention was called with {count} query heads and its MaxLogits counts {self.rows.num_heads}, but of "
            f"{self.rows.weight}, placed as {weight.placements}, this rank has all rows of the heads {held}: not "
            f"{count} that follow each other. Let the ranks divide the heads evenly, or observe all heads."
        )

    def _heads(self, weight: DTensor, first_dim: int) -> list[int]:
        """Return the heads that this rank has whole, by the mesh dimensions from the given one on."""
        check_placements(self.rows.weight, weight)
        mesh, coordinate = weight.device_mesh, weight.device_mesh.get_coordinate()
        assert coordinate is not None, "a forward on a rank outside of the mesh"
        cut = slice(first_dim, None)
        placements, mesh_shape, at = weight.placements[cut], mesh.shape[cut], coordinate[cut]
        held = torch.ones((), dtype=torch.bool, device="cpu")
        for axis in axes_of(self.rows.axis):
            here = torch.zeros(weight.shape[axis], dtype=torch.bool, device="cpu")
            for start, stop in local_indices(weight.shape[axis], axis, placements, mesh_shape, at):
                here[start:stop] = True
            held = held[..., None] & here
        return held.flatten()[self.rows.rows("cpu")].all(1).nonzero().flatten().tolist()

    def _weight(self) -> Tensor | None:
        module = self.module()
        return None if module is None else getattr(module, self.rows.weight)

    def __deepcopy__(self, memo: dict[int, Any]) -> QueryHeads:
        module = self.module()
        copied = memo.get(id(module))
        return QueryHeads(weakref.ref(copied) if isinstance(copied, nn.Module) else self.module, self.rows)


_NO_MODULE = nn.Module()

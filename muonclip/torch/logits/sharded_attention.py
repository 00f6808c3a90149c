"""Attention of DTensors: every rank attends to its own sequences and heads, without communication."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import Tensor

from muonclip.torch.mesh import is_dtensor, is_replicate

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor.placement_types import Placement


def on_local_heads(attend: Callable[..., Tensor], q: DTensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
    """Call `attend(q, k, v, **options)` on the local parts; the result is a DTensor placed as q [B, H, Tq, d].

    Masks may be DTensors. Raises ValueError unless q, k and v are sharded in the same way, on sequences and heads.
    """
    local_q, local_k, local_v = local_queries_and_keys(q, k, v)
    local = {name: each.to_local() if is_dtensor(each) else each for name, each in options.items()}
    y = attend(local_q, local_k, local_v, **local)
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(y, q.device_mesh, q.placements, run_check=False)


def local_queries_and_keys(q: DTensor, *others: Tensor) -> tuple[Tensor, ...]:
    """Return the local parts of queries [B, H, Tq, d] and of keys and values [B, G, Tk, d]."""
    from torch.distributed.tensor import Partial, Shard

    _check(q.placements, all(is_replicate(p) or p in (Shard(0), Shard(1)) for p in q.placements))
    local = [q.to_local()]
    for other in others:
        if not is_dtensor(other):
            raise ValueError(
                "attention got queries that are a DTensor, but a key or value that is not one. Make q, k and v "
                "DTensors on one mesh, or pass their local parts, q.to_local()."
            )
        _check(q.placements, other.device_mesh == q.device_mesh, other.placements)
        gradients: list[Placement] = []
        for wanted, has in zip(q.placements, other.placements, strict=True):
            shared = other.shape[1] == 1 and wanted == Shard(1) and is_replicate(has)
            _check(q.placements, shared or wanted == has, other.placements)
            gradients.append(Partial() if shared else has)  # each rank's heads add their part to a shared key
        local.append(other.to_local(grad_placements=gradients))
    return tuple(local)


def _check(q: tuple[Placement, ...], good: bool, other: tuple[Placement, ...] | None = None) -> None:
    if not good:
        raise ValueError(
            f"attention got queries placed as {q}"
            + ("" if other is None else f" and keys or values placed as {other}")
            + "; it takes q, k and v with the same placements, each Shard(0) (batch), Shard(1) (heads) or Replicate(). "
            "Redistribute them before."
        )

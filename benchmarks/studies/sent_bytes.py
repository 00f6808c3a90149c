"""Counts what collectives send, below all of torch's interfaces."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode


class SentBytes(TorchDispatchMode):
    """Counts by collective the bytes that leave this rank. An all-reduce is a reduce-scatter and an all-gather."""

    def __init__(self, group_size: int) -> None:
        super().__init__()
        self.group_size = group_size
        self.by_name: dict[str, int] = {}
        self.calls: list[str] = []

    @property
    def total(self) -> int:
        return sum(self.by_name.values())

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        namespace, _, name = func._schema.name.partition("::")
        if "c10d" in namespace:
            self.calls.append(name)
            size = sent(name, args)
            self.by_name[name] = self.by_name.get(name, 0) + size
        return func(*args, **(kwargs or {}))


def sent(name: str, args: tuple[Any, ...]) -> int:
    """Return the bytes that leave this rank in one collective. Raises AssertionError for one that is not known."""
    flat = list(_tensors(args))
    group = next(a for a in args if isinstance(a, torch.ScriptObject | dist.ProcessGroup))
    ways, rank = _size_and_rank(group)
    if name == "alltoall_base_":
        _, given, _, _, splits = args[:5]
        each = list(splits) or [given.shape[0] // ways] * ways
        return sum(n for at, n in enumerate(each) if at != rank) * given.element_size()
    if name == "_allgather_base_":
        return flat[1].nbytes * (ways - 1)
    if name == "broadcast_":
        return flat[0].nbytes * (ways - 1) if args[2] == rank else 0
    if name == "allreduce_":
        return round(2 * sum(t.nbytes for t in flat) * (ways - 1) / ways)
    raise AssertionError(f"{name} is not expected here")


def _size_and_rank(group: Any) -> tuple[int, int]:
    group = group if isinstance(group, dist.ProcessGroup) else dist.ProcessGroup.unbox(group)  # pyright: ignore
    return group.size(), group.rank()


def _tensors(value: Any) -> Iterator[Any]:
    if hasattr(value, "element_size"):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)

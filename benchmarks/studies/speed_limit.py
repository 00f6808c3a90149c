"""The limit of a step, measured next to it: its own matrix products, and its passes over memory.

The products are those that a step asks PyTorch for, recorded with their shapes, strides and dtypes and run again with
nothing between them. The passes are the least an update needs: read gradient, momentum and weight, write the latter two
(AdamW: one moment more); their rate is that of a copy of the same weights.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

Operand = tuple[tuple[int, ...], tuple[int, ...], torch.dtype]
"""Shape, strides and dtype."""
aten = torch.ops.aten
_FIRST = {aten.mm: 0, aten.bmm: 0, aten.addmm: 1, aten.baddbmm: 1}  # which argument is the left factor


class Products(TorchDispatchMode):
    """Records the matrix products of what runs inside. `flops`: their floating-point operations."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[tuple[Operand, Operand]] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        first = _FIRST.get(func.overloadpacket)
        if first is not None:
            left, right = ((tuple(x.shape), x.stride(), x.dtype) for x in args[first : first + 2])
            self.calls[left, right] += 1
        return func(*args, **kwargs or {})

    @property
    def flops(self) -> int:
        return sum(2 * count * _volume(left[0]) * right[0][-1] for (left, right), count in self.calls.items())

    def replay(self) -> Callable[[], None]:
        """Return a function that runs these products and nothing else."""
        prepared = [
            (torch.bmm if len(left[0]) == 3 else torch.mm, x := _random(*left), y := _random(*right), x @ y, count)
            for (left, right), count in self.calls.items()
        ]

        def run() -> None:
            for product, x, y, out, count in prepared:
                for _ in range(count):
                    product(x, y, out=out)

        return run


def copies(weights: Iterable[Tensor]) -> Callable[[], None]:
    """Return a function that copies the weights, which is two passes over them."""
    pairs = [(torch.empty_like(x), x.detach().clone()) for x in weights]

    def run() -> None:
        for to, x in pairs:
            to.copy_(x)

    return run


def passes(adamw: Sequence[bool], sizes: Sequence[int]) -> float:
    """Return the passes over memory of an update, per element: five by Muon, seven by AdamW."""
    return sum((7 if is_adamw else 5) * size for is_adamw, size in zip(adamw, sizes, strict=True)) / sum(sizes)


def peak_bytes(step: Callable[[], object]) -> int:
    """Return how many bytes PyTorch's allocator held at most, during a step, in addition to those of before."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step()
    results: Any = profile.profiler
    held = peak = 0
    for event in sorted(results.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak


def _random(shape: tuple[int, ...], strides: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    x = torch.empty_strided(shape, strides, dtype=dtype)
    return x.normal_(0, 1 / shape[-1])


def _volume(shape: tuple[int, ...]) -> int:
    return torch.Size(shape).numel()

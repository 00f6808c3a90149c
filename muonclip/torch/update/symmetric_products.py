"""Symmetric products by halves: of each block on the diagonal and the one below it, which is mirrored.

    C = ABᵀ = Cᵀ:   C₁₁ = A₁B₁ᵀ and C₂₂ = A₂B₂ᵀ likewise,   C₂₁ = A₂B₁ᵀ,   C₁₂ = C₂₁ᵀ

A product of m × m costs up to half, less what small blocks lose. Every entry is the same sum as in the whole product.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

_LEAST_ROWS = 256
_LEAST_WORK = 10**8
_LEAST_WORK_OF_TILES = 8 * 10**8
"""The multiplications of a block below which to divide it costs more than it saves: 512³ pays on AVX512-BF16 and AVX2;
tile units (AMX) are so fast that less than 1024 × 1024 × 768 does not."""


def divides(a: Tensor) -> bool:
    """Tell whether it pays to divide the symmetric product ABᵀ of matrices like this one."""
    rows, columns = a.shape[-2:]
    return rows >= _LEAST_ROWS and rows * rows * columns >= _least_work(a.dtype)


def symmetric_product(a: Tensor, b: Tensor) -> Tensor:
    """Return ABᵀ of stacks (matrices, m, n) for which it is symmetric."""
    result = a.new_empty(len(a), a.shape[1], a.shape[1])
    for each, left, right in zip(result, a, b, strict=True):
        _fill(each, left, right, None, 0.0, 1.0)
    return result


def symmetric_sum(addend: Tensor, a: Tensor, b: Tensor, *, beta: float, alpha: float) -> Tensor:
    """Return β addend + α ABᵀ of stacks of symmetric matrices (matrices, m, m) of which A and B commute."""
    result = torch.empty_like(addend)
    for each, added, left, right in zip(result, addend, a, b, strict=True):
        _fill(each, left, right, added, beta, alpha)
    return result


def _fill(result: Tensor, a: Tensor, b: Tensor, addend: Tensor | None, beta: float, alpha: float) -> None:
    half = len(a) // 2
    if not divides(a):
        _multiply(result, a, b, addend, beta, alpha)
        return
    for part in (slice(half), slice(half, None)):
        _fill(result[part, part], a[part], b[part], None if addend is None else addend[part, part], beta, alpha)
    below = result[half:, :half]
    _multiply(below, a[half:], b[:half], None if addend is None else addend[half:, :half], beta, alpha)
    result[:half, half:].copy_(below.mT)


def _multiply(result: Tensor, a: Tensor, b: Tensor, addend: Tensor | None, beta: float, alpha: float) -> None:
    if addend is None:
        torch.mm(a, b.mT, out=result)
    else:
        torch.addmm(addend, a, b.mT, beta=beta, alpha=alpha, out=result)


@cache
def _least_work(dtype: torch.dtype) -> int:
    instructions = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    narrow = dtype in (torch.bfloat16, torch.float16)
    return _LEAST_WORK_OF_TILES if narrow and instructions.get("amx_bf16") else _LEAST_WORK

"""The choices that decide the speed of an update, from the global shape of its matrices and facts that all ranks share.

On a processor, matrices are taken from the momentum to the weight as many at once as stay in its cache, and iterated in
the form that multiplies least.
"""

from __future__ import annotations

from functools import cache, lru_cache
from itertools import pairwise
from typing import Literal

import torch

from muonclip.core import resolve_coefficients
from muonclip.core.coefficients import Coefficients, checked_gram_restarts, gram_restarts

Form = Literal["standard", "gram"]

PIECE_BYTES = 2 * 2**20
"""What a thread of a processor takes at once, counted in float32: half of it is the input of bf16 products."""

_MOST_THREADS = 4
"""Threads up to which that was measured to help; more share the cache."""

_MOST_WORK_IN_FLOAT32 = 2**15
"""Multiplications of a product up to which float32 takes less time than bf16, however many there are: 16 × 16 × 128."""


@lru_cache(maxsize=1024)
def choose_form(
    m: int, n: int, dtype: torch.dtype, device_type: str, ns_coefficients: Coefficients, ns_steps: int | None
) -> Form:
    """Choose how matrices m × n, m ≤ n, are iterated where nobody says it.

    The Gram form makes more products of m × m, which small matrices multiply less efficiently: it has to save 1/25 of
    the operations, and 8/m more. It is not chosen for float64, which asks for accuracy, nor on other devices, where
    its saving is not measured.
    """
    if device_type != "cpu" or dtype not in (torch.bfloat16, torch.float32):
        return "standard"
    if gram_restarts(ns_coefficients, ns_steps) is None:
        return "standard"
    standard, gram = (flops(m, n, form, dtype, ns_coefficients, ns_steps) for form in ("standard", "gram"))
    return "gram" if standard > gram * (1.04 + 8 / m) else "standard"


@lru_cache(maxsize=4096)
def flops(m: int, n: int, form: Form, dtype: torch.dtype, ns_coefficients: Coefficients, ns_steps: int | None) -> int:
    """Count the floating-point operations of the iteration of one matrix m × n, m ≤ n."""
    steps = len(resolve_coefficients(ns_coefficients, ns_steps))
    if form == "standard" or m == n:
        return steps * (4 * m * m * n + 2 * m**3)
    edges = 0, *checked_gram_restarts(ns_coefficients, ns_steps, wide=dtype.itemsize >= 4), steps
    # Of each step the polynomial, of each but a segment's first Q, of each but its last two products for R.
    squares = sum(4 * (stop - start) - 3 for start, stop in pairwise(edges))
    return (len(edges) - 1) * 4 * m * m * n + squares * 2 * m**3


def iteration_dtype(device_type: str, dtype: torch.dtype, ns_dtype: torch.dtype | None) -> torch.dtype:
    """Return the dtype of the products on matrices of `dtype`, but for small ones, see `multiplies_small_in_float32`.

    It is bf16 where the device multiplies that faster, float32 elsewhere; float64 stays; `ns_dtype` overrides.
    """
    if ns_dtype is not None:
        return ns_dtype
    if dtype == torch.float64:
        return torch.float64
    return torch.bfloat16 if _multiplies_bf16_faster(device_type) else torch.float32


def multiplies_small_in_float32(m: int, n: int, device_type: str) -> bool:
    """Tell whether matrices m × n are so small that a processor starts a product in bf16 later than float32 ends it."""
    return device_type == "cpu" and min(m, n) * m * n <= _MOST_WORK_IN_FLOAT32


def matrices_at_once(m: int, n: int, device_type: str, workspace_bytes: int) -> int:
    """Count the matrices m × n that one rank takes from the momentum to the weight at once."""
    threads = min(torch.get_num_threads(), _MOST_THREADS)
    most = min(threads * PIECE_BYTES, workspace_bytes) if device_type == "cpu" else workspace_bytes
    return max(1, most // (4 * m * n))


def rows_at_once(count: int, columns: int, device_type: str) -> int | None:
    """Count the rows of `count` matrices that are changed element by element at once; None: all."""
    return max(1, PIECE_BYTES // (4 * count * columns)) if device_type == "cpu" and count * columns else None


@cache
def _multiplies_bf16_faster(device_type: str) -> bool:
    """CUDA from Ampere on, and processors with bf16 dot products (AVX512-BF16, AMX), unless torch is held to AVX2."""
    if device_type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device_type != "cpu" or torch.backends.cpu.get_cpu_capability() == "AVX2":  # as ATEN_CPU_CAPABILITY asks
        return False
    instructions = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return bool(instructions.get("avx512_bf16") or instructions.get("amx_bf16"))

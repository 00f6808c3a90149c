"""The precision and the pieces of an update, from the global shape of its matrices and facts that all ranks share.

On a processor, matrices are taken from the momentum to the weight as many at once as stay in its cache. The form in
which they are iterated is `core.cost_model`'s choice.
"""

from __future__ import annotations

from functools import cache

import torch

PIECE_BYTES = 2 * 2**20
"""What a thread of a processor takes at once, counted in float32: half of it is the input of bf16 products."""

_MOST_THREADS = 4
"""Threads up to which that was measured to help; more share the cache."""

_MOST_WORK_IN_FLOAT32 = 2**15
"""Multiplications of a product up to which float32 takes less time than bf16, however many there are: 16 × 16 × 128."""


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
    """Count the matrices m × n that one rank takes from the momentum to the weight at once, as many for each thread."""
    threads = min(torch.get_num_threads(), _MOST_THREADS)
    most = min(threads * PIECE_BYTES, workspace_bytes) if device_type == "cpu" else workspace_bytes
    count = max(1, most // (4 * m * n))
    return count - count % threads if device_type == "cpu" and count > threads else count


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

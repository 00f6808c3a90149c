"""The choices that decide the speed of an update, from the global shape of its matrices and facts that all ranks share.

How many matrices are taken at once on a processor: as many as stay in its cache from the momentum to the weight.
"""

from __future__ import annotations

PIECE_BYTES = 2 * 2**20
"""What is taken at once on a processor, counted in float32: half of it is the input of bf16 products."""


def matrices_at_once(m: int, n: int, device_type: str, workspace_bytes: int) -> int:
    """Count the matrices m × n that one rank takes from the momentum to the weight at once."""
    most = min(PIECE_BYTES, workspace_bytes) if device_type == "cpu" else workspace_bytes
    return max(1, most // (4 * m * n))


def rows_at_once(count: int, columns: int, device_type: str) -> int | None:
    """Count the rows of `count` matrices that are changed element by element at once; None: all."""
    return max(1, PIECE_BYTES // (4 * count * columns)) if device_type == "cpu" and count * columns else None

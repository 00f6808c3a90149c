"""The choices that decide the speed of an update, from the global shape of its matrices and facts that all ranks share.

On a processor, matrices are taken from the momentum to the weight as many at once as stay in its cache, and iterated in
the form that multiplies least.
"""

from __future__ import annotations

from functools import lru_cache
from itertools import pairwise
from typing import Literal

import torch

from muonclip.core import resolve_coefficients
from muonclip.core.coefficients import Coefficients, checked_gram_restarts, gram_restarts

Form = Literal["standard", "gram"]

PIECE_BYTES = 2 * 2**20
"""What is taken at once on a processor, counted in float32: half of it is the input of bf16 products."""


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
    standard, gram = (flops(m, n, form, ns_coefficients, ns_steps) for form in ("standard", "gram"))
    return "gram" if standard > gram * (1.04 + 8 / m) else "standard"


@lru_cache(maxsize=4096)
def flops(m: int, n: int, form: Form, ns_coefficients: Coefficients, ns_steps: int | None) -> int:
    """Count the floating-point operations of the iteration of one matrix m × n, m ≤ n."""
    steps = len(resolve_coefficients(ns_coefficients, ns_steps))
    if form == "standard" or m == n:
        return steps * (4 * m * m * n + 2 * m**3)
    edges = 0, *checked_gram_restarts(ns_coefficients, ns_steps), steps
    # Of each step the polynomial, of each but a segment's first Q, of each but its last two products for R.
    squares = sum(4 * (stop - start) - 3 for start, stop in pairwise(edges))
    return (len(edges) - 1) * 4 * m * m * n + squares * 2 * m**3


def matrices_at_once(m: int, n: int, device_type: str, workspace_bytes: int) -> int:
    """Count the matrices m × n that one rank takes from the momentum to the weight at once."""
    most = min(PIECE_BYTES, workspace_bytes) if device_type == "cpu" else workspace_bytes
    return max(1, most // (4 * m * n))


def rows_at_once(count: int, columns: int, device_type: str) -> int | None:
    """Count the rows of `count` matrices that are changed element by element at once; None: all."""
    return max(1, PIECE_BYTES // (4 * count * columns)) if device_type == "cpu" and count * columns else None

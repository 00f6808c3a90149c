"""The form in which a matrix is iterated, from its whole shape and facts that all ranks share; one rule for both
adapters."""

from __future__ import annotations

from functools import lru_cache
from itertools import pairwise
from typing import Literal

from muonclip.core.coefficients import Coefficients, checked_gram_restarts, gram_restarts, resolve_coefficients

Form = Literal["standard", "gram"]


@lru_cache(maxsize=1024)
def choose_form(
    m: int, n: int, dtype: str, device_type: str, ns_coefficients: Coefficients, ns_steps: int | None
) -> Form:
    """Choose how matrices m × n, m ≤ n, are iterated where nobody says it; `dtype`: of the products, by name.

    The Gram form makes more products of m × m, which small matrices multiply less efficiently: it has to save 1/25 of
    the operations, and 8/m more. It is not chosen for float64, which asks for accuracy, nor on other devices than
    processors ("cpu"), where its saving is not measured.
    """
    if device_type != "cpu" or dtype not in ("bfloat16", "float32"):
        return "standard"
    if gram_restarts(ns_coefficients, ns_steps) is None:
        return "standard"
    wide = dtype == "float32"
    standard, gram = (flops(m, n, form, ns_coefficients, ns_steps, wide=wide) for form in ("standard", "gram"))
    return "gram" if standard > gram * (1.04 + 8 / m) else "standard"


@lru_cache(maxsize=4096)
def flops(m: int, n: int, form: Form, ns_coefficients: Coefficients, ns_steps: int | None, *, wide: bool) -> int:
    """Count the floating-point operations of the iteration of one matrix m × n, m ≤ n; `wide` as in `gram_restarts`."""
    steps = len(resolve_coefficients(ns_coefficients, ns_steps))
    if form == "standard" or m == n:
        return steps * (4 * m * m * n + 2 * m**3)
    edges = 0, *checked_gram_restarts(ns_coefficients, ns_steps, wide=wide), steps
    # Of each step the polynomial, of each but a segment's first Q, of each but its last two products for R.
    squares = sum(4 * (stop - start) - 3 for start, stop in pairwise(edges))
    return (len(edges) - 1) * 4 * m * m * n + squares * 2 * m**3

"""Polar Express: the odd quintics that bring the singular values in [lower, 1] closest to 1, step by step.

With l = lower and u = 1 at first, each step takes

    p      the odd quintic with the smallest max |1 − p(s)| on [max(l, cushion · u), u]
    p      ← p · 2 / (p(l) + p(u)), so that p(l) and p(u) are equally far from 1
    l, u   ← p(l), 2 − p(l)

The cushion keeps the first steps from magnifying rounding errors (Amsel et al., arXiv 2505.16932, Algorithm 1).
"""

from __future__ import annotations

from collections.abc import Sequence
from decimal import Context, Decimal, localcontext

from muonclip.core.arguments import Rule, check_number, check_whole

CUSHION = Decimal("0.02407327424182761")
_CONTEXT = Context(prec=40)  # the last steps' intervals are narrow: in float64 they would cost half the digits
_NARROW = 1 - Decimal("1e-8")  # l/u past which the minimax polynomial is its limit, to 1e-8


def polar_express(
    lower: float = 1e-3, steps: int = 5, *, safety: float = 1.0
) -> tuple[tuple[float, float, float], ...]:
    """Return the `(a, b, c)` of each step, as `ns_coefficients` takes them.

    Args:
        lower: The singular value, relative to the Frobenius norm, from which on all come near 1; in (0, 1). The smaller
            it is, the more steps that takes.
        steps: The number of steps.
        safety: s ≥ 1 turns steps into `(a/s, b/s³, c/s⁵)`, but those at the end whose interval has shrunk to 1. Above
            their interval the polynomials grow steeply, and rounding leads there: in bf16 use 1.02.

    Raises:
        ValueError: For numbers outside these ranges.
    """
    between: Rule = ("between 0 and 1", lambda x: 0 < x < 1)
    check_number("lower", lower, between, "a singular value relative to the Frobenius norm.")
    steps = check_whole("steps", steps, 1, 99)
    check_number("safety", safety, ("from 1 (none) to 2", lambda x: 1 <= x < 2), "1.01 and 1.02 are usual.")
    made: list[tuple[float, float, float]] = []
    with localcontext(_CONTEXT):
        low, high = Decimal(lower), Decimal(1)
        for _ in range(steps):
            s = safety if low < _NARROW * high else 1.0
            p = _minimax(max(low, CUSHION * high), high)
            centre = 2 / (_value(p, low) + _value(p, high))
            p = tuple(centre * number for number in p)
            low = _value(p, low)
            high = 2 - low
            a, b, c = map(float, p)
            made.append((a / s, b / s**3, c / s**5))
    return tuple(made)


def _minimax(low: Decimal, high: Decimal) -> Sequence[Decimal]:
    """Return the odd quintic closest to 1 on [low, high], by the algorithm of Remez.

    Its error takes its largest size, with signs + − + −, at `low`, at two points between, which are zeros of the
    derivative, and at `high`.
    """
    if low >= _NARROW * high:
        return Decimal("1.875") / high, Decimal("-1.25") / high**3, Decimal("0.375") / high**5
    left, right = (3 * low + high) / 4, (low + 3 * high) / 4
    a = b = c = error = Decimal(0)
    before = Decimal(-1)
    while error > before:  # it grows up to the smallest possible, where the digits are used up
        points = ((low, 1), (left, -1), (right, 1), (high, -1))
        before = error
        a, b, c, error = _solve([[x, x**3, x**5, Decimal(sign), Decimal(1)] for x, sign in points])
        root = (9 * b * b - 20 * a * c).sqrt()
        left, right = ((-3 * b - root) / (10 * c)).sqrt(), ((-3 * b + root) / (10 * c)).sqrt()
    return a, b, c


def _value(polynomial: Sequence[Decimal], s: Decimal) -> Decimal:
    a, b, c = polynomial
    return s * (a + s * s * (b + s * s * c))


def _solve(rows: list[list[Decimal]]) -> list[Decimal]:
    """Solve linear equations, given as rows of coefficients with the right side at their end (Gauss–Jordan)."""
    for column in range(len(rows)):
        pivot = max(range(column, len(rows)), key=lambda row: abs(rows[row][column]))
        rows[column], rows[pivot] = rows[pivot], rows[column]
        rows[column] = [number / rows[column][column] for number in rows[column]]
        for row in range(len(rows)):
            if row != column:
                factor = rows[row][column]
                rows[row] = [x - factor * y for x, y in zip(rows[row], rows[column], strict=True)]
    return [row[-1] for row in rows]

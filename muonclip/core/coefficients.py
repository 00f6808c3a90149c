"""The polynomials of the Newton–Schulz iteration, by name.

One step maps every singular value `s` to `a s + b s³ + c s⁵`. A set is the list of its steps' `(a, b, c)`. To add a
set, add an entry to `COEFFICIENT_SETS`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from types import MappingProxyType
from typing import TypeAlias, cast

from muonclip.core.arguments import check_kind, check_whole, shown
from muonclip.core.polar_express import polar_express

Polynomial: TypeAlias = tuple[float, float, float]
"""`(a, b, c)` of a step s → a s + b s³ + c s⁵."""

Coefficients: TypeAlias = str | Polynomial | Sequence[Polynomial]
"""What `ns_coefficients` takes, see `resolve_coefficients`."""

DEFAULT_NS_STEPS = 5


@dataclass(frozen=True, slots=True)
class CoefficientSet:
    """A published sequence of polynomials, and what is known of it.

    Args:
        source: Author or paper.
        steps: `(a, b, c)` of each step, as published.
        tail: The step that repeats after `steps`, so that the set has any length; None where the set ends with them.
        safety: s ≥ 1 turns each of `steps` into `(a/s, b/s³, c/s⁵)`, which keeps the iteration from overshooting when
            rounding pushes a singular value above 1; it is not applied to the tail.
        default_steps: The number of steps where none is given.
        gram_steps: The numbers of steps with which the Gram form may run: those at which its error on real momenta, in
            bf16 and with the restarts of `gram_restarts`, stays near the standard form's, by `python -m benchmarks
            gram-accuracy`.
    """

    source: str
    steps: tuple[Polynomial, ...]
    tail: Polynomial | None = None
    safety: float = 1.0
    default_steps: int = DEFAULT_NS_STEPS
    gram_steps: range = range(0)

    def polynomials(self, ns_steps: int | None = None) -> tuple[Polynomial, ...]:
        """Return the first polynomials, safety factor applied.

        Args:
            ns_steps: How many; None: `default_steps`.

        Raises:
            ValueError: Past the end of the set.
        """
        count = self.default_steps if ns_steps is None else _checked_steps(ns_steps)
        s = self.safety
        published = tuple((a / s, b / s**3, c / s**5) for a, b, c in self.steps[:count])
        missing = count - len(published)
        if missing and self.tail is None:
            raise ValueError(f"ns_steps={count} is longer than the set, which has {len(self.steps)} steps.")
        return published + (self.tail,) * missing if self.tail else published

    def begins_with(self, polynomials: tuple[Polynomial, ...]) -> bool:
        """Tell whether these are the set's first polynomials.

        Args:
            polynomials: `(a, b, c)` of each step.
        """
        count = len(polynomials) if self.tail else min(len(polynomials), len(self.steps))
        return self.polynomials(count) == polynomials


JORDAN: Polynomial = (3.4445, -4.7750, 2.0315)
_POLAR_EXPRESS = polar_express(
    lower=1e-3, steps=7
)  # as published; the eighth and all that follow are the tail, to 4e-9

COEFFICIENT_SETS: Mapping[str, CoefficientSet] = MappingProxyType(
    {
        "jordan": CoefficientSet(
            source="K. Jordan, Muon: an optimizer for hidden layers in neural networks (2024)",
            steps=(),
            tail=JORDAN,
            gram_steps=range(4, 6),
        ),
        "deepseek_v4": CoefficientSet(
            source="DeepSeek-V4: eight steps of jordan, then two that converge",
            steps=(JORDAN,) * 8,
            tail=(2.0, -1.5, 0.5),
            default_steps=10,
            gram_steps=range(9, 100),
        ),
        "you": CoefficientSet(
            source="J. You (2024), steps optimised one by one",
            steps=(
                (4.0848, -6.8946, 2.9270),
                (3.9505, -6.3029, 2.6377),
                (3.7418, -5.5913, 2.3037),
                (2.8769, -3.1427, 1.2046),
                (2.8366, -3.0525, 1.2012),
            ),
            gram_steps=range(1, 6),
        ),
        "polar_express": CoefficientSet(
            source="Amsel et al., The Polar Express (arXiv 2505.16932): minimax on [1e-3, 1], cushion 0.0241",
            steps=_POLAR_EXPRESS,
            tail=(1.875, -1.25, 0.375),
            safety=1.01,
            gram_steps=range(1, 100),
        ),
        "polar_express_1.02": CoefficientSet(
            source="polar_express with a safety factor of 1.02, for small matrices in bf16",
            steps=_POLAR_EXPRESS,
            tail=(1.875, -1.25, 0.375),
            safety=1.02,
            gram_steps=range(1, 100),
        ),
        "cans": CoefficientSet(
            source="Grishina et al., CANS: Chebyshev-accelerated Newton–Schulz (arXiv 2506.10935)",
            steps=(
                (8.4703, -25.1081, 18.6293),
                (4.1828, -3.1087, 0.5806),
                (3.9619, -2.9541, 0.5630),
                (3.2866, -2.4647, 0.5074),
                (2.2737, -1.6447, 0.4162),
            ),
            safety=1.01,  # without it 1.001 becomes 2e23, and bf16 rounds 1 to as much
            # no gram_steps: three of the five steps would be alone, which saves little
        ),
    }
)
"""The known sets by name, as `ns_coefficients` takes it; one entry each."""


GRAM_GROWTH = 150.0
"""The most by which the Gram form may magnify, between two restarts, the rounding of R = XXᵀ to bf16 or float16."""

GRAM_GROWTH_WIDE = 1e5
"""The same in float32: its rounding times this is as small as that of the standard form in bf16."""


def gram_restarts(
    ns_coefficients: Coefficients, ns_steps: int | None = None, *, wide: bool = False
) -> tuple[int, ...] | None:
    """Return the steps (from 0) before which the Gram form restarts; None where it may not run with these polynomials.

    `wide`: with products in float32 or float64, which restart less often. It may run with the polynomials and numbers
    of steps of the sets' `gram_steps`, by name or written out. For others
    its error is too large, or nobody has judged it.
    """
    polynomials = resolve_coefficients(ns_coefficients, ns_steps)
    for known in COEFFICIENT_SETS.values():
        if len(polynomials) in known.gram_steps and known.begins_with(polynomials):
            return restarts_within(GRAM_GROWTH_WIDE if wide else GRAM_GROWTH, polynomials, first_alone=not wide)
    return None


def restarts_within(most: float, polynomials: Sequence[Polynomial], *, first_alone: bool = True) -> tuple[int, ...]:
    """Return the fewest restarts with which ∏ a² is at most `most` between them, and the first step is alone.

    Rounding moves the eigenvalues of R, and makes some of those near zero negative; one step multiplies such a value by
    a², and once it is large the form diverges. Within 150, 2⁻⁸ stays below 0.6. In narrow dtypes the first step is
    alone, because before it small singular values are furthest below the rounding of R.
    """
    restarts: list[int] = []
    growth = 1.0
    for step, (a, _, _) in enumerate(polynomials):
        if (first_alone and step == 1) or (step and growth * a**2 > most):
            restarts.append(step)
            growth = 1.0
        growth *= a**2
    return tuple(restarts)


def checked_gram_restarts(
    ns_coefficients: Coefficients, ns_steps: int | None = None, *, wide: bool = False
) -> tuple[int, ...]:
    """Return `gram_restarts`, for a Gram form that was asked for; raises ValueError where it may not run."""
    restarts = gram_restarts(ns_coefficients, ns_steps, wide=wide)
    if restarts is None:
        usable = [
            f"{name} ({known.gram_steps.start} to {known.gram_steps.stop - 1} steps)"
            for name, known in COEFFICIENT_SETS.items()
            if known.gram_steps
        ]
        raise ValueError(
            f"the Gram form is not accurate, or not tried, with ns_coefficients={ns_coefficients!r} and "
            f"{len(resolve_coefficients(ns_coefficients, ns_steps))} steps; it is with {', '.join(usable)}. Use the "
            "standard form."
        )
    return restarts


def resolve_coefficients(ns_coefficients: Coefficients, ns_steps: int | None = None) -> tuple[Polynomial, ...]:
    """Turn what a user may write as `ns_coefficients` into the polynomials to iterate.

    Args:
        ns_coefficients: A name of `COEFFICIENT_SETS`; one triple `(a, b, c)`, repeated `ns_steps` times (5 by default,
            as in `torch.optim.Muon`); or a sequence of triples, cut to `ns_steps` where given.
        ns_steps: The number of steps; None takes the set's own length.

    Raises:
        ValueError: For an unknown name, for numbers that are not finite triples, and for lengths that the set does not
            have.
    """
    if isinstance(ns_coefficients, str):
        if ns_coefficients not in COEFFICIENT_SETS:
            raise ValueError(
                f"ns_coefficients={ns_coefficients!r} is not a known polynomial; known are "
                f"{', '.join(COEFFICIENT_SETS)}. A triple (a, b, c) or a list of triples is accepted too."
            )
        try:
            return COEFFICIENT_SETS[ns_coefficients].polynomials(ns_steps)
        except ValueError as error:
            raise ValueError(f"ns_coefficients={ns_coefficients!r}: {error}") from None
    check_kind("ns_coefficients", ns_coefficients, Sequence, "a name, a triple (a, b, c) or a list of triples")
    numbers = tuple(ns_coefficients)
    if len(numbers) == 3 and all(isinstance(number, Real) for number in numbers):
        return CoefficientSet("given", (), tail=_checked_polynomial(numbers)).polynomials(ns_steps)
    steps = tuple(_checked_polynomial(step) for step in numbers)
    if not steps:
        raise ValueError("ns_coefficients is empty; give a name, a triple (a, b, c) or a list of triples.")
    return CoefficientSet("given", steps, default_steps=len(steps)).polynomials(ns_steps)


def _checked_polynomial(step: object) -> Polynomial:
    numbers = cast("Sequence[object]", step) if isinstance(step, Sequence) else ()
    finite = [float(x) for x in numbers if isinstance(x, Real) and math.isfinite(x)]
    if len(numbers) != 3 or len(finite) != 3:
        raise ValueError(f"ns_coefficients holds {shown(step)}; each step must be three finite numbers (a, b, c).")
    a, b, c = finite
    return a, b, c


def _checked_steps(ns_steps: int) -> int:
    return check_whole("ns_steps", ns_steps, 1, 99)

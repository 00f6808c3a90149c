import itertools

import numpy as np
import pytest

from muonclip.core import COEFFICIENT_SETS, resolve_coefficients
from muonclip.core.coefficients import (
    GRAM_GROWTH,
    GRAM_GROWTH_WIDE,
    JORDAN,
    checked_gram_restarts,
    gram_restarts,
    restarts_within,
)

# Output band of the singular values for inputs in [1e-3, 1], in float64.
BANDS = {
    ("jordan", None): (0.471, 1.202),
    ("deepseek_v4", None): (1.0000, 1.0005),
    ("you", None): (0.475, 1.145),
    ("polar_express", 5): (0.846, 1.124),
    ("polar_express", 8): (1.0000, 1.0000),
    ("polar_express_1.02", 5): (0.816, 1.124),
    ("polar_express_1.02", 8): (1.0000, 1.0000),
    ("cans", None): (0.857, 1.113),
}


@pytest.mark.parametrize(("key", "band"), BANDS.items(), ids=str)
def test_every_set_has_its_published_band(key, band):
    s = np.geomspace(1e-3, 1, 200_001)
    for a, b, c in resolve_coefficients(*key):
        s = a * s + b * s**3 + c * s**5
    assert (s.min(), s.max()) == pytest.approx(band, abs=6e-4)


def test_every_set_names_its_source():
    assert all(known.source for known in COEFFICIENT_SETS.values())
    assert {name for name, _ in BANDS} == set(COEFFICIENT_SETS)


def test_own_length_is_the_default():
    assert [len(resolve_coefficients(name)) for name in ("jordan", "deepseek_v4", "you", "cans")] == [5, 10, 5, 5]


def test_polar_express_has_any_length_and_its_safety_factor_spares_the_tail():
    known = COEFFICIENT_SETS["polar_express"]
    assert len(resolve_coefficients("polar_express", 12)) == 12
    assert resolve_coefficients("polar_express", 9)[7:] == ((1.875, -1.25, 0.375),) * 2
    a, b, c = known.steps[6]
    assert resolve_coefficients("polar_express", 7)[6] == pytest.approx((a / 1.01, b / 1.01**3, c / 1.01**5), rel=1e-15)


def test_triples_and_lists_are_accepted():
    assert resolve_coefficients((3.4445, -4.7750, 2.0315)) == resolve_coefficients("jordan")
    assert resolve_coefficients((2, -1.5, 0.5), 3) == ((2.0, -1.5, 0.5),) * 3
    assert resolve_coefficients([(2, -1.5, 0.5), [3, -3, 1]], 1) == ((2.0, -1.5, 0.5),)


CONVERGING = (2.0, -1.5, 0.5)


def test_the_gram_form_restarts_by_the_polynomials_and_their_number():
    assert gram_restarts("jordan") == gram_restarts(JORDAN) == gram_restarts([JORDAN] * 5) == (1, 3)
    assert gram_restarts([JORDAN] * 8 + [CONVERGING] * 2) == gram_restarts("deepseek_v4") == (1, 3, 5, 7, 9)
    assert gram_restarts("deepseek_v4", 15) == (1, 3, 5, 7, 9, 12)
    assert gram_restarts("polar_express") == (1, 2, 3)
    assert gram_restarts("polar_express", 15) == (1, 2, 3, 5, 9, 12)
    assert gram_restarts("jordan", wide=True) == (4,)
    assert gram_restarts("polar_express", wide=True) == (3,)


@pytest.mark.parametrize("name", COEFFICIENT_SETS)
def test_between_restarts_rounding_grows_only_so_far(name):
    for ns_steps in range(1, 31 if COEFFICIENT_SETS[name].tail else 6):
        polynomials = resolve_coefficients(name, ns_steps)
        segments = np.split(np.square([a for a, _, _ in polynomials]), restarts_within(GRAM_GROWTH, polynomials))
        assert max(segment.prod() for segment in segments) <= GRAM_GROWTH
        assert len(segments[0]) == 1
        assert all(one.prod() * other[0] > GRAM_GROWTH for one, other in itertools.pairwise(segments[1:]))
        restarts = restarts_within(GRAM_GROWTH_WIDE, polynomials, first_alone=False)
        segments = np.split(np.square([a for a, _, _ in polynomials]), restarts)
        assert max(segment.prod() for segment in segments) <= GRAM_GROWTH_WIDE
        assert all(one.prod() * other[0] > GRAM_GROWTH_WIDE for one, other in itertools.pairwise(segments))


@pytest.mark.parametrize(
    ("given", "steps"),
    [
        ("cans", 5),
        ("jordan", 8),
        ("deepseek_v4", 7),
        (CONVERGING, 5),
        ([JORDAN] * 4 + [CONVERGING], None),
        ([JORDAN] * 9 + [CONVERGING], None),
        ([JORDAN] * 8 + [(8.0, -20.0, 14.0)] * 2, None),
    ],
    ids=str,
)
def test_the_gram_form_is_refused_for_polynomials_that_were_not_judged(given, steps):
    assert gram_restarts(given, steps) is None
    with pytest.raises(ValueError, match="the Gram form is not accurate, or not tried, with ns_coefficients="):
        checked_gram_restarts(given, steps)


@pytest.mark.parametrize(
    ("given", "steps", "message"),
    [
        ("jordon", None, "ns_coefficients='jordon' is not a known polynomial; known are jordan, "),
        ("cans", 6, "ns_coefficients='cans': ns_steps=6 is longer than the set, which has 5 steps"),
        ((1.0, 2.0), None, "three finite numbers"),
        ([(1.0, 2.0, float("nan"))], None, "three finite numbers"),
        ([], None, "ns_coefficients is empty"),
        ("jordan", 0, "ns_steps=0 must be a whole number from 1 to 99"),
        ("jordan", 2.5, "ns_steps=2.5 must be a whole number"),
    ],
)
def test_errors_name_what_was_seen(given, steps, message):
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        resolve_coefficients(given, steps)

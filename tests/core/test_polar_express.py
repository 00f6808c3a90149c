import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.studies.spectra import hard_spectra
from muonclip.core import orthogonalize, polar_express, resolve_coefficients
from muonclip.core.coefficients import gram_restarts

# As published (arXiv 2505.16932), for the singular values from 1e-3 on.
PUBLISHED = [
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
    (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
    (1.8750014808534479, -1.2500016453999487, 0.3750001645474248),
    (1.875, -1.25, 0.375),
]


def values(polynomials, s):
    for a, b, c in polynomials:
        s = a * s + b * s**3 + c * s**5
    return s


def test_equals_the_published_table():
    np.testing.assert_allclose(polar_express(lower=1e-3, steps=8), PUBLISHED, rtol=0, atol=4e-9)


def test_the_named_sets_are_made_of_it():
    for name, safety in (("polar_express", 1.01), ("polar_express_1.02", 1.02)):
        expected = [(a / safety, b / safety**3, c / safety**5) for a, b, c in PUBLISHED[:7]] + PUBLISHED[7:] * 2
        np.testing.assert_allclose(resolve_coefficients(name, 9), expected, rtol=0, atol=4e-9)
        np.testing.assert_allclose(polar_express(1e-3, 9, safety=safety), expected, rtol=0, atol=4e-9)
        assert gram_restarts(name, 9) is not None


@given(st.floats(0.025, 0.99))
def test_the_first_step_is_the_best_quintic(lower):
    """Its error is largest at four points, with alternating signs: by Chebyshev no odd quintic is closer to 1."""
    s = np.linspace(lower, 1, 100_001)
    error = 1 - values(polar_express(lower, 1), s)
    size = abs(error).max()
    extreme = np.sign(error[abs(error) > size * (1 - 1e-6)])
    assert extreme[0] > 0
    assert np.count_nonzero(np.diff(extreme)) == 3


@given(st.floats(-6, -2), st.integers(1, 9))
def test_all_values_from_the_lower_end_on_come_equally_near_one(exponent, steps):
    lower = 10**exponent
    s = np.geomspace(lower, 1, 20_001)
    u = values(polar_express(lower, steps), s)
    assert u[0] == pytest.approx(u.min(), abs=1e-6)  # float64's rounding, magnified step by step
    assert u.max() <= 2 - u.min() + 1e-6
    better = values(polar_express(lower, steps + 1), s)
    assert better.min() > u.min() or u.min() > 1 - 1e-12


@pytest.mark.parametrize("lower", [1e-4, 1e-2])
def test_it_runs_in_bf16_by_its_safety_factor(lower):
    x = hard_spectra(24, 64).float()
    for steps in range(1, 16):
        polynomials = polar_express(lower, steps, safety=1.02)
        u = orthogonalize(x, polynomials, xp=torch, dtype=torch.bfloat16)
        bound = values(polynomials, np.linspace(0, 1 + 2**-7, 20_001)).max()
        assert torch.linalg.svdvals(u.double()).max() <= bound + 0.06


@pytest.mark.parametrize(
    ("given_", "message"),
    [
        (dict(lower=0.0), "lower=0.0 must be between 0 and 1"),
        (dict(lower=1), "lower=1 must be between 0 and 1"),
        (dict(steps=0), "steps=0 must be a whole number from 1 to 99"),
        (dict(steps=2.5), "steps=2.5 must be a whole number"),
        (dict(safety=0.99), "safety=0.99 must be from 1"),
    ],
)
def test_errors_name_what_was_seen(given_, message):
    with pytest.raises(ValueError, match=message):
        polar_express(**given_)

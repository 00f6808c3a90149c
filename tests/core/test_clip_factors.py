import math

import array_api_strict
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from muonclip.core import clip_factors

NAMESPACES = {"numpy": np, "torch": torch, "jax": jnp, "strict": array_api_strict}
taus = st.floats(1e-3, 1e4)
alphas = st.floats(0, 1)
logits = st.lists(st.floats(-1e6, 1e6, width=32) | st.just(-math.inf), min_size=1, max_size=8)


@pytest.mark.parametrize("xp", NAMESPACES.values(), ids=NAMESPACES)
@given(maxima=logits, tau=taus, alpha=alphas)
def test_every_head_ends_at_the_smaller_of_its_maximum_and_tau(xp, maxima, tau, alpha):
    s = xp.asarray(np.array(maxima, dtype=np.float32))
    gamma, query, key = (np.asarray(f, dtype=np.float64) for f in clip_factors(s, tau, alpha, xp=xp))
    s = np.asarray(s, dtype=np.float64)
    loud = s > tau
    assert ((gamma <= 1) & (gamma > 0)).all()
    np.testing.assert_allclose((gamma * s)[loud], np.minimum(s, tau)[loud], rtol=1e-6)
    np.testing.assert_allclose(query * key, gamma, rtol=3e-7)
    np.testing.assert_allclose(query, gamma**alpha, rtol=2e-6)
    for factor in (gamma, query, key):
        assert (factor[~loud] == 1.0).all()


@given(st.integers(1, 10_000))
def test_a_head_exactly_at_tau_is_quiet(tau):
    """τ/τ computed through a reciprocal is 1 − ε for 41, 47, 55 and others, and would move every weight."""
    for xp in (np, torch):
        for factor in clip_factors(xp.asarray(np.array([tau, tau / 2], dtype=np.float32)), float(tau), xp=xp):
            assert np.asarray(factor).tolist() == [1.0, 1.0]


@pytest.mark.parametrize("xp", NAMESPACES.values(), ids=NAMESPACES)
def test_what_is_not_a_finite_maximum_is_never_a_factor(xp):
    """min(1, τ/S) followed by a root is NaN for negative maxima, and 0 for −inf."""
    s = xp.asarray(np.array([-math.inf, -5.0, 0.0, math.nan, math.inf, 200.0], dtype=np.float32))
    for factor in clip_factors(s, 100.0, xp=xp):
        factor = np.asarray(factor)
        assert factor[:3].tolist() == [1.0, 1.0, 1.0]
        assert np.isnan(factor[3:5]).all()
        assert 0 < factor[5] < 1


def test_infinite_tau_measures_and_never_clips():
    assert clip_factors(np.array([1e30, -1.0]), math.inf, xp=np).gamma.tolist() == [1.0, 1.0]


@pytest.mark.parametrize("tau", [0, -1.0, math.nan])
def test_tau_must_be_positive(tau):
    with pytest.raises(ValueError, match=r"tau=.* must be positive"):
        clip_factors(np.ones(2), tau, xp=np)


@pytest.mark.parametrize("alpha", [-0.1, 1.1, math.nan])
def test_alpha_must_lie_between_0_and_1(alpha):
    with pytest.raises(ValueError, match=r"alpha=.* must be in \[0, 1\]"):
        clip_factors(np.ones(2), 1.0, alpha, xp=np)

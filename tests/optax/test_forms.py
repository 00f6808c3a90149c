"""The form in which each shape is iterated: chosen as in PyTorch, the same on a mesh, shown by the plan."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from muonclip.core import MatrixLayout, orthogonalize
from muonclip.optax import plan, scale_by_muon
from muonclip.optax.newton_schulz import NewtonSchulz

FP32, FP64, BF16 = (jnp.dtype(name) for name in ("float32", "float64", "bfloat16"))


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def test_the_form_is_chosen_by_the_shape_and_the_polynomials():
    chosen = NewtonSchulz()
    for m, n in ((512, 1792), (2048, 7168), (256, 512), (64, 512)):
        assert chosen.form_of(m, n, FP32) == NewtonSchulz(dtype=BF16).form_of(m, n, FP32) == "gram"
        assert chosen.form_of(m, n, FP64) == NewtonSchulz(form="standard").form_of(m, n, FP32) == "standard"
        for others in ("cans", (2.0, -1.5, 0.5), [(2.0, -1.5, 0.5)] * 3):
            assert NewtonSchulz(others).form_of(m, n, FP32) == "standard"
    for m, n in ((1024, 1024), (1792, 2048), (64, 96), (16, 20)):
        assert chosen.form_of(m, n, FP32) == "standard"
        assert NewtonSchulz(form="gram").form_of(m, n, FP32) == ("standard" if m == n else "gram")


def test_accelerators_keep_the_standard_form_unless_told(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert NewtonSchulz().form_of(512, 1792, FP32) == "standard"
    assert NewtonSchulz(form="gram").form_of(512, 1792, FP32) == "gram"


@pytest.mark.parametrize("shape", [(64, 256), (256, 64), (3, 64, 256)])
def test_the_update_has_the_chosen_form(shape):
    """Which rounds otherwise than the standard one, and is as near to the polynomials in float64."""
    gradient = {"w": jnp.asarray(normal(0, *shape))}
    layout = {"w": MatrixLayout(batch_ndim=len(shape) - 2)}
    updates = {}
    for form in (None, "gram", "standard"):
        tx = scale_by_muon(beta=0.0, ns_form=form, weight_dimension_numbers=layout)
        updates[form] = np.asarray(tx.update(gradient, tx.init(gradient))[0]["w"], np.float64)
    np.testing.assert_array_equal(updates[None], updates["gram"])
    exact = orthogonalize(np.asarray(gradient["w"], np.float64), xp=np)
    errors = [np.linalg.norm(updates[form] - exact) / np.linalg.norm(exact) for form in ("gram", "standard")]
    assert errors[0] != errors[1]
    assert max(errors) <= 3e-4


def test_the_plan_prints_the_products():
    params = {"a": normal(0, 256, 64), "b": normal(1, 2, 64, 256), "c": normal(2, 64, 64), "bias": normal(3, 64)}
    layouts = {"a": MatrixLayout(), "b": MatrixLayout(1), "c": MatrixLayout(), "bias": None}
    text = str(plan(params, layouts))
    assert "3 × (64×256)  float32, Gram form" in text
    assert "1 × (64×64)   float32, standard form" in text
    assert "3 × (64×256)  bfloat16, standard form" in str(plan(params, layouts, ns_dtype=BF16, ns_form="standard"))
    with pytest.raises(ValueError, match="the Gram form is not accurate, or not tried, with ns_coefficients='cans'"):
        plan(params, layouts, ns_coefficients="cans", ns_form="gram")
    with pytest.raises(ValueError, match="ns_form='Gram'; use 'standard', 'gram', or None"):
        plan(params, layouts, ns_form="Gram")

"""scale_by_muon against NumPy with an SVD, against Optax's own, and block by block against the core."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from optax.contrib import MuonDimensionNumbers
from svd_oracle import muon_step, svd_polynomial

from muonclip.core import MatrixLayout, orthogonalize, resolve_coefficients, update_scale
from muonclip.optax import scale_by_muon
from muonclip.optax.newton_schulz import NewtonSchulz


def normal(seed, *shape, dtype=np.float64):
    return np.random.default_rng(seed).normal(size=shape).astype(dtype)


def eager(function):  # compiling every example would take minutes
    return function


def run(tx, gradients, jit=jax.jit):
    """The updates of a sequence of gradients."""
    state, update, done = tx.init(gradients[0]), jit(tx.update), []
    for gradient in gradients:
        updates, state = update(gradient, state)
        done.append(updates)
    return done


@settings(max_examples=40)
@given(
    shape=st.sampled_from([(5, 9), (9, 5), (6, 6), (1, 7)]),
    nesterov=st.booleans(),
    beta=st.floats(0, 0.99),
    coefficients=st.sampled_from(["jordan", "polar_express", "deepseek_v4", (3.4, -4.7, 2.0)]),
    adjust=st.sampled_from([None, "match_rms_adamw", "spectral_unclamped", ("match_rms_adamw", 0.18), 1.0, 0.3]),
    seed=st.integers(0, 10**6),
)
def test_trajectory_is_that_of_numpy_with_an_svd(shape, nesterov, beta, coefficients, adjust, seed):
    gradients = [normal(seed + i, *shape) for i in range(3)]
    tx = scale_by_muon(coefficients, beta=beta, nesterov=nesterov, adjust_lr_fn=adjust)
    momentum = np.zeros(shape)
    for gradient, update in zip(gradients, run(tx, [{"w": g} for g in gradients], jit=eager), strict=True):
        expected, momentum = muon_step(
            np.zeros(shape),
            momentum,
            gradient,
            lr=-1.0,
            weight_decay=0.0,
            mu=beta,
            nesterov=nesterov,
            coefficients=resolve_coefficients(coefficients),
            scale=update_scale(shape[1], shape[0], adjust),  # a kernel is [in, out]
        )
        np.testing.assert_allclose(update["w"], expected, atol=1e-9)


DIMENSIONS = [
    ((12, 20), MuonDimensionNumbers()),
    ((12, 20), MuonDimensionNumbers(1, 0)),
    ((12, 4, 5), MuonDimensionNumbers(0, (1, 2))),
    ((4, 5, 12), MuonDimensionNumbers((0, 1), 2)),
    ((12, 4, 5), MuonDimensionNumbers(0, 2)),  # heads are a batch axis in the middle
    ((3, 12, 20), MuonDimensionNumbers(-2, -1)),
    ((7, 2, 3, 5), MuonDimensionNumbers((3, 0), 1)),
]


@pytest.mark.parametrize(("shape", "numbers"), DIMENSIONS)
@pytest.mark.parametrize("nesterov", [True, False])
def test_dimension_numbers_and_bias_corrected_nesterov_are_optax_s(shape, numbers, nesterov):
    gradients = [{"w": normal(i, *shape)} for i in range(4)]
    ours = scale_by_muon(nesterov=nesterov and "bias_corrected", weight_dimension_numbers={"w": numbers})
    theirs = optax.contrib.scale_by_muon(nesterov=nesterov, eps=0.0, weight_dimension_numbers={"w": numbers})
    for one, other in zip(run(ours, gradients), run(theirs, gradients), strict=True):
        np.testing.assert_allclose(one["w"], other["w"], atol=1e-9)


def test_torch_s_nesterov_differs_from_optax_s_in_the_first_steps_only():
    gradients = [{"w": normal(i, 32, 48)} for i in range(80)]
    differences = [
        np.linalg.norm(one["w"] - other["w"]) / np.linalg.norm(one["w"])
        for one, other in zip(
            run(scale_by_muon(), gradients), run(scale_by_muon(nesterov="bias_corrected"), gradients), strict=True
        )
    ]
    assert differences[0] < 1e-9  # both terms point to the first gradient
    assert 0.02 < max(differences[1:4]) < 0.5
    assert differences[-1] < 0.1 * max(differences)


LAYOUTS = [
    ((24, 10), MatrixLayout(blocks=(12, 8, 4))),
    ((10, 24), MatrixLayout(transposed=True, blocks=(12, 8, 4), heads=(3, 1, 1))),
    ((10, 24), MatrixLayout(transposed=True, heads=(4,))),
    ((24, 10), MatrixLayout(blocks=(2, 2, 2), repeats=4, heads=(4, 2, 1))),
    ((3, 8, 10), MatrixLayout(batch_ndim=1, blocks=(4, 4))),
    ((2, 3, 10, 8), MatrixLayout(batch_ndim=2, transposed=True, blocks=(4, 4))),
    ((10, 4, 6), MatrixLayout(transposed=True, heads=(4,))),
]


@pytest.mark.parametrize(("shape", "layout"), LAYOUTS)
@pytest.mark.parametrize("adjust", [None, "match_rms_adamw"])
def test_every_block_of_a_layout_is_a_matrix_with_its_own_scale(shape, layout, adjust):
    gradient = normal(1, *shape)
    (update,) = run(scale_by_muon(adjust_lr_fn=adjust, weight_dimension_numbers={"w": layout}), [{"w": gradient}])
    blocks = [
        svd_polynomial(block, resolve_coefficients("jordan")) * update_scale(*block.shape[1:], adjust)
        for block in layout.split(gradient, xp=np)
    ]
    np.testing.assert_allclose(update["w"], layout.join(blocks, shape, xp=np), atol=1e-9)


def test_the_core_s_orthogonalize_is_what_runs():
    gradient = normal(3, 40, 24, dtype=np.float32)
    (update,) = run(scale_by_muon(nesterov=False, beta=0.0), [{"w": gradient}])
    np.testing.assert_allclose(update["w"], orthogonalize(gradient, xp=np), atol=2e-5)


def products(fn, *arguments):
    """How many matrix products a computation holds."""
    return str(jax.make_jaxpr(fn)(*arguments)).count("dot_general[")


def test_same_shapes_of_different_parameters_are_iterated_together():
    one = {"a": jnp.ones((16, 8))}
    many = {f"{i}": jnp.ones((16, 8) if i % 2 else (8, 16)) for i in range(20)} | {"e": jnp.ones((5, 8, 16))}
    numbers = {name: MuonDimensionNumbers(-2, -1) for name in many}
    single, several = scale_by_muon(), scale_by_muon(weight_dimension_numbers=numbers)
    assert products(single.update, one, single.init(one)) == 15
    assert products(several.update, many, several.init(many)) == 15


@settings(max_examples=30)
@given(counts=st.lists(st.integers(1, 7), min_size=1, max_size=5), size=st.integers(1, 9), seed=st.integers(0, 999))
def test_how_matrices_are_stacked_changes_nothing(counts, size, seed):
    batches = [jnp.asarray(normal(seed + i, count, *((4, 6), (6, 4))[i % 2])) for i, count in enumerate(counts)]
    divided = NewtonSchulz(stack_bytes=size * 4 * 6 * 8)(batches)
    for batch, polar in zip(batches, divided, strict=True):
        np.testing.assert_allclose(polar, svd_polynomial(batch, resolve_coefficients("jordan")), atol=1e-9)


def test_the_gram_form_and_narrow_products():
    gradient = {"w": jnp.asarray(normal(5, 32, 96, dtype=np.float32))}
    (exact,) = run(scale_by_muon(ns_form="standard"), [gradient])
    (gram,) = run(scale_by_muon(ns_form="gram"), [gradient])
    (narrow,) = run(scale_by_muon(ns_dtype=jnp.bfloat16), [gradient])
    assert products(scale_by_muon(ns_form="gram").update, gradient, scale_by_muon().init(gradient)) != 15
    assert 0 < np.abs(gram["w"] - exact["w"]).max() < 1e-4
    assert 1e-3 < np.linalg.norm(narrow["w"] - exact["w"]) / np.linalg.norm(exact["w"]) < 1e-1
    assert narrow["w"].dtype == jnp.float32


def test_momentum_has_its_own_dtype():
    gradients = [{"w": jnp.asarray(normal(i, 8, 12, dtype=np.float32))} for i in range(3)]
    tx = scale_by_muon(mu_dtype=jnp.bfloat16)
    state = tx.init(gradients[0])
    for gradient in gradients:
        updates, state = tx.update(gradient, state)
    assert state.mu["w"].dtype == jnp.bfloat16
    assert updates["w"].dtype == jnp.float32
    exact = np.zeros((8, 12))
    for gradient in gradients:
        exact = 0.95 * exact + 0.05 * np.asarray(gradient["w"])
    np.testing.assert_allclose(state.mu["w"].astype(jnp.float32), exact, rtol=2e-2, atol=1e-3)
    once = np.zeros((8, 12), jnp.bfloat16)  # rounded once per step
    for gradient in gradients:
        wide = once.astype(np.float32)
        once = (wide + np.float32(0.05) * (np.asarray(gradient["w"]) - wide)).astype(jnp.bfloat16)
    assert (np.asarray(state.mu["w"]) == once).mean() > 0.98


@pytest.mark.parametrize("size", [1e-30, 1e-20, 1e20, 1e34])
def test_gradients_of_any_size_give_full_size_updates(size):
    gradient = normal(7, 16, 24)
    (plain,) = run(scale_by_muon(), [{"w": gradient.astype(np.float32)}])
    (scaled,) = run(scale_by_muon(), [{"w": (gradient * size).astype(np.float32)}])
    np.testing.assert_allclose(scaled["w"], plain["w"], atol=1e-4)


def test_a_zero_gradient_gives_a_zero_update():
    (update,) = run(scale_by_muon(), [{"w": jnp.zeros((4, 6)), "v": jnp.ones((4, 6))}])
    assert not update["w"].any()
    assert np.isfinite(update["v"]).all()


def test_an_empty_array_stays_empty():
    gradient = {"w": jnp.zeros((0, 6)), "v": jnp.ones((2, 3)), "e": jnp.zeros((0, 3, 4))}
    numbers = dict.fromkeys(gradient, MuonDimensionNumbers(-2, -1))
    (update,) = run(scale_by_muon(weight_dimension_numbers=numbers), [gradient])
    assert [update[name].shape for name in ("w", "e")] == [(0, 6), (0, 3, 4)]


def test_complex_arrays_are_refused():
    with pytest.raises(ValueError, match="'w' is complex"):
        scale_by_muon().init({"w": jnp.ones((2, 3), jnp.complex64)})


def test_read_only_arrays_are_accepted_and_left_alone():
    gradient = normal(1, 6, 4)
    before = gradient.copy()
    gradient.flags.writeable = False
    tx = scale_by_muon()
    tx.update({"w": gradient}, tx.init({"w": gradient}))
    np.testing.assert_array_equal(gradient, before)


@pytest.mark.parametrize(
    ("arguments", "shape", "message"),
    [
        ({}, (4,), r"'w' has shape \(4,\); Muon needs a matrix"),
        ({}, (2, 3, 4), r"'w' has shape \(2, 3, 4\)"),
        ({"ns_coefficients": "jordn"}, (2, 3), "not a known polynomial"),
        ({"ns_coefficients": "cans", "ns_form": "gram"}, (2, 3), "Gram form is not accurate"),
        ({"beta": 1.0}, (2, 3), r"beta=1.0 must be in \[0, 1\)"),
        ({"nesterov": "torch"}, (2, 3), "nesterov='torch'; use True, False, or 'bias_corrected'"),
        ({"adjust_lr_fn": "rms"}, (2, 3), "adjust_lr_fn='rms'"),
        (
            {"weight_dimension_numbers": {"w": MuonDimensionNumbers(0, 0)}},
            (2, 3),
            "'w': .* does not name different axes",
        ),
        ({"weight_dimension_numbers": {"w": MuonDimensionNumbers(0, 5)}}, (2, 3), "'w': axis 5 .* does not exist"),
        (
            {"weight_dimension_numbers": {"w": MatrixLayout(heads=(4,))}},
            (6, 3),
            "'w': 4 heads do not divide the 6 rows",
        ),
        ({"weight_dimension_numbers": {"v": MuonDimensionNumbers()}}, (2, 3), "says nothing of 'w'"),
        ({"weight_dimension_numbers": {"w": 3}}, (2, 3), "has 3 for 'w'"),
    ],
)
def test_wrong_arguments_are_named(arguments, shape, message):
    with pytest.raises(ValueError, match=message):
        scale_by_muon(**arguments).init({"w": jnp.ones(shape)})

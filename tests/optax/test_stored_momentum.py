"""Momentum as int8 codes and with stochastic rounding in Optax: NumPy's trajectories, torch's codes, sharded arrays."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from stored_momentum import FORMS, StoredMatrix, numbered
from torch import nn
from variants import CASES, normal

from muonclip.optax import muonclip, plan, scale_by_muon
from muonclip.torch import MatrixLayout, Muon

STEPS = 8
UPDATES = {
    "muon": {"weight_decay": 0.1},
    "normuon": {"update": "normuon", "weight_decay": 0.1},
    "muown": {"update": "muown", "weight_decay": 0.1},
}
LONG = {"blocks": (5000, 3), "kernel": (3, 5000), "axes": (50, 3, 100)}  # columns along the axes of `COLUMNS`
COLUMNS = {"blocks": optax.contrib.MuonDimensionNumbers(0, 1), "kernel": optax.contrib.MuonDimensionNumbers(1, 0),
           "axes": optax.contrib.MuonDimensionNumbers((0, 2), 1)}  # fmt: skip


def arrays(seed, shapes=None, dtype=np.float64):
    shapes = shapes or {name: shape for name, (shape, *_) in CASES.items()}
    return {name: normal(seed + i, shape).astype(dtype) for i, (name, shape) in enumerate(shapes.items())}


def transformation(form, update="muon", **options):
    layouts = {name: layout for name, (_, layout, _) in CASES.items()}
    given = {"adjust_lr_fn": "original", "muon_weight_dimension_numbers": layouts, "qk_projections": None}
    return muonclip(0.05, mu_dtype=form, **{**given, **UPDATES[update], **options})


def trained(tx, params, steps, state=None, shapes=None):
    state, update = tx.init(params) if state is None else state, jax.jit(tx.update)
    for step in steps:
        dtype = next(iter(params.values())).dtype
        gradients = arrays(1000 * step + 500, shapes, dtype)
        gradients = jax.tree.map(lambda g, p: jax.device_put(g, p.sharding), gradients, params)
        updates, state = update(gradients, state, params)
        params = optax.apply_updates(params, updates)
    return params, state


def momentum_of(state):
    return state.inner_states["muon"].inner_state[0]


@pytest.mark.parametrize("update", UPDATES)
@pytest.mark.parametrize("form", FORMS)
def test_a_trajectory_is_numpy_s_on_every_logical_matrix(form, update):
    params, _ = trained(transformation(form, update), jax.tree.map(jnp.asarray, arrays(0)), range(STEPS))
    for i, (name, weight) in enumerate(arrays(0).items()):
        own = [
            StoredMatrix(view, form=form, name=name, rows=rows, columns=columns, lr=0.05, **UPDATES[update])
            for view, (rows, columns) in zip(CASES[name][2](weight), numbered(name), strict=True)
        ]
        for step in range(STEPS):
            gradient = normal(1000 * step + 500 + i, weight.shape)
            for matrix, each in zip(own, CASES[name][2](gradient), strict=True):
                matrix.step(each)
        np.testing.assert_allclose(params[name], weight, atol=1e-10, err_msg=name)


@pytest.mark.parametrize("form", FORMS)
def test_codes_and_sizes_are_those_of_torch_in_float32(form):
    """After the first step to the bit; later sums may be rounded otherwise, by one code at most, and rarely."""
    named = {name: nn.Parameter(torch.tensor(a)) for name, a in arrays(0, dtype=np.float32).items()}
    groups = [{"params": [(name, p)], "layout": CASES[name][1]} for name, p in named.items()]
    optimizer = Muon(groups, lr=0.05, weight_decay=0.1, momentum_dtype=form, ns_dtype=torch.float32)
    tx = transformation(form)
    params = jax.tree.map(jnp.asarray, arrays(0, dtype=np.float32))
    state, apart, count = None, 0, 0
    for step in range(STEPS):
        params, state = trained(tx, params, [step], state)
        for name, gradient in arrays(1000 * step + 500, dtype=np.float32).items():
            named[name].grad = torch.tensor(gradient)
        optimizer.step()
        held = momentum_of(state)
        for name, parameter in named.items():
            ours, theirs = np.asarray(held.mu[name]), optimizer.state[parameter]["momentum_buffer"]
            assert str(ours.dtype) == str(theirs.dtype).removeprefix("torch.")
            difference = np.abs(ours.astype(np.float32) - theirs.float().numpy())
            if form.startswith("int8"):
                sizes = np.asarray(held.others["momentum_buffer_absmax"][name])
                np.testing.assert_allclose(
                    sizes, optimizer.state[parameter]["momentum_buffer_absmax"], rtol=0 if step == 0 else 1e-5
                )
                assert difference.max() <= (0 if step == 0 else 1)
            else:
                assert (difference <= np.abs(theirs.float().numpy()) * (0 if step == 0 else 2**-7)).all()
            apart, count = apart + (difference > 0).sum(), count + difference.size
        for name, parameter in named.items():
            np.testing.assert_allclose(params[name], parameter.detach(), atol=1e-3)
    assert apart <= 0.01 * count


@pytest.mark.parametrize("form", FORMS)
def test_blocks_are_along_the_columns_wherever_these_are_and_as_torch_s(form):
    tx = scale_by_muon(mu_dtype=form, weight_dimension_numbers=COLUMNS)
    params = jax.tree.map(jnp.asarray, arrays(0, LONG, np.float32))
    _, state = jax.jit(tx.update)(params, tx.init(params), params)
    for name, gradient in params.items():
        columns = COLUMNS[name].reduction_axis
        moved = np.moveaxis(np.asarray(gradient), COLUMNS[name].output_axis, 0).reshape(3, -1)
        parameter = nn.Parameter(torch.tensor(moved))
        optimizer = Muon([(name, parameter)], momentum_dtype=form)
        parameter.grad = torch.tensor(moved)
        optimizer.step()
        expected = {key: value.float().numpy() for key, value in optimizer.state[parameter].items()}
        mu = np.moveaxis(np.asarray(state.mu[name], dtype=np.float32), COLUMNS[name].output_axis, 0).reshape(3, -1)
        np.testing.assert_array_equal(mu, expected["momentum_buffer"])
        if form != "bfloat16_stochastic":
            sizes = state.others["momentum_buffer_absmax"][name]
            assert sizes.shape[columns if isinstance(columns, int) else columns[0]] == 3
            sizes = np.moveaxis(np.asarray(sizes), COLUMNS[name].output_axis, 0).reshape(3, -1)
            np.testing.assert_array_equal(sizes, expected["momentum_buffer_absmax"])


SHARDED = {  # over "x", of two devices
    "tall": P("x"), "wide": P(None, "x"), "kernel": P("x"), "experts": P(None, "x"), "fused experts": P("x"),
    "fused": P("x"), "by head": P(None, "x"), "fused by head": P(None, "x"),
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_sharded_equals_whole(form):
    mesh = jax.make_mesh((2,), ("x",), axis_types=(AxisType.Explicit,))
    placed = {name: jax.device_put(a, NamedSharding(mesh, SHARDED[name])) for name, a in arrays(0).items()}
    with jax.set_mesh(mesh):
        params, state = trained(transformation(form), placed, range(3))
    expected, whole = trained(transformation(form), jax.tree.map(jnp.asarray, arrays(0)), range(3))
    for name in CASES:
        np.testing.assert_allclose(params[name], expected[name], atol=1e-10, err_msg=name)
        assert momentum_of(state).mu[name].sharding.is_equivalent_to(placed[name].sharding, placed[name].ndim)
    for own, other in zip(jax.tree.leaves(momentum_of(state)), jax.tree.leaves(momentum_of(whole)), strict=True):
        assert own.dtype == other.dtype
        np.testing.assert_array_equal(np.asarray(own), np.asarray(other))


@pytest.mark.parametrize("form", FORMS)
def test_blocks_may_be_cut_over_devices(form):
    mesh = jax.make_mesh((2,), ("x",), axis_types=(AxisType.Explicit,))
    tx = scale_by_muon(mu_dtype=form, weight_dimension_numbers=COLUMNS)
    places = {"blocks": P("x"), "kernel": P(None, "x"), "axes": P("x")}
    whole = jax.tree.map(jnp.asarray, arrays(0, LONG))
    with jax.set_mesh(mesh):
        placed = {name: jax.device_put(a, NamedSharding(mesh, places[name])) for name, a in whole.items()}
        _, state = jax.jit(tx.update)(placed, tx.init(placed), placed)
    _, expected = jax.jit(tx.update)(whole, tx.init(whole), whole)
    for own, other in zip(jax.tree.leaves(state), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(np.asarray(own), np.asarray(other))


def test_the_second_step_compiles_nothing_and_a_state_keeps_its_form():
    tx, params = transformation("int8_stochastic"), jax.tree.map(jnp.asarray, arrays(0))
    update = jax.jit(tx.update)
    _, state = update(params, tx.init(params), params)
    before = jax.tree.map(lambda x: (x.shape, x.dtype), state)
    _, state = update(params, state, params)
    assert update._cache_size() == 1
    assert jax.tree.map(lambda x: (x.shape, x.dtype), state) == before


@pytest.mark.parametrize(("made", "used"), [("int8", None), (None, "int8"), ("bfloat16", "int8_stochastic")])
def test_a_state_of_another_form_is_refused(made, used):
    params = jax.tree.map(jnp.asarray, arrays(0))
    state = transformation(made).init(params)
    with pytest.raises(ValueError, match="and mu_dtype says otherwise"):
        transformation(used).update(params, state, params)


def test_the_adamw_half_keeps_its_own_dtype():
    params = {"w": jnp.ones((8, 4), jnp.float32), "bias": jnp.ones(4, jnp.float32)}
    for form, kept in (("int8", jnp.float32), (jnp.int8, jnp.float32), ("bfloat16", jnp.bfloat16)):
        tx = muonclip(1e-3, qk_projections=None, mu_dtype=form)
        dtypes = {leaf.dtype for leaf in jax.tree.leaves(tx.init(params).inner_states["adamw"]) if leaf.ndim}
        assert jnp.dtype(kept) in dtypes
        assert jnp.dtype(jnp.int8) not in dtypes
        assert momentum_of(tx.init(params)).mu["w"].dtype == jnp.dtype(form)


@pytest.mark.parametrize("form", ["int4", "float32_stochastic", jnp.int16])
def test_other_forms_are_refused(form):
    for make in (scale_by_muon, lambda **given: muonclip(1e-3, qk_projections=None, **given)):
        with pytest.raises(ValueError, match="mu_dtype="):
            make(mu_dtype=form)


def test_the_plan_says_the_bytes_of_each_state_and_of_all():
    params = {"mlp": {"kernel": jnp.ones((8, 16), jnp.float32)}}
    text = str(plan(params, mu_dtype="int8"))
    assert "update muon: state momentum_buffer 128 B, momentum_buffer_absmax 64 B" in text
    assert "state of the Muon half: 192 B" in text
    assert "state of the Muon half" not in str(plan(params))


def test_layouts_of_the_core_and_axes_of_optax_store_the_same():
    array = jnp.asarray(normal(0, (8, 6)))
    found = []
    for numbers in (MatrixLayout(transposed=True), optax.contrib.MuonDimensionNumbers(0, 1)):
        tx = scale_by_muon(mu_dtype="int8_stochastic", weight_dimension_numbers={"w": numbers})
        _, state = tx.update({"w": array}, tx.init({"w": array}), {"w": array})
        found.append(state)
    assert all(map(np.array_equal, jax.tree.leaves(found[0]), jax.tree.leaves(found[1])))

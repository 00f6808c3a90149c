"""A variant with a state for each row, as the docs add it, against NumPy, and sharded over devices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from optax.contrib import MuonDimensionNumbers
from row_state import NorMuonRule, normuon_step

from muonclip.core import MatrixLayout, update_scale
from muonclip.optax.newton_schulz import NewtonSchulz
from muonclip.optax.update_rule import scale_by_rule

EXPERTS = MatrixLayout(batch_ndim=1)
CASES = {  # shape, layout, its matrices [rows, columns] as views, and how it is sharded over "x"
    "kernel": ((8, 12), MatrixLayout(transposed=True), lambda a: [a.T], P(None, "x")),
    "kernel_inputs": ((8, 12), MatrixLayout(transposed=True), lambda a: [a.T], P("x")),
    "heads": ((6, 4, 3), MuonDimensionNumbers(0, (1, 2)), lambda a: [a.reshape(len(a), -1).T], P(None, "x")),
    "experts": ((4, 5, 6), EXPERTS, list, P("x")),
    "fused": ((16, 6), MatrixLayout(blocks=(8, 4, 4)), lambda a: [a[:8], a[8:12], a[12:]], P("x")),
    "by_head": ((12, 8), MatrixLayout(heads=(3,)), lambda a: [a[:4], a[4:8], a[8:]], P(None, "x")),
}


def normal(seed, shape):
    return np.random.default_rng(seed).normal(size=shape)


def gradients(step):
    return {name: normal(100 * step + i, shape) for i, (name, (shape, *_)) in enumerate(CASES.items())}


def transformation(**options):
    numbers = {name: layout for name, (_, layout, *_) in CASES.items()}
    return scale_by_rule(
        NorMuonRule(), NewtonSchulz(), adjust_lr_fn="original", weight_dimension_numbers=numbers, **options
    )


def numpy_s(steps):
    """The updates of the last of these steps."""
    momenta, squares = {}, {}
    for step in range(steps):
        updates = {}
        for name, gradient in gradients(step).items():
            updates[name] = np.empty_like(gradient)
            matrices = CASES[name][2]
            for number, (own, out) in enumerate(zip(matrices(gradient), matrices(updates[name]), strict=True)):
                momentum = momenta.get((name, number), np.zeros_like(own))
                square = squares.get((name, number), np.zeros((len(own), 1)))
                new, momenta[name, number], squares[name, number] = normuon_step(
                    np.zeros_like(own), momentum, square, own, lr=-1.0, weight_decay=0.0,
                    scale=update_scale(*own.shape, "original"),
                )  # fmt: skip
                if name == "heads":  # whose matrix is a copy
                    updates[name] = new.T.reshape(gradient.shape)
                else:
                    out[...] = new
    return updates


def test_every_step_is_numpy_s_and_keeps_one_number_for_each_row():
    tx = transformation()
    state = tx.init(jax.tree.map(jnp.asarray, gradients(0)))
    for step in range(3):
        updates, state = jax.jit(tx.update)(jax.tree.map(jnp.asarray, gradients(step)), state)
        for name, expected in numpy_s(step + 1).items():
            np.testing.assert_allclose(updates[name], expected, atol=1e-10, err_msg=name)
    shapes = {name: array.shape for name, array in state.others["row_squares"].items()}
    assert shapes == {
        "kernel": (1, 12), "kernel_inputs": (1, 12), "heads": (1, 4, 3), "experts": (4, 5, 1), "fused": (16, 1),
        "by_head": (12, 1),
    }  # fmt: skip


def test_the_state_keeps_its_dtype_and_compiles_once():
    arrays = {"w": jnp.asarray(normal(0, (6, 8)), jnp.bfloat16)}
    tx = scale_by_rule(NorMuonRule(), NewtonSchulz())
    state, update = tx.init(arrays), jax.jit(tx.update)
    for _ in range(2):
        _, new = update(arrays, state)
        assert jax.tree.map(lambda a: (a.shape, a.dtype), new) == jax.tree.map(lambda a: (a.shape, a.dtype), state)
        state = new
    assert state.others["row_squares"]["w"].dtype == jnp.float32
    assert update._cache_size() == 1


@pytest.mark.parametrize("devices", [2, 4])
@pytest.mark.parametrize("mode", [AxisType.Auto, AxisType.Explicit])
def test_sharded_equals_whole(mode, devices):
    mesh = jax.make_mesh((devices,), ("x",), axis_types=(mode,))
    placed = [
        {name: jax.device_put(array, NamedSharding(mesh, CASES[name][3])) for name, array in gradients(step).items()}
        for step in range(2)
    ]
    told = {"shardings": jax.tree.map(lambda a: a.sharding, placed[0])} if mode is AxisType.Auto else {}
    tx = transformation(**told)
    state = tx.init(placed[0])
    for name, squares in state.others["row_squares"].items():
        spec = (*CASES[name][3], None, None)[: squares.ndim]
        shards = [devices if axes and size > 1 else 1 for axes, size in zip(spec, squares.shape, strict=True)]
        assert squares.sharding.shard_shape(squares.shape) == tuple(
            size // ways for size, ways in zip(squares.shape, shards, strict=True)
        )
    with jax.set_mesh(mesh):
        for step in placed:
            updates, state = jax.jit(tx.update)(step, state)
    for name, expected in numpy_s(2).items():
        np.testing.assert_allclose(updates[name], expected, atol=1e-10, err_msg=name)

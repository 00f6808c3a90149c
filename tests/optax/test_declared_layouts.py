"""Heads that are declared by pattern, in Optax: NumPy's trajectory head by head, sharded too, and what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from linear_attention import KEY, KEY_HEADS, LAYOUTS, SHARE, VALUE, VALUE_HEADS, WIDTH, rows_of_heads
from optax.contrib import MuonDimensionNumbers
from variants import VARIANTS, Matrix, normal

from muonclip.core import MatrixLayout
from muonclip.optax import muonclip, plan

FUSED = MatrixLayout(**{f: getattr(LAYOUTS["*.qkv"], f) for f in ("blocks", "heads", "repeats")}, transposed=True)
GIVEN = {"*/q": KEY_HEADS, "*/k": KEY_HEADS, "*/v": VALUE_HEADS, "*/qkv": FUSED}
WIDTHS = {
    "q": KEY_HEADS * KEY, "k": KEY_HEADS * KEY, "v": VALUE_HEADS * VALUE, "qkv": KEY_HEADS * (2 * KEY + SHARE)
}  # fmt: skip


def kernels(seed):
    """[in, out], as Flax keeps them."""
    layer = {name: {"kernel": normal(seed + i, (WIDTH, width))} for i, (name, width) in enumerate(WIDTHS.items())}
    return {"delta": {**layer, "o": {"kernel": normal(seed + 9, (20, WIDTH))}}}


def trained(tx, params, steps):
    state, update = tx.init(params), jax.jit(tx.update)
    for step in range(steps):
        gradients = jax.tree.map(lambda g, p: jax.device_put(g, p.sharding), kernels(100 * step + 50), params)
        updates, state = update(gradients, state, params)
        params = optax.apply_updates(params, updates)
    return params


@pytest.mark.parametrize("variant", [{"weight_decay": 0.1}, VARIANTS["normuon"], VARIANTS["hyperball"]])
@pytest.mark.parametrize("sharded", [False, True])
def test_a_trajectory_is_numpy_s_head_by_head(sharded, variant):
    params = jax.tree.map(jnp.asarray, kernels(0))
    shardings = None
    if sharded:
        mesh = jax.make_mesh((2,), ("x",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2])
        shardings = jax.tree.map(lambda _: NamedSharding(mesh, P(None, "x")), params)
        params = jax.device_put(params, shardings)
    tx = muonclip(0.05, qk_projections=None, layouts=GIVEN, adjust_lr_fn="original", shardings=shardings, **variant)
    found = trained(tx, params, 12)
    for name in WIDTHS:
        for rows in rows_of_heads(name):
            matrix = Matrix(kernels(0)["delta"][name]["kernel"].T[rows], lr=0.05, **variant)
            for step in range(12):
                matrix.step(kernels(100 * step + 50)["delta"][name]["kernel"].T[rows])
            now = np.asarray(found["delta"][name]["kernel"]).T[rows]
            np.testing.assert_allclose(now, matrix.weight, atol=1e-9, err_msg=name)


def test_the_plan_prints_the_heads_and_what_is_not_named_stays():
    lines = {line.name: line for line in plan(kernels(0), layouts=GIVEN).parameters}
    assert {line.reason for name, line in lines.items() if "/o/" not in name} == {"as layouts= says"}
    assert lines["delta/o/kernel"].reason == "hidden matrix"
    assert "4 × (5×12)" in str(plan(kernels(0), layouts=GIVEN))


def test_a_number_divides_what_dimension_numbers_declare():
    params = {"q": jnp.ones((12, 4, 3)), "k": jnp.ones((4, 3, 12)), "v": jnp.ones((4, 12, 3))}
    numbers = {
        "q": MuonDimensionNumbers(0, (1, 2)),
        "k": MuonDimensionNumbers(2, (0, 1)),
        "v": MuonDimensionNumbers(1, (0, 2)),
    }
    lines = {line.name: line for line in plan(params, numbers, layouts={"q": 4, "k": 2}).parameters}
    assert lines["q"].layout == MatrixLayout(transposed=True, heads=(4,))
    assert lines["k"].layout == MatrixLayout(heads=(2,), out_ndim=2)
    with pytest.raises(ValueError, match=r"'v' of shape \(4, 12, 3\) has rows along several axes: say .* MatrixLayout"):
        plan(params, numbers, layouts={"v": 4})


def test_a_recipe_by_head_takes_them():
    muonclip(1e-2, qk_projections=None, recipe="glm5", layouts=GIVEN).init(kernels(0))
    with pytest.raises(ValueError, match=r"takes heads as matrices of their own .* layouts= with a pattern"):
        muonclip(1e-2, qk_projections=None, recipe="glm5")


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match=r"layouts\['\*/q'\]: 'delta/q/kernel' .*4 heads do not divide the 6 rows"):
        plan(kernels(0), layouts={"*/q": 4})
    with pytest.raises(ValueError, match=r"names 'gamma/q', which fits no matrix"):
        muonclip(1e-2, qk_projections=None, layouts={"gamma/q": 2}).init(kernels(0))
    with pytest.raises(ValueError, match=r"layouts\['\*/q'\]=0"):
        muonclip(1e-2, qk_projections=None, layouts={"*/q": 0})

"""The variants of Muon in Optax: NumPy's trajectories, as in torch's tests, with the clip, and sharded over devices."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from variants import CASES, VARIANTS, Matrix, normal

from muonclip.core import MatrixLayout
from muonclip.optax import QKProjection, accumulate, muonclip, plan, scale_by_muon

STEPS = 24
SHARDED = {  # over "x", of two devices
    "tall": P("x"), "wide": P(None, "x"), "kernel": P("x"), "experts": P(None, "x"), "fused experts": P("x"),
    "fused": P("x"), "by head": P(None, "x"), "fused by head": P(None, "x"),
}  # fmt: skip


def arrays(seed):
    return {name: normal(seed + i, shape) for i, (name, (shape, *_)) in enumerate(CASES.items())}


def transformation(variant, **options):
    layouts = {name: layout for name, (_, layout, _) in CASES.items()}
    given = {"adjust_lr_fn": "original", "muon_weight_dimension_numbers": layouts, "qk_projections": None}
    return muonclip(**{"learning_rate": 0.05, **given, **VARIANTS[variant], **options})


def trained(tx, params, steps, state=None):
    state = tx.init(params) if state is None else state
    update = jax.jit(tx.update)
    for step in steps:
        gradients = jax.tree.map(lambda g, p: jax.device_put(g, p.sharding), arrays(1000 * step + 500), params)
        updates, state = update(gradients, state, params)
        params = optax.apply_updates(params, updates)
    return params, state


def numpy_s(variant, steps):
    weights = arrays(0)
    for name, weight in weights.items():
        own = [Matrix(view, lr=0.05, **VARIANTS[variant]) for view in CASES[name][2](weight)]
        for step in steps:
            for matrix, gradient in zip(own, CASES[name][2](arrays(1000 * step + 500)[name]), strict=True):
                matrix.step(gradient)
    return weights


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_trajectory_is_numpy_s_on_every_logical_matrix(variant):
    params, _ = trained(transformation(variant), jax.tree.map(jnp.asarray, arrays(0)), range(STEPS))
    for name, expected in numpy_s(variant, range(STEPS)).items():
        np.testing.assert_allclose(params[name], expected, atol=1e-10, err_msg=name)


@pytest.mark.parametrize("variant", VARIANTS)
def test_sharded_equals_whole(variant):
    mesh = jax.make_mesh((2,), ("x",), axis_types=(AxisType.Explicit,))
    placed = {name: jax.device_put(a, NamedSharding(mesh, SHARDED[name])) for name, a in arrays(0).items()}
    with jax.set_mesh(mesh):
        params, _ = trained(transformation(variant), placed, range(3))
    for name, expected in numpy_s(variant, range(3)).items():
        np.testing.assert_allclose(params[name], expected, atol=1e-10, err_msg=name)
        assert params[name].sharding.is_equivalent_to(placed[name].sharding, expected.ndim)


HEADS, WIDTH, INTO = 3, 4, 7
PROJECTION = {"attn": QKProjection.mha(q="q/kernel", k="k/kernel", num_heads=HEADS, in_axis=0)}


@pytest.mark.parametrize("heads", [1, HEADS])
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_next_step_goes_on_from_what_the_clip_has_scaled(variant, heads):
    """Also through accumulation; `heads`: into how many matrices a projection is divided."""
    layout = MatrixLayout(transposed=True, heads=(heads,))
    numbers = {name: {"kernel": layout} for name in "qk"}
    tx = transformation(variant, qk_projections=PROJECTION, tau=30.0, muon_weight_dimension_numbers=numbers)
    tx = accumulate(tx, 1)
    params = {name: {"kernel": jnp.asarray(normal(i, (INTO, HEADS * WIDTH)))} for i, name in enumerate("qk")}
    ours = {name: np.array(params[name]["kernel"]).T.copy() for name in params}
    size = HEADS * WIDTH // heads
    matrices = {
        name: [Matrix(a[i * size : (i + 1) * size], lr=0.05, **VARIANTS[variant]) for i in range(heads)]
        for name, a in ours.items()
    }
    state, update = tx.init(params), jax.jit(tx.update)
    for step in range(20):
        gradients = {
            name: {"kernel": normal(100 * step + 50 + i, (INTO, HEADS * WIDTH))} for i, name in enumerate("qk")
        }
        maxima = np.random.default_rng(step).uniform(10, 60, HEADS)
        updates, state = update(gradients, state, params, max_logits={"attn": jnp.asarray(maxima)})
        params = optax.apply_updates(params, updates)
        factors = np.repeat(np.sqrt(np.minimum(1, 30 / maxima)), WIDTH).reshape(heads, size)
        for name, own in matrices.items():
            for matrix, gradient, factor in zip(
                own, gradients[name]["kernel"].T.reshape(heads, size, INTO), factors, strict=True
            ):
                matrix.step(gradient)
                matrix.clip(factor)
            np.testing.assert_allclose(params[name]["kernel"].T, ours[name], rtol=1e-5, atol=1e-6)


def test_rates_and_decays_may_be_schedules():
    def rate(count):
        return 0.1 / (1 + count)

    for variant, options in (("hyperball", {}), ("cautious", {"weight_decay": lambda count: 0.3 * count})):
        params, _ = trained(transformation(variant, learning_rate=rate, **options), arrays_of_jax(), range(3))
        expected = arrays(0)
        for name, weight in expected.items():
            own = [Matrix(view, lr=0.0, **VARIANTS[variant]) for view in CASES[name][2](weight)]
            for step in range(3):
                for matrix, gradient in zip(own, CASES[name][2](arrays(1000 * step + 500)[name]), strict=True):
                    matrix.lr = rate(step)
                    matrix.decay = 0.3 * step
                    matrix.step(gradient)
            np.testing.assert_allclose(params[name], weight, atol=1e-7, err_msg=name)


def test_decays_that_do_not_follow_the_rate_or_come_with_the_gradient_and_ascent():
    """Independent and coupled decay and `maximize`, as the page has them."""

    def rate(count):
        return 0.05 / (1 + count)

    def chained(first, weight_decay):
        tx = transformation("cautious", learning_rate=rate, weight_decay=weight_decay, cautious_decay=False)
        return optax.chain(first, tx)

    cases = {
        "independent": (optax.identity(), lambda count: 0.01 / rate(count)),
        "coupled": (optax.add_decayed_weights(0.3), 0.0),
        "ascent": (optax.scale(-1.0), 0.0),
    }
    for case, (first, weight_decay) in cases.items():
        params, _ = trained(chained(first, weight_decay), arrays_of_jax(), range(6))
        expected = arrays(0)
        for name, weight in expected.items():
            own = [Matrix(view, lr=0.0, weight_decay=0.0) for view in CASES[name][2](weight)]
            for step in range(6):
                gradient = arrays(1000 * step + 500)[name] * (-1 if case == "ascent" else 1)
                gradient = gradient + (0.3 * weight if case == "coupled" else 0)
                share = 0.01 * weight if case == "independent" else 0
                for matrix, part in zip(own, CASES[name][2](gradient), strict=True):
                    matrix.lr = rate(step)
                    matrix.step(part)
                weight -= share
            np.testing.assert_allclose(params[name], weight, atol=1e-7, err_msg=f"{case} {name}")


def arrays_of_jax():
    return jax.tree.map(jnp.asarray, arrays(0))


def test_narrow_weights_keep_their_dtype_and_zeros_stay():
    params = {"w": jnp.asarray(normal(0, (6, 8)), jnp.bfloat16), "zeros": jnp.zeros((6, 8), jnp.bfloat16)}
    tx = muonclip(
        0.1, 0.0, qk_projections=None, update="hyperball", muon_weight_dimension_numbers=MatrixLayout(transposed=True)
    )
    gradients = {name: jnp.asarray(normal(1, (6, 8)), jnp.bfloat16) for name in params}
    updates, _ = tx.update(gradients, tx.init(params), params)
    moved = optax.apply_updates(params, updates)
    assert moved["w"].dtype == updates["w"].dtype == jnp.bfloat16
    lengths = [float(jnp.linalg.norm(each["w"].astype(jnp.float32))) for each in (params, moved)]
    assert lengths[1] == pytest.approx(lengths[0], rel=1e-2)
    assert (moved["w"] != params["w"]).any()
    assert not moved["zeros"].any()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"update": "nor-muon"}, "update='nor-muon'; use 'muon', 'normuon'"),
        ({"update": "muown", "cautious_decay": True}, "cautious_decay=True with update='muown'"),
        ({"update": "hyperball"}, r"weight_decay=0\.1 with update='hyperball', which holds the norm"),
        ({"update": "hyperball", "weight_decay": lambda count: 0.0 * count}, "weight_decay=.*which holds the norm"),
        ({"update": "hyperball", "weight_decay": 0, "cautious_decay": True}, "cautious_decay=True with update="),
        ({"update": "muown", "weight_decay_mask": True}, "weight_decay_mask with update='muown'"),
        ({"update": "hyperball", "weight_decay": 0, "learning_rate": None}, "needs learning_rate"),
    ],
)
def test_what_does_not_exist_or_makes_no_sense_is_refused(options, said):
    with pytest.raises(ValueError, match=said):
        muonclip(**{"learning_rate": 1e-3, "qk_projections": None, **options})


def test_what_moves_weights_needs_them_and_is_not_scaled_by_others():
    tx = muonclip(1e-3, 0.0, qk_projections=None, update="hyperball")
    params = {"kernel": jnp.ones((3, 4))}
    with pytest.raises(ValueError, match="call update"):
        tx.update(params, tx.init(params))
    with pytest.raises(ValueError, match="update='hyperball'; use 'muon' or 'normuon'; muonclip has all"):
        scale_by_muon(update="hyperball")


def test_the_plan_names_the_variant_and_the_bytes_of_its_state():
    params = arrays_of_jax()
    layouts = {name: layout for name, (_, layout, _) in CASES.items()}
    tx = scale_by_muon(update="normuon", mu_dtype=jnp.bfloat16, weight_dimension_numbers=layouts)
    state = tx.init(params)
    made = plan(params, layouts, update="normuon", mu_dtype=jnp.bfloat16)
    sizes = {"momentum_buffer": state.mu, "row_squares": state.others["row_squares"]}
    assert made.state_bytes == {
        "normuon": {name: sum(a.nbytes for a in jax.tree.leaves(tree)) for name, tree in sizes.items()}
    }
    assert "update normuon: state momentum_buffer 1.098 KiB, row_squares" in str(made)
    assert "state momentum_buffer" not in str(plan(params, layouts))

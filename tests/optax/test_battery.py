"""What every transformation here has to do, in the spirit of Optax's own tests."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from muonclip.core import MatrixLayout
from muonclip.optax import QKProjection, accumulate, muonclip, qk_clip, scale_by_muon

ATTENTION = {"attn": QKProjection.gqa(q="q/kernel", k="k", num_heads=3, num_kv_heads=1, in_axis=0)}
MAXIMA = {"attn": jnp.asarray([1.0, 300.0, 50.0], jnp.float32)}
LAYOUTS = {
    "q": {"kernel": MatrixLayout(transposed=True), "bias": None},
    "k": MatrixLayout(),
    "e": MatrixLayout(batch_ndim=1),
}


def parameters(dtype=jnp.float32):
    key = iter(jax.random.split(jax.random.key(0), 9))
    shapes = {"q": {"kernel": (8, 6), "bias": (6,)}, "k": (8, 2), "e": (2, 4, 6)}
    return jax.tree.map(
        lambda shape: jax.random.normal(next(key), shape, dtype), shapes, is_leaf=lambda x: isinstance(x, tuple)
    )


def clipped(rate=0.1, **options):
    return muonclip(rate, qk_projections=ATTENTION, muon_weight_dimension_numbers=LAYOUTS, **options)


TRANSFORMS = {
    "scale_by_muon": lambda: optax.masked(
        scale_by_muon(weight_dimension_numbers=LAYOUTS), lambda p: jax.tree.map(lambda x: x.ndim > 1, p)
    ),
    "qk_clip": lambda: qk_clip(ATTENTION),
    "muonclip": clipped,
    "muonclip, schedule": lambda: clipped(optax.cosine_decay_schedule(0.1, 10)),
    "muonclip, Algorithm 1": lambda: clipped(nesterov=False),
    "muonclip, as Optax": lambda: clipped(nesterov="bias_corrected", adjust_lr_fn="original"),
    "muonclip, narrow momentum": lambda: clipped(mu_dtype=jnp.bfloat16),
    "muonclip, Gram form": lambda: clipped(ns_form="gram"),
    "muonclip without a clip": lambda: muonclip(0.1, qk_projections=None, muon_weight_dimension_numbers=LAYOUTS),
    "accumulate": lambda: accumulate(clipped(), 2),
}
every_transform = pytest.mark.parametrize("name", TRANSFORMS)


def step(tx, **extra):
    def update(gradients, state, params):
        return tx.update(gradients, state, params, max_logits=MAXIMA, **extra)

    return update


def avals(tree):
    return jax.tree.map(lambda x: (x.shape, x.dtype, jax.typeof(x).weak_type), tree)


def close(one, other, **tolerance):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **tolerance), one, other)


@every_transform
def test_unknown_extra_arguments_are_accepted(name):
    tx, params = TRANSFORMS[name](), parameters()
    jax.jit(step(tx, value=1.0, unheard_of=jnp.ones(3)))(params, tx.init(params), params)


@every_transform
def test_the_second_step_compiles_nothing_and_the_state_keeps_its_form(name):
    tx, params = TRANSFORMS[name](), parameters()
    update, state = jax.jit(step(tx)), tx.init(params)
    form = avals(state)
    assert avals(jax.eval_shape(tx.init, params)) == form
    for _ in range(3):
        updates, state = update(params, state, params)
        params = optax.apply_updates(params, updates)
        assert avals(state) == form
    assert update._cache_size() == 1


@pytest.mark.slow
@every_transform
def test_jit_changes_nothing(name):
    tx, params = TRANSFORMS[name](), parameters()
    state = tx.init(params)
    close(step(tx)(params, state, params), jax.jit(step(tx))(params, state, params), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@every_transform
def test_vmap_runs_problems_side_by_side(name):
    tx = TRANSFORMS[name]()
    one, other = parameters(), jax.tree.map(lambda x: jnp.roll(x, 1, -1), parameters())
    both = jax.tree.map(lambda *xs: jnp.stack(xs), one, other)
    together = jax.jit(jax.vmap(step(tx)))(both, jax.vmap(tx.init)(both), both)
    for index, params in enumerate((one, other)):
        alone = jax.jit(step(tx))(params, tx.init(params), params)
        close(jax.tree.map(lambda x, index=index: x[index], together), alone, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@every_transform
def test_it_scans(name):
    tx, params = TRANSFORMS[name](), parameters()

    def body(carry, _):
        params, state = carry
        updates, state = step(tx)(params, state, params)
        return (optax.apply_updates(params, updates), state), None

    (scanned, _), _ = jax.jit(lambda carry: jax.lax.scan(body, carry, length=4))((params, tx.init(params)))
    looped, state, update = params, tx.init(params), jax.jit(step(tx))
    for _ in range(4):
        updates, state = update(looped, state, looped)
        looped = optax.apply_updates(looped, updates)
    close(scanned, looped, rtol=1e-4, atol=1e-5)


@every_transform
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32, jnp.float64])
def test_updates_have_the_dtype_of_the_parameters(name, dtype):
    if name == "muonclip, narrow momentum" and dtype == jnp.float16:
        return  # Optax's AdamW widens where neither dtype holds the other
    tx, params = TRANSFORMS[name](), parameters(dtype)
    updates, state = jax.eval_shape(step(tx), params, jax.eval_shape(tx.init, params), params)
    assert avals(state) == avals(jax.eval_shape(tx.init, params))
    assert {x.dtype for x in jax.tree.leaves(updates)} == {jnp.dtype(dtype)}


@every_transform
def test_the_structure_of_the_state_can_be_asked_for(name):
    """`optax.tree.map_params` inits with a placeholder, then visits what is shaped like parameters."""
    tx, params = TRANSFORMS[name](), parameters()
    state = tx.init(params)
    doubled = optax.tree.map_params(tx, lambda x: x + 1, state)
    assert jax.tree.structure(doubled) == jax.tree.structure(state)
    moved = [jax.tree_util.keystr(path) for path, x in jax.tree_util.tree_flatten_with_path(
        jax.tree.map(lambda a, b: bool((a != b).all()), doubled, state))[0] if x]  # fmt: skip
    assert all(any(part in name for part in (".mu", ".nu", ".gradients")) for name in moved)
    assert bool(moved) == (name != "qk_clip")


PROBLEMS = {
    "parabola": lambda w, goal: jnp.sum((w - goal) ** 2),
    "ill-conditioned": lambda w, goal: jnp.sum(jnp.geomspace(1e-2, 1, w.shape[0])[:, None] * (w - goal) ** 2),
    "regression": lambda w, goal: jnp.mean(
        ((w - goal).T @ jax.random.normal(jax.random.key(1), (w.shape[0], 64))) ** 2
    ),
}


@pytest.mark.parametrize("problem", PROBLEMS)
@pytest.mark.parametrize("nesterov", [True, False, "bias_corrected"])
def test_it_converges(problem, nesterov):
    goal = jax.random.normal(jax.random.key(2), (6, 10))
    params = {"w": jnp.zeros((6, 10)), "b": jnp.zeros(10)}
    rate = optax.cosine_decay_schedule(0.2, 400)
    tx = muonclip(rate, weight_decay=0.0, nesterov=nesterov, qk_projections=None)

    def loss(params):
        return PROBLEMS[problem](params["w"], goal) + jnp.sum((params["b"] - goal[0]) ** 2)

    def body(carry, _):
        params, state = carry
        updates, state = tx.update(jax.grad(loss)(params), state, params)
        return (optax.apply_updates(params, updates), state), None

    (after, _), _ = jax.jit(lambda carry: jax.lax.scan(body, carry, length=400))((params, tx.init(params)))
    assert loss(after) < 1e-3 * loss(params)

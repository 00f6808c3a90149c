"""What becomes of the clip under wrappers that copy, average or delay weights, as docs/optax.md says of each.

One attention, whose head 0 begins at 30 τ and head 1 at τ / 2. The rate is 0, so that nothing but the clip and the
wrapper moves the weights; the maxima of every step are those of its weights.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, PartitionSpec
from tiny_jax import dense_max_logits

from muonclip.optax import QKProjection, accumulate, exact_max_logits, qk_clip

TAU, WIDTH, HEADS, HEAD = 1.0, 10, 2, 4
X = np.random.default_rng(0).normal(size=(1, 6, WIDTH)).astype(np.float32)
CLIP = qk_clip({"attn": QKProjection.mha(q="q", k="k", num_heads=HEADS)}, TAU)
STILL = optax.sgd(0.0)
INSIDE = optax.chain(STILL, CLIP)


def heads(params):
    """The maxima of a tree of weights, in units of τ."""
    bias = np.zeros((HEADS, HEAD))
    return dense_max_logits((params["q"], bias), (params["k"], bias), X, causal=False) / TAU


def start():
    rng = np.random.default_rng(1)
    params = {name: rng.normal(size=(WIDTH, HEADS, HEAD)).astype(np.float32) for name in "qk"}
    wanted = np.array([30, 0.5]) * TAU
    params["q"] *= np.array(wanted / heads(params) / TAU, np.float32)[:, None]
    return jax.tree.map(jnp.asarray, params)


def run(tx, steps=8, quiet=0):
    """The loudest head after each step, in units of τ, the averages of the weights, and the last weights and state.

    In the `quiet` steps at first nothing is reported.
    """
    params = start()
    state, average, loudest = tx.init(params), params, []
    still = jax.tree.map(jnp.zeros_like, params)
    update = jax.jit(tx.update)
    for step in range(quiet + steps):
        maxima = heads(params) * TAU if step >= quiet else np.zeros(HEADS)
        updates, state = update(still, state, params, max_logits={"attn": jnp.asarray(maxima, jnp.float32)})
        params = optax.apply_updates(params, updates)
        average = optax.incremental_update(params, average, 0.1)
        loudest.append(float(heads(params).max()))
    return np.array(loudest[quiet:]), average, params, state


@pytest.mark.parametrize("tx", [
    INSIDE,
    optax.chain(STILL, optax.ema(0.9), CLIP),
    optax.chain(STILL, optax.apply_every(4), CLIP),
], ids=["plain", "ema in front", "apply_every in front"])  # fmt: skip
def test_behind_averages_and_delays_of_updates_the_clip_holds_in_every_step(tx):
    np.testing.assert_allclose(run(tx)[0], 1.0, rtol=1e-5)


@pytest.mark.parametrize(
    "tx",
    [accumulate(INSIDE, 4), optax.MultiSteps(INSIDE, 4).gradient_transformation()],
    ids=["accumulate", "MultiSteps"],
)
def test_wrappers_that_step_once_hold_it_then(tx):
    np.testing.assert_allclose(run(tx)[0], [30, 30, 30, 1, 1, 1, 1, 1], rtol=1e-5)


def test_an_average_of_updates_behind_the_clip_gives_them_again():
    """The bias-corrected mean of a correction and of nothing is half of it, again and again."""
    loudest = run(optax.chain(INSIDE, optax.ema(0.9)))[0]
    np.testing.assert_allclose(loudest[0], 1.0, rtol=1e-5)
    assert loudest.max() > 3


def test_apply_every_behind_the_clip_applies_it_four_times_at_once():
    loudest = run(optax.chain(INSIDE, optax.apply_every(4)))[0]
    factor = 1 - 4 * (1 - np.sqrt(1 / 30))
    np.testing.assert_allclose(loudest[:4], [30, 30, 30, 30 * factor**2], rtol=1e-4)
    assert loudest[7] > 5 * loudest[3]


@pytest.mark.parametrize("inside", [True, False])
def test_schedule_free_lets_a_clip_outside_through_and_delays_one_inside(inside):
    wrapped = optax.contrib.schedule_free(INSIDE if inside else STILL, 0.1, b1=0.9)
    tx = wrapped if inside else optax.chain(wrapped, CLIP)
    late = run(tx, quiet=60)[0]
    if inside:
        assert late[0] > 20
        assert late[4] > 2
    else:
        assert late.max() < 1.2
        first = run(tx)[0]  # the average of few steps brings back what was clipped
        assert first[1] > 3
        assert first[7] < first[1] / 2


def test_schedule_free_s_weights_for_evaluation_are_not_those_that_are_clipped():
    tx = optax.chain(optax.contrib.schedule_free(STILL, 0.1, b1=0.9), CLIP)
    *_, params, state = run(tx, quiet=60)
    evaluated = heads(optax.contrib.schedule_free_eval_params(state[0], params))[0]
    assert 0.2 < evaluated < 0.4


def test_mechanize_scales_a_clip_inside_away_and_undoes_one_outside():
    """It takes weights for the first ones plus a multiple of all updates, and changes that multiple."""
    inside = run(optax.contrib.mechanize(INSIDE))[0]
    assert inside.min() > 25
    outside = run(optax.chain(optax.contrib.mechanize(STILL), CLIP), steps=12)[0]
    np.testing.assert_allclose(outside[0], 1.0, rtol=1e-5)
    assert outside[1:].min() > 1.05  # γ is of weights that mechanize has moved since


def test_an_average_of_weights_stays_loud_for_as_long_as_it_remembers():
    loudest, average, *_ = run(INSIDE, steps=10)
    np.testing.assert_allclose(loudest, 1.0, rtol=1e-5)
    remembered = 0.9**10
    root = np.sqrt(1 / 30)
    expected = 30 * (remembered + (1 - remembered) * root) ** 2
    np.testing.assert_allclose(heads(average).max(), expected, rtol=1e-4)
    assert expected > 5


@pytest.mark.parametrize("how", ["pmap", "shard_map"])
@pytest.mark.parametrize("pmax", [True, False])
def test_without_pmax_every_device_has_weights_of_its_own(how, pmax):
    params, batch = start(), jnp.stack([X, 2 * X])  # the second device sees four times the logits

    def step(params, x):
        q, k = (jnp.einsum("btw,whd->bthd", x, params[name]) for name in "qk")
        maxima = exact_max_logits(q, k, scale=0.5)
        if pmax:
            maxima = jax.lax.pmax(maxima, "devices")
        still = jax.tree.map(jnp.zeros_like, params)
        updates, _ = CLIP.update(still, CLIP.init(params), params, max_logits={"attn": maxima})
        return jax.tree.map(lambda x: x[None], optax.apply_updates(params, updates))

    if how == "pmap":
        after = jax.pmap(step, "devices", in_axes=(None, 0), devices=jax.devices()[:2])(params, batch)
        after = jax.tree.map(lambda x: x[:, 0], after)
    else:
        mesh = Mesh(np.array(jax.devices()[:2]), ("devices",))
        own, shared = PartitionSpec("devices"), PartitionSpec()
        split = lambda params, x: step(params, x[0])  # noqa: E731
        mapped = jax.shard_map(split, mesh=mesh, in_specs=(shared, own), out_specs=own, check_vma=False)
        after = jax.jit(mapped)(params, batch)
    each = [heads({name: array[device] for name, array in after.items()}) for device in range(2)]
    np.testing.assert_allclose(each[1], [1 / 4, 1 / 4], rtol=1e-4)
    np.testing.assert_allclose(each[0], [1 / 4, 1 / 4] if pmax else [1, 1 / 2], rtol=1e-4)

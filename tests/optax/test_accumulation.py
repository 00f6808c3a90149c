"""Gradient accumulation: one step on what all micro-steps saw, maxima included."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny_jax as tiny

from muonclip.optax import QKProjection, accumulate, muonclip, qk_clip
from muonclip.optax.accumulation import AccumulateState

EVERY, STEPS = 4, 3
BATCHES = tiny.batches(STEPS)
MICRO = BATCHES.reshape(STEPS * EVERY, -1, BATCHES.shape[-1])


@functools.cache
def whole():
    """One step for each whole batch → parameters, state."""
    return tiny.train(tiny.optimizer(), tiny.init(), BATCHES)


def seen_in_the_first_micro_step_only(maxima):
    """Maxima for each micro-step of one step: the loud one, then silence."""
    return [maxima] + [jax.tree.map(lambda m: jnp.full_like(m, 0.1), maxima)] * (EVERY - 1)


@pytest.mark.parametrize("every", [EVERY, lambda step: EVERY], ids=["number", "schedule"])
def test_micro_steps_make_the_step_of_the_whole_batch(every):
    params, state = tiny.train(accumulate(tiny.optimizer(), every), tiny.init(), MICRO)
    assert tiny.distance(params, whole()[0]) < 1e-5
    assert tiny.distance(state.inner_state, whole()[1]) < 1e-5
    assert (state.step, state.micro_step) == (STEPS, 0)
    assert any((gamma < 1).any() for gamma in whole()[1][-1].gamma.values())


def test_between_steps_nothing_moves_but_the_accumulators():
    tx = accumulate(tiny.optimizer(), EVERY)
    params, state = tiny.init(), tx.init(tiny.init())
    inner = state.inner_state
    update = tiny.compiled(tx.update)
    total, highest = jax.tree.map(jnp.zeros_like, params), None
    for seen, each in enumerate(MICRO[: EVERY - 1], start=1):
        grads, maxima = tiny.gradients()(params, each)
        updates, state = update(grads, state, params, max_logits=maxima)
        total = jax.tree.map(jnp.add, total, grads)
        highest = maxima if highest is None else jax.tree.map(jnp.maximum, highest, maxima)
        assert tiny.equal(updates, jax.tree.map(jnp.zeros_like, params))
        assert tiny.equal(state.inner_state, inner)
        assert tiny.equal(state.max_logits, highest)
        assert tiny.distance(state.gradients, jax.tree.map(lambda g, seen=seen: g / seen, total)) < 1e-7
        assert (state.step, state.micro_step) == (0, seen)


def test_a_maximum_of_the_first_micro_step_alone_decides_and_optax_multisteps_loses_it():
    params = tiny.init()
    grads, maxima = tiny.gradients()(params, BATCHES[0])
    expected, plain = tiny.optimizer().update(grads, tiny.optimizer().init(params), params, max_logits=maxima)
    assert plain[-1].gamma["first"].min() < 0.1
    running = functools.reduce(
        lambda *both: jax.tree.map(jnp.maximum, *both), seen_in_the_first_micro_step_only(maxima)
    )
    for tx, told, held in (
        (accumulate(tiny.optimizer(), EVERY), seen_in_the_first_micro_step_only(maxima), True),
        (optax.MultiSteps(tiny.optimizer(), EVERY), seen_in_the_first_micro_step_only(maxima), False),
        (optax.MultiSteps(tiny.optimizer(), EVERY), [running] * EVERY, True),
    ):
        state, update = tx.init(params), tiny.compiled(tx.update)
        for each in told:
            updates, state = update(grads, state, params, max_logits=each)
        inner = state.inner_state if isinstance(state, AccumulateState) else state.inner_opt_state
        assert (tiny.distance(updates, expected) < 1e-6) == held
        assert (inner[-1].gamma["first"].min() < 0.1) == held


def test_multisteps_with_a_running_maximum_is_accumulate():
    steps = optax.MultiSteps(tiny.optimizer(), EVERY)

    @tiny.compiled
    def step(params, state, highest, tokens):
        grads, maxima = tiny.gradients_and_maxima(params, tokens)
        highest = jax.tree.map(jnp.maximum, highest, maxima)
        updates, state = steps.update(grads, state, params, max_logits=highest)
        done = steps.has_updated(state)
        highest = jax.tree.map(lambda m: jnp.where(done, -jnp.inf, m), highest)
        return optax.apply_updates(params, updates), state, highest

    params = tiny.init()
    state = steps.init(params)
    highest = {name: jnp.full(tiny.HEADS, -jnp.inf, jnp.float32) for name in tiny.LAYERS}
    for each in MICRO:
        params, state, highest = step(params, state, highest, each)
    assert tiny.distance(params, whole()[0]) < 1e-5


def test_a_schedule_may_change_the_number_of_micro_steps():
    tx = accumulate(tiny.optimizer(), lambda step: jnp.where(step < 1, 2, 3))
    params = tiny.init()
    params, state = tiny.train(tx, params, MICRO[:5])
    assert (state.step, state.micro_step) == (2, 0)
    wholes = [MICRO[:2].reshape(-1, MICRO.shape[-1]), MICRO[2:5].reshape(-1, MICRO.shape[-1])]
    assert tiny.distance(params, tiny.train(tiny.optimizer(), tiny.init(), wholes)[0]) < 1e-5


def test_in_a_scan_with_state_and_dtypes_stable():
    tx = accumulate(tiny.optimizer(), EVERY)

    def step(carry, tokens):
        params, state = carry
        grads, maxima = tiny.gradients_and_maxima(params, tokens)
        updates, state = tx.update(grads, state, params, max_logits=maxima)
        return (optax.apply_updates(params, updates), state), updates["norm"]["scale"]

    params = tiny.init()
    start = (params, tx.init(params))
    (params, _), moved = tiny.compiled(lambda start: jax.lax.scan(step, start, jnp.asarray(MICRO)))(start)
    assert tiny.distance(params, whole()[0]) < 1e-5
    assert [bool(np.any(update)) for update in moved] == ([False] * (EVERY - 1) + [True]) * STEPS


def test_bfloat16_parameters_accumulate_in_float32():
    params = tiny.init(dtype=jnp.bfloat16)
    inner = tiny.optimizer()
    tx = accumulate(inner, 16)
    state, update = tx.init(params), tiny.compiled(tx.update)
    grads, maxima = tiny.gradients()(params, BATCHES[0])
    small = jax.tree.map(lambda g: g / 512, grads)  # lost in a bfloat16 sum with the first
    for each in [grads] + [small] * 15:
        updates, state = update(each, state, params, max_logits=maxima)
    mean = jax.tree.map(
        lambda g, s: ((g.astype(jnp.float32) + 15 * s.astype(jnp.float32)) / 16).astype(g.dtype), grads, small
    )
    expected, _ = tiny.compiled(inner.update)(mean, inner.init(params), params, max_logits=maxima)
    for new, old in zip(jax.tree.leaves(updates), jax.tree.leaves(expected), strict=True):
        assert new.dtype == old.dtype == jnp.bfloat16
    assert tiny.distance(updates, expected) < 0.01
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(tx.init(params).gradients))
    assert jax.tree.map(lambda a: a.dtype, state) == jax.tree.map(lambda a: a.dtype, tx.init(params))


def test_a_maximum_that_is_no_number_leaves_its_head_and_is_counted_once():
    params = tiny.init()
    tx = accumulate(tiny.optimizer(), EVERY)
    grads, maxima = tiny.gradients()(params, BATCHES[0])
    loud = tiny.LOUD["first"]
    told = seen_in_the_first_micro_step_only(maxima)
    told[1] = {**told[1], "first": told[1]["first"].at[loud].set(jnp.nan)}
    state, update = tx.init(params), tiny.compiled(tx.update)
    for each in told:
        updates, state = update(grads, state, params, max_logits=each)
    clip = state.inner_state[-1]
    assert clip.nonfinite == 1
    np.testing.assert_array_equal(clip.gamma["first"], 1)
    assert clip.gamma["second"].min() < 0.1
    assert np.isneginf(state.max_logits["first"]).all(), "the next step starts without it"
    bare = tiny.optimizer(tau=1e9)
    expected, _ = bare.update(grads, bare.init(params), params, max_logits=maxima)
    assert tiny.distance(updates["first"], expected["first"]) < 1e-6


def test_a_micro_step_whose_gradient_is_not_finite_never_happened():
    tx = optax.apply_if_finite(accumulate(tiny.optimizer(), EVERY), 3)
    params, state = tiny.train(tx, tiny.init(), MICRO[:2])
    grads, maxima = jax.tree.map(lambda a: a * jnp.nan, tiny.gradients()(params, MICRO[2]))
    updates, after = tiny.compiled(tx.update)(grads, state, params, max_logits=maxima)
    assert tiny.equal(after.inner_state, state.inner_state)
    assert tiny.equal(updates, jax.tree.map(jnp.zeros_like, params))
    params, after = tiny.train(tx, params, MICRO[2:], after)
    assert tiny.distance(params, whole()[0]) < 1e-5


def test_hyperparameters_may_be_injected_inside_and_outside():
    arguments = {"learning_rate": 0.05, "qk_projections": tiny.PROJECTIONS, "tau": tiny.TAU, "adamw": {"eps": 1e-3}}
    inside = accumulate(optax.inject_hyperparams(muonclip)(**arguments), EVERY)

    def factory(learning_rate, tau):
        return accumulate(muonclip(**{**arguments, "learning_rate": learning_rate, "tau": tau}), EVERY)

    outside = optax.inject_hyperparams(factory)(0.05, tau=tiny.TAU)
    for tx in (inside, outside):
        assert tiny.distance(tiny.train(tx, tiny.init(), MICRO)[0], whole()[0]) < 1e-5
    params, state = tiny.init(), inside.init(tiny.init())
    state.inner_state.hyperparams["learning_rate"] = jnp.float32(0)
    for each in MICRO[:EVERY]:
        grads, maxima = tiny.gradients()(params, each)
        updates, state = inside.update(grads, state, params, max_logits=maxima)
    assert not np.any(updates["norm"]["scale"])
    assert np.any(updates["first"]["attention"]["query"]["kernel"]), "the clip needs no rate"


def test_errors_name_what_is_missing():
    params = tiny.init()
    grads, maxima = tiny.gradients()(params, BATCHES[0])
    tx = accumulate(tiny.optimizer(), EVERY)
    with pytest.raises(TypeError, match=r"max_logits=… in every micro-step"):
        tx.update(grads, tx.init(params), params)
    with pytest.raises(ValueError, match=r"Extra: an array alone; missing: 'first', 'second'"):
        tx.update(grads, tx.init(params), params, max_logits=maxima["first"])
    with pytest.raises(ValueError, match="every=0 must be a whole number of at least 1"):
        accumulate(tiny.optimizer(), 0)
    with pytest.raises(ValueError, match=r"this one has 0\. Use optax\.MultiSteps"):
        accumulate(optax.adam(1e-3), EVERY).init(params)
    with pytest.raises(ValueError, match=r"this one has 2\. Clip all attentions in one"):
        accumulate(optax.chain(tiny.optimizer(), tiny.optimizer()), EVERY).init(params)


@pytest.mark.parametrize("shape", [(), (1,), (2, 1), (2, 4), (3, 2)])
def test_maxima_of_another_shape_are_refused_before_they_are_broadcast(shape):
    projection = QKProjection.mha(q="q", k="k", num_heads=3, layer_axis=0)
    params = {name: jnp.ones((2, 5, 3, 4)) for name in "qk"}
    tx = accumulate(qk_clip({"a": projection}), 2)
    with pytest.raises(ValueError, match=r"max_logits of a has shape \(.*\), not \(2, 3\)"):
        tx.update(params, tx.init(params), params, max_logits={"a": jnp.ones(shape)})

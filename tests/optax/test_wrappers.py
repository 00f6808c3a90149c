"""Optax's own wrappers around the clip: each must leave the trajectory of the plain loop, or say what to use."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny_jax as tiny
from flax.training.train_state import TrainState

from muonclip.optax import QKProjection, muonclip, plan, qk_clip

pytestmark = pytest.mark.slow  # compiles much

BATCHES = tiny.batches(4)
STATIC = ("muon_weight_dimension_numbers", "weight_decay_mask", "ns_steps", "adjust_lr_fn")
OPTIONS = {"qk_projections": tiny.PROJECTIONS, "tau": tiny.TAU, "adamw": {"eps": 1e-3}}


@functools.cache
def plain():
    """The parameters that every faithful wrapper has to reach, and the state."""
    return tiny.train(tiny.optimizer(), tiny.init(), BATCHES)


def counted(tx):
    """`update`, jitted, and a list that grows by one with each compilation."""
    compilations = []

    def update(*args, **extra_args):
        compilations.append(1)
        return tx.update(*args, **extra_args)

    return tiny.compiled(update), compilations


def attention(params, name):
    return params[name]["attention"]["query"], params[name]["attention"]["key"]


def layouts(params):
    """What Muon takes for what, where the clip stands apart from it."""
    return plan(params, None, tiny.PROJECTIONS).tree(params, lambda line: line.layout)


def everywhere(value, **instead):
    """A tree like the parameters with `value`, or `instead` in the layers named so."""
    tree = tiny.init()
    return {key: jax.tree.map(lambda _, key=key: instead.get(key, value), tree[key]) for key in tree}


def test_the_clip_holds_loud_heads_at_tau_in_the_trajectory_that_wrappers_are_compared_with():
    params, tx = tiny.init(), tiny.optimizer(0.0)
    _, maxima, inputs = tiny.forward(params, BATCHES[0][:, :-1])
    after, state = tiny.train(tx, params, BATCHES[:1])
    for name in tiny.LAYERS:
        before, now = (
            tiny.dense_max_logits(*((part["kernel"], part["bias"]) for part in attention(tree, name)), inputs[name])
            for tree in (params, after)
        )
        np.testing.assert_allclose(maxima[name], before, rtol=1e-5)
        assert (before > tiny.TAU).tolist() == [head == tiny.LOUD[name] for head in range(3)]
        np.testing.assert_allclose(now, np.minimum(before, tiny.TAU), rtol=1e-5)
        np.testing.assert_allclose(state[-1].gamma[name], np.minimum(1, tiny.TAU / before), rtol=1e-5)
    assert any((gamma < 1).any() for gamma in plain()[1][-1].gamma.values())


def test_a_schedule_gives_the_rate_of_its_step_and_never_recompiles():
    rates = [0.05, 0.02, 0.04, 0.01]
    tx = tiny.optimizer(lambda count: jnp.asarray(rates)[count])
    params, other, state = tiny.init(), tiny.init(), tx.init(tiny.init())
    update, compilations = counted(tx)
    for each, rate in zip(BATCHES, rates, strict=True):
        grads, maxima = tiny.gradients()(params, each)
        expected, _ = tiny.optimizer(rate).update(grads, state, params, max_logits=maxima)
        updates, state = update(grads, state, params, max_logits=maxima)
        assert tiny.distance(updates, expected) < 1e-6
        params = optax.apply_updates(params, updates)
    assert len(compilations) == 1
    other, _ = tiny.train(tiny.optimizer(optax.constant_schedule(0.05)), other, BATCHES)
    assert tiny.distance(other, plain()[0]) < 1e-6


@pytest.mark.parametrize("options", [{}, {"ns_steps": 5}, {"adjust_lr_fn": 0.5}])
def test_injected_hyperparameters_leave_the_trajectory(options):
    tx = optax.inject_hyperparams(muonclip, static_args=STATIC)(0.05, **{**OPTIONS, **options})
    expected, _ = tiny.train(muonclip(0.05, **{**OPTIONS, **options}), tiny.init(), BATCHES)
    assert tiny.distance(tiny.train(tx, tiny.init(), BATCHES)[0], expected) < 1e-5
    assert set(tx.init(tiny.init()).hyperparams) == {"learning_rate", "weight_decay", "beta", "tau", "alpha", "eps"}


def test_injected_hyperparameters_may_change_between_steps_without_recompiling():
    tx = optax.inject_hyperparams(muonclip, static_args=STATIC)(learning_rate=0.05, **OPTIONS)
    params, state = tiny.init(), tx.init(tiny.init())
    update, compilations = counted(tx)
    changes = [{"alpha": 0.9}, {"learning_rate": 0.01}, {"tau": 0.2}, {"weight_decay": 2.0}, {"beta": 0.5}]
    chosen = {"learning_rate": 0.05}
    for change, each in zip(changes, tiny.batches(5, seed=1), strict=True):
        grads, maxima = tiny.gradients()(params, each)
        before, expected = (
            tiny.optimizer(**values).update(grads, state.inner_state, params, max_logits=maxima)[0]
            for values in (chosen, chosen | change)
        )
        chosen |= change
        for name, value in change.items():
            state.hyperparams[name] = jnp.asarray(value, jnp.float32)
        assert tiny.distance(expected, before) > 1e-3, "the change must show"
        updates, state = update(grads, state, params, max_logits=maxima)
        assert tiny.distance(updates, expected) < 2e-6, change
        params = optax.apply_updates(params, updates)
    assert len(compilations) == 1


@pytest.mark.parametrize("bad_maxima", [False, True], ids=["bad gradients", "bad maxima too"])
@pytest.mark.parametrize("jit", [True, False], ids=["jit", "eager"])
def test_a_step_that_is_not_finite_clips_nothing_and_changes_nothing(jit, bad_maxima):
    tx = optax.apply_if_finite(tiny.optimizer(), 3)
    params, state = tiny.init(), tx.init(tiny.init())
    update = tiny.compiled(tx.update) if jit else tx.update
    grads, maxima = tiny.gradients()(params, BATCHES[0])
    grads["norm"]["scale"] = grads["norm"]["scale"].at[3].set(jnp.nan)
    maxima = jax.tree.map(lambda m: m.at[0].set(jnp.nan), maxima) if bad_maxima else maxima
    updates, after = update(grads, state, params, max_logits=maxima)
    assert tiny.equal(updates, jax.tree.map(jnp.zeros_like, params))
    assert tiny.equal(after.inner_state, state.inner_state)
    assert (after.notfinite_count, after.total_notfinite, after.last_finite) == (1, 1, False)
    params, _ = tiny.train(tx, params, BATCHES[:1], after, jit)
    assert tiny.distance(params, tiny.train(tiny.optimizer(), tiny.init(), BATCHES[:1], jit=jit)[0]) < 1e-6


@pytest.mark.parametrize("wrap", [
    lambda tx: optax.masked(tx, everywhere(True, first=False)),
    lambda tx: optax.partition({True: tx, False: optax.set_to_zero()}, everywhere(True, first=False)),
    lambda tx: optax.selective_transform(tx, freeze_mask=everywhere(False, first=True)),
    lambda tx: optax.chain(tx, optax.freeze(everywhere(False, first=True))),
], ids=["masked", "partition", "selective_transform", "freeze"])  # fmt: skip
def test_an_attention_that_is_not_trained_is_not_scaled_and_the_other_is(wrap):
    params = tiny.init()
    grads, maxima = tiny.gradients()(params, BATCHES[0])
    grads["first"] = jax.tree.map(jnp.zeros_like, grads["first"])  # optax.masked hands these on
    expected, _ = tiny.optimizer().update(grads, tiny.optimizer().init(params), params, max_logits=maxima)
    tx = wrap(tiny.optimizer())
    updates, _ = tx.update(grads, tx.init(params), params, max_logits=maxima)
    assert tiny.distance(updates["first"], grads["first"]) == 0
    assert tiny.distance(updates["second"], expected["second"]) < 1e-6
    assert tiny.distance(expected["second"], grads["second"]) > 0.5, "the clip fires there"


def test_the_state_says_of_an_attention_that_is_not_trained_that_no_head_was_clipped():
    tx = optax.masked(tiny.optimizer(), everywhere(True, first=False))
    _, state = tiny.train(tx, tiny.init(), BATCHES[:1])
    np.testing.assert_array_equal(state.inner_state[-1].gamma["first"], 1)
    assert state.inner_state[-1].gamma["second"].min() < 0.1


@pytest.mark.parametrize("frozen", [["key"], ["key/bias"], ["query/kernel"], ["query/bias", "key/bias"]], ids=str)
def test_of_an_attention_with_a_frozen_part_the_other_takes_all_of_the_factor(frozen):
    params = tiny.init()
    mask = jax.tree_util.tree_map_with_path(
        lambda path, _: not any(
            f"first/attention/{each}" in jax.tree_util.keystr(path, simple=True, separator="/") for each in frozen
        ),
        params,
    )  # fmt: skip
    tx = optax.masked(qk_clip(tiny.PROJECTIONS, 1.0), mask)
    maxima = {name: jnp.full(tiny.HEADS, 4.0) for name in tiny.LAYERS}
    still = jax.tree.map(jnp.zeros_like, params)
    updates, state = tx.update(still, tx.init(params), params, max_logits=maxima)
    sides = {each.split("/")[0] for each in frozen}
    for side in ("query", "key"):
        factor = 1.0 if side in sides else 0.25
        for name, weight in params["first"]["attention"][side].items():
            np.testing.assert_allclose(
                updates["first"]["attention"][side][name],
                (1 if len(sides) > 1 else factor) * weight - weight,
                rtol=1e-5,
                atol=1e-7,
            )
    assert state.inner_state.frozen == (tiny.HEADS if len(sides) > 1 else 0)


def test_gradients_are_clipped_before_muon_and_nothing_comes_after_the_clip():
    params = tiny.init()
    grads, maxima = tiny.gradients()(params, BATCHES[0])
    clipped, _ = optax.clip_by_global_norm(0.01).update(grads, optax.EmptyState())
    expected, _ = tiny.optimizer().update(clipped, tiny.optimizer().init(params), params, max_logits=maxima)
    bare = tiny.optimizer(qk_projections=None, muon_weight_dimension_numbers=layouts)
    for tx in (
        optax.chain(optax.clip_by_global_norm(0.01), tiny.optimizer()),
        optax.named_chain(("norm", optax.clip_by_global_norm(0.01)), ("muonclip", tiny.optimizer())),
        optax.chain(
            optax.clip_by_global_norm(0.01),
            bare,
            optax.contrib.reduce_on_plateau(),
            qk_clip(tiny.PROJECTIONS, tiny.TAU),
        ),
    ):
        updates, _ = tx.update(grads, tx.init(params), params, max_logits=maxima, value=jnp.float32(1.0))
        assert tiny.distance(updates, expected) < 1e-6
    late = optax.chain(tiny.optimizer(), optax.scale(0.5))
    updates, _ = late.update(grads, late.init(params), params, max_logits=maxima)
    assert tiny.distance(updates["first"]["attention"], expected["first"]["attention"]) > 0.5


def test_mapping_over_the_state_meets_moments_and_neither_counters_nor_factors():
    tx, params = tiny.optimizer(), tiny.init()
    state = tx.init(params)
    seen = optax.tree_map_params(
        tx,
        lambda moment, param: moment if isinstance(moment, optax.MaskedNode) else param,
        state,
        params,
        transform_non_params=lambda _: None,
        is_leaf=lambda node: isinstance(node, optax.MaskedNode),
    )
    muon, adamw = (seen[0].inner_states[use].inner_state[0] for use in ("muon", "adamw"))
    clip = seen[1]
    assert muon.count is adamw.count is clip.nonfinite is None
    assert jax.tree.leaves(clip) == []
    assert tiny.equal(muon.mu["first"]["attention"]["out"]["kernel"], params["first"]["attention"]["out"]["kernel"])
    assert tiny.equal(adamw.nu["embed"], adamw.mu["embed"])
    assert tiny.equal(adamw.nu["embed"], params["embed"])
    moments = len(jax.tree.leaves(muon.mu)) + len(jax.tree.leaves(adamw.mu))
    assert moments == len(jax.tree.leaves(params))


def test_under_schedule_free_the_clip_stands_outside():
    params = tiny.init()
    grads, maxima = tiny.gradients()(params, BATCHES[0])
    _, _, inputs = tiny.forward(params, BATCHES[0][:, :-1])
    bare = tiny.optimizer(0.0, qk_projections=None, muon_weight_dimension_numbers=layouts)
    outside = optax.chain(optax.contrib.schedule_free(bare, 0.05, b1=0.9), qk_clip(tiny.PROJECTIONS, tiny.TAU))
    inside = optax.contrib.schedule_free(tiny.optimizer(0.0), 0.05, b1=0.9)
    for tx, held in ((outside, True), (inside, False)):
        state = tx.init(params)
        # The second step: in the first, the average is the iterate.
        updates, state = tx.update(grads, state, params, max_logits=jax.tree.map(jnp.zeros_like, maxima))
        now = optax.apply_updates(params, updates)
        updates, state = tx.update(grads, state, now, max_logits=maxima)
        now = optax.apply_updates(now, updates)
        for name in tiny.LAYERS:
            after = tiny.dense_max_logits(
                *((part["kernel"], part["bias"]) for part in attention(now, name)), inputs[name]
            )
            assert np.allclose(after, np.minimum(maxima[name], tiny.TAU), rtol=1e-4) == held


def test_what_cannot_carry_the_maxima_says_what_to_use():
    params, tx = tiny.init(), tiny.optimizer()
    grads, _ = tiny.gradients()(params, BATCHES[0])
    lookahead = optax.lookahead(tx, 2, 0.5)
    synced = optax.LookaheadParams.init_synced(params)
    micro = optax.chain(optax.MultiSteps(tx, 2).gradient_transformation())
    state = TrainState.create(apply_fn=tiny.forward, params=params, tx=tx)
    for step in (
        lambda: lookahead.update(grads, lookahead.init(synced), synced),
        lambda: micro.update(grads, micro.init(params), params),
        lambda: state.apply_gradients(grads=grads),
        lambda: tx.update(grads, tx.init(params), params),
    ):
        with pytest.raises(TypeError, match=r"max_logits=….*accumulate.*TrainState\.apply_gradients"):
            step()


def test_a_train_state_steps_by_the_call_that_the_error_names():
    state = TrainState.create(apply_fn=tiny.forward, params=tiny.init(), tx=tiny.optimizer())

    @tiny.compiled
    def step(state, tokens):
        grads, maxima = tiny.gradients_and_maxima(state.params, tokens)
        updates, opt_state = state.tx.update(grads, state.opt_state, state.params, max_logits=maxima)
        params = optax.apply_updates(state.params, updates)
        return state.replace(step=state.step + 1, params=params, opt_state=opt_state)

    for each in BATCHES:
        state = step(state, each)
    assert tiny.distance(state.params, plain()[0]) < 1e-5
    assert state.step == len(BATCHES)


@pytest.mark.parametrize("stacked", [True, False])
@pytest.mark.parametrize("prefix", [True, False])
def test_an_attention_may_be_masked_leaf_by_leaf_or_as_a_whole(stacked, prefix):
    params = {
        "layers": {part: {"kernel": jnp.ones((2, 10, 3, 4)[not stacked :])} for part in ("query", "key")},
        "last": {part: {"kernel": jnp.ones((10, 3, 4))} for part in ("query", "key")},
    }
    projections = {
        "layers": QKProjection.mha(q="layers/query", k="layers/key", num_heads=3, layer_axis=0 if stacked else None),
        "last": QKProjection.mha(q="last/query", k="last/key", num_heads=3),
    }
    mask = {"layers": False if prefix else jax.tree.map(lambda _: False, params["layers"]), "last": True}
    tx = optax.masked(qk_clip(projections, 1.0), mask)
    still = jax.tree.map(jnp.zeros_like, params)
    maxima = {"layers": jnp.full((2, 3) if stacked else 3, 4.0), "last": jnp.full(3, 4.0)}
    updates, state = tx.update(still, tx.init(params), params, max_logits=maxima)
    assert tiny.equal(updates["layers"], still["layers"])
    np.testing.assert_allclose(updates["last"]["query"]["kernel"], -0.5, rtol=1e-6)
    np.testing.assert_array_equal(state.inner_state.gamma["last"], 0.25)

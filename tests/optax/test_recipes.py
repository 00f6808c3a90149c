"""Recipes in Optax: the same bits as their arguments by hand, and the trajectory of NumPy in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny_jax as tiny
from svd_oracle import muon_step

from muonclip.core import RECIPES, MatrixLayout, resolve_coefficients
from muonclip.optax import muonclip, plan

JORDAN = dict(ns_coefficients="jordan", adjust_lr_fn="match_rms_adamw", beta=0.95, weight_decay=0.1)
BY_HAND = {
    "moonlight": JORDAN,
    "k2": dict(JORDAN, tau=100.0),
    "kimi_k3": dict(JORDAN, tau=100.0),
    "glm5": dict(JORDAN, ns_steps=5),
    "deepseek_v4": dict(JORDAN, ns_coefficients="deepseek_v4", adjust_lr_fn=("match_rms_adamw", 0.18)),
    "nvidia": dict(
        JORDAN, beta=0.9, ns_coefficients="polar_express", ns_steps=16, adjust_lr_fn="match_rms_adamw_closed_form"
    ),
}
RMS = {"deepseek_v4": 0.18, "nvidia": (0.1 / 1.9) ** 0.5}
SETS = {"deepseek_v4": ("deepseek_v4", 10), "nvidia": ("polar_express", 16)}
HEADS = {"kernel": MatrixLayout(transposed=True, heads=(3,))}


def options_of(name):
    """What this adapter has to be told besides: heads, or that there is no clip."""
    return dict(qk_projections=None, muon_weight_dimension_numbers=HEADS if RECIPES[name].per_head else None)


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_is_its_arguments_to_the_bit_and_takes_the_way_of_numpy(name):
    """[in, out], of three heads where the recipe has heads as matrices of their own."""
    rng = np.random.default_rng(0)
    weight = rng.normal(size=(5, 12))
    transformations = [muonclip(0.02, **given, **options_of(name)) for given in ({"recipe": name}, BY_HAND[name])]
    states = [tx.init({"kernel": jnp.asarray(weight)}) for tx in transformations]
    params = [{"kernel": jnp.asarray(weight)} for _ in transformations]
    blocks = np.split(weight.T, 3) if RECIPES[name].per_head else [weight.T]
    momenta = [np.zeros_like(block) for block in blocks]
    for _ in range(3):
        gradient = rng.normal(size=(5, 12))
        for number, tx in enumerate(transformations):
            updates, states[number] = tx.update({"kernel": jnp.asarray(gradient)}, states[number], params[number])
            params[number] = optax.apply_updates(params[number], updates)
        pieces = np.split(gradient.T, len(blocks))
        for at, piece in enumerate(pieces):
            blocks[at], momenta[at] = muon_step(
                blocks[at], momenta[at], piece, lr=0.02, weight_decay=0.1, mu=0.9 if name == "nvidia" else 0.95,
                nesterov=True, coefficients=resolve_coefficients(*SETS.get(name, ("jordan", 5))),
                scale=RMS.get(name, 0.2) * max(piece.shape) ** 0.5,
            )  # fmt: skip
        assert tiny.equal(*params)
        np.testing.assert_allclose(params[0]["kernel"].T, np.concatenate(blocks), atol=1e-9)


def test_the_clip_is_the_recipe_s_and_a_given_tau_wins():
    batches = tiny.batches(2)
    options = dict(learning_rate=0.05, qk_projections=tiny.PROJECTIONS)
    for given, by_hand in (
        (dict(recipe="k2", tau=tiny.TAU), dict(JORDAN, tau=tiny.TAU)),
        (dict(recipe="moonlight", tau=tiny.TAU), dict(JORDAN, tau=tiny.TAU)),
        (dict(recipe="k2"), dict(JORDAN, tau=100.0)),
    ):
        ours, others = (tiny.train(muonclip(**options, **each), tiny.init(), batches)[0] for each in (given, by_hand))
        assert tiny.equal(ours, others)


def test_what_a_recipe_has_to_be_told_is_asked_for():
    with pytest.raises(ValueError, match="recipe='moonlight' is without a clip"):
        muonclip(1e-3, recipe="moonlight", qk_projections=tiny.PROJECTIONS)
    with pytest.raises(ValueError, match="recipe='kimi_k3' takes heads as matrices of their own"):
        muonclip(1e-3, recipe="kimi_k3", qk_projections=tiny.PROJECTIONS)
    with pytest.raises(ValueError, match="known are moonlight, k2"):
        muonclip(1e-3, recipe="kimi", qk_projections=None)
    with pytest.raises(ValueError, match=r"optax\.inject_hyperparams"):
        optax.inject_hyperparams(muonclip)(1e-3, recipe="k2", qk_projections=None).init({"kernel": jnp.ones((2, 3))})


def test_the_plan_shows_the_recipe_s_values_and_its_products():
    params = {"kernel": jax.ShapeDtypeStruct((5, 12), jnp.float32)}
    lines = str(plan(params, recipe="nvidia", ns_steps=4)).splitlines()
    assert any(line.startswith("recipe nvidia (arXiv 2607.20548") for line in lines)
    assert "momentum = 0.9 (recipe nvidia)" in lines
    assert "ns_steps = 4 (given)" in lines
    assert plan(params).recipe is None

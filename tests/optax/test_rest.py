"""Another transformation for what Muon does not take, in the joint one: with the clip, saved, over a mesh."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from muonclip.optax import QKProjection, muonclip, plan

HEADS = 2
PROJECTIONS = {"attn": QKProjection.mha(q="attn/q/kernel", k="attn/k/kernel", num_heads=HEADS, in_axis=0)}
MAXIMA = {"attn": jnp.asarray([3.0, 50.0])}
RESTS = {
    "lion": optax.lion(1e-2, weight_decay=0.1),
    "adafactor": optax.adafactor(1e-2),
    "sgd": optax.sgd(optax.linear_schedule(0.1, 0.01, 4), momentum=0.9),
}


def arrays(seed):
    shapes = {
        "embed": {"embedding": (20, 8)},
        "attn": {"q": {"kernel": (8, 12)}, "k": {"kernel": (8, 12)}},
        "norm": {"scale": (8,)},
        "head": {"kernel": (8, 20)},
    }
    leaves, tree = jax.tree.flatten(shapes, is_leaf=lambda node: isinstance(node, tuple))
    generator = np.random.default_rng(seed)
    return tree.unflatten([jnp.asarray(generator.normal(size=shape), jnp.float32) for shape in leaves])


def step(tx, params, state, seed):
    gradients = jax.tree.map(lambda g, p: jax.device_put(g, p.sharding), arrays(100 + seed), params)
    updates, state = jax.jit(tx.update)(gradients, state, params, max_logits=MAXIMA)
    return optax.apply_updates(params, updates), state


def trained(tx, params, steps, state=None):
    state = tx.init(params) if state is None else state
    for seed in steps:
        params, state = step(tx, params, state, seed)
    return params, state


def made(**options):
    return muonclip(1e-2, qk_projections=PROJECTIONS, tau=10.0, **options)


@pytest.mark.parametrize("name", RESTS)
def test_each_half_is_what_its_transformation_does_alone(name):
    rest, start = RESTS[name], arrays(0)
    params, _ = trained(made(rest=rest), start, range(4))
    with_adamw, _ = trained(made(), start, range(4))
    others = {key: start[key] for key in ("embed", "norm", "head")}
    state = rest.init(others)
    for seed in range(4):
        updates, state = rest.update({key: arrays(100 + seed)[key] for key in others}, state, others)
        others = optax.apply_updates(others, updates)
    for key in start:
        same, tolerance = (others, 1e-6) if key in others else (with_adamw, 0)
        jax.tree.map(lambda a, b, atol=tolerance: np.testing.assert_allclose(a, b, atol=atol), params[key], same[key])
    difference = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), params["head"], with_adamw["head"])
    assert difference["kernel"] > 1e-3


def test_a_state_goes_on_to_the_bit():
    tx, start = made(rest=RESTS["lion"]), arrays(0)
    straight, _ = trained(tx, start, range(4))
    params, state = trained(tx, start, range(2))
    leaves, tree = jax.tree.flatten(state)
    state = tree.unflatten([jnp.asarray(np.asarray(leaf)) for leaf in leaves])
    params, _ = trained(made(rest=RESTS["lion"]), params, range(2, 4), state)
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), straight, params))


def test_sharded_equals_whole():
    mesh = jax.make_mesh((2,), ("x",), axis_types=(AxisType.Explicit,))
    tx, start = made(rest=RESTS["lion"]), arrays(0)
    whole, _ = trained(tx, start, range(3))
    with jax.set_mesh(mesh):
        sharded, _ = trained(
            tx, jax.tree.map(lambda a: jax.device_put(a, NamedSharding(mesh, P("x"))), start), range(3)
        )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), whole, sharded)


def test_the_plan_says_what_is_the_rest_s():
    lines = plan(arrays(0), None, PROJECTIONS, rest=RESTS["lion"]).parameters
    assert {line.use for line in lines} == {"muon", "rest"}
    assert {line.name.split("/")[0] for line in lines if line.use == "muon"} == {"attn"}


@pytest.mark.parametrize(
    ("rest", "said"),
    [
        (
            optax.lion,
            r"rest=<function lion .*give a transformation that was made, with its rate: rest=optax.lion\(1e-4",
        ),
        ("lion", "rest='lion' is a str; give a transformation"),
        ({"learning_rate": 1e-3}, "is a dict; give a transformation"),
        (1e-3, r"rest=0\.001 is a float; give a transformation"),
    ],
)
def test_what_is_no_transformation_is_refused(rest, said):
    with pytest.raises(TypeError, match=said):
        made(rest=rest)
    with pytest.raises(TypeError, match=said):
        plan(arrays(0), rest=rest)


def test_two_optimizers_for_one_half_are_refused():
    with pytest.raises(ValueError, match=r"adamw=\{'b1': 0\.8\} and rest= are two optimizers for one half"):
        made(rest=RESTS["lion"], adamw={"b1": 0.8})

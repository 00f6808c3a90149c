"""On a mesh of eight devices: the same updates as whole arrays give, and no matrix gathered on the way."""

import math
import re
from collections import Counter
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from optax.contrib import MuonDimensionNumbers

from muonclip.core import MatrixLayout
from muonclip.optax import QKProjection, muonclip, qk_clip, scale_by_muon

MODES = {"auto": AxisType.Auto, "explicit": AxisType.Explicit}


def mesh_of(mode, **axes):
    return jax.make_mesh(tuple(axes.values()), tuple(axes), axis_types=(MODES[mode],) * len(axes))


def normal(seed, *shape, dtype=np.float64):
    return np.random.default_rng(seed).normal(size=shape).astype(dtype)


def placed(tree, mesh, specs):
    return jax.tree.map(lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec)), tree, specs)


def told(mode, tree):
    """What the transformation has to be told."""
    return {"shardings": jax.tree.map(lambda x: x.sharding, tree)} if mode == "auto" else {}


def compiled(update, *arguments):
    return jax.jit(update).lower(*arguments).compile()


def collectives(program):
    """Of a compiled program: how many of each, and the elements that each kind brings to a device."""
    # Comments inside tuple shapes, /*index=5*/, would hide collectives of several operands.
    text = re.sub(r"/\*.*?\*/", "", program.as_text())
    found, elements = Counter(), Counter()
    for shapes, kind in re.findall(
        r"= (.*?) (all-to-all|all-gather|all-reduce|collective-permute|reduce-scatter)(?:-start)?\(", text
    ):
        found[kind] += 1
        sizes = [math.prod(map(int, filter(None, dims.split(",")))) for dims in re.findall(r"\[([\d,]*)\]", shapes)]
        elements[kind] += sum(sizes)
    return found, elements


@cache
def updates_of_whole_matrices():
    whole, tx = {str(i): normal(i, 256, 1024, dtype=np.float32) for i in range(16)}, scale_by_muon()
    return jax.jit(tx.update)(whole, tx.init(whole))[0]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("spec", [P("fsdp"), P(None, "fsdp")])
@pytest.mark.parametrize("count", [16, 13])
def test_two_all_to_alls_bring_whole_matrices_and_their_updates(mode, spec, count):
    mesh = mesh_of(mode, fsdp=8)
    whole = {str(i): normal(i, 256, 1024, dtype=np.float32) for i in range(count)}
    sharded = placed(whole, mesh, dict.fromkeys(whole, spec))
    tx = scale_by_muon(**told(mode, sharded))
    update = compiled(tx.update, sharded, tx.init(sharded))
    found, elements = collectives(update)
    assert found == {"all-to-all": 2}
    assert elements["all-to-all"] == 2 * 16 * 256 * 1024 // 8  # 13 are dealt out as 16
    updates, _ = update(sharded, tx.init(sharded))
    for name in whole:
        np.testing.assert_allclose(updates[name], updates_of_whole_matrices()[name], atol=1e-6)
        assert updates[name].sharding.is_equivalent_to(sharded[name].sharding, 2)


def test_optax_s_own_gathers_every_matrix():
    """So the parser sees what there is to see."""
    whole = {str(i): jnp.ones((256, 1024), jnp.float32) for i in range(16)}
    sharded = placed(whole, mesh_of("auto", fsdp=8), dict.fromkeys(whole, P("fsdp")))
    tx = optax.contrib.scale_by_muon(weight_dimension_numbers=dict.fromkeys(sharded, MuonDimensionNumbers()))
    found, elements = collectives(compiled(tx.update, sharded, tx.init(sharded)))
    assert found["all-gather"] > 100
    assert elements["all-gather"] > 20 * 2 * 16 * 256 * 1024 // 8


SHARDED = {
    # name: (shape, layout, mesh, spec, all-to-alls)
    "rows": ((24, 16), MuonDimensionNumbers(), dict(x=8), P("x"), 2),
    "columns": ((24, 16), MuonDimensionNumbers(), dict(x=8), P(None, "x"), 2),
    "rows and columns": ((24, 16), MuonDimensionNumbers(), dict(x=4, y=2), P("x", "y"), 4),
    "rows over two axes": ((24, 16), MuonDimensionNumbers(), dict(x=4, y=2), P(("x", "y")), 2),
    "an axis of the mesh to spare": ((24, 16), MuonDimensionNumbers(), dict(x=4, y=2), P(None, "x"), 2),
    "one device": ((24, 16), MuonDimensionNumbers(), dict(x=1), P("x"), 0),
    "replicated": ((24, 16), MuonDimensionNumbers(), dict(x=8), P(), 0),
    "experts": ((8, 24, 16), MuonDimensionNumbers(1, 2), dict(x=8), P("x"), 0),
    "experts and rows": ((8, 24, 16), MuonDimensionNumbers(1, 2), dict(x=4, y=2), P("x", "y"), 2),
    "layers": ((8, 12, 2, 4), MuonDimensionNumbers(1, (2, 3)), dict(x=8), P("x"), 0),
    "heads that are matrices": ((12, 8, 4), MuonDimensionNumbers(0, 2), dict(x=8), P(None, "x"), 0),
    "heads of one matrix": ((12, 8, 4), MuonDimensionNumbers(0, (1, 2)), dict(x=8), P(None, "x"), 2),
    "the inner of two output axes": ((12, 3, 8), MuonDimensionNumbers(0, (1, 2)), dict(x=8), P(None, None, "x"), 2),
    "rows of whole heads": ((32, 12), MatrixLayout(heads=(8,)), dict(x=4), P("x"), 0),
    "columns of whole heads": ((12, 32), MatrixLayout(transposed=True, heads=(8,)), dict(x=4), P(None, "x"), 0),
    "rows of halved heads": ((32, 12), MatrixLayout(heads=(4,)), dict(x=8), P("x"), 2),
    "blocks": ((48, 12), MatrixLayout(blocks=(32, 8, 8)), dict(x=8), P("x"), 2),
    "blocks of heads": ((48, 12), MatrixLayout(blocks=(32, 8, 8), heads=(8, 2, 2)), dict(x=2), P("x"), 2),
    "blocks, the other side": ((48, 16), MatrixLayout(blocks=(32, 8, 8)), dict(x=8), P(None, "x"), 2),
    "blocks repeated by head": (
        (48, 12),
        MatrixLayout(blocks=(2, 2, 2), repeats=8, heads=(8, 8, 4)),
        dict(x=4),
        P("x"),
        0,
    ),
    "repeats that make one matrix": (
        (48, 12),
        MatrixLayout(blocks=(2, 4), repeats=8, heads=(8, 1)),
        dict(x=4),
        P("x"),
        2,
    ),
    "experts' gate and up": ((8, 16, 12), MatrixLayout(batch_ndim=1, blocks=(8, 8)), dict(x=2, y=4), P("x", "y"), 2),
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("case", SHARDED)
def test_sharded_is_whole(case, mode):
    shape, layout, axes, spec, moves = SHARDED[case]
    whole = {"a": normal(0, *shape), "b": normal(1, *shape), "c": normal(2, *shape)}
    options = dict(weight_dimension_numbers=dict.fromkeys(whole, layout), adjust_lr_fn="match_rms_adamw")
    sharded = placed(whole, mesh_of(mode, **axes), dict.fromkeys(whole, spec))
    tx, plain = scale_by_muon(**options, **told(mode, sharded)), scale_by_muon(**options)
    update = compiled(tx.update, sharded, tx.init(sharded))
    found, _ = collectives(update)
    assert found == ({"all-to-all": moves} if moves else {})
    updates, _ = update(sharded, tx.init(sharded))
    expected, _ = jax.jit(plain.update)(whole, plain.init(whole))
    for name in whole:
        np.testing.assert_allclose(updates[name], expected[name], atol=1e-12)


def test_different_shardings_in_one_tree():
    mesh = mesh_of("explicit", x=4, y=2)
    whole = {"a": normal(0, 16, 24), "b": normal(1, 16, 24), "c": normal(2, 24, 16), "d": normal(3, 16, 24)}
    specs = {"a": P("x"), "b": P(None, "y"), "c": P("x", "y"), "d": P()}
    tx = scale_by_muon()
    sharded = placed(whole, mesh, specs)
    updates, _ = jax.jit(tx.update)(sharded, tx.init(sharded))
    expected, _ = jax.jit(tx.update)(whole, tx.init(whole))
    for name in whole:
        np.testing.assert_allclose(updates[name], expected[name], atol=1e-12)


def test_one_shape_read_in_two_ways():
    whole = {"a": normal(0, 8, 3, 5), "b": normal(1, 8, 3, 5)}
    numbers = {"a": MuonDimensionNumbers(2, (0, 1)), "b": MuonDimensionNumbers((1, 2), 0)}
    tx = scale_by_muon(weight_dimension_numbers=numbers)
    sharded = placed(whole, mesh_of("explicit", x=8), dict.fromkeys(whole, P("x")))
    updates, _ = jax.jit(tx.update)(sharded, tx.init(sharded))
    expected, _ = jax.jit(tx.update)(whole, tx.init(whole))
    for name in whole:
        np.testing.assert_allclose(updates[name], expected[name], atol=1e-12)


@pytest.mark.slow  # operation by operation
def test_outside_jit_arrays_tell_where_they_lie():
    sharded = placed({"a": normal(0, 16, 24)}, mesh_of("auto", x=8), {"a": P("x")})
    tx = scale_by_muon(**told("auto", sharded))
    state = tx.init(sharded)
    silent = scale_by_muon()
    one, _ = tx.update(sharded, state)
    other, _ = silent.update(sharded, state)
    np.testing.assert_array_equal(one["a"], other["a"])


def test_a_sharding_that_a_jitted_update_cannot_see_is_an_error():
    sharded = placed({"a": normal(0, 16, 24)}, mesh_of("auto", x=8), {"a": P("x")})
    with pytest.raises(ValueError, match=r"\['a'\] is sharded over the mesh axes \['x'\].*shardings=jax.tree.map"):
        scale_by_muon().init(sharded)
    scale_by_muon().init(placed({"a": normal(0, 16, 24)}, mesh_of("auto", x=8), {"a": P()}))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("shape", "spec"),
    [
        ((12, 8, 4), P("x", "y")),
        ((12, 8, 4), P(None, None, "x")),
        ((12, 32), P("x", "y")),
        ((12, 32), P(None, ("x", "y"))),
    ],
)
def test_the_clip_on_shards(mode, shape, spec):
    mesh = mesh_of(mode, x=4, y=2)
    whole = {"q": normal(0, *shape), "k": normal(1, *shape)}
    sharded = placed(whole, mesh, dict.fromkeys(whole, spec))
    tx = qk_clip(QKProjection.mha(q="q", k="k", num_heads=8), tau=10.0)
    maxima = jnp.asarray([1.0, 40, 90, 3, 1000, -1, 10, 11])

    def step(params, maxima):
        updates, _ = tx.update(jax.tree.map(jnp.zeros_like, params), tx.init(params), params, max_logits=maxima)
        return optax.apply_updates(params, updates)

    program = compiled(step, sharded, maxima)
    assert not collectives(program)[0]  # each device scales what it has
    expected = jax.jit(step)(whole, maxima)
    by_head = jax.device_put(maxima, NamedSharding(mesh, P("y")))  # as an attention whose heads are sharded leaves them
    for after in (program(sharded, maxima), jax.jit(step)(sharded, by_head)):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12), after, expected)


@pytest.mark.parametrize("mode", MODES)
def test_training_steps_of_muonclip(mode):
    """The same train step, whole and sharded FSDP-style with the heads over `tp`."""
    whole = {
        "embed": {"embedding": normal(9, 32, 16)},
        "attn": {"query": {"kernel": normal(0, 16, 4, 6)}, "key": {"kernel": normal(1, 16, 4, 6)}},
        "mlp": {"kernel": normal(2, 16, 16), "bias": normal(3, 16)},
    }
    specs = {
        "embed": {"embedding": P("fsdp")},
        "attn": {"query": {"kernel": P("fsdp", "tp")}, "key": {"kernel": P("fsdp", "tp")}},
        "mlp": {"kernel": P("fsdp", "tp"), "bias": P("fsdp")},
    }
    projections = {"attn": QKProjection.mha(q="attn/query", k="attn/key", num_heads=4)}

    def train(params, **options):
        tx = muonclip(0.1, qk_projections=projections, tau=5.0, **options)

        @jax.jit
        def step(params, state):
            gradients = jax.tree.map(jnp.sin, params)
            updates, state = tx.update(
                gradients, state, params, max_logits={"attn": jnp.asarray([1.0, 20.0, 5.0, 80.0], jnp.float32)}
            )
            return optax.apply_updates(params, updates), state

        state = tx.init(params)
        for _ in range(3):
            params, state = step(params, state)
        return params, state

    sharded = placed(whole, mesh_of(mode, fsdp=4, tp=2), specs)
    after, state = train(sharded, **told(mode, sharded))
    expected, expected_state = train(jax.tree.map(jnp.asarray, whole))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-10), after, expected)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-10), state, expected_state)
    for tree in (after, optax.tree.get(state, "ScaleByMuonState").mu):
        kernel = tree["attn"]["query"]["kernel"]
        assert kernel.sharding.is_equivalent_to(sharded["attn"]["query"]["kernel"].sharding, 3)

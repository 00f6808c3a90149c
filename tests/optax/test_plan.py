"""Who updates what: names, shapes and declared attentions against what a person would say; and when to ask."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optax.contrib import MuonDimensionNumbers

from muonclip.core import MatrixLayout
from muonclip.optax import HeadRows, QKProjection, muonclip, plan


def shapes(tree):
    return jax.tree.map(
        lambda shape: jax.ShapeDtypeStruct(shape, jnp.float32), tree, is_leaf=lambda x: isinstance(x, tuple)
    )


def uses(made):
    return {line.name: line.use for line in made.parameters}


FLAX = {
    "embed": {"embedding": (50, 12)},
    "pos_embedding": (64, 12),
    "layers_0": {
        "ln": {"scale": (12,), "bias": (12,)},
        "attn": {
            "query": {"kernel": (12, 4, 5), "bias": (4, 5)},
            "key": {"kernel": (12, 4, 5), "bias": (4, 5)},
            "value": {"kernel": (12, 4, 5), "bias": (4, 5)},
            "out": {"kernel": (4, 5, 12), "bias": (12,)},
        },
        "mlp": {"wi": {"kernel": (12, 40)}, "wo": {"kernel": (40, 12)}},
        "moe": {"router": {"kernel": (12, 8)}, "experts": {"wi": (8, 12, 20)}},
    },
    "head": {"kernel": (12, 50)},
}
FLAX_ATTENTION = {"0": QKProjection.mha(q="layers_0/attn/query", k="layers_0/attn/key", num_heads=4)}


def test_a_flax_model():
    made = plan(shapes(FLAX), qk_projections=FLAX_ATTENTION)
    muon = {line.name: line for line in made.parameters if line.use == "muon"}
    assert set(muon) == {
        *(f"layers_0/attn/{name}/kernel" for name in ("query", "key", "value", "out")),
        *(f"layers_0/mlp/{name}/kernel" for name in ("wi", "wo")),
        "layers_0/moe/router/kernel",
        "layers_0/moe/experts/wi",
    }
    assert muon["layers_0/attn/query/kernel"].layout == MuonDimensionNumbers(0, (1, 2))
    assert muon["layers_0/attn/out/kernel"].layout == MuonDimensionNumbers((0, 1), 2)
    assert muon["layers_0/moe/experts/wi"].layout == MuonDimensionNumbers(1, 2)
    decays = {line.name for line in made.parameters if line.decays}
    assert decays == set(muon) | {"embed/embedding", "pos_embedding", "head/kernel"}
    assert "layers_0/moe/experts/wi     8×12×20  muon    8 × (20×12)  experts" in str(made)


SCANNED = {
    "embed": {"embedding": (50, 12)},
    "decoder": {
        "layers": {
            "norm": {"scale": (3, 12)},
            "attention": {"query": {"kernel": (3, 12, 4, 5), "bias": (3, 4, 5)}, "key": {"kernel": (3, 12, 4, 5)}},
            "mlp": {"wi": {"kernel": (3, 12, 40), "bias": (3, 40)}, "experts": {"wo": (3, 8, 20, 12)}},
        },
        "norm": {"scale": (12,)},
    },
}


def test_scanned_layers_are_batches_and_their_stacked_biases_no_matrices():
    attention = QKProjection.mha(
        q="decoder/layers/attention/query", k="decoder/layers/attention/key", num_heads=4, layer_axis=0
    )
    made = {line.name: line for line in plan(shapes(SCANNED), qk_projections=[attention]).parameters}
    assert made["decoder/layers/norm/scale"].use == "adamw"
    assert not made["decoder/layers/norm/scale"].decays
    assert made["decoder/layers/mlp/wi/bias"].reason == "biases"
    assert made["decoder/layers/attention/query/bias"].use == "adamw"
    assert made["decoder/layers/attention/query/kernel"].layout == MuonDimensionNumbers(1, (2, 3))
    assert made["decoder/layers/mlp/wi/kernel"].layout == MuonDimensionNumbers(1, 2)
    assert made["decoder/layers/mlp/experts/wo"].layout == MuonDimensionNumbers(2, 3)


def test_a_stack_reaches_as_far_as_every_array_has_its_layers():
    """What only shares the root with it is no stack, whatever its shape; stacked vectors are no matrices."""
    tree = {"model": {**SCANNED, "decoder": {**SCANNED["decoder"], "last": {"query": {"kernel": (12, 4, 5)}}}}}
    tree["model"]["decoder"]["layers"]["dt"] = (3, 12)
    attention = QKProjection.mha(
        q="model/decoder/layers/attention/query", k="model/decoder/layers/attention/key", num_heads=4, layer_axis=0
    )
    with pytest.raises(ValueError, match=r"not known:\n  model/decoder/last/query/kernel \(12, 4, 5\)\nSay so"):
        plan(shapes(tree), qk_projections=[attention])
    del tree["model"]["decoder"]["last"]
    made = {line.name: line for line in plan(shapes(tree), qk_projections=[attention]).parameters}
    assert made["model/decoder/layers/dt"].reason == "vectors, stacked over layers"
    assert made["model/decoder/layers/mlp/wi/kernel"].layout == MuonDimensionNumbers(1, 2)


@pytest.mark.parametrize(
    ("shape", "parts", "layout"),
    [
        ((10, 72), [(0, 6), (24, 6)], MatrixLayout(transposed=True, blocks=(24, 24, 24))),
        ((10, 3, 4, 6), [(0, 6), (24, 6)], MatrixLayout(transposed=True, blocks=(24, 24, 24))),
        ((10, 72), [(0, 18), (6, 18)], MatrixLayout(transposed=True, blocks=(6, 6, 6), repeats=4)),
        ((10, 48), [(0, 6), (24, 6)], MatrixLayout(transposed=True, blocks=(24, 24))),
        ((10, 72), [(0, 6), (12, 18)], None),
    ],
)
def test_queries_and_keys_of_one_array_are_matrices_of_their_own(shape, parts, layout):
    query, key = (HeadRows("qkv/kernel", 4, 6, start, stride) for start, stride in parts)
    fused = QKProjection(4, query=(query,), key=(key,))
    if layout is None:
        with pytest.raises(ValueError, match="qkv/kernel"):
            plan(shapes({"qkv": {"kernel": shape}}), qk_projections=fused)
        return
    (line,) = plan(shapes({"qkv": {"kernel": shape}}), qk_projections=fused).parameters
    assert line.layout == layout


def test_queries_in_an_array_that_holds_more_have_to_be_declared():
    query = HeadRows("qkv", 4, 6, 0, 6)
    with pytest.raises(ValueError, match=r"not known:\n  qkv \(10, 48\)"):
        plan(shapes({"qkv": (10, 48)}), qk_projections=QKProjection(4, query_facing_shared=(query,)))


def test_the_latent_projections_are_one_matrix_each():
    latent = QKProjection.mla(q="q", kv="kv", num_heads=4, qk_nope_head_dim=6, qk_rope_head_dim=2, v_head_dim=5)
    made = plan(shapes({"q": (10, 32), "kv": (7, 44)}), qk_projections=latent)
    assert [line.layout for line in made.parameters] == [MuonDimensionNumbers(0, (1,))] * 2


def test_fused_gate_and_up_of_experts_are_two_matrices_each():
    made = plan(
        shapes({"experts": {"gate_up_proj": {"kernel": (8, 12, 40)}}, "experts_b": {"w13": {"weight": (8, 40, 12)}}})
    )
    assert [line.layout for line in made.parameters] == [
        MatrixLayout(1, True, (20, 20)),
        MatrixLayout(1, False, (20, 20)),
    ]


def test_what_is_not_known_is_asked_for():
    with pytest.raises(ValueError, match=r"not known:\n  decoder/layers/attention/key/kernel \(3, 12, 4, 5\)") as error:
        plan(shapes(SCANNED))
    assert "muon_weight_dimension_numbers=" in str(error.value)
    assert not any(word in str(error.value) for word in ("bias", "scale", "embedding"))


@pytest.mark.parametrize(
    ("name", "shape", "use"),
    [
        ("w", (6, 8), "muon"),
        ("bias", (6, 8), "adamw"),
        ("ln_1/scale", (6, 8), "adamw"),
        ("lm_head/kernel", (8, 99), "adamw"),
        ("logits_dense/kernel", (8, 99), "adamw"),
        ("blocks/3/attn/output/kernel", (6, 8), "muon"),
        ("wte", (99, 8), "adamw"),
        ("tok_emb", (99, 8), "adamw"),
        ("member/kernel", (6, 8), "muon"),
        ("conv/kernel", (3, 3, 4, 8), "muon"),
        ("conv1/weight", (8, 4, 3, 3), "muon"),
        ("gate_up_proj/kernel", (6, 16), "muon"),
    ],
)
def test_names(name, shape, use):
    tree = shape
    for part in reversed(name.split("/")):
        tree = {part: tree}
    assert uses(plan(shapes(tree))) == {name: use}


def test_a_head_is_recognised_by_the_embedding_s_shape_in_either_order():
    for shape in ((12, 50), (50, 12)):
        tree = {"embed": {"embedding": (50, 12)}, "to_vocabulary": shape, "block_0": {"mlp": {"w": (12, 50)}}}
        made = uses(plan(shapes(tree)))
        assert made["to_vocabulary"] == "adamw"
        assert made["block_0/mlp/w"] == "muon"


def test_layouts_follow_the_name_of_the_array():
    made = plan(shapes({"a": {"kernel": (6, 16)}, "b": {"weight": (16, 6)}, "gate_up_proj": {"kernel": (6, 16)}}))
    layouts = {line.name: line.layout for line in made.parameters}
    assert layouts["a/kernel"] == MatrixLayout(transposed=True)
    assert layouts["b/weight"] == MatrixLayout()
    assert layouts["gate_up_proj/kernel"] == MatrixLayout(transposed=True, blocks=(8, 8))


def test_declared_dimension_numbers_decide_alone():
    tree = {"a": {"kernel": (6, 4, 2), "bias": (4, 2)}, "m": (6, 8), "n": (6, 8)}
    numbers = {"a": {"kernel": MuonDimensionNumbers(0, (1, 2)), "bias": None}, "m": None, "n": MatrixLayout()}
    for given in (numbers, lambda params: numbers):
        made = {line.name: line for line in plan(shapes(tree), given).parameters}
        assert [made[name].use for name in ("a/kernel", "a/bias", "m", "n")] == ["muon", "adamw", "adamw", "muon"]
        assert not made["a/bias"].decays
        assert made["m"].decays


def test_a_prefix_of_the_tree_is_enough():
    tree = {"a": {"x": (6, 8), "y": (8, 6)}, "b": (4,)}
    assert uses(plan(shapes(tree), {"a": MatrixLayout(), "b": None})) == {"a/x": "muon", "a/y": "muon", "b": "adamw"}
    with pytest.raises(ValueError, match="says nothing of 'b'"):
        plan(shapes(tree), {"a": MatrixLayout()})
    with pytest.raises(ValueError, match=r"'a/x': shape .* has no matrix"):
        plan(shapes(tree), {"a": MatrixLayout(batch_ndim=1), "b": None})


def test_the_plan_is_what_muonclip_does():
    """Zero gradients: only what decays moves, and only by its own rate."""
    params = jax.tree.map(lambda leaf: jnp.ones(leaf.shape), shapes(FLAX))
    tx = muonclip(0.5, weight_decay=0.1, qk_projections=FLAX_ATTENTION, adamw=dict(learning_rate=0.25))
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates, _ = jax.jit(tx.update)(zeros, tx.init(params), params, max_logits={"0": jnp.ones(4)})
    after = optax.apply_updates(params, updates)
    made = plan(params, qk_projections=FLAX_ATTENTION)
    expected = made.tree(params, lambda line: 1 - 0.1 * (0.5 if line.use == "muon" else 0.25) if line.decays else 1.0)
    jax.tree.map(lambda a, e: np.testing.assert_allclose(a, np.full(a.shape, e), rtol=1e-6), after, expected)


def test_a_decay_mask_replaces_the_default():
    params = {"w": jnp.ones((4, 6)), "b": jnp.ones(6)}
    tx = muonclip(0.5, qk_projections=None, weight_decay_mask={"w": False, "b": True})
    updates, _ = tx.update(jax.tree.map(jnp.zeros_like, params), tx.init(params), params)
    assert not updates["w"].any()
    np.testing.assert_allclose(updates["b"], -0.05, rtol=1e-6)

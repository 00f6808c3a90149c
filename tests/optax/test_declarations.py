"""Declarations of attentions: errors where the shapes tell that one is wrong, the right columns elsewhere."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from muonclip.optax import HeadRows, QKProjection, muonclip, plan, qk_clip

D, H, G, W = 10, 4, 2, 6
mha, gqa = QKProjection.mha, QKProjection.gqa


def of(q, k, leaf=""):
    made = {name: np.random.default_rng(sum(shape)).normal(size=shape) for name, shape in (("q", q), ("k", k))}
    return {name: {leaf: value} for name, value in made.items()} if leaf else made


@pytest.mark.parametrize(
    ("params", "projection", "message"),
    [
        (of((D, H, W), (D, G, W)), mha(q="q", k="k", num_heads=H), "4 heads"),
        (
            of((D, H * W), (D, G * W), "kernel"),
            mha(q="q", k="k", num_heads=H),
            "query of 6 outputs .* in 'q' and a key of 3",
        ),
        (of((D, H, W), (D, H, W)), gqa(q="q", k="k", num_heads=H, num_kv_heads=G), "2 heads in no leading axes"),
        (of((D, H * W), (D, H * W), "w"), gqa(q="q", k="k", num_heads=H, num_kv_heads=G), "6 outputs .* 12 in 'k'"),
        (of((D, H, W), (D, G, W)), gqa(q="q", k="keys", num_heads=H, num_kv_heads=G), "no parameter at 'keys'"),
        (of((H * W, 8), (H * W, 8)), mha(q="q", k="k", num_heads=H), r"whichever of the axes \[0, 1\]"),
        (of((H * W, D), (H * W, D), "weight"), mha(q="q", k="k", num_heads=H, in_axis=0), "a `weight` is"),
        (of((D, H, W), (D, H, W)), mha(q="q", k="k", num_heads=H, in_axis=-1), "no leading axes"),
        (of((D, H, W), (D, H, W)), mha(q="q", k="k", num_heads=H, in_axis=3), "in_axis=3 does not exist"),
        (of((H, D, W), (H, D, W)), mha(q="q", k="k", num_heads=H, in_axis=0), "no leading axes"),
        (of((H, D, W), (H, D, W)), mha(q="q", k="k", num_heads=H), "whichever"),
        (of((D, W, H), (D, W, H)), mha(q="q", k="k", num_heads=H), "no leading axes"),
        (of((3, D, H, W), (3, D, H, W)), mha(q="q", k="k", num_heads=H), "layer_axis"),
        (of((3, D, H * W), (3, D, H * W), "kernel"), mha(q="q", k="k", num_heads=H), "layer_axis"),
        (of((D, H, W), (D, H, W)), mha(q="q", k="k", num_heads=H, in_axis=0, heads_last=True), "no last axes"),
        (
            {"qkv": np.ones((D, 3 * H * W))},
            mha(q="qkv", k="qkv", num_heads=H),
            "share 72 outputs of 'qkv'.*QKProjection.fused",
        ),
        (
            {"qkv": np.ones((D, (H + 2 * G) * W))},
            gqa(q="qkv", k="qkv", num_heads=H, num_kv_heads=G),
            "rows",
        ),
        (
            of((D, H * 9), (D, H * 11)),
            QKProjection.mla(q="q", kv="k", num_heads=H, qk_nope_head_dim=6, qk_rope_head_dim=3, v_head_dim=4),
            "have 40 rows in all",
        ),
        (
            of((D, H * 9), (D, H * 11)),
            QKProjection.mla(q="q", kv="k", num_heads=H, qk_nope_head_dim=6, qk_rope_head_dim=2, v_head_dim=5),
            "have 32 rows in all",
        ),
    ],
)
def test_a_declaration_that_the_shapes_contradict_is_an_error_at_init(params, projection, message):
    with pytest.raises(ValueError, match=message):
        qk_clip({"attn": projection}).init(params)


@pytest.mark.parametrize(
    ("shape", "leaf", "in_axis", "axis"),
    [
        ((D, H, W), "", None, 1),
        ((H, D, W), "", 1, 0),
        ((H, W, D), "", -1, 0),
        ((H * W, D), "weight", None, 0),
        ((H * W, D), "", -1, 0),
        ((D, H * W), "kernel", None, 1),
        ((7, H * W), "", None, 1),
        ((D, W, H), "", None, 2),
        ((D, W, H), "kernel", 0, 2),
    ],
)
def test_the_rows_of_the_loud_head_are_scaled_and_no_others(shape, leaf, in_axis, axis):
    params = of(shape, shape, leaf)
    # Both axes of the output may be heads: which they are is declared.
    last = shape[-1] == H and axis == 2
    tx = qk_clip(mha(q="q", k="k", num_heads=H, in_axis=in_axis, heads_last=last))
    loud = np.full(H, 1.0)
    loud[2] = 400.0
    updates, _ = tx.update(jax.tree.map(np.zeros_like, params), tx.init(params), params, max_logits=jnp.asarray(loud))
    factor = np.where(np.arange(H) == 2, 0.5, 1.0).repeat(1 if shape[axis] == H else W)
    for old, change in zip(jax.tree.leaves(params), jax.tree.leaves(updates), strict=True):
        np.testing.assert_allclose(
            old + change, old * np.expand_dims(factor, [i for i in range(old.ndim) if i != axis])
        )


def test_a_head_axis_in_front_of_the_input_makes_muon_s_matrix_of_the_other_two():
    (line, _) = plan(of((H, D, W), (H, D, W)), qk_projections=mha(q="q", k="k", num_heads=H, in_axis=1)).parameters
    assert (line.layout.reduction_axis, line.layout.output_axis) == (1, (0, 2))


def test_heads_that_run_fastest_share_grouped_keys_and_are_flattened():
    params = of((D, W * H), (D, W, G), "kernel")
    tx = qk_clip(gqa(q="q", k="k", num_heads=H, num_kv_heads=G, heads_last=True))
    maxima = jnp.asarray([1.0, 1.0, 400.0, 1.0])
    updates, _ = tx.update(jax.tree.map(np.zeros_like, params), tx.init(params), params, max_logits=maxima)
    query = (params["q"]["kernel"] + updates["q"]["kernel"]).reshape(D, W, H) / params["q"]["kernel"].reshape(D, W, H)
    np.testing.assert_allclose(query, np.broadcast_to([1, 1, 0.25, 1], (D, W, H)), rtol=1e-6)
    assert not updates["k"]["kernel"].any()
    (line, _) = plan(of((D, W, H), (D, W, G)), qk_projections=gqa(
        q="q", k="k", num_heads=H, num_kv_heads=G, heads_last=True
    )).parameters  # fmt: skip
    assert (line.layout.reduction_axis, line.layout.output_axis) == (0, (1, 2))
    with pytest.raises(ValueError, match="'q': stride=4 has no meaning with heads_last"):
        HeadRows("q", H, 2, stride=4, heads_last=True)


ADAPTED = {
    "q": {"kernel": (D, H * W), "lora": {"lora_a": (D, 2), "lora_b": (2, H * W)}},
    "k": {"kernel": (D, H * W), "lora_a": (D, 3), "lora_b": (3, H * W)},
}


def adapted():
    rng = np.random.default_rng(1)
    return jax.tree.map(lambda shape: jnp.asarray(rng.normal(size=shape)), ADAPTED, is_leaf=lambda x: type(x) is tuple)


def product(part):
    part = jax.tree.map(np.asarray, part)
    adapter = part.get("lora", part)
    return (part["kernel"] + adapter["lora_a"] @ adapter["lora_b"]).reshape(D, H, W)


def logits(params):
    q, k = (np.einsum("ti,ihd->htd", np.random.default_rng(2).normal(size=(5, D)), product(params[n])) for n in "qk")
    return (q @ k.swapaxes(1, 2)).max((1, 2))


def clipped(tx, params, tau):
    tx = tx(qk_clip(mha(q="q", k="k", num_heads=H), tau))
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates, state = tx.update(zeros, tx.init(params), params, max_logits=jnp.asarray(logits(params)))
    return optax.apply_updates(params, updates), optax.tree.get(state, "QKClipState")


def test_base_and_adapter_are_scaled_together():
    params = adapted()
    tau = float(np.median(logits(params)))
    after, _ = clipped(lambda tx: tx, params, tau)
    np.testing.assert_allclose(logits(after), np.minimum(logits(params), tau))
    np.testing.assert_array_equal(after["q"]["lora"]["lora_a"], params["q"]["lora"]["lora_a"])
    with pytest.raises(ValueError, match="is adapted by 'q/lora/lora_a', and both make the same rows: declare 'q'"):
        qk_clip(mha(q="q/kernel", k="k", num_heads=H)).init(params)


@pytest.mark.parametrize("frozen", ["q", "k", "qk"])
def test_a_frozen_base_is_never_changed(frozen):
    """The other side takes all of the factor; where both are frozen, the loud heads are counted."""
    params = adapted()
    before = logits(params)
    tau = float(np.median(before))
    mask = jax.tree.map(lambda _: True, params)
    for name in frozen:
        mask[name]["kernel"] = False
    after, state = clipped(lambda tx: optax.masked(tx, mask), params, tau)
    for name in frozen:
        assert all(map(np.array_equal, jax.tree.leaves(after[name]), jax.tree.leaves(params[name])))
    both = frozen == "qk"
    np.testing.assert_allclose(logits(after), before if both else np.minimum(before, tau))
    assert state.frozen == (2 if both else 0)
    np.testing.assert_allclose(state.gamma, np.where(both, 1, np.minimum(1, tau / before)), rtol=1e-6)


def test_an_adapter_without_its_base_is_frozen():
    params = {name: {"lora_a": jnp.ones((D, 2)), "lora_b": jnp.ones((2, H * W))} for name in "qk"}
    tx = qk_clip(mha(q="q", k="k", num_heads=H))
    updates, state = tx.update(params, tx.init(params), params, max_logits=jnp.asarray([1.0, 101.0, 500.0, 7.0]))
    assert all(map(np.array_equal, jax.tree.leaves(updates), jax.tree.leaves(params)))
    assert (state.frozen, state.nonfinite, *state.gamma) == (2, 0, 1, 1, 1, 1)


def test_parts_that_share_no_heads_are_refused():
    with pytest.raises(ValueError, match="num_kv_heads=3 must divide num_heads=4"):
        QKProjection(H, query_facing_shared=(HeadRows("q", H),), shared_key=(HeadRows("k", 3),))
    for wrong in (0, -1, 1.5, "4", True, None):
        with pytest.raises(ValueError, match=f"'q': num_heads={wrong!r} must be a whole number"):
            HeadRows("q", wrong)
    for wrong in (0, -2, 2.0, "6"):
        with pytest.raises(ValueError, match=f"'q': stride={wrong!r} must"):
            HeadRows("q", 4, 2, stride=wrong)


def test_the_clip_s_state_is_found_by_its_type_whatever_parameters_are_called():
    params = of((D, H * W), (D, H * W)) | {"gamma": jnp.ones(3)}
    tx = muonclip(0.1, qk_projections={"attn": mha(q="q", k="k", num_heads=H)})
    state = tx.init(params)
    with pytest.raises(KeyError):
        optax.tree.get(state, "gamma")
    assert optax.tree.get(state, "QKClipState").gamma["attn"].shape == (H,)


FUSED = {
    H: QKProjection(H, query=(HeadRows("a/qkv", H, W, 0, W),), key=(HeadRows("a/qkv", H, W, H * W, W),)),
    G: QKProjection(
        H, query_facing_shared=(HeadRows("a/qkv", H, W, 0, W),), shared_key=(HeadRows("a/qkv", G, W, H * W, W),)
    ),
}


@pytest.mark.parametrize("groups", FUSED)
@pytest.mark.parametrize(("array", "layer_axis"), [("kernel", None), ("weight", None), ("kernel", 0)])
def test_one_call_declares_a_fused_array(groups, array, layer_axis):
    outputs = (H + 2 * groups) * W
    shape = (outputs, D) if array == "weight" else (D, outputs)
    lead = () if layer_axis is None else (3,)
    arrays = {array: np.random.default_rng(0).normal(size=(*lead, *shape)), "bias": np.ones((*lead, outputs))}
    params = {"a": {"qkv": arrays}}
    options = dict(num_heads=H, num_kv_heads=groups, head_dim=W, layer_axis=layer_axis)
    fused = {"a": QKProjection.fused("a/qkv", **options)}
    layout = next(line.layout for line in plan(params, qk_projections=fused).parameters if line.name.endswith(array))
    assert layout.blocks == (H * W, groups * W, groups * W)
    maxima = np.array([400.0, 50.0, 100.0, 200.0])
    gamma = np.minimum(1, 100 / maxima)
    tx = qk_clip(fused)
    zeros, maxima = jax.tree.map(np.zeros_like, params), np.broadcast_to(maxima, (*lead, H))
    updates, _ = tx.update(zeros, tx.init(params), params, max_logits={"a": maxima})
    new = optax.apply_updates(params, updates)["a"]["qkv"]
    per_row = np.ones(outputs)
    per_row[: H * W] = np.repeat(gamma if groups == G else np.sqrt(gamma), W)
    if groups == H:
        per_row[H * W : 2 * H * W] = np.repeat(np.sqrt(gamma), W)
    of_rows = per_row[:, None] if array == "weight" else per_row
    np.testing.assert_allclose(new[array], of_rows * arrays[array], rtol=1e-6)
    np.testing.assert_allclose(new["bias"], per_row * arrays["bias"], rtol=1e-6)
    if layer_axis is None:  # the same as part by part
        by_parts, _ = qk_clip({"a": FUSED[groups]}).update(zeros, tx.init(params), params, max_logits={"a": maxima})
        jax.tree.map(np.testing.assert_array_equal, by_parts, updates)


def test_a_fused_array_of_another_number_of_outputs_is_refused_and_wrong_ways_lead_to_it():
    params = {"qkv": np.ones((D, (H + 2 * G) * W))}
    for options in (dict(num_kv_heads=1), {}, dict(num_kv_heads=G, v_head_dim=W + 1)):
        with pytest.raises(ValueError, match=r"heads that are declared have .* rows in all"):
            qk_clip({"attn": QKProjection.fused("qkv", num_heads=H, head_dim=W, **options)}).init(params)
    with pytest.raises(ValueError, match=r"'a/qkv' has rows for 2 heads.*QKProjection.fused\(path"):
        QKProjection(H, query=FUSED[G].query_facing_shared, key=FUSED[G].shared_key)
    half = {"a": QKProjection(H, query_facing_shared=FUSED[G].query_facing_shared)}
    with pytest.raises(ValueError, match=r"a/qkv .*Declare its keys too, by shared_key= or QKProjection.fused"):
        plan({"a": params}, qk_projections=half)
    reasons = [line.reason for line in plan({"a": params}).parameters]
    assert reasons == ["fused q, k, v taken as one matrix: declare the attention, which splits it"]
    off_by_one = QKProjection(
        H, query_facing_shared=(HeadRows("qkv", H, W, 1, W),), shared_key=(HeadRows("qkv", G, W, H * W, W),)
    )
    with pytest.raises(ValueError, match="share 1 outputs of 'qkv'"):
        qk_clip({"attn": off_by_one}).init(params)

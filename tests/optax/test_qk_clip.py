"""qk_clip: after it every head's logits are at min(S, τ), in every layout of a kernel; and what it refuses."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from muonclip.optax import HeadRows, QKProjection, accumulate, qk_clip
from muonclip.optax.head_rows import RowsOfArray

D, H, G, W = 10, 6, 2, 4  # model width, query heads, key heads, head width: no two products of them are equal


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape)


def maxima(q, k):
    """q [T, H, d], k [T, G, d] → [H], dense."""
    k = np.repeat(k, q.shape[1] // k.shape[1], axis=1)
    return np.einsum("thd,shd->hts", q, k).max((1, 2)) / np.sqrt(q.shape[-1])


def clip(projections, params, updates, max_logits, **options):
    """The parameters after one step of the clip alone."""
    tx = qk_clip(projections, **options)
    clipped, state = jax.jit(lambda u, s, p, m: tx.update(u, s, p, max_logits=m))(
        updates, tx.init(params), params, max_logits
    )
    return optax.apply_updates(params, clipped), state


# How a kernel [in, heads, width] of rows is stored → (store, read back, in_axis).
STORES = {
    "in_heads_width": (lambda w: w, lambda w, h: w, 0),
    "in_rows": (lambda w: w.reshape(len(w), -1), lambda w, h: w.reshape(len(w), h, -1), 0),
    "rows_in": (lambda w: w.reshape(len(w), -1).T, lambda w, h: w.T.reshape(w.shape[1], h, -1), -1),
    "heads_width_in": (lambda w: w.transpose(1, 2, 0), lambda w, h: w.transpose(2, 0, 1), -1),
}


@settings(max_examples=30)
@given(
    kind=st.sampled_from(["mha", "gqa", "mqa"]),
    store=st.sampled_from(list(STORES)),
    tau=st.floats(0.3, 60),
    alpha=st.floats(0, 1),
    scale=st.floats(0.2, 5),
    bias=st.booleans(),
    seed=st.integers(0, 10**6),
)
def test_every_head_ends_at_min_of_maximum_and_tau(kind, store, tau, alpha, scale, bias, seed):
    write, read, in_axis = STORES[store]
    kv = {"mha": H, "gqa": G, "mqa": 1}[kind]
    x = normal(seed, 7, D)
    made = {"q": scale * normal(seed + 1, D, H, W), "k": scale * normal(seed + 2, D, kv, W)}
    biases = {"q": normal(seed + 3, H, W), "k": normal(seed + 4, kv, W)} if bias else {}
    made["q"][:, 2] *= 1e-5  # one quiet head at least
    biases and biases["q"].__setitem__(2, 0)
    params = {
        name: {"kernel": write(made[name])} | ({"bias": biases[name].reshape(-1)} if bias else {}) for name in made
    }
    projection = QKProjection.gqa(q="q", k="k", num_heads=H, num_kv_heads=kv, in_axis=in_axis)

    def measured(p):
        heads = {"q": H, "k": kv}
        q, k = (
            np.einsum("ti,ihd->thd", x, read(np.asarray(p[n]["kernel"]), heads[n]))
            + (np.asarray(p[n]["bias"]).reshape(heads[n], W) if bias else 0)
            for n in ("q", "k")
        )
        return maxima(q, k)

    before = measured(params)
    zeros = jax.tree.map(jnp.zeros_like, params)
    after, state = clip({"attn": projection}, params, zeros, {"attn": jnp.asarray(before)}, tau=tau, alpha=alpha)
    np.testing.assert_allclose(measured(after), np.minimum(before, tau), rtol=1e-9)
    np.testing.assert_allclose(state.gamma["attn"], np.minimum(1, tau / np.maximum(before, tau)), rtol=1e-6)
    quiet = before <= tau
    assert quiet[2]
    old, new = (read(np.asarray(p["q"]["kernel"]), H) for p in (params, after))
    np.testing.assert_array_equal(new[:, quiet], old[:, quiet])
    if kind != "mha":
        np.testing.assert_array_equal(after["k"]["kernel"], params["k"]["kernel"])  # the shared key is never touched


def test_multi_head_latent_attention():
    nope, rope, value, rank_q, rank_kv = 4, 2, 3, 5, 7
    latent_q, latent_kv, k_rope = normal(0, 9, rank_q), normal(1, 9, rank_kv), normal(2, 9, rope)
    params = {"q_b": {"kernel": normal(3, rank_q, H * (nope + rope))}, "kv_b": normal(4, H * (nope + value), rank_kv)}
    projection = QKProjection(
        H,
        query=(HeadRows("q_b", H, nope, 0, nope + rope, rows=H * (nope + rope)),),
        key=(HeadRows("kv_b", H, nope, 0, nope + value, in_axis=-1),),
        query_facing_shared=(HeadRows("q_b", H, rope, nope, nope + rope),),
    )
    assert (
        projection.query
        == QKProjection.mla(
            q="q_b", kv="", num_heads=H, qk_nope_head_dim=nope, qk_rope_head_dim=rope, v_head_dim=value
        ).query
    )

    def measured(p):
        q = (latent_q @ np.asarray(p["q_b"]["kernel"])).reshape(9, H, nope + rope)
        kv = (latent_kv @ np.asarray(p["kv_b"]).T).reshape(9, H, nope + value)
        return maxima(q, np.concatenate([kv[..., :nope], np.broadcast_to(k_rope[:, None], (9, H, rope))], -1))

    before = measured(params)
    tau = float(np.median(before))
    after, _ = clip(projection, params, jax.tree.map(jnp.zeros_like, params), jnp.asarray(before), tau=tau)
    np.testing.assert_allclose(measured(after), np.minimum(before, tau), rtol=1e-9)
    old, new = (np.asarray(p["kv_b"]).reshape(H, nope + value, rank_kv) for p in (params, after))
    np.testing.assert_array_equal(new[:, nope:], old[:, nope:])  # values
    np.testing.assert_array_equal(new[before <= tau], old[before <= tau])


@pytest.mark.parametrize("layer_axis", [0, 1])
def test_scanned_layers_have_a_factor_per_layer_and_head(layer_axis):
    layers, tau = 3, 8.0
    kernel, bias = normal(0, layers, D, H, W), normal(1, layers, H, W)
    stack = {"kernel": np.moveaxis(kernel, 0, layer_axis), "bias": np.moveaxis(bias, 0, layer_axis)}
    params = {"layers": {"q": stack, "k": {"kernel": np.moveaxis(normal(2, layers, D, H, W), 0, layer_axis)}}}
    projection = QKProjection.mha(q="layers/q", k="layers/k", num_heads=H, layer_axis=layer_axis)
    loud = np.full((layers, H), 2.0)
    loud[0, 1], loud[2, 5] = 32.0, 72.0
    after, state = clip(
        {"l": projection}, params, jax.tree.map(jnp.zeros_like, params), {"l": jnp.asarray(loud)}, tau=tau
    )
    root = np.sqrt(np.minimum(1, tau / loud))
    for name, old in stack.items():
        expected = np.moveaxis(old, layer_axis, 0) * root.reshape(layers, *([1] * (name == "kernel")), H, 1)
        np.testing.assert_allclose(np.moveaxis(np.asarray(after["layers"]["q"][name]), layer_axis, 0), expected)
    assert state.gamma["l"].shape == (layers, H)


def test_fused_weights():
    """q|k|v one behind the other, and interleaved by head: only the rows of the loud head's q and k change."""
    for stride, starts in ((W, (0, H * W)), (3 * W, (0, W))):
        rows = [HeadRows("qkv", H, W, start, stride) for start in starts]
        params = {"qkv": normal(0, D, 3 * H * W)}
        loud = np.full(H, 1.0)
        loud[4] = 400.0
        after, _ = clip(
            QKProjection(H, query=(rows[0],), key=(rows[1],)),
            params,
            {"qkv": jnp.zeros((D, 3 * H * W))},
            jnp.asarray(loud),
        )
        factors = np.ones(3 * H * W)
        for start in starts:
            factors[start + 4 * stride : start + 4 * stride + W] = 0.5
        np.testing.assert_allclose(after["qkv"], params["qkv"] * factors, rtol=1e-12)


MHA = {"attn": QKProjection.mha(q="q", k="k", num_heads=H)}


def params_of(dtype=np.float32):
    return {name: jnp.asarray(normal(i, D, H, W), dtype) for i, name in enumerate("qkv")}


def test_it_corrects_the_sum_of_parameters_and_updates():
    params = params_of()
    updates = {name: jnp.asarray(normal(9, D, H, W), jnp.float32) for name in params}
    after, _ = clip(MHA, params, updates, {"attn": jnp.full(H, 400.0)})
    for name, factor in (("q", 0.5), ("k", 0.5), ("v", 1.0)):
        np.testing.assert_allclose(after[name], factor * (params[name] + updates[name]), rtol=3e-6, atol=1e-7)


@pytest.mark.parametrize("tau", [41.0, 47.0, 55.0, 61.3])
def test_quiet_heads_hand_their_updates_on_bit_for_bit(tau):
    params = params_of()
    updates = {name: jnp.asarray(1e-3 * normal(9, D, H, W), jnp.float32) for name in params}
    tx = qk_clip(MHA, tau=tau)
    quiet = jnp.asarray([tau, tau - 1e-3, 0.0, -5.0, -jnp.inf, 2 * tau])
    clipped, _ = tx.update(updates, tx.init(params), params, max_logits={"attn": quiet})
    for name in params:
        np.testing.assert_array_equal(clipped[name][:, :5], updates[name][:, :5])
        assert (np.asarray(clipped[name][:, 5] != updates[name][:, 5]).all()) == (name != "v")


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_maximum_that_is_not_finite(bad):
    params, zeros = params_of(), jax.tree.map(jnp.zeros_like, params_of())
    tx = qk_clip(MHA)
    given = jnp.asarray([1.0, bad, 400.0, 1.0, -np.inf, bad])
    step = jax.jit(lambda s, given: tx.update(zeros, s, params, max_logits={"attn": given}))
    clipped, state = step(tx.init(params), given)
    assert int(state.nonfinite) == 2
    np.testing.assert_array_equal(state.gamma["attn"], [1, 1, 0.25, 1, 1, 1])
    assert np.isfinite(clipped["q"]).all()
    assert not clipped["q"][:, [0, 1, 3, 4, 5]].any()
    _, state = step(state, given)
    assert int(state.nonfinite) == 4
    with pytest.raises(ValueError, match=r"max_logits of attn is (nan|inf) at \(1\), \(5\)"):
        tx.update(zeros, state, params, max_logits={"attn": given})


@pytest.mark.parametrize(("dtype", "rtol"), [(jnp.float32, 1e-6), (jnp.bfloat16, 1e-2), (jnp.float16, 1e-3)])
def test_it_is_exact_to_the_rounding_of_the_parameters(dtype, rtol):
    params = params_of(dtype)
    zeros = jax.tree.map(jnp.zeros_like, params)
    loud = np.random.default_rng(0).uniform(100, 1000, H).astype(np.float32)
    after, state = clip(MHA, params, zeros, {"attn": jnp.asarray(loud)})
    smallest = 0 if dtype == jnp.float32 else 0.25  # ½ of the queries and ½ of the keys
    np.testing.assert_allclose(state.gamma["attn"], np.maximum(100 / loud, smallest), rtol=1e-6)
    for name in "qk":
        assert after[name].dtype == dtype
        exact = np.asarray(params[name], np.float64) * np.sqrt(np.asarray(state.gamma["attn"], np.float64))[:, None]
        np.testing.assert_allclose(np.asarray(after[name], np.float64), exact, rtol=rtol)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("kind", ["mha", "gqa"])
def test_a_strong_clip_of_narrow_weights_takes_as_many_steps_as_halves(dtype, kind):
    """Each step is the rounding of factor · (w + u), to the last bit, and the state says how much was applied."""
    kv = {"mha": H, "gqa": G}[kind]
    params = {"q": jnp.asarray(normal(0, D, H, W), dtype), "k": jnp.asarray(normal(1, D, kv, W), dtype)}
    tx = qk_clip(QKProjection.gqa(q="q", k="k", num_heads=H, num_kv_heads=kv))
    loud = jnp.asarray([50.0, 120.0, 390.0, 1000.0, 1e5, -np.inf], jnp.float32)
    updates = jax.tree.map(lambda p: (p.astype(jnp.float32) * 2**-7).astype(dtype), params)
    state, step = tx.init(params), jax.jit(tx.update)
    applied, seen = np.ones(H), []
    while not seen or seen[-1]:
        given, state = step(updates, state, params, max_logits=loud * applied)
        gamma = np.asarray(state.gamma, np.float64)
        factor = np.sqrt(gamma) if kind == "mha" else gamma
        moved = params["q"].astype(jnp.float32) + updates["q"].astype(jnp.float32)
        expected = np.asarray((jnp.asarray(factor, jnp.float32)[:, None] * moved).astype(dtype), np.float32)
        params = optax.apply_updates(params, given)
        off = np.abs(np.asarray(params["q"], np.float32)[:, 1:5] / expected[:, 1:5] - 1)
        assert given["q"].dtype == dtype
        assert off.max() <= 2 * float(jnp.finfo(dtype).eps), "a factor that differs by 1e-7 may round elsewhere"
        assert off.mean() < 1e-6
        applied, seen = applied * gamma, [*seen, int(state.unfinished)]
        updates = jax.tree.map(jnp.zeros_like, updates)
    np.testing.assert_allclose(applied, np.minimum(1, 100 / np.asarray(loud).clip(100)), rtol=1e-6)
    assert seen == ([2, 1, 1, 1, 0] if kind == "mha" else [3, 2, 2, 1, 1, 1, 1, 1, 1, 0])


def test_wide_updates_of_narrow_weights_carry_all_of_the_factor():
    params = params_of(jnp.bfloat16)
    tx = accumulate(qk_clip(MHA, wide_updates=True), 1)
    loud = {"attn": jnp.full(H, 1e6)}
    given, state = jax.jit(tx.update)(jax.tree.map(jnp.zeros_like, params), tx.init(params), params, max_logits=loud)
    after = optax.apply_updates(params, given)
    assert (given["q"].dtype, after["q"].dtype, given["v"].dtype) == (jnp.float32, jnp.bfloat16, jnp.bfloat16)
    np.testing.assert_allclose(state.inner_state.gamma["attn"], 1e-4, rtol=1e-6)
    assert state.inner_state.unfinished == 0
    np.testing.assert_allclose(*(np.asarray(a, np.float64) for a in (after["q"], 0.01 * params["q"])), rtol=8e-3)


@pytest.mark.parametrize(
    ("tau", "alpha"),
    [(-5.0, 0.5), (0.0, 0.5), (np.nan, 0.5), (-np.inf, 0.5), (100.0, np.nan), (100.0, -0.1), (100.0, 1.5)],
)
def test_a_traced_setting_that_cannot_be_used_scales_nothing_and_is_counted(tau, alpha):
    params = params_of()
    updates = jax.tree.map(lambda p: 0.01 * p, params)
    loud = {"attn": jnp.asarray([1.0, 400.0, -jnp.inf, 200.0, 100.0, jnp.nan])}

    @jax.jit
    def step(tau, alpha):
        tx = qk_clip(MHA, tau, alpha)
        return tx.update(updates, tx.init(params), params, max_logits=loud)

    given, state = step(tau, alpha)
    assert all(np.array_equal(given[name], updates[name]) for name in params)
    np.testing.assert_array_equal(state.gamma["attn"], 1)
    assert state.nonfinite == H
    _, state = step(100.0, 0.5)
    np.testing.assert_allclose(state.gamma["attn"], [1, 0.25, 1, 0.5, 1, 1])
    assert state.nonfinite == 1


def test_tau_may_be_a_schedule_as_the_rate_is():
    params, loud = params_of(), {"attn": jnp.full(H, 400.0)}
    tx = qk_clip(MHA, optax.linear_schedule(400.0, 100.0, 3))
    state, step, gammas = tx.init(params), jax.jit(tx.update), []
    for _ in range(5):
        _, state = step(jax.tree.map(jnp.zeros_like, params), state, params, max_logits=loud)
        gammas.append(float(state.gamma["attn"][0]))
    np.testing.assert_allclose(gammas, [1, 0.75, 0.5, 0.25, 0.25], rtol=1e-6)


def test_each_attention_has_its_own_tau():
    """By patterns of names, numbers and schedules; the first that fits counts."""
    names = ("text/0", "vision/0", "vision/1")
    projections = {n: QKProjection.mha(q=f"{n}/q", k=f"{n}/k", num_heads=2, in_axis=0) for n in names}
    params = {f"{n}/{side}": {"kernel": normal(3, D, 2, W)} for n in names for side in "qk"}
    updates = jax.tree.map(jnp.zeros_like, params)
    largest = dict.fromkeys(names, jnp.full(2, 8.0))
    tau = {"vision/1": 4.0, "vision/*": lambda step: 2.0 + step, "*": 8.0}
    tx = qk_clip(projections, tau)
    update = jax.jit(lambda u, s, p, m: tx.update(u, s, p, max_logits=m))
    state = tx.init(params)
    for expected in ((1.0, 2 / 8, 4 / 8), (1.0, 3 / 8, 4 / 8)):
        clipped, state = update(updates, state, params, largest)
        for name, gamma in zip(names, expected, strict=True):
            np.testing.assert_allclose(state.gamma[name], gamma, rtol=1e-6)
            for side in "qk":
                now = params[f"{name}/{side}"]["kernel"] + clipped[f"{name}/{side}"]["kernel"]
                np.testing.assert_allclose(now, gamma**0.5 * params[f"{name}/{side}"]["kernel"], rtol=1e-5)
    alone, _ = clip(projections, params, updates, largest, tau={"*": 3.0})
    number, _ = clip(projections, params, updates, largest, tau=3.0)
    assert all(map(np.array_equal, jax.tree.leaves(alone), jax.tree.leaves(number)))


@pytest.mark.parametrize(
    ("tau", "words"),
    [({"b": 1.0, "*": 2.0}, "tau names 'b'"), ({"a": 0.0}, r"tau\['a'\]=0\.0 must be positive"), ({}, "tau is empty")],
)
def test_a_tau_that_fits_no_attention_is_refused(tau, words):
    projection = QKProjection.mha(q="q", k="k", num_heads=2)
    with pytest.raises(ValueError, match=words):
        qk_clip({"a": projection}, tau)
    with pytest.raises(ValueError, match="says nothing of the attention 'c'"):
        qk_clip({"a": projection, "c": projection}, {"a": 1.0})


def test_a_reason_only_observes():
    params = params_of()
    zeros = jax.tree.map(jnp.zeros_like, params)
    declared = QKProjection.mha(q="q", k="k", num_heads=H)
    for quiet in (QKProjection(H, reason="QK-norm"), dataclasses.replace(declared, reason="QK-norm")):
        after, state = clip({"a": quiet}, params, zeros, {"a": jnp.full(H, 1e4)})
        np.testing.assert_array_equal(after["q"], params["q"])
        np.testing.assert_array_equal(after["k"], params["k"])
        np.testing.assert_array_equal(state.gamma["a"], np.ones(H))


def update(projections, **arguments):
    params, tx = params_of(), qk_clip(projections)
    return tx.update(jax.tree.map(jnp.zeros_like, params), tx.init(params), **{"params": params, **arguments})


def test_a_missing_maximum_is_a_type_error():
    with pytest.raises(TypeError, match="max_logits"):
        update(MHA)


@pytest.mark.parametrize(
    ("projections", "arguments", "message"),
    [
        (MHA, dict(params=None, max_logits={"attn": np.ones(H)}), "params"),
        (MHA, dict(max_logits={"attention": np.ones(H)}), "Extra: 'attention'; missing: 'attn'. Hand on"),
        (MHA, dict(max_logits=[np.ones(H)]), "Extra: '0'; missing: 'attn'"),
        (MHA, dict(max_logits={}), "Missing: 'attn'. Name the declarations .* Nothing was sown"),
        (MHA, dict(max_logits={"attn": np.ones(H + 1)}), r"max_logits of attn has shape \(7,\), not \(6,\)"),
        (MHA, dict(max_logits={"attn": np.ones((2, H))}), r"shape \(2, 6\), not \(6,\)"),
        (
            {"attn": QKProjection.mha(q="query", k="k", num_heads=H)},
            {},
            r"no parameter at 'query'; there are\n  k\n  q\n",
        ),
        ({"attn": QKProjection.mha(q="q", k="k", num_heads=H - 1)}, {}, r"'q' has 24 rows: 5 heads"),
        ([MHA["attn"], QKProjection.mha(q="q", k="v", num_heads=H)], {}, "scale the same rows of 'q'"),
        ({}, {}, "declares no attention"),
        ({"attn": "q"}, {}, "'q' at 'attn', which is not a QKProjection"),
    ],
)
def test_what_does_not_fit_is_an_error(projections, arguments, message):
    with pytest.raises(ValueError, match=message):
        update(projections, **arguments)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: qk_clip(MHA, tau=0.0), "tau=0.0 must be positive"),
        (lambda: qk_clip(MHA, alpha=1.5), r"alpha=1.5 must be in \[0, 1\]"),
        (lambda: QKProjection(H), "needs `query` and `key`"),
        (lambda: QKProjection(H, query=(HeadRows("q", 3),)), "'q' has rows for 3 heads, the attention has 6"),
        (lambda: QKProjection.gqa(q="q", k="k", num_heads=6, num_kv_heads=4), "num_kv_heads=4 must divide"),
        (lambda: HeadRows("q", 2, in_axis="in"), "'q': in_axis='in' must be a whole number"),
        (lambda: HeadRows("q", 0), "num_heads"),
        (
            lambda: QKProjection(1, query=(HeadRows("q", 1, layer_axis=0),), key=(HeadRows("k", 1),)),
            "some parts stack layers",
        ),
        (lambda: accumulate(optax.sgd(1.0), 0), "every=0 must be a whole number of at least 1"),
    ],
)
def test_wrong_declarations_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_an_array_beside_the_kernel_that_is_no_bias_is_refused():
    params = {"q": {"kernel": jnp.ones((D, H, W)), "lora_a": jnp.ones((D, 3))}, "k": jnp.ones((D, H, W))}
    with pytest.raises(ValueError, match=r"'q' holds 'q/lora_a' of shape .*, which is neither a kernel nor a bias"):
        qk_clip(MHA).init(params)


def test_factors_spread_over_any_layout():
    part = RowsOfArray("w", np.array([[1, 2], [4, 5]]), 1, (3, 6), 0)
    factors = jnp.asarray([[2.0, 3.0], [5.0, 7.0]])  # two layers, two heads
    spread = np.broadcast_to(part.spread(factors), (3, 2, 6))
    np.testing.assert_array_equal(spread[0], [[1, 2, 2, 1, 3, 3], [1, 5, 5, 1, 7, 7]])

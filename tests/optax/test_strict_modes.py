"""Training under JAX's strict modes: no dtype and no rank is promoted in silence."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from muonclip.optax import QKProjection, accumulate, exact_max_logits, qk_clip, scale_by_muon

PROJECTIONS = {"attn": QKProjection.gqa(q="q/kernel", k="k/kernel", num_heads=2, num_kv_heads=1)}
SHAPES = {"q": {"kernel": (6, 8)}, "k": {"kernel": (6, 4), "bias": (4,)}, "v": {"kernel": (6, 4)}}


def trained(dtype):
    rng = np.random.default_rng(0)
    is_shape = dict(is_leaf=lambda x: isinstance(x, tuple))
    params = jax.tree.map(lambda shape: jnp.asarray(rng.normal(size=shape), dtype), SHAPES, **is_shape)
    x = jnp.asarray(rng.normal(size=(2, 5, 6)), dtype)
    options = dict(is_causal=True, local_window_size=3, key_value_seq_lengths=jnp.asarray([5, 3], jnp.int32))

    def loss(params):
        q, k, v = ((x @ params[name]["kernel"]).reshape(2, 5, -1, 4) for name in "qkv")
        k = k + params["k"]["bias"][None, None, None]
        weights = jax.nn.softmax(jnp.einsum("bthd,bsgd->bhts", q, k))  # JAX's own attention promotes bfloat16
        y = jnp.einsum("bhts,bsgd->bthd", weights, v)
        return jnp.square(y.astype(jnp.float32)).mean(), {"attn": exact_max_logits(q, k, **options)}

    muon = optax.masked(scale_by_muon(mu_dtype=jnp.float32), jax.tree.map(lambda each: each.ndim == 2, params))
    tx = accumulate(optax.chain(muon, optax.scale(-0.1), qk_clip(PROJECTIONS, 1e-3)), every=2)
    state = tx.init(params)

    @jax.jit
    def step(params, state):
        gradients, maxima = jax.grad(loss, has_aux=True)(params)
        updates, state = tx.update(gradients, state, params, max_logits=maxima)
        return optax.apply_updates(params, updates), state

    gamma = []
    for _ in range(4):
        params, state = step(params, state)
        gamma.append(optax.tree.get(state, "QKClipState").gamma["attn"].min())
    return params, gamma


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_training_is_the_same_where_nothing_is_promoted(dtype):
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        strict, gamma = trained(dtype)
    assert min(gamma) < 1
    for mine, expected in zip(jax.tree.leaves(strict), jax.tree.leaves(trained(dtype)[0]), strict=True):
        assert mine.dtype == dtype
        assert (mine == expected).all()

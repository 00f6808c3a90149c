"""`check` passes what is declared right and names what is not, where shapes cannot tell."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from muonclip.optax import QKProjection, check, exact_max_logits

D, H, G, W = 8, 4, 2, 4
RNG = np.random.default_rng(0)
BATCH = RNG.normal(size=(2, 5, D))


def model(kv, norm=False, heads_last=False):
    """One attention, whose kernels [in, heads · width] may be read [heads, width] or [width, heads]."""

    def apply(params, x):
        q, k = (jnp.einsum("bti,io->bto", x.astype(w.dtype), w) for w in (params["q"]["w"], params["k"]["w"]))
        q, k = (
            (y.reshape(*y.shape[:2], W, n).swapaxes(2, 3) if heads_last else y.reshape(*y.shape[:2], n, W))
            for y, n in ((q, H), (k, kv))
        )
        if norm:
            q = q / jnp.linalg.norm(q, axis=-1, keepdims=True)
        y = jax.nn.dot_product_attention(q, k, k * 0 + jnp.arange(5.0)[:, None, None].astype(k.dtype))
        return jnp.einsum("bthd,thd->bt", y, params["out"]), {"attn": exact_max_logits(q, k)}

    return apply


def params(kv, dtype=np.float32):
    shapes = {"q": {"w": (D, H * W)}, "k": {"w": (D, kv * W)}, "out": (5, H, W)}
    return jax.tree.map(lambda s: jnp.asarray(RNG.normal(size=s), dtype), shapes, is_leaf=lambda s: type(s) is tuple)


def declared(kv):
    return {"attn": QKProjection.gqa(q="q", k="k", num_heads=H, num_kv_heads=kv)}


@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16])
@pytest.mark.parametrize("kv", [H, G])
def test_a_right_declaration_is_proven(kv, dtype):
    assert check(model(kv), params(kv, dtype), BATCH, declared(kv)) == ("attn",)
    zero = params(kv, dtype) | {"out": jnp.zeros((5, H, W), dtype)}
    assert check(model(kv), zero, BATCH, declared(kv)) == ("attn",)


@pytest.mark.parametrize(
    ("options", "projections", "message"),
    [
        (dict(heads_last=True), declared(H), "attn"),
        (dict(norm=True), declared(H), "QK-norm|is another"),
        ({}, {"attn": QKProjection.mha(q="k", k="q", num_heads=H)}, None),
        ({}, {"attn": QKProjection.mha(q="q", k="other", num_heads=H)}, "attn: with queries"),
    ],
)
def test_a_wrong_one_is_named(options, projections, message):
    arrays = params(H) | {"other": {"w": jnp.ones((D, H * W), np.float32)}}
    if message is None:  # a logit of queries and keys exchanged is scaled alike
        assert check(model(H, **options), arrays, BATCH, projections) == ("attn",)
        return
    with pytest.raises(ValueError, match=message):
        check(model(H, **options), arrays, BATCH, projections)

"""`check` compares maxima with the logits that enter the softmax, however that is written, and says where it cannot."""

import math
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from muonclip.optax import QKProjection, check, exact_max_logits

B, T, D, H, G, W, LAYERS = 2, 6, 8, 4, 2, 4, 2
CAUSAL = np.tril(np.ones((T, T), bool))
X = np.random.default_rng(0).normal(size=(B, T, D)).astype(np.float32)


def params(layers=None, dtype=np.float32):
    rng, lead = np.random.default_rng(1), () if layers is None else (layers,)
    shapes = {"q": {"kernel": (D, H * W)}, "k": {"kernel": (D, G * W)}, "v": {"kernel": (D, G * W)}}
    shapes |= {"out": {"kernel": (H * W, D)}}
    made = jax.tree.map(lambda s: rng.normal(size=(*lead, *s)), shapes, is_leaf=lambda s: type(s) is tuple)
    return jax.tree.map(lambda x: jnp.asarray(x, dtype), made)


def rotated(x):
    angles = jnp.arange(T)[:, None, None] * jnp.asarray([1.0, 0.1])
    even, odd = jnp.split(x, 2, -1)
    cos, sin = jnp.cos(angles).astype(x.dtype), jnp.sin(angles).astype(x.dtype)
    return jnp.concatenate([even * cos - odd * sin, even * sin + odd * cos], -1)


def logits_of(q, k):
    scores = jnp.einsum("bthd,bshd->bhts", q, jnp.repeat(k, H // G, 2)) / math.sqrt(W)
    return jnp.where(CAUSAL, scores, -1e30)


def weighted(weights, v):
    return jnp.einsum("bhts,bshd->bthd", weights, jnp.repeat(v, H // G, 2)).astype(v.dtype)


def by_jax(q, k, v):
    return jax.nn.dot_product_attention(q, k, v, is_causal=True)


def by_softmax(q, k, v):
    return weighted(jax.nn.softmax(logits_of(q, k)), v)


def by_log_sum_exp(q, k, v):
    scores = logits_of(q, k)
    return weighted(jnp.exp(scores - jax.nn.logsumexp(scores, -1, keepdims=True)), v)


def without_maximum(q, k, v):
    weights = jnp.exp(logits_of(q, k))
    return weighted(weights / weights.sum(-1, keepdims=True), v)


def heads_last(q, k, v):
    scores = jnp.moveaxis(logits_of(q, k), 1, -1)
    return weighted(jnp.moveaxis(jax.nn.softmax(scores, 2), -1, 1), v)


def by_vmap(q, k, v):
    def one(q, k, v):
        scores = jnp.where(CAUSAL, q @ k.T / math.sqrt(W), -jnp.inf)
        return jax.nn.softmax(scores) @ v

    over_heads = jax.vmap(one, (1, 1, 1), 1)
    return jax.vmap(over_heads)(q, jnp.repeat(k, H // G, 2), jnp.repeat(v, H // G, 2))


def in_blocks(q, k, v):
    """Keys two at a time, with a running maximum, as flash attention computes it."""
    blocks = jnp.moveaxis(logits_of(q, k).reshape(B, H, T, T // 2, 2), 3, 0)
    values = jnp.moveaxis(jnp.repeat(v, H // G, 2).reshape(B, T // 2, 2, H, W), 1, 0)

    def step(carry, block):
        highest, total, y = carry
        scores, value = block
        new = jnp.maximum(highest, scores.max(-1))
        weights, kept = jnp.exp(scores - new[..., None]), jnp.exp(highest - new)
        total = total * kept + weights.sum(-1)
        return (new, total, y * kept[..., None] + jnp.einsum("bhts,bshd->bhtd", weights, value)), None

    zero = jnp.zeros((B, H, T))
    (_, total, y), _ = jax.lax.scan(step, (zero - 1e30, zero, jnp.zeros((B, H, T, W))), (blocks, values))
    return jnp.moveaxis(y / total[..., None], 1, 2)


ATTENTIONS = [by_jax, by_softmax, by_log_sum_exp, without_maximum, heads_last, by_vmap, in_blocks]


def model(attention, measure=lambda q, k, *_: exact_max_logits(q, k, is_causal=True)):
    def layer(params, x):
        q, k, v = ((x @ params[n]["kernel"]).reshape(B, T, -1, W) for n in ("q", "k", "v"))
        bare = q, k
        q, k = rotated(q), rotated(k)
        y = attention(q, k, v).reshape(B, T, -1) @ params["out"]["kernel"]
        return x + y, measure(q, k, *bare)

    def apply(params, x):
        y, maxima = layer(params, x.astype(params["q"]["kernel"].dtype))
        return y, {"attn": maxima}

    apply.layer = layer
    return apply


def declared(**options):
    return {"attn": QKProjection.gqa(q="q", k="k", num_heads=H, num_kv_heads=G, **options)}


@pytest.mark.parametrize(("attention", "dtype"), [*((each, np.float32) for each in ATTENTIONS), (by_jax, jnp.bfloat16)])
def test_right_maxima_are_proven_however_the_softmax_is_written(attention, dtype):
    assert check(model(attention), params(dtype=dtype), X, declared()) == ("attn",)


WRONG = {
    "before RoPE": (lambda q, k, *bare: exact_max_logits(*bare, is_causal=True), "after RoPE"),
    "no mask": (lambda q, k, *_: exact_max_logits(q, k), "with its mask"),
    "no scale": (lambda q, k, *_: exact_max_logits(q, k, is_causal=True, scale=1.0), "they are 2 times the logits"),
    "key heads tiled": (
        lambda q, k, *_: exact_max_logits(q, jnp.tile(k, (1, 1, 2, 1)), is_causal=True),
        "in its order",
    ),
}


@pytest.mark.parametrize("attention", [by_jax, in_blocks])
@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_maxima_are_named_with_their_likely_cause(attention, wrong):
    measure, cause = WRONG[wrong]
    with pytest.raises(ValueError, match=f"attn: max_logits is .*{cause}"):
        check(model(attention, measure), params(), X, declared())


@pytest.mark.parametrize("wrong_at", [None, 1])
def test_layers_in_a_scan_are_compared_one_by_one(wrong_at):
    layer = jax.checkpoint(model(by_softmax).layer)

    def apply(params, x):
        y, maxima = jax.lax.scan(lambda x, layer_params: layer(layer_params, x), x, params)
        wrong = jnp.ones(LAYERS) if wrong_at is None else jnp.ones(LAYERS).at[wrong_at].set(0.5)
        return y, {"attn": maxima * wrong[:, None]}

    projections = declared(layer_axis=0)
    if wrong_at is None:
        assert check(apply, params(LAYERS), X, projections) == ("attn",)
        return
    with pytest.raises(ValueError, match=r"attn \(layer 1\): max_logits .*they are 0.5 times the logits"):
        check(apply, params(LAYERS), X, projections)


def capped(q, k, v):
    return weighted(jax.nn.softmax(jnp.where(CAUSAL, 5 * jnp.tanh(logits_of(q, k) / 5), -1e30)), v)


def biased(q, k, v):
    return weighted(jax.nn.softmax(logits_of(q, k) + jnp.arange(T)), v)


def in_a_branch(q, k, v):
    return jax.lax.cond(q.sum() > -jnp.inf, by_softmax, lambda q, k, v: q, q, k, v)


@pytest.mark.parametrize("attention", [capped, biased, in_a_branch])
def test_where_no_softmax_has_the_logits_a_warning_says_so(attention):
    with pytest.warns(UserWarning, match="attn: the rows are proven and the maxima are not"):
        assert check(model(attention), params(), X, declared()) == ("attn",)


def test_a_softmax_half_of_which_is_out_of_sight_raises_no_false_alarm():
    def halves(q, k, v):  # the second half of the keys, with the larger logits, is in a branch
        scores = logits_of(q, k * jnp.where(jnp.arange(T) < 3, 0.5, 1.0)[:, None, None])
        near = jnp.exp(scores[..., :3] - 9)
        far = jax.lax.cond(q.sum() > -jnp.inf, lambda s: jnp.exp(s - 9), jnp.zeros_like, scores[..., 3:])
        weights = jnp.concatenate([near, far], -1)
        return weighted(weights / weights.sum(-1, keepdims=True), v)

    def measure(q, k, *_):
        return exact_max_logits(q, k * jnp.where(jnp.arange(T) < 3, 0.5, 1.0)[:, None, None], is_causal=True)

    with pytest.warns(UserWarning, match="the maxima are not"):
        assert check(model(halves, measure), params(), X, declared()) == ("attn",)


def test_what_a_softmax_without_mask_says_of_the_weights_is_no_alarm():
    def watched(q, k, v):
        entropy = jax.scipy.special.entr(jax.nn.softmax(jnp.einsum("bthd,bshd->bhts", q, jnp.repeat(k, 2, 2)))).sum()
        return by_softmax(q, k, v) + 0 * entropy

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert check(model(watched), params(), X, declared()) == ("attn",)


@pytest.mark.parametrize(
    ("projection", "message"),
    [
        (QKProjection.gqa(q="q", k="k", num_heads=H, num_kv_heads=1), "attn: a head has a query of 4"),
        (QKProjection.mha(q="q", k="nothing", num_heads=H), "no parameter at 'nothing'"),
    ],
)
def test_what_init_refuses_is_refused_before_anything_runs(projection, message):
    def apply(params, x):
        raise AssertionError("ran")

    with pytest.raises(ValueError, match=message):
        check(apply, params(), X, {"attn": projection})


def test_maxima_of_another_attention_are_called_that():
    def apply(params, x):
        one, of_one = model(by_softmax)(params["a"], x)
        other, of_other = model(by_softmax)(params["b"], x)
        return one + other, {"a": of_other["attn"], "b": of_one["attn"]}

    projections = {n: QKProjection.gqa(q=f"{n}/q", k=f"{n}/k", num_heads=H, num_kv_heads=G) for n in "ab"}
    with pytest.raises(ValueError, match=r"a: its maxima .* exchanged\?"):
        check(apply, {"a": params(), "b": params()}, X, projections)

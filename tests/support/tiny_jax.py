"""A small transformer as a tree of arrays, and an oracle of its logits that shares no code with the library.

The model width never equals heads · head width, so that a factor along the wrong axis cannot go unnoticed. Biases are
everywhere. In each attention one head is loud and the others are not. B batch, T length, H heads, d head width.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax

from muonclip.optax import QKProjection, dot_product_attention, muonclip

WIDTH, HEADS, HEAD, VOCABULARY, LENGTH = 10, 3, 4, 13, 7
LAYERS = ("first", "second")
TAU = 0.5
LOUD = {"first": 1, "second": 2}
PROJECTIONS = {
    name: QKProjection.mha(q=f"{name}/attention/query", k=f"{name}/attention/key", num_heads=HEADS) for name in LAYERS
}


def init(seed=5, dtype=jnp.float32):
    rng = np.random.default_rng(seed)

    def normal(*shape, scale=None):
        return jnp.asarray(rng.normal(size=shape) * (scale or 1 / math.sqrt(shape[0])), dtype)

    def layer(loud):
        attention = {
            name: {"kernel": normal(WIDTH, HEADS, HEAD), "bias": normal(HEADS, HEAD, scale=0.1)}
            for name in ("query", "key", "value")
        }
        louder = jnp.where(jnp.arange(HEADS)[:, None] == loud, 3, 0.2).astype(dtype)
        for name in ("query", "key"):
            attention[name] = jax.tree.map(lambda a: a * louder, attention[name])
        attention["out"] = {"kernel": normal(HEADS, HEAD, WIDTH, scale=0.3), "bias": normal(WIDTH, scale=0.1)}
        return {"attention": attention}

    return {
        "embed": {"embedding": normal(VOCABULARY, WIDTH, scale=1)},
        **{name: layer(loud) for name, loud in LOUD.items()},
        "norm": {"scale": jnp.ones(WIDTH, dtype)},
        "lm_head": {"kernel": normal(WIDTH, VOCABULARY)},
    }


def forward(params, tokens):
    """tokens [B, T] → logits, the maxima and the inputs of every attention."""
    x = params["embed"]["embedding"][tokens]
    maxima, inputs = {}, {}
    for name in LAYERS:
        layer, inputs[name] = params[name], x
        heads = {
            part: jnp.einsum("btw,whd->bthd", x, layer["attention"][part]["kernel"]) + layer["attention"][part]["bias"]
            for part in ("query", "key", "value")
        }
        y, maxima[name] = dot_product_attention(*heads.values(), is_causal=True)
        out = layer["attention"]["out"]
        x = x + jnp.einsum("bthd,hdw->btw", y, out["kernel"]) + out["bias"]
    return x * params["norm"]["scale"] @ params["lm_head"]["kernel"], maxima, inputs


def loss(params, tokens):
    """Mean nats per token, and the maxima."""
    logits, maxima, _ = forward(params, tokens[:, :-1])
    nats = optax.softmax_cross_entropy_with_integer_labels(logits.astype(jnp.float32), tokens[:, 1:])
    return nats.mean(), maxima


def compiled(function):
    """`jax.jit`, but in half the time: without optimising the code that runs for a millisecond."""
    return jax.jit(function, compiler_options={"xla_backend_optimization_level": 0})


gradients_and_maxima = jax.grad(loss, has_aux=True)
"""(params, tokens) → (gradients, maxima)"""


@functools.cache
def gradients():
    """The same, compiled."""
    return compiled(gradients_and_maxima)


def batches(count, size=12, seed=7):
    """int32 [count, B, T + 1]."""
    return np.random.default_rng(seed).integers(0, VOCABULARY, (count, size, LENGTH + 1)).astype(np.int32)


def optimizer(learning_rate=0.05, **options):
    """The gradient of a key's bias is zero but for rounding, which Adam would blow up to whole steps: hence its eps."""
    return muonclip(learning_rate, **{"qk_projections": PROJECTIONS, "tau": TAU, "adamw": {"eps": 1e-3}, **options})


def train(tx, params, tokens, state=None, jit=True):
    """One step for each of the batches, as documented → params, state."""
    update = compiled(tx.update) if jit else tx.update
    state = tx.init(params) if state is None else state
    for each in tokens:
        grads, maxima = gradients()(params, each)
        updates, state = update(grads, state, params, max_logits=maxima)
        params = optax.apply_updates(params, updates)
    return params, state


def dense_max_logits(query, key, x, scale=None, causal=True):
    """[H] in float64 NumPy, head by head. query, key: (kernel [W, H, d], bias [H, d]); x [B, T, W]."""
    x = np.asarray(x, np.float64)
    maxima = []
    for h in range(np.shape(query[0])[1]):
        q, k = (x @ np.asarray(w, np.float64)[:, h] + np.asarray(b, np.float64)[h] for w, b in (query, key))
        logits = np.einsum("bid,bjd->bij", q, k) * (1 / math.sqrt(q.shape[-1]) if scale is None else scale)
        allowed = np.tri(x.shape[1], dtype=bool) if causal else np.ones((x.shape[1],) * 2, bool)
        maxima.append(logits[:, allowed].max())
    return np.array(maxima)


def distance(one, other):
    """The largest difference between two trees of arrays."""
    both = jax.tree.map(
        lambda a, b: np.max(np.abs(np.asarray(a, np.float64) - np.asarray(b, np.float64)), initial=0), one, other
    )
    return max(jax.tree.leaves(both))


def equal(one, other):
    """To the bit, structure and dtypes included."""
    if jax.tree.structure(one) != jax.tree.structure(other):
        return False
    pairs = zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    return all(a.dtype == b.dtype and np.array_equal(a, b, equal_nan=True) for a, b in pairs)

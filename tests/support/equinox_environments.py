"""As `flax_environments`, in Equinox and as with Haiku, which need not be installed: its parameters are a dict."""

import functools
import math

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax_environments import CAUSAL, LAYERS, MLP, TOKENS, Run, named, nats, optimizer, planned
from tiny_jax import HEAD, HEADS, VOCABULARY, WIDTH, compiled

from muonclip.optax import QKProjection, dot_product_attention, qk_projections_of

# Equinox: weights [out, in]; what is no array becomes None.


class EquinoxBlock(eqx.Module):
    attention: eqx.nn.MultiheadAttention
    mlp: eqx.nn.MLP

    def __call__(self, x):
        seen = []

        def observe(query, key, value):
            seen.append(dot_product_attention(query, key, value, mask=CAUSAL[None])[1])
            return query, key, value

        y = self.attention(x, x, x, mask=CAUSAL, process_heads=observe)
        return x + y + jax.vmap(self.mlp)(x), seen[0]


class EquinoxModel(eqx.Module):
    embed: eqx.nn.Embedding
    blocks: list
    lm_head: eqx.nn.Linear

    def __init__(self, key):
        keys = iter(jax.random.split(key, 2 + 2 * LAYERS))
        self.embed = eqx.nn.Embedding(VOCABULARY, WIDTH, key=next(keys), dtype=jnp.float32)
        sizes = dict(qk_size=HEAD, vo_size=HEAD, use_query_bias=True, use_key_bias=True, dtype=jnp.float32)
        self.blocks = [
            EquinoxBlock(
                eqx.nn.MultiheadAttention(HEADS, WIDTH, key=next(keys), **sizes),
                eqx.nn.MLP(WIDTH, WIDTH, MLP, 1, key=next(keys), dtype=jnp.float32),
            )
            for _ in range(LAYERS)
        ]
        self.lm_head = eqx.nn.Linear(WIDTH, VOCABULARY, use_bias=False, key=next(keys), dtype=jnp.float32)

    def __call__(self, tokens):
        x, maxima, inputs = jax.vmap(self.embed)(tokens), [], []
        for block in self.blocks:
            inputs.append(x)
            x, maximum = block(x)
            maxima.append(maximum)
        return jax.vmap(self.lm_head)(x), maxima, inputs


@functools.cache
def equinox():
    model = EquinoxModel(jax.random.key(0))
    projections = qk_projections_of(model)
    tx = optimizer(projections)

    @eqx.filter_jit
    def step(model, state):
        @eqx.filter_grad(has_aux=True)
        def gradients(model):
            logits, maxima, inputs = jax.vmap(model)(TOKENS[:, :-1])
            return nats(logits), (jax.tree.map(lambda m: m.max(0), maxima), inputs)

        grads, (maxima, inputs) = gradients(model)
        updates, state = tx.update(
            grads,
            state,
            eqx.filter(model, eqx.is_inexact_array),
            max_logits=dict(zip(projections, maxima, strict=True)),
        )
        return eqx.apply_updates(model, updates), state, maxima, inputs

    arrays = eqx.filter(model, eqx.is_inexact_array)

    def heads(projection):
        weight, bias = (np.asarray(a).reshape(HEADS, HEAD, *a.shape[1:]) for a in (projection.weight, projection.bias))
        return np.moveaxis(weight, -1, 0), bias

    def run(learning_rate, tau):
        state = tx.init(arrays)
        state.hyperparams.update(learning_rate=jnp.float32(learning_rate), tau=jnp.float32(tau))
        after, _, maxima, inputs = step(model, state)
        attentions = [
            [[heads(part) for part in (block.attention.query_proj, block.attention.key_proj)] for block in tree.blocks]
            for tree in (model, after)
        ]
        return Run(named(arrays), named(eqx.filter(after, eqx.is_inexact_array)), maxima, inputs, attentions)

    return planned(arrays, projections), run


# Haiku: module names with slashes, heads and widths in one axis.


@functools.cache
def haiku():
    rng = np.random.default_rng(0)

    def linear(fan_in, fan_out):
        return {
            "w": jnp.asarray(rng.normal(size=(fan_in, fan_out)) / math.sqrt(fan_in), jnp.float32),
            "b": jnp.asarray(0.3 * rng.normal(size=fan_out), jnp.float32),
        }

    params = {"model/embed": {"embeddings": jnp.asarray(rng.normal(size=(VOCABULARY, WIDTH)), jnp.float32)}}
    names = [f"model/~/layer_{i}/mha" for i in range(LAYERS)]
    for name in names:
        params |= {f"{name}/{part}": linear(WIDTH, HEADS * HEAD) for part in ("query", "key", "value")}
        params[f"{name}/linear"] = linear(HEADS * HEAD, WIDTH)
    params["model/lm_head"] = {"w": linear(WIDTH, VOCABULARY)["w"]}
    projections = [QKProjection.mha(q=f"{name}/query", k=f"{name}/key", num_heads=HEADS) for name in names]
    tx = optimizer(projections)

    def loss(params):
        x, maxima, inputs = params["model/embed"]["embeddings"][TOKENS[:, :-1]], [], []
        for name in names:
            inputs.append(x)
            modules = [params[f"{name}/{part}"] for part in ("query", "key", "value")]
            heads = [(x @ m["w"] + m["b"]).reshape(*x.shape[:2], HEADS, HEAD) for m in modules]
            y, maximum = dot_product_attention(*heads, is_causal=True)
            maxima.append(maximum)
            x = x + y.reshape(*x.shape[:2], -1) @ params[f"{name}/linear"]["w"] + params[f"{name}/linear"]["b"]
        return nats(x @ params["model/lm_head"]["w"]), (maxima, inputs)

    @compiled
    def step(params, state):
        grads, (maxima, inputs) = jax.grad(loss, has_aux=True)(params)
        updates, state = tx.update(grads, state, params, max_logits=maxima)
        return optax.apply_updates(params, updates), maxima, inputs

    def run(learning_rate, tau):
        state = tx.init(params)
        state.hyperparams.update(learning_rate=jnp.float32(learning_rate), tau=jnp.float32(tau))
        after, maxima, inputs = step(params, state)
        attentions = [
            [
                [
                    (module["w"].reshape(WIDTH, HEADS, HEAD), module["b"].reshape(HEADS, HEAD))
                    for module in (tree[f"{name}/query"], tree[f"{name}/key"])
                ]
                for name in names
            ]
            for tree in (params, after)
        ]
        return Run(named(params), named(after), maxima, inputs, attentions)

    return planned(params, projections), run

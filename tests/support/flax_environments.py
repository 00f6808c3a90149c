"""Small models in Flax linen and Flax NNX, and one step of each as its users write it.

Every environment is a function () → (its plan, a function (learning rate, τ) → `Run`).
W model width, H heads, d head width: W ≠ H · d. B batch, T length.
"""

import functools
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from flax import nnx
from tiny_jax import HEAD, HEADS, LENGTH, VOCABULARY, WIDTH, batches, compiled

from muonclip.optax import dot_product_attention, muonclip, plan, qk_projections_of

LAYERS, MLP = 2, 14
TOKENS = jnp.asarray(batches(1, size=3)[0])
CAUSAL = jnp.tri(LENGTH, dtype=bool)
LOUDEST = dict(init_fn=lambda: jnp.float32(-jnp.inf), reduce_fn=jnp.maximum)


class Run(NamedTuple):
    before: Any
    after: Any
    """Arrays, by name."""
    maxima: list
    """Of each attention, as the model measured them, [H]."""
    inputs: list
    """[B, T, W]."""
    attentions: list
    """Of `before` and `after`: for each attention the query and the key, (kernel [W, H, d], bias [H, d])."""


def named(tree):
    paths = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {jax.tree_util.keystr(path, simple=True, separator="/").removesuffix("/value"): leaf for path, leaf in paths}


def nats(logits):
    return optax.softmax_cross_entropy_with_integer_labels(logits, TOKENS[:, 1:]).mean()


def optimizer(projections):
    """Rate and τ are changed in its state: each environment is compiled once."""
    return optax.inject_hyperparams(muonclip)(0.0, qk_projections=projections, tau=1.0, adamw={"eps": 1e-3})


def planned(params, projections):
    return plan(params, None, projections)


# Flax linen: scanned layers; the statistic is sown.


def sown(query, key, value, mask=None, module=None):
    y, maximum = dot_product_attention(query, key, value, mask=mask)
    module.sow("max_logits", "maximum", maximum, **LOUDEST)
    return y


class LinenBlock(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        self.sow("inputs", "x", x)
        attention = nn.MultiHeadDotProductAttention(
            num_heads=HEADS,
            qkv_features=HEADS * HEAD,
            bias_init=nn.initializers.normal(0.3),
            attention_fn=sown,
            name="attention",
        )
        x = x + attention(x, mask=CAUSAL[None, None], sow_weights=True)  # it passes `module`
        return x + nn.Dense(WIDTH, name="down")(nn.gelu(nn.Dense(MLP, name="up")(x))), None


class LinenModel(nn.Module):
    @nn.compact
    def __call__(self, tokens):
        layers = nn.scan(
            LinenBlock,
            variable_axes={"params": 0, "max_logits": 0, "inputs": 0},
            split_rngs={"params": True},
            length=LAYERS,
        )
        x, _ = layers(name="layers")(
            nn.Embed(VOCABULARY, WIDTH, embedding_init=nn.initializers.normal(1), name="embed")(tokens), None
        )
        return nn.Dense(VOCABULARY, use_bias=False, name="lm_head")(nn.LayerNorm(name="norm")(x))


@functools.cache
def linen():
    model = LinenModel()
    params = model.init(jax.random.key(0), TOKENS[:, :-1])["params"]
    projections = qk_projections_of(model, TOKENS[:, :-1])
    tx = optimizer(projections)

    def loss(params):
        logits, seen = model.apply({"params": params}, TOKENS[:, :-1], mutable=["max_logits", "inputs"])
        return nats(logits), seen

    @compiled
    def step(params, state):
        grads, seen = jax.grad(loss, has_aux=True)(params)
        updates, state = tx.update(grads, state, params, max_logits=seen["max_logits"])
        return optax.apply_updates(params, updates), state, seen

    def run(learning_rate, tau):
        state = tx.init(params)
        state.hyperparams.update(learning_rate=jnp.float32(learning_rate), tau=jnp.float32(tau))
        after, _, seen = step(params, state)
        attentions = [
            [
                [(part["kernel"][layer], part["bias"][layer]) for part in (attention["query"], attention["key"])]
                for layer in range(LAYERS)
            ]
            for attention in (tree["layers"]["attention"] for tree in (params, after))
        ]
        maxima, inputs = seen["max_logits"]["layers"]["attention"]["maximum"], seen["inputs"]["layers"]["x"][0]
        return Run(named(params), named(after), list(maxima), list(inputs), attentions)

    return planned(params, projections), run


# Flax NNX: a list of blocks; the statistic is sown and captured.


def captured(query, key, value, mask=None, module=None, **_):
    y, maximum = dot_product_attention(query, key, value, mask=mask)
    module.sow(nnx.Intermediate, "max_logits", maximum, **LOUDEST)
    return y


class NNXBlock(nnx.Module):
    def __init__(self, rngs):
        self.attention = nnx.MultiHeadAttention(
            HEADS,
            WIDTH,
            HEADS * HEAD,
            bias_init=nnx.initializers.normal(0.3),
            attention_fn=captured,
            decode=False,
            rngs=rngs,
        )
        self.up, self.down = nnx.Linear(WIDTH, MLP, rngs=rngs), nnx.Linear(MLP, WIDTH, rngs=rngs)

    def __call__(self, x):
        self.sow(nnx.Cache, "inputs", x)
        x = x + self.attention(x, mask=CAUSAL[None, None], sow_weights=True)
        return x + self.down(nnx.gelu(self.up(x)))


class NNXModel(nnx.Module):
    def __init__(self, rngs):
        self.embed = nnx.Embed(VOCABULARY, WIDTH, embedding_init=nnx.initializers.normal(1), rngs=rngs)
        self.blocks = nnx.List([NNXBlock(rngs) for _ in range(LAYERS)])
        self.norm = nnx.LayerNorm(WIDTH, rngs=rngs)
        self.lm_head = nnx.Linear(WIDTH, VOCABULARY, use_bias=False, rngs=rngs)

    def __call__(self, tokens):
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        return self.lm_head(self.norm(x))


@functools.cache
def nnx_list():
    projections = qk_projections_of(NNXModel(nnx.Rngs(0)))

    @nnx.jit
    def step(model, optimizer):
        def loss(model):
            logits, seen, inputs = nnx.capture(model, nnx.Intermediate, nnx.Cache)(TOKENS[:, :-1])
            return nats(logits), (nnx.to_pure_dict(seen), nnx.to_pure_dict(inputs))

        grads, (maxima, inputs) = nnx.grad(loss, has_aux=True)(model)
        optimizer.update(model, grads, max_logits=maxima)
        return maxima, inputs

    def arrays(model):
        return nnx.to_pure_dict(nnx.state(model, nnx.Param))

    def run(learning_rate, tau):
        model = NNXModel(nnx.Rngs(0))
        before = arrays(model)
        trained = nnx.Optimizer(model, optimizer(projections), wrt=nnx.Param)
        trained.opt_state.hyperparams["learning_rate"][...] = jnp.float32(learning_rate)
        trained.opt_state.hyperparams["tau"][...] = jnp.float32(tau)
        maxima, inputs = step(model, trained)
        attentions = [
            [
                [(part["kernel"], part["bias"]) for part in (block["attention"]["query"], block["attention"]["key"])]
                for block in tree["blocks"].values()
            ]
            for tree in (before, arrays(model))
        ]
        maxima = [block["attention"]["max_logits"] for block in maxima["blocks"].values()]
        inputs = [block["inputs"][0] for block in inputs["blocks"].values()]
        return Run(named(before), named(arrays(model)), maxima, inputs, attentions)

    return planned(nnx.state(NNXModel(nnx.Rngs(0)), nnx.Param), projections), run

"""Equinox in short: its own attention, the queries and keys taken where they are made, the clip in the update.

    python equinox_attention.py         # seconds

Needs muonclip[jax], equinox.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
import optax

from muonclip.optax import exact_max_logits, muonclip, qk_projections_of

WIDTH, HEADS, LENGTH = 64, 4, 32


class Model(eqx.Module):
    embedding: eqx.nn.Embedding
    attention: eqx.nn.MultiheadAttention
    head: eqx.nn.Linear

    def __init__(self, key):
        keys = jax.random.split(key, 3)
        self.embedding = eqx.nn.Embedding(32, WIDTH, key=keys[0])
        self.attention = eqx.nn.MultiheadAttention(HEADS, WIDTH, key=keys[1])
        self.head = eqx.nn.Linear(WIDTH, 32, use_bias=False, key=keys[2])

    def __call__(self, tokens):
        seen = []

        def observed(query, key, value):  # [T, heads, d] each; nothing is changed
            causal = jnp.tril(jnp.ones((LENGTH, LENGTH), bool))
            seen.append(exact_max_logits(query[None], key[None], mask=causal))
            return query, key, value

        x = jax.vmap(self.embedding)(tokens)
        causal = jnp.tril(jnp.ones((LENGTH, LENGTH), bool))
        x = x + self.attention(x, x, x, mask=causal, process_heads=observed)
        return jax.vmap(self.head)(x), {"attention": seen[0]}


model = Model(jax.random.key(0))
batch = jax.random.randint(jax.random.key(1), (16, LENGTH), 0, 32)
tx = muonclip(5e-3, weight_decay=0.1, tau=0.5, qk_projections=qk_projections_of(model))
state = tx.init(eqx.filter(model, eqx.is_array))


@eqx.filter_jit
def train_step(model, state):
    @eqx.filter_value_and_grad(has_aux=True)
    def loss_of(model):
        logits, maxima = jax.vmap(model)(batch)
        loss = optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], batch[:, 1:]).mean()
        return loss, jax.tree.map(lambda each: each.max(0), maxima)  # over the batch

    (loss, maxima), grads = loss_of(model)
    updates, state = tx.update(grads, state, eqx.filter(model, eqx.is_array), max_logits=maxima)
    return eqx.apply_updates(model, updates), state, loss


for step in range(60):
    model, state, loss = train_step(model, state)
    if step % 20 == 19:
        print(f"step {step + 1}: loss {loss:.3f}, γ {optax.tree.get(state, 'QKClipState').gamma}")

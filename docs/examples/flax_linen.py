"""Flax linen in short: an attention of Flax's own, its maxima sown, the clip in the update.

    python flax_linen.py         # seconds

Needs muonclip[jax], flax.
"""

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn

from muonclip.optax import dot_product_attention, muonclip, qk_projections_of

WIDTH, HEADS, LENGTH = 64, 4, 32


def observed(query, key, value, mask=None, module=None, **_):
    y, maximum = dot_product_attention(query, key, value, mask=mask)
    module.sow("max_logits", "maximum", maximum, init_fn=lambda: jnp.float32(-jnp.inf), reduce_fn=jnp.maximum)
    return y


class Model(nn.Module):
    @nn.compact
    def __call__(self, tokens):
        x = nn.Embed(32, WIDTH, name="embedding")(tokens)
        for layer in range(2):
            attention = nn.MultiHeadDotProductAttention(HEADS, attention_fn=observed, name=f"attention_{layer}")
            x = x + attention(nn.RMSNorm()(x), mask=nn.make_causal_mask(tokens), sow_weights=True)
        return nn.Dense(32, use_bias=False, name="head")(nn.RMSNorm()(x))


model = Model()
tokens = jax.random.randint(jax.random.key(0), (16, LENGTH), 0, 32)
params = model.init(jax.random.key(1), tokens)["params"]
tx = muonclip(5e-3, weight_decay=0.1, tau=0.5, qk_projections=qk_projections_of(model, tokens))
state = tx.init(params)


@jax.jit
def train_step(params, state):
    def loss_of(params):
        logits, seen = model.apply({"params": params}, tokens, mutable=["max_logits"])
        labels = tokens[:, 1:]
        return optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], labels).mean(), seen["max_logits"]

    (loss, maxima), grads = jax.value_and_grad(loss_of, has_aux=True)(params)
    updates, state = tx.update(grads, state, params, max_logits=maxima)
    return optax.apply_updates(params, updates), state, loss


for step in range(60):
    params, state, loss = train_step(params, state)
    if step % 20 == 19:
        print(f"step {step + 1}: loss {loss:.3f}, γ {optax.tree.get(state, 'QKClipState').gamma}")

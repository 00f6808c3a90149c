"""A GPT in Flax nnx with grouped-query attention: maxima captured from the layers, the clip at work, all jitted.

    python flax_nnx_gpt.py         # half a minute on two cores

Needs muonclip[jax], flax, tqdm.
"""

import inspect
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from tqdm import trange

from muonclip.optax import dot_product_attention, muonclip, plan, qk_projections_of

WIDTH, HEADS, KV_HEADS, LAYERS, LENGTH, BATCH, STEPS = 128, 4, 2, 3, 64, 16, 120


def observed(query, key, value, mask=None, module=None, **_):
    """The attention of a layer, which leaves the largest logit of each head with its module."""
    y, maximum = dot_product_attention(query, key, value, mask=mask)
    module.sow(nnx.Intermediate, "max_logits", maximum, init_fn=lambda: jnp.float32(-jnp.inf), reduce_fn=jnp.maximum)
    return y


class Block(nnx.Module):
    def __init__(self, rngs):
        self.norm1, self.norm2 = nnx.RMSNorm(WIDTH, rngs=rngs), nnx.RMSNorm(WIDTH, rngs=rngs)
        options = dict(num_kv_heads=KV_HEADS, attention_fn=observed, use_bias=False, decode=False, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(HEADS, WIDTH, **options)
        self.up = nnx.Linear(WIDTH, 4 * WIDTH, rngs=rngs)
        self.down = nnx.Linear(4 * WIDTH, WIDTH, rngs=rngs)

    def __call__(self, x):
        mask = nnx.make_causal_mask(x[..., 0])
        x = x + self.attention(self.norm1(x), mask=mask, sow_weights=True)  # which hands the module on to `observed`
        return x + self.down(nnx.gelu(self.up(self.norm2(x))))


class GPT(nnx.Module):
    def __init__(self, rngs):
        self.embedding = nnx.Embed(256, WIDTH, rngs=rngs)
        self.positions = nnx.Embed(LENGTH, WIDTH, rngs=rngs)
        self.blocks = nnx.List([Block(rngs) for _ in range(LAYERS)])
        self.norm = nnx.RMSNorm(WIDTH, rngs=rngs)
        self.head = nnx.Linear(WIDTH, 256, use_bias=False, rngs=rngs)

    def __call__(self, tokens):
        x = self.embedding(tokens) + self.positions(jnp.arange(tokens.shape[1]))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


model = GPT(nnx.Rngs(0))
schedule = optax.warmup_cosine_decay_schedule(0.0, 5e-3, 10, STEPS)
# K2's τ is 100; so low that the clip acts on a model as small as this
tx = muonclip(schedule, weight_decay=0.1, tau=3.0, qk_projections=qk_projections_of(model))
tx = optax.chain(optax.clip_by_global_norm(1.0), tx)
optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
print(plan(nnx.to_pure_dict(nnx.state(model, nnx.Param)), qk_projections=qk_projections_of(model)))


@nnx.jit
def train_step(model, optimizer, windows):
    def loss_of(model):
        logits, seen = nnx.capture(model, nnx.Intermediate)(windows[:, :-1])
        return optax.softmax_cross_entropy_with_integer_labels(logits, windows[:, 1:]).mean(), seen

    (loss, seen), grads = nnx.value_and_grad(loss_of, has_aux=True)(model)
    optimizer.update(model, grads, max_logits=seen)
    return loss


text = np.frombuffer(Path(inspect.__file__).read_bytes(), np.uint8)
batches = np.random.default_rng(0)
for _ in (bar := trange(STEPS)):
    starts = batches.integers(len(text) - LENGTH - 1, size=(BATCH, 1))
    loss = train_step(model, optimizer, text[starts + np.arange(LENGTH + 1)].astype(np.int32))
    bar.set_postfix(loss=f"{loss:.2f}")

clip = optax.tree.get(nnx.as_pure(optimizer.opt_state), "QKClipState")
for name, gamma in clip.gamma.items():
    print(f"{name}: γ of the last step {np.round(gamma, 3)}")

"""A GPT in Flax nnx with grouped-query attention: maxima captured from the layers, the clip at work, saved and resumed.

    python flax_nnx_gpt.py         # half a minute on two cores

Needs muonclip[jax], flax, orbax-checkpoint, tqdm.
"""

import inspect
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from flax import nnx
from tqdm import tqdm

from muonclip.optax import check, dot_product_attention, muonclip, plan, qk_projections_of

WIDTH, HEADS, KV_HEADS, LAYERS, LENGTH, BATCH, STEPS = 128, 4, 2, 3, 64, 16, 120
TEXT = np.frombuffer(Path(inspect.__file__).read_bytes(), np.uint8)


class MaxLogits(nnx.Variable):
    """What attentions sow; a class of its own keeps other things that a model sows out."""


def observed(query, key, value, mask=None, module=None, **_):
    """The attention of a layer, which leaves the largest logit of each head with its module."""
    y, maximum = dot_product_attention(query, key, value, mask=mask)
    module.sow(MaxLogits, "max_logits", maximum, init_fn=lambda: jnp.float32(-jnp.inf), reduce_fn=jnp.maximum)
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


def make():
    model = GPT(nnx.Rngs(0))
    schedule = optax.warmup_cosine_decay_schedule(0.0, 5e-3, 10, STEPS)
    tx = muonclip(schedule, tau=3.0, qk_projections=qk_projections_of(model))  # K2's 100 is for larger models
    return model, nnx.Optimizer(model, optax.chain(optax.clip_by_global_norm(1.0), tx), wrt=nnx.Param)


def state_of(model, optimizer):
    return {"model": nnx.state(model, nnx.Param), "optimizer": nnx.state(optimizer)}


def windows(step):
    starts = np.random.default_rng(step).integers(len(TEXT) - LENGTH - 1, size=(BATCH, 1))
    return TEXT[starts + np.arange(LENGTH + 1)].astype(np.int32)


@nnx.jit
def train_step(model, optimizer, windows):
    def loss_of(model):
        logits, maxima = nnx.capture(model, MaxLogits)(windows[:, :-1])
        return optax.softmax_cross_entropy_with_integer_labels(logits, windows[:, 1:]).mean(), maxima

    (loss, maxima), grads = nnx.value_and_grad(loss_of, has_aux=True)(model)
    optimizer.update(model, grads, max_logits=maxima)
    return loss, maxima


def train(model, optimizer, steps):
    for step in (bar := tqdm(steps)):
        loss, maxima = train_step(model, optimizer, windows(step))
        bar.set_postfix(loss=f"{loss:.2f}")
    return maxima


model, optimizer = make()
print(plan(model, qk_projections=qk_projections_of(model)))
arguments = model, windows(0)[:2, :-1], qk_projections_of(model)
print("proven:", *check(lambda model, x: nnx.capture(model, MaxLogits)(x), *arguments))  # once, before a training
train(model, optimizer, range(STEPS - 20))
saved = Path("checkpoint").absolute()
with ocp.StandardCheckpointer() as checkpointer:
    checkpointer.save(saved, state_of(model, optimizer), force=True)
maxima = train(model, optimizer, range(STEPS - 20, STEPS))
clip = optax.tree.get(nnx.as_pure(optimizer.opt_state), "QKClipState")
for (name, gamma), maximum in zip(clip.gamma.items(), jax.tree.leaves(maxima), strict=True):
    print(f"{name}: maxima {np.asarray(maximum).round(2)}, γ {np.asarray(gamma).round(3)}")

again = make()  # as a new process does
with ocp.StandardCheckpointer() as checkpointer:
    state = checkpointer.restore(saved, state_of(*again))
for each, name in zip(again, ("model", "optimizer"), strict=True):
    nnx.update(each, state[name])
train(*again, range(STEPS - 20, STEPS))
same = jax.tree.map(jnp.array_equal, state_of(model, optimizer), state_of(*again))
print("a resumed run ends at the same weights:", jax.tree.all(same))

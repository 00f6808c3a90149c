"""The reference model in JAX, as pure functions: the mathematics, the names and the numbers of `models/torch.py`.

Shapes: B sequences, T positions, N = B·T tokens, D hidden width, V vocabulary, H heads, G key heads, E experts,
K experts per token, F width of an expert; d width of a head's query and key (MLA: nope + rope), R of its rotated part,
v of its value.

Parameters are a flat dict, name → array, with the names and shapes that PyTorch has: a matrix is stored [out, in]; a
stack of experts [E, out, in]; gate_up_proj has the gate's rows first, then up's. The routers' correction biases, which
no gradient moves, are a second dict, `buffers`. A `config` is hashable: `jax.jit(loss, static_argnames="config")`.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from muonclip.models.config import MoEConfig
from muonclip.models.int4 import round_to_int4
from muonclip.models.jax_parameters import (
    Buffers,
    Params,
    from_torch,
    init,
    init_buffers,
    matrix_layouts,
    num_kv_heads,
    parameter_shapes,
    qk_projections,
    to_torch,
)
from muonclip.optax import exact_max_logits

__all__ = [
    "Aux",
    "Buffers",
    "Params",
    "balance",
    "forward",
    "from_torch",
    "init",
    "init_buffers",
    "loss",
    "matrix_layouts",
    "parameter_shapes",
    "qk_projections",
    "to_torch",
]

_IGNORED = -100


class Aux(NamedTuple):
    """The measurements of a forward, in addition to its output.

    Attributes:
        max_logits: Attention, "layers.0.attn", → [H]: the exact maxima, for `qk_clip`. Empty unless observed.
        loads: Router, "layers.1.mlp.router", → float32 [E]: the tokens of each expert, for `balance`.
    """

    max_logits: dict[str, Array]
    loads: dict[str, Array]


def forward(
    params: Mapping[str, Array],
    buffers: Mapping[str, Array],
    tokens: Array,
    config: MoEConfig,
    document_ids: Array | None = None,
    *,
    observe: bool = True,
    remat: bool = False,
) -> tuple[Array, Aux]:
    """Compute the logits [B, T, V] of the tokens.

    Args:
        params: The parameters, by name.
        buffers: The correction biases of the routers, by name.
        tokens: int [B, T].
        config: The sizes of the model.
        document_ids: int [B, T]: a token attends only to its own document.
        observe: Measure maximum logits.
        remat: Compute each layer again in the backward pass instead of keeping its activations.

    Raises:
        ValueError: For more than max_seq_len positions.
    """
    length, limit = tokens.shape[-1], config.max_seq_len
    if length > limit:
        raise ValueError(f"tokens has {length} positions; max_seq_len={limit}. Cut them, or build with more.")
    x = params["embed_tokens.weight"][tokens]
    aux = Aux({}, {})
    for i in range(config.num_layers):
        layer = functools.partial(
            _layer, params, buffers, f"layers.{i}", config=config, document_ids=document_ids, observe=observe
        )
        x, seen = (jax.checkpoint(layer) if remat else layer)(x)
        aux.max_logits.update(seen.max_logits)
        aux.loads.update(seen.loads)
    return _linear(params, "lm_head", _rms_norm(params, "norm", x, config)), aux


def loss(
    params: Mapping[str, Array],
    buffers: Mapping[str, Array],
    tokens: Array,
    targets: Array,
    config: MoEConfig,
    document_ids: Array | None = None,
    *,
    observe: bool = True,
    remat: bool = False,
) -> tuple[Array, Aux]:
    """Return the mean cross-entropy in nats per token.

    Args:
        params: The parameters, by name.
        buffers: The correction biases of the routers, by name.
        tokens: int [B, T].
        targets: int [B, T], already shifted; those of −100 are ignored.
        config: The sizes of the model.
        document_ids: int [B, T]: a token attends only to its own document.
        observe: Measure maximum logits.
        remat: Compute each layer again in the backward pass instead of keeping its activations.

    Raises:
        ValueError: For more than max_seq_len positions.
    """
    logits, aux = forward(params, buffers, tokens, config, document_ids, observe=observe, remat=remat)
    counted = targets != _IGNORED
    log_probabilities = jax.nn.log_softmax(_at_least_float32(logits))
    picked = jnp.take_along_axis(log_probabilities, jnp.where(counted, targets, 0)[..., None], -1)[..., 0]
    return -jnp.sum(jnp.where(counted, picked, 0.0)) / jnp.sum(counted), aux


def balance(buffers: Mapping[str, Array], loads: Mapping[str, Array], config: MoEConfig) -> Buffers:
    """Return the buffers after a step: the experts' load balanced without an auxiliary loss (arXiv 2408.15664).

        correction_bias += router_bias_update_rate · sign(mean load − load)

    Args:
        buffers: The correction biases of the routers, by name.
        loads: Those of `Aux`; of several micro-batches their sum.
        config: The sizes of the model.
    """
    moved = {}
    for name, load in loads.items():
        correction = config.router_bias_update_rate * jnp.sign(jnp.mean(load) - load)
        moved[f"{name}.correction_bias"] = buffers[f"{name}.correction_bias"] + correction
    return {**buffers, **moved}


def _layer(
    params: Mapping[str, Array],
    buffers: Mapping[str, Array],
    name: str,
    x: Array,
    *,
    config: MoEConfig,
    document_ids: Array | None,
    observe: bool,
) -> tuple[Array, Aux]:
    """Compute `x + attn(norm(x))`, then `x + mlp(norm(x))`."""
    attn, mlp = f"{name}.attn", f"{name}.mlp"
    q, k, v = _queries_keys_values(params, attn, _rms_norm(params, f"{attn}_norm", x, config), config)
    max_logits = {}
    if observe:
        max_logits[attn] = exact_max_logits(q, k, scale=config.softmax_scale, is_causal=True, segment_ids=document_ids)
    x = x + _linear(params, f"{attn}.o_proj", _attend(q, k, v, config, document_ids))
    h = _rms_norm(params, f"{mlp}_norm", x, config)
    if f"{mlp}.router.weight" not in params:
        return x + _swiglu(params, mlp, h), Aux(max_logits, {})
    bias = buffers[f"{mlp}.router.correction_bias"]
    y, load = _experts(params, mlp, bias, h.reshape(-1, h.shape[-1]), config)
    y = y.reshape(h.shape)
    if config.num_shared_experts:
        y = y + _swiglu(params, f"{mlp}.shared_experts", h)
    return x + y, Aux(max_logits, {f"{mlp}.router": load})


def _queries_keys_values(
    params: Mapping[str, Array], name: str, x: Array, config: MoEConfig
) -> tuple[Array, Array, Array]:
    """Project x [B, T, D] to q [B, T, H, d], k [B, T, H or G, d], v [B, T, H or G, v]; normalise and rotate q and k.

    MLA (DeepSeek-V2, arXiv 2405.04434): q, k, v come from RMS-normed latents; the heads share the rotary key. Rows per
    head: q_b_proj (or q_proj) [nope | rope], kv_b_proj [k_nope | v].
    """

    def project(part: str, x: Array, heads: int) -> Array:
        return _linear(params, f"{name}.{part}", x).reshape(*x.shape[:-1], heads, -1)

    def latent(part: str) -> Array:
        return _rms_norm(params, f"{name}.{part}_norm", _linear(params, f"{name}.{part}_proj", x), config)

    heads = config.num_heads
    if config.attention == "mla":
        q = project("q_proj", x, heads) if config.q_lora_rank is None else project("q_b_proj", latent("q_a"), heads)
        k_nope, v = jnp.split(project("kv_b_proj", latent("kv_a"), heads), (config.qk_nope_head_dim,), axis=-1)
        k_rope = project("k_rope_proj", x, 1)
        k = jnp.concatenate((k_nope, jnp.broadcast_to(k_rope, (*k_nope.shape[:-1], k_rope.shape[-1]))), -1)
    else:
        groups = num_kv_heads(config)
        q, k, v = project("q_proj", x, heads), project("k_proj", x, groups), project("v_proj", x, groups)
    if config.qk_norm:
        q, k = _rms_norm(params, f"{name}.q_norm", q, config), _rms_norm(params, f"{name}.k_norm", k, config)
    return _rotate(q, config), _rotate(k, config), v


def _attend(q: Array, k: Array, v: Array, config: MoEConfig, document_ids: Array | None) -> Array:
    """Attend causally, within a document: q [B, T, H, d], k [B, T, G, d], v [B, T, G, v] → [B, T, H·v]."""
    batch, length, _, width = q.shape
    q = q.reshape(batch, length, k.shape[2], -1, width)
    logits = config.softmax_scale * jnp.einsum("btgrd,bsgd->bgrts", q, k, preferred_element_type=_wide(q.dtype))
    if config.softcap is not None:
        logits = config.softcap * jnp.tanh(logits / config.softcap)
    allowed = jnp.tri(length, dtype=bool)
    if document_ids is not None:
        allowed = allowed & (document_ids[:, :, None] == document_ids[:, None, :])[:, None, None]
    weights = jax.nn.softmax(jnp.where(allowed, logits, -math.inf)).astype(v.dtype)
    return jnp.einsum("bgrts,bsgv->btgrv", weights, v).reshape(batch, length, -1)


def _rotate(x: Array, config: MoEConfig) -> Array:
    """Rotate the last R entries of each head of x [B, T, heads, d], pairing i with i + R/2; those before them stay.

    Angles are computed in float64, where positions times frequencies are exact enough at any length.
    """
    angles = np.arange(x.shape[1])[:, None, None] * np.asarray(config.rotary_frequencies())
    cos, sin = (jnp.asarray(config.rotary_scale * f(angles), _wide(x.dtype)) for f in (np.cos, np.sin))
    still, first, second = jnp.split(x, (x.shape[-1] - config.rotary_dim, x.shape[-1] - config.rotary_dim // 2), -1)
    turned = jnp.concatenate((first * cos - second * sin, second * cos + first * sin), -1)
    return jnp.concatenate((still, turned.astype(x.dtype)), -1)


def _experts(
    params: Mapping[str, Array], name: str, correction_bias: Array, x: Array, config: MoEConfig
) -> tuple[Array, Array]:
    """Compute `Σ_k weights_k · expert_k(x)` [N, D] and the load [E] of x [N, D].

    Tokens are sorted by expert and multiplied in groups. Chosen are the K experts of best `score + correction_bias`,
    weighed by score (arXiv 2412.19437, eq. 12–16):

        score = sigmoid(x · weightᵀ),   weights_k = routed_scaling_factor · score_k / Σ score over the chosen
    """
    num_tokens, k = len(x), config.num_experts_per_tok
    router = _at_least_float32(params[f"{name}.router.weight"])
    scores = jax.nn.sigmoid(_at_least_float32(x) @ router.T)  # [N, E]
    chosen = jax.lax.top_k(jax.lax.stop_gradient(scores) + correction_bias, k)[1]  # [N, K]
    weights = jnp.take_along_axis(scores, chosen, -1)
    weights = config.routed_scaling_factor * weights / (jnp.sum(weights, -1, keepdims=True) + 1e-20)

    order = jnp.argsort(chosen.ravel())
    sizes = jnp.bincount(chosen.ravel(), length=config.num_experts)
    rows = jnp.repeat(x, k, axis=0)[order]
    gate_up, down = (params[f"{name}.experts.{part}_proj"] for part in ("gate_up", "down"))
    if config.expert_weight_bits:
        gate_up, down = _rounded(gate_up), _rounded(down)
    rows = _grouped_linear(_gate(_grouped_linear(rows, gate_up, sizes)), down, sizes)
    y = rows[jnp.argsort(order)].reshape(num_tokens, k, -1)
    return jnp.sum(y * weights[..., None], 1).astype(x.dtype), sizes.astype(jnp.float32)


@jax.custom_vjp
def _rounded(weight: Array) -> Array:
    """Round weights to INT4; the gradient passes straight through (arXiv 1308.3432)."""
    return round_to_int4(_at_least_float32(weight), jnp).astype(weight.dtype)


_rounded.defvjp(lambda weight: (_rounded(weight), None), lambda _, gradient: (gradient,))


def _grouped_linear(x: Array, weight: Array, sizes: Array) -> Array:
    """Multiply x [rows, in] → [rows, out]: the first sizes[0] rows by weight[0] [out, in], and so on."""
    return jax.lax.ragged_dot(x, weight.mT, sizes.astype(jnp.int32))


def _swiglu(params: Mapping[str, Array], name: str, x: Array) -> Array:
    """Compute `down(silu(gate(x)) · up(x))` (arXiv 2002.05202)."""
    return _linear(params, f"{name}.down_proj", _gate(_linear(params, f"{name}.gate_up_proj", x)))


def _gate(gate_up: Array) -> Array:
    """Compute silu(gate) · up of x [..., 2F] (gate, then up) → [..., F]."""
    gate, up = jnp.split(gate_up, 2, axis=-1)
    return jax.nn.silu(gate) * up


def _rms_norm(params: Mapping[str, Array], name: str, x: Array, config: MoEConfig) -> Array:
    wide = _at_least_float32(x)
    normed = wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), -1, keepdims=True) + config.norm_eps)
    return (normed * params[f"{name}.weight"]).astype(x.dtype)


def _linear(params: Mapping[str, Array], name: str, x: Array) -> Array:
    return x @ params[f"{name}.weight"].T


def _wide(dtype: Any) -> Any:
    return jnp.promote_types(dtype, jnp.float32)


def _at_least_float32(x: Array) -> Array:
    return x.astype(_wide(x.dtype))

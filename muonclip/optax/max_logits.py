"""The maximum attention logit of every head, in JAX.

    S_h = scale · max over allowed pairs of q_i · k_j          (Kimi K2, arXiv 2507.20534, §2.1)

S is signed, after the softmax scale, before soft-capping and additive biases, over the pairs that the mask allows. The
functions return what `muonclip.optax.qk_clip` takes as `max_logits`. Under `jax.jit` the maximum is over the whole
batch, however it is sharded; inside `jax.shard_map` it is the shard's: take `jax.lax.pmax` of it.

Shapes: B batch (the axis may be absent), T queries, S keys, H query heads, G key heads (G divides H), d head width.
Arguments have the meaning they have in `jax.nn.dot_product_attention`:

- `mask`: broadcastable to [B, H, T, S]; True attends, and so does what is not zero (Flax makes float masks of 0 and 1).
- `is_causal`: key j ≤ query i, both counted from their start.
- `query_seq_lengths`, `key_value_seq_lengths`: int [B]; the positions from there on are padding.
- `local_window_size`: (left, right), or one number for both: i − left ≤ j ≤ i + right.
- `segment_ids` (not an argument of JAX's): int [B, T], or a tuple of [B, T] and [B, S]: equal numbers attend to each
  other.
"""

from __future__ import annotations

import functools
import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from muonclip.core.arguments import FINITE, check_array, check_choice, check_floating, check_whole
from muonclip.core.attention_mask import is_masked
from muonclip.core.qk_clip import check_tau
from muonclip.optax.arguments import check_if_concrete, check_real, check_scalar
from muonclip.optax.attention_mask import (
    AttentionMask,
    SegmentIds,
    Window,
    as_bool,
    check_broadcasts,
    checked_window,
    cut,
)
from muonclip.optax.dtypes import wide


def exact_max_logits(
    query: Array,
    key: Array,
    *,
    scale: float | None = None,
    mask: Array | None = None,
    is_causal: bool = False,
    query_seq_lengths: Array | None = None,
    key_value_seq_lengths: Array | None = None,
    local_window_size: Window = None,
    segment_ids: SegmentIds = None,
    block_size: int = 256,
) -> Array:
    """Compute the exact maxima [H], in float32 (float64 for float64); no gradient passes.

    The masks are those of `jax.nn.dot_product_attention`. Logits are held for one tile at a time; tiles that
    `is_causal` and the window exclude are not computed. A head without an allowed pair gives −inf; NaN is kept.

    Args:
        query: [B, T, H, d].
        key: [B, S, G, d], where G divides H.
        scale: From q · k to a logit; None: 1/√d.
        mask: Broadcastable to [B, H, T, S]; True attends, and so does what is not zero.
        is_causal: Key j ≤ query i, both counted from their start.
        query_seq_lengths: int [B]; the positions from there on are padding.
        key_value_seq_lengths: int [B]; the positions from there on are padding.
        local_window_size: (left, right), or one number for both: i − left ≤ j ≤ i + right.
        segment_ids: int [B, T], or a tuple of [B, T] and [B, S]: equal numbers attend to each other.
        block_size: Queries and keys of a tile.

    Raises:
        ValueError: For shapes that do not fit together.
    """
    pairs = AttentionMask.read(
        _logits_shape(query, key), mask, is_causal, query_seq_lengths, key_value_seq_lengths, local_window_size,
        segment_ids,
    )  # fmt: skip
    return _exact(query, key, scale, pairs, block_size)


def certified_max_logits(
    query: Array,
    key: Array,
    tau: float | Array,
    *,
    lse: Array | None = None,
    scale: float | None = None,
    mask: Array | None = None,
    is_causal: bool = False,
    query_seq_lengths: Array | None = None,
    key_value_seq_lengths: Array | None = None,
    local_window_size: Window = None,
    segment_ids: SegmentIds = None,
    block_size: int = 256,
) -> Array:
    """Compute what `exact_max_logits` does where a head may exceed τ; return −inf for all heads where none can.

        S ≤ |scale| · max|q_i| · max|k_j|        S ≤ max LSE_i        (Cauchy–Schwarz; log-sum-exp of a row)

    To find that one of the bounds is at most τ for every head, rounding included, takes no product of queries and keys;
    a bound is never reported. Under `jax.vmap` the choice becomes a select, and the maxima are always computed.

    Args:
        query: [B, T, H, d].
        key: [B, S, G, d], where G divides H.
        tau: The largest logit a head may keep.
        lse: Log-sum-exp, float32 [B, T, H], of the scaled logits under this mask and nothing else: no soft cap, bias or
            sink.
        scale: From q · k to a logit; None: 1/√d.
        mask: Broadcastable to [B, H, T, S]; True attends, and so does what is not zero.
        is_causal: Key j ≤ query i, both counted from their start.
        query_seq_lengths: int [B]; the positions from there on are padding.
        key_value_seq_lengths: int [B]; the positions from there on are padding.
        local_window_size: (left, right), or one number for both: i − left ≤ j ≤ i + right.
        segment_ids: int [B, T], or a tuple of [B, T] and [B, S]: equal numbers attend to each other.
        block_size: Queries and keys of a tile.

    Raises:
        ValueError: For τ ≤ 0, for an `lse` narrower than float32 and for shapes that do not fit together.
    """
    check_if_concrete(tau, check_tau)
    pairs = AttentionMask.read(
        _logits_shape(query, key), mask, is_causal, query_seq_lengths, key_value_seq_lengths, local_window_size,
        segment_ids,
    )  # fmt: skip
    bounds = _norm_bounds(query, key, scale)
    certified = jnp.isfinite(bounds) & (bounds <= tau)
    if lse is not None:
        check_array("lse", lse)
        bounds = _lse_bounds(query, lse, bounds)
        certified |= jnp.isfinite(bounds) & (bounds <= tau)
    return jax.lax.cond(
        certified.all(),
        lambda: jnp.full_like(bounds, -math.inf),
        lambda: _exact(query, key, scale, pairs, block_size),
    )


def dot_product_attention(
    query: Array,
    key: Array,
    value: Array,
    bias: Array | None = None,
    mask: Array | None = None,
    *,
    tau: float | Array | None = None,
    scale: float | None = None,
    is_causal: bool = False,
    query_seq_lengths: Array | None = None,
    key_value_seq_lengths: Array | None = None,
    local_window_size: Window = None,
    implementation: Literal["xla", "cudnn"] | None = None,
) -> tuple[Array, Array]:
    """Return the output of `jax.nn.dot_product_attention`, and the maxima [H].

    JAX's own log-sum-exp is not used: it is rounded to the dtype of the keys, by up to 0.5 at 126 in bfloat16, and
    under `jax.jit` requesting it changes the output's last bits.

    Args:
        query: [B, T, H, d].
        key: [B, S, G, d], where G divides H.
        value: [B, S, G, d].
        bias: Added to the logits, broadcastable to [B, H, T, S]. It is not a part of S; values of it that forbid a pair
            (`muonclip.core.attention_mask`) are a mask.
        mask: bool, broadcastable to [B, H, T, S]; True attends.
        tau: None computes every maximum; a number, only where norms do not bound all heads by it.
        scale: From q · k to a logit; None: 1/√d.
        is_causal: Key j ≤ query i, both counted from their start.
        query_seq_lengths: int [B]; the positions from there on are padding.
        key_value_seq_lengths: int [B]; the positions from there on are padding.
        local_window_size: (left, right), or one number for both: i − left ≤ j ≤ i + right.
        implementation: JAX's: "xla", "cudnn", or None for its choice.
    """
    check_real("value", value)
    check_choice("implementation", implementation, None, "xla", "cudnn")
    mask = None if mask is None else as_bool(mask)
    masks: dict[str, Any] = dict(
        is_causal=is_causal,
        query_seq_lengths=query_seq_lengths,
        key_value_seq_lengths=key_value_seq_lengths,
        local_window_size=checked_window(local_window_size),
        scale=scale,
    )
    attend = functools.partial(
        jax.nn.dot_product_attention, query, key, value, bias, mask, implementation=implementation, **masks
    )
    allowed = mask
    if bias is not None:
        check_floating("bias", bias)
        shape = _logits_shape(query, key)
        for name, each in (("bias", bias), ("mask", mask)):
            if each is not None:
                check_broadcasts(name, each, shape)
        permitted = ~is_masked(bias, xp=jnp)
        allowed = permitted if mask is None else mask & permitted
    if tau is None:
        maxima = exact_max_logits(query, key, mask=allowed, **masks)
    else:
        maxima = certified_max_logits(query, key, tau, mask=allowed, **masks)
    return attend(), maxima


def _exact(query: Array, key: Array, scale: float | None, pairs: AttentionMask, block_size: int) -> Array:
    block_size = check_whole("block_size", block_size, hint="the positions of a tile.")
    query, key = jax.lax.stop_gradient((_batched(query), _batched(key)))
    dtype = _statistic_dtype(query, key)
    batch, length, heads, head_width = query.shape
    groups = key.shape[2]
    factor = _scale(query, scale).astype(dtype)
    query = query.reshape(batch, length, groups, heads // groups, head_width)
    height, width = (min(block_size, each) for each in pairs.lengths)
    tiles = pairs.tiles(height, width) if batch and height and width else np.empty((0, 2))
    if not len(tiles):
        return jnp.full(heads, -math.inf, dtype)

    def maxima(tile: Array) -> Array:
        row, column = tile
        q, k = cut(query, 1, row, height).astype(dtype), cut(key, 1, column, width).astype(dtype)
        # The default precision is bfloat16 on TPU and TF32 on GPU.
        logits = jnp.einsum("btgrd,bsgd->bgrts", q, k, precision=jax.lax.Precision.HIGHEST) * factor
        allowed = pairs.allowed(row, column, height, width, groups)
        if allowed is not None:
            logits = jnp.where(allowed, logits, -math.inf)
        return _max(logits, (0, 3, 4))

    return _max(jax.lax.map(maxima, jnp.asarray(tiles)), 0).reshape(heads)


def _norm_bounds(query: Array, key: Array, scale: float | None) -> Array:
    """Return an upper bound [H] of the logits of each head, by norms, also of logits as `_exact` rounds them."""
    query, key = jax.lax.stop_gradient((_batched(query), _batched(key)))
    dtype = _statistic_dtype(query, key)
    *_, heads, width = query.shape
    limits = jnp.finfo(dtype)

    def longest(x: Array) -> Array:  # [B, heads]; squares below `tiny` are lost
        squares = jnp.sum(jnp.square(x.astype(dtype)), -1) + width * limits.tiny
        return jnp.sqrt(_max(squares, 1, initial=0.0))

    keys = jnp.repeat(longest(key), heads // key.shape[2], axis=1)
    margin = 1 + 4 * (width + 4) * float(limits.eps)
    return _max(longest(query) * keys, 0, initial=0.0) * (abs(_scale(query, scale)) * margin).astype(dtype)


def _lse_bounds(query: Array, lse: Array, norm_bounds: Array) -> Array:
    """Return an upper bound [H] of the logits of each head, by log-sum-exp.

    The margin is what products can lose in a kernel that rounds float32 inputs to bfloat16, as the default precision of
    a TPU does. It is ample for the rounding of a log-sum-exp too: where that is needed, norms alone exceed τ.
    """
    if not jnp.issubdtype(lse.dtype, jnp.floating) or jnp.finfo(lse.dtype).bits < 32:
        raise ValueError(
            f"lse is {lse.dtype}, whose rounding is larger than the margin of a certificate. Ask the kernel for its "
            "log-sum-exp in float32, or leave lse out."
        )
    if lse.shape != query.shape[:-1]:
        raise ValueError(f"lse has shape {lse.shape}; give [B, T, H], here {query.shape[:-1]}.")
    top = _max(jax.lax.stop_gradient(lse), tuple(range(lse.ndim - 1))).astype(norm_bounds.dtype)
    return top + norm_bounds / 128


def _max(x: Array, axis: int | tuple[int, ...], initial: float = -math.inf) -> Array:
    """Return the maximum, or NaN where there is one: XLA's own reduction on the CPU loses some."""
    return jnp.where(jnp.isnan(x).any(axis), math.nan, x.max(axis, initial=initial))


def _logits_shape(query: Array, key: Array) -> tuple[int, int, int, int]:
    """Return the shape of the logits, [B, H, T, S], of queries and keys that fit together."""
    check_real("query", query)
    check_real("key", key)
    if query.ndim not in (3, 4) or key.ndim != query.ndim:
        raise ValueError(
            f"query has shape {query.shape} and key {key.shape}; give [B, length, heads, d] both, or both without B."
        )
    batch, rows, heads, width = _batched(query).shape
    key_batch, columns, groups, key_width = _batched(key).shape
    if (batch, width) != (key_batch, key_width):
        raise ValueError(f"query {query.shape} and key {key.shape} differ in batch or head width.")
    if groups < 1 or heads % groups:
        raise ValueError(
            f"key has {groups} heads and query {heads}; every key head serves equally many query heads. Give a key "
            "[B, S, G, d] with G a divisor of H."
        )
    return batch, heads, rows, columns


def _batched(x: Array) -> Array:
    return x if x.ndim == 4 else x[None]


def _statistic_dtype(query: Array, key: Array) -> Any:
    return max(wide(query.dtype), wide(key.dtype), key=lambda dtype: dtype.itemsize)


def _scale(query: Array, scale: float | None) -> Array:
    if scale is not None:
        check_scalar("scale", scale, FINITE)
    return jnp.asarray(1 / math.sqrt(query.shape[-1]) if scale is None else scale)

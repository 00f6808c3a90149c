"""Decoding multi-head latent attention from its latents, with and without QK-norm; no key is kept, nor made again.

Per token the cache has the normed latent c, the rotated key r that all heads share, and with QK-norm one number per
head (QK-Normed MLA, arXiv 2606.16310). The keys of a head h are `[W_uk,h c | r']`, with r' as projected, and their RMS
norm has two factors. The gain g is the same for every token: its part for the latent moves to the query, its part for
r' is in the cache. What depends on the token is one number ρ, so a logit needs no key:

    ρ_h = 1 / √(mean([W_uk,h c | r']²) + ε)          r = rotate(g_rope · r')
    q_h · k_h = ρ_h · ((W_uk,hᵀ (g_nope · q_nope,h)) · c + q_rope,h · r)

Without QK-norm ρ = 1 and g = 1. Values are `W_uv,h c`: the latents are weighed first, and W_uv is applied to their sum.
Shapes are those of `models/torch.py`; L is the width of the latent, S the number of tokens in the cache.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from muonclip.core.arguments import check_kind
from muonclip.models.torch import LatentAttention, Layer, MoE, at_least_float32, rotary_table, rotate

__all__ = ["LatentCache", "decode"]


class LatentCache(NamedTuple):
    """The tokens that one latent attention has seen.

    Attributes:
        latent: [B, S, kv_lora_rank], normed: what keys and values are projections of.
        rotary_key: [B, S, qk_rope_head_dim], rotated: the part of the key that all heads share.
        inverse_rms: [B, S, H], with QK-norm; None without it.
    """

    latent: Tensor
    rotary_key: Tensor
    inverse_rms: Tensor | None


@torch.no_grad()
def decode(model: MoE, tokens: Tensor, caches: list[LatentCache] | None = None) -> tuple[Tensor, list[LatentCache]]:
    """Compute the logits [B, T, V] of tokens that follow those in the caches, and the caches with them.

    They are those of `model` for the whole sequence, up to rounding. Nothing is observed.

    Args:
        model: A model with `attention="mla"`, whole on this process.
        tokens: int64 [B, T].
        caches: Of every layer, as the call before returned them; None: the tokens are the first.

    Raises:
        ValueError: For a model without latent attention, caches of other layers, or more than max_seq_len positions.
    """
    check_kind("model", model, MoE, "a muonclip.models.torch.MoE")
    check_kind("tokens", tokens, Tensor, "an int64 tensor [B, T]")
    config = model.config
    if config.attention != "mla":
        raise ValueError(f'attention={config.attention!r} has no latents to decode from. Use attention="mla".')
    if caches is not None and len(caches) != config.num_layers:
        raise ValueError(f"caches has {len(caches)} entries; the model has {config.num_layers} layers. Pass one each.")
    start = caches[0].latent.shape[1] if caches else 0
    stop = start + tokens.shape[-1]
    if stop > config.max_seq_len:
        raise ValueError(f"tokens end at position {stop}; max_seq_len={config.max_seq_len}. Build with more.")
    x = model.embed_tokens(tokens)
    cos, sin = (table.to(x.device, at_least_float32(x).dtype) for table in rotary_table(config, start, stop))
    grown: list[LatentCache] = []
    for layer, cache in zip(model.layers, caches or [None] * config.num_layers, strict=True):
        assert isinstance(layer, Layer)
        assert isinstance(layer.attn, LatentAttention)
        normed = layer.attn_norm(x)
        grown.append(_extended(layer.attn, normed, (cos, sin), cache))
        x = x + _attend(layer.attn, normed, (cos, sin), grown[-1])
        x = x + layer.transform(x)
    return model.lm_head(model.norm(x)), grown


def _extended(
    attn: LatentAttention, x: Tensor, rotary: tuple[Tensor, Tensor], cache: LatentCache | None
) -> LatentCache:
    """Return the cache with the tokens of x [B, T, D] at its end."""
    latent, shared = attn.kv_a_norm(attn.kv_a_proj(x)), attn.k_rope_proj(x)  # [B, T, L], [B, T, R]
    inverse_rms = None
    if attn.config.qk_norm:
        up, _ = _absorbed_weights(attn)
        nope = at_least_float32(torch.einsum("hnl,btl->bthn", up, latent))
        squares = nope.square().sum(-1) + at_least_float32(shared).square().sum(-1, keepdim=True)  # [B, T, H]
        inverse_rms = torch.rsqrt(squares / attn.config.qk_head_dim + attn.config.norm_eps)
        shared = shared * attn.k_norm.weight[attn.config.qk_nope_head_dim :]
    rotary_key = rotate(shared[:, :, None], rotary)[:, :, 0]
    if cache is not None:
        latent, rotary_key = torch.cat((cache.latent, latent), 1), torch.cat((cache.rotary_key, rotary_key), 1)
        if inverse_rms is not None and cache.inverse_rms is not None:
            inverse_rms = torch.cat((cache.inverse_rms, inverse_rms), 1)
    return LatentCache(latent, rotary_key, inverse_rms)


def _attend(attn: LatentAttention, x: Tensor, rotary: tuple[Tensor, Tensor], cache: LatentCache) -> Tensor:
    """Attend from x [B, T, D], the last tokens of the cache, to all before each of them and to itself: [B, T, D]."""
    config, length, seen = attn.config, x.shape[1], cache.latent.shape[1]
    q = attn.project_queries(x)
    if config.qk_norm:
        q = attn.q_norm(q)
    nope, rope = rotate(q, rotary).split((config.qk_nope_head_dim, config.qk_rope_head_dim), -1)
    if config.qk_norm:
        nope = nope * attn.k_norm.weight[: config.qk_nope_head_dim]
    up, value = _absorbed_weights(attn)
    query = torch.einsum("bthn,hnl->bthl", nope, up)
    logits = torch.einsum("bthl,bsl->bhts", query, cache.latent) + torch.einsum(
        "bthr,bsr->bhts", rope, cache.rotary_key
    )
    logits = config.softmax_scale * at_least_float32(logits)
    if cache.inverse_rms is not None:
        logits = logits * cache.inverse_rms.transpose(1, 2)[:, :, None]
    if config.softcap is not None:
        logits = config.softcap * torch.tanh(logits / config.softcap)
    later = torch.ones(length, seen, dtype=torch.bool, device=x.device).triu(seen - length + 1)
    weights = logits.masked_fill(later, -torch.inf).softmax(-1).to(x.dtype)
    weighed = torch.einsum("bhts,bsl->bthl", weights, cache.latent)
    return attn.o_proj(torch.einsum("bthl,hvl->bthv", weighed, value).flatten(2))


def _absorbed_weights(attn: LatentAttention) -> tuple[Tensor, Tensor]:
    """Return W_uk [H, nope, L] and W_uv [H, v, L]."""
    config = attn.config
    up = attn.kv_b_proj.weight.unflatten(0, (-1, config.qk_nope_head_dim + config.v_head_dim))
    nope, value = up.split((config.qk_nope_head_dim, config.v_head_dim), 1)
    return nope, value

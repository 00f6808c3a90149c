"""Scaled dot-product attention that observes its maximum logits.

Shapes: B batch, H query heads, G key heads (G divides H), T positions, d head width.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from muonclip.core.arguments import FINITE, check_flag, check_kind, check_number, check_whole
from muonclip.torch.logits.host_modes import unobservable, unobserved, unseen
from muonclip.torch.logits.host_sdpa import sdpa_with_lse
from muonclip.torch.logits.mask import AttentionMask
from muonclip.torch.logits.max_logits import MaxLogits
from muonclip.torch.logits.ring_attention import RingStep, is_context_parallel, run_ring
from muonclip.torch.logits.sharded_attention import on_local_heads
from muonclip.torch.mesh import is_dtensor


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None = None,
    is_causal: bool = False,
    attn_mask: Tensor | None = None,
    window: int | None = None,
    document_ids: Tensor | None = None,
    softcap: float | None = None,
    max_logits: MaxLogits | None = None,
) -> Tensor:
    """Compute scaled dot-product attention [B, H, Tq, dv], and observe its maximum logits.

    With `max_logits`, forwards with gradients enabled are observed; the result and its gradients are unaffected. Under
    tensor parallelism H counts this rank's heads, or q, k and v are DTensors sharded on their heads.

    Args:
        q: [B, H, Tq, d].
        k: [B, G, Tk, d], where G divides H.
        v: [B, G, Tk, dv].
        scale: From q · k to a logit; None: 1/√d.
        is_causal: Query i sees keys j ≤ i, see `AttentionMask`.
        attn_mask: Broadcastable to [B, H, Tq, Tk], see `AttentionMask`.
        window: Keys that a query may see, see `AttentionMask`.
        document_ids: int [B, T], see `AttentionMask`.
        softcap: c, for logits c·tanh(S/c), computed densely; S is taken before it.
        max_logits: The statistic that is filled; None: none.

    Raises:
        ValueError: For shapes that do not fit.
    """
    _check_options(scale, is_causal, attn_mask, window, document_ids, softcap, max_logits)
    if is_dtensor(q):
        masks: dict[str, Any] = dict(is_causal=is_causal, attn_mask=attn_mask, window=window, document_ids=document_ids)
        return on_local_heads(attention, q, k, v, scale=scale, softcap=softcap, max_logits=max_logits, **masks)
    _check_shapes(q, k, v, max_logits)
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else float(scale) if isinstance(scale, int) else scale
    if is_context_parallel():
        masks = dict(attn_mask=attn_mask, window=window, document_ids=document_ids, softcap=softcap)
        return _attend_in_ring(q, k, v, scale, is_causal, masks, max_logits)
    mask = AttentionMask(q.shape[-2], k.shape[-2], is_causal, window, document_ids, attn_mask)
    mask.check_batch(q.shape[0], q.shape[1])
    y, lse = _attend(q, k, v, scale, mask, softcap)
    if max_logits is not None and torch.is_grad_enabled() and not q.is_meta:
        max_logits.observe(q, k, scale=scale, mask=mask, lse=lse)
    return y


def _attend(
    q: Tensor, k: Tensor, v: Tensor, scale: float, mask: AttentionMask, softcap: float | None
) -> tuple[Tensor, Tensor | None]:
    if softcap is not None:
        return _softcapped_attention(q, k, v, scale, mask, softcap), None
    dense = None if mask.is_causal_only else mask.dense(q.device)
    if dense is not None and q.dtype == torch.float64 and dense.dtype != torch.bool:
        dense = dense.to(q.dtype)  # PyTorch 2.13's kernel misreads a float32 mask of float64 queries on some CPUs
    width = v.shape[-1]
    if width < q.shape[-1] and q.device.type == "cpu":  # its fast kernel takes equal widths only
        v = F.pad(v, (0, q.shape[-1] - width))
    y, lse = sdpa_with_lse(
        q, k, v, dense, is_causal=mask.is_causal_only, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
    )
    return y[..., :width], lse


def _attend_in_ring(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    is_causal: bool,
    masks: Mapping[str, object],
    max_logits: MaxLogits | None,
) -> Tensor:
    """Attend by torch's `context_parallel`, to sequences of which this rank has a part."""
    for name, given in masks.items():
        if given is not None:
            raise ValueError(f"{name} was given within context_parallel, which takes is_causal and scale alone.")
    width = v.shape[-1]
    if width < q.shape[-1]:  # its kernels take equal widths only
        v = F.pad(v, (0, q.shape[-1] - width))
    run = functools.partial(
        F.scaled_dot_product_attention, q, k, v, is_causal=is_causal, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
    )
    observes = max_logits is not None and torch.is_grad_enabled() and unobservable() is None

    @unseen
    def take(step: RingStep) -> None:
        assert max_logits is not None
        mask = AttentionMask(step.q.shape[-2], step.k.shape[-2], step.is_causal)
        max_logits.sequence_ranks |= step.ranks
        max_logits.take(step.q.detach(), step.k.detach(), scale=scale, mask=mask, lse=None)

    with unobserved():  # by others than `max_logits`
        y = run_ring(run, take) if observes else run()
    return y[..., :width]


def _softcapped_attention(q: Tensor, k: Tensor, v: Tensor, scale: float, mask: AttentionMask, softcap: float) -> Tensor:
    repeats = q.shape[1] // k.shape[1]
    scores = (q * scale) @ k.repeat_interleave(repeats, 1).mT
    scores = softcap * torch.tanh(scores.to(torch.promote_types(scores.dtype, torch.float32)) / softcap)
    v = v.repeat_interleave(repeats, 1)
    dense = mask.dense(q.device)
    if dense is None:
        return scores.softmax(-1).to(v.dtype) @ v
    if dense.dtype == torch.bool:
        dense = torch.zeros(dense.shape, dtype=scores.dtype, device=dense.device).masked_fill(~dense, -math.inf)
    blind = (dense == -math.inf).all(-1, keepdim=True)  # a query without allowed keys gets zeros, as from SDPA
    weights = (scores + dense.masked_fill(blind, 0)).softmax(-1).masked_fill(blind, 0)
    return weights.to(v.dtype) @ v


def _check_options(
    scale: Any, is_causal: Any, attn_mask: Any, window: Any, document_ids: Any, softcap: Any, max_logits: Any
) -> None:
    if scale is not None:
        check_number("scale", scale, FINITE)
    check_flag("is_causal", is_causal)
    for name, each in (("attn_mask", attn_mask), ("document_ids", document_ids)):
        if each is not None:
            check_kind(name, each, Tensor, "a tensor, or None")
    if attn_mask is not None and not attn_mask.is_nested and attn_mask.ndim < 2:
        raise ValueError(f"attn_mask has shape {tuple(attn_mask.shape)}; it must be broadcastable to [B, H, Tq, Tk].")
    if window is not None and type(window) is not int:
        check_whole("window", window, hint="the keys that a query may see, its own included, or None.")
    if softcap is not None:
        check_number("softcap", softcap, ("positive and finite", lambda x: 0 < x < math.inf), "leave it out for none.")
    if max_logits is not None:
        check_kind("max_logits", max_logits, MaxLogits, "a MaxLogits, or None")


def _check_shapes(q: Tensor, k: Tensor, v: Tensor, max_logits: MaxLogits | None) -> None:
    for name, each in (("q", q), ("k", k), ("v", v)):
        check_kind(name, each, Tensor, "a tensor")
        if each.is_nested or each.layout is not torch.strided:
            how = "nested" if each.is_nested else "sparse"
            raise TypeError(f"{name} is a {how} tensor; give dense ones, with document_ids for sequences in a row.")
    shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
    if not q.ndim == k.ndim == v.ndim == 4 or q.shape[-1] != k.shape[-1] or k.shape[:3] != v.shape[:3]:
        raise ValueError(f"{shapes}: attention needs q [B, H, Tq, d], k [B, G, Tk, d] and v [B, G, Tk, dv].")
    if q.shape[0] != k.shape[0]:
        raise ValueError(f"{shapes}: q and k differ in their batch.")
    if not (q.shape[1] and k.shape[1]) or q.shape[1] % k.shape[1]:
        raise ValueError(f"{shapes}: the {k.shape[1]} key heads do not divide the {q.shape[1]} query heads.")
    if max_logits is not None:
        max_logits.first_of(q.shape[1], shapes)

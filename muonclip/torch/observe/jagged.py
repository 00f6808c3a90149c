"""Sequences of unequal lengths in one jagged nested tensor, read as a row of packed sequences."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from muonclip.torch.observe.attention_call import AttentionCall
from muonclip.torch.observe.packed_sequences import packed_pairs


def is_jagged(tensor: Any) -> bool:
    """Tell whether a tensor is nested and of the jagged layout."""
    return isinstance(tensor, Tensor) and tensor.is_nested and tensor.layout == torch.jagged


def packed(call: AttentionCall) -> AttentionCall:
    """Return a call whose queries and keys are jagged, [B, heads, T*, d], with [1, heads, total, d] in their place."""
    tensors: list[Any] = [call.q, call.k, call.v]
    if not all(map(is_jagged, tensors)):
        return replace(call, problem="its queries, keys and values are not all jagged")
    q, k, v = (each.values() for each in tensors)
    axes = {each._ragged_idx for each in tensors}
    if axes == {1} and q.ndim == k.ndim == v.ndim == 4:  # groups of unequal size, of sequences of one length
        mask: Any = call.attn_mask.values() if is_jagged(call.attn_mask) else call.attn_mask  # pyright: ignore
        return replace(call, q=q, k=k, v=v, attn_mask=mask)
    if axes != {2} or any(each.lengths() is not None for each in tensors) or call.attn_mask is not None:
        return replace(call, problem="its jagged tensors have gaps, a mask, or no axis of heads before the positions")
    queries, keys = (each.offsets() for each in tensors[:2])
    pairs = packed_pairs(queries, keys, (q.shape[-2], k.shape[-2]), bottom_right=False)
    return replace(call, q=q[None], k=k[None], v=v[None], **pairs)


def values_of(tensor: Any) -> Tensor:
    """Return the values of a jagged tensor, which are easier to work with, and other tensors as they are."""
    return tensor.values() if is_jagged(tensor) else tensor


def like(tensor: Any, values: Tensor) -> Tensor:
    """Return a jagged tensor of other values and the same lengths."""
    return torch.nested.nested_tensor_from_jagged(
        values,
        offsets=tensor.offsets(),
        lengths=tensor.lengths(),
        jagged_dim=tensor._ragged_idx,
        min_seqlen=tensor._maybe_min_seqlen,
        max_seqlen=tensor._maybe_max_seqlen,
    )

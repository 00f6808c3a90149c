"""A sample of what one call of attention had: a few queries with all of their keys, whose logits are computed.

    L = S + C,  S = scale · q_i · k_j        L is what enters the softmax, or a soft cap before it; C is anything added

A kernel is known by what it is given: its C is the mask that it adds. Attention that is written out shows L itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from muonclip.torch.observe import EAGER, AttentionCall, Block, broadcast_heads, columns_of, whole_logits

_MOST_POSITIONS = 16


@dataclass(frozen=True, slots=True, eq=False)
class Sample:
    """Hold what a few queries had.

    `scores`: S [B, heads, T, Tk] of T queries. `dtype`: of L. `values`, `added`: what a kernel has got of them, the
    mask being bool or what it adds. `logits`: L of attention that is written out, in the shape of S, −inf at pairs that
    do not count; `is_capped`: what a cap got. `whole`: L with everything that is added, if that can be observed.
    """

    scores: Tensor
    dtype: torch.dtype
    values: Tensor | None = None
    added: Tensor | None = None
    logits: Tensor | None = None
    whole: Tensor | None = None
    is_capped: bool = False

    @classmethod
    def of(cls, call: AttentionCall, heads: int, capped: tuple[Tensor, Sequence[Block]] | None) -> Sample:
        """Take a sample of a call. `capped`: what a cap got before the softmax, and the products in it."""
        q, k = call.heads_first(call.q), call.heads_first(call.k)
        if capped is not None:
            tensor, blocks = capped
            columns = [columns_of(tensor, block) for block in blocks]
            entering = torch.cat([_some(each.reshape(-1, heads, *each.shape[-2:])) for each in columns], -1)
            scores = torch.cat([_scores(block.q, block.k, block.scale, heads) for block in blocks], -1)
            return cls(scores, tensor.dtype, logits=entering.to(scores.dtype), is_capped=True)
        scores = _scores(q, k, call.scale_or_default(), heads)
        mask = call.attn_mask if isinstance(call.attn_mask, Tensor) else None
        is_added = mask is not None and mask.dtype != torch.bool
        logits = whole_logits(call, heads) if is_added or call.kernel == EAGER else None
        whole = None if logits is None else _some(logits).to(scores.dtype)
        if call.kernel == EAGER:
            return cls(scores, q.dtype, logits=whole, whole=whole)
        added = None if mask is None else _some(mask.expand(*mask.shape[:-2], q.shape[-2], -1))
        return cls(scores, q.dtype, None if call.v is None else call.v[:2].clone(), added, whole=whole)


def _scores(q: Tensor, k: Tensor, scale: float | Tensor, heads: int) -> Tensor:
    q, k, _ = broadcast_heads(q, k, None, heads)
    q, k = _some(q), k[_of_batch(len(k))]
    dtype = torch.promote_types(q.dtype, torch.float32)
    return (q.to(dtype) @ k.to(dtype).repeat_interleave(heads // k.shape[1], 1).mT) * scale


def _some(tensor: Tensor) -> Tensor:
    """Return some sequences and positions of [..., T, any], copied."""
    if tensor.ndim > 3:
        tensor = tensor[_of_batch(len(tensor))]
    length = tensor.shape[-2]
    if length > _MOST_POSITIONS:
        positions = torch.linspace(0, length - 1, _MOST_POSITIONS, device=tensor.device).long()
        return tensor.index_select(-2, positions)
    return tensor.clone()


def _of_batch(size: int) -> Any:
    return [0, size - 1] if size > 1 else slice(None)

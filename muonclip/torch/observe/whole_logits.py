"""The maxima of whole logits, for attention whose added terms are linear in the queries, as relative positions are.

    S = scale · q_i · k_j + q_i · r_ij        over the pairs that count; T. Shaw, 1803.02155, eq. 5

The added tensor is as large as the logits, so that computing them needs no more memory than the attention itself.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from muonclip.torch.logits import is_masked
from muonclip.torch.mesh import is_block_mask, is_dtensor
from muonclip.torch.observe.attention_call import AttentionCall, broadcast_heads


@torch.no_grad()
def whole_logits(call: AttentionCall, heads: int) -> Tensor | None:
    """Return the logits [B, heads, Tq, Tk] with what is added to them, −inf at pairs that do not count.

    None where the call does not show them.
    """
    q, k = _local(call.heads_first(call.q.detach())), _local(call.heads_first(call.k.detach()))
    mask = call.attn_mask
    mask = _local(mask.detach()) if isinstance(mask, Tensor) else None
    if call.entering is not None:
        shape = (-1, heads, *call.entering.shape[-2:])
        logits = call.entering.detach()
        if mask is not None:
            alike = mask.shape[:-2].numel() == logits.shape[:-2].numel()  # whatever the axes are
            allowed = mask.reshape(logits.shape) if alike else mask.expand(logits.shape)
            logits = logits.masked_fill(~allowed, -math.inf)
        return logits.reshape(shape)
    others = call.window, call.document_ids, call.key_document_ids, call.score_mod
    if call.kernel.written_out or is_block_mask(call.attn_mask) or any(each is not None for each in others):
        return None
    q, k, mask = broadcast_heads(q, k, mask, heads)
    dtype = torch.promote_types(q.dtype, torch.float32)
    logits = q.to(dtype) @ k.to(dtype).repeat_interleave(heads // k.shape[1], 1).mT * call.scale_or_default()
    if call.is_causal:
        logits = logits.masked_fill(~torch.ones(logits.shape[-2:], dtype=torch.bool, device=q.device).tril(), -math.inf)
    if mask is None:
        return logits
    if mask.dtype == torch.bool:
        return logits.masked_fill(~mask, -math.inf)
    return (logits + mask).masked_fill(is_masked(mask), -math.inf)


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if is_dtensor(tensor) else tensor

"""A sample of what one call of attention had: a few queries with all of their keys, whose logits are computed.

    L = S + C,  S = scale · q_i · k_j        L is what enters the softmax, or a soft cap before it; C is anything added

A kernel is known by what it is given: its C is the mask that it adds. Attention that is written out shows L itself.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from muonclip.torch.observe import AttentionCall, Block, broadcast_heads, columns_of, values_of, whole_logits

_MOST_POSITIONS = 16


@dataclass(frozen=True, slots=True, eq=False)
class Sample:
    """Hold what a few queries had.

    `scores`: S [B, heads, T, Tk] of T queries. `dtype`: of L. `values`, `added`: what a kernel has got of them, the
    mask being bool or what it adds; or what a score_mod does to scores. Of attention that is written out: `logits`, L
    in the shape of S, −inf at pairs that do not count, and `others`, the columns of the softmax that are not of keys;
    where a cap `is_capped`, L is what the cap got, and all that entered the softmax is in `others`. `whole`: L with
    everything that is added, if that can be observed. `by_pair`: S was multiplied by a factor of each pair.
    `of_softmax`: what all logits of a query have in common is not seen.
    """

    scores: Tensor
    dtype: torch.dtype
    values: Tensor | None = None
    added: Tensor | None = None
    logits: Tensor | None = None
    others: Tensor | None = None
    whole: Tensor | None = None
    is_capped: bool = False
    by_pair: bool = False
    of_softmax: bool = True

    @classmethod
    def of_kernel(cls, call: AttentionCall, heads: int) -> Sample:
        """Take a sample of a call of a kernel."""
        q, k = call.heads_first(call.q), call.heads_first(call.k)
        scores = _scores(q, k, call.scale_or_default(), heads)
        mask = call.attn_mask if isinstance(call.attn_mask, Tensor) else None
        logits = whole_logits(call, heads) if mask is not None and mask.dtype != torch.bool else None
        added = None if mask is None else some(mask.expand(*mask.shape[:-2], q.shape[-2], -1))
        if call.score_mod is not None:
            b, h, i, j = (torch.arange(n, device=q.device) for n in (len(q), q.shape[1], q.shape[2], k.shape[2]))
            added = call.score_mod.effects(b[_of_batch(len(b))], h, some(i[:, None])[:, 0], j)
        return cls(
            scores,
            q.dtype,
            values=None if call.v is None else call.v[:2].clone(),
            added=added,
            whole=None if logits is None else some(logits),
        )

    @classmethod
    def of_written_out(
        cls,
        call: AttentionCall,
        heads: int,
        tensor: Tensor,
        blocks: Sequence[Block],
        capped: tuple[Tensor, Sequence[Block]] | None,
    ) -> Sample:
        """Take a sample of a softmax of `tensor`, in which the `blocks` are products. `capped`: what a cap got before,
        and the products in it."""
        entering, others = _divided(tensor.detach(), blocks, heads)
        if capped is not None:
            scores = _scores_of(capped[1], heads)
            logits, _ = _divided(*capped, heads)
            logits, whole = logits.to(scores.dtype), torch.cat([entering, others], -1)
            return cls(scores, tensor.dtype, logits=logits, others=whole, is_capped=True, by_pair=call.by_pair)
        scores, logits = _scores_of(blocks, heads), whole_logits(call, heads)
        of_softmax = call.kernel.weights_by == "softmax"
        whole = None if logits is None else some(logits).to(scores.dtype)
        logits = entering.to(scores.dtype) if whole is None else whole
        others = others.to(scores.dtype)
        return cls(scores, tensor.dtype, None, None, logits, others, whole, False, call.by_pair, of_softmax)


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Yield the tensors that a model has returned, those in dataclasses included."""
    for leaf in tree_leaves(value):
        if isinstance(leaf, Tensor):
            yield values_of(leaf)
        elif dataclasses.is_dataclass(leaf) and not isinstance(leaf, type):
            yield from tensors_in([getattr(leaf, each.name) for each in dataclasses.fields(leaf)])


def some(tensor: Tensor) -> Tensor:
    """Return some sequences and positions of [..., T, any], copied; all of a vector."""
    if tensor.ndim > 2:
        tensor = tensor[_of_batch(len(tensor))]
    if tensor.ndim > 1 and tensor.shape[-2] > _MOST_POSITIONS:
        positions = torch.linspace(0, tensor.shape[-2] - 1, _MOST_POSITIONS, device=tensor.device).long()
        return tensor.index_select(-2, positions)
    return tensor.clone()


def _divided(tensor: Tensor, blocks: Sequence[Block], heads: int) -> tuple[Tensor, Tensor]:
    """Return some rows of the columns that are products of queries and keys, and of the others."""
    tensor = some(tensor.reshape(-1, heads, *tensor.shape[-2:]))
    columns = torch.cat([columns_of(tensor, block) for block in blocks], -1)
    is_other = torch.ones(tensor.shape[-1], dtype=torch.bool, device=tensor.device)
    for block in blocks:
        columns_of(is_other, block).fill_(False)
    return columns, tensor[..., is_other]


def _scores_of(blocks: Sequence[Block], heads: int) -> Tensor:
    return torch.cat([_scores(block.q, block.k, block.scale, heads) for block in blocks], -1)


def _scores(q: Tensor, k: Tensor, scale: float | Tensor, heads: int) -> Tensor:
    q, k, _ = broadcast_heads(q, k, None, heads)
    q, k = some(q), k[_of_batch(len(k))]
    dtype = torch.promote_types(q.dtype, torch.float32)
    return (q.to(dtype) @ k.to(dtype).repeat_interleave(heads // k.shape[1], 1).mT) * scale


def _of_batch(size: int) -> Any:
    return [0, size - 1] if size > 1 else slice(None)

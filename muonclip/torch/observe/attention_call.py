"""One call of an attention kernel, in the form that is common to all kernels, and what is known of each kernel."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from muonclip.torch.logits import RingStep
from muonclip.torch.mesh import is_block_mask
from muonclip.torch.observe.score_mod import ScoreMod

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

_TILES = "norm bound, then exact tiles"


@dataclass(frozen=True, slots=True)
class AttentionKernel:
    """A kernel: its name, where its function is, and how its maxima are computed on each kind of device.

    `home`: "module:attribute" of the function that models call; "" for one that is not a function. `patch`: from the
    function there to what takes its place while models are observed; see `handlers.handled`. `if_unobserved`: what to
    add to the error where such an attention was not observed. `weights_by`: the function that makes weights of
    the logits, of attention that is written out in plain functions of torch.
    """

    name: str
    home: str = ""
    patch: Callable[[Any], Any] | None = field(default=None, compare=False)
    on_cpu: str = _TILES
    on_cuda: str = "norm bound, then tiles"
    if_unobserved: str = ""
    weights_by: str = ""

    @property
    def written_out(self) -> bool:
        """Tell whether it is made of plain functions of torch."""
        return bool(self.weights_by)

    def maxima_on(self, device_type: str) -> str:
        """Say how the maxima are computed on a kind of device, in a few words."""
        return {"cuda": self.on_cuda, "cpu": self.on_cpu}.get(device_type, "exact tiles")

    def __reduce__(self) -> tuple[Any, ...]:
        """Save it without the patch, which is a closure; a copy is equal."""
        return (
            AttentionKernel,
            (self.name, self.home, None, self.on_cpu, self.on_cuda, self.if_unobserved, self.weights_by),
        )


DECLARED = AttentionKernel("declared", on_cpu="row LSE or norm bound, then exact rows")
"""An attention that hands its statistic to `muonclip.torch.attention` itself."""
UNREAD = AttentionKernel("not read", on_cpu="nothing", on_cuda="nothing")
"""An attention whose logits cannot be read, and which is declared to be left alone."""


@dataclass(frozen=True, slots=True, eq=False)
class AttentionCall:
    """One call. `q`, `k`, `v` as the kernel takes them, with the axes of `layout`: [..., heads, T, d] or
    [..., T, heads, d].

    `scale`: of the logits, a number or a tensor []; None: 1/√d. `attn_mask`, `is_causal`, `window`, `document_ids`,
    `key_document_ids`, `query_offset`: as `AttentionMask` takes them; a BlockMask of FlexAttention, too. `score_mod`:
    what is done to each logit. `run` makes the call and returns what it returns.

    What a kernel can say more, where it speaks of these logits under this mask and nothing else: `run_with_lse` returns
    the result and the log-sum-exp of the rows, fp32 [B, heads, Tq], or None; `run_with_max` the result and the exact
    maxima [heads]; `run_in_ring(take)` the result of attention whose keys pass in a ring, of which `take` gets each
    step. `entering`: what enters the softmax, the columns of the keys, of attention that is written out and
    has one product; `by_pair`: that is S times a factor of each pair; `terms`: the operands [..., T, d] of other
    products in it. `run_in_trace` is for kernels that would be slow or not differentiable: the values of its result do
    not matter. `problem`: what was not understood of the logits. `made_in`: the modules that were running when the
    product was made, of an attention that is written out.
    """

    kernel: AttentionKernel
    run: Callable[[], Any]
    q: Tensor
    k: Tensor
    v: Tensor | None
    scale: float | Tensor | None = None
    attn_mask: Tensor | BlockMask | None = None
    is_causal: bool = False
    window: int | tuple[int | None, int | None] | None = None
    document_ids: Tensor | None = None
    key_document_ids: Tensor | None = None
    query_offset: int | Tensor = 0
    score_mod: ScoreMod | None = None
    layout: Literal["heads, positions", "positions, heads"] = "heads, positions"
    run_with_lse: Callable[[], tuple[Any, Tensor | None]] | None = None
    run_with_max: Callable[[], tuple[Any, Tensor]] | None = None
    run_in_ring: Callable[[Callable[[RingStep], None]], Any] | None = None
    run_in_trace: Callable[[], Any] | None = None
    entering: Tensor | None = None
    by_pair: bool = False
    terms: tuple[tuple[Tensor, Tensor], ...] = ()
    problem: str = ""
    made_in: object = None

    def heads_first(self, tensor: Tensor) -> Tensor:
        """Return `q`, `k` or `v` as [..., heads, T, d]."""
        return tensor if self.layout == "heads, positions" else tensor.transpose(-3, -2)

    def with_heads_from(self, axis: int) -> AttentionCall:
        """Return the call with its heads, which are on another axis of q [..., heads, windows, T, d], where others have
        them: before the last two. `axis`: from the end, of queries with more than four axes."""
        if axis == -3 or self.q.ndim < 5:
            return self
        q, k = (heads_from(axis, each) for each in (self.q, self.k))
        v, mask, entering = (
            heads_from(axis, each) if isinstance(each, Tensor) else each
            for each in (self.v, self.attn_mask, self.entering)
        )
        return replace(self, q=q, k=k, v=v, attn_mask=mask, entering=entering, terms=(), run_with_lse=None)

    def scale_or_default(self) -> float | Tensor:
        """Return the scale of the logits."""
        return 1 / math.sqrt(self.q.shape[-1]) if self.scale is None else self.scale

    def dense_mask(self) -> Tensor | None:
        """Return `attn_mask` as a tensor; bool [B or 1, H or 1, Tq, Tk] for a BlockMask."""
        if not is_block_mask(self.attn_mask):
            return self.attn_mask
        from torch.nn.attention.flex_attention import create_mask

        batch, heads = self.attn_mask.shape[:2]
        lengths = self.heads_first(self.q).shape[-2], self.heads_first(self.k).shape[-2]
        return create_mask(self.attn_mask.mask_mod, batch, heads, *lengths, device=self.q.device)


def heads_from(axis: int, tensor: Tensor) -> Tensor:
    """Return a tensor whose heads are on an axis, from the end, with them before its last two; where it has no such
    axis, heads have it in common."""
    if axis == -3 or tensor.ndim < 3:
        return tensor
    return tensor.movedim(axis, -3) if tensor.ndim >= -axis else tensor.unsqueeze(-3)


def broadcast_heads(q: Tensor, k: Tensor, mask: Tensor | None, heads: int) -> tuple[Tensor, Tensor, Tensor | None]:
    """q [B, heads, Tq, d], k [B, G, Tk, d] and a mask broadcastable to [B, heads, Tq, Tk], whatever axes are in front
    of the last two of q and k, broadcast as attention does it."""
    lengths = q.shape[-2], k.shape[-2]
    if q.ndim == k.ndim == 4 and q.shape[1] == heads:
        batch = max(len(q), len(k))
        q, k = q.expand(batch, -1, -1, -1), k.expand(batch, -1, -1, -1)
        if mask is not None and mask.ndim > 2:
            mask = mask.expand(batch, heads, *mask.shape[-2:])
        return q, k, mask
    leading = torch.broadcast_shapes(q.shape[:-2], k.shape[:-2])
    if mask is not None and mask.ndim > 2:
        has_heads = mask.ndim - 2 > len(leading)  # [B, heads, Tq, Tk] for queries [B · heads, Tq, d]
        in_front = (leading.numel() // heads, heads) if has_heads else leading
        mask = mask.expand(*in_front, *lengths).reshape(-1, heads, *lengths)
    q, k = (t.expand(*leading, *t.shape[-2:]).reshape(-1, heads, *t.shape[-2:]) for t in (q, k))
    return q, k, mask

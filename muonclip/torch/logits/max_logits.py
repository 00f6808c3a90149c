"""The maximum attention logit of every head, and attention that observes it.

    S_h = scale · max over allowed pairs of q_i · k_j          (Kimi K2, arXiv 2507.20534, §2.1)

S is signed, after the softmax scale, before soft-capping and additive biases, over the pairs that the mask allows.
Shapes: B batch, H query heads, G key heads (G divides H), T positions, d head width.
"""

from __future__ import annotations

import copy
import math
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.tensor import DTensor

from muonclip.torch.logits.exact_maxima import observe, observe_opaquely
from muonclip.torch.logits.host_sdpa import sdpa_with_lse
from muonclip.torch.logits.mask import AttentionMask
from muonclip.torch.logits.sharded_attention import on_local_heads


class HeadsOfRank(Protocol):
    """The heads of an attention that the queries of a forward on this rank are."""

    def first(self, count: int) -> int:
        """Return the head with which this rank's `count` heads begin.

        Raises ValueError where these are not its heads.
        """
        ...

    def count(self) -> int | None:
        """Return how many heads this rank has; None where it has all of them."""
        ...


class _OfThread(threading.local):
    unobserved = False


_of_thread = _OfThread()


def is_unobserved() -> bool:
    """Tell whether an engine makes this thread run a model for shapes alone, which is not a forward of the training."""
    return _of_thread.unobserved


@contextmanager
def unobserved() -> Iterator[None]:
    """Keep every statistic from observing what this thread runs within."""
    before, _of_thread.unobserved = _of_thread.unobserved, True
    try:
        yield
    finally:
        _of_thread.unobserved = before


class MaxLogits:
    """The running maximum of each head since the last reset: over micro-batches, forwards and recomputation.

    In addition to the largest logit seen it holds a bound on those that were not computed. `threshold` is the logit
    from which on maxima must be exact; a head whose bound stays at or below it is only certified. −inf: all are exact.
    `QKClip` sets it to its τ with `observe="needed"`.

    Set it as a plain attribute of the attention module and pass it to `attention`. It is not a buffer on purpose:
    DistributedDataParallel overwrites registered buffers with rank 0's at every forward. It is written in place, and
    follows the device of the queries.

    Under tensor parallelism a forward has this rank's heads only. `query_heads`, which a `QKProjection` sets, says
    which; the others stay −inf here, and `QKClip` takes the maximum over the ranks. Raises ValueError for `num_heads` <
    1.
    """

    def __init__(self, num_heads: int) -> None:
        if num_heads < 1:
            raise ValueError(f"num_heads={num_heads} must be at least 1.")
        self.num_heads = num_heads
        self.threshold = -math.inf
        self.query_heads: HeadsOfRank | None = None
        self.packed = torch.empty(3 * num_heads + 1, dtype=torch.float32, device="cpu")
        self.reset()

    @property
    def maximum(self) -> Tensor:
        """The largest finite logit computed, fp32 [heads]; −inf where there was none."""
        return self.packed[: self.num_heads]

    @property
    def bound(self) -> Tensor:
        """An upper bound of all logits, fp32 [heads]; equal to `maximum`, or less, where that is exact."""
        return self.packed[self.num_heads : 2 * self.num_heads]

    @property
    def nonfinite(self) -> Tensor:
        """1 where a NaN or +inf was seen, fp32 [heads]; separate, so that it does not hide later finite maxima."""
        return self.packed[2 * self.num_heads : -1]

    @property
    def observed(self) -> Tensor:
        """1 once a forward has been observed, fp32 []."""
        return self.packed[-1]

    def reset(self) -> None:
        """Forget what was seen."""
        self.packed.zero_()
        self.packed[: 2 * self.num_heads].fill_(-math.inf)

    def first_of(self, count: int, seen: str = "") -> int:
        """Return which head the first one of a forward with `count` query heads is.

        `seen`: the shapes or names to put in the error. Raises ValueError if it is not known.
        """
        if count == self.num_heads:
            return 0
        if self.query_heads is None or count > self.num_heads:
            raise ValueError(
                f"max_logits counts {self.num_heads} heads, but {seen or 'attention'} has {count} query heads. Make "
                "MaxLogits(num_heads) count the heads of all ranks; if this rank has some of them (tensor "
                "parallelism), build QKClip(model), or the QKProjection of this attention, before the forward: it says "
                "which heads these are."
            )
        return self.query_heads.first(count)

    def heads_in(self, q: Tensor) -> int:
        """Return how many heads there are in queries [..., Tq, d] of one forward."""
        if self.query_heads is None or (q.ndim == 4 and q.shape[1] == self.num_heads):
            return self.num_heads
        count = self.query_heads.count()
        if count is None:
            return self.num_heads
        return q.shape[1] if q.ndim == 4 else count

    @torch.no_grad()
    def update(self, maxima: Tensor) -> None:
        """Add one forward's exact maxima [heads], or those of this rank's heads, of any dtype and source.

        Raises ValueError for another number of heads.
        """
        if maxima.ndim != 1 or (len(maxima) != self.num_heads and self.query_heads is None):
            raise ValueError(f"maxima has shape {tuple(maxima.shape)}; this attention has {self.num_heads} heads.")
        first = self.first_of(len(maxima))
        if _of_thread.unobserved:
            return
        self.follow(maxima)
        maxima = maxima.float()
        bad = maxima.isnan() | (maxima == math.inf)
        maxima = maxima.masked_fill(bad, -math.inf)
        for part, value in ((self.maximum, maxima), (self.bound, maxima), (self.nonfinite, bad.float())):
            own = part[first : first + len(maxima)]
            own.copy_(torch.maximum(own, value))
        self.observed.fill_(1.0)

    def observe(self, q: Tensor, k: Tensor, *, scale: float, mask: AttentionMask, lse: Tensor | None = None) -> None:
        """Add one forward, from its queries [B, heads, Tq, d] and keys [B, G, Tk, d].

        Maxima are computed, or certified where `threshold` allows it. `heads` are all of them, or this rank's. `scale`:
        from q · k to a logit. `mask`: the pairs that count. `lse`, fp32 [B, heads, Tq]: log-sum-exp of these logits
        under this mask, if known. Raises ValueError for another number of heads.
        """
        first = self.first_of(q.shape[1])
        if _of_thread.unobserved:
            return
        self.follow(q)
        take = observe_opaquely if torch.compiler.is_compiling() else observe
        take(q, k, self.packed, scale=scale, threshold=self.threshold, mask=mask, lse=lse, first=first)

    def follow(self, tensor: Tensor) -> None:
        """Move to the device of a tensor."""
        if self.packed.device != tensor.device:
            self.packed = self.packed.to(tensor.device)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "query_heads": None}  # the projection sets it again

    def __deepcopy__(self, memo: dict[int, Any]) -> MaxLogits:
        copied = memo[id(self)] = object.__new__(type(self))
        copied.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return copied

    def __repr__(self) -> str:
        return f"MaxLogits({self.maximum.tolist()})"


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
    """Compute scaled dot-product attention, and observe its maximum logits.

    `q`: [B, H, Tq, d], `k`: [B, G, Tk, d], `v`: [B, G, Tk, dv] → [B, H, Tq, dv]. `scale`: of the logits (None: 1/√d).
    Masks: see `AttentionMask`. `softcap` c: the logits become c·tanh(S/c), computed densely; S is taken before it.
    With `max_logits`, forwards with gradients enabled are observed; the result and its gradients are unaffected.
    Under tensor parallelism H counts this rank's heads, or q, k and v are DTensors sharded on their heads.
    Raises ValueError for shapes that do not fit.
    """
    if isinstance(q, DTensor):
        masks: dict[str, Any] = dict(is_causal=is_causal, attn_mask=attn_mask, window=window, document_ids=document_ids)
        return on_local_heads(attention, q, k, v, scale=scale, softcap=softcap, max_logits=max_logits, **masks)
    _check_shapes(q, k, v, max_logits)
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    mask = AttentionMask(q.shape[-2], k.shape[-2], is_causal, window, document_ids, attn_mask)
    y, lse = _attend(q, k, v, scale, mask, softcap)
    if max_logits is not None and torch.is_grad_enabled() and not q.is_meta:
        max_logits.observe(q.detach(), k.detach(), scale=scale, mask=mask, lse=lse)
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


def _softcapped_attention(q: Tensor, k: Tensor, v: Tensor, scale: float, mask: AttentionMask, softcap: float) -> Tensor:
    repeats = q.shape[1] // k.shape[1]
    scores = (q * scale) @ k.repeat_interleave(repeats, 1).mT
    scores = softcap * torch.tanh(scores.to(torch.promote_types(scores.dtype, torch.float32)) / softcap)
    v = v.repeat_interleave(repeats, 1)
    dense = mask.dense(q.device)
    if dense is None:
        return scores.softmax(-1).to(v.dtype) @ v
    if dense.dtype == torch.bool:
        dense = torch.zeros(dense.shape, device=dense.device).masked_fill(~dense, -math.inf)
    blind = (dense == -math.inf).all(-1, keepdim=True)  # a query without allowed keys gets zeros, as from SDPA
    weights = (scores + dense.masked_fill(blind, 0)).softmax(-1).masked_fill(blind, 0)
    return weights.to(v.dtype) @ v


def _check_shapes(q: Tensor, k: Tensor, v: Tensor, max_logits: MaxLogits | None) -> None:
    shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
    if not q.ndim == k.ndim == v.ndim == 4 or q.shape[-1] != k.shape[-1] or k.shape[:3] != v.shape[:3]:
        raise ValueError(f"{shapes}: attention needs q [B, H, Tq, d], k [B, G, Tk, d] and v [B, G, Tk, dv].")
    if q.shape[1] % k.shape[1]:
        raise ValueError(f"{shapes}: the {k.shape[1]} key heads do not divide the {q.shape[1]} query heads.")
    if max_logits is not None:
        max_logits.first_of(q.shape[1], shapes)

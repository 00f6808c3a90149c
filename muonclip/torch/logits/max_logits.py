"""The statistic of QK-Clip: the maximum attention logit of every head since the last reset.

    S_h = scale · max over allowed pairs of q_i · k_j          (Kimi K2, arXiv 2507.20534, §2.1)

S is signed, after the softmax scale, before soft-capping and additive biases, over the pairs that the mask allows.
Shapes: B batch, H query heads, G key heads (G divides H), T positions, d head width.
"""

from __future__ import annotations

import copy
import math
from typing import Any, Protocol

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from muonclip.core.arguments import check_kind, check_whole
from muonclip.torch.logits.divided_heads import divided_heads, heads_divided
from muonclip.torch.logits.exact_maxima import check_forward, observe, observe_opaquely
from muonclip.torch.logits.host_modes import FAKE, Unobservable, unobservable, unseen
from muonclip.torch.logits.mask import AttentionMask


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


class MaxLogits:
    """The running maximum of each head since the last reset: over micro-batches, forwards and recomputation.

    In addition to the largest logit seen it holds a bound on those that were not computed. `threshold` is the logit
    from which on maxima must be exact; a head whose bound stays at or below it is only certified. −inf: all are exact.
    `QKClip` sets it to its τ with `observe="needed"`.

    Set it as a plain attribute of the attention module and pass it to `attention`. It is not a buffer on purpose:
    DistributedDataParallel overwrites registered buffers with rank 0's at every forward. It is written in place, and
    follows the device of the queries.

    Under tensor parallelism a forward has this rank's heads only. `query_heads`, which a `QKProjection` sets, says
    which; the others stay −inf here, and `QKClip` takes the maximum over the ranks.

    Args:
        num_heads: Number of query heads, of all ranks; at least 1.

    Raises:
        ValueError: For `num_heads` < 1.
    """

    resets = 0
    """How often it was reset."""
    left_out: Unobservable | None = None
    """The reason why a forward was not observed since the last reset."""
    sequence_ranks: frozenset[int] = frozenset()
    """The ranks between which the sequences of the last forward were divided; empty where they were whole."""

    def __init__(self, num_heads: int) -> None:
        self.num_heads = num_heads = check_whole("num_heads", num_heads)
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
        self.resets += 1
        self.left_out = None
        self.sequence_ranks = frozenset()
        self.packed.zero_()
        self.packed[: 2 * self.num_heads].fill_(-math.inf)

    def first_of(self, count: int, seen: str = "") -> int:
        """Return which head the first one of a forward with `count` query heads is.

        `seen`: the shapes or names to put in the error. Raises ValueError if it is not known.
        """
        if count == self.num_heads:
            return 0
        divided = divided_heads()
        if divided is not None:
            with heads_divided(None):
                return self.first_of(count * divided.size, seen) + divided.rank * count
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
        if q.ndim == 4:
            return q.shape[1]
        count = None if self.query_heads is None else self.query_heads.count()
        return self.num_heads if count is None else count

    def update(self, maxima: Tensor) -> None:
        """Add one forward's exact maxima.

        Args:
            maxima: [heads] of any dtype and source: of all heads, or of this rank's.

        Raises:
            ValueError: For another number of heads.
        """
        check_kind("maxima", maxima, Tensor, "a tensor [heads]")
        if maxima.is_nested or maxima.is_complex() or maxima.dtype == torch.bool:
            raise TypeError(f"maxima is {maxima.dtype}; give real numbers [heads].")
        if maxima.ndim != 1 or (len(maxima) != self.num_heads and self.query_heads is None):
            raise ValueError(f"maxima has shape {tuple(maxima.shape)}; this attention has {self.num_heads} heads.")
        first = self.first_of(len(maxima))
        if (reason := unobservable()) is not None:
            self.leave_out(reason)
        else:
            self._update(maxima, first)

    @unseen
    @torch.no_grad()
    def _update(self, maxima: Tensor, first: int) -> None:
        self.follow(maxima)
        maxima = maxima.float()
        bad = maxima.isnan() | (maxima == math.inf)
        maxima = maxima.masked_fill(bad, -math.inf)
        for part, value in ((self.maximum, maxima), (self.bound, maxima), (self.nonfinite, bad.float())):
            own = part[first : first + len(maxima)]
            own.copy_(torch.maximum(own, value))
        self.observed.fill_(1.0)

    def observe(self, q: Tensor, k: Tensor, *, scale: float, mask: AttentionMask, lse: Tensor | None = None) -> None:
        """Add one forward, from its queries and keys. Maxima are computed, or certified where `threshold` allows it.

        Args:
            q: [B, heads, Tq, d], of all heads, or of this rank's.
            k: [B, G, Tk, d], where G divides the heads.
            scale: From q · k to a logit.
            mask: The pairs that count.
            lse: Log-sum-exp of these logits under this mask, fp32 [B, heads, Tq], if known.

        Raises:
            ValueError: For another number of heads.
        """
        check_forward(q, k, scale, mask, lse)
        first = self.first_of(q.shape[1])
        if (reason := unobservable()) is not None:
            self.leave_out(reason)
        else:
            self._take_unseen(q, k, scale=scale, mask=mask, lse=lse, first=first)

    def take(self, q: Tensor, k: Tensor, *, scale: float, mask: AttentionMask, lse: Tensor | None) -> None:
        """Do what `observe` does, for callers that have seen to it that they may observe and are not seen."""
        self._take(q, k, scale=scale, mask=mask, lse=lse, first=self.first_of(q.shape[1]))

    def _take(self, q: Tensor, k: Tensor, **options: Any) -> None:
        if isinstance(q, FakeTensor):
            self.leave_out(FAKE)
            return
        self.follow(q)
        take = observe_opaquely if torch.compiler.is_compiling() else observe
        take(q, k, self.packed, threshold=self.threshold, **options)

    _take_unseen = unseen(_take)

    def leave_out(self, reason: Unobservable) -> None:
        """Remember why a forward was not observed, until the next reset."""
        if reason.where and not torch.compiler.is_compiling() and not (self.left_out and self.left_out.trains):
            self.left_out = reason

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

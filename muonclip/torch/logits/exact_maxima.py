"""Exact maximum logits from queries and keys, computing only what a bound does not decide.

    s_ij ≤ LSE_i        s_ij ≤ |scale| · |q_i| · max_j |k_j|          (log-sum-exp of the row; Cauchy–Schwarz)

A row whose bound is at most a maximum already found cannot hold a larger one, and a head whose rows are all at most τ
needs no clip. So the row with the largest bound is computed first; mostly it decides its head. Otherwise a few more
rows are computed, then tiles. A bound is never used as a maximum: the two are stored separately.

Shapes: B batch, H query heads, G key heads (G divides H), Tq queries, Tk keys, d head width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, library

from muonclip.core.arguments import FINITE, check_kind, check_number
from muonclip.torch.logits.mask import AttentionMask

_TILE_ROWS, _TILE_COLUMNS = 128, 512  # of all heads: a few megabytes, which stay in the cache
_FEW_ROWS = 64  # of one head, computed row by row; more of them are computed in tiles
_MOST_PAIRS = 2**27  # for which the device keeps a condition evaluated


@torch.no_grad()
def measure_max_logits(
    q: Tensor, k: Tensor, *, scale: float, mask: AttentionMask, slopes: Callable[[slice, slice], Tensor] | None = None
) -> Tensor:
    """Compute the exact maxima [H] of one attention, in float32 (float64 for float64), outside autocast and autograd.

    Logits are computed tile by tile. A head with no allowed pair gives −inf; NaN is kept.

    Args:
        q: [B, H, Tq, d].
        k: [B, G, Tk, d], where G divides H.
        scale: From q · k to a logit.
        mask: The pairs that count.
        slopes: Of queries and keys, a tile of factors of the logits, broadcastable to [B, H, rows, columns].
    """
    check_forward(q, k, scale, mask)
    maxima = torch.full((q.shape[1],), -math.inf, dtype=statistic_dtype(q, k), device=q.device)
    with torch.autocast(q.device.type, enabled=False):
        for _, rows in _tiles(q, k, scale, mask, maxima.dtype, slopes=slopes):
            maxima = torch.maximum(maxima, rows.amax((0, 2)))
    return maxima


def check_forward(q: Any, k: Any, scale: Any, mask: Any, lse: Any = None) -> None:
    """Raise TypeError or ValueError, naming the argument, for what is not a forward of attention."""
    if torch.compiler.is_compiling():  # where sizes and scale are symbols
        return
    for name, each in (("q", q), ("k", k)):
        check_kind(name, each, Tensor, "a tensor")
        is_dense = not each.is_nested and each.layout is torch.strided
        if not (is_dense and each.is_floating_point() and each.dtype.itemsize > 1):
            how = "" if is_dense else ", nested" if each.is_nested else f", {each.layout}"
            raise TypeError(f"{name} is {each.dtype}{how}; give a dense tensor of floating numbers.")
    check_kind("mask", mask, AttentionMask, "an AttentionMask")
    if isinstance(scale, bool) or not isinstance(scale, int | float | Tensor | torch.SymFloat):
        check_number("scale", scale, FINITE)
    if isinstance(scale, float) and not math.isfinite(scale):
        raise ValueError(f"scale={scale} must be a finite number.")
    if isinstance(scale, Tensor) and (scale.is_nested or scale.numel() != 1 or scale.dtype in _NO_SCALE):
        raise ValueError(f"scale is a tensor of {scale.dtype}; give a number, or a tensor of one real number.")
    if q.device != k.device:
        raise ValueError(f"q is on {q.device} and k on {k.device}.")
    shapes = f"q {tuple(q.shape)} and k {tuple(k.shape)}"
    if q.ndim != 4 or k.ndim != 4 or q.shape[0] != k.shape[0] or q.shape[-1] != k.shape[-1]:
        raise ValueError(f"{shapes}: q is [B, H, Tq, d] and k [B, G, Tk, d].")
    if not (q.shape[1] and k.shape[1]) or q.shape[1] % k.shape[1]:
        raise ValueError(f"{shapes}: the {k.shape[1]} key heads do not divide the {q.shape[1]} query heads.")
    if (mask.query_length, mask.key_length) != (q.shape[2], k.shape[2]):
        raise ValueError(f"mask is of {mask.query_length} queries and {mask.key_length} keys, of {shapes}.")
    mask.check_batch(q.shape[0], q.shape[1])
    if lse is not None:
        check_kind("lse", lse, Tensor, "a tensor, or None")
        if lse.is_nested or lse.shape != q.shape[:3]:
            seen = "is nested" if lse.is_nested else f"has shape {tuple(lse.shape)}"
            raise ValueError(f"lse {seen}; it is [B, H, Tq], here {tuple(q.shape[:3])}.")


_NO_SCALE = (torch.bool, torch.complex32, torch.complex64, torch.complex128)


@torch.no_grad()
def observe(
    q: Tensor,
    k: Tensor,
    packed: Tensor,
    *,
    scale: float,
    threshold: float,
    mask: AttentionMask,
    lse: Tensor | None,
    first: int = 0,
) -> None:
    """Add one forward to the statistic `packed` (see `MaxLogits`), in place.

    `q`: [B, H, Tq, d], `k`: [B, G, Tk, d]. Heads whose bound is at most `threshold` are certified only; −inf measures
    every maximum exactly. `lse`, fp32 [B, H, Tq]: of the logits under this mask and nothing else. `first`: which head
    of the statistic head 0 of `q` is; the statistic may have more heads.
    """
    maximum, bound, nonfinite = (part[first : first + q.shape[1]] for part in packed[:-1].chunk(3))
    packed[-1:].fill_(1.0)
    floor = maximum.clamp(min=threshold)
    if q.device.type != "cpu":
        seen, rest = _exact_on_device(q, k, floor, scale, mask, lse)
    else:
        bounds = _bounds(q, k, scale, lse)
        top = bounds.amax((0, 2)) if bounds.numel() and k.numel() else torch.full_like(floor, -math.inf)
        if bool((top <= floor).all()):  # mostly; NaN is not
            torch.maximum(bound, top, out=bound)
            return
        seen, rest = _exact(q, k, floor, scale, mask, bounds, ordered=lse is not None)
    seen, rest = seen.float(), rest.float()
    bad = seen.isnan() | (seen == math.inf)
    seen = seen.masked_fill(bad, -math.inf)
    torch.maximum(maximum, seen, out=maximum)
    torch.maximum(bound, torch.maximum(seen, rest.masked_fill(bad, -math.inf)), out=bound)
    torch.maximum(nonfinite, bad.float(), out=nonfinite)


def observe_opaquely(
    q: Tensor,
    k: Tensor,
    packed: Tensor,
    *,
    scale: float,
    threshold: float,
    mask: AttentionMask,
    lse: Tensor | None,
    first: int = 0,
) -> None:
    """Run `observe` as one operator, for `torch.compile`, which would trace its branches and unroll its tiles."""
    offset = mask.query_offset
    by_query, offset = (offset, 0) if isinstance(offset, Tensor) else (None, offset)
    _observe_operator(
        q.detach(), k.detach(), packed, scale, threshold, *mask.reach, mask.document_ids, mask.key_document_ids, offset,
        by_query, None if mask.attn_mask is None else mask.attn_mask.detach(),
        None if lse is None else lse.detach(), first,
    )  # fmt: skip


@library.custom_op("muonclip::observe", mutates_args=("packed",))
def _observe_operator(
    q: Tensor,
    k: Tensor,
    packed: Tensor,
    scale: float,
    threshold: float,
    left: int | None,
    right: int | None,
    document_ids: Tensor | None,
    key_document_ids: Tensor | None,
    offset: int,
    offset_by_query: Tensor | None,
    attn_mask: Tensor | None,
    lse: Tensor | None,
    first: int,
) -> None:
    by_query = offset if offset_by_query is None else offset_by_query
    documents = document_ids, attn_mask, key_document_ids
    mask = AttentionMask(q.shape[-2], k.shape[-2], False, (left, right), *documents, by_query)
    observe(q, k, packed, scale=scale, threshold=threshold, mask=mask, lse=lse, first=first)


@_observe_operator.register_fake
def _(*_: object) -> None:
    return None


def statistic_dtype(q: Tensor, k: Tensor) -> torch.dtype:
    return torch.promote_types(torch.promote_types(q.dtype, k.dtype), torch.float32)


def _bounds(q: Tensor, k: Tensor, scale: float, lse: Tensor | None) -> Tensor:
    """Return upper bounds [B, H, Tq] of the logits of each row; NaN where a logit may be NaN."""
    dtype = statistic_dtype(q, k)
    if lse is None:
        norm_q = torch.linalg.vector_norm(q, dim=-1, dtype=dtype)
        norm_k = torch.linalg.vector_norm(k, dim=-1, dtype=dtype)
        norm_k = norm_k.amax(-1, keepdim=True) if k.shape[-2] else norm_k.new_zeros(*k.shape[:2], 1)
        return norm_q * (norm_k.repeat_interleave(q.shape[1] // k.shape[1], 1) * (abs(scale) * (1 + 1e-5)))
    if bool((lse == 0).any()) and not bool((q.sum(dtype=dtype) + k.sum(dtype=dtype)).isfinite()):
        return torch.full_like(lse, math.nan, dtype=dtype)  # the kernel gives 0 to a row of NaN, as to one without keys
    return _bounds_of_lse(q, lse.to(dtype))


def _bounds_of_lse(q: Tensor, lse: Tensor) -> Tensor:
    """Return upper bounds [B, H, Tq] of the logits of each row; +inf where a kernel gives that to a row without keys.

    A kernel's log-sum-exp may sit below the maximum: 6e-5 were seen for logits of order one.
    """
    return lse + (1e-3 if q.dtype in (torch.bfloat16, torch.float16) else 1e-4) * (1 + lse.abs())


def _exact(
    q: Tensor, k: Tensor, floor: Tensor, scale: float, mask: AttentionMask, bounds: Tensor, *, ordered: bool
) -> tuple[Tensor, Tensor]:
    """Return the largest logit computed [H], and a bound [H] on all others: at most `floor` [H], or at most the former.

    `ordered`: the rows with the largest bounds are likely to hold the maximum.
    """
    work = _OpenHeads(q, k, scale, mask, floor.to(bounds.dtype), bounds)
    with torch.autocast("cpu", enabled=False):
        if ordered:
            work.compute_best_rows()
        work.compute_few_rows()
        work.compute_tiles()
    return work.seen, work.top


class _OpenHeads:
    """The maxima known so far of one forward, and the ways to compute more, each for the heads that are still open.

    `seen` [H]: the largest logit computed. `bounds` [B, H, Tq]: of the rows not computed, −inf for those that were;
    `top` [H]: the largest of them. A head is open while its `top` is above both `seen` and `floor` (or is NaN).
    """

    def __init__(self, q: Tensor, k: Tensor, scale: float, mask: AttentionMask, floor: Tensor, bounds: Tensor) -> None:
        self.q, self.k, self.scale, self.mask, self.floor, self.bounds = q, k, scale, mask, floor, bounds
        self.seen = torch.full_like(floor, -math.inf)
        self.group_size = q.shape[1] // k.shape[1]
        self._refresh()

    def compute_best_rows(self) -> None:
        """Compute the row of the largest bound, in every sequence and head at once."""
        if not self.heads:
            return
        rows = self.bounds.argmax(-1)  # [B, H]
        batch, heads, _, width = self.q.shape
        queries = self.q.gather(2, rows[..., None, None].expand(-1, -1, 1, width)).to(self.seen.dtype) * self.scale
        queries = queries.view(batch, -1, self.group_size, width)
        logits = (queries @ self.k.to(self.seen.dtype).mT).view(batch, heads, -1)
        allowed = self.mask.allowed_to_rows(rows)
        if allowed is not None:
            logits = logits.masked_fill_(~allowed, -math.inf)
        self.seen = torch.maximum(self.seen, logits.amax((0, 2)))
        self.bounds.scatter_(2, rows[..., None], -math.inf)
        self._refresh()

    def compute_few_rows(self) -> None:
        """Compute the rows that could hold more than the known maximum, in heads that have few of them."""
        for head in self.heads:
            bounds = self.bounds[:, head]
            known = torch.maximum(self.floor[head], self.seen[head])
            candidates = (~(bounds <= known)).flatten().nonzero().flatten()
            if len(candidates) > _FEW_ROWS:
                continue
            batch, row = candidates // bounds.shape[1], candidates % bounds.shape[1]
            for b in batch.unique().tolist():
                rows = row[batch == b]
                queries = self.q[b, head, rows].to(self.seen.dtype) * self.scale
                logits = queries @ self.k[b, head // self.group_size].to(self.seen.dtype).mT
                allowed = self.mask.allowed_to(b, head, rows)
                if allowed is not None:
                    logits = logits.masked_fill_(~allowed, -math.inf)
                self.seen[head] = torch.maximum(self.seen[head], logits.amax())
                self.bounds[b, head, rows] = -math.inf
        if self.heads:
            self._refresh()

    def compute_tiles(self) -> None:
        """Compute all rows of the open heads in tiles, except the row blocks that bounds exclude meanwhile."""
        if not self.heads:
            return
        heads = torch.tensor(self.heads, device=self.seen.device)

        def known() -> Tensor:
            return torch.maximum(self.floor, self.seen)[heads]

        tiles = _tiles(self.q, self.k, self.scale, self.mask, self.seen.dtype, self.heads, self.bounds, known)
        for rows, maxima in tiles:
            self.seen[heads] = torch.maximum(self.seen[heads], maxima.amax((0, 2)))
            self.bounds[:, heads, rows] = -math.inf
        self._refresh()

    def _refresh(self) -> None:
        self.top = self.bounds.amax((0, 2))
        self.heads = self._open_heads()

    def _open_heads(self) -> list[int]:
        is_open = ~(self.top <= torch.maximum(self.floor, self.seen))
        return [head for head, each in enumerate(is_open.tolist()) if each]


def _tiles(
    q: Tensor,
    k: Tensor,
    scale: float,
    mask: AttentionMask,
    dtype: torch.dtype,
    heads: list[int] | None = None,
    bounds: Tensor | None = None,
    known: Callable[[], Tensor] | None = None,
    slopes: Callable[[slice, slice], Tensor] | None = None,
) -> Iterator[tuple[slice, Tensor]]:
    """Yield row blocks and their row maxima [B, heads, rows], the products in `dtype`.

    `heads`: which heads; None: all. With `bounds`, blocks are left out of which no bound is above `known()` [heads].
    """
    group_size = q.shape[1] // k.shape[1]
    if heads is not None and len(heads) < q.shape[1]:
        q, k = q[:, heads], k[:, [head // group_size for head in heads]]
        mask = mask.of_heads(heads)
        bounds = None if bounds is None else bounds[:, heads]
    batch, count, _, width = q.shape
    groups = k.shape[1]
    blocks = _slices(mask.query_length, _TILE_ROWS)
    if bounds is not None:  # the largest bounds first, whose maxima may exclude the other blocks
        blocks.sort(key=lambda rows: -bounds[:, :, rows].amax().nan_to_num(math.inf).item())
    q, k = q.to(dtype), k.to(dtype)
    for rows in blocks:
        if bounds is not None and known is not None and (bounds[:, :, rows].amax((0, 2)) <= known()).all():
            continue
        length = rows.stop - rows.start
        # Queries that share a key head are stacked, so that the key is never repeated.
        queries = (q[:, :, rows] * scale).reshape(batch, groups, count // groups * length, width)
        maxima = torch.full((batch, count, length), -math.inf, dtype=dtype, device=q.device)
        for columns in mask.column_tiles(rows, _TILE_COLUMNS):
            scores = (queries @ k[:, :, columns].mT).view(batch, count, length, -1)
            if slopes is not None:
                scores = scores * slopes(rows, columns)
            allowed = mask.allowed(rows, columns, q.device)
            if allowed is not None:
                scores = scores.masked_fill_(~allowed, -math.inf)
            maxima = torch.maximum(maxima, scores.amax(-1))
        yield rows, maxima


def _exact_on_device(
    q: Tensor, k: Tensor, floor: Tensor, scale: float, mask: AttentionMask, lse: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Do the same without waiting for the device: the kernel itself leaves out the rows that a bound excludes."""
    mask = mask.with_dense_condition(_MOST_PAIRS)
    of_kernel = q.device.type == "cuda" and statistic_dtype(q, k) == torch.float32 and mask.condition is None
    if of_kernel and find_spec("triton"):
        from muonclip.torch.logits.kernels.head_maxima import head_maxima

        bounds = None if lse is None else _bounds_of_lse(q, lse)
        with torch.autocast(q.device.type, enabled=False):
            return head_maxima(q, k, scale=scale, mask=mask, floor=floor, bounds=bounds)
    seen = measure_max_logits(q, k, scale=scale, mask=mask)
    return seen, seen


def _slices(length: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, length)) for start in range(0, length, size)]

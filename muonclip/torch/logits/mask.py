"""The query–key pairs that an attention allows, by tiles, so that no T × T mask has to be stored."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from functools import cached_property, reduce

import torch
from torch import Tensor

from muonclip.torch.logits.added_mask import highest_masked


@dataclass(frozen=True)
class AttentionMask:
    """The pairs of query and key that count: those that every given condition allows.

    - `query_length`, `key_length`: Tq and Tk.
    - `is_causal`: query i may see keys j ≤ i (aligned at the first position, as in `scaled_dot_product_attention`).
    - `window`: query i may see keys with |i − j| < window; with `is_causal`, the last `window` keys, its own included.
    - `document_ids`: int [B, T]; a query may see the keys of its own document.
    - `attn_mask`: broadcastable to [B, H, Tq, Tk]; bool (True: allowed), or float, added to the logits
      (`muonclip.core.attention_mask` says which values of it, as a whole, forbid a pair). For padding give
      `keep[:, None, None, :]`.

    Raises ValueError for masks of other shapes and dtypes.
    """

    query_length: int
    key_length: int
    is_causal: bool = False
    window: int | None = None
    document_ids: Tensor | None = None
    attn_mask: Tensor | None = None

    def __post_init__(self) -> None:
        if self.window is not None and self.window < 1:
            raise ValueError(f"window={self.window} must be at least 1: the query's own position.")
        if self.attn_mask is not None:
            _check_mask(self.attn_mask, (self.query_length, self.key_length))
        if self.document_ids is not None and not (
            self.document_ids.ndim == 2 and self.document_ids.shape[1] == self.query_length == self.key_length
        ):
            raise ValueError(
                f"document_ids has shape {tuple(self.document_ids.shape)}; it must be [B, T] with T = "
                f"{self.query_length} queries = {self.key_length} keys."
            )

    @property
    def is_causal_only(self) -> bool:
        """True where causality is the only condition."""
        return self.is_causal and self.window is None and self.document_ids is None and self.attn_mask is None

    def column_tiles(self, rows: slice, size: int) -> list[slice]:
        """Return the keys that some of these queries may see by their position, in tiles of at most `size`.

        Where only position forbids anything, the tiles off the diagonal are whole: they need no mask.
        """
        start, stop = 0, self.key_length
        if self.is_causal:
            stop = min(stop, rows.stop)
        if self.window is not None:
            start = max(start, rows.start - self.window + 1)
            stop = min(stop, rows.stop + self.window - 1)
        edges = [*range(start, stop, size), stop]
        if self.is_causal_only and start < rows.start < stop:
            edges = sorted({*range(start, rows.start, size), rows.start, *range(rows.start, stop, size), stop})
        return [slice(a, b) for a, b in itertools.pairwise(edges)]

    def allowed(self, rows: slice, columns: slice, device: torch.device) -> Tensor | None:
        """Return the allowed pairs, bool, broadcastable to [B, H, rows, columns]; None where every pair is allowed."""
        i = torch.arange(rows.start, rows.stop, device=device)[:, None]
        j = torch.arange(columns.start, columns.stop, device=device)[None, :]
        conditions: list[Tensor] = []
        if self.is_causal and columns.stop - 1 > rows.start:
            conditions.append(j <= i)
        if self.window is not None:
            conditions.append((i - j).abs() < self.window)
        if self.document_ids is not None:
            conditions.append((self.document_ids[:, rows, None] == self.document_ids[:, None, columns])[:, None])
        if self.attn_mask is not None:
            conditions.append(self._allows(_tile(self.attn_mask, rows, columns)))
        return reduce(torch.logical_and, conditions) if conditions else None

    def allowed_to(self, batch: int, head: int, rows: Tensor) -> Tensor | None:
        """Return the keys that these queries, int64 [rows], of one sequence and head may see: bool [rows, Tk]."""
        i, j = rows[:, None], torch.arange(self.key_length, device=rows.device)[None, :]
        conditions: list[Tensor] = []
        if self.is_causal:
            conditions.append(j <= i)
        if self.window is not None:
            conditions.append((i - j).abs() < self.window)
        if self.document_ids is not None:
            documents = self.document_ids[batch]
            conditions.append(documents[rows, None] == documents[None, :])
        if self.attn_mask is not None:
            mask = self.attn_mask
            if mask.ndim == 4:
                mask = mask[batch if mask.shape[0] > 1 else 0, head if mask.shape[1] > 1 else 0]
            conditions.append(self._allows(mask[rows] if mask.ndim == 2 and mask.shape[0] > 1 else mask))
        return reduce(torch.logical_and, conditions) if conditions else None

    def allowed_to_rows(self, rows: Tensor) -> Tensor | None:
        """Return the keys that one query of each sequence and head, int64 [B, H], may see: bool [B, H, Tk]."""
        i, j = rows[..., None], torch.arange(self.key_length, device=rows.device)
        conditions: list[Tensor] = []
        if self.is_causal:
            conditions.append(j <= i)
        if self.window is not None:
            conditions.append((i - j).abs() < self.window)
        if self.document_ids is not None:
            own = self.document_ids.gather(1, rows)  # [B, H]
            conditions.append(own[..., None] == self.document_ids[:, None, :])
        if self.attn_mask is not None:
            full = self.attn_mask.expand(*rows.shape, self.query_length, self.key_length)
            conditions.append(self._allows(full.gather(2, i[..., None].expand(-1, -1, 1, self.key_length)).squeeze(2)))
        return reduce(torch.logical_and, conditions) if conditions else None

    @cached_property
    def highest_masked(self) -> Tensor | None:
        """The number [] at and below which values of a float `attn_mask` forbid their pairs; read when it is asked."""
        return None if self.attn_mask is None or self.attn_mask.dtype == torch.bool else highest_masked(self.attn_mask)

    def _allows(self, part: Tensor) -> Tensor:
        """Tell which pairs a part of `attn_mask` allows."""
        return part if self.highest_masked is None else ~(part <= self.highest_masked)

    def of_heads(self, heads: list[int]) -> AttentionMask:
        """Return the mask of some of the heads."""
        if self.attn_mask is None or self.attn_mask.ndim < 4 or self.attn_mask.shape[1] == 1:
            return self
        return replace(self, attn_mask=self._allows(self.attn_mask[:, heads]))  # what forbids is said by all heads

    def dense(self, device: torch.device) -> Tensor | None:
        """Return the mask as `scaled_dot_product_attention` takes it: bool, or float where `attn_mask` is."""
        allowed = self.allowed(slice(0, self.query_length), slice(0, self.key_length), device)
        if allowed is None or self.attn_mask is None or self.attn_mask.dtype == torch.bool:
            return allowed
        return torch.where(allowed, self.attn_mask, -torch.inf)


def _check_mask(mask: Tensor, lengths: tuple[int, int]) -> None:
    if mask.dtype != torch.bool and not mask.is_floating_point():
        raise ValueError(f"attn_mask is {mask.dtype}; it must be bool (True: allowed) or float (added to the logits).")
    fits = all(size in (1, length) for size, length in zip(mask.shape[-2:], lengths[-mask.ndim :], strict=False))
    if not (mask.ndim in (1, 2, 4) and fits):
        raise ValueError(
            f"attn_mask has shape {tuple(mask.shape)}; it must be broadcastable to [B, H, {lengths[0]}, {lengths[1]}]."
        )


def _tile(mask: Tensor, rows: slice, columns: slice) -> Tensor:
    if mask.ndim >= 2 and mask.shape[-2] > 1:
        mask = mask[..., rows, :]
    return mask[..., columns] if mask.shape[-1] > 1 else mask

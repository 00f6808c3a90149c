"""The query–key pairs that an attention allows, by tiles, so that no T × T mask has to be stored."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from functools import cached_property, reduce

import torch
from torch import Tensor

from muonclip.core.arguments import check_flag, check_kind, check_whole
from muonclip.torch.logits.added_mask import highest_masked
from muonclip.torch.logits.pair_condition import PairCondition

_FAR = 2**62


@dataclass(frozen=True)
class AttentionMask:
    """The pairs of query and key that count: those that every given condition allows.

    Args:
        query_length: Tq, the number of queries.
        key_length: Tk, the number of keys.
        is_causal: Query i may see keys j ≤ i (aligned at the first position, as in `scaled_dot_product_attention`).
        window: Query i may see keys with |i − j| < window; with `is_causal`, the last `window` keys, its own included.
            Or a pair (left, right): i − left ≤ j ≤ i + right, as in FlashAttention; None where a side has no limit.
        document_ids: int [B, Tq]; a query may see the keys of its own document.
        attn_mask: Broadcastable to [B, H, Tq, Tk]; bool (True: allowed), or float, added to the logits
            (`muonclip.core.attention_mask` says which values of it, as a whole, forbid a pair). For padding give
            `keep[:, None, None, :]`.
        key_document_ids: The documents of the keys, int [B, Tk], where they are others.
        query_offset: What causality and window add to i: which key has the first query's position. Tk − Tq aligns at
            the last position. int [B, Tq] where each query has its own, as in packed sequences of unequal lengths.
        condition: A condition that is a function of the indices.

    Raises:
        ValueError: For masks of other shapes and dtypes.
    """

    query_length: int
    key_length: int
    is_causal: bool = False
    window: int | tuple[int | None, int | None] | None = None
    document_ids: Tensor | None = None
    attn_mask: Tensor | None = None
    key_document_ids: Tensor | None = None
    query_offset: int | Tensor = 0
    condition: PairCondition | None = None

    def __post_init__(self) -> None:
        self._check_kinds()
        if isinstance(self.window, int) and self.window < 1:
            raise ValueError(f"window={self.window} must be at least 1: the query's own position.")
        if self.attn_mask is not None:
            _check_mask(self.attn_mask, (self.query_length, self.key_length))
        if self.document_ids is not None and not (
            self.document_ids.ndim == 2 and self.document_ids.shape[1] == self.query_length
        ):
            raise ValueError(
                f"document_ids has shape {tuple(self.document_ids.shape)}; it must be [B, T] with T = "
                f"{self.query_length} queries."
            )
        of_keys = self.documents_of_keys
        if of_keys is not None and not (of_keys.ndim == 2 and of_keys.shape[1] == self.key_length):
            raise ValueError(
                f"document_ids of the keys has shape {tuple(of_keys.shape)}; it must be [B, T] with T = "
                f"{self.key_length} keys. Give key_document_ids where they are not those of the queries."
            )

    def _check_kinds(self) -> None:
        for name in ("query_length", "key_length"):
            if type(length := getattr(self, name)) is not torch.SymInt and not (type(length) is int and length >= 0):
                check_whole(name, length, 0)
        if type(self.is_causal) is not bool:
            check_flag("is_causal", self.is_causal)
        for name in ("document_ids", "attn_mask", "key_document_ids"):
            if (tensor := getattr(self, name)) is not None:
                check_kind(name, tensor, Tensor, "a tensor, or None")
                if tensor.is_nested:
                    raise TypeError(f"{name} is a nested tensor; give a dense one.")
        # a tuple: torch 2.9 cannot compile a test against a union
        if not isinstance(self.query_offset, (int, torch.SymInt, Tensor)) or isinstance(self.query_offset, bool):
            check_whole("query_offset", self.query_offset, -_FAR)
        if isinstance(self.query_offset, Tensor):
            _check_offsets(self.query_offset, self.query_length)
        if self.condition is not None:
            check_kind("condition", self.condition, PairCondition, "a PairCondition, or None")
        sides = self.window if isinstance(self.window, tuple) else (self.window,)
        for side in sides:
            if side is not None and type(side) not in (int, torch.SymInt):
                check_whole("window", side, hint="or a pair (left, right) of such numbers, or None.")
        if isinstance(self.window, tuple) and len(sides) != 2:
            raise ValueError(f"window={self.window} must be one number of keys, or a pair (left, right).")

    def check_batch(self, batch: int, heads: int) -> None:
        """Raise ValueError, naming it, for a part of the mask that is of another number of sequences or heads."""
        of_mask = () if self.attn_mask is None else tuple(self.attn_mask.shape)
        for name in ("document_ids", "key_document_ids", "query_offset"):
            each = getattr(self, name)
            if isinstance(each, Tensor) and len(each) not in (1, batch):
                raise ValueError(f"{name} has shape {tuple(each.shape)}; q has {batch} sequences.")
        if any(size not in (1, whole) for size, whole in zip(of_mask[-3::-1], (heads, batch), strict=False)):
            raise ValueError(
                f"attn_mask has shape {of_mask}; it must be broadcastable to [{batch}, {heads}, Tq, Tk] of q."
            )

    @property
    def documents_of_keys(self) -> Tensor | None:
        """The document of each key, int [B, Tk]."""
        return self.document_ids if self.key_document_ids is None else self.key_document_ids

    @property
    def reach(self) -> tuple[int | None, int | None]:
        """The number of keys before and after its own position that a query may see; None: all of them."""
        left, right = self.window if isinstance(self.window, tuple) else (self._half_width(), self._half_width())
        return left, right if not self.is_causal else 0 if right is None else min(right, 0)

    def _half_width(self) -> int | None:
        return self.window - 1 if isinstance(self.window, int) else None

    @property
    def is_causal_only(self) -> bool:
        """True where causality is the only condition, and query i has the position of key i."""
        return (
            (self.is_causal and self.window is None and self.document_ids is None and self.attn_mask is None)
            and isinstance(self.query_offset, int)
            and (self.query_offset == 0 and self.condition is None)
        )

    def column_tiles(self, rows: slice, size: int) -> list[slice]:
        """Return the keys that some of these queries may see by their position, in tiles of at most `size`.

        Where only position forbids anything, the tiles off the diagonal are whole: they need no mask.
        """
        start, stop = 0, self.key_length
        left, right = self.reach
        if isinstance(self.query_offset, int):
            if right is not None:
                stop = min(stop, rows.stop + self.query_offset + right)
            if left is not None:
                start = max(start, rows.start + self.query_offset - left)
        edges = [*range(start, stop, size), stop]
        if self.is_causal_only and start < rows.start < stop:
            edges = sorted({*range(start, rows.start, size), rows.start, *range(rows.start, stop, size), stop})
        return [slice(a, b) for a, b in itertools.pairwise(edges)]

    def allowed(self, rows: slice, columns: slice, device: torch.device) -> Tensor | None:
        """Return the allowed pairs, bool, broadcastable to [B, H, rows, columns]; None where every pair is allowed."""
        i = torch.arange(rows.start, rows.stop, device=device)[:, None]
        j = torch.arange(columns.start, columns.stop, device=device)[None, :]
        if isinstance(self.query_offset, Tensor):
            i = i + self.query_offset[:, None, rows, None]
            conditions = self._within_reach(i, j)
        else:
            last = rows.start + self.query_offset + (self.reach[1] or 0)  # the last key that the first of these sees
            conditions = self._within_reach(i + self.query_offset, j, is_right_open=columns.stop - 1 <= last)
        if self.document_ids is not None:
            own, of_keys = self.document_ids[:, rows, None], self._documents_of_keys()[:, None, columns]
            conditions.append((own == of_keys)[:, None])
        if self.attn_mask is not None:
            conditions.append(self._allows(_tile(self.attn_mask, rows, columns)))
        if self.condition is not None:
            conditions.append(self.condition.tile(rows, columns))
        return reduce(torch.logical_and, conditions) if conditions else None

    def allowed_to(self, batch: int, head: int, rows: Tensor) -> Tensor | None:
        """Return the keys that these queries, int64 [rows], of one sequence and head may see: bool [rows, Tk]."""
        j = torch.arange(self.key_length, device=rows.device)[None, :]
        offset = self.query_offset
        i = rows + (_of_sequence(offset, batch)[rows] if isinstance(offset, Tensor) else offset)
        conditions = self._within_reach(i[:, None], j)
        if self.document_ids is not None:
            own, of_keys = _of_sequence(self.document_ids, batch), _of_sequence(self._documents_of_keys(), batch)
            conditions.append(own[rows, None] == of_keys[None, :])
        if self.attn_mask is not None:
            mask = self.attn_mask
            if mask.ndim == 4:
                mask = mask[batch if mask.shape[0] > 1 else 0, head if mask.shape[1] > 1 else 0]
            conditions.append(self._allows(mask[rows] if mask.ndim == 2 and mask.shape[0] > 1 else mask))
        if self.condition is not None:
            conditions.append(self.condition.of_queries(batch, head, rows, self.key_length))
        return reduce(torch.logical_and, conditions) if conditions else None

    def allowed_to_rows(self, rows: Tensor) -> Tensor | None:
        """Return the keys that one query of each sequence and head, int64 [B, H], may see: bool [B, H, Tk]."""
        i, j = rows[..., None], torch.arange(self.key_length, device=rows.device)
        offset = self.query_offset
        if isinstance(offset, Tensor):
            offset = offset.expand(len(rows), -1).gather(1, rows)[..., None]  # [B, H, 1]
        conditions = self._within_reach(i + offset, j)
        if self.document_ids is not None:
            own = self.document_ids.expand(len(rows), -1).gather(1, rows)  # [B, H]
            conditions.append(own[..., None] == self._documents_of_keys()[:, None, :])
        if self.attn_mask is not None:
            full = self.attn_mask.expand(*rows.shape, self.query_length, self.key_length)
            conditions.append(self._allows(full.gather(2, i[..., None].expand(-1, -1, 1, self.key_length)).squeeze(2)))
        if self.condition is not None:
            conditions.append(self.condition.of_rows(rows, self.key_length))
        return reduce(torch.logical_and, conditions) if conditions else None

    @cached_property
    def highest_masked(self) -> Tensor | None:
        """The number [] at and below which values of a float `attn_mask` forbid their pairs; read when it is asked."""
        return None if self.attn_mask is None or self.attn_mask.dtype == torch.bool else highest_masked(self.attn_mask)

    def _allows(self, part: Tensor) -> Tensor:
        """Tell which pairs a part of `attn_mask` allows."""
        return part if self.highest_masked is None else ~(part <= self.highest_masked)

    def _documents_of_keys(self) -> Tensor:
        assert self.documents_of_keys is not None
        return self.documents_of_keys

    def _within_reach(self, i: Tensor, j: Tensor, *, is_right_open: bool = False) -> list[Tensor]:
        """Return the conditions that causality and window set on queries and keys at positions `i` and `j`.

        `is_right_open`: none of the keys is too far behind.
        """
        left, right = self.reach
        conditions: list[Tensor] = []
        if right is not None and not is_right_open:
            conditions.append(j <= i + right)
        if left is not None:
            conditions.append(i - j <= left)
        return conditions

    def of_heads(self, heads: list[int]) -> AttentionMask:
        """Return the mask of some of the heads."""
        condition = None if self.condition is None else self.condition.of_heads(heads)
        mask = self.attn_mask
        if mask is not None and mask.ndim == 4 and mask.shape[1] > 1:
            mask = self._allows(mask[:, heads])  # what forbids is said by all heads
        return replace(self, attn_mask=mask, condition=condition)

    def with_dense_condition(self, most: int) -> AttentionMask:
        """Return the mask with its condition evaluated, as a part of `attn_mask`; as it is where that would have more
        than `most` pairs."""
        allowed = None if self.condition is None else self.condition.dense(self.query_length, self.key_length, most)
        if allowed is None:
            return self
        mask = allowed if self.attn_mask is None else allowed & self._allows(self.attn_mask)
        return replace(self, attn_mask=mask, condition=None)

    def dense(self, device: torch.device) -> Tensor | None:
        """Return the mask as `scaled_dot_product_attention` takes it: bool, or float where `attn_mask` is."""
        allowed = self.allowed(slice(0, self.query_length), slice(0, self.key_length), device)
        if allowed is None or self.attn_mask is None or self.attn_mask.dtype == torch.bool:
            return allowed
        return torch.where(allowed, self.attn_mask, -torch.inf)


def _check_offsets(offsets: Tensor, length: int) -> None:
    is_whole = not (offsets.is_floating_point() or offsets.is_complex() or offsets.dtype == torch.bool)
    if offsets.is_nested or not is_whole or offsets.ndim != 2 or offsets.shape[1] not in (1, length):
        shape = "nested" if offsets.is_nested else tuple(offsets.shape)
        raise ValueError(
            f"query_offset is {offsets.dtype} {shape}; give a whole number, or a tensor of them, [B, {length}]."
        )


def _check_mask(mask: Tensor, lengths: tuple[int, int]) -> None:
    if mask.dtype != torch.bool and not mask.is_floating_point():
        raise ValueError(f"attn_mask is {mask.dtype}; it must be bool (True: allowed) or float (added to the logits).")
    fits = all(size in (1, length) for size, length in zip(mask.shape[-2:], lengths[-mask.ndim :], strict=False))
    if not (mask.ndim in (1, 2, 4) and fits):
        raise ValueError(
            f"attn_mask has shape {tuple(mask.shape)}; it must be broadcastable to [B, H, {lengths[0]}, {lengths[1]}]."
        )


def _of_sequence(tensor: Tensor, batch: int) -> Tensor:
    """Return one row of [B, T] or [1, T], which is for all sequences."""
    return tensor[batch if len(tensor) > 1 else 0]


def _tile(mask: Tensor, rows: slice, columns: slice) -> Tensor:
    if mask.ndim >= 2 and mask.shape[-2] > 1:
        mask = mask[..., rows, :]
    return mask[..., columns] if mask.shape[-1] > 1 else mask

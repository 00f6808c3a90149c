"""Sequences that are packed one after the other into a row, as kernels with `cu_seqlens` take them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def packed_pairs(
    starts_of_queries: Tensor, starts_of_keys: Tensor, lengths: tuple[int, int], *, bottom_right: bool = True
) -> dict[str, Any]:
    """Return which pairs a row of packed sequences allows, as arguments of `AttentionMask`.

    `starts_of_queries`, `starts_of_keys`, int [N + 1]: where each of N sequences begins, and where the last one ends.
    `lengths`: Tq and Tk of the row; what is behind the last sequence is seen by nobody. `bottom_right`: causality and
    windows are aligned at the last positions of each sequence, and not at the first ones.
    """
    queries, keys = (
        torch.searchsorted(starts[1:], torch.arange(length, dtype=starts.dtype, device=starts.device), right=True)
        for starts, length in zip((starts_of_queries, starts_of_keys), lengths, strict=True)
    )
    sequences = len(starts_of_queries) - 1
    pairs: dict[str, Any] = dict(
        document_ids=queries[None], key_document_ids=keys.masked_fill(keys == sequences, -1)[None]
    )
    if starts_of_queries is not starts_of_keys:
        shifts = starts_of_keys - starts_of_queries
        of_sequences = shifts[1:] if bottom_right else shifts[:-1]
        pairs["query_offset"] = of_sequences[queries.clamp(max=sequences - 1)][None]
    return pairs

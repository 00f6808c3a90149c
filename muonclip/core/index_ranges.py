"""Sets of indices as ranges (start, stop), one after the other: which rows of a tensor, and in which order."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import TypeAlias

IndexRanges: TypeAlias = tuple[tuple[int, int], ...]


def length(ranges: IndexRanges) -> int:
    """Count the indices in these ranges."""
    return sum(stop - start for start, stop in ranges)


def merged(ranges: Iterable[tuple[int, int]]) -> IndexRanges:
    """Merge neighbours of which one ends where the next begins."""
    joined: list[tuple[int, int]] = []
    for start, stop in ranges:
        if joined and joined[-1][1] == start:
            joined[-1] = (joined[-1][0], stop)
        else:
            joined.append((start, stop))
    return tuple(joined)


def sliced(ranges: IndexRanges, start: int, stop: int) -> IndexRanges:
    """Take the entries from `start` to `stop` of the concatenated ranges."""
    parts: list[tuple[int, int]] = []
    passed = 0
    for first, last in ranges:
        low, high = max(start - passed, 0), min(stop - passed, last - first)
        if low < high:
            parts.append((first + low, first + high))
        passed += last - first
    return merged(parts)


def intersection(wanted: IndexRanges, present: IndexRanges) -> tuple[IndexRanges, IndexRanges]:
    """Find the indices of `wanted` that are in `present`, in the order of `present`.

    Returns where they are in the concatenation of `wanted`, and where in that of `present`.
    """
    in_wanted: list[tuple[int, int]] = []
    in_present: list[tuple[int, int]] = []
    passed = 0
    for start, stop in present:
        skipped = 0
        found: list[tuple[int, tuple[int, int], int]] = []
        for first, last in wanted:
            low, high = max(start, first), min(stop, last)
            if low < high:
                found.append((low, (skipped + low - first, skipped + high - first), high - low))
            skipped += last - first
        for low, where, size in sorted(found):
            in_wanted.append(where)
            in_present.append((passed + low - start, passed + low - start + size))
        passed += stop - start
    return merged(in_wanted), merged(in_present)


def flattened(sizes: Sequence[int], by_axis: Sequence[IndexRanges]) -> IndexRanges:
    """Turn ranges along several axes of these sizes into ranges along their product; no axes have one index, 0."""
    if not sizes:
        return ((0, 1),)
    ranges, *rest = by_axis
    inner = math.prod(sizes[1:])
    within = flattened(sizes[1:], rest)
    if within == ((0, inner),):
        return merged((start * inner, stop * inner) for start, stop in ranges)
    indices = (index for start, stop in ranges for index in range(start, stop))
    return merged((index * inner + start, index * inner + stop) for index in indices for start, stop in within)

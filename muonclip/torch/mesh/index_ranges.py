"""IndexRanges (start, stop): ranges of indices, one after the other."""

from __future__ import annotations

from collections.abc import Iterable

IndexRanges = tuple[tuple[int, int], ...]


def length(runs: IndexRanges) -> int:
    return sum(stop - start for start, stop in runs)


def merged(runs: Iterable[tuple[int, int]]) -> IndexRanges:
    """Those that touch, as one."""
    joined: list[tuple[int, int]] = []
    for start, stop in runs:
        if joined and joined[-1][1] == start:
            joined[-1] = (joined[-1][0], stop)
        else:
            joined.append((start, stop))
    return tuple(joined)


def sliced(runs: IndexRanges, start: int, stop: int) -> IndexRanges:
    """The entries of the concatenated runs from `start` to `stop`."""
    parts, passed = [], 0
    for first, last in runs:
        low, high = max(start - passed, 0), min(stop - passed, last - first)
        if low < high:
            parts.append((first + low, first + high))
        passed += last - first
    return merged(parts)

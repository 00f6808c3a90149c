"""Rows of a table whose names differ in numbers alone, as one row: `layers.0…11.attn.q.weight ×12`."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from itertools import pairwise

_NUMBER = re.compile(r"(?<![^./_\[])(\d+)(?![^./\]])")  # a part of a dotted name, or the end of one: layers.0, layers_0

Row = tuple[str, ...]


def folded(rows: Sequence[Row]) -> list[Row]:
    """Fold the rows whose first cells differ in one number or in several, and whose other cells are equal.

    The innermost number is folded first, so that `layers.0…3.experts.0…7.up` needs each layer to have eight experts.
    A row stays where the first of those in it was.
    """
    entries = [(tuple(_NUMBER.split(row[0])), row[1:], 1) for row in rows]  # text, number, text, …, text
    for back in range(1, max((len(pieces) for pieces, _, _ in entries), default=0) // 2 + 1):
        merged: dict[object, list[tuple[Row, Row, int]]] = {}
        for index, (pieces, cells, count) in enumerate(entries):
            at = len(pieces) - 2 * back
            key = (pieces[:at], pieces[at + 1 :], cells) if at > 0 else index
            merged.setdefault(key, []).append((pieces, cells, count))
        entries = [_as_one(same, back) for same in merged.values()]
    return [("".join(pieces) + (f" ×{count}" if count > 1 else ""), *cells) for pieces, cells, count in entries]


def _as_one(same: Sequence[tuple[Row, Row, int]], back: int) -> tuple[Row, Row, int]:
    pieces, cells, _ = same[0]
    if len(same) == 1:
        return same[0]
    at = len(pieces) - 2 * back
    numbers = _ranges(int(each[at]) for each, _, _ in same)
    return (*pieces[:at], numbers, *pieces[at + 1 :]), cells, sum(count for _, _, count in same)


def _ranges(numbers: Iterable[int]) -> str:
    """Write numbers as "0…5,7,8"."""
    ordered = sorted(numbers)
    starts = [ordered[0], *(after for before, after in pairwise(ordered) if after != before + 1)]
    ends = [*(before for before, after in pairwise(ordered) if after != before + 1), ordered[-1]]
    runs = ((start, end) for start, end in zip(starts, ends, strict=True))
    return ",".join(
        f"{start}…{end}" if end > start + 1 else ",".join(map(str, range(start, end + 1))) for start, end in runs
    )

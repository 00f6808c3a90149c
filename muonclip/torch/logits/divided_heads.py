"""The heads of attention that ranks have divided among themselves for one call, of sequences that they share otherwise.

In Ulysses' sequence parallelism a rank has a part of every sequence and all heads, but while it attends: an all-to-all
gives it whole sequences of its own heads. Rank r of W has the r-th of W equal parts of the heads.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple


class DividedHeads(NamedTuple):
    """The part `rank` of `size` equal parts of the heads that a rank has; `ranks`: all that have one."""

    rank: int
    size: int
    ranks: frozenset[int]


class _OfThread(threading.local):
    heads: DividedHeads | None = None


_of_thread = _OfThread()


def divided_heads() -> DividedHeads | None:
    """Return how heads are divided in the attention that this thread runs; None where they are not."""
    return _of_thread.heads


@contextmanager
def heads_divided(heads: DividedHeads | None) -> Iterator[None]:
    """Let attention of this thread have a part of the heads meanwhile; None: all of them."""
    before, _of_thread.heads = _of_thread.heads, heads
    try:
        yield
    finally:
        _of_thread.heads = before

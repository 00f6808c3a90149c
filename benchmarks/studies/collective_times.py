"""The time that collectives take, and how much of it the host waits: measured around calls of `torch.distributed`.

    blocked     seconds in which this rank's Python thread was in a collective: inside synchronous calls, and in
                `wait()` of asynchronous ones, issuing them included
    in flight   seconds between the issue of a collective and its completion, which for asynchronous ones a callback on
                their future notes, for synchronous ones their return; those in flight together count once

    communication share = blocked / step        what the step would lose if collectives took no time at all
    compute share       = 1 − communication share
    overlap share       = 1 − blocked / in flight    of the time that collectives took, how much was computed meanwhile

Completion includes waiting for ranks that come late: imbalance counts as communication. On an accelerator `wait()` does
not hold the host, and none of this means anything: only whole steps are timed there.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import wraps
from typing import Any
from unittest import mock

import torch.distributed as dist

_WRAPPED = ("all_gather", "all_gather_into_tensor", "all_gather_single", "all_reduce", "all_to_all_single", "broadcast")
_WRAPPED += ("reduce_scatter_tensor",)


@dataclass
class CollectiveTimes:
    blocked: float = 0.0
    intervals: list[list[float]] = field(default_factory=list)  # issue, completion; infinity until then

    @property
    def in_flight(self) -> float:
        """The length of the union of the intervals, in seconds."""
        total, end = 0.0, float("-inf")
        for begun, ended in sorted(interval for interval in self.intervals if interval[1] < math.inf):
            total += max(0.0, ended - max(begun, end))
            end = max(end, ended)
        return total


@contextlib.contextmanager
def collective_times() -> Iterator[CollectiveTimes]:
    """Time the collectives that are issued inside by name, as `dist.all_reduce(…)`.

    FSDP's are not included: they are C++ calls of the process group.
    """
    times = CollectiveTimes()
    timed: Any = {name: _timed(getattr(dist, name), times) for name in _WRAPPED if hasattr(dist, name)}
    with mock.patch.multiple(dist, **timed):
        yield times


def _timed(collective: Callable[..., Any], times: CollectiveTimes) -> Callable[..., Any]:
    @wraps(collective)
    def call(*args: Any, **kwargs: Any) -> Any:
        begun = time.perf_counter()
        work = collective(*args, **kwargs)
        returned = time.perf_counter()
        times.blocked += returned - begun
        if work is None:
            times.intervals.append([begun, returned])
            return None
        times.intervals.append(interval := [begun, math.inf])
        work.get_future().add_done_callback(lambda _: _end(interval))
        return _Waited(work, times, interval)

    return call


def _end(interval: list[float]) -> None:
    interval[1] = min(interval[1], time.perf_counter())


class _Waited:
    """A collective under way whose `wait()` is timed."""

    def __init__(self, work: Any, times: CollectiveTimes, interval: list[float]) -> None:
        self._work, self._times, self._interval = work, times, interval

    def wait(self, *args: Any) -> Any:
        begun = time.perf_counter()
        result = self._work.wait(*args)
        self._times.blocked += time.perf_counter() - begun
        _end(self._interval)  # the callback may come later than this thread goes on
        return result

    def __getattr__(self, name: str) -> Any:
        return getattr(self._work, name)

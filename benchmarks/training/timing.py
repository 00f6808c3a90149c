"""The time of calls in one process, taken in turn, so that whatever else the machine does meets all candidates."""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

import torch

K = TypeVar("K")
T = TypeVar("T")
Clock = Callable[[], float]


def wall_clock(device: str) -> float:
    """Return the time once the device has done all that it was given."""
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def seconds(run: Callable[[], object], clock: Clock = time.perf_counter) -> float:
    begun = clock()
    run()
    return clock() - begun


def clocked(function: Callable[..., T], tell: Callable[[float], object], clock: Clock) -> Callable[..., T]:
    """Return the function with the seconds of every call told."""

    def call(*args: Any, **kwargs: Any) -> T:
        begun = clock()
        result = function(*args, **kwargs)
        tell(clock() - begun)
        return result

    return call


def in_turn(candidates: Mapping[K, Callable[[], float]], rounds: int, warm_up: int = 3) -> dict[K, list[float]]:
    """Return the values of each candidate, one per round. The order is turned and reversed from round to round."""
    names = list(candidates)
    orders = [(names[first:] + names[:first])[::way] for first in range(len(names)) for way in (1, -1)]
    values: dict[K, list[float]] = {name: [] for name in names}
    for index in range(warm_up + rounds):
        for name in orders[index % len(orders)]:
            values[name].append(candidates[name]())
    return {name: of[warm_up:] for name, of in values.items()}


def milliseconds(candidates: Mapping[K, Callable[[], object]], rounds: int) -> dict[K, float]:
    """Return the median time of each candidate's calls."""
    timed = {name: lambda run=run: seconds(run) for name, run in candidates.items()}
    return {name: round(1e3 * statistics.median(of), 3) for name, of in in_turn(timed, rounds).items()}


@contextlib.contextmanager
def torch_threads(count: int | None) -> Iterator[None]:
    """Give PyTorch so many threads meanwhile; None leaves it as it is."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)

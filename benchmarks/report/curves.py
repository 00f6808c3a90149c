"""Curves over the steps, from the records of runs: what the pictures and the page draw alike."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from benchmarks.records.summary import Record

Curve = NDArray[np.float64]  # [2, points]: steps, values
SMOOTHING = 25  # steps


def curve(records: Sequence[Record], value_of: Callable[[Record], float | None]) -> Curve:
    """Of the steps that have a finite value."""
    points = [(record["step"], value) for record in records if (value := value_of(record)) is not None]
    return np.array([point for point in points if math.isfinite(point[1])], dtype=np.float64).reshape(-1, 2).T


def smooth(curve: Curve) -> Curve:
    """The mean of each step and those before it, `SMOOTHING` together (fewer at the start)."""
    steps, values = curve
    total = np.concatenate(([0.0], np.cumsum(values)))
    end = np.arange(1, len(values) + 1)
    begin = np.maximum(0, end - SMOOTHING)
    return np.stack((steps, (total[end] - total[begin]) / (end - begin)))


def mean(curves: Sequence[Curve]) -> Curve:
    """Of an arm's seeds; a diverged run ends early, and the mean with it."""
    shortest = min(curve.shape[1] for curve in curves)
    return np.mean([curve[:, :shortest] for curve in curves], axis=0)


def bits(record: Record) -> float | None:
    """Validation loss in bits, at the steps that have one."""
    return record["val_loss"] / math.log(2) if "val_loss" in record else None


def thin(curve: Curve, most: int) -> Curve:
    """At most so many points (4 or more): the first, the last, and between them the lowest and the highest of equal
    stretches, so that no peak is lost."""
    count = curve.shape[1]
    if count <= most:
        return curve
    kept = {0, count - 1}
    for stretch in np.array_split(np.arange(1, count - 1), (most - 2) // 2):
        values = curve[1, stretch]
        kept |= {int(stretch[values.argmin()]), int(stretch[values.argmax()])}
    return curve[:, sorted(kept)]

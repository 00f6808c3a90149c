"""What seeds allow to say: means with confidence intervals, and where a curve reaches a value."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

from scipy import stats

CONFIDENCE = 0.95


class Interval(NamedTuple):
    """A mean and its two-sided confidence interval by Student's t; NaN bounds for a single value."""

    mean: float
    low: float
    high: float

    @property
    def excludes_zero(self) -> bool:
        return self.low > 0 or self.high < 0


def interval(values: Sequence[float], confidence: float = CONFIDENCE) -> Interval:
    """The mean of the values, each from a seed of its own; for a paired difference, pass the differences."""
    mean = statistics.fmean(values)
    if len(values) < 2:
        return Interval(mean, math.nan, math.nan)
    error = statistics.stdev(values) / math.sqrt(len(values))
    half = float(stats.t.ppf((1 + confidence) / 2, len(values) - 1)) * error
    return Interval(mean, mean - half, mean + half)


def crossing(budgets: Sequence[float], losses: Sequence[float], target: float) -> float | None:
    """The smallest budget at which the loss is down to the target, straight lines between measurements in log budget.

    None where it never is, or is already at the smallest budget: then the answer lies outside what was measured.
    """
    points = sorted(zip(budgets, losses, strict=True))
    if points[0][1] <= target:
        return None
    for (left, above), (right, below) in pairwise(points):
        if below <= target:
            fraction = (above - target) / (above - below)
            return math.exp(math.log(left) + fraction * (math.log(right) - math.log(left)))
    return None

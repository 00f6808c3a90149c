"""Means and medians over seeds with their confidence intervals, and where a curve reaches a value."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, Literal, NamedTuple

CONFIDENCE = 0.95
Verdict = Literal["not finite", "same to the bit", "one seed", "not told from zero", "lower", "higher"]


class Interval(NamedTuple):
    """A mean and its two-sided confidence interval by Student's t; NaN bounds for a single value."""

    mean: float
    low: float
    high: float

    @classmethod
    def from_json(cls, recorded: Mapping[str, Any]) -> Interval:
        return cls(*(recorded[name] for name in cls._fields))

    @property
    def verdict(self) -> Verdict:
        """Return what the interval of a difference says of its sign."""
        if not math.isfinite(self.mean):
            return "not finite"
        if self.mean == self.low == self.high == 0:
            return "same to the bit"
        if not math.isfinite(self.low):
            return "one seed"
        return "lower" if self.high < 0 else "higher" if self.low > 0 else "not told from zero"

    @property
    def level(self) -> str:
        """Write a value that is not a difference: `2.182 ± 0.030`."""
        if not math.isfinite(self.mean):
            return "not finite"
        half = f" ± {self.high - self.mean:.3f}" if math.isfinite(self.high) else ""
        return f"{self.mean:.3f}{half}"

    def __str__(self) -> str:
        """Write a difference: `+0.100 (−0.020 to +0.220)`."""
        mean, low, high = (difference(value) for value in self)
        return mean if self.low == self.high or not math.isfinite(self.low) else f"{mean} ({low} to {high})"


def interval(values: Sequence[float], confidence: float = CONFIDENCE) -> Interval:
    """Return the mean of the values, each from a seed of its own; for a paired difference, pass the differences."""
    mean = statistics.fmean(values)
    if len(values) < 2:
        return Interval(mean, math.nan, math.nan)
    from scipy import stats  # it takes a second to import, and every rank of a run imports this module

    error = statistics.stdev(values) / math.sqrt(len(values)) if math.isfinite(mean) else math.nan
    half = float(stats.t.ppf((1 + confidence) / 2, len(values) - 1)) * error
    return Interval(mean, mean - half, mean + half)


def difference(value: float) -> str:
    """Write a signed number with three decimals, or as a power of ten where those would be zeros."""
    if not math.isfinite(value):
        return "not finite"
    return (f"{value:+.3f}" if abs(value) >= 0.0005 or value == 0 else f"{value:+.0e}").replace("-", "−")


def median_interval(values: Sequence[float], confidence: float = CONFIDENCE) -> dict[str, float | None]:
    """Return the median and its confidence interval by order statistics, whatever the distribution.

    A bound is None where so few values cannot give it.
    """
    from scipy import stats

    ordered, count = sorted(values), len(values)
    below = int(stats.binom.ppf((1 - confidence) / 2, count, 0.5))
    low, high = (ordered[below - 1], ordered[count - below]) if below else (None, None)
    return {"median": statistics.median(ordered), "low": low, "high": high}


def crossing(budgets: Sequence[float], losses: Sequence[float], target: float) -> float | None:
    """Return the smallest budget at which the loss is down to the target.

    Between measurements the loss is a straight line in log budget. None where it never is, or is already at the
    smallest budget: then the answer is outside what was measured.
    """
    points = sorted(zip(budgets, losses, strict=True))
    if points[0][1] <= target:
        return None
    for (left, above), (right, below) in pairwise(points):
        if below <= target:
            fraction = (above - target) / (above - below)
            return math.exp(math.log(left) + fraction * (math.log(right) - math.log(left)))
    return None

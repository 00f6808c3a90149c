"""Intervals by a table of Student's t; crossings by hand."""

import math

import pytest

from benchmarks.records.intervals import crossing, difference, interval, median_interval


def test_interval_of_three_seeds():
    found = interval([1.0, 2.0, 3.0])
    assert found.mean == 2.0
    assert found.high - 2.0 == pytest.approx(4.303 / math.sqrt(3), rel=1e-3)  # t(0.975, 2) = 4.303
    assert 2.0 - found.low == pytest.approx(found.high - 2.0)
    assert found.verdict == "not told from zero"


@pytest.mark.parametrize(
    ("values", "verdict"),
    [
        ([1.0, 1.1, 1.2], "higher"),
        ([-1.0, -1.1, -1.2], "lower"),
        ([-1.0, 0.0, 1.5], "not told from zero"),
        ([0.0, 0.0, 0.0], "same to the bit"),
        ([0.5], "one seed"),
        ([0.5, math.nan], "not finite"),
        ([0.5, math.inf], "not finite"),
    ],
)
def test_what_an_interval_says_of_the_sign(values, verdict):
    assert interval(values).verdict == verdict


def test_one_value_has_no_interval():
    found = interval([1.5])
    assert found.mean == 1.5
    assert math.isnan(found.low)


def test_differences_in_words():
    assert [difference(value) for value in (0.1, -0.1, 0.0, 2e-5, math.nan)] == [
        "+0.100", "−0.100", "+0.000", "+2e−05", "not finite",
    ]  # fmt: skip
    assert str(interval([-0.5, -0.4])) == "−0.450 (−1.085 to +0.185)"
    assert str(interval([0.5])) == "+0.500"


def test_interval_of_the_median():
    assert median_interval([3.0, 1.0, 2.0]) == {"median": 2.0, "low": None, "high": None}
    assert median_interval([float(n) for n in range(1, 7)]) == {"median": 3.5, "low": 1.0, "high": 6.0}
    found = median_interval([float(n) for n in range(1, 33)])  # 10th and 23rd of 32: by a table of the sign test
    assert found == {"median": 16.5, "low": 10.0, "high": 23.0}


def test_crossing_between_two_budgets():
    assert crossing([0.4, 0.8], [3.0, 2.0], 2.5) == pytest.approx(0.4 * math.sqrt(2))  # halfway in log budget
    assert crossing([0.8, 0.4], [2.0, 3.0], 2.5) == pytest.approx(0.4 * math.sqrt(2))  # in any order
    assert crossing([0.4, 0.8], [3.0, 2.0], 2.0) == pytest.approx(0.8)


def test_crossing_is_the_first():
    assert crossing([1, 2, 4, 8], [4.0, 2.0, 3.0, 1.0], 3.0) == pytest.approx(math.sqrt(2))


@pytest.mark.parametrize("target", [1.9, 3.0, 3.5, math.nan])
def test_no_answer_outside_what_was_measured(target):
    assert crossing([0.4, 0.8], [3.0, 2.0], target) is None

"""Intervals by a table of Student's t; crossings by hand."""

import math

import pytest

from benchmarks.records.intervals import crossing, interval


def test_interval_of_three_seeds():
    found = interval([1.0, 2.0, 3.0])
    assert found.mean == 2.0
    assert found.high - 2.0 == pytest.approx(4.303 / math.sqrt(3), rel=1e-3)  # t(0.975, 2) = 4.303
    assert 2.0 - found.low == pytest.approx(found.high - 2.0)
    assert found.excludes_zero is False


def test_interval_excludes_zero_on_either_side():
    assert interval([1.0, 1.1, 1.2]).excludes_zero
    assert interval([-1.0, -1.1, -1.2]).excludes_zero
    assert not interval([0.0, 0.0, 0.0]).excludes_zero


def test_one_value_has_no_interval():
    found = interval([1.5])
    assert found.mean == 1.5
    assert math.isnan(found.low)
    assert not found.excludes_zero


def test_crossing_between_two_budgets():
    assert crossing([0.4, 0.8], [3.0, 2.0], 2.5) == pytest.approx(0.4 * math.sqrt(2))  # halfway in log budget
    assert crossing([0.8, 0.4], [2.0, 3.0], 2.5) == pytest.approx(0.4 * math.sqrt(2))  # in any order
    assert crossing([0.4, 0.8], [3.0, 2.0], 2.0) == pytest.approx(0.8)


def test_crossing_is_the_first():
    assert crossing([1, 2, 4, 8], [4.0, 2.0, 3.0, 1.0], 3.0) == pytest.approx(math.sqrt(2))


@pytest.mark.parametrize("target", [1.9, 3.0, 3.5, math.nan])
def test_no_answer_outside_what_was_measured(target):
    assert crossing([0.4, 0.8], [3.0, 2.0], target) is None

"""Candidates are timed in turn, and bf16 is chosen only where it is clearly faster."""

import pytest

from benchmarks.training.precision import faster
from benchmarks.training.timing import in_turn, seconds


def test_every_candidate_is_everywhere_equally_often():
    order = []
    found = in_turn({name: lambda name=name: order.append(name) or len(order) for name in "abc"}, rounds=6, warm_up=0)
    rounds = [order[start : start + 3] for start in range(0, len(order), 3)]
    assert len(rounds) == 6
    for place in range(3):
        assert sorted(each[place] for each in rounds) == sorted(2 * "abc")
    assert {name: [order[int(at) - 1] for at in of] for name, of in found.items()} == {n: [n] * 6 for n in "abc"}


def test_warm_up_is_left_out():
    values = iter(range(5))
    assert in_turn({"a": lambda: next(values)}, rounds=3, warm_up=2) == {"a": [2, 3, 4]}


def test_the_clock_that_is_given_counts():
    ticks = iter([3.0, 5.5])
    assert seconds(lambda: None, lambda: next(ticks)) == 2.5


@pytest.mark.parametrize(("fp32", "chosen"), [(80.0, "float32"), (119.0, "float32"), (121.0, "bfloat16")])
def test_bf16_must_be_a_fifth_faster(fp32, chosen):
    assert faster({"float32": fp32, "bfloat16": 100.0}) == chosen

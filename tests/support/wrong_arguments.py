"""Wrong arguments by kind, and the rule that every public function keeps: an error that names the argument."""

import math
from fractions import Fraction

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from unchanged import differences, snapshot

NONE_OF_ANY_KIND = st.one_of(
    st.just(None),
    st.text(max_size=3),
    st.binary(max_size=2),
    st.lists(st.floats(), max_size=2),
    st.sets(st.integers(), max_size=2),
    st.dictionaries(st.text(max_size=2), st.integers(), max_size=1),
    st.complex_numbers(),
    st.builds(object),
    st.sampled_from([len, float, ..., range(2), np.ones(3), np.ones((2, 0))]),
)
NO_NUMBER = st.one_of(NONE_OF_ANY_KIND, st.booleans(), st.just(math.nan))
NEGATIVE = st.floats(max_value=-1e-30)
NO_RATE = st.one_of(NO_NUMBER, NEGATIVE, st.just(math.inf))
NO_SHARE = st.one_of(NO_NUMBER, NEGATIVE, st.floats(min_value=1.0, exclude_min=True))
NOT_BELOW_ONE = st.one_of(NO_SHARE, st.just(1.0))
NOT_POSITIVE = st.one_of(NO_NUMBER, NEGATIVE, st.just(0.0))
NO_COUNT = st.one_of(NONE_OF_ANY_KIND, st.booleans(), st.floats(), st.integers(max_value=0), st.just(Fraction(1, 2)))
NO_INDEX = st.one_of(NONE_OF_ANY_KIND, st.booleans(), st.floats(), st.integers(max_value=-1))
NO_FLAG = st.one_of(NONE_OF_ANY_KIND, st.floats(), st.integers(min_value=2))
NO_NUMBER_OF_HEADS = st.one_of(NONE_OF_ANY_KIND, st.floats(), st.integers(max_value=-1))
NO_NAME = st.one_of(NONE_OF_ANY_KIND.filter(lambda x: x is not None), st.floats(), st.integers())


def one_tau(strategy):
    """Leave out functions of the step and dicts by names, which a τ may be."""
    return strategy.filter(lambda x: not callable(x) and not isinstance(x, dict))


def but_none(strategy):
    """Leave out None, where it has a meaning."""
    return strategy.filter(lambda x: x is not None)


RAW = (
    *("unsupported operand", "not supported between", "ambiguous", "object is not", "has no attribute", "has no len"),
    *("is not iterable", "not subscriptable", "not callable", "invalid combination", "expected sequence", "unpack"),
    *("too big to convert", "out of range", "must match", "Boolean value", "unhashable", "not implemented for"),
    *("got an unexpected", "missing 1 required", "positional argument", "takes from", "Error('", "operand"),
)
"""Words of operators and of Python, which say nothing to a user."""


def assert_named(call, argument, value, held=()):
    """Assert that a call is refused by an error that names the argument, not by one of an operator in passing, and that
    it has changed nothing of what is `held` (see `unchanged.snapshot`)."""
    before = snapshot(held)
    try:
        call(value)
    except (TypeError, ValueError) as error:
        said = str(error)
        assert argument in said, f"{argument}={value!r}: {said}"
        assert not any(words in said for words in RAW), f"{argument}={value!r}: {said}"
    else:
        raise AssertionError(f"{argument}={value!r} is accepted")
    changed = list(differences(before, snapshot(held)))
    assert not changed, f"{argument}={value!r} changes {changed}"


def assert_all_named(call, argument, wrong, held=()):
    """Assert it of some values of a strategy, given to a call by keyword, and print how many they were."""
    tried = []

    @settings(max_examples=8, deadline=None, database=None)
    @given(wrong)
    def every(value):
        tried.append(value)
        assert_named(lambda it: call(**{argument: it}), argument, value, held)

    every()
    print(f"{len(tried)} wrong values of {argument} were named")
    assert tried

"""Rows that differ in numbers of their names alone are one row, and no row is lost or invented."""

import re
from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from muonclip.core.folded_rows import folded


def rows(*names, cells=("muon", "64×32")):
    return [(name, *cells) for name in names]


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ([f"layers.{i}.attn.q.weight" for i in range(12)], ["layers.0…11.attn.q.weight ×12"]),
        (["h.0.q", "h.1.q"], ["h.0,1.q ×2"]),
        (["h.3.q", "h.0.q", "h.1.q", "h.2.q", "h.7.q"], ["h.0…3,7.q ×5"]),
        (["h.10.q", "h.9.q", "h.8.q"], ["h.8…10.q ×3"]),  # by value, not as text
        (["layers_0/attn/q", "layers_1/attn/q", "layers_2/attn/q"], ["layers_0…2/attn/q ×3"]),
        ([f"h.{i}.e.{j}.up" for i, j in product(range(4), range(8))], ["h.0…3.e.0…7.up ×32"]),
        (["h.0.e.0.up", "h.0.e.1.up", "h.1.e.0.up"], ["h.0.e.0,1.up ×2", "h.1.e.0.up"]),
        (["fc1.weight", "fc2.weight"], ["fc1.weight", "fc2.weight"]),  # no numbers of layers, but names
        (["parameter 0 of group 1", "parameter 1 of group 1"], ["parameter 0 of group 1", "parameter 1 of group 1"]),
        (["0", "1", "2"], ["0…2 ×3"]),
        (["same", "same"], ["same", "same"]),
        ([], []),
    ],
)
def test_numbers_are_folded(names, expected):
    assert [row[0] for row in folded(rows(*names))] == expected


def test_rows_that_say_something_else_stay_rows_of_their_own():
    given = [*rows("h.0.q", "h.1.q"), *rows("h.2.q", cells=("adamw", "64×32")), *rows("h.3.q")]
    assert [row[:2] for row in folded(given)] == [("h.0,1,3.q ×3", "muon"), ("h.2.q", "adamw")]


def test_a_row_is_where_the_first_of_it_was():
    assert [row[0] for row in folded(rows("h.0.q", "h.0.k", "norm", "h.1.q", "h.1.k"))] == [
        "h.0,1.q ×2",
        "h.0,1.k ×2",
        "norm",
    ]


@given(st.sets(st.tuples(st.integers(0, 4), st.integers(0, 4), st.booleans()), min_size=1))
def test_every_name_is_in_exactly_one_row(entries):
    """Each row's ranges, multiplied out, are the names of it."""
    names = {f"a.{i}.b.{j}.c": str(use) for i, j, use in entries}
    found = []
    for name, use in folded(list(names.items())):
        name, _, count = name.partition(" ×")
        parts = [written(part) for part in name.split(".")]
        own = [".".join(each) for each in product(*parts)]
        assert len(own) == int(count or 1)
        assert all(names[each] == use for each in own)
        found += own
    assert sorted(found) == sorted(names)


def written(part):
    if not re.match(r"\d", part):
        return [part]
    ends = [each.split("…") for each in part.split(",")]
    return [str(number) for each in ends for number in range(int(each[0]), int(each[-1]) + 1)]

"""Sample numbers that are left out."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megapar.data.intervals import Remaining, joined, parse_intervals

intervals = st.lists(st.tuples(st.integers(0, 60), st.integers(0, 12)).map(lambda pair: (pair[0], sum(pair))), max_size=6)


@given(intervals, st.integers(0, 50), st.integers(1, 40))
def test_runs_are_the_numbers_that_are_left_in_order(left_out, first, count):
    gone = {n for start, stop in left_out for n in range(start, stop)}
    left = [n for n in range(400) if n not in gone]
    remaining = Remaining(left_out)
    runs = list(remaining.runs(first, count))
    assert [n for start, size in runs for n in range(start, start + size)] == left[first : first + count]
    assert all(size > 0 for _, size in runs) and len(runs) <= len(left_out) + 1
    assert [remaining.number(place) for place in range(first, first + count)] == left[first : first + count]


@given(intervals)
def test_joined_holds_the_same_numbers_apart_and_in_order(left_out):
    found = joined(left_out)
    assert {n for a, b in found for n in range(a, b)} == {n for a, b in left_out for n in range(a, b)}
    assert all(a < b for a, b in found) and all(b < c for (_, b), (c, _) in pairwise(found))


def test_parse():
    assert parse_intervals("") == ()
    assert parse_intervals("9000:9008 1200:1600 1500:1700") == ((1200, 1700), (9000, 9008))


@pytest.mark.parametrize("text", ["5", "5:5", "6:5", "-1:5", "a:b", "1:2:3", "1.5:2"])
def test_what_is_no_interval_is_refused(text):
    with pytest.raises(ValueError, match="must be two sample numbers"):
        parse_intervals(text)

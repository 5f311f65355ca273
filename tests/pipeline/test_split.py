"""Which layers go to which stage: every layer once, the slowest stage as fast as brute force can make it."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megapar.pipeline.split import split_layers


@given(st.data())
def test_balanced_is_the_best_of_all_splits(data):
    costs = data.draw(st.lists(st.integers(1, 9), min_size=1, max_size=9))
    stages = data.draw(st.integers(1, len(costs)))
    cuts = split_layers(costs, stages)
    assert [layer for start, stop in cuts for layer in range(start, stop)] == list(range(len(costs)))
    assert len(cuts) == stages and all(start < stop for start, stop in cuts)
    found = [sum(costs[start:stop]) for start, stop in cuts]
    best = None
    for inner in itertools.combinations(range(1, len(costs)), stages - 1):
        sums = [sum(costs[a:b]) for a, b in itertools.pairwise((0, *inner, len(costs)))]
        key = (max(sums), sum(x * x for x in sums))
        best = key if best is None else min(best, key)
    assert (max(found), sum(x * x for x in found)) == best


def test_the_first_stages_alone_may_be_worse_than_they_could_be():
    """The last stage is the slowest in any case, so the first five layers need not be split with the fastest slowest stage of their own."""
    costs = [1, 1, 1, 2, 1, 2, 5, 1, 6]
    found = [sum(costs[start:stop]) for start, stop in split_layers(costs, 5)]
    assert max(found) == 6 and sum(cost * cost for cost in found) == 94


def test_an_expensive_head_gets_fewer_layers_beside_it():
    assert split_layers([1.0] * 7 + [3.0], 4) == [(0, 2), (2, 4), (4, 7), (7, 8)]


def test_even_and_given():
    assert split_layers([1.0] * 7, 3, "even") == [(0, 3), (3, 5), (5, 7)]
    assert split_layers([1.0] * 7, 3, "1,5,1") == [(0, 1), (1, 6), (6, 7)]


@pytest.mark.parametrize(
    ("stages", "how", "told"),
    [
        (5, "even", "5 stages need at least 5 layers, the model has 4: lower pp or chunks"),
        (2, "1,2", "add up to the model's 4 layers"),
        (2, "1,2,1", "2 numbers of 1 or more"),
        (2, "0,4", "1 or more"),
        (2, "fair", 'split="fair" is not known'),
        (2, "1,-3", "is not known"),
    ],
)
def test_what_cannot_be_split_is_refused(stages, how, told):
    with pytest.raises(ValueError, match=r": \w+") as error:
        split_layers([1.0] * 4, stages, how)
    assert told in str(error.value)

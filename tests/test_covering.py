"""The covering arrays cover, and are small."""

from hypothesis import given, settings
from hypothesis import strategies as st

from tests.covering import covering_array, missing


def anything(case):
    return True


def test_pairs_of_four_factors():
    """Four factors of three values have 9 cases at best; greedy needs a few more of the 81."""
    factors = {name: (0, 1, 2) for name in "abcd"}
    cases = covering_array(factors, anything)
    assert not missing(cases, factors, anything) and 9 <= len(cases) <= 13


def test_group_of_three():
    factors = {name: (0, 1) for name in "abcdef"}
    cases = covering_array(factors, anything, [("a", "b", "c")])
    assert len({(case["a"], case["b"], case["c"]) for case in cases}) == 8 and len(cases) <= 10
    assert not missing(cases, factors, anything, [("a", "b", "c")])


def test_missing_names_the_combination():
    factors = {"a": (0, 1), "b": (0, 1)}
    assert missing([{"a": 0, "b": 0}, {"a": 1, "b": 1}, {"a": 1, "b": 0}], factors, anything) == {(("a", 0), ("b", 1))}


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(1, 4), min_size=2, max_size=5), st.sets(st.tuples(st.integers(0, 3), st.integers(0, 3)), max_size=4))
def test_only_legal_cases(sizes, forbidden):
    factors = {str(i): tuple(range(size)) for i, size in enumerate(sizes)}

    def legal(case):
        return (case["0"], case["1"]) not in forbidden

    cases = covering_array(factors, legal)
    assert all(map(legal, cases)) and not missing(cases, factors, legal)
    assert len(cases) == len({tuple(case.values()) for case in cases})

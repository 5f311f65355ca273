"""The generator: a function of its words alone; values that are pinned, uniform, and in range."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megapar.objectives.randomness import Generator
from tests.objectives.common import seeds, thousand


def test_values_are_pinned():
    # A resumed run must draw what it would have drawn, under any numpy.
    assert Generator(1234, 0, 5, "fim").below(1000, 6).tolist() == [49, 184, 311, 756, 883, 555]
    assert Generator(1234, 0, 5, "fim").subset(10, 4).tolist() == [0, 1, 2, 5]


@thousand
@given(seeds, st.integers(0, 50), st.integers(0, 50))
def test_subset(seed, limit, size):
    if size > limit:
        with pytest.raises(ValueError, match=f"{size} distinct integers below {limit} do not exist"):
            Generator(seed).subset(limit, size)
        return
    chosen = Generator(seed).subset(limit, size).tolist()
    assert chosen == sorted(set(chosen)) and len(chosen) == size and set(chosen) <= set(range(limit))


def test_below_stays_below():
    class Ones(Generator):
        def uniform(self, size):
            return np.full(size, 1 - 2.0**-53)

    assert all(Ones().below(limit, 1)[0] == limit - 1 for limit in [*range(1, 5000), 2**31 - 1, 2**31, 2**31 + 1, 2**40 + 1])


def test_words_matter_and_draws_do_not():
    words = [(0,), (1,), (0, 0), (0, 1), (1, 0), (0, "a"), (11, 1), (1, 11), (11,), (111,)]
    assert len({Generator(*w).below(2**40, 1)[0] for w in words}) == len(words)
    first, second = Generator(1, 2), Generator(1, 2)
    first.uniform(5)
    assert first.child(3).uniform(4).tolist() == second.child(3).uniform(4).tolist() == Generator(1, 2, 3).uniform(4).tolist()


def test_uniform_and_subset_by_chi_square():
    counts = np.bincount(Generator(5).below(10, 10000), minlength=10)
    assert ((counts - 1000) ** 2 / 1000).sum() < 9 + 5 * 18**0.5
    picks = np.bincount(np.concatenate([Generator(6, i).subset(10, 3) for i in range(3000)]), minlength=10)
    assert ((picks - 900) ** 2 / 900).sum() < 9 + 5 * 18**0.5


def test_numpys_own_state_is_neither_read_nor_moved():
    np.random.seed(0)
    first = Generator(1).uniform(3).tolist()
    drawn = np.random.random()
    np.random.seed(0)
    assert np.random.random() == drawn and Generator(1).uniform(3).tolist() == first

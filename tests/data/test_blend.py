"""The blend: any part of it is the whole's, drift within its bound, and every sample of a corpus in order; the split of documents."""

import math
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megapar.data.blend import Blend, split_documents

many = settings(max_examples=1000, deadline=None)
weights = st.lists(st.one_of(st.floats(1e-3, 1e3), st.integers(1, 4)), min_size=1, max_size=6).map(tuple)


@many
@given(weights, st.integers(0, 150), st.integers(0, 60))
def test_any_part_is_the_wholes(weights, first, count):
    """Against all samples that can come so early, sorted; one by one and at once."""
    blend = Blend(weights)
    shares = [weight / math.fsum(weights) for weight in weights]
    everything = sorted((((k + 0.5) / share, i, k) for i, share in enumerate(shares) for k in range(first + count + 1)))
    corpora, numbers = blend.draw(first, count)
    assert list(zip(corpora.tolist(), numbers.tolist(), strict=True)) == [(i, k) for _, i, k in everything[first : first + count]]
    if count:
        assert (corpora[-1], numbers[-1]) == tuple(part[0] for part in blend.draw(first + count - 1, 1))
    before = [i for _, i, _ in everything[:first]]
    assert blend.counts(first).tolist() == [before.count(i) for i in range(len(weights))]


@pytest.mark.parametrize("first", [0, 15, 20, 60, 79, 81])
def test_one_large_corpus_and_many_small_ones(first):
    """All the small ones are due at once, half a round late: the worst there is."""
    weights = (40,) + (1,) * 60
    everything = sorted(((k + 0.5) / weight, i, k) for i, weight in enumerate(weights) for k in range(100))
    corpora, numbers = Blend(weights).draw(first, 30)
    assert list(zip(corpora.tolist(), numbers.tolist(), strict=True)) == [(i, k) for _, i, k in everything[first : first + 30]]


@many
@given(weights, st.integers(0, 10**9))
def test_drift_is_bounded(weights, n):
    counts = Blend(weights).counts(n)
    shares = np.array(weights) / math.fsum(weights)
    assert counts.sum() == n
    assert (abs(counts - shares * n) <= 0.5 + shares * len(weights) / 2 + 1e-6).all()


def test_known_order():
    corpora, numbers = Blend((1, 2)).draw(0, 6)
    assert corpora.tolist() == [1, 0, 1, 1, 0, 1] and numbers.tolist() == [0, 0, 1, 2, 1, 3]


@pytest.mark.parametrize("bad", [(), (0.0,), (1, -1), (1, float("nan")), (float("inf"), 1)])
def test_bad_weights_are_refused(bad):
    with pytest.raises(ValueError, match="must be above 0 and finite"):
        Blend(bad)


def test_bad_places_are_refused():
    with pytest.raises(ValueError, match="start at -1 and are 2"):
        Blend((1,)).draw(-1, 2)


@many
@given(st.integers(0, 500), st.lists(st.one_of(st.just(0.0), st.floats(0.01, 100)), min_size=1, max_size=4))
def test_every_document_is_in_one_part(documents, shares):
    if not any(shares):
        with pytest.raises(ValueError, match="one of them above 0"):
            split_documents(documents, shares)
        return
    total, exact = sum(shares), np.cumsum([0, *shares])
    try:
        parts = split_documents(documents, shares)
    except ValueError:
        assert any(0 < share * documents / total < 1.001 for share in shares) or documents == 0
        return
    assert [i for part in parts for i in part] == list(range(documents))
    for part, (a, b) in zip(parts, pairwise(exact * documents / total), strict=True):
        assert abs(part.start - a) <= 0.5 + 1e-9 and abs(part.stop - b) <= 0.5 + 1e-9


def test_split_refusals():
    assert split_documents(1000, (969, 30, 1)) == [range(969), range(969, 999), range(999, 1000)]
    assert split_documents(10, (1.0, 0.0)) == [range(10), range(10, 10)]
    with pytest.raises(ValueError, match="10 documents leave none to the share 30 of"):
        split_documents(10, (969, 30, 1))
    with pytest.raises(ValueError, match="must be 0 or more"):
        split_documents(10, (1, -1))

"""Spans: counts by T5's formula, and texts that come back from inputs and targets whatever the spans are."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megapar.objectives.randomness import Generator
from megapar.objectives.spans import SpanNoise, inputs_and_targets, is_noise, split_by_sentinels, t5_lengths
from tests.objectives.common import SENTINELS, noises, rejoined, seeds, text, thousand


@thousand
@given(noises, st.integers(2, 200), seeds)
def test_counts_are_exact(noise, n, seed):
    spans = noise.draw(n, Generator(seed))
    tokens, most = noise.counts(n)
    lengths = spans[:, 1] - spans[:, 0]
    assert 1 <= tokens == lengths.sum() == is_noise(n, spans).sum() < n
    assert (spans[1:, 0] > spans[:-1, 1]).all(), "text between any two"
    assert spans[0, 0] >= 0 and spans[-1, 1] <= n
    assert is_noise(n, spans).tolist() == [any(a <= i < b for a, b in spans.tolist()) for i in range(n)]
    if noise.lengths == "poisson":
        assert 1 <= len(spans) <= most and lengths.min() >= 0
    else:
        assert len(spans) == most and lengths.min() >= 1
    if noise.placement == "t5":
        assert spans[0, 0] > 0 and spans[-1, 1] == n


@thousand
@given(noises, st.integers(2, 100), seeds)
def test_sentinels_invert(noise, n, seed):
    tokens, spans = text(n, seed), noise.draw(n, Generator(seed))
    inputs, targets = split_by_sentinels(tokens, spans, np.arange(200, 200 - len(spans), -1))
    shifted = [(np.where(part >= 100, part - 200 + SENTINELS[0], part)).tolist() for part in (inputs, targets)]
    if len(spans) <= len(SENTINELS):
        assert rejoined(*shifted) == tokens.tolist()
    if noise.lengths == "composition":
        assert (len(inputs) + 1, len(targets) + 1) == inputs_and_targets(n, noise)


@thousand
@given(st.integers(0, 60), st.data())
def test_any_list_of_spans_inverts(n, data):
    """Empty spans, spans that touch, spans at both ends: what random_roll would have made, too."""
    places = sorted(data.draw(st.lists(st.integers(0, n), max_size=20)))
    spans = np.array(places[: len(places) // 2 * 2], np.int64).reshape(-1, 2)
    tokens = text(n, n)
    inputs, targets = split_by_sentinels(tokens, spans, np.array(SENTINELS[: len(spans)], np.int64))
    assert rejoined(inputs.tolist(), targets.tolist()) == tokens.tolist()


@pytest.mark.parametrize(
    "inputs_length,ratio,mean_span,expected",
    [  # t5's random_spans_helper, run; the last two are its own test's
        (512, 0.15, 3, (568, 114)),
        (512, 0.15, 8, (588, 100)),
        (512, 0.5, 3, (766, 512)),
        (512, 0.5, 8, (908, 512)),
        (512, 0.15, 64, (600, 92)),
        (512, 0.5, 64, (1006, 512)),
        (1024, 0.15, 20, (1193, 189)),
        (16, 0.01, 3, (15, 3)),
        (64, 0.2, 2.0, (70, 22)),
        (64, 0.2, 1.0, (63, 27)),
    ],
)
def test_t5_lengths(inputs_length, ratio, mean_span, expected):
    assert t5_lengths(inputs_length, SpanNoise(ratio=ratio, mean_span=mean_span)) == expected


@thousand
@given(noises, st.integers(3, 400))
def test_t5_lengths_are_the_longest_text(noise, inputs_length):
    if inputs_length < inputs_and_targets(2, noise)[0]:
        with pytest.raises(ValueError, match=f"inputs_length={inputs_length} is too short for any text: give 3 or more"):
            t5_lengths(inputs_length, noise)
        return
    tokens, targets = t5_lengths(inputs_length, noise)
    shortened = noise.ratio == 0.5 and inputs_and_targets(tokens, noise)[1] != targets
    fits = [n for n in range(2, 12 * inputs_length) if inputs_and_targets(n, noise)[0] <= inputs_length]
    assert fits == list(range(2, fits[-1] + 1)), "the search rests on lengths that never fall"
    assert tokens == fits[-1] - (noise.ratio == 0.5 and inputs_and_targets(fits[-1], noise)[1] > inputs_and_targets(fits[-1], noise)[0])
    assert shortened or targets == inputs_and_targets(tokens, noise)[1]


def test_rounding_is_in_float64_with_halves_to_even():
    assert SpanNoise(ratio=0.15).counts(190)[0] == round(190 * 0.15) == 28, "float32 has 28.500002, which rounds to 29"
    assert [SpanNoise(ratio=0.5).counts(n)[0] for n in (5, 7)] == [2, 4]


def test_no_end_is_favoured_by_uniform_placement():
    """P(noise) in the middle is the ratio; t5's placement is 0 at the first token and 1 at the last."""
    count = 3000
    for placement in ("uniform", "t5"):
        noise = SpanNoise(placement=placement)
        share = np.mean([is_noise(100, noise.draw(100, Generator(i, placement))) for i in range(count)], axis=0)
        sigma = (0.15 * 0.85 / count) ** 0.5
        assert abs(share[30:70] - 0.15).max() < 5 * sigma + 0.01, "0.01: the ends have less than their share, the middle has it"
        if placement == "t5":
            assert (share[0], share[-1]) == (0, 1)
        else:
            assert abs(share[0] - share[-1]) < 5 * sigma * 2**0.5 and 0 < share[0] < 0.15


def test_one_span_moves_with_uniform_placement():
    noise = SpanNoise(mean_span=64)
    starts = np.array([noise.draw(20, Generator(i))[0, 0] for i in range(3600)])
    counts = np.bincount(starts, minlength=18)
    assert len(counts) == 18 and ((counts - 200) ** 2 / 200).sum() < 17 + 5 * (2 * 17) ** 0.5, "chi-square, 17 degrees, 5 sigma"


def test_poisson_lengths():
    noise = SpanNoise(ratio=0.5, mean_span=3, lengths="poisson")
    spans = np.concatenate([noise.draw(2000, Generator(i))[:-1] for i in range(30)])  # the last one is trimmed
    lengths = spans[:, 1] - spans[:, 0]
    sigma = (3 / len(lengths)) ** 0.5
    assert abs(lengths.mean() - 3) < 5 * sigma
    zeros = np.exp(-3)
    assert abs((lengths == 0).mean() - zeros) < 5 * (zeros / len(lengths)) ** 0.5


@pytest.mark.parametrize(
    "settings,told",
    [
        ({"ratio": 0.0}, "ratio=0.0 must be between 0 and 1"),
        ({"ratio": 1.0}, "ratio=1.0 must be between"),
        ({"ratio": float("nan")}, "ratio=nan must be between"),
        ({"mean_span": 0.5}, "mean_span=0.5 must be 1 or more"),
        ({"mean_span": float("inf")}, "mean_span=inf must be"),
        ({"ratio": 0.9, "mean_span": 3}, "give a mean_span of 9"),
        ({"mean_span": 501, "lengths": "poisson"}, "must be 500 or less"),
    ],
)
def test_refusals(settings, told):
    with pytest.raises(ValueError, match=told):
        SpanNoise(**settings)

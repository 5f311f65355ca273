"""Denoising: texts come back from inputs and targets, lengths are what they are said to be, settings that can't be met are refused."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megapar.objectives.denoising import Denoising
from megapar.objectives.randomness import Generator
from megapar.objectives.sample import IGNORED
from megapar.objectives.spans import SpanNoise, is_noise
from tests.objectives.common import END, MASK, SENTINELS, VOCAB, X, noises, rejoined, seeds, text, thousand, whole

STYLES = ["sentinel", "infill", "mask", "replace", "delete"]
modes = st.sampled_from([(), (X,), (X, 3, 4)])


def denoising(length: int = 60, **settings: object) -> Denoising:
    common = {"sequence_length": length, "vocab_size": VOCAB, "end_id": END, "mask_id": MASK, "sentinels": SENTINELS}
    return Denoising(**{**common, **settings})


@pytest.mark.parametrize("style", STYLES)
@thousand
@given(noises, modes, st.integers(8, 80), seeds, st.data())
def test_the_text_comes_back(style, noise, mode, length, seed, data):
    objective = denoising(length, style=style, noise=noise, mode=mode)
    n = data.draw(st.one_of(st.just(objective.tokens_needed), st.integers(2, objective.tokens_needed)))
    tokens = text(n, seed, low=0)  # end tokens inside, too: the prefix says where the inputs end
    sample = objective(tokens, Generator(seed))
    ids, prefix = whole(sample), int(sample.prefix_end[0])
    inputs, targets = ids[len(mode) : prefix - 1], ids[prefix:-1]
    assert ids[: len(mode)] == list(mode) and ids[prefix - 1] == ids[-1] == END
    assert sample.targets.tolist() == [IGNORED] * (prefix - 1) + ids[prefix:], "a loss on all targets and their end, on nothing else"
    spans = noise.draw(n, Generator(seed))
    noisy = is_noise(n, spans)
    most = objective.lengths(n)
    lengths = (prefix, len(ids) - prefix)
    if noise.lengths == "composition":
        assert lengths == most
    assert lengths[0] <= most[0] and lengths[1] <= most[1] and len(sample.tokens) <= length
    if style == "sentinel":
        assert rejoined(inputs, targets) == tokens.tolist()
        return
    assert targets == tokens.tolist()
    kept = tokens[~noisy].tolist()
    if style == "delete":
        assert inputs == kept
    elif style == "infill":
        assert [token for token in inputs if token != MASK] == kept and inputs.count(MASK) == len(spans)
    else:
        assert [token for token, noise in zip(inputs, noisy, strict=True) if not noise] == kept
        if style == "replace":
            assert sum(a != b for a, b in zip(inputs, targets, strict=True)) == noisy.sum() and max(inputs) < VOCAB, "the ratio, exactly"


@thousand
@given(st.sampled_from(STYLES), noises, modes, st.integers(8, 120))
def test_the_text_is_the_longest_that_fits(style, noise, mode, length):
    objective = denoising(length, style=style, noise=noise, mode=mode, sentinels=range(200, 50, -1))
    lengths = [sum(objective.lengths(n)) for n in range(2, length + 3)]
    assert lengths == sorted(lengths), "the search rests on it"
    assert max(n for n, total in enumerate(lengths, 2) if total <= length + 1) == objective.tokens_needed


def test_t5s_lengths():
    objective = denoising(626, inputs_length=512, mode=(X,))
    assert objective.tokens_needed == 568
    assert objective.lengths(568) == (513, 114)
    sample = objective(text(568), Generator(0))
    assert (len(sample.tokens), int((sample.targets != IGNORED).sum()), sample.prefix_end[0]) == (626, 114, 513)


def test_mask_rates():
    objective = denoising(4003, style="mask", noise=SpanNoise(ratio=0.5, mean_span=1))
    counts = {"mask": 0, "random": 0, "kept": 0}
    random: list[int] = []
    for i in range(10):
        tokens = text(objective.tokens_needed, i)
        noisy = is_noise(len(tokens), objective.noise.draw(len(tokens), Generator(i)))
        inputs, _ = objective.corrupt(tokens, Generator(i))
        counts["mask"] += int((inputs[noisy] == MASK).sum())
        counts["kept"] += int((inputs == tokens)[noisy].sum())
        other = noisy & (inputs != MASK) & (inputs != tokens)
        counts["random"] += int(other.sum())
        random += ((inputs - tokens) % VOCAB)[other].tolist()
    n = sum(counts.values())
    for name, rate in (("mask", 0.8), ("random", 0.1), ("kept", 0.1)):
        assert abs(counts[name] - n * rate) < 5 * (n * rate * (1 - rate)) ** 0.5, counts
    shifts = np.bincount(random, minlength=VOCAB)
    expected = len(random) / (VOCAB - 1)
    assert shifts[0] == 0 and ((shifts[1:] - expected) ** 2 / expected).sum() < 18 + 5 * 36**0.5, "every other token alike"


@pytest.mark.parametrize(
    "settings,told",
    [
        ({"sentinels": range(90, 80, -1)}, "149 tokens at ratio=0.5 and mean_span=3.0 take 25 sentinels and there are 10: give 25"),
        ({"length": 5, "mode": (X,)}, "sequence_length=5 is too short for 2 tokens of text: give 6 or more"),
        ({"length": 0}, "sequence_length=0 must be 1 or more"),
        ({"inputs_length": 2}, "inputs_length=2 is too short for any text: give 3 or more"),
        ({"inputs_length": 512}, "makes samples of 1023 tokens, sequence_length=200 is shorter: give a sequence_length of 1023"),
        ({"inputs_length": 20, "style": "mask"}, "leave it out, or use style=sentinel"),
        ({"style": "mask", "mask_id": None}, "style=mask needs a mask token and mask_id is none: give its id, 20 or more"),
        ({"style": "infill", "mask_id": VOCAB - 1}, "must be ids of their own outside the text's"),
        ({"sentinels": range(50, 10, -1)}, "must be ids of their own outside the text's"),
        ({"mask_id": SENTINELS[3]}, "must be ids of their own"),
        ({"end_id": SENTINELS[3]}, "not end_id=87"),
        ({"mask_rate": 0.95}, "mask_rate=0.95 and random_rate=0.1 must be 0 or more and add up to 1 at most"),
        ({"mask_rate": -0.1}, "mask_rate=-0.1"),
        ({"style": "replace", "vocab_size": 1}, "vocab_size=1 has no other token"),
        ({"vocab_size": 0}, "vocab_size=0 must be 1 or more"),
    ],
)
def test_refusals(settings, told):
    with pytest.raises(ValueError, match=told):
        denoising(**{"length": 200, "noise": SpanNoise(ratio=0.5), **settings})


def test_what_a_refusal_advises_is_accepted():
    noise = SpanNoise(ratio=0.5)
    denoising(200, noise=noise, sentinels=range(90, 65, -1))
    assert denoising(6, mode=(X,)).tokens_needed == 2
    denoising(1023, noise=noise, inputs_length=512, sentinels=range(300, 100, -1))


@pytest.mark.parametrize("style", ["mask", "replace"])
def test_what_noise_becomes_is_drawn_anew_for_each_sample(style):
    """With all of a long text noise: the same places, so that only what is put there can differ."""
    objective = denoising(200, style=style, noise=SpanNoise(ratio=0.99, mean_span=99.0))
    tokens = text(90)
    first, again, other = (objective.corrupt(tokens, Generator(seed))[0] for seed in (0, 0, 1))
    assert (first == again).all()
    differ, noise = first != other, (first != tokens) | (other != tokens)
    # Replaced alike by chance: 1 in 19. Of masked ones one or both are something else: 1 - 0.8^2 of all that are not kept in both.
    assert differ[noise].mean() > (0.2 if style == "mask" else 0.8)
    with pytest.raises(ValueError, match="end_id=-1 must be 0 or more"):
        denoising(end_id=-1)

"""UL2: the paper's settings, mode tokens first, the rates that were asked for, samples that invert, refusals."""

import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megapar.objectives.randomness import Generator
from megapar.objectives.spans import SpanNoise
from megapar.objectives.ul2 import UL2, Denoiser, ul2_denoisers, ul2r_denoisers
from tests.objectives.common import END, MODES, SENTINELS, VOCAB, R, S, X, rejoined, seeds, text, thousand, whole


def ul2(length: int = 60, **settings: object) -> UL2:
    common = {"sequence_length": length, "vocab_size": VOCAB, "end_id": END, "modes": MODES, "sentinels": SENTINELS}
    return UL2(**{**common, **settings})


SETS = [ul2(denoisers=make(s_mode)) for make in (ul2_denoisers, ul2r_denoisers) for s_mode in ("uniform", "quarter")]
SETS += [ul2(modes={"R": (R, 5), "S": (S, 6, 7), "X": (X,)})]


def test_the_papers_settings():
    found = [(d.name, d.mode, d.noise and d.noise.mean_span, d.noise and d.noise.ratio, d.rate) for d in ul2_denoisers()]
    assert found == [
        ("R1", "R", 3, 0.15, 1),
        ("R2", "R", 8, 0.15, 1),
        ("X1", "X", 3, 0.5, 1),
        ("X2", "X", 8, 0.5, 1),
        ("X3", "X", 64, 0.15, 1),
        ("X4", "X", 64, 0.5, 1),
        ("S", "S", None, None, 1),
    ]
    assert [member.tokens_needed for member in ul2(1024, inputs_length=512, sentinels=range(200, 40, -1)).members] == [
        568, 588, 766, 908, 600, 1006, 1024,
    ]  # fmt: skip
    shares: dict[str, float] = {}
    for denoiser in ul2r_denoisers():
        shares[denoiser.mode] = shares.get(denoiser.mode, 0) + denoiser.rate
    assert shares == {"R": 0.25, "X": 0.25, "S": 0.5}


@thousand
@given(st.sampled_from(SETS), seeds, st.data())
def test_mode_first_and_the_text_comes_back(objective, seed, data):
    n = data.draw(st.one_of(st.just(objective.tokens_needed), st.integers(2, objective.tokens_needed)))
    tokens = text(n, seed)
    sample = objective(tokens, Generator(seed))
    denoiser = next(d for d in objective.denoisers if sample.objective == f"ul2/{d.name}")
    mode = list(objective.modes[denoiser.mode])
    ids, prefix = whole(sample), int(sample.prefix_end[0])
    assert ids[: len(mode)] == mode and len(sample.tokens) <= 60
    if denoiser.noise is None:
        assert ids[len(mode) :] == tokens.tolist()[: 61 - len(mode)], "inputs and targets are the text, with nothing between"
        assert len(mode) < prefix < len(ids)
        if denoiser.target_ratio:
            kept = len(ids) - len(mode)
            assert len(ids) - prefix == min(max(round(0.25 * kept), 1), kept - 1)
    else:
        back = rejoined(ids[len(mode) : prefix - 1], ids[prefix:-1])
        assert back == tokens.tolist()[: len(back)] and (len(back) == n or len(ids) in (60, 61)), "all of it, or all that fits"


@pytest.mark.parametrize("rates", [None, "ul2r"])
def test_rates(rates):
    objective = ul2(denoisers=ul2r_denoisers() if rates else ul2_denoisers())
    tokens, count = text(objective.tokens_needed), 4000
    drawn = [objective(tokens, Generator(7, 0, i, "ul2")).objective for i in range(count)]
    total = sum(denoiser.rate for denoiser in objective.denoisers)
    chi_square = 0.0
    for denoiser in objective.denoisers:
        expected = count * denoiser.rate / total
        chi_square += (drawn.count(f"ul2/{denoiser.name}") - expected) ** 2 / expected
    degrees = len(objective.denoisers) - 1
    assert chi_square < degrees + 5 * (2 * degrees) ** 0.5


def test_s_cuts_anywhere():
    objective = ul2(10, denoisers=(Denoiser(name="S", mode="S"),))
    tokens = text(10)
    cuts = np.bincount([objective(tokens, Generator(i)).prefix_end[0] - 1 for i in range(1800)], minlength=10)
    assert cuts[0] == 0 and len(cuts) == 10, "at least one token on either side, besides the mode"
    assert ((cuts[1:] - 200) ** 2 / 200).sum() < 8 + 5 * 16**0.5


def test_any_order_gives_the_same_samples():
    objective = ul2()
    tokens = [text(objective.tokens_needed, i) for i in range(50)]
    forwards = {i: whole(objective(tokens[i], Generator(3, 1, i, "ul2"))) for i in range(50)}
    backwards = {i: whole(ul2()(tokens[i], Generator(3, 1, i, "ul2"))) for i in reversed(range(50))}
    assert forwards == backwards
    assert len({tuple(whole(objective(tokens[0], Generator(3, epoch, 0, "ul2")))) for epoch in range(20)}) > 10, "epochs differ"


@pytest.mark.parametrize(
    "settings,told",
    [
        ({"denoisers": ()}, "must be one or more of different names"),
        ({"denoisers": ul2_denoisers() + ul2_denoisers()[:1]}, "different names"),
        ({"denoisers": (Denoiser(name="A", mode="S", rate=0.0),)}, r"rates of \['A'\] are \[0.0\] and must be above 0"),
        ({"denoisers": (Denoiser(name="A", mode="S", rate=float("nan")),)}, "must be above 0"),
        ({"modes": {"R": (R,), "S": (S,)}}, "denoiser X1 opens with mode 'X', of which modes has no ids"),
        ({"modes": {"R": (), "S": (S,), "X": (X,)}}, "denoiser R1 opens with mode 'R'"),
        ({"sentinels": range(90, 85, -1), "length": 200}, "denoiser X1: .* take 25 sentinels and there are 5: give 25"),
        ({"length": 4}, "denoiser X1: sequence_length=4 is too short for 2 tokens of text: give 6 or more"),
        ({"denoisers": (Denoiser(name="A", mode="X", noise=SpanNoise(), target_ratio=0.25),)}, "A has noise and target_ratio=0.25"),
        ({"denoisers": (Denoiser(name="A", mode="S", target_ratio=1.0),)}, "denoiser A: target_ratio=1.0 must be between 0 and 1"),
    ],
)
def test_refusals(settings, told):
    with pytest.raises(ValueError, match=told):
        ul2(**settings)


@pytest.mark.parametrize("ids", [(-3,), (END,), (3, SENTINELS[0])])
def test_modes_that_could_be_taken_for_something_else_are_refused(ids):
    with pytest.raises(ValueError, match=re.escape(f"mode 'S' is spelled {ids}, which must be 0 or more and neither end_id=0")):
        UL2(sequence_length=60, vocab_size=VOCAB, end_id=END, sentinels=SENTINELS, modes={**MODES, "S": ids})


def test_what_a_refusal_advises_is_accepted():
    assert ul2(200, sentinels=range(90, 65, -1)).tokens_needed == 200
    assert ul2(6).tokens_needed == 6

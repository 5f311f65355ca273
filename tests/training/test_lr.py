"""Learning rate and weight decay: every schedule against its closed form at the positions where an off-by-one shows."""

import math
from dataclasses import asdict, replace
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megapar.training.lr import RateSchedule, WeightDecaySchedule

# 100 steps: 5 of warm-up, wsd decays in the last 20. Peak 1, floor 0.1.
PARTS = {"peak": 1.0, "total": 100, "floor": 0.1, "warmup": 5}
NEXT = (6 - 5) / 95
HALF = (52 - 5) / 95

# Update 1, 2, 5 (the last of the warm-up), 6, 52, 99, 100 (the last), 101.
RATES = {
    "constant": [0.2, 0.4, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0],
    "linear": [0.2, 0.4, 1.0, 1 - 0.9 * NEXT, 1 - 0.9 * HALF, 0.1 + 0.9 / 95, 0.1, 0.1],
    "cosine": [
        *(0.2, 0.4, 1.0),
        0.55 + 0.45 * math.cos(math.pi / 95),
        0.55 + 0.45 * math.cos(math.pi * 47 / 95),
        0.55 - 0.45 * math.cos(math.pi / 95),
        *(0.1, 0.1),
    ],
    "inverse_sqrt": [0.2, 0.4, 1.0, (5 / 6) ** 0.5, (5 / 52) ** 0.5, (5 / 99) ** 0.5, (5 / 100) ** 0.5, (5 / 101) ** 0.5],
}
# Update 80 (the last of the flat part), 81, 90, 99, 100, 101.
DECAYS = {
    "linear": [1.0, 0.955, 0.55, 0.145, 0.1, 0.1],
    "cosine": [1.0, 0.55 + 0.45 * math.cos(math.pi / 20), 0.55, 0.55 - 0.45 * math.cos(math.pi / 20), 0.1, 0.1],
    "exponential": [1.0, 1.8 * 0.5**0.05 - 0.8, 1.8 * 0.5**0.5 - 0.8, 1.8 * 0.5**0.95 - 0.8, 0.1, 0.1],
    "one_minus_sqrt": [1.0, 1 - 0.9 * 0.05**0.5, 1 - 0.9 * 0.5**0.5, 1 - 0.9 * 0.95**0.5, 0.1, 0.1],
}
SCHEDULES = [RateSchedule(kind, **PARTS) for kind in RATES] + [RateSchedule("wsd", **PARTS, decay=20, decay_shape=s) for s in DECAYS]


def named(schedule: RateSchedule) -> str:
    return schedule.kind + (f", {schedule.decay_shape}" if schedule.kind == "wsd" else "")


@pytest.mark.parametrize("kind", RATES)
def test_closed_forms(kind):
    schedule = RateSchedule(kind, **PARTS)
    assert [schedule.rate(n) for n in (1, 2, 5, 6, 52, 99, 100, 101)] == pytest.approx(RATES[kind], rel=1e-12)


@pytest.mark.parametrize("shape", DECAYS)
def test_closed_forms_of_the_decay(shape):
    schedule = RateSchedule("wsd", **PARTS, decay=20, decay_shape=shape)
    assert [schedule.rate(n) for n in (1, 2, 5, 6, 52)] == [0.2, 0.4, 1.0, 1.0, 1.0]
    assert [schedule.rate(n) for n in (80, 81, 90, 99, 100, 101)] == pytest.approx(DECAYS[shape], rel=1e-12)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=named)
def test_the_peak_and_the_floor_are_exact(schedule):
    """To the last bit, for numbers that have no exact binary form: the last update of the warm-up, and of the run."""
    schedule = replace(schedule, peak=0.3, floor=0.1, warmup=49, total=103)
    assert schedule.rate(49) == 0.3
    if schedule.kind not in ("constant", "inverse_sqrt"):
        assert schedule.rate(103) == schedule.rate(104) == schedule.rate(10**12) == 0.1


def test_what_has_no_end_goes_on():
    assert RateSchedule("constant", **PARTS).rate(10**9) == 1.0
    assert RateSchedule("inverse_sqrt", **PARTS).rate(320) == pytest.approx(1 / 8)
    assert RateSchedule("inverse_sqrt", **PARTS).rate(10**9) == 0.1


@pytest.mark.parametrize("schedule", SCHEDULES, ids=named)
def test_the_unit_is_the_callers(schedule):
    """In samples, 48 a step, an update has the rate that it has in steps."""
    samples = replace(schedule, total=4800, warmup=240, decay=48 * schedule.decay)
    assert [samples.rate(48 * n) for n in range(1, 102)] == pytest.approx([schedule.rate(n) for n in range(1, 102)], rel=1e-12)


def test_one_update():
    assert RateSchedule("cosine", 1.0, 1, floor=0.1).rate(1) == 0.1
    assert RateSchedule("cosine", 1.0, 1, floor=0.1, warmup=1).rate(1) == 1.0
    assert RateSchedule("wsd", 1.0, 1, floor=0.1, decay=1).rate(1) == 0.1


def test_shares_and_counts():
    schedule = RateSchedule.of("wsd", 1.0, 1001, warmup=0.005, decay=0.2, floor=0.1, decay_shape="cosine")
    parts = {"kind": "wsd", "peak": 1.0, "total": 1001, "floor": 0.1, "warmup": 5, "decay": 200, "decay_shape": "cosine"}
    assert asdict(schedule) == parts
    assert RateSchedule(**asdict(schedule)) == schedule
    counts = RateSchedule.of("wsd", 1.0, 1001, warmup=1, decay=30)
    assert (counts.warmup, counts.decay, counts.floor) == (1, 30, 0.0)
    assert RateSchedule.of("linear", 1.0, 10, warmup=0.01).warmup == 0


KINDS = st.sampled_from(SCHEDULES)


@given(KINDS, st.integers(1, 3000), st.floats(0, 1), st.floats(0, 1), st.floats(1e-6, 10), st.floats(0, 1))
def test_bounds_and_shape(like, total, rising, falling, peak, ratio):
    """Up to the end of the warm-up, down from there, never above the peak, and after the warm-up never under the floor."""
    warmup = max(1, round(rising * total))
    wsd = like.kind == "wsd"
    if wsd and warmup == total:
        total += 1
    decay = max(1, round(falling * (total - warmup)))
    schedule = replace(like, peak=peak, floor=ratio * peak, total=total, warmup=warmup, decay=decay)
    positions = sorted({*range(1, total + 2, max(1, total // 50)), warmup})
    rates = [schedule.rate(n) for n in positions]
    top = positions.index(warmup)
    slack = 1e-14 * peak  # a few ulp
    assert all(0 < rate <= peak + slack for rate in rates[: top + 1])
    assert all(ratio * peak - slack <= rate <= peak + slack for rate in rates[top:])
    assert all(before < after for before, after in pairwise(rates[: top + 1]))
    assert all(after <= before + slack for before, after in pairwise(rates[top:]))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"kind": "step"}, '"step" is no learning rate schedule: use one of constant, linear, cosine, inverse_sqrt, wsd'),
        ({"decay_shape": "sqrt"}, '"sqrt" is no decay shape: use one of linear, cosine, exponential, one_minus_sqrt'),
        ({"peak": -1.0}, r"peak=-1\.0 must be a finite number of 0 or more: change it"),
        ({"floor": math.nan}, "floor=nan must be a finite number"),
        ({"total": math.inf}, "total=inf must be a finite number"),
        ({"warmup": -1}, "warmup=-1 must be a finite number"),
        ({"total": 0, "warmup": 0}, "total=0 leaves the schedule no update: make the run longer"),
        ({"floor": 2.0}, r"the lowest learning rate, 2\.0, is above the peak, 1\.0: lower it, or raise the peak"),
        ({"warmup": 101}, "warmup=101 is longer than the run, 100: shorten it"),
        ({"kind": "inverse_sqrt", "warmup": 0}, "inverse_sqrt has its peak at the end of the warm-up, and warmup=0: give it one"),
        ({"kind": "wsd"}, "wsd decays at its end, and decay=0: give it a decay, or take constant"),
        ({"kind": "wsd", "decay": 96}, "warmup=5 and decay=96 are longer than the run together, 100: shorten them"),
    ],
)
def test_refusals(change, words):
    with pytest.raises(ValueError, match=words):
        RateSchedule(**{"kind": "cosine", **PARTS, **change})


@pytest.mark.parametrize("position", [0, -1, math.nan, math.inf])
def test_no_update_ends_there(position):
    for function in (RateSchedule("cosine", **PARTS).rate, WeightDecaySchedule(0.1, 0.3, "linear", 10).value):
        with pytest.raises(ValueError, match="is the end of no update: give where it ends, which is more than 0"):
            function(position)


def test_weight_decay():
    """Megatron's: start + (end - start) times the share of the run, or (1 + cos(pi (1 - share))) / 2."""
    linear, cosine = (WeightDecaySchedule(0.1, 0.3, kind, 10) for kind in ("linear", "cosine"))
    assert [linear.value(n) for n in (1, 2, 5, 9, 10, 11)] == pytest.approx([0.12, 0.14, 0.2, 0.28, 0.3, 0.3], rel=1e-12)
    share = (1 + math.cos(math.pi * 0.9)) / 2
    assert [cosine.value(n) for n in (1, 5, 10, 11)] == pytest.approx([0.1 + 0.2 * share, 0.2, 0.3, 0.3], rel=1e-12)
    assert linear.value(10) == cosine.value(10) == 0.3
    assert WeightDecaySchedule(0.3, 0.1, "linear", 10).value(5) == pytest.approx(0.2)
    assert [WeightDecaySchedule(0.1, 0.1, "constant", 10).value(n) for n in (1, 10, 11)] == [0.1] * 3


@pytest.mark.parametrize(
    ("parts", "words"),
    [
        ((0.1, 0.2, "constant", 10), r"a constant weight decay cannot go from 0\.1 to 0\.2: take linear or cosine, or one value"),
        ((0.1, 0.2, "wsd", 10), '"wsd" is no weight decay schedule: use one of constant, linear, cosine'),
        ((-0.1, 0.2, "linear", 10), r"start=-0\.1 must be a finite number"),
        ((0.1, 0.2, "linear", 0), "total=0 leaves the schedule no update"),
    ],
)
def test_weight_decay_refusals(parts, words):
    with pytest.raises(ValueError, match=words):
        WeightDecaySchedule(*parts)

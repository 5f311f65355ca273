"""The batch size over a run: every sample once, stages at step boundaries, the closed forms against a loop, Megatron's ramp-up formula."""

from dataclasses import asdict
from fractions import Fraction
from math import floor

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megapar.pipeline.kinds import make_schedule
from megapar.training.batch_size import BatchSchedule, parse_amount

SCHEDULES = st.builds(
    lambda sizes, gaps: BatchSchedule(tuple(zip([sum(gaps[:i]) for i in range(len(sizes))], sizes, strict=True))),
    st.lists(st.integers(1, 40), min_size=1, max_size=6),
    st.lists(st.integers(1, 150), min_size=6, max_size=6),
)


def batch_at(schedule: BatchSchedule, consumed: int) -> int:
    """The stages read one by one."""
    size = 0
    for threshold, its in schedule.stages:
        if consumed >= threshold:
            size = its
    return size


@given(SCHEDULES)
def test_steps_take_every_sample_once(schedule):
    """Against a loop over 60 steps: where each starts, and what it takes."""
    consumed = 0
    for step in range(60):
        assert schedule.samples_after(step) == consumed
        assert schedule.batch_at(consumed) == batch_at(schedule, consumed)
        consumed += batch_at(schedule, consumed)


@given(SCHEDULES, st.integers(0, 10**13))
def test_the_steps_that_samples_are_enough_for(schedule, samples):
    """The closed form at sizes at which nobody could count: no more fit, and no whole step is left out."""
    steps = schedule.steps(samples)
    used = schedule.samples_after(steps)
    assert used <= samples < used + schedule.batch_at(used) == schedule.samples_after(steps + 1)


def test_stages_begin_at_the_first_step_after_their_threshold():
    schedule = BatchSchedule.parse("0:64 100:128 300:32")
    # Steps start at 0, 64, 128 (past 100), 256, 384 (past 300), 416.
    assert [schedule.samples_after(step) for step in range(6)] == [0, 64, 128, 256, 384, 416]
    assert [run.first_step for run in schedule.runs] == [0, 2, 4]
    assert schedule.batch_at(99) == 64 and schedule.batch_at(100) == 128
    assert schedule.steps(255) == 2 and schedule.steps(256) == 3


def test_a_stage_that_no_step_starts_in_is_passed_over():
    schedule = BatchSchedule.parse("0:100 10:20 50:30")
    assert [(run.first_step, run.batch_size) for run in schedule.runs] == [(0, 100), (1, 30)]
    assert schedule.samples_after(3) == 160


def test_one_batch_size():
    for text in (16, "16", " 16 ", "0:16"):
        schedule = BatchSchedule.parse(text)
        assert schedule.stages == ((0, 16),)
        assert (schedule.steps(1000), schedule.samples_after(62)) == (62, 992)


def test_thresholds():
    assert BatchSchedule.parse("0:64 2M:128 10M:256").stages == ((0, 64), (2_000_000, 128), (10_000_000, 256))
    assert BatchSchedule.parse("0:64 2M:128 samples").stages == ((0, 64), (2_000_000, 128))
    # 250,000,000 / 1000 is whole; 1,001 tokens are crossed by the second sample, so that the third is the first after them.
    assert BatchSchedule.parse("0:64 1001:96 250M:128 tokens", 1000).stages == ((0, 64), (2, 96), (250_000, 128))
    # Both within the first sample: the last one has the second.
    assert BatchSchedule.parse("0:1 10:2 20:4 tokens", 1000).stages == ((0, 1), (1, 4))


@given(SCHEDULES)
def test_the_text_of_a_schedule_is_parsed_back(schedule):
    assert BatchSchedule.parse(str(schedule)) == schedule
    assert BatchSchedule(**asdict(schedule)) == schedule


@given(st.integers(1, 64), st.integers(1, 16), st.integers(0, 12), st.integers(1, 5000))
def test_ramp_up_is_megatrons_formula(start, increment, count, samples):
    """At every number of consumed samples, in exact arithmetic; start = batch size divides by no 0."""
    size = start + count * increment
    schedule = BatchSchedule.ramp(f"{start} {increment} {samples}", size)
    for consumed in {0, 1, samples // 3, samples // 2, samples - 1, samples, samples + 1, *(t for t, _ in schedule.stages)}:
        expected = size
        if count and consumed <= samples:
            expected = start + increment * floor(consumed / Fraction(samples, count))
        assert schedule.batch_at(consumed) == expected


def test_published_ramp_up():
    """BLOOM's, 16 32 9765625 to 2048: 63 increments."""
    schedule = BatchSchedule.ramp("16 32 9765625", 2032)
    assert len(schedule.stages) == 64 and schedule.stages[-1] == (9765625, 2032)
    assert schedule.stages[1] == (155010, 48)  # 9765625 / 63 = 155009.9


def test_ramp_up_in_tokens():
    assert BatchSchedule.ramp("2 2 3K tokens", 8, 100).stages == ((0, 2), (10, 4), (20, 6), (30, 8))
    assert BatchSchedule.ramp("2 2 301 tokens", 4, 100).stages == ((0, 2), (4, 4))


@pytest.mark.parametrize(
    ("text", "value"), [("7", 7), ("2K", 2000), ("1.5M", 1_500_000), ("0.25b", 250_000_000), ("3T", 3 * 10**12), ("1.0", 1)]
)
def test_amounts(text, value):
    assert parse_amount(text) == value


@pytest.mark.parametrize("text", ["", "M", "-1", "1e6", "2G", "2 M", "1.", "١", "1_000"])
def test_what_is_no_amount(text):
    with pytest.raises(ValueError, match=r'".*" is no amount: write a number'):
        parse_amount(text)


def test_an_amount_is_whole():
    with pytest.raises(ValueError, match=r'"1.2345K" is 1234.5 and must be a whole number'):
        parse_amount("1.2345K")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", '"" gives no batch size: write one'),
        ("tokens", '"tokens" gives no batch size'),
        ("16 tokens", '"16 tokens" names a unit, which is for thresholds, and has none: write 16, which are samples'),
        (0, "the batch size from 0 samples on is 0 and must be at least 1: raise it"),
        (-4, "the batch size from 0 samples on is -4 and must be at least 1"),
        ("0:64 2M:0", "the batch size from 2000000 samples on is 0"),
        ("10:64", "the first batch size begins at 10 samples and must begin at 0: write it as 0:64"),
        ("0:64 2M:128 1M:256", "batch size 256 begins at 1000000 samples, not after the one before it, at 2000000: put them in order"),
        ("0:64 2M:128 2M:256 tokens", "batch size 256 begins at 2000000 tokens, not after the one before it"),
        ("0:64 128", r'"0:64 128": "128" is no stage: write threshold:batch_size'),
        ("0:64 2M:128 words", '"words" is no stage: write threshold:batch_size, as 2M:128, and samples or tokens at the end'),
        ("0:64 2X:128", '"2X" is no amount'),
        ("0:64 2M:", '"" is no amount'),
    ],
)
def test_what_is_no_schedule(text, words):
    with pytest.raises(ValueError, match=words):
        BatchSchedule.parse(text)


@pytest.mark.parametrize(
    ("text", "size", "words"),
    [
        ("16 8", 64, '"16 8" is no ramp-up: write start, increment and over how many samples'),
        ("16 8 1M", 61, 'ramp-up "16 8 1M" does not reach batch size 61 from 16 in increments of 8: take batch size 56 or 64'),
        ("64 8 1M", 16, "does not reach batch size 16 from 64 in increments of 8: take batch size 64 or 72"),
        ("16 0 1M", 64, 'the increment of ramp-up "16 0 1M" is 0 and must be at least 1: raise it'),
        ("0 8 1M", 64, "the start of ramp-up"),
        ("16 8 0", 64, "the length of ramp-up"),
    ],
)
def test_what_is_no_ramp_up(text, size, words):
    with pytest.raises(ValueError, match=words):
        BatchSchedule.ramp(text, size)


def test_every_stage_is_whole_micro_batches():
    schedule = BatchSchedule.parse("0:16 2K:36 5K:48")
    schedule.check(2, 2)
    words = r"batch size 36 \(stage 1, from sample 2000\) must be a multiple of dp=4 x micro_batch_size=2, 8 samples: take 32 or 40, or"
    with pytest.raises(ValueError, match=words):
        schedule.check(4, 2)
    with pytest.raises(ValueError, match="batch size 3 must be a multiple of dp=2 x micro_batch_size=2, 4 samples: take 4, or another"):
        BatchSchedule.parse(3).check(2, 2)


def test_every_stage_has_a_pipeline_schedule():
    seen: list[int] = []
    BatchSchedule.parse("0:8 100:24").check(2, 2, seen.append)
    assert seen == [2, 6]

    def make(count: int) -> None:
        if count == 6:
            make_schedule("interleaved_1f1b", 4, 2, count, group=3)

    with pytest.raises(ValueError, match=r"batch size 24 \(stage 1, from sample 100\) is 6 micro-batches: group=3 is smaller than pp=4"):
        BatchSchedule.parse("0:8 100:24").check(2, 2, make)


def test_negative_counts():
    schedule = BatchSchedule.parse(16)
    for ask in (schedule.batch_at, schedule.steps, schedule.samples_after):
        with pytest.raises(ValueError, match=r"-1 (samples|steps) is negative"):
            ask(-1)


def test_learning_rate_factor():
    schedule = BatchSchedule.parse("0:64 1M:128 2M:256")
    assert [schedule.lr_factor(size, "sqrt") for size in (64, 128, 256)] == pytest.approx([0.5, 0.5**0.5, 1.0])
    assert [schedule.lr_factor(size, "linear") for size in (64, 128, 256)] == [0.25, 0.5, 1.0]
    assert schedule.lr_factor(64, "none") == 1.0
    with pytest.raises(ValueError, match='"cube" scales no learning rate: use none, sqrt, linear'):
        schedule.lr_factor(64, "cube")

"""Orders of forwards and backwards: proven, within the formulas of time and memory, those of Megatron-LM where it has one."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megapar.pipeline.check import check
from megapar.pipeline.kinds import KINDS, make_schedule
from megapar.pipeline.orders import gpipe, interleaved_1f1b, one_f_one_b, padded
from megapar.pipeline.passes import with_communication, with_sharding
from megapar.pipeline.schedule import COMPUTE, Schedule
from megapar.pipeline.simulate import Costs, simulate
from tests.pipeline.common import costs_of, layouts


def base(kind: str, pp: int, chunks: int, microbatches: int, group: int | None) -> Schedule:
    """gpipe, 1f1b or interleaved_1f1b, whatever of the layout it takes."""
    if kind == "1f1b":
        return one_f_one_b(pp, microbatches)
    return make_schedule(kind, pp, chunks, microbatches, group if kind == "interleaved_1f1b" else None)


def most_live(pp: int, chunks: int, microbatches: int, group: int | None) -> list[int]:
    """The formula: activations that interleaved 1F1B keeps on each rank at most."""
    if chunks == 1:
        return [min(microbatches, pp - rank) for rank in range(pp)]
    group = max(pp, min(group or pp, microbatches))
    return [min(chunks * microbatches, 2 * (pp - rank - 1) + (chunks - 1) * group + 1) for rank in range(pp)]


@settings(max_examples=500, deadline=None)
@given(st.data(), layouts(), st.sampled_from(["gpipe", "1f1b", "interleaved_1f1b"]))
def test_proven_for_every_layout(data, layout, kind) -> None:
    schedule = base(kind, *layout)
    pp, chunks, microbatches, group = layout
    costs = data.draw(costs_of(schedule.stages))
    peaks = check(schedule)
    if kind == "gpipe":
        assert peaks == [chunks * microbatches] * pp
    else:
        formula = most_live(pp, 1 if kind == "1f1b" else chunks, microbatches, group)
        assert all(peak <= most for peak, most in zip(peaks, formula, strict=True))
        if kind == "1f1b" or padded(pp, microbatches, group or pp) == microbatches:
            assert peaks == formula
    sent = with_communication(schedule, costs)
    assert check(sent) == peaks
    assert sent.only(COMPUTE) == schedule
    assert simulate(sent, costs).makespan == simulate(schedule, costs).makespan
    sharded = with_sharding(sent, data.draw(st.integers(0, 4)))
    assert check(sharded) == peaks
    assert check(sharded.only(("F", "SEND_F", "RECV_F"))) == [0] * pp  # an evaluation


@settings(max_examples=400, deadline=None)
@given(layouts(), st.tuples(*[st.integers(1, 9)] * 3))
def test_bubble_is_the_formula(layout, times) -> None:
    pp, chunks, microbatches, group = layout
    costs = Costs(*times)
    ideal = sum(times) * microbatches
    assert simulate(gpipe(pp, 1, microbatches), costs).makespan == ideal + (pp - 1) * sum(times)
    assert simulate(one_f_one_b(pp, microbatches), costs).makespan == ideal + (pp - 1) * sum(times)
    assert simulate(one_f_one_b(pp, microbatches)).bubble == pytest.approx((pp - 1) / microbatches, abs=1e-9)
    interleaved = simulate(interleaved_1f1b(pp, chunks, microbatches, group), costs)
    whole = padded(pp, microbatches, group or pp)
    if chunks == 1:
        assert interleaved.makespan == ideal + (pp - 1) * sum(times)
    elif whole == microbatches:  # Megatron's order, also where a last group is shorter
        assert interleaved.makespan == chunks * ideal + (pp - 1) * sum(times)
        assert interleaved.bubble == pytest.approx((pp - 1) / (chunks * microbatches), abs=1e-9)
    else:
        assert interleaved.makespan <= simulate(interleaved_1f1b(pp, chunks, whole, group), costs).makespan


@settings(max_examples=250, deadline=None)
@given(st.data(), layouts())
def test_ragged_is_no_longer_than_the_next_multiple_of_the_group(data, layout) -> None:
    pp, chunks, microbatches, group = layout
    group = group or pp
    costs = data.draw(costs_of(pp * chunks))
    ragged = simulate(interleaved_1f1b(pp, chunks, microbatches, group), costs).makespan
    whole = simulate(interleaved_1f1b(pp, chunks, -(-microbatches // group) * group, group), costs).makespan
    assert ragged <= whole * (1 + 1e-12)


def megatron_order(pp: int, chunks: int, microbatches: int, group: int, rank: int) -> list[str]:
    """Transcribed from Megatron-LM's rules: `get_schedule_table`, `get_pp_rank_microbatches`, backwards through the chunks in reverse."""
    order = []
    for first in range(0, microbatches, group):
        for chunk in range(chunks):
            order += [(m, chunk) for m in range(first, min(first + group, microbatches))]
    total = microbatches * chunks
    warmup = min(total, 2 * (pp - rank - 1) + (chunks - 1) * group)
    texts = []
    for k in range(total + warmup):
        if k < total:
            texts.append(f"{order[k][1] * pp + rank}F{order[k][0]}")
        if k >= warmup:
            m, chunk = order[k - warmup]
            texts.append(f"{(chunks - 1 - chunk) * pp + rank}B{m}")
    return texts


@settings(max_examples=250, deadline=None)
@given(layouts())
def test_megatrons_order_where_megatron_accepts(layout) -> None:
    pp, chunks, microbatches, group = layout
    group = group or pp
    refused = group > microbatches or 0 < microbatches % group < pp
    if chunks == 1 or refused:
        return
    texts = interleaved_1f1b(pp, chunks, microbatches, group).ranks_as_text()
    assert texts == [megatron_order(pp, chunks, microbatches, group, rank) for rank in range(pp)]


# What Megatron-LM runs for pp=2, 2 chunks, 4 micro-batches: F<micro-batch>.<chunk>.
GOLDEN = [
    "F0.0 F1.0 F0.1 F1.1 F2.0 B0.1 F3.0 B1.1 F2.1 B0.0 F3.1 B1.0 B2.1 B3.1 B2.0 B3.0",
    "F0.0 F1.0 F0.1 B0.1 F1.1 B1.1 F2.0 B0.0 F3.0 B1.0 F2.1 B2.1 F3.1 B3.1 B2.0 B3.0",
]


def test_megatrons_golden_order() -> None:
    schedule = interleaved_1f1b(2, 2, 4)
    texts = [" ".join(f"{a.kind}{a.microbatch}.{a.stage // 2}" for a in actions) for actions in schedule.ranks]
    assert texts == GOLDEN


@pytest.mark.parametrize(
    ("pp", "chunks", "microbatches", "warmups"),
    [
        (4, 1, 8, [3, 2, 1, 0]),
        (4, 2, 8, [10, 8, 6, 4]),
        (2, 2, 4, [4, 2]),
        (4, 2, 4, [8, 8, 6, 4]),
        (8, 4, 24, [38, 36, 34, 32, 30, 28, 26, 24]),
    ],
)
def test_warmup_counts(pp, chunks, microbatches, warmups) -> None:
    schedule = interleaved_1f1b(pp, chunks, microbatches)
    forwards_first = [next(k for k, a in enumerate(actions) if a.kind == "B") for actions in schedule.ranks]
    # The first pair begins with one more forward, if there is one left.
    assert forwards_first == [min(warmup + 1, chunks * microbatches) for warmup in warmups]


@pytest.mark.parametrize(
    ("pp", "chunks", "microbatches", "makespan", "bubble", "peaks"),
    [
        (4, 1, 8, 33, 0.375, [4, 3, 2, 1]),
        (4, 1, 32, 105, 0.09375, [4, 3, 2, 1]),
        (8, 1, 64, 213, 0.109375, [8, 7, 6, 5, 4, 3, 2, 1]),
        (2, 2, 4, 13.5, 0.125, [5, 3]),
    ],
)
def test_published_figures(pp, chunks, microbatches, makespan, bubble, peaks) -> None:
    schedule = interleaved_1f1b(pp, chunks, microbatches)
    timeline = simulate(schedule, Costs(1 / chunks, 1 / chunks, 1 / chunks))  # F 1 and B 2 for a rank's whole share
    assert (timeline.makespan, timeline.bubble) == (makespan, pytest.approx(bubble))
    assert schedule.peak_activations() == peaks


def test_one_chunk_or_one_rank() -> None:
    assert interleaved_1f1b(3, 1, 5) == one_f_one_b(3, 5)
    assert interleaved_1f1b(1, 1, 2).ranks_as_text() == [["0F0", "0B0", "0F1", "0B1"]]
    assert gpipe(1, 2, 2).ranks_as_text() == [["0F0", "0F1", "1F0", "1F1", "1B0", "1B1", "0B0", "0B1"]]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((None, 4, 2, 8, 3), "group=3 is smaller than pp=4"),
        (("zero_bubble", 4, 1, 8, 3), "group=3 is smaller than pp=4"),
        (("1f1b", 4, 2, 8, None), "1f1b has one chunk"),
        (("gpipe", 4, 2, 8, 4), "group=4 is for interleaved"),
        (("2f2b", 4, 2, 8, None), '"2f2b" is no schedule: use one of gpipe'),
        ((None, 0, 1, 1, None), "pp=0"),
        ((None, 1, 0, 1, None), "chunks=0"),
        (("gpipe", 1, 1, 0, None), "microbatches=0"),
    ],
)
def test_refused_by_name(arguments, words) -> None:
    with pytest.raises(ValueError, match=words):
        make_schedule(*arguments)


def test_every_kind_has_a_name() -> None:
    assert [make_schedule(kind, 2, 1, 3).microbatches for kind in KINDS] == [3] * len(KINDS)

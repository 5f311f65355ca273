"""The simulation, by hand; what a timeline looks like as a table, a picture and a trace."""

import itertools
import json
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megapar.pipeline.orders import interleaved_1f1b, one_f_one_b
from megapar.pipeline.passes import with_communication, with_sharding
from megapar.pipeline.schedule import COMPUTE, Action, parse_schedule
from megapar.pipeline.simulate import Costs, Span, Timeline, measured_costs, simulate
from megapar.pipeline.timeline import draw, table, write_trace
from megapar.pipeline.zero_bubble import zero_bubble
from tests.pipeline.common import costs_of, layouts


def test_starts_and_ends_by_hand() -> None:
    schedule = parse_schedule("0F0,0I0,0W0\n1F0,1B0")
    costs = Costs([1, 2], [3, 4], [5, 6], 0.5)
    timeline = simulate(schedule, costs)
    assert timeline.ranks == (
        (Span(Action("F", 0, 0), 0, 1), Span(Action("I", 0, 0), 14, 17), Span(Action("W", 0, 0), 17, 22)),
        (Span(Action("F", 1, 0), 1.5, 3.5), Span(Action("B", 1, 0), 3.5, 13.5)),
    )
    assert (timeline.makespan, timeline.work) == (22, [9, 12])
    assert timeline.bubble == pytest.approx(2 * 22 / 21 - 1)
    assert timeline.idle == pytest.approx(1 - 21 / 44)
    sent = simulate(with_communication(schedule, costs), costs)
    assert [span for spans in sent.ranks for span in spans if span.action.kind in COMPUTE] == [s for spans in timeline.ranks for s in spans]
    (wire,) = [span for span in sent.ranks[1] if span.action.kind == "RECV_F"]
    assert (wire.start, wire.end) == (1, 1.5)


def test_what_is_split_lets_the_gradient_go_earlier() -> None:
    assert simulate(parse_schedule("0F0,0B0\n1F0,1B0")).makespan == 6
    assert simulate(parse_schedule("0F0,0B0\n1F0,1I0,1W0")).makespan == 5


@pytest.mark.parametrize(
    ("costs", "words"),
    [
        (Costs([1, 1, 1]), "forward has 3 costs, there are 2 stages"),
        (Costs(weight_gradient=-1), "negative or not finite"),
        (Costs(1, [1, float("nan")]), "negative or not finite"),
        (Costs(communication=float("inf")), "negative or not finite"),
    ],
)
def test_bad_costs(costs, words) -> None:
    with pytest.raises(ValueError, match=words):
        simulate(one_f_one_b(2, 2), costs)


def test_deadlock_is_refused() -> None:
    with pytest.raises(ValueError, match="deadlock"):
        simulate(parse_schedule("0B0,0F0\n1F0,1B0"))


def test_table() -> None:
    assert table(simulate(with_sharding(with_communication(one_f_one_b(2, 2)), 0))).splitlines() == [
        "     time  rank 0 rank 1",
        "        0  0F0    .",
        "        1  0F1    1F0",
        "        2  .      1B0",
        "        4  0B0    1F1",
        "        5  |      1B1",
        "        7  0B1    .",
    ]


@pytest.mark.parametrize("suffix", ["svg", "png", "pdf"])
def test_picture(tmp_path, suffix) -> None:
    simulated = simulate(with_communication(zero_bubble(3, 2, 4)))
    later = [[Span(s.action, s.start + 100, s.end + 100.2) for s in spans] for spans in simulated.ranks]
    measured = Timeline(tuple(map(tuple, later)))
    assert measured.makespan == pytest.approx(simulated.makespan + 0.2)
    path = tmp_path / f"schedule.{suffix}"
    draw({"simulated": simulated, "measured": measured}, path)
    assert path.read_bytes()[:4] in (b"<?xm", b"\x89PNG", b"%PDF")
    if suffix == "svg":
        again = tmp_path / "again.svg"
        draw({"simulated": simulated}, again)
        bars = ElementTree.parse(again).getroot().findall(".//{*}g[@id='axes_1']/{*}g/{*}path")
        assert len(bars) >= sum(len(spans) for spans in simulate(zero_bubble(3, 2, 4)).ranks)
        assert again.stat().st_size < path.stat().st_size


def test_nothing_to_draw_and_nowhere(tmp_path) -> None:
    draw({"empty": Timeline(((), ()))}, tmp_path / "empty.svg")
    assert (Timeline(()).makespan, Timeline(((),)).bubble) == (0, 0)
    with pytest.raises(ValueError, match=r"name it \.svg"):
        draw({"simulated": simulate(one_f_one_b(1, 1))}, tmp_path / "schedule.bmp")


def test_trace(tmp_path) -> None:
    timeline = simulate(with_sharding(with_communication(interleaved_1f1b(2, 2, 3)), 0), Costs(communication=0.25))
    write_trace(timeline, tmp_path / "trace.json")
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    whole = [event for event in events if event["ph"] == "X"]
    first = next(event for event in whole if event["name"] == "1F0")
    assert (first["pid"], first["ts"], first["dur"], first["args"]) == (1, 1.25e6, 1e6, {"stage": 1, "microbatch": 0})
    begun, ended = ([event["id"] for event in events if event["ph"] == phase] for phase in "be")
    assert sorted(begun) == sorted(ended)
    assert len(set(begun)) == len(begun) > 0
    assert len(whole) + len(begun) == sum(len(spans) for spans in timeline.ranks)
    for rank in range(2):  # what is on one track does not overlap
        track = sorted((event["ts"], event["ts"] + event["dur"]) for event in whole if event["pid"] == rank)
        assert all(end <= start + 1e-6 for (_, end), (start, _) in itertools.pairwise(track))


@given(st.data())
def test_measured_costs_are_those_simulated(data):
    """Of a whole step: what was put in comes out, a B as the I that it holds."""
    pp, chunks, microbatches, group = data.draw(layouts(6))
    schedule = interleaved_1f1b(pp, chunks, microbatches, group)
    costs = data.draw(costs_of(schedule.stages, lowest=0.125))
    found = measured_costs(simulate(schedule, costs), schedule.stages).by_stage(schedule.stages)
    wanted = costs.by_stage(schedule.stages)
    assert found["F"] == pytest.approx(wanted["F"]) and found["I"] == pytest.approx(wanted["B"]) and found["W"] == [0.0] * schedule.stages

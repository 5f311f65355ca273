"""megapar plan schedule: a pipeline schedule before anything runs."""

from __future__ import annotations

from pathlib import Path

from megapar.pipeline.check import check
from megapar.pipeline.passes import with_communication
from megapar.pipeline.schedule import COMPUTE, SENDS, Schedule
from megapar.pipeline.simulate import Costs, Timeline, simulate
from megapar.pipeline.timeline import draw, table, write_trace


def parse_costs(text: str) -> Costs:
    """`F,I,W` or `F,I,W,communication`, as in 1,1.1,0.9,0.05. ValueError for another number of numbers."""
    try:
        numbers = [float(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    if len(numbers) not in (3, 4):
        raise ValueError(f'"{text}" are not costs: give the times of F, I, W and, if you like, of a message, as 1,1.1,0.9,0.05')
    return Costs(*numbers)


def plan_schedule(schedule: Schedule, costs: Costs, out: Path | None) -> str:
    """Checks and simulates the schedule; returns its table and figures, and writes to `out`, by suffix: the picture (.svg, .png, .pdf),
    the trace (.json), or the schedule with its sends (.csv, which a run and torch can load)."""
    if not schedule.has(SENDS):
        schedule = with_communication(schedule, costs)
    peaks = check(schedule)
    timeline = simulate(schedule, costs)
    text = table(timeline) + "\n\n" + _figures(timeline, peaks)
    if out is None:
        return text
    if out.suffix == ".json":
        write_trace(timeline, out)
    elif out.suffix == ".csv":
        schedule.save(out)
    else:
        draw({"simulated": timeline}, out)
    return f"{text}\nwritten {out}"


def _figures(timeline: Timeline, peaks: list[int]) -> str:
    ideal = max(timeline.work, default=0.0)
    messages = sum(span.action.kind in SENDS for spans in timeline.ranks for span in spans)
    actions = sum(span.action.kind in COMPUTE for spans in timeline.ranks for span in spans)
    return "\n".join(
        [
            f"time {timeline.makespan:.6g}, of which the fullest rank computes {ideal:.6g}",
            f"bubble {timeline.bubble:.2%} of the time that ranks compute, {timeline.idle:.2%} of the whole",
            f"peak live activations (of one stage and micro-batch) by rank: {', '.join(map(str, peaks))}",
            f"{actions} actions, {messages} messages",
        ]
    )

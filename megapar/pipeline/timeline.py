"""Shows a timeline, simulated or measured: a table for the terminal, a picture, a trace for Perfetto or chrome://tracing."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from megapar.pipeline.schedule import COMPUTE, SHARDING
from megapar.pipeline.simulate import Span, Timeline

_COLOURS = {"F": "#4c78a8", "B": "#54a24b", "I": "#54a24b", "W": "#e8a33d"}
_NAMES = {"F": "F forward", "B": "B backward", "I": "I input gradient", "W": "W weight gradient"}
_LABEL_INCHES = 0.11
"""A bar narrower than this for each digit stays without its number."""


def table(timeline: Timeline) -> str:
    """A row for each time at which a rank starts to compute, a column for each rank: `1F3` starts, `|` goes on, `.` waits."""
    columns = [{round(s.start, 9): s for s in spans if s.action.kind in COMPUTE} for spans in timeline.ranks]
    width = max((len(str(span.action)) for spans in columns for span in spans.values()), default=1)
    width = max(width, len(f"rank {len(columns) - 1}"))
    running: list[Span | None] = [None] * len(columns)
    lines = [f"{'time':>9}  " + " ".join(f"{f'rank {rank}':<{width}}" for rank in range(len(columns)))]
    for time in sorted({time for spans in columns for time in spans}):
        cells = []
        for rank, spans in enumerate(columns):
            if time in spans:
                running[rank] = spans[time]
                cells.append(str(spans[time].action))
            else:
                last = running[rank]
                cells.append("|" if last is not None and last.end > time + 1e-9 else ".")
        lines.append(f"{time:>9.6g}  " + " ".join(f"{cell:<{width}}" for cell in cells))
    return "\n".join(line.rstrip() for line in lines)


def draw(timelines: Mapping[str, Timeline], path: str | Path) -> None:
    """Writes a picture (.svg, .png or .pdf) with one panel for each titled timeline, all on one time axis. A bar is an F, B, I or W with
    its micro-batch, the paler the later its chunk; a white gap is a bubble. ValueError for another suffix."""
    path = Path(path)
    if path.suffix not in (".svg", ".png", ".pdf"):
        raise ValueError(f'"{path}" is no picture that can be drawn: name it .svg, .png or .pdf')
    spans = max((len([s for s in rank if s.action.kind in COMPUTE]) for t in timelines.values() for rank in t.ranks), default=0)
    width = min(40.0, max(8.0, 0.16 * spans))
    height = sum(0.9 + 0.34 * len(timeline.ranks) for timeline in timelines.values()) + 0.5
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    heights = [len(timeline.ranks) + 1 for timeline in timelines.values()]
    panels = figure.subplots(len(timelines), 1, sharex=True, squeeze=False, height_ratios=heights)[:, 0]
    longest = max((timeline.makespan for timeline in timelines.values()), default=0.0) or 1.0
    for axes, (title, timeline) in zip(panels, timelines.items(), strict=True):
        _draw_bars(axes, timeline, inches=width / longest)
        axes.set_title(f"{title}: {timeline.makespan:.6g}, bubble {timeline.bubble:.1%}", loc="left", fontsize=9)
        axes.set_xlim(0, longest)
    panels[-1].set_xlabel("time", fontsize=8)
    used = {span.action.kind for timeline in timelines.values() for spans in timeline.ranks for span in spans}
    patches = [Patch(color=_COLOURS[kind], label=_NAMES[kind]) for kind in COMPUTE if kind in used]
    figure.legend(handles=patches, loc="outside lower right", ncols=4, fontsize=7)
    figure.savefig(path, dpi=120, metadata={"Date": None} if path.suffix == ".svg" else None)


def _draw_bars(axes: Axes, timeline: Timeline, inches: float) -> None:
    """One panel. `inches`: of paper for a unit of time."""
    begin = min((span.start for spans in timeline.ranks for span in spans), default=0.0)
    for rank, spans in enumerate(timeline.ranks):
        computed = [span for span in spans if span.action.kind in COMPUTE]
        chunks = {stage: chunk for chunk, stage in enumerate(sorted({span.action.stage for span in computed}))}
        colours = [_paler(_COLOURS[s.action.kind], chunks[s.action.stage] / max(1, len(chunks))) for s in computed]
        bars = [(span.start - begin, span.end - span.start) for span in computed]
        axes.broken_barh(bars, (rank - 0.45, 0.9), facecolors=colours, edgecolor="white", linewidth=0.5)
        for (start, duration), span in zip(bars, computed, strict=True):
            number = str(span.action.microbatch)
            if duration * inches > _LABEL_INCHES * len(number):
                axes.text(start + duration / 2, rank, number, ha="center", va="center", fontsize=6, clip_on=True)
    axes.set_ylim(len(timeline.ranks) - 0.5, -0.5)
    axes.set_yticks(range(len(timeline.ranks)), [f"rank {rank}" for rank in range(len(timeline.ranks))], fontsize=7)
    axes.tick_params(axis="x", labelsize=7)
    axes.spines[["top", "right", "left"]].set_visible(False)


def _paler(colour: str, share: float) -> tuple[float, ...]:
    return tuple(part + (1 - part) * 0.65 * share for part in to_rgb(colour))


def write_trace(timeline: Timeline, path: str | Path) -> None:
    """Writes the timeline, in seconds, as Chrome trace JSON: a process for each rank, what it computes on one track, its messages (which
    overlap one another) as asynchronous events."""
    events: list[dict[str, object]] = []
    for rank, spans in enumerate(timeline.ranks):
        events.append({"ph": "M", "name": "process_name", "pid": rank, "args": {"name": f"pipeline rank {rank}"}})
        events.append({"ph": "M", "name": "thread_name", "pid": rank, "tid": 0, "args": {"name": "compute"}})
        for number, span in enumerate(spans):
            kind, stage, microbatch = span.action
            event = {"name": str(span.action), "cat": kind, "pid": rank, "tid": 0, "ts": span.start * 1e6}
            event["args"] = {"stage": stage, "microbatch": microbatch}
            if kind in COMPUTE + SHARDING:
                events.append(event | {"ph": "X", "dur": (span.end - span.start) * 1e6})
            else:
                identity = f"{rank}.{number}"
                events += [event | {"ph": "b", "id": identity}, event | {"ph": "e", "id": identity, "ts": span.end * 1e6}]
    Path(path).write_text(json.dumps({"traceEvents": events, "displayTimeUnit": "ms"}), encoding="utf-8")

"""The pictures of a run's history, as PNGs: a plot for each thing that was measured, over steps; the loss over tokens too."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from io import BytesIO
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from megapar.training.history import Floats, History, running_mean, series
from megapar.training.metrics import Record

Plots = dict[str, tuple[str, bytes]]
"""By name: a caption, and a PNG."""

LEFT, BACK, SKIPPED = "0.6", "C3", "C4"
"""Colours of lines that were left, ranges that were rolled back, and steps that were skipped."""

MEASURES: tuple[tuple[str, str, float, str], ...] = (
    # key of a step's record, caption, what a unit of the axis is, scale of the axis
    ("lr", "Learning rate", 1.0, "linear"),
    ("batch_size", "Batch size, samples", 1.0, "linear"),
    ("grad_norm", "Gradient norm before clipping", 1.0, "log"),
    ("weight_decay", "Weight decay", 1.0, "linear"),
    ("loss_scale", "Loss scale", 1.0, "log"),
    ("tokens_per_second", "Throughput, tokens a second", 1.0, "linear"),
    ("peak_bytes", "Memory peak of rank 0, MB", 1e6, "linear"),
)


def draw_plots(history: History, baselines: Mapping[str, float]) -> Plots:
    """A picture of everything that the history has at least one number of; baselines: losses, drawn as lines."""
    plots: Plots = {}
    if history.steps or history.evaluations:
        plots["loss"] = _picture("Loss over steps", "step", lambda axes: _loss(axes, history, baselines, over_tokens=False))
    if series(history.steps, "tokens")[1].any():
        plots["loss-tokens"] = _picture("Loss over tokens", "tokens", lambda axes: _loss(axes, history, baselines, over_tokens=True))
    if history.objectives:
        caption = "Loss by objective: training (running mean), held out (dots)"
        plots["objectives"] = _picture(caption, "step", lambda axes: _by_objective(axes, history))
    for key, caption, unit, scale in MEASURES:
        if series(history.steps, key)[0].size:
            plots[key.replace("_", "-")] = _picture(caption, "step", _measure(history, key, caption, unit, scale))
    if series(history.checkpoints, "checkpoint", "stall")[0].size:
        plots["checkpoint-stalls"] = _picture("Checkpoints: seconds that training stood still", "step", lambda axes: _stalls(axes, history))
    return plots


def _picture(caption: str, across: str, draw: Callable[[Axes], None]) -> tuple[str, bytes]:
    figure = Figure(figsize=(9, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    draw(axes)
    axes.set_xlabel(across)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    handles, labels = axes.get_legend_handles_labels()
    if handles:
        unique = dict(zip(labels, handles, strict=True))  # marks of one kind have one line in it
        axes.legend(unique.values(), unique.keys(), fontsize="small")
    png = BytesIO()
    figure.savefig(png, dpi=110, format="png")
    return caption, png.getvalue()


def _loss(axes: Axes, history: History, baselines: Mapping[str, float], over_tokens: bool) -> None:
    def across(records: list[Record], steps: Floats) -> Floats:
        if not over_tokens or not steps.size:
            return steps
        if records is history.steps or records is history.evaluations:
            return history.tokens_at(steps)
        return history.tokens_at([steps[0] - 1]) + np.cumsum([record.get("tokens", 0) for record in records])  # a line that was left

    for line in history.abandoned:
        steps, losses = series(line, "loss")
        axes.plot(across(line, steps), losses, color=LEFT, linewidth=0.8, label="training, undone")
    steps, losses = series(history.steps, "loss")
    axes.plot(
        across(history.steps, steps), losses, marker=_marker(steps), color="C0", alpha=0.3, linewidth=0.8, label="training, each step"
    )
    axes.plot(across(history.steps, steps), running_mean(losses), color="C0", label="training, running mean")
    steps, losses = series(history.evaluations, "held_out_loss")
    if steps.size:
        axes.plot(across(history.evaluations, steps), losses, "o-", color="C1", markersize=4, label="held out")
    for number, (name, value) in enumerate(baselines.items()):
        axes.axhline(value, color="0.4", linestyle=("--", ":", "-.")[number % 3], label=f"{name} {value:.2f}")
    axes.set_ylabel("loss (nats a token)")
    if not over_tokens:
        _mark(axes, history)


def _marker(steps: Floats) -> str:
    return "o" if steps.size == 1 else ""  # a line through one point is none


def _mark(axes: Axes, history: History) -> None:
    """Shades what was rolled back and marks skipped steps."""
    for start, stop in history.rolled_back:
        axes.axvspan(start, stop, color=BACK, alpha=0.12, linewidth=0, label="rolled back")
    for step in history.skipped:
        axes.axvline(step, color=SKIPPED, alpha=0.6, linewidth=0.8, label="skipped step")


def _measure(history: History, key: str, caption: str, unit: float, scale: str) -> Callable[[Axes], None]:
    def draw(axes: Axes) -> None:
        for line in history.abandoned:
            steps, values = series(line, key)
            axes.plot(steps, values / unit, color=LEFT, linewidth=0.8, label="undone")
        steps, values = series(history.steps, key)
        axes.plot(steps, values / unit, marker=_marker(steps), linewidth=1.0)
        if scale == "log" and (values > 0).any():
            axes.set_yscale("log")
        else:
            axes.set_ylim(bottom=0)
        axes.set_ylabel(caption)
        _mark(axes, history)

    return draw


def _by_objective(axes: Axes, history: History) -> None:
    for number, name in enumerate(history.objectives):
        color = f"C{number % 10}"
        steps, losses = series(history.steps, "objectives", name)
        axes.plot(steps, running_mean(losses), color=color, linewidth=1.0, label=name)
        axes.plot(*series(history.evaluations, "held_out", name), "o", color=color, markersize=5, label=name if not steps.size else None)
    axes.set_ylabel("loss (nats a token)")


def _stalls(axes: Axes, history: History) -> None:
    places: list[Any] = [record["checkpoint"].get("step", record["step"]) for record in history.checkpoints]
    stalls = [record["checkpoint"].get("stall") or 0.0 for record in history.checkpoints]
    axes.vlines(places, 0, stalls, color="C0")
    axes.plot(places, stalls, "o", color="C0", markersize=4)
    failed = [(place, stall) for place, stall, r in zip(places, stalls, history.checkpoints, strict=True) if r["checkpoint"].get("error")]
    if failed:
        axes.plot(*zip(*failed, strict=True), "x", color=BACK, label="failed")
    axes.set_ylim(bottom=0)
    axes.set_ylabel("stall, s")

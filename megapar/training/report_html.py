"""A run's history as one HTML page that needs nothing else: curves over steps and tokens, what went wrong on the way, and the config."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from megapar.training.history import History, read_history, running_mean, series
from megapar.training.report_plots import Plots, draw_plots

NOT_BASELINES = {"held_out_loss", "test_loss", "steps", "memory"}
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; color: #222; background: #fff }
img { max-width: 100%; height: auto }
table { border-collapse: collapse; margin: .5rem 0 1.5rem; font-variant-numeric: tabular-nums }
th, td { text-align: left; padding: .2rem .9rem .2rem 0; border-bottom: 1px solid #ddd; vertical-align: top }
figure { margin: 1rem 0 2rem }
"""


def write_report(metrics: Path, out: Path) -> list[Path]:
    """Writes the page `out`, and each of its pictures as a PNG beside it (`report-loss.png` for `report.html`); returns what it wrote.

    metrics: the run's `metrics.jsonl`, which may be missing or that of a run that goes on. From the same folder come `config.json` and, for
    baselines, `summary.json`, if they are there. Raises ValueError naming the file for one that is there and cannot be read.
    """
    history = read_history(metrics)
    config, summary = _read_json(metrics.with_name("config.json")), _read_json(metrics.with_name("summary.json"))
    baselines = {name: float(value) for name, value in summary.items() if name not in NOT_BASELINES and isinstance(value, (int, float))}
    pictures = draw_plots(history, baselines)
    out.parent.mkdir(parents=True, exist_ok=True)
    written = [out]
    for name, (_, png) in pictures.items():
        written.append(out.with_name(f"{out.stem}-{name}.png"))
        written[-1].write_bytes(png)
    out.write_text(_page(metrics, history, config, baselines, pictures), encoding="utf-8")
    return written


def _read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; an empty one if there is no file."""
    try:
        found = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read ({error}): repair it, or move it away") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds a {type(found).__name__} and must hold an object: repair it, or move it away")
    return found


def _page(metrics: Path, history: History, config: Mapping[str, Any], baselines: Mapping[str, float], pictures: Plots) -> str:
    title = f"Run {metrics.resolve().parent.name}"
    parts = [f"<h1>{escape(title)}</h1>", _table(["", ""], _summary(history, baselines))]
    if not history.steps:
        parts.append(f"<p>No step was recorded in {escape(str(metrics))}.</p>")
    for name, (caption, png) in pictures.items():
        source = base64.b64encode(png).decode()
        picture = f'<img id="{escape(name)}" alt="{escape(caption)}" src="data:image/png;base64,{source}">'
        parts.append(f"<figure>{picture}<figcaption>{escape(caption)}</figcaption></figure>")
    for heading, columns, rows in (
        ("Loss by objective, nats a token", ["", "training, running mean", "held out", "test"], _objectives(history)),
        ("Skipped steps and rollbacks", ["step", "action", "reason", "back to step", "samples"], _recoveries(history)),
        ("Checkpoints", ["of step", "durable at step", "stall, s", "seconds", "MB", "error"], _checkpoints(history)),
        ("Resumed", ["at step", "changed"], _resumes(history)),
        ("Config", ["", ""], [[name, _text(value)] for name, value in _flat(config)]),
    ):
        if rows:
            parts += [f"<h2>{heading}</h2>", _table(columns, rows)]
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{escape(title)}</title><style>{STYLE}</style>'
    return f'<!doctype html>\n<html lang="en"><head>{head}</head>\n<body>\n' + "\n".join(parts) + "\n</body></html>\n"


def _summary(history: History, baselines: Mapping[str, float]) -> list[list[str]]:
    """The run in a few numbers."""
    rows: list[list[str]] = []
    if history.steps:
        last = history.steps[-1]
        tokens = series(history.steps, "tokens")[1].sum()
        rows += [["last step", _number(last["step"])], ["its loss, nats a token", _number(last["loss"])], ["tokens", f"{tokens:,.0f}"]]
    steps, losses = series(history.evaluations, "held_out_loss")
    if losses.size:
        rows.append(["held-out loss, last", f"{losses[-1]:.4f} at step {steps[-1]:.0f}"])
        if np.isfinite(losses).any():
            best = int(np.nanargmin(losses))
            rows.append(["held-out loss, best", f"{losses[best]:.4f} at step {steps[best]:.0f}"])
    rows += [["test loss", f"{record['test_loss']:.4f} at step {record['step']}"] for record in history.tests]
    rows += [[f"baseline {name}", f"{value:.4f}"] for name, value in baselines.items()]
    for label, name, pick, unit in (
        ("tokens a second, median", "tokens_per_second", np.median, 1.0),
        ("memory peak, MB", "peak_bytes", np.max, 1e6),
        ("time in steps, s", "seconds", np.sum, 1.0),
    ):
        values = series(history.steps, name)[1]
        if values.size:
            rows.append([label, f"{float(pick(values)) / unit:,.1f}"])
    stalls = series(history.checkpoints, "checkpoint", "stall")[1]
    if history.checkpoints:
        rows.append(["checkpoints", f"{len(history.checkpoints)}, training stood still for {stalls.sum():.2f} s"])
    lost = sum(len(line) for line in history.abandoned)
    return [*rows, ["skipped steps", _number(len(history.skipped))], ["steps undone", _number(lost)]]


def _objectives(history: History) -> list[list[str]]:
    rows = []
    for name in history.objectives:
        losses = [running_mean(series(history.steps, "objectives", name)[1])]
        losses += [[*series(records, part, name)[1]] for records, part in ((history.evaluations, "held_out"), (history.tests, "test"))]
        rows.append([name, *(f"{found[-1]:.4f}" if found else "" for found in losses)])
    return rows


def _recoveries(history: History) -> list[list[str]]:
    told = ((r["step"], r["recovery"]) for r in history.recoveries)
    return [[_number(step), *(_text(what.get(key)) for key in ("action", "reason", "to_step", "samples"))] for step, what in told]


def _checkpoints(history: History) -> list[list[str]]:
    rows = []
    for durable, told in ((r["step"], r["checkpoint"]) for r in history.checkpoints):
        size = told.get("bytes")
        megabytes = f"{size / 1e6:,.1f}" if isinstance(size, (int, float)) else ""
        times = [_number(told.get(key)) for key in ("stall", "seconds")]
        rows.append([_number(told.get("step")), _number(durable), *times, megabytes, _text(told.get("error"))])
    return rows


def _resumes(history: History) -> list[list[str]]:
    return [[_number(told.get("from")), _text(told.get("changed"))] for told in (record["resumed"] for record in history.resumes)]


def _table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Cells are text."""
    head = "<tr>" + "".join(f"<th>{escape(cell)}</th>" for cell in columns) + "</tr>" if any(columns) else ""
    return f"<table>{head}" + "".join("<tr>" + "".join(f"<td>{escape(c)}</td>" for c in row) + "</tr>" for row in rows) + "</table>"


def _number(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4f}"
    return "" if value is None else f"{value:,}" if isinstance(value, int) else str(value)


def _text(value: Any) -> str:
    if value is None:
        return ""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value

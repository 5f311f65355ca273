"""What a run tells while it goes: one JSON line a step, and progress on the terminal."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any, TextIO

from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column

Record = dict[str, Any]


class MetricsFile:
    """`metrics.jsonl`: a record a line, on disk as soon as it is logged.

    On opening, records after `resumed_step` are dropped, and its evaluation, which a resumed run does again; not those of a line that the
    run rolled back from, which stand before the record of the rollback.
    """

    def __init__(self, path: Path, resumed_step: int = 0) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        records = read_metrics(path) if resumed_step else []
        turns = [place for place, record in enumerate(records, 1) if record.get("recovery", {}).get("to_step") is not None]
        abandoned = turns[-1] if turns else 0
        kept = records[:abandoned] + [r for r in records[abandoned:] if r["step"] <= resumed_step - ("held_out_loss" in r)]
        partial = path.with_name(path.name + ".tmp")
        partial.write_text("".join(json.dumps(record) + "\n" for record in kept), encoding="utf-8")
        os.replace(partial, path)
        self._file: TextIO = path.open("a", encoding="utf-8")

    def log(self, record: Record) -> None:
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def read_metrics(path: Path) -> list[Record]:
    """The records of a metrics file; an unfinished last line, left by a run that was killed, is no record."""
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")[:-1]
    return [json.loads(line) for line in lines]


class RunProgress:
    """Live progress of `steps` steps: a `rich` bar on a terminal, about twenty plain lines elsewhere."""

    def __init__(self, steps: int, first: int = 0) -> None:
        self._steps, self._stride = steps, max(1, steps // 20)
        self._bar: Progress | None = None
        if sys.stdout.isatty():
            # The numbers keep their width on a narrow terminal, the bar takes what is left.
            text = TextColumn("{task.description}", table_column=Column(no_wrap=True))
            eta = TimeRemainingColumn(compact=True, table_column=Column(no_wrap=True))
            self._bar = Progress(text, BarColumn(None, table_column=Column(ratio=1)), eta, expand=True)
            self._task = self._bar.add_task("", total=steps, completed=first)
            self._bar.start()

    def step(self, record: Record, eta: float) -> None:
        """`eta`: seconds left."""
        text = (
            f"loss {record['loss']:.4f}  lr {record['lr']:.2e}  grad_norm {record['grad_norm']:.3f}  "
            f"{record['tokens_per_second']:,.0f} tokens/s"
        )
        done = record["step"]
        if self._bar is not None:
            self._bar.update(self._task, completed=done, description=f"step {done}/{self._steps} {text.replace('  ', ' ')}")
        elif done == 1 or done % self._stride == 0 or done == self._steps:
            print(f"step {done}/{self._steps}  {text}  eta {eta:.0f} s", flush=True)

    def say(self, text: str) -> None:
        if self._bar is not None:
            self._bar.console.print(text, markup=False, highlight=False)
        else:
            print(text, flush=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()

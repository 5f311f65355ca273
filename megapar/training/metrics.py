"""What a run tells while it goes: one JSON line a step, and progress on the terminal."""

from __future__ import annotations

import errno
import json
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column

Record = dict[str, Any]


class MetricsFile:
    """`metrics.jsonl`: a record a line, given to the system as soon as it is logged.

    On opening, records after `resumed_step` are dropped, and its evaluation, which a resumed run does again; not those of lines that the
    run rolled back from, which stand before the record of the rollback. rollbacks: of the run; their records are written where a run that
    was killed did not come to it. `damaged`: lines that could not be read; the file as it was is then `metrics.jsonl.damaged`.
    """

    def __init__(self, path: Path, resumed_step: int = 0, rollbacks: Sequence[Record] = ()) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        records, self.damaged = _readable(path) if resumed_step else ([], 0)
        if self.damaged:
            shutil.copyfile(path, path.with_name(path.name + ".damaged"))
        told = sum(_rolls_back(record) for record in records)
        records += [{"step": rollback["step"], "recovery": rollback} for rollback in rollbacks[told:]]
        turns = [place for place, record in enumerate(records, 1) if _rolls_back(record)]
        left = turns[-1] if turns else 0
        kept = records[:left] + [r for r in records[left:] if r["step"] <= resumed_step - ("held_out_loss" in r or "test_loss" in r)]
        partial = path.with_name(path.name + ".tmp")
        partial.write_text("".join(json.dumps(record) + "\n" for record in kept), encoding="utf-8")
        os.replace(partial, path)
        self._file = path.open("ab", buffering=0)

    def log(self, record: Record) -> None:
        """Raises OSError for a record that could not be written, of which nothing stays."""
        line, before = (json.dumps(record) + "\n").encode(), self._file.tell()
        try:
            if self._file.write(line) != len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError:
            self._file.truncate(before)
            raise

    def close(self) -> None:
        self._file.close()


def _rolls_back(record: Record) -> bool:
    return record.get("recovery", {}).get("to_step") is not None


def _readable(path: Path) -> tuple[list[Record], int]:
    """The records that can be read, and how many whole lines cannot."""
    records: list[Record] = []
    lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
    for line in lines:
        try:
            record = json.loads(line)
            records += [record] if isinstance(record, dict) and isinstance(record.get("step"), int) else []
        except ValueError:
            continue  # counted below
    return records, len(lines) - len(records)


def read_metrics(path: Path) -> list[Record]:
    """The records of a metrics file; an unfinished last line, left by a run that was killed, is no record.

    Raises ValueError, naming file and line, for one that is none.
    """
    if not path.exists():
        return []
    records = []
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], 1):
        try:
            records.append(json.loads(line))
        except ValueError as error:
            raise ValueError(f"line {number} of {path} is no record ({error}): remove it") from error
    return records


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

"""What a run's `metrics.jsonl` tells: the line of steps that counts, those that were abandoned, and what happened beside them. Pure.

A record is a step ("loss" and what else was measured), an evaluation ("held_out_loss", "test_loss"), a "checkpoint" that became durable, a
"recovery" (a skipped step, a rollback, a stop) or a run that "resumed". After a rollback to step k, steps after k come again: the latest
record of a step counts, and what it replaces is an abandoned line.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megapar.training.metrics import Record, read_metrics

Floats = NDArray[np.float64]


@dataclass
class History:
    """Records by kind. steps, evaluations, tests: those that count, by step.

    abandoned: steps of each line that was left, oldest line first. recoveries: as they were logged, and steps that say themselves that they
    were skipped.
    """

    steps: list[Record] = field(default_factory=list)
    abandoned: list[list[Record]] = field(default_factory=list)
    evaluations: list[Record] = field(default_factory=list)
    tests: list[Record] = field(default_factory=list)
    checkpoints: list[Record] = field(default_factory=list)
    recoveries: list[Record] = field(default_factory=list)
    resumes: list[Record] = field(default_factory=list)

    def tokens_at(self, steps: Iterable[float]) -> Floats:
        """Seen when each step had ended, skipped ones too, along the line that counts; 0 before its first step."""
        at, counts = series(self.steps, "tokens")
        index = np.searchsorted(at, np.asarray([*steps], np.float64), side="right")
        return np.concatenate([[0.0], np.cumsum(counts)])[index]

    @property
    def objectives(self) -> list[str]:
        """The names of a mixture's."""
        told = [*(record.get("objectives", {}) for record in self.steps), *(record.get("held_out", {}) for record in self.evaluations)]
        return sorted({name for each in told for name in each})

    @property
    def rolled_back(self) -> list[tuple[int, int]]:
        """(from, to): the steps after `from`, up to `to`, were undone."""
        return [(r["recovery"]["to_step"], r["step"]) for r in self.recoveries if r["recovery"].get("action") == "rollback"]

    @property
    def skipped(self) -> list[int]:
        """Steps that updated nothing."""
        return [record["step"] for record in self.recoveries if _is_skip(record)]


def read_history(path: Path) -> History:
    """The history in a metrics file; an empty one if there is no file. An unfinished last line is no record. Raises ValueError naming the
    line for what is no record otherwise."""
    try:
        records = read_metrics(path)
    except ValueError as error:
        raise ValueError(f"{path} holds a line that is no JSON ({error}): it is no metrics file, or was edited") from error
    for number, record in enumerate(records, 1):
        if not isinstance(record, dict) or not isinstance(record.get("step"), int):
            raise ValueError(f'{path} line {number} is no record with a "step": it is no metrics file, or was edited')
    return history_of(records)


def history_of(records: Iterable[Record]) -> History:
    """Sorts records by kind; unknown kinds and keys are ignored."""
    found = History()
    for record in records:
        step = record["step"]
        if "recovery" in record:
            if _is_skip(record) and found.recoveries and _is_skip(found.recoveries[-1]) and found.recoveries[-1]["step"] == step:
                found.recoveries.pop()  # what the step's own record said; this one says more
            found.recoveries.append(record)
            if record["recovery"].get("action") == "rollback":
                _abandon(found, record["recovery"]["to_step"])
        elif "resumed" in record:
            found.resumes.append(record)
            _abandon(found, step)
        elif "checkpoint" in record:
            found.checkpoints.append(record)
        elif "held_out_loss" in record:
            found.evaluations = [other for other in found.evaluations if other["step"] < step] + [record]
        elif "test_loss" in record:
            found.tests = [record]
        elif "loss" in record:
            _abandon(found, step - 1)  # a step that comes again
            found.steps.append(record)
            last = found.recoveries[-1] if found.recoveries else {}
            if record.get("skipped") and not (_is_skip(last) and last["step"] == step):
                reason = record.get("reason", "gradients were not finite")
                found.recoveries.append({"step": step, "recovery": {"action": "skip", "reason": reason}})
    return found


def _is_skip(record: Record) -> bool:
    return bool(record) and record["recovery"].get("action") == "skip"


def _abandon(found: History, step: int) -> None:
    """What came after `step` does not count any more."""
    keep = len(found.steps)
    while keep and found.steps[keep - 1]["step"] > step:
        keep -= 1
    if found.steps[keep:]:
        found.tests = []
        found.abandoned.append(found.steps[keep:])
        del found.steps[keep:]
        found.evaluations = [record for record in found.evaluations if record["step"] <= step]


def series(records: Iterable[Record], *path: str) -> tuple[Floats, Floats]:
    """(steps, values) of the records in which a number is found under the keys `path`."""
    pairs = [(record["step"], value) for record in records for value in _numbers(record, path)]
    steps, values = zip(*pairs, strict=True) if pairs else ((), ())
    return np.asarray(steps, np.float64), np.asarray(values, np.float64)


def _numbers(record: Any, path: Sequence[str]) -> Iterator[float]:
    for key in path:
        record = record.get(key) if isinstance(record, dict) else None
    if isinstance(record, (int, float)) and not isinstance(record, bool):
        yield float(record)


def running_mean(values: Iterable[float], keep: float = 0.95) -> list[float]:
    """Exponential mean, corrected for its start; of the finite values so far, NaN before the first."""
    mean, weight, means = 0.0, 0.0, []
    for value in values:
        if np.isfinite(value):
            mean, weight = keep * mean + (1 - keep) * value, keep * weight + (1 - keep)
        means.append(mean / weight if weight else float("nan"))
    return means

"""A pipeline schedule as data: for each rank the list of what it does, in order.

Letters, text form and files are those of torch.distributed.pipelining. An action is written stage, kind, micro-batch (`1F3`); stages are
global, so with `chunks` stages a rank, stage s is chunk s // pp of rank s % pp. A file has one line a rank, actions between commas, empty
cells for steps in which the rank waits (they are skipped: only the order says anything).

    F  forward                    SEND_F, RECV_F   the stage's output to the next stage, its input from the previous one
    B  backward, the same as I, W SEND_B, RECV_B   the gradient of its input to the previous stage, of its output from the next one
    I  gradient of the input      UNSHARD, RESHARD the stage's parameters gathered over the data-parallel ranks, and dropped
    W  gradient of the weights    REDUCE_GRAD      the stage's gradients reduced over the data-parallel ranks
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

COMPUTE = ("F", "B", "I", "W")
SENDS, RECEIVES = ("SEND_F", "SEND_B"), ("RECV_F", "RECV_B")
SHARDING = ("UNSHARD", "RESHARD", "REDUCE_GRAD")
KINDS = (*COMPUTE, *SENDS, *RECEIVES, *SHARDING)

Place = tuple[int, int]
"""Rank and index in its list."""

_TEXT = re.compile(r"(\d+)([A-Z_]+?)(\d*)")
_OVERLAP = re.compile(r"\((.*)\)OVERLAP_F_B")
_ROWS_AROUND = 12


class Action(NamedTuple):
    """One thing that a rank does: `kind` (see the file's head) for a global stage and, but for the sharding kinds, a micro-batch."""

    kind: str
    stage: int
    microbatch: int | None = None

    def __str__(self) -> str:
        return f"{self.stage}{self.kind}{'' if self.microbatch is None else self.microbatch}"

    @staticmethod
    def parse(text: str) -> Action:
        """The action that is written so; ValueError if none is."""
        found = _TEXT.fullmatch(text.strip())
        if found is None or found[2] not in KINDS:
            raise ValueError(f'"{text}" is not an action: write stage, kind, micro-batch, as 1F3, with a kind of {", ".join(KINDS)}')
        stage, kind, microbatch = found.groups()
        if (kind in SHARDING) != (microbatch == ""):
            raise ValueError(f'"{text}": {kind} is for {"a whole stage: leave out" if microbatch else "one micro-batch: add"} its number')
        return Action(kind, int(stage), int(microbatch) if microbatch else None)


@dataclass(frozen=True)
class Schedule:
    """`ranks[r]`: the actions of pipeline rank r, in order. `stage_to_rank[s]`: the rank that holds global stage s."""

    ranks: tuple[tuple[Action, ...], ...]
    stage_to_rank: tuple[int, ...]

    @property
    def stages(self) -> int:
        """How many global stages there are."""
        return len(self.stage_to_rank)

    @property
    def microbatches(self) -> int:
        """How many micro-batches a step has."""
        return 1 + max((a.microbatch for actions in self.ranks for a in actions if a.microbatch is not None), default=-1)

    def only(self, kinds: Collection[str]) -> Schedule:
        """The schedule without the actions of other kinds: `only("F")` is for evaluation, `only(COMPUTE)` has no communication."""
        return Schedule(tuple(tuple(a for a in actions if a.kind in kinds) for actions in self.ranks), self.stage_to_rank)

    def has(self, kinds: Collection[str]) -> bool:
        """Whether there is an action of these kinds."""
        return any(a.kind in kinds for actions in self.ranks for a in actions)

    def peak_activations(self) -> list[int]:
        """For each rank the most activations, of one stage and micro-batch each, that it ever keeps: from an F to its B or W."""
        return [max(live_activations(actions), default=0) for actions in self.ranks]

    def __str__(self) -> str:
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows(self.ranks_as_text())
        return text.getvalue()

    def ranks_as_text(self) -> list[list[str]]:
        """The text form of every action."""
        return [[str(a) for a in actions] for actions in self.ranks]

    def save(self, path: str | Path) -> None:
        """Writes the file that `load` and torch's `_load_csv` read."""
        Path(path).write_text(str(self), encoding="utf-8")

    @staticmethod
    def load(path: str | Path) -> Schedule:
        """Reads a file of `save` or of torch's `_dump_csv`. ValueError names line and cell of what is not an action. It is not checked:
        `check.check` does that."""
        try:
            return parse_schedule(Path(path).read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error


def parse_schedule(text: str) -> Schedule:
    """The schedule of a file's text. torch's `(3F4;0B1)OVERLAP_F_B` is read as what its runtime does, 3F4 and then 0B1."""
    ranks = []
    for line, cells in enumerate(csv.reader(io.StringIO(text)), start=1):
        actions = []
        for number, cell in enumerate(cells, start=1):
            overlap = _OVERLAP.fullmatch(cell.strip())
            try:
                actions += [Action.parse(part) for part in (overlap[1].split(";") if overlap else [cell]) if part.strip()]
            except ValueError as error:
                raise ValueError(f"line {line}, cell {number}: {error}") from error
        ranks.append(tuple(actions))
    return Schedule(tuple(ranks), _place_stages(ranks))


def _place_stages(ranks: Sequence[Sequence[Action]]) -> tuple[int, ...]:
    """Which rank holds which stage, by who computes it; a stage that two ranks compute is marked."""
    holder: dict[int, int] = {}
    for rank, actions in enumerate(ranks):
        for index, action in enumerate(actions):
            if action.kind in COMPUTE and holder.setdefault(action.stage, rank) != rank:
                sentence = f"{action} is on rank {rank}, but stage {action.stage} is on rank {holder[action.stage]}: a stage has one rank"
                raise ValueError(marked(sentence, ranks, [(rank, index)]))
    for stage in range(max(holder, default=0) + 1):
        if stage not in holder:
            raise ValueError(f"no rank computes stage {stage}, and there are stages after it: number them 0, 1, 2 without a gap")
    return tuple(holder[stage] for stage in range(len(holder)))


def live_activations(actions: Iterable[Action]) -> list[int]:
    """After each action of one rank: forward passes whose B or W is still to come. An evaluation (F alone) keeps none."""
    actions = list(actions)
    live, counts, kept = 0, [], any(a.kind in ("B", "W") for a in actions)
    for action in actions:
        live += kept and action.kind == "F"
        live -= action.kind in ("B", "W")
        counts.append(live)
    return counts


def marked(sentence: str, ranks: Sequence[Sequence[Action]], marks: Sequence[Place]) -> str:
    """The sentence, and under it the table of the schedule (a row a step, a column a rank) with `>` before the marked actions."""
    rows = max((len(actions) for actions in ranks), default=0)
    steps = [index for _, index in marks] or [0]
    first, last = max(0, min(steps) - _ROWS_AROUND), min(rows, max(steps) + _ROWS_AROUND + 1)
    places = set(marks)
    cells = [[f"rank {rank}" for rank in range(len(ranks))]]
    for step in range(first, last):
        texts = [str(actions[step]) if step < len(actions) else "" for actions in ranks]
        cells.append([(">" if (rank, step) in places else " ") + text for rank, text in enumerate(texts)])
    widths = [max(len(row[rank]) for row in cells) for rank in range(len(ranks))]
    labels = ["step", *(str(step) for step in range(first, last))]
    lines = [
        f"{label:>6}  " + " ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True))
        for label, row in zip(labels, cells, strict=True)
    ]
    if first > 0:
        lines.insert(1, f"        ({first} steps before)")
    if last < rows:
        lines.append(f"        ({rows - last} steps after)")
    return sentence + "\n" + "\n".join(line.rstrip() for line in lines)

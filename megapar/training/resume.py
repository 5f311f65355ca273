"""Which checkpoint a run goes on from, and whether it is a checkpoint of this run."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megapar.data.intervals import Remaining, joined, parse_intervals
from megapar.training.checkpoint.disk import Disk
from megapar.training.checkpoint.folder import PARTIAL, checkpoints, point_latest, remove_checkpoints, step_of
from megapar.training.checkpoint.manifest import read_manifest
from megapar.training.config import Config
from megapar.training.config_file import to_dict
from megapar.training.recovery import Event, is_valid
from megapar.training.run_state import RunState

FREE_TO_CHANGE = (
    *("parallel.", "recompute.", "recovery.", "precision.master"),
    *("run.resume", "run.change", "run.out", "run.tensorboard", "run.sample_tokens", "run.prompt"),
    *("run.eval_every", "run.save_every", "run.async_save", "run.keep_last", "run.keep_every"),
    *("run.micro_batch_size", "run.microbatches"),
    *("data.corpus", "data.tokenizer"),  # what is in them is compared
    "data.max_epochs",
)
"""What may differ between a run and the one that it resumes, keys and sections: how it is computed and told, not what."""

ROLLBACKS = "rollbacks.json"


def read_rollbacks(folder: Path) -> list[Event]:
    """The rollbacks of the run whose checkpoints are in `folder`. Raises ValueError for a file that does not say so."""
    path = folder / ROLLBACKS
    if not path.exists():
        return []
    try:
        return [Event.from_dict(told) for told in json.loads(path.read_text(encoding="utf-8"))]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not a list of rollbacks ({error}): restore it, or remove the later checkpoints too") from error


def write_rollbacks(folder: Path, events: Sequence[Event]) -> None:
    """Durable on return. Written before any checkpoint is removed: a rollback that is cut short is completed by `remove_abandoned`."""
    disk, partial = Disk(), folder / (ROLLBACKS + PARTIAL)
    partial.unlink(missing_ok=True)
    disk.write(partial, [json.dumps([event.to_dict() for event in events], indent=2).encode()])
    disk.rename(partial, folder / ROLLBACKS)
    disk.sync(folder, "rollbacks")


def remove_abandoned(folder: Path) -> list[Path]:
    """Removes the checkpoints of lines that the run rolled back from; which they were. `latest` then names the newest that stays."""
    rollbacks, disk = read_rollbacks(folder), Disk()
    lowest = min((event.to_step for event in rollbacks if event.to_step is not None), default=None)
    abandoned: list[Path] = []
    staying: list[Path] = []
    for path in checkpoints(folder):
        if lowest is None or step_of(path) <= lowest:
            staying.append(path)
            continue
        state = read_manifest(path)["state"]
        valid = is_valid(int(state["step"]), len(state["run"]["rollbacks"]), rollbacks)
        (staying if valid else abandoned).append(path)
    if abandoned and staying:
        point_latest(staying[-1], disk)
    remove_checkpoints(abandoned, disk)
    return abandoned


def forget_rollbacks(folder: Path) -> None:
    """For a run that begins: those in its folder are of a run whose checkpoints were removed."""
    if (folder / ROLLBACKS).exists():
        (folder / ROLLBACKS).unlink()
        Disk().sync(folder, "rollbacks")


def check_skips(then: str, now: str, state: RunState, where: Path) -> None:
    """Raises ValueError where data.skip leaves out otherwise than it did what lies among the samples that were used."""
    remaining = Remaining((*parse_intervals(then), *(event.samples for event in state.rollbacks)))
    last = remaining.number(state.samples - 1) if state.samples else -1

    def up_to_last(text: str) -> tuple[tuple[int, int], ...]:
        return joined((start, min(stop, last + 1)) for start, stop in parse_intervals(text) if start <= last)

    if up_to_last(then) != up_to_last(now):
        raise ValueError(f'data.skip is "{now}" and was "{then}" in {where}, which used the samples up to {last}: change only later ones')


def accept(state: Mapping[str, Any], here: Mapping[str, Any], change: str, where: Path) -> dict[str, list[Any]]:
    """What the run `here` has otherwise than the state of the checkpoint `where`, by key: [then, now].

    here: config, corpus, tokenizer, as the state has them. change: keys that may differ, beside those that change no number of the
    run. Raises ValueError for others, naming the first, and for keys in `change` that are none.
    """
    now, then = (flat({key: told.get(key) for key in ("config", "corpus", "tokenizer")}) for told in (json.loads(json.dumps(here)), state))
    # A key that is newer than the checkpoint had no other value than its default.
    then = {**flat({"config": json.loads(json.dumps(to_dict(Config())))}), **then}
    asked = {f"config.{key}" for key in change.replace(",", " ").split()}
    for key in sorted(asked - now.keys()):
        raise ValueError(f"run.change names {key.removeprefix('config.')}, which is no key of the config: give such as optimizer.lr")
    changed: dict[str, list[Any]] = {}
    for key in now.keys() | then.keys():
        if now.get(key) != then.get(key):
            changed[key.removeprefix("config.")] = [then.get(key), now.get(key)]
    for key in sorted(changed):
        if f"config.{key}" not in asked and not key.startswith(FREE_TO_CHANGE):
            was, is_now = changed[key]
            fix = "a resumed run must keep it" + (f", or be told --change {key}" if f"config.{key}" in now else "")
            raise ValueError(f"{key} is {is_now} and was {was} in {where}: {fix}")
    return {key: values for key, values in sorted(changed.items()) if not key.startswith(("run.resume", "run.out", "run.change"))}


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dicts as one, keys joined by dots."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        found.update(flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {prefix + key: value})
    return found

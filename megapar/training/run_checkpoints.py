"""A run's checkpoints: it begins or goes on from one, saves while it trains, and rolls back to one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from megapar.collectives import check_same, gather_json, raise_together
from megapar.mesh import ParallelMesh
from megapar.training.checkpoint.folder import checkpoints, lock, newest_checkpoint, step_of
from megapar.training.checkpoint.load import load_checkpoint
from megapar.training.checkpoint.save import Saved, Saver
from megapar.training.config import Config
from megapar.training.config_file import to_dict
from megapar.training.examples import Examples
from megapar.training.recovery import Event, Watch
from megapar.training.resume import accept, check_skips, forget_rollbacks, read_rollbacks, remove_abandoned, write_rollbacks
from megapar.training.run_state import RunState
from megapar.training.sections import policy_of
from megapar.zero.optimizer import ZeroOptimizer


def resumes(config: Config) -> bool:
    """Whether the run goes on from a checkpoint, which holds what would else be drawn."""
    return config.run.resume != "no" and newest_checkpoint(Path(config.run.out) / "checkpoints") is not None


def attempt(work: Callable[[], Any]) -> Exception | None:
    """What keeps this rank from it: the others have to hear of it."""
    try:
        work()
    except (OSError, ValueError) as error:
        return error
    return None


class RunCheckpoints:
    """Under `run.out`, which this run alone may write to. newest: the step of the last one that is on disk.

    Raises ValueError, the same on every rank, for a folder that another run uses or cannot be written to.
    """

    def __init__(self, config: Config, mesh: ParallelMesh, examples: Examples, optimizer: ZeroOptimizer, watch: Watch) -> None:
        self.config, self.mesh, self.examples, self.optimizer, self.watch = config, mesh, examples, optimizer, watch
        out, run = Path(config.run.out), config.run
        self.folder = out / "checkpoints"
        error: Exception | None = None
        if mesh.world.rank == 0:
            try:
                out.mkdir(parents=True, exist_ok=True)
                self._lock = lock(out)
            except OSError as caught:
                error = ValueError(f"run.out={out} cannot hold this run ({caught}): give another --out")
            except ValueError as caught:
                error = caught
        raise_together(error, mesh.world)
        self.newest: int | None = None
        keep: dict[str, Any] = {"keep_last": run.keep_last or None, "keep_every": run.keep_every or None}
        self.saver = Saver(self.folder, mesh, asynchronous=run.async_save, **keep)

    # Where to go on

    def resume(self) -> tuple[RunState, dict[str, list[Any]]]:
        """Where the run begins, and what of its config changed since. Raises ValueError for a folder that run.resume does not expect."""
        asked = self.config.run.resume
        tidies = self.mesh.world.rank == 0 and asked != "no"
        raise_together(attempt(lambda: remove_abandoned(self.folder)) if tidies else None, self.mesh.world)
        folder = newest_checkpoint(self.folder)
        check_same(None if folder is None else folder.name, self.mesh.world, "the newest checkpoint")
        if folder is not None and asked == "no":
            raise ValueError(f"run.out={self.config.run.out} holds checkpoints of an earlier run: give --resume yes, or another --out")
        if folder is None and asked == "yes":
            raise ValueError(f"{self.folder} holds no checkpoint to resume from: give --resume auto or no, or check run.out")
        if folder is None:
            raise_together(attempt(lambda: forget_rollbacks(self.folder)) if self.mesh.world.rank == 0 else None, self.mesh.world)
            return RunState(), {}
        changed: dict[str, list[Any]] = {}
        here, change = self._told(), self.config.run.change
        state = self._load(folder, lambda told: changed.update(accept(told, here, change, folder)))
        state.rollbacks = max(state.rollbacks, read_rollbacks(self.folder), key=len)
        self._leave_out(state)
        if "data.skip" in changed:
            then, now = changed["data.skip"]
            check_skips(then, now, state, folder)
        return state, changed

    def _load(self, folder: Path, check: Callable[[dict[str, Any]], None] = lambda told: None) -> RunState:
        told = load_checkpoint(folder, self.optimizer.boxes(), self.mesh, check)
        self.optimizer.set_progress(told["progress"])
        self.optimizer.loaded()
        self.newest = int(told["step"])
        return RunState.from_dict(told["run"], self.watch)

    def _told(self) -> dict[str, Any]:
        """What a checkpoint says of the run that wrote it."""
        text = self.examples.text
        return {"config": to_dict(self.config), "corpus": text.corpus_sha256, "tokenizer": text.tokenizer.sha256}

    def _leave_out(self, state: RunState) -> None:
        self.examples.leave_out(event.samples for event in state.rollbacks)

    # Saving

    def save(self, state: RunState) -> Saved | None:
        """Begins to save; how the save before ended, if it had not yet."""
        before = self.finish()
        told = {"step": state.step, **self._told(), "progress": self.optimizer.progress(), "run": state.to_dict(self.watch)}
        self.saver.save(state.step, self.optimizer.boxes(), told)
        return before

    def finish(self) -> Saved | None:
        """Waits until the save under way, if there is one, is on disk; how it ended."""
        return self._ended(self.saver.finish())

    def commit_if(self, all_ended: bool) -> Saved | None:
        """Completes the save under way once the files of all ranks are on disk; how it ended."""
        return self._ended(self.saver.commit() if self.saver.pending and all_ended else None)

    def _ended(self, saved: Saved | None) -> Saved | None:
        if saved is not None and saved.path is not None:
            self.newest = saved.step
        return saved

    def close(self) -> None:
        """Of what is not on disk nothing is kept."""
        self.saver.close()
        if self.mesh.world.rank == 0:
            self._lock.close()

    # Going back

    def roll_back(self, state: RunState, reason: str, batch_size: int) -> tuple[RunState, Event]:
        """Goes back because of the step after `state`: where to, and what is told of it; a "stop" if there is no way back.

        No save is under way. The checkpoints after the one that is loaded are removed: their line of training is abandoned.
        """
        policy, bad = policy_of(self.config), state.step + 1
        stop = Event(bad, "stop", reason, self.examples.numbers(state.samples, batch_size))
        if len(state.rollbacks) >= policy.max_rollbacks:
            return state, replace(stop, reason=f"{reason}, and the run rolled back {policy.max_rollbacks} times already")
        loaded, why = self._load_before(bad - max(policy.back, 1))
        if loaded is None:
            return state, replace(stop, reason=f"{reason}, and there is no checkpoint from before to roll back to{why}")
        first = max(loaded.samples, state.samples - policy.skip_before * batch_size)
        stop_at = state.samples + (1 + policy.skip_after) * batch_size
        event = Event(bad, "rollback", reason, self.examples.numbers(first, stop_at - first), loaded.step)
        loaded.rollbacks = [*state.rollbacks, event]
        error = attempt(lambda: self._leave_line(loaded.rollbacks)) if self.mesh.world.rank == 0 else None
        raise_together(error, self.mesh.world)
        self._leave_out(loaded)
        return loaded, event

    def _load_before(self, last: int) -> tuple[RunState | None, str]:
        """The newest checkpoint of step `last` or earlier that is whole; what is wrong with those that are not."""
        names = [path.name for path in reversed(checkpoints(self.folder)) if step_of(path) <= last]
        why = ""
        for name in gather_json(names, self.mesh.world)[0]:
            try:
                return self._load(self.folder / name), why
            except ValueError as error:  # the same on every rank
                why = f"{why}; {error}"
        return None, why

    def _leave_line(self, rollbacks: list[Event]) -> None:
        write_rollbacks(self.folder, rollbacks)
        remove_abandoned(self.folder)

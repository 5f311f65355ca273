"""Saving: every rank writes its files under a temporary name, rank 0 the manifest, and a rename makes it a checkpoint, or nothing does.

A save is never half there. Its files are flushed, synced and hashed; the manifest, written last, holds the hashes and one of itself; then
the folder gets its name, and only then older checkpoints go (tests/training/checkpoint/test_killed.py kills it at every point).
"""

from __future__ import annotations

import json
import shutil
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megapar.collectives import gather_json, raise_together
from megapar.mesh import ParallelMesh
from megapar.training.checkpoint.disk import Disk
from megapar.training.checkpoint.folder import (
    PARTIAL,
    checkpoints,
    point_latest,
    remove_checkpoints,
    remove_partial,
    step_name,
    step_of,
    superfluous,
)
from megapar.training.checkpoint.manifest import MANIFEST, make_manifest
from megapar.training.checkpoint.write import FILE_BYTES, RankFiles
from megapar.zero.state import StateBox


@dataclass(frozen=True)
class Saved:
    """How a save ended, the same on every rank.

    path: the checkpoint; None if there is none. error: the sentence that says why not, or what failed after it had its name (`latest`, the
    removal of older ones); empty if nothing did. stall: seconds that training waited, on the rank that waited longest. seconds: from the
    beginning until it was durable. bytes: of the files of all ranks.
    """

    step: int
    path: Path | None
    error: str
    stall: float
    seconds: float
    bytes: int


class Saver:
    """The checkpoints of a run in `folder`, `<out>/checkpoints`: one save at a time.

        saver.save(step, optimizer.boxes(), state)      # asynchronous: returns at once, and a thread goes on
        ...                                             # forward and backward: weights and moments stay as they are
        saver.before_update()                           # the optimizer may write now
        ...                                             # when the sum of `saver.ended` over all ranks is their number:
        saved = saver.commit()

    asynchronous: needs host memory for what this rank owns, `snapshot_bytes`, until it is written. Synchronous: `save` returns when the
    checkpoint is durable, and `commit` only hands out what became of it. keep_last: how many checkpoints stay, None: all; keep_every:
    those of every n-th step stay too. on_point: called at every point of a save (`Disk`).

    Made on every rank, when nobody else writes to the folder: what killed saves left there is removed. Raises ValueError on every rank for
    numbers below 1, and where it cannot be.
    """

    def __init__(
        self,
        folder: Path,
        mesh: ParallelMesh,
        *,
        asynchronous: bool,
        keep_last: int | None = None,
        keep_every: int | None = None,
        on_point: Callable[[str], None] | None = None,
        file_bytes: int = FILE_BYTES,
    ) -> None:
        for name, value in (("keep_last", keep_last), ("keep_every", keep_every)):
            if value is not None and value < 1:
                raise ValueError(f"{name}={value} must be 1 or more: leave it out to keep all checkpoints")
        self.folder, self.mesh, self.asynchronous = folder, mesh, asynchronous
        self.keep_last, self.keep_every, self.file_bytes = keep_last, keep_every, file_bytes
        self._disk = Disk(on_point)
        self._job: Job | None = None
        self._saved: Saved | None = None
        raise_together(_attempt(lambda: remove_partial(folder)) if mesh.world.rank == 0 else None, mesh.world)

    def save(self, step: int, boxes: Iterable[StateBox], state: Mapping[str, Any]) -> Saved | None:
        """Starts saving the boxes that each rank owns and the JSON-able `state` as `step-N`. Collective if something is pending, and if
        synchronous.

        An earlier save that nobody has committed ends first, and how is returned.
        """
        earlier, begin = self.finish(), time.perf_counter()
        rank, folder = self.mesh.world.rank, self.folder / step_name(step)
        how: dict[str, Any] = {"file_bytes": self.file_bytes, "snapshot": self.asynchronous}
        files = RankFiles(_partial(folder), boxes, rank, self._disk, **how)
        self._job = Job(step, folder, files, state, begin)
        self._job.start(self.asynchronous)
        if not self.asynchronous:
            self._saved = self._end()
        return earlier

    def before_update(self) -> None:
        """Returns when weights and moments may change: the save under way has its copy of them."""
        if self._job is not None:
            with self._job.stalling():
                self._job.files.copied.wait()

    @property
    def ended(self) -> float:
        """0.0 while this rank still writes, else 1.0: of files that are durable, or that failed."""
        return float(self._job is None or not self._job.runs)

    @property
    def pending(self) -> bool:
        """Whether there is a save to `commit` or `finish`; the same on all ranks."""
        return self._job is not None or self._saved is not None

    @property
    def snapshot_bytes(self) -> int:
        """Host memory that copies hold now."""
        return 0 if self._job is None else self._job.files.snapshot_bytes

    def commit(self) -> Saved:
        """Makes a checkpoint of the save that every rank has ended, or nothing where one failed: training goes on. Collective; waits for
        ranks that have not."""
        saved, self._saved = self._saved or self._end(), None
        return saved

    def finish(self) -> Saved | None:
        """Ends the pending save, if there is one. Collective."""
        return self.commit() if self.pending else None

    def close(self) -> None:
        """Waits until this rank no longer writes; what is pending then is lost. Not collective: for a run that fails."""
        if self._job is not None:
            self._job.join()
        self._job = self._saved = None

    def _end(self) -> Saved:
        assert self._job is not None, "there is no save to commit"
        saved = commit(self._job, self.mesh, self._disk, self._tidy)
        self._job = None
        return saved

    def _tidy(self, saved: Path) -> None:
        point_latest(saved, self._disk)
        steps = [step_of(path) for path in checkpoints(self.folder)]
        gone = superfluous(steps, step_of(saved), self.keep_last, self.keep_every)
        remove_checkpoints([self.folder / step_name(step) for step in gone], self._disk)


def save_checkpoint(folder: Path, boxes: Iterable[StateBox], state: Mapping[str, Any], mesh: ParallelMesh) -> None:
    """Writes the boxes that this rank owns and the JSON-able `state`; returns, on every rank, when the folder is complete under its name.

    Raises the same sentence on every rank, leaving nothing, when a rank cannot write or the folder exists.
    """
    disk, partial = Disk(), _partial(folder)
    clean = _attempt(lambda: shutil.rmtree(partial)) if mesh.world.rank == 0 and partial.exists() else None
    raise_together(clean, mesh.world)
    job = Job(-1, folder, RankFiles(partial, boxes, mesh.world.rank, disk), state, time.perf_counter())
    job.start(asynchronous=False)
    saved = commit(job, mesh, disk, lambda saved: None)
    if saved.error:
        raise ValueError(saved.error)


class Job:
    """A save under way on this rank: its files, the thread that writes them, and how long training has waited for it."""

    def __init__(self, step: int, folder: Path, files: RankFiles, state: Mapping[str, Any], begin: float) -> None:
        self.step, self.folder, self.files, self.begin, self.stall = step, folder, files, begin, 0.0
        self.state: dict[str, Any] = json.loads(json.dumps(state))  # a copy: the caller's goes on changing
        self._thread: threading.Thread | None = None

    def start(self, asynchronous: bool) -> None:
        if self.folder.exists():
            self._fail(ValueError(f"{self.folder} exists and checkpoints are never overwritten: choose another folder"))
        elif asynchronous:
            self._thread = threading.Thread(target=self.files.run, name=f"checkpoint {self.folder.name}")
            try:
                self._thread.start()
            except RuntimeError as error:
                self._thread = None
                self._fail(error)
        else:
            self.files.run()
        self.stall = time.perf_counter() - self.begin

    @property
    def runs(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    def join(self) -> None:
        if self._thread is not None:
            self._thread.join()

    @contextmanager
    def stalling(self) -> Iterator[None]:
        begin = time.perf_counter()
        yield
        self.stall += time.perf_counter() - begin

    def _fail(self, error: Exception) -> None:
        self.files.error = error
        self.files.copied.set()


def commit(job: Job, mesh: ParallelMesh, disk: Disk, tidy: Callable[[Path], None]) -> Saved:
    """Makes a checkpoint of what every rank has written, or nothing: the same on all ranks, and it raises nothing of its own. tidy: what
    rank 0 does when it is durable."""
    entry = time.perf_counter()
    job.join()
    mine = {"error": _said(job.files.error), "entries": job.files.entries, "files": job.files.files}
    ranks = gather_json(mine, mesh.world)
    ended = time.perf_counter()
    told: dict[str, Any] = {"stall": job.stall + ended - entry, "seconds": ended - job.begin}
    if mesh.world.rank == 0:
        told["saved"], told["error"] = _publish(job, ranks, mesh, disk, tidy)
        told["publish"] = time.perf_counter() - ended
    times = gather_json(told, mesh.world)
    first = times[0]
    stall, seconds = (max(rank[name] for rank in times) + first["publish"] for name in ("stall", "seconds"))
    size = sum(file["bytes"] for rank in ranks for file in rank["files"].values())
    return Saved(job.step, job.folder if first["saved"] else None, first["error"], stall, seconds, size)


def _publish(job: Job, ranks: list[dict[str, Any]], mesh: ParallelMesh, disk: Disk, tidy: Callable[[Path], None]) -> tuple[bool, str]:
    """What rank 0 does: whether there is a checkpoint now, and the sentence on what failed."""
    errors = [f"rank {rank} could not save {job.folder}: {told['error']}" for rank, told in enumerate(ranks) if told["error"]]
    if not errors:
        failed = _attempt(lambda: _rename(job, ranks, mesh, disk))
        errors += [f"rank 0 could not save {job.folder}: {_said(failed)}"] if failed is not None else []
    saved = not errors
    if saved:
        failed = _attempt(lambda: tidy(job.folder))
        errors += [f"{job.folder} is saved, but rank 0 failed afterwards: {_said(failed)}"] if failed is not None else []
    else:
        shutil.rmtree(job.files.folder, ignore_errors=True)
    return saved, errors[0] if errors else ""


def _rename(job: Job, ranks: list[dict[str, Any]], mesh: ParallelMesh, disk: Disk) -> None:
    files = {name: told for rank in ranks for name, told in rank["files"].items()}
    manifest = make_manifest(job.state, files, [entry for rank in ranks for entry in rank["entries"]], mesh)
    disk.write(job.files.folder / MANIFEST, [manifest.encode()])
    disk.sync(job.files.folder, "manifest")
    disk.rename(job.files.folder, job.folder)
    disk.sync(job.folder.parent, f"rename {job.folder.name}")  # until then its name may be lost, and it is not announced


def _partial(folder: Path) -> Path:
    return folder.with_name(folder.name + PARTIAL)


def _attempt(work: Callable[[], Any]) -> Exception | None:
    """What a rank cannot do alone must be told to the others, or they wait in the next collective."""
    try:
        work()
    except Exception as error:
        return error
    return None


def _said(error: BaseException | None) -> str:
    """One line of it: its sentence, with its type where it is none of ours or the system's."""
    if error is None:
        return ""
    text = " ".join(str(error).split())
    return text if isinstance(error, OSError | ValueError) and text else f"{type(error).__name__}: {text}"

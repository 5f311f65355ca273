"""The folder of a run's checkpoints: `step-00000100`, `step-00000200`, `latest`, and what a killed save left under `.tmp` names.

A checkpoint is one when it has its name; `latest` tells people and tools which is the last that was written.
"""

from __future__ import annotations

import fcntl
import re
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import TracebackType

from megapar.training.checkpoint.disk import Disk

LATEST = "latest"
PARTIAL = ".tmp"


def step_name(step: int) -> str:
    """The name of a step's checkpoint."""
    return f"step-{step:08d}"


def step_of(checkpoint: Path) -> int:
    """The N of `step-N`; -1 for another name."""
    found = re.fullmatch(r"step-(\d+)", checkpoint.name)
    return int(found[1]) if found else -1


def checkpoints(folder: Path) -> list[Path]:
    """The complete checkpoints in `folder`, by step."""
    return sorted((path for path in (folder.iterdir() if folder.is_dir() else ()) if step_of(path) >= 0), key=step_of)


def newest_checkpoint(folder: Path) -> Path | None:
    """The complete checkpoint `step-N` with the largest N in `folder`."""
    found = checkpoints(folder)
    return found[-1] if found else None


def remove_partial(folder: Path) -> None:
    """Removes what saves that were killed left behind. Nobody else may be writing there: see `lock`."""
    for path in folder.iterdir() if folder.is_dir() else ():
        if path.name.endswith(PARTIAL):
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def point_latest(checkpoint: Path, disk: Disk) -> None:
    """Makes `latest` name the checkpoint."""
    partial = checkpoint.parent / (LATEST + PARTIAL)
    partial.unlink(missing_ok=True)
    disk.write(partial, [f"{checkpoint.name}\n".encode()])
    disk.rename(partial, checkpoint.parent / LATEST)
    disk.sync(checkpoint.parent, "rename latest")


def superfluous(steps: Iterable[int], newest: int, keep_last: int | None, keep_every: int | None) -> list[int]:
    """The steps that are neither among the last `keep_last`, nor multiples of `keep_every`, nor the one that was just saved."""
    found = sorted(steps)
    old = found[: max(0, len(found) - keep_last)] if keep_last is not None else []
    return [step for step in old if step != newest and (keep_every is None or step % keep_every)]


def remove_checkpoints(gone: Sequence[Path], disk: Disk) -> None:
    """They lose their names first: what is half removed must not be taken for whole."""
    nameless = [path.with_name(f"{path.name}.old{PARTIAL}") for path in gone]
    for path, other in zip(gone, nameless, strict=True):
        disk.rename(path, other)
    if gone:
        disk.sync(gone[0].parent, "renaming old ones")
    for path in nameless:
        disk.remove(path)


class Lock:
    """Held until it is closed or the process ends, however it ends."""

    def __init__(self, out: Path) -> None:
        out.mkdir(parents=True, exist_ok=True)
        self._file = open(out / "lock", "a")  # noqa: SIM115
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._file.close()
            raise ValueError(f"another run writes to {out}: wait for its end, or give another --out") from error

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> Lock:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def lock(out: Path) -> Lock:
    """Takes a run's folder for this process. Raises ValueError, naming it, while another process has it."""
    return Lock(out)

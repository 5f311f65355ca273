"""What a save does to the disk, each thing between two points that a test can stop at: `before rename step-00000002.tmp`, `after ...`.

What was done is durable when its function returns, but for renames and removals, which are when their folder is synced.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path


class Disk:
    """on_point: called with the name of each point, in the thread that comes to it."""

    def __init__(self, on_point: Callable[[str], None] | None = None) -> None:
        self._on_point = on_point

    @contextmanager
    def step(self, what: str) -> Iterator[None]:
        if self._on_point is not None:
            self._on_point(f"before {what}")
        yield
        if self._on_point is not None:
            self._on_point(f"after {what}")

    def make_folder(self, folder: Path) -> None:
        """With its parents; it may be there, another rank makes it too."""
        if not folder.parent.is_dir():
            self.make_folder(folder.parent)
        with self.step(f"mkdir {folder.name}"):
            folder.mkdir(exist_ok=True)
        self.sync(folder.parent, f"mkdir {folder.name}")

    def write(self, path: Path, parts: Iterable[memoryview | bytes]) -> None:
        """A new file. Its name is durable when its folder is synced."""
        with self.step(f"open {path.name}"):
            file = open(path, "xb")  # noqa: SIM115
        with file:
            with self.step(f"write {path.name}"):
                for part in parts:
                    file.write(part)
            with self.step(f"fsync {path.name}"):
                # What Python still buffers the system cannot sync.
                file.flush()
                os.fsync(file.fileno())

    def sync(self, folder: Path, why: str) -> None:
        """Makes the names in a folder durable."""
        with self.step(f"fsync of {folder.name} after {why}"):
            descriptor = os.open(folder, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)

    def rename(self, source: Path, target: Path) -> None:
        with self.step(f"rename {source.name}"):
            os.replace(source, target)

    def remove(self, folder: Path) -> None:
        with self.step(f"remove {folder.name}"):
            shutil.rmtree(folder)
